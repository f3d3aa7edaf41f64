"""The simulation's own parts: its loop, its faults, and its checkers on histories made by hand."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

import pytest

from consul_backend.errors import Conflict, OutcomeUnknown, Unavailable
from consul_backend.physical import LOCK_KEY
from consul_backend.testing import SimulatedConsul
from consul_backend.testing_faults import FAULTS, Call, Journey, faulty_journey
from consul_backend.txn import Cas, CheckIndex, Lock, Set
from tests.sim.checkers import Exemption, landed, linearizable
from tests.sim.fold import Fold
from tests.sim.history import History, Listing, Read, Write
from tests.sim.loop import Deadlock, Livelock, NodeClock, Process, SimLoop

KEY = "r/p/k/1"


def run(work, *, shuffle: bool = False):
    loop = SimLoop(1, shuffle=shuffle)
    try:
        return loop.run_until_complete(work(loop))
    finally:
        loop.close()


# -- the loop


def test_hours_pass_in_no_time() -> None:
    async def work(loop: SimLoop) -> float:
        await asyncio.sleep(36_000)
        return loop.time()

    started_s = time.perf_counter()
    assert run(work) == 36_000
    assert time.perf_counter() - started_s < 1


def test_waiting_for_nothing_is_a_deadlock() -> None:
    async def work(loop: SimLoop) -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock):
        run(work)


def test_being_busy_for_ever_is_a_livelock() -> None:
    async def work(loop: SimLoop) -> None:
        async def turn() -> None:
            await asyncio.sleep(0)

        while True:
            await turn()

    with pytest.raises(Livelock):
        run(work)


def test_a_paused_process_stands_still_and_then_goes_on() -> None:
    async def work(loop: SimLoop) -> list[float]:
        process, seen = Process("p"), []

        async def tick() -> None:
            for _ in range(3):
                await asyncio.sleep(1)
                seen.append(loop.time())

        task = process.spawn(tick())
        await asyncio.sleep(1.5)
        process.paused = True
        await asyncio.sleep(10)
        loop.unpause(process)
        await task
        return seen

    assert run(work) == [1.0, 11.5, 12.5]


def test_a_killed_process_runs_no_finally() -> None:
    async def work(loop: SimLoop) -> list[str]:
        process, seen = Process("p"), []

        async def live() -> None:
            try:
                await asyncio.sleep(1)
            finally:
                seen.append("unwound")

        task = process.spawn(live())
        await asyncio.sleep(0.5)
        process.killed = True
        await asyncio.sleep(10)
        before = list(seen)
        loop.bury(process)
        await asyncio.wait([task])
        return before

    assert run(work) == []


def test_the_seed_decides_the_order() -> None:
    async def work(loop: SimLoop) -> list[int]:
        seen: list[int] = []

        async def one(number: int) -> None:
            await asyncio.sleep(1)
            seen.append(number)

        await asyncio.gather(*(one(number) for number in range(8)))
        return seen

    assert run(work) == list(range(8))
    assert run(work, shuffle=True) == run(work, shuffle=True) != list(range(8))


# -- faults of the simulated Consul


class OneFault:
    """The first transaction has this fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def journey(self, call: Call) -> Journey:
        usual = Journey(0.001, 0.001)
        if call.verb != "txn" or not self.fault:
            return usual
        fault, self.fault = self.fault, ""
        return faulty_journey(fault, random.Random(1), usual=usual, late_s_max=1.0)

    def connected(self, node: str) -> bool:
        return True


LEFT: dict[str, bytes | None] = {
    "request:refused": None,
    "request:lost": None,
    "request:reset": None,
    "request:late": b"1",
    "request:duplicated": b"1",
    "answer:lost": b"1",
    "answer:reset": b"1",
}
"""What is stored at the end; where an answer came, another write followed it, which only a duplicate undoes."""

ANSWER = {
    "request:refused": Unavailable,
    "request:lost": OutcomeUnknown,
    "request:reset": OutcomeUnknown,
    "request:late": OutcomeUnknown,
    "answer:lost": OutcomeUnknown,
    "answer:reset": OutcomeUnknown,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_does_what_its_name_says(fault: str) -> None:
    async def work(loop: SimLoop) -> tuple[bytes | None, type[BaseException] | None]:
        consul = SimulatedConsul(NodeClock(loop, rate=1.0, started_s=0.0), network=OneFault(fault))
        client = consul.client("n")
        await client.open()
        answer: type[BaseException] | None = None
        try:
            await client.txn([Set("a", b"1")])
        except (Unavailable, OutcomeUnknown) as error:
            answer = type(error)
        else:
            await client.txn([Set("a", b"after the answer")])
        await asyncio.sleep(20)
        consul.close()
        item = consul.table.read("a")
        return item.value if item is not None else None, answer

    assert run(work) == (LEFT.get(fault, b"after the answer"), ANSWER.get(fault))


def test_a_late_duplicate_is_stopped_by_the_guards_of_a_commit() -> None:
    async def work(loop: SimLoop) -> None:
        consul = SimulatedConsul(NodeClock(loop, rate=1.0, started_s=0.0))
        client = consul.client("n")
        await client.open()
        first = (await client.txn([Cas("wal/1", b"1", 0)])).modify_index
        commit = [CheckIndex("wal/1", first), Set("data", b"x"), Cas("wal/2", b"2", 0)]
        await client.txn(commit)
        with pytest.raises(Conflict):
            await client.txn(commit)
        consul.close()

    run(work)


def test_no_session_ends_while_there_is_no_leader() -> None:
    async def work(loop: SimLoop) -> None:
        consul = SimulatedConsul(NodeClock(loop, rate=1.0, started_s=0.0))
        client, other = consul.client("a"), consul.client("b")
        await client.open()
        await other.open()
        session = await client.create_session("s", beat_ttl_s=1.0, lock_delay_s=0.0)
        await client.txn([Lock(LOCK_KEY, b"", session)])
        consul.change_leader(5.0)
        await asyncio.sleep(4.9)
        held = consul.table.read(LOCK_KEY)
        assert held is not None
        assert held.session == session
        with pytest.raises((Unavailable, TimeoutError)):
            await asyncio.wait_for(other.create_session("t", beat_ttl_s=1.0, lock_delay_s=0.0), 0.05)
        await asyncio.sleep(0.2)
        item = await other.get(LOCK_KEY, consistent=True)
        assert item is not None
        assert not item.session
        consul.close()

    run(work)


# -- checkers


class FakeWitness:
    """A log of single-key records: record 1 + n sets :data:`KEY` to the n-th value."""

    def __init__(self, values: Sequence[bytes | None]) -> None:
        self.fold = Fold()
        self.fold.effects = [{}, *({KEY: value} for value in values)]
        self.fold.versions = {KEY: [(index, value) for index, value in enumerate(values, 2)]}


def write(
    number: int, value: bytes | None, start_s: float, stop_s: float, outcome: str = "ok", index: int = 0
) -> Write:
    return Write(number, "c", {KEY: value}, start_s, stop_s, outcome, index or number + 1)


def judge(history: History, values: Sequence[bytes | None], exempt: Sequence[Exemption] = ()) -> list[str]:
    witness = FakeWitness(values)
    at, found = landed(history, witness)  # type: ignore[arg-type]  # it has what the checkers look at
    found += linearizable(history, witness, at, exempt)  # type: ignore[arg-type]  # as above
    return [violation.checker for violation in found]


def test_an_ordinary_history_passes() -> None:
    history = History(
        [write(1, b"1", 0, 1), write(2, b"2", 2, 3), write(3, None, 6, 7)],
        [
            Read("c", KEY, None, 0, 0.5),
            Read("d", KEY, b"1", 2.5, 2.6),
            Read("d", KEY, b"2", 4, 5),
            Read("d", KEY, None, 8, 9),
        ],
        [Listing("c", "r/p/k/", frozenset({"1"}), 4, 5), Listing("c", "r/p/k/", frozenset(), 8, 9)],
    )
    assert judge(history, [b"1", b"2", None]) == []


@pytest.mark.parametrize(
    ("read", "stale"),
    [
        (Read("d", KEY, b"1", 4, 5), True),
        (Read("d", KEY, None, 1.5, 1.6), True),
        (Read("d", KEY, b"2", 1.2, 1.5), True),
        (Read("d", KEY, b"never", 4, 5), True),
        (Read("d", KEY, b"1", 2.9, 5), False),
        (Read("d", KEY, b"2", 2.1, 2.2), False),
    ],
)
def test_a_stale_or_future_read_is_seen(read: Read, stale: bool) -> None:
    history = History([write(1, b"1", 0, 1), write(2, b"2", 2, 3)], [read])
    assert judge(history, [b"1", b"2"]) == (["P3"] if stale else [])
    assert judge(history, [b"1", b"2"], [Exemption(0, 10)]) == []


def test_reads_that_go_back_are_seen() -> None:
    history = History([write(1, b"1", 0, 1), write(2, b"2", 2, 9)])
    history.reads = [Read("d", KEY, b"2", 3, 4), Read("e", KEY, b"1", 5, 6)]
    assert judge(history, [b"1", b"2"]) == ["P3"]
    history.reads.reverse()
    assert judge(history, [b"1", b"2"]) == ["P3"], "the order of recording does not matter"


def test_a_listing_that_lacks_what_is_there_is_seen() -> None:
    history = History([write(1, b"1", 0, 1)], [], [Listing("c", "r/p/k/", frozenset(), 2, 3)])
    assert judge(history, [b"1"]) == ["P3"]


@pytest.mark.parametrize(
    ("attempt", "values", "found"),
    [
        (write(1, b"1", 0, 1, "ok"), [b"1"], []),
        (write(1, b"1", 0, 1, "ok"), [b"other"], ["P1"]),
        (write(1, b"1", 0, 1, "ok"), [b"1", b"1"], ["P1", "P1"]),
        (write(1, b"1", 0, 1, "ok", index=9), [b"1"], ["P1"]),
        (write(1, b"1", 0, 1, "fail"), [b"1"], ["P1"]),
        (write(1, b"1", 0, 1, "fail"), [b"other"], []),
        (write(1, b"1", 0, 1, "unknown"), [b"1"], []),
        (write(1, b"1", 0, 1, "unknown"), [b"other"], []),
        (write(1, b"1", 0, 1, "unknown"), [b"1", b"1"], ["P1"]),
    ],
)
def test_what_was_told_is_held_against_the_log(attempt: Write, values: list[bytes], found: list[str]) -> None:
    assert [checker for checker in judge(History([attempt]), values) if checker == "P1"] == found


def test_a_batch_that_is_there_in_part_is_seen() -> None:
    attempt = Write(1, "c", {KEY: b"1", "r/p/k/2": b"2"}, 0, 1, "ok", 2)
    assert judge(History([attempt]), [b"1"]) == ["P1"]


def test_checking_is_linear() -> None:
    """A hundred thousand operations on one key in a few seconds."""
    count = 50_000
    history = History([write(n, b"%d" % n, n, n + 0.5) for n in range(1, count)])
    history.reads = [Read("d", KEY, b"%d" % n, n + 0.6, n + 0.7) for n in range(1, count)]
    started_s = time.perf_counter()
    assert judge(history, [b"%d" % n for n in range(1, count)]) == []
    assert time.perf_counter() - started_s < 20
