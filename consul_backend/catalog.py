"""One service instance in the local agent's catalog, with one TTL check, as Vault registers itself.

What tags mean and when the check passes is for the caller to say; this file only says it to Consul. Every call is one
request that may be repeated. Raises Unavailable and PermissionDenied; a cluster works on without its catalog entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from consul_backend.client import PooledConsul, UnknownToConsul, translated
from consul_backend.config import ConsulConfig
from consul_backend.transport import Transport

CALL_TIMEOUT_S = 5.0
REMOVE_DEAD_AFTER_S = 60
"""An instance whose check has been critical this long is removed; Consul's minimum is one minute."""


@dataclass(frozen=True, slots=True)
class ServiceEntry:
    """``id`` is unique on the agent; clients connect to ``address`` and ``port``; one :meth:`Registration.check` counts
    for ``check_ttl_s``."""

    service: str
    id: str
    address: str
    port: int
    tags: tuple[str, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict)
    check_ttl_s: float = 5.0

    @property
    def check_id(self) -> str:
        """The name of the service's one check."""
        return f"{self.id}:sealed-check"


class Registration:
    """Close it. Registering again replaces tags and meta and keeps the check's state."""

    def __init__(
        self,
        config: ConsulConfig,
        *,
        service: str,
        id: str,  # noqa: A002 - Consul's word
        address: str,
        port: int,
        tags: Sequence[str] = (),
        meta: Mapping[str, str] | None = None,
        check_ttl_s: float = 5.0,
    ) -> None:
        self._config = config
        self._entry = ServiceEntry(service, id, address, port, tuple(tags), dict(meta or {}), check_ttl_s)
        self._transport: Transport | None = None
        self._state: tuple[bool, str] = (False, "Outrider starting")

    @property
    def entry(self) -> ServiceEntry:
        """What the catalog shows, or will."""
        return self._entry

    async def register(self) -> None:
        """Make the catalog show the entry; also mends an agent that has forgotten it. The check keeps its last word."""
        entry = self._entry
        check: dict[str, Any] = {
            "CheckID": entry.check_id,
            "Name": "Outrider sealed status",
            "TTL": f"{round(entry.check_ttl_s * 1000)}ms",
            "Status": "passing" if self._state[0] else "critical",
            "DeregisterCriticalServiceAfter": f"{REMOVE_DEAD_AFTER_S}s",
        }
        with translated("register the service"):
            await self._consul.agent.service.register(
                entry.service,
                service_id=entry.id,
                address=entry.address,
                port=entry.port,
                tags=list(entry.tags),
                meta=dict(entry.meta),
                check=check,
            )
        await self._report()

    async def set_tags(self, tags: Sequence[str]) -> None:
        """Replace the tags."""
        self._entry = replace(self._entry, tags=tuple(tags))
        await self.register()

    async def check(self, passing: bool, output: str) -> None:
        """Set the check for the next ``check_ttl_s``; registers again where the agent has forgotten the service."""
        self._state = (passing, output)
        try:
            await self._report()
        except UnknownToConsul:
            await self.register()

    async def deregister(self) -> None:
        """Take the entry out; one that is not there is no failure."""
        try:
            with translated("deregister the service"):
                await self._consul.agent.service.deregister(self._entry.id)
        except UnknownToConsul:
            return

    async def close(self) -> None:
        """Close the connection. The entry stays: deregister it first on a clean way down. Idempotent."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.close()

    async def _report(self) -> None:
        passing, output = self._state
        check = self._consul.agent.check
        with translated("report the check"):
            report = check.ttl_pass if passing else check.ttl_fail
            known = await report(self._entry.check_id, notes=output)
        if not known:
            raise UnknownToConsul("the agent does not know the service's check")

    @property
    def _consul(self) -> PooledConsul:
        if self._transport is None:
            self._transport = Transport(self._config, connections_max=2)
        return PooledConsul(self._transport, timeout_s=CALL_TIMEOUT_S)
