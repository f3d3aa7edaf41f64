"""Whose address a request counts as: the connection's, or what a trusted proxy says in ``X-Forwarded-For``. Pure.

The header is believed only from addresses that the listener names. Each proxy appends who it got the request from, so
the address is counted from the end: what stands before it may have been written by the client itself.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

HEADER = "X-Forwarded-For"
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class AddressRefused(Exception):
    """The request is not served: 400 with this text."""


@dataclass(frozen=True, slots=True)
class ForwardedFor:
    """A listener's rule. ``hop_skips``: how many addresses at the end of the chain are proxies' own."""

    authorized: tuple[Network, ...]
    hop_skips: int = 0
    reject_not_authorized: bool = True
    reject_not_present: bool = True

    def client_address(self, peer: str, headers: Sequence[str]) -> str:
        """The client's address; ``peer`` is the connection's, ``headers`` every value of the header in order. Raises
        AddressRefused."""
        chain = [part.strip() for value in headers for part in value.split(",")]
        if not any(chain):
            if self.reject_not_present:
                raise AddressRefused("missing x-forwarded-for header and configured to reject when not present")
            return peer
        if not self._trusts(peer):
            if self.reject_not_authorized:
                raise AddressRefused(
                    "client address not authorized for x-forwarded-for and configured to reject connection"
                )
            return peer
        place = len(chain) - 1 - self.hop_skips
        if place < 0:
            raise AddressRefused(
                f"malformed x-forwarded-for configuration or request: {self.hop_skips} hops to skip in a chain of "
                f"{len(chain)}"
            )
        address = _address(chain[place])
        if address is None:
            raise AddressRefused("malformed x-forwarded-for address")
        return str(address)

    def _trusts(self, peer: str) -> bool:
        address = _address(peer)
        return address is not None and any(address in network for network in self.authorized)


def _address(text: str) -> Address | None:
    """An address, also with a port; an IPv4 address in IPv6 form is the IPv4 address."""
    host = text
    if text.startswith("["):
        host, bracket, _ = text[1:].partition("]")
        if not bracket:
            return None
    elif text.count(":") == 1:
        host = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
