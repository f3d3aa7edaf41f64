"""What one seed does: the size of the world, which faults are on and how strong (a *swarm*: no two seeds alike), and
when each event of the nemesis happens. Everything is drawn here, before the world starts."""

from __future__ import annotations

import random
from dataclasses import dataclass

from consul_backend.election import ElectionOptions
from consul_backend.limits import BODY_BYTES_MIN, Limits
from consul_backend.replicated import StoreOptions
from consul_backend.testing_faults import FAULTS

CALM_S = 1.0
"""Before the first fault: the floor of useful work is measured here."""

DURATIONS_S = (3.0, 4.0, 5.0, 6.0, 8.0, 12.0)
"""Of the time in which faults happen. Most seeds are short: as many faults a second, and more worlds a minute."""

LONG_S, LONG_SHARE = 45.0, 0.03
"""A few seeds go on for longer than anything waits."""

RESTORED_SHARE = 0.05
"""How many seeds end with an old snapshot of the store put back underneath."""

RATES_PER_S = (8.0, 20.0, 50.0, 120.0)
"""Operations a second that all clients together wish for."""

EVENTS = (
    "pause",
    "kill",
    "cut",
    "cut-refused",
    "clock",
    "destroy-session",
    "cut-and-depose",
    "pause-and-depose",
    "delete-lock",
    "step-down",
    "leader-change",
    "quorum-lost",
    "storm",
    "reindex",
    "foreign-write",
)


@dataclass(frozen=True, slots=True)
class Event:
    """One act of the nemesis. ``node`` is a node's number, or -1 for whoever leads then."""

    at_s: float
    what: str
    node: int
    for_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """One seed's world. ``faults`` are probabilities per call; ``usual_s`` is the mean latency of one direction. With
    ``snapshot_at_s`` the run ends with the store put back to what it was then, and perhaps nobody writes any more."""

    seed: int
    nodes: int
    clients: int
    keys: int
    think_s: float
    duration_s: float
    patience_s: float
    read_share: float
    marker_share: float
    large_share: float
    same_name: bool
    snapshot_at_s: float | None
    quiet_after_restore: bool
    shuffle: bool
    usual_s: float
    late_s_max: float
    stale_share: float
    faults: dict[str, float]
    limits: Limits
    store: StoreOptions
    election: ElectionOptions
    rates: tuple[float, ...]
    events: tuple[Event, ...]
    value_bytes: int
    skipped: frozenset[int] = frozenset()
    muted: frozenset[str] = frozenset()
    """Checkers that keep silent, to see whether another one speaks."""

    def describe(self) -> str:
        """For a person who looks at a failing seed."""
        lines = [
            f"seed {self.seed}: {self.nodes} nodes, {self.clients} clients, {self.keys} keys,"
            f" think {self.think_s:.3f} s, shuffle {self.shuffle}, same name {self.same_name}",
            f"  faults per call: { {name: round(p, 4) for name, p in self.faults.items()} }, late up to"
            f" {self.late_s_max:.1f} s",
            f"  limits: {self.limits}",
            f"  store: {self.store}",
            f"  snapshot put back at the end: {self.snapshot_at_s}",
            f"  clocks run at {[round(rate, 3) for rate in self.rates]}",
        ]
        for number, event in enumerate(self.events):
            who = "the leader" if event.node < 0 else f"node {event.node}"
            skipped = " (skipped)" if number in self.skipped else ""
            lines.append(f"  {event.at_s:7.3f} s #{number}: {event.what} {who} for {event.for_s:.2f} s{skipped}")
        return "\n".join(lines)


def make_plan(seed: int) -> Plan:
    """The plan of a seed."""
    rnd = random.Random(f"plan {seed}")
    nodes = rnd.choice((2, 2, 3))
    clients = rnd.choice((1, 2, 4, 6))
    duration_s = LONG_S if rnd.random() < LONG_SHARE else rnd.choice(DURATIONS_S)
    on = [name for name in FAULTS if rnd.random() < 0.5]
    strength = rnd.choice((0.0, 0.005, 0.02, 0.05, 0.1))
    faults = {name: strength * rnd.uniform(0.2, 1.0) / len(on) for name in on} if strength else {}
    store = StoreOptions(
        cache_bytes_max=rnd.choice((0, 2_000, 1 << 20)),
        queue_batches_max=rnd.choice((2, 16, 4096)),
        ring_records_max=rnd.choice((4, 4096)),
        wal_keep_records=rnd.choice((4, 16, 64, 4096)),
        wal_keep_bytes=rnd.choice((2_000, 1 << 28)),
        segment_records=rnd.choice((2, 4, 8, 32)),
        flush_interval_s=rnd.choice((0.05, 0.3, 1.0, 5.0)),
        flush_extents_per_s=rnd.choice((4.0, 64.0, 1000.0)),
        collect_interval_s=rnd.choice((0.05, 0.5, 5.0)),
        tip_interval_s=rnd.choice((0.1, 1.0)),
        index_eager_keys=rnd.choice((0, 10_000, 10_000)),
        resolve_timeout_s=rnd.choice((0.5, 5.0, 15.0)),
    )
    limits = Limits(
        ops_max=rnd.choice((6, 12, 64, 128)), body_bytes_max=rnd.choice((BODY_BYTES_MIN, BODY_BYTES_MIN, 524_288))
    )
    election = ElectionOptions(step_down_grace_s=rnd.choice((0.0, 1.0, 10.0)), watch_wait_s=rnd.choice((2.0, 10.0)))
    return Plan(
        seed=seed,
        nodes=nodes,
        clients=clients,
        keys=rnd.choice((1, 4, 20, 60)),
        think_s=clients / rnd.choice(RATES_PER_S),
        duration_s=duration_s,
        patience_s=rnd.choice((0.5, 5.0, 40.0)),
        read_share=rnd.choice((0.2, 0.5, 0.8)),
        marker_share=rnd.choice((0.1, 0.5)),
        large_share=rnd.choice((0.0, 0.0, 0.02, 0.1)),
        same_name=rnd.random() < 0.05,
        snapshot_at_s=rnd.uniform(0.0, CALM_S + duration_s) if rnd.random() < RESTORED_SHARE else None,
        quiet_after_restore=rnd.random() < 0.5,
        shuffle=rnd.random() < 0.7,
        usual_s=rnd.choice((0.0005, 0.003, 0.02)),
        late_s_max=rnd.choice((0.5, 3.0, 12.0)),
        stale_share=rnd.choice((0.0, 0.5, 0.9)),
        faults=faults,
        limits=limits,
        store=store,
        election=election,
        rates=tuple(rnd.uniform(0.95, 1.05) for _ in range(nodes)),
        events=_events(rnd, nodes, duration_s),
        value_bytes=rnd.choice((0, 40, 2_000)),
    )


def _events(rnd: random.Random, nodes: int, duration_s: float) -> tuple[Event, ...]:
    kinds = [kind for kind in EVENTS if rnd.random() < 0.4]
    if not kinds:
        return ()
    events = []
    at_s = CALM_S
    mean_s = rnd.choice((0.7, 1.5, 4.0))
    while (at_s := at_s + rnd.expovariate(1 / mean_s)) < CALM_S + duration_s:
        node = -1 if rnd.random() < 0.6 else rnd.randrange(nodes)
        events.append(Event(at_s, rnd.choice(kinds), node, rnd.choice((0.3, 1.0, 3.0, 6.0, 15.0)) * rnd.random()))
    return tuple(events)
