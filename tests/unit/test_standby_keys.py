"""A cluster's store is replaced (an activation): which nodes get its root key, from whom, and what they do without."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest

from consul_backend.clock import SystemClock
from consul_backend.election import LeaderInfo
from consul_backend.embedded import EmbeddedStore
from consul_backend.physical import GENERATION_KEY
from consul_backend.txn import Cas
from sidecar.api.node_view import InitOptions
from sidecar.core.cluster import ClusterInfo
from sidecar.core.node_settings import Cors
from sidecar.core.seal_record import root_fingerprint
from sidecar.forwarding import ForwardingServer, KeySource, TenureCredentials, Told
from sidecar.generation import Generation, read_generation
from sidecar.sealing import Opened, Sealing
from sidecar.transport.forwarding import KeysReply, decode, encode
from sidecar.transport.listener import ClusterListener

NEW_KEY = b"n" * 32
CLUSTER = ClusterInfo("cluster", "name")


@pytest.fixture
async def physical() -> AsyncIterator[EmbeddedStore]:
    store = EmbeddedStore(None)
    await store.open()
    yield store
    await store.close()


async def unsealed(physical: EmbeddedStore) -> tuple[Sealing, Opened]:
    """A node of a new cluster with its keys."""
    sealing = Sealing(physical, node_id="n", cluster_name="c", clock=SystemClock())
    outcome = await sealing.init(InitOptions(1, 1))
    await sealing.unseal(outcome.keys[0])
    assert sealing.opened is not None
    return sealing, sealing.opened


async def replaced(physical: EmbeddedStore, root_key: bytes) -> Generation:
    """Point the cluster at another store."""
    found = await read_generation(physical)
    assert found is not None
    target = Generation(os.urandom(4).hex(), "store", root_fingerprint(root_key))
    await physical.txn([Cas(GENERATION_KEY, msgspec.json.encode(target), found[1])])
    return target


def telling(root_key: bytes | None) -> Callable[[str], Awaitable[bytes | None]]:
    async def ask(generation: str) -> bytes | None:
        return root_key

    return ask


async def test_a_standby_goes_on_with_the_key_that_it_is_told(physical: EmbeddedStore) -> None:
    sealing, opened = await unsealed(physical)
    target = await replaced(physical, NEW_KEY)
    assert "primary's unseal keys" in await sealing.stale_reason(opened)
    assert await sealing.reopen(opened, telling(NEW_KEY))
    now = sealing.opened
    assert now is not None
    assert (now.generation, now.root_key) == (target, NEW_KEY)
    assert await sealing.stale_reason(now) == ""


async def test_the_same_root_key_needs_no_telling(physical: EmbeddedStore) -> None:
    sealing, opened = await unsealed(physical)
    target = await replaced(physical, opened.root_key)

    async def ask(generation: str) -> bytes | None:
        raise AssertionError("asked for what it has")

    assert await sealing.reopen(opened, ask)
    assert sealing.opened is not None
    assert sealing.opened.generation == target


@pytest.mark.parametrize("told", [None, b"x" * 32])
async def test_nothing_or_a_wrong_key_leaves_it_as_it_was(
    physical: EmbeddedStore, told: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    sealing, opened = await unsealed(physical)
    await replaced(physical, NEW_KEY)
    assert not await sealing.reopen(opened, telling(told))
    assert sealing.opened is opened
    assert ("security: the active node sent another root key" in caplog.text) == (told is not None)


async def test_who_was_sealed_meanwhile_stays_sealed(physical: EmbeddedStore) -> None:
    sealing, opened = await unsealed(physical)
    await replaced(physical, NEW_KEY)

    async def ask(generation: str) -> bytes | None:
        sealing.seal()
        return NEW_KEY

    assert not await sealing.reopen(opened, ask)
    assert sealing.opened is None


def forwarding(credentials: TenureCredentials, root_key_of: Callable[[str], bytes | None]) -> ForwardingServer:
    async def nobody(request: object) -> None:
        raise AssertionError

    return ForwardingServer(
        credentials,
        cluster_id="cluster",
        own_cluster_addr="https://127.0.0.1:1",
        handle=nobody,  # type: ignore[arg-type]  # is not called
        told=lambda: Told(("disabled", "disabled"), 1, 250, Cors()),
        root_key_of=root_key_of,
    )


async def test_only_a_node_of_the_old_cluster_is_told_and_only_of_that_store() -> None:
    credentials, strangers = TenureCredentials.make(), TenureCredentials.make()
    asked: list[str] = []

    def root_key_of(generation: str) -> bytes | None:
        asked.append(generation)
        return NEW_KEY if generation == "new" and len(asked) > 1 else None

    listener = ClusterListener("127.0.0.1", 0)
    await listener.start()
    try:
        listener.add(forwarding(credentials, root_key_of).purpose())
        leader = LeaderInfo("n", "http://127.0.0.1:2", f"https://127.0.0.1:{listener.port}", credentials.sni)
        source = KeySource(leader, credentials.record(CLUSTER))
        assert await source.root_key_of("new", timeout_s=120, retry_s=0.01) == NEW_KEY, "asked again: it was too early"
        assert await source.root_key_of("other", timeout_s=0.3, retry_s=0.01) is None
        forged = msgspec.structs.replace(strangers.record(CLUSTER), sni=credentials.sni)
        assert await KeySource(leader, forged).root_key_of("theirs", timeout_s=0.5, retry_s=0.05) is None
        assert "theirs" not in asked, "a stranger's certificate reaches no handler"
        # The tenure that replaced the store is over, and still tells, until its time is up.
        retiring = asyncio.create_task(listener.retire(credentials.sni, 600, at_least_s=600))
        await asyncio.sleep(0)
        assert await source.root_key_of("new", timeout_s=120, retry_s=0.01) == NEW_KEY
        retiring.cancel()
        await listener.retire(credentials.sni, 0.1, at_least_s=0.01)
        assert await source.root_key_of("new", timeout_s=0.3, retry_s=0.05) is None
    finally:
        await listener.close()


def test_the_key_is_shown_nowhere() -> None:
    reply = KeysReply(NEW_KEY)
    assert "nnn" not in repr(reply)
    assert decode(encode(reply), KeysReply).root_key == NEW_KEY
