"""Flags as Vault users write them: one dash or two, ``-name=value`` or ``-name value``, up to ``--``. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class UsageError(Exception):
    """The command was called wrongly: exit code 1."""


class HelpWanted(Exception):
    """``-h`` or ``-help`` was given."""


class Flag(NamedTuple):
    """One flag. ``kind`` is ``text``, ``bool``, ``int`` or ``texts`` (repeatable). The default is only shown."""

    name: str
    help: str
    kind: str = "text"
    default: str = ""
    aliases: tuple[str, ...] = ()


class Values:
    """What the flags were set to; a flag that was not given has no value."""

    def __init__(self, given: Mapping[str, list[str]]) -> None:
        self._given = given

    def text(self, name: str, default: str = "") -> str:
        return self._given[name][-1] if name in self._given else default

    def texts(self, name: str) -> list[str]:
        return list(self._given.get(name, ()))

    def flag(self, name: str) -> bool:
        return self.text(name) == "true"

    def integer(self, name: str, default: int) -> int:
        return int(self.text(name)) if name in self._given else default

    def __contains__(self, name: str) -> bool:
        return name in self._given


def parse(words: Sequence[str], flags: Sequence[Flag]) -> tuple[Values, list[str]]:
    """Split a command's words into flag values and arguments. Raises UsageError and HelpWanted.

    A lone ``-`` is an argument (standard input).
    """
    by_name = {name: flag for flag in flags for name in (flag.name, *flag.aliases)}
    given: dict[str, list[str]] = {}
    arguments: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            arguments.extend(rest)
            break
        if len(word) < 2 or not word.startswith("-"):
            arguments.append(word)
            continue
        name, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
        if name in ("h", "help") and name not in by_name:
            raise HelpWanted
        flag = by_name.get(name)
        if flag is None:
            raise UsageError(f"flag provided but not defined: -{name}{_hint(name, by_name)}")
        if not equals and flag.kind == "bool":
            value = "true"
        elif not equals:
            following = next(rest, None)
            if following is None:
                raise UsageError(f"flag needs an argument: -{name}")
            value = following
        given.setdefault(flag.name, []).append(_checked(flag, name, value))
    return Values(given), arguments


def _checked(flag: Flag, name: str, value: str) -> str:
    if flag.kind == "bool":
        boolean = {"1": "true", "t": "true", "0": "false", "f": "false"}.get(value.lower(), value.lower())
        if boolean not in ("true", "false"):
            raise UsageError(f"flag -{name} must be true or false")
        return boolean
    if flag.kind == "int":
        digits = value.removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
            raise UsageError(f"flag -{name} must be a whole number")
    return value


def _hint(name: str, known: Mapping[str, Flag]) -> str:
    import difflib  # only on the way to an error

    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean -{found[0]}?" if found else ""


def describe(title: str, flags: Sequence[Flag]) -> str:
    """A section of a help text."""
    lines = [f"{title}:", ""]
    for flag in flags:
        shape = {"bool": "", "int": "=<int>", "texts": "=<string>", "text": "=<string>"}[flag.kind]
        names = ", ".join(f"-{name}{shape}" for name in (flag.name, *flag.aliases))
        default = f" The default is {flag.default}." if flag.default else ""
        lines += [f"  {names}", f"      {flag.help}{default}", ""]
    return "\n".join(lines)
