"""The applier against a primary that is a script, a shipper, or a liar. Stores in memory, no sockets."""

from __future__ import annotations

import asyncio
import contextlib
import random
from asyncio import sslproto
from unittest.mock import Mock

import msgspec
import pytest
from aiohttp import web

from consul_backend.errors import FenceLost, Overloaded
from consul_backend.limits import Limits
from consul_backend.position import Position
from consul_backend.wal import Record, Write
from sidecar.replication import channel
from sidecar.replication import protocol as wire
from sidecar.replication.applier import Applier, ApplierOptions, End
from sidecar.replication.channel import ChannelClosed
from sidecar.replication.committer import stored_position
from sidecar.replication.hello import Identity, LogFacts, Source, answer_hello
from sidecar.replication.intake import Budget, Intake, split_writes
from sidecar.replication.modes import PERFORMANCE
from sidecar.replication.outgoing import frames_of
from sidecar.replication.protocol import NONE_POSITION, ProtocolViolation, RecordFrame, Skip, encode
from sidecar.replication.shipper import Shipper, ShipperOptions
from sidecar.replication.states import Event
from tests.support.replication import Crash, FakeClock, MemoryChannel, MemoryStore, channel_pair

KEYRING_KEY = "r/core/keyring"
SOURCE = Source("primary-cluster", "set", "generation", 1, "epoch-id")
IDENTITY = Identity("second", "store-id", "set", 1, "epoch-id")
BUDGET = Budget.of(Limits())
QUICK = ApplierOptions(beat_s=0.02, silent_beats_max=50, position_interval_s=0.0)


def position_at(store: MemoryStore, index: int) -> Position:
    return Position("set", "generation", 1, index, store.log[index - 1].chain_hash)


def in_step_pair() -> tuple[MemoryStore, MemoryStore]:
    """A primary with its genesis record, and an empty secondary that stands exactly there."""
    primary, secondary = MemoryStore("primary"), MemoryStore("secondary")
    secondary.positions = {"performance": position_at(primary, 1)}
    return primary, secondary


def frame_at(store: MemoryStore, index: int) -> RecordFrame | Skip:
    return frames_of([store.log[index - 1]], PERFORMANCE.classes)[0][0]


async def nothing(keys):
    """For tests that do not care which keys changed."""


# The intake: order and honesty of what arrives.


def intake_for(store: MemoryStore, index: int = 1) -> Intake:
    return Intake(PERFORMANCE, position_at(store, index), BUDGET)


def test_intake_merges_records_and_keeps_the_last_value():
    store = MemoryStore()
    store.write(("r/p/a", b"1"), ("r/p/b", b"1"))
    store.write(("r/p/a", b"2"), ("l/x/secret", b"local"))
    store.write(("r/p/b", None))
    intake = intake_for(store)
    for index in (2, 3, 4):
        intake.accept(frame_at(store, index))
    batch = intake.take()
    assert {write.key: write.value for write in batch.writes} == {"r/p/a": b"2", "r/p/b": None}
    assert batch.position == position_at(store, 4)
    assert intake.take() is None
    assert intake.pending_bytes == 0


def test_local_entries_do_not_leave_and_runs_without_any_travel_as_one_skip():
    store = MemoryStore()
    store.write(("l/x/secret-path", b"local value"))
    store.write(("c/x/y", b"cluster value"))
    store.write(("r/p/a", b"1"), ("l/x/other-path", b"local value"))
    store.write(("l/x/secret-path", None))
    frames = frames_of(store.log, PERFORMANCE.classes)
    assert [(type(frame), last) for frame, last in frames] == [(Skip, 3), (RecordFrame, 4), (Skip, 5)]
    shipped = b"".join(encode(frame) for frame, _ in frames)
    for word in (b"secret-path", b"other-path", b"local value", b"cluster value"):
        assert word not in shipped
    intake = Intake(PERFORMANCE, Position("set", "generation", 1, 0, bytes(32)), BUDGET)
    for frame, _ in frames:
        intake.accept(frame)
    assert intake.last == position_at(store, 5)


def test_intake_refuses_duplicates_gaps_reorder_and_other_histories():
    store, other = MemoryStore(), MemoryStore("stranger")
    for value in (b"1", b"2", b"3"):
        store.write(("r/p/a", value))
        other.write(("r/p/a", value))
    here = store.log[0].chain_hash
    skips = (Skip(3, 3, here, bytes(32)), Skip(2, 1, here, bytes(32)), Skip(2, 2, bytes(32), bytes(32)))
    for bad in (frame_at(store, 1), frame_at(store, 3), frame_at(other, 3), *skips):
        intake = intake_for(store)
        with pytest.raises(ProtocolViolation):
            intake.accept(bad)
        assert intake.take() is None
        intake.accept(frame_at(store, 2))
        with pytest.raises(ProtocolViolation):
            intake.accept(frame_at(store, 2))
        with pytest.raises(ProtocolViolation):
            intake.accept(frame_at(other, 3))
        intake.accept(frame_at(store, 3))


def test_a_false_skip_breaks_the_chain_at_the_next_record():
    store = MemoryStore()
    for value in (b"1", b"2", b"3"):
        store.write(("r/p/a", value))
    intake = intake_for(store)
    intake.accept(Skip(2, 3, store.log[0].chain_hash, bytes(32)))
    with pytest.raises(ProtocolViolation, match="chain"):
        intake.accept(frame_at(store, 4))


def forge(store: MemoryStore, **changes) -> Record:
    last = store.log[-1]
    fields = {
        "index": last.index + 1,
        "prev_hash": last.chain_hash,
        "epoch": 1,
        "writer": "x",
        "batch_id": bytes(16),
        "time_ms": 1,
        "kind": "data",
        "positions": {},
        "groups": {("r", "p"): [("a", b"1")]},
    }
    return Record.build(**(fields | changes))


def test_intake_refuses_entries_of_other_classes_and_missing_or_malformed_ones():
    store = MemoryStore()
    forged = {
        "brings entries of l/token": forge(store, groups={("l", "token"): [("a", b"1")]}),
        "lacks entries of r/p": forge(store).only(()),
        "bad group": forge(store, groups={("r", "a/b"): [("c", b"1")]}),
        "not what the header says": forge(store, groups={("r", "p"): [("a", b"1"), ("a", b"2")]}),
        "bad kind": forge(store, kind="part"),
        "record 99 after record 1": forge(store, index=99),
    }
    for word, record in forged.items():
        with pytest.raises(ProtocolViolation, match=word):
            intake_for(store).accept(RecordFrame(record.encode()))


def test_an_older_tenure_is_refused():
    store = MemoryStore()
    store.tenure = 5
    store.write(("r/p/a", b"1"))
    intake = intake_for(store)
    intake.accept(frame_at(store, 2))
    with pytest.raises(ProtocolViolation, match="tenure"):
        intake.accept(RecordFrame(forge(store, epoch=4).encode()))


def test_every_flipped_byte_of_a_record_is_refused():
    store = MemoryStore()
    store.write(("r/p/a", b"some value"), ("r/q/b", b"another"))
    raw = frame_at(store, 2).raw
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 1 + at % 255
        with pytest.raises(ProtocolViolation):
            intake_for(store).accept(RecordFrame(bytes(damaged)))


def test_batches_fit_the_budget_and_a_keyring_ends_one():
    store = MemoryStore()
    for number in range(40):
        store.write(*((f"r/p/{number}-{part}", b"x" * 100) for part in range(5)))
    store.write((KEYRING_KEY, b"keys"))
    store.write(("r/p/under-the-new-key", b"1"))
    intake = intake_for(store)
    for index in range(2, 44):
        intake.accept(frame_at(store, index))
    batches = []
    while (batch := intake.take()) is not None:
        assert len(batch.writes) <= BUDGET.writes_max
        assert sum(map(BUDGET.cost_bytes, batch.writes)) <= BUDGET.bytes_max
        batches.append(batch)
    assert [batch.position.index for batch in batches] == [13, 25, 37, 42, 43]
    assert batches[-2].writes[-1].key == KEYRING_KEY


def test_big_values_make_small_batches_and_a_batch_can_be_given_back():
    store = MemoryStore()
    for number in range(6):
        store.write((f"r/p/{number}", b"x" * 90_000))
    intake = intake_for(store)
    for index in range(2, 8):
        intake.accept(frame_at(store, index))
    first = intake.take()
    assert len(first.steps) == 2
    intake.give_back(first)
    assert [intake.take(steps_max=1).position.index for _ in range(6)] == [2, 3, 4, 5, 6, 7]


def test_split_writes_cuts_by_count_and_by_bytes():
    writes = [Write(f"r/p/{number}", b"x" * (150_000 if number % 7 == 0 else 10)) for number in range(200)]
    pieces = split_writes(writes, BUDGET)
    assert [write for piece in pieces for write in piece] == writes
    for piece in pieces:
        assert len(piece) <= BUDGET.writes_max
        assert len(piece) == 1 or sum(map(BUDGET.cost_bytes, piece)) <= BUDGET.bytes_max


# The applier, fed by a script.


class Script:
    """The primary's end of a channel, driven line by line."""

    def __init__(self, primary: MemoryStore) -> None:
        self.primary = primary
        self.channel, self.secondary_end = channel_pair()

    async def greet(self, mode: str = "accept") -> wire.Hello:
        hello = wire.decode_hello(await self.channel.recv())
        head = self.primary.head
        facts = LogFacts(head.index, head.chain_hash, hello.position.chain_hash if hello.position else None)
        reply = answer_hello(hello, SOURCE, facts, Limits())
        assert reply.mode == mode
        await self.channel.send(encode(reply))
        return hello

    async def send(self, *frames: wire.Frame) -> None:
        for frame in frames:
            await self.channel.send(encode(frame))

    async def ack(self) -> wire.Ack:
        while True:
            frame = wire.decode_from_secondary(await self.channel.recv())
            if isinstance(frame, wire.Ack):
                return frame

    def complete(self) -> wire.CompleteUpTo:
        head = self.primary.head
        return wire.CompleteUpTo(head.index, head.chain_hash, self.primary.forest.root("r"), FakeClock().time_ms())


def make_applier(store: MemoryStore, options: ApplierOptions = QUICK, on_applied=nothing, **others) -> Applier:
    return Applier(
        PERFORMANCE,
        store,
        stored_position(store, PERFORMANCE),
        on_applied,
        others.pop("clock", FakeClock()),
        options,
        identity=others.pop("identity", IDENTITY),
        **others,
    )


async def test_apply_acknowledge_compare():
    primary, secondary = in_step_pair()
    applied: list[str] = []
    events: list[Event] = []

    async def on_applied(keys):
        assert all(key in secondary.data for key in keys), "told before it was true"
        applied.extend(keys)

    applier = make_applier(secondary, on_applied=on_applied, on_event=events.append)
    script = Script(primary)
    running = asyncio.create_task(applier.run(script.secondary_end))
    hello = await script.greet()
    assert hello.position == position_at(primary, 1)
    primary.write(("r/p/a", b"1"))
    await script.send(frame_at(primary, 2))
    assert await script.ack() == wire.Ack(2, 2)
    assert secondary.positions["performance"] == position_at(primary, 2)
    await script.send(script.complete())
    await script.ack()
    assert (applied, events) == (["r/p/a"], [Event.ACCEPTED, Event.IN_STEP])
    assert applier.lag_s() == 0.0
    assert await applier.wait_applied(2, 0)
    assert await applier.wait_applied(2, 0, generation=position_at(primary, 1).generation)
    assert not await applier.wait_applied(2, 0, generation="another store"), "its numbers say nothing here"
    assert not await applier.wait_applied(3, 0)
    waiting = asyncio.create_task(applier.wait_applied(3, 5))
    primary.write(("r/p/a", b"2"))
    await script.send(frame_at(primary, 3), wire.Bye("closing", "maintenance"))
    outcome = await running
    assert await waiting
    assert (outcome.end, outcome.reason, outcome.alarm) == (End.LOST, "maintenance", False)
    assert secondary.data == {"r/p/a": b"2"}


async def test_where_a_sync_led_is_known_before_the_next_connection():
    primary, secondary = in_step_pair()
    applier = make_applier(secondary)
    waiting = asyncio.create_task(applier.wait_applied(7, 5))
    await secondary.commit([], positions={"performance": msgspec.structs.replace(position_at(primary, 1), index=7)})
    assert applier.position == position_at(primary, 1)
    applier.look()
    assert applier.position is not None
    assert applier.position.index == 7
    assert await waiting


async def test_skips_move_the_position_and_are_made_durable_in_time():
    primary, secondary = in_step_pair()
    clock = FakeClock()
    applier = make_applier(secondary, ApplierOptions(beat_s=60, position_interval_s=5.0), clock=clock)
    script = Script(primary)
    running = asyncio.create_task(applier.run(script.secondary_end))
    await script.greet()
    commits = len(secondary.log)
    for number in range(3):
        primary.write(("l/x/y", bytes([number])))
        await script.send(frame_at(primary, primary.head.index))
        assert await script.ack() == wire.Ack(2 + number, 1)
    assert len(secondary.log) == commits
    assert await applier.wait_applied(4, 0)
    clock.now_s += 5
    primary.write(("l/x/y", b"last"))
    await script.send(frame_at(primary, 5))
    assert await script.ack() == wire.Ack(5, 5)
    primary.write(("l/x/y", b"more"))
    await script.send(frame_at(primary, 6), wire.Bye("closing", ""))
    await running
    # The next hello promises what is durable.
    script = Script(primary)
    running = asyncio.create_task(applier.run(script.secondary_end))
    assert (await script.greet()).position == position_at(primary, 6)
    assert stored_position(secondary, PERFORMANCE) == position_at(primary, 6)
    await script.channel.close("")
    await running


@pytest.mark.parametrize(
    ("frames", "end", "alarm", "word"),
    [
        (lambda p: [frame_at(p, 3)], End.LOST, True, "after record 1"),
        (lambda p: [frame_at(p, 2), frame_at(p, 2)], End.LOST, True, "after record 2"),
        (lambda p: [frame_at(p, 2), wire.CompleteUpTo(3, bytes(32), bytes(20), 1)], End.LOST, True, "out of order"),
        (lambda p: [frame_at(p, 2), wire.CompleteUpTo(2, bytes(32), bytes(20), 1)], End.LOST, True, "out of order"),
        (
            lambda p: [frame_at(p, 2), wire.CompleteUpTo(2, p.log[1].chain_hash, bytes(20), 1)],
            End.NEED_DIFF,
            False,
            "roots differ",
        ),
        (lambda p: [frame_at(p, 2), wire.Bye("need-diff", "no matching WALs")], End.NEED_DIFF, False, "no matching"),
        (lambda p: [frame_at(p, 2), wire.Bye("refuse", "revoked")], End.REFUSED, False, "revoked"),
        (lambda p: [frame_at(p, 2), wire.Ack(2, 2)], End.LOST, True, "does not decode"),
    ],
)
async def test_how_a_stream_ends(frames, end, alarm, word):
    primary, secondary = in_step_pair()
    primary.write(("r/p/a", b"1"))
    primary.write(("r/p/a", b"2"))
    script = Script(primary)
    running = asyncio.create_task(make_applier(secondary).run(script.secondary_end))
    await script.greet()
    sent = frames(primary)
    await script.send(*sent)
    outcome = await running
    assert (outcome.end, outcome.alarm) == (end, alarm)
    assert word in outcome.reason
    good = sent[0] == frame_at(primary, 2)
    assert secondary.data == ({"r/p/a": b"1"} if good else {})
    assert stored_position(secondary, PERFORMANCE) == position_at(primary, 2 if good else 1)


async def test_hello_refused_forked_unanswered():
    primary, secondary = in_step_pair()
    script = Script(primary)
    applier = make_applier(secondary, identity=Identity("second", "store", "set", 1, "twin"))
    running = asyncio.create_task(applier.run(script.secondary_end))
    await script.greet("refuse")
    outcome = await running
    assert outcome.end is End.REFUSED
    assert "fork" in outcome.reason
    silent = make_applier(secondary, ApplierOptions(hello_timeout_s=0.01))
    assert (await silent.run(channel_pair()[0])).end is End.LOST
    secondary.positions = {"performance": NONE_POSITION}
    script = Script(primary)
    running = asyncio.create_task(make_applier(secondary).run(script.secondary_end))
    await script.greet("need-diff")
    assert (await running).end is End.NEED_DIFF


async def test_a_record_that_is_no_single_commit_here_asks_for_a_diff():
    primary, secondary = in_step_pair()
    secondary.writes_max = 4
    for number in range(3):
        primary.write(*((f"r/p/{number}-{part}", b"1") for part in range(3)))
    primary.write(*((f"r/p/big-{part}", b"1") for part in range(5)))
    script = Script(primary)
    running = asyncio.create_task(make_applier(secondary).run(script.secondary_end))
    await script.greet()
    await script.send(*(frame_at(primary, index) for index in range(2, 6)))
    outcome = await running
    assert outcome.end is End.NEED_DIFF
    assert stored_position(secondary, PERFORMANCE) == position_at(primary, 4)
    assert secondary.data == primary.fold(4)


async def test_a_full_queue_is_waited_out_and_a_lost_fence_is_raised():
    primary, secondary = in_step_pair()
    failures: list[Exception] = [Overloaded("full"), Overloaded("full")]

    def hook(name: str) -> None:
        if name == "before" and failures:
            raise failures.pop(0)

    secondary.hook = hook
    primary.write(("r/p/a", b"1"))
    script = Script(primary)
    running = asyncio.create_task(make_applier(secondary).run(script.secondary_end))
    await script.greet()
    await script.send(frame_at(primary, 2))
    assert (await script.ack()).applied == 2
    failures.append(FenceLost("gone"))
    primary.write(("r/p/a", b"2"))
    await script.send(frame_at(primary, 3))
    with pytest.raises(FenceLost):
        await running
    assert secondary.data == {"r/p/a": b"1"}


async def test_a_silent_primary_is_left():
    primary, secondary = in_step_pair()
    script = Script(primary)
    applier = make_applier(secondary, ApplierOptions(beat_s=0.01, silent_beats_max=2))
    running = asyncio.create_task(applier.run(script.secondary_end))
    await script.greet()
    outcome = await running
    assert outcome.end is End.LOST
    assert "no heartbeat" in outcome.reason
    assert not applier.upstream.connected


async def test_a_frame_that_is_still_arriving_is_no_silence():
    """A narrow link: whoever gave up now would begin with the same frame again, for ever."""
    primary, secondary = in_step_pair()
    script = Script(primary)
    script.secondary_end.silence_s = 0.0
    applier = make_applier(secondary, ApplierOptions(beat_s=0.01, silent_beats_max=2))
    running = asyncio.create_task(applier.run(script.secondary_end))
    await script.greet()
    applier.upstream.heard_at_s = 0.0
    done, _ = await asyncio.wait({running}, timeout=0.2)
    assert not done
    assert applier.upstream.heard_at_s > 0, "the status shows a sign of life"
    script.secondary_end.silence_s = 60.0
    assert "no heartbeat" in (await running).reason


async def test_a_frame_does_not_arrive_for_ever(monkeypatch):
    monkeypatch.setattr(channel, "FRAME_PATIENCE_S", 0.1)
    end, _ = channel_pair()
    end.silence_s = 0.0
    with pytest.raises(ChannelClosed, match="no heartbeat"):
        await channel.hear(end, 0.01, 2)


async def test_nobody_can_tell_how_long_a_transport_that_was_closed_twice_is_silent():
    """asyncio's TLS transport has forgotten its connection by then; who waits for a frame must hear of silence only."""
    transport = sslproto._SSLProtocolTransport(asyncio.get_running_loop(), Mock())
    transport.close()
    transport.close()
    assert channel.WebSocketChannel(web.WebSocketResponse(), transport).silent_s() == float("inf")


async def test_a_cancelled_run_waits_for_its_commit_and_the_next_goes_on_after_it():
    primary, secondary = in_step_pair()
    primary.write(("r/p/a", b"1"))
    started, release = asyncio.Event(), asyncio.Event()
    commit = secondary.commit

    async def slow(writes, *, positions=None):
        started.set()
        await release.wait()
        return await commit(writes, positions=positions)

    secondary.commit = slow
    applier = make_applier(secondary)
    script = Script(primary)
    running = asyncio.create_task(applier.run(script.secondary_end))
    await script.greet()
    await script.send(frame_at(primary, 2))
    await started.wait()
    running.cancel()
    await asyncio.sleep(0)
    assert not running.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    script = Script(primary)
    running = asyncio.create_task(applier.run(script.secondary_end))
    assert (await script.greet()).position == position_at(primary, 2)
    await script.channel.close("")
    await running
    assert [record.header.positions["performance"].index for record in secondary.log[1:]] == [2]


# Applier and shipper together.


class Link:
    """Runs a shipper and an applier over a channel of its own until one of them ends."""

    def __init__(self, primary: MemoryStore, secondary: MemoryStore, **options) -> None:
        self.primary = primary
        self.secondary = secondary
        self.shipper = Shipper(
            PERFORMANCE, primary, SOURCE, ShipperOptions(beat_s=0.02, silent_beats_max=50, **options), FakeClock()
        )
        self.events: list[Event] = []
        self.in_step = asyncio.Event()

    def _event(self, event: Event) -> None:
        self.events.append(event)
        if event is Event.IN_STEP and stored_position(self.secondary, PERFORMANCE).index == self.primary.head.index:
            self.in_step.set()

    async def run(self, tamper=None, on_applied=nothing):
        ours, theirs = channel_pair()
        if tamper is not None:
            ours.tamper = tamper
        applier = make_applier(self.secondary, on_applied=on_applied, on_event=self._event)

        async def serve() -> None:
            await self.shipper.serve(ours, wire.decode_hello(await ours.recv()))

        serving = asyncio.create_task(serve())
        try:
            return await applier.run(theirs)
        finally:
            await theirs.close("the secondary is gone")
            with contextlib.suppress(ChannelClosed):
                await serving

    async def until_in_step(self) -> None:
        self.in_step.clear()
        running = asyncio.create_task(self.run())
        await asyncio.wait({running, asyncio.create_task(self.in_step.wait())}, return_when="FIRST_COMPLETED")
        assert not running.done(), running.result()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def random_writes(store: MemoryStore, dice: random.Random, count: int) -> None:
    for _ in range(count):
        pairs = {}
        for _ in range(dice.randint(1, 4)):
            cls = dice.choice("rrrl")
            value = None if dice.random() < 0.2 else dice.randbytes(dice.randint(1, 40))
            pairs[f"{cls}/{dice.choice('pq')}/{dice.randint(0, 20)}"] = value
        store.write(*pairs.items())


def assert_prefix(primary: MemoryStore, secondary: MemoryStore) -> None:
    """P5, and exactly once: every record of the secondary is the primary's state at the position it carries."""
    seen = 1
    for number, record in enumerate(secondary.log[1:], start=2):
        index = record.header.positions["performance"].index
        assert index > seen, "a remote record was applied again"
        seen = index
        assert secondary.fold(number) == primary.fold(index)


@pytest.mark.parametrize("step", ["before", "after", "applied"])
@pytest.mark.parametrize("seed", range(4))
async def test_exactly_once_over_a_crash_at_each_step(step, seed):
    dice = random.Random(seed)
    primary, secondary = in_step_pair()
    link = Link(primary, secondary, chunk_records=3)
    random_writes(primary, dice, 60)
    for crash_at in range(1, 6):
        hits = 0

        def die(name: str, crash_at: int = crash_at) -> None:
            nonlocal hits
            hits += name == step
            if name == step and hits == crash_at:
                raise Crash

        async def on_applied(keys, die=die):
            die("applied")

        secondary.hook = die
        running = asyncio.create_task(link.run(on_applied=on_applied))
        waiting = asyncio.create_task(link.in_step.wait())
        await asyncio.wait({running, waiting}, return_when="FIRST_COMPLETED")
        waiting.cancel()
        running.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        link.in_step.clear()
        random_writes(primary, dice, 15)
        assert_prefix(primary, secondary)
    secondary.hook = lambda name: None
    await link.until_in_step()
    assert secondary.replicated() == primary.replicated()
    assert secondary.forest.root("r") == primary.forest.root("r")
    assert_prefix(primary, secondary)


@pytest.mark.parametrize("seed", range(20))
async def test_a_bad_wire_never_applies_anything_wrong(seed):
    dice = random.Random(seed)
    primary, secondary = in_step_pair()
    link = Link(primary, secondary, chunk_records=3)
    random_writes(primary, dice, 80)
    earlier: list[bytes] = []

    def tamper(frame: bytes) -> list[bytes]:
        earlier.append(frame)
        luck = dice.random()
        if luck < 0.03:
            damaged = bytearray(frame)
            damaged[dice.randrange(len(frame))] ^= dice.randint(1, 255)
            return [bytes(damaged)]
        if luck < 0.05:
            return []
        if luck < 0.07:
            return [frame, frame]
        if luck < 0.09:
            return [dice.choice(earlier), frame]
        return [frame]

    for _ in range(12):
        running = asyncio.create_task(link.run(tamper))
        waiting = asyncio.create_task(link.in_step.wait())
        await asyncio.wait({running, waiting}, return_when="FIRST_COMPLETED", timeout=0.3)
        waiting.cancel()
        running.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        assert_prefix(primary, secondary)
        random_writes(primary, dice, 5)
    link.in_step.clear()
    await link.until_in_step()
    assert secondary.replicated() == primary.replicated()


async def test_a_slow_secondary_is_bounded_and_does_not_slow_the_primary():
    primary, _ = in_step_pair()
    shipper = Shipper(
        PERFORMANCE,
        primary,
        SOURCE,
        ShipperOptions(beat_s=0.02, silent_beats_max=1000, window_records=10, chunk_records=4),
        FakeClock(),
    )
    ours, theirs = channel_pair()
    hello = wire.Hello(wire.PROTOCOL_VERSIONS, "slow", "s", "set", 1, "epoch-id", position_at(primary, 1), 0, 0, 0)
    serving = asyncio.create_task(shipper.serve(ours, hello))
    wire.decode_hello_reply(await theirs.recv())
    for number in range(500):
        primary.write(("r/p/a", str(number).encode()))
    records = 0
    beats = 0
    while beats < 6:  # it goes on beating, and sends no more than its window
        frame = wire.decode_from_primary(await theirs.recv())
        records += isinstance(frame, RecordFrame)
        beats += isinstance(frame, wire.Heartbeat)
    assert records == 10
    assert shipper.peers["slow"].progress.sent == 11
    assert primary.holds["performance:slow"] == 1
    assert primary.reads <= 3, "nothing is read for a window that is closed"
    await theirs.send(encode(wire.Ack(11, 6)))
    while records < 20:
        records += isinstance(wire.decode_from_primary(await theirs.recv()), RecordFrame)
    assert primary.holds["performance:slow"] == 6
    shipper.forget("slow")
    await serving
    assert "slow" not in primary.holds


async def test_a_collected_record_mid_stream_ends_in_need_diff():
    primary, secondary = in_step_pair()
    link = Link(primary, secondary, window_records=2)
    random_writes(primary, random.Random(1), 30)
    real = secondary.commit

    async def commit(writes, *, positions=None):
        primary.oldest_index = 25
        return await real(writes, positions=positions)

    secondary.commit = commit
    outcome = await link.run()
    assert outcome.end is End.NEED_DIFF
    assert "no matching WALs available" in outcome.reason


@pytest.mark.parametrize("ack", [wire.Ack(99, 1), wire.Ack(1, 0)])
async def test_a_lying_secondary_is_cut(ack):
    primary, _ = in_step_pair()
    shipper = Shipper(PERFORMANCE, primary, SOURCE, ShipperOptions(), FakeClock())
    ours, theirs = channel_pair()
    hello = wire.Hello(wire.PROTOCOL_VERSIONS, "liar", "s", "set", 1, "epoch-id", position_at(primary, 1), 0, 0, 0)
    serving = asyncio.create_task(shipper.serve(ours, hello))
    await theirs.send(encode(ack))
    assert "acknowledged" in await serving
    assert not shipper.peers["liar"].connected


async def test_a_second_stream_of_one_secondary_ends_the_first():
    primary, _ = in_step_pair()
    shipper = Shipper(PERFORMANCE, primary, SOURCE, ShipperOptions(), FakeClock())
    hello = wire.Hello(wire.PROTOCOL_VERSIONS, "same", "s", "set", 1, "epoch-id", position_at(primary, 1), 0, 0, 0)

    async def connect() -> tuple[asyncio.Task[str], MemoryChannel]:
        ours, theirs = channel_pair()
        serving = asyncio.create_task(shipper.serve(ours, hello))
        wire.decode_hello_reply(await theirs.recv())
        return serving, theirs

    first, _ = await connect()
    second, theirs = await connect()
    assert "another stream" in await first
    assert shipper.peers["same"].connected
    await theirs.close("done")
    await second
    assert not shipper.peers["same"].connected


async def test_heartbeats_carry_addresses_and_find_the_clock_offset():
    primary, secondary = in_step_pair()
    link = Link(primary, secondary)
    link.shipper._clock = FakeClock(skew_ms=90_000)
    await link.until_in_step()
    peer = link.shipper.peers["second"]
    assert peer.lag_s(peer.heard_at_s) == 0.0
    assert peer.applied == primary.head.index
