"""Plans that dwell on one kind of trouble, so that a planted bug is caught within few seeds. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tests.sim.plan import CALM_S, Event, Plan, make_plan

DURATION_S = 20.0


@dataclass(frozen=True, slots=True)
class Focus:
    """``kinds`` of acts, one every ``every_s`` seconds and lasting up to ``for_s``; ``faults`` per call; fields of the
    plan and of its store options to be so and not otherwise."""

    kinds: tuple[str, ...] = ("kill", "pause", "cut", "step-down")
    every_s: float = 3.0
    for_s: float = 5.0
    faults: Mapping[str, float] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    store: Mapping[str, Any] = field(default_factory=dict)


def focused(seed: int, focus: Focus) -> Plan:
    """The seed's plan with the focus laid over it."""
    plan = make_plan(seed)
    rnd = random.Random(f"focus {seed}")
    events = []
    at_s = CALM_S
    while focus.kinds and (at_s := at_s + rnd.expovariate(1 / focus.every_s)) < CALM_S + DURATION_S:
        node = -1 if rnd.random() < 0.8 else rnd.randrange(plan.nodes)
        events.append(Event(at_s, rnd.choice(focus.kinds), node, focus.for_s * rnd.random()))
    store = {"resolve_timeout_s": 5.0, "queue_batches_max": 4096, **focus.store}
    fields = {"clients": 4, "think_s": 0.05, "usual_s": 0.003, "late_s_max": 3.0, "large_share": 0.0}
    fields |= {"snapshot_at_s": None, **focus.plan}
    return replace(
        plan,
        events=tuple(events),
        faults=dict(focus.faults),
        duration_s=DURATION_S,
        store=replace(plan.store, **store),
        **fields,
    )


SMALL_LOG = {
    "wal_keep_records": 4,
    "wal_keep_bytes": 2_000,
    "segment_records": 2,
    "flush_interval_s": 0.05,
    "flush_extents_per_s": 1000.0,
    "collect_interval_s": 0.05,
    "index_eager_keys": 10_000,
}
EAGER = {"index_eager_keys": 10_000}

ANY = Focus()
CALM = Focus(kinds=(), store=EAGER)
CALM_COLLECTING = Focus(kinds=(), store=SMALL_LOG)
RESTORED = Focus(kinds=("step-down",), plan={"snapshot_at_s": CALM_S + 0.7 * DURATION_S}, every_s=5.0)
RESTORED_QUIET = Focus(
    kinds=(),
    plan={"snapshot_at_s": CALM_S + 0.9 * DURATION_S, "quiet_after_restore": True},
    store={**EAGER, "flush_interval_s": 5.0},
)
FOREIGN = Focus(
    kinds=("foreign-write",), every_s=4.0, plan={"read_share": 0.8, "keys": 4}, store={"cache_bytes_max": 0}
)
CHECKING = Focus(kinds=("reindex",), every_s=0.5, plan={"clients": 6, "think_s": 0.02, "usual_s": 0.02})
CHECKING_LOST = Focus(
    kinds=("reindex",),
    every_s=0.3,
    faults={"answer:reset": 0.1},
    plan={"think_s": 0.02},
    store={**EAGER, "flush_interval_s": 0.05, "flush_extents_per_s": 1000.0},
)
CHECKING_DEPOSED = Focus(
    kinds=("reindex", "cut-and-depose", "pause-and-depose"), every_s=0.7, for_s=4.0, plan={"usual_s": 0.02, "keys": 60}
)
LATE = Focus(faults={"request:late": 0.01, "request:duplicated": 0.02, "answer:reset": 0.01})
LATE_AND_COLLECTED = replace(LATE, faults={"request:duplicated": 0.1}, store=SMALL_LOG, kinds=("step-down",))
LOST = Focus(faults={"answer:reset": 0.03, "request:late": 0.01}, kinds=("step-down", "kill"))
UNRESOLVED = Focus(
    kinds=("cut", "step-down"),
    every_s=4.0,
    for_s=2.0,
    faults={"request:reset": 0.35, "request:refused": 0.25},
    store={"resolve_timeout_s": 0.5},
)
LOST_AND_DEPOSED = Focus(
    kinds=("destroy-session",),
    every_s=0.7,
    faults={"answer:reset": 0.3},
    plan={"clients": 6, "think_s": 0.02, "read_share": 0.2},
)
DEPOSED = Focus(kinds=("pause", "cut", "destroy-session"), every_s=1.5, for_s=8.0, store=SMALL_LOG)
LEASE = Focus(
    kinds=("cut-and-depose",),
    every_s=2.5,
    plan={"clients": 6, "think_s": 0.02, "keys": 4, "read_share": 0.8, "patience_s": 0.5},
    store={"cache_bytes_max": 1 << 20},
)
LEASE_LATE = replace(LEASE, kinds=("pause-and-depose",), plan={**LEASE.plan, "usual_s": 0.02, "patience_s": 0.5})
ACQUIRE = Focus(kinds=("step-down",), every_s=2.0, faults={"request:late": 0.5}, plan={"late_s_max": 0.2}, store=EAGER)
STALE = Focus(
    kinds=("leader-change", "destroy-session"),
    every_s=1.0,
    for_s=4.0,
    plan={"stale_share": 0.9, "keys": 20, "read_share": 0.8, "think_s": 0.02},
)
RECOVERY = Focus(kinds=("kill", "step-down"), every_s=1.5, for_s=1.0, store=EAGER)
PARTIAL_FLUSH = replace(
    RECOVERY, plan={"keys": 60}, store={**EAGER, "flush_interval_s": 0.3, "flush_extents_per_s": 4.0}
)
LAZY = replace(RECOVERY, plan={"keys": 60, "marker_share": 0.5}, store={"index_eager_keys": 0, "flush_interval_s": 1.0})
LAZY_DEPOSED = Focus(
    kinds=("cut-and-depose", "pause-and-depose"),
    every_s=0.8,
    for_s=4.0,
    plan={"keys": 60, "usual_s": 0.02, "marker_share": 0.5},
    store={"index_eager_keys": 0, "flush_interval_s": 0.05, "flush_extents_per_s": 1000.0},
)
COLLECTING = Focus(kinds=("kill", "pause"), every_s=2.0, for_s=1.0, store=SMALL_LOG)
SLOW_RECOVERY = Focus(
    kinds=("cut-and-depose", "step-down"),
    every_s=1.0,
    for_s=8.0,
    plan={"usual_s": 0.02},
    store=SMALL_LOG,
)
READING = Focus(plan={"read_share": 0.8, "keys": 4, "think_s": 0.02}, kinds=("step-down",))
CROWD = Focus(plan={"clients": 6, "think_s": 0.005, "read_share": 0.2, "usual_s": 0.02}, kinds=("step-down",))
LARGE = Focus(
    kinds=("kill", "pause"),
    every_s=1.5,
    for_s=1.0,
    plan={"large_share": 0.1, "usual_s": 0.02, "keys": 20},
    store=EAGER,
)
