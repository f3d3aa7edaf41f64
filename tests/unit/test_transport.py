"""The transport against a server that misbehaves on purpose: nothing is sent twice, nothing is followed."""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from consul_backend import transport as transport_module
from consul_backend.config import ConsulConfig
from consul_backend.errors import (
    Conflict,
    OutcomeUnknown,
    PermissionDenied,
    TooLarge,
    Unavailable,
)
from consul_backend.limits import Limits
from consul_backend.store import ConsulStore
from consul_backend.transport import AnswerTooBig, ConnectionLost, Token, Transport, tls_context
from consul_backend.txn import Set

Reply = bytes | None
EMPTY_RESULT = b'{"Results":[],"Errors":null}'
SESSION = "01234567-89ab-cdef-0123-456789abcdef"


def http(status: int, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class FakeConsul:
    """Answers each request with the next reply of ``script`` (None: close the connection); keeps what it got."""

    def __init__(self, script: list[Reply]) -> None:
        self.script = script
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.connections = 0
        self.address = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                self.requests.append((head[0], headers, body))
                reply = self.script.pop(0)
                if reply is None:
                    return
                writer.write(reply)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


@asynccontextmanager
async def fake(*script: Reply) -> AsyncIterator[FakeConsul]:
    consul = FakeConsul(list(script))
    server = await asyncio.start_server(consul.serve, "127.0.0.1", 0)
    consul.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield consul
    finally:
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def transport_to(address: str, **settings: str) -> AsyncIterator[Transport]:
    transport = Transport(ConsulConfig(address=address, **settings))
    try:
        yield transport
    finally:
        await transport.close()


async def put(transport: Transport, timeout_s: float = 5.0, path: str = "/v1/txn") -> transport_module.Answer:
    return await transport.request("PUT", path, body=b"[]", timeout_s=timeout_s)


BOTH_WAYS = pytest.mark.parametrize("path", ["/v1/txn", "/v1/agent/x"])
"""Transactions have connections of their own; the rules are the same."""


@BOTH_WAYS
async def test_a_put_whose_reused_connection_closes_without_an_answer_is_not_sent_again(path: str) -> None:
    async with fake(http(200), None, http(200)) as consul, transport_to(consul.address) as transport:
        await put(transport, path=path)
        with pytest.raises(ConnectionLost):
            await put(transport, path=path)
        assert len(consul.requests) == 2
        assert consul.connections == 1


async def test_aiohttp_would_have_sent_it_again() -> None:
    """The reason for the switch. When this fails, aiohttp has changed and the switch may go."""
    async with fake(http(200), None, http(200)) as consul, aiohttp.ClientSession() as session:
        for _ in range(2):
            async with session.put(f"http://{consul.address}/v1/txn", data=b"[]") as answer:
                await answer.read()
        assert len(consul.requests) == 3


async def test_an_aiohttp_without_the_switch_is_refused() -> None:
    with pytest.raises(RuntimeError, match="resend"):
        transport_module._never_resend(object())  # type: ignore[arg-type]  # the point of the test


@BOTH_WAYS
@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_no_redirect_is_followed(status: int, path: str) -> None:
    async with (
        fake(http(status, b"", "Location: /v1/kv/elsewhere"), http(200)) as consul,
        transport_to(consul.address) as transport,
    ):
        assert (await put(transport, path=path)).status == status
        assert len(consul.requests) == 1


@BOTH_WAYS
async def test_a_refused_connection_is_certain(path: str) -> None:
    async with fake() as consul:
        address = consul.address
    async with transport_to(address) as transport:
        with pytest.raises(Unavailable, match="cannot connect"):
            await put(transport, path=path)


@BOTH_WAYS
async def test_a_late_answer_is_unknown(path: str) -> None:
    never = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await never.wait()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with transport_to(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as transport:
        with pytest.raises(OutcomeUnknown, match="timed out") as caught:
            await put(transport, timeout_s=0.05, path=path)
        assert not isinstance(caught.value, ConnectionLost)
    never.set()
    server.close()
    await server.wait_closed()


@BOTH_WAYS
async def test_a_truncated_answer_is_unknown(path: str) -> None:
    truncated = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nConnection: close\r\n\r\n{"
    async with fake(truncated, None) as consul, transport_to(consul.address) as transport:
        request = asyncio.create_task(put(transport, timeout_s=0.5, path=path))
        with pytest.raises(OutcomeUnknown):
            await request


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_answer_over_the_size_taken_is_refused(chunked: bool) -> None:
    big = b"x" * 100
    reply = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n" + big + b"\r\n0\r\n\r\n"
        if chunked
        else http(200, big)
    )
    async with fake(reply) as consul, transport_to(consul.address) as transport:
        with pytest.raises(AnswerTooBig):
            await transport.request("GET", "/", timeout_s=5, answer_bytes_max=99)


@BOTH_WAYS
async def test_token_and_namespace_travel_and_nothing_else_does(path: str) -> None:
    async with (
        fake(http(200, b"", "X-Consul-Index: 7")) as consul,
        transport_to(consul.address, token="tok", namespace="ns") as transport,
    ):
        assert (await put(transport, path=path)).index == (0 if path == "/v1/txn" else 7)
        _, headers, body = consul.requests[0]
        assert body == b"[]"
        assert headers["host"] == consul.address
        assert headers["x-consul-token"] == "tok"
        assert headers["x-consul-namespace"] == "ns"
        assert headers["accept-encoding"] == "identity"
        assert "user-agent" not in headers


@BOTH_WAYS
async def test_a_unix_socket(tmp_path: Path, path: str) -> None:
    consul = FakeConsul([http(200)])
    socket_path = str(tmp_path / "consul.sock")
    server = await asyncio.start_unix_server(consul.serve, socket_path)
    async with transport_to(f"unix://{socket_path}") as transport:
        assert (await put(transport, path=path)).status == 200
    server.close()
    await server.wait_closed()


async def test_a_token_that_would_end_the_header_is_refused() -> None:
    async with fake() as consul, transport_to(consul.address, token="a\r\nX: b") as transport:
        with pytest.raises(Unavailable, match="characters"):
            await put(transport)
        assert consul.connections == 0


def test_the_token_file_is_read_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(transport_module.time, "monotonic", lambda: now_s)
    path = tmp_path / "token"
    path.write_text("one\n")
    token = Token(ConsulConfig(token_file=str(path)))
    assert token.current() == "one"
    replacement = tmp_path / "new"
    replacement.write_text("two\n")
    replacement.replace(path)
    assert token.current() == "one", "not looked at within a second"
    token.suspect()
    assert token.current() == "two"
    now_s = 2.0
    path.unlink()
    assert token.current() == "two"


def test_a_token_file_that_never_was_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="token file"):
        Token(ConsulConfig(token_file=str(tmp_path / "none"))).current()


def test_an_unreadable_token_file_never_means_no_token(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.touch()
    token = Token(ConsulConfig(token_file=str(path)))
    for _ in range(2):
        with pytest.raises(Unavailable, match="is empty"):
            token.current()
    path.write_text("one\n")
    assert token.current() == "one", "at once, while there is none"
    path.write_text("")
    token.suspect()
    assert token.current() == "one"
    path.write_text("two")
    token.suspect()
    assert token.current() == "two"


def test_tls_is_strict_unless_told_otherwise() -> None:
    strict = tls_context(ConsulConfig())
    assert strict.verify_mode is ssl.CERT_REQUIRED
    assert strict.check_hostname
    assert strict.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert tls_context(ConsulConfig(tls_skip_verify=True)).verify_mode is ssl.CERT_NONE
    with pytest.raises(Unavailable, match="TLS files"):
        tls_context(ConsulConfig(ca_file=os.devnull + "/none"))


# -- how ConsulStore reads the answers to a transaction

OPEN_SCRIPT: tuple[Reply, ...] = (
    http(413, b"Transaction contains too many operations (128 > 64)"),
    http(200, EMPTY_RESULT),
    http(409, b'{"Results":null,"Errors":[{"OpIndex":0,"What":"key \\"outrider/sentinel\\" doesn\'t exist"}]}'),
    http(200, EMPTY_RESULT),
)


@asynccontextmanager
async def store_on(*script: Reply) -> AsyncIterator[tuple[ConsulStore, FakeConsul]]:
    async with fake(*OPEN_SCRIPT, *script) as consul:
        store = ConsulStore(ConsulConfig(address=consul.address), request_timeout_s=1.0)
        await store.open()
        consul.requests.clear()
        try:
            yield store, consul
        finally:
            await store.close()


@pytest.mark.parametrize(
    ("reply", "error", "text"),
    [
        (None, ConnectionLost, "no answer"),
        (http(500, b"rpc error making call: EOF"), OutcomeUnknown, "EOF"),
        (http(500, b"leadership lost while committing log"), OutcomeUnknown, "500"),
        (http(503), OutcomeUnknown, "503"),
        (http(200, b"<html>"), OutcomeUnknown, "makes no sense"),
        (http(403, b"Permission denied"), PermissionDenied, "Permission denied"),
        (http(403, b"ACL not found"), Unavailable, "does not know this token"),
        (http(413, b"Request body too large"), TooLarge, "too large"),
        (http(429, b"rate limit"), Unavailable, "429"),
        (http(400, b"Failed to parse body"), Unavailable, "400"),
        (http(301, b"", "Location: /elsewhere"), Unavailable, "301"),
        (http(409, b'{"Errors":[{"OpIndex":0,"What":"Permission denied"}]}'), PermissionDenied, "operation 0"),
        (http(409, b"?"), Conflict, "does not say why"),
    ],
)
async def test_every_answer_to_a_write_has_its_error_and_is_asked_for_once(
    reply: Reply, error: type[Exception], text: str
) -> None:
    async with store_on(reply) as (store, consul):
        with pytest.raises(error, match=text) as caught:
            await store.txn([Set("a", b"value")])
        assert type(caught.value) is error
        assert len(consul.requests) == 1


async def test_a_conflict_names_every_failed_operation_and_no_session() -> None:
    what = f'failed session check for key \\"outrider/lock\\", current session \\"{SESSION}\\" != \\"{SESSION}\\"'
    body = f'{{"Errors":[{{"OpIndex":0,"What":"{what}"}},{{"OpIndex":3,"What":"index is stale"}}]}}'.encode()
    async with store_on(http(409, body)) as (store, _):
        with pytest.raises(Conflict) as caught:
            await store.txn([Set("a", b"")])
    assert [failure.op_index for failure in caught.value.failures] == [0, 3]
    assert SESSION not in str(caught.value) + repr(caught.value.failures)


async def test_a_write_over_the_limits_is_not_sent() -> None:
    async with store_on() as (store, consul):
        with pytest.raises(TooLarge):
            await store.txn([Set("a", b"x" * 400_000)])
        assert consul.requests == []


FOUND = http(200, b'{"Results":[{"KV":{"Key":"outrider/a","Value":"MQ==","ModifyIndex":5}}],"Errors":null}')
MISSING = http(409, b'{"Errors":[{"OpIndex":0,"What":"key \\"outrider/a\\" doesn\'t exist"}]}')
APPEARED = http(409, b'{"Errors":[{"OpIndex":0,"What":"key \\"outrider/a\\" exists"}]}')
DENIED = http(409, b'{"Errors":[{"OpIndex":0,"What":"Permission denied"}]}')


@pytest.mark.parametrize("failure", [None, http(500), http(503), http(429)])
async def test_a_read_is_repeated(failure: Reply) -> None:
    async with store_on(failure, failure, FOUND) as (store, consul):
        item = await store.get("a")
        assert item is not None
        assert (item.key, item.value, item.modify_index) == ("a", b"1", 5)
        assert len(consul.requests) == 3


async def test_a_read_without_rights_is_not_repeated() -> None:
    async with store_on(http(403, b"Permission denied")) as (store, consul):
        with pytest.raises(PermissionDenied):
            await store.get("a")
        assert len(consul.requests) == 1


async def test_absence_is_asked_for_by_name() -> None:
    async with store_on(MISSING, http(200, EMPTY_RESULT)) as (store, consul):
        assert await store.get("a") is None
        assert b"check-not-exists" in consul.requests[1][2]


async def test_a_key_that_appears_between_get_and_proof_is_read() -> None:
    async with store_on(MISSING, APPEARED, FOUND) as (store, _):
        item = await store.get("a")
        assert item is not None


@pytest.mark.parametrize("script", [(MISSING, DENIED), (http(200, EMPTY_RESULT),)])
async def test_a_hidden_key_is_not_missing(script: tuple[Reply, ...]) -> None:
    async with store_on(*script) as (store, _):
        with pytest.raises(PermissionDenied):
            await store.get("a")


async def test_an_index_that_falls_starts_the_watch_again() -> None:
    entry = b'[{"Key":"outrider/a","Value":null,"ModifyIndex":3}]'
    async with store_on(http(200, entry, "X-Consul-Index: 3"), http(404, b"", "X-Consul-Index: 0")) as (store, consul):
        item, index = await store.watch("a", 9, 0.01)
        assert item is not None
        assert item.value == b""
        assert index == 0
        assert await store.watch("a", 0, 0.01) == (None, 0)
        assert "index=9&wait=10ms" in consul.requests[0][0]
        assert "index" not in consul.requests[1][0]


async def test_the_limits_are_what_the_server_takes() -> None:
    async with fake(
        http(200, EMPTY_RESULT), http(413, b"too large"), http(200, EMPTY_RESULT), *OPEN_SCRIPT[2:]
    ) as consul:
        store = ConsulStore(ConsulConfig(address=consul.address, path="p/"))
        await store.open()
        assert store.limits == Limits(ops_max=128, body_bytes_max=262_144, prefix_bytes=2)
        await store.close()


Call = Callable[[ConsulStore], Awaitable[object]]


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.get("a"),
        lambda store: store.txn([Set("a", b"")]),
        lambda store: store.beat(),
        lambda store: store.renew_session(SESSION),
    ],
)
async def test_a_store_that_is_not_open_is_unavailable(call: Call) -> None:
    with pytest.raises(Unavailable, match="not open"):
        await call(ConsulStore(ConsulConfig()))
