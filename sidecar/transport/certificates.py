"""X.509 for the cluster port: one small P-521 authority per purpose, server and client certificates below it.

Making a P-521 key takes milliseconds, so callers on the event loop use ``asyncio.to_thread``. Peers are told apart by
the *fingerprint*, the SHA-256 of the whole DER certificate: another authority can repeat names and serial numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

BACKDATED = timedelta(hours=24)
"""Certificates are valid from a day before, so that skewed clocks of peers do not refuse them."""

VALIDITY = timedelta(days=3650)
"""Of authorities, and of whatever is not renewed by itself: its trust ends by revocation or rotation, not by date:
an expired certificate would cut replication years later, unannounced."""

REQUEST_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class Credentials:
    """A certificate and its private key, both PEM (PKCS #8, unencrypted)."""

    certificate_pem: bytes
    key_pem: bytes = field(repr=False)


def make_authority(common_name: str) -> Credentials:
    """A self-signed P-521 authority that may sign end-entity certificates only (path length 0)."""
    key = ec.generate_private_key(ec.SECP521R1())
    usage = key_usage(sign_certificates=True)
    builder = (
        _builder(common_name, key.public_key(), issuer=subject_name(common_name))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    return Credentials(_pem(builder.sign(key, hashes.SHA512())), _key_pem(key))


def issue_server(authority: Credentials, sni: str) -> Credentials:
    """A server certificate for the DNS name ``sni``, the only name clients will accept it under."""
    return _issue(authority, sni, x509.SubjectAlternativeName([x509.DNSName(sni)]), ExtendedKeyUsageOID.SERVER_AUTH)


def issue_client(authority: Credentials, identity: str, *, validity: timedelta = VALIDITY) -> Credentials:
    """A client certificate whose common name is ``identity`` (at most 64 characters shown, the rest cut)."""
    return _issue(authority, identity, None, ExtendedKeyUsageOID.CLIENT_AUTH, validity)


def make_request(identity: str) -> tuple[bytes, bytes]:
    """(PKCS #10 request as DER, its new P-521 private key as PEM). The request proves who holds the key."""
    key = ec.generate_private_key(ec.SECP521R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(subject_name(identity)).sign(key, hashes.SHA512())
    return request.public_bytes(serialization.Encoding.DER), _key_pem(key)


def sign_request(authority: Credentials, request_der: bytes, identity: str, *, validity: timedelta) -> bytes:
    """The client certificate (PEM) for the key of a request. Nothing but that key is taken from it: name and usage are
    the authority's to say. Raises ValueError for what is no request of the holder of a P-521 key."""
    if len(request_der) > REQUEST_BYTES_MAX:
        raise ValueError("the certificate request is too long")
    request = x509.load_der_x509_csr(request_der)
    key = request.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP521R1):
        raise ValueError("the certificate request is not for a P-521 key")
    if not request.is_signature_valid:
        raise ValueError("the certificate request is not signed by its own key")
    return _sign(authority, identity, key, None, ExtendedKeyUsageOID.CLIENT_AUTH, validity)


def each(pem: bytes) -> list[bytes]:
    """The certificates in ``pem``, one PEM each. Raises ValueError when there is none, or one that is none."""
    return [_pem(one) for one in x509.load_pem_x509_certificates(pem)]


def period_s(certificate_pem: bytes) -> tuple[int, int]:
    """When it was issued and when it expires, Unix seconds; the day of leeway before its issue is not counted."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    begins = certificate.not_valid_before_utc + BACKDATED
    return int(begins.timestamp()), int(certificate.not_valid_after_utc.timestamp())


def fingerprint(certificate: bytes) -> str:
    """Lower-case hex SHA-256 of the DER certificate; accepts PEM or DER. Raises ValueError on anything else."""
    der = certificate
    if certificate.lstrip().startswith(b"-----BEGIN"):
        der = pem_to_der(certificate)
    return hashlib.sha256(der).hexdigest()


def pem_to_der(pem: bytes) -> bytes:
    """The first certificate in ``pem`` as DER. Raises ValueError."""
    return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)


def der_to_pem(der: bytes) -> bytes:
    """A DER certificate as PEM, parsed on the way. Raises ValueError."""
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


def key_numbers(key_pem: bytes) -> tuple[int, int, int]:
    """``(x, y, d)`` of a P-521 private key. Raises ValueError for any other kind of key."""
    key = serialization.load_pem_private_key(key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP521R1):
        raise ValueError("not a P-521 private key")
    numbers = key.private_numbers()
    return numbers.public_numbers.x, numbers.public_numbers.y, numbers.private_value


def key_from_numbers(x: int, y: int, d: int) -> bytes:
    """The PEM of the P-521 private key with these numbers. Raises ValueError if they do not belong together."""
    public = ec.EllipticCurvePublicNumbers(x, y, ec.SECP521R1())
    return _key_pem(ec.EllipticCurvePrivateNumbers(d, public).private_key())


def belongs(certificate_pem: bytes, key_pem: bytes, authority_pem: bytes) -> bool:
    """Whether the certificate carries this key and was signed by this authority, or by one of these."""
    key = serialization.load_pem_private_key(key_pem, password=None)
    if x509.load_pem_x509_certificate(certificate_pem).public_key() != key.public_key():
        return False
    return issued_by(certificate_pem, authority_pem)


def issued_by(certificate_pem: bytes, authority_pem: bytes) -> bool:
    """Whether one of the authorities in ``authority_pem`` signed this certificate."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    for authority in x509.load_pem_x509_certificates(authority_pem):
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return True
    return False


def _issue(
    authority: Credentials,
    common_name: str,
    san: x509.SubjectAlternativeName | None,
    usage: x509.ObjectIdentifier,
    validity: timedelta = VALIDITY,
) -> Credentials:
    key = ec.generate_private_key(ec.SECP521R1())
    return Credentials(_sign(authority, common_name, key.public_key(), san, usage, validity), _key_pem(key))


def _sign(
    authority: Credentials,
    common_name: str,
    public_key: ec.EllipticCurvePublicKey,
    san: x509.SubjectAlternativeName | None,
    usage: x509.ObjectIdentifier,
    validity: timedelta,
) -> bytes:
    signer = serialization.load_pem_private_key(authority.key_pem, password=None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise ValueError("the authority's key is not an elliptic-curve key")
    issuer = x509.load_pem_x509_certificate(authority.certificate_pem)
    builder = (
        _builder(common_name, public_key, issuer=issuer.subject, validity=validity)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if san is not None:
        builder = builder.add_extension(san, critical=False)
    return _pem(builder.sign(signer, hashes.SHA512()))


def _builder(
    common_name: str, public_key: ec.EllipticCurvePublicKey, *, issuer: x509.Name, validity: timedelta = VALIDITY
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject_name(common_name))
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + validity)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def subject_name(common_name: str) -> x509.Name:
    """A common name alone, cut to the 64 characters that one may have."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    """Of an authority's key, or of one that proves who its holder is."""
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
