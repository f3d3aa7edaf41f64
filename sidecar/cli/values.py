"""``key=value`` arguments: ``key=@file``, ``key=-`` (standard input), and ``-`` or ``@file`` for a whole JSON object.

A key given several times becomes a list. ``\\@`` at the beginning of a value stands for ``@``. Messages name an
argument by its place only: what stands there may be a secret.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from sidecar.cli.flags import UsageError


def parse_data(arguments: Sequence[str], read_stdin: Callable[[], str]) -> dict[str, Any]:
    """The object that the arguments describe. Raises UsageError."""
    data: dict[str, Any] = {}
    repeated: set[str] = set()
    stdin = _Once(read_stdin)
    for number, argument in enumerate(arguments, start=1):
        if argument == "-":
            data.update(_object(stdin.read(), "standard input"))
            continue
        if argument.startswith("@"):
            data.update(_object(_file(argument[1:]), argument[1:]))
            continue
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise UsageError(f"data argument {number} is not key=value")
        if value == "-":
            value = stdin.read()
        elif value.startswith("@"):
            value = _file(value[1:])
        elif value.startswith("\\@"):
            value = value[1:]
        if key in repeated:
            data[key].append(value)
        elif key in data:
            data[key] = [data[key], value]
            repeated.add(key)
        else:
            data[key] = value
    return data


class _Once:
    """Standard input can be read only once."""

    def __init__(self, read: Callable[[], str]) -> None:
        self._read: Callable[[], str] | None = read

    def read(self) -> str:
        if self._read is None:
            raise UsageError("standard input is asked for twice")
        read, self._read = self._read, None
        return read()


def _file(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read {path}: it is not UTF-8 text") from error


def _object(text: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{source} is not JSON") from error
    if not isinstance(value, dict):
        raise UsageError(f"{source} is not a JSON object")
    return value
