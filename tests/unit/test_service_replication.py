"""What the service does with replication: endpoints, forwarding, invalidation, the gate."""

import asyncio

import jwt

from sidecar.request.types import ForwardedAuth, HttpRequest
from tests.support.service_node import (
    DENIED,
    FakeReplication,
    log_in,
    primary_and_secondary,
    replicate,
    running,
    with_bob,
    with_kv,
)


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
        assert (
            await node.call("POST", "sys/replication/performance/primary/revoke-secondary", {"id": "a"})
        ).status == 204
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
        del replication.calls[:]
        checked = await node.call("POST", "sys/replication/merkle-check")
        assert checked.data == {"merkle_corruption_report": {"corrupted_root": False}}
        started = await node.call("POST", "sys/replication/reindex", {"diff": True, "skip_flush": "true"})
        assert started.body["warnings"] == ["background"]
        await node.call("PUT", "sys/replication/recover")
        assert replication.calls == [("merkle_check",), ("reindex", True, False, True, 0), ("recover", False)]
        weak = await node.token('path "sys/replication/*" { capabilities = ["update"] }')
        assert (await node.call("POST", "sys/replication/reindex", {}, token=weak)).status == 403
        assert (await node.call("POST", "sys/replication/merkle-check", {}, token=weak)).status == 200
        denied = await node.call("POST", "sys/replication/performance/primary/enable", {}, token=None)
        assert denied.status == 403


async def test_role_changes_and_lost_writes_ask_replication() -> None:
    replication = FakeReplication()
    async with running(replication=replication) as node:
        base = "sys/replication/performance"
        assert (await node.call("POST", f"{base}/primary/demote", {})).body["warnings"] == ["demoted"]
        promoted = await node.call("POST", "sys/replication/secondary/promote", {"force": "true"})
        assert promoted.data["required"] == 1
        unsaid = await node.call("POST", f"{base}/secondary/update-primary", {})
        assert (unsaid.status, "token must be specified" in unsaid.errors[0]) == (400, True)
        await node.call("POST", f"{base}/secondary/update-primary", {"token": "t ", "primary_api_addr": "https://p/"})
        await node.call(
            "POST", f"{base}/secondary/update-primary", {"update_primary_addrs": ["https://a:1", "https://b:1"]}
        )
        accept = f"{base}/secondary/accept-deletions"
        weak = await node.token('path "sys/replication/*" { capabilities = ["update"] }')
        assert (await node.call("POST", accept, {"deletions": 900}, token=weak)).status == 403
        for unsaid in ({}, {"deletions": 0}, {"deletions": "many"}):
            assert (await node.call("POST", accept, unsaid)).status == 400
        assert (await node.call("POST", accept, {"deletions": "900"})).body["warnings"] == ["begins anew"]
        assert replication.calls[-1] == ("accept_deletions", "performance", 900)
        await node.call("POST", "sys/replication/reindex", {"force": True, "deletions": 7})
        assert replication.calls[-1] == ("reindex", False, True, False, 7)
        del replication.calls[-2:]
        for method in ("GET", "LIST"):
            assert (await node.call(method, "sys/replication/dr/lost-writes")).data == {"lost_writes": []}
        await node.call("GET", "sys/replication/dr/lost-writes/1-2-ab?page=3")
        await node.call("GET", "sys/replication/dr/lost-writes/1-2-ab/export")
        assert (await node.call("DELETE", "sys/replication/dr/lost-writes/1-2-ab")).status == 204
        assert replication.calls == [
            ("primary_demote", "performance"),
            ("secondary_promote", "performance", "", True, False),
            ("secondary_update_primary", "performance", "t", "https://p", ()),
            ("secondary_update_primary", "performance", "", "", ("https://a:1", "https://b:1")),
            ("lost_writes_read", "dr", "1-2-ab", "3", False),
            ("lost_writes_read", "dr", "1-2-ab", "", True),
            ("lost_writes_delete", "dr", "1-2-ab"),
        ]
        plain = await node.token('path "sys/replication/*" { capabilities = ["read", "update", "list", "delete"] }')
        for path in ("", "/1-2-ab", "/1-2-ab/export"):
            assert (await node.call("GET", f"sys/replication/dr/lost-writes{path}", token=plain)).status == 403
        assert (await node.call("LIST", "sys/replication/dr/lost-writes", token=plain)).status == 403


async def test_the_oldest_paths_mean_performance() -> None:
    replication = FakeReplication()
    async with running(replication=replication) as node:
        base = "sys/replication"
        assert (await node.call("POST", f"{base}/primary/revoke-secondary", {"id": "../x"})).status == 400
        assert (await node.call("POST", f"{base}/primary/revoke-secondary", {"id": "eu"}, token=None)).status == 403
        assert (await node.call("POST", f"{base}/primary/revoke-secondary", {"id": "eu"})).status == 204
        accept = f"{base}/secondary/accept-deletions"
        weak = await node.token('path "sys/replication/*" { capabilities = ["update"] }')
        assert (await node.call("POST", accept, {"deletions": 3}, token=weak)).status == 403
        assert (await node.call("POST", accept, {})).status == 400
        assert (await node.call("PUT", accept, {"deletions": 3})).body["warnings"] == ["begins anew"]
        assert replication.calls == [
            ("revoke_secondary", "performance", "eu"),
            ("accept_deletions", "performance", 3),
        ]


async def test_keys_rotation_and_preflight_ask_replication() -> None:
    replication = FakeReplication()
    async with running(replication=replication) as node:
        base = "sys/replication/dr"
        made = await node.call("POST", f"{base}/secondary/generate-public-key", {})
        assert made.data == {"secondary_public_key": "ork1.AA"}
        looked = await node.call("POST", "sys/replication/secondary/enable", {"token": "t", "preflight": True})
        assert looked.data == {"ready": True, "checks": []}
        await node.call("POST", f"{base}/primary/rotate-ca", {"overlap": "1h"})
        await node.call("POST", f"{base}/primary/rotate-ca", {"force": "true"})
        token = await node.call(
            "POST", f"{base}/primary/secondary-token", {"id": "eu", "secondary_public_key": "ork1.AA"}
        )
        assert token.data == {"id": "eu", "client_key": "secret"}, "what replication encrypted is not wrapped again"
        assert token.body["wrap_info"] is None
        assert replication.calls == [
            ("secondary_public_key", "dr"),
            ("secondary_preflight", "performance", "t", ""),
            ("rotate_authority", "dr", 3600, False),
            ("rotate_authority", "dr", 7 * 86400, True),
            ("secondary_token", "dr", "eu", 1800),
        ]
        weak = await node.token('path "sys/replication/*" { capabilities = ["update"] }')
        assert (await node.call("POST", f"{base}/primary/rotate-ca", {}, token=weak)).status == 403
        assert (await node.call("POST", f"{base}/secondary/generate-public-key", {}, token=None)).status == 403


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


async def test_a_secondary_forwards_what_it_may_not_write() -> None:
    async with primary_and_secondary() as (primary, secondary):
        upstream = secondary.replication
        assert upstream is not None
        await with_kv(primary)
        policy = 'path "secret/data/app" { capabilities = ["create", "read", "update"] }'
        await primary.call("PUT", "sys/policies/acl/app", {"policy": policy})
        await replicate(primary, secondary)
        created = await secondary.call("POST", "auth/token/create", {"policies": ["app"]})
        token = created.body["auth"]["client_token"]
        assert (await primary.call("GET", "auth/token/lookup-self", token=token)).status == 403
        assert upstream.forwarded == [], "tokens are made where they are used"

        before = secondary.store.index
        written = await secondary.call("POST", "secret/data/app", {"data": {"x": 1}}, token=token)
        assert (written.status, written.data["version"]) == (200, 1)
        ((request, auth),) = upstream.forwarded
        assert (auth.policies, auth.cluster_id) == (("app", "default"), primary.node.genesis.cluster.cluster_id)
        assert (request.method, request.path) == ("POST", "secret/data/app")
        assert secondary.store.index == before
        assert (await primary.call("GET", "secret/data/app")).data["data"] == {"x": 1}

        denied = await secondary.call("POST", "secret/data/other", {"data": {}}, token=token)
        assert (denied.status, denied.errors) == (403, [DENIED])
        assert len(upstream.forwarded) == 1, "refused here, not there"


async def test_a_secondary_keeps_what_is_its_own() -> None:
    async with primary_and_secondary() as (primary, secondary):
        upstream = secondary.replication
        assert upstream is not None
        rotate = await secondary.call("PUT", "sys/rotate")
        assert rotate.errors == ["cannot rotate on a replication secondary"]
        assert (await secondary.call("POST", "sys/mounts/mine", {"type": "kv", "local": True})).status == 204
        assert (await secondary.call("POST", "mine/a", {"x": 1})).status == 204
        assert (await secondary.call("POST", "cubbyhole/a", {"x": 1})).status == 204
        assert upstream.forwarded == []
        assert (await secondary.call("POST", "sys/mounts/shared", {"type": "kv"})).status == 204
        assert "shared/" in (await primary.call("GET", "sys/mounts")).data
        assert "mine/" not in (await primary.call("GET", "sys/mounts")).data


async def test_a_secondary_cannot_have_the_primarys_own_paths_run() -> None:
    async with primary_and_secondary() as (primary, _):
        for method, path in (
            ("PUT", "sys/seal"),
            ("PUT", "sys/step-down"),
            ("PUT", "sys/rotate"),
            ("POST", "auth/token/create"),
            ("PUT", "sys/generate-root/attempt"),
            ("POST", "sys/replication/performance/primary/secondary-token"),
            ("GET", "cubbyhole/a"),
        ):
            request = HttpRequest(method, path, body=b"{}", forwarded_auth=ForwardedAuth(policies=("root",)))
            assert (await primary.service.handle(request)).status == 403
        assert primary.node.asked == []


async def test_a_forwarded_answer_is_wrapped_here() -> None:
    async with primary_and_secondary() as (primary, secondary):
        await with_kv(primary)
        await replicate(primary, secondary)
        wrapped = await secondary.call("POST", "secret/data/a", {"data": {"x": 1}}, X_Vault_Wrap_TTL="60")
        token = wrapped.body["wrap_info"]["token"]
        assert wrapped.body["data"] is None
        assert (await primary.call("POST", "sys/wrapping/unwrap", token=token)).status == 400
        assert (await secondary.call("POST", "sys/wrapping/unwrap", token=token)).data["version"] == 1


async def test_a_forwarded_identity_comes_from_the_cluster_port_only() -> None:
    async with running() as node:
        forged = await node.call(
            "GET", "sys/mounts", token=None, X_Vault_Internal_Forwarded_Auth='{"policies":["root"]}'
        )
        assert forged.status == 403


async def test_what_replication_changes_is_seen_at_once() -> None:
    async with primary_and_secondary() as (primary, secondary):
        assert (await secondary.call("GET", "secret/data/a")).status == 404
        await with_kv(primary)
        await with_bob(primary, token_policies="p")
        await primary.call("PUT", "sys/rotate")
        await primary.call("PUT", "sys/policies/acl/p", {"policy": 'path "secret/*" { capabilities = ["read"] }'})
        await primary.call("POST", "secret/data/a", {"data": {"x": 1}})
        await replicate(primary, secondary)
        token = (await log_in(secondary)).body["auth"]["client_token"]
        assert (await secondary.call("GET", "secret/data/a", token=token)).data["data"] == {"x": 1}
        await primary.call("PUT", "sys/policies/acl/p", {"policy": 'path "x" { capabilities = ["read"] }'})
        await primary.call("POST", "secret/data/a", {"data": {"x": 2}})
        await replicate(primary, secondary)
        assert (await secondary.call("GET", "secret/data/a", token=token)).status == 403
        assert (await secondary.call("GET", "secret/data/a")).data["data"] == {"x": 2}


async def test_logins_of_an_auth_method_that_the_primary_disabled_are_revoked() -> None:
    async with primary_and_secondary() as (primary, secondary):
        await with_bob(primary)
        await replicate(primary, secondary)
        auth = (await log_in(secondary)).body["auth"]
        await primary.call("DELETE", "sys/auth/userpass")
        ids = {key for key in secondary.store.entries if key.startswith("l/token/id/")}
        work = asyncio.create_task(secondary.service.run())
        await replicate(primary, secondary)
        await secondary.store.until(lambda: not ids <= set(secondary.store.entries))
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        assert (await secondary.call("GET", "auth/token/lookup-self", token=auth["client_token"])).status == 403


async def test_a_gate_blocks_data_but_not_status() -> None:
    async with running() as node:
        node.gate.append("a merkle sync is running: 10 of 100 keys")
        for path in ("secret/data/a", "sys/mounts", "auth/token/lookup-self"):
            reply = await node.call("GET", path)
            assert (reply.status, reply.errors) == (503, ["a merkle sync is running: 10 of 100 keys"])
        assert (await node.call("GET", "sys/replication/status", token=None)).status == 200
        assert (await node.call("PUT", "sys/step-down")).status == 204
        node.gate.clear()
        assert (await node.call("GET", "sys/mounts")).status == 200
