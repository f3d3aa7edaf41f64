"""``seal "static"``: a 32-byte key that stands beside the configuration. Parameters as OpenBao documents them.

Rotation: the new key becomes the current one and the old one the previous one; what the previous key has wrapped still
opens, and the active node then wraps the root key with the current one.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sidecar.core.seal import KEY_BYTES
from sidecar.core.seal_record import NONCE_BYTES
from sidecar.core.seals import SealUnavailable, Wrapped

KIND = "static"
_KEY_FILE_BYTES_MAX = 4096


class BadStaticKey(ValueError):
    """The key cannot be read or is none. Names where it should come from, never what was found there."""


@dataclass(frozen=True, slots=True)
class StaticKey:
    """A key and the name that it has for good."""

    key_id: str
    key: bytes = field(repr=False)


class StaticSeal:
    """Implements :class:`sidecar.core.seals.AutoSeal`."""

    kind = KIND

    def __init__(
        self, current: StaticKey, previous: StaticKey | None, *, random_bytes: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._current = current
        self._keys = {key.key_id: key.key for key in (previous, current) if key is not None}
        self._random_bytes = random_bytes

    @property
    def key_id(self) -> str:
        return self._current.key_id

    async def wrap(self, key: bytes) -> Wrapped:
        nonce = self._random_bytes(NONCE_BYTES)
        return Wrapped(self.key_id, nonce + AESGCM(self._current.key).encrypt(nonce, key, _data(self.key_id)))

    async def unwrap(self, wrapped: Wrapped) -> bytes:
        key = self._keys.get(wrapped.key_id)
        if key is None:
            raise SealUnavailable(
                f'the root key is sealed with the static key "{wrapped.key_id}", and the configuration has only '
                f"{' and '.join(repr(known) for known in self._keys)}: give that key as previous_key, with its id"
            )
        try:
            return AESGCM(key).decrypt(wrapped.blob[:NONCE_BYTES], wrapped.blob[NONCE_BYTES:], _data(wrapped.key_id))
        except (InvalidTag, ValueError):
            raise SealUnavailable(
                f'the static key "{wrapped.key_id}" does not open what was sealed with the key of that name: '
                "it is another key, or the seal record was damaged"
            ) from None

    async def run(self) -> None:
        return

    async def close(self) -> None:
        return


def _data(key_id: str) -> bytes:
    return f"outrider static seal v1\n{key_id}".encode()


def load_static_key(name: str, key_id: str, value: str, environ: Mapping[str, str], warnings: list[str]) -> StaticKey:
    """The key that the setting ``name`` gives: as text (base64 or hex), as ``env://VARIABLE``, or as ``file://PATH``,
    whose content may also be the 32 bytes themselves. Raises BadStaticKey; adds to ``warnings``."""
    if value.startswith("env://"):
        variable = value.removeprefix("env://")
        text = environ.get(variable, "")
        if not text:
            raise BadStaticKey(f"{name}: the environment variable {variable} is not set")
        return StaticKey(key_id, _decoded(f"{name}: the environment variable {variable}", text))
    if value.startswith("file://"):
        path = value.removeprefix("file://")
        return StaticKey(key_id, _decoded(f"{name}: the file {path}", _read(name, path, warnings)))
    return StaticKey(key_id, _decoded(name, value))


def _read(name: str, path: str, warnings: list[str]) -> bytes:
    try:
        with Path(path).open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(_KEY_FILE_BYTES_MAX)
    except OSError as error:
        raise BadStaticKey(f"{name}: the file {path}: {error.strerror}") from None
    if mode & 0o077:
        warnings.append(f"{name}: the file {path} can be read by others (mode {mode:04o}); make it 0600")
    return content


def _decoded(where: str, value: str | bytes) -> bytes:
    if isinstance(value, bytes) and len(value) == KEY_BYTES:
        return value
    text = (value.decode("latin-1") if isinstance(value, bytes) else value).strip()
    key = b""
    with suppress(ValueError, binascii.Error):
        key = bytes.fromhex(text) if len(text) == 2 * KEY_BYTES else base64.b64decode(text, validate=True)
    if len(key) != KEY_BYTES:
        raise BadStaticKey(f"{where} does not hold a key of {KEY_BYTES} bytes in base64 or hex")
    return key
