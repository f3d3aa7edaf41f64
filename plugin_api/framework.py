"""Paths, fields and operations: an engine as a table of what it answers.

A :class:`Path` is a regular expression with named groups, the fields a client may send, and one handler per operation.
:class:`PathEngine` finds the first path that matches, turns what the client sent into the declared types (JSON numbers
and strings are interchangeable, as are arrays and comma-separated strings) and calls the handler. It never puts a
client's value into an error text: the value may be a secret sent under the wrong type.
"""

from __future__ import annotations

import enum
import math
import re
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plugin_api.description import PathDescription, describe_paths
from plugin_api.engine import Engine, EngineContext
from plugin_api.errors import InvalidRequest, ReadOnlyStorage, UnsupportedOperation, UnsupportedPath
from plugin_api.formats import format_duration, format_time, format_time_us, parse_duration, parse_duration_s
from plugin_api.request import Operation, Request, Response

__all__ = [
    "FieldSpec",
    "FieldType",
    "Fields",
    "Path",
    "PathEngine",
    "format_duration",
    "format_time",
    "format_time_us",
    "generic_name",
    "parse_bool",
    "parse_duration",
    "parse_duration_s",
    "parse_int",
    "parse_list",
    "writes",
]

INT_MAX = 2**63 - 1

_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"", "0", "f", "F", "FALSE", "false", "False"})
_QUERY_WORDS = frozenset({"list", "help"})
"""Query parameters of the API itself; they arrive merged into a read's data and are no field of any path."""


class FieldType(enum.Enum):
    """What a field's value becomes. DURATION_S is whole seconds, never negative; SIGNED_DURATION_S may be."""

    STRING = "string"
    INT = "integer"
    BOOL = "boolean"
    DURATION_S = "duration"
    SIGNED_DURATION_S = "signed duration"
    LIST = "list of strings"
    INT_LIST = "list of integers"
    MAP = "map"
    ANY = "any"

    # As in Operation: there is one object of each, and every field of every request looks its type up.
    __hash__ = object.__hash__


_ZERO: Mapping[FieldType, Callable[[], Any]] = {
    FieldType.STRING: str,
    FieldType.INT: int,
    FieldType.BOOL: bool,
    FieldType.DURATION_S: int,
    FieldType.SIGNED_DURATION_S: int,
    FieldType.LIST: list,
    FieldType.INT_LIST: list,
    FieldType.MAP: dict,
    FieldType.ANY: lambda: None,
}


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One field of a path. Without a default, a field that is not sent reads as its type's zero value.

    Of a path that is written to, a field is shown as part of the body; ``query_of`` names the operations without a body
    (reads and deletes) that take it from the query. Of a path that is never written to they all take it.
    """

    type: FieldType
    default: Any = None
    description: str = ""
    query_of: tuple[Operation, ...] = ()

    def missing(self) -> Any:
        """The value of a field that was not sent; a new object each time where it can be changed."""
        return _ZERO[self.type]() if self.default is None else self.default


class Fields(Mapping[str, Any]):
    """The fields of one request by name: what was sent, in its declared type, else the default."""

    def __init__(self, specs: Mapping[str, FieldSpec], sent: Mapping[str, Any]) -> None:
        self._specs = specs
        self._sent = sent

    def __getitem__(self, name: str) -> Any:
        return self._sent[name] if name in self._sent else self._specs[name].missing()

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __repr__(self) -> str:
        return f"Fields(sent={sorted(self._sent)})"

    def given(self, name: str) -> bool:
        """Whether the client sent this field, even as null."""
        return name in self._sent


Handler = Callable[[Request, Fields], Awaitable[Response | None]]
ExistsCheck = Callable[[Request, Fields], Awaitable[bool | None]]


@dataclass(frozen=True, slots=True)
class Path:
    """One row of an engine's table.

    ``pattern`` must match the whole path relative to the mount; its named groups are fields (strings unless declared
    otherwise) and win over fields of the same name in the body. ``exists`` tells create from update; without it every
    write is an update. ``free_form`` paths take any parameter without a warning. Writes to ``primary_only`` paths are
    sent to the primary before the handler runs, so that nothing is decided from a copy that may be behind; use it for
    every read-modify-write of replicated storage.
    """

    pattern: str
    fields: Mapping[str, FieldSpec]
    operations: Mapping[Operation, Handler]
    exists: ExistsCheck | None = None
    help: str = ""
    free_form: bool = False
    primary_only: bool = False
    regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "regex", re.compile(self.pattern, re.ASCII | re.DOTALL))


class PathEngine(Engine):
    """An engine that answers from a table of paths; the first match wins, so a catch-all goes last."""

    def __init__(self, context: EngineContext) -> None:
        super().__init__(context)
        self._paths = tuple(self.paths())

    @abstractmethod
    def paths(self) -> Sequence[Path]:
        """The table. Called once, while the engine is made."""

    async def handle(self, request: Request) -> Response | None:
        path, match = self._route(request.path)
        handler = _handler(path, request.operation)
        if path.primary_only and request.operation in _WRITES and not self.context.writable():
            raise ReadOnlyStorage
        captured = {name: text for name, text in match.groupdict().items() if text is not None}
        fields = _fields(path, request.data, captured)
        response = await handler(request, fields)
        if response is None or _is_bare_failure(response):
            return response
        response.warnings.extend(_warnings(path, request.data, captured))
        return response

    async def exists(self, request: Request) -> bool | None:
        path, match = self._route(request.path)
        if path.exists is None:
            return None
        captured = {name: text for name, text in match.groupdict().items() if text is not None}
        return await path.exists(request, _fields(path, request.data, captured))

    def help(self, path: str) -> str:
        try:
            return self._route(path)[0].help
        except UnsupportedPath:
            return ""

    def describe(self) -> Sequence[PathDescription]:
        return describe_paths(self._paths)

    def _route(self, path: str) -> tuple[Path, re.Match[str]]:
        for candidate in self._paths:
            match = candidate.regex.fullmatch(path)
            if match is not None:
                return candidate, match
        raise UnsupportedPath


_WRITES = frozenset({Operation.CREATE, Operation.UPDATE, Operation.PATCH, Operation.DELETE})
_TWINS = {Operation.CREATE: Operation.UPDATE, Operation.UPDATE: Operation.CREATE}


def writes(handler: Handler) -> dict[Operation, Handler]:
    """``operations`` of a handler that takes creates and updates alike; merge it with ``|``."""
    return {Operation.CREATE: handler, Operation.UPDATE: handler}


def generic_name(group: str) -> str:
    """A named group for one name: word characters, dots and hyphens, with a word character at both ends."""
    return rf"(?P<{group}>\w(?:[\w.-]*\w)?)"


def _handler(path: Path, operation: Operation) -> Handler:
    handler = path.operations.get(operation)
    if handler is None and operation in _TWINS:
        # One verb of the client: a path that declares only one of the two means both.
        handler = path.operations.get(_TWINS[operation])
    if handler is None:
        raise UnsupportedOperation
    return handler


def _fields(path: Path, data: Mapping[str, Any], captured: Mapping[str, str]) -> Fields:
    specs = path.fields
    if any(name not in specs for name in captured):
        specs = {**dict.fromkeys(captured, _CAPTURED), **specs}
    sent = {}
    for name, text in captured.items():
        spec = specs[name]
        sent[name] = text if spec.type is FieldType.STRING else converted(name, spec, text)
    # Most requests send few of many fields, and a free-form one may send many that are none.
    for name in data if len(data) < len(specs) else specs:
        if name in data and name in specs and name not in captured:
            sent[name] = converted(name, specs[name], data[name])
    return Fields(specs, sent)


_CAPTURED = FieldSpec(FieldType.STRING)


def _is_bare_failure(response: Response) -> bool:
    """A failure without data or warnings has a body of its own shape, which a warning of ours would change."""
    return response.status >= 400 and response.data is None and not response.warnings


def _warnings(path: Path, data: Mapping[str, Any], captured: Mapping[str, str]) -> list[str]:
    if path.free_form or not data:
        return []
    known = _QUERY_WORDS.union(path.fields, captured)
    ignored = sorted(name for name in data if name not in known)
    replaced = sorted(name for name in captured if data.get(name) not in (None, captured[name]))
    warnings = []
    if ignored:
        warnings.append(f"Endpoint ignored these unrecognized parameters: [{' '.join(ignored)}]")
    if replaced:
        warnings.append(
            "Endpoint replaced the value of these parameters with the values captured from the endpoint's path: "
            f"[{' '.join(replaced)}]"
        )
    return warnings


def converted(name: str, spec: FieldSpec, value: Any) -> Any:
    """``value`` in the type of ``spec``. Raises InvalidRequest, which names the field and never repeats the value."""
    try:
        return _CONVERTERS[spec.type](value)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f'error converting input for field "{name}": {error}') from None


def parse_string(value: Any) -> str:
    """A string; numbers as their digits, booleans as ``1`` and ``0``; None is ``""``. Raises ValueError."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, int | float):
        return str(value)
    raise ValueError("expected type 'string'")


def parse_int(value: Any) -> int:
    """An integer from a number or its text; ``""`` and None are 0. Raises ValueError."""
    if value is None or value == "":
        return 0
    if isinstance(value, bool):
        raise ValueError("expected type 'int'")
    if isinstance(value, str):
        if not re.fullmatch(r"[+-]?[0-9]{1,19}", value):
            raise ValueError("cannot parse as an integer")
        number = int(value)
    elif isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value.is_integer()):
        number = int(value)
    else:
        raise ValueError("expected type 'int'")
    if abs(number) > INT_MAX:
        raise ValueError("value out of range")
    return number


def parse_bool(value: Any) -> bool:
    """A boolean from itself, a number, or Go's spellings of it; ``""`` and None are False. Raises ValueError."""
    if isinstance(value, bool):
        return value
    if value is None:
        return False
    if isinstance(value, int | float):
        return value != 0
    if isinstance(value, str):
        if value in _TRUE:
            return True
        if value in _FALSE:
            return False
        raise ValueError("cannot parse as a boolean")
    raise ValueError("expected type 'bool'")


def parse_list(value: Any) -> list[str]:
    """Strings from an array or one comma-separated string; items are trimmed, empty ones dropped. Raises ValueError."""
    if value is None:
        return []
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    return [text for text in (parse_string(item).strip() for item in items) if text]


def _int_list(value: Any) -> list[int]:
    if isinstance(value, list | tuple):
        return [parse_int(item) for item in value if item != ""]
    if isinstance(value, str):
        return [parse_int(item) for item in parse_list(value)]
    return [] if value is None else [parse_int(value)]


def _duration_s(value: Any) -> int:
    seconds = parse_duration_s(value)
    if seconds < 0:
        raise ValueError("cannot provide negative value")
    return seconds


def _map(value: Any) -> dict[str, Any]:
    if value is None or value == "":
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError("expected a map")
    pairs = {}
    for item in value:
        if not isinstance(item, str) or "=" not in item:
            raise ValueError("expected a map")
        name, text = item.split("=", 1)
        pairs[name.strip()] = text.strip()
    return pairs


_CONVERTERS: Mapping[FieldType, Callable[[Any], Any]] = {
    FieldType.STRING: parse_string,
    FieldType.INT: parse_int,
    FieldType.BOOL: parse_bool,
    FieldType.DURATION_S: _duration_s,
    FieldType.SIGNED_DURATION_S: parse_duration_s,
    FieldType.LIST: parse_list,
    FieldType.INT_LIST: _int_list,
    FieldType.MAP: _map,
    FieldType.ANY: lambda value: value,
}
