"""The catalog of a real Consul follows a node's life."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from consul_backend.config import ConsulConfig
from sidecar.mesh.registration import ServiceRegistration
from tests.support.consul_server import ConsulServer

PORT = 8200
SERVICE = f"outrider-{uuid.uuid4().hex[:8]}"
"""A name of this run: other tests' nodes may linger in the same catalog."""
WAIT_S = 120.0


@asynccontextmanager
async def registered(server: ConsulServer, *, check_ttl_s: float) -> AsyncIterator[ServiceRegistration]:
    config = ConsulConfig(address=server.address, token=server.token)
    registration = ServiceRegistration.of(
        config, service=SERVICE, address="127.0.0.1", port=PORT, check_ttl_s=check_ttl_s
    )
    task = asyncio.create_task(registration.run())
    try:
        yield registration
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await registration.close()


async def instances(server: ConsulServer, query: str = "") -> list[dict[str, Any]]:
    answer = await asyncio.to_thread(server.call, "GET", f"health/service/{SERVICE}?{query}")
    found: list[dict[str, Any]] = answer.json
    return found


async def until(server: ConsulServer, condition: Callable[[list[dict[str, Any]]], bool], query: str = "") -> float:
    """Seconds until the catalog satisfies ``condition``, watched with a blocking query."""
    started = time.monotonic()
    index = 0
    while True:
        answer = await asyncio.to_thread(server.call, "GET", f"health/service/{SERVICE}?{query}&index={index}&wait=1s")
        if condition(answer.json):
            return time.monotonic() - started
        index = int(answer.headers.get("x-consul-index", "0"))
        assert time.monotonic() < started + WAIT_S, f"the catalog never got there: {answer.text}"


def tags_of(found: list[dict[str, Any]]) -> set[str]:
    return set(found[0]["Service"]["Tags"]) if found else set()


async def test_life_of_a_node(consul_server: ConsulServer) -> None:
    async with registered(consul_server, check_ttl_s=600) as registration:  # so that nothing passes or ends by time
        await until(consul_server, lambda found: tags_of(found) == {"standby"})
        assert await instances(consul_server, "passing") == []
        await registration.update(sealed=False)
        await until(consul_server, lambda found: tags_of(found) == {"standby", "initialized"}, "passing")
        await registration.update(active=True, performance_mode="primary")
        await until(consul_server, lambda found: "active" in tags_of(found), "passing")
        service = (await instances(consul_server, "passing&tag=active"))[0]["Service"]
        assert (service["ID"], service["Address"], service["Port"]) == (
            f"{SERVICE}:127.0.0.1:{PORT}",
            "127.0.0.1",
            PORT,
        )
        await registration.leaving()
        assert await until(consul_server, lambda found: found == [], "passing") < 2
        await until(consul_server, lambda found: "active" not in tags_of(found))
        await registration.update(active=False)
        await until(consul_server, lambda found: bool(found), "passing")
    await until(consul_server, lambda found: found == [])


async def test_an_entry_that_an_operator_removed_comes_back(consul_server: ConsulServer) -> None:
    async with registered(consul_server, check_ttl_s=0.4) as registration:
        await registration.update(sealed=False)
        await until(consul_server, lambda found: bool(found), "passing")
        path = f"agent/service/deregister/{SERVICE}:127.0.0.1:{PORT}"
        await asyncio.to_thread(consul_server.call, "PUT", path)
        await until(consul_server, lambda found: bool(found), "passing")
        await until(consul_server, lambda found: tags_of(found) == {"standby", "initialized"})


async def test_a_node_that_hangs_stops_passing(consul_server: ConsulServer) -> None:
    async with registered(consul_server, check_ttl_s=0.4) as registration:
        await registration.update(sealed=False)
        await until(consul_server, lambda found: bool(found), "passing")
        # What holds this lock never lets the next push through: the node is stuck, its entry is not.
        async with registration._pushing:
            assert await until(consul_server, lambda found: found == [], "passing") < 5
        await until(consul_server, lambda found: bool(found), "passing")
