"""Base64 as clients send it, and the versioned form of ciphertexts, signatures and HMACs. Pure."""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass

from plugin_api.errors import InvalidRequest

PIECE_CHARS = 1 << 20
"""Base64 characters converted at a time, a multiple of four: converting holds the interpreter, here 3 ms."""

VERSION_MAX = 2**31 - 1

_PREFIX = re.compile(r"vault:v([1-9][0-9]{0,9}):", re.ASCII)
_URL_SAFE = str.maketrans("-_", "+/")
_NEWLINES = str.maketrans("", "", "\r\n")


class InvalidBase64(InvalidRequest):
    """What was sent is not base64; the text says which field."""


def decode_base64(text: str, field: str) -> bytes:
    """The bytes of standard padded base64; line breaks are ignored. Raises InvalidBase64, which names ``field``."""
    if "\n" in text or "\r" in text:
        text = text.translate(_NEWLINES)
    if len(text) <= PIECE_CHARS:
        return _decode(text, field)
    pieces = [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]
    if any("=" in piece for piece in pieces[:-1]):
        raise _not_base64(field)
    return b"".join(_decode(piece, field) for piece in pieces)


def encode_base64(data: bytes) -> str:
    """Standard padded base64."""
    step = PIECE_CHARS // 4 * 3
    if len(data) <= step:
        return binascii.b2a_base64(data, newline=False).decode()
    pieces = (data[start : start + step] for start in range(0, len(data), step))
    return "".join(binascii.b2a_base64(piece, newline=False).decode() for piece in pieces)


def decode_base64_url(text: str, field: str) -> bytes:
    """The bytes of URL-safe base64 without padding. Raises InvalidBase64."""
    if "=" in text or "+" in text or "/" in text:
        raise _not_base64(field)
    return _decode(text.translate(_URL_SAFE) + "=" * (-len(text) % 4), field)


def encode_base64_url(data: bytes) -> str:
    """URL-safe base64 without padding."""
    return encode_base64(data).rstrip("=").replace("+", "-").replace("/", "_")


def _decode(text: str, field: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise _not_base64(field) from None


def _not_base64(field: str) -> InvalidBase64:
    return InvalidBase64(f"failed to base64-decode {field}")


@dataclass(frozen=True, slots=True)
class Versioned:
    """``vault:v<version>:<body>``."""

    version: int
    body: str

    def __str__(self) -> str:
        return f"vault:v{self.version}:{self.body}"


def parse_versioned(text: str, what: str) -> Versioned:
    """Split a ciphertext, signature or HMAC; ``what`` names it in errors. Raises InvalidRequest."""
    match = _PREFIX.match(text)
    if match is None:
        raise InvalidRequest(f"invalid {what}: no prefix" if not text.startswith("vault:v") else _bad_version(what))
    version = int(match[1])
    if version > VERSION_MAX:
        raise InvalidRequest(_bad_version(what))
    return Versioned(version, text[match.end() :])


def _bad_version(what: str) -> str:
    return f"invalid {what}: version number could not be decoded"
