"""Bad links between clusters of real processes: a primary, its performance secondary and its DR secondary, and between
them a proxy that is cut, half-open, long, lossy, narrow or corrupting; and clocks that are minutes apart.

Said of each: the primary is not slowed, what a secondary has it serves, both ends say how things stand, and nobody has
to do anything for it to heal. That they say so within two heartbeats is proved on a clock that is set
(tests/unit/test_replication_status.py): here it is printed, since a machine that runs other tests too may hold up any
beat of any process. For the same reason what must be so all the time must be so throughout one of a few windows.
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
LIMIT_S = 120.0
"""For what is waited for: nothing takes that long but on a machine that is starved."""
WINDOWS = 6
"""How often :meth:`Links.undisturbed` looks before it believes that the link, and not the machine, is what it sees."""
QUICK_S = 0.25
"""Less than what a write takes that waits for a secondary on any link here that is not good."""
SETTINGS = f'replication {{\n  heartbeat_interval = "{BEAT_S:.0f}s"\n}}\n'
MODES = ("performance", "dr")
WRITES = 100
LONG = Link(delay_s=0.15, jitter_s=0.01, loss=0.01)
NARROW = Link(delay_s=0.01, bytes_per_s=125_000)


@dataclass
class View:
    """What both ends of one mode's link say; ``lags_s``: the secondary's and the primary's figure, ``said_s`` the two
    moments between which each was told. ``entry`` is the secondary's among those of the primary."""

    primary: dict[str, Any]
    secondary: dict[str, Any]
    entry: dict[str, Any]
    said_s: tuple[tuple[float, float], tuple[float, float]]

    @property
    def up(self) -> tuple[bool, bool]:
        """Whether the secondary, and whether the primary, says that they are connected."""
        return self.secondary["connection_state"] == "ready", self.entry["connection_status"] == "connected"

    @property
    def streams(self) -> bool:
        """Whether both say that they are connected, and the secondary that it streams."""
        return self.up == (True, True) and self.secondary.get("state") == "stream-wals"

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
        began_s = time.monotonic()
        ours = disaster.status(self.near.nodes[0], mode)
        between_s = time.monotonic()
        theirs = disaster.status(self.followers[mode], mode)
        (entry,) = [one for one in ours["secondaries"] if one["node_id"] == theirs["secondary_id"]]
        return View(ours, theirs, entry, ((between_s, time.monotonic()), (began_s, between_s)))

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

    def wait(self, what: str, condition: Callable[[View], bool], timeout_s: float = LIMIT_S) -> float:
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

    def wait_in_step(self) -> float:
        """Until both secondaries are connected, stream and have the primary's roots; returns how long that took.

        Streaming and equal is what one that was just cut off still calls itself, while it waits to connect again.
        """

        def equal(view: View) -> bool:
            return bool(view.streams and view.secondary["merkle_root"] == view.primary["merkle_root"])

        return self.wait("in step", equal)

    def undisturbed(self, what: str, watch: Callable[[], str]) -> None:
        """``watch`` looks for a while and returns what was wrong, "" for nothing, which must come soon."""
        wrong = ""
        for _ in range(WINDOWS):
            self.wait("connected", lambda view: view.streams)
            connections = self.proxy.connections
            wrong = watch()
            if not wrong and self.proxy.connections == connections:
                return
            print(f"\n{what}: looked at again, because {wrong or 'somebody connected anew'}")
        raise AssertionError(f"not {what} throughout any of {WINDOWS} windows; the last: {wrong or 'connected anew'}")

    def watch_streams(self, for_s: float, meanwhile: Callable[[], object] = lambda: time.sleep(0.1)) -> str:
        """Which of the two does not stream at some moment of that time, for :meth:`undisturbed`."""
        until_s = time.monotonic() + for_s
        while time.monotonic() < until_s:
            meanwhile()
            for view in self.views():
                if not view.streams:
                    return f"not streaming: {view.entry} {view.secondary}"
        return ""


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


def assert_not_slowed(links: Links, took_s: list[float], what: str, bound_s: float = QUICK_S) -> None:
    """A primary that waited for a secondary would do so in every write, and for longer than ``bound_s``."""
    usual, under = statistics.median(links.before_s), statistics.median(took_s)
    usual_p99, under_p99 = (sorted(times)[-max(1, len(times) // 100)] for times in (links.before_s, took_s))
    print(f"\n{what}: writes p50 {under * 1000:.1f} ms, p99 {under_p99 * 1000:.1f} ms; without a secondary", end=" ")
    print(f"{usual * 1000:.1f} and {usual_p99 * 1000:.1f} ms")
    assert under < bound_s


def assert_idle_lag(links: Links, transit_s: float = 0.0) -> None:
    """Under a beat on both ends, from one beat to the next, as soon as what was written has arrived."""
    most_s = BEAT_S + transit_s + 0.5

    def watch() -> str:
        until_s = time.monotonic() + 1.2 * BEAT_S
        while time.monotonic() < until_s:
            worst_s = max(lag_s for view in links.views() for lag_s in view.lags_s)
            if worst_s >= most_s:
                return f"an idle link shows a lag of {worst_s:.2f} s"
            time.sleep(0.1)
        return ""

    links.wait("caught up", lambda view: max(view.lags_s) < most_s)
    links.undisturbed("below a beat behind", watch)


def assert_no_skew(view: View) -> None:
    """Of two clocks that are the same: what is measured over a heartbeat is off by no more than that took."""
    assert abs(int(view.entry["clock_skew_ms"])) <= int(view.entry["last_heartbeat_duration_ms"]) + 10


def test_a_good_link_shows_a_lag_below_a_beat(links: Links) -> None:
    assert_not_slowed(links, links.write(), "good link")
    links.wait_in_step()
    assert_idle_lag(links)
    for view in links.views():
        assert_no_skew(view)


@pytest.mark.parametrize("fault", ["cut", "blackhole"])
def test_a_link_that_is_gone(links: Links, fault: str) -> None:
    client = alice(links.far.nodes[0])
    root = hvac.Client(links.near.nodes[0].address, token=links.near.root_token)
    root.secrets.kv.v2.create_or_update_secret("kept", secret={"from": fault})
    links.wait_in_step()
    getattr(links.proxy, fault)()
    took_s = links.wait("shown as down on both ends", lambda view: view.up == (False, False))
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
    time.sleep(2.0)  # what the lag is to rise by, and by what the requests take
    for before, after in zip(first, links.views(), strict=True):
        for then_s, now_s, then_said_s, now_said_s in zip(
            before.lags_s, after.lags_s, before.said_s, after.said_s, strict=True
        ):
            least_s, most_s = now_said_s[0] - then_said_s[1], now_said_s[1] - then_said_s[0]
            assert least_s - 0.1 < now_s - then_s < most_s + 0.1, "the lag rises by one second a second"
        assert after.entry["behind_records"] >= WRITES

    links.proxy.heal()
    print(f"healed after {links.wait_in_step():.2f} s")
    assert_idle_lag(links)


def test_connections_that_are_half_open_are_given_up_and_made_anew(links: Links) -> None:
    """Neither end is told anything, and the link is not healed: what is open is dead, what is new works."""
    said: set[tuple[str, bool]] = set()
    for _ in range(WINDOWS):
        before = links.proxy.connections
        links.proxy.lose_connections()

        def said_or_over(view: View, before: int = before) -> bool:
            """Nobody says so for long, so each is looked at by itself, and who was missed is given another chance."""
            said.update((view.secondary["secondary_id"], end) for end in (False, True) if not view.up[end])
            return len(said) == 4 or (view.streams and links.proxy.connections >= before + 2)

        took_s = links.wait("shown as down on both ends, or connected again", said_or_over)
        print(f"\n{len(said)} of four ends were seen to say so after {took_s:.2f} s")
        assert_not_slowed(links, links.write(), "half-open")
        took_s = links.wait("connected again", lambda view: view.streams)
        assert links.proxy.connections >= before + 2
        print(f"connected again {took_s:.2f} s later")
        links.wait_in_step()
        if len(said) == 4:
            break
    assert len(said) == 4, f"of both ends of both modes only {said} said that they were cut off"


def test_300_ms_round_trip_with_1_percent_loss(links: Links) -> None:
    client, lost = alice(links.far.nodes[0]), links.proxy.packets_lost
    links.proxy.shape(LONG)

    def measured(view: View) -> bool:
        sides = (view.entry, view.secondary["primaries"][0])
        return all(int(side["last_heartbeat_duration_ms"]) >= 300 for side in sides)

    links.wait("known to be that long", measured)
    waited_s = []
    for number in range(2):
        started_s = time.monotonic()
        client.secrets.kv.v2.create_or_update_secret("over", secret={"the": f"ocean {number}"})
        waited_s.append(time.monotonic() - started_s)
    assert min(waited_s) > 0.29, "the control: the link is that long"
    with pytest.raises(AssertionError):
        assert_not_slowed(links, waited_s, "the control, writes that wait for the link")
    took_s: list[float] = []
    links.undisturbed("streaming", lambda: links.watch_streams(2 * BEAT_S, lambda: took_s.extend(links.write(10))))
    took_s += links.write(max(0, WRITES - len(took_s)))
    assert_not_slowed(links, took_s, "300 ms, 1 % loss")
    links.wait_in_step()
    assert_idle_lag(links, transit_s=0.45)
    for view in links.views():
        assert_no_skew(view)
    assert links.proxy.packets_lost > lost


def test_1_mbit_per_s_is_caught_up_by_itself(links: Links) -> None:
    links.proxy.shape(NARROW)
    took_s = links.write(40, "v" * 24_000)  # a quarter of a second for each is what the link takes for them
    assert_not_slowed(links, took_s, "1 Mbit/s")
    behind = [view.entry["behind_records"] for view in links.views()]
    assert min(behind) > 0, "the control: it does not keep up"
    least_s = [min(view.lags_s) for view in links.views()]
    links.undisturbed("streaming", lambda: links.watch_streams(0.5))
    print(f"{behind} records and {least_s} s behind; in step after {links.wait_in_step():.1f} s")
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
    assert_not_slowed(links, overwrite(links.near, 400), "25 kB/s", max(1.0, 3 * statistics.median(usual_s)))
    grown = resident_bytes(node) - before
    print(f"the primary grew by {grown / 2**20:.1f} MiB")
    assert grown < 40 * 2**20
    assert min(view.entry["behind_records"] for view in links.views()) > 300, "the control: they stalled"

    def watch() -> str:
        """A record takes 4 s here, and a peer that is silent for 3 is given up: each is to get on, and stay."""
        reached = [view.entry["acknowledged_wal"] for view in links.views()]
        deadline_s = time.monotonic() + 30
        while time.monotonic() < deadline_s:
            if wrong := links.watch_streams(0.1):
                return wrong
            if all(view.entry["acknowledged_wal"] > was for view, was in zip(links.views(), reached, strict=True)):
                return ""
        return "no progress on a narrow link"

    links.undisturbed("getting on", watch)
    links.proxy.heal()
    links.wait_in_step()


def test_bytes_changed_below_tls_apply_nothing_wrong(links: Links) -> None:
    client, before = alice(links.far.nodes[0]), links.proxy.connections
    links.proxy.shape(Link(corrupt_every=12))
    wanted = 12 * rounds()
    until_s = time.monotonic() + LIMIT_S * rounds()
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
        links.proxy.shape(Link(delay_s=0.02, loss=0.01, bytes_per_s=150_000))
        token = activation_token(links.near, "late")
        path = "sys/replication/performance/secondary/enable"
        assert late.call("POST", path, {"token": token}).status == 200
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
        node.wait_until("be in step", lambda: in_step(links.near.nodes[0], node))
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
    client, wanted_ms = alice(links.far.nodes[0]), skew_s * 1000

    def watch() -> str:
        links.clock.set(0)
        wait_skew(links, 0)
        connections = links.proxy.connections
        links.clock.set(skew_s)
        wait_skew(links, wanted_ms)
        until_s = time.monotonic() + 2 * BEAT_S
        while time.monotonic() < until_s:
            view = links.view("performance")
            if not view.streams or max(view.lags_s) >= BEAT_S + 0.5:
                return f"{view.entry} {view.secondary}"
            time.sleep(0.1)
        return "" if links.proxy.connections == connections else "the stream did not go on"

    links.undisturbed("streaming whatever the clock is", watch)
    links.write(10)
    links.wait_in_step()
    assert read(client, f"n/{links.written}") == {"n": links.written, "v": "v"}
    client.secrets.kv.v2.create_or_update_secret("skewed", secret={"v": skew_s})


def wait_skew(links: Links, wanted_ms: int) -> None:
    """Until both ends of performance replication know how far the secondary's clock is ahead."""

    def known() -> bool:
        view = links.view("performance")
        if not view.secondary["primaries"]:
            return False
        ours, theirs = view.entry["clock_skew_ms"], view.secondary["primaries"][0]["clock_skew_ms"]
        return abs(int(ours) - wanted_ms) < 500 and abs(int(theirs) + wanted_ms) < 500

    links.near.nodes[0].wait_until(f"know of {wanted_ms} ms of skew", known, LIMIT_S)
