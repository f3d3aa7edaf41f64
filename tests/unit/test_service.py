"""Service and Front behind a real HTTP server on loopback: tokens, policies, wrapping, sys endpoints, as clients see them."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import hvac
import jwt
import pytest
from hvac import exceptions

from consul_backend import errors as backend
from sidecar.api.node_view import LeaderStatus, NodeHealth, NotForwarded
from sidecar.api.service import Service
from sidecar.request.types import HttpRequest, HttpResponse
from tests.support.service_node import FakeReplication, Harness, Reply, running

JOINED = "1 error occurred:\n\t* {}\n\n"
DENIED = JOINED.format("permission denied")


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


async def with_kv(harness: Harness, version: str = "2") -> None:
    reply = await harness.call("POST", "sys/mounts/secret", {"type": "kv", "options": {"version": version}})
    assert reply.status == 204, reply.errors


async def with_bob(harness: Harness, **fields: object) -> None:
    assert (await harness.call("POST", "sys/auth/userpass", {"type": "userpass"})).status == 204
    reply = await harness.call("POST", "auth/userpass/users/bob", {"password": "pw", **fields})
    assert reply.status == 204, reply.errors


async def log_in(harness: Harness, **headers: str) -> Reply:
    return await harness.call("POST", "auth/userpass/login/bob", {"password": "pw"}, token=None, **headers)


# -- hvac, the client most people have


def drive_hvac(address: str, root: str) -> None:
    client = hvac.Client(url=address, token=root)
    assert client.is_authenticated()
    client.sys.enable_secrets_engine("kv", path="secret", options={"version": "2"})
    assert "secret/" in client.sys.list_mounted_secrets_engines()["data"]
    kv = client.secrets.kv.v2
    assert kv.create_or_update_secret("app/db", {"password": "hunter2"})["data"]["version"] == 1
    read = kv.read_secret_version("app/db", raise_on_deleted_version=True)
    assert read["data"]["data"] == {"password": "hunter2"}
    assert kv.list_secrets("app")["data"]["keys"] == ["db"]
    assert client.list("secret/metadata")["data"]["keys"] == ["app/"]
    with pytest.raises(exceptions.InvalidPath):
        kv.list_secrets("nothing")
    kv.delete_latest_version_of_secret("app/db")
    with pytest.raises(exceptions.InvalidPath) as deleted:
        kv.read_secret_version("app/db", raise_on_deleted_version=True)
    assert deleted.value.json["data"]["metadata"]["deletion_time"]

    client.sys.create_or_update_policy("app", {"path": {"secret/data/app/*": {"capabilities": ["read"]}}})
    assert client.sys.list_policies()["data"]["policies"] == ["app", "default", "root"]
    assert client.sys.list_acl_policies()["data"]["keys"] == ["app", "default", "root"]
    assert json.loads(client.sys.read_policy("app")["data"]["rules"])
    client.sys.enable_auth_method("userpass", path="people")
    client.auth.userpass.create_or_update_user("bob", "pw", policies=["app"], mount_point="people")
    assert client.sys.list_auth_methods()["data"]["people/"]["type"] == "userpass"

    bob = hvac.Client(url=address)
    auth = bob.auth.userpass.login("bob", "pw", mount_point="people")["auth"]
    assert auth["policies"] == ["app", "default"]
    assert bob.auth.token.lookup_self()["data"]["display_name"] == "people-bob"
    assert bob.secrets.kv.v2.read_secret_version("app/db", version=1, raise_on_deleted_version=False) is not None
    with pytest.raises(exceptions.Forbidden):
        bob.secrets.kv.v2.create_or_update_secret("app/db", {"a": 1})
    with pytest.raises(exceptions.InvalidRequest):
        hvac.Client(url=address).auth.userpass.login("bob", "wrong", mount_point="people")

    created = client.auth.token.create(policies=["app"], ttl="1h", num_uses=3, meta={"team": "a"})["auth"]
    assert created["lease_duration"] == 3600
    token = created["client_token"]
    assert client.auth.token.lookup(token)["data"]["meta"] == {"team": "a"}
    assert client.auth.token.lookup_accessor(created["accessor"])["data"]["id"] == ""
    assert created["accessor"] in client.auth.token.list_accessors()["data"]["keys"]
    assert client.auth.token.renew(token, increment="2h")["auth"]["lease_duration"] == 7200
    client.auth.token.revoke(token)
    with pytest.raises(exceptions.Forbidden, match="bad token"):
        client.auth.token.lookup(token)

    wrapped = client.auth.token.create(policies=["app"], wrap_ttl="60s")
    assert wrapped["wrap_info"]["ttl"] == 60
    unwrapped = hvac.Client(url=address, token=wrapped["wrap_info"]["token"]).sys.unwrap()
    assert unwrapped["auth"]["client_token"].startswith("hvs.")
    with pytest.raises(exceptions.InvalidRequest):
        client.sys.unwrap(wrapped["wrap_info"]["token"])

    assert client.sys.read_health_status(method="GET")["initialized"]
    assert client.sys.read_health_status().status_code == 200
    assert client.sys.read_leader_status()["ha_enabled"]
    term = client.sys.get_encryption_key_status()["term"]
    client.sys.rotate_encryption_key()
    assert client.sys.get_encryption_key_status()["term"] == term + 1
    assert client.sys.get_capabilities(["sys/mounts"])["capabilities"] == ["root"]
    client.sys.tune_auth_method("people", max_lease_ttl="1h")
    assert client.sys.read_auth_method_tuning("people")["data"]["max_lease_ttl"] == 3600
    client.sys.disable_auth_method("people")
    assert not bob.is_authenticated()
    client.sys.disable_secrets_engine("secret")
    assert client.sys.seal().status_code == 204


async def test_hvac_does_its_daily_work(node: Harness) -> None:
    await asyncio.to_thread(drive_hvac, node.address, node.root)
    assert node.node.asked == ["seal"]


# -- tokens and policies


async def test_without_a_token_that_counts_there_is_nothing(node: Harness) -> None:
    for token in (None, "", "hvs.nothing", "x" * 9000 if False else "s.x", "a.b.c"):
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


async def test_sudo_is_asked_for_where_it_must_be(node: Harness) -> None:
    everything = '["create", "read", "update", "delete", "list"]'
    plain = await node.token(f'path "*" {{ capabilities = {everything} }}')
    sudo = await node.token(f'path "*" {{ capabilities = {everything[:-1]}, "sudo"] }}')
    for method, path in (
        ("PUT", "sys/rotate"),
        ("PUT", "sys/seal"),
        ("PUT", "sys/step-down"),
        ("POST", "sys/auth/x"),
        ("LIST", "auth/token/accessors"),
        ("POST", "auth/token/revoke-orphan"),
        ("POST", "sys/replication/performance/primary/secondary-token"),
        ("POST", "sys/replication/primary/secondary-token"),
        ("POST", "sys/remount"),
    ):
        assert (await node.call(method, path, {}, token=plain)).errors == [DENIED], path
        reply = await node.call(method, path, {}, token=sudo)
        assert reply.errors != [DENIED], path
    assert node.node.asked == ["seal", "step-down"] or node.node.asked == ["seal"]


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
    token = await node.token("")if False else (await node.call("POST", "auth/token/create", {"ttl": 60})).body["auth"]
    secret = token["client_token"]
    renewed = await node.call("POST", "auth/token/renew-self", {"increment": 120}, token=secret)
    assert renewed.body["auth"]["lease_duration"] == 120
    assert (await node.call("POST", "auth/token/renew", {"token": "nosuch"})).errors == ["bad token"]
    assert (await node.call("POST", "auth/token/renew-self", {})).errors == ["lease is not renewable"]
    by_accessor = await node.call("POST", "auth/token/renew-accessor", {"accessor": token["accessor"]})
    assert by_accessor.body["auth"]["client_token"] == ""
    assert (await node.call("POST", "auth/token/revoke", {"token": "nosuch"})).status == 204
    unknown = await node.call("POST", "auth/token/revoke-accessor", {"accessor": "nosuch"})
    assert (unknown.status, unknown.errors) == (400, [JOINED.format("invalid accessor")])
    assert (await node.call("POST", "auth/token/lookup-accessor", {"accessor": "nosuch"})).errors == ["invalid accessor"]
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
    assert (await log_in(node)).status == 400
    await node.call("POST", "auth/userpass/users/bob", {"token_bound_cidrs": "127.0.0.0/8"})
    auth = (await log_in(node)).body["auth"]
    assert (await node.call("GET", "auth/token/lookup-self", token=auth["client_token"])).status == 200
    elsewhere = HttpRequest("GET", "auth/token/lookup-self", remote_address="192.0.2.1")
    elsewhere.headers["X-Vault-Token"] = auth["client_token"]
    assert (await node.service.handle(elsewhere)).status == 403


async def test_a_login_makes_a_token_of_this_cluster(node: Harness) -> None:
    await with_bob(node, token_policies="dev", token_ttl="10m", token_max_ttl="20m")
    auth = (await log_in(node)).body["auth"]
    assert (auth["policies"], auth["lease_duration"], auth["metadata"]) == (["default", "dev"], 600, {"username": "bob"})
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


# -- wrapping


async def test_an_answer_is_wrapped_and_unwrapped_once(node: Harness) -> None:
    await with_kv(node)
    await node.call("POST", "secret/data/a", {"data": {"x": 1}})
    wrapped = await node.call("GET", "secret/data/a", X_Vault_Wrap_TTL="5m")
    info = wrapped.body["wrap_info"]
    assert (wrapped.body["request_id"], wrapped.body["data"], wrapped.body["auth"]) == ("", None, None)
    assert (info["ttl"], info["creation_path"]) == (300, "secret/data/a")
    looked = await node.call("POST", "sys/wrapping/lookup", {"token": info["token"]}, token=None)
    assert looked.data["creation_path"] == "secret/data/a"
    answers = await asyncio.gather(
        *(node.call("POST", "sys/wrapping/unwrap", token=info["token"]) for _ in range(8))
    )
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


# -- requests


async def test_bodies_may_be_many_things(node: Harness) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded", "X-Vault-Token": node.root}
    for body, data in (
        (b'{"x": "y"}', {"x": "y"}),
        (b"x=y&z=1&z=2", {"x": "y", "z": "1,2"}),
        (b"name=x", {"name": "x"}),
    ):
        async with node.session.post(f"{node.address}/v1/cubbyhole/a", data=body, headers=form) as answer:
            assert answer.status == 204
        assert (await node.call("GET", "cubbyhole/a")).data == data
    for body in (b"null", b"", b"{}"):
        async with node.session.post(f"{node.address}/v1/sys/rotate", data=body, headers=form) as answer:
            assert answer.status == 204
    for body in (b"[]", b"{", b'"x"', b"1", b'{"a":1,"a":2}', b"\xff\xfe{"):
        headers = {"X-Vault-Token": node.root}
        async with node.session.post(f"{node.address}/v1/cubbyhole/a", data=body, headers=headers) as answer:
            assert answer.status == 400
            assert (await answer.json())["errors"][0].startswith("error parsing JSON")


async def test_list_is_a_verb_or_a_parameter(node: Harness) -> None:
    await node.call("POST", "cubbyhole/a/b", {"x": 1})
    for method, path in (("LIST", "cubbyhole/a"), ("GET", "cubbyhole/a?list=true"), ("GET", "cubbyhole/a/?list=1")):
        assert (await node.call(method, path)).data == {"keys": ["b"]}
    assert (await node.call("GET", "cubbyhole/a?list=false")).status == 404
    bad = await node.call("GET", "cubbyhole/a?list=maybe")
    assert (bad.status, bad.body) == (400, {"errors": []})
    empty = await node.call("LIST", "cubbyhole/nothing")
    assert (empty.status, empty.body) == (404, {"errors": []})


async def test_requests_that_make_no_sense(node: Harness) -> None:
    slash = await node.call("POST", "cubbyhole/a/", {"x": 1})
    assert (slash.status, slash.errors) == (400, ["cannot write to a path ending in '/'"])
    assert (await node.call("PATCH", "cubbyhole/a", {"x": 1})).status == 415
    forward = await node.call("GET", "sys/mounts", X_Vault_Forward="active-node")
    assert forward.errors == ["forwarding via header X-Vault-Forward disabled in configuration"]
    namespace = await node.call("GET", "sys/mounts", X_Vault_Namespace="team")
    assert (namespace.status, namespace.errors) == (403, ["namespaces feature not enabled"])
    assert (await node.call("GET", "sys/mounts", X_Vault_Namespace="")).status == 200
    assert (await node.call("GET", "cubbyhole/a?help=1")).body["help"]


async def test_what_the_store_refuses_reaches_the_client_as_such(node: Harness) -> None:
    for error, status in (
        (backend.Overloaded("q"), 503),
        (backend.OutcomeUnknown("q"), 500),
        (backend.TooLarge("600000 bytes over the limit"), 413),
        (RuntimeError("hvs.secret"), 500),
    ):
        node.store.fail_next = error
        reply = await node.call("POST", "cubbyhole/a", {"x": 1})
        assert reply.status == status
        assert "hvs.secret" not in str(reply.body)


async def test_a_request_says_which_index_it_reached(node: Harness) -> None:
    request = HttpRequest("POST", "cubbyhole/a", body=b'{"x":1}')
    request.headers["X-Vault-Token"] = node.root
    written = await node.service.handle(request)
    assert written.position == node.store.index
    read = await node.service.handle(replace(request, method="GET", body=b""))
    assert (read.status, read.position) == (200, 0)


# -- sys


async def test_mounts(node: Harness) -> None:
    assert set((await node.call("GET", "sys/mounts")).data) == {"cubbyhole/", "sys/"}
    cases = {
        "cannot mount \"sys/x/\"": ("sys/x", {"type": "kv"}),
        "plugin not found in the catalog: nosuch": ("a", {"type": "nosuch"}),
        "backend type must be specified as a string": ("a", {}),
    }
    for text, (path, body) in cases.items():
        assert (await node.call("POST", f"sys/mounts/{path}", body)).errors == [text]
    await with_kv(node)
    twice = await node.call("POST", "sys/mounts/secret", {"type": "kv"})
    assert twice.errors == ["path is already in use at secret/"]
    listed = await node.call("GET", "sys/mounts")
    assert listed.body["secret/"] == listed.data["secret/"]
    assert listed.data["secret/"]["options"] == {"version": "2"}
    tuned = await node.call("POST", "sys/mounts/secret/tune", {"default_lease_ttl": "1h", "description": "d"})
    assert tuned.status == 204
    tuning = (await node.call("GET", "sys/mounts/secret/tune")).data
    assert (tuning["default_lease_ttl"], tuning["max_lease_ttl"], tuning["description"]) == (3600, 2764800, "d")
    assert (await node.call("GET", "sys/mounts/no/tune")).errors == ['cannot fetch sysview for path "no/"']
    downgrade = await node.call("POST", "sys/mounts/secret/tune", {"options": {"version": "1"}})
    assert downgrade.status == 400
    await node.call("POST", "secret/data/a", {"data": {"x": 1}})
    assert (await node.call("POST", "sys/remount", {"from": "secret", "to": "moved"})).status == 204
    assert (await node.call("GET", "moved/data/a")).data["data"] == {"x": 1}
    assert (await node.call("GET", "secret/data/a")).status == 404
    assert (await node.call("DELETE", "sys/mounts/sys")).errors == ['cannot unmount "sys/"']
    assert (await node.call("DELETE", "sys/mounts/moved/")).status == 204
    assert (await node.call("DELETE", "sys/mounts/moved")).status == 204
    assert (await node.call("DELETE", "sys/auth/token")).errors == ["token credential backend cannot be disabled"]
    aliased = await node.call("POST", "sys/mounts/kv2", {"type": "kv-v2"})
    assert aliased.status == 204
    assert (await node.call("GET", "sys/mounts")).data["kv2/"]["options"] == {"version": "2"}


async def test_the_data_of_an_unmounted_engine_is_deleted(node: Harness) -> None:
    await with_kv(node)
    for number in range(60):
        await node.call("POST", f"secret/data/{number}", {"data": {"x": number}})
    uuid = (await node.call("GET", "sys/mounts")).data["secret/"]["uuid"]
    assert any(uuid in key for key in node.store.entries)
    running_service = asyncio.create_task(node.service.run())
    await node.call("DELETE", "sys/mounts/secret")
    async with asyncio.timeout(10):
        while any(uuid in key for key in node.store.entries):
            await asyncio.sleep(0)
    running_service.cancel()
    await asyncio.gather(running_service, return_exceptions=True)


async def test_policies(node: Harness) -> None:
    text = 'path "a" { capabilities = ["read"] }'
    assert (await node.call("PUT", "sys/policies/acl/Mine", {"policy": text})).status == 204
    assert (await node.call("GET", "sys/policies/acl/mine")).data == {"name": "mine", "policy": text}
    legacy = await node.call("GET", "sys/policy/mine")
    assert (legacy.data, legacy.body["rules"]) == ({"name": "mine", "rules": text}, text)
    assert (await node.call("GET", "sys/policies/acl?list=true")).data["keys"] == ["default", "mine", "root"]
    assert (await node.call("PUT", "sys/policies/acl/x", {})).errors == ["'policy' parameter not supplied or empty"]
    bad = await node.call("PUT", "sys/policies/acl/x", {"policy": "path {"})
    assert bad.errors[0].startswith("failed to parse policy: ")
    assert (await node.call("PUT", "sys/policies/acl/root", {"policy": text})).errors == ['cannot update "root" policy']
    assert (await node.call("DELETE", "sys/policies/acl/root")).errors == ['cannot delete "root" policy']
    assert (await node.call("DELETE", "sys/policies/acl/mine")).status == 204
    gone = await node.call("GET", "sys/policies/acl/mine")
    assert (gone.status, gone.body) == (404, {"errors": []})


async def test_capabilities(node: Harness) -> None:
    token = await node.token('path "secret/*" { capabilities = ["read", "list"] }')
    own = await node.call("POST", "sys/capabilities-self", {"paths": ["secret/a", "other"]}, token=token)
    assert own.data == {"secret/a": ["list", "read"], "other": ["deny"]}
    one = await node.call("POST", "sys/capabilities", {"path": "secret/a", "token": token})
    assert one.data["capabilities"] == ["list", "read"]
    assert one.body["capabilities"] == ["list", "read"]
    accessor = (await node.call("POST", "auth/token/lookup", {"token": token})).data["accessor"]
    by = await node.call("POST", "sys/capabilities-accessor", {"path": "x", "accessor": accessor})
    assert by.data["capabilities"] == ["deny"]
    for path in ("sys/replication/primary/enable", "sys/replication/secondary/enable"):
        legacy = await node.call("POST", "sys/capabilities-self", {"path": path})
        assert legacy.data["capabilities"] == ["root"]


async def test_what_the_cli_and_the_ui_ask_about_mounts(node: Harness) -> None:
    await with_kv(node)
    token = await node.token('path "secret/data/app/*" { capabilities = ["read"] }')
    found = await node.call("GET", "sys/internal/ui/mounts/secret/app/db", token=token)
    assert (found.data["path"], found.data["options"]["version"]) == ("secret/", "2")
    for path in ("other/x", "sys/x", "nosuch"):
        denied = await node.call("GET", f"sys/internal/ui/mounts/{path}", token=token)
        assert denied.status == 403
        assert denied.errors == [
            "preflight capability check returned 403, please ensure client's policies grant access to "
            f'path "{path}/"'
        ]
    assert (await node.call("GET", "sys/internal/ui/mounts/secret", token=None)).status == 403
    assert (await node.call("GET", "sys/internal/ui/mounts", token=None)).data == {"auth": {}, "secret": {}}
    await node.call("POST", "sys/mounts/secret/tune", {"listing_visibility": "unauth"})
    shown = (await node.call("GET", "sys/internal/ui/mounts", token=None)).data["secret"]["secret/"]
    assert shown == {"description": "", "options": {"version": "2"}, "type": "kv"}
    assert "secret/" in (await node.call("GET", "sys/internal/ui/mounts", token=token)).data["secret"]
    assert (await node.call("GET", "sys/internal/ui/resultant-acl")).data == {"root": True}
    assert (await node.call("GET", "sys/internal/ui/namespaces")).data == {"keys": [""]}
    assert (await node.call("GET", "sys/license/features", token=None)).body["features"]
    assert (await node.call("GET", "sys/internal/ui/feature-flags", token=None)).body == {"feature_flags": None}


async def test_a_root_token_from_key_shares(node: Harness) -> None:
    before = await node.call("GET", "sys/generate-root/attempt", token=None)
    assert (before.body["started"], before.body["otp_length"], before.body["required"]) == (False, 28, 2)
    begun = (await node.call("PUT", "sys/generate-root/attempt", {}, token=None)).body
    assert begun["started"]
    twice = await node.call("PUT", "sys/generate-root/attempt", {}, token=None)
    assert twice.errors == ["root generation already in progress"]
    hidden = (await node.call("GET", "sys/generate-root/attempt", token=None)).body
    assert (hidden["otp"], len(begun["otp"])) == ("", 28)

    async def provide(key: str, nonce: str = begun["nonce"]) -> Reply:
        return await node.call("PUT", "sys/generate-root/update", {"key": key, "nonce": nonce}, token=None)

    wrong = await provide(node.keys[0].hex(), "x")
    assert wrong.errors[0].startswith("incorrect nonce supplied; nonce for this root generation operation is ")
    assert (await provide("zz!")).errors == ["'key' must be a valid hex or base64 string"]
    assert (await provide("00ff")).errors == ["invalid key: key is shorter than minimum 16 bytes"]
    first = await provide(node.keys[0].hex())
    assert (first.body["progress"], first.body["complete"], first.body["otp_length"]) == (1, False, 0)
    assert (await provide(node.keys[0].hex())).errors == [
        "given key has already been provided during this generation operation"
    ]
    other = await provide(bytes([node.keys[1][0] ^ 1, *node.keys[1][1:]]).hex())
    assert other.errors == ["root generation aborted: cipher: message authentication failed"]
    assert (await node.call("GET", "sys/generate-root/attempt", token=None)).body["progress"] == 0
    await provide(base64.b64encode(node.keys[2]).decode())
    done = (await provide(node.keys[1].hex())).body
    assert done["complete"]
    assert "=" not in done["encoded_token"]
    raw = base64.b64decode(done["encoded_token"] + "==")
    token = bytes(left ^ right for left, right in zip(raw, begun["otp"].encode(), strict=True)).decode()
    assert (await node.call("GET", "auth/token/lookup-self", token=token)).data["policies"] == ["root"]
    assert (await provide(node.keys[0].hex())).errors == ["no root generation in progress"]
    assert (await node.call("PUT", "sys/generate-root/attempt", {"otp": "x"}, token=None)).errors == [
        "OTP string is wrong length"
    ]
    assert (await node.call("DELETE", "sys/generate-root/attempt", token=None)).status == 204


# -- the front


async def test_health_has_a_code_for_each_state(node: Harness) -> None:
    states = {
        "uninitcode": NodeHealth(False, True, True),
        "sealedcode": NodeHealth(True, True, True),
        "drsecondarycode": NodeHealth(True, False, True, "disabled", "secondary"),
        "standbycode": NodeHealth(True, False, True, "primary", "disabled"),
        "activecode": NodeHealth(True, False, False, "primary", "disabled", "n", "i", 7),
    }
    for (name, state), status in zip(states.items(), (501, 503, 472, 429, 200), strict=True):
        node.node.state = state
        reply = await node.call("GET", "sys/health", token=None)
        assert reply.status == status
        assert (await node.call("GET", f"sys/health?{name}=299", token=None)).status == 299
        assert reply.body["replication_dr_mode"] == state.dr_mode
        assert ("cluster_id" in reply.body) is not state.sealed
        assert (await node.call("HEAD", "sys/health", token=None)).body is None
    assert reply.body["last_wal"] == 7
    node.node.state = states["standbycode"]
    for query, status in (("standbyok", 200), ("standbyok=true", 200), ("standbyok=false", 429)):
        assert (await node.call("GET", f"sys/health?{query}", token=None)).status == status
    for query in ("standbyok=maybe", "activecode=ok", "sealedcode=99999", "standbycode=-1"):
        bad = await node.call("GET", f"sys/health?{query}", token=None)
        assert (bad.status, bad.body) == (400, {"errors": []})
    assert (await node.call("PUT", "sys/health", token=None)).status == 405


async def test_a_sealed_node_answers_what_it_can(node: Harness) -> None:
    node.node.state = NodeHealth(True, True, True)
    for path in ("sys/mounts", "secret/a", "sys/leader", "auth/token/lookup-self", "sys/replication/status"):
        reply = await node.call("GET", path)
        assert (reply.status, reply.errors) == (503, ["Vault is sealed"])
    status = await node.call("GET", "sys/seal-status", token=None)
    assert (status.status, status.body["sealed"], status.body["t"], status.body["storage_type"]) == (200, True, 2, "inmem")
    cases = {
        "'key' must be specified in request body as JSON, or 'reset' set to true": {},
        "'key' must be a valid hex or base64 string": {"key": "?"},
    }
    for text, body in cases.items():
        assert (await node.call("PUT", "sys/unseal", body, token=None)).errors == [text]
    assert (await node.call("PUT", "sys/unseal", {"key": node.keys[0].hex()}, token=None)).status == 200
    assert (await node.call("PUT", "sys/unseal", {"reset": True}, token=None)).status == 200
    assert node.node.asked == ["unseal 33"]
    node.node.state = NodeHealth(False, True, True)
    assert (await node.call("PUT", "sys/unseal", {"key": "00"}, token=None)).errors == ["Vault is not initialized"]


async def test_init(node: Harness) -> None:
    assert (await node.call("GET", "sys/init", token=None)).body == {"initialized": True}
    twice = await node.call("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1}, token=None)
    assert (twice.status, twice.errors) == (400, ["Vault is already initialized"])
    node.node.state = NodeHealth(False, True, True)
    for shares, threshold, text in (
        (0, 0, "shares must be at least one"),
        (1, 2, "threshold cannot be larger than shares"),
        (3, 1, "threshold must be greater than one for multiple shares"),
    ):
        body = {"secret_shares": shares, "secret_threshold": threshold}
        reply = await node.call("PUT", "sys/init", body, token=None)
        assert (reply.status, reply.errors) == (400, [f"invalid seal configuration: {text}"])
    made = await node.call("PUT", "sys/init", {"secret_shares": 3, "secret_threshold": 2}, token=None)
    assert made.body["root_token"] == node.root
    assert [bytes.fromhex(key) for key in made.body["keys"]] == node.keys
    assert [base64.b64decode(key) for key in made.body["keys_base64"]] == node.keys
    assert node.node.asked == ["init 3/2"]


async def test_a_standby_forwards_or_redirects(node: Harness) -> None:
    seen: list[HttpRequest] = []

    async def forward(request: HttpRequest) -> HttpResponse:
        seen.append(request)
        if len(seen) > 1:
            raise NotForwarded("no connection")
        return HttpResponse(200, body=b'{"forwarded":true}\n')

    node.node.dispatched = forward
    node.node.state = NodeHealth(True, False, True, "disabled", "disabled")
    node.node.leading = LeaderStatus(True, False, 0, "https://active:8200/", "https://active:8201")
    assert (await node.call("GET", "secret/a?version=1")).body == {"forwarded": True}
    moved = await node.call("PUT", "secret/data/a%20b?x=1", {"data": {}})
    assert (moved.status, moved.headers["Location"], moved.body) == (
        307,
        "https://active:8200/v1/secret/data/a%20b?x=1",
        None,
    )
    direct = await node.call("GET", "secret/a", X_Vault_No_Request_Forwarding="1")
    assert (direct.status, len(seen)) == (307, 2)
    sealing = await node.call("PUT", "sys/seal")
    assert sealing.errors == ["error performing token check: Vault is in standby mode"]
    leader = await node.call("GET", "sys/leader", token=None)
    assert (leader.body["is_self"], leader.body["active_time"]) == (False, "0001-01-01T00:00:00Z")
    node.node.leading = LeaderStatus(True, False)
    assert (await node.call("GET", "secret/a")).status == 503


# -- replication


async def test_replication_endpoints_ask_replication() -> None:
    replication = FakeReplication()
    async with running(replication=replication) as node:
        status = await node.call("GET", "sys/replication/status", token=None)
        assert status.data == {"dr": {"mode": "disabled"}, "performance": {"mode": "primary"}}
        one = await node.call("GET", "sys/replication/performance/status", token=None)
        assert one.data == {"mode": "primary"}
        assert (await node.call("GET", "sys/replication/nosuch/status", token=None)).status == 404
        enabled = await node.call("PUT", "sys/replication/performance/primary/enable", None)
        assert enabled.body["warnings"] == ["This cluster is being enabled as a primary for replication."]
        assert enabled.data is None
        await node.call("POST", "sys/replication/primary/disable", {})
        for bad in ({}, {"id": "-x"}, {"id": "a b"}, {"id": "x" * 200}, {"id": "../x"}):
            assert (await node.call("POST", "sys/replication/performance/primary/secondary-token", bad)).status == 400
        assert (await node.call("POST", "sys/replication/performance/primary/revoke-secondary", {"id": "a"})).status == 204
        assert (await node.call("POST", "sys/replication/performance/secondary/enable", {})).status == 400
        await node.call(
            "POST", "sys/replication/performance/secondary/enable", {"token": "t\n", "primary_api_addr": "https://p/"}
        )
        assert replication.calls == [
            ("primary_enable", "performance", ""),
            ("primary_disable", "performance"),
            ("revoke_secondary", "performance", "a"),
            ("secondary_enable", "performance", "t", "https://p"),
        ]
        denied = await node.call("POST", "sys/replication/performance/primary/enable", {}, token=None)
        assert denied.status == 403


async def test_an_activation_token_is_always_a_wrapped_jwt() -> None:
    async with running(replication=FakeReplication()) as node:
        path = "sys/replication/performance/primary/secondary-token"
        reply = await node.call("POST", path, {"id": "eu-west"})
        info = reply.body["wrap_info"]
        assert (reply.body["request_id"], reply.body["data"], reply.body["warnings"]) == ("", None, None)
        assert (info["ttl"], info["creation_path"]) == (1800, path)
        claims = jwt.decode(info["token"], options={"verify_signature": False})
        assert claims["ca_sha256"] == "ab" * 32
        assert claims["accessor"] == ""
        shorter = await node.call("POST", path, {"id": "eu-west"}, X_Vault_Wrap_TTL="60")
        assert shorter.body["wrap_info"]["ttl"] == 60
        longer = await node.call("POST", path, {"id": "eu-west", "ttl": "5m"}, X_Vault_Wrap_TTL="1h")
        assert longer.body["wrap_info"]["ttl"] == 300
        bundle = await node.call("POST", "sys/wrapping/unwrap", token=claims["jti"])
        assert bundle.data == {"id": "eu-west", "client_key": "secret"}
        assert (await node.call("POST", "sys/wrapping/unwrap", token=claims["jti"])).status == 400
    async with running(replication=FakeReplication(), api_addr="") as node:
        warned = await node.call("POST", path, {"id": "eu-west"})
        assert warned.body["warnings"][0].startswith("No redirect address set in Vault")


async def secondary_of(primary: Harness) -> AsyncIterator[Harness]:
    """A performance secondary that holds the primary's replicated entries as of now."""
    store = type(primary.store)()
    store.entries = dict(primary.store.entries)
    replication = FakeReplication(primary.service)
    async with running(replication=replication, store=store, genesis=primary.node.genesis) as harness:
        yield harness


async def test_a_secondary_forwards_what_it_may_not_write() -> None:
    async with running() as primary:
        await with_kv(primary)
        async for secondary in secondary_of(primary):
            policy = 'path "secret/data/app" { capabilities = ["create", "read", "update"] }'
            await primary.call("PUT", "sys/policies/acl/app", {"policy": policy})
            secondary.store.entries.update(
                {key: value for key, value in primary.store.entries.items() if key.startswith("r/")}
            )
            created = await secondary.call("POST", "auth/token/create", {"policies": ["app"]})
            token = created.body["auth"]["client_token"]
            assert (await primary.call("GET", "auth/token/lookup-self", token=token)).status == 403
            assert secondary.replication is not None
            assert secondary.replication.forwarded == [], "tokens are made where they are used"

            before = secondary.store.index
            written = await secondary.call("POST", "secret/data/app", {"data": {"x": 1}}, token=token)
            assert (written.status, written.data["version"]) == (200, 1)
            ((request, auth),) = secondary.replication.forwarded
            assert (auth.policies, auth.cluster_id) == (("app", "default"), primary.node.genesis.cluster.cluster_id)
            assert (request.method, request.path) == ("POST", "secret/data/app")
            assert secondary.store.index == before
            assert (await primary.call("GET", "secret/data/app")).data["data"] == {"x": 1}

            denied = await secondary.call("POST", "secret/data/other", {"data": {}}, token=token)
            assert (denied.status, denied.errors) == (403, [DENIED])
            assert len(secondary.replication.forwarded) == 1, "refused here, not there"
            rotate = await secondary.call("PUT", "sys/rotate")
            assert rotate.errors == ["cannot rotate on a replication secondary"]
            local = await secondary.call("POST", "sys/mounts/mine", {"type": "kv", "local": True})
            assert local.status == 204
            assert (await secondary.call("POST", "mine/a", {"x": 1})).status == 204
            assert len(secondary.replication.forwarded) == 1
            shared = await secondary.call("POST", "sys/mounts/shared", {"type": "kv"})
            assert shared.status == 204
            assert "shared/" in (await primary.call("GET", "sys/mounts")).data


async def test_a_forwarded_answer_is_wrapped_here() -> None:
    async with running() as primary:
        await with_kv(primary)
        async for secondary in secondary_of(primary):
            wrapped = await secondary.call("POST", "secret/data/a", {"data": {"x": 1}}, X_Vault_Wrap_TTL="60")
            token = wrapped.body["wrap_info"]["token"]
            assert wrapped.body["data"] is None
            assert (await primary.call("POST", "sys/wrapping/unwrap", token=token)).status == 400
            assert (await secondary.call("POST", "sys/wrapping/unwrap", token=token)).data["version"] == 1


async def test_a_forwarded_identity_comes_from_the_cluster_port_only(node: Harness) -> None:
    forged = await node.call("GET", "sys/mounts", token=None, X_Vault_Internal_Forwarded_Auth='{"policies":["root"]}')
    assert forged.status == 403


async def run_once(service: Service) -> None:
    work = asyncio.create_task(service.run())
    for _ in range(200):
        await asyncio.sleep(0)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


async def test_what_replication_changes_is_seen_at_once() -> None:
    async with running() as primary:
        async for secondary in secondary_of(primary):

            async def replicate() -> None:
                old, new = secondary.store.entries, primary.store.entries
                keys = {key for key in (*old, *new) if key.startswith("r/") and old.get(key) != new.get(key)}
                for key in keys:
                    old.pop(key, None)
                    if key in new:
                        old[key] = new[key]
                await secondary.service.invalidate(sorted(keys))

            assert (await secondary.call("GET", "secret/data/a")).status == 404
            await with_kv(primary)
            await with_bob(primary, token_policies="p")
            await primary.call("PUT", "sys/rotate")
            await primary.call("PUT", "sys/policies/acl/p", {"policy": 'path "secret/*" { capabilities = ["read"] }'})
            await primary.call("POST", "secret/data/a", {"data": {"x": 1}})
            await replicate()
            token = (await log_in(secondary)).body["auth"]["client_token"]
            assert (await secondary.call("GET", "secret/data/a", token=token)).data["data"] == {"x": 1}
            await primary.call("PUT", "sys/policies/acl/p", {"policy": 'path "x" { capabilities = ["read"] }'})
            await primary.call("POST", "secret/data/a", {"data": {"x": 2}})
            await replicate()
            assert (await secondary.call("GET", "secret/data/a", token=token)).status == 403
            assert (await secondary.call("GET", "secret/data/a")).data["data"] == {"x": 2}
            await primary.call("DELETE", "sys/auth/userpass")
            await replicate()
            await run_once(secondary.service)
            assert (await secondary.call("GET", "auth/token/lookup-self", token=token)).status == 403


async def test_a_gate_blocks_data_but_not_status(node: Harness) -> None:
    await with_kv(node)
    node.gate.append("a merkle sync is running: 10 of 100 keys")
    for path in ("secret/data/a", "sys/mounts", "auth/token/lookup-self"):
        reply = await node.call("GET", path)
        assert (reply.status, reply.errors) == (503, ["a merkle sync is running: 10 of 100 keys"])
    assert (await node.call("GET", "sys/replication/status", token=None)).status == 200
    assert (await node.call("PUT", "sys/step-down")).status == 204
    node.gate.clear()
    assert (await node.call("GET", "sys/mounts")).status == 200
