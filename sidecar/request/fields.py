"""Typed parameters of the core's own endpoints; the conversions are those that engines use. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from plugin_api.errors import InvalidRequest
from plugin_api.formats import parse_duration_s
from plugin_api.framework import parse_bool, parse_int, parse_list, parse_string

T = TypeVar("T")

GO_BOOLEANS = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}


class Fields:
    """Reads typed parameters of one request. Wrong types raise InvalidRequest, which names the field and never repeats
    the value."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data

    def given(self, name: str) -> bool:
        """Whether the client sent the parameter (null counts as not sent)."""
        return self._data.get(name) is not None

    def string(self, name: str, default: str = "") -> str:
        """Text; numbers become text."""
        return self._read(name, parse_string, default)

    def boolean(self, name: str, default: bool = False) -> bool:
        """true, false, or their usual texts."""
        return self._read(name, parse_bool, default)

    def integer(self, name: str, default: int = 0) -> int:
        """A whole number, also as text."""
        return self._read(name, parse_int, default)

    def duration_s(self, name: str, default: int = 0) -> int:
        """Whole seconds, never negative."""
        seconds = self._read(name, parse_duration_s, default)
        if seconds < 0:
            raise InvalidRequest(f'error converting input for field "{name}": cannot provide negative value')
        return seconds

    def strings(self, name: str) -> list[str]:
        """A list, or a text with commas; spaces around items and empty items are dropped."""
        return self._read(name, parse_list, [])

    def mapping(self, name: str) -> dict[str, Any]:
        """An object, or a list of ``key=value``."""
        return self._read(name, _mapping, {})

    def string_mapping(self, name: str) -> dict[str, str]:
        """An object whose values are texts (numbers and booleans become text)."""
        return self._read(name, _string_mapping, {})

    def _read(self, name: str, convert: Callable[[Any], T], default: T) -> T:
        value = self._data.get(name)
        if value is None:
            return default
        try:
            return convert(value)
        except (ValueError, OverflowError) as error:
            raise InvalidRequest(f'error converting input for field "{name}": {error}') from None


def _mapping(value: Any) -> dict[str, Any]:
    if value == "":
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and "=" in item for item in items):
        raise ValueError("expected a map")
    return dict(item.split("=", 1) for item in items)


def _string_mapping(value: Any) -> dict[str, str]:
    return {name: parse_string(item) for name, item in _mapping(value).items()}
