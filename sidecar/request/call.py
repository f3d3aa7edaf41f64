"""One request inside the service, and its answer before it becomes bytes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from plugin_api.description import PathDescription
from plugin_api.request import Caller, Operation
from sidecar.core.audit.entries import Record
from sidecar.core.policies import ACL
from sidecar.core.token_entry import TokenEntry
from sidecar.core.wrapping import WrapInfo
from sidecar.request.types import ForwardedAuth


class Identity(msgspec.Struct, frozen=True):
    """A caller whose token was checked here, or on the performance secondary that forwarded the request (then
    ``entry`` is None and ``token`` empty)."""

    policies: tuple[str, ...]
    acl: ACL
    caller: Caller
    entry: TokenEntry | None = None
    token: str = ""

    def __repr__(self) -> str:
        return f"Identity(policies={self.policies!r}, caller={self.caller!r})"  # never the token

    def forwarded(self, cluster_id: str) -> ForwardedAuth:
        """What the primary is told about this caller."""
        return ForwardedAuth(
            policies=self.policies,
            display_name=self.caller.display_name,
            accessor=self.caller.accessor,
            entity_id=self.caller.entity_id,
            metadata=dict(self.caller.metadata),
            cluster_id=cluster_id,
        )


class Call(msgspec.Struct):
    """A decoded request. ``path`` is the full path below ``/v1/``, with a trailing slash for a list. ``identity`` is
    set once the token was checked, also when the request is refused later. ``headers`` are compared without case.
    ``wrap_ttl_s`` is what the client asked
    for, 0 for no wrapping. ``audited``: whether the request was entered in the audit log; None while nobody tried.
    ``record`` is what was entered.
    ``stale``: replicated data here is older than what the session has seen, so only the primary may answer.
    ``allowed``: what the caller's policies say, None where they were not asked."""

    operation: Operation
    path: str
    data: Mapping[str, Any]
    id: str
    token: str = ""
    remote_address: str = ""
    wants_help: bool = False
    wrap_ttl_s: int = 0
    wrap_jwt: bool = False
    forwarded_auth: ForwardedAuth | None = None
    identity: Identity | None = None
    body_bytes: int = 0
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    audited: bool | None = None
    record: Record | None = None
    stale: bool = False
    allowed: bool | None = None
    remote_port: int = 0

    def __repr__(self) -> str:
        # Without token, data and headers.
        return f"Call({self.operation}, path={self.path!r}, id={self.id!r}, remote_address={self.remote_address!r})"

    @property
    def known(self) -> Identity:
        """The identity of a call that was authorised. Raises AssertionError before that."""
        if self.identity is None:
            raise AssertionError("the call was not authorised")
        return self.identity


@dataclass(frozen=True, slots=True)
class Wrap:
    """The answer must leave wrapped: as a JWT, for at most ``ttl_s``, with more claims."""

    ttl_s: int
    jwt: bool = False
    claims: Mapping[str, Any] = field(default_factory=dict)


class Answer(msgspec.Struct):
    """What a backend answers. ``raw`` replaces the envelope by a body of its own, ``plain`` by one that is no JSON
    object at all and ``stream`` by one that goes on until the client leaves. ``headers`` are added to the answer's.
    ``stored`` is an unwrapped envelope, which is repeated with a new request id. ``wrap`` says that the
    answer must be wrapped, ``wrap_info`` that it is. ``data`` None without auth, warnings or lease becomes 204."""

    data: dict[str, Any] | None = None
    auth: dict[str, Any] | None = None
    warnings: list[str] = msgspec.field(default_factory=list)
    lease_id: str = ""
    lease_duration_s: int = 0
    renewable: bool = False
    status: int = 200
    raw: dict[str, Any] | None = None
    stored: dict[str, Any] | None = None
    wrap: Wrap | None = None
    wrap_info: WrapInfo | None = None
    mount_type: str = ""
    plain: bytes | None = None
    content_type: str = ""
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    stream: AsyncGenerator[bytes] | None = None

    def __repr__(self) -> str:
        return f"Answer(status={self.status}, mount_type={self.mount_type!r})"  # never what is answered

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to put in an envelope."""
        return (
            self.data is None
            and self.auth is None
            and not self.warnings
            and not self.lease_duration_s
            and not self.lease_id
        )


class Backend(Protocol):
    """What a mount path leads to: an engine, or a part of the core that needs more than an engine may know."""

    @property
    def type_name(self) -> str:
        """The mount's type."""

    @property
    def replicated(self) -> bool:
        """Whether the primary has the same mount, and could answer in this cluster's place."""

    def is_open(self, rest: str, operation: Operation) -> bool:
        """Whether the path needs no token."""

    def needs_sudo(self, rest: str) -> bool:
        """Whether the path needs the sudo capability."""

    async def exists(self, call: Call, rest: str) -> bool | None:
        """Whether a write would update (True) or create (False); None where that makes no difference."""

    async def handle(self, call: Call, rest: str) -> Answer | None:
        """Answer; None is 204, or 404 for a read. Raises PluginError."""

    def help(self, rest: str) -> str:
        """A line or two."""

    def describe(self) -> Sequence[PathDescription]:
        """What can be asked of the mount."""


def matches_any(patterns: tuple[str, ...], rest: str) -> bool:
    """Whether ``rest`` is one of ``patterns``; a trailing ``*`` matches any rest, ``+`` a whole segment."""
    return bool(patterns) and any(_matches(pattern, rest) for pattern in patterns)


def _matches(pattern: str, rest: str) -> bool:
    if "+" in pattern:
        wanted, given = pattern.split("/"), rest.split("/")
        return len(wanted) == len(given) and all(w in ("+", g) for w, g in zip(wanted, given, strict=True))
    return rest.startswith(pattern[:-1]) if pattern.endswith("*") else rest == pattern
