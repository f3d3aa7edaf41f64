"""Bugs of replication on purpose, as those of the store (``tests/sim/bugs.py``): patched in, unknown to production."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import msgspec

from consul_backend.position import Position
from consul_backend.wal import Record
from sidecar.core.write_gate import WriteGate
from sidecar.replication import applier as applier_module
from sidecar.replication import lost_writes, mode_manager, roles, staging
from sidecar.replication.applier import Applier
from sidecar.replication.history import Parting
from sidecar.replication.intake import Batch, Intake
from sidecar.replication.lost_writes import LostWrites
from sidecar.replication.mode_manager import ModeManager
from sidecar.replication.parts import concerns
from sidecar.replication.primary import PrimaryService
from sidecar.replication.progress import Lag, Progress
from sidecar.replication.protocol import RecordFrame
from sidecar.replication.secondary import SecondaryService
from sidecar.replication.selection import selection_for
from sidecar.replication.sync import Syncer
from sidecar.transport.forwarding import ForwardOutcomeUnknown, ForwardRequest, ForwardResponse, send_forward
from tests.sim.clusters import focus
from tests.sim.clusters.focus import SetFocus
from tests.sim.clusters.port import Port

Patch = Callable[[ExitStack], None]


@dataclass(frozen=True, slots=True)
class SetBug:
    """How to plant it, what it spoils, and the trouble in which that shows."""

    plant: Patch
    text: str
    focus: SetFocus


SET_BUGS: dict[str, SetBug] = {}


def bug(name: str, where: SetFocus) -> Callable[[Patch], Patch]:
    """Register a bug; its docstring says what it spoils."""

    def register(plant: Patch) -> Patch:
        SET_BUGS[name] = SetBug(plant, (plant.__doc__ or "").strip(), where)
        return plant

    return register


# -- applying


@bug("position-in-another-record", focus.STREAMING)
def position_in_another_record(stack: ExitStack) -> None:
    """What was received is committed, and then the position: a crash in between applies it again."""
    commit = applier_module.commit

    async def split(store: Any, writes: Sequence[Any], positions: Mapping[str, Position]) -> None:
        if writes:
            await commit(store, writes, {})
        await commit(store, [], positions)

    stack.enter_context(patch.object(applier_module, "commit", split))


@bug("position-of-the-batch-before", focus.STREAMING)
def position_of_the_batch_before(stack: ExitStack) -> None:
    """A batch is committed with the position that it began from: after a reconnect it is applied twice."""
    take = Intake.take

    def taken(self: Intake, *, steps_max: int | None = None) -> Batch | None:
        batch = take(self, steps_max=steps_max)
        if batch is None or len(batch.steps) < 2:
            return batch
        return Batch(batch.writes, batch.steps[-2].position, batch.steps)

    stack.enter_context(patch.object(Intake, "take", taken))


@bug("first-write-wins", focus.MERGING)
def first_write_wins(stack: ExitStack) -> None:
    """Of several writes to one key in a batch the oldest is kept."""
    take = Intake.take

    def taken(self: Intake, *, steps_max: int | None = None) -> Batch | None:
        batch = take(self, steps_max=steps_max)
        if batch is None:
            return None
        merged = {write.key: write for step in reversed(batch.steps) for write in reversed(step.writes)}
        return Batch(tuple(merged.values()), batch.position, batch.steps)

    stack.enter_context(patch.object(Intake, "take", taken))


@bug("gaps-are-not-noticed", focus.DAMAGED)
def gaps_are_not_noticed(stack: ExitStack) -> None:
    """A record is applied whatever came before it: out of order, twice, or over a hole."""
    record = Intake._record

    def accept(self: Intake, frame: RecordFrame) -> Any:
        found = Record.decode(frame.raw)
        last = self._last
        self._last = Position(last.set_id, last.generation, last.epoch, found.index - 1, found.header.prev_hash)
        return record(self, frame)

    stack.enter_context(patch.object(Intake, "_record", accept))


@bug("acknowledged-before-commit", focus.STREAMING)
def acknowledged_before_commit(stack: ExitStack) -> None:
    """A batch counts as durable when its commit begins."""
    apply = Applier._apply

    async def early(self: Applier, batch: Batch, *, durable_now: bool) -> None:
        self._durable = batch.position
        self._moved(batch.position)
        self._later = asyncio.ensure_future(apply(self, batch, durable_now=durable_now))  # type: ignore[attr-defined]  # the planted bug's own state
        await asyncio.sleep(0)

    stack.enter_context(patch.object(Applier, "_apply", early))


# -- syncing


@bug("sync-ends-at-its-base", focus.SYNCING)
def sync_ends_at_its_base(stack: ExitStack) -> None:
    """After a sync the position is the record at which the comparison began, not the guard."""
    fetch_all = Syncer._fetch_all

    async def fetched(self: Syncer, plan: Any, base: Position) -> Any:
        guard = await fetch_all(self, plan, base)
        return msgspec.structs.replace(guard, index=base.index, chain_hash=base.chain_hash)

    stack.enter_context(patch.object(Syncer, "_fetch_all", fetched))


@bug("sync-skips-to-its-guard", focus.SYNCING)
def sync_skips_to_its_guard(stack: ExitStack) -> None:
    """The records that the primary wrote during a sync are checked and not applied."""
    received = Syncer._received

    async def kept(self: Syncer, frame: Any, intake: Intake, *rest: Any) -> None:
        if isinstance(frame, RecordFrame):
            intake.accept(frame)
            intake.take()
        else:
            await received(self, frame, intake, *rest)

    stack.enter_context(patch.object(Syncer, "_received", kept))


@bug("readers-see-a-mix", focus.RESYNCING)
def readers_see_a_mix(stack: ExitStack) -> None:
    """Reads go on while a sync commits piece by piece."""

    def gate(self: SecondaryService, progress: Any) -> None:
        self._callbacks.set_gate(None)

    stack.enter_context(patch.object(SecondaryService, "_gate", gate))


@bug("mix-keeps-its-position", focus.RESYNCING)
def mix_keeps_its_position(stack: ExitStack) -> None:
    """A sync that commits piece by piece leaves the old position: a crash in between streams into a mix."""
    commit = staging.commit

    async def same(store: Any, writes: Sequence[Any], positions: Mapping[str, Position]) -> None:
        moved = {name: position for name, position in positions.items() if position.index}
        await commit(store, writes, moved)

    stack.enter_context(patch.object(staging, "commit", same))


@bug("gone-means-deleted", focus.FILTERED)
def gone_means_deleted(stack: ExitStack) -> None:
    """A primary names what it does not hold as empty: its secondaries delete theirs."""
    stack.enter_context(
        patch.object(mode_manager, "selection_for", lambda one, mounts, not_held: selection_for(one, mounts, ()))
    )


# -- shipping


@bug("window-is-ignored", focus.NARROW)
def window_is_ignored(stack: ExitStack) -> None:
    """A slow secondary is sent everything there is."""
    stack.enter_context(patch.object(Progress, "has_room", lambda self: True))


@bug("window-never-opens-again", focus.NARROW)
def window_never_opens_again(stack: ExitStack) -> None:
    """What is acknowledged goes on counting as under way."""
    room = Progress.has_room

    def closed(self: Progress) -> bool:
        self.closed_for_good = not room(self) or getattr(self, "closed_for_good", False)  # type: ignore[attr-defined]  # the planted bug's own state
        return not self.closed_for_good  # type: ignore[attr-defined]  # the planted bug's own state

    stack.enter_context(patch.object(Progress, "has_room", closed))


@bug("revoked-stream-goes-on", focus.REVOKING)
def revoked_stream_goes_on(stack: ExitStack) -> None:
    """A revocation is committed and what is open stays open."""

    async def dismiss(self: PrimaryService, secondary_id: str, fingerprints: Sequence[str]) -> None:
        return None

    stack.enter_context(patch.object(PrimaryService, "dismiss", dismiss))


@bug("revoked-comes-again", focus.REVOKING)
def revoked_comes_again(stack: ExitStack) -> None:
    """A revocation cuts what is open, and whoever was cut is let in again."""
    stack.enter_context(patch.object(PrimaryService, "_allow", lambda self, fingerprint: True))


@bug("revoked-is-not-cut", focus.REVOKING)
def revoked_is_not_cut(stack: ExitStack) -> None:
    """A revoked secondary's stream is asked to end, and neither waited for nor cut."""
    dismiss = PrimaryService.dismiss

    async def later(self: PrimaryService, secondary_id: str, fingerprints: Sequence[str]) -> None:
        self._later = asyncio.ensure_future(dismiss(self, secondary_id, fingerprints))  # type: ignore[attr-defined]  # the planted bug's own state

    stack.enter_context(patch.object(PrimaryService, "dismiss", later))
    stack.enter_context(patch.object(Port, "cut", lambda self, fingerprint: 0))


# -- forwarding


@bug("answer-is-not-held", focus.FORWARDING)
def answer_is_not_held(stack: ExitStack) -> None:
    """A forwarded write is answered before this cluster has it, and nobody is warned."""

    async def wait_applied(self: Applier, *_: Any, **__: Any) -> bool:
        return True

    stack.enter_context(patch.object(Applier, "wait_applied", wait_applied))


@bug("forwarded-again-when-unknown", focus.FORWARDING_LOSSY)
def forwarded_again_when_unknown(stack: ExitStack) -> None:
    """A forwarded request whose answer was lost is sent again."""
    send = SecondaryService._send

    async def again(self: SecondaryService, message: ForwardRequest) -> ForwardResponse:
        try:
            return await send_forward(self._client(self._address()), message, timeout_s=1.0)
        except ForwardOutcomeUnknown:
            return await send(self, message)

    stack.enter_context(patch.object(SecondaryService, "_send", again))


# -- roles


@bug("secondary-writes-by-itself", focus.CALM)
def secondary_writes_by_itself(stack: ExitStack) -> None:
    """The gate between service and store is open on a secondary."""
    stack.enter_context(patch.object(WriteGate, "check", lambda self, writes: None))


@bug("demotion-does-not-settle", focus.CROWDED)
def demotion_does_not_settle(stack: ExitStack) -> None:
    """A demotion does not wait for commits that were let in before."""

    async def settle(self: ModeManager) -> None:
        return None

    stack.enter_context(patch.object(ModeManager, "_settle", settle))


@bug("other-mode-writes-on", focus.CHAINED)
def other_mode_writes_on(stack: ExitStack) -> None:
    """A DR demotion leaves performance replication at work: it writes after the end that the demotion names."""

    @asynccontextmanager
    async def still(self: ModeManager) -> AsyncIterator[None]:
        yield

    stack.enter_context(patch.object(ModeManager, "still", still))
    stack.enter_context(patch.object(ModeManager, "rest", lambda self: None))


@bug("promotion-keeps-the-epoch", focus.PARTING)
def promotion_keeps_the_epoch(stack: ExitStack) -> None:
    """A promoted secondary goes on in the epoch of the primary that it replaced."""
    extended = roles.extended

    def same(history: Any, promotion: Any) -> Any:
        newest = history[-1]
        return extended(history[:-1], msgspec.structs.replace(promotion, number=newest.number, id=newest.id))

    stack.enter_context(patch.object(roles, "extended", same))


# -- what is lost, and what is said of it


@bug("fork-is-not-noticed", focus.PARTING)
def fork_is_not_noticed(stack: ExitStack) -> None:
    """A demoted primary takes over the new one's history as if it were its own."""
    stack.enter_context(patch.object(mode_manager, "parting", lambda mine, theirs, generation: Parting()))


@bug("lost-writes-forget-the-tail", focus.PARTING)
def lost_writes_forget_the_tail(stack: ExitStack) -> None:
    """The newest record behind the fork is not looked at."""
    gather = LostWrites.gather

    async def fewer(self: LostWrites, parting: Any, **facts: Any) -> Any:
        head = self._store.head.index
        newest = head
        for record in reversed(await self._range(max(self._store.oldest_index, head - TAIL), head)):
            if concerns(record, self._mode.classes):
                newest = record.index - 1
                break
        records = self._records
        with patch.object(self, "_records", lambda start, stop: records(start, min(stop, newest))):
            return await gather(self, parting, **facts)

    stack.enter_context(patch.object(LostWrites, "gather", fewer))


TAIL = 64


@bug("lost-writes-skip-large-batches", focus.PARTING_LARGE)
def lost_writes_skip_large_batches(stack: ExitStack) -> None:
    """Of a lost large batch nothing is kept."""
    writes = LostWrites._writes

    async def small(self: LostWrites, found: Any, record: Any) -> Sequence[Any]:
        return [] if record.header.kind == "commit" else await writes(self, found, record)

    stack.enter_context(patch.object(LostWrites, "_writes", small))


@bug("synced-past-the-fork-is-common", focus.FILLED_AND_PARTED)
def synced_past_the_fork_is_common(stack: ExitStack) -> None:
    """What a sync in pieces brought counts as common with any later primary."""
    stack.enter_context(patch.object(lost_writes, "is_none", lambda position: False))


@bug("forecast-ignores-the-tail", focus.FORECASTING)
def forecast_ignores_the_tail(stack: ExitStack) -> None:
    """What the primary said that it has, and what has not come, is left out of the forecast."""
    standing = ModeManager.standing

    async def applied(self: ModeManager, *, probe: bool) -> Any:
        found = await standing(self, probe=probe)
        return replace(found, seen=found.applied)

    stack.enter_context(patch.object(ModeManager, "standing", applied))


@bug("lag-stands-still", focus.FORECASTING_CUT)
def lag_stands_still(stack: ExitStack) -> None:
    """The lag is what it was when the last frame came, however long ago."""
    stack.enter_context(patch.object(Lag, "lag_s", lambda self, now_s: None if self._as_of_s is None else 0.0))


@bug("synced-is-not-seen", focus.FORECASTING_FILL)
def synced_is_not_seen(stack: ExitStack) -> None:
    """Where a sync led is known only after the next connection."""
    stack.enter_context(patch.object(Applier, "look", lambda self: None))
