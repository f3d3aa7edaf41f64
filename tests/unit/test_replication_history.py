"""Where histories part, what a promotion says before it is done, and that what is reported lost is what is lost."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

import msgspec
import pytest

from consul_backend.limits import Limits
from consul_backend.position import Position
from consul_backend.wal import GENESIS_PREV
from plugin_api.errors import InvalidRequest, Unavailable
from sidecar.replication.forecast import Standing, forecast, objections, require_safe
from sidecar.replication.history import (
    HISTORY_MAX,
    Epoch,
    Parting,
    Promotion,
    epoch_of,
    extended,
    fork_between,
    history_of_data,
    parting,
)
from sidecar.replication.intake import Budget, Intake
from sidecar.replication.lost_writes import LostHead, LostWrites
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from sidecar.replication.outgoing import frames_of
from sidecar.replication.protocol import NONE_POSITION
from tests.support.replication_cluster import Store


def at(generation: str, index: int) -> Position:
    return Position("set", generation, 1, index, bytes(32))


ONE = Promotion(1, "a", generation="A", index=1)
B2 = Promotion(2, "b", fork=at("A", 100), generation="B", index=40)
C2 = Promotion(2, "c", fork=at("A", 90), generation="C", index=70)
D3 = Promotion(3, "d", fork=at("B", 60), generation="D", index=5)
E3 = Promotion(3, "e", fork=at("C", 75), generation="E", index=30)


def test_forks_are_seen_at_any_number() -> None:
    assert fork_between(1, "a", (ONE, B2)) == ""
    assert fork_between(2, "b", (ONE, B2)) == ""
    assert "fork" in fork_between(2, "c", (ONE, B2))
    assert "fork" in fork_between(2, "c", (ONE, B2, D3)), "also when the primary has gone on since"
    assert "older" in fork_between(3, "d", (ONE, B2))
    assert "none of the primary's" in fork_between(2, "b", (ONE, D3)), "an epoch that the primary's history leaves out"
    assert fork_between(0, "", (ONE,)) == "", "whoever has no data yet follows anybody"
    assert fork_between(7, "", (ONE,)) == ""
    assert fork_between(7, "x", ()) == "", "and nobody knows of a fork where no epoch is known"
    assert fork_between(1, "x", (B2, D3)) == "", "what is forgotten cannot be told"


def test_how_an_epoch_is_stored_and_sent_stays() -> None:
    whole = Promotion(2, "b", 5, Position("set", "A", 1, 100, b"h" * 32), "B", 40)
    packed = msgspec.json.encode(whole)
    assert packed == b'[2,"b",5,["set","A",1,100,"' + b"aGho" * 10 + b'aGg="],"B",40]'
    assert msgspec.json.decode(packed, type=Promotion) == whole
    assert msgspec.json.encode(msgspec.json.decode(b'[2,"b"]', type=Promotion)) == b'[2,"b",0,null,"",0]'


def test_the_newest_epoch_is_the_epoch() -> None:
    assert epoch_of((ONE, B2)) == Epoch(2, "b")


def test_data_is_of_the_epochs_before_until_its_position_moves() -> None:
    """A demoted primary has met its successor, and nothing of it is here yet."""
    assert history_of_data((ONE, B2), (ONE,), at("A", 120)) == (ONE,)
    assert history_of_data((ONE, B2), (ONE,), at("B", 50)) == (ONE, B2)
    assert history_of_data((ONE, B2), (), at("A", 120)) == (ONE, B2), "nobody else was met before"
    for mixed in (None, NONE_POSITION):
        assert history_of_data((ONE, B2), (ONE,), mixed) == (ONE, B2), "a mix has something of both"
    assert history_of_data((ONE, B2), (ONE,), at("A", 1)) == (ONE,)
    assert history_of_data((), (ONE,), at("A", 120)) == ()
    unnamed = (ONE, Promotion(2, "b"))
    assert history_of_data(unnamed, (ONE,), at("A", 120)) == unnamed, "of which store it is was not said"


def test_a_history_is_bounded() -> None:
    history: tuple[Promotion, ...] = (ONE,)
    for number in range(2, 200):
        history = extended(history, Promotion(number, str(number)))
    assert len(history) == HISTORY_MAX
    assert history[-1].number == 199


@pytest.mark.parametrize(
    ("mine", "theirs", "generation", "common", "lost"),
    [
        pytest.param((ONE,), (ONE, B2), "A", [(100, None)], [(101, None)], id="the old primary"),
        pytest.param((ONE,), (ONE, B2, D3), "A", [(100, None)], [(101, None)], id="the old primary, two epochs late"),
        pytest.param((ONE,), (ONE, B2), "S", [(9, at("A", 100))], [(9, at("A", 101))], id="a secondary ahead"),
        pytest.param((ONE,), (ONE,), "S", [(9, at("A", 500))], [], id="the same epoch"),
        pytest.param((ONE, B2), (ONE, B2, D3), "B", [(60, at("A", 100))], [(61, at("A", 100))], id="second failover"),
        pytest.param((ONE, C2), (ONE, B2), "C", [(70, at("A", 90))], [(71, at("A", 90))], id="a fork that gives up"),
        pytest.param((ONE, B2), (ONE, C2), "B", [(30, at("A", 90))], [(31, at("A", 91)), (41, at("A", 90))], id="fork"),
        pytest.param((ONE, B2), (ONE,), "B", [(40, at("A", 100))], [(41, at("A", 100))], id="back to the first"),
        pytest.param(
            (ONE, C2, E3),
            (ONE, B2),
            "E",
            [(20, at("A", 90)), (30, at("C", 70))],
            [(25, at("C", 71)), (31, at("C", 70))],
            id="primary after a primary that is not common",
        ),
        pytest.param(
            (ONE, C2, E3), (ONE, B2), "S", [(5, at("C", 70))], [(6, at("C", 71)), (7, at("E", 31))], id="its follower"
        ),
        pytest.param(
            (ONE, B2), (ONE, C2), "S", [(5, at("A", 90))], [(6, at("A", 95)), (7, at("B", 41))], id="follower"
        ),
    ],
)
def test_where_a_log_leaves_the_new_primary(
    mine: tuple[Promotion, ...],
    theirs: tuple[Promotion, ...],
    generation: str,
    common: list[tuple[int, Position | None]],
    lost: list[tuple[int, Position | None]],
) -> None:
    where = parting(mine, theirs, generation)
    assert where.known
    assert [where.holds(*point) for point in common] == [True] * len(common)
    assert [where.holds(*point) for point in lost] == [False] * len(lost)
    assert where.parts == bool(lost)


def test_without_a_common_epoch_nothing_is_claimed() -> None:
    for mine, theirs in (((ONE,), (Promotion(1, "x"),)), ((ONE,), (ONE, Promotion(2, "blind")))):
        where = parting(mine, theirs, "A")
        assert (where.known, where.parts) == (False, True)


@pytest.mark.parametrize(("mine", "theirs"), [((), (ONE,)), ((ONE,), ()), ((), ())])
def test_who_has_no_history_parts_from_nobody(mine: tuple[Promotion, ...], theirs: tuple[Promotion, ...]) -> None:
    where = parting(mine, theirs, "A")
    assert (where.known, where.parts) == (True, False)


SAFE = Standing(True, True, 100, 100, 1.0, 0.5, connected=False)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({}, None, ""),
        ({"attached": False, "seen": 500, "complete": False}, None, ""),
        ({"alive_at": "https://us:8201"}, InvalidRequest, "alive and reachable at https://us:8201"),
        ({"seen": 107}, Unavailable, "7 records of the primary are known and not applied"),
        ({"seen": 107, "alive_at": "https://us:8201"}, InvalidRequest, "alive and reachable"),
        ({"complete": False}, InvalidRequest, "no complete copy"),
        ({"lag_max_s": 0.4}, InvalidRequest, "last had everything 0.5 s ago"),
        ({"lag_max_s": 0.6}, None, ""),
        ({"lag_max_s": 5.0, "complete_age_s": None}, InvalidRequest, "an unknown time"),
    ],
)
def test_what_forbids_a_promotion(changes: dict[str, object], error: type[Exception] | None, text: str) -> None:
    from dataclasses import replace

    standing = replace(SAFE, **changes)  # type: ignore[arg-type]  # fields by name
    shown = forecast(standing)
    assert shown["objections"] == objections(standing)
    if error is None:
        require_safe(standing)
        assert shown["objections"] == []
        return
    with pytest.raises(error, match=text):
        require_safe(standing)
    assert shown["known_missing_records"] == max(standing.seen - standing.applied, 0)
    assert shown["known_missing_range"] == ([101, standing.seen] if standing.seen > 100 else [])


def test_a_forecast_does_not_claim_to_know_what_it_cannot() -> None:
    from dataclasses import replace

    assert "and so how much, is not known" in forecast(replace(SAFE, heard_age_s=None))["may_be_lost"]
    assert "its last 0.5 s that never arrived" in forecast(SAFE)["may_be_lost"]


def write_some(store: Store, dice: random.Random, commits: int) -> None:
    """Random commits of every class; deletions too."""
    for _ in range(commits):
        keys = {f"{dice.choice('rrlc')}/p{dice.randint(0, 2)}/{dice.randint(0, 30)}" for _ in range(dice.randint(1, 4))}
        store.write(*((key, None if dice.random() < 0.2 else dice.randbytes(8)) for key in sorted(keys)))


@dataclass
class Promoted:
    """A secondary that was promoted by force: what it has, at which position, and how many writes that took."""

    data: dict[str, bytes]
    position: Position
    writes: int


def follow(primary: Store, mode: Mode, applied: int, dice: random.Random) -> Promoted:
    """What a secondary holds that took the primary's records up to ``applied`` as they are shipped and applied."""
    start = Position("set", primary.generation, 1, 0, GENESIS_PREV)
    intake, found = Intake(mode, start, Budget.of(Limits())), Promoted({}, start, 0)
    frames = [frame for frame, _ in frames_of(primary.log[:applied], mode.classes)]
    while frames or intake.pending_bytes:
        for _ in range(dice.randint(1, 5)):
            if frames:
                intake.accept(frames.pop(0))
        while (batch := intake.take()) is not None:
            found.position = batch.position
            found.writes += sum(len(step.writes) for step in batch.steps)
            put(found.data, ((write.key, write.value) for write in batch.writes))
    return found


def put(data: dict[str, bytes], writes: Iterable[tuple[str, bytes | None]]) -> None:
    for key, value in writes:
        data.pop(key, None)
        if value is not None:
            data[key] = value


async def forced_promotion(seed: int, mode: Mode, *, planted: int = 0) -> bool:
    """The primary dies with a tail that the promoted secondary never got, and comes back. Whether what it then reports
    as lost is what is lost: with it, and with nothing less, the secondary would have what the primary had. ``planted``:
    by how much the fork is told wrong."""
    dice = random.Random(seed)
    primary = Store("A")
    write_some(primary, dice, dice.randint(1, 40))
    applied = dice.randint(1, primary.head.index)
    write_some(primary, dice, dice.randint(0, 15))
    promoted = follow(primary, mode, applied, dice)
    fork = msgspec.structs.replace(promoted.position, index=promoted.position.index + planted)
    theirs = (
        Promotion(1, "a", generation=primary.generation),
        Promotion(2, "b", fork=fork, generation="generation-of-B", index=7),
    )
    collected = dice.random() < 0.3
    primary.oldest_index = dice.randint(1, primary.head.index) if collected else 1
    lost = LostWrites(mode, primary, primary)
    before = primary.of_classes(mode.classes)
    everything = [
        (record.index, write.key, write.value)
        for record in primary.log
        for write in record.writes()
        if write.key[0] in mode.classes
    ]
    where = parting(theirs[:1], theirs, primary.generation)
    head = await lost.gather(where, set_id="set", epoch=1, new_epoch=Epoch(2, "b"), now_ms=1)
    pages = range(1, head.pages + 1) if head else ()
    entries = [(one.index, one.key, one.value) for page in pages if head for one in await lost.page(head, page)]
    short = primary.oldest_index > applied + 1
    really = everything[promoted.writes :]
    if short:  # the log does not reach back to the fork: said, and what it still has is reported
        really = [one for one in really if one[0] >= primary.oldest_index]
    else:
        put(promoted.data, ((key, value) for _, key, value in entries))
        if promoted.data != before:
            return False
    if head is None:
        return not really and not short
    counted = (head.entries, head.records, head.at_least) == (len(really), len({one[0] for one in really}), short)
    ends = not really or (head.first, head.last) == (really[0][0], really[-1][0])
    return entries == really and counted and ends


@pytest.mark.parametrize("mode", [PERFORMANCE, DR], ids=lambda mode: mode.name)
@pytest.mark.parametrize("first", range(0, 500, 50))
async def test_what_is_reported_lost_is_lost_and_nothing_else(first: int, mode: Mode) -> None:
    """A thousand forced promotions: equal to the entry."""
    wrong = [seed for seed in range(first, first + 50) if not await forced_promotion(seed, mode)]
    assert wrong == []


@pytest.mark.parametrize("mode", [PERFORMANCE, DR], ids=lambda mode: mode.name)
@pytest.mark.parametrize("planted", [-1, 1])
async def test_a_fork_that_is_one_record_off_is_noticed(planted: int, mode: Mode) -> None:
    """The control. A record that is wrongly counted, or not, and has nothing that travels makes no difference."""
    caught = sum([not await forced_promotion(seed, mode, planted=planted) for seed in range(50)])
    assert caught > 25


@pytest.mark.parametrize("mode", [PERFORMANCE, DR], ids=lambda mode: mode.name)
async def test_a_walk_that_begins_one_record_late_is_noticed(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    start = LostWrites._start

    async def late(self: LostWrites, where: Parting) -> object:
        reach = await start(self, where)
        return replace(reach, start=reach.start + 1)

    monkeypatch.setattr(LostWrites, "_start", late)
    assert sum([not await forced_promotion(seed, mode) for seed in range(50)]) > 25


@pytest.mark.parametrize("seed", range(100))
async def test_a_secondary_ahead_reports_exactly_what_it_applied_beyond(seed: int) -> None:
    """Its own log holds what it applied, several of the primary's records in one; one that straddles counts as lost."""
    dice = random.Random(seed)
    mine = Store("S")
    upstream = 1
    rows: list[tuple[int, int]] = []
    for _ in range(dice.randint(1, 40)):
        upstream += dice.randint(1, 4)
        mine.positions = {"dr": Position("set", "generation-of-A", 1, upstream, bytes(32))}
        mine.write((f"r/m/{dice.randint(0, 9)}", dice.randbytes(4)))
        rows.append((mine.head.index, upstream))
    fork_index = dice.randint(1, upstream + 3)
    history = (Promotion(1, "a"), Promotion(2, "b", fork=at("generation-of-A", fork_index), generation="B", index=3))
    lost = LostWrites(DR, mine, mine)
    where = parting(history[:1], history, mine.generation)
    head = await lost.gather(where, set_id="set", epoch=1, new_epoch=Epoch(2, "b"), now_ms=1)
    beyond = [index for index, position in rows if position > fork_index]
    assert (head.records if head else 0) == len(beyond)
    if head and beyond:
        assert (head.first, head.last) == (beyond[0], beyond[-1])


async def head_of(mine: Store, mode: Mode, fork_index: int) -> LostHead | None:
    """What ``mine`` reports on meeting a primary that left the log of A after that record."""
    history = (Promotion(1, "a"), Promotion(2, "b", fork=at("generation-of-A", fork_index), generation="B", index=3))
    lost = LostWrites(mode, mine, mine)
    where = parting(history[:1], history, mine.generation)
    return await lost.gather(where, set_id="set", epoch=1, new_epoch=Epoch(2, "b"), now_ms=1)


async def test_what_a_sync_in_pieces_brought_past_the_fork_is_reported_as_uncertain() -> None:
    """Its records have no position: they belong to the one at which the sync ended."""
    mine = Store("S")
    mine.positions = {"dr": at("generation-of-A", 40)}
    mine.write(("r/m/common", b"1"))
    mine.positions = {"dr": NONE_POSITION}
    mine.write(("r/m/fetched", b"2"))
    mine.positions = {"dr": at("generation-of-A", 60)}
    mine.write(("r/m/streamed", b"3"))
    assert await head_of(mine, DR, 60) is None
    head = await head_of(mine, DR, 50)
    assert head is not None
    assert (head.records, head.certain, head.at_least) == (2, False, False)
    mine.positions = {"dr": NONE_POSITION}
    mine.write(("r/m/unfinished", b"4"))
    head = await head_of(mine, DR, 60)
    assert head is not None
    assert (head.records, head.certain) == (1, False), "whatever a sync that never ended brought"


async def test_a_promoted_mirror_reports_by_the_log_that_it_mirrored() -> None:
    """It holds its performance set's data from a DR stream: there, and nowhere else, it says how far."""
    mine = Store("S")
    for index in (40, 50, 60):
        mine.positions = {"dr": at("generation-of-A", index)}
        mine.write((f"r/m/{index}", b"1"))
    head = await head_of(mine, PERFORMANCE, 45)
    assert head is not None
    assert (head.records, head.certain) == (2, True)


def test_a_promotion_is_stored_and_sent_as_an_array_of_its_fields():
    """Others read it, of other versions too: fields are added at its end."""
    raw = msgspec.msgpack.encode(Promotion(2, "e2", 5, None, "B", 7))
    assert raw == msgspec.msgpack.encode([2, "e2", 5, None, "B", 7])
