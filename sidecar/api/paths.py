"""From a request target to a path: decoded once, by segments, refused rather than cleaned. Pure.

Two layers that clean a path differently are how a policy is walked around; so ``..``, ``.``, empty segments, encoded
dots and slashes, control characters and bytes that are not UTF-8 have no meaning here.
"""

from __future__ import annotations

import unicodedata
from urllib.parse import parse_qsl, unquote_to_bytes

PATH_BYTES_MAX = 4096
QUERY_FIELDS_MAX = 128
_ODD_SEGMENT = "a path must not contain empty, '.' or '..' segments"
_NEVER_ENCODED = ("%2e", "%2f", "%5c", "%00")


class PathRefused(ValueError):
    """A target that is not served. The client gets 400 and this text, which repeats nothing of the target; for control
    characters an empty list of errors, as published clients know it."""


def split_target(target: str) -> tuple[str, str]:
    """(raw path, raw query) of a request line's target. Raises :class:`PathRefused` for anything but origin form."""
    if not target.startswith("/"):
        raise PathRefused("only a path is served")
    path, _, query = target.partition("?")
    return path, query


def decode_path(raw: str) -> str:
    """The path without its leading slash; a trailing slash is kept. Raises :class:`PathRefused`."""
    if len(raw) > PATH_BYTES_MAX:
        raise PathRefused("path too long")
    if not raw.startswith("/"):
        raise PathRefused("a path begins with '/'")
    if "\\" in raw or "#" in raw or ("%" in raw and any(sequence in raw.lower() for sequence in _NEVER_ENCODED)):
        raise PathRefused("a path must not hide a separator")
    segments = raw[1:].split("/")
    last = len(segments) - 1
    if "%" not in raw and raw.isascii() and raw.isprintable():
        # Nothing to decode, which is how most paths come.
        if "." in segments or ".." in segments or "" in segments[:last]:
            raise PathRefused(_ODD_SEGMENT)
        return raw[1:]
    return "/".join(_segment(segment, may_be_empty=place == last) for place, segment in enumerate(segments))


def decode_query(raw: str) -> dict[str, list[str]]:
    """Every value of every name in order. Raises :class:`PathRefused`."""
    fields: dict[str, list[str]] = {}
    if not raw:
        return fields
    if not raw.isascii():
        raise PathRefused("a query is ASCII, all else percent-encoded")
    try:
        pairs = parse_qsl(raw, keep_blank_values=True, errors="strict", max_num_fields=QUERY_FIELDS_MAX)
    except ValueError:
        raise PathRefused("a query that cannot be read") from None
    for name, value in pairs:
        fields.setdefault(name, []).append(value)
    return fields


def _segment(raw: str, *, may_be_empty: bool) -> str:
    try:
        # What is not ASCII must have come encoded.
        text = unquote_to_bytes(raw.encode("ascii")).decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        raise PathRefused("a path is UTF-8, percent-encoded") from None
    if raw.count("%") != _escapes(raw):
        # It would decode to itself here, and to something else after the next hop has encoded it.
        raise PathRefused("a broken percent escape")
    if (not text and not may_be_empty) or text in (".", ".."):
        raise PathRefused(_ODD_SEGMENT)
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
        raise PathRefused
    return text


def _escapes(raw: str) -> int:
    """How many whole percent escapes there are."""
    pieces = raw.split("%")[1:]
    return sum(len(piece) >= 2 and all(digit in "0123456789abcdefABCDEF" for digit in piece[:2]) for piece in pieces)
