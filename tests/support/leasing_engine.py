"""An engine that hands out dynamic credentials, whose revocation a test can make fail, hang or count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import ClassVar

from plugin_api.engine import Engine, EngineContext
from plugin_api.errors import PluginError
from plugin_api.framework import Fields, FieldSpec, FieldType, Path, PathEngine, generic_name, writes
from plugin_api.request import IssuedLease, Lease, Operation, Request, Response
from sidecar.request.plugins import SECRETS, PluginRegistry

TYPE = "credentials"


class Outside:
    """The system the credentials are for. ``fail`` is raised by the next revocations; ``hang`` holds them up until
    ``release``; ``calls`` and ``renewals`` are what it was asked."""

    def __init__(self) -> None:
        self.valid: set[str] = set()
        self.calls: list[str] = []
        self.renewals: list[tuple[str, int]] = []
        self.fail: Exception | None = None
        self.failing: dict[str, Exception] = {}
        self.hang = False
        self.running = 0
        self.most_running = 0
        self.release = asyncio.Event()
        self.renewed_ttl_s: int | None = None
        self._changed = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds after some call."""
        async with asyncio.timeout(20):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def revoke(self, credential: str) -> None:
        self.calls.append(credential)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self._changed.set()
        try:
            await asyncio.sleep(0)
            if self.hang:
                await self.release.wait()
            error = self.failing.get(credential.split("-")[0], self.fail)
            if error is not None:
                raise error
            self.valid.discard(credential)
        finally:
            self.running -= 1
            self._changed.set()


class Credentials(PathEngine):
    """``creds/<role>`` issues one; ``ttl``, ``max_ttl`` and ``renewable`` are the lease's."""

    type_name = TYPE
    outside: ClassVar[Outside]

    def __init__(self, context: EngineContext) -> None:
        super().__init__(context)
        self._issued = 0

    def paths(self) -> Sequence[Path]:
        fields = {
            "ttl": FieldSpec(FieldType.DURATION_S),
            "max_ttl": FieldSpec(FieldType.DURATION_S),
            "renewable": FieldSpec(FieldType.BOOL, default=True),
        }
        issue = {Operation.READ: self._issue} | writes(self._issue)
        return [Path("creds/" + generic_name("role"), fields, issue, help="Issues a credential.")]

    async def _issue(self, request: Request, fields: Fields) -> Response:
        self._issued += 1
        credential = f"{fields['role']}-{self.context.mount.accessor}-{request.id}-{self._issued}"
        self.outside.valid.add(credential)
        lease = Lease(
            ttl_s=fields["ttl"],
            max_ttl_s=fields["max_ttl"],
            renewable=fields["renewable"],
            internal={"credential": credential},
        )
        return Response(data={"password": credential}, lease=lease)

    async def renew(self, lease: IssuedLease, increment_s: int) -> Lease | None:
        self.outside.renewals.append((lease.internal["credential"], increment_s))
        if self.outside.fail is not None:
            raise PluginError("cannot be renewed")
        ttl_s = self.outside.renewed_ttl_s
        return None if ttl_s is None else Lease(ttl_s=ttl_s)

    async def revoke(self, lease: IssuedLease) -> None:
        await self.outside.revoke(lease.internal["credential"])


def credentials_engine() -> tuple[Outside, type[Credentials]]:
    """An outside of its own, and the engine class that works on it."""
    system = Outside()

    class Bound(Credentials):
        outside = system

    return system, Bound


def registry_with(engine: type[Credentials]) -> PluginRegistry:
    """The installed plugins, and the credentials engine."""

    class Registry(PluginRegistry):
        def types(self, group: str) -> list[str]:
            return sorted([*super().types(group), *([TYPE] if group == SECRETS else [])])

        def load(self, group: str, type_name: str) -> type[Engine]:
            return engine if (group, type_name) == (SECRETS, TYPE) else super().load(group, type_name)

    return Registry(PluginRegistry.installed()._found)
