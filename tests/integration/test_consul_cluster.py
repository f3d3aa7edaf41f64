"""Two nodes on a Consul of three servers, which lose their leader, their quorum and their machines under load.

Judged at the end like test_faults.py. Each node has an agent of its own; the third server is nobody's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.cluster import Node
from tests.support.consul_server import ConsulCluster, ConsulServer
from tests.support.faults import rounds
from tests.support.site import Site
from tests.support.traffic import Traffic

SETTINGS = (
    'sidecar {\n  beat_ttl = "4s"\n  beat_interval = "500ms"\n'
    '  step_down_grace = "500ms"\n  flush_interval = "50ms"\n}\n'
)
FLOOR = 100
PAUSE_S = 5.0


@dataclass
class Three:
    """``spare`` is the server that is no node's agent."""

    consul: ConsulCluster
    site: Site
    spare: ConsulServer


@pytest.fixture(scope="module")
def three_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    with ConsulCluster() as consul:
        spare = consul.leader()
        agents = [server for server in consul.servers if server is not spare]
        with Site(tmp_path_factory.mktemp("three"), agents, settings=SETTINGS) as site:
            yield Three(consul, site, spare)


@pytest.fixture
def three(three_of_all: Three) -> Iterator[Three]:
    """The same with everything up, whatever the test before left behind; no node may exit or seal itself."""
    three_of_all.consul.heal()
    three_of_all.site.whole()
    yield three_of_all
    for node in three_of_all.site.cluster.nodes:
        assert node.running, node.log_tail()
        assert not node.call("GET", "sys/seal-status").body["sealed"], node.log_tail()


def leads(node: Node) -> bool:
    return (reply := node.health()) is not None and reply.status == 200


@contextlib.contextmanager
def under_load(site: Site, fault: str) -> Iterator[Traffic]:
    """Traffic with its floor before the fault and after it; notes for how long nobody wrote."""
    with site.traffic(timeout_s=2.0) as traffic:
        traffic.wait_acked(FLOOR)
        began_s = time.monotonic()
        yield traffic
        traffic.wait_acked(FLOOR)
    assert traffic.odd == []
    site.gaps[fault] = traffic.gap_s(began_s - 1.0)


def test_the_leader_is_killed(three: Three) -> None:
    """F3. Not the active node's own agent: that is the test of the lost machine."""
    site = three.site
    for number in range(2 * rounds()):
        leader = three.consul.leader()
        active = site.cluster.wait_active()
        if leader is site.agent_of(active):
            assert site.cluster.call("PUT", "sys/step-down").status == 204
            successor = next(node for node in site.cluster.nodes if node is not active)
            successor.wait_until("lead", lambda node=successor: leads(node))
        with under_load(site, f"leader of Consul killed, {number + 1}"):
            leader.kill()
            three.consul.leader()
        three.consul.heal()


def test_the_leader_is_paused(three: Three) -> None:
    """F4: what it had taken in may be applied by its successor, or by nobody; nobody is told a lie."""
    for number in range(2 * rounds()):
        with under_load(three.site, f"leader of Consul paused, {number + 1}"):
            leader = three.consul.leader()
            leader.freeze()
            time.sleep(PAUSE_S)  # the fault's own length
            leader.thaw()


def test_quorum_is_lost_and_comes_back(three: Three) -> None:
    """F5: refused while it is gone, and the node is there when it is back."""
    site = three.site
    active = site.cluster.wait_active()
    lost = [server for server in three.consul.servers if server is not site.agent_of(active)]
    with under_load(site, "quorum lost") as traffic:
        for server in lost:
            server.kill()
        acked = traffic.acked
        active.wait_until("refuse writes", lambda: traffic.count("fail") + traffic.count("unknown") >= 6)
        assert traffic.acked <= acked + 20, "answers under way at most"
        assert all(node.running for node in site.cluster.nodes)
        for server in lost:
            server.restart(wait=False)


def test_an_agent_is_lost(three: Three) -> None:
    """As when a whole machine is: nobody is left to say that the beat is missed, but the session has a TTL too. The
    active node lives on without its agent: it must not lead."""
    site = three.site
    active, survivor = site.cluster.wait_active(), site.cluster.standby()
    with under_load(site, "machine with the active node's agent lost") as traffic:
        agent = site.agent_of(active)
        agent.kill()
        survivor.wait_until("lead", lambda: leads(survivor))
        traffic.wait_acked(FLOOR)
        assert active.running
        assert not leads(active)
        agent.restart(wait=False)
        active.wait_until("stand by", lambda: (reply := active.health()) is not None and reply.status == 429)


def test_the_whole_history_is_judged(three_of_all: Three) -> None:
    """Last: everything above, by the checkers of the simulation."""
    three_of_all.consul.heal()
    verdict = three_of_all.site.verdict()
    print(f"\nthree Consul servers: {verdict.text()}")
    for fault, gap_s in three_of_all.site.gaps.items():
        print(f"  {gap_s:6.2f} s without a write: {fault}")
    assert verdict.violations == []
    assert verdict.acknowledged >= FLOOR
