"""Merkle diff and sync between two stores in memory; the round trips are function calls."""

from __future__ import annotations

import random
import time

import pytest

from consul_backend.allowance import DeleteAllowance
from consul_backend.errors import FenceLost
from consul_backend.merkle import entry_digest
from consul_backend.position import Position
from consul_backend.wal import Write
from sidecar.replication import diff as diffing
from sidecar.replication import protocol as wire
from sidecar.replication.answers import answer_diff, answer_fetch
from sidecar.replication.channel import ChannelClosed
from sidecar.replication.committer import stored_position
from sidecar.replication.diff import Range, SyncPlan, compare, diff_request
from sidecar.replication.hello import Identity, Source
from sidecar.replication.modes import PERFORMANCE, Mode
from sidecar.replication.protocol import NONE_POSITION, encode, is_none
from sidecar.replication.shipped import Shipped
from sidecar.replication.states import Event
from sidecar.replication.sync import Syncer, SyncRefused
from tests.support.replication import LARGE_BYTES, Crash, FakeClock, MemoryStore
from tests.support.turns import watched_turns

KEYRING_KEY = "r/core/keyring"
SALT = bytes(range(16))
SOURCE = Source("primary-cluster", "set", "generation", 1, "epoch-id")


class Pair:
    """A primary, a secondary, and everything a sync told the world. ``meanwhile(step)`` runs at "diff" (after the
    answer) and at each "chunk"; ``mangle(frames)`` changes an answer to a fetch."""

    def __init__(self, mode: Mode = PERFORMANCE) -> None:
        self.mode = mode
        self.primary = MemoryStore("primary")
        self.secondary = MemoryStore("secondary")
        self.meanwhile = lambda step: None
        self.mangle = lambda frames: frames
        self.gates: list[object] = []
        self.events: list[Event] = []
        self.applied: list[str] = []
        self.requests: list[wire.Frame] = []

    async def _request(self, request: wire.DiffRequest) -> wire.DiffReply:
        self.requests.append(request)
        request = wire.decode_diff_request(encode(request))
        reply = await answer_diff(self.primary, SOURCE, request, mode=self.mode, hold_as="second")
        self.meanwhile("diff")
        return wire.decode_diff_reply(encode(reply))

    async def _fetch(self, request: wire.FetchRequest):
        self.requests.append(request)
        request = wire.decode_fetch_request(encode(request))
        frames = [chunk async for chunk in answer_fetch(self.primary, request, mode=self.mode)]
        for chunk in self.mangle(frames):
            self.meanwhile("chunk")
            yield chunk

    async def _on_applied(self, keys) -> None:
        self.applied += keys

    async def sync(self, **options):
        syncer = Syncer(
            self.mode,
            self.secondary,
            self._request,
            self._fetch,
            on_applied=self._on_applied,
            gate=self.gates.append,
            on_event=self.events.append,
            clock=FakeClock(),
            **options,
        )
        return await syncer.run()

    def at(self, index: int) -> Position:
        return Position("set", "generation", 1, index, self.primary.log[index - 1].chain_hash)

    def assert_in_step(self, index: int) -> None:
        assert self.secondary.replicated() == self.primary.fold(index)
        assert stored_position(self.secondary, PERFORMANCE) == self.at(index)


def shipped(store: MemoryStore) -> Shipped:
    return Shipped(store.forest, PERFORMANCE.classes)


def request_of(store: MemoryStore) -> wire.DiffRequest:
    return next(item for item in diff_request(shipped(store), SALT) if item is not None)


def fill(store: MemoryStore, count: int, *, partition: str = "p", value: bytes = b"old") -> None:
    for start in range(0, count, 50):
        store.write(*((f"r/{partition}/{number}", value) for number in range(start, min(count, start + 50))))


async def test_equal_roots_take_one_round_trip_and_only_set_the_position():
    pair = Pair()
    fill(pair.primary, 100)
    fill(pair.secondary, 100)
    pair.secondary.positions = {"performance": NONE_POSITION}
    result = await pair.sync()
    assert (result.event, result.round_trips, result.keys) == (Event.EQUAL, 1, 0)
    assert result.position == pair.at(pair.primary.head.index)
    pair.assert_in_step(pair.primary.head.index)
    assert pair.gates == [None]
    again = len(pair.secondary.log)
    assert (await pair.sync()).event is Event.EQUAL
    assert len(pair.secondary.log) == again, "an unchanged position is not written again"


async def test_a_first_fill_takes_two_round_trips_and_is_gated():
    pair = Pair()
    fill(pair.primary, 500)
    fill(pair.primary, 70, partition="q")
    pair.primary.write(("l/token/secret", b"local"), ("c/core/seal", b"cluster"))
    pair.primary.write((KEYRING_KEY, b"keys"))
    result = await pair.sync()
    assert (result.event, result.round_trips, result.keys) == (Event.SYNCED, 2, 571)
    pair.assert_in_step(pair.primary.head.index)
    assert pair.applied[0] == KEYRING_KEY
    assert pair.events == [Event.DIFFERS]
    assert pair.gates[-1] is None
    assert all(gate is not None for gate in pair.gates[:-1])
    positions = [record.header.positions["performance"] for record in pair.secondary.log[1:]]
    assert [is_none(position) for position in positions] == [True] * (len(positions) - 1) + [False]


async def test_a_small_difference_is_one_commit_that_readers_see_whole():
    pair = Pair()
    fill(pair.primary, 300)
    fill(pair.secondary, 300)
    pair.primary.write(("r/p/7", b"new"), ("r/p/8", None), ("r/p/new", b"new"))
    pair.secondary.write(("r/p/9", b"wrong"), ("r/p/extra", b"wrong"))
    pair.secondary.positions = {"performance": pair.at(1)}
    commits = len(pair.secondary.log)
    result = await pair.sync()
    assert (result.event, result.round_trips, result.keys) == (Event.SYNCED, 2, 5)
    assert len(pair.secondary.log) == commits + 1
    assert pair.gates == [None]
    pair.assert_in_step(pair.primary.head.index)


async def test_gone_partitions_and_one_sided_pages():
    pair = Pair()
    fill(pair.primary, 30)
    fill(pair.primary, 300, partition="only-primary")
    fill(pair.secondary, 30, partition="only-secondary")
    fill(pair.secondary, 250)
    fill(pair.secondary, 20, partition="mixed")
    pair.primary.write(("r/mixed/other", b"1"))
    result = await pair.sync(allowance=DeleteAllowance(share=1.0))
    assert (result.event, result.round_trips) == (Event.SYNCED, 2)
    pair.assert_in_step(pair.primary.head.index)
    assert "only-secondary" not in pair.secondary.forest.partitions("r")


@pytest.mark.parametrize("seed", range(15))
async def test_the_primary_goes_on_writing(seed):
    dice = random.Random(seed)
    pair = Pair()
    fill(pair.primary, 400)
    fill(pair.secondary, 400)
    changed = dice.sample(range(400), dice.choice([5, 200]))
    for number in changed:
        pair.primary.write((f"r/p/{number}", dice.randbytes(20)))

    def meanwhile(step: str) -> None:
        for _ in range(dice.randint(0, 4)):
            key = f"r/{dice.choice('pq')}/{dice.choice(changed)}"
            value = None if dice.random() < 0.4 else dice.randbytes(3)
            pair.primary.write((key, value), ("l/x/y", b"1"))

    pair.meanwhile = meanwhile
    store_get = pair.primary.get

    async def get(key: str) -> bytes | None:
        meanwhile("read")
        return await store_get(key)

    pair.primary.get = get
    result = await pair.sync()
    assert (result.event, result.round_trips) == (Event.SYNCED, 2)
    assert result.position.index <= pair.primary.head.index
    pair.assert_in_step(result.position.index)


async def test_a_keyring_that_arrives_with_the_records_is_loaded_before_what_follows():
    pair = Pair()
    fill(pair.primary, 100)

    def meanwhile(step: str) -> None:
        if step == "diff":
            pair.primary.write((KEYRING_KEY, b"rotated"))
            pair.primary.write(("r/p/after", b"under the new key"))

    pair.meanwhile = meanwhile
    assert (await pair.sync()).event is Event.SYNCED
    assert pair.applied.index(KEYRING_KEY) < pair.applied.index("r/p/after")
    commits = [[write.key for write in record.writes()] for record in pair.secondary.log]
    with_keyring = next(keys for keys in commits if KEYRING_KEY in keys)
    assert "r/p/after" not in with_keyring


@pytest.mark.parametrize("crash_at", [1, 2, 5, 11])
@pytest.mark.parametrize("step", ["before", "after"])
async def test_a_crash_in_the_middle_finds_none_and_fetches_only_the_rest(crash_at, step):
    pair = Pair()
    fill(pair.primary, 600)
    hits = 0

    def die(name: str) -> None:
        nonlocal hits
        hits += name == step
        if hits == crash_at:
            raise Crash

    pair.secondary.hook = die
    with pytest.raises(Crash):
        await pair.sync()
    pair.secondary.hook = lambda name: None  # the eleventh commit is the one that sets the position
    there = len(pair.secondary.data)
    if there and (crash_at, step) != (11, "after"):
        assert is_none(stored_position(pair.secondary, PERFORMANCE))
        assert pair.gates[-1] is not None
    pair.primary.write(("r/p/3", b"newer"))
    result = await pair.sync()
    assert result.event is Event.SYNCED
    assert result.keys <= 601 - there
    assert pair.gates[-1] is None
    pair.assert_in_step(pair.primary.head.index)


async def test_a_position_from_before_does_not_survive_a_sync_that_was_cut():
    pair = Pair()
    fill(pair.primary, 300)
    await pair.sync()
    fill(pair.primary, 300, value=b"new")
    hits = 0

    def die(name: str) -> None:
        nonlocal hits
        hits += name == "after"
        if hits == 2:
            raise Crash

    pair.secondary.hook = die
    with pytest.raises(Crash):
        await pair.sync()
    assert is_none(stored_position(pair.secondary, PERFORMANCE))
    assert pair.gates[-1] is not None


@pytest.mark.parametrize(
    ("mangle", "word"),
    [
        (lambda frames: frames[:-1], "without its guard"),
        (lambda frames: [*frames[:-1], frames[-1][:-3]], "middle of a frame"),
        (lambda frames: [*frames, frames[0]], "after its guard"),
        (lambda frames: [frames[0], frames[-1]], "records end at"),
        (lambda frames: [frames[0], frames[2], frames[1], frames[-1]], "after record"),
        (lambda frames: [frames[0], frames[1], frames[1], frames[-1]], "after record"),
        (
            lambda frames: [wire.with_length(encode(wire.Entries([("l/x/y", b"1")], [], 0))), *frames],
            "where only r may travel",
        ),
        (lambda frames: [wire.with_length(encode(wire.Entries([("r/x", b"1")], [], 0))), *frames], "malformed"),
        (lambda frames: [wire.with_length(encode(wire.Bye("need-diff", "collected")))], "collected"),
        (lambda frames: [b"\xff\xff\xff\xff"], "allowed are up to"),
    ],
)
async def test_answers_that_do_not_hold_leave_the_old_state(mangle, word):
    pair = Pair()
    fill(pair.primary, 10)

    def meanwhile(step: str) -> None:
        if step == "diff":
            pair.primary.write(("r/p/1", b"2"))
            pair.primary.write(("r/p/2", b"2"))

    pair.meanwhile = meanwhile
    pair.mangle = mangle
    result = await pair.sync()
    assert result.event is Event.LOST
    assert word in result.reason
    assert pair.secondary.data == {}
    assert result.position is None


async def test_a_value_that_is_not_what_the_index_says_ends_in_mismatch_and_keeps_reads_closed():
    pair = Pair()
    fill(pair.primary, 200)
    pair.primary.data["r/p/5"] = b"damaged under the index"
    result = await pair.sync()
    assert result.event is Event.MISMATCH
    assert is_none(result.position)
    assert pair.gates[-1] is not None


async def test_records_collected_meanwhile_and_a_store_that_fails():
    pair = Pair()
    fill(pair.primary, 100)

    def meanwhile(step: str) -> None:
        if step == "diff":
            fill(pair.primary, 300, value=b"newer")
            pair.primary.oldest_index = pair.primary.head.index

    pair.meanwhile = meanwhile
    result = await pair.sync()
    assert result.event is Event.LOST
    assert "no matching WALs available" in result.reason
    pair.meanwhile = lambda step: None
    assert (await pair.sync()).event is Event.SYNCED

    async def get(key: str):
        raise FenceLost("gone")

    pair.primary.write(("r/p/3", b"newest"))
    pair.primary.get = get
    result = await pair.sync()
    assert (result.event, result.reason) == (Event.LOST, "gone")

    def fail(name: str) -> None:
        raise FenceLost("our own")

    del pair.primary.get
    pair.secondary.hook = fail
    with pytest.raises(FenceLost):
        await pair.sync()


async def test_unreachable_refused_and_forked():
    pair = Pair()
    fill(pair.primary, 10)
    result = await pair.sync(identity=Identity("second", "store", "set", 1, "twin"))
    assert result.event is Event.REFUSED
    assert "fork" in result.reason

    async def gone(request):
        raise ChannelClosed("no route")

    async def refused(request):
        raise SyncRefused("revoked")

    for request, event in ((gone, Event.LOST), (refused, Event.REFUSED)):
        pair._request = request
        assert (await pair.sync()).event is event


async def test_large_requests_are_cut_and_only_the_last_is_final(monkeypatch):
    monkeypatch.setattr("sidecar.replication.sync.FETCH_REQUEST_BYTES", 300)
    pair = Pair()
    fill(pair.primary, 400, value=b"new")
    fill(pair.secondary, 400)
    result = await pair.sync()
    fetches = [request for request in pair.requests if isinstance(request, wire.FetchRequest)]
    assert len(fetches) > 5
    assert [request.final for request in fetches] == [False] * (len(fetches) - 1) + [True]
    assert result.round_trips == len(fetches) + 1
    assert result.event is Event.SYNCED
    pair.assert_in_step(pair.primary.head.index)


async def test_fingerprints_beyond_the_bound_become_whole_groups(monkeypatch):
    monkeypatch.setattr(diffing.Differences, "__init__", _few_fingerprints(diffing.Differences.__init__))
    pair = Pair()
    fill(pair.primary, 2000, value=b"new")
    fill(pair.secondary, 2000)
    result = await pair.sync()
    assert (result.event, result.keys) == (Event.SYNCED, 2000)
    pair.assert_in_step(pair.primary.head.index)


def _few_fingerprints(original):
    def initialise(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.fingerprints_left = 100

    return initialise


@pytest.mark.parametrize("seed", range(10))
def test_the_plan_names_exactly_the_cells_that_differ(seed):
    dice = random.Random(seed)
    ours, theirs = MemoryStore(), MemoryStore()
    for store in (ours, theirs):
        fill(store, 200)
    for _ in range(dice.randint(1, 30)):
        store = dice.choice([ours, theirs])
        store.write((f"r/{dice.choice('pq')}/{dice.randint(0, 300)}", dice.choice([None, b"changed", b"other"])))
    request = request_of(theirs)
    found = diffing.Differences()
    for _ in compare(shipped(ours), request, found):
        pass
    reply = wire.DiffReply("c", "s", "g", 1, "e", 1, bytes(32), False, found.whole, found.gone, found.cells, {})
    plan = SyncPlan.of(request, reply, shipped(theirs))
    named = {key for part in plan.ranges for key in _keys_in(ours, part) | _keys_in(theirs, part)}
    named |= {key for keys in plan.deletions(shipped(theirs)) for key in keys}
    keys = ours.data.keys() | theirs.data.keys()
    differing = {key for key in keys if ours.data.get(key) != theirs.data.get(key)}
    assert differing <= named
    for part in plan.ranges:
        assert (_keys_in(ours, part) | _keys_in(theirs, part)) & differing, "a range that does not differ is asked for"


def _keys_in(store: MemoryStore, part: Range) -> set[str]:
    return {f"{part.partition}/{path}" for path, _ in diffing.entries_in(shipped(store), part)}


def test_the_keyring_comes_first_of_all_ranges_and_of_its_own():
    ours = MemoryStore()
    ours.write((KEYRING_KEY, b"1"), ("r/core/mounts", b"1"), ("r/core/auth", b"1"), ("r/a/b", b"1"))
    request = request_of(MemoryStore())
    found = diffing.Differences()
    for _ in compare(shipped(ours), request, found):
        pass
    reply = wire.DiffReply("c", "s", "g", 1, "e", 1, bytes(32), False, found.whole, [], found.cells, {})
    plan = SyncPlan.of(request, reply, shipped(MemoryStore()))
    assert plan.ranges[0] == Range("r/core")
    assert diffing.entries_in(shipped(ours), plan.ranges[0])[0][0] == "keyring"
    theirs = MemoryStore()
    theirs.write(*((f"r/core/{number}", b"1") for number in range(300)), (KEYRING_KEY, b"0"))
    ours.write(*((f"r/core/{number}", b"2") for number in range(300)))
    request = request_of(theirs)
    found = diffing.Differences()
    for _ in compare(shipped(ours), request, found):
        pass
    reply = wire.DiffReply("c", "s", "g", 1, "e", 1, bytes(32), False, found.whole, [], found.cells, {})
    plan = SyncPlan.of(request, reply, shipped(theirs))
    assert ("keyring", entry_digest(KEYRING_KEY, b"1")) in diffing.entries_in(shipped(ours), plan.ranges[0])


async def test_the_wal_after_the_base_is_held():
    pair = Pair()
    fill(pair.primary, 10)
    await pair.sync()
    assert pair.primary.holds == {"second": pair.primary.head.index}


async def test_a_commit_that_is_too_large_after_all_is_halved():
    pair = Pair()
    fill(pair.primary, 50)
    pair.secondary.writes_max = 7
    assert (await pair.sync()).event is Event.SYNCED
    pair.assert_in_step(pair.primary.head.index)
    assert Write("r/p/1", b"old") in [write for record in pair.secondary.log for write in record.writes()]


@pytest.mark.parametrize("differing", [1, 20, 200])
async def test_the_bytes_follow_the_difference_and_two_round_trips_are_enough(differing):
    pair = Pair()
    pair.secondary.writes_max = 1000
    for partition in ("p", "q"):
        fill(pair.primary, 10_000, partition=partition)
        fill(pair.secondary, 10_000, partition=partition)
    for number in range(differing):
        pair.primary.write((f"r/{'pq'[number % 2]}/{number}", b"new" if number % 5 else None))
    records = sum(len(record.encode()) for record in pair.primary.log[-differing:])
    result = await pair.sync()
    assert (result.event, result.round_trips, result.keys) == (Event.SYNCED, 2, differing)
    assert result.bytes < 20_000 / 16 + 450 * differing + records + 2000


async def test_malformed_fingerprints_and_extents_are_refused():
    store = MemoryStore()
    fill(store, 2000)
    request = request_of(store)
    partition = request.partitions["r/p"]
    other = wire.PartitionDigests(bytes(20), partition.depth, partition.groups[:-8])
    with pytest.raises(wire.ProtocolViolation):
        list(compare(shipped(store), wire.DiffRequest(SALT, bytes(20), {"r/p": other}), diffing.Differences()))
    for cells in (
        wire.Cells(partition.depth - 1, [0], b""),
        wire.Cells(partition.depth, [1 << partition.depth], b""),
        wire.Cells(partition.depth, [0], bytes(8)),
        wire.Cells(partition.depth + 1, [0], b""),
        wire.Cells(partition.depth + 1, [0], bytes(8)),
    ):
        reply = wire.DiffReply("c", "s", "g", 1, "e", 1, bytes(32), False, [], [], {"r/p": cells}, {})
        with pytest.raises(wire.ProtocolViolation):
            SyncPlan.of(request, reply, shipped(store))
    reply = wire.DiffReply(
        "c", "s", "g", 1, "e", 1, bytes(32), False, [], [], {"r/unasked": wire.Cells(4, [0], b"")}, {}
    )
    with pytest.raises(wire.ProtocolViolation):
        SyncPlan.of(request, reply, shipped(store))
    for extent in (wire.Extent(1, 0, 0, b""), wire.Extent(0, 1, 2, b""), wire.Extent(0, 0, 0, b"7 bytes")):
        with pytest.raises(wire.ProtocolViolation):
            diffing.range_of(wire.FetchRequest(1, bytes(32), True, SALT, ["r/p"], [extent]), extent)
    fetch = wire.FetchRequest(1, bytes(32), True, SALT, ["r/p"], [wire.Extent(0, 0, 0, b"")])
    assert list(diffing.dropped_keys(shipped(store), fetch, wire.Entries([], [(0, b"")], 0))) == []
    with pytest.raises(wire.ProtocolViolation):
        list(diffing.dropped_keys(shipped(store), fetch, wire.Entries([], [(1, b"")], 0)))


async def test_large_values_are_read_one_by_one_and_small_ones_together():
    pair = Pair()
    fill(pair.primary, 200)
    large = [f"r/p/large-{number}" for number in range(5)]
    pair.primary.write(*((name, b"v" * (LARGE_BYTES + 1)) for name in large))
    assert (await pair.sync()).event is Event.SYNCED
    pair.assert_in_step(pair.primary.head.index)
    together = pair.primary.read_together
    assert max(map(len, together)) > 1
    assert all(len(names) == 1 for names in together if set(names) & set(large))


async def sync_and_piece_s() -> tuple[float, float]:
    """CPU time of the longest turn of a sync, and of the longest step of the primary's answer to it."""
    pair = Pair()
    fill(pair.primary, 20_000)
    fill(pair.secondary, 20_000, partition="gone")
    async with watched_turns() as turns:
        result = await pair.sync(allowance=DeleteAllowance(share=1.0))
    assert (result.event, result.keys) == (Event.SYNCED, 40_000)
    pair.assert_in_step(pair.primary.head.index)
    request, longest_s = pair.requests[-1], 0.0
    for extent in request.extents:
        started = time.thread_time()
        diffing.differing_entries(shipped(pair.primary), SALT, diffing.range_of(request, extent), extent.ids)
        longest_s = max(longest_s, time.thread_time() - started)
    return turns.longest_s, longest_s


async def test_neither_end_holds_up_its_event_loop(monkeypatch):
    """Whole partitions are read, sent and deleted in pieces. The control takes them whole."""
    sync_s, piece_s = await sync_and_piece_s()
    assert sync_s < 0.05
    monkeypatch.setattr(diffing, "PIECE_ENTRIES", 10**9)
    assert (await sync_and_piece_s())[1] > 3 * piece_s
