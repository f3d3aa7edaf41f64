"""Values beyond a transaction: any of them, replaced and deleted at random, with a node that dies between two chunks or
anywhere else, against a dictionary. Afterwards exactly the chunks that somebody names are stored."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from typing import Any
from unittest.mock import patch

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from consul_backend import chunks
from consul_backend.batching import MANIFEST_MAGIC
from consul_backend.chunks import CHUNK_BYTES_MAX, CHUNKS_MAX, Manifest, decode_manifest, encode_manifest, split
from consul_backend.errors import BackendError
from consul_backend.failpoint import FailpointHit, arm, disarm
from consul_backend.fenced import guards
from consul_backend.limits import BODY_BYTES_MIN, Limits, body_bytes
from consul_backend.replicated import ReplicatedStore, StoreOptions
from consul_backend.tenure import Tenure
from consul_backend.txn import Op, Set
from consul_backend.wal import Write
from tests.support.store import GENERATION, Cluster, key, memory_cluster

# -- the pure part

TENURE = Tenure(10**9, "node", "7f1a6ad5-6a5f-4b1c-9c7e-0d3c1a2b3c4d", 2**40)
LIMITS = st.builds(
    Limits,
    body_bytes_max=st.integers(BODY_BYTES_MIN, 2**21),
    value_bytes_max=st.sampled_from([4_000, 100_000, 524_288]),
    prefix_bytes=st.integers(0, 200),
)


@given(limits=LIMITS, size=st.integers(0, 600_000))
def test_pieces_make_the_value_and_each_fits_a_transaction(limits: Limits, size: int) -> None:
    value = bytes(range(251)) * (size // 251) + bytes(size % 251)
    pieces = split(value, limits)
    assert b"".join(pieces) == value
    assert all(pieces)
    assert len(pieces) <= 1 or len({len(piece) for piece in pieces[:-1]}) == 1
    largest = max(map(len, pieces), default=0)
    assert largest <= min(limits.value_bytes_max, CHUNK_BYTES_MAX)
    where = f"g/{'g' * 36}/b/{'n' * 60}/000000"
    ops: list[Op] = [*guards(TENURE), Set(where, bytes(largest))]
    assert body_bytes(ops, limits.prefix_bytes) <= limits.body_bytes_max
    assert len(pieces) <= CHUNKS_MAX


@given(name=st.text(max_size=40), count=st.integers(0, CHUNKS_MAX), size=st.integers(0, 2**40))
def test_a_manifest_is_read_as_it_was_written(name: str, count: int, size: int) -> None:
    assert decode_manifest(encode_manifest(Manifest(name, count, size))) == Manifest(name, count, size)


@given(
    raw=st.binary(max_size=60)
    | st.builds(lambda fields: msgspec.msgpack.encode(fields), st.lists(st.integers(-(2**63), 2**63) | st.text()))
)
def test_no_bytes_are_a_manifest_that_leads_far(raw: bytes) -> None:
    for stored in (raw, MANIFEST_MAGIC + raw):
        manifest = decode_manifest(stored)
        assert manifest is None or 0 <= manifest.count <= CHUNKS_MAX
    assert raw.startswith(MANIFEST_MAGIC) or decode_manifest(raw) is None


# -- the machine

SMALL = Limits(ops_max=8, body_bytes_max=20 * 1024, value_bytes_max=16 * 1024)
PIECE = len(split(bytes(100_000), SMALL)[0])
OPTIONS = StoreOptions(
    segment_records=8,
    wal_keep_records=8,
    resolve_timeout_s=2.0,
    flush_interval_s=0.002,
    collect_interval_s=0.002,
    tip_interval_s=3600,
)
NAMES = [f"k{n}" for n in range(4)]
POINTS = ["large:after-chunk", "large:after-part", "large:after-commit", "large:before-roll", "large:after-roll"]

names = st.sampled_from(NAMES)
sizes = st.sampled_from([0, 1, 100, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE + 7, 9 * PIECE])
# What looks like a manifest, and names chunks that may even exist, is a value like any other.
heads = st.sampled_from(
    [b"", MANIFEST_MAGIC, encode_manifest(Manifest("x", 2, 10)), encode_manifest(Manifest("", 0, 0))]
)
values = st.builds(lambda head, size, fill: head + bytes([fill]) * size, heads, sizes, st.integers(0, 255))
changes = st.dictionaries(names, st.none() | values, min_size=1, max_size=3)


class ChunksMachine(RuleBasedStateMachine):
    """``true`` is the oracle. One caller at a time: a crash leaves the state before or after its call."""

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._contexts = contextlib.AsyncExitStack()
        self._contexts.enter_context(patch.object(chunks, "_RETRY_PAUSE_S", 0))
        self._contexts.callback(disarm)
        self.true: dict[str, bytes] = {}
        self.store: ReplicatedStore
        self._running: asyncio.Task[None]

    @initialize()
    def begin(self) -> None:
        self.cluster: Cluster = self._do(self._contexts.enter_async_context(memory_cluster(SMALL)))
        self._do(self._lead())

    def teardown(self) -> None:
        try:
            self._do(self._only_named_chunks_are_left())
        finally:
            self._do(self._stop())
            self._do(self._contexts.aclose())
            self._runner.close()

    @rule(writes=changes, rolled=st.booleans())
    def commit(self, writes: dict[str, bytes | None], rolled: bool) -> None:
        self._do(self._commit(writes))
        if rolled:
            self._do(self.store.rolled())
        self._note(writes)

    @rule(writes=changes, point=st.sampled_from(POINTS), hit=st.integers(1, 6))
    def die(self, writes: dict[str, bytes | None], point: str, hit: int) -> None:
        """The node dies at a step of the batch; another one takes over and finds all of it or nothing."""
        self._do(self.store.rolled())
        arm(f"{point}=raise:{hit}")
        crashed, acknowledged = self._do(self._until_crash(writes))
        disarm()
        after = self._after(writes)
        if crashed:
            self._do(self._lead())
            found = self._do(self._contents())
            assert found in ((after,) if acknowledged or point != "large:after-part" else (self.true,))
        self.true = after if not crashed or acknowledged or point != "large:after-part" else self.true

    @rule(writes=changes, fates=st.lists(st.sampled_from([None, "lose-before", "lose-after", "twice"]), max_size=8))
    def lose_answers(self, writes: dict[str, bytes | None], fates: list[str | None]) -> None:
        """Of chunks and of their deletion: the same is sent again."""

        def fault(ops: Sequence[Op]) -> str | None:
            chunk = any("/b/" in str(getattr(op, "key", "")) or "/b/" in str(getattr(op, "prefix", "")) for op in ops)
            return fates.pop() if chunk and fates else None

        self.cluster.physical.fault = fault
        self._do(self._commit(writes))
        self._do(self.store.rolled())
        self.cluster.physical.fault = lambda ops: None
        self._note(writes)

    @rule()
    def take_over(self) -> None:
        self._do(self._lead())

    @rule(name=names)
    def get(self, name: str) -> None:
        assert self._do(self.store.get(key(name))) == self.true.get(name)

    @rule()
    def settle(self) -> None:
        self._do(self._only_named_chunks_are_left())

    def _after(self, writes: dict[str, bytes | None]) -> dict[str, bytes]:
        return {name: value for name, value in {**self.true, **writes}.items() if value is not None}

    def _note(self, writes: dict[str, bytes | None]) -> None:
        self.true = self._after(writes)

    async def _commit(self, writes: dict[str, bytes | None]) -> None:
        await self.store.commit([Write(key(name), value) for name, value in writes.items()])

    async def _contents(self) -> dict[str, bytes]:
        found = {name: await self.store.get(key(name)) for name in NAMES}
        return {name: value for name, value in found.items() if value is not None}

    async def _until_crash(self, writes: dict[str, bytes | None]) -> tuple[bool, bool]:
        """Whether the store died before the batch was through, and whether the caller was told *done*."""

        async def through() -> None:
            with contextlib.suppress(BackendError):
                await self._commit(writes)
                acknowledged.set()
                await self.store.rolled()

        acknowledged = asyncio.Event()
        working = asyncio.create_task(through())
        await asyncio.wait({working, self._running}, return_when=asyncio.FIRST_COMPLETED)
        if not acknowledged.is_set():
            await asyncio.wait({self._running})  # the caller may hear of the end first; nothing else ends a call
        crashed = self._running.done()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        return crashed, acknowledged.is_set()

    async def _lead(self) -> None:
        await self._stop()
        self.store = await self.cluster.recover(OPTIONS)
        self._running = asyncio.create_task(self.store.run())

    async def _stop(self) -> None:
        if (running := getattr(self, "_running", None)) is None:
            return
        running.cancel()
        ended = (await asyncio.gather(running, return_exceptions=True))[0]
        if isinstance(ended, BaseExceptionGroup):
            assert ended.subgroup(FailpointHit) is not None, ended.exceptions
        else:
            assert isinstance(ended, asyncio.CancelledError), ended

    async def _only_named_chunks_are_left(self) -> None:
        """The data are those of the oracle, and the chunks those that they name: the collector gets there."""
        await self.store.rolled()
        assert await self._contents() == self.true
        async with asyncio.timeout(60):
            while await self._stored_names() != set(named := await self._named()):  # noqa: ASYNC110 - the collector's work
                await asyncio.sleep(0.002)
        assert {value for name, value in self.true.items() if len(value) > SMALL.value_bytes_max} == {
            self.true[name] for name in named.values() if len(self.true[name]) > SMALL.value_bytes_max
        }
        data = await self.cluster.data()
        data.pop(key("seal", "c"), None)
        assert data == {key(name): value for name, value in self.true.items()}

    async def _stored_names(self) -> set[str]:
        return {name.removesuffix("/") for name in await self.cluster.inner.list(f"g/{GENERATION}/b/")}

    async def _named(self) -> dict[str, str]:
        """Names of chunks that a data key's manifest tells, and whose."""
        found = {}
        for name in self.true:
            item = await self.cluster.inner.get(f"g/{GENERATION}/d/{key(name)}")
            assert item is not None
            if (manifest := decode_manifest(item.value)) is not None:
                found[manifest.name] = name
        return found

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(60):
                return await work

        return self._runner.run(bounded())


TestChunksMachine = ChunksMachine.TestCase
TestChunksMachine.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
