"""Two real replicated stores, one websocket over loopback: streaming, crashes, divergence, sync under load.

The stores are real (in-memory physical store, WAL, merkle index, recovery, election); TLS is not the subject here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import web

from consul_backend.clock import SystemClock
from consul_backend.election import Election, ElectionOptions, Held, LeaderInfo
from consul_backend.embedded import EmbeddedStore
from consul_backend.index_check import Progress
from consul_backend.position import Position
from consul_backend.reindex import ReindexOptions, ReindexReport, reindex
from consul_backend.replicated import ReplicatedStore, StoreOptions, genesis
from consul_backend.txn import Delete, Set
from consul_backend.wal import Write
from sidecar.replication import protocol as wire
from sidecar.replication.answers import answer_diff, answer_fetch
from sidecar.replication.applier import Applier, ApplierOptions, End, Outcome
from sidecar.replication.channel import Channel, ChannelClosed, WebSocketChannel
from sidecar.replication.committer import stored_position
from sidecar.replication.hello import Identity, Source
from sidecar.replication.modes import PERFORMANCE
from sidecar.replication.protocol import FRAME_BYTES_MAX, encode, is_none
from sidecar.replication.shipper import Advertised, Shipper, ShipperOptions
from sidecar.replication.states import Event
from sidecar.replication.sync import Syncer, SyncResult

CLOCK = SystemClock()
GENERATION = "generation"
SOURCE = Source("primary-cluster", "set", GENERATION, 1, "epoch-id")
IDENTITY = Identity("second", "store-id", "set", 1, "epoch-id")


class Node:
    """One cluster's active node: a physical store that outlives its tenures."""

    def __init__(self, name: str, options: StoreOptions) -> None:
        self.name = name
        self.options = options
        self.physical = EmbeddedStore(None)
        self.election = Election(
            self.physical,
            node_id=name,
            advertise=lambda: LeaderInfo(name, "", ""),
            clock=CLOCK,
            options=ElectionOptions(beat_ttl_s=30, lock_delay_s=0.05, step_down_grace_s=0),
        )
        self.store: ReplicatedStore
        self._held: Held
        self._running: asyncio.Task[None]

    async def create(self) -> None:
        await self.physical.open()
        await genesis(
            self.physical, GENERATION, [], node_id=self.name, time_ms=CLOCK.time_ms(), random_bytes=os.urandom
        )
        await self.lead()

    async def lead(self) -> None:
        """Win a tenure and recover; every start is a recovery."""
        self._held = await self.election.campaign()
        self.store = await ReplicatedStore.recover(
            self.physical, GENERATION, self._held.tenure, self.options, clock=CLOCK, lease=self._held.lease
        )
        self._running = asyncio.create_task(self.store.run())

    async def lead_again(self, **options: object) -> None:
        """Another tenure, with other options."""
        await self.crash()
        self.options = replace(self.options, **options)
        await self.lead()

    async def crash(self) -> None:
        """Everything in memory is gone, the store stays as it is at this moment."""
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self.election.lost(self._held)

    async def close(self) -> None:
        await self.crash()
        await self.physical.close()

    def replicated(self) -> dict[str, bytes]:
        forest = self.store.forest
        return {
            f"r/{partition}/{path}": digest
            for partition in forest.partitions("r")
            for path, digest in forest.keys("r", partition)
        }

    def at(self) -> Position:
        head = self.store.head
        return Position(SOURCE.set_id, GENERATION, SOURCE.epoch, head.index, head.chain_hash)


class World:
    """A primary with its HTTP server, a secondary with its client, and what the secondary's callbacks heard."""

    def __init__(self, primary: Node, secondary: Node) -> None:
        self.primary = primary
        self.secondary = secondary
        self.source = SOURCE
        self.denied: dict[str, str] = {}
        self.shipper_options = ShipperOptions(beat_s=0.05, silent_beats_max=100)
        self.wrap: Callable[[Channel], Channel] = lambda channel: channel
        self.applied: list[str] = []
        self.gates: list[object] = []
        self.in_step = asyncio.Event()
        self.wanted = (0, asyncio.Event())
        self.port = 0
        self.serve_primary()

    def serve_primary(self) -> None:
        self.shipper = Shipper(
            PERFORMANCE,
            self.primary.store,
            self.source,
            self.shipper_options,
            CLOCK,
            advertise=lambda: Advertised("https://primary:8200", ("https://primary:8201",)),
            denied=self.denied.__setitem__,
        )

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/stream":
            channel = await WebSocketChannel.accept(request)
            with contextlib.suppress(ChannelClosed, wire.ProtocolViolation):
                await self.shipper.serve(self.wrap(channel), wire.decode_hello(await channel.recv()))
            return channel.socket
        body = await request.read()
        if request.path == "/diff":
            asked = wire.decode_diff_request(body)
            answer = await answer_diff(self.primary.store, self.source, asked, mode=PERFORMANCE, hold_as="second")
            return web.Response(body=encode(answer))
        response = web.StreamResponse()
        await response.prepare(request)
        async for chunk in answer_fetch(self.primary.store, wire.decode_fetch_request(body), mode=PERFORMANCE):
            await response.write(chunk)
        await response.write_eof()
        return response

    async def on_applied(self, keys) -> None:
        self.applied += keys
        count, reached = self.wanted
        if len(self.applied) >= count:
            reached.set()

    async def until_applied(self, count: int) -> None:
        """Until ``count`` keys were applied since the beginning."""
        if len(self.applied) < count:
            self.wanted = (count, asyncio.Event())
            await self.wanted[1].wait()

    def heard(self, event: Event) -> None:
        position = stored_position(self.secondary.store, PERFORMANCE)
        if event is Event.IN_STEP and position is not None and position.index == self.primary.store.head.index:
            self.in_step.set()

    @contextlib.asynccontextmanager
    async def dial(self) -> AsyncIterator[WebSocketChannel]:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"http://127.0.0.1:{self.port}/stream", max_msg_size=FRAME_BYTES_MAX) as socket,
        ):
            yield WebSocketChannel(socket)

    def applier(self, **options) -> Applier:
        store = self.secondary.store
        return Applier(
            PERFORMANCE,
            store,
            stored_position(store, PERFORMANCE),
            self.on_applied,
            CLOCK,
            ApplierOptions(beat_s=0.05, silent_beats_max=100, **options),
            identity=IDENTITY,
            on_event=self.heard,
        )

    async def stream(self) -> Outcome:
        async with self.dial() as channel:
            return await self.applier().run(channel)

    async def stream_while(self, work: Awaitable[object]) -> None:
        """Stream until ``work`` is done and the secondary is in step, then cut the connection."""
        streaming = asyncio.create_task(self.stream())
        try:
            await work
            self.in_step.clear()
            waiting = asyncio.create_task(self.in_step.wait())
            await asyncio.wait({streaming, waiting}, return_when=asyncio.FIRST_COMPLETED, timeout=120)
            waiting.cancel()
            assert not streaming.done(), streaming.result()
            assert self.in_step.is_set()
        finally:
            streaming.cancel()
            await asyncio.gather(streaming, return_exceptions=True)

    async def sync(self) -> SyncResult:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{self.port}") as session:

            async def request(asked: wire.DiffRequest) -> wire.DiffReply:
                async with session.post("/diff", data=encode(asked)) as answer:
                    return wire.decode_diff_reply(await answer.read())

            async def fetch(asked: wire.FetchRequest) -> AsyncIterator[bytes]:
                async with session.post("/fetch", data=encode(asked)) as answer:
                    async for chunk in answer.content.iter_any():
                        yield chunk

            syncer = Syncer(
                PERFORMANCE,
                self.secondary.store,
                request,
                fetch,
                on_applied=self.on_applied,
                gate=self.gates.append,
                on_event=lambda event: None,
                clock=CLOCK,
                identity=IDENTITY,
            )
            return await syncer.run()

    async def join(self) -> None:
        """The secondary is empty: bring it in step."""
        assert (await self.sync()).event in {Event.SYNCED, Event.EQUAL}

    def assert_same(self) -> None:
        assert self.secondary.replicated() == self.primary.replicated()
        assert self.secondary.store.forest.root("r") == self.primary.store.forest.root("r")

    async def assert_exactly_once(self) -> None:
        """Positions only grow, and every record with replicated entries is at a newer one than the record before."""
        store = self.secondary.store
        records = await store.records(store.oldest_index, 100_000, bytes_max=1 << 30)
        before = 0
        for record in records:
            position = record.header.positions.get("performance")
            index = position.index if position else 0
            assert index >= before
            if index and any(head.cls == "r" for head in record.header.groups):
                assert index > before, "a remote record was applied twice"
            before = index


@pytest.fixture
async def world():
    nodes = [Node("primary", StoreOptions(ring_records_max=64)), Node("secondary", StoreOptions())]
    for node in nodes:
        await node.create()
    world = World(*nodes)
    server = web.Server(lambda request: world.handle(request), handler_cancellation=True)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    world.port = listener.sockets[0].getsockname()[1]
    try:
        yield world
    finally:
        listener.close()
        await server.shutdown(1)
        for node in nodes:
            await node.close()


async def write_some(store: ReplicatedStore, dice: random.Random, count: int) -> None:
    """``count`` commits, up to eight at once, local ones among them."""

    async def one() -> None:
        writes = {}
        for _ in range(dice.randint(1, 4)):
            key = f"{dice.choice('rrrl')}/{dice.choice('pq')}/{dice.randint(0, 60)}"
            writes[key] = Write(key, None if dice.random() < 0.2 else dice.randbytes(dice.randint(1, 200)))
        await store.commit(list(writes.values()))

    for _ in range(count // 8):
        await asyncio.gather(*(one() for _ in range(8)))


async def fill(store: ReplicatedStore, count: int, value: bytes = b"v" * 40) -> None:
    for start in range(0, count, 50):
        await store.commit([Write(f"r/p/key-{number}", value) for number in range(start, min(count, start + 50))])


async def test_what_the_log_no_longer_has_is_restored_from_a_secondary(world: World):
    primary = world.primary
    short_log = {"segment_records": 4, "wal_keep_records": 8, "collect_interval_s": 0.02, "flush_interval_s": 0.02}
    await primary.lead_again(cache_bytes_max=0, ring_records_max=1, **short_log)
    world.serve_primary()
    await world.join()
    await fill(primary.store, 400)
    written = primary.store.head.index
    lost = ["r/p/key-3", "r/p/key-200", "r/p/key-399"]
    values = {key: await primary.store.get(key) for key in lost}

    async def let_the_log_go() -> None:
        while primary.store.oldest_index <= written:
            await primary.store.commit([Write("r/q/other", os.urandom(8))])
            await asyncio.sleep(0.005)

    async with asyncio.timeout(120):
        await world.stream_while(let_the_log_go())
    parts = primary.store.inspected()
    await primary.physical.txn([Set(parts.where(lost[0]), b"foreign"), Set(parts.where(lost[1]), b"foreign")])
    await primary.physical.txn([Delete(parts.where(lost[2]))])
    options = ReindexOptions(diff=False, force=False, skip_flush=True)
    alone = await reindex(parts, options, Progress())
    assert (alone.restored, alone.unresolved) == (0, 3), "there is nobody to ask, and nothing is given up"
    done: asyncio.Future[ReindexReport] = asyncio.get_running_loop().create_future()

    async def repair() -> None:
        world.in_step.clear()
        await world.in_step.wait()
        done.set_result(await reindex(parts, options, Progress(), world.shipper.ask))

    async with asyncio.timeout(120):
        await world.stream_while(repair())
    assert (done.result().restored, done.result().quarantined, done.result().unresolved) == (3, 2, 0)
    assert {key: await primary.store.get(key) for key in lost} == values
    world.assert_same()


async def test_steady_streaming(world: World):
    await world.join()
    dice = random.Random(1)
    await world.stream_while(write_some(world.primary.store, dice, 400))
    world.assert_same()
    await world.assert_exactly_once()
    peer = world.shipper.peers["second"]
    assert peer.applied == world.primary.store.head.index
    assert 0 <= peer.lag_s(CLOCK.monotonic()) < 60
    merged = world.secondary.store.statistics()["commit_batches"]
    assert merged <= world.primary.store.head.index
    assert "l/" not in "".join(key[:2] for key in world.applied)


async def test_reconnect_goes_on_from_the_position_and_reads_old_records_from_the_store(world: World):
    await world.join()
    dice = random.Random(2)
    for _ in range(4):
        await world.stream_while(write_some(world.primary.store, dice, 40))
        await write_some(world.primary.store, dice, 160)  # more than the ring of recent records holds
    await world.stream_while(asyncio.sleep(0))
    world.assert_same()
    await world.assert_exactly_once()
    assert [gate for gate in world.gates if gate is not None] == []


@pytest.mark.parametrize("who", ["secondary", "primary"])
async def test_exactly_once_over_crashes_at_any_moment(world: World, who: str):
    await world.join()
    dice = random.Random(3)
    for round_number in range(12):
        streaming = asyncio.create_task(world.stream())
        enough = asyncio.create_task(world.until_applied(len(world.applied) + dice.randint(1, 40)))
        writing = asyncio.create_task(write_some(world.primary.store, dice, 80))
        await asyncio.wait({enough, writing}, return_when=asyncio.FIRST_COMPLETED)
        enough.cancel()
        if who == "secondary":
            await world.secondary.crash()
        else:
            await world.primary.crash()
        streaming.cancel()
        await asyncio.gather(writing, streaming, return_exceptions=True)
        if who == "secondary":
            await world.secondary.lead()
        else:
            await world.primary.lead()
            world.serve_primary()
        position = stored_position(world.secondary.store, PERFORMANCE)
        assert position is not None, round_number
        there = (await world.primary.store.records(position.index, 1))[0].chain_hash
        assert there == position.chain_hash
        await world.assert_exactly_once()
    await world.stream_while(write_some(world.primary.store, dice, 16))
    world.assert_same()
    await world.assert_exactly_once()


async def test_a_diverged_secondary_is_sent_to_the_diff_once_somebody_has_decided(world: World):
    """Until then its primary hears that one of the two stores is not what it was, and nothing is replaced."""
    await fill(world.primary.store, 100)
    await world.join()
    await write_some(world.primary.store, random.Random(4), 40)
    position = stored_position(world.secondary.store, PERFORMANCE)
    diverged = Position(position.set_id, position.generation, position.epoch, position.index, bytes(32))
    await world.secondary.store.commit([], positions={"performance": diverged})
    outcome = await world.stream()
    assert outcome.end is End.LOST
    assert "has another of that number" in outcome.reason
    assert f"secondary second has record {position.index} of this store" in world.denied["second"]
    world.source = replace(SOURCE, epoch=2, epoch_id="epoch-2-id")
    world.serve_primary()
    outcome = await world.stream()
    assert outcome.end is End.NEED_DIFF
    assert "another store or epoch" in outcome.reason
    assert world.denied == {"second": ""}


async def test_a_wrong_entry_is_noticed_while_streaming(world: World):
    await fill(world.primary.store, 100)
    await world.join()
    await world.secondary.store.commit([Write("r/p/key-5", b"somebody else wrote this")])
    outcome = await world.stream()
    assert outcome.end is End.NEED_DIFF
    assert "roots differ" in outcome.reason
    result = await world.sync()
    assert (result.event, result.round_trips, result.keys) == (Event.SYNCED, 2, 1)
    await world.stream_while(asyncio.sleep(0))
    world.assert_same()


async def test_a_thousand_changed_entries_take_two_round_trips_while_the_primary_writes_on(world: World):
    await fill(world.primary.store, 3000)
    await world.join()
    world.gates.clear()
    await fill(world.primary.store, 1000, b"changed")
    done = asyncio.Event()

    async def keep_writing() -> None:
        dice = random.Random(5)
        # Bounded, so that the bytes below are about the difference, however fast this machine writes meanwhile.
        for _ in range(150):
            if done.is_set():
                return
            await write_some(world.primary.store, dice, 8)
            await world.primary.store.commit([Write(f"r/p/key-{dice.randint(0, 2999)}", dice.randbytes(9))])

    writing = asyncio.create_task(keep_writing())
    before = world.primary.store.head.index
    started = time.monotonic()
    result = await world.sync()
    took_s = time.monotonic() - started
    written = world.primary.store.head.index - before
    done.set()
    await writing
    assert (result.event, result.round_trips) == (Event.SYNCED, 2)
    assert result.keys >= 1000
    assert result.bytes < 400_000, "about the changed entries, not all of them"
    assert written > 0
    assert world.gates[-1] is None
    print(f"synced {result.keys} keys, {result.bytes} bytes in {took_s:.3f} s; {written} records written meanwhile")
    await world.stream_while(asyncio.sleep(0))
    world.assert_same()


async def test_a_crash_in_the_middle_of_a_sync(world: World):
    await fill(world.primary.store, 1500)
    syncing = asyncio.create_task(world.sync())
    await world.until_applied(600)
    await world.secondary.crash()
    syncing.cancel()
    await asyncio.gather(syncing, return_exceptions=True)
    await world.secondary.lead()
    assert is_none(stored_position(world.secondary.store, PERFORMANCE))
    there = world.secondary.store.forest.count("r", "p")
    assert 600 <= there < 1500
    assert (await world.stream()).end is End.NEED_DIFF
    result = await world.sync()
    assert result.event is Event.SYNCED
    assert result.keys <= 1500 - there
    await world.stream_while(write_some(world.primary.store, random.Random(6), 16))
    world.assert_same()


async def test_a_collected_position_needs_a_diff(world: World):
    await world.join()
    store = world.primary.store
    await write_some(store, random.Random(7), 40)
    store.oldest_index = store.head.index
    store._ring._records.clear()
    outcome = await world.stream()
    assert outcome.end is End.NEED_DIFF
    assert "no matching WALs available" in outcome.reason


class BadWire:
    """A channel that damages, doubles, drops and replays a share of what it sends."""

    def __init__(self, inner: Channel, dice: random.Random) -> None:
        self._inner = inner
        self._dice = dice
        self._earlier: list[bytes] = []

    async def send(self, frame: bytes) -> None:
        self._earlier.append(frame)
        luck = self._dice.random()
        if luck < 0.02:
            damaged = bytearray(frame)
            damaged[self._dice.randrange(len(frame))] ^= self._dice.randint(1, 255)
            await self._inner.send(bytes(damaged))
        elif luck >= 0.03:
            await self._inner.send(frame)
            if luck > 0.97:
                await self._inner.send(self._dice.choice(self._earlier))

    async def recv(self) -> bytes:
        return await self._inner.recv()

    def silent_s(self) -> float:
        return self._inner.silent_s()

    async def close(self, reason: str) -> None:
        await self._inner.close(reason)


async def test_damaged_doubled_dropped_and_replayed_frames_apply_nothing_wrong(world: World):
    await world.join()
    dice = random.Random(8)
    world.wrap = lambda channel: BadWire(channel, dice)
    alarms = 0
    for number in range(500):
        if number >= 25 and alarms > 3:  # on a machine that is slow little is sent in a round
            break
        writing = asyncio.create_task(write_some(world.primary.store, dice, 24))
        streaming = asyncio.create_task(world.stream())
        await asyncio.wait({streaming}, timeout=0.3)
        streaming.cancel()
        outcome = (await asyncio.gather(streaming, return_exceptions=True))[0]
        alarms += isinstance(outcome, Outcome) and outcome.alarm
        await writing
        await world.assert_exactly_once()
    assert alarms > 3
    world.wrap = lambda channel: channel
    await world.stream_while(asyncio.sleep(0))
    world.assert_same()


async def test_a_secondary_that_stops_reading_costs_a_bounded_amount(world: World):
    await world.join()
    world.shipper_options = ShipperOptions(beat_s=0.05, silent_beats_max=1000)
    world.serve_primary()
    store = world.primary.store
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with world.dial() as channel:
        position = stored_position(world.secondary.store, PERFORMANCE)
        await channel.send(
            encode(wire.Hello(wire.PROTOCOL_VERSIONS, "slow", "s", "set", 1, "epoch-id", position, 0, 0, 0))
        )
        assert wire.decode_hello_reply(await channel.recv()).mode == "accept"
        took = []
        for number in range(300):
            started = time.perf_counter()
            await store.commit([Write(f"r/big/{number % 10}", os.urandom(100_000))])
            took.append(time.perf_counter() - started)
        progress = world.shipper.peers["slow"].progress
        assert progress.sent < store.head.index
        assert progress.in_flight_bytes <= world.shipper_options.window_bytes + FRAME_BYTES_MAX
        assert sorted(took)[len(took) // 2] < 1, "one that waited for it would wait for ever"
        world.shipper.forget("slow")
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < 200 * 1024, f"{grown_kib} KiB"  # the store's own ring and cache are most of it


async def read_to_the_end(channel: Channel) -> None:
    while True:
        await channel.recv()


async def test_one_big_message_and_text_close_the_stream(world: World):
    await world.join()
    for attack in ("big", "text", "junk"):
        async with world.dial() as channel:
            hello = wire.Hello(
                wire.PROTOCOL_VERSIONS,
                attack,
                "s",
                "set",
                1,
                "epoch-id",
                stored_position(world.secondary.store, PERFORMANCE),
                0,
                0,
                0,
            )
            await channel.send(encode(hello))
            await channel.recv()
            socket = channel.socket
            assert isinstance(socket, aiohttp.ClientWebSocketResponse)
            with contextlib.suppress(ConnectionError, aiohttp.ClientError):
                if attack == "big":
                    await socket.send_bytes(bytes(FRAME_BYTES_MAX + 1))
                elif attack == "text":
                    await socket.send_str("hello")
                else:
                    await socket.send_bytes(os.urandom(100))
            with pytest.raises(ChannelClosed):
                await read_to_the_end(channel)
