"""Password policies: how long a generated password is, and what it is made of. Parsing and choosing are pure.

    length = 20
    rule "charset" { charset = "abcdefghijklmnopqrstuvwxyz"  min-chars = 1 }

A candidate is drawn evenly from all characters of all rules together, and drawn again until every rule holds: so every
password that the rules allow is equally likely.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, NotFound, PluginError, ReadOnlyStorage
from sidecar.core.keys import PASSWORD_POLICIES
from sidecar.core.store_view import SealedStore
from sidecar.hcl import Block, HCLError, parse_any

LENGTH_MIN, LENGTH_MAX = 4, 100
CHARSET_MAX = 4096
"""Characters of one rule."""
RULES_MAX = 32
TRIES_MAX = 400
"""Candidates for one password; a policy that needs more is refused."""
_PROOFS = 10
_NAME = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)

RandomBytes = Callable[[int], bytes]


class TooStrict(Exception):
    """No candidate kept the rules within :data:`TRIES_MAX`."""


@dataclass(frozen=True, slots=True)
class CharsetRule:
    """At least ``min_chars`` characters of a password are in ``charset``."""

    charset: frozenset[str]
    min_chars: int

    def holds(self, password: Sequence[str]) -> bool:
        """Whether ``password`` keeps it."""
        return sum(character in self.charset for character in password) >= self.min_chars


@dataclass(frozen=True, slots=True)
class PasswordPolicy:
    """One policy; ``alphabet`` is every character that a rule names, each once."""

    length: int
    rules: tuple[CharsetRule, ...]
    alphabet: str

    @classmethod
    def parse(cls, text: str) -> PasswordPolicy:
        """Raises InvalidRequest that says what is wrong."""
        try:
            body = parse_any(text, "policy")
        except HCLError as error:
            raise _error(str(error)) from None
        for name in body.attributes:
            if name != "length":
                raise _error(f'invalid key "{name}"')
        length = body.attributes["length"].value if "length" in body.attributes else 0
        if not isinstance(length, int) or isinstance(length, bool) or not LENGTH_MIN <= length <= LENGTH_MAX:
            raise _error(f"length must be a number from {LENGTH_MIN} to {LENGTH_MAX}")
        if not 1 <= len(body.blocks) <= RULES_MAX:
            raise _error(f"there must be 1 to {RULES_MAX} rules")
        charsets = [_charset(block) for block in body.blocks]
        rules = tuple(CharsetRule(frozenset(charset), minimum) for charset, minimum in charsets)
        if sum(rule.min_chars for rule in _disjoint(rules)) > length:
            raise _error("the rules ask for more characters than the length allows")
        alphabet = "".join(dict.fromkeys(character for charset, _ in charsets for character in charset))
        return cls(length, rules, alphabet)

    def generate(self, random_bytes: RandomBytes) -> str:
        """A password. Raises :class:`TooStrict`."""
        for _ in range(TRIES_MAX):
            candidate = _draw(self.alphabet, self.length, random_bytes)
            if all(rule.holds(candidate) for rule in self.rules):
                return candidate
        raise TooStrict


def _charset(block: Block) -> tuple[str, int]:
    if block.type != "rule" or block.labels != ("charset",) or block.body.blocks:
        raise _error(f'line {block.line}: only rules of the form rule "charset" {{ … }} are known')
    values: dict[str, Any] = {name: attribute.value for name, attribute in block.body.attributes.items()}
    # Both spellings are in use.
    minimum = values.pop("min-chars", values.pop("min_chars", 0))
    charset = values.pop("charset", "")
    if values:
        raise _error(f'line {block.line}: invalid key "{min(values)}"')
    if not isinstance(charset, str) or not charset or len(charset) > CHARSET_MAX or not charset.isprintable():
        raise _error(f"line {block.line}: charset must be 1 to {CHARSET_MAX} printable characters")
    if not isinstance(minimum, int) or isinstance(minimum, bool) or not 0 <= minimum <= LENGTH_MAX:
        raise _error(f"line {block.line}: min-chars must be a number from 0 to {LENGTH_MAX}")
    return charset, minimum


def _disjoint(rules: Sequence[CharsetRule]) -> list[CharsetRule]:
    """Rules that share no character with one chosen before: their minima add up."""
    chosen: list[CharsetRule] = []
    for rule in sorted(rules, key=lambda one: -one.min_chars):
        if all(rule.charset.isdisjoint(other.charset) for other in chosen):
            chosen.append(rule)
    return chosen


def _draw(alphabet: str, length: int, random_bytes: RandomBytes) -> str:
    """``length`` characters, each as likely as any other: a number beyond the last whole multiple is thrown away."""
    size = len(alphabet)
    width = 1 if size <= 256 else 3
    usable = 256**width - 256**width % size
    drawn: list[str] = []
    while len(drawn) < length:
        raw = random_bytes(width * 2 * length)
        for start in range(0, len(raw), width):
            number = int.from_bytes(raw[start : start + width], "big")
            if number < usable and len(drawn) < length:
                drawn.append(alphabet[number % size])
    return "".join(drawn)


def _error(message: str) -> InvalidRequest:
    return InvalidRequest(f"invalid password policy: {message}")


def decoded_text(given: str) -> str:
    """A policy document of any kind, which may have been sent in base64, also broken into lines."""
    try:
        raw = base64.b64decode(given.replace("\r", "").replace("\n", ""), validate=True).decode()
    except (binascii.Error, ValueError):
        return given
    return raw if raw.strip() else given


class PasswordPolicies:
    """Password policies by name, replicated."""

    def __init__(self, sealed: SealedStore, writable: Callable[[], bool], random_bytes: RandomBytes) -> None:
        self._sealed = sealed
        self._writable = writable
        self._random_bytes = random_bytes

    async def get(self, name: str) -> str | None:
        """The policy's text, or None."""
        raw = await self._sealed.get(PASSWORD_POLICIES + _checked(name))
        return None if raw is None else raw.decode()

    async def put(self, name: str, text: str) -> None:
        """Store a policy that can be kept. Raises InvalidRequest, ReadOnlyStorage."""
        if not text:
            raise InvalidRequest("missing policy")
        policy = PasswordPolicy.parse(text)
        try:
            for _ in range(_PROOFS):
                policy.generate(self._random_bytes)
        except TooStrict:
            raise _error("hardly any password keeps all its rules") from None
        await self._commit(name, text.encode())

    async def delete(self, name: str) -> None:
        """A missing one is no failure. Raises InvalidRequest, ReadOnlyStorage."""
        await self._commit(name, None)

    async def list(self) -> list[str]:
        """Sorted names."""
        return sorted(await self._sealed.list(PASSWORD_POLICIES))

    async def generate(self, name: str) -> str:
        """A password by the policy ``name``. Raises NotFound, PluginError."""
        text = await self.get(name)
        if text is None:
            raise NotFound("no password policy of this name")
        try:
            return PasswordPolicy.parse(text).generate(self._random_bytes)
        except TooStrict:
            raise PluginError("no password was found that keeps the policy's rules") from None

    async def _commit(self, name: str, value: bytes | None) -> None:
        key = PASSWORD_POLICIES + _checked(name)
        if not self._writable():
            raise ReadOnlyStorage
        await self._sealed.commit([Write(key, value)])


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidRequest("a policy name holds letters, digits, '_', '.' and '-'")
    return name.lower()
