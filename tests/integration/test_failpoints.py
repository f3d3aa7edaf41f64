"""A process killed at every named point, then started again: nothing acknowledged is lost, nothing is half done."""

from __future__ import annotations

import ast
import contextlib
import http.client
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from consul_backend.failpoint import ELECTION_POINTS, LARGE_POINTS, REINDEX_POINTS
from consul_backend.failpoint import POINTS as STORE_POINTS
from sidecar.core.keys import REPLICATED_KEYRING
from sidecar.failpoints import POINTS as DAEMON_POINTS
from sidecar.replication.protocol import is_none
from tests.support.cluster import (
    Cluster,
    Node,
    activation_token,
    embedded_storage,
    performance,
    replicate,
    wait_in_step,
)
from tests.support.faults import (
    MOUNT,
    StoreFacts,
    Writers,
    arm,
    await_killed,
    check_embedded,
    mount_load,
    rounds,
)

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    'replication {\n  heartbeat_interval = "1s"\n}\nsidecar {\n  flush_interval = "20ms"\n  wal_keep_records = 1\n}\n'
)

# Under load, in a primary and in a secondary: the point and at which visit the process dies there.
COMMON = {
    "commit:before-build": 15,
    "commit:before-send": 15,
    "commit:after-reply": 15,
    "commit:before-ack": 15,
    "flush:before-send": 4,
    "flush:after-reply": 4,
    "flush:before-ack": 4,
    "recovery:after-checkpoint": 1,
    "recovery:after-extents": 1,
    "recovery:after-redo": 1,
    "recovery:before-tenure": 1,
    "recovery:after-tenure": 1,
    "lead:before-serving": 1,
    "election:before-acquire": 1,
    "election:after-acquire": 1,
}
PRIMARY = {"ship:before-send": 10}
SECONDARY = {"applier:before-commit": 10, "applier:after-commit": 10, "applier:before-ack": 10}
COLLECT = ("collect:before-send", "collect:after-reply")
LEAVING = ("lead:before-release", "election:after-release")
INIT = ("init:before-genesis", "init:after-genesis")
ROLE = ("role:before-commit", "role:after-commit")
# While a cluster becomes a secondary: the point and whether its store is the new one afterwards.
ACTIVATION = {
    "activation:after-bootstrap": False,
    "activation:after-genesis": False,
    "activation:after-flip": True,
    "activation:before-drop": True,
    "activation:after-drop": True,
    "sync:after-diff": True,
    "sync:half-way": True,
    "sync:before-guard": True,
    "sync:after-guard": True,
}
# A batch that is no single transaction, as one row of lives: the point where each ends, and whether that is while it
# recovers from how the one before ended.
LARGE = {
    "large:after-part": False,
    "large:before-abort": True,
    "large:after-abort": True,
    "large:before-commit": False,
    "large:after-commit": False,
    "large:recovered": True,
    "large:after-chunk": True,
    "large:before-roll": True,
    "large:after-roll": True,
}
# Visited by other tests: two in process, of which one needs damage; the others another server's key.
ELSEWHERE = {
    "reindex:before-repair": "tests/unit/test_index_check.py",
    "filter:dropping": "tests/integration/test_paths_filter.py",
    "seal:before-change": "tests/integration/test_auto_unseal.py",
    "seal:after-change": "tests/integration/test_auto_unseal.py",
    **{
        name: "tests/integration/test_failpoints_roles.py"
        for name in DAEMON_POINTS
        if name.startswith(("demote:", "promote:", "update-primary:", "lost-writes:", "certificate:", "rotation:"))
    },
}
ACTIVATION_PRIMARY = ("activation:before-reply",)

UNDER_LOAD = [
    (roles, point, hit)
    for roles, points in ((("secondary", "primary"), COMMON), (("primary",), PRIMARY), (("secondary",), SECONDARY))
    for point, hit in points.items()
]


def test_every_failpoint_in_the_tree_is_declared_and_visited_here() -> None:
    found: list[str] = []
    for package in ("consul_backend", "sidecar", "plugin_api"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "failpoint":
                    (name,) = node.args
                    assert isinstance(name, ast.Constant), f"{path}: a failpoint's name is a literal"
                    found.append(str(name.value))
    assert len(found) == len(set(found)), "a name is one place"
    assert set(found) == {*STORE_POINTS, *LARGE_POINTS, *ELECTION_POINTS, *REINDEX_POINTS, *DAEMON_POINTS}
    assert len(found) >= 60
    visited = {*COMMON, *PRIMARY, *SECONDARY, *COLLECT, *LEAVING, *INIT, *ROLE, *ACTIVATION, *ACTIVATION_PRIMARY}
    visited |= {*LARGE, *ELSEWHERE}
    assert set(found) == visited, "a test dies at every point"
    for name, path in ELSEWHERE.items():
        assert name in (ROOT / path).read_text(encoding="utf-8")


def one_node(home: Path, name: str) -> Cluster:
    """A cluster of one node on SQLite that flushes and collects eagerly."""
    return Cluster([Node(name, home, embedded_storage(home / f"{name}-data"), cluster_name=name, settings=SETTINGS)])


def stored(cluster: Cluster) -> StoreFacts:
    """The checked store of a cluster whose node is down."""
    return check_embedded(cluster.nodes[0].directory / f"{cluster.nodes[0].name}-data")


@contextlib.contextmanager
def running(*clusters: Cluster) -> Iterator[None]:
    """Kill what is left at the end."""
    try:
        yield
    finally:
        for cluster in clusters:
            cluster.kill()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Cluster]]:
    """A replicating primary and secondary, to be killed again and again."""
    home = tmp_path_factory.mktemp("failpoints")
    primary, secondary = one_node(home, "primary"), one_node(home, "secondary")
    with running(primary, secondary):
        primary.bootstrap()
        secondary.bootstrap()
        mount_load(primary.call)
        replicate(primary, secondary, "secondary")
        yield {"primary": primary, "secondary": secondary}


@pytest.fixture
def pair(together: dict[str, Cluster]) -> dict[str, Cluster]:
    """The same with both running, whatever the test before left behind."""
    restart(*[cluster for cluster in together.values() if not cluster.nodes[0].running])
    wait_in_step(*together.values())
    return together


def restart(*clusters: Cluster, spec: str = "") -> None:
    """Start each cluster's node with these points armed and unseal it; it may die of that."""
    for cluster in clusters:
        cluster.nodes[0].kill()
        arm(cluster.nodes[0], spec)
        cluster.nodes[0].start(wait=False)
    for cluster in clusters:
        cluster.nodes[0].wait_listening()
        with contextlib.suppress(OSError, http.client.HTTPException):
            cluster.nodes[0].unseal(cluster.keys)


@pytest.mark.parametrize(("roles", "point", "hit"), UNDER_LOAD)
def test_killed_under_load(pair: dict[str, Cluster], roles: tuple[str, ...], point: str, hit: int) -> None:
    primary, victims = pair["primary"], [pair[role] for role in roles]
    with Writers(primary.nodes, primary.root_token, point) as load:
        load.wait_acked(20)
        for victim in victims:
            restart(victim, spec=f"{point}=kill:{hit}")
            await_killed(victim.nodes[0])
            stored(victim)
    restart(*victims)
    wait_in_step(primary, pair["secondary"])
    load.judge(primary.nodes[0])


RECOVERY = [point for point in COMMON if point.startswith("recovery:")]
NESTED = list(itertools.product(RECOVERY, repeat=3))
STRIDE = 21
"""Of the 125 ways to die three times in one recovery a test run takes six, which have every point at every depth; a
soak takes more, or all."""


def test_killed_three_deep_while_it_recovers(pair: dict[str, Cluster]) -> None:
    """F13: a recovery that dies leaves what the next one needs."""
    primary = pair["primary"]
    with Writers(primary.nodes, primary.root_token, "again") as load:
        load.wait_acked(100)
    chosen = NESTED[:: max(1, STRIDE // rounds())]
    assert all({sequence[depth] for sequence in chosen} == set(RECOVERY) for depth in range(3))
    for sequence in chosen:
        for point in sequence:
            restart(primary, spec=f"{point}=kill")
            await_killed(primary.nodes[0])
        stored(primary)
    restart(*pair.values())
    wait_in_step(*pair.values())
    load.judge(primary.nodes[0])


def test_killed_while_collecting_the_log(pair: dict[str, Cluster]) -> None:
    first, second = COLLECT
    primary, secondary = pair["primary"], pair["secondary"]
    restart(secondary, spec=f"{second}=kill")
    restart(primary, spec=f"{first}=kill")
    wait_in_step(primary, secondary)
    with Writers(primary.nodes, primary.root_token, "collect", writers=1, distinct=3, pace_s=0):
        for cluster in (primary, secondary):
            await_killed(cluster.nodes[0])
            stored(cluster)
            restart(cluster)
    wait_in_step(primary, secondary)


def is_whole(facts: StoreFacts) -> bool:
    """Whether the newest record says that the data are one prefix of the primary's."""
    return not is_none(facts.records[-1].header.positions.get("performance"))


def but_the_keyring(facts: StoreFacts) -> dict[str, bytes]:
    """The replicated entries; a newer keyring may go before them, because it opens the older ones too."""
    return {key: value for key, value in facts.replicated().items() if key != REPLICATED_KEYRING}


def test_killed_at_every_step_of_a_sync_after_the_log_went(tmp_path: Path) -> None:
    """The secondary has data and was away for too long: its readers see the old prefix, then the new one."""
    primary, secondary = one_node(tmp_path, "primary"), one_node(tmp_path, "secondary")
    with running(primary, secondary):
        arm(primary.nodes[0], "collect:after-reply=kill")
        primary.bootstrap()
        secondary.bootstrap()
        mount_load(primary.call)
        replicate(primary, secondary, "secondary")
        secondary.kill()
        with Writers(primary.nodes, primary.root_token, "away", writers=1, distinct=3, pace_s=0):
            await_killed(primary.nodes[0])
        restart(primary)
        old = but_the_keyring(stored(secondary))
        for point in ("sync:after-diff", "sync:before-guard", "sync:after-guard"):
            restart(secondary, spec=f"{point}=kill")
            await_killed(secondary.nodes[0])
            facts = stored(secondary)
            assert is_whole(facts), "what differs fits one batch, so nobody ever reads a mix"
            if point != "sync:after-guard":
                assert but_the_keyring(facts) == old
        assert facts.root.hex() == performance(primary.nodes[0])["merkle_root"]
        restart(secondary)
        wait_in_step(primary, secondary)


BIG_BYTES = 700_000


def put_big(cluster: Cluster, value: str) -> bool:
    """Write a value that is several transactions; whether that was acknowledged, and not the node's death."""
    try:
        reply = cluster.call("PUT", f"{MOUNT}/big", {"v": value})
    except (OSError, http.client.HTTPException):
        return False
    assert reply.status == 204, reply
    return True


def big(cluster: Cluster) -> str | None:
    """The value, None when there is none."""
    reply = cluster.call("GET", f"{MOUNT}/big")
    assert reply.status in (200, 404), reply
    return str(reply.data["v"]) if reply.status == 200 else None


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_killed_at_every_step_of_a_large_batch(pair: dict[str, Cluster], role: str) -> None:
    """Each life begins with what the one before left behind: the whole old value or the whole new one."""
    primary, victim = pair["primary"], pair[role]
    allowed = {big(primary)}
    for number, (point, recovering) in enumerate(LARGE.items()):
        restart(victim, spec=f"{point}=kill")
        if not recovering:
            primary.wait_active()
            assert big(primary) in allowed
            value = f"{number:02}" * (BIG_BYTES // 2)
            allowed = {value} if put_big(primary, value) else {*allowed, value}
        await_killed(victim.nodes[0])
    restart(victim)
    primary.wait_active()
    assert big(primary) in allowed
    wait_in_step(*pair.values())
    for cluster in pair.values():
        cluster.stop()
        stored(cluster)


@pytest.mark.parametrize("point", LEAVING)
def test_killed_while_it_leaves(pair: dict[str, Cluster], point: str) -> None:
    primary = pair["primary"]
    restart(primary, spec=f"{point}=kill")
    with Writers(primary.nodes, primary.root_token, "leaving") as load:
        load.wait_acked(20)
        process = primary.nodes[0].process
        assert process is not None
        process.terminate()
        await_killed(primary.nodes[0])
    stored(primary)
    restart(primary)
    load.judge(primary.wait_active())


@pytest.mark.parametrize("point", INIT)
def test_killed_in_init(tmp_path: Path, point: str) -> None:
    cluster = one_node(tmp_path, "new")
    node = cluster.nodes[0]
    with running(cluster):
        arm(node, f"{point}=kill")
        cluster.start()
        with pytest.raises((OSError, http.client.HTTPException)):
            node.call("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        await_killed(node)
        arm(node, "")
        node.start()
        made = point == "init:after-genesis"
        assert node.call("GET", "sys/init").body == {"initialized": made}
        if made:
            assert node.call("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1}).status == 400
        else:
            cluster.init()
            cluster.unseal()


@pytest.mark.parametrize("point", ROLE)
def test_killed_while_a_role_changes(tmp_path: Path, point: str) -> None:
    """Each change is either there or not after the crash, and can be asked for again."""
    cluster = one_node(tmp_path, "chief")
    api = "sys/replication/performance/primary"
    with running(cluster):
        cluster.bootstrap()
        done = point == "role:after-commit"

        def crash(path: str, body: dict[str, str]) -> dict[str, object]:
            restart(cluster, spec=f"{point}=kill")
            cluster.wait_active()
            with pytest.raises((OSError, http.client.HTTPException)):
                cluster.call("POST", f"{api}/{path}", body)
            await_killed(cluster.nodes[0])
            stored(cluster)
            restart(cluster)
            return performance(cluster.wait_active())

        assert crash("enable", {})["mode"] == ("primary" if done else "disabled")
        if not done:
            assert cluster.call("POST", f"{api}/enable", {}).status == 200
        assert crash("secondary-token", {"id": "far"})["known_secondaries"] == (["far"] if done else [])
        activation_token(cluster, "far")
        assert crash("revoke-secondary", {"id": "far"})["known_secondaries"] == ([] if done else ["far"])
        assert cluster.call("POST", f"{api}/revoke-secondary", {"id": "far"}).status == (400 if done else 204)


def enable(cluster: Cluster, token: str) -> int:
    """The status of secondary/enable; 0 when the node died of it."""
    try:
        reply = cluster.call("POST", "sys/replication/performance/secondary/enable", {"token": token})
    except (OSError, http.client.HTTPException):
        return 0
    return reply.status


@pytest.mark.parametrize("point", ACTIVATION)
def test_killed_while_it_becomes_a_secondary(pair: dict[str, Cluster], tmp_path: Path, point: str) -> None:
    """Either the cluster it was, with its own keys and data, or the secondary; and then it gets in step."""
    primary = pair["primary"]
    name = point.replace(":", "-")
    fresh = one_node(tmp_path, name)
    flipped = ACTIVATION[point]
    with running(fresh):
        arm(fresh.nodes[0], f"{point}=kill")
        fresh.bootstrap()
        mount_load(fresh.call)
        assert fresh.call("PUT", f"{MOUNT}/own", {"v": "own"}).status == 204
        enable(fresh, activation_token(primary, name))
        await_killed(fresh.nodes[0])
        stored(fresh)
        if flipped:
            fresh.keys = primary.keys
            restart(fresh)
        else:
            restart(fresh)
            assert fresh.call("GET", f"{MOUNT}/own").data == {"v": "own"}
            assert performance(fresh.wait_active())["mode"] == "disabled"
            activated = f"{name}-again"
            assert enable(fresh, activation_token(primary, activated)) == 200
            fresh.keys = primary.keys
        wait_in_step(primary, fresh)
        fresh.kill()
        facts = stored(fresh)
        assert facts.root.hex() == performance(primary.nodes[0])["merkle_root"]


@pytest.mark.parametrize("point", ACTIVATION_PRIMARY)
def test_primary_killed_while_it_hands_out_its_keys(pair: dict[str, Cluster], tmp_path: Path, point: str) -> None:
    primary = pair["primary"]
    fresh = one_node(tmp_path, "fresh")
    with running(fresh):
        fresh.bootstrap()
        restart(primary, spec=f"{point}=kill")
        token = activation_token(primary, "fresh")
        assert enable(fresh, token) == 503
        await_killed(primary.nodes[0])
        assert performance(fresh.wait_active())["mode"] == "disabled"
        restart(primary)
        primary.wait_active()
        assert enable(fresh, token) == 400, "a token works once"
        replicate(primary, fresh, "fresh-again")


def test_both_stores_are_equal_in_the_end(pair: dict[str, Cluster]) -> None:
    """Roots equal and, read entry by entry, everything else too."""
    pair["primary"].kill()
    pair["secondary"].kill()
    ours, theirs = (stored(cluster) for cluster in pair.values())
    assert ours.root == theirs.root
    assert ours.replicated() == theirs.replicated()
