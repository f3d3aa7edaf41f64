"""Durations and times as Go prints and reads them, which is what clients of this API expect on the wire."""

from __future__ import annotations

import functools
import math
import re
from datetime import UTC, datetime

_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TERM = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h|d)", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)

DURATION_S_MAX = (2**63 - 1) // 10**9
"""The longest duration that Go's 64-bit nanoseconds can hold, about 292 years."""


def parse_duration(value: object) -> float:
    """Seconds from 90, 1.5, ``"90"``, ``"1h30m"``, ``"-1s"`` or ``"2d"``; ``""`` and None are 0.

    Raises ValueError, whose text does not repeat the value.
    """
    if value is None or value == "":
        return 0.0
    if isinstance(value, bool):
        raise ValueError("expected a duration")
    if isinstance(value, int | float):
        return _checked(float(value))
    if not isinstance(value, str):
        raise ValueError("expected a duration")
    return _parse_text(value)


@functools.lru_cache(maxsize=256)
def _parse_text(value: str) -> float:
    """Kept: the same few are sent again and again."""
    text = value.strip()
    if _NUMBER.fullmatch(text):
        return _checked(float(text))
    sign = -1.0 if text.startswith("-") else 1.0
    terms = text[1:] if text[:1] in ("-", "+") else text
    end = 0
    total = 0.0
    while end < len(terms):
        term = _TERM.match(terms, end)
        if term is None:
            raise ValueError("invalid duration")
        total += float(term[1]) * _UNIT_S[term[2]]
        end = term.end()
    if not terms:
        raise ValueError("invalid duration")
    return _checked(sign * total)


def parse_duration_s(value: object) -> int:
    """:func:`parse_duration` in whole seconds, cut towards zero."""
    return int(parse_duration(value))


def _checked(seconds: float) -> float:
    if not math.isfinite(seconds) or abs(seconds) > DURATION_S_MAX:
        raise ValueError("duration out of range")
    return seconds


def format_duration(seconds: float) -> str:
    """``0s``, ``1m30s``, ``768h0m0s``, ``500ms``: the way Go prints a duration."""
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if 0 < seconds < 1:
        for unit, size in (("ms", 1e-3), ("µs", 1e-6)):
            if seconds >= size:
                return f"{_trimmed(seconds / size)}{unit}"
        return f"{round(seconds * 1e9)}ns"
    whole = int(seconds)
    rest = f"{_trimmed(whole % 60 + (seconds - whole))}s"
    if whole < 60:
        return rest
    if whole < 3600:
        return f"{whole // 60}m{rest}"
    return f"{whole // 3600}h{whole % 3600 // 60}m{rest}"


def _trimmed(number: float) -> str:
    return f"{number:.9f}".rstrip("0").rstrip(".")


def format_time(unix_s: float) -> str:
    """RFC 3339 in UTC with up to microseconds, trailing zeros dropped: ``2024-05-01T12:00:00.25Z``."""
    return format_time_us(round(unix_s * 1_000_000))


@functools.lru_cache(maxsize=64)
def _second(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat()[:19]


def format_time_us(unix_us: int) -> str:
    """:func:`format_time` of whole microseconds, for times that are stored and must read back unchanged."""
    seconds, micros = divmod(unix_us, 1_000_000)
    text = _second(seconds)
    if micros:
        text += f".{micros:06d}".rstrip("0")
    return text + "Z"
