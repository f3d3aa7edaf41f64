"""Thousands of leases that are revoked together, and the node that does it is killed several times on the way.

The operator asks again after each kill, as one does. In the end every credential was taken back, twice only where a
kill cut the first call short, and no lease is left; memory and the delay of the event loop stay bounded meanwhile.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from consul_backend.config import ConsulConfig
from plugin_api.engine import MountInfo
from sidecar.core.lease_revocation import AT_ONCE
from sidecar.loop_lag import NAME as LOOP_LAG
from tests.support.cluster import ROOT, Cluster, Node, cluster_on
from tests.support.consul_server import ConsulServer
from tests.support.faults import Client, rounds
from tests.support.file_credentials import Shared
from tests.support.lease_maker import make_leases
from tests.support.leasing_engine import TYPE

LEASES = int(os.environ.get("OUTRIDER_FAULT_LEASES", "600" if rounds() == 1 else "100000"))
KILLS = 2 if rounds() == 1 else 5
DONE_S_MAX = 300.0 + LEASES * 0.02
CALLS_CUT_MAX = 2 * AT_ONCE
"""Of one kill: what the request and what the background had under way."""
GROWTH_MIB_MAX = 400
SETTINGS = 'sidecar {\n  step_down_grace = "300ms"\n  beat_ttl = "6s"\n}\n'
"""A beat that is long enough for a busy machine to end no tenure that the test did not end."""


@pytest.fixture
def outside(tmp_path: Path) -> Shared:
    return Shared(tmp_path, ROOT)


@pytest.fixture
def server() -> Iterator[ConsulServer]:
    """This test's own."""
    with ConsulServer() as started:
        yield started


@pytest.fixture
def cluster(server: ConsulServer, tmp_path: Path, outside: Shared) -> Iterator[Cluster]:
    with cluster_on(server, tmp_path, 2, SETTINGS, environment=outside.environment) as it:
        yield it


def make(cluster: Cluster, server: ConsulServer, outside: Shared) -> float:
    """All leases, past the API and with no node up; returns the seconds that took."""
    data = cluster.call("GET", "sys/mounts").data["db/"]
    mount = MountInfo("db/", data["type"], data["uuid"], data["accessor"])
    cluster.stop()
    began_s = time.monotonic()
    path = cluster.nodes[0].storage.split('path = "')[1].split('"')[0]

    def issue(number: int) -> str:
        (outside.path / "valid" / f"app-{number}").touch()
        return f"app-{number}"

    config = ConsulConfig(address=server.address, token=server.token, path=path)
    asyncio.run(make_leases(config, cluster.keys, mount, LEASES, issue))
    took_s = time.monotonic() - began_s
    cluster.start()
    cluster.unseal()
    return took_s


def resident_mib(node: Node, what: str = "VmRSS") -> float:
    """Memory of the node's process; ``VmHWM``: at most so far."""
    assert node.process is not None
    lines = Path(f"/proc/{node.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def loop_lag_ms(node: Node, token: str) -> float:
    """How late the node's event loop was at most since the last look, by its own metric."""
    samples = node.call("GET", "sys/metrics", token=token).body["Samples"]
    return max((each["Max"] for each in samples if each["Name"].endswith(LOOP_LAG)), default=0.0)


def ask(cluster: Cluster) -> int:
    """Revoke everything below the mount; the status, 0 where the node died."""
    client = Client(cluster.wait_active(), cluster.root_token, DONE_S_MAX)
    try:
        return client.call("PUT", "sys/leases/revoke-prefix/db")[0]
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        client.close()


def calls_of(outside: Shared) -> int:
    """How often the engine was called to revoke; cheap with many."""
    path = outside.path / "calls"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def nothing_valid(outside: Shared) -> bool:
    """Whether every credential is taken back."""
    return not any((outside.path / "valid").iterdir())


def gauge(cluster: Cluster) -> float:
    """How many leases there are, that of the token to which they were issued among them."""
    gauges = {each["Name"]: each["Value"] for each in cluster.call("GET", "sys/metrics").body["Gauges"]}
    return float(gauges["vault.expire.num_leases"])


def test_all_are_revoked_whatever_dies(cluster: Cluster, server: ConsulServer, outside: Shared) -> None:
    assert cluster.call("POST", "sys/mounts/db", {"type": TYPE}).status == 204
    made_s = make(cluster, server, outside)
    assert len(outside.valid) == LEASES
    before_mib = resident_mib(cluster.wait_active())
    began_s, statuses, grown_mib, lag_ms = time.monotonic(), Counter[int](), 0.0, 0.0
    with ThreadPoolExecutor(1) as threads:
        for number in range(KILLS):
            victim = cluster.wait_active()
            before_mib, called = resident_mib(victim), calls_of(outside)
            asked: Future[int] = threads.submit(ask, cluster)
            wanted = called + (LEASES - called) // (2 * (KILLS - number))
            while calls_of(outside) < wanted and not (asked.done() and asked.result() == 204):
                assert time.monotonic() - began_s < DONE_S_MAX, victim.log_tail()
                if asked.done():
                    statuses[asked.result()] += 1
                    asked = threads.submit(ask, cluster)
                lag_ms = max(lag_ms, loop_lag_ms(victim, cluster.root_token))
                time.sleep(0.2)  # between two looks at a directory that another process fills
            grown_mib = max(grown_mib, resident_mib(victim, "VmHWM") - before_mib)
            victim.kill()
            statuses[asked.result()] += 1
            victim.start()
            victim.unseal(cluster.keys)
        while (status := ask(cluster)) != 204:
            statuses[status] += 1
            assert time.monotonic() - began_s < DONE_S_MAX, cluster.wait_active().log_tail()
        active = cluster.wait_active()
        active.wait_until("revoke everything", lambda: nothing_valid(outside), DONE_S_MAX)
        took_s = time.monotonic() - began_s
        grown_mib = max(grown_mib, resident_mib(active, "VmHWM") - before_mib)
        lag_ms = max(lag_ms, loop_lag_ms(active, cluster.root_token))
    calls = Counter(line.split()[1] for line in outside.calls)
    twice = sum(count - 1 for count in calls.values())
    print(
        f"\n{LEASES:,} leases, made in {made_s:.0f} s, revoked in {took_s:.0f} s with {KILLS} kills; answers before the"
        f" last one: {dict(statuses)}; {twice} calls of the engine repeated; {grown_mib:.0f} MiB grown at most, the"
        f" event loop late by {lag_ms:.0f} ms at most"
    )
    assert len(calls) == LEASES
    assert twice <= KILLS * CALLS_CUT_MAX
    assert grown_mib < GROWTH_MIB_MAX
    active.wait_until("count that of the token only", lambda: gauge(cluster) == 1)
    assert cluster.call("LIST", "sys/leases/lookup/db/").status == 404
    assert cluster.call("GET", "sys/leases/count?type=irrevocable").data["lease_count"] == 0
