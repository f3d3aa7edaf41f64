"""The gate between service and store: who is refused what, and when nothing is under way any more."""

from __future__ import annotations

import asyncio

import pytest

from consul_backend.errors import NotApplied, Unavailable
from consul_backend.wal import Write
from plugin_api.errors import ReadOnlyStorage
from sidecar.core.write_gate import GatedStore, WriteGate
from tests.support.logical_store import MemoryLogicalStore

WRITES = {cls: Write(f"{cls}/m/a", b"x") for cls in "rlc"}


@pytest.mark.parametrize(
    ("closed", "refused"),
    [
        ((), {}),
        (("r",), {"r": ReadOnlyStorage}),
        (("r", "l"), {"r": NotApplied, "l": NotApplied}),
    ],
)
async def test_who_is_refused_what(closed: tuple[str, ...], refused: dict[str, type[Exception]]) -> None:
    gate = WriteGate()
    gate.restrict(closed)
    store = GatedStore(MemoryLogicalStore(), gate)
    for cls, write in WRITES.items():
        if cls in refused:
            with pytest.raises(refused[cls]):
                await store.commit([WRITES["c"], write])
            assert await store.get(WRITES["c"].key) is None, "all or nothing"
        else:
            await store.commit([write])
            await store.commit([Write(write.key, None)])


class SlowStore(MemoryLogicalStore):
    """Commits wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = asyncio.Event()
        self.let_go = asyncio.Event()
        self.error: Exception | None = None

    async def commit(self, writes):  # type: ignore[no-untyped-def]  # the signature of the class above
        self.begun.set()
        await self.let_go.wait()
        if self.error is not None:
            raise self.error
        return await super().commit(writes)


@pytest.mark.parametrize("error", [None, Unavailable("gone")])
async def test_settled_is_when_what_was_let_in_has_ended(error: Exception | None) -> None:
    gate, below = WriteGate(), SlowStore()
    below.error = error
    store = GatedStore(below, gate)
    await gate.settled()
    commit = asyncio.create_task(store.commit([WRITES["r"]]))
    await below.begun.wait()
    gate.restrict(("r",))
    settled = asyncio.create_task(gate.settled())
    with pytest.raises(ReadOnlyStorage):
        await store.commit([WRITES["r"]])
    await asyncio.sleep(0)
    assert not settled.done()
    below.let_go.set()
    await settled
    await asyncio.wait([commit])
    assert (commit.exception() is None) == (error is None)


async def test_a_cancelled_commit_is_under_way_no_more() -> None:
    gate, below = WriteGate(), SlowStore()
    commit = asyncio.create_task(GatedStore(below, gate).commit([WRITES["r"]]))
    await below.begun.wait()
    commit.cancel()
    await asyncio.wait([commit])
    await gate.settled()
