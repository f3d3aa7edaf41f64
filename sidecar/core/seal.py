"""Shamir's secret sharing over GF(2^8), in the share format of Vault: the bytes of y, then one byte x.

The field is the one of AES (polynomial 0x11b). Arithmetic works on all bytes of a secret at once, packed in one
integer, with masks instead of tables and branches: no memory access or branch depends on a secret byte.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

from plugin_api.errors import InvalidRequest

SHARES_MAX = 255
KEY_BYTES = 32
SHARE_BYTES_MIN = 16
SHARE_BYTES_MAX = KEY_BYTES + 1


class InvalidShares(ValueError):
    """The shares cannot be combined: too few, of unequal length, or two for one x."""


@lru_cache(maxsize=8)
def _repeat(byte: int, length: int) -> int:
    return int.from_bytes(bytes([byte]) * length, "big")


def _scale(packed: int, factor: int, length: int) -> int:
    """Each of the ``length`` bytes of ``packed`` times the field element ``factor``."""
    low, ones = _repeat(0x7F, length), _repeat(0x01, length)
    product = 0
    for _ in range(8):
        product ^= packed & -(factor & 1)
        factor >>= 1
        packed = ((packed & low) << 1) ^ (((packed >> 7) & ones) * 0x1B)
    return product


def _multiply(left: int, right: int) -> int:
    product = 0
    for _ in range(8):
        product ^= left & -(right & 1)
        right >>= 1
        left = ((left & 0x7F) << 1) ^ ((left >> 7) * 0x1B)
    return product


def _invert(element: int) -> int:
    """The inverse by exponentiation to 254 (of 0: 0)."""
    power, result = element, 1
    for _ in range(7):
        power = _multiply(power, power)
        result = _multiply(result, power)
    return result


def _coordinates(count: int, random_bytes: Callable[[int], bytes]) -> list[int]:
    """``count`` distinct x in 1..255, uniformly."""
    chosen: list[int] = []
    while len(chosen) < count:
        for candidate in random_bytes(count):
            if candidate and candidate not in chosen and len(chosen) < count:
                chosen.append(candidate)
    return chosen


def split(secret: bytes, shares: int, threshold: int, random_bytes: Callable[[int], bytes]) -> list[bytes]:
    """``shares`` shares of which any ``threshold`` restore ``secret``. With one share, the share is the secret."""
    SealConfig(shares, threshold).validate()
    if not secret:
        raise ValueError("an empty secret cannot be split")
    if shares == 1:
        return [secret]
    length = len(secret)
    coefficients = [int.from_bytes(random_bytes(length), "big") for _ in range(threshold - 1)]
    constant = int.from_bytes(secret, "big")
    made = []
    for x in _coordinates(shares, random_bytes):
        y = 0
        for coefficient in coefficients:
            y = _scale(y ^ coefficient, x, length)
        made.append((y ^ constant).to_bytes(length, "big") + bytes([x]))
    return made


def combine(shares: Sequence[bytes]) -> bytes:
    """The secret, if these are enough shares of it; otherwise some other bytes. Raises InvalidShares."""
    if not shares:
        raise InvalidShares("no shares")
    if len(shares) == 1:
        return shares[0]
    length = len(shares[0]) - 1
    if length < 1 or any(len(share) != length + 1 for share in shares):
        raise InvalidShares("shares must have one length of at least two bytes")
    points = [share[-1] for share in shares]
    _check_points(points)
    product = reduce(_multiply, points)
    secret = 0
    for x, share in zip(points, shares, strict=True):
        # Lagrange at zero: the product of all other points over the product of their distances from this one.
        distances = reduce(_multiply, (other ^ x for other in points if other != x), x)
        weight = _multiply(product, _invert(distances))
        secret ^= _scale(int.from_bytes(share[:-1], "big"), weight, length)
    return secret.to_bytes(length, "big")


def _check_points(points: Sequence[int]) -> None:
    """A share at zero would be the secret, and with it every other share counts for nothing; of two at one place one
    could be anybody's."""
    if 0 in points or len(set(points)) != len(points):
        raise InvalidShares("shares must have distinct coordinates other than zero")


@dataclass(frozen=True, slots=True)
class SealConfig:
    """How many shares the unseal key is split into and how many restore it."""

    shares: int
    threshold: int

    def validate(self) -> None:
        """Raises InvalidRequest with the text clients know."""
        problem = ""
        if self.shares < 1:
            problem = "shares must be at least one"
        elif self.shares > SHARES_MAX:
            problem = f"shares must be less than {SHARES_MAX + 1}"
        elif self.threshold < 1:
            problem = "threshold must be at least one"
        elif self.threshold > self.shares:
            problem = "threshold cannot be larger than shares"
        elif self.shares > 1 and self.threshold == 1:
            problem = "threshold must be greater than one for multiple shares"
        if problem:
            raise InvalidRequest(f"invalid seal configuration: {problem}")


def decode_share(text: str) -> bytes:
    """The bytes of a share that was given as hex or as standard base64. Raises InvalidRequest."""
    try:
        return bytes.fromhex(text) if _is_hex(text) else base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise InvalidRequest("'key' must be a valid hex or base64 string") from None


def _is_hex(text: str) -> bool:
    # 32 and 33 bytes have 64 and 66 hex digits; base64 of them has 44 characters, so that no text is both.
    return len(text) % 2 == 0 and all(character in "0123456789abcdefABCDEF" for character in text)


class UnsealAttempt:
    """Shares given so far. Pure: the caller draws the nonce, which names the attempt while shares are held."""

    def __init__(self, config: SealConfig, nonce: str = "") -> None:
        self.config = config
        self._nonce = nonce
        self._shares: list[bytes] = []

    @property
    def progress(self) -> int:
        """How many different shares are held."""
        return len(self._shares)

    @property
    def nonce(self) -> str:
        """The name of this attempt; empty while no share is held."""
        return self._nonce if self._shares else ""

    def has(self, share: bytes) -> bool:
        """Whether exactly this share was given already."""
        return any(hmac.compare_digest(share, held) for held in self._shares)

    def provide(self, share: bytes) -> bytes | None:
        """The combined key once enough shares are held (and the attempt starts over), else None.

        A repeated share changes nothing. Raises InvalidRequest for an impossible length, and InvalidShares, after
        which the attempt starts over, where shares contradict each other.
        """
        if len(share) < SHARE_BYTES_MIN:
            raise InvalidRequest(f"key is shorter than minimum {SHARE_BYTES_MIN} bytes")
        if len(share) > SHARE_BYTES_MAX:
            raise InvalidRequest(f"key is longer than maximum {SHARE_BYTES_MAX} bytes")
        if not self.has(share):
            self._shares.append(share)
        if len(self._shares) < self.config.threshold:
            return None
        shares, self._shares = self._shares, []
        return combine(shares)

    def reset(self, nonce: str = "") -> None:
        """Forget the shares; ``nonce`` names the next attempt."""
        self._shares = []
        self._nonce = nonce

    def __repr__(self) -> str:
        return f"UnsealAttempt({self.progress}/{self.config.threshold})"
