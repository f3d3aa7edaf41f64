"""Certificate requests signed with a key, and the certificates that come back."""

from __future__ import annotations

from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from plugin_api.errors import InvalidRequest
from plugin_api.framework import Fields, FieldSpec, FieldType, Path, generic_name, writes
from plugin_api.request import Request, Response
from sidecar.engines.transit.keys import Key, KeyStore
from sidecar.engines.transit.material import Material, MlDsaPrivateKey
from sidecar.engines.transit.work import Workers

CHAIN_CERTIFICATES_MAX = 16

_TEXT = FieldType.STRING
_VERSION = {"version": FieldSpec(_TEXT, description="Version of the key; the latest if not given.")}


class Certificates:
    """The paths of a key that deal with X.509."""

    def __init__(self, store: KeyStore, workers: Workers) -> None:
        self._store = store
        self._workers = workers

    def paths(self) -> list[Path]:
        """The table. A request is only signed, which every cluster can."""
        key = "keys/" + generic_name("name")
        return [
            Path(
                key + "/csr",
                _VERSION | {"csr": FieldSpec(_TEXT, description="PEM request to take names and extensions from.")},
                writes(self._request),
                help="Signs a certificate request.",
            ),
            Path(
                key + "/set-certificate",
                _VERSION
                | {"certificate_chain": FieldSpec(_TEXT, description="PEM certificates, the key's own first.")},
                writes(self._set_chain),
                help="Stores the certificates of a key version.",
                primary_only=True,
            ),
        ]

    async def _request(self, request: Request, fields: Fields) -> Response:
        key = _signing(await self._store.get(fields["name"]))
        number = version_number(key, fields["version"]) or key.ring.latest
        materials = await self._store.material(key, [number])
        pem = await self._workers.run(make_request, materials[number], fields["csr"])
        return Response(
            data={"name": key.ring.name, "type": key.ring.kind.shown["type"], "version": number, "csr": pem}
        )

    async def _set_chain(self, request: Request, fields: Fields) -> None:
        if not fields["certificate_chain"]:
            raise InvalidRequest("missing certificate_chain")
        key = _signing(await self._store.get(fields["name"]))
        number = version_number(key, fields["version"])
        await self._store.set_chain(
            key.ring.name, number, lambda material: parse_chain(fields["certificate_chain"], material)
        )


def version_number(key: Key, text: str) -> int:
    """A version by its number, which must be usable; 0 for ``latest`` and ``""``. Raises InvalidRequest."""
    if text in ("", "latest"):
        return 0
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise InvalidRequest("invalid key version")
    number = int(text)
    if number not in key.ring.usable():
        raise InvalidRequest("there is no such key version, or it is below the minimum decryption version")
    return number


def _signing(key: Key) -> Key:
    if not key.ring.kind.signs or key.ring.derived:
        raise InvalidRequest("certificates are for signing keys that are not derived")
    return key


def make_request(material: Material, template: str) -> str:
    """A PEM request for the key, with subject and extensions of ``template`` if there is one. Raises InvalidRequest."""
    builder = x509.CertificateSigningRequestBuilder(subject_name=x509.Name([]))
    key = material.private
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey | MlDsaPrivateKey) else hashes.SHA256()
    try:
        if template:
            parsed = x509.load_pem_x509_csr(template.encode())
            builder = x509.CertificateSigningRequestBuilder(subject_name=parsed.subject)
            for extension in parsed.extensions:
                builder = builder.add_extension(extension.value, extension.critical)
        made = builder.sign(key, algorithm)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise InvalidRequest("could not parse the template csr") from None
    return made.public_bytes(serialization.Encoding.PEM).decode()


def parse_chain(pem: str, material: Material) -> list[bytes]:
    """Certificates in DER; the first must be of the key. Raises InvalidRequest."""
    try:
        chain = x509.load_pem_x509_certificates(pem.encode())
        public = (
            chain[0]
            .public_key()
            .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidRequest("could not parse the certificate chain") from None
    if len(chain) > CHAIN_CERTIFICATES_MAX:
        raise InvalidRequest(f"a certificate chain has at most {CHAIN_CERTIFICATES_MAX} certificates")
    if public != material.record.public:
        raise InvalidRequest("the first certificate is not of this key version")
    return [certificate.public_bytes(serialization.Encoding.DER) for certificate in chain]


def pem_of_chain(chain: Sequence[bytes]) -> str:
    """The PEM text of certificates in DER."""
    certificates = (x509.load_der_x509_certificate(der) for der in chain)
    return "".join(one.public_bytes(serialization.Encoding.PEM).decode() for one in certificates)
