"""Keeps this node's service in Consul's catalog as Vault keeps its own, so that the usual DNS names work.

``<service>.service.consul`` answers with every unsealed node, ``active.<service>...`` with the one that leads. The
entry's TTL check is not the beat that keeps the leader's lock: it says *may be sent requests*, and may be minutes late.

A Consul that fails here takes nothing down: the error is logged once, and tried again until it works.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypedDict, Unpack

from consul_backend.catalog import Registration
from consul_backend.config import ConsulConfig
from consul_backend.errors import BackendError

log = logging.getLogger("service_registration")

UNSEALED = "Outrider Unsealed"
SEALED = "Outrider Sealed"
LEAVING = "Outrider Stepping Down"

_MODE_TAGS = {"primary": "perf-primary", "secondary": "perf-secondary"}


class Changed(TypedDict, total=False):
    """What of :class:`NodeState` is another than before."""

    sealed: bool
    active: bool
    initialized: bool
    performance_mode: str
    dr_mode: str


class Registrar(Protocol):
    """What the roles tell the catalog. Nothing here raises or waits long."""

    async def run(self) -> None:
        """Keep the entry true until cancelled."""

    async def update(self, **changed: Unpack[Changed]) -> None:
        """Note what changed; the catalog follows in the background."""

    async def leaving(self) -> None:
        """Tell the catalog that this node stops leading, and wait until it knows or a short time has passed."""

    async def close(self) -> None:
        """Take the entry out of the catalog. Call it after :meth:`run` has ended."""


class NoRegistration:
    """A :class:`Registrar` for clusters without a catalog."""

    async def run(self) -> None:
        return

    async def update(self, **changed: Unpack[Changed]) -> None:
        return

    async def leaving(self) -> None:
        return

    async def close(self) -> None:
        return


class CatalogEntry(Protocol):
    """One service in the catalog of the local agent. Every method raises BackendError."""

    async def register(self) -> None:
        """Write the entry; an entry with the same id is replaced."""

    async def set_tags(self, tags: Sequence[str]) -> None:
        """Write the entry with other tags."""

    async def check(self, passing: bool, output: str) -> None:
        """Pass or fail the TTL check. Fails when the agent does not know the entry."""

    async def deregister(self) -> None:
        """Remove the entry; a missing one is no failure."""

    async def close(self) -> None:
        """Close connections."""


@dataclass(frozen=True, slots=True)
class Intervals:
    """Times in seconds. ``check_s`` must leave room for a lost push within the check's TTL."""

    check_s: float = 2.5
    reconcile_s: float = 60.0
    retry_s: float = 1.0
    leave_s: float = 2.0


@dataclass(frozen=True, slots=True)
class NodeState:
    """What the catalog should say of this node."""

    sealed: bool = True
    active: bool = False
    initialized: bool = False
    leaving: bool = False
    performance_mode: str = ""
    dr_mode: str = ""

    @property
    def passing(self) -> bool:
        """Whether requests may be sent here."""
        return not self.sealed and not self.leaving

    @property
    def output(self) -> str:
        """The check's text."""
        if self.sealed:
            return SEALED
        return LEAVING if self.leaving else UNSEALED

    def tags(self, configured: Sequence[str]) -> tuple[str, ...]:
        """The configured tags and what the node is at the moment. No node of a DR secondary has one by which clients
        look for somebody to serve them."""
        leads = self.active and self.passing
        mirrors = self.dr_mode == "secondary" and not self.sealed
        tags = [*configured, "dr-secondary" if mirrors else "active" if leads else "standby"]
        if self.initialized:
            tags.append("initialized")
        if not self.sealed and not mirrors and self.performance_mode in _MODE_TAGS:
            tags.append(_MODE_TAGS[self.performance_mode])
        if not self.sealed and self.dr_mode == "primary":
            tags.append("dr-primary")
        return tuple(dict.fromkeys(tags))


class ServiceRegistration:
    """One :class:`Registrar` over one :class:`CatalogEntry`. A node starts out sealed and standing by."""

    def __init__(self, entry: CatalogEntry, *, tags: Sequence[str] = (), intervals: Intervals | None = None) -> None:
        self._entry = entry
        self._configured_tags = tuple(tags)
        self._intervals = intervals or Intervals()
        self._state = NodeState()
        self._changed = asyncio.Event()
        self._pushing = asyncio.Lock()
        self._tags_written: tuple[str, ...] | None = None
        self._reconcile_at_s = 0.0
        self._failing = False

    @classmethod
    def of(
        cls,
        config: ConsulConfig,
        *,
        service: str = "outrider",
        tags: Sequence[str] = (),
        meta: Mapping[str, str] | None = None,
        address: str,
        port: int,
        check_ttl_s: float = 5.0,
    ) -> ServiceRegistration:
        """The registration of this node with the agent at ``config``. ``address`` and ``port`` are where clients
        reach the API."""
        entry = Registration(
            config,
            service=service,
            id=service_id(service, address, port),
            address=address,
            port=port,
            tags=NodeState().tags(tags),
            meta=dict(meta or {}),
            check_ttl_s=check_ttl_s,
        )
        return cls(entry, tags=tags, intervals=Intervals(check_s=check_ttl_s / 2))

    async def run(self) -> None:
        """Push every change at once, the check twice per TTL, and the whole entry now and then: an agent that was
        restarted, or an operator who removed it, is put right within a minute."""
        while True:
            self._changed.clear()
            wait_s = self._intervals.check_s if await self._try_push() else self._intervals.retry_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()

    async def update(self, **changed: Unpack[Changed]) -> None:
        """See :meth:`Registrar.update`. An unsealed node is initialised; any update ends :meth:`leaving`."""
        new = replace(self._state, **changed, leaving=False)
        if changed.get("sealed") is False:
            new = replace(new, initialized=True)
        self._set(new)

    async def leaving(self) -> None:
        """See :meth:`Registrar.leaving`. A Consul that does not answer within ``leave_s`` is told later."""
        self._set(replace(self._state, active=False, leaving=True))
        if self._tags_written is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._intervals.leave_s):
                await self._try_push()

    async def close(self) -> None:
        """See :meth:`Registrar.close`. What cannot be removed in time, Consul removes when its check stays critical."""
        try:
            async with asyncio.timeout(self._intervals.leave_s):
                await self._entry.deregister()
        except (BackendError, TimeoutError) as error:
            log.warning("the service could not be taken out of the catalog: %s", str(error) or "no answer")
        finally:
            await self._entry.close()

    def _set(self, state: NodeState) -> None:
        if state != self._state:
            self._state = state
            self._changed.set()

    async def _try_push(self) -> bool:
        try:
            async with self._pushing:
                await self._push(self._state)
        except BackendError as error:
            # Registered or not is unknown now: the next push writes the whole entry.
            self._tags_written = None
            if not self._failing:
                self._failing = True
                log.warning("the catalog cannot be updated, trying again: %s", error)
            return False
        if self._failing:
            self._failing = False
            log.info("the catalog is up to date again")
        return True

    async def _push(self, state: NodeState) -> None:
        tags = state.tags(self._configured_tags)
        known = self._tags_written is not None
        if known and not state.passing:
            # The check takes effect within milliseconds, so it goes before anything slower.
            await self._entry.check(False, state.output)
        if tags != self._tags_written or time.monotonic() >= self._reconcile_at_s:
            await self._entry.set_tags(tags)
            self._tags_written = tags
            self._reconcile_at_s = time.monotonic() + self._intervals.reconcile_s
        if not known or state.passing:
            await self._entry.check(state.passing, state.output)


def service_id(service: str, address: str, port: int) -> str:
    """The entry's id, the same after every restart of the node."""
    return f"{service}:{address}:{port}"
