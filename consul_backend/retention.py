"""What of the write-ahead log may be collected, and collecting it.

Kept, always: the newest record, and everything from the durable checkpoint's redo point on. Kept within the hard bound
(``HARD_FACTOR`` times the configured bounds): what a known secondary has not acknowledged. Collected: whole segments
all of whose records may go, one fenced ``delete-tree`` each; never between the parts of a large batch and its commit.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from consul_backend.complaints import Complaint
from consul_backend.errors import OutcomeUnknown, PermissionDenied, Unavailable
from consul_backend.failpoint import failpoint
from consul_backend.fenced import Newest, fenced_idempotent
from consul_backend.physical import PhysicalStore
from consul_backend.tenure import Tenure
from consul_backend.txn import DeleteTree
from consul_backend.wal import segment_prefix

log = logging.getLogger("core.retention")

HARD_FACTOR = 4


@dataclass(frozen=True, slots=True)
class RetentionFacts:
    """``sizes`` are bytes by segment, as far as known; ``holds`` the first record each secondary still needs."""

    oldest: int
    head: int
    redo_from: int
    keep_records: int
    keep_bytes: int
    segment_records: int
    sizes: Mapping[int, int]
    holds: Mapping[str, int]
    crossings: Mapping[int, int] = field(default_factory=dict)
    """By segment: the first part, in an older segment, of a large batch that a record of it commits."""


def keep_from(facts: RetentionFacts) -> int:
    """The first record that must stay."""
    soft = _bounded(facts, 1)
    hard = _bounded(facts, HARD_FACTOR)
    held = min(facts.holds.values(), default=soft)
    kept = max(facts.oldest, min(facts.head, facts.redo_from, max(hard, min(soft, held))))
    # A commit record is worth nothing without its parts: whoever has the one must be able to get the others.
    for segment in sorted(facts.crossings, reverse=True):
        if segment >= kept // facts.segment_records:
            kept = min(kept, facts.crossings[segment])
    return max(facts.oldest, kept)


def _bounded(facts: RetentionFacts, factor: int) -> int:
    """The first record within ``factor`` times the bounds of count and bytes; bytes count in whole segments."""
    by_count = facts.head - factor * facts.keep_records + 1
    size = 0
    newest = facts.head // facts.segment_records
    for segment in range(newest, facts.oldest // facts.segment_records - 1, -1):
        size += facts.sizes.get(segment, 0)
        if size > factor * facts.keep_bytes and segment < newest:
            return max(by_count, (segment + 1) * facts.segment_records)
    return by_count


def collectable(facts: RetentionFacts) -> list[int]:
    """Segments, oldest first, that may go as a whole."""
    return list(range(facts.oldest // facts.segment_records, keep_from(facts) // facts.segment_records))


class Collector:
    """Collects now and then. ``facts`` is asked each time; ``gone`` is told a segment *before* it is deleted, so that
    no reader looks for what may be half away."""

    def __init__(
        self,
        physical: PhysicalStore,
        generation: str,
        tenure: Tenure,
        *,
        facts: Callable[[], RetentionFacts],
        gone: Callable[[int], None],
        newest: Newest,
        interval_s: float,
    ) -> None:
        self._physical = physical
        self._generation = generation
        self._tenure = tenure
        self._facts = facts
        self._gone = gone
        self._newest = newest
        self._interval_s = interval_s
        self._doomed: deque[int] = deque()
        self.collected = 0
        self.failures = 0

    async def collect(self) -> int:
        """Delete what may go; returns how many segments. Raises FenceLost, StoreWentBack, Unavailable,
        PermissionDenied, OutcomeUnknown."""
        for segment in collectable(self._facts()):
            self._gone(segment)
            self._doomed.append(segment)
        before = self.collected
        while self._doomed:
            # In order and one after the other: a hole in the log would be damage to whoever recovers next.
            failpoint("collect:before-send")
            prefix = segment_prefix(self._generation, self._doomed[0])
            await fenced_idempotent(self._physical, self._tenure, [DeleteTree(prefix)], self._newest)
            failpoint("collect:after-reply")
            self._doomed.popleft()
            self.collected += 1
        return self.collected - before

    def statistics(self) -> dict[str, int]:
        """Counters and gauges, by the names of their metrics."""
        return {"wal_segments_collected": self.collected, "collect_failures": self.failures}

    async def run(self) -> NoReturn:
        """Collect until cancelled. Raises FenceLost; failures that time or an operator mends are logged."""
        complaint = Complaint()
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.collect()
                complaint.over()
            except (Unavailable, PermissionDenied, OutcomeUnknown) as error:
                self.failures += 1
                if complaint.due(error):
                    log.warning("old log segments could not be collected, trying again later: %s", error)
