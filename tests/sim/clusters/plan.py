"""What one seed of a replication set does: who follows whom, the links, the acts of nemesis and operator. All of it is
drawn here, before the world starts."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from consul_backend.allowance import DeleteAllowance
from consul_backend.election import ElectionOptions
from consul_backend.limits import BODY_BYTES_MIN, Limits
from consul_backend.replicated import StoreOptions
from sidecar.replication.sync import Staging
from sidecar.replication.wiring import ReplicationOptions

CALM_S = 1.0
DURATIONS_S = (4.0, 6.0, 8.0, 12.0)

TAMPERING = ("flip", "forge", "drop", "duplicate", "swap")
"""Damage to frames of the log on their way: what TLS would never let pass, so the codec and the chain have to."""

EVENTS = (
    # nodes
    *("pause", "kill", "step-down", "cut-store"),
    # links
    *("cut-link", "cut-one-way", "slow-link", "reset-links"),
    # operators
    *("force-promote", "switch-over", "revoke", "repoint", "recover", "filter", "keyring"),
    *("restart-sync", "detach"),
)
"""Every act. Those of operators are done by :mod:`tests.sim.clusters.operators`, the others by the world."""


@dataclass(frozen=True, slots=True)
class Follow:
    """``who`` begins as a secondary of ``source`` in ``mode``."""

    who: str
    source: str
    mode: str


TOPOLOGIES: dict[str, tuple[Follow, ...]] = {
    "performance": (Follow("b", "a", "performance"),),
    "dr": (Follow("b", "a", "dr"),),
    "two performance": (Follow("b", "a", "performance"), Follow("c", "a", "performance")),
    "two dr": (Follow("b", "a", "dr"), Follow("c", "a", "dr")),
    "both": (Follow("b", "a", "performance"), Follow("c", "a", "dr")),
    "chain": (Follow("b", "a", "performance"), Follow("c", "b", "dr")),
}

SESSIONS = 3
"""In every other plan whose topology has performance replication: elsewhere another cluster's index means nothing."""


@dataclass(frozen=True, slots=True)
class Event:
    """One act. ``cluster`` is the victim by place in the world, ``other`` a second one where two are needed."""

    at_s: float
    what: str
    cluster: int
    other: int
    for_s: float


@dataclass(frozen=True, slots=True)
class LinkPlan:
    """``delay_s`` is the mean of one way; ``tampering`` the chance of each kind of damage per frame of the log."""

    delay_s: float
    tampering: dict[str, float]


@dataclass(frozen=True, slots=True)
class SetPlan:
    """One seed's world."""

    seed: int
    topology: str
    nodes: int
    clients: int
    think_s: float
    keys: int
    value_bytes: int
    delete_share: float
    large_share: float
    read_share: float
    duration_s: float
    shuffle: bool
    usual_s: float
    faults: dict[str, float]
    limits: Limits
    store: StoreOptions
    election: ElectionOptions
    replication: ReplicationOptions
    link: LinkPlan
    events: tuple[Event, ...]
    sessions: int = 0
    skipped: frozenset[int] = frozenset()
    muted: frozenset[str] = field(default_factory=frozenset)

    @property
    def follows(self) -> tuple[Follow, ...]:
        """Who follows whom when it begins."""
        return TOPOLOGIES[self.topology]

    @property
    def names(self) -> tuple[str, ...]:
        """The clusters; the first is everybody's first primary."""
        return ("a", *(follow.who for follow in self.follows))

    def describe(self) -> str:
        """For a person who looks at a failing seed."""
        lines = [
            f"cluster seed {self.seed}: {self.topology}, {self.nodes} nodes each, {self.clients} clients per cluster,"
            f" {self.sessions} sessions, {self.keys} keys, think {self.think_s:.3f} s, shuffle {self.shuffle}",
            f"  link: {self.link.delay_s * 1000:.1f} ms one way, damage per frame {self.link.tampering}",
            f"  faults per call of a store: { {name: round(p, 4) for name, p in self.faults.items()} }",
            f"  limits: {self.limits}",
            f"  store: {self.store}",
            f"  replication: {self.replication}",
        ]
        for number, event in enumerate(self.events):
            skipped = " (skipped)" if number in self.skipped else ""
            who = f"{self.names[event.cluster]}, {self.names[event.other]}"
            lines.append(f"  {event.at_s:7.3f} s #{number}: {event.what} ({who}) for {event.for_s:.2f} s{skipped}")
        return "\n".join(lines)


def make_plan(seed: int) -> SetPlan:
    """The plan of a seed."""
    rnd = random.Random(f"set plan {seed}")
    topology = rnd.choice(list(TOPOLOGIES))
    duration_s = rnd.choice(DURATIONS_S)
    limits = Limits(
        ops_max=rnd.choice((12, 64, 128)), body_bytes_max=rnd.choice((BODY_BYTES_MIN, BODY_BYTES_MIN, 524_288))
    )
    delay_s = rnd.choice((0.001, 0.01, 0.15))
    kinds = [kind for kind in TAMPERING if rnd.random() < 0.4]
    damage = rnd.choice((0.0, 0.0, 0.01, 0.05))
    faults = {"answer:reset": rnd.choice((0.0, 0.0, 0.01)), "request:late": rnd.choice((0.0, 0.0, 0.005))}
    return SetPlan(
        seed=seed,
        topology=topology,
        nodes=rnd.choice((1, 1, 2)),
        clients=rnd.choice((1, 2)),
        think_s=rnd.choice((0.05, 0.1, 0.25)),
        keys=rnd.choice((4, 20, 60)),
        value_bytes=rnd.choice((0, 40, 1_000)),
        delete_share=rnd.choice((0.0, 0.2, 0.5)),
        large_share=rnd.choice((0.0, 0.0, 0.02, 0.1)),
        read_share=rnd.choice((0.1, 0.4)),
        duration_s=duration_s,
        shuffle=rnd.random() < 0.7,
        usual_s=rnd.choice((0.001, 0.005)),
        faults={name: chance for name, chance in faults.items() if chance},
        limits=limits,
        store=_store(rnd, far=delay_s > 0.1),
        election=ElectionOptions(step_down_grace_s=rnd.choice((0.0, 0.5)), watch_wait_s=2.0),
        replication=_replication(rnd, limits, far=delay_s > 0.1),
        link=LinkPlan(delay_s, dict.fromkeys(kinds, damage) if damage else {}),
        events=_events(rnd, len(TOPOLOGIES[topology]) + 1, duration_s),
        sessions=SESSIONS if seed % 2 == 0 and any(it.mode == "performance" for it in TOPOLOGIES[topology]) else 0,
    )


def _store(rnd: random.Random, *, far: bool) -> StoreOptions:
    return StoreOptions(
        cache_bytes_max=rnd.choice((0, 1 << 20)),
        ring_records_max=rnd.choice((4, 4096)),
        # Over a far link a log of a few records is shorter than any sync takes.
        wal_keep_records=4096 if far else rnd.choice((4, 16, 4096, 4096)),
        wal_keep_bytes=1 << 28 if far else rnd.choice((2_000, 1 << 28, 1 << 28)),
        segment_records=rnd.choice((2, 8, 32)),
        flush_interval_s=rnd.choice((0.3, 1.0, 5.0)),
        collect_interval_s=rnd.choice((0.2, 1.0)),
        index_eager_keys=rnd.choice((0, 10_000, 10_000)),
        resolve_timeout_s=rnd.choice((2.0, 5.0)),
    )


def _replication(rnd: random.Random, limits: Limits, *, far: bool) -> ReplicationOptions:
    return ReplicationOptions(
        beat_s=rnd.choice((0.25, 1.0)),
        silent_beats_max=3,
        wal_wait_s=rnd.choice((0.2, 2.0)),
        forward_timeout_s=4.0,
        activation_timeout_s=3.0,
        reconnect_min_s=0.1,
        reconnect_max_s=1.0,
        connect_timeout_s=1.0,
        probe_timeout_s=0.5,
        demote_drain_s=rnd.choice((0.2, 2.0)),
        certificate_check_s=3600.0,
        fetch_idle_timeout_s=3.0,
        window_records=1024 if far else rnd.choice((2, 16, 1024)),  # or it would take minutes to catch up
        window_bytes=4 * 1024 * 1024 if far else rnd.choice((2_000, 4 * 1024 * 1024)),
        limits=limits,
        allowance=DeleteAllowance(entries=1_000_000),  # what is deleted here was written here
        staging=rnd.choice((Staging(), Staging(), Staging(entries_max=4, bytes_max=4_000))),
    )


def _events(rnd: random.Random, clusters: int, duration_s: float) -> tuple[Event, ...]:
    kinds = [kind for kind in EVENTS if rnd.random() < 0.4] or ["cut-link"]
    events = []
    at_s = CALM_S
    mean_s = rnd.choice((0.7, 1.5, 3.0))
    while (at_s := at_s + rnd.expovariate(1 / mean_s)) < CALM_S + duration_s:
        cluster, other = rnd.sample(range(clusters), 2)
        events.append(Event(at_s, rnd.choice(kinds), cluster, other, rnd.choice((0.3, 1.0, 3.0, 6.0)) * rnd.random()))
    return tuple(events)
