"""The PROXY header by itself, pure."""

import ipaddress
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.api.proxy_protocol import (
    NO_HEADER,
    V2_SIGNATURE,
    Behavior,
    Header,
    MalformedHeader,
    ProxyRule,
    parse,
)


def v2(family: int, addresses: bytes, *, command: int = 0x21, length: int | None = None) -> bytes:
    size = len(addresses) if length is None else length
    return V2_SIGNATURE + bytes([command, family]) + struct.pack("!H", size) + addresses


V2_IPV4 = v2(0x11, socket.inet_aton("203.0.113.9") + socket.inet_aton("10.0.0.1") + struct.pack("!HH", 4000, 8200))
V2_IPV6 = v2(
    0x21,
    socket.inet_pton(socket.AF_INET6, "2001:db8::9")
    + socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    + struct.pack("!HH", 4000, 8200)
    + b"\x04\x00\x01\x00",  # a TLV (NOOP)
)
GOOD = [
    (b"PROXY TCP4 203.0.113.9 10.0.0.1 4000 8200\r\n", "203.0.113.9"),
    (b"PROXY TCP6 2001:db8::9 2001:db8::1 4000 8200\r\n", "2001:db8::9"),
    (b"PROXY UNKNOWN\r\n", ""),
    (b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n", ""),
    (V2_IPV4, "203.0.113.9"),
    (V2_IPV6, "2001:db8::9"),
    (v2(0x00, b"", command=0x20), ""),
    (v2(0x11, b"\x00" * 12, command=0x20), ""),
    (v2(0x31, b"/run/x".ljust(216, b"\x00")), ""),
]


@pytest.mark.parametrize(("header", "client"), GOOD)
def test_headers(header: bytes, client: str) -> None:
    for rest in (b"", b"GET /v1/sys/health HTTP/1.1\r\n\r\n", b"\x16\x03\x01"):
        assert parse(header + rest) == Header(len(header), client)
    for cut in range(len(header)):
        assert parse(header[:cut]) is None, "not all of it has come"


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00", b"PROXX", b"\r\n\r\nX"])
def test_no_header(data: bytes) -> None:
    assert parse(data) == NO_HEADER


@pytest.mark.parametrize(
    "header",
    [
        b"PROXY TCP4 203.0.113.9 10.0.0.1 4000\r\n",
        b"PROXY TCP4 2001:db8::9 10.0.0.1 4000 8200\r\n",
        b"PROXY TCP4 203.0.113.9 10.0.0.1 4000 99999\r\n",
        b"PROXY TCP4 203.0.113.9 10.0.0.1 -1 8200\r\n",
        b"PROXY TCP4  203.0.113.9 10.0.0.1 4000 8200\r\n",
        b"PROXY TCP5 203.0.113.9 10.0.0.1 4000 8200\r\n",
        b"PROXY TCP4 203.0.113.\xff 10.0.0.1 4000 8200\r\n",
        b"PROXY " + b"x" * 200,
        v2(0x11, b"\x00" * 12, command=0x31),
        v2(0x11, b"\x00" * 12, command=0x22),
        v2(0x11, b"\x00" * 8),
        v2(0x11, b"\x00" * 12, length=65535),
    ],
)
def test_malformed_headers(header: bytes) -> None:
    with pytest.raises(MalformedHeader):
        parse(header)


@given(st.sampled_from([header for header, _ in GOOD]), st.data())
def test_any_bytes_are_a_header_or_none_or_refused(header: bytes, data: st.DataObject) -> None:
    changed = bytearray(header)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = parse(bytes(changed))
    except MalformedHeader:
        return
    if found is not None:
        assert found.length <= len(changed)
        if found.client:
            ipaddress.ip_address(found.client)


@pytest.mark.parametrize(
    ("behavior", "peer", "trusted", "refused"),
    [
        (Behavior.USE_ALWAYS, "198.51.100.1", True, False),
        (Behavior.ALLOW_AUTHORIZED, "10.0.0.5", True, False),
        (Behavior.ALLOW_AUTHORIZED, "::ffff:10.0.0.5", True, False),
        (Behavior.ALLOW_AUTHORIZED, "198.51.100.1", False, False),
        (Behavior.DENY_UNAUTHORIZED, "10.0.0.5", True, False),
        (Behavior.DENY_UNAUTHORIZED, "198.51.100.1", False, True),
        (Behavior.DENY_UNAUTHORIZED, "", False, True),
    ],
)
def test_whose_word_counts(behavior: Behavior, peer: str, trusted: bool, refused: bool) -> None:
    rule = ProxyRule(behavior, (ipaddress.ip_network("10.0.0.0/8"),))
    assert (rule.trusts(peer), rule.refuses(peer)) == (trusted, refused)
