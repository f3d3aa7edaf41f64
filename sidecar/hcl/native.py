"""The native form of HCL 1. Use it through :mod:`sidecar.hcl`."""

from __future__ import annotations

import re

from sidecar.hcl.scanner import Attribute, Block, Body, HCLError, ObjectValue, Scanner, Value

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*|//[^\n]*|/\*.*?\*/)+", re.DOTALL)
_NAME = re.compile(r"[^\W\d][\w.-]*")
_HCL_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)")
_PLAIN = re.compile(r'[^"\\\n$]+')
_HEREDOC = re.compile(r"<<(-?)(\w+)[ \t]*\r?\n", re.ASCII)
_SIMPLE_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", '"': '"'}
_CODED_ESCAPE = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})")
_OCTAL_ESCAPE = re.compile(r"[0-7]{3}")
# Possessive, and matched part by part: a hostile text must not cost more than one pass.
_INTERPOLATION_PART = re.compile(r'[^"{}]++|[{}]|"(?:[^"\\\n]|\\.)*+"')


class NativeParser(Scanner):
    """One document; :meth:`body` with ``end=""`` reads all of it."""

    def skip(self) -> None:
        self.match(_BLANK)
        if self.text.startswith("/*", self.at):
            raise self.error("comment is not closed")

    def body(self, end: str) -> Body:
        """Items up to ``end``, which is ``}`` or "" for the end of the file; ``end`` itself is consumed."""
        body = Body(self.filename)
        while True:
            self.skip()
            if self.peek() == end:
                self.at += len(end)
                return body
            self.item(body)
            self.skip()
            if self.peek() == "," and end:
                self.at += 1

    def item(self, body: Body) -> None:
        start = self.at
        line, col = self.position()
        name = self.key()
        labels: list[str] = []
        while True:
            self.skip()
            char = self.peek()
            if char == "{":
                self.enter()
                self.at += 1
                body.blocks.append(Block(name, tuple(labels), self.body(end="}"), line, col))
                self.leave()
                return
            if char == "=" and not labels:
                self.at += 1
                self.skip()
                if name in body.attributes:
                    raise self.error(f'"{name}" is set twice; first on line {body.attributes[name].line}', start)
                body.attributes[name] = Attribute(self.value(), line, col)
                return
            if char == '"' or self.is_name():
                labels.append(self.key())
                continue
            wanted = '"{"' if labels else '"=" or "{"'
            raise self.error(f"expected {wanted} after the name, found {self.describe()}")

    def is_name(self) -> bool:
        return _NAME.match(self.text, self.at) is not None

    def key(self) -> str:
        if self.peek() == '"':
            return self.string()
        name = self.match(_NAME)
        if name is None:
            raise self.error(f"expected a name, found {self.describe()}")
        return name

    def value(self) -> Value:
        char = self.peek()
        if char == '"':
            return self.string()
        if char == "[":
            return self.list()
        if char == "{":
            return self.object()
        if char == "<":
            return self.heredoc()
        start = self.at
        literal = self.match(_HCL_NUMBER)
        if literal is not None:
            if self.is_name():
                raise self.error("malformed number; a duration is written in quotes", start)
            return self.number(literal, start)
        word = self.match(_NAME)
        if word in ("true", "false"):
            return word == "true"
        if word is not None:
            raise self.error("expected a value; text is written in quotes", start)
        raise self.error(f"expected a value, found {self.describe()}")

    def list(self) -> list[Value]:
        self.enter()
        self.at += 1
        values: list[Value] = []
        while True:
            self.skip()
            if self.peek() == "]":
                break
            values.append(self.value())
            self.skip()
            if self.peek() == ",":
                self.at += 1
            elif self.peek() != "]":
                raise self.error(f'expected "," or "]", found {self.describe()}')
        self.at += 1
        self.leave()
        return values

    def object(self) -> ObjectValue:
        """An object value; blocks inside it become members, as HCL 1 makes no difference."""
        self.enter()
        self.at += 1
        body = self.body(end="}")
        self.leave()
        return self._object_of(body)

    def _object_of(self, body: Body) -> ObjectValue:
        result = ObjectValue()
        for name, attribute in body.attributes.items():
            result[name] = attribute.value
            result.positions[name] = (attribute.line, attribute.col)
        for block in body.blocks:
            if block.type in result:
                raise HCLError(f'"{block.type}" is set twice', self.filename, block.line, block.col)
            value = self._object_of(block.body)
            for label in reversed(block.labels):
                outer = ObjectValue()
                outer[label] = value
                outer.positions[label] = (block.line, block.col)
                value = outer
            result[block.type] = value
            result.positions[block.type] = (block.line, block.col)
        return result

    def string(self) -> str:
        start = self.at
        self.at += 1
        parts: list[str] = []
        while True:
            plain = self.match(_PLAIN)
            if plain is not None:
                parts.append(plain)
            char = self.peek()
            if char == '"':
                self.at += 1
                return "".join(parts)
            if char == "\\":
                parts.append(self.escape())
            elif char == "$":
                parts.append(self.dollar())
            else:
                raise self.error("string is not closed on its line", start)

    def escape(self) -> str:
        start = self.at
        self.at += 1
        simple = _SIMPLE_ESCAPES.get(self.peek())
        if simple is not None:
            self.at += 1
            return simple
        coded = self.match(_CODED_ESCAPE)
        if coded is not None:
            return self.code_point(coded[1:], start)
        octal = self.match(_OCTAL_ESCAPE)
        if octal is not None:
            return self.code_point(f"{int(octal, 8):x}", start)
        raise self.error("unknown escape in a string", start)

    def dollar(self) -> str:
        """``$``, or the whole of ``${...}`` as it stands: quotes inside it do not end the string."""
        start = self.at
        if not self.text.startswith("${", start):
            self.at += 1
            return "$"
        self.at += 1
        depth = 0
        while True:
            part = self.match(_INTERPOLATION_PART)
            if part is None:
                raise self.error('"${" is not closed', start)
            depth += {"{": 1, "}": -1}.get(part, 0)
            if depth == 0:
                return self.text[start : self.at]

    def heredoc(self) -> str:
        """``<<EOT`` keeps the lines; ``<<-EOT`` takes the closing line's indentation off if every line has it."""
        start = self.at
        opening = _HEREDOC.match(self.text, start)
        if opening is None:
            raise self.error("expected a here-document: <<NAME at the end of the line")
        closing = re.compile(rf"^([ \t]*){opening[2]}[ \t]*\r?$", re.MULTILINE).search(self.text, opening.end())
        if closing is None:
            raise self.error("here-document is not closed", start)
        self.at = closing.end()
        content = self.text[opening.end() : closing.start()]
        indent = closing[1]
        if not opening[1] or not indent:
            return content
        lines = content.splitlines(keepends=True)
        if not all(line.startswith(indent) for line in lines if line.strip()):
            return content
        return "".join(line.removeprefix(indent) for line in lines)
