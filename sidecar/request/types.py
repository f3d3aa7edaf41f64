"""Requests and responses as they travel between the API port, the cluster port and the active node's service.

Plain values: msgspec encodes :class:`ForwardedAuth` as it stands. Nothing here imports a server.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from multidict import CIMultiDict

Hop = tuple[str, str]
"""(cluster id, ``"inner"`` or ``"upward"``)."""


@dataclass(frozen=True, slots=True)
class ForwardedAuth:
    """Who a performance secondary found the caller to be. The primary builds its ACL from ``policies`` and trusts the
    rest for names only; it never sees the caller's token as one of its own."""

    policies: tuple[str, ...] = ()
    display_name: str = ""
    accessor: str = ""
    entity_id: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    cluster_id: str = ""


@dataclass(frozen=True, slots=True)
class Disclosure:
    """What a listener shows to anybody without a token, and what it leaves out of answers that need none."""

    metrics: bool = False
    profiles: bool = False
    in_flight: bool = False
    hides_addresses: bool = False
    hides_cluster_name: bool = False
    hides_version: bool = False


USUAL_DISCLOSURE = Disclosure()


@dataclass(slots=True)
class HttpRequest:
    """One request below ``/v1/``.

    ``path`` is decoded, without ``/v1/`` and without a leading slash (a trailing one is kept). ``query`` holds every
    value of every name in order. ``raw_target`` is the undecoded path and query as the client sent them, for
    redirects. ``remote_address`` is the client's, also through hops; ``remote_port`` that of the connection it came
    by, 0 where there is none. ``trail`` and ``forwarded_auth`` are set by the
    cluster port only, never from a header. ``disclosure`` is that of the listener it came by.
    """

    method: str
    path: str
    query: Mapping[str, list[str]] = field(default_factory=dict)
    headers: CIMultiDict[str] = field(default_factory=CIMultiDict, repr=False)
    body: bytes = field(default=b"", repr=False)
    remote_address: str = ""
    raw_target: str = ""
    trail: tuple[Hop, ...] = ()
    forwarded_auth: ForwardedAuth | None = None
    disclosure: Disclosure = USUAL_DISCLOSURE
    remote_port: int = 0

    @property
    def remote(self) -> str:
        """Address and port of the client as one text; the address alone where there is no port."""
        host = f"[{self.remote_address}]" if ":" in self.remote_address else self.remote_address
        return f"{host}:{self.remote_port}" if self.remote_port else self.remote_address


class AnswerLike(Protocol):
    """What :meth:`Upstream.forward_to_primary` returns: an :class:`HttpResponse` or anything of its shape."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def body(self) -> bytes: ...


@dataclass(slots=True)
class HttpResponse:
    """An answer, complete. ``position`` is the highest WAL index that the request committed on the cluster that ran
    it, 0 if it wrote nothing; the forwarder of a performance secondary stalls on it. ``stream`` goes on after ``body``
    until the client leaves; empty pieces are pulses that are not sent."""

    status: int = 200
    headers: CIMultiDict[str] = field(default_factory=CIMultiDict, repr=False)
    body: bytes = field(default=b"", repr=False)
    position: int = 0
    stream: AsyncGenerator[bytes] | None = field(default=None, repr=False)


class Upstream(Protocol):
    """What the pipeline needs of replication."""

    def is_primary_writable(self) -> bool:
        """False on a performance secondary: class ``r`` must not be written here."""

    async def forward_to_primary(self, request: HttpRequest, auth: ForwardedAuth) -> AnswerLike:
        """Run ``request`` on the primary as ``auth`` and wait (bounded) until its writes are readable here. An answer
        that came late carries the contract's warning already. Raises plugin_api Unavailable (certainly not handled)
        or PluginError (outcome unknown)."""
