"""What the ``sys/`` endpoints work with, and the table that leads to them."""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from plugin_api.errors import UnsupportedOperation, UnsupportedPath
from plugin_api.request import Operation
from sidecar.api.node_view import NodeView
from sidecar.api.replication_api import ReplicationAPI
from sidecar.core.audit.options import LocalRules
from sidecar.core.audit.registry import AuditRegistry
from sidecar.core.cluster import ClusterInfo
from sidecar.core.leasing import Leasing
from sidecar.core.lockout_rules import LockoutSettings
from sidecar.core.policies import PolicyStore
from sidecar.core.store_view import SealedStore
from sidecar.core.tokens import TokenStore
from sidecar.core.wrapping import Wrapping
from sidecar.request.call import Answer, Call
from sidecar.request.in_flight import InFlight
from sidecar.request.mount_view import MountView
from sidecar.request.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """Settings of the service. TTLs in seconds. ``sanitized_config`` is what ``sys/config/state/sanitized`` shows and
    must hold no secret."""

    api_addr: str = ""
    default_lease_ttl_s: int = 2_764_800
    max_lease_ttl_s: int = 2_764_800
    prometheus: bool = True
    sanitized_config: Mapping[str, Any] = field(default_factory=dict)
    audit: LocalRules = field(default_factory=LocalRules)
    lockout: LockoutSettings = field(default_factory=LockoutSettings)


@dataclass(frozen=True, slots=True)
class SysCore:
    """The parts of one tenure. ``mounts_changed`` wakes the task that deletes what an unmount left."""

    sealed: SealedStore
    tokens: TokenStore
    leasing: Leasing
    policies: PolicyStore
    mounts: MountView
    wrapping: Wrapping
    pipeline: Pipeline
    node: NodeView
    replication: ReplicationAPI | None
    cluster: ClusterInfo
    options: ServiceOptions
    now: Callable[[], float]
    writable: Callable[[], bool]
    mounts_changed: Callable[[], None]
    audit: AuditRegistry
    random_bytes: Callable[[int], bytes] = os.urandom
    in_flight: InFlight = field(default_factory=InFlight)


Params = Mapping[str, str]
Handler = Callable[[Call, Params], Awaitable[Answer | None]]

_PLACEHOLDER = re.compile(r"\{(\w+)(\*?)\}")


@dataclass(frozen=True, slots=True)
class Route:
    """One row: a path below ``sys/`` with ``{name}`` for a segment and ``{name*}`` for any rest, and who answers.

    ``open`` routes need no token; their handlers check for themselves what they must. ``sudo_list``: a list needs
    sudo, other operations do not. A handler for UPDATE answers
    creates too.
    """

    template: str
    handlers: Mapping[Operation, Handler]
    sudo: bool = False
    sudo_list: bool = False
    open: bool = False
    help: str = ""
    regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pattern, end = "", 0
        for found in _PLACEHOLDER.finditer(self.template):
            pattern += re.escape(self.template[end : found.start()])
            pattern += f"(?P<{found[1]}>{'.+' if found[2] else '[^/]+'})"
            end = found.end()
        object.__setattr__(self, "regex", re.compile(pattern + re.escape(self.template[end:]), re.DOTALL))


class SysBackend:
    """The backend of ``sys/``: a table of routes; the first match wins, so a catch-all goes last."""

    type_name = "system"

    def __init__(self, routes: Iterable[Route]) -> None:
        self._routes = tuple(routes)

    def is_open(self, rest: str, operation: Operation) -> bool:
        found = self._find(rest)
        return found is not None and found[0].open

    def needs_sudo(self, rest: str) -> bool:
        found = self._find(rest)
        if found is None:
            return False
        # A list comes with a slash at the end, and nothing else does.
        return found[0].sudo or (found[0].sudo_list and rest.endswith("/"))

    async def exists(self, call: Call, rest: str) -> bool | None:
        return None

    async def handle(self, call: Call, rest: str) -> Answer | None:
        found = self._find(rest)
        if found is None:
            raise UnsupportedPath
        route, params = found
        operation = Operation.UPDATE if call.operation is Operation.CREATE else call.operation
        handler = route.handlers.get(operation)
        if handler is None:
            raise UnsupportedOperation
        answer = await handler(call, params)
        if answer is not None and not answer.mount_type:
            answer.mount_type = self.type_name
        return answer

    def help(self, rest: str) -> str:
        found = self._find(rest)
        return found[0].help if found is not None else ""

    def _find(self, rest: str) -> tuple[Route, Params] | None:
        # A list and the removal of a mount come with a slash at the end; no route is told apart by it.
        path = rest.rstrip("/")
        for route in self._routes:
            match = route.regex.fullmatch(path)
            if match is not None:
                return route, match.groupdict()
        return None
