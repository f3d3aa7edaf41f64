"""``-dev-tls``: a CA and a server certificate of its own, in files for as long as the dev server runs.

Names, validity and file names are those of Vault's ``-dev-tls``, so that scripts which look for ``vault-ca.pem`` find
it. The CA's key is never written: it signs one certificate and is gone.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from sidecar.transport.certificates import key_usage, subject_name

CA_NAME, CERTIFICATE_NAME, KEY_NAME = "vault-ca.pem", "vault-cert.pem", "vault-key.pem"
_LOCAL_NAMES = ("localhost", "localhost4", "localhost6", "localhost.localdomain")
_LOCAL_ADDRESSES = ("127.0.0.1", "::1")
_BACKDATED = timedelta(seconds=30)
_VALIDITY = timedelta(days=365)
_UNSPECIFIED = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound


@dataclass(frozen=True, slots=True)
class DevCertificates:
    """The paths of the three PEM files."""

    ca: str
    certificate: str
    key: str


@contextmanager
def dev_certificates(directory: str, names: Sequence[str]) -> Iterator[DevCertificates]:
    """Write them into ``directory``, or into a new one, and remove at the end what was made. ``names``: DNS names and
    IP addresses that the certificate holds beside those of this host. Raises OSError, and ValueError for a name that no
    certificate can hold."""
    ca, certificate, key = _made(names)
    folder = Path(directory or tempfile.mkdtemp(prefix="vault-tls"))
    files = {CA_NAME: (ca, 0o644), CERTIFICATE_NAME: (certificate, 0o644), KEY_NAME: (key, 0o600)}
    try:
        for name, (pem, mode) in files.items():
            _write(folder / name, pem, mode)
        yield DevCertificates(*(str(folder / name) for name in files))
    finally:
        for name, (pem, _) in files.items():
            with contextlib.suppress(OSError):
                if (folder / name).read_bytes() == pem:  # another server may have put its own there
                    (folder / name).unlink()
        if not directory:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _write(path: Path, pem: bytes, mode: int) -> None:
    """In the place of what a server that was killed left there; never through a link."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(pem)


def _made(names: Sequence[str]) -> tuple[bytes, bytes, bytes]:
    """(CA, certificate, private key) as PEM."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    host = socket.gethostname() or "localhost"
    ca_name = subject_name(f"Vault dev CA of {host}")
    identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = (
        _builder(ca_name, ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(sign_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    certificate = (
        _builder(subject_name(host), ca_name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(sign_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(_alternatives(host, names)), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(ca_key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem = serialization.Encoding.PEM
    return ca.public_bytes(pem), certificate.public_bytes(pem), private


def _alternatives(host: str, names: Sequence[str]) -> list[x509.GeneralName]:
    """Each name once. Raises ValueError for one that is no DNS name in ASCII."""
    found: list[x509.GeneralName] = []
    for name in (*_LOCAL_NAMES, *_LOCAL_ADDRESSES, host, *names):
        try:
            one: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            one = x509.DNSName(name)
        if one not in found and name not in _UNSPECIFIED:
            found.append(one)
    return found


def _builder(subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + _VALIDITY)
    )
