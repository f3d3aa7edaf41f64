"""The cluster port on loopback: the whole TLS matrix, with real sockets and handshakes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from asyncio import sslproto
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from aiohttp import WSMsgType, web

from sidecar.replication import protocol as wire
from sidecar.replication import sync_calls
from sidecar.replication.channel import ChannelClosed
from sidecar.transport import certificates
from sidecar.transport.certificates import Credentials
from sidecar.transport.listener import ClusterListener, ListenerOptions, Purpose, peer_of
from sidecar.transport.peer import (
    PeerClient,
    PeerIdentity,
    PeerOutcomeUnknown,
    PeerRefused,
    PeerUnreachable,
)
from sidecar.transport.tls import TLS_BUFFER_BYTES, _load, base_server_context, server_context

REPLICATION = ("set.performance.outrider", "replication_v1")
FORWARDING = ("fw.cluster.outrider", "req_fw_sb-act_v1")


@dataclass
class Side:
    """One purpose with its authority, server and client."""

    sni: str
    alpn: str
    authority: Credentials
    server: Credentials
    client: Credentials

    @classmethod
    def make(cls, sni: str, alpn: str) -> Side:
        authority = certificates.make_authority(f"authority of {sni}")
        return cls(
            sni, alpn, authority, certificates.issue_server(authority, sni), certificates.issue_client(authority, "eu")
        )

    @property
    def fingerprint(self) -> str:
        return certificates.fingerprint(self.client.certificate_pem)

    def identity(self) -> PeerIdentity:
        return PeerIdentity(self.sni, self.alpn, self.client, self.authority.certificate_pem)


@dataclass
class Port:
    """A listener with both purposes, and what reached their handlers."""

    listener: ClusterListener
    replication: Side
    forwarding: Side
    allowed: set[str]
    served: list[str] = field(default_factory=list)
    entered: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.listener.port}"

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        peer = peer_of(request)
        self.served.append(f"{request.method} {request.path} {peer.common_name}")
        self.entered.set()
        if request.path == "/stream":
            websocket = web.WebSocketResponse()
            await websocket.prepare(request)
            async for message in websocket:
                await websocket.send_bytes(message.data)
            return websocket
        if request.path == "/hang":
            await asyncio.get_running_loop().create_future()
        return web.Response(body=await request.read(), headers={"X-Peer": peer.fingerprint})


SIDES = (Side.make(*REPLICATION), Side.make(*FORWARDING))


@pytest.fixture
async def port() -> AsyncIterator[Port]:
    replication, forwarding = SIDES
    listener = ClusterListener("127.0.0.1", 0)
    allowed = {side.fingerprint for side in SIDES}
    port = Port(listener, replication, forwarding, allowed)
    for side in SIDES:
        listener.add(
            Purpose(
                side.sni,
                side.alpn,
                side.server,
                side.authority.certificate_pem,
                port.handle,
                lambda fingerprint: fingerprint in allowed,
            )
        )
    await listener.start()
    yield port
    await listener.close()


@contextlib.asynccontextmanager
async def client_of(port: Port, identity: PeerIdentity) -> AsyncIterator[PeerClient]:
    client = PeerClient(identity, port.address)
    try:
        yield client
    finally:
        await client.close()


def lax_context(credentials: Credentials | None, alpn: list[str] | None) -> ssl.SSLContext:
    """A client that checks nothing, as an attacker's would."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if credentials is not None:
        _load(context, credentials)
    if alpn is not None:
        context.set_alpn_protocols(alpn)
    return context


async def raw_call(port: Port, context: ssl.SSLContext, sni: str | None, host: str | None = None) -> bytes:
    """What a hand-made client gets back for one request; b"" when the port dropped it."""
    try:
        async with asyncio.timeout(60):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port.listener.port, ssl=context, server_hostname=sni or ""
            )
            try:
                writer.write(f"POST /x HTTP/1.1\r\nHost: {host or sni}\r\nContent-Length: 0\r\n\r\n".encode())
                await writer.drain()
                return await reader.read(4096)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except OSError:
        return b""


async def test_each_purpose_serves_its_own_peers(port: Port) -> None:
    for side in SIDES:
        async with client_of(port, side.identity()) as client:
            answer = await client.post("/x", b"hello", timeout_s=60)
            assert (answer.status, answer.body) == (200, b"hello")
    assert port.served == ["POST /x eu", "POST /x eu"]


MATRIX = [
    # sni, alpn, whose certificate
    pytest.param(REPLICATION[0], None, "replication", id="no ALPN"),
    pytest.param(REPLICATION[0], ["http/1.1"], "replication", id="unknown ALPN"),
    pytest.param(REPLICATION[0], ["h2", "http/1.1"], "replication", id="ALPN list without ours"),
    pytest.param(REPLICATION[0], [FORWARDING[1]], "replication", id="the other purpose's ALPN"),
    pytest.param("evil.cluster", [REPLICATION[1]], "replication", id="unknown SNI"),
    pytest.param(None, [REPLICATION[1]], "replication", id="no SNI"),
    pytest.param(FORWARDING[0], [REPLICATION[1]], "replication", id="the other purpose's SNI"),
    pytest.param(FORWARDING[0], [FORWARDING[1]], "replication", id="replication certificate for forwarding"),
    pytest.param(REPLICATION[0], [REPLICATION[1]], "forwarding", id="forwarding certificate for replication"),
    pytest.param(REPLICATION[0], [REPLICATION[1]], "foreign", id="foreign authority"),
    pytest.param(REPLICATION[0], [REPLICATION[1]], "same name", id="authority of the same name"),
    pytest.param(REPLICATION[0], [REPLICATION[1]], "server", id="server certificate as a client's"),
    pytest.param(REPLICATION[0], [REPLICATION[1]], "none", id="no client certificate"),
    pytest.param(REPLICATION[0], [REPLICATION[1]], "unknown", id="right authority, not on the allow list"),
]


@pytest.mark.parametrize(("sni", "alpn", "whose"), MATRIX)
async def test_everything_else_is_dropped_before_a_byte_is_served(
    port: Port, sni: str | None, alpn: list[str] | None, whose: str
) -> None:
    replication, forwarding = SIDES
    credentials = {
        "replication": lambda: replication.client,
        "forwarding": lambda: forwarding.client,
        "foreign": lambda: certificates.issue_client(certificates.make_authority("foreign"), "eu"),
        "same name": lambda: certificates.issue_client(
            certificates.make_authority(f"authority of {REPLICATION[0]}"), "eu"
        ),
        "server": lambda: replication.server,
        "none": lambda: None,
        "unknown": lambda: certificates.issue_client(replication.authority, "eu"),
    }[whose]()
    if credentials is not None and whose != "unknown":
        # The allow list is another guard: here TLS alone has to refuse.
        port.allowed.add(certificates.fingerprint(credentials.certificate_pem))
    assert await raw_call(port, lax_context(credentials, alpn), sni) == b""
    assert port.served == []


def test_every_context_demands_a_certificate() -> None:
    side = SIDES[0]
    contexts = (base_server_context(), server_context(side.server, side.authority.certificate_pem, side.alpn))
    for context in contexts:
        assert (context.verify_mode, context.num_tickets) == (ssl.CERT_REQUIRED, 0)
        assert context.minimum_version is context.maximum_version is ssl.TLSVersion.TLSv1_3


async def test_the_matrix_has_a_control(port: Port) -> None:
    replication = SIDES[0]
    context = lax_context(replication.client, [REPLICATION[1]])
    assert (await raw_call(port, context, REPLICATION[0])).startswith(b"HTTP/1.1 200")


async def test_old_protocols_are_refused(port: Port) -> None:
    context = lax_context(SIDES[0].client, [REPLICATION[1]])
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert await raw_call(port, context, REPLICATION[0]) == b""
    assert port.served == []


async def test_host_must_name_what_sni_named(port: Port) -> None:
    context = lax_context(SIDES[0].client, [REPLICATION[1]])
    answer = await raw_call(port, context, REPLICATION[0], host=FORWARDING[0])
    assert answer.startswith(b"HTTP/1.1 421")
    assert port.served == []


async def test_revoked_while_connected_is_refused_at_the_next_request(port: Port) -> None:
    side = SIDES[0]
    async with client_of(port, side.identity()) as client:
        assert (await client.post("/x", b"", timeout_s=60)).status == 200
        port.allowed.discard(side.fingerprint)
        with pytest.raises(PeerOutcomeUnknown):
            await client.post("/x", b"", timeout_s=60)
    assert len(port.served) == 1


async def test_cut_ends_an_open_stream_and_a_running_request_at_once(port: Port) -> None:
    side = SIDES[0]
    async with client_of(port, side.identity()) as client:
        websocket = await client.websocket("/stream", message_bytes_max=1024)
        await websocket.send_bytes(b"ping")
        assert (await websocket.receive()).data == b"ping"
        port.entered.clear()
        hanging = asyncio.create_task(client.post("/hang", b"", timeout_s=60))
        await port.entered.wait()
        port.allowed.discard(side.fingerprint)
        assert port.listener.cut(side.fingerprint) == 2
        async with asyncio.timeout(60):
            message = await websocket.receive()
            assert message.type in (WSMsgType.CLOSED, WSMsgType.ERROR, WSMsgType.CLOSE)
            with pytest.raises(PeerOutcomeUnknown):
                await hanging
        assert port.listener.statistics()["connections"] == 0


async def test_revoked_cannot_reconnect(port: Port) -> None:
    side = SIDES[0]
    port.allowed.discard(side.fingerprint)
    port.listener.cut(side.fingerprint)
    async with client_of(port, side.identity()) as client:
        with pytest.raises((PeerOutcomeUnknown, PeerUnreachable)):
            await client.post("/x", b"", timeout_s=60)
        with pytest.raises((PeerUnreachable, PeerRefused)):
            await client.websocket("/stream", message_bytes_max=1024)
    assert port.served == []
    assert port.listener.statistics()["refused"] >= 1


async def test_no_session_is_ever_resumed(port: Port) -> None:
    """A client that keeps whatever session it can get must complete the whole handshake again."""
    context = lax_context(SIDES[0].client, [REPLICATION[1]])

    def connect(session: ssl.SSLSession | None) -> tuple[bool, bool, ssl.SSLSession | None]:
        with socket.create_connection(("127.0.0.1", port.listener.port), timeout=60) as plain:
            tls = context.wrap_socket(plain, server_hostname=REPLICATION[0], session=session)
            with tls:
                tls.sendall(f"POST /x HTTP/1.1\r\nHost: {REPLICATION[0]}\r\nContent-Length: 0\r\n\r\n".encode())
                assert tls.recv(4096).startswith(b"HTTP/1.1 200")  # tickets, if any, came before this
                kept = tls.session
                return bool(tls.session_reused), bool(kept is not None and kept.has_ticket), kept

    reused, ticket, session = await asyncio.to_thread(connect, None)
    assert (reused, ticket) == (False, False)
    reused, ticket, _ = await asyncio.to_thread(connect, session)
    assert (reused, ticket) == (False, False)


async def test_tls_buffers_are_16_kib_on_both_ends(port: Port) -> None:
    """asyncio's attribute is private: this fails when a Python release no longer honours it."""
    sizes: list[int] = []

    async def look(request: web.BaseRequest) -> web.StreamResponse:
        sizes.append(len(request.transport._ssl_protocol._ssl_buffer))  # type: ignore[union-attr]  # asyncio's TLS transport has one
        return web.Response()

    port.handle = look  # type: ignore[method-assign]  # stands in for one call
    side = SIDES[0]
    await port.listener.remove(side.sni)
    port.listener.add(Purpose(side.sni, side.alpn, side.server, side.authority.certificate_pem, look, lambda _: True))
    async with client_of(port, side.identity()) as client:
        await client.post("/x", b"", timeout_s=60)
    assert sizes == [TLS_BUFFER_BYTES] == [16 * 1024]
    assert sslproto.SSLProtocol.max_size == 16 * 1024


async def test_a_large_body_passes_the_small_buffer(port: Port) -> None:
    body = bytes(range(256)) * 4096 * 8
    async with client_of(port, SIDES[0].identity()) as client:
        answer = await client.post("/x", body, timeout_s=60)
    assert answer.body == body


@pytest.mark.parametrize("silent", [False, True])
async def test_the_answer_to_a_diff_may_take_long_as_long_as_it_comes(
    port: Port, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A narrow link is no reason to begin the same comparison again, for ever; a primary that is gone is one."""
    monkeypatch.setattr(sync_calls, "DIFF_IDLE_S", 1.5)
    reply = wire.DiffReply("c", "s", "g", 1, "e", 7, bytes(32), False, [f"r/{n:036}" for n in range(16)], [], {}, {})

    async def dribble(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        body = wire.encode(reply)
        for start in range(0, len(body), 60):
            await response.write(body[start : start + 60])
            await asyncio.sleep(60 if silent else 0.3)
        return response

    side = SIDES[0]
    await port.listener.remove(side.sni)
    port.listener.add(
        Purpose(side.sni, side.alpn, side.server, side.authority.certificate_pem, dribble, lambda _: True)
    )
    async with client_of(port, side.identity()) as client:
        asked = sync_calls.ask_diff(client, wire.DiffRequest(bytes(16), bytes(20), {}))
        started = time.monotonic()
        if silent:
            with pytest.raises(ChannelClosed):
                await asked
        else:
            assert await asked == reply
            assert time.monotonic() - started > 2 * sync_calls.DIFF_IDLE_S, "it took longer than any silence may"


async def test_a_removed_purpose_is_gone_and_cuts_its_connections(port: Port) -> None:
    async with client_of(port, SIDES[0].identity()) as client:
        websocket = await client.websocket("/stream", message_bytes_max=1024)
        await websocket.send_bytes(b"ping")
        assert (await websocket.receive()).data == b"ping"
        await port.listener.remove(REPLICATION[0])
        async with asyncio.timeout(60):
            assert (await websocket.receive()).type is not WSMsgType.BINARY
        with pytest.raises(PeerUnreachable):
            await client.post("/x", b"", timeout_s=60)
    async with client_of(port, SIDES[1].identity()) as client:
        assert (await client.post("/x", b"", timeout_s=60)).status == 200


async def test_a_listener_without_purposes_refuses_everybody() -> None:
    listener = ClusterListener("127.0.0.1", 0)
    await listener.start()
    try:
        client = PeerClient(SIDES[0].identity(), f"127.0.0.1:{listener.port}")
        with pytest.raises(PeerUnreachable):
            await client.post("/x", b"", timeout_s=60)
        await client.close()
    finally:
        await listener.close()


@pytest.mark.parametrize("flaw", ["authority", "name", "alpn"])
async def test_the_client_refuses_a_wrong_server_before_it_sends_anything(flaw: str) -> None:
    """A server with another authority's certificate, another name, or (as Python lets it) no common ALPN protocol."""
    side = SIDES[0]
    authority = certificates.make_authority("foreign") if flaw == "authority" else side.authority
    server_credentials = certificates.issue_server(authority, "other.name" if flaw == "name" else side.sni)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, server_credentials)
    context.set_alpn_protocols(["http/1.1"] if flaw == "alpn" else [side.alpn])
    received = bytearray()
    done = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            received.extend(await reader.read())
        writer.close()
        done.set()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    client = PeerClient(side.identity(), f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        with pytest.raises(PeerUnreachable):
            await client.post("/x", b"secret", timeout_s=60)
        with pytest.raises(PeerUnreachable):
            await client.websocket("/stream", message_bytes_max=1024)
    finally:
        await client.close()
        server.close()
        await server.wait_closed()
    assert not received


async def test_a_peer_that_never_answers_the_handshake_is_unreachable() -> None:
    held = asyncio.Event()

    async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await held.wait()
        writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    client = PeerClient(SIDES[0].identity(), f"127.0.0.1:{server.sockets[0].getsockname()[1]}", connect_timeout_s=0.2)
    try:
        with pytest.raises(PeerUnreachable):
            await client.post("/x", b"", timeout_s=60)
        with pytest.raises(PeerUnreachable):
            await client.websocket("/stream", message_bytes_max=1024)
    finally:
        held.set()
        await client.close()
        server.close()
        await server.wait_closed()


async def test_a_peer_that_accepts_and_says_nothing_is_not_waited_for(port: Port) -> None:
    async with client_of(port, SIDES[0].identity()) as client:
        with pytest.raises(PeerUnreachable):
            await client.websocket("/hang", message_bytes_max=1024, open_timeout_s=0.2)
        with pytest.raises(PeerOutcomeUnknown, match="no answer within"):
            await client.post("/hang", b"", timeout_s=0.2)


async def test_a_handshake_that_stalls_is_dropped() -> None:
    listener = ClusterListener("127.0.0.1", 0, ListenerOptions(handshake_timeout_s=0.2))
    await listener.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        async with asyncio.timeout(60):
            assert await reader.read() == b""
        writer.close()
    finally:
        await listener.close()


async def test_more_connections_than_allowed_are_dropped() -> None:
    side = SIDES[0]
    listener = ClusterListener("127.0.0.1", 0, ListenerOptions(connections_max=1))

    async def echo(request: web.BaseRequest) -> web.StreamResponse:
        websocket = web.WebSocketResponse()
        await websocket.prepare(request)
        await websocket.receive()
        return websocket

    listener.add(Purpose(side.sni, side.alpn, side.server, side.authority.certificate_pem, echo, lambda _: True))
    await listener.start()
    client = PeerClient(side.identity(), f"127.0.0.1:{listener.port}")
    try:
        first = await client.websocket("/stream", message_bytes_max=1024)
        with pytest.raises((PeerUnreachable, PeerRefused)):
            await client.websocket("/stream", message_bytes_max=1024)
        assert not first.closed
    finally:
        await client.close()
        await listener.close()


async def test_nothing_listens_is_unreachable() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    client = PeerClient(SIDES[0].identity(), address)
    with pytest.raises(PeerUnreachable):
        await client.post("/x", b"", timeout_s=60)
    await client.close()


async def test_two_purposes_may_not_share_a_name(port: Port) -> None:
    side = SIDES[0]
    with pytest.raises(ValueError, match="already"):
        port.listener.add(
            Purpose(side.sni, side.alpn, side.server, side.authority.certificate_pem, port.handle, lambda _: True)
        )
