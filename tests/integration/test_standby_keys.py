"""A cluster of two nodes becomes a secondary: nobody carries keys to the standby, unless nobody is left to tell it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_main_job import alice, consul_cluster, read, with_secrets
from tests.support.cluster import Cluster, Node, activation_token, performance, replicate
from tests.support.consul_server import ConsulServer


@pytest.fixture
def two(consul_server: ConsulServer, tmp_path: Path) -> Iterator[tuple[Cluster, Cluster]]:
    """us with one node and secrets, eu with two nodes, each a cluster of its own."""
    us = consul_cluster(consul_server, tmp_path, "us", 1, f"keys-{tmp_path.name}")
    eu = consul_cluster(consul_server, tmp_path, "eu", 2, f"keys-{tmp_path.name}")
    try:
        us.bootstrap(3, 2)
        eu.bootstrap()
        with_secrets(us)
        yield us, eu
    finally:
        us.kill()
        eu.kill()


def is_secondary(node: Node) -> bool:
    health = node.health()
    return (
        health is not None
        and health.status in (200, 429)
        and (health.body["replication_performance_mode"] == "secondary")
    )


def test_the_standby_takes_the_new_keys_from_the_active_node_and_can_take_over(two: tuple[Cluster, Cluster]) -> None:
    us, eu = two
    replicate(us, eu, "eu")
    for node in eu.nodes:
        node.wait_until("be of the secondary, without anybody's keys", lambda node=node: is_secondary(node))
    client = alice(us.wait_active())
    client.secrets.kv.v2.create_or_update_secret("db", secret={"v": "1"})
    standby = eu.standby()
    assert any("goes on with the keys that the active node has" in node.log_path.read_text() for node in eu.nodes)
    assert "unseal this node" not in standby.log_path.read_text()
    eu.wait_active().kill()
    standby.wait_until("lead the secondary", lambda: is_secondary(standby) and standby.health().status == 200)
    standby.wait_until("stream", lambda: performance(standby).get("state") == "stream-wals")
    assert read(alice(standby), "db") == {"v": "1"}


def test_a_standby_that_nobody_can_tell_seals_itself_and_says_with_which_keys_to_open_it(
    two: tuple[Cluster, Cluster],
) -> None:
    us, eu = two
    us.call("POST", "sys/replication/performance/primary/enable", {})
    token = activation_token(us, "eu")
    active, standby = eu.wait_active(), eu.standby()
    standby.freeze()
    try:
        fields = {"token": token}
        enabled = active.call("POST", "sys/replication/performance/secondary/enable", fields, token=eu.root_token)
        assert enabled.status == 200, enabled.errors
        active.wait_until("have flipped", lambda: active.call("GET", "sys/seal-status").body["n"] == 3)
        active.kill()
    finally:
        standby.thaw()

    def told() -> bool:
        status = standby.call("GET", "sys/seal-status").body
        return bool(status["sealed"] and "primary's unseal keys" in " ".join(status.get("warnings") or ()))

    standby.wait_until("seal itself and say why", told)
    assert standby.unseal(eu.keys).body["sealed"], "its own old keys open nothing any more"
    standby.call("PUT", "sys/unseal", {"reset": True})
    assert not standby.unseal(us.keys).body["sealed"]
    standby.wait_until("lead the secondary", lambda: is_secondary(standby) and standby.health().status == 200)
