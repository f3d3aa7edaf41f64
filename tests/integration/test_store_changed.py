"""What is stored changes under a node, by other hands than its own: it is noticed, named, and never served."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from consul_backend.checkpoint import decode_checkpoint
from consul_backend.config import ConsulConfig
from consul_backend.store import ConsulStore
from tests.support.cluster import Cluster, Node, Reply, cluster_on
from tests.support.consul_server import POLICY_FILE, ConsulServer
from tests.support.faults import MOUNT, StoreFacts, Writers, check_store, mount_load
from tests.support.site import SETTINGS


@pytest.fixture(scope="module")
def server() -> Iterator[ConsulServer]:
    """This file's own: snapshots are put back."""
    with ConsulServer() as started:
        yield started


@contextlib.contextmanager
def loaded(server: ConsulServer, home: Path, nodes: int = 1, *, token: str = "") -> Iterator[Cluster]:
    """A cluster with the load mount."""
    with cluster_on(server, home, nodes, SETTINGS, token=token) as cluster:
        mount_load(cluster.call)
        yield cluster


def prefix_of(cluster: Cluster) -> str:
    """Where in Consul the cluster lives."""
    return cluster.nodes[0].storage.split('path = "')[1].split('"')[0]


def facts(server: ConsulServer, cluster: Cluster) -> StoreFacts:
    """The checked store of a cluster whose nodes are down."""

    async def check() -> StoreFacts:
        store = ConsulStore(ConsulConfig(address=server.address, token=server.token, path=prefix_of(cluster)))
        await store.open()
        try:
            return await check_store(store)
        finally:
            await store.close()

    return asyncio.run(check())


def names(server: ConsulServer, cluster: Cluster, part: str) -> list[str]:
    """Full Consul keys of the store that contain ``part``, in order."""
    return sorted(name for name in server.call("GET", f"kv/{prefix_of(cluster)}g/?keys").json if part in name)


def data_key(server: ConsulServer, cluster: Cluster, path: str) -> str:
    """The full Consul key of an entry at the load mount."""
    (found,) = [name for name in names(server, cluster, "/d/r/") if name.endswith(f"/{path}")]
    return found


def value_at(server: ConsulServer, key: str) -> bytes:
    value = server.raw_get(key)
    assert value is not None
    return value


def put(cluster: Cluster, path: str, value: str) -> Reply:
    return cluster.nodes[0].call("PUT", f"{MOUNT}/{path}", {"v": value}, token=cluster.root_token)


def get(cluster: Cluster, path: str) -> Reply:
    return cluster.nodes[0].call("GET", f"{MOUNT}/{path}", token=cluster.root_token)


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
    found, record = names(server, cluster, "/checkpoint"), names(server, cluster, "/wal/")[-1]
    if not found:
        return False
    generation = found[0].rsplit("/", 2)[1]
    return decode_checkpoint(generation, value_at(server, found[0])).head_index >= int(record.rsplit("/", 1)[1])


# -- the log


def torn(raw: bytes, others: list[bytes]) -> bytes | None:
    return raw[: len(raw) // 2]


def flipped(raw: bytes, others: list[bytes]) -> bytes | None:
    return raw[:-1] + bytes([raw[-1] ^ 1])


def foreign(raw: bytes, others: list[bytes]) -> bytes | None:
    return others[0]


def removed(raw: bytes, others: list[bytes]) -> bytes | None:
    return None


def damage(server: ConsulServer, key: str, value: bytes | None) -> None:
    if value is None:
        server.raw_delete(key)
    else:
        server.raw_put(key, value)


@pytest.mark.parametrize("how", [torn, flipped, foreign, removed])
def test_the_newest_record_is_damaged_under_a_node(
    server: ConsulServer, tmp_path: Path, how: Callable[[bytes, list[bytes]], bytes | None]
) -> None:
    """It stops, and starts only when the record is back: recovery names it."""
    with loaded(server, tmp_path) as cluster:
        (node,) = cluster.nodes
        assert put(cluster, "a", "1").status == 204
        node.wait_until("flush its index", lambda: flushed(server, cluster))
        *older, key = names(server, cluster, "/wal/")
        whole = value_at(server, key)
        damage(server, key, how(whole, [value_at(server, older[-1])]))
        assert put(cluster, "b", "1").status in (500, 503)
        assert "changed underneath" in sealed_with_reason(node)
        assert serves_nothing(cluster, "a")
        node.unseal(cluster.keys)
        reason = sealed_with_reason(node)
        assert key.rsplit("/", 1)[1].lstrip("0") in reason or "log shorter than the checkpoint" in reason
        assert serves_nothing(cluster, "a")
        server.raw_put(key, whole)
        cluster.unseal()
        assert cluster.call("GET", f"{MOUNT}/a").data == {"v": "1"}
        assert cluster.call("GET", f"{MOUNT}/b").status == 404


def test_a_record_in_the_middle_is_gone(server: ConsulServer, tmp_path: Path) -> None:
    with loaded(server, tmp_path) as cluster:
        for n in range(5):
            assert put(cluster, f"{n}", "1").status == 204
        cluster.stop()
        key = names(server, cluster, "/wal/")[-4]
        whole = value_at(server, key)
        server.raw_delete(key)
        cluster.start()
        cluster.nodes[0].unseal(cluster.keys)
        assert f"record {int(key.rsplit('/', 1)[1])} is missing" in sealed_with_reason(cluster.nodes[0])
        server.raw_put(key, whole)
        cluster.unseal()
        assert cluster.call("GET", f"{MOUNT}/3").data == {"v": "1"}


# -- the index


def test_the_stored_index_is_damaged_in_every_way(server: ConsulServer, tmp_path: Path) -> None:
    """F14, F15: found when the next tenure begins, and made anew from the log; and named while a node is active."""
    with loaded(server, tmp_path) as cluster:
        (node,) = cluster.nodes
        assert put(cluster, "a", "1").status == 204
        node.wait_until("flush its index", lambda: flushed(server, cluster))
        older = {key: value_at(server, key) for key in names(server, cluster, "/merkle/")}
        assert put(cluster, "b", "1").status == 204
        node.wait_until("flush its index", lambda: flushed(server, cluster))
        cluster.stop()
        facts(server, cluster)
        first, second = names(server, cluster, "/merkle/r/")[:2]
        (changed,) = [key for key, value in older.items() if value_at(server, key) != value and "/r/" in key]
        damages: list[dict[str, bytes | None]] = [
            {first: flipped(value_at(server, first), [])},
            {first: None},
            {first: value_at(server, second), second: value_at(server, first)},
            {changed: older[changed]},
            {names(server, cluster, "/checkpoint")[0]: b"foreign"},
        ]
        for damages_now in damages:
            for key, value in damages_now.items():
                damage(server, key, value)
            cluster.start()
            cluster.unseal()
            assert "the index is made anew from the log" in node.log_tail(5)
            assert cluster.call("GET", f"{MOUNT}/a").data == {"v": "1"}
            node.wait_until("flush its index", lambda: flushed(server, cluster))
            cluster.stop()
            facts(server, cluster)
        cluster.start()
        cluster.unseal()
        node.wait_until("flush its index", lambda: flushed(server, cluster))
        key = names(server, cluster, "/merkle/r/")[0]
        server.raw_put(key, b"foreign")
        report = cluster.call("POST", "sys/replication/merkle-check").data["merkle_corruption_report"]
        assert any(key.rsplit("/", 1)[1] in problem for problem in report["problems"]), (key, report)


# -- the data


@pytest.mark.parametrize("how", [foreign, removed])
def test_what_a_start_needs_is_put_right_before_anything_is_served(
    server: ConsulServer, tmp_path: Path, how: Callable[[bytes, list[bytes]], bytes | None]
) -> None:
    """Keyrings, mounts and the tokens' salt: the log has them. The first start finds the lock of a killed node, so it
    stands by before it leads. The seal record is needed before there is a lock: its loss is named."""
    with loaded(server, tmp_path) as cluster:
        assert put(cluster, "mine", "mine").status == 204
        (node,) = cluster.nodes
        node.kill()
        rows = [row for row in names(server, cluster, "/d/") if "/core/keyring" in row or "/core/mounts/" in row]
        for row in [*rows, *names(server, cluster, "/d/l/token/salt")]:
            damage(server, row, how(b"", [b"foreign"]))
        node.start()
        assert not node.unseal(cluster.keys).body["sealed"]
        assert cluster.call("GET", f"{MOUNT}/mine").data == {"v": "mine"}
        assert "was changed by somebody else" in node.log_path.read_text(encoding="utf-8")
        (seal,) = names(server, cluster, "/d/c/core/seal")
        kept = value_at(server, seal)
        node.kill()
        damage(server, seal, how(b"", [b"foreign"]))
        node.start()
        refused = node.unseal(cluster.keys)
        assert refused.status == 503
        assert "c/core/seal" in refused.errors[0]
        assert "from a backup of Consul" in refused.errors[0]
        server.raw_put(seal, kept)
        assert not node.unseal(cluster.keys).body["sealed"]
        assert cluster.call("GET", f"{MOUNT}/mine").data == {"v": "mine"}


def test_an_overwritten_entry_is_not_served(server: ConsulServer, tmp_path: Path) -> None:
    """Nothing, another entry's bytes, one bit; an entry nobody wrote is not listed, and the check names both."""
    with loaded(server, tmp_path) as cluster:
        for name in ("mine", "other"):
            assert put(cluster, name, name).status == 204
        mine, other = (data_key(server, cluster, name) for name in ("mine", "other"))
        kept = value_at(server, mine)
        cluster.nodes[0].stop()
        cluster.start()
        cluster.unseal()
        for value in (b"", value_at(server, other), flipped(kept, [])):
            damage(server, mine, value)
            reply = cluster.call("GET", f"{MOUNT}/mine")
            assert reply.status == 500
            assert reply.errors == ["stored data failed its integrity check"]
            assert cluster.call("GET", f"{MOUNT}/other").data == {"v": "other"}
        server.raw_put(other.removesuffix("other") + "planted", kept)
        assert cluster.call("GET", f"{MOUNT}/planted").status == 404
        assert cluster.call("LIST", f"{MOUNT}/").data == {"keys": ["mine", "other"]}
        report = cluster.call("POST", "sys/replication/merkle-check").data["merkle_corruption_report"]
        assert report["corrupted_root"]
        server.raw_put(mine, kept)
        assert cluster.call("GET", f"{MOUNT}/mine").data == {"v": "mine"}


STRAYS = (
    "d/{own}/a.dot",
    "d/{own}/an_underscore",
    "d/{own}/a.folder/x",
    "d/{own}/a%20space",
    "d/r/a.partition/x",
    "d/r/no_folder",
    "d/another.class/x",
    "d/no_class",
    "b/a.folder/x",
    "b/a_folder/meta",
    "b/no-folder",
    "merkle/r/a.partition/x",
    "merkle/r/no-folder",
    "merkle/no-class",
    "heads/r/a.partition",
)
"""Names below a generation that this program never writes, of which many cannot even be asked for."""


def test_names_that_nobody_of_us_writes_harm_nothing(server: ConsulServer, tmp_path: Path) -> None:
    """Some tool's files among ours: what is ours is listed, checked, healed, flushed and taken over as without them,
    and the check says where they are and how many."""
    with loaded(server, tmp_path) as cluster:
        (node,) = cluster.nodes
        assert put(cluster, "mine", "mine").status == 204
        root, _, partition = data_key(server, cluster, "mine").removesuffix("/mine").rpartition("/d/")
        node.stop()
        for stray in STRAYS:
            server.raw_put(f"{root}/{stray.format(own=partition)}", b"stray")
        server.raw_put(f"{root.rpartition('/')[0]}/a.generation/x", b"stray")
        cluster.start()
        cluster.unseal()
        epoch = server.raw_get(f"{prefix_of(cluster)}epoch")
        assert cluster.call("LIST", f"{MOUNT}/").data == {"keys": ["mine"]}
        report = cluster.call("POST", "sys/replication/merkle-check").data["merkle_corruption_report"]
        assert report["corrupted_root"]
        assert report["findings"] == {"foreign": 0, "extra": 0, "lost": 0, "stray": 8}, report
        assert any(f"partition {partition[2:]}: 4 names" in problem for problem in report["problems"]), report
        assert cluster.call("POST", "sys/replication/reindex").status in (200, 204)
        node.wait_until("reindex", lambda: "reindex done" in node.log_path.read_text(encoding="utf-8"))
        assert put(cluster, "mine", "later").status == 204
        node.wait_until("flush", lambda: flushed(server, cluster))
        assert get(cluster, "mine").data == {"v": "later"}
        assert server.raw_get(f"{prefix_of(cluster)}epoch") == epoch, node.log_tail()


def test_a_value_as_large_as_consul_takes_is_put_aside_and_healed(server: ConsulServer, tmp_path: Path) -> None:
    """Neither it nor what is right, which is larger still, fits a transaction with guards."""
    right = "x" * 700_000
    with loaded(server, tmp_path) as cluster:
        assert put(cluster, "big", right).status == 204
        assert put(cluster, "small", "1").status == 204
        for name, value in (("big", right), ("small", "1")):
            there = f"/{name}"
            cluster.nodes[0].wait_until(
                "roll it forward",
                lambda there=there: any(one.endswith(there) for one in names(server, cluster, "/d/r/")),
            )
            server.raw_put(data_key(server, cluster, name), bytes(512 * 1024))
            cluster.nodes[0].stop()
            cluster.start()
            cluster.unseal()
            assert cluster.call("GET", f"{MOUNT}/{name}").errors == ["stored data failed its integrity check"]
            reply = cluster.call("POST", "sys/replication/reindex")
            assert reply.status in (200, 204), reply
            cluster.nodes[0].wait_until("heal it", lambda name=name: get(cluster, name).status == 200)
            assert get(cluster, name).data == {"v": value}
        report = cluster.call("POST", "sys/replication/merkle-check").data["merkle_corruption_report"]
        assert not report["corrupted_root"], report


# -- rights

READ_ONLY = POLICY_FILE.read_text().replace(
    'key_prefix "outrider/" {\n  policy = "write"', 'key_prefix "outrider/" {\n  policy = "read"'
)


@pytest.mark.parametrize("rules", [READ_ONLY, ""])
def test_the_token_loses_its_rights(server: ConsulServer, tmp_path: Path, rules: str) -> None:
    """Nothing is ever said to be absent; nothing unacknowledged appears; with the rights back the node goes on."""
    policy = server.create_policy(POLICY_FILE.read_text())
    with loaded(server, tmp_path, token=server.create_token(policy)) as cluster:
        (node,) = cluster.nodes
        assert put(cluster, "kept", "1").status == 204
        with Writers(cluster.nodes, cluster.root_token, "rights") as load:
            load.wait_acked(50)
            server.change_policy(policy, rules)
            node.wait_until("refuse writes", lambda: put(cluster, "x", "1").status in (500, 503))
            for _ in range(20):
                reply = node.call("GET", f"{MOUNT}/kept", token=cluster.root_token)
                assert reply.status in (200, 500, 503), reply
                assert reply.status != 200 or reply.data == {"v": "1"}
            if not rules:
                node.wait_until("refuse reads", lambda: get(cluster, "kept").status in (500, 503))
                node.wait_until("say why", lambda: "stopped_reason" in node.call("GET", "sys/health").body)
                health = node.call("GET", "sys/health")
                assert health.status == 503
                assert "tries again by itself" in health.body["stopped_reason"]
                assert 'needed: key_prefix "outrider/' in health.body["stopped_reason"]
            server.change_policy(policy, POLICY_FILE.read_text())
        assert node.running
        cluster.wait_active()
        assert not node.call("GET", "sys/seal-status").body["sealed"]
        assert cluster.call("GET", f"{MOUNT}/kept").data == {"v": "1"}
        assert "stopped_reason" not in node.call("GET", "sys/health").body
        assert node.log_tail(100_000).count("this node plays no role") <= 6, "one line a trouble, not one a try"
        load.judge(cluster.wait_active())


# -- a whole store from the past. Last, because it takes everything else on that server back as well.


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("idle", [False, True])
def test_a_snapshot_put_back_during_a_tenure_stops_every_node(
    server: ConsulServer, tmp_path: Path, nodes: int, idle: bool
) -> None:
    """``idle``: nobody writes after the restore, so that no commit finds out."""
    with loaded(server, tmp_path, nodes) as cluster:
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
    with loaded(server, tmp_path) as cluster:
        node = cluster.nodes[0]
        assert put(cluster, "kept", "1").status == 204
        node.stop()
        snapshot = server.snapshot()
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


# -- a full disk


def test_consul_s_disk_is_full(tmp_path: Path) -> None:
    """F41: writes are refused or of unknown outcome, honestly; with room again the node goes on by itself."""
    with ConsulServer(disk_can_fill=True) as full, loaded(full, tmp_path) as cluster:
        (node,) = cluster.nodes
        with Writers(cluster.nodes, cluster.root_token, "full", writers=4, pace_s=0) as load:
            load.wait_acked(50)
            full.fill_disk()
            node.wait_until("refuse a write", lambda: len(load.attempts) > len(load.of("acked")))
            node.wait_until("have a Consul without room", lambda: full.found_disk_full)
            full.free_disk()
            if not full.running:
                full.restart()
            load.wait_acked(50)
        assert node.running
        load.judge(cluster.wait_active())
        cluster.stop()
        facts(full, cluster)
