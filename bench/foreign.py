"""Keys that are not ours: a million beside our prefix in the same Consul, then ten thousand among our own data.

Beside: how long a node takes from its keys to serving, what health, writes and a merkle-check take, and how
long old segments of the log stay, before and after. Among: the same start, what the check counts, what a reindex puts
aside and restores, how many lines that makes in the log and by how much the process grows.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.pair import checked, workspace
from bench.report import percentile, result, table
from tests.support.cluster import Cluster, Node, consul_storage
from tests.support.consul_server import ConsulServer
from tests.support.faults import MOUNT, Client, mount_load

PREFIX = "outrider/ours/"
OWN_KEYS = 5_000
WRITES = 1_600
"""Three segments of the log and more."""
KEPT_RECORDS = 600
OVERWRITTEN = 200
OPS_MAX = 64
SETTINGS = f'sidecar {{\n  wal_keep_records = {KEPT_RECORDS}\n  flush_interval = "100ms"\n}}\n'
WAIT_S = 600.0


@dataclass(frozen=True)
class Costs:
    """Of one node. Seconds, but for milliseconds where it says so."""

    start_s: float
    health_p50_ms: float
    health_p99_ms: float
    write_p50_ms: float
    check_s: float
    collect_s: float

    def row(self, name: str) -> tuple[str, ...]:
        return (name, *(f"{each:,.2f}" for each in vars(self).values()))


class Site:
    """A Consul server, one node, and the other programs that use that Consul."""

    def __init__(self, server: ConsulServer, home: Path) -> None:
        self.server = server
        storage = consul_storage(server.address, server.token, PREFIX)
        self.cluster = Cluster([Node("node", home, storage, settings=SETTINGS)])
        self._serial = 0

    @property
    def node(self) -> Node:
        return self.cluster.nodes[0]

    def start_s(self) -> float:
        """From the keys to serving, of a node whose process runs."""
        self.node.stop()
        self.node.start()
        began_s = time.monotonic()
        self.node.unseal(self.cluster.keys)
        self.cluster.wait_active(WAIT_S)
        return time.monotonic() - began_s

    def write(self, count: int) -> list[float]:
        """So many writes one after the other, seconds of each; every key is used again after ``OWN_KEYS``."""
        client, took_s = Client(self.node, self.cluster.root_token), []
        for _ in range(count):
            began_s = time.monotonic()
            status, body = client.call("PUT", f"{MOUNT}/{self._serial % OWN_KEYS}", {"v": str(self._serial)})
            if status != 204:
                raise SystemExit(f"a write was answered {status}: {body}")
            took_s.append(time.monotonic() - began_s)
            self._serial += 1
        client.close()
        return took_s

    def segments(self) -> list[str]:
        """Those of the log that are stored."""
        return list(self.server.call("GET", f"kv/{self.root()}/wal/?keys&separator=/").json)

    def root(self) -> str:
        """The generation's folder in Consul."""
        return f"{PREFIX}g/{json.loads(self.server.raw_get(PREFIX + 'generation') or b'{}')['id']}"

    def check(self) -> tuple[float, dict[str, object]]:
        """Seconds of a merkle-check, and its report."""
        began_s = time.monotonic()
        reply = checked(self.cluster.call("POST", "sys/replication/merkle-check", timeout_s=WAIT_S))
        return time.monotonic() - began_s, dict(reply.data["merkle_corruption_report"])

    def costs(self) -> Costs:
        """Everything that must not depend on what others keep in Consul."""
        starts_s = [self.start_s() for _ in range(3)]
        health_s = []
        client = Client(self.node, "")
        for _ in range(300):
            began_s = time.monotonic()
            client.call("GET", "sys/health")
            health_s.append(time.monotonic() - began_s)
        client.close()
        writes_s = self.write(WRITES)
        began_s = time.monotonic()
        self.node.wait_until("collect the log", lambda: len(self.segments()) <= 3, WAIT_S)
        collect_s = time.monotonic() - began_s
        return Costs(
            statistics.median(starts_s),
            percentile(health_s, 0.5) * 1e3,
            percentile(health_s, 0.99) * 1e3,
            percentile(writes_s, 0.5) * 1e3,
            self.check()[0],
            collect_s,
        )

    def plant(self, keys: Iterator[str]) -> None:
        """Write full keys past Outrider, many in a transaction."""
        value = base64.b64encode(b"not ours").decode()

        def some(batch: Sequence[str]) -> None:
            ops = [{"KV": {"Verb": "set", "Key": name, "Value": value}} for name in batch]
            answer = self.server.call("PUT", "txn", ops, timeout_s=WAIT_S)
            if answer.status != 200:
                raise SystemExit(f"Consul answered {answer.status}: {answer.text}")

        with ThreadPoolExecutor(4) as threads:
            while batches := [batch for _ in range(64) if (batch := list(islice(keys, OPS_MAX)))]:
                list(threads.map(some, batches))

    def log_lines(self) -> int:
        """Of the node's log so far."""
        return len(self.node.log_path.read_text(encoding="utf-8").splitlines())

    def resident_mib(self) -> float:
        """Memory of the node's process."""
        assert self.node.process is not None
        lines = Path(f"/proc/{self.node.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def beside(count: int) -> Iterator[str]:
    """Keys of other programs, some of them next to our prefix and with names that we would not write."""
    for number in range(count):
        folder = "outrider/theirs" if number % 10 == 0 else f"app-{number % 1000}/some.config"
        yield f"{folder}/{number // 1000:06d}/key {number:08d}"


def among(site: Site, count: int) -> Iterator[str]:
    """Keys in the middle of our data: entries nobody wrote, some of ours overwritten, and names we never write."""
    listed = site.server.call("GET", f"kv/{site.root()}/d/r/?keys").json
    own = max(listed, key=lambda name: name.rsplit("/", 1)[1].isdigit())
    folder = own.rsplit("/", 1)[0]
    newest = range(site._serial - OVERWRITTEN, site._serial)
    yield from (f"{folder}/{number % OWN_KEYS}" for number in newest)
    strays = count // 10
    yield from (f"{folder}/stray.{number}" for number in range(strays))
    yield from (f"{folder}/planted-{number}" for number in range(count - strays - OVERWRITTEN))


def reindexed(site: Site) -> tuple[float, str]:
    """Seconds of a reindex, and its own line in the log."""
    began_s = time.monotonic()
    checked(site.cluster.call("POST", "sys/replication/reindex"))

    def done() -> list[str]:
        log = site.node.log_path.read_text(encoding="utf-8").splitlines()
        return [line for line in log if "reindex done" in line]

    site.node.wait_until("reindex", done, WAIT_S)
    return time.monotonic() - began_s, done()[-1].rpartition("reindex done: ")[2]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beside", type=int, default=1_000_000)
    parser.add_argument("--among", type=int, default=10_000)
    arguments = parser.parse_args()
    with workspace() as home, ConsulServer() as server:
        site = Site(server, home)
        try:
            site.cluster.bootstrap()
            mount_load(site.cluster.call)
            site.write(OWN_KEYS)
            alone = site.costs()
            began_s = time.monotonic()
            site.plant(beside(arguments.beside))
            print(f"{arguments.beside:,} keys beside ours were written in {time.monotonic() - began_s:.0f} s")
            crowded = site.costs()
            header = ("", "start s", "health p50 ms", "p99", "write p50 ms", "merkle-check s", "log collected s")
            table(header, [alone.row("alone"), crowded.row(f"{arguments.beside:,} beside")])
            lines, before_mib = site.log_lines(), site.resident_mib()
            site.plant(among(site, arguments.among))
            check_s, report = site.check()
            reindex_s, said = reindexed(site)
            after_s, left = site.check()
            grown_mib = site.resident_mib() - before_mib
            lines = site.log_lines() - lines
            start_s = site.start_s()
        finally:
            site.cluster.kill()
    print(f"{arguments.among:,} among ours: checked in {check_s:.1f} s: {report['findings']}")
    print(f"reindexed in {reindex_s:.1f} s: {said}")
    print(f"then checked in {after_s:.1f} s: {left['findings']}; start {start_s:.2f} s")
    print(f"{lines} lines in the log, {grown_mib:.0f} MiB grown")
    figures = {"alone": vars(alone), "beside": vars(crowded), "check_s": round(check_s, 2)}
    among_figures = {"findings": report["findings"], "reindex_s": round(reindex_s, 2), "log_lines": lines}
    result("foreign", {**figures, **among_figures, "grown_mib": round(grown_mib, 1), "left": left["findings"]})


if __name__ == "__main__":
    main()
