"""Audit on a real process: rotation by SIGHUP, a device that fills up, what health says, and a restart."""

import json
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster, Node, embedded_storage

SETTINGS = 'sidecar {{\n  audit_directories = ["{}"]\n  audit_timeout = "20s"\n}}\n'


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


@pytest.fixture
def cluster(tmp_path: Path, logs: Path) -> Iterator[Cluster]:
    storage = embedded_storage(tmp_path / "data")
    made = Cluster([Node("audited", tmp_path, storage, cluster_name="audited", settings=SETTINGS.format(logs))])
    try:
        made.bootstrap()
        yield made
    finally:
        made.kill()


def enable(cluster: Cluster, path: Path, name: str = "file") -> Any:
    body = {"type": "file", "options": {"file_path": str(path)}}
    return cluster.call("PUT", f"sys/audit/{name}", body)


def paths(file: Path) -> list[str]:
    return [json.loads(line)["request"]["path"] for line in file.read_text().splitlines()]


def test_rotation_restart_and_local_limits(cluster: Cluster, logs: Path, tmp_path: Path) -> None:
    node, file, old = cluster.nodes[0], logs / "audit.log", logs / "audit.log.1"
    refused = enable(cluster, tmp_path / "elsewhere.log")
    assert refused.status == 400
    assert "outside the directories" in refused.errors[0]
    assert enable(cluster, file).status == 204
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.rename(old)
    assert cluster.call("GET", "sys/mounts").status == 200
    assert paths(old)[-2:] == ["sys/mounts"] * 2
    assert node.process is not None
    node.process.send_signal(signal.SIGHUP)
    node.wait_until("open its audit file again", file.exists)
    assert cluster.call("GET", "sys/auth").status == 200
    assert paths(file) == ["sys/auth"] * 2
    assert paths(old)[-1] == "sys/mounts"
    node.stop()
    node.start()
    cluster.unseal()
    cluster.wait_active()
    assert cluster.call("GET", "sys/mounts").status == 200
    assert paths(file)[-2:] == ["sys/mounts"] * 2
    assert cluster.root_token not in old.read_text() + file.read_text()


def test_a_blocked_device_refuses_and_health_says_so(cluster: Cluster, logs: Path) -> None:
    node, fifo = cluster.nodes[0], logs / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert enable(cluster, fifo).status == 204
    assert "audit_blocked" not in node.call("GET", "sys/health").body
    os.close(reader)
    refused = cluster.call("GET", "sys/mounts")
    assert (refused.status, refused.body) == (500, {"errors": ["internal error"]})
    health = node.call("GET", "sys/health")
    assert (health.status, health.body["sealed"], health.body["audit_blocked"]) == (200, False, True)
    # Still blocked: the node must be able to end, and to be sealed.
    assert cluster.call("PUT", "sys/seal").status == 204
    assert node.call("GET", "sys/health").status == 503
    node.stop()
