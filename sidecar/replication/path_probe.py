"""What is at a cluster address: one TLS handshake without a client certificate, and nothing after it.

In TLS 1.3 the server shows its certificate and its choice of ALPN before it asks who we are. So this tells a primary's
cluster port from everything that may stand in its place, and gives nothing away.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import ssl
from dataclasses import dataclass

from cryptography import x509

from sidecar.transport import certificates
from sidecar.transport.peer import parse_address


class Fault(enum.Enum):
    """What is wrong."""

    NONE = 0
    NO_AUTHORITY = 1
    OTHER = 2
    TERMINATED = 3
    REFUSED = 4
    NOT_TLS = 5
    UNREACHABLE = 6


@dataclass(frozen=True, slots=True)
class Seen:
    """Of one address. ``action`` is what to do, empty when nothing is wrong."""

    address: str
    fault: Fault
    text: str
    action: str = ""


_UNREACHABLE = (
    "open the way from every node of this cluster to the primary's cluster port, or set primary_cluster_addr there"
)
_TERMINATED = (
    "replicate through layer 4 only: a balancer or proxy must pass TLS through to the cluster port, or be left out by "
    "setting primary_cluster_addr"
)
_REFUSED = (
    "give the address of the primary's active node, or of a layer-4 balancer that leads there; a standby's port and "
    "another cluster's look like this"
)


async def probe(address: str, sni: str, alpn: str, authority_pem: bytes, timeout_s: float) -> Seen:
    """Look at ``address`` as one who dials the purpose (``sni``, ``alpn``); ``authority_pem`` may be empty."""
    try:
        host, port = parse_address(address)
    except ValueError:
        return Seen(address, Fault.UNREACHABLE, "it is not an address", "correct primary_cluster_addr on the primary")
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        return Seen(address, Fault.UNREACHABLE, f"no connection ({_cause(error)})", _UNREACHABLE)
    writer.close()
    try:
        certificate, chosen = await _handshake(host, port, sni, alpn, timeout_s)
    except ssl.SSLError as error:
        return _refused(address, error)
    except (OSError, TimeoutError) as error:
        text = f"it accepts connections and ends or ignores a TLS handshake ({_cause(error)})"
        return Seen(address, Fault.REFUSED, text, _REFUSED)
    return _judged(address, sni, alpn, authority_pem, certificate, chosen)


async def _handshake(host: str, port: int, sni: str, alpn: str, timeout_s: float) -> tuple[bytes, str | None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # whatever is there shall show itself; nothing is sent to it
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([alpn])
    async with asyncio.timeout(timeout_s):
        _, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=sni)
    try:
        tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
        return tls.getpeercert(binary_form=True) or b"", tls.selected_alpn_protocol()
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.wait_closed()


def _refused(address: str, error: ssl.SSLError) -> Seen:
    reason = (error.reason or "").lower()
    if "wrong_version_number" in reason or "http_request" in reason or "record_layer" in reason:
        text = "it does not speak TLS: something that ends TLS is in between, or it is another port"
        return Seen(address, Fault.NOT_TLS, text, _TERMINATED)
    if "unrecognized_name" in reason:
        text = "it is a cluster port, or another TLS server, that does not serve this replication set"
        return Seen(address, Fault.REFUSED, text, _REFUSED)
    return Seen(address, Fault.REFUSED, f"it refuses the TLS handshake ({reason or 'without a reason'})", _REFUSED)


def _judged(
    address: str, sni: str, alpn: str, authority_pem: bytes, certificate_der: bytes, chosen: str | None
) -> Seen:
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        pem = certificates.der_to_pem(certificate_der)
    except ValueError:
        return Seen(address, Fault.OTHER, "it shows no certificate that can be read", _TERMINATED)
    who = (
        f"certificate {certificate.subject.rfc4514_string()!r} issued by {certificate.issuer.rfc4514_string()!r}, "
        f"ALPN {chosen or 'none'}"
    )
    if not authority_pem:
        return Seen(address, Fault.NO_AUTHORITY, f"{who}; the authority to compare it with is not known")
    if not certificates.issued_by(pem, authority_pem):
        text = f"a TLS-terminating proxy is in between, or it is another server: it shows {who}"
        return Seen(address, Fault.TERMINATED, text, _TERMINATED)
    if chosen != alpn:
        return Seen(address, Fault.OTHER, f"{who}, but not the protocol {alpn}", "check that both run one version")
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        named = sni in names.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        named = False
    if not named:
        return Seen(address, Fault.OTHER, f"{who}, which is not for {sni}", _REFUSED)
    return Seen(address, Fault.NONE, f"TLS reaches the primary itself, protocol {alpn}")


def _cause(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
