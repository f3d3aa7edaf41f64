"""Renewed certificates and rotated authorities, as changes of the primary's role."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from plugin_api.errors import InvalidRequest, PermissionDenied
from sidecar.replication import allow_list, authorities, renewal, roles
from sidecar.replication.history import Epoch, Promotion
from sidecar.replication.modes import PERFORMANCE
from sidecar.replication.roles import DisabledRole, PrimaryRole
from sidecar.transport import certificates

FIRST = certificates.make_authority("first")
SECOND = certificates.make_authority("second")
FIRST_SHA, SECOND_SHA = (certificates.fingerprint(one.certificate_pem) for one in (FIRST, SECOND))
BEGAN = Promotion(1, "epoch", 1000)


def primary(*ids: str) -> PrimaryRole:
    """With connected secondaries; the certificate of ``x`` is ``x1``."""
    role = roles.enable_primary(
        PERFORMANCE, DisabledRole(), set_id="set", began=BEGAN, cluster_addr="", authority=FIRST
    )
    for one in ids:
        role, _ = allow_list.add_secondary(PERFORMANCE, role, one, f"{one}1", now_ms=0, ttl_ms=1000)
        role = allow_list.claim_store(PERFORMANCE, role, f"{one}1", "set", Epoch(1, "epoch"), one, now_ms=0)
        role = hello(role, one, f"{one}1")
    return role


def hello(role: PrimaryRole, one: str, shown: str) -> PrimaryRole:
    return allow_list.connect(PERFORMANCE, role, shown, "set", one)


def offered(role: PrimaryRole, shown: str, new: str) -> PrimaryRole:
    signer = certificates.fingerprint(role.renewing.certificate_pem)
    return authorities.offer(PERFORMANCE, role, shown, new, signer)


def test_both_certificates_count_until_the_new_one_is_used() -> None:
    role = offered(primary("eu"), "eu1", "eu2")
    assert role.by_fingerprint("eu1") is role.by_fingerprint("eu2") is not None
    assert hello(role, "eu", "eu1") is role  # the answer was lost, or it was not stored: the old one goes on
    after = hello(role, "eu", "eu2")
    assert after.by_fingerprint("eu1") is None
    assert after.secondaries["eu"].fingerprints == ("eu2",)
    assert hello(after, "eu", "eu2") is after


def test_an_offer_that_was_lost_is_replaced() -> None:
    role = offered(offered(primary("eu"), "eu1", "eu2"), "eu1", "eu3")
    assert role.secondaries["eu"].fingerprints == ("eu1", "eu3")
    assert role.by_fingerprint("eu2") is None


def test_who_asks_with_a_renewed_certificate_gives_the_old_one_up() -> None:
    role = offered(offered(primary("eu"), "eu1", "eu2"), "eu2", "eu3")
    assert role.secondaries["eu"].fingerprints == ("eu2", "eu3")


def test_revoking_ends_both() -> None:
    after, doomed = allow_list.revoke(PERFORMANCE, offered(primary("eu", "us"), "eu1", "eu2"), "eu")
    assert doomed == ("eu1", "eu2")
    assert list(after.secondaries) == ["us"]


def test_strangers_are_offered_nothing() -> None:
    with pytest.raises(PermissionDenied):
        offered(primary("eu"), "nobody", "new")
    unconnected, _ = allow_list.add_secondary(PERFORMANCE, primary(), "eu", "eu1", now_ms=0, ttl_ms=1)
    with pytest.raises(PermissionDenied):
        offered(unconnected, "eu1", "eu2")
    with pytest.raises(PermissionDenied, match="changed meanwhile"):
        authorities.offer(PERFORMANCE, primary("eu"), "eu1", "eu2", SECOND_SHA)


def test_a_rotation_waits_for_every_secondary() -> None:
    role = authorities.begin(PERFORMANCE, primary("eu", "us"), SECOND, deadline_ms=10**9)
    assert role.trusted_pem == FIRST.certificate_pem + SECOND.certificate_pem
    assert (role.authority, role.renewing) == (FIRST, SECOND)
    assert authorities.waiting(role, now_ms=0) == ["eu", "us"]
    role = hello(offered(role, "eu1", "eu2"), "eu", "eu2")
    role = offered(role, "us1", "us2")  # has it, has not used it
    assert authorities.waiting(role, now_ms=0) == ["us"]
    assert not authorities.due(role, now_ms=0)
    role = hello(role, "us", "us2")
    assert authorities.due(role, now_ms=0)
    after, dead = authorities.finish(PERFORMANCE, role)
    assert (after.authority, after.trusted_pem, after.rotating, dead) == (SECOND, SECOND.certificate_pem, False, ())
    again = authorities.begin(PERFORMANCE, after, FIRST, deadline_ms=1)
    assert authorities.waiting(again, now_ms=0) == ["eu", "us"]


def test_a_rotation_ends_at_its_deadline_and_says_who_is_out() -> None:
    role = hello(
        offered(authorities.begin(PERFORMANCE, primary("eu", "us"), SECOND, deadline_ms=500), "eu1", "eu2"), "eu", "eu2"
    )
    assert not authorities.due(role, now_ms=499)
    assert authorities.due(role, now_ms=500)
    after, dead = authorities.finish(PERFORMANCE, role)
    assert dead == ("us1",)
    assert set(after.secondaries) == {"eu", "us"}  # known still: it is not revoked, it needs a token


def test_a_rotation_waits_for_tokens_that_may_still_come() -> None:
    role, _ = allow_list.add_secondary(PERFORMANCE, primary(), "eu", "eu1", now_ms=0, ttl_ms=1000)
    role = authorities.begin(PERFORMANCE, role, SECOND, deadline_ms=10**9)
    assert authorities.waiting(role, now_ms=1000 + roles.BOOTSTRAP_GRACE_MS) == ["eu"]
    assert authorities.waiting(role, now_ms=1001 + roles.BOOTSTRAP_GRACE_MS) == []


def test_one_rotation_at_a_time() -> None:
    role = authorities.begin(PERFORMANCE, primary("eu"), SECOND, deadline_ms=1)
    with pytest.raises(InvalidRequest, match="already"):
        authorities.begin(PERFORMANCE, role, FIRST, deadline_ms=1)
    with pytest.raises(InvalidRequest, match="not being rotated"):
        authorities.finish(PERFORMANCE, primary("eu"))


def test_a_role_of_before_has_no_rotation() -> None:
    """Fields that were added later have defaults: an older entry is read as it was meant."""
    role = primary("eu")
    older = roles.encode_role(role)
    assert roles.decode_role(older) == role
    assert not role.rotating
    assert role.trusted_pem == FIRST.certificate_pem


def test_a_certificate_is_made_for_the_key_of_a_request_and_for_nothing_else_it_says() -> None:
    request, key_pem = certificates.make_request("admin")
    pem = certificates.sign_request(FIRST, request, "eu", validity=timedelta(hours=1))
    assert certificates.belongs(pem, key_pem, FIRST.certificate_pem)
    assert not certificates.belongs(pem, key_pem, SECOND.certificate_pem)
    assert certificates.belongs(pem, key_pem, SECOND.certificate_pem + FIRST.certificate_pem)
    assert x509.load_pem_x509_certificate(pem).subject.rfc4514_string() == "CN=eu"
    issued_s, expires_s = certificates.period_s(pem)
    assert expires_s - issued_s == 3600


def test_a_certificate_is_renewed_at_two_thirds_of_its_life() -> None:
    pem = certificates.issue_client(FIRST, "eu", validity=timedelta(hours=3)).certificate_pem
    issued_s, _ = certificates.period_s(pem)
    assert not renewal.renewal_due(pem, issued_s + 2 * 3600 - 1)
    assert renewal.renewal_due(pem, issued_s + 2 * 3600)


def test_an_expired_certificate_is_named_as_the_reason() -> None:
    pem = certificates.issue_client(FIRST, "eu", validity=timedelta(hours=3)).certificate_pem
    _, expires_s = certificates.period_s(pem)
    assert renewal.reason_lost(["a: refused", "b: refused"], pem, expires_s * 1000 - 1) == "a: refused; b: refused"
    assert "expired: it needs a new token" in renewal.reason_lost(["a: refused"], pem, expires_s * 1000)


def test_a_certificate_counts_a_day_before_it_was_made() -> None:
    """The clock of the other end may be behind."""
    made = certificates.issue_client(FIRST, "eu", validity=timedelta(hours=3)).certificate_pem
    begins = x509.load_pem_x509_certificate(made).not_valid_before_utc.timestamp()
    assert certificates.period_s(made)[0] - begins == certificates.BACKDATED.total_seconds() == 86_400


def _request(key: ec.EllipticCurvePrivateKey) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def test_requests_that_are_refused() -> None:
    good = certificates.make_request("eu")[0]
    tampered = good[:-1] + bytes([good[-1] ^ 1])
    small = _request(ec.generate_private_key(ec.SECP256R1()))
    for bad in (b"", b"junk", good[:-10], tampered, small, bytes(5000)):
        with pytest.raises(ValueError, match=r".*"):
            certificates.sign_request(FIRST, bad, "eu", validity=timedelta(hours=1))
