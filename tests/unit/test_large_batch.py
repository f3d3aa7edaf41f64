"""Large batches as values: parts cut from entries, entries put together from parts, and what the log says is true."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_backend.batching import GROUP_FRAME_BYTES, Preparer
from consul_backend.errors import TooLarge
from consul_backend.large_batch import (
    START,
    VALUE_ALLOWANCE_BYTES,
    Assembly,
    BatchBounds,
    Replay,
    crossing,
    in_order,
    next_part,
    part_ref,
)
from consul_backend.limits import Limits
from consul_backend.listing import corrected
from consul_backend.wal import GENESIS_PREV, CorruptRecord, Large, Record, Write
from tests.support.store import committed_writes

ID = b"i" * 16


class Log:
    """A chained log, record by record."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def add(self, kind, writes=(), *, groups=None, large=None) -> Record:
        found: dict[tuple[str, str], list[tuple[str, bytes | None]]] = {}
        for write in writes:
            cls, partition, path = write.key.split("/", 2)
            found.setdefault((cls, partition), []).append((path, write.value))
        index = len(self.records) + 1
        record = Record.build(
            index=index,
            prev_hash=self.records[-1].chain_hash if self.records else GENESIS_PREV,
            epoch=1,
            writer="node",
            batch_id=index.to_bytes(16, "big"),
            time_ms=index,
            kind=kind,
            positions={},
            groups=groups if groups is not None else found,
            large=large,
        )
        self.records.append(Record.decode(record.encode()))
        return self.records[-1]


def prepared(writes):
    preparer = Preparer("g", Limits())
    return in_order({write.key: preparer.prepare(write, any_size=True) for write in writes}.values())


def frame_bytes(entry):
    return entry.record_bytes - len(entry.value or b"")


def group_bytes(group):
    return GROUP_FRAME_BYTES + len(group[1].encode())


def require_full(entries, cursor, plan, size):
    """A part is within its bound and stops only for a reason: counted entry by entry, from the sizes they came with."""
    by_name = {(entry.group, entry.path): entry for entry in entries}
    held = [(by_name[group, path], piece) for group, found in plan.groups.items() for path, piece in found]
    used = sum(map(group_bytes, plan.groups)) + sum(frame_bytes(entry) + len(piece or b"") for entry, piece in held)
    assert used <= size, "a part keeps its bound"
    at, offset = plan.after
    assert [entry for entry, _ in held] == list(entries[cursor.entry : at + (offset > 0)])
    if offset:
        assert used == size, "a value is cut only where the part is full"
        assert len(held) == 1 or len(held[-1][1]) >= size // 4, "and the piece is worth it"
    elif at < len(entries):
        entry = entries[at]
        room = size - used - frame_bytes(entry) - (0 if entry.group in plan.groups else group_bytes(entry.group))
        assert room < min(len(entry.value or b""), size // 4), "the next one would have fitted"


def parts(entries, size, log=None, batch_id=ID):
    """The batch as records of a log."""
    log = log or Log()
    made, cursor = [], START
    while cursor.entry < len(entries):
        plan = next_part(entries, cursor, size)
        assert plan.after > cursor, "every part brings something"
        require_full(entries, cursor, plan, size)
        made.append(log.add("part", groups=plan.groups, large=Large(batch_id, plan.continued)))
        cursor = plan.after
    return made


batches = st.dictionaries(
    st.builds("{}/{}/{}".format, st.sampled_from("rl"), st.sampled_from("pq"), st.text("ab/é", min_size=1, max_size=6)),
    st.one_of(st.none(), st.binary(max_size=40), st.integers(0, 3000).map(lambda n: bytes(n % 251 for n in range(n)))),
    min_size=1,
    max_size=30,
)


@given(batches, st.integers(200, 5000))
def test_parts_put_together_are_the_batch(batch, size):
    entries = prepared([Write(key, value) for key, value in batch.items()])
    made = parts(entries, size)
    assembly = Assembly()
    for record in made:
        assert sum(map(len, record.bodies)) <= size, "the sizes that entries come with are upper bounds"
        assembly.add(record)
    assert {write.key: write.value for write in assembly.writes()} == batch
    replicated = Assembly()
    for record in made:
        if "r" in part_ref(record).classes:
            replicated.add(record.only({"r"}))
    found = {write.key: write.value for write in replicated.writes()}
    assert found == {key: value for key, value in batch.items() if key.startswith("r/")}


def test_a_value_larger_than_every_part_goes_on_and_on():
    value = random.Random(1).randbytes(10_000)
    made = parts(prepared([Write("r/p/big", value), Write("r/p/a", b"1"), Write("r/q/z", None)]), 1000)
    assert sum(record.header.large.continued for record in made) >= 9
    replay = Replay()
    for record in made:
        assert replay.feed(record) == []
    late = Replay()
    assert [late.feed(record) for record in made[1:]] == [[]] * (len(made) - 1), "begun before what is read"
    assert late.firsts == []
    with pytest.raises(TooLarge, match="name alone"):
        next_part(prepared([Write("r/p/" + "n" * 500, b"")]), START, 400)


def test_what_just_fits_is_no_piece():
    (entry,) = entries = prepared([Write("r/p/a", b"v" * 300)])
    size = entry.record_bytes + GROUP_FRAME_BYTES + len("p")
    whole, cut = next_part(entries, START, size), next_part(entries, START, size - 1)
    assert (whole.after, whole.groups[entry.group]) == ((1, 0), [("a", b"v" * 300)])
    assert (cut.after, cut.groups[entry.group]) == ((0, 299), [("a", b"v" * 299)])
    first = next_part(entries, START, size - 299)
    assert (first.after, first.continued, first.groups[entry.group]) == ((0, 1), False, [("a", b"v")])
    rest = next_part(entries, first.after, size)
    assert (rest.after, rest.continued, rest.groups[entry.group]) == ((1, 0), True, [("a", b"v" * 299)])
    with pytest.raises(TooLarge, match="name alone"):
        next_part(entries, START, size - 300)


def test_a_deletion_that_just_fits_comes_along():
    deletions = prepared([Write("r/p/a", None), Write("r/p/b", None)])
    size = sum(map(frame_bytes, deletions)) + group_bytes(("r", "p"))
    assert [next_part(deletions, START, size - less).after for less in (0, 1)] == [(2, 0), (1, 0)]


def test_parts_that_do_not_fit_together_are_refused():
    made = parts(prepared([Write("r/p/big", b"v" * 3000)]), 1000)
    with pytest.raises(CorruptRecord, match="did not begin"):
        Assembly().add(made[1])
    assembly = Assembly()
    assembly.add(made[0])
    with pytest.raises(CorruptRecord, match="repeats"):
        assembly.add(made[0])
    log = Log()
    first = log.add("part", [Write("r/p/a", b"1")], large=Large(ID))
    foreign = part_ref(first)
    log.add("commit", large=Large(ID, parts=(type(foreign)(first.index, b"x" * 32, "r"),)))
    for found in (log.records, log.records[1:]):
        with pytest.raises(CorruptRecord, match="not those it names"):
            list(committed_writes(found))


def test_a_deletion_has_no_rest():
    log = Log()
    log.add("part", [Write("r/p/a", None)], large=Large(ID))
    log.add("part", [Write("r/p/a", b"rest")], large=Large(ID, continued=True))
    log.add("part", [Write("r/p/b", b"begun")], large=Large(b"j" * 16))
    log.add("part", [Write("r/p/b", None)], large=Large(b"j" * 16, continued=True))
    for found in (log.records[:2], log.records[2:]):
        with pytest.raises(CorruptRecord, match="did not begin"):
            list(committed_writes(found))


@pytest.mark.parametrize(
    ("kind", "writes", "large"),
    [
        ("part", [], Large(ID)),
        ("part", [Write("r/p/a", b"")], None),
        ("part", [Write("r/p/a", b"")], Large(b"short")),
        ("part", [Write("r/p/a", b"")], Large(ID, done=True)),
        ("data", [Write("r/p/a", b"")], Large(ID)),
        ("commit", [], Large(ID)),
        ("commit", [Write("r/p/a", b"")], Large(ID)),
        ("abort", [], Large(ID, continued=True)),
        ("roll", [Write("r/p/a", b"")], Large(ID)),
    ],
)
def test_a_record_says_what_its_kind_needs_and_no_more(kind, writes, large):
    with pytest.raises(CorruptRecord, match="has a bad"):
        Log().add(kind, writes, large=large)


STEPS = {
    "idle": ["small", "begin"],
    "pending": ["small", "part", "part", "commit", "abort"],
    "rolling": ["small", "roll", "done"],
}
"""What may come next: one batch at a time, as the store writes them."""

steps = st.lists(
    st.tuples(
        st.integers(0, 29), st.sampled_from([f"r/p/{name}" for name in "abc"]), st.none() | st.binary(max_size=3)
    ),
    max_size=40,
)


@given(steps)
def test_replay_agrees_with_an_oracle_that_keeps_whole_batches(steps):
    """The oracle is a dictionary and a list."""
    log, true, pending, refs, rolling, ids = Log(), {}, None, [], None, itertools.count(1)
    batch_id, spans = b"", []
    for number, key, value in steps:
        possible = STEPS["pending" if pending is not None else "rolling" if rolling is not None else "idle"]
        what = possible[number % len(possible)]
        if what == "small":
            log.add("data", [Write(key, value)])
            true[key] = value
            if rolling is not None:
                rolling.pop(key, None)
        elif what == "begin":
            pending, refs, batch_id = {}, [], next(ids).to_bytes(16, "big")
        elif what == "part" and key not in pending:
            pending[key] = value
            refs.append(part_ref(log.add("part", [Write(key, value)], large=Large(batch_id))))
        elif what == "commit" and pending:
            log.add("commit", large=Large(batch_id, parts=tuple(refs)))
            true |= pending
            rolling, pending = dict(pending), None
            spans.append((refs[0].index, len(log.records)))
        elif what == "abort":
            log.add("abort", large=Large(batch_id))
            pending = None
        elif what in {"roll", "done"}:
            log.add("roll", large=Large(batch_id, done=what == "done"))
            rolling = None if what == "done" else rolling
    replay, folded = Replay(), {}
    for record in log.records:
        for write in replay.feed(record):
            folded[write.key] = write.value
    assert folded == true
    assert [*replay.open] == ([batch_id] if pending else [])
    left = replay.unrolled
    assert ({name: write.value for name, write in left.entries.items()} if left else None) == rolling
    assert replay.spans == spans
    assert replay.firsts == ([refs[0].index] if pending else []) + ([spans[-1][0]] if rolling is not None else [])


def test_what_a_later_record_replaced_is_not_rolled_any_more():
    """A roll forward after a takeover would bring the older value back."""
    log = Log()
    made = log.add("part", [Write("r/p/a", b"1"), Write("r/p/b", b"1")], large=Large(ID))
    log.add("commit", large=Large(ID, parts=(part_ref(made),)))
    log.add("data", [Write("r/p/a", b"later")])
    replay = Replay()
    for record in log.records:
        replay.feed(record)
    assert replay.unrolled is not None
    assert list(replay.unrolled.entries) == ["r/p/b"]


def test_bounds_name_size_and_limit():
    bounds = BatchBounds(2, 100)
    bounds.require([Write("r/p/a", b"v" * (100 + VALUE_ALLOWANCE_BYTES)), Write("r/p/b", None)])
    bounds.require([Write("r/p/a", b"v" * (100 + VALUE_ALLOWANCE_BYTES)), Write("r/p/b", b"")])
    with pytest.raises(TooLarge, match="3 entries in one batch, the limit is 2"):
        bounds.require([Write("r/p/a", b"")] * 3)
    with pytest.raises(TooLarge, match="values of 101 bytes in one batch, the limit is 100"):
        bounds.require([Write("r/p/a", b"v" * (101 + VALUE_ALLOWANCE_BYTES))])


def test_spans_that_cross_segments():
    assert crossing([(1, 7), (9, 17), (10, 30), (25, 31)], 8) == {2: 9, 3: 10}


names = st.text("ab", min_size=1, max_size=2)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)


@given(st.sets(paths), st.dictionaries(paths, st.booleans()))
async def test_names_with_an_overlay_are_those_of_what_is_true(stored, changes):
    def below(keys, prefix):
        found = set()
        for key in keys:
            if key.startswith(prefix):
                name, slash, _ = key[len(prefix) :].partition("/")
                found.add(name + slash)
        return found

    async def read(prefix):
        return sorted(below(stored, prefix))

    true = (stored - {key for key, exists in changes.items() if not exists}) | {
        key for key, exists in changes.items() if exists
    }
    for prefix in ("", "a/", "a/b/"):
        here = {key: exists for key, exists in changes.items() if key.startswith(prefix)}
        assert await corrected(read, prefix, await read(prefix), here) == below(true, prefix)
