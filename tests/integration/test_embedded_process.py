"""The embedded store as a process: SIGKILL at any point loses nothing, and it is honest about being alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, Node, embedded_storage
from tests.support.faults import Writers, arm, await_killed, check_embedded, mount_load

POINTS = (
    "commit:before-send=kill:15",
    "commit:before-ack=kill:15",
    "large:after-part=kill:2",
    "large:after-commit=kill:1",
    "large:after-chunk=kill:2",
)
BIG = "b" * 600_000


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster([Node("lone", tmp_path, embedded_storage(tmp_path / "data"), cluster_name="lone")])
    try:
        made.bootstrap()
        mount_load(made.call)
        yield made
    finally:
        made.kill()


def restart(cluster: Cluster, failpoints: str = "") -> None:
    arm(cluster.nodes[0], failpoints)
    cluster.start()
    cluster.unseal()


def test_sigkill_at_any_point_loses_nothing_acknowledged(cluster: Cluster, tmp_path: Path) -> None:
    (node,) = cluster.nodes
    rounds: list[Writers] = []
    whole: list[int] = []
    for number, point in enumerate(POINTS):
        node.stop()
        restart(cluster, point)
        with Writers([node], cluster.root_token, f"r{number}", writers=3) as writers:
            rounds.append(writers)
            if point.startswith("large"):
                try:
                    reply = node.call("PUT", f"load/big-{number}", {"v": BIG}, token=cluster.root_token)
                    whole += [number] if reply.status == 204 else []
                except OSError:
                    pass  # killed before it could answer
            await_killed(node)
        restart(cluster)
        writers.judge(node)
    for number, point in enumerate(POINTS):
        if point.startswith("large"):
            found = cluster.call("GET", f"load/big-{number}")
            if found.status == 200:
                assert found.data == {"v": BIG}
            else:
                assert found.status == 404
                assert number not in whole
    for writers in rounds:
        writers.judge(node)
    node.stop()
    check_embedded(tmp_path / "data")


def test_it_says_that_it_is_alone_and_a_second_process_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    (node,) = cluster.nodes
    assert node.call("GET", "sys/seal-status").body["storage_type"] == "embedded"
    assert node.call("GET", "sys/leader").body["ha_enabled"] is False
    second = Node("second", tmp_path, embedded_storage(tmp_path / "data"), cluster_name="lone")
    try:
        second.start(wait=False)
        process = second.process
        assert process is not None
        assert process.wait(120) != 0
        assert "another process uses the embedded store" in second.log_tail()
        assert "Traceback" not in second.log_tail()
    finally:
        second.kill()
    assert cluster.call("GET", "sys/mounts").status == 200
