"""HTTP to one Consul agent: pooled connections, no redirect, no silent second try.

aiohttp sends an idempotent request (PUT counts as one) a second time when a reused connection closes without an answer.
For a lock or a conditional write that hides a lost answer, so it is switched off here, and a test pins it. Nothing in
this file retries: whether a failed call may be repeated is known only to the caller.

Transactions have connections of their own (``exchange.py``), on which nothing is done beyond the exchange itself.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from consul_backend.config import ConsulConfig
from consul_backend.errors import OutcomeUnknown, Unavailable
from consul_backend.exchange import Closed, Exchange, NeverSent, NoAnswer, TooBig, connector

CONNECT_TIMEOUT_S = 5.0
TOKEN_CHECK_INTERVAL_S = 1.0
CONNECTIONS_MAX = 32
"""Consul takes 200 connections per client address by default and closes the next without a word; nodes share that."""
KEEPALIVE_S = 55.0
"""Below the idle time-outs of the usual proxies, so that we close first."""
ANSWER_BYTES_MAX = 64 * 2**20
"""No answer we ask for comes near; a stray one must not fill memory."""
TXN_PATH = "/v1/txn"
"""What is put here goes over connections of its own; Consul says nothing of interest in the answer's headers."""
_NO_HEADERS: CIMultiDictProxy[str] = CIMultiDictProxy(CIMultiDict())
_UNFIT_FOR_A_HEADER = re.compile(r"[^\x21-\x7e]")


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete HTTP answer. The body may hold stored values: it is never logged."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes = field(repr=False)

    @property
    def index(self) -> int:
        """``X-Consul-Index``, or 0."""
        text = self.headers.get("X-Consul-Index", "0")
        return int(text) if text.isdigit() else 0


class AnswerTooBig(Unavailable):
    """The answer exceeds the size the caller takes; ask for less at once."""


class ConnectionLost(OutcomeUnknown):
    """The connection ended before the answer was complete."""


class Token:
    """The ACL token to send: fixed, or in a file that is read again when it changes."""

    def __init__(self, config: ConsulConfig) -> None:
        self._fixed = config.token
        self._path = Path(config.token_file) if config.token_file and not config.token else None
        self._text = config.token
        self._stamp: tuple[int, int, int] | None = None
        self._next_check_s = float("-inf")

    def current(self) -> str:
        """The token now; the file is looked at once a second at most. A file that vanished, or is empty, keeps the
        last token. Raises Unavailable while none was ever read: without a token Consul would answer as to anybody."""
        if self._path is not None and (self._stamp is None or time.monotonic() >= self._next_check_s):
            self._next_check_s = time.monotonic() + TOKEN_CHECK_INTERVAL_S
            self._reread(self._path)
        return self._text

    def suspect(self) -> None:
        """Consul refused the token: look at the file again before the next request."""
        self._next_check_s = float("-inf")

    def _reread(self, path: Path) -> None:
        try:
            found = path.stat()
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            if stamp == self._stamp:
                return
            text = path.read_text().strip()
            if not text:
                raise OSError(f"{path} is empty")  # perhaps only for as long as somebody writes it
            self._text, self._stamp = text, stamp
        except (OSError, UnicodeDecodeError) as error:
            if self._stamp is None:
                raise Unavailable(f"consul token file: {error}") from error


class Transport:
    """``connections_max`` connections at most; make one per purpose that must not wait for another. Close it."""

    def __init__(self, config: ConsulConfig, *, connections_max: int = CONNECTIONS_MAX) -> None:
        base, socket_path = config.endpoint()
        self._config = config
        self._base = base
        self._token = Token(config)
        self._server_name = config.tls_server_name or None
        self._fixed_headers = {"Accept-Encoding": "identity"}
        if config.http_auth:
            self._fixed_headers["Authorization"] = f"Basic {base64.b64encode(config.http_auth.encode()).decode()}"
        if config.namespace:
            self._fixed_headers["X-Consul-Namespace"] = config.namespace
        context = tls_context(config) if base.startswith("https:") else None
        parts = urlsplit(base)
        self._host = parts.netloc
        self._exchange = Exchange(
            connector(parts.hostname or "", parts.port or 0, socket_path, context, self._server_name)
        )
        self._session = aiohttp.ClientSession(
            connector=_connector(context, socket_path, connections_max),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._fixed_headers,
            skip_auto_headers=("User-Agent", "Content-Type"),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        )
        _never_resend(self._session)

    @property
    def token(self) -> Token:
        """The token that every request carries."""
        return self._token

    async def close(self) -> None:
        """Close every connection."""
        await self._exchange.close()
        await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: str = "",
        body: bytes | None = None,
        timeout_s: float,
        answer_bytes_max: int = ANSWER_BYTES_MAX,
    ) -> Answer:
        """One request, sent once. ``path`` and ``query`` are sent as they are: encode them.

        Raises Unavailable when it certainly never left, OutcomeUnknown when its answer is lost (ConnectionLost) or
        late, AnswerTooBig.
        """
        if path == TXN_PATH and method == "PUT":
            return await self._txn(query, body or b"", timeout_s, answer_bytes_max)
        url = URL(f"{self._base}{path}?{query}" if query else self._base + path, encoded=True)
        token = self._token.current()
        headers = {"X-Consul-Token": token} if token else None
        try:
            async with asyncio.timeout(timeout_s):
                async with self._session.request(
                    method, url, data=body, headers=headers, allow_redirects=False, server_hostname=self._server_name
                ) as response:
                    content = await _read(response, answer_bytes_max)
        except (aiohttp.ClientError, OSError) as error:
            _translate(error, self._base)
        return Answer(response.status, response.headers, content)

    async def _txn(self, query: str, body: bytes, timeout_s: float, answer_bytes_max: int) -> Answer:
        token = self._token.current()
        if _UNFIT_FOR_A_HEADER.search(token):
            raise Unavailable("the Consul token holds characters that no token has")
        lines = [f"PUT {TXN_PATH}{'?' if query else ''}{query} HTTP/1.1", f"Host: {self._host}"]
        lines += [f"{name}: {value}" for name, value in self._fixed_headers.items()]
        if token:
            lines.append(f"X-Consul-Token: {token}")
        text = "\r\n".join([*lines, f"Content-Length: {len(body)}\r\n\r\n"]).encode() + body
        try:
            status, content = await self._exchange.request(text, timeout_s=timeout_s, answer_bytes_max=answer_bytes_max)
        except NeverSent as error:
            raise Unavailable(f"cannot connect to Consul at {self._base}: {_reason(error.__cause__)}") from error
        except TooBig:
            raise AnswerTooBig(f"the answer has more than the {answer_bytes_max} bytes that are taken") from None
        except NoAnswer as error:
            lost = ConnectionLost if isinstance(error, Closed) else OutcomeUnknown
            raise lost(f"no answer from Consul at {self._base}: {error}") from error
        return Answer(status, _NO_HEADERS, content)


async def _read(response: aiohttp.ClientResponse, answer_bytes_max: int) -> bytes:
    if (response.content_length or 0) > answer_bytes_max:
        response.close()
        raise AnswerTooBig(f"the answer has {response.content_length} bytes, {answer_bytes_max} are taken")
    if response.content_length is not None:
        return await response.read()
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > answer_bytes_max:
            response.close()
            raise AnswerTooBig(f"the answer has more than the {answer_bytes_max} bytes that are taken")
        chunks.append(chunk)
    return b"".join(chunks)


# Raised before a byte of the request is written.
_NEVER_SENT = (
    aiohttp.ClientConnectorError,
    aiohttp.ClientConnectorCertificateError,
    aiohttp.ClientConnectorSSLError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.InvalidURL,
)


def _translate(error: aiohttp.ClientError | OSError, base: str) -> NoReturn:
    if isinstance(error, _NEVER_SENT):
        raise Unavailable(f"cannot connect to Consul at {base}: {_reason(error)}") from error
    lost = OutcomeUnknown if isinstance(error, TimeoutError) else ConnectionLost
    raise lost(f"no answer from Consul at {base}: {_reason(error)}") from error


def _reason(error: BaseException | None) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    # aiohttp keeps what went wrong in one of two places; an SSLError has an errno of its own, which is none of the
    # system's ("Operation not permitted").
    cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {cause.verify_message}"
    if isinstance(cause, ssl.SSLError):
        return f"TLS: {(cause.reason or type(cause).__name__).lower().replace('_', ' ')}"
    number = getattr(cause, "errno", None)
    return os.strerror(number) if isinstance(number, int) and number > 0 else type(error).__name__


def _never_resend(session: aiohttp.ClientSession) -> None:
    # aiohttp has no public switch for this; a release that renames it must fail here, not resend.
    if not isinstance(getattr(session, "_retry_connection", None), bool):
        raise RuntimeError("this aiohttp cannot be told not to resend requests")
    session._retry_connection = False


def _connector(context: ssl.SSLContext | None, socket_path: str, connections_max: int) -> aiohttp.BaseConnector:
    if socket_path:
        return aiohttp.UnixConnector(socket_path, limit=connections_max, keepalive_timeout=KEEPALIVE_S)
    return aiohttp.TCPConnector(limit=connections_max, keepalive_timeout=KEEPALIVE_S, ssl=context or True)


def tls_context(config: ConsulConfig) -> ssl.SSLContext:
    """TLS 1.2 or newer by the configured authorities and client certificate. Raises Unavailable for unreadable
    files."""
    try:
        authorities = _authorities(config)
        context = ssl.create_default_context(cafile=authorities[0] if authorities else None)
        for more in authorities[1:]:
            context.load_verify_locations(cafile=more)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if config.tls_skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if config.client_cert:
            context.load_cert_chain(config.client_cert, config.client_key or None)
    except OSError as error:
        raise Unavailable(f"consul TLS files: {error}") from error
    return context


def _authorities(config: ConsulConfig) -> list[str]:
    """The PEM files to trust; none means the system's. Every file of ``ca_path`` is one, as for Consul's own client:
    OpenSSL by itself would only look for names made of hashes there. Raises OSError."""
    files = [config.ca_file] if config.ca_file else []
    if config.ca_path:
        found = sorted(str(path) for path in Path(config.ca_path).iterdir() if path.is_file())
        if not found:
            raise OSError(f"there is no file in {config.ca_path}")
        files += found
    return files
