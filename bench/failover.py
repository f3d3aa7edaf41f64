"""How long no write is acknowledged when the active node is killed (SIGKILL) and when it steps down, on real Consul."""

from __future__ import annotations

import argparse
import itertools
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.pair import checked, consul_cluster, workspace
from bench.report import result, spread, table
from tests.support.cluster import Cluster, Node


class Writer(threading.Thread):
    """Writes to whichever node accepts, without pause, and notes the longest time between two acknowledgements."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.cluster = cluster
        self.acknowledged: list[tuple[float, int]] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        n = 0
        while not self.stopped.is_set():
            n += 1
            for node in self.cluster.nodes:
                if self._write(node, n):
                    self.acknowledged.append((time.monotonic(), n))
                    break

    def _write(self, node: Node, n: int) -> bool:
        try:
            reply = node.call("POST", f"bench/key/{n}", {"n": n}, token=self.cluster.root_token, timeout_s=10)
        except OSError:
            return False
        return reply.status == 204

    def gap_s(self, since: float) -> float:
        """The longest pause between acknowledgements from just before ``since`` on."""
        times = [moment for moment, _ in self.acknowledged]
        before = max((moment for moment in times if moment <= since), default=since)
        later = [before, *(moment for moment in times if moment > since)]
        return max(after - earlier for earlier, after in itertools.pairwise(later))


def one_event(cluster: Cluster, kind: str) -> tuple[float, int]:
    """Seconds without an acknowledgement, and acknowledged writes that are gone."""
    active = cluster.wait_active()
    standby = cluster.standby()
    standby.wait_until("know the leader", lambda: bool(standby.call("GET", "sys/leader").body["leader_address"]))
    writer = Writer(cluster)
    writer.start()
    time.sleep(1.0)
    happened = time.monotonic()
    if kind == "kill":
        active.kill()
    else:
        checked(active.call("PUT", "sys/step-down", token=cluster.root_token))
    standby.wait_until("lead", lambda: (reply := standby.health()) is not None and reply.status == 200, 60)
    time.sleep(1.0)
    writer.stopped.set()
    writer.join()
    lost = sum(
        1
        for _, n in writer.acknowledged
        if standby.call("GET", f"bench/key/{n}", token=cluster.root_token).status != 200
    )
    if kind == "kill":
        active.start()
        active.unseal(cluster.keys)
    return writer.gap_s(happened), lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    figures: dict[str, object] = {}
    rows = []
    with workspace() as home, consul_cluster(home, "failover", 2) as cluster:
        checked(cluster.call("POST", "sys/mounts/bench", {"type": "kv"}))
        for kind in ("kill", "step-down"):
            gaps, losses = [], 0
            for _ in range(repeats):
                gap_s, lost = one_event(cluster, kind)
                gaps.append(gap_s * 1000)
                losses += lost
                # A node that stepped down stays away for its grace period; the next event needs a standby again.
                time.sleep(11.0 if kind == "step-down" else 2.0)
            rows.append([kind, spread(gaps), str(losses)])
            figures[f"{kind.replace('-', '_')}_ms"] = [round(gap) for gap in gaps]
            figures[f"{kind.replace('-', '_')}_lost"] = losses
    print(f"{repeats} of each, default settings (3 s beat check, 0.5 s read lease)")
    table(["event", "ms without an acknowledged write", "acknowledged writes lost"], rows)
    result("failover", figures)


if __name__ == "__main__":
    main()
