"""The dialling side of the cluster port.

A :class:`PeerClient` speaks to one address as one identity. The URL names the purpose (its SNI name), so certificate
check, SNI and Host header all agree, and a resolver of our own maps that name to the address.

Outcomes are told apart by what the caller may do next: :class:`PeerUnreachable` means that no byte of the request was
accepted (another address may be tried), :class:`PeerOutcomeUnknown` that it was sent and must not be sent again.
"""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from sidecar.transport.certificates import Credentials
from sidecar.transport.tls import client_context, limit_tls_buffers

DEFAULT_PORT = 8201
CONNECTIONS_MAX = 64
WHOLE_BYTES_MAX = 256 * 1024


class PeerUnreachable(Exception):
    """No connection, or a handshake that failed: the request was certainly not processed."""


class PeerOutcomeUnknown(Exception):
    """The request was sent and its answer did not arrive: it may have been processed. Never repeat it blindly."""


class PeerAnswer(NamedTuple):
    """A complete answer of the peer."""

    status: int
    body: bytes


class PeerStream(NamedTuple):
    """An answer whose body is read as it arrives."""

    status: int
    pieces: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """How to dial one purpose: SNI name, ALPN protocol, our certificate, the authority that vouches for the server."""

    sni: str
    alpn: str
    credentials: Credentials
    authority_pem: bytes


class PeerClient:
    """Requests and websockets to one ``address`` (``host:port``, ``https://host:port``, or a host with port 8201).

    Raises ValueError for an address that is none. Make it inside a running event loop; close it.
    """

    def __init__(
        self,
        identity: PeerIdentity,
        address: str,
        *,
        connect_timeout_s: float = 5.0,
    ) -> None:
        self.address = address
        self._host, self._port = parse_address(address)
        self._sni = identity.sni
        self._connect_timeout_s = connect_timeout_s
        limit_tls_buffers()
        connector = aiohttp.TCPConnector(
            ssl=client_context(identity.credentials, identity.authority_pem, identity.alpn),
            resolver=_Fixed(self._host),
            limit=CONNECTIONS_MAX,
            use_dns_cache=False,
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s, connect=connect_timeout_s)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)

    async def post(
        self,
        path: str,
        body: bytes,
        *,
        timeout_s: float,
        answer_bytes_max: int = 64 * 1024 * 1024,
    ) -> PeerAnswer:
        """POST ``body`` to ``path`` and read the whole answer, at most ``answer_bytes_max``.

        Raises PeerUnreachable, PeerOutcomeUnknown (time-out, reset, answer too large). Never follows a redirect.
        """
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.post(
                    self._url(path),
                    data=_payload(body),
                    allow_redirects=False,
                ) as response,
            ):
                return PeerAnswer(response.status, await read_answer(response, answer_bytes_max))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise PeerUnreachable(f"{self.address}: {describe(error)}") from error
        except TimeoutError as error:
            raise PeerOutcomeUnknown(f"{self.address}: no answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise PeerOutcomeUnknown(f"{self.address}: {describe(error)}") from error

    @asynccontextmanager
    async def stream(self, path: str, body: bytes, *, idle_timeout_s: float) -> AsyncIterator[PeerStream]:
        """POST ``body`` and read a long answer piece by piece; ``idle_timeout_s`` bounds each wait for the next piece.

        Raises PeerUnreachable; reading raises PeerOutcomeUnknown when the answer breaks off.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_read=idle_timeout_s, sock_connect=self._connect_timeout_s)
        try:
            response = await self._session.post(
                self._url(path),
                data=_payload(body),
                allow_redirects=False,
                timeout=timeout,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise PeerUnreachable(f"{self.address}: {describe(error)}") from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise PeerOutcomeUnknown(f"{self.address}: {describe(error)}") from error
        async with response:
            yield PeerStream(response.status, _pieces(response, self.address))

    async def websocket(
        self,
        path: str,
        *,
        message_bytes_max: int,
        open_timeout_s: float = 10.0,
    ) -> aiohttp.ClientWebSocketResponse:
        """Open a websocket at ``path``. Raises PeerUnreachable, or PeerRefused when the peer answers otherwise."""
        try:
            async with asyncio.timeout(open_timeout_s):
                return await self._session.ws_connect(
                    self._url(path, "wss"),
                    max_msg_size=message_bytes_max,
                    autoping=True,
                    compress=0,
                )
        except aiohttp.WSServerHandshakeError as error:
            raise PeerRefused(error.status, f"{self.address} answered {error.status} to {path}") from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise PeerUnreachable(f"{self.address}: {describe(error)}") from error

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    def _url(self, path: str, scheme: str = "https") -> str:
        return f"{scheme}://{self._sni}:{self._port}{path}"


class PeerRefused(Exception):
    """The peer was reached and refused: ``status`` is its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Fixed(AbstractResolver):
    """Resolves every name to the one host this client dials."""

    def __init__(self, host: str) -> None:
        self._host = host

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_INET,
    ) -> list[ResolveResult]:
        found = await asyncio.get_running_loop().getaddrinfo(
            self._host,
            port,
            type=socket.SOCK_STREAM,
            family=socket.AF_UNSPEC,
            flags=socket.AI_ADDRCONFIG,
        )
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=port,
                family=address_family,
                proto=protocol,
                flags=socket.AI_NUMERICHOST,
            )
            for address_family, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        """Nothing is held."""


def parse_address(address: str) -> tuple[str, int]:
    """``(host, port)`` of a cluster address, with or without scheme; port 8201 by default. Raises ValueError."""
    parts = urlsplit(address if "://" in address else f"https://{address}")
    if not parts.hostname or parts.scheme not in ("http", "https") or parts.path.strip("/") or parts.query:
        raise ValueError(f"not a cluster address: {address!r}")
    return parts.hostname, parts.port or DEFAULT_PORT


def describe(error: BaseException) -> str:
    """A short cause without addresses or certificate contents."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "the server's certificate is not of the expected authority or name"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the connection was ended without an answer, as for a certificate that is revoked or unknown there"
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        return "the TLS handshake was refused"
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.os_error.strerror or "connection failed"
    return type(error).__name__


def _payload(body: bytes) -> bytes | io.BytesIO:
    """aiohttp writes ``bytes`` in one go, which holds up the event loop when they are many."""
    return body if len(body) <= WHOLE_BYTES_MAX else io.BytesIO(body)


async def _pieces(response: aiohttp.ClientResponse, address: str) -> AsyncIterator[bytes]:
    try:
        async for chunk in response.content.iter_any():
            yield chunk
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise PeerOutcomeUnknown(f"{address}: {describe(error)}") from error


async def read_answer(response: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    """The whole body. Raises aiohttp.ClientPayloadError beyond ``bytes_max``, before it is held."""
    parts: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > bytes_max:
            response.close()
            raise aiohttp.ClientPayloadError(f"the answer is larger than {bytes_max} bytes")
        parts.append(chunk)
    return b"".join(parts)
