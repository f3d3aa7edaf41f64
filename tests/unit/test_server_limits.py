"""The API port's bounds, over real sockets: nothing here reaches a handler that should not."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
from multidict import CIMultiDict

from consul_backend.deadline import remaining_s
from consul_backend.errors import Overloaded
from sidecar.api.server import ApiServer, ServerLimits
from sidecar.api.statuses import refusal
from sidecar.request.types import HttpRequest, HttpResponse

SMALL = ServerLimits(body_bytes_max=1000, buffered_bytes_max=1500, body_timeout_s=60.0, request_timeout_s=60.0)
QUICK = replace(SMALL, body_timeout_s=0.2, request_timeout_s=0.3)
"""Where something is to be given up."""


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    closed: bool


class Served:
    """A server that collects requests and answers 200 ``{}``, or what ``handle`` is set to."""

    def __init__(self) -> None:
        self.requests: list[HttpRequest] = []
        self.port = 0

    async def handle(self, request: HttpRequest) -> HttpResponse:
        self.requests.append(request)
        return HttpResponse(body=b"{}\n")

    async def raw(self, *parts: bytes, read: bool = True) -> Answer:
        """Send bytes as they are and read one answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
            return await _answer(reader)
        finally:
            writer.close()


async def _answer(reader: asyncio.StreamReader, method: str = "GET") -> Answer:
    async with asyncio.timeout(120):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status_line, *lines = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        status = int(status_line.split(" ")[1])
        length = 0 if method == "HEAD" else int(headers.get("content-length", "0"))
        body = await reader.readexactly(length)
        closed = False
        if headers.get("connection") == "close":
            closed = await reader.read() == b""
        return Answer(status, headers, body, closed)


@asynccontextmanager
async def serving(limits: ServerLimits = SMALL) -> AsyncIterator[Served]:
    served = Served()
    server = ApiServer(lambda request: served.handle(request), limits=limits)
    _, served.port = await server.listen("127.0.0.1", 0)
    try:
        yield served
    finally:
        await server.close()


def request(method: str = "GET", target: str = "/v1/x", *headers: str, body: bytes = b"") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: h", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


@pytest.mark.parametrize("method", ["GET", "LIST", "PUT", "POST", "DELETE", "PATCH"])
async def test_every_verb_of_the_api_arrives(method: str) -> None:
    async with serving() as served:
        answer = await served.raw(request(method, "/v1/a%20b/c?list=true&list=x", "X-Vault-Token: t", body=b"{}"))
    assert answer.status == 200
    (seen,) = served.requests
    assert (seen.method, seen.path, seen.body) == (method, "a b/c", b"{}")
    assert seen.query == {"list": ["true", "x"]}
    assert seen.headers["x-vault-token"] == "t"
    assert seen.remote_address == "127.0.0.1"
    assert seen.raw_target == "/v1/a%20b/c?list=true&list=x"
    assert "X-Vault-Token" not in repr(seen)


async def test_list_and_other_verbs_share_a_connection() -> None:
    async with serving() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        for method in ("GET", "LIST", "PUT", "LIST"):
            writer.write(request(method, body=b"{}"))
            assert (await _answer(reader)).status == 200
        writer.write(request("LIST") + request("GET") + request("LIST"))
        for _ in range(3):
            assert (await _answer(reader)).status == 200
        writer.close()
    assert [seen.method for seen in served.requests] == ["GET", "LIST", "PUT", "LIST", "LIST", "GET", "LIST"]


async def test_every_answer_has_the_headers_clients_compare() -> None:
    async with serving() as served:

        async def nothing(_: HttpRequest) -> HttpResponse:
            return HttpResponse(204)

        served.handle = nothing  # type: ignore[method-assign] - a test double changes its mind
        empty = await served.raw(request())
        unknown = await served.raw(request(target="/nothing"))
    for answer in (empty, unknown):
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["server"] == "Outrider"
    assert (empty.status, empty.body) == (204, b"")
    assert (unknown.status, json.loads(unknown.body)) == (404, {"errors": []})


async def test_head_has_no_body() -> None:
    async with serving() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request("HEAD") + request("GET"))
        head, get = await _answer(reader, "HEAD"), await _answer(reader)
        writer.close()
    assert (head.status, get.status, get.body) == (200, 200, b"{}\n")


async def test_an_announced_body_over_the_limit_is_refused_before_it_is_read() -> None:
    async with serving() as served:
        answer = await served.raw(request("PUT", "/v1/x", "Content-Length: 1001"))
        assert (answer.status, answer.closed) == (413, True)
        huge = await served.raw(request("PUT", "/v1/x", "Content-Length: 99999999999999"))
        assert huge.status == 413
        assert (await served.raw(request("PUT", body=b"x" * 1000))).status == 200
    assert [len(seen.body) for seen in served.requests] == [1000]


async def test_a_chunked_body_is_counted_as_it_comes() -> None:
    chunk = b"190\r\n" + b"x" * 400 + b"\r\n"
    head = request("PUT", "/v1/x", "Transfer-Encoding: chunked")
    async with serving() as served:
        assert (await served.raw(head + chunk * 2 + b"0\r\n\r\n")).status == 200
        answer = await served.raw(head, chunk, chunk, chunk)
        assert (answer.status, answer.closed) == (413, True)
    assert [len(seen.body) for seen in served.requests] == [800]


async def test_bodies_of_all_requests_together_are_bounded() -> None:
    async with serving() as served:
        _, first = await asyncio.open_connection("127.0.0.1", served.port)
        first.write(request("PUT", "/v1/x", "Content-Length: 1000"))
        await first.drain()
        second = await served.raw(request("PUT", body=b"x" * 600))
        assert second.status == 503
        first.close()
        await first.wait_closed()
        for _ in range(50):
            if (await served.raw(request("PUT", body=b"x" * 600))).status == 200:
                break
        else:
            pytest.fail("the memory of a request that went away is not given back")


async def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async with serving(QUICK) as served:
        answer = await served.raw(request("PUT", "/v1/x", "Content-Length: 10") + b"abc")
    assert (answer.status, answer.closed) == (408, True)
    assert served.requests == []


async def test_a_handler_that_does_not_answer_is_given_up() -> None:
    cancelled = asyncio.Event()

    async def stuck(_: HttpRequest) -> HttpResponse:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return HttpResponse()

    async with serving(QUICK) as served:
        served.handle = stuck  # type: ignore[method-assign] - a test double changes its mind
        answer = await served.raw(request())
    assert answer.status == 503
    assert "too long" in json.loads(answer.body)["errors"][0]
    assert cancelled.is_set()


async def test_a_defect_is_an_incident_and_not_a_trace() -> None:
    async def broken(_: HttpRequest) -> HttpResponse:
        raise KeyError("hvs.secret")

    async with serving() as served:
        served.handle = broken  # type: ignore[method-assign] - a test double changes its mind
        answer = await served.raw(request())
    assert answer.status == 500
    assert b"hvs.secret" not in answer.body
    assert json.loads(answer.body)["errors"][0].startswith("internal error (incident ")


@pytest.mark.parametrize(
    "target",
    [
        "/v1/../sys/x",
        "/v1//x",
        "/v1/a/./b",
        "/v1/%2e%2e/x",
        "/v1/a%2fb",
        "/v1/%00",
        "/v1/%ff",
        "http://h/v1/x",
        "/v1/x?a=é",
    ],
)
async def test_ambiguous_paths_get_400_and_are_told_why(target: str) -> None:
    async with serving() as served:
        answer = await served.raw(request(target=target))
    assert answer.status == 400
    (text,) = json.loads(answer.body)["errors"]
    assert target.removeprefix("/v1/") not in text
    assert served.requests == []


async def test_control_characters_get_400_and_nothing_else() -> None:
    async with serving() as served:
        answer = await served.raw(request(target="/v1/a%09b"))
    assert (answer.status, json.loads(answer.body)) == (400, {"errors": []})
    assert served.requests == []


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /v1/x HTTP/9.9.9\r\n\r\n", 400),
        (b"GET /v1/x HTTP/1.1\r\nHost: h\r\nX-Vault-Token : hvs.secret\r\n\r\n", 400),
        (b"GET /v1/x HTTP/1.1\r\nHost: h\r\nX-Vault-Token: hvs.secret\x00\r\n\r\n", 400),
        (b"PUT /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (b"PUT /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400),
        (b"PUT /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: -2\r\n\r\n{}", 400),
        (b"BREW /v1/x HTTP/1.1\r\nHost: h\r\n\r\n", 405),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else "",
)
async def test_unreadable_requests_are_not_repeated(raw: bytes, status: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with serving() as served:
        answer = await served.raw(raw)
    assert (answer.status, json.loads(answer.body)) == (status, {"errors": []})
    assert answer.headers["content-type"] == "application/json"
    assert served.requests == []
    assert "hvs.secret" not in caplog.text


async def test_a_head_that_is_too_long_is_named() -> None:
    async with serving() as served:
        answer = await served.raw(b"GET /v1/x HTTP/1.1\r\nHost: h\r\nA: " + b"x" * 9000 + b"\r\n\r\n")
    assert answer.status == 400
    assert "longer than this server takes" in json.loads(answer.body)["errors"][0]


async def test_header_bytes_that_are_no_text_arrive_as_text_that_can_be_sent_on() -> None:
    async with serving() as served:
        raw = b"GET /v1/x HTTP/1.1\r\nHost: h\r\nX-Vault-Token: hvs.\xff\xfe\r\nUser-Agent: caf\xc3\xa9\r\n\r\n"
        assert (await served.raw(raw)).status == 200
    (seen,) = served.requests
    assert seen.headers["X-Vault-Token"] == "hvs.\xff\xfe"
    assert seen.headers["User-Agent"] == "café"
    "".join(seen.headers.values()).encode()  # a lone surrogate would raise


@pytest.mark.parametrize("version", [b"HTTP/0.9", b"HTTP/2.0", b"HTTP/3.0"])
async def test_other_versions_of_http_are_refused(version: bytes) -> None:
    async with serving() as served:
        answer = await served.raw(b"GET /v1/x " + version + b"\r\nHost: h\r\n\r\n")
    assert answer.status == 505
    assert served.requests == []


async def test_after_connect_nothing_is_waited_for() -> None:
    async with serving() as served:
        answer = await served.raw(b"CONNECT /v1/x HTTP/1.1\r\nHost: h\r\n\r\n")
    assert (answer.status, answer.closed) == (405, True)


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_incident(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as served:
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request("PUT", "/v1/x", "Content-Length: 100") + b"{")
        await writer.drain()
        assert (await served.raw(request())).status == 200  # the other one has arrived by now
        writer.close()
        await writer.wait_closed()
        assert (await served.raw(request())).status == 200
    assert "request failed" not in caplog.text
    assert [seen.method for seen in served.requests] == ["GET", "GET"]


@pytest.mark.parametrize("body", [b"", b"{}"])
async def test_a_client_that_has_no_more_to_send_gets_its_answer(body: bytes) -> None:
    async with serving() as served:
        arrived, ended = asyncio.Event(), asyncio.Event()

        async def handle(_: HttpRequest) -> HttpResponse:
            arrived.set()
            await ended.wait()
            return HttpResponse(body=b"{}\n")

        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request("PUT", body=body))
        writer.write_eof()  # at once: it may be seen before the request is begun
        async with asyncio.timeout(120):
            assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
        writer.close()
        served.handle = handle  # type: ignore[method-assign]
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request("PUT", body=body))
        await arrived.wait()
        writer.write_eof()  # while it is at work
        served.handle = Served.handle.__get__(served)  # type: ignore[method-assign]
        assert (await served.raw(request())).status == 200
        ended.set()
        async with asyncio.timeout(120):
            assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
        writer.close()


async def test_a_client_that_ends_in_the_middle_of_a_request_is_not_waited_for() -> None:
    async with serving() as served:
        for cut in (request()[:-3], request("PUT", "/v1/x", "Content-Length: 9") + b"{", request() + b"GET /v1/y HT"):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(cut)
            writer.write_eof()
            async with asyncio.timeout(120):
                await reader.read()
            writer.close()
    assert "PUT" not in [seen.method for seen in served.requests]


async def test_a_client_that_waits_is_told_to_go_on() -> None:
    async with serving() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request("PUT", "/v1/x", "Expect: 100-continue", "Content-Length: 2"))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 Continue")
        writer.write(b"{}")
        assert (await _answer(reader)).status == 200
        writer.close()
        refused = await served.raw(request("PUT", "/v1/x", "Expect: 100-continue", "Content-Length: 2000"))
        assert refused.status == 413
        assert (await served.raw(request("PUT", "/v1/x", "Expect: magic", body=b"{}"))).status == 417
    assert [seen.body for seen in served.requests] == [b"{}"]


async def test_an_upgrade_is_not_taken_up() -> None:
    async with serving() as served:
        answer = await served.raw(request("GET", "/v1/x", "Connection: Upgrade", "Upgrade: websocket"))
    assert answer.status == 200


async def test_compressed_bodies_are_refused() -> None:
    async with serving() as served:
        answer = await served.raw(request("PUT", "/v1/x", "Content-Encoding: gzip", body=b"\x1f\x8b"))
    assert answer.status == 415
    assert served.requests == []


async def test_headers_of_hops_are_stripped() -> None:
    async with serving() as served:
        await served.raw(request("GET", "/v1/x", "X-Vault-Internal-No-Request-Forwarding: 1", "X-Other: 1"))
    (seen,) = served.requests
    assert seen.headers == CIMultiDict({"Host": "h", "X-Other": "1"})
    assert seen.forwarded_auth is None
    assert seen.trail == ()


async def test_28_control_unstripped_they_would_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.api.server._INTERNAL_PREFIX", "nothing begins so")
    async with serving() as served:
        await served.raw(request("GET", "/v1/x", "X-Vault-Internal-No-Request-Forwarding: 1"))
    assert "X-Vault-Internal-No-Request-Forwarding" in served.requests[0].headers


async def test_the_request_header_can_be_required() -> None:
    async with serving(ServerLimits(require_request_header=True)) as served:
        assert (await served.raw(request())).status == 412
        assert (await served.raw(request("GET", "/v1/x", "X-Vault-Request: true"))).status == 200


async def test_connections_are_bounded() -> None:
    async with serving(ServerLimits(connections_max=2)) as served:
        kept = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(2)]
        for reader, writer in kept:
            writer.write(request())
            assert (await _answer(reader)).status == 200
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request())
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await _answer(reader)
        for _, open_writer in [*kept, (reader, writer)]:
            open_writer.close()


async def test_a_request_s_writes_have_its_deadline_and_refusals_for_load_say_when_to_come_again() -> None:
    left: list[float | None] = []

    async def handle(request: HttpRequest) -> HttpResponse:
        left.append(remaining_s())
        answer = refusal(Overloaded("full"))
        return HttpResponse(answer.status, answer.headers(), b"{}")

    server = ApiServer(handle, limits=SMALL)
    _, port = await server.listen("127.0.0.1", 0)
    served = Served()
    served.port = port
    answer = await served.raw(b"PUT /v1/a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert left[0] is not None
    assert 0 < left[0] <= SMALL.request_timeout_s
    await server.close()
