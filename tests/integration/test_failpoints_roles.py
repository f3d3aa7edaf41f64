"""A process killed at every named point of a demotion, a promotion, an update-primary, the renewal of a certificate and
the rotation of an authority: afterwards it has the old role or the new one, never both and never neither."""

from __future__ import annotations

import contextlib
import http.client
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_failpoints import one_node, restart, running, stored
from tests.support import disaster
from tests.support.cluster import Cluster, activation_token, replicate, together
from tests.support.faults import MOUNT, Writers, await_killed, mount_load

QUICK = 'replication {\n  heartbeat_interval = "1s"\n  certificate_check_interval = "200ms"\n}\n'
MODES = ("performance", "dr")
# While a primary is demoted: the point and what the cluster is afterwards.
DEMOTION = {"demote:before-commit": "primary", "demote:after-commit": "secondary"}
# While a secondary is promoted: the point and what it is afterwards.
PROMOTION = {"promote:before-commit": "secondary", "promote:after-commit": "primary"}
# While a secondary is pointed at another primary; then when it first meets it and has what that never had.
RETURN = ("update-primary:before-commit", "update-primary:after-commit")
ADOPTION = ("lost-writes:before-head",)
# While an authority is rotated, in the order in which they are reached: the point, and who dies there. The renewal of
# the secondary's certificate lies in between.
ROTATION = (
    ("rotation:after-begin", "us"),
    ("certificate:before-offer", "us"),
    ("certificate:after-offer", "us"),
    ("certificate:before-keep", "eu"),
    ("certificate:after-keep", "eu"),
    ("certificate:after-use", "us"),
    ("rotation:before-finish", "us"),
    ("rotation:after-finish", "us"),
)


def authorised(cluster: Cluster, mode: str) -> dict[str, Any]:
    """What a secondary wants to see before it changes its role: an operation token in the body, or a root token."""
    if mode == "dr":
        return {"dr_operation_token": disaster.operation_token(cluster)}
    cluster.root_token = disaster.root_token(cluster)
    return {}


def dies(cluster: Cluster, mode: str, path: str, body: dict[str, Any]) -> None:
    """A request in whose course the node dies."""
    node = disaster.leader(cluster)
    with contextlib.suppress(OSError, http.client.HTTPException):
        node.call("POST", f"sys/replication/{mode}/{path}", body, token=cluster.root_token, timeout_s=60)
    await_killed(node)


def kind(cluster: Cluster, mode: str) -> str:
    """What the cluster says it is, once somebody leads it."""
    return str(disaster.status(disaster.leader(cluster), mode)["mode"])


def accepts(cluster: Cluster, path: str) -> bool:
    """Whether a write of the cluster's own is taken."""
    reply = disaster.leader(cluster).call("PUT", f"{MOUNT}/{path}", {"v": path}, token=cluster.root_token)
    return reply.status == 204


def wait_in_step(primary: Cluster, secondary: Cluster, mode: str) -> None:
    """Until both are connected and the secondary streams with the primary's root."""
    deadline = time.monotonic() + disaster.STEP_TIMEOUT_S
    while True:
        ours, theirs = (disaster.status(disaster.leader(one), mode) for one in (primary, secondary))
        if together(ours, theirs):
            return
        assert time.monotonic() < deadline, (ours, theirs)
        time.sleep(0.05)


def joined(home: Path, mode: str) -> tuple[Cluster, Cluster]:
    """us, and eu as its secondary in that mode."""
    us, eu = one_node(home, "us"), one_node(home, "eu")
    for cluster in (us, eu):
        cluster.nodes[0].settings = QUICK
        cluster.bootstrap()
    mount_load(us.call)
    if mode == "dr":
        disaster.mirror(us, eu, "eu")
    else:
        replicate(us, eu, "eu")
    return us, eu


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_every_step_of_a_planned_failover(tmp_path: Path, mode: str) -> None:
    us, eu = joined(tmp_path, mode)
    with running(us, eu):
        loads = {point: Writers(us.nodes, us.root_token, point, writers=2) for point in DEMOTION}
        for point, role in DEMOTION.items():
            restart(us, spec=f"{point}=kill")
            wait_in_step(us, eu, mode)
            with loads[point] as load:
                load.wait_acked(10)
                dies(us, mode, "primary/demote", {})
            stored(us)
            restart(us)
            assert kind(us, mode) == role
            assert kind(eu, mode) == "secondary", "the other one is what it was"
            assert accepts(us, point.replace(":", "-")) == (role == "primary"), "as the role has it, so it is obeyed"
            if role == "primary":
                load.judge(us.nodes[0])
                wait_in_step(us, eu, mode)
        # Nobody is primary, as a demotion wants it; whoever is promoted has all that was acknowledged.
        for point, role in PROMOTION.items():
            restart(eu, spec=f"{point}=kill")
            dies(eu, mode, "secondary/promote", authorised(eu, mode))
            stored(eu)
            restart(eu)
            assert kind(eu, mode) == role
            assert kind(us, mode) == "secondary"
        eu.root_token = us.root_token if mode == "dr" else disaster.root_token(eu)
        for load in loads.values():
            load.judge(eu.nodes[0], eu.root_token)
        for point in RETURN:
            restart(us, spec=f"{point}=kill")
            token = activation_token(eu, point.replace(":", "-"), mode=mode)
            dies(us, mode, "secondary/update-primary", authorised(us, mode) | {"token": token})
            stored(us)
            restart(us)
            assert (kind(us, mode), kind(eu, mode)) == ("secondary", "primary")
        wait_in_step(eu, us, mode)
        assert "lost_writes" not in disaster.status(disaster.leader(us), mode)


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_every_step_of_a_renewal_and_of_a_rotation(tmp_path: Path, mode: str) -> None:
    """After each death the secondary still has a certificate that counts, and the rotation goes on by itself."""
    us, eu = joined(tmp_path, mode)
    who = {"us": us, "eu": eu}

    def authority() -> dict[str, Any]:
        return dict(disaster.status(us.nodes[0], mode).get("certificate_authority") or {})

    with running(us, eu):
        old = authority()["sha256"]
        before = disaster.status(disaster.leader(eu), mode)["certificate"]["sha256"]
        (first, name), victim = ROTATION[0], us
        restart(victim, spec=f"{first}=kill")
        dies(us, mode, "primary/rotate-ca", {"overlap": "1h"})
        for point, name in ROTATION[1:]:
            # It has to be armed before the one that died comes back, since then the renewal goes on.
            restart(who[name], spec=f"{point}=kill")
            if who[name] is not victim:
                restart(victim)
            victim = who[name]
            await_killed(victim.nodes[0])
            stored(victim)
        restart(victim)
        us.nodes[0].wait_until("end the rotation", lambda: "successor" not in (authority() or {"successor": 1}))
        assert authority()["sha256"] != old
        assert us.call("PUT", f"{MOUNT}/after", {"v": "1"}).status == 204
        wait_in_step(us, eu, mode)
        held = disaster.status(disaster.leader(eu), mode)["certificate"]
        assert held["sha256"] != before
        restart(eu)
        wait_in_step(us, eu, mode)
        wanted = [authority()["sha256"]]
        eu.nodes[0].wait_until(
            "trust the new authority alone",
            lambda: disaster.status(disaster.leader(eu), mode)["certificate"]["trusted_authorities"] == wanted,
        )


def test_killed_at_every_step_of_a_failover_and_of_the_way_back(tmp_path: Path) -> None:
    """Never both roles and never neither; what only the old primary had is kept, whenever it dies."""
    us, eu = one_node(tmp_path, "us"), one_node(tmp_path, "eu")
    with running(us, eu):
        us.bootstrap()
        eu.bootstrap()
        mount_load(us.call)
        disaster.mirror(us, eu, "eu")
        assert us.call("PUT", f"{MOUNT}/kept", {"v": "1"}).status == 204
        disaster.wait_in_step(us, eu)
        us.kill()
        for point, mode in PROMOTION.items():
            restart(eu, spec=f"{point}=kill")
            token = disaster.operation_token(eu)
            dies(eu, "dr", "secondary/promote", {"dr_operation_token": token})
            restart(eu)
            assert disaster.status(disaster.leader(eu))["mode"] == mode
        eu.root_token = us.root_token
        assert eu.call("GET", f"{MOUNT}/kept").data == {"v": "1"}

        restart(us)
        assert us.call("PUT", f"{MOUNT}/only-us", {"v": "1"}).status == 204
        assert us.call("POST", f"{disaster.BASE}/primary/demote", {}).status == 200
        disaster.settle(us, us.keys)
        for point in RETURN:
            restart(us, spec=f"{point}=kill")
            disaster.leader(us)
            fields = {"dr_operation_token": disaster.operation_token(us)}
            fields["token"] = activation_token(eu, point.replace(":", "-"), mode="dr")
            dies(us, "dr", "secondary/update-primary", fields)
        for point in ADOPTION:  # by now it has a primary to go to, and meets this on its way
            restart(us, spec=f"{point}=kill")
            await_killed(us.nodes[0])
        restart(us)
        disaster.wait_in_step(eu, us)
        token = disaster.operation_token(us)
        (lost,) = disaster.leader(us).call("GET", f"{disaster.BASE}/lost-writes", token=token).data["lost_writes"]
        assert lost["exact"]
        assert lost["entries"] >= 1
