"""What the two forms of HCL share: the values, the error, and a place in a text."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TypeAlias

TEXT_CHARS_MAX = 4 * 1024 * 1024
DEPTH_MAX = 32
_NUMBER_CHARS_MAX = 64  # far above any sane number, far below where Python refuses to convert


class HCLError(ValueError):
    """The text is not valid; ``line`` and ``col`` count from 1."""

    def __init__(self, reason: str, filename: str, line: int, col: int) -> None:
        super().__init__(f"{filename}:{line}:{col}: {reason}")
        self.reason, self.filename, self.line, self.col = reason, filename, line, col


class ObjectValue(dict[str, "Value"]):
    """An object used as a value. ``positions`` maps each key to its (line, col)."""

    __slots__ = ("positions",)

    def __init__(self) -> None:
        super().__init__()
        self.positions: dict[str, tuple[int, int]] = {}


Value: TypeAlias = "str | bool | int | float | list[Value] | ObjectValue | None"
"""``None`` comes from JSON's null only."""


@dataclass(frozen=True, slots=True)
class Attribute:
    """``name = value``, at the position of the name."""

    value: Value = field(repr=False)
    line: int
    col: int


@dataclass(frozen=True, slots=True)
class Block:
    """``type "label" ... { body }``, at the position of the type."""

    type: str
    labels: tuple[str, ...]
    body: Body
    line: int
    col: int


@dataclass(slots=True)
class Body:
    """What stands between braces, or in the whole file. Blocks keep their order."""

    filename: str
    attributes: dict[str, Attribute] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)


class Scanner:
    """A place in a text, with what both grammars need."""

    def __init__(self, text: str, filename: str) -> None:
        self.text = text
        self.filename = filename
        self.at = 1 if text.startswith("\ufeff") else 0
        self.depth = 0
        self._line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
        if len(text) > TEXT_CHARS_MAX:
            raise self.error(f"more than {TEXT_CHARS_MAX} characters")

    def position(self, at: int | None = None) -> tuple[int, int]:
        offset = self.at if at is None else at
        line = bisect_right(self._line_starts, offset)
        return line, offset - self._line_starts[line - 1] + 1

    def error(self, reason: str, at: int | None = None) -> HCLError:
        return HCLError(reason, self.filename, *self.position(at))

    def peek(self) -> str:
        """The next character, or "" at the end."""
        return self.text[self.at : self.at + 1]

    def match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found.group()

    def enter(self) -> None:
        self.depth += 1
        if self.depth > DEPTH_MAX:
            raise self.error(f"nested more than {DEPTH_MAX} levels deep")

    def leave(self) -> None:
        self.depth -= 1

    def describe(self) -> str:
        """The next character as an error may show it; never more, as what follows may be a secret."""
        char = self.peek()
        if not char:
            return "the end of the file"
        if char == "\n":
            return "the end of the line"
        return f'"{char}"' if char.isprintable() else f"character U+{ord(char):04X}"

    def code_point(self, digits: str, at: int) -> str:
        value = int(digits, 16)
        if value > 0x10FFFF or 0xD800 <= value <= 0xDFFF:
            raise self.error("escape is not a Unicode character", at)
        return chr(value)

    def number(self, literal: str, at: int) -> int | float:
        """A number's value. Leading 0 is octal and 0x hexadecimal, as in the original."""
        if len(literal) > _NUMBER_CHARS_MAX:
            raise self.error("number has too many digits", at)
        digits = literal.lstrip("-")
        sign = -1 if literal.startswith("-") else 1
        try:
            if digits[:2].lower() == "0x":
                return sign * int(digits, 16)
            if re.fullmatch(r"0[0-9]+", digits):
                return sign * int(digits, 8)
            if digits.isdigit():
                return sign * int(digits)
            value = float(digits)
        except ValueError:
            raise self.error("malformed number", at) from None
        if value == float("inf"):
            raise self.error("number is out of range", at)
        return sign * value
