"""Merkle diff and sync (being written; signatures are final)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from consul_backend.clock import Clock
from consul_backend.position import Position
from sidecar.replication.hello import Source
from sidecar.replication.protocol import DiffReply, DiffRequest, FetchRequest
from sidecar.replication.states import Event
from sidecar.replication.store_view import PrimaryStore, SecondaryStore


async def answer_diff(store: PrimaryStore, source: Source, request: DiffRequest, *, hold_as: str) -> DiffReply:
    """POST /diff on the primary: body protocol.decode_diff_request, answer protocol.encode(reply)."""
    ...


def answer_fetch(store: PrimaryStore, request: FetchRequest) -> AsyncIterator[bytes]:
    """POST /fetch on the primary: body protocol.decode_fetch_request; yields chunks of the streamed body."""
    ...


@dataclass(frozen=True, slots=True)
class SyncProgress:
    """``done`` of ``total`` extents; for the 503 text and merkle_sync_progress."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class SyncResult:
    """``event`` is EQUAL, SYNCED, MISMATCH, LOST or REFUSED for states.step. Position as it is now."""

    event: Event
    reason: str
    position: Position
    round_trips: int
    bytes: int
    keys: int
    seconds: float


class Syncer:
    """``request`` sends a DiffRequest; ``fetch`` sends a FetchRequest and yields the body's raw chunks."""

    def __init__(
        self,
        store: SecondaryStore,
        request: Callable[[DiffRequest], Awaitable[DiffReply]],
        fetch: Callable[[FetchRequest], AsyncIterator[bytes]],
        *,
        on_applied: Callable[[Sequence[str]], Awaitable[None]],
        gate: Callable[[SyncProgress | None], None],
        on_event: Callable[[Event], None],  # DIFFERS, once the diff is known
        clock: Clock,
    ) -> None: ...

    async def run(self) -> SyncResult:
        """Diff, and sync what differs. Raises BackendError when this cluster's own store fails."""
        ...
