"""Packing batches into transactions: never over a limit, never more cautious than it must be, last write wins."""

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_backend.batching import (
    _GROUPS_KEPT_MAX,
    OVERHEAD_OPS,
    Batch,
    Budget,
    NeedsParts,
    Packing,
    Preparer,
    require_fits_alone,
    take,
)
from consul_backend.errors import TooLarge
from consul_backend.limits import KEY_BYTES_MAX, Limits, base64_bytes, body_bytes, excess
from consul_backend.physical import LOCK_KEY
from consul_backend.position import Position
from consul_backend.txn import Cas, CheckIndex, CheckSession
from consul_backend.wal import Record, Write, record_key

SESSION = "0b8f2c1e-1c3d-4b5a-9a77-3f3a7f3a7f3a"
LIMITS = Limits(ops_max=10, body_bytes_max=20_000, value_bytes_max=20_000, prefix_bytes=9)
ROOMY = Limits(ops_max=10**6, body_bytes_max=10**9, value_bytes_max=10**9, prefix_bytes=9)
KEY = record_key("g1", 2**40, 512)
WRITER = "node-" + "x" * 150

values = st.none() | st.integers(0, 1500).map(lambda size: b"v" * size) | st.just(b"v" * 6000)
writes = st.builds(
    Write,
    st.builds(
        "{}/{}/{}".format,
        st.sampled_from("rlc"),
        st.sampled_from(["core", "mount ü"]),
        st.sampled_from(["a", "b", "c/d", "é", "long/" * 40 + "x", *map(str, range(9))]),
    ),
    values,
)
batches = st.lists(st.lists(writes, min_size=1, max_size=4), max_size=30)
position = st.none() | st.dictionaries(
    st.sampled_from(["performance", "dr"]),
    st.builds(lambda size: Position("s" * size, "g", 1, 2, b"h" * 32), st.integers(0, 30)),
)


def budget(limits=LIMITS):
    return Budget(limits, session=SESSION, record_key=KEY, writer=WRITER)


def batch(entries, limits=LIMITS, positions=None):
    return Batch(Preparer("g1", limits).prepare_all(entries), positions)


def transaction(packing):
    """What the packing becomes, with the longest of everything that can vary."""
    record = Record.build(
        index=2**63 - 1,
        prev_hash=b"p" * 32,
        epoch=2**63 - 1,
        writer=WRITER,
        batch_id=b"b" * 16,
        time_ms=2**63 - 1,
        kind="genesis",
        positions=packing.positions,
        groups=packing.groups(),
    )
    raw = record.encode()
    assert len(raw) <= packing.record_bytes, "the record's size is an upper bound"
    groups = len({entry.group for entry in packing.entries.values()})
    assert packing.record_bytes <= len(raw) + 400 + 80 * groups + 20 * len(packing.entries), "and not far above"
    return [
        CheckSession(LOCK_KEY, SESSION),
        CheckIndex(KEY, 2**64 - 1),
        *(entry.op for entry in packing.entries.values()),
        Cas(KEY, raw, 0),
    ]


@pytest.mark.parametrize("malformed", ["r/p/", "r/pq", "r/p", "r//a"])
def test_a_malformed_key_is_refused_also_when_its_beginning_is_known(malformed):
    preparer = Preparer("g1", LIMITS)
    preparer.prepare(Write("r/p/a", b"v"))
    with pytest.raises(ValueError, match="key"):
        preparer.prepare(Write(malformed, b"v"))


@given(writes)
def test_a_batch_weighs_what_its_values_do_in_the_data_and_in_the_log(write):
    size = len(write.value or b"")
    assert size * 7 // 3 <= batch([write]).size_bytes <= size * 7 // 3 + 1000, "base64 in the one, plain in the other"


def test_what_every_transaction_holds_is_counted_with_the_longest_index() -> None:
    fixed = [CheckSession(LOCK_KEY, SESSION), CheckIndex(KEY, 2**64 - 1), Cas(KEY, b"", 0)]
    assert budget().fixed_body_bytes == body_bytes(fixed, LIMITS.prefix_bytes)


@given(batches, st.lists(position, min_size=30, max_size=30))
def test_everything_is_packed_whole_in_order_and_fits(lists, positions):
    pending = deque()
    for entries, at in zip(lists, positions, strict=False):
        made = batch(entries, positions=at)
        try:
            require_fits_alone(made, budget(), {})
        except TooLarge:
            continue
        pending.append(made)
    expected, state, packed = list(pending), {}, []
    current = {}
    while pending:
        packing = take(pending, budget(), current)
        assert packing.batches, "what fits alone is never stuck"
        assert excess(transaction(packing), LIMITS) is None
        packed += packing.batches
        state |= {name: entry.value for name, entry in packing.entries.items()}
        current = packing.positions
    assert packed == expected
    folded, newest = {}, {}
    for made in expected:
        newest |= made.positions or {}
        folded |= {name: entry.value for name, entry in made.writes.items()}
    assert state == folded
    assert current == newest, "each mode's newest position goes along"


def test_a_record_is_no_larger_than_a_value_may_be():
    small = Limits(ops_max=30, body_bytes_max=60_000, value_bytes_max=2_000, prefix_bytes=9)
    made = [batch([Write(f"r/core/{number}", b"v" * 500)], small) for number in range(9)]
    packing = take(deque(made), budget(small), {})
    assert 1 < len(packing.batches) < 4
    assert packing.record_bytes <= 2_000
    with pytest.raises(TooLarge, match="a record of about"):
        require_fits_alone(
            batch([Write("r/core/a", b"v" * 1_000), Write("r/core/b", b"v" * 1_000)], small), budget(small), {}
        )


@given(batches)
def test_a_packing_stops_only_for_a_reason(lists):
    """The dumb oracle: adding the next batch too would break a limit, allowing for the record's frame bytes."""
    pending = deque(made for made in map(batch, lists) if excess(transaction_of([made]), LIMITS) is None)
    while pending:
        packing = take(pending, budget(), {})
        if not packing.batches:
            pending.popleft()  # within the frame allowance of the limit: refused, never sent
            continue
        if pending:
            both = transaction_of([*packing.batches, pending[0]])
            slack = 400 + 80 * len({entry.group for entry in packing.entries.values()}) + 20 * len(both)
            assert len(both) > LIMITS.ops_max or body_bytes(both, 9) + slack > LIMITS.body_bytes_max


def transaction_of(made):
    packing = Packing(budget(ROOMY), {})
    assert all(packing.add(each) for each in made)
    return transaction(packing)


def test_writes_of_one_key_share_one_operation():
    pending = deque(batch([Write("r/core/hot", b"%d" % number)]) for number in range(500))
    packing = take(pending, budget(), {})
    assert len(packing.batches) == 500
    assert packing.groups() == {("r", "core"): [("hot", b"499")]}
    assert len(transaction(packing)) == OVERHEAD_OPS + 1


def test_a_batch_with_one_key_twice_keeps_the_last():
    made = batch([Write("r/core/a", b"1"), Write("r/core/a", None)])
    assert [entry.value for entry in made.writes.values()] == [None]


def test_a_lone_batch_travels_by_itself():
    pending = deque(batch([Write(f"r/core/{number}", b"")]) for number in range(4))
    pending[1].alone = True
    assert [len(take(pending, budget(), {}).batches) for _ in range(3)] == [1, 1, 2]


def test_the_largest_single_value_fits_to_the_byte():
    """Found by bisection, then confirmed against the store's own arithmetic at both sides."""
    limits = Limits(prefix_bytes=9)

    def fits(size):
        try:
            require_fits_alone(batch([Write("r/core/a", b"v" * size)], limits), budget(limits), {})
        except TooLarge:
            return False
        return True

    size = largest(limits.value_bytes_max, fits)
    assert 190_000 < size < 200_000, "a value travels twice, in base64"
    packing = take(deque([batch([Write("r/core/a", b"v" * size)], limits)]), budget(limits), {})
    assert excess(transaction(packing), limits) is None
    with pytest.raises(TooLarge, match=r"a request of about \d+ bytes, the store takes 524288"):
        require_fits_alone(batch([Write("r/core/a", b"v" * (size + 1))], limits), budget(limits), {})


@pytest.mark.parametrize("room", [7, 1])
def test_too_many_keys_are_refused_with_both_numbers(room):
    limits = replace(LIMITS, ops_max=OVERHEAD_OPS + room)
    made = [batch([Write(f"r/core/{number}", b"") for number in range(count)], limits) for count in (room, room + 1)]
    require_fits_alone(made[0], budget(limits), {})
    with pytest.raises(TooLarge, match=f"{room + 1} keys, one transaction of this store takes {room}"):
        require_fits_alone(made[1], budget(limits), {})


def test_each_limit_is_used_to_the_last_key_and_byte():
    made = batch([Write(f"r/core/{number}", b"v" * 4_000) for number in range(3)], ROOMY)
    packing = Packing(budget(ROOMY), {})
    assert packing.add(made)
    ops = sum(entry.op_bytes for entry in packing.entries.values())
    body = budget(ROOMY).fixed_body_bytes + ops + base64_bytes(packing.record_bytes)
    used = {"ops_max": OVERHEAD_OPS + 3, "value_bytes_max": packing.record_bytes, "body_bytes_max": body}
    assert Packing(budget(replace(ROOMY, **used)), {}).add(made) is True
    for name, size in used.items():
        short = Packing(budget(replace(ROOMY, **used | {name: size - 1})), {})
        assert short.add(made) is False, name
        assert (short.batches, short.entries) == ([], {}), "what does not fit changes nothing"


def largest(below, fits):
    """The largest number under ``below`` that fits, found by bisection; 0 does."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def position_of(size):
    return Position("s" * size, "g", 1, 2, b"h" * 32)


@pytest.mark.parametrize("names", [["r/core/a"], ["r/core/a", "r/core/b"], ["r/core/a", "r/mount ü/b", "l/core/c"]])
@pytest.mark.parametrize("current", [{}, {"dr": position_of(300)}])
@pytest.mark.parametrize("own", [None, {"performance": position_of(9)}, {"performance": position_of(9_000)}])
def test_what_is_let_in_leaves_room_for_a_position_that_arrives_before_it(names, current, own):
    """To the byte: as if it were packed with 512 bytes less."""
    reserved = budget()
    reserved.fixed_record_bytes += 512

    def made(size):
        return batch([Write(name, b"v" * size) for name in names], positions=own)

    def let_in(size):
        try:
            require_fits_alone(made(size), budget(), current)
        except NeedsParts:
            return False
        return True

    size = largest(8_000, lambda size: Packing(reserved, current).add(made(size)))
    assert let_in(size)
    assert not let_in(size + 1)


def test_a_small_write_is_not_let_in_for_its_size_alone():
    with pytest.raises(NeedsParts):
        require_fits_alone(batch([Write("r/core/a", b"")], positions={"dr": position_of(20_000)}), budget(), {})


@pytest.mark.parametrize("name", ["", "r", "r/core", "r/core/", "x/core/a", "/core/a", "r//a"])
def test_malformed_keys_are_refused(name):
    with pytest.raises(ValueError, match="logical key"):
        batch([Write(name, b"")])


def test_a_key_or_value_no_store_takes_is_refused():
    with pytest.raises(TooLarge, match="as stored"):
        batch([Write("r/core/" + "x" * 17_000, b"")])
    assert Preparer("g1", LIMITS).prepare(Write("r/core/a", b"v" * 20_000)).value == b"v" * 20_000
    with pytest.raises(TooLarge, match="a value of 20001 bytes, the store takes 20000"):
        batch([Write("r/core/a", b"v" * 20_001)])


def test_the_longest_key_is_taken_and_one_more_is_not():
    room = KEY_BYTES_MAX - len("g/g1/d/r/p/")
    longest = Preparer("g1", LIMITS).prepare(Write("r/p/" + "a" * room, b""))
    assert len(longest.op.key) == KEY_BYTES_MAX
    with pytest.raises(TooLarge, match=f"{KEY_BYTES_MAX + 1} bytes"):
        Preparer("g1", LIMITS).prepare(Write("r/p/" + "a" * (room + 1), b""))


def test_groups_are_kept_for_many_keys_and_never_mixed_up():
    preparer = Preparer("g1", LIMITS)
    for number in range(5000):  # more than are kept
        made = preparer.prepare(Write(f"r/p{number}/a/b", b"1"))
        assert (made.group, made.path, made.op.key) == (("r", f"p{number}"), "a/b", f"g/g1/d/r/p{number}/a/b")
    assert len(preparer._groups) <= _GROUPS_KEPT_MAX
    again = preparer.prepare(Write("l/p1/a", b"1"))
    assert (again.group, again.path, again.op.key) == (("l", "p1"), "a", "g/g1/d/l/p1/a")
    for bad in ("r/p1", "r/p1/", "x/p1/a", "r//a", "", "/", "rr/p1/a"):
        with pytest.raises(ValueError, match="not a logical key"):
            preparer.prepare(Write(bad, b"1"))
