"""Sizes are exact to the byte, and each limit holds at its edge."""

import json
import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_backend.errors import TooLarge
from consul_backend.limits import (
    BODY_BYTES_MIN,
    KEY_BYTES_MAX,
    OPS_MIN,
    Limits,
    body_bytes,
    excess,
    fits,
    learnt,
    op_bytes,
    require_body,
    require_fit,
    require_key,
    require_prefix,
    require_shape,
)
from consul_backend.txn import (
    Cas,
    CheckNotExists,
    CheckSession,
    Delete,
    DeleteTree,
    Get,
    Lock,
    Op,
    Set,
    Unlock,
)
from consul_backend.wire import encode_txn
from tests.support.operations import SESSION, ops


@given(st.lists(ops, min_size=1, max_size=20), st.sampled_from(["", "outrider/", "a/b_c/"]))
def test_the_size_is_the_size_on_the_wire(batch: list[Op], prefix: str) -> None:
    body = encode_txn(batch, prefix)
    assert body_bytes(batch, len(prefix)) == len(body)
    assert body_bytes(batch, len(prefix)) == 1 + sum(op_bytes(op, len(prefix)) for op in batch)
    assert [next(iter(op)) for op in json.loads(body)] == ["KV"] * len(batch)


@given(st.lists(ops, min_size=1, max_size=8), st.integers(-2, 2))
def test_the_body_limit_holds_to_the_byte(batch: list[Op], slack: int) -> None:
    limits = Limits(body_bytes_max=BODY_BYTES_MIN, prefix_bytes=3)
    filler = Set("filler", b"")
    rest = limits.body_bytes_max - body_bytes([*batch, filler], 3) + slack
    padded = [*batch, Set("filler" + "x" * (rest % 4), b"v" * (rest // 4 * 3))]
    assert body_bytes(padded, 3) == limits.body_bytes_max + slack
    assert fits(padded, limits) == (slack <= 0)


@pytest.mark.parametrize(("count", "fit"), [(63, True), (64, True), (65, False)])
def test_the_operation_limit(count: int, fit: bool) -> None:
    batch: list[Op] = [CheckNotExists("a")] * count
    assert fits(batch, Limits()) is fit
    if not fit:
        with pytest.raises(TooLarge, match="65 operations, the store takes 64"):
            require_fit(batch, Limits())


@pytest.mark.parametrize("make", [Set, lambda k, v: Cas(k, v, 0), lambda k, v: Lock(k, v, SESSION)])
def test_the_value_limit(make: Callable[[str, bytes], Op]) -> None:
    limits = Limits(value_bytes_max=100)
    assert fits([make("a", b"x" * 100)], limits)
    assert excess([make("a", b"x" * 101)], limits) == "a value of 101 bytes, the store takes 100"


def test_consuls_own_figures() -> None:
    """Measured on Consul 1.8.7: one value of at most 393,174 bytes, 64 equal ones of at most 6,102 (short keys)."""
    limits = Limits()
    assert fits([Set("k", b"x" * 393_174)], limits)
    assert not fits([Set("k", b"x" * 393_200)], limits)
    assert fits([Set(f"k{n:02}", b"x" * 6_102) for n in range(64)], limits)


@pytest.mark.parametrize(
    "key", ["", "/", "a/", "/a", "a//b", "a.b", "a b", "ü", "a\n", "a\nb", 'a"', "a\\", "x" * (KEY_BYTES_MAX + 1)]
)
def test_keys_outside_the_alphabet_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="not a physical key"):
        require_key(key)
    for batch in ([Set(key, b"")], [Get("fine"), Delete(key), Get("fine")]):
        with pytest.raises(ValueError, match="not a physical key"):
            require_shape(batch, Limits())


@pytest.mark.parametrize("prefix", ["/", "a//", "/a", "a.b/", "a\n"])
def test_prefixes_outside_the_alphabet_are_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="not a physical key"):
        require_prefix(prefix)
    with pytest.raises(ValueError, match="not a physical key"):
        require_shape([DeleteTree(prefix)], Limits())


@pytest.mark.parametrize("prefix", ["", "a", "a/", "a/b", "a/b/"])
def test_prefixes_may_end_anywhere(prefix: str) -> None:
    assert require_prefix(prefix) == prefix
    require_shape([DeleteTree(prefix)], Limits())


def test_keys_and_prefixes_have_a_greatest_length() -> None:
    longest = "x" * KEY_BYTES_MAX
    assert require_key(longest) == longest
    assert require_prefix(longest) == longest
    require_shape([Set(longest, b"")], Limits())
    for refused in (lambda: require_prefix(longest + "x"), lambda: require_shape([Get(longest + "x")], Limits())):
        with pytest.raises(ValueError, match="not a physical key"):
            refused()


def test_figures_that_others_count_on() -> None:
    assert (KEY_BYTES_MAX, OPS_MIN, BODY_BYTES_MIN) == (16_384, 4, 16_384)
    assert Limits() == Limits(ops_max=64, body_bytes_max=524_288, value_bytes_max=524_288, prefix_bytes=0)
    assert Limits(value_bytes_max=1).value_bytes_max == 1
    assert op_bytes(Get("a")) == op_bytes(Get("a"), 0)
    assert body_bytes([Get("a"), Set("b", b"x")]) == len(encode_txn([Get("a"), Set("b", b"x")], ""))


def test_all_of_a_transaction_has_to_fit() -> None:
    batch = [Set(f"k{n}", bytes(200_000)) for n in range(2)]
    require_shape(batch, Limits())
    with pytest.raises(TooLarge, match="the store takes 524288"):
        require_fit(batch, Limits())


def test_an_empty_transaction_is_a_bug() -> None:
    with pytest.raises(ValueError, match="at least one"):
        require_fit([], Limits())


def test_a_body_over_the_limit_names_both_numbers() -> None:
    require_body(524_288, Limits())
    with pytest.raises(TooLarge, match="524289 bytes, the store takes 524288"):
        require_body(524_289, Limits())


@pytest.mark.parametrize(
    "values",
    [{"ops_max": OPS_MIN - 1}, {"body_bytes_max": BODY_BYTES_MIN - 1}, {"value_bytes_max": 0}, {"prefix_bytes": -1}],
)
def test_limits_that_leave_no_room_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Limits(**values)


@pytest.mark.parametrize(
    "make", [lambda s: CheckSession("l", s), lambda s: Lock("l", b"", s), lambda s: Unlock("l", b"", s)]
)
@pytest.mark.parametrize("session", ["", "none", str(uuid.UUID(int=0)).upper() + "x", SESSION + "\n"])
def test_an_unfenced_operation_cannot_be_built(make: Callable[[str], Op], session: str) -> None:
    with pytest.raises(ValueError, match="UUID"):
        make(session)


@pytest.mark.parametrize(
    ("text", "ops", "size", "expected"),
    [
        ("Transaction contains too many operations (128 > 64)", 128, 9_000, {"ops_max": 64}),
        ("Request body(600000 bytes) too large, max size: 524288 bytes", 10, 600_000, {"body_bytes_max": 524288}),
        ('Value for key "k" is too large (600000 > 300000 bytes)', 10, 900_000, {"value_bytes_max": 300_000}),
        ("", 100, 9_000, {"ops_max": 64}),
        ("nginx", 10, 400_000, {"body_bytes_max": 200_000}),
        ("", 10, 20_000, {"body_bytes_max": 16 * 1024}),
        ("Transaction contains too many operations (5 > 1)", 5, 500, {"ops_max": 4}),
        ("max size: 9999999999", 5, 400_000, {"body_bytes_max": 399_999}),
        ("Value for key k is too large (5 > 0 bytes)", 5, 500, {"value_bytes_max": 1}),
        ("", 64, 40_000, {"body_bytes_max": 20_000}),
        ("", 65, 40_000, {"ops_max": 64}),
        ("operations (70 > 100)", 70, 500, {"ops_max": 69}),
    ],
)
def test_a_refusal_teaches_what_holds(text, ops, size, expected):
    before = Limits(ops_max=128, body_bytes_max=1 << 20)
    assert learnt(before, ops, size, text) == replace(before, **expected)
