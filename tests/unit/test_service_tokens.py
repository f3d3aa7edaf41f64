"""Tokens, policies and response wrapping over HTTP."""

import asyncio
from collections.abc import AsyncIterator

import jwt
import pytest

from sidecar.request.types import HttpRequest
from tests.support.service_node import (
    DENIED,
    JOINED,
    Harness,
    log_in,
    running,
    with_bob,
    with_kv,
)


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


async def test_without_a_token_that_counts_there_is_nothing(node: Harness) -> None:
    for token in (None, "", "hvs.nothing", "s.x", "a.b.c"):
        for path in ("sys/mounts", "nosuch/x", "auth/token/lookup-self", "cubbyhole/a"):
            reply = await node.call("GET", path, token=token)
            assert (reply.status, reply.errors) == (403, ["permission denied"])


async def test_a_bearer_token_counts(node: Harness) -> None:
    reply = await node.call("GET", "sys/mounts", token=None, Authorization=f"Bearer {node.root}")
    assert reply.status == 200


async def test_policies_deny_by_default(node: Harness) -> None:
    await with_kv(node)
    token = await node.token('path "secret/data/a" { capabilities = ["create", "read"] }')
    assert (await node.call("POST", "secret/data/a", {"data": {"n": 1}}, token=token)).status == 200
    assert (await node.call("GET", "secret/data/a", token=token)).status == 200
    again = await node.call("POST", "secret/data/a", {"data": {"n": 2}}, token=token)
    assert (again.status, again.errors) == (403, [DENIED]), "create does not include update"
    for method, path in (("GET", "secret/data/b"), ("LIST", "secret/metadata"), ("GET", "sys/mounts"), ("GET", "no/x")):
        reply = await node.call(method, path, token=token)
        assert (reply.status, reply.errors) == (403, [DENIED])
    assert (await node.call("GET", "no/x")).errors == ['no handler for route "no/x". route entry not found.']


async def test_what_a_path_is_like_is_said_to_those_who_may_know(node: Harness) -> None:
    await with_kv(node)
    token = await node.token('path "other" { capabilities = ["read"] }')
    for path in ("secret/nosuch/path", "secret/data/a"):
        assert (await node.call("POST", path, {"data": "not an object"}, token=token)).errors == [DENIED]
    assert (await node.call("POST", "secret/nosuch/path", {})).status == 404


async def test_sudo_is_asked_for_where_it_must_be(node: Harness) -> None:
    everything = '["create", "read", "update", "delete", "list"]'
    plain = await node.token(f'path "*" {{ capabilities = {everything} }}')
    sudo = await node.token(f'path "*" {{ capabilities = {everything[:-1]}, "sudo"] }}')
    for method, path in (
        ("PUT", "sys/rotate"),
        ("PUT", "sys/step-down"),
        ("POST", "sys/auth/x"),
        ("LIST", "auth/token/accessors"),
        ("POST", "auth/token/revoke-orphan"),
        ("POST", "sys/replication/performance/primary/secondary-token"),
        ("POST", "sys/replication/primary/secondary-token"),
        ("POST", "sys/remount"),
        ("PUT", "sys/seal"),
    ):
        assert (await node.call(method, path, {}, token=plain)).errors == [DENIED], path
        reply = await node.call(method, path, {}, token=sudo)
        assert reply.errors != [DENIED], path
    assert node.node.asked == ["step-down", "seal"]


async def test_uses_of_a_token_are_counted(node: Harness) -> None:
    created = await node.call("POST", "auth/token/create", {"policies": ["default"], "num_uses": "2"})
    token = created.body["auth"]["client_token"]
    first = await node.call("GET", "auth/token/lookup-self", token=token)
    assert (first.status, first.data["num_uses"]) == (200, 1)
    await node.call("POST", "cubbyhole/a", {"x": "y"}, token=token)
    assert (await node.call("GET", "auth/token/lookup-self", token=token)).status == 403
    assert (await node.call("POST", "auth/token/lookup", {"token": token})).errors == ["bad token"]
    left = [key for key in node.store.entries if key.startswith("l/cubbyhole/")]
    assert left == [], "what the token kept went with its last use"


async def test_tokens_expire(node: Harness) -> None:
    created = await node.call("POST", "auth/token/create", {"policies": ["default"], "ttl": "1h"})
    token = created.body["auth"]["client_token"]
    node.clock.now_s += 3599
    assert (await node.call("GET", "auth/token/lookup-self", token=token)).data["ttl"] == 1
    node.clock.now_s += 2
    assert (await node.call("GET", "auth/token/lookup-self", token=token)).status == 403


async def test_children_have_no_more_than_their_parents(node: Harness) -> None:
    parent = await node.token(
        'path "auth/token/create" { capabilities = ["update"] }\n'
        'path "auth/token/create-orphan" { capabilities = ["update"] }'
    )
    own = (await node.call("GET", "auth/token/lookup-self", token=parent)).data["policies"]
    child = await node.call("POST", "auth/token/create", {"ttl": "1h"}, token=parent)
    assert child.body["auth"]["policies"] == own
    assert child.body["auth"]["orphan"] is False
    cases = {
        "root or sudo privileges required to create orphan token": {"no_parent": True},
        "root or sudo privileges required to specify token id": {"id": "mine"},
        "root or sudo privileges required to create periodic token": {"period": "1h"},
        "child policies must be subset of parent": {"policies": ["other"]},
        "number of uses cannot be negative": {"num_uses": -1},
        "'entity_alias' is only allowed in combination with token role": {"entity_alias": "x"},
    }
    for text, body in cases.items():
        reply = await node.call("POST", "auth/token/create", body, token=parent)
        assert (reply.status, reply.errors) == (400, [text])
    reply = await node.call("POST", "auth/token/create", {"policies": ["root"]}, token=parent)
    assert reply.status == 400
    orphan = await node.call("POST", "auth/token/create-orphan", {}, token=parent)
    assert orphan.body["auth"]["orphan"] is True
    assert (await node.call("POST", "auth/token/create/nosuch", {})).errors == ["unknown role nosuch"]
    assert (await node.call("POST", "auth/token/revoke", {"token": parent})).status == 204
    assert (await node.call("GET", "auth/token/lookup-self", token=child.body["auth"]["client_token"])).status == 403
    alive = orphan.body["auth"]["client_token"]
    assert (await node.call("GET", "auth/token/lookup-self", token=alive)).status == 200


async def test_the_root_token_looks_like_one(node: Harness) -> None:
    data = (await node.call("GET", "auth/token/lookup-self")).data
    assert data["path"] == "auth/token/root"
    assert (data["ttl"], data["expire_time"], data["policies"], data["orphan"]) == (0, None, ["root"], True)
    assert "issue_time" not in data
    assert "renewable" not in data
    assert data["id"] == node.root


async def test_token_calls_answer_as_clients_expect(node: Harness) -> None:
    token = (await node.call("POST", "auth/token/create", {"ttl": 60})).body["auth"]
    secret = token["client_token"]
    renewed = await node.call("POST", "auth/token/renew-self", {"increment": 120}, token=secret)
    assert renewed.body["auth"]["lease_duration"] == 120
    assert (await node.call("POST", "auth/token/renew", {"token": "nosuch"})).errors == ["token not found"]
    assert (await node.call("POST", "auth/token/renew-self", {})).errors == ["lease is not renewable"]
    by_accessor = await node.call("POST", "auth/token/renew-accessor", {"accessor": token["accessor"]})
    assert by_accessor.body["auth"]["client_token"] == ""
    assert (await node.call("POST", "auth/token/revoke", {"token": "nosuch"})).status == 204
    for path in ("lookup-accessor", "renew-accessor"):
        unknown = await node.call("POST", f"auth/token/{path}", {"accessor": "nosuch"})
        assert (unknown.status, unknown.errors) == (400, [JOINED.format("invalid accessor")]), path
    gone = await node.call("POST", "auth/token/revoke-accessor", {"accessor": "nosuch"})
    assert (gone.status, gone.body["warnings"]) == (200, ["No token found with this accessor"])
    unknown = await node.call("POST", "sys/capabilities-accessor", {"accessor": "nosuch", "path": "x"})
    assert (unknown.status, unknown.errors) == (400, [JOINED.format("invalid accessor")])
    assert (await node.call("POST", "auth/token/revoke-self", {}, token=secret)).status == 204
    assert (await node.call("GET", "auth/token/lookup-self", token=secret)).status == 403
    assert (await node.call("GET", "auth/token/nosuch")).errors == [JOINED.format("unsupported path")]
    wrong = await node.call("GET", "auth/token/create")
    assert (wrong.status, wrong.errors) == (405, [JOINED.format("unsupported operation")])


async def test_a_cubbyhole_is_its_tokens_alone(node: Harness) -> None:
    other = (await node.call("POST", "auth/token/create", {"ttl": "1h"})).body["auth"]["client_token"]
    assert (await node.call("POST", "cubbyhole/a/b", {"x": "y"}, token=other)).status == 204
    assert (await node.call("GET", "cubbyhole/a/b", token=other)).data == {"x": "y"}
    assert (await node.call("LIST", "cubbyhole", token=other)).data["keys"] == ["a/"]
    assert (await node.call("GET", "cubbyhole/a/b")).status == 404
    assert (await node.call("LIST", "cubbyhole")).status == 404
    assert (await node.call("DELETE", "cubbyhole/a/b", token=other)).status == 204
    assert (await node.call("GET", "cubbyhole/a/b", token=other)).status == 404


async def test_tokens_bound_to_addresses_count_from_there_only(node: Harness) -> None:
    await with_bob(node, token_bound_cidrs="10.0.0.0/8")
    assert (await log_in(node)).status == 403
    await node.call("POST", "auth/userpass/users/bob", {"token_bound_cidrs": "127.0.0.0/8"})
    auth = (await log_in(node)).body["auth"]
    assert (await node.call("GET", "auth/token/lookup-self", token=auth["client_token"])).status == 200
    elsewhere = HttpRequest("GET", "auth/token/lookup-self", remote_address="192.0.2.1")
    elsewhere.headers["X-Vault-Token"] = auth["client_token"]
    assert (await node.service.handle(elsewhere)).status == 403


async def test_a_login_makes_a_token_of_this_cluster(node: Harness) -> None:
    await with_bob(node, token_policies="dev", token_ttl="10m", token_max_ttl="20m")
    auth = (await log_in(node)).body["auth"]
    assert (auth["policies"], auth["lease_duration"], auth["metadata"]) == (
        ["default", "dev"],
        600,
        {"username": "bob"},
    )
    assert auth["orphan"] is True
    renewed = await node.call("POST", "auth/token/renew-self", {"increment": "2h"}, token=auth["client_token"])
    assert renewed.body["auth"]["lease_duration"] == 1200
    assert "capped accordingly" in renewed.body["warnings"][0]
    await node.call("POST", "auth/userpass/users/bob", {"token_policies": "root"})
    assert (await log_in(node)).errors == ["auth methods cannot create root tokens"]


async def test_disabling_an_auth_method_revokes_its_logins(node: Harness) -> None:
    await with_bob(node)
    token = (await log_in(node)).body["auth"]["client_token"]
    assert (await node.call("DELETE", "sys/auth/userpass")).status == 204
    assert (await node.call("GET", "auth/token/lookup-self", token=token)).status == 403


async def test_an_answer_is_wrapped_and_unwrapped_once(node: Harness) -> None:
    await with_kv(node)
    await node.call("POST", "secret/data/a", {"data": {"x": 1}})
    wrapped = await node.call("GET", "secret/data/a", X_Vault_Wrap_TTL="5m")
    info = wrapped.body["wrap_info"]
    assert (wrapped.body["request_id"], wrapped.body["data"], wrapped.body["auth"]) == ("", None, None)
    assert (info["ttl"], info["creation_path"]) == (300, "secret/data/a")
    looked = await node.call("POST", "sys/wrapping/lookup", {"token": info["token"]}, token=None)
    assert looked.data["creation_path"] == "secret/data/a"
    answers = await asyncio.gather(*(node.call("POST", "sys/wrapping/unwrap", token=info["token"]) for _ in range(8)))
    assert sorted(answer.status for answer in answers) == [200] + [400] * 7
    (winner,) = (answer for answer in answers if answer.status == 200)
    assert winner.data["data"] == {"x": 1}
    loser = next(answer for answer in answers if answer.status == 400)
    assert loser.errors == ["wrapping token is not valid or does not exist"]


async def test_a_wrapping_token_can_be_redeemed_by_parameter(node: Harness) -> None:
    wrapped = await node.call("POST", "sys/wrapping/wrap", {"a": "b"}, X_Vault_Wrap_TTL="60")
    token = wrapped.body["wrap_info"]["token"]
    nobody = await node.call("POST", "sys/wrapping/unwrap", {"token": token}, token=None)
    assert (nobody.status, nobody.errors) == (403, ["permission denied"])
    new = (await node.call("POST", "sys/wrapping/rewrap", {"token": token})).body["wrap_info"]["token"]
    assert (await node.call("POST", "sys/wrapping/unwrap", {"token": token})).status == 400
    assert (await node.call("POST", "sys/wrapping/unwrap", {"token": new})).data == {"a": "b"}


async def test_a_wrapping_token_is_no_other_token(node: Harness) -> None:
    wrapped = await node.call("POST", "sys/wrapping/wrap", {"a": "b"}, X_Vault_Wrap_TTL="60")
    token = wrapped.body["wrap_info"]["token"]
    assert (await node.call("GET", "sys/mounts", token=token)).status == 403


async def test_a_wrapping_token_can_be_a_jwt(node: Harness) -> None:
    wrapped = await node.call("POST", "sys/wrapping/wrap", {"a": "b"}, X_Vault_Wrap_TTL="60", X_Vault_Wrap_Format="jwt")
    token = wrapped.body["wrap_info"]["token"]
    assert jwt.get_unverified_header(token) == {"alg": "ES512", "typ": "JWT"}
    claims = jwt.decode(token, options={"verify_signature": False})
    assert (claims["type"], claims["addr"], claims["exp"] - claims["iat"]) == ("wrapping", "http://127.0.0.1:8200", 60)
    assert (await node.call("POST", "sys/wrapping/unwrap", token=token)).data == {"a": "b"}


async def test_a_login_can_be_wrapped(node: Harness) -> None:
    await with_bob(node)
    info = (await log_in(node, X_Vault_Wrap_TTL="1m")).body["wrap_info"]
    inner = await node.call("POST", "sys/wrapping/unwrap", token=info["token"])
    assert inner.body["auth"]["accessor"] == info["wrapped_accessor"]
    assert (await node.call("GET", "auth/token/lookup-self", token=inner.body["auth"]["client_token"])).status == 200


async def test_big_numbers_survive_wrapping(node: Harness) -> None:
    wrapped = await node.call("POST", "sys/wrapping/wrap", {"a": 2**520}, X_Vault_Wrap_TTL="60")
    token = wrapped.body["wrap_info"]["token"]
    assert (await node.call("POST", "sys/wrapping/unwrap", token=token)).data == {"a": 2**520}


async def test_errors_and_empty_answers_are_not_wrapped(node: Harness) -> None:
    await with_kv(node)
    assert (await node.call("GET", "secret/data/no", X_Vault_Wrap_TTL="60")).status == 404
    assert (await node.call("POST", "cubbyhole/a", {"x": 1}, X_Vault_Wrap_TTL="60")).status == 204
    assert (await node.call("POST", "sys/wrapping/wrap", {"a": 1})).errors == [
        "endpoint requires response wrapping to be used"
    ]
    bad = await node.call("GET", "sys/mounts", X_Vault_Wrap_TTL="soon")
    assert bad.status == 400
    assert bad.errors[0].startswith("error parsing X-Vault-Wrap-TTL header: ")
    negative = await node.call("GET", "sys/mounts", X_Vault_Wrap_TTL="-1s")
    assert negative.errors == ["requested wrap ttl cannot be negative"]
