"""A step-down costs no client an error: requests are held, and follow the role to the next active node."""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.cluster import Cluster, Node, consul_storage
from tests.support.consul_server import ConsulServer

STEP_DOWNS = 5
QUICK = 'sidecar {\n  step_down_grace = "1s"\n  beat_ttl = "10s"\n}'


@dataclass
class Writer:
    """One client with one keep-alive connection to one node, writing and reading back as fast as it is answered."""

    node: Node
    token: str
    name: str
    stop: threading.Event
    written: int = 0
    errors: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.node.api_port, timeout=120)
        connection.connect()
        kept = connection.sock
        while not self.stop.is_set():
            path, value = f"/v1/kv/{self.name}-{self.written}", str(self.written)
            started = time.monotonic()
            for method, body, wanted in (("PUT", json.dumps({"v": value}), 204), ("GET", None, 200)):
                try:
                    connection.request(method, path, body, {"X-Vault-Token": self.token})
                    answer = connection.getresponse()
                    content = answer.read()
                except (OSError, http.client.HTTPException) as error:
                    self.errors.append(f"{method} {path}: {error!r}")
                    connection.close()
                    return
                if answer.status != wanted:
                    self.errors.append(f"{method} {path}: {answer.status} {content[:300]!r}")
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            self.written += 1
        if connection.sock is not kept:
            self.errors.append(f"{self.name}: the connection was not kept")
        connection.close()


def test_no_request_is_lost_over_five_step_downs(consul_server: ConsulServer, tmp_path: Path) -> None:
    storage = consul_storage(consul_server.address, consul_server.token, "outrider/step-down/")
    nodes = [Node(f"n{number}", tmp_path, storage, cluster_name="c", settings=QUICK) for number in (1, 2, 3)]
    cluster = Cluster(nodes)
    stop = threading.Event()
    threads: list[threading.Thread] = []
    try:
        cluster.bootstrap()
        assert cluster.call("POST", "sys/mounts/kv", {"type": "kv"}).status == 204
        writers = [
            Writer(node, cluster.root_token, f"{node.name}-{number}", stop) for node in nodes for number in (1, 2)
        ]
        threads = [threading.Thread(target=writer.run) for writer in writers]
        for thread in threads:
            thread.start()
        leaders = []
        for _ in range(STEP_DOWNS):
            old = cluster.wait_active()
            leaders.append(old.name)
            counts = [writer.written for writer in writers]
            assert old.call("PUT", "sys/step-down", token=cluster.root_token).status == 204
            old.wait_until("hand over", lambda old=old: (now := cluster.active()) is not None and now is not old)
            # Every client has been served by the next one before that steps down in its turn.
            for writer, count in zip(writers, counts, strict=True):
                old.wait_until(
                    "see its clients go on",
                    lambda writer=writer, count=count: writer.errors or writer.written > count + 3,
                )
        stop.set()
        for thread in threads:
            thread.join(180)
        assert [error for writer in writers for error in writer.errors] == []
        assert len(set(leaders)) > 1
        print(f"{sum(writer.written for writer in writers)} writes, slowest {max(w.slowest_s for w in writers):.2f} s")
        # What was acknowledged is there.
        for writer in writers:
            last = cluster.call("GET", f"kv/{writer.name}-{writer.written - 1}")
            assert last.data == {"v": str(writer.written - 1)}
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
        cluster.kill()
