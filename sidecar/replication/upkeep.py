"""``merkle-check`` and ``reindex``: looking after the index of this cluster's store while it serves.

A check runs within its request. A reindex is started by a request and runs in :meth:`IndexUpkeep.run`; its progress is
in the status, ``recover`` and the end of the tenure cancel it, and starting it again finishes what is left.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NoReturn, Protocol

import msgspec

from consul_backend.clock import Clock
from consul_backend.errors import Corrupt, NotApplied, Overloaded, PermissionDenied
from consul_backend.errors import Unavailable as StoreUnavailable
from consul_backend.index_check import CheckReport, Inspected, Kind, Progress, check
from consul_backend.reindex import AskOthers, ReindexOptions, nobody, reindex
from plugin_api.errors import InvalidRequest
from sidecar.replication.status import IndexFacts
from sidecar.replication.wiring import SealedEntries

logger = logging.getLogger(__name__)

HEALTH_KEY = "c/replication/index"
TREES = {"1": ("r", "replicated"), "2": ("l", "local")}
RUNNING = "a merkle check or a reindex is running already; see sys/replication/status"


class InspectedStore(Protocol):
    """A store that can be checked. ``consul_backend.replicated.ReplicatedStore`` is one."""

    def inspected(self) -> Inspected:
        """The parts that a check looks at."""


class IndexHealth(msgspec.Struct, frozen=True):
    """What the last check and the last reindex found; outlives the tenure. Times in unix milliseconds, 0: never."""

    corrupted: bool = False
    checked_ms: int = 0
    reindexed_ms: int = 0


class IndexUpkeep:
    """One tenure's. ``ask_others`` has entries that this cluster lost."""

    def __init__(
        self, store: InspectedStore, sealed: SealedEntries, clock: Clock, ask_others: AskOthers = nobody
    ) -> None:
        self._store = store
        self._sealed = sealed
        self._clock = clock
        self._ask_others = ask_others
        self._health = IndexHealth()
        self._busy = asyncio.Lock()
        self._asked = asyncio.Event()
        self._options: ReindexOptions | None = None
        self._progress: Progress | None = None
        self._job: asyncio.Task[None] | None = None
        self._braked = 0

    async def load(self) -> None:
        """Read what is remembered of earlier tenures. Raises BackendError."""
        raw = await self._sealed.get(HEALTH_KEY)
        if raw is not None:
            self._health = msgspec.msgpack.decode(raw, type=IndexHealth)

    def facts(self) -> IndexFacts:
        """What the status shows."""
        progress = self._progress if self._options is not None else None
        return IndexFacts(
            corrupted=self._health.corrupted,
            checked_s=self._health.checked_ms // 1000 if self._health.checked_ms else None,
            reindexed_s=self._health.reindexed_ms // 1000,
            reindexing=self._options is not None,
            stage=progress.stage if progress is not None else "",
            done=progress.done if progress is not None else 0,
            total=progress.total if progress is not None else 0,
            braked=self._braked,
        )

    async def check(self) -> dict[str, Any]:
        """Compare the index with everything stored, changing nothing (contract 1.14). Raises InvalidRequest, and what
        reading raises."""
        if self._busy.locked() or self._options is not None:
            raise InvalidRequest(RUNNING)
        async with self._busy:
            parts = self._store.inspected()
            report = await check(parts, Progress())
            now_ms = self._clock.time_ms()
            await self._remember(lambda health: IndexHealth(report.corrupted, now_ms, health.reindexed_ms))
            for problem in report.problems[:100]:
                logger.error("merkle check: %s", problem)
            if report.counts:
                logger.error("merkle check: of %d keys %s", report.keys, counted(report))
            return {"merkle_corruption_report": corruption_report(report, parts, now_ms)}

    def start(self, options: ReindexOptions) -> None:
        """Have :meth:`run` reindex. Raises InvalidRequest."""
        if self._busy.locked() or self._options is not None:
            raise InvalidRequest(RUNNING)
        self._options, self._progress = options, Progress()
        self._asked.set()

    def cancel(self) -> bool:
        """Cancel a running reindex; whether there was one. What it repaired stays repaired."""
        if self._job is None:
            return False
        self._job.cancel()
        return True

    async def run(self) -> NoReturn:
        """Reindex whenever :meth:`start` asked, until cancelled. Raises what ends the tenure."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            try:
                async with asyncio.TaskGroup() as tasks:
                    self._job = tasks.create_task(self._reindex(), name="reindex")
            finally:
                self._job = self._options = self._progress = None

    async def _reindex(self) -> None:
        options, progress = self._options, self._progress
        if options is None or progress is None:
            return
        async with self._busy:
            try:
                report = await reindex(self._store.inspected(), options, progress, self._ask_others)
            except (StoreUnavailable, PermissionDenied, NotApplied, Overloaded, Corrupt) as error:
                logger.error("reindex ended early, start it again: %s", error)
                return
            self._braked = report.braked
            logger.info("reindex done: %s", report)
            now_ms = self._clock.time_ms()
            await self._remember(lambda health: IndexHealth(not report.clean, now_ms, now_ms))

    async def _remember(self, change: Callable[[IndexHealth], IndexHealth]) -> None:
        self._health = change(self._health)
        await self._sealed.put(HEALTH_KEY, msgspec.msgpack.encode(self._health))


def counted(report: CheckReport) -> dict[str, int]:
    """How many keys do not hold, by what is wrong with them."""
    return {kind.name.lower(): report.counts[kind] for kind in Kind} | {"stray": report.strays}


def corruption_report(report: CheckReport, parts: Inspected, now_ms: int) -> dict[str, Any]:
    """The contract's shape (1.14). Pages and subpages of all partitions of a tree are merged, as it has no partitions;
    ``partitions`` is ours and has them apart. ``problems`` name no path."""
    trees = {number: _tree(report, parts, cls, kind) for number, (cls, kind) in TREES.items()}
    return {
        "corrupted_root": report.corrupted,
        "corrupted_tree_map": trees,
        "keys_checked": report.keys,
        "findings": counted(report),
        "last_corruption_check_epoch": rfc3339_nanoseconds(now_ms),
        "problems": report.problems[:100],
    }


def _tree(report: CheckReport, parts: Inspected, cls: str, kind: str) -> dict[str, Any]:
    merged: dict[int, set[int]] = {}
    apart: dict[str, Any] = {}
    for (owner, partition), pages in report.pages.items():
        if owner == cls:
            apart[partition] = {str(page): sorted(subpages) for page, subpages in sorted(pages.items())}
            for page, subpages in pages.items():
                merged.setdefault(page, set()).update(subpages)
    tuples = {str(page): {"corrupted": True, "subpages": sorted(merged[page])} for page in sorted(merged)}
    known = not any(damaged[0] == cls for damaged in report.damaged)
    return {
        "tree_type": kind,
        "corrupted_index_tuples_map": tuples or None,
        "corrupted_subtree_root": bool(tuples),
        "root_hash": base64.b64encode(parts.forest.root(cls)).decode() if known else "",
        "partitions": apart,
    }


def rfc3339_nanoseconds(time_ms: int) -> str:
    """UTC, as Go prints a time with nanoseconds."""
    moment = datetime.fromtimestamp(time_ms // 1000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{time_ms % 1000 * 1_000_000:09d}Z"
