"""What clients did and what they were told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

NEVER = float("inf")


@dataclass(slots=True, eq=False)
class Write:
    """One batch. ``outcome``: ``ok`` (at record ``index``), ``fail`` (certainly not applied) or ``unknown``."""

    number: int
    client: str
    entries: Mapping[str, bytes | None]
    invoked_s: float
    completed_s: float = NEVER
    outcome: str = "unknown"
    index: int = 0


@dataclass(slots=True, eq=False)
class Read:
    """One key that was read; only answered reads are kept."""

    client: str
    key: str
    value: bytes | None
    invoked_s: float
    completed_s: float


@dataclass(slots=True, eq=False)
class Listing:
    """One folder that was listed; ``names`` are those of keys below ``prefix``."""

    client: str
    prefix: str
    names: frozenset[str]
    invoked_s: float
    completed_s: float


@dataclass(slots=True)
class History:
    """Everything, in order of invocation."""

    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    listings: list[Listing] = field(default_factory=list)

    def until(self, stop_s: float) -> History:
        """What was over by then; a write that was not is unknown, whatever it was told later."""
        writes = [
            replace(write, outcome="unknown", completed_s=NEVER, index=0)
            if write.outcome == "ok" and write.completed_s > stop_s
            else write
            for write in self.writes
            if write.invoked_s <= stop_s
        ]
        return History(
            writes,
            [read for read in self.reads if read.completed_s <= stop_s],
            [listing for listing in self.listings if listing.completed_s <= stop_s],
        )

    def acknowledged(self) -> int:
        """Writes that were acknowledged."""
        return sum(write.outcome == "ok" for write in self.writes)
