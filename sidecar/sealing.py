"""Whether this node holds the root key, and how it gets it: by shares, or from an auto seal.

The root key lives here and in the barrier, in memory only. Sealing forgets it; the role loop watches
:attr:`Sealing.changed` and leaves its role when it does.

A change of seal (another seal type, a static key rotated) is prepared here while the node is unsealed and comes into
force by :meth:`Sealing.settle`, in one write, once this node leads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field

from consul_backend.clock import Clock
from consul_backend.errors import BackendError, Conflict, Corrupt, OutcomeUnknown
from consul_backend.failpoint import failpoint
from consul_backend.physical import PhysicalStore
from consul_backend.replicated import genesis, read_entry
from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, Unavailable
from sidecar.api.node_view import InitOptions, InitOutcome, SealStatus
from sidecar.core.barrier import PUT_BACK
from sidecar.core.init import build_genesis
from sidecar.core.keys import SEAL
from sidecar.core.seal import InvalidShares, UnsealAttempt
from sidecar.core.seal_record import (
    SHAMIR,
    AutoPart,
    BadSealRecord,
    SealRecord,
    WrongKey,
    open_root_key,
    root_fingerprint,
)
from sidecar.core.seals import AutoSeal, Need, Sealer, SealUnavailable, needed, prepare, unseal_root_key
from sidecar.core.store_view import SealedStore
from sidecar.generation import Generation, first_generation, read_generation

log = logging.getLogger("core")


@dataclass(frozen=True, slots=True)
class Opened:
    """An unsealed node's secret: the root key of one generation of the store."""

    generation: Generation
    root_key: bytes

    def __repr__(self) -> str:
        return f"Opened({self.generation.id})"


@dataclass(frozen=True, slots=True)
class _Pending:
    """A change of seal that the next tenure of this node writes, if the record is still ``base``."""

    base: bytes = field(repr=False)
    record: SealRecord


class Sealing:
    """Seal state of one node over its cluster's store. ``seal`` is the configured auto seal, ``disabled_seals`` are the
    kinds of those that the configuration is leaving."""

    def __init__(
        self,
        physical: PhysicalStore,
        *,
        node_id: str,
        cluster_name: str,
        clock: Clock,
        seal: AutoSeal | None = None,
        disabled_seals: Collection[str] = (),
    ) -> None:
        self._physical = physical
        self._node_id = node_id
        self._cluster_name = cluster_name
        self._clock = clock
        self._seal = seal
        self._disabled = frozenset(disabled_seals)
        self._attempt: UnsealAttempt | None = None
        self._opened: Opened | None = None
        self._pending: _Pending | None = None
        self._reason = ""
        self._trouble = ""
        self._opens_itself = True
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

    @property
    def kind(self) -> str:
        """The configured seal: ``shamir`` or the auto seal's kind."""
        return self._seal.kind if self._seal else SHAMIR

    @property
    def opens_itself(self) -> bool:
        """Whether the auto seal may unseal this node now: not after somebody sealed it, nor after it found its store or
        keys to be wrong."""
        return self._seal is not None and self._opened is None and self._opens_itself

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
            sealer=await self.sealer(),
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
        self._wake()
        return InitOutcome(tuple(made.keys), made.root_token)

    async def sealer(self) -> Sealer | None:
        """What puts a root key under the configured auto seal; None without one. Raises Unavailable."""
        if self._seal is None:
            return None
        try:
            return await prepare(self._seal, os.urandom)
        except SealUnavailable as error:
            raise Unavailable(f"the seal cannot be used, nothing was changed: {error}") from error

    async def own_record(self, primarys: bytes, root_key: bytes) -> bytes:
        """The seal record of a cluster that becomes a secondary, from the primary's: the primary's shares, beside this
        cluster's own seal. Raises Unavailable."""
        sealer = await self.sealer()
        try:
            record = SealRecord.decode(primarys)
        except BadSealRecord as error:
            raise Unavailable(f"the primary's seal record is not usable here: {error}") from error
        return record.with_auto(sealer(root_key) if sealer else None).encode()

    # ---- status

    async def status(self) -> SealStatus:
        """What seal-status and health report; an unreachable store reads as initialized and sealed with a warning."""
        warnings = tuple(text for text in (self._reason, "" if self._opened else self._trouble) if text)
        generation = self._opened.generation if self._opened else None
        if generation is None:
            try:
                generation = await self._generation()
            except Unavailable as error:
                return SealStatus(True, sealed=True, type=self.kind, warnings=(*warnings, str(error)))
        if generation is None:
            return SealStatus(False, sealed=True, type=self.kind, recovery_seal=self._seal is not None)
        raw_record = await self._record_or_none(generation)
        if raw_record is None:
            unreadable = () if self._opened else ("the seal record cannot be read",)
            return SealStatus(True, sealed=self._opened is None, type=self.kind, warnings=(*warnings, *unreadable))
        raw, record = raw_record
        attempt = self._attempt if self._opened is None else None
        migrating = self._opened is None and needed(record, self._seal, self._disabled) is Need.MIGRATION
        return SealStatus(
            initialized=True,
            sealed=self._opened is None,
            t=record.threshold,
            n=record.shares,
            progress=attempt.progress if attempt else 0,
            nonce=attempt.nonce if attempt else "",
            type=record.kind,
            recovery_seal=record.auto is not None,
            migration=migrating or (self._pending is not None and self._pending.base == raw),
            warnings=warnings,
            shares_issued_s=record.created_s,
        )

    async def _record_or_none(self, generation: Generation) -> tuple[bytes, SealRecord] | None:
        try:
            return await self._record(generation)
        except (BackendError, Unavailable):
            return None

    async def _record(self, generation: Generation) -> tuple[bytes, SealRecord]:
        raw = await read_entry(self._physical, generation.id, SEAL)
        if raw is None:
            raise Unavailable(f"there is no seal record at {SEAL}: {PUT_BACK}")
        try:
            return raw, SealRecord.decode(raw)
        except BadSealRecord as error:
            raise Unavailable(f"{error} at {SEAL}, somebody else changed it: {PUT_BACK}") from error

    async def _current(self) -> tuple[Generation, bytes, SealRecord] | None:
        """The cluster's generation and seal record, or None where it is not initialized. Raises Unavailable."""
        generation = await self._generation()
        if generation is None:
            return None
        try:
            return (generation, *await self._record(generation))
        except BackendError as error:
            raise Unavailable(f"the seal record cannot be read: {error}") from error

    # ---- by shares

    async def unseal(self, share: bytes, *, migrate: bool = False) -> None:
        """Take one share; unseals when enough are held. Recovery shares do so too, for an auto seal that cannot.
        ``migrate``: the shares are given so that the configured seal replaces the cluster's. Raises InvalidRequest,
        Unavailable."""
        async with self._lock:
            if self._opened is not None:
                return
            current = await self._current()
            if current is None:
                raise InvalidRequest("Vault is not initialized")
            generation, raw, record = current
            need = needed(record, self._seal, self._disabled)
            if migrate and need is not Need.MIGRATION:
                raise InvalidRequest("can't perform a seal migration, no migration seal found")
            if need is Need.MIGRATION and not migrate:
                raise InvalidRequest(
                    f'this cluster is sealed by "{record.kind}" and this node is configured for "{self.kind}": give '
                    "every share with migrate to change the seal, or correct the seal stanza and restart"
                )
            if self._attempt is None or self._attempt.config != record.config:
                self._attempt = UnsealAttempt(record.config)
            if self._attempt.progress == 0:
                self._attempt.reset(str(uuid.uuid4()))
            sealer = None
            if migrate and self._attempt.progress + 1 >= record.threshold:
                sealer = await self.sealer()  # before the last share is taken: it can be given again
            root_key = self._try(generation, record, self._attempt, share)
            if root_key is None:
                return
            self.install(Opened(generation, root_key))
            if migrate:
                self._prepare_change(raw, record, sealer(root_key) if sealer else None)

    def _try(self, generation: Generation, record: SealRecord, attempt: UnsealAttempt, share: bytes) -> bytes | None:
        try:
            share_key = attempt.provide(share)
            if share_key is None:
                return None
            root_key = open_root_key(record, share_key)
        except (InvalidShares, WrongKey) as error:
            attempt.reset()
            raise InvalidRequest(f"Unseal failed, invalid key: {error}") from error
        _check(generation, root_key)
        return root_key

    async def reset(self) -> None:
        """Forget the shares given so far. Raises InvalidRequest when unsealed already."""
        if self._opened is not None:
            raise InvalidRequest("vault is unsealed")
        self._attempt = None

    # ---- by the auto seal

    async def unseal_by_itself(self) -> bool:
        """Let the auto seal unseal this node, where the cluster's seal is of its kind; returns whether it did. Raises
        Unavailable with what the operator should know; ``sys/seal-status`` shows it too."""
        try:
            return await self._unseal_by_itself()
        except Unavailable as error:
            self._trouble = f"auto-unseal: {error}"
            raise

    async def _unseal_by_itself(self) -> bool:
        seal = self._seal
        current = await self._current() if seal else None
        if seal is None or current is None:
            return False
        generation, raw, record = current
        if record.auto is None or needed(record, seal, self._disabled) is not Need.AUTO:
            raise Unavailable(
                f'the cluster is sealed by "{record.kind}", not by the configured "{seal.kind}": '
                "change the seal with unseal -migrate, or correct the seal stanza"
            )
        part: AutoPart | None = None
        try:
            root_key = await unseal_root_key(seal, record.auto)
            if record.auto.key_id != seal.key_id:
                part = (await prepare(seal, os.urandom))(root_key)
        except SealUnavailable as error:
            raise Unavailable(str(error)) from error
        except WrongKey as error:
            raise Unavailable(f"the auto seal's part of the seal record is damaged: {error}") from error
        _check(generation, root_key)
        async with self._lock:
            if not self.opens_itself:
                return False  # unsealed by shares, or sealed by somebody, meanwhile
            self.install(Opened(generation, root_key))
            if part is not None:
                self._prepare_change(raw, record, part)
            return True

    # ---- a change of seal

    def _prepare_change(self, raw: bytes, record: SealRecord, part: AutoPart | None) -> None:
        self._pending = _Pending(raw, record.with_auto(part))
        log.info("the seal changes once this node is active: %s", _change(record, self._pending.record))

    async def settle(self, sealed: SealedStore) -> None:
        """Called by a new tenure before it serves: bring a prepared change of seal into force, in one write. Raises
        what the store raises; the change then stays prepared."""
        pending = self._pending
        if pending is None:
            return
        stored, wanted = await sealed.get_raw(SEAL), pending.record.encode()
        if stored == pending.base:
            failpoint("seal:before-change")
            await sealed.commit([Write(SEAL, wanted)])
            failpoint("seal:after-change")
            log.info("seal migration completed: the root key is now sealed by %s", _name(pending.record))
        elif stored != wanted:
            log.warning("the prepared change of seal was dropped: the seal record was changed by somebody else")
        self._pending = None

    # ---- sealed and unsealed

    def install(self, opened: Opened) -> None:
        """Be unsealed with ``opened``: by shares, by the auto seal, or after an activation by what the primary sent."""
        self._opened = opened
        self._attempt = None
        self._pending = None
        self._reason = self._trouble = ""
        self._opens_itself = True
        log.info("vault is unsealed")
        self._wake()

    def seal(self, reason: str = "", *, reopen: bool = False) -> None:
        """Forget the root key. ``reason`` tells the operator why, if the node does it by itself; ``reopen`` lets the
        auto seal unseal it again, which is for a store that has changed and not for one that is wrong."""
        if self._opened is not None:
            if reason:
                log.error("sealing: %s", reason)
            else:
                log.info("vault is sealed")
        self._opened = None
        self._attempt = None
        self._pending = None
        self._reason = reason
        self._opens_itself = reopen
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

    async def reopen(self, opened: Opened, ask: Callable[[str], Awaitable[bytes | None]]) -> bool:
        """The store was replaced under ``opened``: be unsealed with what is there now, if this node's own root key
        opens it, or the one that ``ask`` returns for its generation. Returns whether it is; it stays as it was if not,
        or if somebody sealed it meanwhile. Raises BackendError."""
        found = await read_generation(self._physical)
        if found is None:
            return False
        current, root_key = found[0], opened.root_key
        if current.root_fingerprint != opened.generation.root_fingerprint:
            asked = await ask(current.id)
            if asked is None:
                return False
            root_key = asked
            if root_fingerprint(root_key) != current.root_fingerprint:
                log.error("security: the active node sent another root key than the store names; it is not used")
                return False
        if self._opened is not opened:
            return False
        self.install(Opened(current, root_key))
        return True

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


def _check(generation: Generation, root_key: bytes) -> None:
    if root_fingerprint(root_key) != generation.root_fingerprint:
        raise Unavailable("the seal record opens another root key than the store names: the store is damaged")


def _name(record: SealRecord) -> str:
    return f'{record.kind} key "{record.auto.key_id}"' if record.auto else record.kind


def _change(old: SealRecord, new: SealRecord) -> str:
    return f"{_name(old)} -> {_name(new)}"
