"""Key encoding: one to one, in the safe alphabet, for any text."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_backend.errors import Corrupt
from consul_backend.keys import (
    decode_name,
    decode_path,
    decode_segment,
    encode_partition,
    encode_path,
    encode_segment,
    public_name,
    split_key,
    split_prefix,
)
from consul_backend.limits import require_key

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("abc-XYZ-09", "abc-XYZ-09"),
        ("", "_"),
        ("_", "_5F"),
        ("a b", "a_20b"),
        ("..", "_2E_2E"),
        ("x.json", "x_2Ejson"),
        ("ü", "_C3_BC"),
        ("\0\n", "_00_0A"),
        ("%2F", "_252F"),
    ],
)
def test_segments_are_written_like_this(text: str, encoded: str) -> None:
    assert encode_segment(text) == encoded
    assert decode_segment(encoded) == text


@given(texts)
def test_any_segment_comes_back(text: str) -> None:
    encoded = encode_segment(text)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", encoded)
    assert decode_segment(encoded) == text


@given(texts)
def test_any_path_comes_back_and_is_a_physical_key(path: str) -> None:
    encoded = encode_path(path)
    assert require_key(encoded) == encoded
    assert decode_path(encoded) == path


@given(st.text("abc_0123456789ABCDEFé/\\ .-", max_size=12))
def test_decoding_accepts_only_what_encoding_writes(encoded: str) -> None:
    try:
        text = decode_segment(encoded)
    except Corrupt:
        return
    assert encode_segment(text) == encoded


@pytest.mark.parametrize(
    "encoded", ["", "_4", "_zz", "_5f", "_41", "a.b", "a__", "_FF", "_ED_A0_80", "a/b", "ü", "a\n"]
)
def test_foreign_segments_are_corrupt(encoded: str) -> None:
    with pytest.raises(Corrupt):
        decode_segment(encoded)


def test_text_outside_utf8_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        encode_segment("\ud800")


@given(st.sampled_from("rlc"), texts.filter(lambda text: text and "/" not in text), texts.filter(bool))
def test_logical_keys_are_split(cls: str, partition: str, path: str) -> None:
    assert split_key(f"{cls}/{partition}/{path}") == (cls, partition, path)
    assert encode_partition(cls, partition) == f"{cls}/{encode_segment(partition)}"


@pytest.mark.parametrize("key", ["", "r", "r/", "r/p", "r/p/", "r//x", "x/p/a", "/p/a", "rl/p/a"])
def test_malformed_logical_keys_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="not a logical key"):
        split_key(key)


@pytest.mark.parametrize(
    ("prefix", "parts"),
    [("r/p/", ("r", "p", "")), ("l/p/a/", ("l", "p", "a")), ("c/p/a/b/", ("c", "p", "a/b")), ("r/p//", ("r", "p", ""))],
)
def test_list_prefixes(prefix: str, parts: tuple[str, str, str]) -> None:
    assert split_prefix(prefix) == parts


@pytest.mark.parametrize("prefix", ["", "r", "r/p", "r//", "x/p/", "r/p/a", "r/p/a/b", "//", "R/p/"])
def test_what_is_no_list_prefix(prefix: str) -> None:
    with pytest.raises(ValueError, match="not a list prefix"):
        split_prefix(prefix)


@given(texts, st.booleans())
def test_names_of_a_listing_come_back(text: str, folder: bool) -> None:
    slash = "/" * folder
    assert decode_name(encode_segment(text) + slash) == text + slash


def test_messages_name_no_path() -> None:
    assert public_name("r/p/secret/path") == "an entry of class r, partition p"
