"""The connections that transactions travel on, against a server that says what a script tells it."""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from consul_backend import exchange as exchange_module
from consul_backend.exchange import CONNECTIONS_MAX, HEAD_BYTES_MAX, Exchange, NeverSent, NoAnswer, TooBig, connector

REQUEST = b"PUT /v1/txn HTTP/1.1\r\nHost: consul\r\nContent-Length: 2\r\n\r\n[]"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Scripted:
    """Answers the n-th request with the n-th text; keeps how many connections and requests there were."""

    def __init__(self, *script: bytes) -> None:
        self.script = list(script)
        self.connections = 0
        self.requests = 0
        self.writers: list[asyncio.StreamWriter] = []
        self.gone = asyncio.Event()
        self._request = asyncio.Condition()

    async def asked(self, times: int) -> None:
        async with asyncio.timeout(120), self._request:
            await self._request.wait_for(lambda: self.requests >= times)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        try:
            while True:
                await reader.readexactly(len(REQUEST))
                async with self._request:
                    self.requests += 1
                    self._request.notify_all()
                if self.script:
                    writer.write(self.script.pop(0))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.set()
        finally:
            writer.close()


@asynccontextmanager
async def against(*script: bytes) -> AsyncIterator[tuple[Exchange, Scripted]]:
    scripted = Scripted(*script)
    server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
    exchange = Exchange(connector("127.0.0.1", server.sockets[0].getsockname()[1], "", None, None))
    try:
        yield exchange, scripted
    finally:
        await exchange.close()
        server.close()
        await server.wait_closed()


async def ask(exchange: Exchange, *, timeout_s: float = 20.0, answer_bytes_max: int = 1000) -> tuple[int, bytes]:
    return await exchange.request(REQUEST, timeout_s=timeout_s, answer_bytes_max=answer_bytes_max)


async def test_a_connection_serves_again() -> None:
    async with against(OK, OK, OK) as (exchange, scripted):
        for _ in range(3):
            assert await ask(exchange) == (200, b"ok")
        assert (scripted.connections, scripted.requests) == (1, 3)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n", (200, b"abcde")),
        (b"HTTP/1.1 409 Conflict\r\nContent-Length: 0\r\n\r\n", (409, b"")),
        (b"HTTP/1.1 307 x\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n", (307, b"")),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, (200, b"ok")),
    ],
)
async def test_answers_of_every_form(text: bytes, answer: tuple[int, bytes]) -> None:
    async with against(text, OK) as (exchange, scripted):
        assert await ask(exchange) == answer
        assert await ask(exchange) == (200, b"ok")
        assert (scripted.connections, scripted.requests) == (1, 2)


async def test_an_answer_in_many_pieces() -> None:
    async with against(b"", OK) as (exchange, scripted):
        asking = asyncio.create_task(ask(exchange))
        await scripted.asked(1)
        for byte in OK:
            scripted.writers[0].write(bytes([byte]))
            await scripted.writers[0].drain()
            await asyncio.sleep(0)
        assert await asking == (200, b"ok")


@pytest.mark.parametrize("extra", [OK, b"HTTP/1.1 200", b"garbage"])
async def test_what_nobody_asked_for_ends_the_connection_and_is_never_the_next_answer(extra: bytes) -> None:
    async with against(OK + extra, OK.replace(b"ok", b"no")) as (exchange, scripted):
        try:
            assert await ask(exchange) == (200, b"ok")
        except NoAnswer:
            assert extra == b"garbage"  # it came with the answer, so the answer itself is in doubt
        assert await ask(exchange) == (200, b"no")
        assert scripted.connections == 2


async def test_what_comes_while_nothing_is_asked_ends_the_connection() -> None:
    async with against(OK, OK.replace(b"ok", b"no")) as (exchange, scripted):
        assert await ask(exchange) == (200, b"ok")
        scripted.writers[0].write(OK)
        await asyncio.wait_for(scripted.gone.wait(), 120)
        assert await ask(exchange) == (200, b"no")
        assert scripted.connections == 2


@pytest.mark.parametrize(
    "text",
    [
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * (HEAD_BYTES_MAX + 70_000),
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
    ],
)
async def test_what_is_no_answer(text: bytes) -> None:
    async with against(text, OK) as (exchange, scripted):
        with pytest.raises(NoAnswer):
            await ask(exchange)
        assert scripted.requests == 1
        assert await ask(exchange) == (200, b"ok")


async def test_a_closed_connection_is_no_answer_and_nothing_is_sent_again() -> None:
    async with against(OK, b"", OK) as (exchange, scripted):
        await ask(exchange)
        asking = asyncio.create_task(ask(exchange))
        await scripted.asked(2)
        scripted.writers[0].close()
        with pytest.raises(NoAnswer):
            await asking
        assert (scripted.connections, scripted.requests) == (1, 2)


async def test_a_connection_that_the_server_closed_meanwhile_is_replaced_before_anything_is_sent() -> None:
    async with against(OK, OK) as (exchange, scripted):
        await ask(exchange)
        scripted.writers[0].close()
        await asyncio.wait_for(scripted.gone.wait(), 120)
        assert await ask(exchange) == (200, b"ok")
        assert (scripted.connections, scripted.requests) == (2, 2)


async def test_an_answer_that_announces_the_end_is_the_last_of_its_connection() -> None:
    async with against(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), OK) as (exchange, scripted):
        assert await ask(exchange) == (200, b"ok")
        assert await ask(exchange) == (200, b"ok")
        assert scripted.connections == 2


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_size(chunked: bool) -> None:
    text = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" if chunked else OK + b""
    async with against(text, OK) as (exchange, scripted):
        with pytest.raises(TooBig):
            await ask(exchange, answer_bytes_max=1)
        await ask(exchange, answer_bytes_max=2)
        assert scripted.connections == 2


async def test_an_answer_that_does_not_come_in_time_gives_the_connection_up() -> None:
    async with against(b"", OK) as (exchange, scripted):
        with pytest.raises(NoAnswer, match="timed out"):
            await ask(exchange, timeout_s=0.05)
        assert await ask(exchange) == (200, b"ok")
        assert scripted.connections == 2


async def test_a_cancelled_request_gives_the_connection_up() -> None:
    async with against(b"", OK.replace(b"ok", b"no")) as (exchange, scripted):
        asking = asyncio.create_task(ask(exchange))
        await scripted.asked(1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert await ask(exchange) == (200, b"no")
        assert scripted.connections == 2


async def test_nobody_there_is_certain() -> None:
    async with against() as (exchange, _):
        pass
    with pytest.raises(NeverSent) as caught:
        await ask(exchange)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


async def test_connections_are_bounded_and_waiting_for_one_is_certain() -> None:
    async with against(*[b""] * CONNECTIONS_MAX) as (exchange, scripted):
        held = [asyncio.create_task(ask(exchange)) for _ in range(CONNECTIONS_MAX)]
        await scripted.asked(CONNECTIONS_MAX)
        with pytest.raises(NeverSent):
            await ask(exchange, timeout_s=0.05)
        assert scripted.connections == CONNECTIONS_MAX
        await exchange.close()
        for asking in held:
            with pytest.raises(NoAnswer):
                await asking


async def test_an_idle_connection_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async with against(OK, OK) as (exchange, scripted):
        await ask(exchange)
        monkeypatch.setattr(exchange_module, "IDLE_S", 0.0)
        await ask(exchange)
        assert scripted.connections == 2


def certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate and its key in one file."""
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(private.public_key())
    builder = builder.serial_number(1).not_valid_before(now - dt.timedelta(days=1))
    builder = builder.not_valid_after(now + dt.timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    signed = builder.sign(private, hashes.SHA256())
    path = folder / "both.pem"
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(
        signed.public_bytes(serialization.Encoding.PEM) + private.private_bytes(serialization.Encoding.PEM, *form)
    )
    return path


@pytest.mark.parametrize("server_name", ["consul.test", "other.test", None])
async def test_tls_by_the_configured_name(tmp_path: Path, server_name: str | None) -> None:
    path = certificate(tmp_path, "consul.test")
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    serving.load_cert_chain(path)
    scripted = Scripted(OK, OK)
    server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0, ssl=serving)
    trusting = ssl.create_default_context(cafile=path)
    port = server.sockets[0].getsockname()[1]
    exchange = Exchange(connector("127.0.0.1", port, "", trusting, server_name))
    if server_name == "consul.test":
        assert [await ask(exchange), await ask(exchange)] == [(200, b"ok")] * 2
        assert scripted.connections == 1
    else:
        with pytest.raises(NeverSent) as caught:
            await ask(exchange)
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        assert scripted.requests == 0
    await exchange.close()
    server.close()
    await server.wait_closed()
