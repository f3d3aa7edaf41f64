"""What operators do to a running cluster, on two nodes and real Consul."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hvac

from tests.support.cluster import STEADY, Cluster, Node, consul_storage, replicate
from tests.support.consul_server import ConsulServer


def cluster_of(server: ConsulServer, home: Path, name: str, nodes: int = 2) -> Cluster:
    storage = consul_storage(server.address, server.token, f"outrider/operator/{name}/")
    return Cluster(
        [Node(f"{name}-{n}", home, storage, cluster_name=name, settings=STEADY) for n in range(1, nodes + 1)]
    )


def test_a_rekey_holds_on_every_node_after_a_restart(consul_server: ConsulServer, tmp_path: Path) -> None:
    cluster = cluster_of(consul_server, tmp_path, "rekey")
    try:
        cluster.bootstrap(3, 2)
        old_keys = cluster.keys
        client = hvac.Client(cluster.standby().address)
        started = client.sys.start_rekey(secret_shares=4, secret_threshold=3)
        done = client.sys.rekey_multi(old_keys, nonce=started["nonce"])
        assert done["complete"]
        assert len(done["keys"]) == 4
        for node in cluster.nodes:
            node.stop()
        cluster.start()
        for node in cluster.nodes:
            status = node.call("GET", "sys/seal-status").body
            assert (status["sealed"], status["t"], status["n"]) == (True, 3, 4)
            for key in old_keys:
                assert node.call("PUT", "sys/unseal", {"key": key}).body["sealed"]
            node.call("PUT", "sys/unseal", {"reset": True})
        cluster.keys = done["keys_base64"][:3]
        cluster.unseal()
        assert cluster.call("GET", "auth/token/lookup-self").status == 200
    finally:
        cluster.kill()


def test_an_orphan_batch_token_counts_on_every_node_of_the_set(consul_server: ConsulServer, tmp_path: Path) -> None:
    primary = cluster_of(consul_server, tmp_path, "batch-primary")
    secondary = cluster_of(consul_server, tmp_path, "batch-secondary")
    try:
        primary.bootstrap()
        secondary.bootstrap()
        primary.call("PUT", "sys/policies/acl/app", {"policy": 'path "sys/mounts" { capabilities = ["read"] }'})
        replicate(primary, secondary)
        for node in secondary.nodes:
            node.unseal(primary.keys)
        secondary.wait_active()
        body = {"type": "batch", "policies": ["app"], "no_parent": True}
        token = primary.call("POST", "auth/token/create", body).body["auth"]["client_token"]
        for node in (*primary.nodes, *secondary.nodes):
            node.wait_until(
                "take the token", lambda node=node: node.call("GET", "sys/mounts", token=token).status == 200
            )
        child = primary.call("POST", "auth/token/create", {"type": "batch", "policies": ["app"]})
        child_token = child.body["auth"]["client_token"]
        assert primary.standby().call("GET", "sys/mounts", token=child_token).status == 200
        for node in secondary.nodes:
            assert node.call("GET", "sys/mounts", token=child_token).status == 403
    finally:
        primary.kill()
        secondary.kill()


BEHIND_A_PROXY = """  x_forwarded_for_authorized_addrs = ["127.0.0.1"]
  x_forwarded_for_reject_not_present = false
  telemetry {
    unauthenticated_metrics_access = true
  }
"""


def metrics(node: Node, kind: str) -> dict[str, Any]:
    """The node's metrics of one kind, by name."""
    return {entry["Name"]: entry for entry in node.call("GET", "sys/metrics").body[kind]}


def test_what_a_cluster_tells_of_its_nodes_and_clients(consul_server: ConsulServer, tmp_path: Path) -> None:
    cluster = cluster_of(consul_server, tmp_path, "nodes")
    for node in cluster.nodes:
        node.listener_settings = BEHIND_A_PROXY
    try:
        cluster.bootstrap()
        active, standby = cluster.wait_active(), cluster.standby()

        def heard() -> bool:
            return len(active.call("GET", "sys/ha-status", token=cluster.root_token).data["nodes"]) == 2

        active.wait_until("hear of the standby", heard)
        for node in (active, standby):
            nodes = node.call("GET", "sys/ha-status", token=cluster.root_token).data["nodes"]
            assert [one["active_node"] for one in nodes] == [True, False]
            assert [one["api_address"] for one in nodes] == [active.address, standby.address]
            assert all(one["hostname"] and one["version"] for one in nodes)
            assert [bool(one["last_echo"]) for one in nodes] == [False, True]
        refused = standby.call("GET", "sys/host-info", token=cluster.root_token)
        assert refused.errors == ["cannot forward local-only request"]
        for node, is_active in ((active, 1), (standby, 0)):
            sampled = {"vault.consul.get", "vault.runtime.event_loop_lag"}
            node.wait_until("have sampled", lambda node=node, sampled=sampled: sampled <= set(metrics(node, "Samples")))
            gauges = {name: entry["Value"] for name, entry in metrics(node, "Gauges").items()}
            samples = metrics(node, "Samples")
            assert (gauges["vault.core.active"], gauges["vault.core.unsealed"]) == (is_active, 1)
            assert samples["vault.consul.get"]["Count"] > 0
            assert samples["vault.runtime.event_loop_lag"]["Mean"] < 1000
            assert ("vault.replication.wal.last_wal" in gauges) == bool(is_active)
        # The standby sees the proxy's word for the client's address; the active node checks it.
        role = {"allowed_policies": "default", "token_bound_cidrs": "192.0.2.0/24"}
        cluster.call("POST", "auth/token/roles/bound", role)
        token = cluster.call("POST", "auth/token/create/bound", {}).body["auth"]["client_token"]
        for address, status in (("192.0.2.9", 200), ("198.51.100.9", 403)):
            headers = {"X-Forwarded-For": address}
            for node in (active, standby):
                assert node.call("GET", "auth/token/lookup-self", token=token, headers=headers).status == status
    finally:
        cluster.kill()
