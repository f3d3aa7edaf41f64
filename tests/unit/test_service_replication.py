"""What the service does with replication: endpoints, forwarding, invalidation, the gate."""

import asyncio
from collections.abc import AsyncIterator

import jwt
import pytest

from sidecar.api.service import Service
from tests.support.service_node import (
    DENIED,
    FakeReplication,
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
