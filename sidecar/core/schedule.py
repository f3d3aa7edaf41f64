"""When something has to be done: an index in the store by minute and second; memory holds what is needed of it.

A name that falls due is one small entry, written in the commit that makes it so and deleted in the commit that does
what was due; nothing is lost with a node. A start reads the names of the minutes only. A minute is opened when it
begins, a second is read when it has come: memory does not grow with the number of names, and no single list holds more
of them than were written in about a second. Only this module knows the form of the keys.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from consul_backend.wal import Write
from sidecar.core.keys import LEASES_DUE
from sidecar.core.store_view import SealedStore

MINUTE_S = 60
LISTS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Due:
    """A name whose second (unix time) has come."""

    at_s: int
    name: str

    @property
    def group(self) -> str:
        """Who does it."""
        return self.name.rpartition("-")[0]

    @property
    def subject(self) -> str:
        """The name without its group."""
        return self.name.rpartition("-")[2]

    @property
    def key(self) -> str:
        """The entry that says so: it goes in the commit that does what was due."""
        return due_key(self.at_s, self.name)


def due_name(group: str, name: str) -> str:
    """The name under which ``name`` (without hyphens) is due for ``group``: who does it, and who shares the room."""
    return f"{group}-{name}"


def due_key(at_s: int, name: str) -> str:
    """Where it is written that ``name`` (without slashes) is due at a unix second, 0 or later."""
    return _second_folder(at_s) + name


def due_write(at_s: int, name: str, about: bytes = b"") -> Write:
    """The write that makes ``name`` due, with what its handler wants to read there; :meth:`Schedule.add` follows its
    commit."""
    return Write(due_key(at_s, name), about)


def due_delete(at_s: int, name: str) -> Write:
    """The write that takes it back."""
    return Write(due_key(at_s, name), None)


def _second_folder(at_s: int) -> str:
    return f"{_minute_folder(at_s // MINUTE_S)}{at_s % MINUTE_S:02d}/"


def _minute_folder(minute: int) -> str:
    return f"{LEASES_DUE}{minute:010d}/"


class _Moments:
    """A heap without repetitions."""

    def __init__(self) -> None:
        self._heap: list[int] = []
        self._known: set[int] = set()

    def push(self, moment: int) -> None:
        if moment not in self._known:
            self._known.add(moment)
            heapq.heappush(self._heap, moment)

    def pop(self) -> int:
        moment = heapq.heappop(self._heap)
        self._known.discard(moment)
        return moment

    @property
    def first(self) -> int | None:
        return self._heap[0] if self._heap else None


class Schedule:
    """What is due when. ``now`` returns unix seconds."""

    def __init__(self, sealed: SealedStore, now: Callable[[], float]) -> None:
        self._sealed = sealed
        self._now = now
        self._minutes = _Moments()
        self._seconds = _Moments()

    async def load(self) -> None:
        """Read which minutes have anything. Once, before :meth:`take`."""
        for folder in await self._sealed.list(LEASES_DUE):
            self._minutes.push(int(folder.rstrip("/")))

    def add(self, at_s: int) -> None:
        """Something was written to this second."""
        minute = at_s // MINUTE_S
        if minute * MINUTE_S <= self._now():
            self._seconds.push(at_s)
        else:
            self._minutes.push(minute)

    def invalidate(self, keys: Iterable[str]) -> None:
        """Replication changed these logical keys."""
        for key in keys:
            if key.startswith(LEASES_DUE):
                self._minutes.push(int(key.removeprefix(LEASES_DUE).partition("/")[0]))

    async def take(self) -> list[Due]:
        """The names of the oldest seconds that have come; none where there is no such second. They stay in the store
        until whoever acts on them deletes them; :meth:`add` brings a second back. Raises what the store raises,
        and then forgets nothing."""
        now_s = self._now()
        await self._open_minutes(now_s)
        found = await self._read(self._seconds, now_s, 1, _second_folder)
        return [Due(at_s, name) for at_s, names in sorted(found.items()) for name in names if not name.endswith("/")]

    async def _open_minutes(self, now_s: float) -> None:
        """Those that have begun, but none while an older second waits."""
        while (minute := self._minutes.first) is not None and minute * MINUTE_S <= now_s:
            second = self._seconds.first
            if second is not None and second < minute * MINUTE_S:
                return
            for opened, folders in (await self._read(self._minutes, now_s, MINUTE_S, _minute_folder)).items():
                for folder in folders:
                    self._seconds.push(opened * MINUTE_S + int(folder.rstrip("/")))

    async def _read(
        self, moments: _Moments, now_s: float, unit_s: int, folder: Callable[[int], str]
    ) -> dict[int, list[str]]:
        """Names in the folders of the first of ``moments`` that have come. After a pause there may be many: read one
        by one they would take as long as the pause."""
        taken: list[int] = []
        while len(taken) < LISTS_AT_ONCE and (first := moments.first) is not None and first * unit_s <= now_s:
            # Before the read: what is written to this moment from here on brings it back.
            taken.append(moments.pop())
        try:
            names = await asyncio.gather(*(self._sealed.list(folder(moment)) for moment in taken))
        except BaseException:
            for moment in taken:
                moments.push(moment)
            raise
        return dict(zip(taken, names, strict=True))

    def wait_s(self) -> float | None:
        """Seconds until the next name may be due, None where none is known; not positive where one is."""
        moments = [moment for moment in (self._seconds.first, _start(self._minutes.first)) if moment is not None]
        return min(moments) - self._now() if moments else None


def _start(minute: int | None) -> int | None:
    return None if minute is None else minute * MINUTE_S
