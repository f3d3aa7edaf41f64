"""Two clusters on two real Consul servers, one replicating to the other, for the benchmarks."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.cluster import Cluster, Node, consul_storage, replicate
from tests.support.consul_server import ConsulServer


def checked(reply: Any) -> Any:
    """``reply`` if it is a success. Raises RuntimeError."""
    if reply.status not in (200, 204):
        raise RuntimeError(f"status {reply.status}: {reply.errors}")
    return reply


@contextlib.contextmanager
def consul_cluster(home: Path, name: str, nodes: int) -> Iterator[Cluster]:
    """One bootstrapped cluster on a Consul server of its own."""
    server = ConsulServer()
    server.start()
    storage = consul_storage(server.address, server.token, "outrider/")
    cluster = Cluster(
        [Node(f"{name}-{n}", home / name, storage, cluster_name=name, warm=False) for n in range(1, nodes + 1)]
    )
    try:
        cluster.bootstrap()
        yield cluster
    finally:
        cluster.kill()
        server.stop()


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder."""
    home = Path(tempfile.mkdtemp(prefix="outrider-bench-"))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def replicating_pair() -> Iterator[tuple[Cluster, Cluster, str]]:
    """Primary, secondary (one node each, streaming), and a token of the secondary that may use ``bench/``."""
    with (
        workspace() as home,
        consul_cluster(home, "primary", 1) as primary,
        consul_cluster(home, "secondary", 1) as other,
    ):
        checked(primary.call("POST", "sys/mounts/bench", {"type": "kv", "options": {"version": "1"}}))
        checked(primary.call("POST", "sys/auth/userpass", {"type": "userpass"}))
        policy = 'path "bench/*" { capabilities = ["create", "read", "update", "delete", "list"] }'
        checked(primary.call("PUT", "sys/policies/acl/bench", {"policy": policy}))
        checked(primary.call("POST", "auth/userpass/users/bench", {"password": "bench", "policies": "bench"}))
        replicate(primary, other, "secondary")
        login = checked(other.wait_active().call("POST", "auth/userpass/login/bench", {"password": "bench"}))
        yield primary, other, login.body["auth"]["client_token"]
