"""What an engine is asked and what it answers. Pure values; no token ever reaches an engine.

What every request makes anew is a msgspec struct: a dataclass takes ten times as long to make.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec


class Operation(enum.Enum):
    """What a client wants done at a path. CREATE and UPDATE are one HTTP verb, told apart by the existence check."""

    CREATE = "create"
    READ = "read"
    UPDATE = "update"
    PATCH = "patch"
    DELETE = "delete"
    LIST = "list"

    # There is one object of each; what the class inherits hashes its name, in Python, several times a request.
    __hash__ = object.__hash__


class Caller(msgspec.Struct, frozen=True):
    """Who asks, as far as an engine may know. ``remote_address`` is the client's, also through forwarding hops."""

    display_name: str = ""
    accessor: str = ""
    policies: tuple[str, ...] = ()
    entity_id: str = ""
    metadata: Mapping[str, str] = msgspec.field(default_factory=dict)
    remote_address: str = ""


class Request(msgspec.Struct, frozen=True):
    """One call. ``path`` is relative to the mount; ``data`` is the decoded body (queries merged in for reads).
    ``headers`` holds, in lower case, those that the mount's ``passthrough_request_headers`` names."""

    operation: Operation
    path: str
    data: Mapping[str, Any] = msgspec.field(default_factory=dict)
    mount_point: str = ""
    caller: Caller = msgspec.field(default_factory=Caller)
    id: str = ""
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)

    def __repr__(self) -> str:
        # Without what the client sent: it may hold secrets.
        return f"Request({self.operation}, path={self.path!r}, mount_point={self.mount_point!r}, id={self.id!r})"


@dataclass(slots=True)
class Auth:
    """A successful login: the sidecar makes the token from it. TTLs in seconds, 0 means the mount's default."""

    display_name: str = ""
    policies: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    ttl_s: int = 0
    max_ttl_s: int = 0
    explicit_max_ttl_s: int = 0
    period_s: int = 0
    num_uses: int = 0
    renewable: bool = True
    token_type: str = "default"  # noqa: S105 - a kind of token
    no_default_policy: bool = False
    bound_cidrs: list[str] = field(default_factory=list)
    alias: str = ""


@dataclass(slots=True)
class Lease:
    """An answer that holds a secret which must be taken back: the sidecar keeps a lease of it and calls
    :meth:`~plugin_api.engine.Engine.revoke` in time. TTLs in seconds, 0 means the mount's. ``internal`` (JSON values,
    never shown to anybody) is what the engine needs to know the secret again. ``pending`` is a note of
    :mod:`plugin_api.pending`, which ends in the commit that keeps the lease."""

    ttl_s: int = 0
    max_ttl_s: int = 0
    renewable: bool = True
    internal: dict[str, Any] = field(default_factory=dict, repr=False)
    pending: str = ""


@dataclass(frozen=True, slots=True)
class IssuedLease:
    """A lease of this engine, as its ``renew`` and ``revoke`` get it. Times are unix seconds; ``mount_point`` is where
    the engine is mounted."""

    id: str
    internal: Mapping[str, Any] = field(repr=False)
    issued_s: int
    expires_s: int
    max_ttl_s: int
    mount_point: str = ""


class Response(msgspec.Struct):
    """An answer. ``data`` None and no auth, warnings or lease becomes 204. ``status`` overrides 200 (kv-v2 answers a
    deleted version with 404 *and* data). ``lease_duration_s`` is what a client is told where there is no ``lease``. Of
    ``headers`` those leave that the mount's ``allowed_response_headers`` names."""

    data: dict[str, Any] | None = None
    auth: Auth | None = None
    lease: Lease | None = None
    warnings: list[str] = msgspec.field(default_factory=list)
    lease_duration_s: int = 0
    renewable: bool = False
    status: int = 200
    headers: dict[str, str] = msgspec.field(default_factory=dict)

    def __repr__(self) -> str:
        # Without what is answered: it may hold secrets.
        return f"Response(status={self.status}, warnings={self.warnings!r})"


def list_response(keys: list[str]) -> Response:
    """The answer to LIST: an empty list is 404 with an empty error list, as clients expect."""
    if not keys:
        return Response(status=404)
    return Response(data={"keys": keys})
