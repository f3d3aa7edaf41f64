"""The API port's sockets: PROXY headers before TLS, Unix sockets, and deadlines for clients that are slow."""

import asyncio
import ipaddress
import os
import socket
import ssl
import stat
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import pytest

from sidecar.api.listening import SocketAccess
from sidecar.api.patience import Patience
from sidecar.api.proxy_protocol import V2_SIGNATURE, Behavior, ProxyRule
from sidecar.api.server import ApiServer, ServerLimits
from sidecar.request.types import HttpRequest, HttpResponse
from sidecar.transport.certificates import issue_server, make_authority

GET = b"GET /v1/sys/health HTTP/1.1\r\nHost: h\r\n\r\n"
V1 = b"PROXY TCP4 203.0.113.9 10.0.0.1 4000 8200\r\n"
V2 = V2_SIGNATURE + b"\x21\x11\x00\x0c" + socket.inet_aton("203.0.113.9") + b"\x0a\x00\x00\x01\x0f\xa0\x20\x08"
LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)
NOBODY = (ipaddress.ip_network("192.0.2.0/24"),)


class Served:
    def __init__(self) -> None:
        self.requests: list[HttpRequest] = []
        self.arrived = asyncio.Event()

    async def handle(self, request: HttpRequest) -> HttpResponse:
        self.requests.append(request)
        self.arrived.set()
        return HttpResponse(body=request.body or b"{}\n")

    @property
    def clients(self) -> list[str]:
        return [request.remote_address for request in self.requests]


@asynccontextmanager
async def serving(limits: ServerLimits | None = None) -> AsyncIterator[tuple[Served, ApiServer]]:
    served = Served()
    server = ApiServer(served.handle, limits=limits)
    try:
        yield served, server
    finally:
        await server.close()


async def ask(port: int, *parts: bytes, tls: ssl.SSLContext | None = None) -> int:
    """Send ``parts`` one by one and return the answer's status; 0 where the connection was closed without one."""
    loop = asyncio.get_running_loop()
    plain = socket.socket()
    plain.setblocking(False)
    await loop.sock_connect(plain, ("127.0.0.1", port))
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    *heads, request = parts
    for head in heads:
        await loop.sock_sendall(plain, head)
        await asyncio.sleep(0)
    try:
        async with asyncio.timeout(120):
            # From here on the socket is the transport's, which closes it.
            reader, writer = await asyncio.open_connection(
                sock=plain, ssl=tls, server_hostname="localhost" if tls else None
            )
            writer.write(request)
            line = await reader.readline()
            writer.close()
            await writer.wait_closed()
    except (ConnectionError, ssl.SSLError):
        return 0
    return int(line.split(b" ")[1]) if line else 0


@pytest.fixture(scope="module")
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(the server's, a client's) context."""
    authority = make_authority("test")
    credentials = issue_server(authority, "localhost")
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    descriptor = os.memfd_create("pair")
    os.write(descriptor, credentials.certificate_pem + credentials.key_pem)
    server.load_cert_chain(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)
    client.load_verify_locations(cadata=authority.certificate_pem.decode())
    return server, client


@pytest.mark.parametrize("header", [(V1,), (V2,), (V1[:3], V1[3:20], V1[20:]), (V2[:5], V2[5:13], V2[13:])])
@pytest.mark.parametrize("with_tls", [False, True])
async def test_the_client_is_who_the_proxy_says(
    header: tuple[bytes, ...], with_tls: bool, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    async with serving() as (served, server):
        rule = ProxyRule(Behavior.ALLOW_AUTHORIZED, LOOPBACK)
        _, port = await server.listen("127.0.0.1", 0, tls=tls[0] if with_tls else None, proxy=rule)
        assert await ask(port, *header, GET, tls=tls[1] if with_tls else None) == 200
        assert served.clients == ["203.0.113.9"]


async def test_a_header_and_its_request_in_one_piece() -> None:
    async with serving() as (served, server):
        _, port = await server.listen("127.0.0.1", 0, proxy=ProxyRule(Behavior.USE_ALWAYS))
        assert await ask(port, V2 + GET) == 200
        assert await ask(port, GET) == 200, "a health check of the proxy itself"
        assert served.clients == ["203.0.113.9", "127.0.0.1"]


async def test_who_is_not_listed_is_not_believed() -> None:
    """Statement 28: the header is taken off and the connection's own address counts."""
    async with serving() as (served, server):
        _, port = await server.listen("127.0.0.1", 0, proxy=ProxyRule(Behavior.ALLOW_AUTHORIZED, NOBODY))
        assert await ask(port, V1, GET) == 200
        assert served.clients == ["127.0.0.1"]


async def test_who_is_not_listed_is_refused_and_the_listener_goes_on() -> None:
    """Statement 28, CVE-2024-6468: a refused connection must not end the listener."""
    async with serving() as (served, server):
        denied = ProxyRule(Behavior.DENY_UNAUTHORIZED, NOBODY)
        _, port = await server.listen("127.0.0.1", 0, proxy=denied)
        for _ in range(5):
            assert await ask(port, V1, GET) == 0
        assert served.requests == []
        _, other = await server.listen("127.0.0.1", 0, proxy=ProxyRule(Behavior.DENY_UNAUTHORIZED, LOOPBACK))
        for broken in (b"PROXY nonsense\r\n", V2_SIGNATURE + b"\xff" * 20, b"PROXY "):
            assert await ask(other, broken, b"\r\n") == 0
        assert await ask(other, V1, GET) == 200


async def test_without_a_rule_a_header_is_no_request() -> None:
    async with serving() as (served, server):
        _, port = await server.listen("127.0.0.1", 0)
        assert await ask(port, V1 + GET) == 400
        assert served.requests == []


async def test_a_header_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.api.listening.HEADER_TIMEOUT_S", 0.1)
    async with serving() as (_, server):
        _, port = await server.listen("127.0.0.1", 0, proxy=ProxyRule(Behavior.USE_ALWAYS))
        for part in (b"", b"PROX"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(part)
            async with asyncio.timeout(120):
                assert await _closed(reader)
            writer.close()
        assert await ask(port, V1, GET) == 200


async def _closed(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read() == b""
    except ConnectionError:
        return True


# -- slow clients (F31)


async def test_a_head_that_trickles_is_given_up() -> None:
    async with serving(ServerLimits(head_timeout_s=0.2)) as (served, server):
        _, port = await server.listen("127.0.0.1", 0)
        slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
        for _, writer in slow[:25]:
            writer.write(b"GET /v1/sys/health HTT")
        assert await ask(port, GET) == 200, "others are served meanwhile"
        async with asyncio.timeout(120):
            for reader, writer in slow:
                assert await _closed(reader)
                writer.close()
        assert len(served.requests) == 1


async def test_the_second_head_of_a_connection_has_its_deadline_too() -> None:
    async with serving(ServerLimits(head_timeout_s=0.2)) as (served, server):
        _, port = await server.listen("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        async with asyncio.timeout(120):
            await reader.readuntil(b"{}\n")
            await asyncio.sleep(0.3)  # longer than a head may take: between requests there is time
            writer.write(GET)
            await reader.readuntil(b"{}\n")
            writer.write(GET[:10])
            assert await _closed(reader)
        writer.close()
        assert len(served.requests) == 2


async def test_a_client_that_does_not_read_its_answer_is_given_up() -> None:
    body = b"x" * (8 * 2**20)
    async with serving(ServerLimits(write_timeout_s=0.2)) as (served, server):
        _, port = await server.listen("127.0.0.1", 0)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", port))
            head = b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body)
            await loop.sock_sendall(client, head + body)
            got = 0
            async with asyncio.timeout(120):
                await served.arrived.wait()
                await asyncio.sleep(0.6)  # three times as long as the server waits for a reader
                try:
                    while part := await loop.sock_recv(client, 65536):
                        got += len(part)
                except ConnectionError:
                    pass
            assert got < len(body), "cut off within the answer"
        assert await ask(port, GET) == 200


async def test_a_handshake_that_does_not_come_is_given_up(
    tls: tuple[ssl.SSLContext, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.api.listening.HANDSHAKE_TIMEOUT_S", 0.2)
    async with serving() as (_, server):
        for rule in (None, ProxyRule(Behavior.USE_ALWAYS)):
            _, port = await server.listen("127.0.0.1", 0, tls=tls[0], proxy=rule)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"\x16\x03\x01")
            async with asyncio.timeout(120):
                assert await _closed(reader)
            writer.close()
            assert await ask(port, GET, tls=tls[1]) == 200


# -- a loop that was held up (no slow client is to blame for it)


@pytest.fixture(params=[True, False], ids=["by turns of the loop", "by the clock"])
def counted_by_turns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The control counts the whole deadline as one slice, which is what a timer by the clock does."""
    if not request.param:
        monkeypatch.setattr("sidecar.api.patience.SLICES", 1)
    return bool(request.param)


async def hold_up_the_loop(for_s: float) -> None:
    """What a stretch of computing does to everything else in this process; a moment later clients go on."""
    time.sleep(for_s)  # noqa: ASYNC251 - the fault itself
    await asyncio.sleep(0.05)


async def test_a_held_up_loop_cuts_off_no_head(counted_by_turns: bool) -> None:
    async with serving(ServerLimits(head_timeout_s=1.0)) as (_, server):
        _, port = await server.listen("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET[:10])
        await asyncio.sleep(0.2)  # the server has begun to read
        await hold_up_the_loop(1.5)
        writer.write(GET[10:])
        with nullcontext() if counted_by_turns else pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            async with asyncio.timeout(120):
                assert b"200 OK" in await reader.readuntil(b"{}\n")
        writer.close()


async def test_a_held_up_loop_cuts_off_no_body(counted_by_turns: bool) -> None:
    async with serving(ServerLimits(body_timeout_s=1.0)) as (_, server):
        _, port = await server.listen("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/x HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        async with asyncio.timeout(120):
            await reader.readuntil(b"100 Continue\r\n\r\n")
            await hold_up_the_loop(1.5)
            writer.write(b"{}")
            line = await reader.readline()
        assert line.split(b" ")[1] == (b"200" if counted_by_turns else b"408")
        writer.close()


async def test_a_held_up_loop_cuts_off_no_handshake(
    tls: tuple[ssl.SSLContext, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch, counted_by_turns: bool
) -> None:
    monkeypatch.setattr("sidecar.api.listening.HANDSHAKE_TIMEOUT_S", 1.0)
    async with serving() as (_, server):
        _, port = await server.listen("127.0.0.1", 0, tls=tls[0])
        loop = asyncio.get_running_loop()
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.setblocking(False)
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            client = tls[1].wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
            with pytest.raises(ssl.SSLWantReadError):
                client.do_handshake()
            hello = outgoing.read()
            await loop.sock_sendall(raw, hello[:20])
            await asyncio.sleep(0.2)  # the server has begun the handshake
            await hold_up_the_loop(1.5)
            await loop.sock_sendall(raw, hello[20:])
            async with asyncio.timeout(120):
                try:
                    answer = await loop.sock_recv(raw, 65536)
                except ConnectionError:
                    answer = b""
            assert (answer != b"") == counted_by_turns


async def test_ten_held_up_seconds_are_one_slice_of_a_deadline() -> None:
    """The figure of the statement, on a loop whose clock is set: 12 s held up within a head's 10 s."""
    calls: list[str] = []
    loop = ClockedLoop()
    timer = Patience(loop, 10.0, lambda: calls.append("given up"))  # type: ignore[arg-type]  # what it uses of a loop
    loop.pass_time(0.5)
    loop.pass_time(12.0)
    assert (calls, loop.turns) == ([], 1)
    for _ in range(8):
        loop.pass_time(1.0)
    assert calls == []
    loop.pass_time(1.0)
    assert calls == ["given up"], "and a client that never sends is given up all the same"
    timer.cancel()


class ClockedLoop:
    """A loop's timers without a loop: each turn runs those that were due when it began."""

    def __init__(self) -> None:
        self.now_s, self.turns, self._due = 0.0, 0, list[tuple[float, Callable[[], None]]]()

    def call_later(self, delay_s: float, act: Callable[[], None]) -> asyncio.TimerHandle:
        self._due.append((self.now_s + delay_s, act))
        return asyncio.TimerHandle(self.now_s + delay_s, act, (), asyncio.get_running_loop())

    def pass_time(self, by_s: float) -> None:
        self.now_s += by_s
        due, self._due = (
            [each for each in self._due if each[0] <= self.now_s],
            [each for each in self._due if each[0] > self.now_s],
        )
        for _, act in due:
            self.turns += 1
            act()


# -- Unix sockets


async def unix_ask(path: Path) -> int:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(GET)
    line = await reader.readline()
    writer.close()
    return int(line.split(b" ")[1])


@pytest.mark.parametrize(("mode", "found"), [(None, 0o700), (0o660, 0o660)])
async def test_a_unix_socket_has_its_mode_whatever_the_umask(tmp_path: Path, mode: int | None, found: int) -> None:
    path = tmp_path / "api.sock"
    umask = os.umask(0)
    try:
        async with serving() as (served, server):
            await server.listen_unix(str(path), SocketAccess(mode, str(os.getuid()), str(os.getgid())))
            assert stat.S_IMODE(path.stat().st_mode) == found
            assert await unix_ask(path) == 200
            assert served.clients == [""]
        assert not path.exists()
    finally:
        os.umask(umask)


async def test_a_socket_that_was_left_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    async with serving() as (_, server):
        await server.listen_unix(str(path), SocketAccess())
        assert await unix_ask(path) == 200
        async with serving() as (_, second):
            with pytest.raises(OSError, match="another process listens"):
                await second.listen_unix(str(path), SocketAccess())
        assert await unix_ask(path) == 200
    (tmp_path / "file").write_text("not a socket")
    async with serving() as (_, server):
        for bad, access in (("file", SocketAccess()), ("x.sock", SocketAccess(user="no-such-user"))):
            with pytest.raises(OSError, match=r"no user|in use"):
                await server.listen_unix(str(tmp_path / bad), access)
    assert (tmp_path / "file").read_text() == "not a socket"
