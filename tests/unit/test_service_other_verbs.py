"""The second verb or spelling of endpoints whose first one other tests look at: both must say the same."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.service_node import Harness, running, with_kv


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


@pytest.mark.parametrize(
    ("method", "path", "other_method", "other_path"),
    [
        ("GET", "auth/token/lookup", "POST", "auth/token/lookup"),
        ("GET", "auth/token/lookup-self", "POST", "auth/token/lookup-self"),
        ("LIST", "sys/policies/acl", "GET", "sys/policies/acl"),
        ("LIST", "sys/policy", "GET", "sys/policy"),
        ("LIST", "sys/plugins/catalog", "GET", "sys/plugins/catalog"),
        ("GET", "sys/internal/specs/openapi", "POST", "sys/internal/specs/openapi"),
    ],
)
async def test_two_ways_to_ask_one_thing(
    node: Harness, method: str, path: str, other_method: str, other_path: str
) -> None:
    one = await node.call(method, path)
    other = await node.call(other_method, other_path, {} if other_method == "POST" else None)
    assert (one.status, other.status) == (200, 200)
    assert one.body.get("data") == other.body.get("data")


async def test_lists_by_reading(node: Harness) -> None:
    assert (await node.call("GET", "sys/policies/password")).status == 404
    body = {"policy": 'length = 9 rule "charset" { charset = "abc" }'}
    await node.call("PUT", "sys/policies/password/p", body)
    assert (await node.call("GET", "sys/policies/password")).data == {"keys": ["p"]}
    await node.call("PUT", "sys/config/ui/headers/x-a", {"values": "v"})
    assert (await node.call("GET", "sys/config/ui/headers")).data == {"keys": ["x-a"]}


async def test_tokens_are_ended_by_accessor_and_without_their_children(node: Harness) -> None:
    parent = (await node.call("POST", "auth/token/create", {})).body["auth"]
    child = (await node.call("POST", "auth/token/create", {}, token=parent["client_token"])).body["auth"]
    ended = await node.call("POST", "auth/token/revoke-orphan", {"token": parent["client_token"]})
    assert ended.status == 204
    looked_up = await node.call("POST", "auth/token/lookup", {"token": child["client_token"]})
    assert looked_up.data["orphan"] is True
    assert (await node.call("POST", "auth/token/revoke-accessor", {"accessor": child["accessor"]})).status == 204
    assert (await node.call("GET", "auth/token/lookup-self", token=child["client_token"])).status == 403


async def test_a_policy_is_deleted_in_the_older_form_too(node: Harness) -> None:
    await node.call("PUT", "sys/policy/p", {"policy": 'path "a" { capabilities = ["read"] }'})
    assert (await node.call("DELETE", "sys/policy/p")).status == 204
    assert (await node.call("GET", "sys/policies/acl/p")).status == 404


async def test_a_wrapping_token_looks_itself_up(node: Harness) -> None:
    await with_kv(node, "1")
    await node.call("PUT", "secret/a", {"x": "1"})
    token = (await node.call("GET", "secret/a", X_Vault_Wrap_TTL="60")).body["wrap_info"]["token"]
    looked_up = await node.call("GET", "sys/wrapping/lookup", token=token)
    assert looked_up.data["creation_path"] == "secret/a"
    assert (await node.call("POST", "sys/wrapping/unwrap", {}, token=token)).data == {"x": "1"}


async def test_a_cubbyhole_names_its_type_like_any_mount(node: Harness) -> None:
    await node.call("POST", "cubbyhole/a", {"b": "c"})
    assert (await node.call("GET", "cubbyhole/a")).body["mount_type"] == "cubbyhole"
    assert (await node.call("LIST", "cubbyhole")).body["mount_type"] == "cubbyhole"


async def test_the_configuration_without_secrets(node: Harness) -> None:
    reply = await node.call("GET", "sys/config/state/sanitized")
    assert (reply.status, reply.data) == (200, {})


async def test_the_index_of_profiles(node: Harness) -> None:
    async with node.session.get(f"{node.address}/v1/sys/pprof", headers={"X-Vault-Token": node.root}) as answer:
        assert "goroutine" in await answer.text()
