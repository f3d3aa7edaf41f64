"""Two clusters as processes: preflight by the command line, a token encrypted to a key, an authority rotated while both
ends are killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import (
    ROOT,
    Cluster,
    Node,
    activation_token,
    embedded_storage,
    performance,
    wait_in_step,
)

SETTINGS = 'replication {\n  certificate_check_interval = "0.2s"\n  heartbeat_interval = "0.5s"\n}'
BASE = "sys/replication/performance"


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[tuple[Cluster, Cluster]]:
    made = tuple(
        Cluster([Node(name, tmp_path, embedded_storage(tmp_path / f"data-{name}"), name, SETTINGS)])
        for name in ("us", "eu")
    )
    primary, secondary = made
    try:
        for cluster in made:
            cluster.bootstrap()
        assert primary.call("POST", f"{BASE}/primary/enable", {}).status == 200
        yield primary, secondary
    finally:
        for cluster in made:
            cluster.kill()


def outrider(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sidecar", *arguments],
        cwd=ROOT,
        env={**os.environ, "OUTRIDER_ADDR": cluster.nodes[0].address, "OUTRIDER_TOKEN": cluster.root_token},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def until(what: str, condition: Any, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def authority(cluster: Cluster) -> dict[str, Any]:
    return dict(performance(cluster.nodes[0]).get("certificate_authority") or {})


def test_preflight_encrypted_token_and_a_rotation_with_kills(clusters: tuple[Cluster, Cluster]) -> None:
    primary, secondary = clusters
    token = activation_token(primary, "eu-west")
    good = outrider(secondary, "replication", "enable-secondary", "-preflight", token)
    assert good.returncode == 0, good.stdout + good.stderr
    assert good.stdout.count(" ok ") == 10, good.stdout
    assert primary.call("POST", f"{BASE}/primary/revoke-secondary", {"id": "eu-west"}).status == 204
    cut = outrider(secondary, "replication", "enable-secondary", "-preflight", token[:-9])
    assert cut.returncode == 2
    assert "truncated" in cut.stdout

    key = outrider(secondary, "replication", "generate-public-key", "-field=secondary_public_key").stdout.strip()
    sealed = outrider(
        primary, "replication", "secondary-token", f"-secondary-public-key={key}", "-field=token", "eu-2"
    ).stdout.strip()
    assert sealed.startswith("ort1."), sealed
    enabled = outrider(secondary, "replication", "enable-secondary", sealed)
    assert enabled.returncode == 0, enabled.stderr
    secondary.keys = primary.keys
    wait_in_step(primary, secondary)

    old = authority(primary)["sha256"]
    secondary.nodes[0].kill()
    rotated = outrider(primary, "replication", "rotate-ca", "-overlap=1h", "-format=json")
    assert rotated.returncode == 0, rotated.stderr
    assert authority(primary)["waiting_for"] == ["eu-2"]
    primary.nodes[0].kill()
    for cluster in (primary, secondary):
        cluster.start()
        cluster.unseal()
    until("the rotation ends", lambda: "successor" not in (authority(primary) or {"successor": 1}))
    assert authority(primary)["sha256"] != old
    secondary.nodes[0].kill()
    secondary.start()
    secondary.unseal()
    wait_in_step(primary, secondary)
    trusted = performance(secondary.nodes[0])["certificate"]["trusted_authorities"]
    assert authority(primary)["sha256"] in trusted
