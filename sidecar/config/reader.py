"""Typed, total reading of one stanza of the configuration: every key has one type, and no key goes unnoticed.

A stanza's function asks a :class:`Reader` for each key it knows and then calls :meth:`Reader.finish`, which refuses
what was never asked for. Messages name file, line and key and never a value, which may be a secret.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from sidecar.hcl import Block, Body, HCLError, ObjectValue, Value, as_blocks

DURATION_S_MAX = 10**10


class ConfigError(ValueError):
    """The configuration cannot be used. The text begins with ``file:line`` where there is one."""


_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ns|us|µs|ms|s|m|h|d)", re.ASCII)
_DURATION = re.compile(rf"(?:{_DURATION_PART.pattern})+", re.ASCII)
_PLAIN_NUMBER = re.compile(r"[0-9]{1,18}(?:\.[0-9]{1,9})?", re.ASCII)
_SIZE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"([0-9]{1,18}) ?([kmg]i?b|b|)", re.ASCII | re.IGNORECASE)
_TRUE, _FALSE = {"1", "t", "true"}, {"0", "f", "false"}


def parse_duration_s(text: str) -> float:
    """Seconds of ``90``, ``1.5``, ``1h30m``, ``500ms``. Raises ValueError for all else, negative ones included."""
    stripped = text.strip()
    if _PLAIN_NUMBER.fullmatch(stripped):
        seconds = float(stripped)
    elif len(stripped) <= 64 and _DURATION.fullmatch(stripped):
        seconds = sum(float(part[1]) * _UNITS_S[part[2]] for part in _DURATION_PART.finditer(stripped))
    else:
        raise ValueError("not a duration")
    if seconds > DURATION_S_MAX:
        raise ValueError("duration is out of range")
    return seconds


def parse_boolean(text: str) -> bool:
    """``true``, ``t``, ``1`` and their opposites in any case. Raises ValueError."""
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError("not a boolean")


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that was probably meant."""
    import difflib  # only ever needed on the way to an error

    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return found[0] if found else None


class Reader:
    """One stanza, given by one body or, at the top level, by one body per file (a later file wins).

    ``title`` names it in messages, as ``storage "consul"``; the top level has none.
    """

    def __init__(self, bodies: Sequence[Body], title: str, warnings: list[str]) -> None:
        self._bodies = bodies
        self._title = title
        self._warnings = warnings
        self._known: set[str] = set()

    def error(self, name: str, problem: str) -> ConfigError:
        """An error at the place where ``name`` stands, as ``file:line: "name" in stanza problem``."""
        place = self.place(name)
        return ConfigError(f'{place}{": " if place else ""}"{name}"{self._where()} {problem}')

    def place(self, name: str) -> str:
        """``file:line`` of a key or block, "" if it is not there."""
        for body in reversed(self._bodies):
            if name in body.attributes:
                return f"{body.filename}:{body.attributes[name].line}"
            for block in body.blocks:
                if block.type == name:
                    return f"{body.filename}:{block.line}"
        return ""

    def text(self, name: str, default: str = "", choices: Collection[str] = ()) -> str:
        """Text in quotes; with ``choices`` one of those, whatever its case."""
        value = self._value(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(name, "must be text in quotes")
        if not choices:
            return value
        if value.lower() not in choices:
            raise self.error(name, f"must be one of {', '.join(choices)}")
        return value.lower()

    def text_or_newer(self, name: str, default: str, choices: Collection[str], older: Mapping[str, str]) -> str:
        """As :meth:`text`; a value of ``older`` counts as the one it maps to, with a warning."""
        value = self._value(name)
        if isinstance(value, str) and value.lower() in older:
            newer = older[value.lower()]
            self.warn(f'{self.place(name)}: "{name}"{self._where()}: "{value.lower()}" is too old; "{newer}" it is')
            return newer
        return self.text(name, default, choices)

    def boolean(self, name: str, default: bool = False) -> bool:
        """true and false, also as 1, 0 or in quotes, as Vault's own examples have them."""
        value = self._value(name)
        if value is None:
            return default
        if isinstance(value, bool | int | str):
            try:
                return parse_boolean(str(value))
            except ValueError:
                pass
        raise self.error(name, "must be true or false")

    def optional_boolean(self, name: str) -> bool | None:
        """As :meth:`boolean`; None where the key is not there."""
        return None if self._value(name) is None else self.boolean(name)

    def integer(self, name: str, default: int, minimum: int = 0) -> int:
        """A whole number, also in quotes."""
        value = self._value(name)
        if value is None:
            return default
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value.strip(), re.ASCII):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(name, "must be a whole number")
        if value < minimum:
            raise self.error(name, f"must be at least {minimum}")
        return value

    def size_bytes(self, name: str, default: int, minimum: int = 0) -> int:
        """A number of bytes, or text as ``64MiB``."""
        value = self._value(name)
        if isinstance(value, str):
            size = _SIZE.fullmatch(value.strip())
            if size is None:
                raise self.error(name, 'must be a number of bytes, or text as "64MiB"')
            amount = int(size[1]) * _SIZE_UNITS[size[2].lower()]
            if amount < minimum:
                raise self.error(name, f"must be at least {minimum} bytes")
            return amount
        return self.integer(name, default, minimum)

    def duration_s(self, name: str, default: float, minimum: float = 0.0) -> float:
        """Seconds: a number, or text as ``1h30m``."""
        value = self._value(name)
        if value is None:
            return default
        try:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError("not a duration")
            seconds = parse_duration_s(value if isinstance(value, str) else f"{value}")
        except ValueError:
            raise self.error(name, 'must be a duration, as 30 (seconds) or "1h30m"') from None
        if seconds < minimum:
            raise self.error(name, f"must be at least {minimum:g} seconds")
        return seconds

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, or one text with commas."""
        value = self._value(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.error(name, "must be a list of texts")
        return tuple(str(each) for each in value)

    def texts_as_given(self, name: str) -> tuple[str, ...]:
        """A list of texts, or one text, whatever it holds."""
        value = self._value(name)
        return (value,) if isinstance(value, str) else self.texts(name)

    def is_text(self, name: str, word: str) -> bool:
        """Whether the key is there and that word, whatever its case; for one that has another type else."""
        value = self._value(name)
        return isinstance(value, str) and value.strip().lower() == word

    def mapping(self, name: str) -> Mapping[str, str]:
        """An object of texts, written with or without ``=``."""
        members: dict[str, Value] = {}
        for block in self.blocks(name):
            if block.labels or block.body.blocks:
                raise self.error(name, "must be an object of texts")
            members.update((key, attribute.value) for key, attribute in block.body.attributes.items())
        if not all(isinstance(value, str) for value in members.values()):
            raise self.error(name, "must be an object of texts")
        return {key: str(value) for key, value in members.items()}

    def blocks(self, name: str) -> list[Block]:
        """Every block of this type in order, also those written as ``name = {...}``."""
        self._known.add(name)
        found: list[Block] = []
        for body in self._bodies:
            attribute = body.attributes.get(name)
            if attribute is not None:
                try:
                    found.extend(as_blocks(name, attribute, body.filename))
                except HCLError as error:
                    raise self.error(name, "must be a block in braces") from error
            found.extend(block for block in body.blocks if block.type == name)
        return found

    def block(self, name: str, labels: int) -> Block | None:
        """The one block of this type with that many labels; of several files the last one's, in one file only one."""
        last: Block | None = None
        for block in self.blocks(name):
            if len(block.labels) != labels:
                shape = f'{name} "type" {{...}}' if labels else f"{name} {{...}}"
                raise ConfigError(f"{block.body.filename}:{block.line}: expected {shape}")
            if last is not None and last.body.filename == block.body.filename:
                raise ConfigError(
                    f'{block.body.filename}:{block.line}: "{name}" is given twice; first on line {last.line}'
                )
            last = block
        return last

    def inner(self, block: Block) -> Reader:
        """A reader of one of the blocks."""
        label = "".join(f' "{label}"' for label in block.labels)
        return Reader([block.body], f"{block.type}{label}", self._warnings)

    def no_effect(self, reasons: Mapping[str, str]) -> None:
        """Keys and blocks that Vault knows and that mean nothing here, with the reason: a warning."""
        for name, reason in reasons.items():
            self._known.add(name)
            place = self.place(name)
            if place:
                self.warn(f'{place}: "{name}"{self._where()} has no effect: {reason}')

    def ignore(self, *names: str) -> None:
        """Keys that may stand there and are not looked at."""
        self._known.update(names)

    def not_available(self, **reasons: str) -> None:
        """Keys and blocks that must not be passed over, since something would be other than the file says."""
        for name, reason in reasons.items():
            self._known.add(name)
            if self.place(name):
                raise self.error(name, f"is not available: {reason}")

    def warn(self, text: str) -> None:
        self._warnings.append(text)

    def finish(self) -> None:
        """Refuse what nobody asked for."""
        for body in self._bodies:
            lines = {name: attribute.line for name, attribute in body.attributes.items()}
            lines.update((block.type, block.line) for block in body.blocks if block.type not in lines)
            for name, line in lines.items():
                if name in self._known:
                    continue
                meant = nearest(name, self._known)
                hint = f'; did you mean "{meant}"?' if meant else ""
                raise ConfigError(f'{body.filename}:{line}: unknown key "{name}"{self._where()}{hint}')

    def _where(self) -> str:
        return f" in {self._title}" if self._title else ""

    def _value(self, name: str) -> Value:
        self._known.add(name)
        for body in reversed(self._bodies):
            if any(block.type == name for block in body.blocks):
                raise self.error(name, "is a setting, not a block")
            attribute = body.attributes.get(name)
            if attribute is not None and attribute.value is not None:
                if isinstance(attribute.value, ObjectValue):
                    raise self.error(name, "is a setting, not a block")
                return attribute.value
        return None
