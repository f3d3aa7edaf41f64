"""What the log makes true, read from its description alone and not with the store's own reader.

A record of a large batch (kinds part, commit, abort, roll) changes nothing by its own entries: the commit record makes
all parts true at once, the roll records say which of them have come to their data keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from consul_backend.wal import Record

Entries = dict[str, bytes | None]


class BadLog(Exception):
    """A record that cannot follow the ones before it."""


@dataclass(slots=True)
class OpenBatch:
    """A large batch: the first of its parts, and what they hold so far."""

    first: int
    parts: list[int] = field(default_factory=list)
    entries: Entries = field(default_factory=dict)


@dataclass(slots=True)
class Fold:
    """The log up to now. ``effects`` has one item per record: what became true with it."""

    effects: list[Entries] = field(default_factory=list)
    versions: dict[str, list[tuple[int, bytes | None]]] = field(default_factory=dict)
    open: dict[bytes, OpenBatch] = field(default_factory=dict)
    unrolled: Entries = field(default_factory=dict)
    """True, and perhaps not in the data keys yet."""
    unrolled_first: int | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)
    """First part and commit record of each large batch that became true."""

    def feed(self, record: Record) -> Entries | None:
        """The next record; returns what its transaction must have done to the data, None for a roll: any of
        ``unrolled``, and all that is left when it says done. Raises BadLog."""
        large = record.header.large
        true: Entries = {}
        data: Entries | None = {}
        if large is None:
            true = data = {write.key: write.value for write in record.writes()}
            for key in true:
                self.unrolled.pop(key, None)
        elif record.header.kind == "part":
            self._part(record, large.id, large.continued)
        elif record.header.kind == "commit":
            batch = self.open.pop(large.id, None)
            if batch is None or batch.parts != [part.index for part in large.parts]:
                raise BadLog(f"record {record.index} commits other parts than were written")
            if self.unrolled:
                raise BadLog(f"record {record.index} commits a batch before the one before it is rolled forward")
            true, self.unrolled, self.unrolled_first = batch.entries, dict(batch.entries), batch.first
            self.spans.append((batch.first, record.index))
        elif record.header.kind == "abort":
            self.open.pop(large.id, None)
        else:
            data = None
        for key, value in true.items():
            self.versions.setdefault(key, []).append((record.index, value))
        self.effects.append(true)
        return data

    def rolled(self) -> None:
        """The batch is in its data keys."""
        self.unrolled = {}
        self.unrolled_first = None

    def _part(self, record: Record, batch_id: bytes, continued: bool) -> None:
        batch = self.open.setdefault(batch_id, OpenBatch(record.index))
        batch.parts.append(record.index)
        for write in record.writes():
            before = batch.entries.get(write.key)
            if continued:
                continued = False
                if before is None or write.value is None:
                    raise BadLog(f"record {record.index} goes on with an entry that did not begin")
                batch.entries[write.key] = before + write.value
            elif write.key in batch.entries:
                raise BadLog(f"record {record.index} repeats an entry of its batch")
            else:
                batch.entries[write.key] = write.value

    def state_at(self, index: int) -> dict[str, bytes]:
        """Every entry as of record ``index``."""
        state: dict[str, bytes] = {}
        for key, versions in self.versions.items():
            for at, value in reversed(versions):
                if at <= index:
                    if value is not None:
                        state[key] = value
                    break
        return state
