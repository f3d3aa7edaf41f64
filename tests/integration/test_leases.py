"""Leases, wrapping and lockout on two real nodes over Consul: what a node that dies half way leaves to the next."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.cluster import ROOT, STEADY, Cluster, Reply, cluster_on
from tests.support.consul_server import ConsulServer
from tests.support.file_credentials import Shared
from tests.support.leasing_engine import TYPE


@pytest.fixture
def outside(tmp_path: Path) -> Shared:
    return Shared(tmp_path, ROOT)


@pytest.fixture
def cluster(consul_server: ConsulServer, tmp_path: Path, outside: Shared) -> Iterator[Cluster]:
    with cluster_on(consul_server, tmp_path, 2, STEADY, environment=outside.environment) as it:
        yield it


def issued(cluster: Cluster, ttl_s: int) -> tuple[str, str]:
    """A new lease and what it is for: the lease's id, the credential."""
    reply = cluster.call("POST", "db/creds/app", {"ttl": ttl_s})
    assert reply.status == 200, reply.errors
    return str(reply.body["lease_id"]), str(reply.data["password"])


def issue(cluster: Cluster, ttl_s: int) -> str:
    return issued(cluster, ttl_s)[0]


def calls_for(outside: Shared, credential: str) -> list[str]:
    """The process ids of those who asked to revoke it."""
    return [line.split()[0] for line in outside.calls if line.split()[1] == credential]


def test_leases_are_revoked_whatever_dies(cluster: Cluster, outside: Shared) -> None:
    assert cluster.call("POST", "sys/mounts/db", {"type": TYPE}).status == 204
    for _ in range(20):
        issue(cluster, 6)
    begun, credential = issued(cluster, 3600)
    kept = issue(cluster, 3600)
    outside.set("hang", True)
    with ThreadPoolExecutor(1) as threads:
        first = cluster.wait_active()
        revoking = threads.submit(cluster.call, "PUT", "sys/leases/revoke", {"lease_id": begun})
        first.wait_until("begin the revocation", lambda: calls_for(outside, credential))
        first.kill()
        assert isinstance(revoking.exception(), OSError)
    outside.set("hang", False)
    second = cluster.wait_active()
    second.wait_until("revoke what is due", lambda: len(outside.valid) == 1)
    assert len(set(calls_for(outside, credential))) == 2, "the call that was cut short was repeated by the next node"
    assert cluster.call("PUT", "sys/leases/lookup", {"lease_id": kept}).status == 200
    assert cluster.call("PUT", "sys/leases/lookup", {"lease_id": begun}).errors == ["invalid lease"]
    gauges = {each["Name"]: each["Value"] for each in cluster.call("GET", "sys/metrics").body["Gauges"]}
    assert gauges["vault.expire.num_leases"] == 1
    assert cluster.call("PUT", "sys/leases/revoke-prefix/db").status == 204
    assert outside.valid == []


def test_a_seal_and_an_unseal_lose_no_lease(cluster: Cluster, outside: Shared) -> None:
    assert cluster.call("POST", "sys/mounts/db", {"type": TYPE}).status == 204
    for ttl_s in (3, 12, 48):  # a machine so slow that the lease was due before both nodes were down gets more time
        lease_id = issue(cluster, ttl_s)
        cluster.stop()
        if outside.valid:
            break
        cluster.start()
        cluster.unseal()
    assert len(outside.valid) == 1, "a node that stops revokes nothing"
    cluster.start()
    cluster.unseal()
    cluster.wait_active().wait_until("revoke it", lambda: outside.valid == [])
    assert cluster.call("PUT", "sys/leases/lookup", {"lease_id": lease_id}).status == 400


def test_a_wrapping_token_gives_its_secret_to_one_of_a_hundred(cluster: Cluster) -> None:
    assert cluster.call("POST", "sys/mounts/secret", {"type": "kv"}).status == 204
    for _ in range(3):
        wrapped = cluster.call("POST", "sys/wrapping/wrap", {"the": "secret"}, headers={"X-Vault-Wrap-TTL": "5m"}).body[
            "wrap_info"
        ]["token"]

        def unwrap(number: int, token: str = wrapped) -> Reply:
            node = cluster.nodes[number % 2]
            if number % 4 < 2:
                return node.call("PUT", "sys/wrapping/unwrap", token=token)
            return node.call("PUT", "sys/wrapping/unwrap", {"token": token}, token=cluster.root_token)

        with ThreadPoolExecutor(100) as threads:
            replies = list(threads.map(unwrap, range(100)))
        won = [reply for reply in replies if reply.status == 200]
        assert [reply.data for reply in won] == [{"the": "secret"}]
        lost = {(reply.status, *reply.errors) for reply in replies if reply.status != 200}
        assert lost == {(400, "wrapping token is not valid or does not exist")}


def test_a_lock_counts_tries_at_every_node_and_survives_the_active_one(cluster: Cluster) -> None:
    assert cluster.call("POST", "sys/auth/userpass", {"type": "userpass"}).status == 204
    assert cluster.call("POST", "auth/userpass/users/bob", {"password": "pw"}).status == 204

    def login(number: int, password: str = "wrong") -> int:
        node = cluster.nodes[number % len(cluster.nodes)]
        name = ("bob", "BOB", "Bob")[number % 3]
        return node.call("PUT", f"auth/userpass/login/{name}", {"password": password}).status

    with ThreadPoolExecutor(20) as threads:
        statuses = list(threads.map(login, range(20)))
    assert sorted(statuses) == [400] * 5 + [403] * 15
    dead = cluster.wait_active()
    dead.kill()
    cluster.wait_active()
    alive = next(number for number, node in enumerate(cluster.nodes) if node is not dead)
    assert login(alive, "pw") == 403
    accessor = cluster.call("GET", "sys/auth/userpass").data["accessor"]
    assert cluster.call("GET", "sys/locked-users").data["total"] == 1
    assert cluster.call("POST", f"sys/locked-users/{accessor}/unlock/bob").status == 204
    assert login(alive, "pw") == 200
