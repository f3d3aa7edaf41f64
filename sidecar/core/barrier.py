"""The barrier: below it only ciphertext exists.

An entry is sealed with AES-256-GCM under the active key of its class's ring, a fresh random nonce, and its whole
logical key as additional data: moved to another key it no longer opens. Layout of a sealed value::

    version (1 byte) | key id (8) | nonce (12) | ciphertext and tag
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sidecar.core.keyring import KEY_ID_BYTES, Keyring
from sidecar.core.keys import LOCAL_KEYRING, PRIVATE_KEYRING, REPLICATED_KEYRING, keyring, partition_of
from sidecar.core.seal_record import NONCE_BYTES, WrongKey, root_fingerprint

VERSION = 1
HEADER_BYTES = 1 + KEY_ID_BYTES + NONCE_BYTES
OVERHEAD_BYTES = HEADER_BYTES + 16
# Above this a value is sealed in a thread: AES of megabytes would hold up the loop (and with it the session's beat).
THREAD_BYTES_MIN = 64 * 1024


class DecryptionFailed(Exception):
    """A stored value does not authenticate: corrupt, moved from another key, or sealed under another key. Names the
    class and partition only."""


class UnknownKey(DecryptionFailed):
    """The value names a data key that the ring does not hold (yet)."""


PUT_BACK = "put this one entry back from a backup of Consul (docs/operations.md, Backup)"
"""What to do where nothing else than a backup helps; ends an error's text."""


class BarrierMissing(Exception):
    """A keyring that must exist is not there."""


class _Ring:
    """A keyring ready for use, with the number of uses in this process."""

    def __init__(self, keyring: Keyring) -> None:
        self.keyring = keyring
        self.ciphers = {key_id: AESGCM(entry.key) for key_id, entry in keyring.keys.items()}
        self.active = self.ciphers[keyring.active_id]
        self.head = bytes([VERSION]) + keyring.active_id
        self.floor = keyring.active.encryptions
        self.used = 0


class Barrier:
    """Class ``r`` is sealed with the replicated ring, ``l`` with the local one, and ``c`` with the private ring, or the
    local one where there is none. The private ring also opens what the others no longer can: it keeps this cluster's
    own keys when rings of another cluster replace its own. Holds keys; never printed."""

    def __init__(
        self,
        root_key: bytes,
        replicated: Keyring,
        local: Keyring,
        private: Keyring | None = None,
        *,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._root_key = root_key
        self._random_bytes = random_bytes
        self._rings = {"r": _Ring(replicated), "l": _Ring(local)}
        if private is not None:
            self._rings["c"] = _Ring(private)
        self.root_fingerprint = root_fingerprint(root_key)

    def __repr__(self) -> str:
        return f"Barrier({self.root_fingerprint[:8]})"

    def root_key(self) -> bytes:
        """The root key itself: for activation, which hands it to a new secondary, and for nothing else."""
        return self._root_key

    def derived_key(self, label: bytes) -> bytes:
        """32 bytes for the one use that ``label`` names: the same on every node of every cluster under this root key.
        They reveal nothing of it."""
        return HKDF(SHA256(), 32, salt=None, info=label).derive(self._root_key)

    def seal(self, key: str, plaintext: bytes) -> bytes:
        """``plaintext`` as it is stored at logical ``key``."""
        return _seal(self._use(key), self._random_bytes(NONCE_BYTES), key, plaintext)

    def open(self, key: str, blob: bytes) -> bytes:
        """The plaintext of what is stored at logical ``key``. Raises DecryptionFailed."""
        if len(blob) < OVERHEAD_BYTES or blob[0] != VERSION:
            raise DecryptionFailed(f"an entry in {partition_of(key)} is not a sealed value")
        cipher = self._cipher(key, blob[1 : 1 + KEY_ID_BYTES])
        if cipher is None:
            raise UnknownKey(f"an entry in {partition_of(key)} is sealed with a key that is not in the keyring")
        try:
            return cipher.decrypt(blob[1 + KEY_ID_BYTES : HEADER_BYTES], blob[HEADER_BYTES:], key.encode())
        except InvalidTag:
            raise DecryptionFailed(f"an entry in {partition_of(key)} does not authenticate") from None

    async def seal_value(self, key: str, plaintext: bytes) -> bytes:
        """:meth:`seal`, in a thread when the value is big."""
        if len(plaintext) < THREAD_BYTES_MIN:
            return self.seal(key, plaintext)
        # Counted here, not in the thread: an upper bound of the uses must not lose one to a race.
        return await asyncio.to_thread(_seal, self._use(key), self._random_bytes(NONCE_BYTES), key, plaintext)

    async def open_value(self, key: str, blob: bytes) -> bytes:
        """:meth:`open`, in a thread when the value is big."""
        if len(blob) < THREAD_BYTES_MIN:
            return self.open(key, blob)
        return await asyncio.to_thread(self.open, key, blob)

    def ring(self, storage_class: str) -> Keyring:
        """The keyring that seals ``storage_class``."""
        return self._rings[self._name(storage_class)].keyring

    def encryptions(self, storage_class: str) -> int:
        """An upper bound of the uses of the active key, over all tenures."""
        ring = self._rings[self._name(storage_class)]
        return ring.floor + ring.used

    def install(self, storage_class: str, keyring: Keyring, *, fresh: bool = False) -> None:
        """Use ``keyring`` from now on; it must be committed. The same active key goes on counting; ``fresh`` says that
        the active key has sealed nothing yet."""
        name = storage_class
        old, new = self._rings.get(name), _Ring(keyring)
        if old is None:
            new.floor = 0
        elif old.keyring.active_id == keyring.active_id:
            new.floor, new.used = old.floor, old.used
        elif fresh:
            new.floor = 0
        self._rings[name] = new

    def encode_ring(self, storage_class: str, ring: Keyring) -> bytes:
        """``ring`` as it is stored at :func:`~sidecar.core.keys.keyring` of the class."""
        return ring.encode(self._root_key, keyring(storage_class), self._random_bytes)

    def load_ring(self, storage_class: str, raw: bytes) -> None:
        """Use the keyring in ``raw``: it arrived by replication. To be called before any entry under it is read. What
        the other cluster reserved counts as used: promoted, this one goes on from there. Raises WrongKey where the
        root key has changed too."""
        arrived = Keyring.decode(raw, self._root_key, keyring(storage_class))
        self.install(storage_class, arrived)
        ring = self._rings[self._name(storage_class)]
        ring.floor = max(ring.floor, arrived.active.encryptions)

    def new_ring(self, storage_class: str, now_s: float) -> Keyring:
        """The class's ring with a fresh active key, not yet in use."""
        return self.ring(storage_class).rotated(now_s, self._random_bytes)

    def _use(self, key: str) -> _Ring:
        ring = self._ring(key)
        ring.used += 1
        return ring

    def private_ring(self, now_s: float) -> Keyring:
        """A private ring that holds every key of every ring in use now, not yet in use itself."""
        private = self._rings.get("c")
        own = private.keyring if private is not None else Keyring.generate(now_s, self._random_bytes)
        keys = {key_id: entry for ring in self._rings.values() for key_id, entry in ring.keyring.keys.items()}
        return Keyring({**keys, **own.keys}, own.active_id)

    def _ring(self, key: str) -> _Ring:
        return self._rings[self._name(key[:1])]

    def _name(self, storage_class: str) -> str:
        """The ring that seals a class."""
        if storage_class == "r":
            return "r"
        return "c" if storage_class == "c" and "c" in self._rings else "l"

    def _cipher(self, key: str, key_id: bytes) -> AESGCM | None:
        """The class's own ring first, then the private one; an older entry of class ``c`` is the local ring's."""
        names = {"r": ("r", "c"), "l": ("l", "c")}.get(key[:1], ("c", "l"))
        for name in names:
            ring = self._rings.get(name)
            if ring is not None and key_id in ring.ciphers:
                return ring.ciphers[key_id]
        return None


def _seal(ring: _Ring, nonce: bytes, key: str, plaintext: bytes) -> bytes:
    return ring.head + nonce + ring.active.encrypt(nonce, plaintext, key.encode())


async def load_barrier(read_raw: Callable[[str], Awaitable[bytes | None]], root_key: bytes) -> Barrier:
    """The barrier from the stored keyrings. Raises WrongKey, BadKeyring, BarrierMissing, and what ``read_raw`` does."""
    rings = []
    for storage_key in (REPLICATED_KEYRING, LOCAL_KEYRING):
        raw = await read_raw(storage_key)
        if raw is None:
            raise BarrierMissing(f"there is no keyring at {storage_key}: {PUT_BACK}")
        rings.append(_opened(raw, root_key, storage_key))
    raw = await read_raw(PRIVATE_KEYRING)
    private = _opened(raw, root_key, PRIVATE_KEYRING) if raw is not None else None
    return Barrier(root_key, rings[0], rings[1], private)


def _opened(raw: bytes, root_key: bytes, storage_key: str) -> Keyring:
    try:
        return Keyring.decode(raw, root_key, storage_key)
    except WrongKey:
        raise WrongKey(f"the keyring at {storage_key} does not open, somebody else changed it: {PUT_BACK}") from None
