"""The main job as a user does it: processes, HTTP, hvac, real Consul; then what may go wrong with it."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hvac
import hvac.exceptions
import pytest

from tests.support.cluster import (
    STEADY,
    Cluster,
    Node,
    activation_token,
    call,
    consul_storage,
    embedded_storage,
    in_step,
    performance,
    replicate,
    together,
    wait_in_step,
)
from tests.support.consul_server import ConsulServer
from tests.support.proxy import FaultProxy

FAST = f'replication {{\n  heartbeat_interval = "1s"\n}}\n{STEADY}'
TAKEOVER_S_MAX = 16.0
"""After a SIGKILL: the beat of ``STEADY``, and as much again and more for a busy machine."""


def consul_cluster(server: ConsulServer, home: Path, name: str, nodes: int, prefix: str) -> Cluster:
    """Nodes on one Consul server under a prefix of their own."""
    storage = consul_storage(server.address, server.token, f"outrider/{prefix}/{name}/")
    return Cluster([Node(f"{name}-{n}", home, storage, cluster_name=name, settings=FAST) for n in range(1, nodes + 1)])


def embedded_cluster(home: Path, name: str) -> Cluster:
    """One node on SQLite."""
    return Cluster([Node(name, home, embedded_storage(home / f"{name}-data"), cluster_name=name, settings=FAST)])


def with_secrets(cluster: Cluster) -> Cluster:
    """Mount kv v2 at secret/ and userpass, with a user alice who may use secret/."""
    client = hvac.Client(cluster.wait_active().address, token=cluster.root_token)
    client.sys.enable_secrets_engine("kv", path="secret", options={"version": "2"})
    client.sys.enable_auth_method("userpass")
    rules = 'path "secret/*" { capabilities = ["create", "read", "update", "delete", "list"] }'
    client.sys.create_or_update_policy("shop", rules)
    client.auth.userpass.create_or_update_user("alice", "wonderland", policies="shop")
    return cluster


def alice(node: Node) -> hvac.Client:
    """A client logged in on ``node``."""
    client = hvac.Client(node.address)
    client.auth.userpass.login("alice", "wonderland")
    return client


def read(client: hvac.Client, path: str) -> dict[str, object]:
    """The data of a kv v2 secret."""
    return client.secrets.kv.v2.read_secret_version(path, raise_on_deleted_version=True)["data"]["data"]


@pytest.fixture(scope="module")
def pair(consul_server: ConsulServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Cluster]]:
    """us-east with two nodes and eu-west with two nodes, replicating, on real Consul with ACLs."""
    home = tmp_path_factory.mktemp("pair")
    primary = consul_cluster(consul_server, home, "us-east", 2, "main-job")
    secondary = consul_cluster(consul_server, home, "eu-west", 2, "main-job")
    try:
        primary.bootstrap(3, 2)
        secondary.bootstrap()
        with_secrets(primary)
        replicate(primary, secondary)
        for node in secondary.nodes:
            node.wait_until("have the primary's keys", lambda node=node: has_role(node, "secondary"))
        secondary.wait_active()
        yield primary, secondary
    finally:
        primary.kill()
        secondary.kill()


def has_role(node: Node, mode: str) -> bool:
    """Unsealed, and in that mode of performance replication, as active node or as its standby."""
    health = node.health()
    return bool(health and health.status in (200, 429) and health.body["replication_performance_mode"] == mode)


def leads(node: Node) -> bool:
    """Whether it is the active node."""
    return (reply := node.health()) is not None and reply.status == 200


def stands_by(node: Node) -> bool:
    """Whether it is a standby."""
    return (reply := node.health()) is not None and reply.status == 429


def test_a_secret_written_on_the_active_is_read_through_the_standby(pair: tuple[Cluster, Cluster]) -> None:
    primary, _ = pair
    writer = hvac.Client(primary.wait_active().address, token=primary.root_token)
    writer.secrets.kv.v2.create_or_update_secret("db", secret={"user": "app"})
    standby = primary.standby()
    reader = hvac.Client(standby.address, token=primary.root_token)
    assert read(reader, "db") == {"user": "app"}
    redirected = standby.call(
        "GET", "secret/data/db?version=1", token=primary.root_token, headers={"X-Vault-No-Request-Forwarding": "1"}
    )
    assert redirected.status == 307
    assert redirected.headers["location"] == f"{primary.wait_active().address}/v1/secret/data/db?version=1"


def test_the_secondary_serves_logins_reads_and_forwarded_writes(pair: tuple[Cluster, Cluster]) -> None:
    primary, secondary = pair
    node = secondary.wait_active()
    for dead in (secondary.root_token, primary.root_token):
        assert node.call("GET", "auth/token/lookup-self", token=dead).status == 403
    for entrance in (node, secondary.standby()):
        client = alice(entrance)
        for n in range(20):
            client.secrets.kv.v2.create_or_update_secret(f"from/{entrance.name}", secret={"n": n})
            assert read(client, f"from/{entrance.name}") == {"n": n}, "read-after-write where it was written"
    root = hvac.Client(primary.wait_active().address, token=primary.root_token)
    assert read(root, f"from/{node.name}") == {"n": 19}


def test_a_forwarded_write_keeps_the_callers_policies(pair: tuple[Cluster, Cluster]) -> None:
    _, secondary = pair
    client = alice(secondary.wait_active())
    with pytest.raises(hvac.exceptions.Forbidden):
        client.sys.create_or_update_policy("mine", 'path "*" { capabilities = ["sudo"] }')
    with pytest.raises(hvac.exceptions.Forbidden):
        client.write("auth/userpass/users/mallory", password="x", policies="root")


def test_both_ends_report_the_same_root(pair: tuple[Cluster, Cluster]) -> None:
    primary, secondary = pair
    wait_in_step(primary, secondary)
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}

    def both() -> bool:
        """Both statuses of a moment at which nothing is under way."""
        ours.update(performance(primary.wait_active()))
        theirs.update(performance(secondary.wait_active()))
        return together(ours, theirs)

    primary.nodes[0].wait_until("say the same as its secondary", both)
    assert ours["mode"] == "primary"
    assert ours["state"] == "running"
    assert ours["known_secondaries"] == ["eu-west"]
    assert ours["secondaries"][0]["connection_status"] == "connected"
    assert ours["secondaries"][0]["node_id"] == "eu-west"
    assert theirs["mode"] == "secondary"
    assert theirs["state"] == "stream-wals"
    assert theirs["connection_state"] == "ready"
    assert theirs["cluster_id"] == ours["cluster_id"]
    assert theirs["merkle_root"] == ours["merkle_root"]
    assert len(ours["merkle_root"]) == 40
    assert isinstance(ours["last_reindex_epoch"], str)
    wanted = sorted(node.cluster_address for node in primary.nodes)
    secondary.wait_active().wait_until(
        "know every node of the primary",
        lambda: sorted(performance(secondary.wait_active()).get("known_primary_cluster_addrs", [])) == wanted,
    )


def test_status_needs_no_token_and_is_forwarded(pair: tuple[Cluster, Cluster]) -> None:
    primary, secondary = pair
    for cluster in pair:
        reply = cluster.standby().call("GET", "sys/replication/status")
        assert reply.status == 200
        assert reply.data["dr"] == {"mode": "disabled"}
    assert has_role(secondary.standby(), "secondary")
    standby = primary.standby()
    standby.wait_until("stand by", lambda: stands_by(standby))


def test_mounts_and_policies_appear_on_the_secondary_without_restart(pair: tuple[Cluster, Cluster]) -> None:
    primary, secondary = pair
    primary.call("POST", "sys/mounts/later", {"type": "kv"})
    rules = 'path "later/*" { capabilities = ["create", "read", "update"] }'
    primary.call("PUT", "sys/policies/acl/later", {"policy": rules})
    primary.call("POST", "auth/userpass/users/bob", {"password": "builder", "policies": "later"})
    primary.call("POST", "later/thing", {"a": 1})
    wait_in_step(primary, secondary)
    bob = hvac.Client(secondary.wait_active().address)
    bob.auth.userpass.login("bob", "builder")
    assert bob.read("later/thing")["data"] == {"a": 1}
    primary.call("DELETE", "sys/mounts/later")
    wait_in_step(primary, secondary)
    assert secondary.wait_active().call("GET", "later/thing", token=bob.token).status in (403, 404)


class Load(threading.Thread):
    """Writes numbered secrets through any node that answers, and remembers which were acknowledged."""

    def __init__(self, cluster: Cluster, token: str, prefix: str) -> None:
        super().__init__(daemon=True)
        self.cluster = cluster
        self.token = token
        self.prefix = prefix
        self.acknowledged: list[int] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        n = 0
        while not self.stopped.is_set():
            n += 1
            for node in self.cluster.nodes:
                try:
                    reply = node.call(
                        "POST", f"secret/data/{self.prefix}/{n}", {"data": {"n": n}}, token=self.token, timeout_s=60
                    )
                except OSError:
                    continue
                if reply.status == 200:
                    self.acknowledged.append(n)
                    break

    def wait_acknowledged(self, count: int) -> None:
        """Until so many more writes were acknowledged than now."""
        target = len(self.acknowledged) + count
        self.cluster.nodes[0].wait_until(f"acknowledge {count} writes", lambda: len(self.acknowledged) >= target)

    def finish(self) -> list[int]:
        self.stopped.set()
        self.join(180)
        assert not self.is_alive(), "a request was neither answered nor refused"
        return self.acknowledged


def missing(node: Node, token: str, prefix: str, numbers: list[int]) -> list[int]:
    """Which of the acknowledged secrets ``node`` does not have."""
    return [n for n in numbers if node.call("GET", f"secret/data/{prefix}/{n}", token=token).status != 200]


def test_sigkill_of_the_active_loses_no_acknowledged_write(pair: tuple[Cluster, Cluster]) -> None:
    primary, secondary = pair
    victim, survivor = primary.wait_active(), primary.standby()
    load = Load(primary, primary.root_token, "kill")
    load.start()
    load.wait_acknowledged(10)
    killed_at = time.monotonic()
    victim.kill()
    survivor.wait_until("lead", lambda: leads(survivor))
    took_s = time.monotonic() - killed_at
    assert took_s < TAKEOVER_S_MAX, f"takeover took {took_s:.1f} s"
    load.wait_acknowledged(10)
    acknowledged = load.finish()
    assert missing(survivor, primary.root_token, "kill", acknowledged) == []
    wait_in_step(primary, secondary)
    victim.start()
    victim.unseal(primary.keys)
    victim.wait_until("stand by", lambda: stands_by(victim))


def test_a_paused_active_serves_nothing_after_its_successor_leads(pair: tuple[Cluster, Cluster]) -> None:
    primary, secondary = pair
    paused, successor = primary.wait_active(), primary.standby()
    path = "secret/data/paused"
    primary.call("POST", path, {"data": {"by": "before"}})
    paused.freeze()
    try:
        successor.wait_until("lead", lambda: leads(successor))
        assert successor.call("POST", path, {"data": {"by": "successor"}}, token=primary.root_token).status == 200
    finally:
        paused.thaw()
    for _ in range(50):
        reply = paused.call("GET", path, token=primary.root_token)
        if reply.status == 200:
            assert reply.data["data"] == {"by": "successor"}, "a deposed node served its own old state"
    paused.wait_until("stand by", lambda: stands_by(paused))
    wait_in_step(primary, secondary)


def test_step_down_hands_over_at_once(pair: tuple[Cluster, Cluster]) -> None:
    primary, secondary = pair
    active, standby = primary.wait_active(), primary.standby()
    started = time.monotonic()
    assert active.call("PUT", "sys/step-down", token=primary.root_token).status == 204
    standby.wait_until("lead", lambda: leads(standby))
    assert time.monotonic() - started < 3, "half a beat: nobody waited for the one that left"
    reply = active.call("GET", "sys/mounts", token=primary.root_token)
    assert reply.status == 200, "the node that stepped down forwards"
    wait_in_step(primary, secondary)


@pytest.mark.parametrize("after_s", [0.0, 0.3, 1.0])
def test_sigkill_of_a_secondary_under_load_converges(pair: tuple[Cluster, Cluster], after_s: float) -> None:
    primary, secondary = pair
    prefix = f"secondary-kill-{after_s}"
    load = Load(primary, primary.root_token, prefix)
    load.start()
    try:
        time.sleep(after_s)
        victim = secondary.wait_active()
        victim.kill()
        secondary.wait_active()
        victim.start()
        victim.unseal(primary.keys)
        time.sleep(0.5)
    finally:
        acknowledged = load.finish()
    wait_in_step(primary, secondary)
    client = alice(secondary.wait_active())
    assert missing(secondary.wait_active(), client.token, prefix, acknowledged) == []


def test_replayed_foreign_and_broken_tokens_change_nothing(pair: tuple[Cluster, Cluster], tmp_path: Path) -> None:
    primary, _ = pair
    lone = embedded_cluster(tmp_path, "lone")
    try:
        with_secrets_at = lone
        with_secrets_at.bootstrap()
        with_secrets(lone)
        lone.call("POST", "secret/data/keep", {"data": {"still": "here"}})

        def enable(token: str) -> tuple[int, str]:
            reply = lone.call("POST", "sys/replication/performance/secondary/enable", {"token": token})
            return reply.status, " ".join(reply.errors)

        token = activation_token(primary, "lone")
        header, payload, signature = token.split(".")
        for broken in ("", "x", "a.b.c", token[: len(token) // 2], f"{header}.{payload}.{signature[:-9]}"):
            status, text = enable(broken)
            assert status == 400, text
        claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
        forged = dict(claims, ca_sha256="0" * 64)
        body = base64.urlsafe_b64encode(json.dumps(forged).encode()).decode().rstrip("=")
        spare = activation_token(primary, "spare")
        spare_claims = json.loads(base64.urlsafe_b64decode(spare.split(".")[1] + "=="))
        swapped = dict(spare_claims, ca_sha256="0" * 64)
        body = base64.urlsafe_b64encode(json.dumps(swapped).encode()).decode().rstrip("=")
        status, text = enable(f"{header}.{body}.{signature}")
        assert status == 400
        assert "authority" in text
        consumed = primary.call("POST", "sys/wrapping/unwrap", {}, token=claims["jti"])
        assert consumed.status == 200
        status, text = enable(token)
        assert status == 400
        assert "unwrapping secondary token" in text
        expiring = activation_token(primary, "expiring", ttl="1s")
        time.sleep(1.2)
        assert enable(expiring)[0] == 400
        assert lone.call("GET", "secret/data/keep").data["data"] == {"still": "here"}
        assert performance(lone.wait_active())["mode"] == "disabled"
    finally:
        lone.kill()


def test_one_token_activates_one_secondary(pair: tuple[Cluster, Cluster], tmp_path: Path) -> None:
    primary, _ = pair
    rivals = [embedded_cluster(tmp_path, f"rival-{n}") for n in range(2)]
    try:
        for rival in rivals:
            rival.bootstrap()
        token = activation_token(primary, "rival")
        statuses: list[int] = []

        def enable(rival: Cluster) -> None:
            path = "sys/replication/performance/secondary/enable"
            statuses.append(rival.call("POST", path, {"token": token}).status)

        threads = [threading.Thread(target=enable, args=(rival,)) for rival in rivals]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(180)
        assert sorted(statuses) == [200, 400]

        def modes() -> list[str]:
            return sorted(str(performance(rival.wait_active()).get("mode")) for rival in rivals)

        what = "be one secondary, and one that was left as it was"
        rivals[0].nodes[0].wait_until(what, lambda: modes() == ["disabled", "secondary"])
    finally:
        primary.call("POST", "sys/replication/performance/primary/revoke-secondary", {"id": "rival"})
        for rival in rivals:
            rival.kill()


def has_given_up(secondary: Node) -> bool:
    """Whether it has tried to reach its primary, in vain."""
    status = performance(secondary)
    tried = status.get("connection_state") == "transient_failure" or bool(status.get("state_reason"))
    return status.get("state") == "idle" and tried


def test_a_revoked_secondary_is_cut_and_stays_out(pair: tuple[Cluster, Cluster], tmp_path: Path) -> None:
    primary, _ = pair
    doomed = embedded_cluster(tmp_path, "doomed")
    try:
        doomed.bootstrap()
        replicate(primary, doomed, "doomed")
        client = alice(doomed.wait_active())
        primary.call("POST", "secret/data/doomed", {"data": {"seen": "before"}})
        wait_in_step(primary, doomed)
        started = time.monotonic()
        revoked = primary.call("POST", "sys/replication/performance/primary/revoke-secondary", {"id": "doomed"})
        assert revoked.status == 204
        node = doomed.wait_active()
        node.wait_until("be cut off", lambda: performance(node).get("connection_state") not in ("ready", "connecting"))
        assert time.monotonic() - started < 2, "at once, not when silence was noticed"
        node.wait_until("give up", lambda: has_given_up(node))
        assert "doomed" not in performance(primary.wait_active())["known_secondaries"]
        primary.call("POST", "secret/data/doomed", {"data": {"seen": "after"}})
        node.stop()
        node.start()
        node.unseal(primary.keys)
        doomed.wait_active()
        node.wait_until("be refused again", lambda: has_given_up(node))
        assert read(client, "doomed") == {"seen": "before"}, "a revoked secondary serves the data it has"
        assert performance(node)["state"] == "idle"
        refused = node.call("POST", "secret/data/doomed", {"data": {"seen": "mine"}}, token=client.token)
        assert refused.status >= 500
    finally:
        doomed.kill()


def test_a_cut_link_never_blocks_the_primary_and_heals(tmp_path: Path) -> None:
    primary, secondary = embedded_cluster(tmp_path, "near"), embedded_cluster(tmp_path, "far")
    proxy = FaultProxy(primary.nodes[0].cluster_port)
    primary.nodes[0].advertised_cluster_port = proxy.port
    try:
        primary.bootstrap()
        secondary.bootstrap()
        with_secrets(primary)
        replicate(primary, secondary, "far")
        assert proxy.connections > 0
        client = alice(secondary.wait_active())
        for fault in (proxy.cut, proxy.blackhole):
            fault()
            writes_s = []
            for n in range(50):
                started = time.monotonic()
                assert primary.call("POST", f"secret/data/link/{n}", {"data": {"n": n}}).status == 200
                writes_s.append(time.monotonic() - started)
            assert sorted(writes_s)[-3] < 1, "one that waited for the link would do so in each, for a beat at least"
            far = secondary.wait_active()
            far.wait_until("notice the fault", lambda far=far: performance(far).get("connection_state") != "ready")
            near = primary.wait_active()
            near.wait_until(
                "notice the fault",
                lambda near=near: performance(near)["secondaries"][0]["connection_status"] == "disconnected",
            )
            assert client.is_authenticated(), "the secondary goes on serving"
            proxy.heal()
            wait_in_step(primary, secondary)
            assert read(client, "link/49") == {"n": 49}
    finally:
        primary.kill()
        secondary.kill()
        proxy.close()


def test_lost_rights_stop_the_node_and_wipe_nothing(own_consul_server: ConsulServer, tmp_path: Path) -> None:
    server = own_consul_server
    rules = Path(__file__).parents[2].joinpath("deploy/nomad/consul-acl-policy.hcl").read_text(encoding="utf-8")
    policy = server.create_policy(rules)
    token = server.create_token(policy)
    storage = consul_storage(server.address, token, "outrider/")
    cluster = Cluster([Node("narrowed", tmp_path, storage, settings=FAST)])
    try:
        cluster.bootstrap()
        with_secrets(cluster)
        cluster.call("POST", "secret/data/keep", {"data": {"still": "here"}})
        before = server.call("GET", "kv/outrider/?keys").json
        server.change_policy(policy, 'node_prefix "" { policy = "read" } agent_prefix "" { policy = "read" }')
        node = cluster.nodes[0]
        node.wait_until("say why", lambda: "stopped_reason" in node.call("GET", "sys/health").body)
        status = node.call("GET", "sys/seal-status").body
        assert status["initialized"], "an unreadable cluster must not look like a new one"
        assert not status["sealed"], "whoever mends the policy has mended the node"
        assert node.call("GET", "secret/data/keep", token=cluster.root_token).status == 503
        refused = node.call("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        assert refused.status >= 400
        node.stop()
        node.start(wait=False)
        node.wait_until("refuse to start", lambda: not node.running)
        assert "permission denied" in node.log_tail(1)
        after = server.call("GET", "kv/outrider/?keys").json
        assert set(before) <= set(after), "nothing was deleted"
        server.change_policy(policy, rules)
        node.start()
        cluster.unseal()
        assert cluster.call("GET", "secret/data/keep").data["data"] == {"still": "here"}
    finally:
        cluster.kill()


def test_two_inits_at_once_make_one_cluster(consul_server: ConsulServer, tmp_path: Path) -> None:
    cluster = consul_cluster(consul_server, tmp_path, "twice", 2, "main-job-init")
    try:
        cluster.start()
        replies = []

        def init(node: Node) -> None:
            replies.append(node.call("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1}))

        threads = [threading.Thread(target=init, args=(node,)) for node in cluster.nodes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(180)
        assert sorted(reply.status for reply in replies) == [200, 400]
        winner = next(reply for reply in replies if reply.status == 200)
        cluster.keys, cluster.root_token = winner.body["keys_base64"], winner.body["root_token"]
        cluster.unseal()
        assert cluster.call("GET", "auth/token/lookup-self").status == 200
    finally:
        cluster.kill()


def test_an_embedded_store_survives_sigkill(tmp_path: Path) -> None:
    cluster = embedded_cluster(tmp_path, "alone")
    try:
        cluster.bootstrap()
        with_secrets(cluster)
        for round_number in range(3):
            load = Load(cluster, cluster.root_token, f"round-{round_number}")
            load.start()
            load.wait_acknowledged(5)
            cluster.nodes[0].kill()
            acknowledged = load.finish()
            cluster.nodes[0].start()
            cluster.unseal()
            assert missing(cluster.nodes[0], cluster.root_token, f"round-{round_number}", acknowledged) == []
        second = Node("second", tmp_path, cluster.nodes[0].storage)
        second.start(wait=False)
        second.wait_until("refuse to share the store", lambda: not second.running)
        assert "another process" in second.log_tail().lower()
    finally:
        cluster.kill()


def test_reads_follow_a_manual_call(tmp_path: Path) -> None:
    """The plain HTTP contract on a fresh node: statuses and shapes an operator's scripts rely on."""
    node = Node("plain", tmp_path, embedded_storage(tmp_path / "data"))
    cluster = Cluster([node])
    try:
        cluster.start()
        assert node.call("GET", "sys/health").status == 501
        assert node.call("GET", "sys/init").body == {"initialized": False}
        assert node.call("GET", "sys/leader").body["ha_enabled"] is False
        cluster.init(3, 2)
        assert node.call("GET", "sys/health").status == 503
        assert node.call("GET", "secret/x", token="anything").body == {"errors": ["Vault is sealed"]}
        first = node.call("PUT", "sys/unseal", {"key": cluster.keys[0]})
        assert (first.body["sealed"], first.body["progress"]) == (True, 1)
        again = node.call("PUT", "sys/unseal", {"key": cluster.keys[0]})
        assert again.body["progress"] == 1
        assert node.call("PUT", "sys/unseal", {"reset": True}).body["progress"] == 0
        cluster.unseal()
        assert node.call("GET", "sys/health").status == 200
        assert call(node.address, "GET", "sys/health?activecode=299").status == 299
        sealed = node.call("PUT", "sys/seal", token=cluster.root_token)
        assert sealed.status == 204
        node.wait_until("be sealed", lambda: (reply := node.health()) is not None and reply.status == 503)
        cluster.unseal()
        assert in_step(node, node) is False
    finally:
        cluster.kill()
