"""Values as an audit entry shows them: texts as keyed hashes, booleans as they are, numbers as the device wants it.
Pure."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from sidecar.core.keyed_hash import KeyedHash

SALT_BYTES = 32
_PREFIX = "hmac-sha256:"
_NONE: Set[str] = frozenset()


class Hasher:
    """Hashes under one device's salt; with ``numbers`` it hashes those too, as their digits."""

    __slots__ = ("_keyed", "_numbers")

    def __init__(self, salt: bytes, *, numbers: bool = False) -> None:
        self._numbers = numbers
        self._keyed = KeyedHash(salt)

    def text(self, text: str) -> str:
        """``hmac-sha256:<hex>``; what ``sys/audit-hash`` answers."""
        return self._bytes(text.encode("utf-8", "surrogatepass"))

    def values(self, value: Any, clear: Set[str] = _NONE, name: str = "") -> Any:
        """``value`` with every text in it hashed, at any depth. Names of members stay, and so do the texts directly
        below a name in ``clear`` (also those of a list there)."""
        if isinstance(value, str):
            return value if name in clear else self.text(value)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int | float):
            return self.text(str(value)) if self._numbers and name not in clear else value
        if isinstance(value, Mapping):
            return {str(key): self.values(item, clear, str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.values(item, clear, name) for item in value]
        if isinstance(value, bytes):
            return self._bytes(value)
        # Nothing may pass in clear because nobody thought of its type.
        return self.text(str(value))

    def _bytes(self, data: bytes) -> str:
        return _PREFIX + self._keyed.digest(data).hex()
