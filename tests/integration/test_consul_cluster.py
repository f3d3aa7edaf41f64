"""Two nodes on a Consul of three servers, which lose their leader, their quorum and their machines under load."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.cluster import Cluster, Node, consul_storage
from tests.support.consul_server import ConsulCluster, ConsulServer
from tests.support.faults import ACKED, FAILED, UNKNOWN, Writers, mount_load

SETTINGS = (
    'sidecar {\n  beat_ttl = "2s"\n  beat_interval = "500ms"\n'
    '  step_down_grace = "500ms"\n  flush_interval = "50ms"\n}\n'
)
PAUSE_S = 3.0
TTL_S = 35.0
"""Consul counts a session's TTL of 10 s twice; then comes the lock-delay, and recovery."""


@dataclass
class Site:
    """``cluster`` has two nodes; ``agents[name]`` is the server that node talks to; ``spare`` is nobody's agent."""

    consul: ConsulCluster
    cluster: Cluster
    agents: dict[str, ConsulServer]
    spare: ConsulServer


@pytest.fixture(scope="module")
def site_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home = tmp_path_factory.mktemp("three")
    with ConsulCluster() as consul:
        spare = consul.leader()
        agents = [server for server in consul.servers if server is not spare]
        nodes = [
            Node(
                f"node-{n}",
                home,
                consul_storage(agent.address, agent.token, "outrider/three/"),
                settings=SETTINGS,
                warm=True,
            )
            for n, agent in enumerate(agents)
        ]
        cluster = Cluster(nodes)
        try:
            cluster.bootstrap()
            mount_load(cluster.call)
            yield Site(consul, cluster, dict(zip([node.name for node in nodes], agents, strict=True)), spare)
        finally:
            cluster.kill()


@pytest.fixture
def site(site_of_all: Site) -> Site:
    """The same with everything up, whatever the test before left behind."""
    cluster, consul = site_of_all.cluster, site_of_all.consul
    consul.heal()
    for node in cluster.nodes:
        if not node.running:
            node.start()
    for node in cluster.nodes:
        node.wait_until("be unsealed", lambda node=node: not node.unseal(cluster.keys).body["sealed"])
    cluster.wait_active()
    return site_of_all


def still_running(site: Site) -> bool:
    return all(node.running for node in site.cluster.nodes)


def test_the_leader_is_killed(site: Site) -> None:
    """Once a server that is nobody's agent, if it leads, then whichever leads next."""
    with Writers(site.cluster.nodes, site.cluster.root_token, "leader-killed") as load:
        load.wait_acked(50)
        for _ in range(2):
            leader = site.consul.leader()
            leader.kill()
            site.consul.leader()
            load.wait_acked(50, 40)
            site.consul.heal()
    assert still_running(site)
    load.judge(site.cluster.wait_active())
    assert load.longest_gap_s() < 25


def test_the_leader_is_paused(site: Site) -> None:
    with Writers(site.cluster.nodes, site.cluster.root_token, "leader-paused") as load:
        for _ in range(2):
            load.wait_acked(50)
            leader = site.consul.leader()
            leader.freeze()
            time.sleep(PAUSE_S)  # the fault's own length
            leader.thaw()
            load.wait_acked(50, 40)
    assert still_running(site)
    load.judge(site.cluster.wait_active())


def test_quorum_is_lost_and_comes_back(site: Site) -> None:
    active = site.cluster.wait_active()
    lost = [server for server in site.consul.servers if server is not site.agents[active.name]]
    with Writers(site.cluster.nodes, site.cluster.root_token, "quorum", writers=6) as load:
        load.wait_acked(50)
        for server in lost:
            server.kill()
        killed_at_s = time.monotonic()
        active.wait_until("refuse writes", lambda: len([a for a in load.of(FAILED) if a.status >= 500]) >= 6, 40)
        assert max(attempt.at_s for attempt in load.of(ACKED)) < killed_at_s + 1, "an answer under way at most"
        assert still_running(site)
        assert {attempt.status for attempt in load.of(FAILED) if attempt.status >= 500} == {503}
        assert {attempt.status for attempt in load.of(UNKNOWN)} <= {0, 500}
        for server in lost:
            server.restart(wait=False)
        load.wait_acked(50, 40)
    assert still_running(site)
    load.judge(site.cluster.wait_active())


def test_an_agent_is_lost(site: Site) -> None:
    """As when a whole machine is: nobody is left to say that the beat is missed, but the session has a TTL too. The
    active node lives on without its agent: it must not lead."""
    active, survivor = site.cluster.wait_active(), site.cluster.standby()
    with Writers([survivor], site.cluster.root_token, "agent") as load:
        load.wait_acked(20)
        site.agents[active.name].kill()
        survivor.wait_until("lead", lambda: (reply := survivor.health()) is not None and reply.status == 200, TTL_S)
        load.wait_acked(20)
        assert active.running
        assert (reply := active.health()) is not None
        assert reply.status != 200
        site.agents[active.name].restart(wait=False)
        active.wait_until("stand by", lambda: (reply := active.health()) is not None and reply.status == 429)
        load.wait_acked(20)
    load.judge(survivor)
