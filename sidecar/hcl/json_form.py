"""The JSON form of HCL: RFC 8259 with positions. Use it through :mod:`sidecar.hcl`."""

from __future__ import annotations

import re

from sidecar.hcl.scanner import ObjectValue, Scanner, Value

_BLANK = re.compile(r"[ \t\r\n]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![\w.])")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_WORD = re.compile(r"true|false|null")
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "/": "/"}
_UNICODE = re.compile(r"u([0-9a-fA-F]{4})")
_PAIR = re.compile(r"u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")


class JSONParser(Scanner):
    """One document. A repeated key is refused, as two readers would disagree about it."""

    def document(self) -> ObjectValue:
        self.skip()
        if self.peek() != "{":
            raise self.error(f'expected "{{", found {self.describe()}')
        value = self.object()
        self.skip()
        if self.peek():
            raise self.error(f"expected the end of the file, found {self.describe()}")
        return value

    def skip(self) -> None:
        self.match(_BLANK)

    def expect(self, char: str) -> None:
        self.skip()
        if self.peek() != char:
            raise self.error(f'expected "{char}", found {self.describe()}')
        self.at += 1
        self.skip()

    def object(self) -> ObjectValue:
        self.enter()
        self.expect("{")
        result = ObjectValue()
        while self.peek() != "}" or result:
            if self.peek() != '"':
                raise self.error(f"expected a name in quotes, found {self.describe()}")
            start = self.at
            name = self.string()
            if name in result:
                raise self.error(f'"{name}" is set twice', start)
            self.expect(":")
            result[name] = self.value()
            result.positions[name] = self.position(start)
            self.skip()
            if self.peek() == "}":
                break
            self.expect(",")
        self.at += 1
        self.leave()
        return result

    def list(self) -> list[Value]:
        self.enter()
        self.expect("[")
        values: list[Value] = []
        while self.peek() != "]" or values:
            values.append(self.value())
            self.skip()
            if self.peek() == "]":
                break
            self.expect(",")
        self.at += 1
        self.leave()
        return values

    def value(self) -> Value:
        char = self.peek()
        if char == "{":
            return self.object()
        if char == "[":
            return self.list()
        if char == '"':
            return self.string()
        start = self.at
        literal = self.match(_NUMBER)
        if literal is not None:
            return self.number(literal, start)
        word = self.match(_WORD)
        if word is None:
            raise self.error(f"expected a value, found {self.describe()}")
        return None if word == "null" else word == "true"

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
            if char != "\\":
                raise self.error("string is not closed on its line", start)
            parts.append(self.escape())

    def escape(self) -> str:
        start = self.at
        self.at += 1
        simple = _ESCAPES.get(self.peek())
        if simple is not None:
            self.at += 1
            return simple
        pair = self.match(_PAIR)
        if pair is not None:
            high, low = int(pair[1:5], 16), int(pair[7:11], 16)
            return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))
        coded = self.match(_UNICODE)
        if coded is None:
            raise self.error("unknown escape in a string", start)
        return self.code_point(coded[1:], start)
