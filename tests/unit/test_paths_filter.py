"""What a paths filter selects, what a secondary holds, and what its clients are told."""

from __future__ import annotations

import random
import uuid
from typing import Any

import msgspec
import pytest

from consul_backend.limits import Limits
from consul_backend.position import Position
from plugin_api.errors import InvalidRequest
from sidecar.replication import roles
from sidecar.replication.hello import Identity, LogFacts, Source, answer_hello, hello_of
from sidecar.replication.modes import DR, PERFORMANCE
from sidecar.replication.roles import DisabledRole, SecondaryRole
from sidecar.replication.selection import (
    EVERYTHING,
    NOTHING,
    Mount,
    Partitions,
    PathsFilter,
    check_filter,
    filled,
    narrowed,
    partitions,
    selection_for,
    withheld,
)
from sidecar.transport.certificates import make_authority
from tests.support.role_node import RoleNode, role_node, role_of

IDS = [str(uuid.UUID(int=n)) for n in range(8)]
A, B, C = IDS[:3]
MOUNTS = [
    Mount("a/", A, "kv"),
    Mount("ns1/b/", B, "kv"),
    Mount("auth/c/", C, "userpass"),
    Mount("sys/", IDS[3], "system"),
]


@pytest.mark.parametrize(
    ("mode", "paths", "only", "names"),
    [
        ("allow", ["a/"], [A, IDS[3]], ["auth/c/", "ns1/b/"]),
        ("deny", ["a"], [B, C, IDS[3]], ["a/"]),
        ("allow", ["ns1"], [B, IDS[3]], ["a/", "auth/c/"]),
        ("deny", ["auth/c/", "nosuch/"], [A, B, IDS[3]], ["auth/c/"]),
        ("whitelist", ["nosuch/"], [IDS[3]], ["a/", "auth/c/", "ns1/b/"]),
    ],
)
def test_what_a_filter_selects(mode: str, paths: list[str], only: list[str], names: list[str]) -> None:
    filtered = check_filter(mode, paths)
    assert selection_for(filtered, MOUNTS, ()) == partitions(only)
    assert withheld(filtered, MOUNTS) == names


@pytest.mark.parametrize(
    ("mode", "paths"),
    [
        ("some", ["a/"]),
        ("allow", []),
        *(("deny", [path]) for path in ("sys/", "cubbyhole", "identity/", "auth/token/", "auth/", "/", "", "a//b")),
        ("deny", ["a/"] * 2000),
    ],
)
def test_a_filter_that_is_refused(mode: str, paths: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        check_filter(mode, paths)


def test_system_areas_other_classes_and_unknown_mounts() -> None:
    some = partitions([A])
    assert [some.takes(*pair) for pair in (("r", "core"), ("r", A), ("l", B))] == [True] * 3
    assert not some.takes("r", B), "a mount that nobody names does not travel, known or not"
    assert not partitions(None, [A]).takes("r", A)
    assert partitions(None, [A]).takes("r", B)


def test_sets_of_partitions_are_sets() -> None:
    """Inclusion and the two steps of a change agree with plain sets of mounts."""
    dice = random.Random(7)

    def members(one: Partitions) -> set[str]:
        return {mount for mount in IDS if one.has(mount)}

    def some() -> Partitions:
        only = None if dice.random() < 0.3 else dice.sample(IDS, dice.randrange(len(IDS)))
        return partitions(only, dice.sample(IDS, dice.randrange(4)))

    for _ in range(2000):
        one, other = some(), some()
        if one.only is not None or other.only is None:  # None is more than these eight
            assert one.within(other) == (members(one) <= members(other))
        else:
            assert not one.within(other)
        kept = narrowed(one, other)
        assert members(kept) == {mount for mount in members(one) if other.permits(mount)}
        full = filled(kept, other)
        assert members(full) == members(other) | (members(kept) & set(other.without))
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(one), type=Partitions) == one
        assert other.within(full)


def test_a_secondary_that_does_not_hold_what_it_is_sent_must_diff() -> None:
    """Also where roots would be equal, because the mount is empty: only a sync proves that it is."""
    position = Position("set", "generation", 1, 5, bytes(32))
    source, facts = Source("cluster", "set", "generation", 1, "e"), LogFacts(5, bytes(32), bytes(32))
    for held, selection, mode in (
        (partitions([A]), EVERYTHING, "need-diff"),
        (partitions(None, [B]), EVERYTHING, "need-diff"),
        (partitions(None, [B]), partitions(None, [B]), "accept"),
        (EVERYTHING, partitions([A]), "accept"),
        (EVERYTHING, EVERYTHING, "accept"),
    ):
        hello = hello_of(Identity("eu", "store", "set", 1, "e", held), position, Limits())
        reply = answer_hello(hello, source, facts, Limits(), selection)
        assert (reply.mode, reply.selection) == (mode, selection)


def test_what_a_secondary_holds_through_filters_and_syncs() -> None:
    role = SecondaryRole("set", role_of("secondary", PERFORMANCE).history, held=NOTHING)
    first = roles.select(role, EVERYTHING)
    assert roles.not_held(first, A), "nothing is held before the first sync"
    whole = roles.synced(first, EVERYTHING)
    assert not roles.not_held(whole, A)
    less = roles.select(whole, partitions([A]))
    assert (roles.not_held(less, A), roles.not_held(less, B), roles.hidden(less, B)) == (False, True, True)
    again = roles.select(less, EVERYTHING)
    assert (roles.not_held(again, B), roles.hidden(again, B)) == (True, False)
    assert roles.synced(again, partitions([A])) is again, "a sync by another selection proves nothing"
    assert not roles.not_held(roles.synced(again, EVERYTHING), B)
    assert roles.select(whole, EVERYTHING) is whole


def test_roles_remember_what_is_not_held() -> None:
    authority = {"began": role_of("primary", PERFORMANCE).history[0], "cluster_addr": ""}
    secondary = role_of("secondary", PERFORMANCE)
    primary = roles.promote(PERFORMANCE, secondary, **authority, authority=make_authority("x"), not_held=[B])
    assert roles.not_held(primary, B)
    assert roles.not_held(roles.demote(PERFORMANCE, primary), B)
    alone = roles.disable(PERFORMANCE, primary, "primary/disable")
    assert roles.not_held(alone, B)
    anew = roles.enable_primary(PERFORMANCE, alone, set_id="s", **authority, authority=make_authority("x"))
    assert roles.not_held(anew, B)
    assert not roles.not_held(roles.accept_empty(anew, [B]), B)
    assert roles.decode_role(roles.encode_role(anew)) == anew
    with pytest.raises(InvalidRequest):
        roles.accept_empty(secondary, [B])
    with pytest.raises(InvalidRequest, match="mirrors everything"):
        roles.set_filter(DR, role_of("primary", DR), "eu", PathsFilter("deny", ("a/",)))


# ---- endpoints and mounts of a node

PATH = "sys/replication/performance/primary/paths-filter/eu"


async def test_the_endpoints_of_a_filter() -> None:
    node = await role_node("primary", "disabled")
    assert ((await node.call("GET", PATH)).status, (await node.call("GET", PATH)).errors) == (404, [])
    assert (await node.call("POST", PATH, {"mode": "deny", "paths": "private,team/"})).status == 204
    assert (await node.call("GET", PATH)).body["data"] == {"mode": "deny", "paths": ["private/", "team/"]}
    assert (await node.call("PUT", PATH, {"paths": ["kv/"]})).status == 204
    old = PATH.replace("paths-filter", "mount-filter")
    assert (await node.call("GET", old)).body["data"] == {"mode": "allow", "paths": ["kv/"]}
    assert (await node.call("POST", old, {"mode": "deny", "paths": ["own"]})).status == 204
    assert (await node.call("GET", PATH)).body["data"] == {"mode": "deny", "paths": ["own/"]}, "one filter, two names"
    assert (await node.call("POST", old, {"mode": "deny", "paths": ["sys/"]})).status == 400
    assert (await node.call("DELETE", old, token=None)).status == 403
    assert (await node.call("DELETE", old)).status == 204
    assert (await node.call("GET", PATH)).status == 404
    assert (await node.call("PUT", PATH, {"paths": ["kv/"]})).status == 204
    for bad in ({}, {"mode": "x", "paths": ["kv/"]}, {"mode": "deny", "paths": ["sys/"]}):
        assert (await node.call("POST", PATH, bad)).status == 400
    assert (await node.call("POST", PATH.replace("/eu", "/-eu"), {"paths": ["kv/"]})).status == 400
    dynamic = await node.call("GET", "sys/replication/performance/primary/dynamic-filter/eu")
    assert dynamic.body["data"] == {"dynamic_filtered_mounts": [], "dynamic_filtered_namespaces": []}
    assert (await node.call("GET", "sys/replication/performance/primary/dynamic-filter/us")).status == 404
    assert (await node.call("GET", PATH, token=None)).status == 403
    assert (await node.call("DELETE", PATH)).status == 204
    assert (await node.call("DELETE", PATH)).status == 204
    assert (await node.call("GET", PATH)).status == 404


@pytest.mark.parametrize("kind", ["disabled", "secondary"])
async def test_who_is_no_primary_has_no_filters(kind: str) -> None:
    node = await role_node(kind, "disabled")
    for method, body in (("GET", None), ("POST", {"paths": ["kv/"]}), ("DELETE", None)):
        answer = await node.call(method, PATH, body)
        assert (answer.status, answer.errors) == (400, ["this cluster is not a performance replication primary"])


async def test_a_dr_secondary_refuses_all_of_it() -> None:
    node = await role_node("primary", "secondary")
    for path in (PATH, "sys/replication/performance/not-held"):
        assert (await node.call("GET", path)).status == 400


async def mounted(node: RoleNode, path: str, **more: Any) -> str:
    assert (await node.call("POST", f"sys/mounts/{path}", {"type": "kv", **more})).status == 204
    return str((await node.call("GET", f"sys/mounts/{path}")).body["data"]["uuid"])


async def play(node: RoleNode, role: roles.Role) -> None:
    """Be that from now on, as after a hello."""
    await node.replication.performance.change(lambda _: role)
    await node.service.reselected()


async def test_a_withheld_mount_is_none_and_a_local_one_in_its_place_is_served() -> None:
    node = await role_node("disabled", "disabled")
    kv, private = await mounted(node, "kv"), await mounted(node, "private")
    await node.call("POST", "private/a", {"x": "1"})
    secondary = role_of("secondary", PERFORMANCE)
    assert isinstance(secondary, SecondaryRole)
    only = [mount.uuid for mount in node.replication.performance.mounts() if mount.uuid != private]
    await play(node, roles.select(secondary, partitions(only)))
    answer = await node.call("GET", "private/a")
    assert (answer.status, "no handler for route" in answer.errors[0]) == (404, True)
    assert "private/" not in (await node.call("GET", "sys/mounts")).body["data"]
    assert (await node.call("GET", "kv/a")).status == 404, "served: there is no such secret"
    assert node.replication.filters.dynamic("secondary", "") == {
        "dynamic_filtered_mounts": ["private/"],
        "dynamic_filtered_namespaces": [],
    }
    await mounted(node, "private", local=True)
    assert (await node.call("POST", "private/a", {"x": "own"})).status == 204
    assert (await node.call("GET", "private/a")).body["data"] == {"x": "own"}
    assert kv in only


async def test_what_a_withheld_mount_has_issued_ends_and_what_a_local_one_has_stays() -> None:
    node = await role_node("disabled", "disabled")
    tokens: dict[str, str] = {}
    uuids: dict[str, str] = {}
    for name in ("corp", "own", "kept"):
        await node.call("POST", f"sys/auth/{name}", {"type": "userpass", "local": name == "own"})
        uuids[name] = str((await node.call("GET", f"sys/auth/{name}")).body["data"]["uuid"])
        await node.call("POST", f"auth/{name}/users/ann", {"password": "wonder"})
        login = await node.call("POST", f"auth/{name}/login/ann", {"password": "wonder"}, token=None)
        tokens[name] = login.body["auth"]["client_token"]
    secondary = role_of("secondary", PERFORMANCE)
    assert isinstance(secondary, SecondaryRole)
    only = [mount.uuid for mount in node.replication.performance.mounts() if mount.uuid != uuids["corp"]]
    await play(node, roles.select(secondary, partitions(only)))
    alive = {
        name: (await node.call("GET", "auth/token/lookup-self", token=token)).status for name, token in tokens.items()
    }
    assert alive == {"corp": 403, "own": 200, "kept": 200}
    assert (await node.call("POST", "auth/corp/login/ann", {"password": "wonder"}, token=None)).status in (403, 404)


async def test_a_mount_that_is_not_held_says_so_until_it_is() -> None:
    node = await role_node("disabled", "disabled")
    private = await mounted(node, "private")
    await mounted(node, "kv")
    assert (await node.call("POST", "sys/auth/corp", {"type": "userpass"})).status == 204
    corp = str((await node.call("GET", "sys/auth/corp")).body["data"]["uuid"])
    await play(node, DisabledRole((corp,)))
    login = await node.call("POST", "auth/corp/login/ann", {"password": "x"}, token=None)
    assert (login.status, "not held" in login.errors[0]) == (503, True)
    await play(node, DisabledRole((private,)))
    for method, body in (("GET", None), ("POST", {"x": "1"})):
        answer = await node.call(method, "private/a", body)
        assert (answer.status, "not held" in answer.errors[0]) == (503, True)
    assert (await node.call("POST", "kv/a", {"x": "1"})).status == 204
    listed = await node.call("GET", "sys/replication/performance/not-held")
    assert listed.body["data"] == {"mounts": ["private/"]}
    status = await node.call("GET", "sys/replication/performance/status", token=None)
    assert status.body["data"]["mounts_not_held"] == 1
    accept = "sys/replication/performance/not-held/accept-empty"
    assert (await node.call("POST", accept, {"paths": ["kv/"]})).status == 400
    assert (await node.call("POST", accept, {"paths": []})).status == 400
    assert (await node.call("POST", accept, {"paths": ["private/"]})).status == 204
    assert (await node.call("GET", "private/a")).status == 404


async def test_unmount_and_move_are_followed_by_filters() -> None:
    node = await role_node("primary", "disabled")
    private = await mounted(node, "private")
    await mounted(node, "kv")
    await node.call("POST", PATH, {"mode": "deny", "paths": ["private/", "kv/"]})

    async def paths() -> list[str]:
        return list((await node.call("GET", PATH)).body["data"]["paths"])

    assert (await node.call("POST", "sys/remount", {"from": "private", "to": "hidden"})).status in (200, 204)
    assert await paths() == ["kv/", "hidden/"]
    assert not node.replication.performance.selected("eu").has(private), "the move let nothing go"
    assert (await node.call("POST", "sys/remount", {"from": "hidden", "to": "kv"})).status == 400
    assert await paths() == ["kv/", "hidden/"]
    assert (await node.call("DELETE", "sys/mounts/kv")).status == 204
    assert await paths() == ["hidden/"]


async def test_a_move_that_fails_leaves_filters_as_they_were() -> None:
    node = await role_node("primary", "disabled")
    await node.call("POST", PATH, {"mode": "deny", "paths": ["a/"]})
    seen: list[tuple[str, ...]] = []

    async def fail() -> None:
        seen.append(node.replication.performance.role.filters["eu"].paths)
        raise InvalidRequest("no")

    with pytest.raises(InvalidRequest):
        await node.replication.filters.mount_moved("a/", "b/", fail)
    assert seen == [("a/", "b/")], "while it moves, both are withheld"
    assert node.replication.filters.get("eu") == {"mode": "deny", "paths": ["a/"]}
