"""The PROXY protocol, versions 1 and 2: the header a load balancer puts before a connection's bytes, TLS included, to
say whose connection it is. Pure. From the specification "The PROXY protocol, versions 1 & 2" of HAProxy.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

V1_SIGNATURE = b"PROXY "
V2_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
V1_BYTES_MAX = 107  # with the line end
V2_FIXED_BYTES = 16
V2_BYTES_MAX = 4096
"""More than addresses and every registered TLV need; the field itself could say 65,535."""
_V2_ADDRESS_BYTES = {0x11: 4, 0x12: 4, 0x21: 16, 0x22: 16}  # family and protocol: TCP or UDP over IPv4, IPv6
_V2_LOCAL, _V2_PROXY = 0x20, 0x21

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class MalformedHeader(ValueError):
    """The bytes begin as a header and are none."""


class Behavior(enum.Enum):
    """What a listener does with a header, by the configuration's words."""

    USE_ALWAYS = "use_always"
    ALLOW_AUTHORIZED = "allow_authorized"
    DENY_UNAUTHORIZED = "deny_unauthorized"


@dataclass(frozen=True, slots=True)
class ProxyRule:
    """A listener's rule. ``authorized`` are the addresses of proxies whose word counts."""

    behavior: Behavior
    authorized: tuple[Network, ...] = ()

    def trusts(self, peer: str) -> bool:
        """Whether a header from ``peer`` names the client."""
        return self.behavior is Behavior.USE_ALWAYS or _within(peer, self.authorized)

    def refuses(self, peer: str) -> bool:
        """Whether a connection from ``peer`` is closed."""
        return self.behavior is Behavior.DENY_UNAUTHORIZED and not _within(peer, self.authorized)


@dataclass(frozen=True, slots=True)
class Header:
    """``length`` bytes at the front of the connection; 0 where there is no header. ``client`` is empty where the proxy
    speaks for itself (a health check) or knows no address."""

    length: int
    client: str = ""


NO_HEADER = Header(0)


def parse(data: bytes) -> Header | None:
    """The header that ``data`` begins with, or None where more bytes are needed to tell. Raises MalformedHeader."""
    if data.startswith(V1_SIGNATURE):
        return _parse_v1(data)
    if data.startswith(V2_SIGNATURE):
        return _parse_v2(data)
    if V1_SIGNATURE.startswith(data) or V2_SIGNATURE.startswith(data):
        return None
    return NO_HEADER


def _parse_v1(data: bytes) -> Header | None:
    end = data.find(b"\r\n", 0, V1_BYTES_MAX)
    if end < 0:
        if len(data) >= V1_BYTES_MAX:
            raise MalformedHeader("a version 1 header without an end")
        return None
    words = data[:end].split(b" ")
    if words[1:2] == [b"UNKNOWN"]:
        return Header(end + 2)
    families: dict[bytes, type[ipaddress.IPv4Address | ipaddress.IPv6Address]] = {
        b"TCP4": ipaddress.IPv4Address,
        b"TCP6": ipaddress.IPv6Address,
    }
    try:
        _, family, source, destination, source_port, destination_port = words
        address = families[family]
        client = address(source.decode("ascii"))
        address(destination.decode("ascii"))
        ports_sound = all(port.isdigit() and int(port) < 65536 for port in (source_port, destination_port))
    except (KeyError, ValueError):
        raise MalformedHeader("a version 1 header that names no two addresses") from None
    if not ports_sound:
        raise MalformedHeader("a version 1 header without ports")
    return Header(end + 2, str(client))


def _parse_v2(data: bytes) -> Header | None:
    if len(data) < V2_FIXED_BYTES:
        return None
    command, family = data[12], data[13]
    length = V2_FIXED_BYTES + int.from_bytes(data[14:16], "big")
    if command not in (_V2_LOCAL, _V2_PROXY):
        raise MalformedHeader("a version 2 header with an unknown version or command")
    if length > V2_BYTES_MAX:
        raise MalformedHeader("a version 2 header that is too long")
    if len(data) < length:
        return None
    address_bytes = _V2_ADDRESS_BYTES.get(family)
    if command == _V2_LOCAL or address_bytes is None:
        return Header(length)
    if length - V2_FIXED_BYTES < 2 * address_bytes + 4:
        raise MalformedHeader("a version 2 header that is shorter than its addresses")
    return Header(length, str(ipaddress.ip_address(data[16 : 16 + address_bytes])))


def _within(peer: str, networks: Sequence[Network]) -> bool:
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return any(mapped in network for network in networks)
