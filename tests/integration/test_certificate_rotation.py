"""Certificates of secondaries that renew themselves, authorities that are rotated, keys that tokens are encrypted to;
over real TLS and in-memory stores, with a crash at each step of a renewal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from consul_backend.clock import SystemClock
from plugin_api.errors import InvalidRequest, Unavailable
from sidecar.replication.activation import Bundle, bootstrap, secondary_identity
from sidecar.replication.certifying import CERTIFICATE_PATH, CertificateReply, CertificateRequest
from sidecar.replication.mode_status import gauges_of
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from sidecar.replication.renewal import Renewal
from sidecar.replication.roles import PrimaryRole, SecondaryRole, decode_role, encode_role
from sidecar.transport import certificates
from sidecar.transport.forwarding import decode, encode
from sidecar.transport.peer import PeerAnswer, PeerClient, PeerOutcomeUnknown, PeerUnreachable
from tests.support.replication_cluster import (
    OPTIONS,
    Auth,
    Cluster,
    Pair,
    Request,
    in_step,
    primary_in,
    until,
)

BOTH = (PERFORMANCE, DR)
QUICK = replace(OPTIONS, certificate_check_s=0.05, forward_timeout_s=5.0)
"""Looks for work all the time; certificates live for a year."""
BY_HAND = replace(QUICK, certificate_check_s=3600.0)
"""Looks for none: the test does."""


class Later(SystemClock):
    """Two thirds of a certificate's life from now: no test waits for a certificate to age, nor lets one expire."""

    def time_ms(self) -> int:
        return super().time_ms() + 250 * 86_400_000


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with primary_in(*BOTH, primary=Cluster("us", options=QUICK)) as pair:
        yield pair


def primary_role(cluster: Cluster, mode: Mode = PERFORMANCE) -> PrimaryRole:
    role = cluster.of(mode).role
    assert isinstance(role, PrimaryRole)
    return role


def secondary_role(cluster: Cluster, mode: Mode = PERFORMANCE) -> SecondaryRole:
    role = cluster.of(mode).role
    assert isinstance(role, SecondaryRole)
    return role


def shown(cluster: Cluster, mode: Mode = PERFORMANCE) -> str:
    """The fingerprint of the certificate a secondary holds."""
    return certificates.fingerprint(secondary_role(cluster, mode).certificate_pem)


async def followed(pair: Pair, mode: Mode = PERFORMANCE, name: str = "eu", options: Any = QUICK) -> Cluster:
    secondary = await pair.activate(name, options, mode=mode)
    await until(lambda: in_step(pair.primary, secondary, mode))
    return secondary


async def ships(pair: Pair, secondary: Cluster, mode: Mode = PERFORMANCE, key: str = "r/m/after") -> None:
    """What is written now arrives."""
    pair.primary.store.write((key, b"value"))
    await until(lambda: in_step(pair.primary, secondary, mode))
    assert secondary.store.data[key] == b"value"


# ---- renewal


@pytest.mark.parametrize("mode", BOTH, ids=lambda mode: mode.name)
async def test_a_certificate_is_renewed_in_time(pair: Pair, mode: Mode) -> None:
    secondary = await followed(pair, mode)
    first = shown(secondary, mode)
    overdue(secondary, mode)
    await until(lambda: shown(secondary, mode) != first)
    await until(lambda: primary_role(pair.primary, mode).secondaries["eu"].fingerprints == (shown(secondary, mode),))
    await ships(pair, secondary, mode)
    again = await pair.start("eu-again", secondary.store, QUICK) if await stopped(secondary) else secondary
    await ships(pair, again, mode, "r/m/restarted")


def overdue(secondary: Cluster, mode: Mode = PERFORMANCE) -> None:
    """Its certificate looks old from now on."""
    service = secondary.of(mode).secondary
    assert service is not None
    service._renewal._clock = Later()


async def stopped(cluster: Cluster) -> bool:
    await cluster.stop()
    return True


async def test_a_certificate_that_has_time_is_left_alone(pair: Pair) -> None:
    """The control: looking does not renew."""
    secondary = await followed(pair)
    first, looked = shown(secondary), 0
    service = secondary.of(PERFORMANCE).secondary
    assert service is not None
    inner = service._renewal.once

    async def count() -> SecondaryRole | None:
        nonlocal looked
        looked += 1
        return await inner()

    service._renewal.once = count  # type: ignore[method-assign]  # counts and passes on
    await until(lambda: looked >= 3)
    assert shown(secondary) == first
    status = await secondary.manager.status("performance")
    assert status["certificate"]["sha256"] == first
    assert status["certificate"]["renewal_due"] < status["certificate"]["expires"]


async def asked(pair: Pair, secondary: Cluster) -> tuple[Renewal, PeerClient, list[str]]:
    """A renewal by hand with the secondary's own certificate, and what it kept."""
    kept: list[str] = []
    role = secondary_role(secondary)
    client = PeerClient(secondary_identity(PERFORMANCE, role), pair.primary.address)

    async def post(body: bytes) -> PeerAnswer:
        return await client.post(CERTIFICATE_PATH, body, timeout_s=60)

    async def keep(_: bytes, credentials: certificates.Credentials, authority: bytes) -> SecondaryRole | None:
        kept.append(certificates.fingerprint(credentials.certificate_pem))
        return None

    return Renewal(Later(), role=lambda: role, post=post, keep=keep), client, kept


def crash_after_offer(renewal: Renewal) -> Callable[[], bool]:
    """The primary commits the new certificate, and its answer is lost. Returns whether that happened."""
    inner, lost = renewal._post, []

    async def lose(body: bytes) -> PeerAnswer:
        answer = await inner(body)
        if decode(body, CertificateRequest, bytes_max=10_000).request:
            lost.append(answer)
            raise PeerOutcomeUnknown("the answer was lost")
        return answer

    renewal._post = lose
    return lambda: bool(lost)


async def test_every_step_of_a_renewal_may_be_the_last(pair: Pair) -> None:
    secondary = await followed(pair, options=BY_HAND)
    first = shown(secondary)

    renewal, client, kept = await asked(pair, secondary)
    lost = crash_after_offer(renewal)
    assert await renewal.once() is None
    assert lost()
    assert kept == []
    known = primary_role(pair.primary).secondaries["eu"]
    assert (known.fingerprint, bool(known.next_fingerprint)) == (first, True)
    await ships(pair, secondary, key="r/m/1")  # the old one goes on

    second, other, kept = await asked(pair, secondary)
    await second.once()  # committed there, and the secondary dies before it commits
    known = primary_role(pair.primary).secondaries["eu"]
    assert known.fingerprints == (first, kept[0])
    await ships(pair, secondary, key="r/m/2")
    await client.close()
    await other.close()


async def test_a_secondary_that_died_after_its_commit_comes_back_with_the_new_one(pair: Pair) -> None:
    secondary = await followed(pair, options=BY_HAND)
    first = shown(secondary)
    manager, service = secondary.of(PERFORMANCE), secondary.of(PERFORMANCE).secondary
    assert service is not None
    request, key_pem = await asyncio.to_thread(certificates.make_request, "eu")
    reply = await told(pair, secondary, request)
    await manager._renewed(
        secondary_role(secondary).certificate_pem,
        certificates.Credentials(reply.certificate, key_pem),
        reply.authorities,
    )
    await secondary.stop()
    assert primary_role(pair.primary).secondaries["eu"].fingerprint == first
    again = await pair.start("eu-again", secondary.store, QUICK)
    await until(lambda: in_step(pair.primary, again))
    new = certificates.fingerprint(reply.certificate)
    assert primary_role(pair.primary).secondaries["eu"].fingerprints == (new,)
    assert shown(again) == new


async def told(pair: Pair, secondary: Cluster, request: bytes = b"") -> CertificateReply:
    client = PeerClient(secondary_identity(PERFORMANCE, secondary_role(secondary)), pair.primary.address)
    try:
        answer = await client.post(CERTIFICATE_PATH, encode(CertificateRequest(request)), timeout_s=60)
    finally:
        await client.close()
    assert answer.status == 200, answer.body
    return decode(answer.body, CertificateReply, bytes_max=100_000)


async def test_the_old_certificate_is_out_when_the_new_one_was_used(pair: Pair) -> None:
    secondary = await followed(pair)
    before = secondary_role(secondary)
    thief = PeerClient(secondary_identity(PERFORMANCE, before), pair.primary.address)
    body = encode(CertificateRequest())
    assert (await thief.post(CERTIFICATE_PATH, body, timeout_s=60)).status == 200  # the control
    overdue(secondary)
    old = certificates.fingerprint(before.certificate_pem)
    await until(lambda: primary_role(pair.primary).by_fingerprint(old) is None)
    with pytest.raises((PeerOutcomeUnknown, PeerUnreachable)):
        await thief.post(CERTIFICATE_PATH, body, timeout_s=60)
    await thief.close()


async def test_a_forwarded_write_survives_a_renewal(pair: Pair) -> None:
    """The write is under way on the old connection while certificate, clients and stream change."""
    secondary = await followed(pair, options=replace(QUICK, forward_timeout_s=120.0))
    first, entered, go_on = shown(secondary), asyncio.Event(), asyncio.Event()
    execute = pair.primary.execute

    async def slow(request: Any) -> Any:
        entered.set()
        await go_on.wait()
        return await execute(request)

    pair.primary.execute = slow
    forwarding = asyncio.create_task(secondary.manager.forward_to_primary(Request(), Auth()))
    await entered.wait()
    overdue(secondary)
    await until(lambda: primary_role(pair.primary).by_fingerprint(first) is None)
    go_on.set()
    assert (await forwarding).status == 204


async def test_a_revoked_secondary_renews_nothing_and_loses_both(pair: Pair) -> None:
    secondary = await followed(pair, options=BY_HAND)
    request, _ = await asyncio.to_thread(certificates.make_request, "eu")
    reply = await told(pair, secondary, request)
    await pair.primary.manager.revoke_secondary("performance", "eu")
    assert pair.primary.listener.statistics()["connections"] == 0
    role = primary_role(pair.primary)
    assert role.by_fingerprint(certificates.fingerprint(reply.certificate)) is None
    with pytest.raises((PeerOutcomeUnknown, PeerUnreachable)):
        await told(pair, secondary, request)


async def test_what_is_no_request_is_refused(pair: Pair) -> None:
    secondary = await followed(pair)
    client = PeerClient(secondary_identity(PERFORMANCE, secondary_role(secondary)), pair.primary.address)
    for body in (encode(CertificateRequest(b"junk")), b"\xc1", b"x" * 70_000):
        assert (await client.post(CERTIFICATE_PATH, body, timeout_s=60)).status in (400, 403, 413)
    await client.close()
    assert primary_role(pair.primary).secondaries["eu"].next_fingerprint == ""


# ---- authorities


@pytest.mark.parametrize("mode", BOTH, ids=lambda mode: mode.name)
async def test_an_authority_is_rotated_without_a_token(pair: Pair, mode: Mode) -> None:
    one, other = await followed(pair, mode, "eu"), await followed(pair, mode, "ap")
    old = primary_role(pair.primary, mode).authority_pem
    answer = await pair.primary.manager.rotate_authority(mode.name, 3600, force=False)
    assert answer.data["waiting_for"] == ["ap", "eu"]
    await until(lambda: not primary_role(pair.primary, mode).rotating)
    new = primary_role(pair.primary, mode).authority_pem
    assert new != old
    for cluster in (one, other):
        await until(lambda cluster=cluster: secondary_role(cluster, mode).authority_pem == new)
        await until(lambda cluster=cluster: in_step(pair.primary, cluster, mode))
        assert certificates.issued_by(secondary_role(cluster, mode).certificate_pem, new)
        await cluster.stop()
    again = await pair.start("eu-again", one.store, QUICK)
    await ships(pair, again, mode)
    late = await followed(pair, mode, "late")
    assert certificates.issued_by(secondary_role(late, mode).certificate_pem, new)


async def test_a_rotation_waits_shows_for_whom_and_can_be_ended(pair: Pair) -> None:
    secondary = await followed(pair)
    gone = await followed(pair, name="gone")
    await gone.stop()
    old = primary_role(pair.primary).authority_pem
    await pair.primary.manager.rotate_authority("performance", 3600, force=False)
    await until(
        lambda: certificates.issued_by(
            secondary_role(secondary).certificate_pem, primary_role(pair.primary).next_authority_pem or old
        )
    )
    await until(lambda: primary_role(pair.primary).secondaries["eu"].next_fingerprint == "")
    shown_authority = (await pair.primary.manager.status("performance"))["certificate_authority"]
    assert shown_authority["waiting_for"] == ["gone"]
    assert int(shown_authority["overlap_ends_ms"]) > 0
    assert "PRIVATE" not in str(shown_authority)
    assert gauges_of(pair.primary.of(PERFORMANCE))["replication.performance.rotation_waiting"] == 1
    left_s = gauges_of(secondary.of(PERFORMANCE))["replication.performance.certificate_left_s"]
    assert 364 * 86_400 < left_s <= 365 * 86_400
    with pytest.raises(InvalidRequest, match="already"):
        await pair.primary.manager.rotate_authority("performance", 3600, force=False)
    await ships(pair, secondary)
    await pair.primary.manager.rotate_authority("performance", 0, force=True)
    assert not primary_role(pair.primary).rotating
    await ships(pair, secondary, key="r/m/ended")
    returned = await pair.start("gone-again", gone.store, QUICK)
    service = returned.of(PERFORMANCE).secondary
    assert service is not None
    await until(lambda: service._failures >= 3)
    assert "r/m/ended" not in returned.store.data
    await returned.manager.secondary_update_primary("performance", await replaced(pair, "gone"))
    await until(lambda: in_step(pair.primary, returned))
    with pytest.raises(InvalidRequest, match="not being rotated"):
        await pair.primary.manager.rotate_authority("performance", 0, force=True)


async def replaced(pair: Pair, name: str) -> str:
    await pair.primary.manager.revoke_secondary("performance", name)
    return await pair.token(name)


async def test_a_rotation_ends_at_its_deadline(pair: Pair) -> None:
    gone = await followed(pair, name="gone")
    await gone.stop()
    await pair.primary.manager.rotate_authority("performance", 0.2, force=False)
    await until(lambda: not primary_role(pair.primary).rotating)
    assert set(primary_role(pair.primary).secondaries) == {"gone"}


async def test_a_secondary_that_was_away_renews_when_it_returns(
    pair: Pair,
) -> None:
    away = await followed(pair, name="away")
    await away.stop()
    await pair.primary.manager.rotate_authority("performance", 3600, force=False)
    await pair.primary.stop()  # and the primary restarts in the middle
    pair.primary = await Cluster("us", pair.primary.store, QUICK).start()
    assert primary_role(pair.primary).rotating
    role = decode_role(away.store.data[PERFORMANCE.role_key])
    assert isinstance(role, SecondaryRole)
    away.store.write((PERFORMANCE.role_key, _at(role, pair.primary.address)))
    back = await pair.start("away-again", away.store, QUICK)
    await until(lambda: not primary_role(pair.primary).rotating)
    await ships(pair, back)


def _at(role: SecondaryRole, address: str) -> bytes:
    return encode_role(msgspec.structs.replace(role, addresses=(address,), primary_cluster_addr=address))


async def test_a_token_of_before_the_rotation_works_during_it(pair: Pair) -> None:
    token, fresh = await pair.token("slow"), await pair.start("fresh")
    await pair.primary.manager.rotate_authority("performance", 3600, force=False)
    status = (await pair.primary.manager.status("performance"))["certificate_authority"]
    assert status["waiting_for"] == ["slow"]
    await fresh.manager.secondary_enable("performance", token, "", "", "")
    assert len(fresh.flipped) == 1


# ---- tokens that are encrypted to a key


@pytest.mark.parametrize("mode", BOTH, ids=lambda mode: mode.name)
async def test_activation_by_an_encrypted_token_asks_no_api(pair: Pair, mode: Mode) -> None:
    fresh = await pair.start("fresh")
    key = (await fresh.manager.secondary_public_key(mode.name)).data["secondary_public_key"]
    payload, claims = await pair.primary.manager.secondary_token(mode.name, "eu", 1800, key)
    assert (list(payload), claims) == (["token"], {})
    await fresh.manager.secondary_enable(mode.name, payload["token"], "", "", "")
    assert pair.api.calls == []
    fresh.store.write(*fresh.flipped[0].entries.items())
    await fresh.stop()
    secondary = await pair.start("eu", fresh.store, QUICK)
    await ships(pair, secondary, mode)


async def test_an_encrypted_token_is_good_for_one_cluster_and_one_store(pair: Pair) -> None:
    fresh, thief = await pair.start("fresh"), await pair.start("thief")
    key = (await fresh.manager.secondary_public_key("performance")).data["secondary_public_key"]
    await thief.manager.secondary_public_key("performance")
    payload, _ = await pair.primary.manager.secondary_token("performance", "eu", 1800, key)
    with pytest.raises(InvalidRequest, match="does not hold"):
        await thief.manager.secondary_enable("performance", payload["token"], "", "", "")
    with pytest.raises(InvalidRequest, match="another mode"):
        await fresh.manager.secondary_enable("dr", await _for_dr(fresh, payload), "", "", "")
    await fresh.manager.secondary_enable("performance", payload["token"], "", "", "")
    stolen = fresh.flipped[0].role
    with pytest.raises(InvalidRequest, match="used already"):  # who got hold of the opened bundle
        await bootstrap(PERFORMANCE, _bundle(stolen), store_id="another", timeout_s=60)


async def _for_dr(fresh: Cluster, payload: dict[str, str]) -> str:
    """The performance token where a key for mode dr is held too: the same bytes under another mode's name."""
    raw = fresh.store.data["c/replication/activation-key/performance"]
    await fresh.store.put("c/replication/activation-key/dr", raw)
    return payload["token"]


def _bundle(role: SecondaryRole) -> Any:
    return Bundle(
        role.secondary_id,
        role.set_id,
        role.epoch,
        role.primary_cluster_addr,
        role.authority_pem,
        role.credentials,
    )


async def test_an_activation_that_broke_off_is_tried_again_with_the_same_encrypted_token(pair: Pair) -> None:
    fresh = await pair.start("fresh")
    key = (await fresh.manager.secondary_public_key("performance")).data["secondary_public_key"]
    payload, _ = await pair.primary.manager.secondary_token("performance", "eu", 1800, key)

    async def broken(_: Any) -> None:
        raise Unavailable("the flip failed")

    manager = fresh.manager
    works, manager._callbacks = manager._callbacks, replace(manager._callbacks, flip=broken)
    with pytest.raises(Unavailable):
        await manager.secondary_enable("performance", payload["token"], "", "", "")
    manager._callbacks = works
    await manager.secondary_enable("performance", payload["token"], "", "", "")
    assert len(fresh.flipped) == 1


async def test_update_primary_by_an_encrypted_token_uses_the_key_up(pair: Pair) -> None:
    secondary = await followed(pair)
    key = (await secondary.manager.secondary_public_key("performance")).data["secondary_public_key"]
    payload, _ = await pair.primary.manager.secondary_token("performance", "eu-2", 1800, key)
    await secondary.manager.secondary_update_primary("performance", payload["token"])
    await ships(pair, secondary)
    assert secondary_role(secondary).secondary_id == "eu-2"
    assert "c/replication/activation-key/performance" not in secondary.store.data
    with pytest.raises(InvalidRequest, match="does not hold"):
        await secondary.manager.secondary_update_primary("performance", payload["token"])


async def test_keys_are_made_where_they_can_be_used(pair: Pair) -> None:
    with pytest.raises(InvalidRequest, match="is a performance replication primary"):
        await pair.primary.manager.secondary_public_key("performance")
    before = primary_role(pair.primary)
    with pytest.raises(InvalidRequest, match="generate-public-key"):
        await pair.primary.manager.secondary_token("performance", "eu", 1800, "no key")
    assert primary_role(pair.primary) is before
    mirror = await followed(pair, DR, "mirror")
    assert (await mirror.manager.secondary_public_key("dr")).data["secondary_public_key"].startswith("ork1.")
