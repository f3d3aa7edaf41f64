"""Networks that a login, a secret or a token is bound to. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

from plugin_api.errors import InvalidRequest

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def checked_cidrs(texts: Iterable[str]) -> list[str]:
    """CIDR blocks and single addresses as they were written. Raises InvalidRequest."""
    return [_checked(text) for text in texts]


def address_within(cidrs: Sequence[str], address: str) -> bool:
    """Whether ``address`` lies in one of ``cidrs``; no blocks bind nothing, an unknown address is within none."""
    if not cidrs:
        return True
    try:
        client = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(client, ipaddress.IPv6Address) and client.ipv4_mapped is not None:
        client = client.ipv4_mapped
    return any(client in _network(text) for text in cidrs)


def all_within(inner: Iterable[str], outer: Sequence[str]) -> bool:
    """Whether every block of ``inner`` lies in one of ``outer``; no outer blocks bind nothing."""
    if not outer:
        return True
    blocks = [_network(text) for text in outer]
    return all(any(_is_within(_network(text), block) for block in blocks) for text in inner)


def _is_within(inner: Network, outer: Network) -> bool:
    if isinstance(inner, ipaddress.IPv4Network) and isinstance(outer, ipaddress.IPv4Network):
        return inner.subnet_of(outer)
    if isinstance(inner, ipaddress.IPv6Network) and isinstance(outer, ipaddress.IPv6Network):
        return inner.subnet_of(outer)
    return False


def _network(text: str) -> Network:
    return ipaddress.ip_network(text, strict=False)


def _checked(text: str) -> str:
    try:
        _network(text)
    except ValueError:
        raise InvalidRequest("error parsing bound_cidrs: not an address or CIDR block") from None
    return text
