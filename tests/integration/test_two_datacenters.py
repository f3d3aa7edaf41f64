"""Two datacenters an ocean apart, as real processes: us is performance primary, eu its performance secondary, and each
has a DR secondary in its own place. The link between the places goes through a proxy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hvac
import pytest

from tests.integration.test_main_job import alice, read, with_secrets
from tests.support import disaster
from tests.support.cluster import Cluster, Node, Reply, embedded_storage, replicate, together
from tests.support.faults import rounds
from tests.support.proxy import FaultProxy, Link

SETTINGS = 'replication {\n  heartbeat_interval = "1s"\n}\n'
OCEAN = Link(delay_s=0.04, jitter_s=0.005, loss=0.002)
FAILOVERS = 4
"""In a row, planned and forced by turns; a soak makes ten of them, and more."""


def one_node(home: Path, name: str) -> Cluster:
    """A cluster of one node on SQLite."""
    return Cluster([Node(name, home, embedded_storage(home / f"{name}-data"), name, SETTINGS)])


@dataclass
class World:
    """us and eu with a mirror each; ``ocean`` has a proxy in front of us and one in front of us_dr."""

    us: Cluster
    us_dr: Cluster
    eu: Cluster
    eu_dr: Cluster
    ocean: list[FaultProxy]

    @property
    def clusters(self) -> tuple[Cluster, ...]:
        return self.us, self.us_dr, self.eu, self.eu_dr


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    us, us_dr, eu, eu_dr = (one_node(tmp_path, name) for name in ("us", "us-dr", "eu", "eu-dr"))
    ocean = []
    for cluster in (us, us_dr):
        proxy = FaultProxy(cluster.nodes[0].cluster_port)
        proxy.shape(OCEAN)
        cluster.nodes[0].advertised_cluster_port = proxy.port
        ocean.append(proxy)
    world = World(us, us_dr, eu, eu_dr, ocean)
    try:
        for cluster in world.clusters:
            cluster.bootstrap()
        with_secrets(us)
        replicate(us, eu, "eu")
        disaster.mirror(us, us_dr, "us-dr")
        eu.root_token = disaster.root_token(eu)
        disaster.mirror(eu, eu_dr, "eu-dr")
        yield world
    finally:
        for proxy in ocean:
            proxy.close()
        for cluster in world.clusters:
            cluster.kill()


def api(node: Node, path: str, mode: str, token: str, **fields: object) -> Reply:
    """A call of ``sys/replication`` that has to succeed, asked again while the node is between two roles."""
    deadline = time.monotonic() + disaster.STEP_TIMEOUT_S
    while True:
        reply = node.call("POST", f"sys/replication/{mode}/{path}", fields, token=token, timeout_s=60)
        if reply.status in (200, 204) or time.monotonic() > deadline or reply.status != 503:
            return disaster.require(reply)
        time.sleep(0.1)


def promoted(cluster: Cluster, **fields: object) -> None:
    """The DR secondary takes its primary's place."""
    disaster.require(disaster.promote(cluster, disaster.operation_token(cluster), **fields))


def demoted(cluster: Cluster) -> None:
    """A DR primary gives its place up; its nodes begin anew."""
    api(disaster.leader(cluster), "primary/demote", "dr", cluster.root_token)
    disaster.settle(cluster, cluster.keys)


def redirected(secondary: Cluster, primary: Cluster, token: str) -> None:
    """A performance secondary is told where its primary is now."""
    addresses = [primary.nodes[0].cluster_address]
    node = secondary.wait_active()
    api(node, "secondary/update-primary", "performance", token, update_primary_addrs=addresses)
    wait_in_step(primary, secondary)


def wait_in_step(primary: Cluster, secondary: Cluster) -> None:
    """Of performance replication."""
    node = secondary.nodes[0]

    def equal() -> bool:
        return together(*(disaster.status(one.nodes[0], "performance") for one in (primary, secondary)))

    node.wait_until("be in step", equal, disaster.STEP_TIMEOUT_S)


def keys_applied(cluster: Cluster, mode: str) -> int:
    """How many keys the newest reconciliation brought; a wipe would bring all."""
    found = disaster.status(disaster.leader(cluster), mode).get("last_sync")
    return int(found["keys"]) if found else 0


def write(client: hvac.Client, path: str, value: str) -> None:
    client.secrets.kv.v2.create_or_update_secret(path, secret={"v": value})


def test_the_loss_of_a_datacenter_and_the_way_back(world: World) -> None:
    us, us_dr, eu, eu_dr = world.clusters
    many = hvac.Client(us.nodes[0].address, token=us.root_token)
    for number in range(200):
        write(many, f"old/{number}", "x")
    app = alice(eu.nodes[0])
    write(app, "before", "1")
    for cluster, mirror in ((us, us_dr), (eu, eu_dr)):
        disaster.wait_in_step(cluster, mirror)

    # The place of us burns; us-dr, which stands elsewhere, takes over, and eu is told.
    us.kill()
    write_fails(app)
    assert read(app, "before") == {"v": "1"}, "eu serves what it has"
    promoted(us_dr, force=True)
    us_dr.root_token = us.root_token
    redirected(eu, us_dr, eu.root_token)
    assert keys_applied(eu, "performance") < 50, "by the difference, not anew"
    write(app, "between", "2")
    disaster.wait_in_step(eu, eu_dr)

    # us is rebuilt from its disks: an old primary that does not know. It is demoted and follows, then leads again.
    us.start()
    us.unseal()
    write(hvac.Client(us.nodes[0].address, token=us.root_token), "only-us", "nobody else has it")
    demoted(us)
    assert disaster.status(disaster.leader(us))["mode"] == "secondary"
    disaster.update_primary(us, us_dr, "us", disaster.operation_token(us))
    (lost,) = disaster.status(disaster.leader(us))["lost_writes"]
    assert lost["exact"]
    assert lost["entries"] >= 1
    demoted(us_dr)
    promoted(us)
    redirected(eu, us, eu.root_token)
    disaster.update_primary(us_dr, us, "us-dr-again", disaster.operation_token(us_dr))
    assert keys_applied(us_dr, "dr") < 50

    write(app, "after", "3")
    disaster.wait_in_step(eu, eu_dr)
    home = hvac.Client(us.nodes[0].address, token=us.root_token)
    for path, value in (("before", "1"), ("between", "2"), ("after", "3"), ("old/199", "x")):
        assert read(home, path) == {"v": value}
        assert read(app, path) == {"v": value}, "with the token of the first day"
    with pytest.raises(hvac.exceptions.InvalidPath):
        read(home, "only-us")
    epochs = [one["number"] for one in disaster.status(us.nodes[0])["epochs"]]
    assert epochs == [1, 2, 3]
    assert disaster.status(eu.nodes[0], "performance")["epoch"]["number"] == 3

    # The other place: eu-dr is eu from now on, for the primary too, and eu comes back behind it.
    demoted(eu)
    promoted(eu_dr)
    wait_in_step(us, eu_dr)
    eu_dr.root_token = eu.root_token
    assert read(hvac.Client(eu_dr.nodes[0].address, token=app.token), "after") == {"v": "3"}
    disaster.update_primary(eu, eu_dr, "eu", disaster.operation_token(eu))
    write(hvac.Client(eu_dr.nodes[0].address, token=app.token), "from-eu-dr", "4")
    assert read(home, "from-eu-dr") == {"v": "4"}
    assert "lost_writes" not in disaster.status(disaster.leader(eu))


def write_fails(app: hvac.Client) -> None:
    with pytest.raises(hvac.exceptions.VaultDown, match="was not carried out"):
        write(app, "nobody-takes-it", "0")


def test_failovers_in_a_row_keep_what_was_acknowledged_and_replicated(tmp_path: Path) -> None:
    """us and eu change places, planned and by force in turn; a third DR secondary follows whoever leads, and is never
    filled anew."""
    us, eu, ap = (one_node(tmp_path, name) for name in ("us", "eu", "ap"))
    clusters = {"us": us, "eu": eu}
    try:
        for cluster in (us, eu, ap):
            cluster.bootstrap()
        with_secrets(us)
        disaster.mirror(us, eu, "eu")
        disaster.mirror(us, ap, "ap")
        token, kept, names = us.root_token, {}, ["us", "eu"]
        eu.root_token = ap.root_token = token
        for number in range(100):
            write(hvac.Client(us.nodes[0].address, token=token), f"old/{number}", "x")
        turns = FAILOVERS if rounds() == 1 else max(10, rounds())
        for turn in range(turns):
            old, new = (clusters[name] for name in names)
            client = hvac.Client(old.wait_active().address, token=token)
            for number in range(5):
                write(client, f"t/{turn}-{number}", str(turn))
                kept[f"t/{turn}-{number}"] = {"v": str(turn)}
            for follower in (new, ap):
                disaster.wait_in_step(old, follower)
            if turn % 2:
                demoted(old)
            else:
                old.kill()
            promoted(new)
            # First of all, or it would follow the old primary once more when that is back.
            disaster.update_primary(ap, new, f"ap-{turn}", disaster.operation_token(ap))
            assert keys_applied(ap, "dr") < 50, "by the difference, not anew"
            if not turn % 2:
                old.start()
                old.unseal()
                write(hvac.Client(old.wait_active().address, token=token), f"lost/{turn}", "x")
                demoted(old)
            disaster.update_primary(old, new, f"{names[0]}-{turn}", disaster.operation_token(old))
            names.reverse()
        leader = hvac.Client(clusters[names[0]].wait_active().address, token=token)
        assert {path: read(leader, path) for path in kept} == kept
        assert [one["number"] for one in disaster.status(disaster.leader(ap))["epochs"]] == list(range(1, turns + 2))
        lost = [
            one["entries"]
            for cluster in (us, eu)
            for one in disaster.status(disaster.leader(cluster)).get("lost_writes", [])
        ]
        assert len(lost) == (turns + 1) // 2, "each write that only a dead primary had, and no other"
        assert "lost_writes" not in disaster.status(disaster.leader(ap))
    finally:
        for cluster in (us, eu, ap):
            cluster.kill()
