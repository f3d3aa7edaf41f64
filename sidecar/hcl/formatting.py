"""HCL 1 in its usual layout: two blanks a level, one blank around signs, ``=`` under each other in a run of settings.

Line breaks, comments and the spelling of values stay as they are; only blanks and blank lines change. The result is
parsed again and must mean the same. Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from sidecar.hcl.native import NativeParser
from sidecar.hcl.scanner import Body, HCLError, ObjectValue, Value

_INDENT = "  "
_BLANK = re.compile(r"[ \t\r]+")
_COMMENT = re.compile(r"#[^\n]*|//[^\n]*|/\*.*?\*/", re.DOTALL)
_WORD = re.compile(r"[^\s{}\[\]=,\"#]+")
_OPENS, _CLOSES = "{[", "}]"


@dataclass(slots=True)
class _Line:
    """The tokens of one line of the source; ``depth`` is that of its first token."""

    tokens: list[str] = field(default_factory=list)
    depth: int = 0
    inside: int = 0

    @property
    def is_setting(self) -> bool:
        """``name = value`` that ends on its line, as those that are aligned do."""
        return len(self.tokens) > 2 and self.tokens[1] == "=" and self.inside == 0 and "\n" not in self.tokens[-1]

    @property
    def closes(self) -> bool:
        return bool(self.tokens) and self.tokens[0] in _CLOSES

    @property
    def ends_block(self) -> bool:
        return self.closes and self.inside < 0


def format_text(text: str, filename: str = "<text>") -> str:
    """``text`` in the usual layout. Raises HCLError where it is no HCL."""
    meant = _plain(NativeParser(text, filename).body(end=""))
    lines = _spaced(_lines(text, filename))
    made = "".join(f"{line}\n" for line in _rendered(lines))
    if _plain(NativeParser(made, filename).body(end="")) != meant:
        raise HCLError("this text cannot be laid out without changing what it means", filename, 1, 1)
    return made


def _lines(text: str, filename: str) -> list[_Line]:
    scanner = NativeParser(text, filename)
    lines = [_Line()]
    depth = 0
    while scanner.peek():
        if scanner.match(_BLANK) is not None:
            continue
        if scanner.peek() == "\n":
            scanner.at += 1
            lines.append(_Line(depth=depth))
            continue
        token = _token(scanner)
        line = lines[-1]
        if token in _OPENS:
            depth += 1
            line.inside += 1
        elif token in _CLOSES:
            depth -= 1
            line.inside -= 1
            if not line.tokens:
                line.depth = depth
        line.tokens.append(token)
        if token.startswith("<<"):
            # Whatever follows a here-document is on a line of its own.
            lines.append(_Line(depth=depth))
            _rest_of_line(scanner)
    return lines


def _token(scanner: NativeParser) -> str:
    start = scanner.at
    if scanner.peek() == '"':
        scanner.string()
    elif scanner.peek() in (*_OPENS, *_CLOSES, "=", ","):
        scanner.at += 1
    elif scanner.text.startswith("<<", start):
        scanner.heredoc()
        return scanner.text[start : scanner.at].rstrip("\r\n")
    elif (comment := scanner.match(_COMMENT)) is not None:
        return comment.rstrip()
    elif scanner.match(_WORD) is None:
        scanner.at += 1
    return scanner.text[start : scanner.at]


def _rest_of_line(scanner: NativeParser) -> None:
    scanner.match(_BLANK)
    if scanner.peek() == "\n":
        scanner.at += 1


def _spaced(lines: list[_Line]) -> list[_Line]:
    """One blank line at most, none at the ends and next to braces, one after each block of several lines."""
    made: list[_Line] = []
    for line in lines:
        before = made[-1] if made else None
        if not line.tokens:
            if before is not None and before.tokens and before.tokens[-1] not in _OPENS:
                made.append(line)
            continue
        if before is not None and not before.tokens and line.closes:
            made.pop()
        elif before is not None and before.ends_block and before.tokens[0] == "}" and not line.closes:
            made.append(_Line())
        made.append(line)
    while made and not made[-1].tokens:
        made.pop()
    return made


def _rendered(lines: list[_Line]) -> list[str]:
    made: list[str] = []
    run: list[_Line] = []
    for line in (*lines, _Line()):
        if run and not (line.is_setting and line.depth == run[0].depth):
            width = max(len(each.tokens[0]) for each in run)
            made += [_INDENT * each.depth + _joined([each.tokens[0].ljust(width), *each.tokens[1:]]) for each in run]
            run = []
        if line.is_setting:
            run.append(line)
        else:
            made.append((_INDENT * line.depth + _joined(line.tokens)).rstrip())
    return made[:-1]


def _joined(tokens: list[str]) -> str:
    text = ""
    before = ""
    for piece in tokens:
        close = not before or before == "[" or piece in ("]", ",") or (before == "{" and piece == "}")
        text += piece if close else f" {piece}"
        before = piece
    return text


def _plain(body: Body) -> object:
    """What a document says, without positions."""
    return (
        {name: _value(attribute.value) for name, attribute in body.attributes.items()},
        [(block.type, block.labels, _plain(block.body)) for block in body.blocks],
    )


def _value(value: Value) -> object:
    if isinstance(value, ObjectValue):
        return {name: _value(member) for name, member in value.items()}
    return [_value(member) for member in value] if isinstance(value, list) else value
