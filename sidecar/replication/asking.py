"""Entries that a primary lost, asked back from whoever follows it.

A secondary holds the same ciphertext under the same logical keys. What it answers is taken only if it has the digest
that the primary's own index names, so that nothing wrong can come back this way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from consul_backend.errors import BackendError
from consul_backend.merkle import entry_digest
from sidecar.replication.protocol import Ask, ProtocolViolation, Told
from sidecar.replication.store_view import SecondaryStore

KEYS_MAX = 128
"""Of one question."""
ANSWER_BYTES_MAX = 1024 * 1024
"""Values of one answer; a value that does not fit beside the others is left out and asked for again."""
ANSWER_TIMEOUT_S = 10.0

Wanted = tuple[str, bytes]
"""A logical key and the digest of its entry."""


class Questions:
    """What one stream's primary asked and was not told yet. ``wake`` is called when there is something to send."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._number = 0
        self._waiting: dict[int, asyncio.Future[Sequence[tuple[int, bytes]]]] = {}
        self._unsent: deque[Ask] = deque()

    async def ask(self, wanted: Sequence[Wanted], timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, bytes]:
        """The values of those of ``wanted`` (at most KEYS_MAX) that the peer has; none when it does not answer."""
        self._number += 1
        number = self._number
        self._waiting[number] = told = asyncio.get_running_loop().create_future()
        self._unsent.append(Ask(number, list(wanted)))
        self._wake()
        try:
            async with asyncio.timeout(timeout_s):
                values = await told
        except TimeoutError:
            return {}
        finally:
            del self._waiting[number]
        return dict(_checked(wanted, values))

    def next(self) -> Ask | None:
        """The oldest question that was not sent yet."""
        while self._unsent:
            ask = self._unsent.popleft()
            if ask.number in self._waiting:
                return ask
        return None

    def told(self, answer: Told) -> None:
        """An answer came; one that nobody waits for any more is dropped."""
        waiting = self._waiting.get(answer.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer.values)

    def close(self) -> None:
        """Nothing more will be told."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(())


def _checked(wanted: Sequence[Wanted], values: Iterable[tuple[int, bytes]]) -> Iterable[tuple[str, bytes]]:
    for place, value in values:
        if place < len(wanted):
            key, digest = wanted[place]
            if entry_digest(key, value) == digest:
                yield key, value


async def answer_to(store: SecondaryStore, classes: Collection[str], ask: Ask) -> Told:
    """What this secondary has of what is asked for. Raises ProtocolViolation for keys that do not travel."""
    values: list[tuple[int, bytes]] = []
    room = ANSWER_BYTES_MAX
    for place, (key, digest) in enumerate(ask.wanted):
        cls, _, rest = key.partition("/")
        if cls not in classes or "/" not in rest:
            raise ProtocolViolation("a key was asked for that does not travel in this mode of replication")
        if store.forest.digest_of(key) != digest:
            continue
        try:
            value = await store.get(key)
        except BackendError:
            continue  # what this cluster cannot read now, it does not have
        if value is not None and len(value) <= room:
            room -= len(value)
            values.append((place, value))
    return Told(ask.number, values)


async def ask_all(streams: Iterable[Questions], wanted: Mapping[str, bytes]) -> dict[str, bytes]:
    """Ask one stream after the other for what the ones before did not have."""
    found: dict[str, bytes] = {}
    for questions in streams:
        missing = [(key, digest) for key, digest in wanted.items() if key not in found]
        while missing:
            asked, missing = missing[:KEYS_MAX], missing[KEYS_MAX:]
            told = await questions.ask(asked)
            found |= told
            if told:
                missing = [one for one in asked if one[0] not in found] + missing
    return found
