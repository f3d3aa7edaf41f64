"""Disaster recovery between clusters of real processes: what an operator does, over HTTP."""

from __future__ import annotations

import base64
import time
from typing import Any

from tests.support.cluster import Cluster, ClusterError, Node, Reply, activation_token, together

STEP_TIMEOUT_S = 120.0
BASE = "sys/replication/dr"


def status(node: Node, mode: str = "dr") -> dict[str, Any]:
    """One mode's status at a node; empty while it cannot tell."""
    try:
        reply = node.call("GET", f"sys/replication/{mode}/status")
    except OSError:
        return {}
    return dict(reply.data) if reply.status == 200 else {}


def leader(cluster: Cluster, timeout_s: float = STEP_TIMEOUT_S) -> Node:
    """The node that leads, whether or not it serves clients."""
    deadline = time.monotonic() + timeout_s
    while True:
        for node in cluster.nodes:
            reply = node.health() if node.running else None
            if reply is not None and reply.status in (200, 472) and not reply.body["standby"]:
                return node
        if time.monotonic() > deadline:
            tails = "\n".join(f"--- {node.name}\n{node.log_tail()}" for node in cluster.nodes)
            raise ClusterError(f"nobody leads within {timeout_s:.0f} s\n{tails}")
        time.sleep(0.05)


def settle(cluster: Cluster, keys: list[str]) -> None:
    """After the cluster's keys were replaced: unseal every node that sealed itself, until one leads and the others
    follow."""
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while True:
        leading = 0
        following = 0
        for node in cluster.nodes:
            health = node.health()
            if health is None:
                continue
            if health.status == 503:
                node.unseal(keys)
            elif health.status in (200, 429, 472):
                leading += not health.body["standby"]
                following += bool(health.body["standby"] and health.body["replication_dr_mode"] != "unknown")
        if leading == 1 and leading + following == len(cluster.nodes):
            cluster.keys = keys
            return
        if time.monotonic() > deadline:
            tails = "\n".join(f"--- {node.name}\n{node.log_tail()}" for node in cluster.nodes)
            raise ClusterError(f"the cluster did not settle within {STEP_TIMEOUT_S:.0f} s\n{tails}")
        time.sleep(0.1)


def in_step(primary: Cluster, secondary: Cluster) -> bool:
    """Whether both ends are connected, the DR secondary streams and both roots are equal."""
    return together(status(leader(primary)), status(leader(secondary)))


def wait_in_step(primary: Cluster, secondary: Cluster) -> None:
    """Raises ClusterError with both statuses when they do not come in step."""
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while not in_step(primary, secondary):
        if time.monotonic() > deadline:
            states = [status(leader(cluster)) for cluster in (primary, secondary)]
            tails = "\n".join(f"--- {node.name}\n{node.log_tail()}" for node in (*primary.nodes, *secondary.nodes))
            raise ClusterError(f"not in step within {STEP_TIMEOUT_S:.0f} s: {states}\n{tails}")
        time.sleep(0.1)


def require(reply: Reply, *statuses: int) -> Reply:
    """The reply, if its status is one of these (200 or 204 by default). Raises ClusterError."""
    if reply.status not in (statuses or (200, 204)):
        raise ClusterError(f"answered {reply.status}: {reply.errors}")
    return reply


def patient(node: Node, path: str, body: dict[str, Any]) -> Reply:
    """A request that is asked again while the node says 503, as it does between two roles."""
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while (reply := node.call("POST", path, body)).status == 503 and time.monotonic() < deadline:
        time.sleep(0.1)
    return require(reply)


def mirror(primary: Cluster, secondary: Cluster, name: str) -> None:
    """Make ``secondary`` a DR secondary and wait until it holds everything."""
    if status(primary.wait_active()).get("mode") != "primary":
        require(primary.call("POST", f"{BASE}/primary/enable", {}))
    token = activation_token(primary, name, mode="dr")
    require(secondary.call("POST", f"{BASE}/secondary/enable", {"token": token}))
    settle(secondary, primary.keys)
    wait_in_step(primary, secondary)


def operation_token(cluster: Cluster) -> str:
    """A DR operation token from the cluster's key shares."""
    return _generated(cluster, f"{BASE}/secondary/generate-operation-token")


def root_token(cluster: Cluster) -> str:
    """A root token from the cluster's key shares."""
    return _generated(cluster, "sys/generate-root")


def _generated(cluster: Cluster, base: str) -> str:
    node = leader(cluster)
    started = patient(node, f"{base}/attempt", {}).body
    reply = started
    for key in cluster.keys:
        reply = require(node.call("POST", f"{base}/update", {"key": key, "nonce": started["nonce"]})).body
    encoded, otp = reply["encoded_token"], started["otp"]
    raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4))
    return bytes(left ^ right for left, right in zip(raw, otp.encode(), strict=True)).decode()


def promote(cluster: Cluster, token: str, **fields: Any) -> Reply:
    """Promote the DR secondary; waits until it serves clients."""
    reply = leader(cluster).call("POST", f"{BASE}/secondary/promote", {"dr_operation_token": token, **fields})
    if reply.status == 200 and not fields.get("preview"):
        cluster.wait_active(STEP_TIMEOUT_S)
    return reply


def update_primary(secondary: Cluster, primary: Cluster, name: str, token: str) -> None:
    """Point a DR secondary at another primary and wait until it is in step."""
    fields = {"dr_operation_token": token, "token": activation_token(primary, name, mode="dr")}
    require(leader(secondary).call("POST", f"{BASE}/secondary/update-primary", fields))
    wait_in_step(primary, secondary)
