"""Forwarded requests and the standby's echo, as typed messages (msgpack maps) on the cluster port.

``POST /forward`` carries a :class:`ForwardRequest` and is answered with 200 and a :class:`ForwardResponse`, whatever
the inner status. An outer status of :data:`NOT_HANDLED` means that the request was refused before it ran; any other is
an unknown outcome. ``POST /echo`` carries :class:`Echo` and is answered with :class:`EchoReply`. A client asks once:
after a lost answer the outcome is unknown and stays so. ``POST /keys`` carries :class:`KeysRequest` and is answered
with :class:`KeysReply` by a node that has replaced its cluster's store, for a while after it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

import msgspec

from consul_backend.deadline import remaining_s
from consul_backend.position import Position
from sidecar.transport.peer import PeerClient, PeerOutcomeUnknown, PeerUnreachable
from sidecar.transport.trail import Hop, Trail

FORWARD_PATH = "/forward"
ECHO_PATH = "/echo"
KEYS_PATH = "/keys"
CALL_TIMEOUT_S = 2.0
"""Of a heartbeat, and of asking for keys."""

REQUEST_BYTES_MAX = 33 * 1024 * 1024
"""A request body of 32 MiB and a mebibyte of everything else."""

RESPONSE_BYTES_MAX = 64 * 1024 * 1024
HEADERS_MAX = 256

TIME_LEFT_MS_MAX = 90_000
"""Nobody waits longer for a forwarded request, whatever the sender says."""

NOT_HANDLED = frozenset({400, 403, 404, 405, 413, 421, 503})
"""Outer statuses that only a refusal before execution has."""


HOP_BY_HOP = frozenset(
    {
        "connection",
        "content-length",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that belong to one connection; everything else travels."""


class RequestLike(Protocol):
    """An HTTP request below ``/v1/`` as the API port knows it (``sidecar.request.types.HttpRequest``)."""

    @property
    def method(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def query(self) -> Mapping[str, list[str]]: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def body(self) -> bytes: ...

    @property
    def remote_address(self) -> str: ...

    @property
    def remote_port(self) -> int: ...

    @property
    def raw_target(self) -> str: ...

    @property
    def trail(self) -> tuple[tuple[str, str], ...]: ...


class ForwardedIdentity(msgspec.Struct, frozen=True):
    """Who the sending cluster found the caller to be; only on upward hops. The receiver builds its ACL from
    ``policies`` and takes the caller's token for nothing."""

    policies: tuple[str, ...] = ()
    display_name: str = ""
    accessor: str = ""
    entity_id: str = ""
    metadata: dict[str, str] = {}
    cluster_id: str = ""


class ForwardRequest(msgspec.Struct, frozen=True):
    """One request below ``/v1/``. ``path`` is decoded; ``headers`` are pairs, since names may repeat; ``raw_target`` is
    the undecoded path and query; ``trail`` includes the hop just made. ``time_left_ms``: until the sender's deadline
    for the request, None where it has none."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: list[tuple[str, str]]
    body: bytes
    remote_address: str
    trail: tuple[Hop, ...]
    raw_target: str = ""
    auth: ForwardedIdentity | None = None
    time_left_ms: int | None = None
    remote_port: int = 0

    def __repr__(self) -> str:
        return f"ForwardRequest({self.method} {self.path!r}, {len(self.body)} bytes)"

    @property
    def time_left_s(self) -> float:
        """How long the request may take here, in seconds."""
        left_ms = TIME_LEFT_MS_MAX if self.time_left_ms is None else self.time_left_ms
        return min(max(left_ms, 0), TIME_LEFT_MS_MAX) / 1000


class ForwardResponse(msgspec.Struct, frozen=True):
    """The complete answer. ``position`` is where the request's last write stands in the receiver's WAL, None if it
    wrote nothing."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    position: Position | None = None

    def __repr__(self) -> str:
        return f"ForwardResponse({self.status}, {len(self.body)} bytes)"


class Echo(msgspec.Struct, frozen=True):
    """A standby's heartbeat to the active of its cluster. ``clock_ms`` is its wall clock at sending (unix, 0 from a
    node that does not tell), ``echo_ms`` how long its last heartbeat took, there and back. ``seen_index`` and its chain
    hash: the newest record of the generation that it knows to have been committed, whichever node told it; 0 for none.
    """

    node_id: str
    api_addr: str
    cluster_addr: str
    generation: str = ""
    hostname: str = ""
    version: str = ""
    clock_ms: int = 0
    echo_ms: int = 0
    seen_index: int = 0
    seen_hash: bytes = b""


class EchoReply(msgspec.Struct, frozen=True):
    """``cluster_addrs`` of all nodes heard of; replication modes as in ``sys/health``; the active's newest record with
    its chain hash, and wall clock (unix milliseconds); how far this cluster is behind its primary; and which origins'
    pages may call (none: cross-origin requests are off), with which headers."""

    cluster_addrs: list[str]
    performance_mode: str
    dr_mode: str
    head_index: int = 0
    clock_ms: int = 0
    canary_age_ms: int = 0
    cors_origins: tuple[str, ...] = ()
    cors_headers: tuple[str, ...] = ()
    head_hash: bytes = b""


class KeysRequest(msgspec.Struct, frozen=True):
    """A standby found that its cluster's store was replaced by the one of that generation, and cannot open it."""

    generation: str


class KeysReply(msgspec.Struct, frozen=True):
    """What opens it."""

    root_key: bytes

    def __repr__(self) -> str:
        return "KeysReply()"


class MalformedMessage(ValueError):
    """Bytes that are no such message, or exceed its bounds."""


class ForwardNotSent(Exception):
    """The request was certainly not handled; ``status`` (0: not reached) is the refusal's."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ForwardOutcomeUnknown(Exception):
    """The request was sent and may have been handled."""


_T = TypeVar("_T")
_encoder = msgspec.msgpack.Encoder()


def forwarded(request: RequestLike, trail: Trail, auth: ForwardedIdentity | None = None) -> ForwardRequest:
    """``request`` as it goes over the hop that ``trail`` ends with. The caller's token is among the headers; above a
    standby's own cluster it counts for nothing, there ``auth`` does."""
    left_s = remaining_s()
    return ForwardRequest(
        method=request.method,
        path=request.path,
        query={name: list(values) for name, values in request.query.items()},
        headers=travelling(request.headers.items()),
        body=request.body,
        remote_address=request.remote_address,
        trail=trail,
        raw_target=request.raw_target,
        auth=auth,
        time_left_ms=None if left_s is None else int(left_s * 1000),
        remote_port=request.remote_port,
    )


def travelling(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The headers that go over a hop, as a message carries them."""
    return header_pairs((name, value) for name, value in headers if name.lower() not in HOP_BY_HOP)


def header_pairs(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Headers as a message carries them: multidict's names are a subclass of str, which msgpack refuses."""
    return [(str(name), value) for name, value in headers]


def encode(message: msgspec.Struct) -> bytes:
    """The bytes of any message of this module."""
    return _encoder.encode(message)


def decode(raw: bytes, kind: type[_T], *, bytes_max: int = REQUEST_BYTES_MAX) -> _T:
    """A message of ``kind``. Raises MalformedMessage, whatever the bytes."""
    if len(raw) > bytes_max:
        raise MalformedMessage(f"message of {len(raw)} bytes; at most {bytes_max} are taken")
    try:
        message = msgspec.msgpack.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"not a {kind.__name__}: {type(error).__name__}") from None
    if isinstance(message, ForwardRequest) and len(message.headers) > HEADERS_MAX:
        raise MalformedMessage(f"more than {HEADERS_MAX} headers")
    return message


async def send_forward(client: PeerClient, request: ForwardRequest, *, timeout_s: float) -> ForwardResponse:
    """Have the peer handle ``request``, once. Raises ForwardNotSent, ForwardOutcomeUnknown."""
    raw = encode(request)
    if len(raw) > REQUEST_BYTES_MAX:
        raise ForwardNotSent(f"the request is larger than {REQUEST_BYTES_MAX} bytes", 413)
    try:
        answer = await client.post(FORWARD_PATH, raw, timeout_s=timeout_s, answer_bytes_max=RESPONSE_BYTES_MAX)
    except PeerUnreachable as error:
        raise ForwardNotSent(str(error)) from error
    except PeerOutcomeUnknown as error:
        raise ForwardOutcomeUnknown(str(error)) from error
    if answer.status in NOT_HANDLED:
        raise ForwardNotSent(answer.body[:500].decode("utf-8", "replace"), answer.status)
    if answer.status != 200:
        raise ForwardOutcomeUnknown(f"{client.address} answered {answer.status}")
    try:
        return decode(answer.body, ForwardResponse, bytes_max=RESPONSE_BYTES_MAX)
    except MalformedMessage as error:
        raise ForwardOutcomeUnknown(f"{client.address}: {error}") from error


async def send_echo(client: PeerClient, echo: Echo) -> EchoReply:
    """One heartbeat. Raises ForwardNotSent when it got no proper answer; a heartbeat may be repeated."""
    try:
        answer = await client.post(ECHO_PATH, encode(echo), timeout_s=CALL_TIMEOUT_S, answer_bytes_max=1024 * 1024)
        if answer.status != 200:
            raise ForwardNotSent(f"{client.address} answered {answer.status}", answer.status)
        return decode(answer.body, EchoReply)
    except (PeerUnreachable, PeerOutcomeUnknown, MalformedMessage) as error:
        raise ForwardNotSent(str(error)) from error


async def send_keys(client: PeerClient, generation: str) -> bytes:
    """The root key of a store generation. Raises ForwardNotSent when it got no proper answer; may be repeated."""
    try:
        answer = await client.post(
            KEYS_PATH, encode(KeysRequest(generation)), timeout_s=CALL_TIMEOUT_S, answer_bytes_max=64 * 1024
        )
        if answer.status != 200:
            raise ForwardNotSent(f"{client.address} answered {answer.status}", answer.status)
        return decode(answer.body, KeysReply).root_key
    except (PeerUnreachable, PeerOutcomeUnknown, MalformedMessage) as error:
        raise ForwardNotSent(str(error)) from error
