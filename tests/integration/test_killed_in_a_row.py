"""Three nodes on one Consul of which whoever leads is killed, again and again, before the cluster has settled.

Every two seconds, or as soon as writes are acknowledged again, the active node gets a SIGKILL and is started again at
once; every third time the next node gets it already when it has taken the lock and only recovers. Clients of every node
write, read and list meanwhile; at the end the history is judged as in test_faults.py.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.cluster import Node
from tests.support.consul_server import ConsulServer
from tests.support.faults import rounds
from tests.support.site import Site

PERIOD_S = 2.0
KILLS = 4
"""In ``make test``; a soak kills ``60``: two minutes."""
KILLS_OF_A_SOAK = 60
FLOOR = 100
SETTLED_S_MAX = 180.0
"""Generous, for a machine that does other work; what it took is printed."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ConsulServer() as server, Site(tmp_path, [server, server, server]) as made:
        yield made


def await_holder(site: Site, killed: str) -> tuple[Node, str]:
    """The node with the lock, whether it serves already or only recovers, and its session: not the ``killed`` one."""
    deadline_s = time.monotonic() + SETTLED_S_MAX
    while (session := str((row := site.lock()).get("Session") or killed)) == killed:
        assert time.monotonic() < deadline_s, f"nobody takes the lock\n{site.cluster.nodes[0].log_tail()}"
        time.sleep(0.02)
    address = json.loads(base64.b64decode(str(row["Value"])))["api_addr"]
    return next(node for node in site.cluster.nodes if node.address == address), session


def come_back(site: Site, node: Node) -> None:
    node.start()
    node.wait_until("be unsealed", lambda: not node.unseal(site.cluster.keys).body["sealed"], SETTLED_S_MAX)


def test_whoever_leads_is_killed_every_two_seconds(site: Site) -> None:
    kills = KILLS if rounds() == 1 else KILLS_OF_A_SOAK
    serving, killed, server = 0, "", site.agents[0]
    with site.traffic(writers=4, readers=2, timeout_s=5.0) as traffic, ThreadPoolExecutor(3) as starters:
        traffic.wait_acked(FLOOR)
        began_s = time.monotonic()
        returning: dict[str, Future[None]] = {}
        for number in range(kills):
            time.sleep(max(0.0, began_s + number * PERIOD_S - time.monotonic()))  # the fault's own rhythm
            if number % 3 != 2:
                traffic.wait_acked(20, SETTLED_S_MAX)
            victim, killed = await_holder(site, killed)
            if victim.name in returning:
                returning[victim.name].result()
            with contextlib.suppress(OSError):
                serving += (reply := victim.health()) is not None and reply.status == 200
            victim.kill()
            returning[victim.name] = starters.submit(come_back, site, victim)
        last_s = time.monotonic()
        acked = traffic.acked
        first_s = traffic.wait_acked(1, SETTLED_S_MAX)
        traffic.wait_acked(FLOOR, SETTLED_S_MAX)
        for each in returning.values():
            each.result()
        site.whole()
        settled_s = time.monotonic() - last_s
    tenures = json.loads(server.raw_get(f"{site.prefix}epoch") or b"{}")["number"]
    assert traffic.odd == []
    for node in site.cluster.nodes:
        assert node.running, node.log_tail()
    verdict = site.verdict()
    print(
        f"\n{kills} kills in {last_s - began_s:.0f} s, of which {serving} of a node that served; {acked} writes"
        f" acknowledged before the last one; then {first_s:.1f} s until the next write, {settled_s:.1f} s until all"
        f" three were there; longest time without a write {traffic.gap_s(began_s - 1.0):.1f} s\n{verdict.text()}"
    )
    assert verdict.violations == []
    assert tenures > kills, "each kill ended a tenure"
