"""Whether this node holds the root key, and how it gets it.

The root key lives here and in the barrier, in memory only. Sealing forgets it; the role loop watches
:attr:`Sealing.changed` and leaves its role when it does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from dataclasses import dataclass

from consul_backend.clock import Clock
from consul_backend.errors import BackendError, Conflict, Corrupt, OutcomeUnknown
from consul_backend.failpoint import failpoint
from consul_backend.physical import PhysicalStore
from consul_backend.replicated import genesis, read_entry
from plugin_api.errors import InvalidRequest, Unavailable
from sidecar.api.node_view import InitOptions, InitOutcome, SealStatus
from sidecar.core.init import build_genesis
from sidecar.core.keys import SEAL
from sidecar.core.seal import InvalidShares, UnsealAttempt
from sidecar.core.seal_record import BadSealRecord, SealRecord, WrongKey, open_root_key, root_fingerprint
from sidecar.generation import Generation, first_generation, read_generation

log = logging.getLogger("core")


@dataclass(frozen=True, slots=True)
class Opened:
    """An unsealed node's secret: the root key of one generation of the store."""

    generation: Generation
    root_key: bytes

    def __repr__(self) -> str:
        return f"Opened({self.generation.id})"


class Sealing:
    """Seal state of one node over its cluster's store."""

    def __init__(self, physical: PhysicalStore, *, node_id: str, cluster_name: str, clock: Clock) -> None:
        self._physical = physical
        self._node_id = node_id
        self._cluster_name = cluster_name
        self._clock = clock
        self._attempt: UnsealAttempt | None = None
        self._opened: Opened | None = None
        self._reason = ""
        self._lock = asyncio.Lock()
        self.changed = asyncio.Event()

    @property
    def opened(self) -> Opened | None:
        """The root key, or None while sealed."""
        return self._opened

    @property
    def reason(self) -> str:
        """Why the node sealed itself, for the operator; empty if it was asked to or never was unsealed."""
        return self._reason

    async def initialized(self) -> bool:
        """Whether the store is a cluster's already. Raises Unavailable with the cause if that cannot be told."""
        return await self._generation() is not None

    async def _generation(self) -> Generation | None:
        try:
            found = await read_generation(self._physical)
        except BackendError as error:
            raise Unavailable(f"the store cannot tell whether it is initialized: {error}") from error
        return found[0] if found else None

    async def init(self, options: InitOptions, *, root_token: str | None = None) -> InitOutcome:
        """Make the store a new cluster's; ``root_token`` is a chosen one, for development. Raises InvalidRequest,
        Unavailable."""
        if await self.initialized():
            raise InvalidRequest("Vault is already initialized")
        made = build_genesis(
            shares=options.shares,
            threshold=options.threshold,
            cluster_name=self._cluster_name or None,
            now_s=self._clock.time_ms() / 1000,
            random_bytes=os.urandom,
            root_token=root_token,
        )
        generation = Generation(os.urandom(4).hex(), str(uuid.uuid4()), made.root_fingerprint)
        failpoint("init:before-genesis")
        try:
            await genesis(
                self._physical,
                generation.id,
                made.writes,
                node_id=self._node_id,
                time_ms=self._clock.time_ms(),
                random_bytes=os.urandom,
                guard=first_generation(generation),
            )
        except Conflict as error:
            raise InvalidRequest("Vault is already initialized") from error
        except OutcomeUnknown as error:
            raise Unavailable(
                "the store did not confirm the initialization; its keys are discarded. If sys/init now says that it is "
                "initialized, delete the store's prefix and initialize again"
            ) from error
        except BackendError as error:
            raise Unavailable(f"the store refused the initialization, nothing was written: {error}") from error
        failpoint("init:after-genesis")
        log.info("security barrier initialized: shares=%d threshold=%d", options.shares, options.threshold)
        return InitOutcome(tuple(made.keys), made.root_token)

    async def status(self) -> SealStatus:
        """What seal-status and health report; an unreachable store reads as initialized and sealed with a warning."""
        warnings = (self._reason,) if self._reason else ()
        if self._opened is not None:
            record = await self._record_or_none(self._opened.generation)
            shape = (record.threshold, record.shares) if record else (0, 0)
            return SealStatus(initialized=True, sealed=False, t=shape[0], n=shape[1], warnings=warnings)
        try:
            generation = await self._generation()
        except Unavailable as error:
            return SealStatus(initialized=True, sealed=True, warnings=(*warnings, str(error)))
        if generation is None:
            return SealStatus(initialized=False, sealed=True)
        record = await self._record_or_none(generation)
        if record is None:
            return SealStatus(initialized=True, sealed=True, warnings=(*warnings, "the seal record cannot be read"))
        attempt = self._attempt
        progress, nonce = (attempt.progress, attempt.nonce) if attempt else (0, "")
        return SealStatus(True, True, record.threshold, record.shares, progress, nonce, warnings=warnings)

    async def _record_or_none(self, generation: Generation) -> SealRecord | None:
        try:
            return await self._record(generation)
        except (BackendError, Unavailable):
            return None

    async def _record(self, generation: Generation) -> SealRecord:
        raw = await read_entry(self._physical, generation.id, SEAL)
        if raw is None:
            raise Unavailable("the store holds no seal record: it is damaged or not this program's")
        try:
            return SealRecord.decode(raw)
        except BadSealRecord as error:
            raise Unavailable(str(error)) from error

    async def unseal(self, share: bytes) -> None:
        """Take one share; unseals when enough are held. Raises InvalidRequest, Unavailable."""
        async with self._lock:
            if self._opened is not None:
                return
            generation = await self._generation()
            if generation is None:
                raise InvalidRequest("Vault is not initialized")
            try:
                record = await self._record(generation)
            except BackendError as error:
                raise Unavailable(f"the seal record cannot be read: {error}") from error
            if self._attempt is None or self._attempt.config != record.config:
                self._attempt = UnsealAttempt(record.config)
            if self._attempt.progress == 0:
                self._attempt.reset(str(uuid.uuid4()))
            self._try(generation, record, self._attempt, share)

    def _try(self, generation: Generation, record: SealRecord, attempt: UnsealAttempt, share: bytes) -> None:
        try:
            unseal_key = attempt.provide(share)
            if unseal_key is None:
                return
            root_key = open_root_key(record, unseal_key)
        except (InvalidShares, WrongKey) as error:
            attempt.reset()
            raise InvalidRequest(f"Unseal failed, invalid key: {error}") from error
        if root_fingerprint(root_key) != generation.root_fingerprint:
            raise Unavailable("the seal record opens another root key than the store names: the store is damaged")
        self._attempt = None
        self.install(Opened(generation, root_key))
        log.info("vault is unsealed")

    def install(self, opened: Opened) -> None:
        """Be unsealed with ``opened``: by shares, or after an activation by what the primary sent."""
        self._opened = opened
        self._reason = ""
        self._wake()

    async def reset(self) -> None:
        """Forget the shares given so far. Raises InvalidRequest when unsealed already."""
        if self._opened is not None:
            raise InvalidRequest("vault is unsealed")
        self._attempt = None

    def seal(self, reason: str = "") -> None:
        """Forget the root key. ``reason`` tells the operator why, if the node does it by itself."""
        if self._opened is not None:
            if reason:
                log.error("sealing: %s", reason)
            else:
                log.info("vault is sealed")
        self._opened = None
        self._attempt = None
        self._reason = reason
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def wait_unsealed(self) -> Opened:
        """The root key, as soon as there is one."""
        while self._opened is None:
            await self.changed.wait()
        return self._opened

    async def wait_left(self, opened: Opened) -> None:
        """Return once this node no longer holds exactly ``opened``: sealed, or moved to another generation."""
        while self._opened is opened:
            await self.changed.wait()

    async def stale_reason(self, opened: Opened) -> str:
        """Why ``opened`` no longer fits the store, or "" while it does. Raises BackendError."""
        found = await read_generation(self._physical)
        if found is None:
            raise Corrupt("the store is empty although this node was unsealed with its keys")
        current, _ = found
        if current == opened.generation:
            return ""
        if current.root_fingerprint == opened.generation.root_fingerprint:
            return "this cluster's store was replaced under the same root key; unseal this node with the same keys"
        return (
            "this cluster became a secondary: its store and unseal keys are now the primary's; "
            "unseal this node with the primary's unseal keys"
        )
