"""Faults around a node on real Consul: pauses, operators' hands, a bad network, a store that changes underneath."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from consul_backend.config import ConsulConfig
from consul_backend.store import ConsulStore
from tests.support.cluster import Cluster, Node, Reply, consul_storage, ready
from tests.support.consul_server import ConsulServer
from tests.support.faults import FAILED, MOUNT, UNKNOWN, Client, Writers, arm, await_killed, check_store, mount_load
from tests.support.proxy import FaultProxy

SETTINGS = (
    'sidecar {\n  beat_ttl = "1500ms"\n  beat_interval = "300ms"\n'
    '  step_down_grace = "300ms"\n  flush_interval = "50ms"\n}\n'
)


@pytest.fixture(scope="module")
def server() -> Iterator[ConsulServer]:
    """This file's own: it is restarted and its sessions are destroyed."""
    with ConsulServer() as started:
        yield started


@contextlib.contextmanager
def cluster_on(server: ConsulServer, home: Path, nodes: int, *, address: str = "") -> Iterator[Cluster]:
    """A cluster under a prefix of its own, with the load mount."""
    prefix = f"outrider/{uuid.uuid4().hex[:8]}/"
    storage = consul_storage(address or server.address, server.token, prefix)
    cluster = Cluster([Node(f"node-{n}", home, storage, settings=SETTINGS) for n in range(nodes)])
    try:
        cluster.bootstrap()
        mount_load(cluster.call)
        yield cluster
    finally:
        cluster.kill()


def prefix_of(cluster: Cluster) -> str:
    """Where in Consul the cluster lives."""
    return cluster.nodes[0].storage.split('path = "')[1].split('"')[0]


@pytest.fixture(scope="module")
def shared(server: ConsulServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes that outlive the tests here."""
    with cluster_on(server, tmp_path_factory.mktemp("faults"), 2) as cluster:
        yield cluster


@pytest.fixture
def pair(shared: Cluster) -> Iterator[Cluster]:
    """The two nodes, one of them leading; neither may have exited or sealed itself by the end."""
    shared.wait_active()
    for node in shared.nodes:
        node.wait_until("be there", lambda node=node: ready(node))
    yield shared
    assert all(node.running for node in shared.nodes)
    assert not any(node.call("GET", "sys/seal-status").body["sealed"] for node in shared.nodes)


def leads(node: Node) -> bool:
    return (reply := node.health()) is not None and reply.status == 200


async def check(server: ConsulServer, cluster: Cluster) -> None:
    """The whole store of a cluster whose nodes are down or idle."""
    store = ConsulStore(ConsulConfig(address=server.address, token=server.token, path=prefix_of(cluster)))
    await store.open()
    try:
        await check_store(store)
    finally:
        await store.close()


class Register:
    """One key with growing numbers: one thread writes it through any node, one per node reads it there.

    A read must not be older than what was acknowledged before it began, whoever answers.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._path = f"{MOUNT}/register-{uuid.uuid4().hex[:6]}"
        self._stopped = threading.Event()
        self._acked = 0
        self.reads = 0
        self.stale: list[tuple[str, int, int]] = []
        self._threads = [threading.Thread(target=self._write, daemon=True)]
        self._threads += [threading.Thread(target=self._read, args=(node,), daemon=True) for node in cluster.nodes]

    def __enter__(self) -> Register:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(60)

    def _write(self) -> None:
        clients = [Client(node, self._cluster.root_token) for node in self._cluster.nodes]
        number, turn = 0, 0
        while not self._stopped.is_set():
            number += 1
            with contextlib.suppress(Exception):
                if clients[turn % len(clients)].call("PUT", self._path, {"v": number})[0] < 300:
                    self._acked = number
                    continue
            turn += 1
            self._stopped.wait(0.01)

    def _read(self, node: Node) -> None:
        client = Client(node, self._cluster.root_token)
        while not self._stopped.is_set():
            before = self._acked
            with contextlib.suppress(Exception):
                status, body = client.call("GET", self._path)
                if status == 200:
                    self.reads += 1
                    if body["data"]["v"] < before:
                        self.stale.append((node.name, body["data"]["v"], before))
            self._stopped.wait(0.002)


# -- pauses


async def test_an_active_paused_for_longer_than_its_beat_commits_and_serves_nothing_stale(
    server: ConsulServer, pair: Cluster
) -> None:
    paused, successor = pair.wait_active(), pair.standby()
    with Register(pair) as register, Writers([paused], pair.root_token, "paused", writers=16, pace_s=0) as queued:
        queued.wait_acked(100)
        paused.freeze()
        try:
            successor.wait_until("lead", lambda: leads(successor))
            with Writers([successor], pair.root_token, "successor") as load:
                load.wait_acked(50)
        finally:
            paused.thaw()
        queued.wait_acked(50)
        paused.wait_until("stand by", lambda: (reply := paused.health()) is not None and reply.status == 429)
    assert register.reads > 100
    assert register.stale == []
    queued.judge(successor)
    load.judge(paused)


# -- crashes (each point there is, on the embedded store: test_failpoints.py)


@pytest.mark.parametrize("point", ["commit:after-reply", "flush:after-reply", "recovery:before-tenure"])
def test_an_active_killed_at_a_failpoint_is_succeeded(pair: Cluster, point: str) -> None:
    successor, victim = pair.wait_active(), pair.standby()
    victim.kill()
    arm(victim, f"{point}=kill:{1 if point.startswith('recovery') else 5}")
    victim.start()
    victim.unseal(pair.keys)
    victim.wait_until("stand by", lambda: ready(victim))
    with Writers(pair.nodes, pair.root_token, point) as load:
        load.wait_acked(20)
        assert successor.call("PUT", "sys/step-down", token=pair.root_token).status == 204
        await_killed(victim)
        successor.wait_until("lead again", lambda: leads(successor))
        arm(victim, "")
        victim.start()
        victim.unseal(pair.keys)
        load.wait_acked(20)
    victim.wait_until("stand by", lambda: ready(victim))
    load.judge(victim)


# -- operators


def destroy_session(server: ConsulServer, cluster: Cluster) -> None:
    lock = server.call("GET", f"kv/{prefix_of(cluster)}lock").json[0]
    assert server.call("PUT", f"session/destroy/{lock['Session']}").status == 200


def delete_lock(server: ConsulServer, cluster: Cluster) -> None:
    assert server.call("DELETE", f"kv/{prefix_of(cluster)}lock").status == 200


def overwrite_lock(server: ConsulServer, cluster: Cluster) -> None:
    server.raw_put(f"{prefix_of(cluster)}lock", b"not a leader")


def release_lock(server: ConsulServer, cluster: Cluster) -> None:
    lock = server.call("GET", f"kv/{prefix_of(cluster)}lock").json[0]
    assert server.call("PUT", f"kv/{prefix_of(cluster)}lock?release={lock['Session']}", b"").status == 200


def restart_agent(server: ConsulServer, cluster: Cluster) -> None:
    server.kill()
    server.restart()


@pytest.mark.parametrize("hand", [destroy_session, delete_lock, overwrite_lock, release_lock, restart_agent])
async def test_an_operator_s_hand_costs_no_write(
    server: ConsulServer, pair: Cluster, hand: Callable[[ConsulServer, Cluster], None]
) -> None:
    with Register(pair) as register, Writers(pair.nodes, pair.root_token, hand.__name__) as load:
        load.wait_acked(50)
        hand(server, pair)
        load.wait_acked(100)
    assert register.reads > 50
    assert register.stale == []
    load.judge(pair.wait_active())
    assert load.longest_gap_s() < 10


def test_the_same_configuration_twice(server: ConsulServer, pair: Cluster, tmp_path: Path) -> None:
    """On one machine the ports decide; elsewhere two nodes call themselves the same, and still one leads."""
    active = pair.wait_active()
    again = Node("again", tmp_path, active.storage, settings=SETTINGS, api_port=active.api_port)
    again.start(wait=False)
    again.wait_until("refuse to start", lambda: not again.running)
    assert "address already in use" in again.log_tail().lower()
    impostor = Node("impostor", tmp_path, active.storage)
    lines = f'cluster_addr = "{active.cluster_address}"\n{SETTINGS}'
    impostor.write_config()
    text = impostor.config_path.read_text()
    text = text.replace(f'api_addr = "{impostor.address}"', f'api_addr = "{active.address}"')
    text = text.replace(f'cluster_addr = "{impostor.cluster_address}"', lines)
    try:
        with Writers([*pair.nodes, impostor], pair.root_token, "impostor") as load:
            impostor.write_config = lambda: impostor.config_path.write_text(text)  # type: ignore[method-assign]
            impostor.start()
            impostor.unseal(pair.keys)
            load.wait_acked(100)
            assert pair.call("PUT", "sys/step-down").status == 204
            load.wait_acked(100)
            assert [leads(node) for node in (*pair.nodes, impostor)].count(True) <= 1
    finally:
        impostor.kill()
    load.judge(pair.wait_active())


# -- the network between a node and Consul


def lose_consul(server: ConsulServer, home: Path, fault: str) -> None:
    """One node under load loses its Consul by ``fault``, and finds it again."""
    proxy = FaultProxy(int(server.address.rsplit(":", 1)[1]))
    try:
        with cluster_on(server, home, 1, address=f"127.0.0.1:{proxy.port}") as cluster:
            node = cluster.nodes[0]
            with Writers(cluster.nodes, cluster.root_token, fault, writers=8, pace_s=0) as load:
                load.wait_acked(100)
                getattr(proxy, fault)()
                node.wait_until("answer every writer", lambda: len(load.of(FAILED)) + len(load.of(UNKNOWN)) >= 8, 40)
                assert node.call("GET", f"{MOUNT}/x", token=cluster.root_token).status in (404, 503)
                proxy.heal()
                load.wait_acked(100)
            assert node.running
            for attempt in load.of(UNKNOWN):
                assert attempt.status == 500
                assert "outcome of this request is not known" in attempt.text
            assert {attempt.status for attempt in load.of(FAILED)} <= {503}
            assert load.of(UNKNOWN), "a request was under way when the answers stopped"
            load.judge(node)
            cluster.stop()
            asyncio.run(check(server, cluster))
    finally:
        proxy.close()


def test_a_node_loses_its_consul_and_finds_it_again(server: ConsulServer, tmp_path: Path) -> None:
    """Once by refused connections, once by silence; both wait a lot, so they do it at the same time."""
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(lose_consul, server, tmp_path / fault, fault) for fault in ("cut", "blackhole")]
        for run in runs:
            run.result()


def test_every_reset_leaves_an_honest_answer(server: ConsulServer, tmp_path: Path) -> None:
    """Connections break again and again, each time with a transaction under way; the store itself is well."""
    proxy = FaultProxy(int(server.address.rsplit(":", 1)[1]))
    try:
        with (
            cluster_on(server, tmp_path, 1, address=f"127.0.0.1:{proxy.port}") as cluster,
            Writers(cluster.nodes, cluster.root_token, "reset", writers=8, pace_s=0) as load,
        ):
            for _ in range(20):
                load.wait_acked(20)
                proxy.cut()
                proxy.heal()
            load.wait_acked(20)
            load.finish()
            load.judge(cluster.wait_active())
            assert not load.of(UNKNOWN), "an identical transaction, sent again, settles what was lost"
    finally:
        proxy.close()


# -- a store that changes underneath


def data_key(server: ConsulServer, cluster: Cluster, path: str) -> str:
    """The full Consul key of an entry at the load mount."""
    names = server.call("GET", f"kv/{prefix_of(cluster)}g/?keys").json
    (found,) = [name for name in names if "/d/r/" in name and name.endswith(f"/{path}")]
    return str(found)


def newest_record(server: ConsulServer, cluster: Cluster) -> str:
    """The full Consul key of the newest record."""
    names = server.call("GET", f"kv/{prefix_of(cluster)}g/?keys").json
    return max(name for name in names if "/wal/" in name)


def put(cluster: Cluster, path: str, value: str, **options: Any) -> Reply:
    return cluster.nodes[0].call("PUT", f"{MOUNT}/{path}", {"v": value}, token=cluster.root_token, **options)


def sealed_with_reason(node: Node) -> str:
    """Why the node sealed itself, waiting for it to do so."""
    node.wait_until("stop", lambda: node.call("GET", "sys/seal-status").body["sealed"])
    return " ".join(node.call("GET", "sys/seal-status").body["warnings"])


def serves_nothing(cluster: Cluster, path: str) -> bool:
    """Neither reads nor writes, at any node."""
    replies = [
        node.call(method, f"{MOUNT}/{path}", {"v": "new"} if method == "PUT" else None, token=cluster.root_token)
        for node in cluster.nodes
        for method in ("GET", "PUT")
    ]
    return {reply.status for reply in replies} == {503}


def echoed_since(active: Node, cluster: Cluster, since: datetime) -> bool:
    """Whether every standby has exchanged a heartbeat with the active node since then."""
    nodes = active.call("GET", "sys/ha-status", token=cluster.root_token).data["nodes"]
    echoes = [datetime.fromisoformat(node["last_echo"]) for node in nodes if not node["active_node"]]
    return len(echoes) == len(cluster.nodes) - 1 and all(echo > since for echo in echoes)


def flushed(server: ConsulServer, cluster: Cluster) -> bool:
    """Whether the index is stored up to the newest record, so that an idle node writes nothing more."""
    names = server.call("GET", f"kv/{prefix_of(cluster)}g/?keys").json
    (checkpoint,) = [name for name in names if name.endswith("/checkpoint")] or [""]
    record = max(name for name in names if "/wal/" in name)
    indexes = [server.call("GET", f"kv/{name}").json[0]["ModifyIndex"] for name in (checkpoint, record) if name]
    return len(indexes) == 2 and indexes[0] > indexes[1]


def test_an_overwritten_record_stops_the_node(server: ConsulServer, tmp_path: Path) -> None:
    with cluster_on(server, tmp_path, 1) as cluster:
        assert put(cluster, "a", "1").status == 204
        key = newest_record(server, cluster)
        whole = server.raw_get(key)
        assert whole is not None
        server.raw_put(key, whole[:-1] + bytes([whole[-1] ^ 1]))
        assert put(cluster, "b", "1").status in (500, 503)
        assert "changed underneath" in sealed_with_reason(cluster.nodes[0])
        assert serves_nothing(cluster, "a")
        cluster.nodes[0].unseal(cluster.keys)
        assert key.rsplit("/", 1)[1] in sealed_with_reason(cluster.nodes[0]), "recovery names the record"
        server.raw_put(key, whole)
        cluster.unseal()
        assert cluster.call("GET", f"{MOUNT}/a").data == {"v": "1"}
        assert cluster.call("GET", f"{MOUNT}/b").status == 404


def test_an_overwritten_entry_is_not_served(server: ConsulServer, tmp_path: Path) -> None:
    with cluster_on(server, tmp_path, 1) as cluster:
        for name in ("mine", "other"):
            assert put(cluster, name, name).status == 204
        mine, other = (data_key(server, cluster, name) for name in ("mine", "other"))
        kept = server.raw_get(mine)
        theirs = server.raw_get(other)
        assert kept is not None
        assert theirs is not None
        cluster.nodes[0].stop()
        cluster.start()
        cluster.unseal()
        for damage in (b"", theirs, kept[:-1] + bytes([kept[-1] ^ 1])):
            server.raw_put(mine, damage)
            reply = cluster.call("GET", f"{MOUNT}/mine")
            assert reply.status == 500
            assert reply.errors == ["stored data failed its integrity check"]
            assert cluster.call("GET", f"{MOUNT}/other").data == {"v": "other"}
        server.raw_put(mine, kept)
        assert cluster.call("GET", f"{MOUNT}/mine").data == {"v": "mine"}


# Last, because a restored snapshot takes everything else on that server back as well.


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("idle", [False, True])
def test_a_snapshot_put_back_during_a_tenure_stops_every_node(
    server: ConsulServer, tmp_path: Path, nodes: int, idle: bool
) -> None:
    """``idle``: nobody writes after the restore, so that no commit finds out."""
    with cluster_on(server, tmp_path, nodes) as cluster:
        active = cluster.wait_active()
        assert cluster.call("PUT", f"{MOUNT}/kept", {"v": "1"}).status == 204
        snapshot = server.snapshot()
        for n in range(20):
            assert cluster.call("PUT", f"{MOUNT}/lost-{n}", {"v": "1"}).status == 204
        if idle:
            active.wait_until("flush its index", lambda: flushed(server, cluster))
        written = datetime.now(UTC)
        active.wait_until("tell its standbys of the newest record", lambda: echoed_since(active, cluster, written))
        server.restore(snapshot)
        if not idle:
            assert active.call("PUT", f"{MOUNT}/next", {"v": "1"}, token=cluster.root_token).status in (500, 503)
        for node in cluster.nodes:
            assert "restored" in sealed_with_reason(node)
        assert serves_nothing(cluster, "kept")
        assert all(node.running for node in cluster.nodes)


def test_a_snapshot_from_before_the_tenure_is_no_less_noticed(server: ConsulServer, tmp_path: Path) -> None:
    """It has no session of this tenure, so that the node loses its lock, is elected again and finds an older store.
    Whoever unseals it then has decided to go on with that."""
    with cluster_on(server, tmp_path, 1) as cluster:
        node = cluster.nodes[0]
        assert put(cluster, "kept", "1").status == 204
        snapshot = server.snapshot()
        node.kill()
        node.start()
        cluster.unseal()
        for n in range(20):
            assert put(cluster, f"lost-{n}", "1").status == 204
        server.restore(snapshot)
        assert "restored" in sealed_with_reason(node)
        assert serves_nothing(cluster, "kept")
        cluster.unseal()
        assert cluster.call("GET", f"{MOUNT}/kept").data == {"v": "1"}
        assert cluster.call("GET", f"{MOUNT}/lost-0").status == 404
