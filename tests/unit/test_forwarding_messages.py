"""Forwarded requests as bytes: round trips, and junk that is refused without harm."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from consul_backend.position import Position
from sidecar.replication.upstream import STALL_WARNING, travelling, with_warning
from sidecar.replication.wiring import ForwardAnswer
from sidecar.transport.forwarding import (
    HEADERS_MAX,
    Echo,
    EchoReply,
    ForwardedIdentity,
    ForwardRequest,
    ForwardResponse,
    MalformedMessage,
    decode,
    encode,
)
from sidecar.transport.peer import parse_address
from sidecar.transport.trail import UPWARD, Hop, LoopRefused, arrived

TEXT = st.text(max_size=20)
PAIRS = st.lists(st.tuples(TEXT, TEXT), max_size=5)
REQUESTS = st.builds(
    ForwardRequest,
    method=st.sampled_from(["GET", "LIST", "POST"]),
    path=TEXT,
    query=st.dictionaries(TEXT, st.lists(TEXT, max_size=3), max_size=3),
    headers=PAIRS,
    body=st.binary(max_size=100),
    remote_address=TEXT,
    remote_port=st.integers(0, 65535),
    trail=st.lists(st.builds(Hop, TEXT, TEXT), max_size=3).map(tuple),
    raw_target=TEXT,
    auth=st.none()
    | st.builds(
        ForwardedIdentity,
        policies=st.lists(TEXT, max_size=3).map(tuple),
        display_name=TEXT,
        accessor=TEXT,
        entity_id=TEXT,
        metadata=st.dictionaries(TEXT, TEXT, max_size=2),
        cluster_id=TEXT,
    ),
)


@given(REQUESTS)
def test_a_request_arrives_as_it_was_sent(request: ForwardRequest) -> None:
    assert decode(encode(request), ForwardRequest) == request


def test_the_other_messages_arrive_too() -> None:
    position = Position("set", "generation", 1, 7, b"h" * 32)
    for message in (
        ForwardResponse(204, [("a", "b")], b"", position),
        ForwardResponse(200, [], b"x"),
        Echo("n", "a", "c"),
        EchoReply(["a"], "primary", "disabled", 5),
    ):
        assert decode(encode(message), type(message)) == message


@given(st.binary(max_size=300))
def test_junk_is_malformed_and_nothing_else(junk: bytes) -> None:
    for kind in (ForwardRequest, ForwardResponse, Echo, EchoReply):
        with contextlib.suppress(MalformedMessage):
            assert isinstance(decode(junk, kind), kind)


@given(REQUESTS, st.data())
def test_a_cut_request_is_malformed(request: ForwardRequest, data: st.DataObject) -> None:
    raw = encode(request)
    with pytest.raises(MalformedMessage):
        decode(raw[: data.draw(st.integers(0, len(raw) - 1))], ForwardRequest)


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(b"\xdf\xff\xff\xff\xff", id="a map of four billion entries"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="an array of four billion entries"),
        pytest.param(b"\xc6\xff\xff\xff\xff", id="four gigabytes of bytes"),
        pytest.param(b"\x81\xa1x" + b"\x91" * 100_000, id="100,000 levels deep"),
        pytest.param(b"x" * 200, id="over the limit"),
    ],
)
def test_bombs_are_refused(bomb: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(bomb, ForwardRequest, bytes_max=150 if bomb[:1] == b"x" else 1_000_000)


def test_headers_are_bounded() -> None:
    request = ForwardRequest("GET", "a", {}, [("n", "v")] * (HEADERS_MAX + 1), b"", "", ())
    with pytest.raises(MalformedMessage, match="headers"):
        decode(encode(request), ForwardRequest)


def test_a_long_trail_is_refused_with_a_short_text() -> None:
    trail = tuple(Hop(f"c{n}", UPWARD) for n in range(10_000))
    with pytest.raises(LoopRefused) as refused:
        arrived(trail, "us", UPWARD)
    assert len(str(refused.value)) < 1000


def test_no_body_in_a_repr() -> None:
    assert "hunter2" not in repr(ForwardRequest("GET", "a", {}, [("X-Vault-Token", "hunter2")], b"hunter2", "", ()))
    assert "hunter2" not in repr(ForwardResponse(200, [("a", "hunter2")], b"hunter2"))


def test_headers_of_one_connection_do_not_travel() -> None:
    headers = [("Host", "x"), ("connection", "close"), ("Transfer-Encoding", "chunked"), ("X-Vault-Token", "t")]
    assert travelling(headers) == [("X-Vault-Token", "t")]


@pytest.mark.parametrize(
    ("status", "body", "wanted_status", "warnings"),
    [
        (204, b"", 200, [STALL_WARNING]),
        (200, b'{"warnings":null,"data":{}}', 200, [STALL_WARNING]),
        (200, b'{"warnings":["a"]}', 200, ["a", STALL_WARNING]),
    ],
)
def test_a_warning_finds_its_place(status: int, body: bytes, wanted_status: int, warnings: list[str]) -> None:
    answer = with_warning(ForwardAnswer(status, CIMultiDict({"Content-Type": "text/plain"}), body), STALL_WARNING)
    assert answer.status == wanted_status
    assert json.loads(answer.body)["warnings"] == warnings
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("body", [b"plain text", b"[1]", b"7"])
def test_bodies_without_room_for_a_warning_pass_unchanged(body: bytes) -> None:
    answer = ForwardAnswer(200, CIMultiDict(), body)
    assert with_warning(answer, STALL_WARNING) is answer


def test_addresses() -> None:
    assert parse_address("https://10.0.0.1:8201") == ("10.0.0.1", 8201)
    assert parse_address("node-1:9000") == ("node-1", 9000)
    assert parse_address("https://node-1") == ("node-1", 8201)
    assert parse_address("https://[::1]:7") == ("::1", 7)
    for bad in ("", "https://", "ftp://x", "x/y", "https://x?y", "x:notaport", "x:99999"):
        with pytest.raises(ValueError, match=r".*"):
            parse_address(bad)
