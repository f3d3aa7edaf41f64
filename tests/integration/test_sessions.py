"""What a session has seen is never taken back: two clusters with their managers, then with their processes."""

from __future__ import annotations

import asyncio
import operator
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest
from sidecar.replication.modes import DR, PERFORMANCE
from sidecar.replication.sessions import ELSEWHERE, LOST, Found
from tests.integration.test_main_job import consul_cluster
from tests.support import disaster
from tests.support.cluster import STEADY, Node, Reply, embedded_storage, replicate
from tests.support.cluster import Cluster as Processes
from tests.support.consul_server import ConsulServer
from tests.support.proxy import FaultProxy
from tests.support.replication_cluster import OPTIONS, Cluster, Pair, in_step, primary_in, until
from tests.support.sessions import Event, violations

LONG = replace(OPTIONS, wal_wait_s=120.0)
"""Longer than any wait that ends well takes; :func:`impatient` where one is to be in vain."""


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with primary_in(primary=Cluster("us", options=LONG)) as pair:
        yield pair


def impatient(cluster: Cluster, wait_s: float = 0.3) -> None:
    """Have a read wait for no longer than this from now on."""
    cluster.manager.sessions._wait_s = wait_s


async def write(cluster: Cluster, key: str = "r/m/a") -> str:
    """Commit; the header of the answer."""
    head = await cluster.store.commit([Write(key, b"v")])
    header = cluster.manager.sessions.after(written=head.index, answered="", asked=False)
    assert header
    return header


def told(cluster: Cluster) -> str:
    """What a read shows now."""
    return cluster.manager.sessions.after(written=0, answered="", asked=True)


async def test_a_secondary_waits_for_the_primarys_writes_and_no_longer_than_it_may(pair: Pair) -> None:
    primary = pair.primary
    await primary.manager.primary_enable("performance", "")
    secondary = await pair.activate(options=LONG)
    await until(lambda: in_step(primary, secondary))
    assert await secondary.manager.sessions.require([await write(primary)]) == Found()
    assert "r/m/a" in secondary.store.data

    blocked, applied = asyncio.Event(), secondary.store.commit

    async def late(writes: Any, **options: Any) -> Any:
        await blocked.wait()
        return await applied(writes, **options)

    secondary.store.commit = late  # type: ignore[method-assign]  # the applier stands still, the link does not
    header = await write(primary, "r/m/b")
    impatient(secondary)
    assert await secondary.manager.sessions.require([header]) == Found(missing=True, upstream=True)
    assert await primary.manager.sessions.require([header]) == Found()
    impatient(secondary, LONG.wal_wait_s)
    waiting = asyncio.create_task(secondary.manager.sessions.require([header]))
    await asyncio.sleep(0)
    blocked.set()
    assert await waiting == Found()
    assert "r/m/b" in secondary.store.data


async def test_reads_are_monotonic_between_clusters_of_a_set(pair: Pair) -> None:
    primary = pair.primary
    await primary.manager.primary_enable("performance", "")
    ahead, behind = await pair.activate("ahead", LONG), await pair.activate("behind", LONG)
    await until(lambda: in_step(primary, ahead) and in_step(primary, behind))
    await behind.listener.close()
    await behind.stop()
    stopped = await pair.start("behind", behind.store, LONG)
    applier = stopped.manager.performance.secondary
    assert applier is not None
    await until(lambda: in_step(primary, stopped))

    async def never(writes: Any, **options: Any) -> Any:
        await asyncio.get_running_loop().create_future()

    stopped.store.commit = never  # type: ignore[method-assign]  # it applies nothing more
    await write(primary)
    await until(lambda: "r/m/a" in ahead.store.data)
    shown = told(ahead)
    impatient(stopped)
    assert (await stopped.manager.sessions.require([shown])).missing, "older than what the session has read"
    assert await ahead.manager.sessions.require([told(stopped)]) == Found()
    local = ahead.manager.sessions.after(written=ahead.store.head.index, answered="", asked=False)
    assert await stopped.manager.sessions.require([local]) == Found(), "another cluster's own data is never here"


async def test_after_a_failover_an_index_is_judged_by_the_fork_point(pair: Pair) -> None:
    primary = pair.primary
    await primary.manager.primary_enable("performance", "")
    secondary = await pair.activate(options=LONG)
    kept = await write(primary)
    await until(lambda: in_step(primary, secondary))
    assert await secondary.manager.sessions.require([kept]) == Found()
    await secondary.stop()
    lost = await write(primary, "r/m/lost")
    await primary.stop()
    promoted = await pair.start("eu", secondary.store, LONG)
    await promoted.manager.secondary_promote("performance", "", force=True, preview=False)
    before_s = time.monotonic()
    assert await promoted.manager.sessions.require([kept]) == Found()
    assert await promoted.manager.sessions.require([lost]) == Found(warnings=(LOST,))
    assert time.monotonic() - before_s < LONG.wal_wait_s, "answered at once: waiting would be in vain"
    newer = await write(promoted, "r/m/newer")
    assert await promoted.manager.sessions.require([kept, newer]) == Found()
    old = await pair.start("us-again", primary.store, LONG)
    impatient(old)
    assert (await old.manager.sessions.require([newer])).missing, "a replaced primary does not answer for its successor"


async def test_a_promoted_mirror_knows_what_its_primarys_clients_have_seen(pair: Pair) -> None:
    primary = pair.primary
    await primary.manager.primary_enable("dr", "")
    mirror = await pair.activate("mirror", LONG, mode=DR)
    kept = await write(primary)
    await until(lambda: in_step(primary, mirror, DR))
    await mirror.stop()
    lost = await write(primary, "r/m/lost")
    await primary.stop()
    promoted = await pair.start("mirror", mirror.store, LONG)
    # The in-memory clusters are named by their node; a promoted mirror takes over its primary's identity.
    promoted.manager.sessions._cluster_id = "cluster-us"
    await promoted.manager.secondary_promote("dr", "", force=True, preview=False)
    await until(lambda: promoted.tenures == 2 and not promoted.manager.mirrors)
    promoted.manager.sessions._cluster_id = "cluster-us"
    assert await promoted.manager.sessions.require([kept]) == Found()
    assert await promoted.manager.sessions.require([lost]) == Found(warnings=(LOST,))


async def test_what_nobody_of_the_set_made_is_refused_or_said_to_be_unknown(pair: Pair) -> None:
    primary = pair.primary
    alone = await pair.start("alone", options=LONG)
    await primary.manager.primary_enable("performance", "")
    header = await write(primary)
    assert await alone.manager.sessions.require([header]) == Found(warnings=(ELSEWHERE,))
    assert await alone.manager.sessions.require(["", " "]) == Found()
    for forged in ("nonsense", header[:-4], "AAAA" + header):
        with pytest.raises(InvalidRequest, match="invalid X-Vault-Index header"):
            await primary.manager.sessions.require([forged])
    with pytest.raises(InvalidRequest, match="more than 16"):
        await primary.manager.sessions.require([header] * 17)
    assert primary.of(PERFORMANCE).role.kind == "primary"


# ---- processes

FAST = (
    'replication {\n  heartbeat_interval = "500ms"\n  best_effort_wal_wait_duration = "1s"\n'
    "  allow_forwarding_via_header = true\n}\n"
)


@dataclass
class Session:
    """A client that writes and reads one key of its own, anywhere, and keeps what it was told."""

    name: str
    nodes: dict[str, list[Node]]
    tokens: dict[str, str]
    indexed: bool
    events: list[Event] = field(default_factory=list)
    index: str = ""
    value: int = 0

    def write(self, via: str, node: Node) -> None:
        reply = node.call(
            "POST", f"secret/{self.name}", {"n": self.value + 1}, token=self.tokens[via], headers=self.headers()
        )
        if reply.status not in (200, 204):
            self.events.append(Event(self.name, "refused", 0, via, self.indexed))
            return
        self.value += 1
        self.index = reply.headers["x-vault-index"]
        warned = bool((reply.body or {}).get("warnings"))
        self.events.append(Event(self.name, "write", self.value, via, self.indexed, warned))

    def read(self, via: str, node: Node, *, indexed: bool | None = None) -> int:
        headers = self.headers() if indexed is None or indexed else {}
        reply = node.call("GET", f"secret/{self.name}", token=self.tokens[via], headers=headers)
        if reply.status not in (200, 404):
            self.events.append(Event(self.name, "refused", 0, via, self.indexed))
            return reply.status
        value = int(reply.data["n"]) if reply.status == 200 else 0
        self.index = reply.headers.get("x-vault-index", self.index)
        self.events.append(Event(self.name, "read", value, via, self.indexed))
        return reply.status

    def headers(self) -> dict[str, str]:
        return {"X-Vault-Index": self.index} if self.indexed else {}

    def done(self, did: str) -> int:
        """How many events of that kind there have been."""
        return sum(event.did == did for event in tuple(self.events))

    def run(self, stop: threading.Event) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            via = ("us", "eu")[turn % 2] if self.indexed else "eu"
            nodes = self.nodes[via]
            self.write(via, nodes[turn % len(nodes)])
            for other in ("eu", "us") if self.indexed else ("eu",):
                self.read(other, self.nodes[other][turn % len(self.nodes[other])])


@pytest.fixture
def two(consul_server: ConsulServer, tmp_path: Path) -> Iterator[tuple[Processes, Processes, FaultProxy]]:
    """us with one node behind a proxy, eu with two nodes, its performance secondary."""
    us = Processes([Node("us", tmp_path, embedded_storage(tmp_path / "us-data"), cluster_name="us", settings=FAST)])
    eu = consul_cluster(consul_server, tmp_path, "eu", 2, f"sessions-{tmp_path.name}")
    for node in eu.nodes:
        node.settings = FAST + STEADY
    proxy = FaultProxy(us.nodes[0].cluster_port)
    us.nodes[0].advertised_cluster_port = proxy.port
    try:
        us.bootstrap()
        eu.bootstrap()
        assert us.call("POST", "sys/mounts/secret", {"type": "kv"}).status == 204
        assert us.call("POST", "sys/auth/userpass", {"type": "userpass"}).status == 204
        rules = 'path "secret/*" { capabilities = ["create", "read", "update"] }'
        assert us.call("POST", "sys/policies/acl/app", {"policy": rules}).status == 204
        fields = {"password": "pw", "policies": "app"}
        assert us.call("POST", "auth/userpass/users/ann", fields).status == 204
        replicate(us, eu, "eu")
        eu.unseal()
        yield us, eu, proxy
    finally:
        us.kill()
        eu.kill()
        proxy.close()


def log_in(node: Node) -> str:
    return str(node.call("POST", "auth/userpass/login/ann", {"password": "pw"}).body["auth"]["client_token"])


def work(node: Node, sessions: list[Session], did: str) -> None:
    """For two seconds at least, and until every session has had some more answers of that kind."""
    until_s = time.monotonic() + 2.0
    wanted = [session.done(did) + (4 if did == "read" else 1) for session in sessions]

    def enough() -> bool:
        had = [session.done(did) for session in sessions]
        return time.monotonic() > until_s and all(map(operator.ge, had, wanted))

    node.wait_until(f"have {did} by every session", enough)


def test_sessions_of_real_clients_keep_their_promises_through_cuts(
    two: tuple[Processes, Processes, FaultProxy],
) -> None:
    us, eu, proxy = two
    nodes = {"us": [us.wait_active()], "eu": [eu.wait_active(), eu.standby()]}
    tokens = {name: log_in(some[0]) for name, some in nodes.items()}
    sessions = [Session(f"s{n}", nodes, tokens, indexed=n < 3) for n in range(4)]
    stop = threading.Event()
    threads = [threading.Thread(target=session.run, args=(stop,)) for session in sessions]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            work(us.nodes[0], sessions, "read")  # under load, whole
            proxy.cut()
            work(us.nodes[0], sessions, "refused")  # under load, cut: which is felt
            proxy.heal()
        work(us.nodes[0], sessions, "read")
    finally:
        stop.set()
        for thread in threads:
            thread.join(180)
    assert not any(thread.is_alive() for thread in threads)
    events = [event for session in sessions for event in session.events]
    assert not violations(events)

    session = sessions[0]
    eu.nodes[0].wait_until("be in step", lambda: session.read("eu", nodes["eu"][0]) == 200)
    proxy.cut()
    session.write("us", nodes["us"][0])
    for node in nodes["eu"]:
        assert session.read("eu", node) == 412, "active and standby say the same"
    # Negative control: the same read without the header is stale, and the checker would have noticed.
    assert session.read("eu", nodes["eu"][0], indexed=False) == 200
    assert violations(session.events)
    assert "after its write of" in violations(session.events)[0]
    session.events.pop()
    proxy.heal()
    eu.nodes[0].wait_until("be in step again", lambda: session.read("eu", nodes["eu"][0]) == 200)
    assert not violations(session.events)


def test_a_promoted_mirror_tells_clients_what_was_lost_and_keeps_what_was_not(tmp_path: Path) -> None:
    us, eu = (
        Processes([Node(name, tmp_path, embedded_storage(tmp_path / f"{name}-data"), cluster_name=name, settings=FAST)])
        for name in ("us", "eu")
    )
    proxy = FaultProxy(us.nodes[0].cluster_port)
    us.nodes[0].advertised_cluster_port = proxy.port
    try:
        us.bootstrap()
        eu.bootstrap()
        assert us.call("POST", "sys/mounts/secret", {"type": "kv"}).status == 204
        disaster.mirror(us, eu, "eu")
        kept = us.call("POST", "secret/kept", {"n": 1})
        disaster.wait_in_step(us, eu)
        proxy.cut()
        lost = us.call("POST", "secret/lost", {"n": 1})
        us.kill()
        promoted = disaster.promote(eu, disaster.operation_token(eu), force=True)
        assert promoted.status == 200, promoted.errors

        def read(path: str, *before: Reply) -> Reply:
            headers = {"X-Vault-Index": ", ".join(reply.headers["x-vault-index"] for reply in before)}
            return eu.nodes[0].call("GET", path, token=us.root_token, headers=headers)

        there = read("secret/kept", kept)
        assert (there.status, there.data, there.body["warnings"]) == (200, {"n": 1}, None)
        warned = read("secret/kept", kept, lost)
        assert (warned.status, warned.data, warned.body["warnings"]) == (200, {"n": 1}, [LOST])
        after = eu.nodes[0].call("POST", "secret/new", {"n": 2}, token=us.root_token)
        assert read("secret/new", kept, after).body["warnings"] is None
    finally:
        us.kill()
        eu.kill()
        proxy.close()
