"""How far a merkle sync has come: entries, bytes, rate and what is left. Pure: times are parameters.

The total is known from the first round trip: a partition that is lacking counts whole, and of one that differs in
places as many entries as those places hold on the primary on average. ``done`` counts entries that were received or
found equal. A sync that was cut begins a new count: what it brought is ``kept`` in the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sidecar.replication.diff import Range


@dataclass(frozen=True, slots=True)
class SyncProgress:
    """``done`` of ``total`` entries; 0 of 0 before the diff is known. ``kept``: entries that were here when it began.
    ``eta_s`` None while there is no rate yet."""

    done: int
    total: int
    kept: int = 0
    bytes: int = 0
    seconds: float = 0.0

    @property
    def entries_per_s(self) -> float:
        """Since the diff was known."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds until the rest is here, at the rate so far."""
        return (self.total - self.done) / self.entries_per_s if self.done and self.seconds > 0 else None


class Filling:
    """One sync's count. ``ranges`` are the plan's, in their order; ``there`` the primary's entries by partition."""

    def __init__(self, ranges: Sequence[Range], there: Mapping[str, int], *, kept: int, started_s: float) -> None:
        self._weights = [-(-there.get(part.partition, 0) >> part.depth) for part in ranges]  # rounded up
        self._started_s = started_s
        self._kept = kept
        self._finished = 0
        self._finished_entries = 0
        self._received = 0
        self.total = sum(self._weights)

    def advance(self, ranges: int, entries: int) -> None:
        """``ranges`` of them are complete by now; ``entries`` more were received."""
        self._received += entries
        if ranges > self._finished:
            self._finished_entries += sum(self._weights[self._finished : ranges])
            self._finished, self._received = ranges, 0

    def progress(self, received_bytes: int, now_s: float) -> SyncProgress:
        """As of now."""
        rest = self._weights[self._finished] if self._finished < len(self._weights) else 0
        done = self._finished_entries + min(self._received, rest)
        return SyncProgress(done, self.total, self._kept, received_bytes, max(0.0, now_s - self._started_s))
