"""Paths filters as an operator and a client meet them: two processes, HTTP, real stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, Node, embedded_storage, performance, replicate

FAST = 'replication {\n  heartbeat_interval = "1s"\n}\n'
FILTER = "sys/replication/performance/primary/paths-filter/eu-west"
RULES = "\n".join(
    f'path "{path}" {{ capabilities = ["create", "read", "update", "delete", "list", "sudo"] }}'
    for path in ("secret/*", "private/*", "sys/mounts", "sys/mounts/*", "sys/replication/*")
)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Cluster, Cluster]]:
    clusters = [
        Cluster([Node(name, tmp_path, embedded_storage(tmp_path / f"{name}-data"), cluster_name=name, settings=FAST)])
        for name in ("us-east", "eu-west")
    ]
    primary, secondary = clusters
    try:
        primary.bootstrap()
        for path in ("secret", "private"):
            assert primary.call("POST", f"sys/mounts/{path}", {"type": "kv"}).status == 204
            assert primary.call("POST", f"{path}/a", {"x": path}).status == 204
        primary.call("POST", "sys/auth/userpass", {"type": "userpass"})
        primary.call("POST", "sys/policies/acl/ops", {"policy": RULES})
        primary.call("POST", "auth/userpass/users/alice", {"password": "wonderland", "policies": "ops"})
        secondary.bootstrap()
        replicate(primary, secondary)
        yield primary, secondary
    finally:
        for cluster in clusters:
            cluster.kill()


def log_in(cluster: Cluster) -> str:
    reply = cluster.wait_active().call("POST", "auth/userpass/login/alice", {"password": "wonderland"})
    return str(reply.body["auth"]["client_token"])


def test_a_filter_from_its_setting_to_a_forced_promotion(pair: tuple[Cluster, Cluster]) -> None:
    primary, secondary = pair
    node = secondary.wait_active()
    secondary.root_token = log_in(secondary)

    def answers(path: str, status: int) -> Callable[[], bool]:
        return lambda: secondary.call("GET", path).status == status

    assert secondary.call("GET", "private/a").data == {"x": "private"}
    assert primary.call("POST", FILTER, {"mode": "deny", "paths": ["private/"]}).status == 204
    assert primary.call("GET", FILTER).data == {"mode": "deny", "paths": ["private/"]}
    node.wait_until("have no mount at private/", answers("private/a", 404))
    assert "no handler for route" in secondary.call("GET", "private/a").errors[0]
    assert "private/" not in secondary.call("GET", "sys/mounts").data
    assert secondary.call("GET", "secret/a").data == {"x": "secret"}
    assert secondary.call("POST", "secret/b", {"x": "forwarded"}).status == 204
    assert primary.call("GET", "secret/b").data == {"x": "forwarded"}
    listed = secondary.call("GET", "sys/replication/performance/secondary/dynamic-filter/eu-west").data
    assert listed["dynamic_filtered_mounts"] == ["private/"]
    node.wait_until("stream again", lambda: performance(node).get("state") == "stream-wals")
    assert performance(node)["mounts_withheld"] == 1

    assert primary.call("POST", "private/a", {"x": "changed"}).status == 204
    assert primary.call("DELETE", FILTER).status == 204
    node.wait_until("have private/ again", answers("private/a", 200))
    assert secondary.call("GET", "private/a").data == {"x": "changed"}

    assert primary.call("POST", FILTER, {"paths": ["secret/", "auth/userpass/"]}).status == 204
    node.wait_until("have no mount at private/", answers("private/a", 404))
    primary.kill()
    promote = "sys/replication/performance/secondary/promote"
    refused = secondary.call("POST", promote, {})
    assert refused.status in (400, 503)
    assert "private/" in refused.errors[0]
    assert secondary.call("POST", promote, {"force": True}).status == 200
    assert secondary.call("GET", "private/a").status == 503
    assert secondary.call("POST", "private/a", {"x": "new"}).status == 503
    assert secondary.call("GET", "sys/replication/performance/not-held").data == {"mounts": ["private/"]}
    accept = "sys/replication/performance/not-held/accept-empty"
    assert secondary.call("POST", accept, {"paths": ["private/"]}).status == 204
    assert secondary.call("POST", "private/a", {"x": "new"}).status == 204
    assert secondary.call("GET", "private/a").data == {"x": "new"}
