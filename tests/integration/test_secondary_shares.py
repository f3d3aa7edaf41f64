"""After a rekey of the primary one set of key shares opens every cluster of the set, as soon as it has heard of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_main_job import embedded_cluster
from tests.support import disaster
from tests.support.cluster import Cluster, replicate, wait_in_step


@pytest.fixture
def three(tmp_path: Path) -> Iterator[tuple[Cluster, Cluster, Cluster]]:
    """A primary, its performance secondary and its DR secondary."""
    us, eu, mirror = (embedded_cluster(tmp_path, name) for name in ("us", "eu", "mirror"))
    try:
        us.bootstrap(2, 2)
        for cluster in (eu, mirror):
            cluster.bootstrap()
        replicate(us, eu, "eu")
        disaster.mirror(us, mirror, "mirror")
        yield us, eu, mirror
    finally:
        for cluster in (us, eu, mirror):
            cluster.kill()


def rekey(cluster: Cluster) -> dict[str, Any]:
    """New shares, one of one; they count for the cluster from now on."""
    node = cluster.wait_active()
    nonce = node.call("PUT", "sys/rekey/init", {"secret_shares": 1, "secret_threshold": 1}).body["nonce"]
    for key in cluster.keys:
        reply = node.call("PUT", "sys/rekey/update", {"key": key, "nonce": nonce})
    assert reply.status == 200, reply.errors
    return dict(reply.body)


def issued(cluster: Cluster) -> tuple[int, str]:
    status = cluster.nodes[0].call("GET", "sys/seal-status").body
    return status["n"], status["shares_issued"]


def test_new_shares_open_the_secondaries_too_and_the_old_ones_until_then(
    three: tuple[Cluster, Cluster, Cluster],
) -> None:
    us, eu, mirror = three
    assert issued(us) == issued(eu) == issued(mirror)
    old = list(us.keys)
    mirror.nodes[0].stop()
    done = rekey(us)
    assert "dr mirror" in done["warnings"][0]
    assert "performance eu" not in done["warnings"][0]
    new = done["keys"]
    eu.nodes[0].wait_until("have the new shares", lambda: issued(eu) == issued(us))

    node = eu.nodes[0]
    node.kill()
    node.start()
    assert node.unseal(old[:1]).status == 400, "the old ones open it no longer"
    assert not node.unseal(new).body["sealed"]
    us.keys = eu.keys = new
    wait_in_step(us, eu)

    away = mirror.nodes[0]
    away.start()
    assert issued(mirror) != issued(us), "it says itself which shares open it"
    assert not away.unseal(old).body["sealed"], "the old ones open what has not heard of the new ones"
    away.wait_until("have the new shares", lambda: issued(mirror) == issued(us))
    away.kill()
    away.start()
    assert not away.unseal(new).body["sealed"]
    mirror.keys = new
    disaster.wait_in_step(us, mirror)
    assert disaster.operation_token(mirror), "key shares are asked for this as well"
