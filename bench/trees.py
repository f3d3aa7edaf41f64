"""CPU a request of two trees of this project, in turns on one machine: what a change is worth.

Rates on a shared machine say little; the processor time of a request says more, and its ratio to another tree's in the
same second most. Two nodes, one of each tree, stand on one Consul; a round loads first one, then the other.

    git worktree add /tmp/before main
    python bench/trees.py /tmp/before --rounds 8 --only kv --audit
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import wrk
from bench.api import Case, cpu_s, prepare
from bench.pair import checked, workspace
from bench.report import result, table
from tests.support.cluster import ROOT, Cluster, Node, consul_storage
from tests.support.consul_server import ConsulServer


@dataclass
class TreeNode(Node):
    """A node that runs the code below ``tree``."""

    tree: Path = ROOT

    def _start_cold(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sidecar", "server", f"-config={self.config_path}"],
                cwd=self.tree,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(self.tree), "PYTHONUNBUFFERED": "1"},
            )


@dataclass
class Side:
    """One tree's cluster of one node, and the rows it can be asked."""

    cluster: Cluster
    node: Node
    rows: list[Case]
    token: str


def side(name: str, tree: Path, home: Path, consul: ConsulServer, *, audit: bool) -> Side:
    """Start a node of ``tree`` and prepare its data."""
    storage = consul_storage(consul.address, consul.token, f"outrider/{name}/")
    cluster = Cluster([TreeNode(name, home / name, storage, cluster_name=name, tree=tree)])
    cluster.bootstrap()
    token, rows = prepare(cluster, consul)
    if audit:
        log = {"type": "file", "options": {"file_path": str(home / f"{name}-audit.log")}}
        checked(cluster.call("PUT", "sys/audit/file", log))
    return Side(cluster, cluster.wait_active(), rows, token)


def cpu_us(one: Side, row: int, home: Path, arguments: argparse.Namespace) -> float:
    """Microseconds of the node's processor time a request, over one turn."""
    folder = home / one.node.name
    script = one.rows[row].script(folder, one.token)
    before = cpu_s(one.node)
    found = wrk.load(
        f"{one.node.address}/", connections=arguments.connections, seconds=arguments.seconds, script=script
    )
    if found.failed or not found.per_s:
        raise SystemExit(f"{one.rows[row].name}: {found.failed} requests failed, {found.per_s} a second were answered")
    return (cpu_s(one.node) - before) / (found.per_s * arguments.seconds) * 1e6


def measure(sides: list[Side], home: Path, arguments: argparse.Namespace) -> None:
    """Run and print every row."""
    shown, figures = [], []
    for row, case in enumerate(sides[0].rows):
        if not any(word in case.name for word in arguments.only):
            continue
        for one in sides:
            cpu_us(one, row, home, arguments)  # caches fill, series and sockets come to be
        took: list[list[float]] = [[], []]
        for turn in range(arguments.rounds):
            for number in (0, 1) if turn % 2 else (1, 0):
                took[number].append(cpu_us(sides[number], row, home, arguments))
        ratios = [after / before for before, after in zip(*took, strict=True)]
        before_us, after_us, ratio = statistics.median(took[0]), statistics.median(took[1]), statistics.median(ratios)
        print(f"{case.name}: {before_us:.0f} -> {after_us:.0f} ({ratio:.2f})", flush=True)
        shown.append(
            [case.name, f"{before_us:.0f}", f"{after_us:.0f}", f"{ratio:.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"]
        )
        figures.append(
            {"case": case.name, "before_us": round(before_us), "after_us": round(after_us), "ratio": round(ratio, 3)}
        )
    table(("request", "CPU µs before", "CPU µs after", "ratio"), shown)
    result("trees", {"connections": arguments.connections, "audit": arguments.audit, "cases": figures})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="the other tree")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose names contain one of these")
    parser.add_argument("--audit", action="store_true", help="with an audit device that writes a file")
    arguments = parser.parse_args()
    consul = ConsulServer()
    consul.start()
    try:
        with workspace() as home:
            sides: list[Side] = []
            try:
                for name, tree in (("before", arguments.before.resolve()), ("after", ROOT)):
                    sides.append(side(name, tree, home, consul, audit=arguments.audit))
                measure(sides, home, arguments)
            finally:
                for one in sides:
                    one.cluster.kill()
    finally:
        consul.stop()


if __name__ == "__main__":
    main()
