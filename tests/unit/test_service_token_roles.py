"""auth/token/roles, auth/token/tidy and batch tokens over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import hvac
import pytest
from hvac import exceptions

from plugin_api.errors import InvalidRequest
from sidecar.core.token_roles import TokenRole
from sidecar.request.types import HttpRequest
from tests.support.service_node import (
    JOINED,
    Harness,
    Reply,
    primary_and_secondary,
    replicate,
    running,
    with_bob,
    with_kv,
)

CALLER = 'path "auth/token/create/*" { capabilities = ["create", "update"] }'


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


async def role(node: Harness, name: str = "app", **fields: Any) -> None:
    reply = await node.call("POST", f"auth/token/roles/{name}", fields)
    assert reply.status == 204, reply.errors


async def create(node: Harness, token: str = "root", name: str = "app", **fields: Any) -> Reply:
    return await node.call("POST", f"auth/token/create/{name}", fields, token=token)


async def test_a_role_is_written_read_listed_and_deleted(node: Harness) -> None:
    assert (await node.call("LIST", "auth/token/roles")).status == 404
    assert (await node.call("GET", "auth/token/roles/app")).status == 404
    await role(node, allowed_policies="B, a", orphan="true", token_period="1h", token_explicit_max_ttl=7200)
    assert (await node.call("GET", "auth/token/roles/app")).data == {
        "allowed_entity_aliases": [],
        "allowed_policies": ["a", "b"],
        "allowed_policies_glob": [],
        "disallowed_policies": [],
        "disallowed_policies_glob": [],
        "explicit_max_ttl": 7200,
        "name": "app",
        "orphan": True,
        "path_suffix": "",
        "period": 3600,
        "renewable": True,
        "token_bound_cidrs": [],
        "token_explicit_max_ttl": 7200,
        "token_no_default_policy": False,
        "token_num_uses": 0,
        "token_period": 3600,
        "token_type": "default-service",
    }
    await role(node, renewable=False)
    changed = (await node.call("GET", "auth/token/roles/app")).data
    assert (changed["renewable"], changed["allowed_policies"]) == (False, ["a", "b"]), "the rest stays"
    await role(node, "other")
    for method, path in (("LIST", "auth/token/roles"), ("GET", "auth/token/roles?list=true")):
        assert (await node.call(method, path)).data == {"keys": ["app", "other"]}
    assert (await node.call("DELETE", "auth/token/roles/app")).status == 204
    assert (await node.call("DELETE", "auth/token/roles/app")).status == 204
    assert (await create(node)).errors == ["unknown role app"]
    assert (await node.call("GET", "auth/token/roles")).errors == [JOINED.format("unsupported operation")]
    assert (await node.call("POST", "auth/token/roles/-x", {})).errors == [JOINED.format("unsupported path")]
    warned = await node.call("POST", "auth/token/roles/x", {"nosuch": 1})
    assert warned.body["warnings"] == ["Endpoint ignored these unrecognized parameters: [nosuch]"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"token_type": "magic"}, 'invalid "token_type" value "magic"'),
        ({"token_num_uses": -1}, "'token_num_uses' cannot be negative"),
        ({"token_type": "batch"}, "when role is set to generate renewable tokens"),
        ({"token_type": "batch", "renewable": False, "token_period": 60}, "periodic tokens"),
        ({"token_type": "batch", "renewable": False, "explicit_max_ttl": 60}, "explicit max TTL"),
        ({"path_suffix": "a/b"}, "path suffix"),
        ({"token_bound_cidrs": "everywhere"}, "error parsing bound_cidrs"),
        ({"token_period": "soon"}, 'error converting input for field "token_period"'),
        ({"token_period": -1}, 'error converting input for field "token_period"'),
    ],
)
async def test_a_role_that_makes_no_sense_is_not_stored(node: Harness, fields: dict[str, Any], text: str) -> None:
    reply = await node.call("POST", "auth/token/roles/app", fields)
    assert reply.status == 400
    assert text in reply.errors[0]
    assert (await node.call("GET", "auth/token/roles/app")).status == 404


async def test_a_role_decides_what_its_tokens_are(node: Harness) -> None:
    caller = await node.token(CALLER)
    await role(
        node,
        allowed_policies="app,other",
        orphan=True,
        renewable=False,
        path_suffix="v1",
        token_explicit_max_ttl="1h",
        token_num_uses=5,
        token_bound_cidrs="127.0.0.0/8",
    )
    reply = await create(node, caller, policies=["app"], ttl="2h", explicit_max_ttl="3h", meta={"a": "b"})
    auth = reply.body["auth"]
    assert (auth["policies"], auth["orphan"], auth["renewable"]) == (["app", "default"], True, False)
    assert (auth["lease_duration"], auth["num_uses"], auth["token_type"]) == (3600, 5, "service")
    data = (await node.call("POST", "auth/token/lookup", {"token": auth["client_token"]})).data
    assert (data["role"], data["path"]) == ("app", "auth/token/create/app/v1")
    assert (data["explicit_max_ttl"], data["bound_cidrs"], data["meta"]) == (3600, ["127.0.0.0/8"], {"a": "b"})
    elsewhere = HttpRequest("GET", "auth/token/lookup-self", remote_address="192.0.2.1")
    elsewhere.headers["X-Vault-Token"] = auth["client_token"]
    assert (await node.service.handle(elsewhere)).status == 403
    everything = await create(node, caller)
    assert everything.body["auth"]["policies"] == ["app", "default", "other"]
    bare = await create(node, caller, policies=["app"], no_default_policy=True)
    assert bare.body["auth"]["policies"] == ["app"]
    refused = await create(node, caller, policies=["admin"])
    assert refused.status == 400
    assert 'token policies (["admin"]) must be subset of the role\'s allowed policies' in refused.errors[0]
    alias = await create(node, caller, entity_alias="x")
    assert alias.errors == ["'entity_alias' is not available: there is no identity engine"]


async def test_a_role_never_gives_root_to_who_has_it_not(node: Harness) -> None:
    caller = await node.token(CALLER)
    for fields in ({"allowed_policies": "root"}, {"disallowed_policies": "other"}, {"allowed_policies_glob": "*"}):
        await node.call("DELETE", "auth/token/roles/app")
        await role(node, **fields)
        reply = await create(node, caller, policies=["root"])
        assert reply.errors == ["root tokens may not be created without parent token being root"]
    await node.call("DELETE", "auth/token/roles/app")
    await role(node)
    assert (await create(node, caller, policies=["more"])).errors == ["child policies must be subset of parent"]


async def test_a_periodic_role_needs_no_sudo(node: Harness) -> None:
    caller = await node.token(CALLER)
    await role(node, token_period="10m", allowed_policies="app")
    auth = (await create(node, caller)).body["auth"]
    assert auth["lease_duration"] == 600
    for _ in range(3):
        node.clock.now_s += 500
        renewed = await node.call("POST", "auth/token/renew-self", {"increment": "9h"}, token=auth["client_token"])
        assert renewed.body["auth"]["lease_duration"] == 600
    own = await create(node, caller, period="1h")
    assert own.errors == ["root or sudo privileges required to create periodic token"]


async def test_a_child_of_a_role_goes_with_its_parent_and_an_orphan_stays(node: Harness) -> None:
    caller = await node.token(CALLER)
    await role(node, allowed_policies="app")
    await role(node, "free", allowed_policies="app", orphan=True)
    child = (await create(node, caller)).body["auth"]
    orphan = (await create(node, caller, "free")).body["auth"]
    assert (child["orphan"], orphan["orphan"]) == (False, True)
    await node.call("POST", "auth/token/revoke", {"token": caller})
    assert (await node.call("GET", "auth/token/lookup-self", token=child["client_token"])).status == 403
    assert (await node.call("GET", "auth/token/lookup-self", token=orphan["client_token"])).status == 200


def policies(role: TokenRole, *wanted: str, no_default: bool = False) -> list[str] | str:
    try:
        return role.policies(wanted, ["default", "own"], no_default=no_default)
    except InvalidRequest as error:
        return str(error)


def test_policies_of_a_role() -> None:
    allowed = TokenRole("r", allowed_policies=("a", "b"), allowed_policies_glob=("team-*-ro",))
    assert policies(allowed) == ["a", "b", "default"]
    assert policies(allowed, "a", "team-x-ro") == ["a", "default", "team-x-ro"]
    assert "must be subset" in policies(allowed, "team-x-rw")
    assert policies(allowed, "a", no_default=True) == ["a"]
    assert policies(allowed, "default", no_default=True) == ["default"]
    globs = TokenRole("r", allowed_policies_glob=("team-*",))
    assert policies(globs) == ["default"]
    denied = TokenRole("r", disallowed_policies=("admin", "default"), disallowed_policies_glob=("*-rw", "x*y*z"))
    assert policies(denied) == ["own"]
    assert policies(denied, "anything") == ["anything"]
    for name in ("admin", "a-rw", "xyz", "x1y2z", "default"):
        assert policies(denied, name) == f'token policy "{name}" is disallowed by this role'
    for name in ("rw", "xy", "yxz", "xzy"):
        assert policies(denied, name) == [name]
    both = TokenRole("r", allowed_policies=("a", "b"), disallowed_policies=("b",))
    assert policies(both) == 'token policy "b" is disallowed by this role'
    assert policies(both, "a") == ["a", "default"]


async def test_roles_are_the_whole_sets_and_tokens_each_clusters() -> None:
    async with primary_and_secondary() as (primary, secondary):
        await role(primary, allowed_policies="app")
        await replicate(primary, secondary)
        auth = (await create(secondary)).body["auth"]
        assert auth["policies"] == ["app", "default"]
        assert (await primary.call("GET", "auth/token/lookup-self", token=auth["client_token"])).status == 403
        await role(secondary, "from-below", orphan=True)
        assert (await primary.call("GET", "auth/token/roles/from-below")).data["orphan"]
        await replicate(primary, secondary)
        assert (await secondary.call("LIST", "auth/token/roles")).data["keys"] == ["app", "from-below"]
        assert (await secondary.call("DELETE", "auth/token/roles/from-below")).status == 204
        assert (await primary.call("GET", "auth/token/roles/from-below")).status == 404


# -- batch tokens


async def test_a_batch_token_refuses_what_it_cannot_do(node: Harness) -> None:
    await role(node, "batch", token_type="batch", renewable=False, orphan=True, allowed_policies="default")
    await role(node, "either", token_type="default-batch", allowed_policies="default")
    auth = (await create(node, name="batch", type="service")).body["auth"]
    assert (auth["token_type"], auth["accessor"], auth["renewable"]) == ("batch", "", False)
    assert (await create(node, name="either")).body["auth"]["token_type"] == "batch"
    assert (await create(node, name="either", type="service")).body["auth"]["token_type"] == "service"
    token = auth["client_token"]
    assert token.startswith("hvb.")
    assert (await node.call("GET", "auth/token/lookup-self", token=token)).data["type"] == "batch"
    for path, text in (
        ("renew-self", "batch tokens cannot be renewed"),
        ("revoke-self", "batch tokens cannot be revoked"),
    ):
        assert (await node.call("POST", f"auth/token/{path}", {}, token=token)).errors == [text]
    assert (await node.call("POST", "auth/token/revoke", {"token": token})).errors == ["batch tokens cannot be revoked"]
    cubbyhole = await node.call("POST", "cubbyhole/a", {"x": 1}, token=token)
    assert cubbyhole.errors == ['cubbyhole operations are only supported by "service" type tokens']
    periodic = await node.call("POST", "auth/token/create", {"type": "batch", "period": "1h", "policies": "default"})
    assert periodic.errors == ['batch tokens cannot have "period" set']
    root = await node.call("POST", "auth/token/create", {"type": "batch"})
    assert root.errors == ["batch tokens cannot be root tokens"]


async def test_orphan_batch_tokens_count_on_every_cluster_of_the_set() -> None:
    async with primary_and_secondary() as (primary, secondary):
        await with_kv(primary)
        await primary.call("PUT", "sys/policies/acl/app", {"policy": 'path "secret/*" { capabilities = ["read"] }'})
        await with_bob(primary, token_policies="app", token_type="batch")
        await primary.call("POST", "secret/data/a", {"data": {"x": 1}})
        await replicate(primary, secondary)
        login = await secondary.call("POST", "auth/userpass/login/bob", {"password": "pw"}, token=None)
        for maker in (primary, secondary):
            fields = {"type": "batch", "policies": ["app"], "no_parent": True}
            made = (await maker.call("POST", "auth/token/create", fields)).body["auth"]["client_token"]
            for token in (made, login.body["auth"]["client_token"]):
                for cluster in (primary, secondary):
                    assert (await cluster.call("GET", "secret/data/a", token=token)).data["data"] == {"x": 1}
                    assert (await cluster.call("GET", "auth/token/lookup-self", token=token)).status == 200
            parent = (await maker.call("POST", "auth/token/create", {"ttl": "1h"})).body["auth"]["client_token"]
            fields = {"type": "batch", "policies": ["app"]}
            child = (await maker.call("POST", "auth/token/create", fields, token=parent)).body["auth"]["client_token"]
            other = secondary if maker is primary else primary
            assert (await maker.call("GET", "secret/data/a", token=child)).status == 200
            assert (await other.call("GET", "secret/data/a", token=child)).status == 403, (
                "its parent is not known there"
            )
            await maker.call("POST", "auth/token/revoke", {"token": parent})
            assert (await maker.call("GET", "secret/data/a", token=child)).status == 403


# -- tidy and hvac


async def test_tidy_is_accepted_and_done(node: Harness) -> None:
    work = asyncio.create_task(node.service.run())
    reply = await node.call("POST", "auth/token/tidy", {})
    assert reply.status == 202
    assert reply.body["warnings"][0].startswith("Tidy operation successfully started.")
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    await node.call("POST", "auth/token/tidy", {})
    again = await node.call("POST", "auth/token/tidy", {})
    assert (again.status, again.body["warnings"]) == (202, ["Tidy operation already in progress."])


def drive_hvac(address: str, root: str) -> None:
    tokens = hvac.Client(url=address, token=root).auth.token
    tokens.create_or_update_role(
        "nomad", allowed_policies="app", orphan=True, token_period="1h", token_explicit_max_ttl="24h", path_suffix="v1"
    )
    assert tokens.read_role("nomad")["data"]["token_period"] == 3600
    assert tokens.list_roles()["data"]["keys"] == ["nomad"]
    auth = tokens.create(role_name="nomad", policies=["app"])["auth"]
    assert (auth["policies"], auth["lease_duration"]) == (["app", "default"], 3600)
    assert auth["orphan"]
    with pytest.raises(exceptions.InvalidRequest):
        tokens.create(role_name="nomad", policies=["root"])
    tokens.delete_role("nomad")
    with pytest.raises(exceptions.InvalidPath):
        tokens.read_role("nomad")
    with pytest.raises(exceptions.InvalidRequest, match="unknown role nomad"):
        tokens.create(role_name="nomad")
    assert tokens.tidy().status_code == 202


async def test_hvac_uses_roles(node: Harness) -> None:
    await asyncio.to_thread(drive_hvac, node.address, node.root)
