"""HCL, version 1, and its JSON form: the language of Vault's configuration files and policies.

Version 1 differs from HCL 2 where it matters to users: a block may hold several attributes on one line, an object may
be written with or without ``=``, and there are no expressions (``${...}`` in a string stays as it is). Either form
gives the same :class:`Body`; :func:`parse_any` decides by the first character, as Vault does.

Every defect of the input raises :class:`HCLError` with its position, and nothing else is ever raised. Messages name
keys and positions and never a value, since a configuration file may hold a token.

Stricter than the original on purpose: one name may be assigned only once in a body (there the last one silently wins,
which in a policy is a trap). Blocks may repeat.
"""

from __future__ import annotations

import re

from sidecar.hcl_json import JSONParser
from sidecar.hcl_scanner import Attribute, Block, Body, HCLError, ObjectValue, Scanner, Value

__all__ = [
    "Attribute",
    "Block",
    "Body",
    "HCLError",
    "ObjectValue",
    "Value",
    "as_blocks",
    "parse",
    "parse_any",
    "parse_json",
]


def parse(text: str, filename: str = "<text>") -> Body:
    """Parse HCL 1. Raises HCLError."""
    return _HCL(text, filename).body(end="")


def parse_json(text: str, filename: str = "<text>") -> Body:
    """Parse the JSON form into the structure the HCL form would give. Raises HCLError.

    JSON has no blocks, so at the top level an object of objects (``{"path": {"secret/*": {...}}}``) is read as
    labelled blocks, any other object (``{"telemetry": {"x": 1}}``) as a block without label, and a list of objects as
    a repetition. Deeper objects stay attributes; :func:`as_blocks` turns one into blocks where a schema says it is one.
    """
    top = JSONParser(text, filename).document()
    body = Body(filename)
    for name, value in top.items():
        line, col = top.positions[name]
        attribute = Attribute(value, line, col)
        if _is_object_or_objects(value):
            body.blocks.extend(as_blocks(name, attribute, filename))
        else:
            body.attributes[name] = attribute
    return body


def parse_any(text: str, filename: str = "<text>") -> Body:
    """Parse JSON if the first visible character is ``{``, else HCL 1. Raises HCLError."""
    if text.lstrip("\ufeff \t\r\n").startswith("{"):
        return parse_json(text, filename)
    return parse(text, filename)


def as_blocks(name: str, attribute: Attribute, filename: str = "<text>") -> list[Block]:
    """The blocks that ``name = {...}`` or ``name = [{...}, ...]`` stands for; HCL 1 makes no difference between them.

    An object whose members are all objects gives labelled blocks, any other one block without label. Raises HCLError if
    the value is something else.
    """
    if not _is_object_or_objects(attribute.value):
        raise HCLError(f'"{name}" must be a block', filename, attribute.line, attribute.col)
    blocks: list[Block] = []
    for each in _objects(attribute.value):
        if each and all(_is_object_or_objects(member) for member in each.values()):
            for label, member in each.items():
                line, col = each.positions[label]
                blocks.extend(Block(name, (label,), _body_of(inner, filename), line, col) for inner in _objects(member))
        else:
            blocks.append(Block(name, (), _body_of(each, filename), attribute.line, attribute.col))
    return blocks


def _is_object_or_objects(value: Value) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, ObjectValue) for each in value)
    return isinstance(value, ObjectValue)


def _objects(value: Value) -> list[ObjectValue]:
    several = value if isinstance(value, list) else [value]
    return [each for each in several if isinstance(each, ObjectValue)]


def _body_of(value: ObjectValue, filename: str) -> Body:
    attributes = {name: Attribute(member, *value.positions[name]) for name, member in value.items()}
    return Body(filename, attributes)


_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*|//[^\n]*|/\*.*?\*/)+", re.DOTALL)
_NAME = re.compile(r"[^\W\d][\w.-]*")
_HCL_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)")
_PLAIN = re.compile(r'[^"\\\n$]+')
_HEREDOC = re.compile(r"<<(-?)(\w+)[ \t]*\r?\n", re.ASCII)
_SIMPLE_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", '"': '"'}
_CODED_ESCAPE = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})")
_OCTAL_ESCAPE = re.compile(r"[0-7]{3}")
_INTERPOLATION_PART = re.compile(r'"(?:[^"\\\n]|\\.)*"|[{}]')


class _HCL(Scanner):
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
        depth = 0
        for part in _INTERPOLATION_PART.finditer(self.text, start + 1):
            depth += {"{": 1, "}": -1}.get(part.group(), 0)
            if depth == 0:
                self.at = part.end()
                return self.text[start : self.at]
        raise self.error('"${" is not closed', start)

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
