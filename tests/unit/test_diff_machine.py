"""The diff protocol between two forests driven at random: two round trips, exactly the entries that differ."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from consul_backend.merkle import Forest, bucket_of, entry_digest
from sidecar.replication import diff as diffing
from sidecar.replication import protocol as wire
from sidecar.replication.diff import SyncPlan, compare, diff_request, differing_entries, dropped_keys, range_of
from sidecar.replication.modes import DR
from sidecar.replication.shipped import Shipped

PARTITIONS = ["r/p", "l/q", "r/ü"]
sides = st.booleans()


def test_a_partition_is_divided_until_a_range_holds_so_many():
    found = [diffing.depth_for(entries, 16, 5) for entries in (0, 1, 16, 17, 32, 33, 64, 65, 10**6)]
    assert found == [0, 0, 0, 1, 1, 2, 2, 3, 5]


def test_both_ends_of_any_version_compute_the_same_fingerprints():
    forest = Forest()
    for number in range(600):
        forest.change("r", "p", f"k{number}", entry_digest(f"r/p/k{number}", b"v"))
    shipped = Shipped(forest, DR.classes)
    found = [diffing.fingerprint(b"s" * 16, shipped, diffing.Range("r/p", depth, 1)).hex() for depth in (1, 8, 9)]
    assert found == ["c03d86e80f7a8415", "e66338d525c0214f", "d946b68e46ee23fe"], (
        "of several pages, one, and half of one"
    )


class DiffMachine(RuleBasedStateMachine):
    """``primary`` and ``secondary`` are the oracles: digests by logical key."""

    def __init__(self) -> None:
        super().__init__()
        self.primary: dict[str, bytes] = {}
        self.secondary: dict[str, bytes] = {}
        self.forests = {True: Forest(), False: Forest()}
        self.shipped = {side: Shipped(forest, DR.classes) for side, forest in self.forests.items()}
        self.syncs = 0

    @rule(
        side=sides,
        partition=st.sampled_from(PARTITIONS),
        n=st.integers(0, 400),
        digest=st.binary(min_size=20, max_size=20),
    )
    def put(self, side: bool, partition: str, n: int, digest: bytes) -> None:
        self._change(side, f"{partition}/k{n}", digest)

    @rule(side=sides, partition=st.sampled_from(PARTITIONS), n=st.integers(0, 400))
    def delete(self, side: bool, partition: str, n: int) -> None:
        self._change(side, f"{partition}/k{n}", None)

    @rule(partition=st.sampled_from(PARTITIONS), seed=st.integers(0, 99), count=st.integers(1, 400))
    def fill_both(self, partition: str, seed: int, count: int) -> None:
        dice = random.Random(seed)
        for n in dice.sample(range(401), count):
            digest = dice.randbytes(20)
            self._change(True, f"{partition}/k{n}", digest)
            self._change(False, f"{partition}/k{n}", digest)

    @rule(side=sides, partition=st.sampled_from(PARTITIONS))
    def empty(self, side: bool, partition: str) -> None:
        for key in [key for key in (self.primary if side else self.secondary) if key.startswith(f"{partition}/")]:
            self._change(side, key, None)

    @rule(fingerprints=st.sampled_from([0, 40, 10**6]), bytes_max=st.sampled_from([200, 10**6]))
    def sync(self, fingerprints: int, bytes_max: int) -> None:
        """Both round trips; what comes is exactly what differs, and afterwards nothing does."""
        self.syncs += 1
        salt = self.syncs.to_bytes(16, "big")
        request = wire.decode_diff_request(
            wire.encode(next(item for item in diff_request(self.shipped[False], salt) if item is not None))
        )
        found = diffing.Differences(fingerprints_left=fingerprints)
        for _ in compare(self.shipped[True], request, found):
            pass
        sent = sum(len(cells.fingerprints) for cells in found.cells.values()) // wire.FINGERPRINT_BYTES
        assert sent <= fingerprints
        reply = wire.decode_diff_reply(
            wire.encode(
                wire.DiffReply("c", "s", "g", 1, "e", 1, bytes(32), False, found.whole, found.gone, found.cells, {})
            )
        )
        plan = SyncPlan.of(request, reply, self.shipped[False])
        puts: dict[str, bytes] = {}
        drops = {key for keys in plan.deletions(self.shipped[False]) for key in keys}
        fetches = list(plan.requests(self.shipped[False], bytes_max))
        assert len(fetches) == 1 or bytes_max == 200, "one request holds it, so two round trips are enough"
        for names, extents in fetches:
            assert len(extents) <= 1 or sum(16 + len(extent.ids) for extent in extents) <= bytes_max
            fetch = wire.FetchRequest(1, bytes(32), True, salt, names, extents)
            for number, extent in enumerate(extents):
                part = range_of(fetch, extent)
                wanted, extra = differing_entries(self.shipped[True], salt, part, extent.ids)
                puts |= {f"{part.partition}/{path}": self.primary[f"{part.partition}/{path}"] for path in wanted}
                drops |= set(dropped_keys(self.shipped[False], fetch, wire.Entries([], [(number, extra)], number)))
        differing = {key for key, digest in self.primary.items() if self.secondary.get(key) != digest}
        assert set(puts) == differing
        assert drops - set(puts) == set(self.secondary) - set(self.primary)
        for key in drops - set(puts):
            self._change(False, key, None)
        for key, digest in puts.items():
            self._change(False, key, digest)
        assert self.secondary == self.primary
        assert self.shipped[True].root() == self.shipped[False].root()

    @invariant()
    def roots_differ_exactly_when_the_entries_do(self) -> None:
        same = self.shipped[True].root() == self.shipped[False].root()
        assert same == (self.primary == self.secondary)

    def _change(self, side: bool, key: str, digest: bytes | None) -> None:
        held = self.primary if side else self.secondary
        held.pop(key, None)
        if digest is not None:
            held[key] = digest
        self.forests[side].apply([(key, digest)])


TestDiffMachine = DiffMachine.TestCase
TestDiffMachine.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize("count", [300, 3_000, 6_000, 9_000, 40_000])
def test_ranges_smaller_than_a_page_and_as_large(count: int) -> None:
    """Where groups and cells are pages, parts of pages, and single subpages."""
    machine = DiffMachine()
    dice = random.Random(count)
    for n in range(count):
        machine.primary[f"r/p/k{n}"] = machine.secondary[f"r/p/k{n}"] = n.to_bytes(20, "big")
    for side in (True, False):
        machine.forests[side].apply(machine.primary.items())
    for n in dice.sample(range(count), 12):
        machine._change(dice.random() < 0.5, f"r/p/k{n}", dice.choice([None, dice.randbytes(20)]))
        machine._change(dice.random() < 0.5, f"r/p/new{n}", dice.randbytes(20))
    machine.sync(10**6, 10**6)


@pytest.mark.parametrize("there", [1, 20, 40, 300])
@pytest.mark.parametrize("here", [1, 300, 600, 5_000])
def test_sides_of_any_two_sizes(here: int, there: int) -> None:
    """The secondary says how finely groups are divided, the primary how finely cells are: not at all, once, or more."""
    machine = DiffMachine()
    machine.secondary = {f"r/p/k{n}": n.to_bytes(20, "big") for n in range(here)}
    machine.primary = {f"r/p/k{n}": (n + n % 2).to_bytes(20, "big") for n in range(there)}
    machine.forests[False].apply(machine.secondary.items())
    machine.forests[True].apply(machine.primary.items())
    machine.sync(10**6, 10**6)


@pytest.mark.parametrize("depth", [0, 1, 2, 7, 8, 9, 12, 16])
def test_the_ranges_of_any_depth_divide_a_partition(depth: int) -> None:
    forest = Forest()
    forest.apply((f"r/p/k{n}", n.to_bytes(20, "big")) for n in range(3_000))
    shipped = Shipped(forest, DR.classes)
    found = []
    for prefix in range(1 << depth):
        part = diffing.Range("r/p", depth, prefix)
        entries = diffing.entries_in(shipped, part)
        assert {bucket_of(path) >> (16 - depth) for path, _ in entries} <= {prefix}
        found += entries
    assert sorted(found) == sorted((f"k{n}", n.to_bytes(20, "big")) for n in range(3_000))


def test_the_range_of_the_keyring_is_asked_for_first_and_no_other() -> None:
    reply = wire.DiffReply(
        "c", "s", "g", 1, "e", 1, bytes(32), False, ["r/a", "r/core"], [], {}, {}, {"r/core": 1024 << 16}
    )
    plan = SyncPlan.of(wire.DiffRequest(bytes(16), bytes(20), {}), reply, Shipped(Forest(), DR.classes))
    whole = [diffing.Range("r/a"), *(diffing.Range("r/core", 16, bucket) for bucket in range(1 << 16))]
    keyring = diffing.Range("r/core", 16, bucket_of("keyring"))
    assert plan.ranges == (keyring, *(part for part in whole if part != keyring))


def test_a_keyring_comes_first_in_its_range() -> None:
    forest = Forest()
    forest.apply(
        (f"r/{partition}/{name}", bytes(20)) for partition in ("core", "p") for name in ["keyring", *"abcdefg"]
    )
    shipped = Shipped(forest, DR.classes)
    core, other = [diffing.entries_in(shipped, diffing.Range(partition)) for partition in ("r/core", "r/p")]
    assert other[0][0] != "keyring"
    assert core == [("keyring", bytes(20)), *(entry for entry in other if entry[0] != "keyring")]


def differences(ours: Forest, theirs: Forest, fingerprints: int) -> diffing.Differences:
    request = next(item for item in diff_request(Shipped(theirs, DR.classes), bytes(16)) if item is not None)
    found = diffing.Differences(fingerprints_left=fingerprints)
    for _ in compare(Shipped(ours, DR.classes), request, found):
        pass
    return found


def test_the_fingerprints_of_all_partitions_come_out_of_one_budget() -> None:
    ours, theirs = Forest(), Forest()
    for forest, value in ((ours, b"new"), (theirs, b"old")):
        for partition in "pq":
            for n in range(600):
                forest.change("r", partition, f"k{n}", entry_digest(f"r/{partition}/k{n}", value))
    whole = differences(ours, theirs, 10**6)
    sent = {name: len(cells.fingerprints) // wire.FINGERPRINT_BYTES for name, cells in whole.cells.items()}
    assert min(sent["r/p"], sent["r/q"]) > 0
    assert whole.fingerprints_left == 10**6 - sum(sent.values())
    exact = differences(ours, theirs, sum(sent.values()))
    assert (exact.cells, exact.fingerprints_left) == (whole.cells, 0)
    short = differences(ours, theirs, sum(sent.values()) - 1)
    assert short.cells["r/p"] == whole.cells["r/p"]
    assert short.cells["r/q"].fingerprints == b"", "one too few: its groups are asked for as they are"


@pytest.mark.parametrize("named", [{"gone": ["c/core"]}, {"whole": ["c/core"]}])
def test_a_plan_refuses_partitions_that_do_not_travel(named: dict[str, list[str]]) -> None:
    """A deletion could follow from it."""
    lists = {"whole": [], "gone": []} | named
    reply = wire.DiffReply("c", "s", "g", 1, "e", 1, bytes(32), False, lists["whole"], lists["gone"], {}, {})
    with pytest.raises(wire.ProtocolViolation):
        SyncPlan.of(wire.DiffRequest(bytes(16), bytes(20), {}), reply, Shipped(Forest(), DR.classes))
