"""F47: the barrier's key is rotated while a secondary is filled, dies and is filled again; and on both sides of a
failover, with a primary that dies before anybody has its new key. Every node opens everything it holds."""

from __future__ import annotations

import base64
import http.client
from collections.abc import Iterator
from pathlib import Path

import hvac
import pytest

from tests.integration.test_failpoints import enable, one_node, restart, running, stored
from tests.integration.test_main_job import alice, read, with_secrets
from tests.support import disaster
from tests.support.cluster import Cluster, activation_token, performance, wait_in_step
from tests.support.faults import arm, await_killed


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Cluster, Cluster]]:
    """us with secrets and a user, and eu, which is nothing yet."""
    us, eu = one_node(tmp_path, "us"), one_node(tmp_path, "eu")
    with running(us, eu):
        us.bootstrap()
        with_secrets(us)
        yield us, eu


def rotate(cluster: Cluster) -> None:
    """A fresh encryption key from now on."""
    assert cluster.call("POST", "sys/rotate", {}).status == 204


def write(cluster: Cluster, prefix: str, count: int = 20) -> dict[str, dict[str, object]]:
    """So many secrets; returns them by path."""
    client = hvac.Client(cluster.wait_active().address, token=cluster.root_token)
    written = {f"{prefix}/{number}": {"v": f"{prefix}-{number}"} for number in range(count)}
    for path, secret in written.items():
        client.secrets.kv.v2.create_or_update_secret(path, secret=secret)
    return written


def term(cluster: Cluster) -> int:
    """Of the key that is in use."""
    return int(cluster.call("GET", "sys/key-status").data["term"])


def test_while_a_secondary_is_filled_and_dies_of_it(two: tuple[Cluster, Cluster]) -> None:
    us, eu = two
    written = write(us, "first", 100)
    assert us.call("POST", "sys/replication/performance/primary/enable", {}).status == 200
    arm(eu.nodes[0], "sync:half-way=kill")
    eu.bootstrap()
    enable(eu, activation_token(us, "eu"))
    await_killed(eu.nodes[0])
    eu.keys = us.keys
    for round_, point in enumerate(("sync:before-guard", "sync:after-guard", "applier:before-commit")):
        rotate(us)
        written |= write(us, f"round-{round_}")
        restart(eu, spec=f"{point}=kill")
        if point.startswith("applier"):
            # What is written earlier may come with another sync; then nothing would be left to be streamed.
            node = eu.nodes[0]
            node.wait_until(
                "stream", lambda node=node: not node.running or performance(node).get("state") == "stream-wals"
            )
            rotate(us)
            written |= write(us, "streamed")
        await_killed(eu.nodes[0])
        stored(eu)
    restart(eu)
    wait_in_step(us, eu)
    client = alice(eu.nodes[0])
    assert {path: read(client, path) for path in written} == written
    assert term(us) == 5
    restart(eu)
    eu.wait_active()
    assert {path: read(client, path) for path in written} == written, "also what it only has from its own store"


def test_on_both_sides_of_a_failover(two: tuple[Cluster, Cluster]) -> None:
    """Both have a key of term 2 then, and not the same one; what the old primary lost can still be read there."""
    us, eu = two
    kept = write(us, "kept")
    eu.bootstrap()
    disaster.mirror(us, eu, "eu")
    eu.kill()
    rotate(us)
    write(us, "lost", 3)
    us.kill()

    restart(eu)
    token = disaster.operation_token(eu)
    restart(eu, spec="promote:after-commit=kill")
    with pytest.raises((OSError, http.client.HTTPException)):
        disaster.leader(eu).call("POST", f"{disaster.BASE}/secondary/promote", {"dr_operation_token": token})
    await_killed(eu.nodes[0])
    restart(eu)
    eu.root_token = us.root_token
    rotate(eu)
    kept |= write(eu, "new")
    assert (term(eu), stored_reads(eu, kept)) == (2, True)

    restart(us)
    assert term(us) == 2
    disaster.require(us.call("POST", f"{disaster.BASE}/primary/demote", {}))
    disaster.settle(us, us.keys)
    operation = disaster.operation_token(us)
    disaster.update_primary(us, eu, "us", operation)
    (head,) = disaster.status(disaster.leader(us))["lost_writes"]
    restart(us)
    exported = disaster.leader(us).call("GET", f"{disaster.BASE}/lost-writes/{head['id']}/export", token=operation)
    found = [base64.b64decode(entry.get("value", "")) for entry in exported.data["lost_entries"]]
    assert sum([b'"lost-' in value for value in found]) == 3, "under the key that nobody else has"

    # And it leads again, with the keys of the other one.
    disaster.require(eu.call("POST", f"{disaster.BASE}/primary/demote", {}))
    disaster.settle(eu, eu.keys)
    disaster.require(disaster.promote(us, disaster.operation_token(us)))
    assert stored_reads(us, kept)
    rotate(us)
    assert term(us) == 3
    kept |= write(us, "again")
    disaster.update_primary(eu, us, "eu-again", disaster.operation_token(eu))
    disaster.require(disaster.promote(eu, disaster.operation_token(eu), force=True))
    assert stored_reads(eu, kept)


def stored_reads(cluster: Cluster, written: dict[str, dict[str, object]]) -> bool:
    """Whether every secret opens and is what was written."""
    client = hvac.Client(cluster.wait_active().address, token=cluster.root_token)
    return {path: read(client, path) for path in written} == written
