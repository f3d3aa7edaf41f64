"""Faults around the nodes of a cluster on one real Consul: pauses, crashes, operators' hands, a bad network.

Clients of every node write, read and list during all of it. The last test puts every transaction in the order in which
Consul applied it and judges the whole history with the checkers of the simulation (P1-P4, P8, P11, P13).
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from consul_backend.transport import CONNECTIONS_MAX
from tests.sim.history import Read, Write
from tests.support.cluster import Node, ready
from tests.support.consul_server import ConsulServer
from tests.support.consul_tap import is_acquire, is_commit, is_flush
from tests.support.faults import arm, await_killed, rounds
from tests.support.site import BEAT_TTL_S, SETTINGS, Site
from tests.support.traffic import Traffic

FLOOR = 100
"""Writes that must be acknowledged before each fault, and again after it: a fault without work proves nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[ConsulServer]:
    """This file's own: it is restarted and its sessions are destroyed."""
    with ConsulServer() as started:
        yield started


@pytest.fixture(scope="module")
def site_of_all(server: ConsulServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two nodes that outlive the tests here."""
    with Site(tmp_path_factory.mktemp("faults"), [server, server]) as site:
        yield site


@pytest.fixture
def site(site_of_all: Site) -> Iterator[Site]:
    """The two nodes, one of them leading; neither may have exited or sealed itself by the end."""
    site_of_all.whole()
    yield site_of_all
    for node in site_of_all.cluster.nodes:
        assert node.running, node.log_tail()
        assert not node.call("GET", "sys/seal-status").body["sealed"], node.log_tail()


def leads(node: Node) -> bool:
    return (reply := node.health()) is not None and reply.status == 200


def stands_by(node: Node) -> bool:
    return (reply := node.health()) is not None and reply.status == 429


@contextlib.contextmanager
def under_load(site: Site, fault: str, *, writers: int = 4, timeout_s: float = 20.0) -> Iterator[Traffic]:
    """Traffic with its floor before the fault and after it; notes for how long nobody wrote."""
    with site.traffic(writers=writers, timeout_s=timeout_s) as traffic:
        traffic.wait_acked(FLOOR)
        began_s = time.monotonic()
        yield traffic
        traffic.wait_acked(FLOOR)
    assert traffic.odd == []
    site.gaps[fault] = traffic.gap_s(began_s - 1.0)


def tenure(site: Site) -> str:
    return str(site.lock()["Session"])


# -- pauses and crashes


def test_an_active_paused_for_longer_than_its_beat(site: Site) -> None:
    """F8: what it had queued is refused, and what it reads when it wakes is refused or fresh (the verdict says so)."""
    for _ in range(rounds()):
        paused, successor = site.cluster.wait_active(), site.cluster.standby()
        with under_load(site, "active paused beyond its beat", writers=8, timeout_s=1.0) as traffic:
            paused.freeze()
            try:
                successor.wait_until("lead", lambda successor=successor: leads(successor))
                traffic.wait_acked(FLOOR // 2)
            finally:
                paused.thaw()
            paused.wait_until("stand by", lambda paused=paused: stands_by(paused))


def test_an_active_paused_for_less_goes_on(site: Site) -> None:
    active, session = site.cluster.wait_active(), tenure(site)
    with under_load(site, "active paused for a moment"):
        active.freeze()
        time.sleep(0.4)  # the fault's own length, below the beat's time to live
        active.thaw()
    assert tenure(site) == session


def test_an_active_killed(site: Site) -> None:
    """F1 and F44: SIGKILL from outside, as the kernel does when memory is short."""
    for _ in range(rounds()):
        victim = site.cluster.wait_active()
        with under_load(site, "active killed") as traffic:
            victim.kill()
            traffic.wait_acked(FLOOR // 2)
            victim.start()
            victim.unseal(site.cluster.keys)
        victim.wait_until("stand by", lambda victim=victim: ready(victim))


@pytest.mark.parametrize("point", ["commit:after-reply", "flush:after-reply", "recovery:before-tenure"])
def test_an_active_killed_at_a_failpoint(site: Site, point: str) -> None:
    """Every point there is, on the embedded store: test_failpoints.py."""
    leader, victim = site.cluster.wait_active(), site.cluster.standby()
    victim.kill()
    arm(victim, f"{point}=kill:{1 if point.startswith('recovery') else 5}")
    victim.start()
    victim.unseal(site.cluster.keys)
    victim.wait_until("stand by", lambda: ready(victim))
    with under_load(site, f"killed at {point}"):
        assert leader.call("PUT", "sys/step-down", token=site.cluster.root_token).status == 204
        await_killed(victim)
        arm(victim, "")
        victim.start()
        victim.unseal(site.cluster.keys)
    victim.wait_until("stand by", lambda: ready(victim))


def test_a_step_down(site: Site) -> None:
    with under_load(site, "step-down"):
        assert site.cluster.call("PUT", "sys/step-down").status == 204


# -- operators


def destroy_session(server: ConsulServer, site: Site) -> None:
    assert server.call("PUT", f"session/destroy/{tenure(site)}").status == 200


def delete_lock(server: ConsulServer, site: Site) -> None:
    with site.exempted(1.0):  # skips the lock-delay, which is the read lease
        assert server.call("DELETE", f"kv/{site.prefix}lock").status == 200


def delete_epoch(server: ConsulServer, site: Site) -> None:
    """The tenure ends with the next flush; the one after it must not be numbered below the log."""
    assert server.call("DELETE", f"kv/{site.prefix}epoch").status == 200


def overwrite_lock(server: ConsulServer, site: Site) -> None:
    server.raw_put(f"{site.prefix}lock", b"not a leader")


def release_lock(server: ConsulServer, site: Site) -> None:
    with site.exempted(1.0):  # the same
        assert server.call("PUT", f"kv/{site.prefix}lock?release={tenure(site)}", b"").status == 200


def restart_agent(server: ConsulServer, site: Site) -> None:
    server.kill()
    server.restart()


def pause_agent(server: ConsulServer, site: Site) -> None:
    server.freeze()
    time.sleep(BEAT_TTL_S + 1.0)  # the fault's own length, beyond the beat's time to live
    server.thaw()


@pytest.mark.parametrize(
    "hand", [destroy_session, delete_lock, delete_epoch, overwrite_lock, release_lock, restart_agent, pause_agent]
)
def test_an_operator_s_hand(server: ConsulServer, site: Site, hand: Callable[[ConsulServer, Site], None]) -> None:
    for _ in range(rounds()):
        with under_load(site, hand.__name__.replace("_", " ")):
            hand(server, site)


def test_the_same_configuration_twice(site: Site, tmp_path: Path) -> None:
    """On one machine the ports decide; elsewhere two nodes call themselves the same, and still one leads."""
    active = site.cluster.wait_active()
    again = Node("again", tmp_path, active.storage, settings=SETTINGS, api_port=active.api_port)
    again.start(wait=False)
    again.wait_until("refuse to start", lambda: not again.running)
    assert "address already in use" in again.log_tail().lower()
    standby = site.cluster.standby()
    standby.stop()
    honest = standby.config_path.read_text()
    stolen = honest.replace(f'api_addr = "{standby.address}"', f'api_addr = "{active.address}"')
    stolen = stolen.replace(f'cluster_addr = "{standby.cluster_address}"', f'cluster_addr = "{active.cluster_address}"')
    assert stolen != honest
    impostor = standby
    impostor.write_config = lambda: impostor.config_path.write_text(stolen)  # type: ignore[method-assign,assignment]  # a configuration of its own, stolen as it is
    try:
        with under_load(site, "two nodes of one name", timeout_s=1.0) as traffic:
            impostor.start()
            impostor.unseal(site.cluster.keys)
            traffic.wait_acked(FLOOR)
            assert site.cluster.call("PUT", "sys/step-down").status == 204
            traffic.wait_acked(FLOOR)
            assert [leads(node) for node in site.cluster.nodes].count(True) <= 1
    finally:
        del impostor.write_config  # type: ignore[method-assign]  # stands in for one call
        impostor.kill()
        impostor.start()
        impostor.unseal(site.cluster.keys)


# -- the network between a node and Consul: outcomes that nobody knows


@pytest.mark.parametrize(
    ("kind", "count", "every", "for_s"),
    [("lose-answer", 100, 2, 0.0), ("swallow", 50, 2, 0.0), ("land-late", 50, 2, 0.05), ("delay", 3, 5, 1.0)],
)
def test_commits_of_unknown_outcome_are_settled(site: Site, kind: str, count: int, every: int, for_s: float) -> None:
    """F9 and F42: the same transaction, sent again, settles it; nobody is told that it failed, and nobody steps down.
    ``land-late``: both copies arrive, the first one last."""
    active, session = site.cluster.wait_active(), tenure(site)
    with under_load(site, f"{kind} x{count}") as traffic:
        fault = site.tap_of(active).inject(kind, count=count * rounds(), every=every, for_s=for_s)
        while fault.count > 0:
            traffic.wait_acked(20)
    assert site.tap_of(active).done[kind] >= count
    assert (traffic.count("fail"), traffic.count("unknown")) == (0, 0)
    assert tenure(site) == session


def test_every_reset_leaves_an_honest_answer(site: Site) -> None:
    """Connections break again and again, each time with a transaction under way."""
    active, session = site.cluster.wait_active(), tenure(site)
    with under_load(site, "resets") as traffic:
        for _ in range(20 * rounds()):
            traffic.wait_acked(10)
            site.tap_of(active).cut()
            site.tap_of(active).heal()
        traffic.wait_acked(FLOOR)
    assert (traffic.count("fail"), traffic.count("unknown")) == (0, 0)
    assert tenure(site) == session


@pytest.mark.parametrize("kind", ["lose-answer", "swallow", "land-late"])
def test_the_answer_to_taking_the_lock_is_lost(site: Site, kind: str) -> None:
    """The lock is ours or it is not, and a late copy finds its session destroyed: somebody leads, and one only."""
    with under_load(site, f"acquire {kind}"):
        for tap in site.taps:
            tap.inject(kind, matches=is_acquire, for_s=0.3)
        assert site.cluster.call("PUT", "sys/step-down").status == 204
        site.cluster.nodes[0].wait_until("meet the fault", lambda: any(tap.done[kind] for tap in site.taps))
    for tap in site.taps:
        tap.clear()


def test_a_session_destroyed_while_a_commit_is_under_way(server: ConsulServer, site: Site) -> None:
    """F7: the request leaves the node, waits on the way, and meets a lock that is no longer its own."""
    active, session = site.cluster.wait_active(), tenure(site)
    tap = site.tap_of(active)
    with under_load(site, "session lost in flight") as traffic:
        before = len(tap.exchanges)
        tap.inject("delay", for_s=1.0)
        active.wait_until("send a commit", lambda: tap.done["delay"] > 0 and len(tap.exchanges) > before)
        (held,) = [it for it in tap.exchanges[before:] if it.status == 0]
        destroy_session(server, site)
        traffic.wait_acked(FLOOR)
        active.wait_until("hear the answer", lambda: held.status != 0)
    assert held.status == 409, "the fence refuses what a dead session sent"
    assert tenure(site) != session


def test_flushes_of_unknown_outcome(site: Site) -> None:
    """A part of the index was stored and the node was not told: it ends the tenure or stores it again."""
    for kind in ("lose-answer", "swallow", "land-late"):
        tap = site.tap_of(site.cluster.wait_active())
        with under_load(site, f"flush {kind}"):
            fault = tap.inject(kind, matches=is_flush, for_s=0.2)
            site.cluster.nodes[0].wait_until("meet the fault", lambda fault=fault: fault.count <= 0)


@pytest.mark.parametrize("fault", ["cut", "blackhole", "half_open"])
def test_the_active_loses_its_way_to_consul(site: Site, fault: str) -> None:
    """F6: as in a minority partition. The other one takes over; what the first one sent arrives when it heals."""
    lost, successor = site.cluster.wait_active(), site.cluster.standby()
    tap = site.tap_of(lost)
    with under_load(site, f"active's network: {fault}", writers=6, timeout_s=1.0) as traffic:
        getattr(tap, fault)()
        successor.wait_until("lead", lambda: leads(successor))
        traffic.wait_acked(FLOOR // 2)
        tap.heal()
    lost.wait_until("stand by", lambda: stands_by(lost))


CAP = 24


def take_every_connection(address: str, held: list[socket.socket]) -> None:
    """Open connections until the server, which closes what is too much without a word, keeps ``CAP`` of ours."""
    host, port = address.rsplit(":", 1)
    while len(held) < CAP:
        held.append(socket.create_connection((host, int(port)), timeout=10))
        if len(held) == CAP:
            closed, _, _ = select.select(held, [], [], 0.5)
            for one in closed:
                held.remove(one)
                one.close()


def test_consul_takes_no_more_connections(tmp_path: Path) -> None:
    """F43: from one address it takes so many and closes the rest without a word. The node has few, and waits."""
    with (
        ConsulServer(settings={"limits": {"http_max_conns_per_client": CAP}}) as small,
        Site(tmp_path, [small]) as site,
    ):
        held: list[socket.socket] = []
        with under_load(site, "Consul's connection cap") as traffic:
            site.taps[0].cut()  # the node must connect anew, and may not
            take_every_connection(small.address, held)
            site.taps[0].heal()
            node = site.cluster.nodes[0]
            node.wait_until("answer that it cannot", lambda: traffic.count("fail") > 0)
            for one in held:
                one.close()
        assert node.running
        assert site.taps[0].open_peak <= CONNECTIONS_MAX + 2, "a pool, not a connection for each request"
        verdict = site.verdict()
        assert verdict.violations == []


# -- the verdict


def test_the_whole_history_is_judged(site_of_all: Site) -> None:
    """Last: everything above, by the checkers of the simulation."""
    verdict = site_of_all.verdict()
    lost = sum(tap.done.total() for tap in site_of_all.taps)
    print(f"\none Consul server: {verdict.text()}; {lost} answers lost, late or delayed on purpose")
    for fault, gap_s in site_of_all.gaps.items():
        print(f"  {gap_s:6.2f} s without a write: {fault}")
    assert verdict.violations == []
    assert verdict.acknowledged >= FLOOR


def test_a_history_that_did_not_happen_is_not_believed(site_of_all: Site) -> None:
    """The control of the test above: one lost write, one stale read, one transaction of a node that did not lead."""
    site_of_all.whole()
    with site_of_all.traffic() as traffic:
        traffic.wait_acked(FLOOR)
    history, taps = traffic.history, site_of_all.taps
    path = next(iter(history.writes[0].entries))
    first = next(write for write in history.writes if write.outcome == "ok" and path in write.entries)
    now_s = time.monotonic()
    history.writes.append(Write(0, "control", {path: b"never stored"}, now_s, now_s + 0.1, "ok"))
    history.reads.append(Read("control", path, first.entries[path], now_s, now_s + 0.1))
    commits = [it for tap in taps for it in tap.exchanges if it.status == 200 and is_commit(it.body)]
    commits[len(commits) // 2].node = "nobody"
    assert {"P1", "P3", "P11"} <= {violation.checker for violation in site_of_all.verdict().violations}
