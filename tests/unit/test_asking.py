"""Entries asked back from a secondary: what is taken, what is left out, and what ends the connection."""

from __future__ import annotations

import asyncio

import pytest

from consul_backend.errors import Unavailable
from consul_backend.merkle import Forest, entry_digest
from sidecar.replication import asking
from sidecar.replication.asking import Questions, answer_to, ask_all
from sidecar.replication.protocol import (
    Ask,
    ProtocolViolation,
    Told,
    decode_from_primary,
    decode_from_secondary,
    encode,
)


class Store:
    """A secondary's store in a dict."""

    def __init__(self, entries: dict[str, bytes]) -> None:
        self.entries = entries
        self.forest = Forest()
        self.forest.apply((key, entry_digest(key, value)) for key, value in entries.items())
        self.unreadable: set[str] = set()

    async def get(self, key: str) -> bytes | None:
        if key in self.unreadable:
            raise Unavailable("away")
        return self.entries.get(key)


def wanted(*keys: str, value: bytes = b"v") -> list[tuple[str, bytes]]:
    return [(key, entry_digest(key, value)) for key in keys]


async def test_a_secondary_answers_with_what_has_the_digest():
    store = Store({"r/p/a": b"v", "r/p/b": b"other", "r/p/c": b"v"})
    store.unreadable = {"r/p/c"}
    ask = Ask(7, wanted("r/p/a", "r/p/b", "r/p/c", "r/p/none"))
    assert decode_from_primary(encode(ask)) == ask
    told = await answer_to(store, "r", ask)
    assert told == Told(7, [(0, b"v")])
    assert decode_from_secondary(encode(told)) == told


@pytest.mark.parametrize("key", ["l/p/a", "c/core/seal", "r", "r/p", "x/y/z", ""])
async def test_a_key_that_does_not_travel_ends_the_connection(key: str):
    with pytest.raises(ProtocolViolation, match="does not travel"):
        await answer_to(Store({}), "r", Ask(1, [(key, bytes(20))]))


async def test_an_answer_is_bounded_and_the_rest_is_asked_for_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(asking, "ANSWER_BYTES_MAX", 250)
    entries = {f"r/p/{n}": bytes(100) for n in range(7)} | {"r/p/huge": bytes(300)}
    store = Store(entries)
    woken = asyncio.Event()
    questions = Questions(woken.set)
    rounds = 0

    async def secondary() -> None:
        nonlocal rounds
        while True:
            await woken.wait()
            woken.clear()
            while (ask := questions.next()) is not None:
                rounds += 1
                questions.told(await answer_to(store, "r", ask))

    task = asyncio.create_task(secondary())
    found = await ask_all([questions], {key: entry_digest(key, value) for key, value in entries.items()})
    task.cancel()
    assert found == {key: value for key, value in entries.items() if key != "r/p/huge"}
    assert rounds == 5, "two at a time, and once more for what never fits"


async def test_a_value_without_the_digest_a_stranger_place_and_a_late_answer_are_dropped():
    questions = Questions(lambda: None)
    asked = asyncio.create_task(questions.ask(wanted("r/p/a", "r/p/b")))
    await asyncio.sleep(0)
    number = questions.next().number
    questions.told(Told(number + 1, [(0, b"v")]))
    questions.told(Told(number, [(0, b"forged"), (1, b"v"), (9, b"v")]))
    assert await asked == {"r/p/b": b"v"}
    questions.told(Told(number, [(0, b"v")]))


async def test_nobody_is_waited_for_without_bound():
    questions = Questions(lambda: None)
    assert await questions.ask(wanted("r/p/a"), timeout_s=0.01) == {}
    assert questions.next() is None, "what nobody waits for is not sent any more"
    waiting = asyncio.create_task(questions.ask(wanted("r/p/a")))
    await asyncio.sleep(0)
    questions.close()
    assert await waiting == {}


async def test_the_next_secondary_is_asked_for_what_the_first_does_not_have():
    stores = [Store({"r/p/a": b"v"}), Store({"r/p/a": b"v", "r/p/b": b"v"})]
    asked: list[list[str]] = []

    def stream(store: Store) -> Questions:
        def wake() -> None:
            ask = questions.next()
            asked.append([key for key, _ in ask.wanted])

            async def reply() -> None:
                questions.told(await answer_to(store, "r", ask))

            tasks.append(asyncio.create_task(reply()))

        questions = Questions(wake)
        return questions

    tasks: list[asyncio.Task[None]] = []
    found = await ask_all([stream(store) for store in stores], dict(wanted("r/p/a", "r/p/b")))
    assert found == {"r/p/a": b"v", "r/p/b": b"v"}
    assert asked == [["r/p/a", "r/p/b"], ["r/p/b"], ["r/p/b"]]
