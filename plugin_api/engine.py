"""The contract of a secrets engine or auth method that runs inside the sidecar.

A class is registered by the entry-point groups ``outrider.secrets`` and ``outrider.auth`` under its type name. One
instance serves one mount. Every call runs on the active node of a cluster; writes to replicated storage on a
performance secondary raise :class:`~plugin_api.errors.ReadOnlyStorage`, which an engine lets pass: the sidecar then
forwards the request to the primary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from plugin_api.description import PathDescription
from plugin_api.errors import Irrevocable, NotFound
from plugin_api.request import IssuedLease, Lease, Request, Response
from plugin_api.storage import Storage


@dataclass(frozen=True, slots=True)
class MountInfo:
    """The mount an engine serves. ``path`` ends in ``/``; auth mounts begin with ``auth/``. TTLs in seconds."""

    path: str
    type: str
    uuid: str
    accessor: str
    local: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    default_lease_ttl_s: int = 2764800
    max_lease_ttl_s: int = 2764800


async def _no_passwords(policy: str) -> str:
    raise NotFound("no password policy of this name")


@dataclass(frozen=True, slots=True)
class EngineContext:
    """What an engine is given. ``now`` returns unix seconds. ``local_storage`` reaches DR secondaries only.

    ``writable`` tells whether ``storage`` may be written here; False on a performance secondary, where the answer of a
    read-modify-write must come from the primary's copy and not from this cluster's, which may be behind.

    ``generate_password`` makes a password by the operator's policy of the given name. Raises NotFound for a name that
    is no policy.
    """

    mount: MountInfo
    storage: Storage
    local_storage: Storage
    now: Callable[[], float]
    writable: Callable[[], bool] = lambda: True
    generate_password: Callable[[str], Awaitable[str]] = _no_passwords


class Engine(ABC):
    """One mounted engine.

    ``unauthenticated`` and ``sudo`` list paths relative to the mount that need no token, or the sudo capability;
    a trailing ``*`` matches any rest. ``has_login_roles``: logins are to a role, which :meth:`login_role` tells.
    """

    type_name: ClassVar[str]
    unauthenticated: ClassVar[tuple[str, ...]] = ()
    sudo: ClassVar[tuple[str, ...]] = ()
    has_login_roles: ClassVar[bool] = False

    def __init__(self, context: EngineContext) -> None:
        self.context = context

    @abstractmethod
    async def handle(self, request: Request) -> Response | None:
        """Answer one request. None becomes 204 (or 404 for a read). Raises PluginError and its children."""

    async def exists(self, request: Request) -> bool | None:
        """Whether a write to this path would update (True) or create (False); None where the path makes no
        difference, which counts as update."""
        return None

    async def retune(self, options: Mapping[str, str]) -> list[str]:
        """The mount's options are about to become ``options``, and a new engine object will serve with them: write what
        that one must find; returns warnings for the operator. Raises InvalidRequest where it cannot be done."""
        return []

    async def initialize(self) -> None:
        """Work to do once after the engine was made, in the background and only where its storage can be written.
        Requests come before it ends. Called again after a failure, so it must bear repetition."""
        return

    async def renew(self, lease: IssuedLease, increment_s: int) -> Lease | None:
        """The holder wants the secret for ``increment_s`` (0: as before) from now on: prolong it, and answer with the
        new TTL and ``internal``; None lets the sidecar grant what the lease's and the mount's maxima allow. Whatever is
        answered, those maxima hold. Raises PluginError: the lease stays as it was."""
        return None

    async def revoke(self, lease: IssuedLease) -> None:
        """Take the secret back; returns once it is worth nothing. Called at its end, and again after a failure, a crash
        or a change of the active node: a secret that is gone already is no failure. Raises PluginError, whose text
        operators see; :class:`~plugin_api.errors.Irrevocable` where trying again has no use."""
        raise Irrevocable(f"a {self.type_name} engine cannot revoke")

    async def undo(self, data: Mapping[str, Any]) -> None:
        """What ``data`` notes (:mod:`plugin_api.pending`) was begun and never finished, or finished without anybody
        knowing: take it back. Called again after a failure or a crash; what is gone already is no failure. Raises
        PluginError: it is tried again later."""
        return

    async def login_identity(self, request: Request) -> str:
        """Whom a login claims to be, in one spelling for every way to write it; empty where it says nothing. Must not
        depend on whether there is such an identity. Failed logins are counted by it."""
        return ""

    async def login_role(self, request: Request) -> str:
        """The name of the role that a login is to; empty for what is no login, or to no role that there is. Nothing is
        proven yet, and nothing may change: rate limits of a role are decided by it, before the login is looked at."""
        return ""

    async def invalidate(self, path: str) -> None:
        """Replication changed ``path`` in this mount's storage: forget what was cached of it."""
        return

    def help(self, path: str) -> str:
        """A line or two for ``?help=1``."""
        return ""

    def describe(self) -> Sequence[PathDescription]:
        """What can be asked of this mount, for the OpenAPI document; nothing where the engine keeps no table."""
        return ()
