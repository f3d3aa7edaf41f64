"""What happens to requests while a node hands its role over: run, or certainly not run, and then held for the next."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from consul_backend.election import LeaderInfo
from sidecar.api.node_view import NotForwarded
from sidecar.core.cluster import ClusterInfo
from sidecar.core.node_settings import Cors
from sidecar.forwarding import ForwardingServer, Heard, StandbyForwarder, TenureCredentials, Told
from sidecar.node import ActiveRole, Node, NodeIdentity, StandbyRole
from sidecar.request.types import HttpRequest, HttpResponse
from sidecar.sealing import Sealing
from sidecar.transport.forwarding import Echo
from sidecar.transport.listener import ClusterListener

CLUSTER = ClusterInfo("cluster", "name")


@dataclass
class Service:
    """Answers once ``go`` is set."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    ran: int = 0

    async def handle(self, request: HttpRequest) -> HttpResponse:
        self.ran += 1
        self.started.set()
        await self.go.wait()
        return HttpResponse(body=b"done")


def active(service: Service) -> ActiveRole:
    return ActiveRole(service, cast(Any, None), CLUSTER, 0.0)


def a_request() -> HttpRequest:
    return HttpRequest("GET", "kv/a", remote_address="127.0.0.1")


@dataclass
class Pair:
    """An active node's end and a standby's, over a real cluster port."""

    role: ActiveRole
    service: Service
    listener: ClusterListener
    standby: StandbyForwarder
    sni: str
    server: ForwardingServer


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    service = Service()
    role = active(service)
    credentials = TenureCredentials.make()
    server = ForwardingServer(
        credentials,
        cluster_id="cluster",
        own_cluster_addr="https://127.0.0.1:1",
        handle=role.run,
        told=lambda: Told(("disabled", "disabled"), 1, 250, Cors(True, ("https://a.example",), ("X-A",))),
    )
    listener = ClusterListener("127.0.0.1", 0)
    await listener.start()
    listener.add(server.purpose())
    address = f"https://127.0.0.1:{listener.port}"
    leader = LeaderInfo("n", "http://127.0.0.1:2", address, credentials.sni)
    standby = StandbyForwarder(leader, credentials.record(CLUSTER), timeout_s=10)
    yield Pair(role, service, listener, standby, credentials.sni, server)
    service.go.set()
    await standby.close()
    await listener.close()


async def test_a_draining_node_finishes_what_runs_and_runs_nothing_more() -> None:
    service = Service()
    role = active(service)
    running = asyncio.create_task(role.run(a_request()))
    await service.started.wait()
    draining = asyncio.create_task(role.drain(10))
    await asyncio.sleep(0)
    with pytest.raises(NotForwarded):
        await role.run(a_request())
    assert not draining.done()
    service.go.set()
    assert (await running).body == b"done"
    await draining
    assert service.ran == 1


async def test_a_standby_is_told_that_its_request_was_not_run(pair: Pair) -> None:
    pair.service.go.set()
    assert (await pair.standby.forward(a_request())).body == b"done"
    await pair.role.drain(1)
    with pytest.raises(NotForwarded):
        await pair.standby.forward(a_request())
    assert pair.service.ran == 1


async def test_a_standby_that_leaves_waits_for_its_answers(pair: Pair) -> None:
    asked = asyncio.create_task(pair.standby.forward(a_request()))
    await pair.service.started.wait()
    leaving = asyncio.create_task(pair.standby.retire(10))
    await asyncio.sleep(0)
    with pytest.raises(NotForwarded, match="being left"):
        await pair.standby.forward(a_request())
    assert not leaving.done()
    pair.service.go.set()
    assert (await asked).body == b"done"
    await leaving


async def test_a_standby_does_not_wait_for_ever(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    asked = asyncio.create_task(pair.standby.forward(a_request()))
    await pair.service.started.wait()
    await pair.standby.retire(0.05)
    assert "1 requests unanswered" in caplog.text
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)


async def test_the_cluster_port_refuses_until_the_standbys_have_left(pair: Pair) -> None:
    pair.service.go.set()
    await pair.standby.forward(a_request())
    await pair.role.drain(1)
    retiring = asyncio.create_task(pair.listener.retire(pair.sni, 10))
    with pytest.raises(NotForwarded):
        await pair.standby.forward(a_request())
    assert not retiring.done()
    await pair.standby.close()
    async with asyncio.timeout(120):
        await retiring
    assert pair.listener.statistics()["connections"] == 0


async def test_the_cluster_port_does_not_wait_for_ever(pair: Pair) -> None:
    pair.service.go.set()
    await pair.standby.forward(a_request())
    async with asyncio.timeout(120):
        await pair.listener.retire(pair.sni, 0.05)


async def test_a_request_is_held_until_there_is_a_next_active_node(pair: Pair) -> None:
    """The node that steps down holds it, and forwards it when it has become a standby of the next."""
    pair.service.go.set()
    node = Node(
        NodeIdentity("n", "http://127.0.0.1:1", "https://127.0.0.1:2"),
        cast(Sealing, None),
        storage_type="consul",
        ha_enabled=True,
    )
    leaving = active(Service())
    node.take_role(leaving)
    await leaving.drain(1)
    held = asyncio.create_task(node.dispatch(a_request()))
    await asyncio.sleep(0)
    node.take_role(None)
    await asyncio.sleep(0)
    assert not held.done()
    node.take_role(StandbyRole(forwarder=pair.standby))
    async with asyncio.timeout(120):
        assert (await held).body == b"done"
    assert pair.service.ran == 1


async def test_a_request_is_not_held_for_ever() -> None:
    identity = NodeIdentity("n", "http://127.0.0.1:1", "https://127.0.0.1:2")
    node = Node(identity, cast(Sealing, None), storage_type="consul", ha_enabled=True, leader_wait_s=0.05)
    with pytest.raises(NotForwarded):
        await node.dispatch(a_request())


async def test_a_heartbeat_tells_both_ends_how_far_their_clocks_are_apart(pair: Pair) -> None:
    """What ``sys/ha-status`` and a standby's ``sys/health`` show, and which origins a standby may answer."""
    echo = Echo("s1", "https://s1:8200", "https://s1:8201", hostname="h", version="1", clock_ms=1, echo_ms=20)
    role = StandbyRole()
    role.heard(await pair.standby.echo(echo), 0.02)
    assert abs(role.skew_ms) < 60_000, "both clocks are this machine's"
    assert (role.canary_age_ms, role.cors) == (250, Cors(True, ("https://a.example",), ("X-A",)))
    (heard,) = pair.server.standbys()
    assert heard.skew_ms < -1_000_000, "its clock stands at 1970"
    ahead = Heard(Echo("s", "a", "c", clock_ms=1_005_000, echo_ms=20), 0.0, 1_000.0)
    assert ahead.skew_ms == 5_010
    assert Heard(Echo("s", "a", "c"), 0.0, 1_000.0).skew_ms == 0, "of a node that does not tell its clock"


async def test_a_standby_answers_pages_that_the_active_node_allows() -> None:
    node = Node(
        NodeIdentity("n", "http://127.0.0.1:1", "https://127.0.0.1:1"),
        cast(Sealing, None),
        storage_type="inmem",
        ha_enabled=True,
    )
    assert node.cors() == Cors(), "before anything was heard"
    role = StandbyRole(cors=Cors(True, ("https://a.example",), ()))
    node.take_role(role)
    assert node.cors().allows("https://a.example")
    assert not node.cors().allows("https://b.example")
