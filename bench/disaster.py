"""How long a disaster recovery takes on real Consul: promotion until the first write, and failback until in step."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.pair import checked, consul_cluster, workspace
from bench.report import result, table
from tests.support import disaster
from tests.support.cluster import Cluster

TAIL = 100


def fill(cluster: Cluster, keys: int) -> None:
    """Write that many keys, many to a request of the batch-free API: one each."""
    from concurrent.futures import ThreadPoolExecutor

    node, token = cluster.wait_active(), cluster.root_token
    with ThreadPoolExecutor(16) as threads:
        for reply in threads.map(
            lambda n: node.call("POST", f"bench/key/{n}", {"n": n}, token=token, timeout_s=60), range(keys)
        ):
            checked(reply)


def first_write_s(cluster: Cluster, since: float) -> float:
    """Seconds until a write is acknowledged."""
    while True:
        for node in cluster.nodes:
            try:
                reply = node.call("POST", "bench/probe", {"n": 1}, token=cluster.root_token, timeout_s=5)
            except OSError:
                continue
            if reply.status == 204:
                return time.monotonic() - since
        time.sleep(0.01)


def one_size(home: Path, keys: int) -> list[float]:
    """Seconds: promotion to the first acknowledged write; demotion, and the old primary in step again."""
    with (
        consul_cluster(home, f"us-{keys}", 1) as us,
        consul_cluster(home, f"eu-{keys}", 1) as eu,
    ):
        checked(us.call("POST", "sys/mounts/bench", {"type": "kv"}))
        fill(us, keys)
        disaster.mirror(us, eu, "eu")
        token = disaster.operation_token(eu)
        us.kill()
        since = time.monotonic()
        eu.root_token = us.root_token
        node = disaster.leader(eu)
        checked(
            node.call(
                "POST", f"{disaster.BASE}/secondary/promote", {"dr_operation_token": token, "force": True}, timeout_s=60
            )
        )
        promoted_s = first_write_s(eu, since)
        us.start()
        us.unseal()
        for n in range(TAIL):
            checked(us.call("POST", f"bench/lost/{n}", {"n": n}))
        since = time.monotonic()
        checked(us.call("POST", f"{disaster.BASE}/primary/demote", {}))
        disaster.settle(us, us.keys)
        demoted_s = time.monotonic() - since
        back = disaster.operation_token(us)
        since = time.monotonic()
        disaster.update_primary(us, eu, "us", back)
        return [promoted_s, demoted_s, time.monotonic() - since]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, nargs="+", default=[1_000, 10_000])
    figures: dict[str, object] = {}
    rows = []
    with workspace() as home:
        for keys in parser.parse_args().keys:
            seconds = one_size(home, keys)
            rows.append([f"{keys:,}", *(f"{one:.2f}" for one in seconds)])
            figures[str(keys)] = [round(one, 3) for one in seconds]
    print(f"one node each, default settings; the old primary returns with {TAIL} writes of its own")
    table(["keys", "s promote → first write", "s demote → mirror", "s update-primary → in step"], rows)
    result("disaster", figures)


if __name__ == "__main__":
    main()
