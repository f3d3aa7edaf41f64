"""``X-Vault-Index``: what is on the wire, what a forger can do with it, and what it says after failovers."""

import base64
import hmac
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consul_backend.position import Position
from sidecar.replication.history import History, Promotion, extended
from sidecar.replication.session_index import (
    INDEX_BITS,
    BadSessionIndex,
    OwnLog,
    Point,
    SessionIndex,
    SetLog,
    Verdict,
    decode,
    encode,
    epoch_at,
    judge_local,
    judge_replicated,
    name_of,
)

KEY = b"k" * 32
UUID = "6f2d0b1c-6f6a-4f6e-8f2d-9a1d1f0a3b5c"
POINTS = st.builds(Point, st.integers(1, 2**20), st.integers(1, 2**INDEX_BITS - 1))
NAMES = st.binary(min_size=8, max_size=8)
STATES = st.builds(SessionIndex, st.just(UUID), POINTS, NAMES, POINTS | st.just(Point()), NAMES, NAMES)


def as_clients_parse(header: str) -> tuple[str, int, int]:
    """As the published clients do it: the last colon first, the hexadecimal behind it, then exactly four pieces."""
    state, _, mac = base64.b64decode(header, validate=True).decode().rpartition(":")
    assert bytes.fromhex(mac)
    version, cluster, local, replicated = state.split(":")
    assert version == "v1"
    assert cluster
    assert max(int(local), int(replicated)) < 2**64
    return cluster, int(local), int(replicated)


@given(STATES, st.binary(min_size=32, max_size=32))
def test_what_is_written_is_read(state: SessionIndex, key: bytes) -> None:
    header = encode(state, key)
    assert decode(header, key) == state
    assert as_clients_parse(header)[0] == UUID


@given(STATES, st.data())
def test_a_changed_or_foreign_header_is_refused(state: SessionIndex, data: st.DataObject) -> None:
    header = encode(state, KEY)
    with pytest.raises(BadSessionIndex):
        decode(header, b"x" * 32)
    raw = bytearray(base64.b64decode(header))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    changed = base64.b64encode(bytes(raw)).decode()
    try:
        assert decode(changed, KEY) == state, "hexadecimal digits may change their case, and nothing else"
    except BadSessionIndex:
        return


@given(STATES, st.integers(0), st.sampled_from("\n !-_="))
def test_a_header_has_one_spelling(state: SessionIndex, place: int, foreign: str) -> None:
    header = encode(state, KEY)
    place %= len(header)
    with pytest.raises(BadSessionIndex):
        decode(header[:place] + foreign + header[place:], KEY)


@given(st.text(max_size=200))
def test_no_text_does_harm(text: str) -> None:
    for header in (text, base64.b64encode(text.encode()).decode()):
        with pytest.raises(BadSessionIndex):
            decode(header, KEY)


def packed(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def signed(text: str) -> str:
    """A header that says ``text`` about nothing, made by a cluster of the set."""
    names = bytes(24)
    return packed(f"{text}:{(names + hmac.digest(KEY, text.encode() + b':' + names, 'sha256')).hex()}")


def test_a_header_stays_readable_for_other_versions() -> None:
    state = SessionIndex(UUID, Point(2, 3), name_of("store"), Point(1, 900), name_of("set"), name_of("epoch"))
    known = (
        "djE6NmYyZDBiMWMtNmY2YS00ZjZlLThmMmQtOWExZDFmMGEzYjVjOjE3NTkyMTg2MDQ0NDE5OjkwMDo2ZWUwZWI0OTBmZjgzMjEwYWZjOWIz"
        "MWQ5ZjNmMzY0NTgyNGQ4MGQ3MTk4NWYwODJhODI1YjVmN2VkMmU5MmYwMDFlNjI1NjhkYmJjNmQ0NTFlNjYwYjJhNDNlZTllMzliNjI0ZjAx"
        "M2Y1ZjBhMWVj"
    )
    assert encode(state, KEY) == known
    assert decode(known, KEY) == state
    assert as_clients_parse(known) == (UUID, 2**44 + 3, 900)
    assert decode(signed("v1:a:1:2"), KEY) == SessionIndex("a", Point(1, 1), replicated=Point(1, 2))


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("A" * 1025, "longer than 1024"),
        ("A" * 1024, "five pieces"),
        ("", "five pieces"),
        (packed("v1:a:1:2"), "five pieces"),
        (packed("v1:a:1:2:00"), "wrong length"),
        (packed("v1:a:1:2:" + "00" * 57), "wrong length"),
        (packed("v1:a:1:2:" + "00" * 56), "not made by"),
        (signed("v2:a:1:2"), "malformed"),
        (signed("v1::1:2"), "malformed"),
        (signed(f"v1:{'a' * 129}:1:2"), "malformed"),
        (signed("v1:a/b:1:2"), "malformed"),
        (signed("v1:a:-1:2"), "malformed"),
        (signed("v1:a:1:"), "malformed"),
        (signed(f"v1:a:1:{'9' * 21}"), "malformed"),
    ],
)
def test_what_is_too_long_or_of_another_shape_is_refused(header: str, why: str) -> None:
    """Whoever made it."""
    with pytest.raises(BadSessionIndex, match=why):
        decode(header, KEY)


def test_numbers_of_the_first_epoch_are_plain_and_those_of_later_ones_greater() -> None:
    first = encode(SessionIndex(UUID, Point(1, 900), replicated=Point(1, 800)), KEY)
    assert as_clients_parse(first) == (UUID, 900, 800)
    later = encode(SessionIndex(UUID, Point(2, 3), replicated=Point(2, 1)), KEY)
    assert as_clients_parse(later)[1] > 900, "a client that keeps the greater must keep the newer"
    assert as_clients_parse(later)[2] > 800


# ---- judging


def at(generation: str, epoch: int, index: int) -> Position:
    return Position("set", generation, epoch, index, bytes(32))


HISTORY: History = (
    Promotion(1, "e1", generation="A", index=0),
    Promotion(2, "e2", fork=at("A", 1, 100), generation="B", index=70),
)


def seen(number: int, index: int, epoch: str = "", cluster: str = "a", of: str = "set") -> SessionIndex:
    return SessionIndex(
        cluster, Point(), replicated=Point(number, index), set=name_of(of), epoch=name_of(epoch or f"e{number}")
    )


@pytest.mark.parametrize(
    ("wanted", "here", "verdict"),
    [
        (seen(1, 100), at("B", 2, 80), Verdict.PRESENT),
        (seen(1, 101), at("B", 2, 80), Verdict.LOST),
        (seen(1, 100), at("A", 1, 100), Verdict.PRESENT),
        (seen(1, 100), at("A", 1, 99), Verdict.MISSING),
        (seen(2, 80), at("B", 2, 80), Verdict.PRESENT),
        (seen(2, 81), at("B", 2, 80), Verdict.MISSING),
        (seen(2, 80), at("A", 1, 500), Verdict.MISSING),
        (seen(3, 1), at("B", 2, 80), Verdict.MISSING),
        (seen(2, 1, epoch="other branch"), at("B", 2, 80), Verdict.LOST),
        (seen(1, 1, of="other set"), at("B", 2, 80), Verdict.ELSEWHERE),
        (seen(1, 1), None, Verdict.MISSING),
        (SessionIndex("a", Point(1, 5)), at("B", 2, 80), Verdict.PRESENT),
        (seen(2, 81, cluster="b"), at("B", 2, 80), Verdict.MISSING),
    ],
)
def test_a_secondary_judges_by_its_position_and_the_fork_point(
    wanted: SessionIndex, here: Position | None, verdict: Verdict
) -> None:
    assert judge_replicated(wanted, "b", SetLog("set", HISTORY, here), secondary=True) is verdict


@pytest.mark.parametrize(
    ("fork", "verdict"),
    [
        (at("B", 2, 10), Verdict.PRESENT),
        (at("B", 2, 9), Verdict.LOST),
        (at("B", 2, 11), Verdict.PRESENT),
        (None, Verdict.LOST),
    ],
)
def test_of_a_later_promotion_counts_whether_it_had_the_whole_epoch_before(
    fork: Position | None, verdict: Verdict
) -> None:
    """Epoch 2 began with record 10 of its log: whoever had followed up to there has all of epoch 1 that epoch 2 had.
    Without a known fork nothing is promised."""
    history: History = (
        Promotion(1, "e1", generation="A"),
        Promotion(2, "e2", fork=at("A", 1, 50), generation="B", index=10),
        Promotion(3, "e3", fork=fork, generation="C", index=5),
    )
    assert judge_replicated(seen(1, 5), "b", SetLog("set", history, at("C", 3, 9)), secondary=True) is verdict


def test_an_epoch_that_the_history_leaves_out_is_lost() -> None:
    """Whoever was primary then, no later one tells of it."""
    history: History = (HISTORY[0], Promotion(3, "e3", fork=at("A", 1, 70), generation="C", index=5))
    assert judge_replicated(seen(2, 5), "b", SetLog("set", history, at("C", 3, 9)), secondary=True) is Verdict.LOST


@pytest.mark.parametrize(
    "fork",
    [pytest.param(at("X", 2, 90), id="of an epoch not known"), pytest.param(at("Z", 1, 90), id="of another log")],
)
def test_nothing_is_promised_by_a_fork_that_cannot_be_placed(fork: Position) -> None:
    history: History = (HISTORY[0], Promotion(3, "e3", fork=fork, generation="C", index=5))
    assert judge_replicated(seen(1, 5), "b", SetLog("set", history, at("C", 3, 9)), secondary=True) is Verdict.LOST


def test_who_is_in_no_set_cannot_tell() -> None:
    assert judge_replicated(seen(1, 5), "b", None, secondary=False) is Verdict.ELSEWHERE
    assert judge_replicated(seen(1, 5, cluster="b"), "b", None, secondary=False) is Verdict.PRESENT


def local(number: int, index: int, generation: str, cluster: str = "a") -> SessionIndex:
    return SessionIndex(cluster, Point(number, index), name_of(generation))


@pytest.mark.parametrize(
    ("wanted", "own", "verdict"),
    [
        (local(1, 50, "A"), OwnLog("a", "A", 50), Verdict.PRESENT),
        (local(1, 51, "A"), OwnLog("a", "A", 50), Verdict.MISSING),
        (local(1, 51, "A", cluster="b"), OwnLog("a", "A", 50), Verdict.PRESENT),
        (local(1, 100, "A"), OwnLog("a", "B", 80, HISTORY), Verdict.PRESENT),
        (local(1, 101, "A"), OwnLog("a", "B", 80, HISTORY), Verdict.LOST),
        (local(2, 81, "B"), OwnLog("a", "B", 80, HISTORY), Verdict.MISSING),
        (local(2, 80, "B"), OwnLog("a", "A", 500, HISTORY[:1]), Verdict.MISSING),
        (local(1, 5, "X"), OwnLog("a", "A", 50), Verdict.ELSEWHERE),
        (local(2, 5, "X"), OwnLog("a", "A", 50), Verdict.ELSEWHERE),
        (local(1, 5, "X"), OwnLog("a", "B", 80, HISTORY), Verdict.ELSEWHERE),
        (local(2, 5, "X"), OwnLog("a", "B", 80, HISTORY), Verdict.ELSEWHERE),
        (local(3, 5, "X"), OwnLog("a", "B", 80, HISTORY), Verdict.MISSING),
        (local(1, 101, "A"), OwnLog("a", "A", 500, HISTORY), Verdict.LOST),
    ],
)
def test_a_cluster_judges_its_own_log_also_when_it_took_over_an_identity(
    wanted: SessionIndex, own: OwnLog, verdict: Verdict
) -> None:
    assert judge_local(wanted, own) is verdict


def test_without_a_set_it_is_the_first_epoch() -> None:
    assert OwnLog("a", "A", 50).number == 1
    assert OwnLog("a", "B", 80, HISTORY).number == SetLog("set", HISTORY, None).number == 2


def test_a_stream_that_went_on_into_the_next_epoch_is_of_that_epoch() -> None:
    history: History = (
        Promotion(1, "e1", generation="A"),
        Promotion(2, "e2", fork=at("A", 1, 70), generation="A", index=70),
    )
    found = epoch_at(at("A", 1, 120), history), epoch_at(at("A", 1, 70), history)
    assert [one.number for one in found if one is not None] == [2, 1]
    assert judge_replicated(seen(2, 120), "b", SetLog("set", history, at("A", 1, 120)), secondary=True) is (
        Verdict.PRESENT
    )


def test_a_cluster_that_has_met_another_branch_and_not_its_data_yet_has_nothing_of_it() -> None:
    """Found by simulation: two clusters were promoted apart as epoch 2, and one of them comes to follow the other."""
    mine, theirs = Promotion(2, "mine", generation="B", index=5), Promotion(2, "theirs", generation="C", index=3)
    first = Promotion(1, "e1", generation="A")
    standing = at("B", 2, 26)
    assert epoch_at(standing, (first, mine)) == mine
    assert epoch_at(standing, (first, theirs)) is None
    adopted = SetLog("set", (first, theirs), standing)
    assert judge_replicated(seen(2, 4, "theirs"), "b", adopted, secondary=True) is Verdict.MISSING
    assert judge_replicated(seen(2, 4, "mine"), "b", adopted, secondary=True) is Verdict.LOST
    unnamed = SessionIndex("b", Point(), replicated=Point(2, 26), set=name_of("set"))
    assert judge_replicated(unnamed, "x", adopted, secondary=True) is Verdict.LOST


# ---- against a model


@dataclass
class Site:
    """One cluster: the records of its own log by what they hold, what it holds, and where it stands."""

    name: str
    log: list[int] = field(default_factory=list)
    holds: set[int] = field(default_factory=set)
    position: Position | None = None
    history: History = ()

    def commit(self, *writes: int) -> None:
        self.log.append(len(self.log))
        self.holds.update(writes)


class Model:
    """Three clusters of one set, one of them primary; every write is acknowledged with an index."""

    def __init__(self) -> None:
        self.sites = [Site(name) for name in "ABC"]
        self.primary = self.sites[0]
        self.began(None)
        self.tags: list[tuple[int, SessionIndex]] = []

    def began(self, fork: Position | None) -> None:
        site = self.primary
        number = site.history[-1].number + 1 if site.history else 1
        site.history = extended(
            site.history, Promotion(number, f"e{number}", fork=fork, generation=site.name, index=len(site.log))
        )
        site.position = None
        site.commit()

    def write(self) -> None:
        write, newest = len(self.tags), self.primary.history[-1]
        self.primary.commit(write)
        self.tags.append((write, seen(newest.number, len(self.primary.log), newest.id, cluster=self.primary.name)))

    def follow(self, site: Site) -> None:
        """Bring ``site`` up to the primary's head, by whichever way."""
        if site is self.primary:
            return
        site.history = self.primary.history
        site.holds = set(self.primary.holds)
        site.commit()
        site.position = at(self.primary.name, self.primary.history[-1].number, len(self.primary.log))

    def promote(self, site: Site) -> None:
        if site is self.primary or site.position is None:
            return
        number = self.primary.history[-1].number
        site.history = tuple(one for one in self.primary.history if one.number <= site.history[-1].number)
        if site.history[-1].number != number:
            return  # it has not met the newest primary: a fork, which the set does not go on from
        self.primary = site
        self.began(site.position)


STEPS = st.lists(st.tuples(st.sampled_from(["write", "follow", "promote"]), st.integers(0, 2)), max_size=60)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_present_means_held_and_lost_means_not_held_through_any_failovers(steps: list[tuple[str, int]]) -> None:
    model = Model()
    for what, number in steps:
        site = model.sites[number]
        {"write": model.write, "follow": lambda s=site: model.follow(s), "promote": lambda s=site: model.promote(s)}[
            what
        ]()
    for site in model.sites:
        primary = site is model.primary
        if not primary and (site.position is None or site.history != model.primary.history):
            continue
        here = at(site.name, site.history[-1].number, len(site.log)) if primary else site.position
        view = SetLog("set", site.history, here)
        for write, tag in model.tags:
            verdict = judge_replicated(tag, f"own-{site.name}", view, secondary=not primary)
            if verdict is Verdict.PRESENT:
                assert write in site.holds, (tag, site)
            if verdict is Verdict.LOST:
                assert write not in model.primary.holds, (tag, site)
            if primary:
                assert (verdict is Verdict.PRESENT) == (write in site.holds)


def test_the_model_notices_a_judge_that_forgets_the_fork_point() -> None:
    model = Model()
    model.follow(model.sites[1])
    model.write()
    model.promote(model.sites[1])
    ((write, tag),) = model.tags
    view = SetLog("set", model.primary.history, at("B", 2, len(model.primary.log)))
    assert judge_replicated(tag, "x", view, secondary=False) is Verdict.LOST
    forgetful = replace(view, history=tuple(replace_fork(one) for one in view.history))
    assert judge_replicated(tag, "x", forgetful, secondary=False) is Verdict.PRESENT
    assert write not in model.primary.holds


def replace_fork(one: Promotion) -> Promotion:
    fork = one.fork and at(one.fork.generation, one.fork.epoch, 10**6)
    return Promotion(one.number, one.id, one.time_ms, fork, one.generation, one.index)
