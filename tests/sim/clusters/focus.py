"""Plans that dwell on one kind of trouble, so that a planted bug is caught within few seeds. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sidecar.replication.sync import Staging
from tests.sim.clusters.plan import CALM_S, Event, SetPlan, make_plan

DURATION_S = 8.0


@dataclass(frozen=True, slots=True)
class SetFocus:
    """One of ``topologies``; ``kinds`` of acts, one every ``every_s`` seconds and lasting up to ``for_s``, or the acts
    of a ``script``; fields of the plan, of its replication and of its store to be so and not otherwise; ``tampering``
    per frame of the log."""

    topologies: tuple[str, ...] = ("performance",)
    kinds: tuple[str, ...] = ()
    script: tuple[Event, ...] = ()
    every_s: float = 1.5
    for_s: float = 2.0
    plan: Mapping[str, Any] = field(default_factory=dict)
    replication: Mapping[str, Any] = field(default_factory=dict)
    store: Mapping[str, Any] = field(default_factory=dict)
    tampering: Mapping[str, float] = field(default_factory=dict)
    delay_s: float = 0.01


def focused(seed: int, focus: SetFocus) -> SetPlan:
    """The seed's plan with the focus laid over it."""
    plan = make_plan(seed)
    rnd = random.Random(f"set focus {seed}")
    topology = rnd.choice(focus.topologies)
    plan = replace(plan, topology=topology)
    events = []
    at_s = CALM_S
    while focus.kinds and (at_s := at_s + rnd.expovariate(1 / focus.every_s)) < CALM_S + DURATION_S:
        one, other = rnd.sample(range(len(plan.names)), 2)
        events.append(Event(at_s, rnd.choice(focus.kinds), one, other, focus.for_s * rnd.random()))
    far = {"wal_keep_records": 4096, "wal_keep_bytes": 1 << 28} if focus.delay_s >= 0.1 else {}
    fields = {"think_s": 0.05, "clients": 1, "large_share": 0.0, "keys": 12, "faults": {}, "usual_s": 0.003}
    fields["sessions"] = 0
    return replace(
        plan,
        events=focus.script or tuple(events),
        duration_s=DURATION_S,
        store=replace(plan.store, **{**far, **focus.store}),
        replication=replace(plan.replication, **{"window_records": 64, **focus.replication}),
        link=replace(plan.link, delay_s=focus.delay_s, tampering=dict(focus.tampering)),
        **{**fields, **focus.plan},
    )


LOSSY = ("reset-links", "cut-link", "kill")
SHORT_LOG = {"wal_keep_records": 4, "wal_keep_bytes": 2_000, "segment_records": 2, "collect_interval_s": 0.2}
SMALL_STAGING = {"staging": Staging(entries_max=4, bytes_max=4_000)}

CALM = SetFocus()
STREAMING = SetFocus(kinds=LOSSY)
MERGING = SetFocus(kinds=("cut-link", "pause"), plan={"keys": 4, "think_s": 0.02}, for_s=1.0)
DAMAGED = SetFocus(tampering={"drop": 0.05, "duplicate": 0.05, "swap": 0.05})
SYNCING = SetFocus(kinds=("repoint", "force-promote"), every_s=2.0, plan={"think_s": 0.02, "keys": 40}, delay_s=0.1)
RESYNCING = SetFocus(
    kinds=("repoint", "force-promote"),
    every_s=1.5,
    plan={"read_share": 0.7, "think_s": 0.02, "keys": 40},
    replication=SMALL_STAGING,
)
PARTING = SetFocus(kinds=("force-promote", "cut-link"), every_s=2.0, for_s=3.0)
PARTING_LARGE = SetFocus(kinds=("force-promote", "cut-link"), every_s=2.0, for_s=3.0, plan={"large_share": 0.2})
FILLED_AND_PARTED = SetFocus(
    ("two performance",),
    script=(
        Event(1.5, "cut-link", 0, 1, 7.0),  # b stays behind
        Event(2.0, "filter", 2, 0, 0.0),
        Event(2.6, "filter", 2, 0, 0.0),  # c has to be filled again, in pieces
        Event(5.0, "force-promote", 1, 0, 0.0),
    ),
    replication=SMALL_STAGING,
    plan={"keys": 40},
)
FORECASTING = SetFocus(
    kinds=("force-promote",),
    every_s=3.0,
    plan={"think_s": 0.02},
    replication={"beat_s": 0.25, "window_records": 2},
    delay_s=0.1,
)
FORECASTING_CUT = SetFocus(kinds=("cut-link", "cut-link", "force-promote"), every_s=0.8, for_s=5.0)
FORECASTING_FILL = SetFocus(
    kinds=("filter", "filter", "cut-link", "cut-link", "cut-link", "force-promote"), every_s=0.3, for_s=1.0, delay_s=0.1
)
CROWDED = SetFocus(kinds=("switch-over",), every_s=1.5, plan={"clients": 2, "think_s": 0.01, "usual_s": 0.01})
CHAINED = SetFocus(("chain",), ("switch-over",), every_s=2.0, plan={"clients": 2, "think_s": 0.02, "usual_s": 0.005})
FORWARDING = SetFocus(plan={"think_s": 0.02, "keys": 6}, delay_s=0.05)
FORWARDING_LOSSY = SetFocus(
    kinds=("reset-links",), every_s=0.3, plan={"think_s": 0.02, "usual_s": 0.02, "read_share": 0.0}, delay_s=0.05
)
REVOKING = SetFocus(("performance", "dr"), ("revoke",), every_s=2.0, plan={"think_s": 0.02})
NARROW = SetFocus(
    kinds=("slow-link",), replication={"window_records": 2}, plan={"think_s": 0.02, "large_share": 0.0}, delay_s=0.05
)
FILTERED = SetFocus(kinds=("filter", "force-promote"), every_s=1.5)
