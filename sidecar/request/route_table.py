"""The core's own endpoints as a table: paths, the parameters they take, and who answers.

The table is the one truth: what a route does not declare its handler does not see, what it declares arrives in its
type, and the OpenAPI document is made from it.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from plugin_api.description import PathDescription
from plugin_api.errors import UnsupportedOperation, UnsupportedPath
from plugin_api.framework import FieldSpec, FieldType, converted
from plugin_api.request import Operation
from sidecar.request.call import Answer, Call

Params = Mapping[str, str]
Handler = Callable[[Call, Params], Awaitable[Answer | None]]

_PLACEHOLDER = re.compile(r"\{(\w+)(\*?)\}")
_WRITES = frozenset({Operation.CREATE, Operation.UPDATE, Operation.PATCH})
_SEGMENT, _REST = "[^/]+", ".+"

STRING, INT, BOOL = FieldType.STRING, FieldType.INT, FieldType.BOOL
DURATION, LIST, MAP, ANY = FieldType.DURATION_S, FieldType.LIST, FieldType.MAP, FieldType.ANY


def takes(**types: FieldType) -> dict[str, FieldSpec]:
    """Parameters by name and type, where the name says what the parameter is."""
    return {name: FieldSpec(kind) for name, kind in types.items()}


def in_query(kind: FieldType, *operations: Operation) -> FieldSpec:
    """A parameter that these operations, which have no body, take from the query."""
    return FieldSpec(kind, query_of=operations)


@dataclass(frozen=True, slots=True)
class Route:
    """One row: a path below the mount with ``{name}`` for a segment and ``{name*}`` for any rest, and who answers.

    ``open`` routes need no token; their handlers check for themselves what they must. ``sudo_list``: a list needs
    sudo, other operations do not. A handler for UPDATE answers creates too. ``fields`` None passes on whatever was
    sent. ``raw`` answers have no envelope.
    """

    template: str
    handlers: Mapping[Operation, Handler]
    sudo: bool = False
    sudo_list: bool = False
    open: bool = False
    help: str = ""
    fields: Mapping[str, FieldSpec] | None = None
    raw: bool = False
    content_type: str = "application/json"
    regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pattern, end = "", 0
        for found in _PLACEHOLDER.finditer(self.template):
            pattern += re.escape(self.template[end : found.start()])
            pattern += f"(?P<{found[1]}>{_REST if found[2] else _SEGMENT})"
            end = found.end()
        object.__setattr__(self, "regex", re.compile(pattern + re.escape(self.template[end:]), re.DOTALL))

    def describe(self) -> PathDescription:
        """The row as data."""
        parameters = {found[1]: _REST if found[2] else _SEGMENT for found in _PLACEHOLDER.finditer(self.template)}
        return PathDescription(
            _PLACEHOLDER.sub(r"{\1}", self.template),
            tuple(operation for operation in Operation if operation in self.handlers),
            parameters,
            {name: spec for name, spec in (self.fields or {}).items() if name not in parameters},
            help=self.help,
            open=self.open,
            sudo=self.sudo,
            free_form=self.fields is None,
            raw=self.raw,
            content_type=self.content_type,
        )


class RouteBackend:
    """A backend made of routes; the first match wins, so a catch-all goes last."""

    def __init__(self, type_name: str, routes: Iterable[Route]) -> None:
        self._type_name = type_name
        self._routes = tuple(routes)
        self._by_first: dict[str, list[Route]] = {}
        for route in self._routes:
            first = route.template.partition("/")[0]
            if "{" in first:
                raise ValueError(f"a route begins with a word: {route.template}")
            self._by_first.setdefault(first, []).append(route)

    @property
    def type_name(self) -> str:
        return self._type_name

    @property
    def replicated(self) -> bool:
        return True

    def is_open(self, rest: str, operation: Operation) -> bool:
        found = self._find(rest)
        return found is not None and found[0].open

    def needs_sudo(self, rest: str) -> bool:
        found = self._find(rest)
        if found is None:
            return False
        # A list comes with a slash at the end, and nothing else does.
        return found[0].sudo or (found[0].sudo_list and rest.endswith("/"))

    async def exists(self, call: Call, rest: str) -> bool | None:
        return None

    async def handle(self, call: Call, rest: str) -> Answer | None:
        found = self._find(rest)
        if found is None:
            raise UnsupportedPath
        route, params = found
        operation = Operation.UPDATE if call.operation is Operation.CREATE else call.operation
        handler = route.handlers.get(operation)
        if handler is None:
            raise UnsupportedOperation
        answer = await _answered(route, handler, call, params)
        if answer is not None and not answer.mount_type:
            answer.mount_type = self._type_name
        return answer

    def help(self, rest: str) -> str:
        found = self._find(rest)
        return found[0].help if found is not None else ""

    def describe(self) -> list[PathDescription]:
        """Every row as data."""
        return [route.describe() for route in self._routes]

    def _find(self, rest: str) -> tuple[Route, Params] | None:
        # A list and the removal of a mount come with a slash at the end; no route is told apart by it.
        path = rest.rstrip("/")
        for route in self._by_first.get(path.partition("/")[0], ()):
            match = route.regex.fullmatch(path)
            if match is not None:
                return route, match.groupdict()
        return None


async def _answered(route: Route, handler: Handler, call: Call, params: Params) -> Answer | None:
    if route.fields is None:
        return await handler(call, params)
    sent = call.data
    ignored = sorted(name for name in sent if name not in route.fields and name not in params)
    # For the handler alone: what is audited and what is forwarded is what the client sent.
    call.data = _declared(route.fields, sent)
    try:
        answer = await handler(call, params)
    finally:
        call.data = sent
    if ignored and answer is None and call.operation in _WRITES:
        # A setting whose name was mistyped must not pass for one that was made.
        answer = Answer()
    if ignored and answer is not None and _has_envelope(answer):
        answer.warnings.append(f"Endpoint ignored these unrecognized parameters: [{' '.join(ignored)}]")
    return answer


def _declared(fields: Mapping[str, FieldSpec], sent: Mapping[str, Any]) -> dict[str, Any]:
    """What was sent of ``fields``, in their types; null counts as not sent."""
    return {
        name: converted(name, spec, sent[name])
        for name, spec in fields.items()
        if name in sent and sent[name] is not None
    }


def _has_envelope(answer: Answer) -> bool:
    if answer.raw is not None or answer.plain is not None or answer.stored is not None or answer.wrap_info is not None:
        return False
    return answer.status < 400 or not answer.is_empty
