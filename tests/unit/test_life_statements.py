"""Lives that must end, things that count once, and ceremonies of strangers (statements 10, 11 and 14 to 17), each with
the defence switched off once: a test that still passes then would prove nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from plugin_api.errors import InvalidRequest
from sidecar.core import lease_entry, leases, rekey, token_entry
from sidecar.core.token_entry import BATCH
from sidecar.core.tokens import TokenStore
from sidecar.request import pipeline
from sidecar.request.types import HttpRequest
from tests.support.leasing import Setup, make_setup
from tests.support.service_node import Harness, running


@pytest.fixture
async def it() -> Setup:
    return await make_setup()


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


def uncapped(what: str, wanted_s: int, limit_s: int, warnings: list[str]) -> int:
    """The planted fault: what is asked for is what there is."""
    return wanted_s


# -- 10: renewals beyond the maximum

INCREMENTS = (0, 1, -1, -(10**9), 100, 10**6)


async def end_of_a_renewed_token(it: Setup) -> tuple[int, int]:
    """(when it ends, when it must) of a token renewed in every odd way, the last time within its last second."""
    issued = await it.token(ttl_s=50, explicit_max_ttl_s=100, max_ttl_s=80)
    for increment_s in INCREMENTS:
        await it.leasing.tokens.renew(issued.token, increment_s)
    it.now.advance(79)
    ends_s = (await it.leasing.tokens.renew(issued.token, 10**6)).entry.expires_s
    return ends_s, issued.entry.created_s + 80


async def test_10_no_renewal_passes_a_maximum(it: Setup) -> None:
    ends_s, latest_s = await end_of_a_renewed_token(it)
    assert ends_s == latest_s
    lease = (await it.lease((await it.token()).entry, ttl_s=50, max_ttl_s=80)).entry
    it.now.advance(40)
    assert (await it.leasing.leases.renew(lease.id, 10**6)).entry.expires_s == lease.issued_s + 80
    for ttl_s in (10**9, 0):
        assert 0 < (await it.token(ttl_s=ttl_s, max_ttl_s=80)).entry.ttl_s <= 80, "never one that does not end"


async def test_10_control_uncapped_it_would_live_on(it: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_entry, "capped", uncapped)
    monkeypatch.setattr(lease_entry, "capped", uncapped)
    ends_s, latest_s = await end_of_a_renewed_token(it)
    assert ends_s > latest_s + 10**5
    lease = (await it.lease((await it.token()).entry, ttl_s=50, max_ttl_s=80)).entry
    assert (await it.leasing.leases.renew(lease.id, 10**6)).entry.expires_s > lease.issued_s + 80


# -- 11: leases that outlive their token


async def lease_of_a_batch_token(it: Setup) -> tuple[int, int]:
    """(when the lease ends, when the token does)"""
    batch = await it.token(type=BATCH, ttl_s=60, parent=None)
    entry = (await it.lease(batch.entry, ttl_s=3000, max_ttl_s=9000)).entry
    it.now.advance(50)
    return (await it.leasing.leases.renew(entry.id, 3000)).entry.expires_s, batch.entry.expires_s


async def test_11_a_lease_ends_with_a_token_that_cannot_be_revoked(it: Setup) -> None:
    lease_s, token_s = await lease_of_a_batch_token(it)
    assert lease_s == token_s
    await it.expire(10)
    assert it.outside.valid == set()


async def test_11_control_by_its_own_ttl_it_would_outlive_it(it: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    first, renewed = lease_entry.first_expiry, lease_entry.renewed_expiry
    monkeypatch.setattr(leases, "first_expiry", lambda lease, mount, now_s, token_s: first(lease, mount, now_s, 0))

    def of_itself(entry: Any, *times: int) -> Any:
        return renewed(msgspec.structs.replace(entry, token_expires_s=0), *times)

    monkeypatch.setattr(leases, "renewed_expiry", of_itself)
    lease_s, token_s = await lease_of_a_batch_token(it)
    assert lease_s > token_s + 1000


# -- 14: what counts once, used twice or by many at once

TRIES = 20


async def unwraps(node: Harness) -> list[int]:
    wrapped = await node.call("POST", "sys/wrapping/wrap", {"a": "b"}, X_Vault_Wrap_TTL="60")
    token = wrapped.body["wrap_info"]["token"]
    spellings = [token, f"{token} ", f" {token}"] + [token] * TRIES
    tries = [node.call("POST", "sys/wrapping/unwrap", {"token": spelling}) for spelling in spellings]
    return [reply.status for reply in await asyncio.gather(*tries)]


async def test_14_what_counts_once_counts_once(node: Harness) -> None:
    found = await unwraps(node)
    assert sorted(found) == [200] + [400] * (TRIES + 2)
    made = await node.call("POST", "auth/token/create", {"policies": ["default"], "num_uses": 1})
    token = made.body["auth"]["client_token"]
    uses = await asyncio.gather(*(node.call("GET", "auth/token/lookup-self", token=token) for _ in range(TRIES)))
    assert sorted(reply.status for reply in uses) == [200] + [403] * (TRIES - 1)


async def test_14_control_read_and_not_taken_it_counts_often(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is looked at in place of being consumed in the commit that reads its contents."""
    take = TokenStore.take

    async def look(self: TokenStore, token: str, names: Any, renewed: Any) -> Any:
        if token not in kept:
            kept[token] = await take(self, token, names, renewed)
        return kept[token]

    kept: dict[str, Any] = {}

    async def still_there(self: Any, token: str) -> Any:
        return token

    monkeypatch.setattr(TokenStore, "take", look)
    monkeypatch.setattr("sidecar.core.wrapping.Wrapping._entry", still_there)
    assert (await unwraps(node)).count(200) > 1


# -- 15: ids of others


async def test_15_a_lease_of_another_cluster_is_as_unknown_as_none(it: Setup) -> None:
    other = await make_setup()
    foreign = (await other.lease((await other.token()).entry)).entry
    texts = set()
    for lease_id in (foreign.id, "db/creds/app/" + "A" * 24):
        with pytest.raises(InvalidRequest) as refused:
            await it.leasing.leases.renew(lease_id, 10)
        texts.add(str(refused.value))
        await it.leasing.revocation.revoke(lease_id)
    assert texts == {leases.NOT_FOUND}
    assert other.outside.calls == []


async def test_15_control_in_one_store_it_would_be_known(it: Setup) -> None:
    """The ids are told apart by whose store they stand in, and by nothing in them."""
    other = await make_setup()
    other.sealed = it.sealed
    await other.start()
    foreign = (await other.lease((await other.token()).entry)).entry
    assert (await it.leasing.leases.renew(foreign.id, 10)).entry.id == foreign.id


# -- 16: a bound token elsewhere


async def used_elsewhere(node: Harness) -> tuple[int, int]:
    """(status from the token's network, status from another)"""
    await node.call("POST", "auth/token/roles/bound", {"token_bound_cidrs": "192.0.2.0/24"})
    token = (await node.call("POST", "auth/token/create/bound")).body["auth"]["client_token"]
    found = []
    for address in ("192.0.2.7", "198.51.100.7"):
        request = HttpRequest("GET", "auth/token/lookup-self", remote_address=address)
        request.headers["X-Vault-Token"] = token
        found.append((await node.service.handle(request)).status)
    return found[0], found[1]


async def test_16_a_bound_token_counts_in_its_network_only(node: Harness) -> None:
    assert await used_elsewhere(node) == (200, 403)


async def test_16_control_unasked_it_counts_everywhere(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "address_allowed", lambda cidrs, address: True)
    assert await used_elsewhere(node) == (200, 200)


# -- 17: strangers at a ceremony

CEREMONIES = {
    "rekey/init": {"secret_shares": 3, "secret_threshold": 2},
    "generate-root/attempt": {},
}


async def cancelled_by_a_stranger(node: Harness, path: str) -> bool:
    begun = await node.call("PUT", f"sys/{path}", CEREMONIES[path], token=None)
    assert begun.body["started"]
    for stranger in (None, {"nonce": "x"}):
        await node.call("DELETE", f"sys/{path}", stranger, token=None)
    denied = await node.token('path "other" { capabilities = ["read"] }')
    await node.call("DELETE", f"sys/{path}", token=denied)
    return not (await node.call("GET", f"sys/{path}", token=None)).body["started"]


@pytest.mark.parametrize("path", list(CEREMONIES))
async def test_17_a_stranger_ends_no_ceremony(node: Harness, path: str) -> None:
    assert not await cancelled_by_a_stranger(node, path)
    again = await node.call("PUT", f"sys/{path}", CEREMONIES[path], token=None)
    assert (again.status, "already in progress" in again.errors[0]) == (400, True)
    nonce = (await node.call("GET", f"sys/{path}", token=None)).body["nonce"]
    for who in ({"nonce": nonce}, None):
        ended = await node.call("DELETE", f"sys/{path}", who, token=None if who else node.root)
        assert ended.status == 204, "who began it, and who may by a token, can"
        assert not (await node.call("GET", f"sys/{path}", token=None)).body["started"]
        await node.call("PUT", f"sys/{path}", CEREMONIES[path], token=None)
    node.clock.now_s += rekey.CANCEL_NEEDS_NONCE_S
    assert (await node.call("DELETE", f"sys/{path}", token=None)).status == 204, "one that was left lying can go"


@pytest.mark.parametrize("path", list(CEREMONIES))
async def test_17_control_without_the_rule_a_stranger_does(
    node: Harness, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr("sidecar.core.rekey.CANCEL_NEEDS_NONCE_S", 0)
    monkeypatch.setattr("sidecar.api.token_generation.CANCEL_NEEDS_NONCE_S", 0)
    assert await cancelled_by_a_stranger(node, path)
