"""F46: an older Consul snapshot put back underneath an active node stops it, and the node says why."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from tests.integration.test_store_changed import echoed_since
from tests.support.cluster import STEADY, cluster_on
from tests.support.consul_server import ConsulServer
from tests.support.faults import mount_load


def test_a_restore_underneath_stops_every_node_and_status_and_health_say_so(tmp_path: Path) -> None:
    with ConsulServer() as server, cluster_on(server, tmp_path, 2, STEADY) as cluster:
        nodes = cluster.nodes
        mount_load(cluster.call)
        snapshot = server.snapshot()
        for number in range(20):
            assert cluster.call("PUT", f"load/{number}", {"v": "after the snapshot"}).status == 204
        standby, written = cluster.standby(), datetime.now(UTC)
        active = cluster.wait_active()
        # A standby that never heard of what is gone could not miss it.
        active.wait_until("hear from its standby", lambda: echoed_since(active, cluster, written))
        wal = cluster.call("GET", "sys/health").body["last_wal"]
        server.restore(snapshot)
        for node in nodes:
            node.wait_until("seal itself", lambda node=node: node.call("GET", "sys/seal-status").body["sealed"])
            health = node.call("GET", "sys/health")
            assert health.status == 503
            assert "restored or changed underneath" in health.body["sealed_reason"], node.log_tail()
            assert "until it is unsealed again" in node.call("GET", "sys/seal-status").body["warnings"][0]
            assert node.call("GET", "load/1", token=cluster.root_token).status == 503
        # Whoever unseals has decided to go on with the store as it is.
        standby.unseal(cluster.keys)
        cluster.nodes = [standby]
        cluster.wait_active()
        assert cluster.call("GET", "load/1").status == 404
        assert "sealed_reason" not in cluster.call("GET", "sys/health").body
        assert cluster.call("GET", "sys/health").body["last_wal"] < wal


def test_a_standby_that_knows_better_stops_a_node_that_does_not(tmp_path: Path) -> None:
    """Whoever leads first after the restore has never seen what is gone; the standby that has was paused meanwhile."""
    with ConsulServer() as server, cluster_on(server, tmp_path, 2, STEADY) as cluster:
        nodes = cluster.nodes
        mount_load(cluster.call)
        snapshot = server.snapshot()
        for number in range(20):
            assert cluster.call("PUT", f"load/{number}", {"v": "after the snapshot"}).status == 204
        knowing, ignorant, written = cluster.standby(), cluster.wait_active(), datetime.now(UTC)
        ignorant.wait_until("hear from its standby", lambda: echoed_since(ignorant, cluster, written))
        knowing.freeze()
        ignorant.kill()
        server.restore(snapshot)
        ignorant.start()
        ignorant.unseal(cluster.keys)
        ignorant.wait_until("lead on the older store", lambda: ignorant.call("GET", "sys/health").status == 200)
        assert ignorant.call("GET", "load/1", token=cluster.root_token).status == 404
        knowing.thaw()
        for node in nodes:
            node.wait_until("seal itself", lambda node=node: node.call("GET", "sys/seal-status").body["sealed"])
            assert "restored or changed underneath" in node.call("GET", "sys/health").body["sealed_reason"]
        assert "another node of this cluster saw record" in ignorant.call("GET", "sys/health").body["sealed_reason"]
