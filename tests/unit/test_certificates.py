"""Authorities, certificates and their numbers."""

from __future__ import annotations

import hashlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from sidecar.transport import certificates
from sidecar.transport.certificates import Credentials

AUTHORITY = certificates.make_authority("an authority")
SERVER = certificates.issue_server(AUTHORITY, "set.performance.outrider")
CLIENT = certificates.issue_client(AUTHORITY, "eu-west")


def load(credentials: Credentials) -> x509.Certificate:
    return x509.load_pem_x509_certificate(credentials.certificate_pem)


@pytest.mark.parametrize("credentials", [AUTHORITY, SERVER, CLIENT])
def test_every_key_is_p521_and_signed_with_sha512(credentials: Credentials) -> None:
    certificate = load(credentials)
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp521r1"
    assert certificate.signature_hash_algorithm is not None
    assert certificate.signature_hash_algorithm.name == "sha512"


def test_only_the_authority_may_sign() -> None:
    for credentials, is_authority in ((AUTHORITY, True), (SERVER, False), (CLIENT, False)):
        certificate = load(credentials)
        assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is is_authority
        assert certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is is_authority


def test_server_and_client_are_no_substitute_for_each_other() -> None:
    usages = [
        list(load(one).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) for one in (SERVER, CLIENT)
    ]
    assert usages == [[ExtendedKeyUsageOID.SERVER_AUTH], [ExtendedKeyUsageOID.CLIENT_AUTH]]
    names = load(SERVER).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["set.performance.outrider"]


def test_fingerprint_is_that_of_the_whole_der_certificate() -> None:
    der = load(CLIENT).public_bytes(Encoding.DER)
    assert certificates.fingerprint(CLIENT.certificate_pem) == hashlib.sha256(der).hexdigest()
    assert certificates.fingerprint(der) == certificates.fingerprint(CLIENT.certificate_pem)
    again = certificates.issue_client(AUTHORITY, "eu-west")
    assert certificates.fingerprint(again.certificate_pem) != certificates.fingerprint(CLIENT.certificate_pem)


def test_der_and_pem_are_one_certificate() -> None:
    der = certificates.pem_to_der(CLIENT.certificate_pem)
    assert certificates.pem_to_der(certificates.der_to_pem(der)) == der
    with pytest.raises(ValueError, match=r".*"):
        certificates.der_to_pem(der[:-1])


def test_a_key_survives_its_numbers() -> None:
    x, y, d = certificates.key_numbers(CLIENT.key_pem)
    assert certificates.key_numbers(certificates.key_from_numbers(x, y, d)) == (x, y, d)
    with pytest.raises(ValueError, match=r".*"):
        certificates.key_from_numbers(x, y, d + 1)


def test_belongs_needs_all_three_to_fit() -> None:
    other = certificates.make_authority("an authority")
    assert certificates.belongs(CLIENT.certificate_pem, CLIENT.key_pem, AUTHORITY.certificate_pem)
    assert not certificates.belongs(CLIENT.certificate_pem, SERVER.key_pem, AUTHORITY.certificate_pem)
    assert not certificates.belongs(CLIENT.certificate_pem, CLIENT.key_pem, other.certificate_pem)


def test_no_private_key_in_a_repr() -> None:
    assert "PRIVATE" not in repr(CLIENT)


def test_a_long_identity_still_makes_a_certificate() -> None:
    long = certificates.issue_client(AUTHORITY, "e" * 256)
    assert load(long).subject.rfc4514_string() == "CN=" + "e" * 64
