"""Shamir sharing, the unseal attempt and the seal record."""

from __future__ import annotations

import base64
import itertools
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugin_api.errors import InvalidRequest
from sidecar.core.seal import (
    InvalidShares,
    SealConfig,
    UnsealAttempt,
    _invert,
    _multiply,
    _scale,
    combine,
    decode_share,
    split,
)
from sidecar.core.seal_record import (
    BadSealRecord,
    SealRecord,
    WrongKey,
    make_seal_record,
    open_root_key,
    root_fingerprint,
)


def slow_multiply(left: int, right: int) -> int:
    """The field as a textbook has it: polynomial multiplication, then reduction by 0x11b."""
    product = 0
    for bit in range(8):
        if right >> bit & 1:
            product ^= left << bit
    for bit in range(15, 7, -1):
        if product >> bit & 1:
            product ^= 0x11B << (bit - 8)
    return product


def slow_shares(secret: bytes, coefficients: list[bytes], points: list[int]) -> list[bytes]:
    shares = []
    for x in points:
        ys = bytearray()
        for position, constant in enumerate(secret):
            y, power = constant, 1
            for coefficient in coefficients:
                power = slow_multiply(power, x)
                y ^= slow_multiply(coefficient[position], power)
            ys.append(y)
        shares.append(bytes(ys) + bytes([x]))
    return shares


def test_field_against_the_textbook():
    # FIPS 197 section 4.2: {57} x {83} = {c1}, {57} x {13} = {fe}.
    assert _multiply(0x57, 0x83) == 0xC1
    assert _multiply(0x57, 0x13) == 0xFE
    for left in range(256):
        for right in (0, 1, 2, 3, 0x1B, 0x53, 0x80, 0xCA, 0xFF):
            assert _multiply(left, right) == slow_multiply(left, right)


def test_every_element_but_zero_has_an_inverse():
    assert _multiply(0x53, _invert(0x53)) == 1
    assert _invert(0x53) == 0xCA
    assert all(_multiply(element, _invert(element)) == 1 for element in range(1, 256))
    assert _invert(0) == 0


@given(st.binary(min_size=1, max_size=40), st.integers(0, 255))
def test_packed_scaling_is_scaling_of_each_byte(data: bytes, factor: int):
    packed = _scale(int.from_bytes(data, "big"), factor, len(data))
    assert packed.to_bytes(len(data), "big") == bytes(slow_multiply(byte, factor) for byte in data)


def test_known_vector():
    # f(x) = s + a x + b x^2 byte by byte, computed by the textbook field above with fixed coefficients.
    secret = bytes.fromhex("00112233445566778899aabbccddeeff")
    coefficients = [bytes.fromhex("0f1e2d3c4b5a69788796a5b4c3d2e1f0"), bytes.fromhex("a5" * 16)]
    shares = slow_shares(secret, coefficients, [1, 7, 0x53, 0xFF])
    assert shares[0].hex() == "aaaa aaaa aaaa aaaa aaaa aaaa aaaa aaaa 01".replace(" ", "")
    for three in itertools.combinations(shares, 3):
        assert combine(three) == secret
    for two in itertools.combinations(shares, 2):
        assert combine(two) != secret


def test_known_vector_with_the_format_of_vault():
    # 2-of-3 over a 4-byte secret, y bytes then x, worked out by hand: f(x) = s + a x.
    secret, slope = bytes([1, 2, 3, 4]), bytes([0x10, 0x20, 0x40, 0x80])
    shares = [
        bytes([0x01 ^ 0x10, 0x02 ^ 0x20, 0x03 ^ 0x40, 0x04 ^ 0x80, 1]),
        bytes([0x01 ^ 0x20, 0x02 ^ 0x40, 0x03 ^ 0x80, 0x04 ^ 0x1B, 2]),
        bytes([0x01 ^ 0x30, 0x02 ^ 0x60, 0x03 ^ 0xC0, 0x04 ^ 0x9B, 3]),
    ]
    assert shares == slow_shares(secret, [slope], [1, 2, 3])
    assert all(combine(pair) == secret for pair in itertools.permutations(shares, 2))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_threshold_of_shares_restores_the_secret(data: st.DataObject):
    secret = data.draw(st.binary(min_size=1, max_size=33))
    count = data.draw(st.integers(2, 12))
    threshold = data.draw(st.integers(2, count))
    shares = split(secret, count, threshold, os.urandom)
    assert all(len(share) == len(secret) + 1 for share in shares)
    assert len({share[-1] for share in shares}) == count
    assert 0 not in {share[-1] for share in shares}
    chosen = data.draw(st.permutations(shares))
    assert combine(chosen[:threshold]) == secret
    assert combine(chosen) == secret


def test_fewer_shares_than_the_threshold_say_nothing():
    secret = b"\x00" * 32
    # Two pairs whose coordinates have the same product combine to the same bytes: six of a hundred draws have such.
    shares = split(secret, 5, 3, random.Random(1).randbytes)
    pairs = {combine(pair) for pair in itertools.combinations(shares, 2)}
    assert secret not in pairs
    assert len(pairs) == 10


def test_two_shares_are_compatible_with_every_secret():
    # Perfect secrecy, checked whole in one byte: one share of a 2-of-n leaves all 256 secrets equally possible.
    share = bytes([0x42, 9])
    secrets = {combine([share, bytes([other, 17])]) for other in range(256)}
    assert len(secrets) == 256


def test_the_most_shares_there_can_be():
    secret = os.urandom(32)
    shares = split(secret, 255, 255, os.urandom)
    assert combine(shares) == secret
    assert combine(shares[:-1]) != secret


def test_one_share_is_the_secret():
    secret = os.urandom(32)
    assert split(secret, 1, 1, os.urandom) == [secret]
    assert combine([secret]) == secret


@pytest.mark.parametrize(
    "shares",
    [
        [],
        [b"\x01\x00", b"\x02\x01"],  # x = 0 would be the secret itself
        [b"\x01\x05", b"\x02\x05"],  # two values for one x
        [b"\x01\x05", b"\x01\x05"],
        [b"\x01\x02\x03", b"\x01\x02"],
        [b"\x01", b"\x02"],
    ],
)
def test_shares_that_cannot_be_combined(shares: list[bytes]):
    with pytest.raises(InvalidShares):
        combine(shares)


@pytest.mark.parametrize(
    ("shares", "threshold", "text"),
    [
        (0, 0, "shares must be at least one"),
        (-1, 1, "shares must be at least one"),
        (256, 3, "shares must be less than 256"),
        (5, 0, "threshold must be at least one"),
        (3, 5, "threshold cannot be larger than shares"),
        (5, 1, "threshold must be greater than one for multiple shares"),
    ],
)
def test_seal_configurations_that_are_refused(shares: int, threshold: int, text: str):
    with pytest.raises(InvalidRequest) as caught:
        SealConfig(shares, threshold).validate()
    assert str(caught.value) == f"invalid seal configuration: {text}"


@pytest.mark.parametrize(("shares", "threshold"), [(1, 1), (2, 2), (255, 2), (255, 255)])
def test_the_least_and_the_greatest_seal_configurations(shares: int, threshold: int):
    SealConfig(shares, threshold).validate()


def test_two_shares_of_which_one_would_do_are_refused():
    with pytest.raises(InvalidRequest, match="greater than one for multiple shares"):
        SealConfig(2, 1).validate()


def test_coordinates_are_drawn_until_there_are_enough_distinct_ones():
    drawn = iter([bytes([1, 2, 3]), bytes([0, 9, 9]), bytes([9, 0, 7]), bytes([8, 6, 5])])
    shares = split(b"xyz", 3, 2, lambda length: next(drawn)[:length])
    assert shares == slow_shares(b"xyz", [bytes([1, 2, 3])], [9, 7, 8])


def test_a_secret_is_split_only_by_a_seal_configuration_that_is_allowed():
    with pytest.raises(InvalidRequest, match="greater than one for multiple shares"):
        split(b"secret", 2, 1, os.urandom)


@pytest.mark.parametrize("length", range(16, 34))
def test_decode_share_takes_hex_and_base64(length: int):
    share = os.urandom(length)
    assert decode_share(share.hex()) == share
    assert decode_share(share.hex().upper()) == share
    assert decode_share(base64.b64encode(share).decode()) == share


def test_decode_share_refuses_other_texts():
    for text in ("not a key!", "abc", "=", "é"):
        with pytest.raises(InvalidRequest, match="valid hex or base64"):
            decode_share(text)


def test_attempt_collects_shares_and_ignores_repetition():
    secret = os.urandom(32)
    shares = split(secret, 5, 3, os.urandom)
    attempt = UnsealAttempt(SealConfig(5, 3), "nonce-1")
    assert (attempt.progress, attempt.nonce) == (0, "")
    assert attempt.provide(shares[0]) is None
    assert attempt.provide(shares[0]) is None
    assert (attempt.progress, attempt.nonce) == (1, "nonce-1")
    assert attempt.provide(shares[4]) is None
    assert attempt.provide(shares[2]) == secret
    assert attempt.progress == 0
    assert shares[0].hex() not in repr(attempt)


def test_attempt_reset_and_bad_shares():
    shares = split(os.urandom(32), 5, 2, os.urandom)
    attempt = UnsealAttempt(SealConfig(5, 2), "one")
    attempt.provide(shares[0])
    attempt.reset("two")
    assert attempt.progress == 0
    attempt.provide(shares[1])
    assert attempt.nonce == "two"
    attempt.reset()
    attempt.provide(shares[1])
    assert attempt.nonce == ""
    attempt.reset()
    with pytest.raises(InvalidRequest, match="shorter than minimum 16 bytes"):
        attempt.provide(b"x" * 15)
    with pytest.raises(InvalidRequest, match="longer than maximum 33 bytes"):
        attempt.provide(b"x" * 34)
    attempt.provide(shares[0])
    forged = bytes([shares[0][0] ^ 1]) + shares[0][1:]
    with pytest.raises(InvalidShares):
        attempt.provide(forged)
    assert attempt.progress == 0


@pytest.mark.parametrize("length", [16, 33])
def test_the_shortest_and_the_longest_share(length: int):
    attempt = UnsealAttempt(SealConfig(2, 2))
    assert attempt.provide(b"x" * length) is None
    assert attempt.progress == 1


def test_seal_record_round_trip_and_wrong_key():
    root_key, unseal_key = os.urandom(32), os.urandom(32)
    record = make_seal_record(root_key, unseal_key, SealConfig(5, 3), 1_700_000_000, os.urandom)
    again = SealRecord.decode(record.encode())
    assert again == record
    assert again.config == SealConfig(5, 3)
    assert open_root_key(again, unseal_key) == root_key
    for wrong in (os.urandom(32), b"", unseal_key[:-1], unseal_key + b"x"):
        with pytest.raises(WrongKey):
            open_root_key(again, wrong)
    assert root_key.hex() not in record.encode().decode()


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"\xff", b'{"version":2,"shares":1,"threshold":1}'])
def test_seal_record_that_cannot_be_read(raw: bytes):
    with pytest.raises(BadSealRecord):
        SealRecord.decode(raw)


def test_seal_record_of_a_later_version_is_refused():
    record = make_seal_record(os.urandom(32), os.urandom(32), SealConfig(1, 1), 0, os.urandom)
    with pytest.raises(BadSealRecord, match="version 2"):
        SealRecord.decode(record.encode().replace(b'"version":1', b'"version":2'))


def test_fingerprint_tells_root_keys_apart():
    one, other = os.urandom(32), os.urandom(32)
    assert root_fingerprint(one) == root_fingerprint(one) != root_fingerprint(other)
    assert len(root_fingerprint(one)) == 64
    assert one.hex() not in root_fingerprint(one)
