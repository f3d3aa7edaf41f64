"""Service and Front behind a real HTTP server on loopback: hvac, and requests of every shape."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import hvac
import pytest
from hvac import exceptions

from consul_backend import errors as backend
from sidecar.api.node_view import LeaderStatus, NodeHealth, NotForwarded
from sidecar.request.types import HttpRequest, HttpResponse
from tests.support.service_node import (
    Harness,
    running,
)


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


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

    client.sys.tune_auth_method("people", max_lease_ttl="1h")
    assert client.sys.read_auth_method_tuning("people")["data"]["max_lease_ttl"] == 3600
    client.sys.disable_auth_method("people")
    assert not bob.is_authenticated()
    client.sys.disable_secrets_engine("secret")


def drive_hvac_tokens(address: str, root: str) -> None:
    client = hvac.Client(url=address, token=root)
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
    assert client.sys.seal().status_code == 204


async def test_hvac_does_its_daily_work(node: Harness) -> None:
    await asyncio.to_thread(drive_hvac, node.address, node.root)
    await asyncio.to_thread(drive_hvac_tokens, node.address, node.root)
    assert node.node.asked == ["seal"]


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


async def test_health_has_a_code_for_each_state(node: Harness) -> None:
    states = {
        "uninitcode": NodeHealth(False, True, True),
        "sealedcode": NodeHealth(True, True, True),
        "haunhealthycode": NodeHealth(True, False, True, "disabled", "secondary", ha_healthy=False),
        "drsecondarycode": NodeHealth(True, False, True, "disabled", "secondary", heartbeat_age_ms=12, echo_ms=1),
        "standbycode": NodeHealth(True, False, True, "primary", "disabled"),
        "activecode": NodeHealth(True, False, False, "primary", "disabled", "n", "i", 7),
    }
    for (name, state), status in zip(states.items(), (501, 503, 474, 472, 429, 200), strict=True):
        node.node.state = state
        reply = await node.call("GET", "sys/health", token=None)
        assert reply.status == status
        assert (await node.call("GET", f"sys/health?{name}=299", token=None)).status == 299
        assert reply.body["replication_dr_mode"] == state.dr_mode
        assert ("cluster_id" in reply.body) is not state.sealed
        assert reply.body.get("ha_connection_healthy") == (
            None if state.sealed or not state.standby else state.ha_healthy
        )
        assert reply.body.get("last_request_forwarding_heartbeat_ms") == state.heartbeat_age_ms
        assert (await node.call("HEAD", "sys/health", token=None)).body is None
    assert (await node.call("GET", "sys/health", token=None)).body["last_wal"] == 7
    node.node.state = states["standbycode"]
    for query, status in (("standbyok", 200), ("standbyok=true", 200), ("standbyok=false", 429)):
        assert (await node.call("GET", f"sys/health?{query}", token=None)).status == status
    for query in ("standbyok=maybe", "activecode=ok", "sealedcode=99999", "standbycode=-1"):
        bad = await node.call("GET", f"sys/health?{query}", token=None)
        assert (bad.status, bad.body) == (400, {"errors": []})
    assert (await node.call("PUT", "sys/health", token=None)).status == 405


async def test_a_sealed_node_answers_what_it_can(node: Harness) -> None:
    node.node.state = NodeHealth(True, True, True)
    for path in ("sys/mounts", "secret/a", "auth/token/lookup-self", "sys/replication/status"):
        reply = await node.call("GET", path)
        assert (reply.status, reply.errors) == (503, ["Vault is sealed"])
    leader = await node.call("GET", "sys/leader", token=None)
    assert (leader.status, leader.errors) == (503, ["Vault is sealed"])
    node.node.leading = LeaderStatus(ha_enabled=False, is_self=False)
    leader = await node.call("GET", "sys/leader", token=None)
    assert (leader.status, leader.body["ha_enabled"]) == (200, False)
    status = await node.call("GET", "sys/seal-status", token=None)
    assert (status.status, status.body["sealed"], status.body["t"], status.body["storage_type"]) == (
        200,
        True,
        2,
        "inmem",
    )
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


async def test_a_store_that_cannot_be_reached_is_no_defect(
    node: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def unreachable(_: object) -> None:
        raise backend.Unavailable("connect 10.0.0.1: refused")

    node.node.state = NodeHealth(False, True, True)
    monkeypatch.setattr(node.node, "init", unreachable)
    reply = await node.call("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1}, token=None)
    assert (reply.status, reply.errors) == (503, ["the storage is not available; try again"])
    assert "Traceback" not in caplog.text


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
