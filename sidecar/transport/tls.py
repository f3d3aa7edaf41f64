"""TLS contexts of the cluster port: TLS 1.3 only, both sides authenticated, nothing resumed, one ALPN protocol each.

Three things Python does not do by itself and this module does: it refuses a handshake that negotiated no common ALPN
protocol (``ssl`` lets it pass), it issues no session tickets (a resumed session would skip the certificate check), and
it keeps asyncio's TLS read buffer at 16 KiB a connection (256 KiB by default: 293 KiB of memory while idle).
"""

from __future__ import annotations

import os
import ssl
from asyncio import sslproto

from sidecar.transport.certificates import Credentials

TLS_BUFFER_BYTES = 16 * 1024
"""One TLS record is at most 16 KiB, so a larger read buffer buys nothing for small messages."""


class AlpnError(ssl.SSLError):
    """The peer did not agree to the one protocol this side offered."""


class _AlpnCheckedObject(ssl.SSLObject):
    """Fails a client's handshake unless the offered protocol was selected: nothing is sent to such a peer."""

    def do_handshake(self) -> None:
        super().do_handshake()
        wanted = self.context.alpn if isinstance(self.context, PeerContext) else None
        if wanted is not None and self.selected_alpn_protocol() != wanted:
            raise AlpnError(f"the peer does not speak {wanted}")


class PeerContext(ssl.SSLContext):
    """A client context bound to one ALPN protocol."""

    alpn: str | None = None
    sslobject_class = _AlpnCheckedObject


def server_context(credentials: Credentials, trust_root_pem: bytes, alpn: str) -> ssl.SSLContext:
    """The context of one purpose: its certificate, the only authority whose clients it accepts, its ALPN protocol."""
    context = base_server_context()
    _load(context, credentials)
    context.load_verify_locations(cadata=trust_root_pem.decode("ascii"))
    context.set_alpn_protocols([alpn])
    return context


def base_server_context() -> ssl.SSLContext:
    """A context without certificate or trust root: every handshake that is not switched to another one fails.

    OpenSSL copies verify mode, verify flags and ticket count into a connection when it begins, *before* SNI is known;
    so the base context must be as strict as those it is switched to.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _restrict(context)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0
    return context


def client_context(credentials: Credentials, authority_pem: bytes, alpn: str) -> ssl.SSLContext:
    """For dialling a peer, which must show a certificate of ``authority_pem`` for the SNI name and take ``alpn``."""
    context = PeerContext(ssl.PROTOCOL_TLS_CLIENT)
    _restrict(context)
    _load(context, credentials)
    context.load_verify_locations(cadata=authority_pem.decode("ascii"))
    context.set_alpn_protocols([alpn])
    context.alpn = alpn
    return context


def limit_tls_buffers() -> None:
    """Set asyncio's TLS read buffer to :data:`TLS_BUFFER_BYTES` for connections made from now on, process-wide.

    The attribute is private to asyncio; an integration test fails should a Python release rename it or stop using it.
    """
    sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES


def _restrict(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.verify_flags |= ssl.VERIFY_X509_STRICT


def _load(context: ssl.SSLContext, credentials: Credentials) -> None:
    """Python loads keys from files only: an anonymous memory file keeps the key off every disk."""
    descriptor = os.memfd_create("credentials", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as pipe:
            pipe.write(credentials.certificate_pem + b"\n" + credentials.key_pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
