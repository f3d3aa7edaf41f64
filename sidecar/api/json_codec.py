"""The one JSON parser and printer of the API: every body is read and written here.

Refused, because two readers could disagree about them or because they cost more than they say: encodings other than
UTF-8, lone surrogates, duplicate keys, NaN and Infinity, numbers of absurd length, deep nesting, and very many values
in one body. Nothing of a body is repeated in an error.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

DEPTH_MAX = 300
"""Nesting of arrays and objects; what newer servers of this API allow by default."""
VALUES_MAX = 100_000
"""Values in one body: 32 MiB of ``{}`` would otherwise become gigabytes of objects."""
NUMBER_CHARS_MAX = 512
"""Length of one number: a P-521 coordinate has 157 digits."""

# Possessive, and the closing quote optional: a string without an end is eaten at once, never tried again from within.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"{}[],"))
_DEEPER = frozenset(b"{[")
_SHALLOWER = frozenset(b"}]")


class JSONRefused(ValueError):
    """A body that is not acceptable JSON. The message is fit for the client and holds nothing of the body."""


def decode(raw: bytes) -> Any:
    """The value of a JSON document. Raises :class:`JSONRefused`."""
    _check_shape(raw)
    try:
        text = raw.decode("utf-8")
        value = _DECODER.decode(text)
        if b"\\ud" in raw.lower():
            # Escaped surrogates that do not pair up survive parsing and break whatever encodes them later.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except JSONRefused:
        raise
    except (ValueError, RecursionError):
        raise JSONRefused("error parsing JSON") from None
    return value


def decode_object(raw: bytes) -> dict[str, Any]:
    """The members of a JSON object; ``null`` and an empty body are an empty object. Raises :class:`JSONRefused`."""
    if not raw.strip():
        return {}
    value = decode(raw)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise JSONRefused("error parsing JSON")
    return value


def encode(value: Any) -> bytes:
    """A body as the API writes it: compact, UTF-8, keys in the given order, a newline at the end. Raises TypeError,
    OverflowError or UnicodeEncodeError for what has no JSON form."""
    return _ENCODER.encode(value) + b"\n"


def _check_shape(raw: bytes) -> None:
    """Bound depth and number of values before a single object is made."""
    structure = _STRING.sub(b"", raw).translate(None, _NOT_STRUCTURE)
    if len(structure) > 2 * VALUES_MAX:
        raise JSONRefused("error parsing JSON: too many values")
    depth = 0
    for mark in structure:
        if mark in _DEEPER:
            depth += 1
            if depth > DEPTH_MAX:
                raise JSONRefused("error parsing JSON: nested too deeply")
        elif mark in _SHALLOWER:
            depth -= 1


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise JSONRefused("error parsing JSON: duplicate key")
    return members


def _integer(text: str) -> int:
    if len(text) > NUMBER_CHARS_MAX:
        raise JSONRefused("error parsing JSON: number too long")
    return int(text)


def _fraction(text: str) -> float:
    if len(text) > NUMBER_CHARS_MAX:
        raise JSONRefused("error parsing JSON: number too long")
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise JSONRefused("error parsing JSON: number out of range")
    return value


def _constant(name: str) -> Any:
    raise JSONRefused(f"error parsing JSON: {name} is not a JSON number")


_ENCODER = msgspec.json.Encoder()
_DECODER = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_int=_integer, parse_float=_fraction, parse_constant=_constant
)
