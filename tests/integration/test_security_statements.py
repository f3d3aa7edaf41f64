"""The security statements about the cluster port (19 to 25) and activation (29 to 36): where each is held, and those
that no other file holds. ``HELD`` is checked against the sources, so that a test cannot go without its statement."""

from __future__ import annotations

import asyncio
import ssl
import warnings
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from plugin_api.errors import InvalidRequest, Unavailable
from sidecar.replication.activation import bootstrap, check_origin, parse_bundle, secondary_identity
from sidecar.replication.modes import DR, PERFORMANCE
from sidecar.replication.roles import PrimaryRole, SecondaryRole
from sidecar.transport import certificates
from sidecar.transport.certificates import Credentials
from sidecar.transport.peer import PeerClient, PeerOutcomeUnknown, PeerUnreachable
from sidecar.transport.tls import base_server_context, server_context
from tests.integration.test_cluster_port import REPLICATION, SIDES, Port, lax_context, port, raw_call
from tests.support.replication_cluster import Cluster as Node
from tests.support.replication_cluster import Pair, PrimaryApi, in_step, primary_in, until
from tests.support.role_node import role_node

__all__ = ["port"]  # a fixture

HERE = Path(__file__)
TESTS = HERE.parents[1]
HELD: dict[int, tuple[tuple[str, str], ...]] = {
    19: (("integration/test_cluster_port.py", "test_everything_else_is_dropped_before_a_byte_is_served"),),
    20: (
        ("integration/test_cluster_port.py", "test_everything_else_is_dropped_before_a_byte_is_served"),
        (HERE.name, "test_20_a_certificate_of_one_mode_is_none_in_the_other"),
    ),
    21: (("integration/test_cluster_port.py", "test_everything_else_is_dropped_before_a_byte_is_served"),),
    22: (
        ("integration/test_cluster_port.py", "test_no_session_is_ever_resumed"),
        ("integration/test_cluster_port.py", "test_revoked_cannot_reconnect"),
    ),
    23: ((HERE.name, "test_23_the_whole_certificate_counts"),),
    24: (
        ("integration/test_cluster_port.py", "test_host_must_name_what_sni_named"),
        ("integration/test_cluster_port.py", "test_everything_else_is_dropped_before_a_byte_is_served"),
    ),
    25: (
        ("integration/test_cluster_port.py", "test_old_protocols_are_refused"),
        (HERE.name, "test_25_no_weak_suite_compression_or_renegotiation"),
    ),
    29: (("unit/test_activation.py", "test_tokens_that_are_refused"), ("unit/test_wrapping.py", "test_forged_jwts")),
    30: (("unit/test_activation.py", "test_tokens_that_are_refused"), ("unit/test_wrapping.py", "test_forged_jwts")),
    31: (
        ("unit/test_activation.py", "test_tokens_that_are_refused"),
        (HERE.name, "test_31_the_origin_is_compared_whole"),
    ),
    32: (
        ("unit/test_steady_time.py", "test_32_a_step_of_the_wall_clock_lengthens_and_shortens_nothing"),
        ("unit/test_steady_time.py", "test_32_an_unwrapped_activation_is_not_kept_alive_by_a_clock_that_is_set_back"),
        ("unit/test_activation.py", "test_a_minute_of_skew_is_forgiven"),
        ("unit/test_activation.py", "test_tokens_that_are_refused"),
        ("unit/test_sealed_token.py", "test_what_is_refused"),
    ),
    33: (
        ("integration/test_performance_replication.py", "test_a_token_is_good_once"),
        (HERE.name, "test_33_reuse_is_refused_and_reported"),
        (HERE.name, "test_33_a_revoked_activation_is_no_use"),
    ),
    34: (
        ("integration/test_performance_replication.py", "test_a_token_of_another_primary_is_refused"),
        (HERE.name, "test_34_a_swapped_address_fails_at_tls_and_uses_nothing_up"),
    ),
    35: (("integration/test_performance_replication.py", "test_a_rewrapped_token_is_refused_before_it_is_consumed"),),
    36: ((HERE.name, "test_36_a_dr_secondary_does_nothing_without_an_operation_token"),),
}


def test_every_statement_is_held_somewhere() -> None:
    assert sorted(HELD) == [*range(19, 26), *range(29, 37)]
    for statement, tests in HELD.items():
        for file, name in tests:
            path = HERE if file == HERE.name else TESTS / file
            assert f"def {name}(" in path.read_text(), (statement, file, name)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with primary_in(PERFORMANCE, DR, primary=Node("us")) as pair:
        yield pair


async def test_20_a_certificate_of_one_mode_is_none_in_the_other(pair: Pair) -> None:
    """One cluster, one secondary in mode performance; its certificate at the DR purpose's own name and protocol."""
    secondary = await pair.activate("eu")
    await until(lambda: in_step(pair.primary, secondary))
    role, target = secondary.of(PERFORMANCE).role, pair.primary.of(DR).role
    assert isinstance(role, SecondaryRole)
    assert isinstance(target, PrimaryRole)
    right = secondary_identity(PERFORMANCE, role)
    wrong = type(right)(DR.server_name(target.set_id), DR.alpn, role.credentials, target.authority_pem)
    for identity, served in ((right, True), (wrong, False)):
        client = PeerClient(identity, pair.primary.address)
        try:
            status = (await client.post("/alive", b"", timeout_s=60)).status
        except (PeerUnreachable, PeerOutcomeUnknown):
            status = 0
        finally:
            await client.close()
        assert (status == 204) == served


def _twin(original: Credentials, authority: Credentials) -> Credentials:
    """A certificate with the same name, serial number and dates for another key."""
    model = x509.load_pem_x509_certificate(original.certificate_pem)
    signer = serialization.load_pem_private_key(authority.key_pem, password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    issuer = x509.load_pem_x509_certificate(authority.certificate_pem)
    key = ec.generate_private_key(ec.SECP521R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(model.subject)
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(model.serial_number)
        .not_valid_before(model.not_valid_before_utc)
        .not_valid_after(model.not_valid_after_utc)
    )
    for extension in model.extensions:
        if not isinstance(extension.value, x509.SubjectKeyIdentifier | x509.AuthorityKeyIdentifier):
            builder = builder.add_extension(extension.value, extension.critical)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
    )
    return Credentials(certificates._pem(builder.sign(signer, hashes.SHA512())), certificates._key_pem(key))


async def test_23_the_whole_certificate_counts(port: Port) -> None:
    side = SIDES[0]
    twin = _twin(side.client, side.authority)
    model, copy = (x509.load_pem_x509_certificate(one.certificate_pem) for one in (side.client, twin))
    assert (model.subject, model.serial_number) == (copy.subject, copy.serial_number)
    assert await raw_call(port, lax_context(twin, [side.alpn]), side.sni) == b""
    assert port.served == []
    port.allowed.add(certificates.fingerprint(twin.certificate_pem))  # the control: nothing else is wrong with it
    assert (await raw_call(port, lax_context(twin, [side.alpn]), side.sni)).startswith(b"HTTP/1.1 200")


async def test_25_no_weak_suite_compression_or_renegotiation(port: Port) -> None:
    side = SIDES[0]
    for context in (base_server_context(), server_context(side.server, side.authority.certificate_pem, side.alpn)):
        wanted = ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
        assert context.options & wanted == wanted
        negotiable = [cipher for cipher in context.get_ciphers() if cipher["protocol"] == "TLSv1.3"]
        assert negotiable
        assert all(cipher["strength_bits"] >= 128 and cipher["aead"] for cipher in negotiable)
    for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2):
        weak = lax_context(side.client, [REPLICATION[1]])
        weak.set_ciphers("ALL:COMPLEMENTOFALL:@SECLEVEL=0")  # null and anonymous suites too
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python, about the old versions
            weak.minimum_version = version
            weak.maximum_version = version
        assert await raw_call(port, weak, side.sni) == b""
    assert port.served == []


def test_31_the_origin_is_compared_whole() -> None:
    right = PERFORMANCE.creation_path
    for wrong in (right + "2", right[:-1], f"x/{right}", right.upper(), right + "/", "", "None", DR.creation_path):
        with pytest.raises(InvalidRequest):
            check_origin(PERFORMANCE, wrong)
    check_origin(PERFORMANCE, right)


async def test_33_reuse_is_refused_and_reported(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    payload, claims = await pair.primary.manager.secondary_token("performance", "eu", 1800, "")
    bundle = parse_bundle(payload, claims["ca_sha256"])
    tries = await asyncio.gather(
        *(bootstrap(PERFORMANCE, bundle, store_id=f"store-{n}", timeout_s=60) for n in range(5)),
        return_exceptions=True,
    )
    refused = [one for one in tries if isinstance(one, InvalidRequest)]
    assert len(refused) == 4
    events = [record for record in caplog.records if record.getMessage().startswith("security:")]
    assert len(events) == 4
    fingerprint = certificates.fingerprint(bundle.credentials.certificate_pem)
    assert all(fingerprint in event.getMessage() and "used already" in event.getMessage() for event in events)


async def test_33_a_revoked_activation_is_no_use(pair: Pair) -> None:
    payload, claims = await pair.primary.manager.secondary_token("performance", "eu", 1800, "")
    await pair.primary.manager.revoke_secondary("performance", "eu")
    with pytest.raises(Unavailable):
        await bootstrap(PERFORMANCE, parse_bundle(payload, claims["ca_sha256"]), store_id="s", timeout_s=60)


def _self_signed(address: str) -> tuple[bytes, bytes]:
    """Certificate and key (PEM) that nobody has heard of."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(address)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificates._pem(certificate), certificates._key_pem(key)


async def test_34_a_swapped_address_fails_at_tls_and_uses_nothing_up(pair: Pair, tmp_path: Path) -> None:
    token, evil = await pair.token(), PrimaryApi()
    certificate, key = _self_signed("localhost")
    (tmp_path / "evil.pem").write_bytes(certificate + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "evil.pem")
    await evil.start(context)
    fresh = await pair.start("fresh")
    try:
        with pytest.raises(InvalidRequest, match="did not answer"):
            await fresh.manager.secondary_enable(
                "performance", token, evil.address.replace("127.0.0.1", "localhost"), "", ""
            )
    finally:
        await evil.stop()
    assert evil.calls == [], "not a byte of the token was sent"
    await fresh.manager.secondary_enable("performance", token, "", "", "")  # the control: it is as good as before
    assert len(fresh.flipped) == 1


@pytest.mark.parametrize(
    "path",
    [
        "promote",
        "disable",
        "update-primary",
        "recover",
        "reindex",
        "merkle-check",
        "accept-deletions",
        "generate-public-key",
    ],
)
@pytest.mark.parametrize("token", ["root", "hvs.made-up", None])
async def test_36_a_dr_secondary_does_nothing_without_an_operation_token(path: str, token: str | None) -> None:
    node = await role_node("primary", "secondary")
    before = dict(node.store.data)
    reply = await node.call("POST", f"sys/replication/dr/secondary/{path}", {"token": "", "force": True}, token=token)
    assert reply.status == (400 if token is None else 403)
    assert ("missing" if token is None else "permission denied") in reply.errors[0]
    assert node.store.data == before
