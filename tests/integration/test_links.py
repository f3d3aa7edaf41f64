"""Bad links between clusters of real processes: a primary, its performance secondary and its DR secondary, and between
them a proxy that is cut, half-open, long, lossy, narrow or corrupting; and clocks that are minutes apart.

Said of each: the primary is not slowed, what a secondary has it serves, both ends say within two heartbeats how things
stand, and nobody has to do anything for it to heal.
"""

from __future__ import annotations

import http.client
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hvac
import hvac.exceptions
import pytest

from tests.integration.test_main_job import alice, read, with_secrets
from tests.support import disaster
from tests.support.cluster import (
    Cluster,
    ClusterError,
    Node,
    activation_token,
    embedded_storage,
    in_step,
    performance,
    replicate,
)
from tests.support.faults import MOUNT, Client, mount_load, rounds
from tests.support.proxy import FaultProxy, Link
from tests.support.wrong_clock import WrongClock

BEAT_S = 1.0
SLACK_S = 1.5
"""For a machine that is busy with other tests."""
SETTINGS = f'replication {{\n  heartbeat_interval = "{BEAT_S:.0f}s"\n}}\n'
MODES = ("performance", "dr")
WRITES = 100
LONG = Link(delay_s=0.15, jitter_s=0.01, loss=0.01)
NARROW = Link(delay_s=0.01, bytes_per_s=125_000)


@dataclass
class View:
    """What both ends of one mode's link say at one moment; ``lags_s``: the secondary's and the primary's figure."""

    primary: dict[str, Any]
    secondary: dict[str, Any]
    entry: dict[str, Any]
    at_s: float

    @property
    def up(self) -> tuple[bool, bool]:
        """Whether the secondary, and whether the primary, says that they are connected."""
        return self.secondary["connection_state"] == "ready", self.entry["connection_status"] == "connected"

    @property
    def lags_s(self) -> tuple[float, float]:
        return float(self.secondary["lag_s"]), int(self.entry["replication_primary_canary_age_ms"]) / 1000


@dataclass
class Links:
    """The three clusters. ``before_s``: what writes took on the primary when it had no secondary."""

    near: Cluster
    far: Cluster
    mirror: Cluster
    proxy: FaultProxy
    clock: WrongClock
    before_s: list[float] = field(default_factory=list)
    written: int = 0

    @property
    def followers(self) -> dict[str, Node]:
        return {"performance": self.far.nodes[0], "dr": self.mirror.nodes[0]}

    def view(self, mode: str) -> View:
        ours = disaster.status(self.near.nodes[0], mode)
        theirs = disaster.status(self.followers[mode], mode)
        (entry,) = [one for one in ours["secondaries"] if one["node_id"] == theirs["secondary_id"]]
        return View(ours, theirs, entry, time.monotonic())

    def views(self) -> list[View]:
        return [self.view(mode) for mode in MODES]

    def write(self, count: int = WRITES, value: str = "v") -> list[float]:
        """Seconds of each of so many writes on the primary, one after the other."""
        node = self.near.nodes[0]
        connection = http.client.HTTPConnection("127.0.0.1", node.api_port, timeout=30)
        took_s = []
        for _ in range(count):
            self.written += 1
            body = json.dumps({"data": {"n": self.written, "v": value}})
            started_s = time.monotonic()
            connection.request(
                "POST", f"/v1/secret/data/n/{self.written}", body, {"X-Vault-Token": self.near.root_token}
            )
            answer = connection.getresponse()
            answer.read()
            took_s.append(time.monotonic() - started_s)
            assert answer.status == 200
        connection.close()
        return took_s

    def wait(self, what: str, condition: Callable[[View], bool], timeout_s: float) -> float:
        """Until both modes are so; returns how long that took."""
        started_s = time.monotonic()
        while not all(list(map(condition, self.views()))):
            if time.monotonic() > started_s + timeout_s:
                tails = "\n".join(
                    f"--- {node.name}\n{node.log_tail()}" for node in (self.near.nodes[0], *self.followers.values())
                )
                raise ClusterError(f"not {what} within {timeout_s:.1f} s: {self.views()}\n{tails}")
            time.sleep(0.05)
        return time.monotonic() - started_s

    def wait_in_step(self, timeout_s: float = 30.0) -> float:
        """Until both secondaries are connected, stream and have the primary's roots; returns how long that took.

        Streaming and equal is what one that was just cut off still calls itself, while it waits to connect again.
        """

        def equal(view: View) -> bool:
            streams = view.up == (True, True) and view.secondary.get("state") == "stream-wals"
            return bool(streams and view.secondary["merkle_root"] == view.primary["merkle_root"])

        return self.wait("in step", equal, timeout_s)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Links]:
    home = tmp_path_factory.mktemp("links")
    clock = WrongClock(home / "clock")
    near, far, mirror = (
        Cluster([Node(name, home, embedded_storage(home / f"{name}-data"), name, SETTINGS)])
        for name in ("near", "far", "mirror")
    )
    far.nodes[0].environment = clock.environment
    proxy = FaultProxy(near.nodes[0].cluster_port)
    near.nodes[0].advertised_cluster_port = proxy.port
    links = Links(near, far, mirror, proxy, clock)
    try:
        for cluster in (near, far, mirror):
            cluster.bootstrap()
        with_secrets(near)
        links.write()
        links.before_s = links.write()
        replicate(near, far, "far")
        disaster.mirror(near, mirror, "mirror")
        yield links
    finally:
        proxy.close()
        for cluster in (near, far, mirror):
            cluster.kill()


@pytest.fixture
def links(running: Links) -> Iterator[Links]:
    """Everything healthy before and after."""
    running.wait_in_step()
    yield running
    running.clock.set(0)
    running.proxy.heal()
    running.wait_in_step()


def assert_not_slowed(links: Links, took_s: list[float], what: str) -> None:
    """A primary that waited for a secondary would do so in every write, and for a beat at least."""
    usual, under = statistics.median(links.before_s), statistics.median(took_s)
    usual_p99, under_p99 = (sorted(times)[-max(1, len(times) // 100)] for times in (links.before_s, took_s))
    print(f"\n{what}: writes p50 {under * 1000:.1f} ms, p99 {under_p99 * 1000:.1f} ms; without a secondary", end=" ")
    print(f"{usual * 1000:.1f} and {usual_p99 * 1000:.1f} ms")
    assert under < 3 * usual + 0.08
    assert under_p99 < 5 * usual_p99 + 0.25


def assert_idle_lag(links: Links, transit_s: float = 0.0) -> None:
    """Under a beat on both ends, from one beat to the next, as soon as what was written has arrived."""
    most_s = BEAT_S + transit_s + 0.5
    links.wait("caught up", lambda view: max(view.lags_s) < most_s, 10)
    worst_s = 0.0
    until_s = time.monotonic() + 1.2 * BEAT_S
    while time.monotonic() < until_s:
        worst_s = max(worst_s, *(lag_s for view in links.views() for lag_s in view.lags_s))
        time.sleep(0.1)
    assert worst_s < most_s, f"an idle link shows a lag of {worst_s:.2f} s"


def test_a_good_link_shows_a_lag_below_a_beat(links: Links) -> None:
    assert_not_slowed(links, links.write(), "good link")
    links.wait_in_step()
    assert_idle_lag(links)
    for view in links.views():
        assert view.up == (True, True)
        assert abs(int(view.entry["clock_skew_ms"])) < 200


@pytest.mark.parametrize("fault", ["cut", "blackhole"])
def test_a_link_that_is_gone(links: Links, fault: str) -> None:
    client = alice(links.far.nodes[0])
    root = hvac.Client(links.near.nodes[0].address, token=links.near.root_token)
    root.secrets.kv.v2.create_or_update_secret("kept", secret={"from": fault})
    links.wait_in_step()
    getattr(links.proxy, fault)()
    took_s = links.wait("shown as down on both ends", lambda view: view.up == (False, False), 2 * BEAT_S + SLACK_S)
    print(f"\n{fault}: both ends of both modes said so after {took_s:.2f} s")

    first = links.views()
    assert_not_slowed(links, links.write(), fault)
    assert read(client, "kept") == {"from": fault}, "what it has it serves"
    health = links.mirror.nodes[0].health()
    assert health is not None
    assert health.status == 472
    if fault == "cut":
        with pytest.raises(hvac.exceptions.VaultDown, match="was not carried out"):
            client.secrets.kv.v2.create_or_update_secret("mine", secret={"v": 1})
    time.sleep(max(0.0, first[0].at_s + 2.0 - time.monotonic()))
    for before, after in zip(first, links.views(), strict=True):
        passed_s = after.at_s - before.at_s
        for then_s, now_s in zip(before.lags_s, after.lags_s, strict=True):
            assert abs(now_s - then_s - passed_s) < 0.4, "the lag rises by one second a second"
        assert after.entry["behind_records"] >= WRITES

    links.proxy.heal()
    print(f"healed after {links.wait_in_step():.2f} s")
    links.wait("shown as up on both ends", lambda view: view.up == (True, True), 2 * BEAT_S + SLACK_S)
    assert_idle_lag(links)


def test_connections_that_are_half_open_are_given_up_and_made_anew(links: Links) -> None:
    """Neither end is told anything, and the link is not healed: what is open is dead, what is new works."""
    before = links.proxy.connections
    links.proxy.lose_connections()
    said: set[tuple[str, bool]] = set()

    def everybody_said_so(view: View) -> bool:  # none of them for long: each is looked at by itself
        said.update((view.secondary["secondary_id"], end) for end in (False, True) if not view.up[end])
        return len(said) == 4

    links.wait("shown as down on both ends", everybody_said_so, 2 * BEAT_S + SLACK_S)
    assert_not_slowed(links, links.write(), "half-open")
    # Three silent beats, a pause, and a handshake.
    took_s = links.wait("connected again", lambda view: view.up == (True, True), 3 * BEAT_S + 3 + 2 * SLACK_S)
    assert links.proxy.connections >= before + 2
    print(f"connected again {took_s:.2f} s later")
    links.wait_in_step()


def test_300_ms_round_trip_with_1_percent_loss(links: Links) -> None:
    client, lost = alice(links.far.nodes[0]), links.proxy.packets_lost
    links.proxy.shape(LONG)

    def measured(view: View) -> bool:
        sides = (view.entry, view.secondary["primaries"][0])
        return all(int(side["last_heartbeat_duration_ms"]) >= 300 for side in sides)

    links.wait("known to be that long", measured, 2 * BEAT_S + SLACK_S)
    waited_s = []
    for number in range(2):
        started_s = time.monotonic()
        client.secrets.kv.v2.create_or_update_secret("over", secret={"the": f"ocean {number}"})
        waited_s.append(time.monotonic() - started_s)
    assert min(waited_s) > 0.29, "the control: the link is that long"
    with pytest.raises(AssertionError):
        assert_not_slowed(links, waited_s, "the control, writes that wait for the link")
    until_s = time.monotonic() + 2 * BEAT_S
    took_s: list[float] = []
    while time.monotonic() < until_s or len(took_s) < WRITES:
        took_s += links.write(10)
        for view in links.views():
            assert view.up == (True, True)
            assert view.secondary.get("state") == "stream-wals"
    assert_not_slowed(links, took_s, "300 ms, 1 % loss")
    links.wait_in_step()
    assert_idle_lag(links, transit_s=0.45)
    for view in links.views():
        assert abs(int(view.entry["clock_skew_ms"])) < 300
    assert links.proxy.packets_lost > lost


def test_1_mbit_per_s_is_caught_up_by_itself(links: Links) -> None:
    links.proxy.shape(NARROW)
    took_s = links.write(60, "v" * 8_000)
    assert_not_slowed(links, took_s, "1 Mbit/s")
    behind = [view.entry["behind_records"] for view in links.views()]
    assert min(behind) > 0, "the control: it does not keep up"
    least_s = [min(view.lags_s) for view in links.views()]
    for _ in range(5):
        for view in links.views():
            assert view.up == (True, True)
            assert view.secondary.get("state") == "stream-wals"
        time.sleep(0.1)
    print(f"{behind} records and {least_s} s behind; in step after {links.wait_in_step(60):.1f} s")
    assert_idle_lag(links)


def resident_bytes(node: Node) -> int:
    """Of a node's process."""
    assert node.process is not None
    status = Path(f"/proc/{node.process.pid}/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def overwrite(cluster: Cluster, count: int) -> list[float]:
    """Seconds of each of so many writes of 100 kB, always to the same ten keys, so that no cache grows of it."""
    client, took_s = Client(cluster.nodes[0], cluster.root_token), []
    for number in range(count):
        started_s = time.monotonic()
        status, _ = client.call("PUT", f"{MOUNT}/{number % 10}", {"v": f"{number:06}" + "v" * 100_000})
        took_s.append(time.monotonic() - started_s)
        assert status == 204
    client.close()
    return took_s


def test_secondaries_that_take_nearly_nothing_cost_the_primary_bounded_memory(links: Links) -> None:
    """What each may have in flight, and no more: 80 MB are waiting for the two of them."""
    node = links.near.nodes[0]
    mount_load(links.near.call)
    usual_s = overwrite(links.near, 350)  # the newest 32 MiB of the log are kept in memory
    links.wait_in_step()
    before = resident_bytes(node)
    links.proxy.shape(Link(bytes_per_s=25_000))
    links.before_s, kept = usual_s, links.before_s
    assert_not_slowed(links, overwrite(links.near, 400), "25 kB/s")
    links.before_s = kept
    grown = resident_bytes(node) - before
    print(f"the primary grew by {grown / 2**20:.1f} MiB")
    assert grown < 40 * 2**20
    reached = [view.entry["acknowledged_wal"] for view in links.views()]
    assert min(view.entry["behind_records"] for view in links.views()) > 300, "the control: they stalled"
    # A record takes 4 s here, and a peer that is silent for 3 is given up.
    streams = links.proxy.connections
    deadline_s = time.monotonic() + 30
    while any(view.entry["acknowledged_wal"] <= before for view, before in zip(links.views(), reached, strict=True)):
        assert time.monotonic() < deadline_s, "no progress on a narrow link"
        assert all(view.up == (True, True) for view in links.views())
        time.sleep(0.1)
    assert links.proxy.connections == streams
    links.proxy.heal()
    links.wait_in_step(60)


def test_bytes_changed_below_tls_apply_nothing_wrong(links: Links) -> None:
    client, before = alice(links.far.nodes[0]), links.proxy.connections
    links.proxy.shape(Link(corrupt_every=12))
    wanted = 12 * rounds()
    until_s = time.monotonic() + 20 * rounds()
    while links.proxy.corrupted < wanted and time.monotonic() < until_s:
        links.write(5)
        time.sleep(0.05)
    assert links.proxy.corrupted >= wanted
    assert links.proxy.connections > before, "each such connection ends"
    for view in links.views():
        assert not view.secondary["alarm"], "TLS refused it; nothing above it ever saw it"
    links.proxy.heal()
    links.wait_in_step()
    assert read(client, f"n/{links.written}") == {"n": links.written, "v": "v"}


def test_a_first_fill_is_cut_and_goes_on_by_itself(links: Links, tmp_path: Path) -> None:
    """Until all is there it serves nothing rather than a part."""
    late = Cluster([Node("late", tmp_path, embedded_storage(tmp_path / "late-data"), "late", SETTINGS)])
    links.write(30, "v" * 50_000)
    try:
        late.bootstrap()
        links.proxy.shape(Link(delay_s=0.02, loss=0.01, bytes_per_s=400_000))
        token = activation_token(links.near, "late")
        path = "sys/replication/performance/secondary/enable"
        assert late.call("POST", path, {"token": token}, timeout_s=60).status == 200
        node, late.keys = late.nodes[0], links.near.keys

        def filling() -> bool:
            return performance(node).get("state") == "merkle-sync"

        node.wait_until("be filled", filling)
        links.proxy.cut()
        node.wait_until("notice", lambda: performance(node).get("connection_state") == "transient_failure")
        assert performance(node)["merkle_root"] != performance(links.near.nodes[0])["merkle_root"]
        login = node.call("POST", "auth/userpass/login/alice", {"password": "wonderland"})
        assert (login.status, "primary's data" in login.errors[0] or "merkle sync" in login.errors[0]) == (503, True)
        links.proxy.heal()
        node.wait_until("be in step", lambda: in_step(links.near.nodes[0], node), 60)
        client = alice(node)
        assert {number: read(client, f"n/{number}")["n"] for number in (1, 2, links.written)} == {
            number: number for number in (1, 2, links.written)
        }
    finally:
        late.kill()
        revoke = "sys/replication/performance/primary/revoke-secondary"
        assert links.near.call("POST", revoke, {"id": "late"}).status == 204


@pytest.mark.parametrize("skew_s", [300, -300])
def test_clocks_minutes_apart(links: Links, skew_s: int) -> None:
    """The clock of the performance secondary is set while it streams: nothing is lost, and no lag is made of it."""
    client, before = alice(links.far.nodes[0]), links.proxy.connections
    links.clock.set(skew_s)
    wanted_ms, worst_s = skew_s * 1000, 0.0

    def known(view: View) -> bool:
        ours, theirs = view.entry["clock_skew_ms"], view.secondary["primaries"][0]["clock_skew_ms"]
        return abs(int(ours) - wanted_ms) < 500 and abs(int(theirs) + wanted_ms) < 500

    until_s = time.monotonic() + 3 * BEAT_S + SLACK_S
    while not known(view := links.view("performance")):
        assert time.monotonic() < until_s, f"{view.entry} {view.secondary['primaries']}"
        time.sleep(0.05)
    until_s = time.monotonic() + 2 * BEAT_S
    while time.monotonic() < until_s:
        view = links.view("performance")
        worst_s = max(worst_s, *view.lags_s)
        assert view.up == (True, True)
        time.sleep(0.1)
    assert worst_s < BEAT_S + 0.5
    links.write(10)
    links.wait_in_step()
    assert performance(links.far.nodes[0])["state"] == "stream-wals"
    assert read(client, f"n/{links.written}") == {"n": links.written, "v": "v"}
    client.secrets.kv.v2.create_or_update_secret("skewed", secret={"v": skew_s})
    assert links.proxy.connections <= before + 1, "the stream went on; a forwarded write may have its own connection"
