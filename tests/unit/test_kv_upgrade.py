"""From version 1 of the key/value engine to version 2, also where a crash ends any step of it."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from plugin_api.errors import InvalidRequest
from plugin_api.storage import Write
from plugin_api.testing import MemoryStorage, make_context
from sidecar.engines.kv import KV
from sidecar.engines.kv_upgrade import UNDER_WAY
from tests.support.kv_mount import CREATE, LIST, READ, Mount
from tests.support.service_node import running, with_kv

# Names that version 2 uses itself are ordinary secrets of version 1.
SECRETS = ("a", "a/b", "config", "metadata/a", "metadata/a/b", "versions/a/1", "versions/a", "data/a", "deep/er/x")


async def filled() -> Mount:
    mount = Mount("1")
    for name in SECRETS:
        await mount(CREATE, name, {"name": name})
    return mount


def as_version_2(mount: Mount) -> None:
    mount.engine = KV(make_context(type_name="kv", options={"version": "2"}, storage=mount.storage, now=mount.clock))


async def check_upgraded(mount: Mount) -> None:
    for name in SECRETS:
        read = await mount.data(READ, f"data/{name}")
        assert read["data"] == {"name": name}
        assert read["metadata"]["version"] == 1
    assert (await mount.data(LIST, "metadata/"))["keys"] == sorted(
        {name.partition("/")[0] + ("/" if "/" in name else "") for name in SECRETS}
    )
    assert (await mount.data(READ, "config"))["max_versions"] == 0
    assert not [path for path in mount.storage.entries if not path.startswith(("metadata/", "versions/"))]


async def test_every_value_becomes_version_1() -> None:
    mount = await filled()
    assert len(await mount.engine.retune({"version": "2"})) == 1
    with pytest.raises(InvalidRequest, match="brief period"):
        await mount(READ, "a")
    as_version_2(mount)
    with pytest.raises(InvalidRequest) as refused:
        await mount(READ, "data/a")
    assert str(refused.value) == UNDER_WAY
    await mount.engine.initialize()
    await check_upgraded(mount)
    await mount.engine.initialize()
    await check_upgraded(mount)


class Crash(Exception):
    """The process ended."""


class CrashingStorage(MemoryStorage):
    """Fails every commit from the ``after``-th on."""

    def __init__(self, entries: dict[str, bytes], after: int) -> None:
        super().__init__(entries)
        self.left = after

    async def commit(self, writes: list[Write]) -> None:
        self.left -= 1
        if self.left < 0:
            raise Crash
        await super().commit(writes)


async def test_a_crash_after_any_commit_loses_nothing() -> None:
    start = await filled()
    await start.engine.retune({"version": "2"})
    entries = dict(start.storage.entries)
    for after in itertools.count():
        crashing = CrashingStorage(entries, after)
        mount = Mount("2")
        mount.storage = crashing
        as_version_2(mount)
        try:
            await mount.engine.initialize()
        except Crash:
            mount.storage = MemoryStorage(crashing.entries)
            as_version_2(mount)
            await mount.engine.initialize()
            await check_upgraded(mount)
            continue
        assert after > len(SECRETS)
        return


async def test_a_mark_without_an_upgrade_is_not_seen() -> None:
    mount = await filled()
    await mount.engine.retune({"version": "2"})
    mount.engine = KV(make_context(type_name="kv", options={"version": "1"}, storage=mount.storage))
    assert (await mount.data(LIST, ""))["keys"] == ["a", "a/", "config", "data/", "deep/", "metadata/", "versions/"]


async def test_no_write_of_version_1_comes_after_the_mark() -> None:
    mount = Mount("1")
    gate, waiting = asyncio.Event(), asyncio.Event()
    put = mount.storage.put

    async def slow_put(path: str, value: bytes) -> None:
        waiting.set()
        await gate.wait()
        await put(path, value)

    mount.storage.put = slow_put  # type: ignore[method-assign]  # the one commit that a test can hold up
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(mount(CREATE, "late", {"x": 1}))
        await waiting.wait()
        mount.storage.put = put  # type: ignore[method-assign]  # stands in for one call
        retuning = tasks.create_task(mount.engine.retune({"version": "2"}))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not retuning.done()
        gate.set()
    as_version_2(mount)
    await mount.engine.initialize()
    assert (await mount.data(READ, "data/late"))["data"] == {"x": 1}


async def test_what_cannot_be_done() -> None:
    assert await Mount("2").engine.retune({"version": "2"}) == []
    for version, text in (("1", "downgrade"), ("3", "1 or 2")):
        with pytest.raises(InvalidRequest, match=text):
            await Mount("2").engine.retune({"version": version})


async def test_over_http_a_mount_is_upgraded_by_tuning_it() -> None:
    async with running() as node:
        await with_kv(node, "1")
        await node.call("PUT", "secret/a", {"x": "1"})
        running_service = asyncio.create_task(node.service.run())
        try:
            tuned = await node.call("POST", "sys/mounts/secret/tune", {"options": {"version": "2"}})
            assert tuned.status == 200
            assert tuned.body["warnings"][0].startswith("Upgrading mount from version 1 to version 2.")
            async with asyncio.timeout(120):
                while (reply := await node.call("GET", "secret/data/a")).status == 400:
                    assert reply.errors == [UNDER_WAY]
            assert reply.data["data"] == {"x": "1"}
            again = await node.call("POST", "sys/mounts/secret/tune", {"options": {"version": "1"}})
            assert again.status == 400
        finally:
            running_service.cancel()
