"""One JSON parser, which refuses what two readers could disagree about (reliability 6 A 2-4)."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.api import json_codec
from sidecar.api.json_codec import DEPTH_MAX, NUMBER_CHARS_MAX, VALUES_MAX, JSONRefused


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"nul",
        b'{"a":1}x',
        b"{'a':1}",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":1,"a":2}',
        b'{"a":{"b":1,"b":1}}',
        b'{"a":"\\ud800"}',
        b'{"\\uDC00":1}',
        b'{"a":"\xff"}',
        b'{"a":"\xc0\xaf"}',
        b'{"a":"\xed\xa0\x80"}',
        '{"a":1}'.encode("utf-16"),
        b'\xef\xbb\xbf{"a":1}',
        b'{"a":"\x01"}',
        b'{"a":01}',
        b'{"a":' + b"1" * (NUMBER_CHARS_MAX + 1) + b"}",
        b'{"a":1.' + b"1" * (NUMBER_CHARS_MAX + 1) + b"}",
        b"[" * (DEPTH_MAX + 1) + b"]" * (DEPTH_MAX + 1),
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"[" + b"{}," * (VALUES_MAX + 1) + b"{}]",
        b"[" + b"1," * (2 * VALUES_MAX) + b"1]",
        b'"' + b'\\"' * 1_000_000,
        b'{"' + b"\\" * 1_000_001,
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_bad_documents_are_refused_quickly(raw: bytes) -> None:
    started = time.process_time()
    with pytest.raises(JSONRefused, match="error parsing JSON"):
        json_codec.decode(raw)
    assert time.process_time() - started < 5, "more than linear in the size of the body"


def test_an_error_repeats_nothing_of_the_body() -> None:
    for raw in (b'{"password":"hunter2"', b'{"hunter2":1,"hunter2":2}', b'["hunter2"'):
        with pytest.raises(JSONRefused) as refused:
            json_codec.decode(raw)
        assert "hunter2" not in str(refused.value)
        assert refused.value.__cause__ is None


@pytest.mark.parametrize("raw", [b"", b"  \n", b"null", b" null ", b"{}"])
def test_nothing_is_an_empty_object(raw: bytes) -> None:
    assert json_codec.decode_object(raw) == {}


@pytest.mark.parametrize("raw", [b"[]", b"1", b'"a"', b"true", b"[{}]"])
def test_a_body_is_an_object(raw: bytes) -> None:
    with pytest.raises(JSONRefused):
        json_codec.decode_object(raw)


def test_limits_hold_exactly() -> None:
    nested = b"[" * DEPTH_MAX + b"]" * DEPTH_MAX
    assert json_codec.decode(nested)
    digits = b"9" * NUMBER_CHARS_MAX
    assert json_codec.decode(digits) == int(digits)
    assert json_codec.decode(b'"' + b",{[" * 500_000 + b'"') == ",{[" * 500_000, "marks in a string are no structure"


def test_paired_surrogates_and_any_text_are_fine() -> None:
    assert json_codec.decode(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"
    assert json_codec.decode('{"é":"\N{SNOWMAN}"}'.encode()) == {"é": "\N{SNOWMAN}"}


documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=30,
)


@given(documents)
def test_what_is_written_reads_back(value: Any) -> None:
    raw = json_codec.encode(value)
    assert raw.endswith(b"\n")
    assert json_codec.decode(raw) == value
    assert json.loads(raw) == value


@given(st.binary(max_size=200) | st.text().map(str.encode))
def test_any_bytes_are_a_value_or_refused(raw: bytes) -> None:
    try:
        value = json_codec.decode(raw)
    except JSONRefused:
        return
    assert value == json.loads(raw)
