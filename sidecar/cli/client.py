"""One HTTP call to the API, with Vault's rules for retries and redirects. Standard library only."""

from __future__ import annotations

import http.client
import json
import os
import random
import shlex
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlencode, urljoin, urlsplit

from sidecar.cli.command import NotSent, program

ATTEMPT_WAIT_S = (1.0, 1.5)
BODY_BYTES_MAX = 64 * 2**20
# What a command asks on its way to the request that -output-curl-string is about.
_PREFLIGHT = "sys/internal/ui/mounts/"
REDIRECTS = (301, 302, 307, 308)
_UNIX = "unix://"
_SOCKET_HOST = "localhost"
"""What stands in the URL of a request over a Unix socket, as for Vault's own client."""


class LocalError(Exception):
    """No answer was had: the address, TLS material or network is at fault, or the answer is not the API's."""


class ApiError(Exception):
    """The server said no. The text is what a user sees, in Vault's form."""

    def __init__(self, reply: Reply) -> None:
        errors = "\n".join(f"* {each}" for each in reply.errors())
        super().__init__(
            f"Error making API request.\n\nURL: {reply.method} {reply.url}\nCode: {reply.status}. Errors:\n\n{errors}"
        )
        self.reply = reply
        self.status = reply.status


class Reply:
    """An answer. ``body`` is the decoded JSON object, None where there was none. It may hold secrets."""

    def __init__(self, status: int, method: str, url: str, text: str, body: dict[str, Any] | None) -> None:
        self.status, self.method, self.url = status, method, url
        self.text, self.body = text, body

    def errors(self) -> list[str]:
        """The error texts, or the plain answer where it has another form."""
        if self.body is None:
            return [self.text.strip()] if self.text.strip() else []
        errors = self.body.get("errors")
        return [str(each) for each in errors] if isinstance(errors, list) else []

    def has_content(self) -> bool:
        """Whether a 404 carries something to show (kv-v2 answers a deleted version with its metadata)."""
        return bool(self.body and (self.body.get("data") or self.body.get("warnings")))


class ClientOptions:
    """How to reach the server. ``address`` is an http or https URL, or ``unix://`` and the path of a socket; empty
    texts are not used.

    A plain class, as dataclasses take a tenth of a call's time to import.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str = "",
        namespace: str = "",
        ca_file: str = "",
        ca_path: str = "",
        client_cert: str = "",
        client_key: str = "",
        tls_server_name: str = "",
        tls_skip_verify: bool = False,
        timeout_s: float = 60.0,
        retries_max: int = 2,
        wrap_ttl: str = "",
        headers: Mapping[str, str] | None = None,
        as_curl: bool = False,
        as_policy: bool = False,
    ) -> None:
        self.headers, self.as_curl, self.as_policy = dict(headers or {}), as_curl, as_policy
        self.address, self.token, self.namespace, self.wrap_ttl = address, token, namespace, wrap_ttl
        self.ca_file, self.ca_path, self.client_cert, self.client_key = ca_file, ca_path, client_cert, client_key
        self.tls_server_name, self.tls_skip_verify = tls_server_name, tls_skip_verify
        self.timeout_s, self.retries_max = timeout_s, retries_max


class _NamedHTTPS(http.client.HTTPSConnection):
    """TLS to one address under another server name."""

    def __init__(self, host: str, port: int, *, name: str, context: ssl.SSLContext, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout, context=context)
        self._name, self._tls = name, context

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), self.timeout)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self._name)


class _UnixHTTP(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, *, timeout: float | None) -> None:
        super().__init__(_SOCKET_HOST, timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    """Calls under ``/v1/``. Raises LocalError and ApiError."""

    def __init__(self, options: ClientOptions) -> None:
        self.options = options
        self._socket_path = options.address.removeprefix(_UNIX) if options.address.startswith(_UNIX) else ""
        parts = _split(f"http://{_SOCKET_HOST}" if self._socket_path else options.address)
        self.address = f"{parts[0]}://{parts[1]}{parts[2].rstrip('/')}"

    def get(self, path: str, query: Mapping[str, str] | None = None) -> Reply:
        return self.call("GET", path, query=query)

    def list(self, path: str) -> Reply:
        return self.call("GET", path, query={"list": "true"})

    def put(self, path: str, body: Any = None) -> Reply:
        return self.call("PUT", path, body=body, has_body=True)

    def post(self, path: str, body: Any = None) -> Reply:
        return self.call("POST", path, body=body, has_body=True)

    def patch(self, path: str, body: Any) -> Reply:
        """A JSON merge patch."""
        return self.call("PATCH", path, body=body, has_body=True)

    def delete(self, path: str) -> Reply:
        return self.call("DELETE", path)

    def stream(self, path: str, query: Mapping[str, str]) -> Iterator[str]:
        """The lines of an answer that does not end. A redirect is not followed."""
        url = f"{self.address}/v1/{path}?{urlencode(query)}"
        scheme, host, _ = _split(url)
        connection = self._connection(scheme, host)
        try:
            connection.request("GET", f"/{url.split('/', 3)[3]}", None, self._headers("GET", None))
            answer = connection.getresponse()
            if answer.status != HTTPStatus.OK:
                text = answer.read(BODY_BYTES_MAX).decode("utf-8", errors="replace")
                raise ApiError(Reply(answer.status, "GET", url, text, _json_object(text)))
            if connection.sock is not None:
                connection.sock.settimeout(None)  # a quiet server is no failure
            for line in answer:
                yield line.decode("utf-8", errors="replace")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise LocalError(f"GET {url.partition('?')[0]}: {_explain(error, scheme)}") from error
        finally:
            connection.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        has_body: bool = False,
    ) -> Reply:
        """One call; every status of 400 and more but a 404 with content raises ApiError."""
        url = f"{self.address}/v1/{quote(path.lstrip('/'), safe='/~:@!$&()*+,;=')}"
        if query:
            url += f"?{urlencode(query)}"
        payload = json.dumps(body).encode() if has_body else None
        if self.options.as_curl and not path.startswith(_PREFLIGHT):
            raise NotSent(self._curl(method, url, payload))
        if self.options.as_policy and not path.startswith(_PREFLIGHT):
            from sidecar.cli.policy_text import policy_for

            raise NotSent(policy_for(method, path.strip("/"), lists=(query or {}).get("list") == "true"))
        reply = self._send(method, url, payload)
        for _ in range(self.options.retries_max):
            if not _worth_retrying(reply.status):
                break
            time.sleep(random.uniform(*ATTEMPT_WAIT_S))  # noqa: S311 - spreads load, protects nothing
            reply = self._send(method, url, payload)
        if reply.status >= 400 and not (reply.status == 404 and reply.has_content()):
            raise ApiError(reply)
        return reply

    def _send(self, method: str, url: str, payload: bytes | None) -> Reply:
        """One request; one redirect is followed with the same method and body, never from https to http."""
        reply, location = self._exchange(method, url, payload)
        if reply.status not in REDIRECTS or not location:
            return reply
        target = urljoin(url, location)
        if url.startswith("https:") and not target.startswith("https:"):
            raise LocalError("redirect would cause protocol downgrade")
        again, _ = self._exchange(method, target, payload)
        if again.status in REDIRECTS:
            raise LocalError(f"redirected twice, at last by {target.partition('?')[0]}")
        return again

    def _exchange(self, method: str, url: str, payload: bytes | None) -> tuple[Reply, str]:
        scheme, host, _ = _split(url)
        target = url.split("/", 3)
        try:
            connection = self._connection(scheme, host)
            try:
                headers = self._headers(method, payload)
                connection.request(method, f"/{target[3] if len(target) > 3 else ''}", payload, headers)
                answer = connection.getresponse()
                raw = answer.read(BODY_BYTES_MAX + 1)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise LocalError(f"{method} {url.partition('?')[0]}: {_explain(error, scheme)}") from error
        if len(raw) > BODY_BYTES_MAX:
            raise LocalError(f"the answer is larger than {BODY_BYTES_MAX} bytes")
        text = raw.decode("utf-8", errors="replace")
        return Reply(answer.status, method, url, text, _json_object(text)), answer.headers.get("Location", "")

    def _headers(self, method: str, payload: bytes | None) -> dict[str, str]:
        headers = {"X-Vault-Request": "true", "Accept": "application/json"}
        if payload is not None:
            headers["Content-Type"] = "application/merge-patch+json" if method == "PATCH" else "application/json"
        optional = {
            "X-Vault-Token": self.options.token,
            "X-Vault-Namespace": self.options.namespace,
            "X-Vault-Wrap-TTL": self.options.wrap_ttl,
        }
        return headers | {name: value for name, value in optional.items() if value} | self.options.headers

    def _curl(self, method: str, url: str, payload: bytes | None) -> str:
        """The request for people to repeat; the token is asked for when it runs, and stands nowhere."""
        options = self.options
        words = ["curl"] if method == "GET" else ["curl", "-X", method]
        for flag, value in (("--cacert", options.ca_file), ("--capath", options.ca_path)):
            words += [flag, shlex.quote(value)] if value else []
        for flag, value in (("--cert", options.client_cert), ("--key", options.client_key)):
            words += [flag, shlex.quote(value)] if value else []
        words += ["--insecure"] if options.tls_skip_verify else []
        words += ["--unix-socket", shlex.quote(self._socket_path)] if self._socket_path else []
        for name, value in self._headers(method, payload).items():
            if name == "X-Vault-Token":
                words += ["-H", f'"{name}: $({program()} print token)"']
            elif name not in ("Accept", "Content-Type"):
                words += ["-H", shlex.quote(f"{name}: {value}")]
        if method == "PATCH":
            words += ["-H", "'Content-Type: application/merge-patch+json'"]
        words += ["-d", shlex.quote(payload.decode())] if payload is not None else []
        return " ".join([*words, shlex.quote(url)])

    def _connection(self, scheme: str, host: str) -> http.client.HTTPConnection:
        parts = urlsplit(f"//{host}")
        name = parts.hostname or ""
        timeout_s = self.options.timeout_s or None
        if self._socket_path and host == _SOCKET_HOST:  # elsewhere only where a redirect points
            return _UnixHTTP(self._socket_path, timeout=timeout_s)
        if scheme == "http":
            return http.client.HTTPConnection(name, parts.port or 80, timeout=timeout_s)
        context = _tls_context(self.options)
        if self.options.tls_server_name:
            return _NamedHTTPS(
                name,
                parts.port or 443,
                name=self.options.tls_server_name,
                context=context,
                timeout=self.options.timeout_s,
            )
        return http.client.HTTPSConnection(name, parts.port or 443, timeout=timeout_s, context=context)


def _worth_retrying(status: int) -> bool:
    return status == 412 or (status >= 500 and status != 501)


def _split(url: str) -> tuple[str, str, str]:
    try:
        parts = urlsplit(url)
        sound = parts.port is None or parts.port > 0
    except ValueError:
        sound, parts = False, urlsplit("")
    if not sound or parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise LocalError("the address must be http://host:port, https://host:port or unix:///path")
    return parts.scheme, parts.netloc, parts.path


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _tls_context(options: ClientOptions) -> ssl.SSLContext:
    try:
        # As in Vault: every file of the directory, and only where no single file is named.
        authorities = [options.ca_file] if options.ca_file else _files_in(options.ca_path)
        if options.ca_path and not authorities:
            raise LocalError(f"there is no certificate in {options.ca_path}")
        context = ssl.create_default_context(cafile=authorities[0] if authorities else None)
        for more in authorities[1:]:
            context.load_verify_locations(cafile=more)
        if options.client_cert:
            context.load_cert_chain(options.client_cert, options.client_key or None)
    except (OSError, ssl.SSLError) as error:
        raise LocalError(f"cannot load the TLS files: {error.strerror or error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if options.tls_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _files_in(directory: str) -> list[str]:
    """Sorted; none without a directory. Raises OSError."""
    if not directory:
        return []
    with os.scandir(directory) as entries:
        return sorted(entry.path for entry in entries if entry.is_file())


def _explain(error: Exception, scheme: str) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verification failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        plain = scheme == "https" and error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")
        return "the server does not speak TLS; use an http:// address" if plain else f"TLS: {error.reason or error}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, http.client.BadStatusLine | http.client.RemoteDisconnected):
        return "the server closed the connection without an answer; it may expect https"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    # The text of a ValueError may hold a header here, and so the token.
    return "the address, token or namespace holds a character that no request can carry"
