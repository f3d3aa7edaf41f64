"""Leases over HTTP: every endpoint, also as hvac calls it, and what happens to leases with mounts, tokens and audit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import hvac
import pytest

from plugin_api.errors import Irrevocable, PluginError
from sidecar.api.sys_leases import TIDY_STARTED
from tests.support.leasing_engine import TYPE, Outside, credentials_engine, registry_with
from tests.support.service_node import (
    DENIED,
    FakeReplication,
    Harness,
    Reply,
    log_in,
    primary_and_secondary,
    replicate,
    running,
    with_bob,
    with_kv,
)


@dataclass
class It:
    """A node with the credentials engine at ``db/``, and what is outside."""

    node: Harness
    outside: Outside

    async def issue(self, role: str = "app", token: str | None = "root", **fields: Any) -> dict[str, Any]:
        reply = await self.node.call("POST", f"db/creds/{role}", fields, token=token)
        assert reply.status == 200, reply.errors
        return dict(reply.body)

    async def expire(self, seconds: float = 0) -> None:
        self.node.clock.now_s += seconds
        await self.node.service._leasing.expiration.sweep()

    async def lookup(self, lease_id: str) -> Reply:
        return await self.node.call("PUT", "sys/leases/lookup", {"lease_id": lease_id})


@pytest.fixture
async def it() -> AsyncIterator[It]:
    outside, engine = credentials_engine()
    async with running(plugins=registry_with(engine)) as node:
        assert (await node.call("POST", "sys/mounts/db", {"type": TYPE})).status == 204
        yield It(node, outside)


async def test_an_answer_with_a_lease(it: It) -> None:
    body = await it.issue(ttl="1h")
    assert body["lease_id"].startswith("db/creds/app/")
    assert (body["lease_duration"], body["renewable"]) == (3600, True)
    assert list(body["data"]) == ["password"]
    found = (await it.lookup(body["lease_id"])).data
    assert list(found) == ["expire_time", "id", "issue_time", "last_renewal", "renewable", "ttl"]
    assert (found["id"], found["ttl"], found["last_renewal"]) == (body["lease_id"], 3600, None)
    assert found["issue_time"] == "2023-11-14T22:13:20Z"
    assert found["expire_time"] == "2023-11-14T23:13:20Z"


async def test_a_ttl_is_capped_with_a_warning(it: It) -> None:
    await it.node.call("POST", "sys/mounts/db/tune", {"max_lease_ttl": "2h"})
    body = await it.issue(ttl="3h")
    assert body["lease_duration"] == 7200
    assert body["warnings"] == ['TTL of "3h" exceeded the effective max_ttl of "2h"; TTL value is capped accordingly']
    assert (await it.issue())["lease_duration"] == 7200, "the mount's default is within its maximum"


@pytest.mark.parametrize("path", ["sys/leases/renew", "sys/renew"])
@pytest.mark.parametrize("in_url", [False, True])
async def test_renewing(it: It, path: str, in_url: bool) -> None:
    lease_id = (await it.issue(ttl=100, max_ttl=1000))["lease_id"]
    it.node.clock.now_s += 50
    body = {"increment": 300} if in_url else {"increment": 300, "lease_id": lease_id}
    reply = await it.node.call("PUT", f"{path}/{lease_id}" if in_url else path, body)
    assert reply.status == 200
    assert (reply.body["lease_id"], reply.body["lease_duration"], reply.body["renewable"]) == (lease_id, 300, True)
    assert reply.body["data"] is None
    assert (await it.lookup(lease_id)).data["last_renewal"] == "2023-11-14T22:14:10Z"


@pytest.mark.parametrize("path", ["sys/leases/revoke", "sys/revoke"])
@pytest.mark.parametrize("in_url", [False, True])
@pytest.mark.parametrize("sync", [None, True, False])
async def test_revoking(it: It, path: str, in_url: bool, sync: bool | None) -> None:
    lease_id = (await it.issue())["lease_id"]
    body: dict[str, Any] = {} if in_url else {"lease_id": lease_id}
    body |= {} if sync is None else {"sync": sync}
    reply = await it.node.call("PUT", f"{path}/{lease_id}" if in_url else path, body)
    assert reply.status == (202 if sync is False else 204)
    assert bool(it.outside.valid) == (sync is False)
    await it.expire()
    assert it.outside.valid == set()
    assert (await it.lookup(lease_id)).errors == ["invalid lease"]
    assert (await it.node.call("PUT", "sys/leases/revoke", {"lease_id": lease_id})).status == 204


async def test_texts_of_what_is_refused(it: It) -> None:
    for path in ("sys/leases/lookup", "sys/leases/renew", "sys/renew", "sys/leases/revoke", "sys/revoke"):
        reply = await it.node.call("PUT", path, {})
        assert (reply.status, reply.errors) == (400, ["lease_id must be specified"])
    for lease_id in ("nosuch", "db/creds/app/" + "x" * 24, "a//b", "../sys"):
        reply = await it.node.call("PUT", "sys/leases/renew", {"lease_id": lease_id})
        assert (reply.status, reply.errors) == (400, ["lease not found"])
        reply = await it.lookup(lease_id)
        assert (reply.status, reply.errors) == (400, ["invalid lease"])
    lease_id = (await it.issue())["lease_id"]
    for increment in (-1, "-1h", "1e30h", 2**70):
        reply = await it.node.call("PUT", "sys/leases/renew", {"lease_id": lease_id, "increment": increment})
        assert reply.status == 400, increment
    assert (await it.lookup(lease_id)).data["ttl"] == 2764800


async def test_tokens_are_leases_too(it: It) -> None:
    await with_bob(it.node, token_ttl="1h")
    token = (await log_in(it.node)).body["auth"]["client_token"]
    listed = await it.node.call("LIST", "sys/leases/lookup/auth/userpass/login/bob")
    (name,) = listed.data["keys"]
    assert name.startswith("h")
    lease_id = f"auth/userpass/login/bob/{name}"
    assert (await it.lookup(lease_id)).data["ttl"] == 3600
    assert (await it.node.call("LIST", "sys/leases/lookup")).data["keys"] == ["auth/"]
    reply = await it.node.call("PUT", "sys/leases/renew", {"lease_id": lease_id})
    assert (reply.status, reply.errors) == (400, ["tokens cannot be renewed through this endpoint"])
    assert (await it.node.call("PUT", "sys/leases/revoke", {"lease_id": lease_id})).status == 204
    assert (await it.node.call("GET", "auth/token/lookup-self", token=token)).status == 403
    assert (await it.node.call("LIST", "sys/leases/lookup/auth")).status == 404


async def test_a_prefix_of_an_auth_method_revokes_its_tokens(it: It) -> None:
    await with_bob(it.node)
    tokens = [(await log_in(it.node)).body["auth"]["client_token"] for _ in range(3)]
    lease = await it.issue(token="root")
    assert (await it.node.call("PUT", "sys/leases/revoke-prefix/auth/userpass", {"sync": True})).status == 204
    for token in tokens:
        assert (await it.node.call("GET", "auth/token/lookup-self", token=token)).status == 403
    assert (await it.lookup(lease["lease_id"])).status == 200


@pytest.mark.parametrize("path", ["sys/leases/revoke-prefix", "sys/revoke-prefix"])
async def test_prefixes(it: It, path: str) -> None:
    for role in ("a", "a", "b"):
        await it.issue(role)
    assert (await it.node.call("LIST", "sys/leases/lookup/db/creds")).data["keys"] == ["a/", "b/"]
    assert (await it.node.call("PUT", f"{path}/db/creds/a", {"sync": False})).status == 202
    await it.expire()
    assert len(it.outside.valid) == 1
    assert (await it.node.call("PUT", f"{path}/db")).status == 204
    assert it.outside.valid == set()


async def test_a_failure_is_told_and_force_forgets(it: It) -> None:
    lease_id = (await it.issue())["lease_id"]
    it.outside.fail = PluginError("the database is away")
    reply = await it.node.call("PUT", "sys/leases/revoke", {"lease_id": lease_id})
    assert (reply.status, reply.errors) == (400, [f'failed to revoke "{lease_id}": the database is away'])
    assert (await it.lookup(lease_id)).data["ttl"] == 0
    reply = await it.node.call("PUT", "sys/leases/revoke-prefix/db", {})
    assert reply.status == 400
    for path in ("sys/leases/revoke-force/db", "sys/revoke-force/db"):
        assert (await it.node.call("PUT", path)).status == 204
    assert (await it.lookup(lease_id)).status == 400
    assert it.node.service.gauges()["expire.num_irrevocable_leases"] == 0


async def test_irrevocable_leases_are_counted_and_listed(it: It) -> None:
    it.outside.fail = Irrevocable("dropped by hand")
    ids = sorted([(await it.issue(f"r{number}", ttl=10 + number))["lease_id"] for number in range(3)])
    await it.expire(100)
    accessor = (await it.node.call("GET", "sys/mounts/db")).data["accessor"]
    counted = await it.node.call("GET", "sys/leases/count?type=irrevocable&include_child_namespaces=true")
    assert counted.data == {"counts": {accessor: 3}, "lease_count": 3}
    listed = (await it.node.call("GET", "sys/leases?type=irrevocable")).data
    assert [each["lease_id"] for each in listed["leases"]] == ids
    assert {(each["mount_id"], each["error"]) for each in listed["leases"]} == {(accessor, "dropped by hand")}
    cut = await it.node.call("GET", "sys/leases?type=irrevocable&limit=2")
    assert (len(cut.data["leases"]), cut.data["lease_count"]) == (2, 3)
    assert cut.body["warnings"] == ["only 2 of 3 leases are shown: limit=none shows all"]
    every = await it.node.call("GET", "sys/leases?type=irrevocable&limit=none")
    assert (len(every.data["leases"]), every.body["warnings"]) == (3, None)
    assert it.node.service.gauges()["expire.num_irrevocable_leases"] == 3
    for query in ("", "?type=all"):
        assert (await it.node.call("GET", f"sys/leases/count{query}")).status == 404
        assert (await it.node.call("GET", f"sys/leases{query}")).status == 404
    for limit in ("0", "-1", "x", "1e3", "9" * 30):
        assert (await it.node.call("GET", f"sys/leases?type=irrevocable&limit={limit}")).status == 400


async def test_sudo_is_asked_for(it: It) -> None:
    plain = await it.node.token('path "sys/*" { capabilities = ["create", "read", "update", "list"] }')
    await it.issue()
    for method, path in (
        ("LIST", "sys/leases/lookup"),
        ("LIST", "sys/leases/lookup/db/creds/app"),
        ("PUT", "sys/leases/revoke-prefix/db"),
        ("PUT", "sys/revoke-prefix/db"),
        ("PUT", "sys/leases/revoke-force/db"),
        ("PUT", "sys/revoke-force/db"),
        ("GET", "sys/leases?type=irrevocable"),
    ):
        reply = await it.node.call(method, path, token=plain)
        assert (reply.status, reply.errors) == (403, [DENIED]), path
    assert len(it.outside.valid) == 1
    assert (await it.node.call("PUT", "sys/leases/lookup", {"lease_id": "x"}, token=plain)).status == 400


async def test_tidy(it: It) -> None:
    tidying = asyncio.create_task(it.node.service._leasing.tidying.run())
    reply = await it.node.call("POST", "sys/leases/tidy")
    assert (reply.status, reply.body["warnings"]) == (202, [TIDY_STARTED])
    async with asyncio.timeout(120):
        await it.node.service._leasing.tidying.done()
    tidying.cancel()
    await asyncio.gather(tidying, return_exceptions=True)


# -- mounts


async def test_unmounting_revokes_first(it: It) -> None:
    await it.issue()
    assert (await it.node.call("DELETE", "sys/mounts/db")).status == 204
    assert it.outside.valid == set()
    assert [key for key in it.node.store.entries if "/db/" in key] == []


async def test_a_mount_whose_leases_cannot_be_revoked_stays_until_it_is_forced(it: It) -> None:
    lease_id = (await it.issue())["lease_id"]
    it.outside.fail = PluginError("away")
    reply = await it.node.call("DELETE", "sys/mounts/db")
    assert (reply.status, reply.errors) == (
        400,
        [f'failed to revoke 1 of 1 leases below "db/"; "{lease_id}": away'],
    )
    await it.issue()
    assert (await it.node.call("DELETE", "sys/mounts/db?force=true")).status == 204
    assert (await it.node.call("GET", "sys/mounts/db")).status == 400


async def test_nothing_is_issued_while_a_mount_goes(it: It) -> None:
    await it.issue()
    it.outside.hang = True
    going = asyncio.create_task(it.node.call("DELETE", "sys/mounts/db"))
    await it.outside.until(lambda: it.outside.running == 1)
    reply = await it.node.call("POST", "db/creds/app", {})
    assert reply.status == 404
    assert (await it.node.call("DELETE", "sys/mounts/db")).status == 503
    it.outside.release.set()
    assert (await going).status == 204
    assert it.outside.valid == set()


async def test_moving_a_mount_revokes_what_it_issued(it: It) -> None:
    await it.issue()
    assert (await it.node.call("POST", "sys/mounts/taken", {"type": TYPE})).status == 204
    for target in ("taken", "sys/x", "auth/x"):
        assert (await it.node.call("POST", "sys/remount", {"from": "db", "to": target})).status == 400
    assert len(it.outside.valid) == 1, "a move that fails changes nothing"
    assert (await it.node.call("POST", "sys/remount", {"from": "db", "to": "db2"})).status in (200, 204)
    assert it.outside.valid == set()
    assert (await it.node.call("POST", "db2/creds/app", {})).body["lease_id"].startswith("db2/creds/app/")


async def test_disabling_an_auth_method_revokes_its_tokens(it: It) -> None:
    await with_bob(it.node)
    token = (await log_in(it.node)).body["auth"]["client_token"]
    assert (await it.node.call("DELETE", "sys/auth/userpass")).status == 204
    assert (await it.node.call("GET", "auth/token/lookup-self", token=token)).status == 403


# -- tokens


async def test_a_last_use_cannot_lease(it: It) -> None:
    token = await it.node.token('path "db/*" { capabilities = ["update"] }', num_uses=1)
    reply = await it.node.call("POST", "db/creds/app", {}, token=token)
    assert reply.status == 400
    assert reply.errors == [
        "Secret cannot be returned; token had one use left, so leased credentials were immediately revoked."
    ]
    assert it.outside.valid == set()


async def test_leases_end_with_their_token(it: It) -> None:
    token = await it.node.token('path "db/*" { capabilities = ["update"] }')
    for _ in range(3):
        await it.issue(token=token)
    await it.issue()
    assert (await it.node.call("POST", "auth/token/revoke-self", token=token)).status == 204
    await it.expire()
    assert len(it.outside.valid) == 1


# -- clusters


async def test_a_secondary_keeps_its_own_leases_and_the_primary_refuses_them() -> None:
    async with primary_and_secondary() as (primary, secondary):
        for path in ("sys/leases/lookup", "sys/leases/revoke", "sys/revoke", "sys/renew", "sys/locked-users"):
            reply = await primary.service.handle(_forwarded(path))
            assert reply.status == 403, path
        assert (await secondary.call("PUT", "sys/leases/revoke", {"lease_id": "x"})).status == 204


def _forwarded(path: str) -> Any:
    from sidecar.request.types import ForwardedAuth, HttpRequest

    return HttpRequest("PUT", path, body=b'{"lease_id":"x"}', forwarded_auth=ForwardedAuth(policies=("root",)))


async def test_a_lease_for_another_clusters_token_is_taken_back() -> None:
    outside, engine = credentials_engine()
    async with running(plugins=registry_with(engine)) as primary:
        await primary.call("POST", "sys/mounts/db", {"type": TYPE})
        reply = await primary.service.handle(_forwarded("db/creds/app"))
        assert reply.status == 400
        assert b"needs a token of this cluster" in reply.body
        assert (outside.valid, len(outside.calls)) == (set(), 1)


async def test_a_mount_that_the_primary_removed_takes_its_tokens_here_along() -> None:
    async with primary_and_secondary() as (primary, secondary):
        await with_bob(primary)
        await replicate(primary, secondary)
        token = (await log_in(secondary)).body["auth"]["client_token"]
        await primary.call("DELETE", "sys/auth/userpass")
        await replicate(primary, secondary)
        await secondary.service._clean_up_once()
        assert (await secondary.call("GET", "auth/token/lookup-self", token=token)).status == 403


async def test_a_closed_gate_expires_nothing() -> None:
    outside, engine = credentials_engine()
    async with running(plugins=registry_with(engine), replication=FakeReplication()) as node:
        await node.call("POST", "sys/mounts/db", {"type": TYPE})
        await node.call("POST", "db/creds/app", {"ttl": 10})
        node.clock.now_s += 100
        node.gate.append("this cluster is being filled")
        await node.service._leasing.expiration.sweep()
        assert len(outside.valid) == 1
        node.gate.clear()
        await node.service._leasing.expiration.sweep()
        assert outside.valid == set()


# -- wrapping


@pytest.mark.parametrize("what", ["read", "list", "write", "login", "lease", "policy"])
async def test_any_answer_can_be_wrapped(it: It, what: str) -> None:
    node = it.node
    await with_kv(node)
    await with_bob(node)
    await node.call("POST", "secret/data/a", {"data": {"k": "v"}})
    wrap = {"X_Vault_Wrap_TTL": "5m"}
    match what:
        case "read":
            reply = await node.call("GET", "secret/data/a", **wrap)
        case "list":
            reply = await node.call("LIST", "secret/metadata", **wrap)
        case "write":
            reply = await node.call("POST", "secret/data/a", {"data": {"k": "w"}}, **wrap)
        case "login":
            reply = await log_in(node, **wrap)
        case "lease":
            reply = await node.call("POST", "db/creds/app", {}, **wrap)
        case _:
            reply = await node.call("GET", "sys/policies/acl/default", **wrap)
    assert reply.status == 200
    info = reply.body["wrap_info"]
    assert (reply.body["data"], reply.body["auth"], reply.body["lease_id"]) == (None, None, "")
    assert (info["ttl"], bool(info.get("wrapped_accessor"))) == (300, what == "login")
    unwrapped = await node.call("POST", "sys/wrapping/unwrap", token=info["token"])
    assert unwrapped.status == 200
    assert bool(unwrapped.body["auth"]) == (what == "login")
    assert bool(unwrapped.body["lease_id"]) == (what == "lease")
    assert unwrapped.body["data"] or what == "login"
    again = await node.call("POST", "sys/wrapping/unwrap", token=info["token"])
    assert (again.status, again.errors) == (400, ["wrapping token is not valid or does not exist"])


# -- audit and clients


async def test_the_audit_log_knows_the_lease(it: It, tmp_path: Any) -> None:
    path = tmp_path / "audit.log"
    await it.node.call("PUT", "sys/audit/file", {"type": "file", "options": {"file_path": str(path)}})
    lease_id = (await it.issue())["lease_id"]
    await it.node.call("PUT", "sys/leases/revoke", {"lease_id": lease_id})
    lines = path.read_text()
    assert f'"secret":{{"lease_id":"{lease_id}"}}' in lines
    assert '"path":"sys/leases/revoke"' in lines


async def test_hvac_drives_it(it: It) -> None:
    client = hvac.Client(it.node.address, it.node.root)

    def drive() -> None:
        lease_id = client.read("db/creds/app")["lease_id"]
        assert client.sys.read_lease(lease_id)["data"]["id"] == lease_id
        assert client.sys.renew_lease(lease_id, increment=60)["lease_duration"] == 60
        assert client.sys.list_leases("db/creds/app")["data"]["keys"] == [lease_id.rpartition("/")[2]]
        assert client.sys.revoke_lease(lease_id).status_code == 204
        with pytest.raises(hvac.exceptions.InvalidRequest):
            client.sys.read_lease(lease_id)
        client.read("db/creds/app")
        assert client.sys.revoke_prefix("db").status_code == 204
        client.read("db/creds/app")
        assert client.sys.revoke_force("db").status_code == 204
        with pytest.raises(hvac.exceptions.InvalidPath):
            client.sys.list_leases("db/creds/app")

    await asyncio.to_thread(drive)
    assert it.outside.valid == set()


async def test_kv_version_1_has_a_duration_and_no_lease(it: It) -> None:
    await with_kv(it.node, version="1")
    await it.node.call("POST", "secret/a", {"ttl": "1h", "k": "v"})
    body = (await it.node.call("GET", "secret/a")).body
    assert (body["lease_id"], body["lease_duration"], body["renewable"]) == ("", 3600, False)
    assert (await it.node.call("LIST", "sys/leases/lookup")).status == 404
