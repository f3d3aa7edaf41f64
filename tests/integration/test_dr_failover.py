"""Disaster recovery with real processes on a real Consul: what clients hold survives, what was lost is kept."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from pathlib import Path

import hvac
import pytest

from tests.integration.test_main_job import alice, consul_cluster, embedded_cluster, read, with_secrets
from tests.support import disaster
from tests.support.cluster import ROOT, Cluster, replicate, wait_in_step
from tests.support.consul_server import ConsulServer
from tests.support.file_credentials import Shared
from tests.support.leasing_engine import TYPE

REFUSED = "path disabled in replication DR secondary mode"


@pytest.fixture
def two(consul_server: ConsulServer, tmp_path: Path) -> Iterator[tuple[Cluster, Cluster]]:
    """us with one node and secrets, eu with two nodes, its DR secondary."""
    us = consul_cluster(consul_server, tmp_path, "us", 1, f"dr-{tmp_path.name}")
    eu = consul_cluster(consul_server, tmp_path, "eu", 2, f"dr-{tmp_path.name}")
    try:
        us.bootstrap(3, 2)
        eu.bootstrap()
        with_secrets(us)
        disaster.mirror(us, eu, "eu")
        yield us, eu
    finally:
        us.kill()
        eu.kill()


def write(cluster: Cluster, path: str, value: str) -> None:
    client = hvac.Client(cluster.wait_active().address, token=cluster.root_token)
    client.secrets.kv.v2.create_or_update_secret(path, secret={"v": value})


def serves_nobody(us: Cluster, eu: Cluster) -> None:
    """Every node of the mirror ``eu`` refuses every user, and says so in health and status."""
    for node in eu.nodes:
        health = node.health()
        assert health is not None
        assert (health.status, health.body["replication_dr_mode"]) == (472, "secondary"), node.name
        for method, path in (
            ("GET", "secret/data/db"),
            ("GET", "auth/token/lookup-self"),
            ("GET", "sys/mounts"),
            ("PUT", "sys/step-down"),
            ("POST", "sys/replication/performance/primary/enable"),
            ("POST", "auth/userpass/login/alice"),
        ):
            reply = node.call(
                method, path, {"password": "wonderland"} if method != "GET" else None, token=us.root_token
            )
            assert (reply.status, reply.errors) == (400, [REFUSED]), (node.name, path)
        state = node.call("GET", "sys/replication/status").data
        assert state["performance"] == {"mode": "disabled"}
        assert (state["dr"]["mode"], state["dr"]["secondary_id"]) == ("secondary", "eu")


def is_not_promoted_while_its_primary_lives(eu: Cluster) -> str:
    """Nor without the right token; returns that."""
    token = disaster.operation_token(eu)
    wrong = disaster.promote(eu, "hvs.wrong")
    assert (wrong.status, wrong.errors) == (403, ["1 error occurred:\n\t* permission denied\n\n"])
    missing = disaster.leader(eu).call("POST", f"{disaster.BASE}/secondary/promote", {})
    assert (missing.status, "dr_operation_token" in missing.errors[0]) == (400, True)
    alive = disaster.promote(eu, token)
    assert alive.status == 400
    assert "alive and reachable" in alive.errors[0]
    assert disaster.status(disaster.leader(eu))["state"] == "stream-wals"
    return token


def shows_what_was_lost(us: Cluster, us_token: str) -> None:
    """The one record of lost writes, to whoever has the operation token."""
    asked = disaster.leader(us).call("GET", f"{disaster.BASE}/lost-writes", token=us_token)
    (record,) = asked.data["lost_writes"]
    assert record["exact"]
    assert record["entries"] >= 1
    exported = disaster.leader(us).call("GET", f"{disaster.BASE}/lost-writes/{record['id']}/export", token=us_token)
    found = [base64.b64decode(entry.get("value", "")) for entry in exported.data["lost_entries"]]
    assert any(b'"lost"' in value for value in found), "what nobody else had can be read"
    assert all("value" not in one for one in exported.data["lost_entries"] if "/core/" in one["key"])
    assert disaster.leader(us).call("GET", f"{disaster.BASE}/lost-writes").status == 400


def test_failover_with_living_tokens_and_failback_with_what_was_lost(two: tuple[Cluster, Cluster]) -> None:
    us, eu = two
    client = alice(us.wait_active())
    client.secrets.kv.v2.create_or_update_secret("db", secret={"v": "1"})
    disaster.wait_in_step(us, eu)

    serves_nobody(us, eu)
    identity = us.wait_active().health().body["cluster_id"]
    assert disaster.leader(eu).health().body["cluster_id"] != identity

    token = is_not_promoted_while_its_primary_lives(eu)
    eu_leader = disaster.leader(eu)
    write(us, "both", "1")
    disaster.wait_in_step(us, eu)
    for action in ("merkle-check", "reindex", "recover"):
        path = f"{disaster.BASE}/secondary/{action}"
        assert eu_leader.call("POST", path, {"dr_operation_token": "hvs.wrong"}).status == 403, action
        disaster.require(eu_leader.call("POST", path, {"dr_operation_token": token}), 200, 202)
    disaster.wait_in_step(us, eu)
    us.kill()
    preview = disaster.promote(eu, token, preview=True).data["promotion_forecast"]
    assert preview["known_missing_records"] == 0
    assert eu_leader.health().status == 472
    done = disaster.promote(eu, token)
    assert done.status == 200, done.errors
    assert done.body["warnings"][0].startswith("This cluster is being promoted to a replication primary.")

    eu.root_token = us.root_token
    survivor = hvac.Client(eu.wait_active().address, token=client.token)
    assert read(survivor, "db") == {"v": "1"}, "no new login"
    survivor.secrets.kv.v2.create_or_update_secret("db", secret={"v": "2"})
    assert eu.call("GET", "auth/token/lookup-self").status == 200, "the root token too"
    assert eu.wait_active().health().body["cluster_id"] == identity, "it took over the identity"
    assert disaster.status(eu.wait_active())["mode"] == "primary"
    refused = eu.call("POST", f"{disaster.BASE}/secondary/promote", {"dr_operation_token": token})
    assert (refused.status, refused.errors) == (400, ["Not a DR secondary."])

    # The old primary returns with a write of its own, is demoted, and comes back as the new one's secondary.
    us.start()
    us.unseal()
    write(us, "only-us", "lost")
    assert us.call("POST", f"{disaster.BASE}/primary/demote", {}).status == 200
    disaster.settle(us, us.keys)
    assert disaster.status(disaster.leader(us))["state"] == "idle"
    us_token = disaster.operation_token(us)
    disaster.update_primary(us, eu, "us", us_token)
    shows_what_was_lost(us, us_token)

    # and back again, planned: demote, promote, point
    assert eu.call("POST", f"{disaster.BASE}/primary/demote", {}).status == 200
    disaster.settle(eu, eu.keys)
    done = disaster.promote(us, us_token)
    assert done.status == 200, done.errors
    assert read(hvac.Client(us.wait_active().address, token=client.token), "db") == {"v": "2"}
    last = disaster.operation_token(eu)
    disaster.update_primary(eu, us, "eu-again", last)
    for status in (204, 403):
        deleted = disaster.leader(eu).call(
            "POST", f"{disaster.BASE}/secondary/operation-token/delete", {"dr_operation_token": last}
        )
        assert deleted.status == status
    assert [one["number"] for one in disaster.status(disaster.leader(eu))["epochs"]] == [1, 2, 3]


def test_a_batch_token_of_the_primary_is_an_operation_token(tmp_path: Path) -> None:
    us, eu = embedded_cluster(tmp_path, "us"), embedded_cluster(tmp_path, "eu")
    try:
        us.bootstrap()
        eu.bootstrap()
        rules = 'path "sys/replication/dr/secondary/promote" { capabilities = ["update"] }'
        assert us.call("PUT", "sys/policies/acl/dr", {"policy": rules}).status == 204
        made = us.call(
            "POST",
            "auth/token/create-orphan",
            {"type": "batch", "policies": ["dr"], "no_default_policy": True, "renewable": False, "ttl": "8h"},
        )
        batch = made.body["auth"]["client_token"]
        child = us.call("POST", "auth/token/create", {"type": "batch", "policies": ["dr"], "ttl": "8h"})
        disaster.mirror(us, eu, "eu")
        us.kill()
        assert disaster.promote(eu, child.body["auth"]["client_token"], preview=True).status == 403
        other = eu.nodes[0].call("POST", f"{disaster.BASE}/secondary/disable", {"dr_operation_token": batch})
        assert other.status == 403, "its policy names another path"
        assert disaster.promote(eu, batch).status == 200
        eu.root_token = us.root_token
        assert eu.call("GET", "sys/mounts").status == 200
    finally:
        us.kill()
        eu.kill()


def test_leases_are_revoked_by_the_promoted_cluster_and_by_nobody_before(tmp_path: Path) -> None:
    """A lease falls due while nobody is primary: a DR secondary leaves it alone, the promoted cluster takes it back."""
    outside = Shared(tmp_path, ROOT)
    us, eu = embedded_cluster(tmp_path, "us"), embedded_cluster(tmp_path, "eu")
    for cluster in (us, eu):
        cluster.nodes[0].environment.update(outside.environment)
    try:
        us.bootstrap()
        eu.bootstrap()
        assert us.call("POST", "sys/mounts/db", {"type": TYPE}).status == 204
        disaster.mirror(us, eu, "eu")
        began_s = time.monotonic()
        kept = us.call("POST", "db/creds/app", {"ttl": 3600}).body["lease_id"]
        disaster.wait_in_step(us, eu)
        due_s = 4 + int(5 * (time.monotonic() - began_s))  # the next one is as much and a kill; it must not be due then
        assert us.call("POST", "db/creds/app", {"ttl": due_s}).status == 200
        issued_s = time.monotonic()
        disaster.wait_in_step(us, eu)
        us.kill()
        token = disaster.operation_token(eu)
        eu.nodes[0].wait_until("see the lease fall due", lambda: time.monotonic() > issued_s + due_s + 2, due_s + 60.0)
        assert len(outside.valid) == 2, "a DR secondary revokes nothing"
        assert disaster.promote(eu, token, force=True).status == 200
        eu.root_token = us.root_token
        eu.nodes[0].wait_until("revoke what is due", lambda: len(outside.valid) == 1)
        assert eu.call("PUT", "sys/leases/renew", {"lease_id": kept, "increment": 7200}).status == 200
        assert eu.call("PUT", "sys/leases/revoke", {"lease_id": kept, "sync": True}).status == 204
        assert outside.valid == []
    finally:
        us.kill()
        eu.kill()


def test_two_datacenters_each_with_a_mirror_survive_the_loss_of_both_originals(tmp_path: Path) -> None:
    """us is performance primary, eu its performance secondary; each has a DR secondary, which takes its place."""
    names = ("us", "us-dr", "eu", "eu-dr")
    us, us_dr, eu, eu_dr = clusters = [embedded_cluster(tmp_path, name) for name in names]
    try:
        for cluster in clusters:
            cluster.bootstrap()
        with_secrets(us)
        replicate(us, eu, "eu")
        disaster.mirror(us, us_dr, "us-dr")
        eu.root_token = disaster.root_token(eu)
        disaster.mirror(eu, eu_dr, "eu-dr")
        client = alice(eu.nodes[0])
        client.secrets.kv.v2.create_or_update_secret("before", secret={"v": "1"})
        wait_in_step(us, eu)
        disaster.wait_in_step(us, us_dr)
        disaster.wait_in_step(eu, eu_dr)

        us.kill()
        assert disaster.promote(us_dr, disaster.operation_token(us_dr), force=True).status == 200
        us_dr.root_token = us.root_token
        moved = eu.call(
            "POST",
            "sys/replication/performance/secondary/update-primary",
            {"update_primary_addrs": [us_dr.nodes[0].cluster_address]},
        )
        assert moved.status == 200, moved.errors
        wait_in_step(us_dr, eu)
        client.secrets.kv.v2.create_or_update_secret("between", secret={"v": "2"})
        assert read(hvac.Client(us_dr.nodes[0].address, token=us.root_token), "between") == {"v": "2"}
        disaster.wait_in_step(eu, eu_dr)

        eu.kill()
        assert disaster.promote(eu_dr, disaster.operation_token(eu_dr), force=True).status == 200
        wait_in_step(us_dr, eu_dr)
        survivor = hvac.Client(eu_dr.nodes[0].address, token=client.token)
        for path, value in (("before", "1"), ("between", "2")):
            assert read(survivor, path) == {"v": value}, "with the token that eu gave out"
        survivor.secrets.kv.v2.create_or_update_secret("after", secret={"v": "3"})
        assert read(hvac.Client(us_dr.nodes[0].address, token=us.root_token), "after") == {"v": "3"}
        status = disaster.status(eu_dr.nodes[0], "performance")
        assert (status["mode"], status["secondary_id"], status["epoch"]["number"]) == ("secondary", "eu", 2)
    finally:
        for cluster in clusters:
            cluster.kill()
