"""What can be asked of a mount, as data: the source of OpenAPI documents and of tables in the documentation. Pure.

A :class:`PathDescription` has a template (``data/{path}``) where an engine's own table has a regular expression;
:func:`templates` makes one from the other. Optional parts become several templates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from plugin_api.request import Operation

if TYPE_CHECKING:  # the framework describes itself with this module
    from plugin_api.framework import FieldSpec, Path


@dataclass(frozen=True, slots=True)
class PathDescription:
    """One path of a mount.

    ``parameters`` maps the names in the template to the regular expression of their values. ``fields`` are the
    parameters of the body, or for reads of the query. ``open`` needs no token, ``sudo`` the sudo capability. ``raw``
    answers with a body of its own instead of the envelope, ``content_type`` in another form than JSON.
    """

    template: str
    operations: tuple[Operation, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, FieldSpec] = field(default_factory=dict)
    help: str = ""
    open: bool = False
    sudo: bool = False
    free_form: bool = False
    raw: bool = False
    content_type: str = "application/json"


def describe_paths(paths: Iterable[Path]) -> list[PathDescription]:
    """The rows of a table, without those whose pattern cannot be written as a template."""
    found = []
    for path in paths:
        if path.pattern == ".*":
            continue  # a row that only says what is wrong with a path
        try:
            rows = templates(path.pattern)
        except ValueError:
            continue  # served all the same: one plugin's odd pattern must not cost the others their description
        for template, parameters in rows:
            found.append(
                PathDescription(
                    template,
                    _operations(path),
                    parameters,
                    {name: spec for name, spec in path.fields.items() if name not in parameters},
                    help=path.help,
                    free_form=path.free_form,
                )
            )
    return found


def _operations(path: Path) -> tuple[Operation, ...]:
    given = set(path.operations)
    if given & {Operation.CREATE, Operation.UPDATE}:
        given = (given - {Operation.CREATE}) | {Operation.UPDATE}
    return tuple(operation for operation in Operation if operation in given)


def templates(pattern: str) -> list[tuple[str, dict[str, str]]]:
    """(template, parameters) of every way to fill in the optional parts of ``pattern``. Raises ValueError."""
    unique: dict[str, dict[str, str]] = {}
    for template, parameters in _expand(pattern):
        unique.setdefault(template, parameters)
    return list(unique.items())


def _expand(pattern: str) -> list[tuple[str, dict[str, str]]]:
    results: list[tuple[str, dict[str, str]]] = [("", {})]
    at = 0
    while at < len(pattern):
        at, alternatives = _piece(pattern, at)
        results = [(text + more, known | new) for text, known in results for more, new in alternatives]
    return results


def _piece(pattern: str, at: int) -> tuple[int, list[tuple[str, dict[str, str]]]]:
    """(where the piece at ``at`` ends, what it may become)."""
    if pattern.startswith(("(?P<", "(?:"), at):
        end = _closing(pattern, at)
        optional = pattern.startswith("?", end + 1)
        if pattern.startswith("(?P<", at):
            name, inner = pattern[at + 4 : end].split(">", 1)
            alternatives = [(f"{{{name}}}", {name: inner})]
        else:
            alternatives = _expand(pattern[at + 3 : end])
        return end + 1 + optional, ([("", {})] if optional else []) + alternatives
    if pattern[at:] in (".*", ".+"):
        return len(pattern), [("{rest}", {"rest": pattern[at:]})]
    if pattern[at] == "\\":
        return at + 2, [(pattern[at + 1], {})]
    if pattern[at] in "()[]|*+.?^$":
        raise ValueError(f"no template can be made of this pattern at {at}: {pattern}")
    if pattern.startswith("/?", at):
        return at + 2, [("", {})]
    return at + 1, [(pattern[at], {})]


def _closing(pattern: str, opening: int) -> int:
    depth, at, in_class = 0, opening, False
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            at += 1
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        elif character in "()":
            depth += 1 if character == "(" else -1
            if not depth:
                return at
        at += 1
    raise ValueError(f"unbalanced pattern: {pattern}")
