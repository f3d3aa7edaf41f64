"""Plain answers against aiohttp's own: the same status, headers in any order, and body, and a connection that lives."""

import asyncio
import re
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.http import HttpVersion11

from sidecar.api import server
from sidecar.api.plain_answer import PlainAnswer, plain_answer
from sidecar.api.response_headers import ResponseHeaders
from sidecar.api.server import ApiServer, ServerLimits
from sidecar.request.types import HttpRequest, HttpResponse

ANSWERS = {
    "read": HttpResponse(200, body=b'{"data":"1"}\n'),
    "large": HttpResponse(200, body=b"x" * 3_000_000),
    "written": HttpResponse(204),
    "missing": HttpResponse(404, body=b'{"errors":[]}\n'),
    "odd": HttpResponse(473, body=b"{}\n"),
    "empty": HttpResponse(200),
    "unchanged": HttpResponse(304),
}
for _name, _index in (("told", "v1:abc="), ("blank", "")):
    ANSWERS[_name] = HttpResponse(204)
    ANSWERS[_name].headers["X-Vault-Index"] = _index
ANSWERS["elsewhere"] = HttpResponse(307)
ANSWERS["elsewhere"].headers["Location"] = "http://127.0.0.1/"

PLAIN = {"read", "large", "written", "missing", "odd", "told"}


async def exchange(name: str, *, method: str = "GET", version: str = "1.1", more: str = "") -> bytes:
    """What comes of two requests on one connection, as far as it comes."""

    async def handle(request: HttpRequest) -> HttpResponse:
        return ANSWERS[request.path]

    serving = ApiServer(handle)
    host, port = await serving.listen("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(host, port)
    try:
        once = f"{method} /v1/{name} HTTP/{version}\r\nHost: h\r\n{more}\r\n".encode()
        last = f"GET /v1/read HTTP/{version}\r\nHost: h\r\nConnection: close\r\n\r\n".encode()
        writer.write(once)
        await writer.drain()
        first = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", first)
        if length and method != "HEAD" and b" 304 " not in first:
            first += await reader.readexactly(int(length[1]))
        writer.write(last)
        return re.sub(rb"Date: [^\r]+", b"Date: now", first + await reader.read())
    finally:
        writer.close()
        await serving.close()


def shape(answer: bytes) -> tuple[bytes, list[bytes], bytes]:
    head, _, rest = answer.partition(b"\r\n\r\n")
    line, *headers = head.split(b"\r\n")
    return line, sorted(headers), rest


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"method": "HEAD"},
        {"version": "1.0"},
        {"more": "Connection: close\r\n"},
        {"version": "1.0", "more": "Connection: keep-alive\r\n"},
    ],
    ids=["plain", "head", "1.0", "close", "1.0 keep-alive"],
)
async def test_both_say_the_same(name: str, how: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = await exchange(name, **how)
    monkeypatch.setattr(server, "plain_answer", lambda *_: None)
    assert shape(ours) == shape(await exchange(name, **how))


@pytest.mark.parametrize("name", ANSWERS)
async def test_which_are_plain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []

    def noted(*arguments: object) -> PlainAnswer | None:
        found = plain_answer(*arguments)  # type: ignore[arg-type]  # as the server calls it
        made.append(found is not None)
        return found

    monkeypatch.setattr(server, "plain_answer", noted)
    await exchange(name)
    assert made[0] == (name in PLAIN)


async def test_a_listeners_own_headers_are_on_every_answer_from_when_they_are_set() -> None:
    async def handle(request: HttpRequest) -> HttpResponse:
        return HttpResponse(200, body=b"{}\n")

    custom = ResponseHeaders({})
    serving = ApiServer(handle, limits=ServerLimits(response_headers=custom))
    host, port = await serving.listen("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(host, port)
    try:
        for sections, shown in (({}, False), ({"default": {"X-Of-Listener": "1"}}, True), ({}, False)):
            custom.replace(sections)
            writer.write(b"GET /v1/a HTTP/1.1\r\nHost: h\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(3)
            assert (b"X-Of-Listener: 1\r\n" in head) == shown
    finally:
        writer.close()
        await serving.close()


def test_a_line_break_in_a_header_is_left_to_aiohttp_which_refuses_it() -> None:
    request: Any = SimpleNamespace(version=HttpVersion11, keep_alive=True, method="GET")
    for index, plain in (("ok", True), ("a\r\nX-Evil: 1", False), ("a\n", False), ("a\x00", False), ("\xe4", False)):
        answer = HttpResponse(204)
        answer.headers["X-Vault-Index"] = index
        assert (plain_answer(request, answer, lambda _: b"") is not None) == plain


async def test_a_client_that_does_not_read_is_waited_for() -> None:
    """As much as the sockets hold is on its way; the answers to the rest of a pipeline are not made meanwhile."""
    answered = asyncio.Event()
    count = 0

    async def handle(request: HttpRequest) -> HttpResponse:
        nonlocal count
        count += 1
        answered.set()
        return HttpResponse(200, body=b"x" * 8_000_000)

    serving = ApiServer(handle)
    host, port = await serving.listen("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(host, port, limit=1024)
    try:
        for _ in range(4):
            writer.write(b"GET /v1/a HTTP/1.1\r\nHost: h\r\n\r\n")
        await answered.wait()
        for _ in range(50):
            await asyncio.sleep(0)
        assert count <= 2
        for _ in range(4):
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(8_000_000)
        assert count == 4
    finally:
        writer.close()
        await serving.close()


def test_it_is_an_answer_of_aiohttp() -> None:
    assert issubclass(PlainAnswer, web.StreamResponse)
