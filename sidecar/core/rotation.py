"""Rotation of data keys: by command, and by itself well before a key has sealed 2^32 values (NIST SP 800-38D).

The stored bound of a key's uses is raised in reservations ahead of the uses: a crash wastes the rest of a reservation,
it never hides a use.
"""

from __future__ import annotations

from collections.abc import Callable

from consul_backend.wal import Write
from sidecar.core.barrier import Barrier
from sidecar.core.keyring import Keyring
from sidecar.core.keys import keyring
from sidecar.core.store_view import SealedStore

ENCRYPTIONS_MAX = 3_865_470_566  # Vault's number: nine tenths of 2^32
RESERVATION = 1 << 22
# Of a ring made with the store: its first entries, and what is written before the first pass here.
FIRST_RESERVATION = 1 << 10


async def rotate(sealed: SealedStore, storage_class: str, now_s: float) -> Keyring:
    """Give the class's ring a fresh active key. The caller tests first that this cluster may write it."""
    ring = sealed.barrier.new_ring(storage_class, now_s).with_encryptions(RESERVATION)
    return await _store(sealed, storage_class, ring, fresh=True)


async def maintain_keyrings(sealed: SealedStore, now: Callable[[], float], writable: Callable[[], bool]) -> None:
    """One pass: rotate what is due, reserve uses where the reservation runs out. To be called every minute or so;
    the first pass of a tenure comes before it has sealed a reservation's worth of values."""
    for storage_class in ("r", "l"):
        if storage_class == "r" and not writable():
            continue
        barrier = sealed.barrier
        used = barrier.encryptions(storage_class)
        if used >= ENCRYPTIONS_MAX:
            await rotate(sealed, storage_class, now())
        elif _reserved(barrier, storage_class) - used < RESERVATION // 2:
            ring = barrier.ring(storage_class)
            await _store(sealed, storage_class, ring.with_encryptions(used + RESERVATION), fresh=False)


async def keep_keys(sealed: SealedStore, now_s: float) -> None:
    """Store every key of every ring in use now in the private ring, so that what they sealed opens here for good,
    whatever rings arrive from another cluster."""
    await _store(sealed, "c", sealed.barrier.private_ring(now_s), fresh=False)


def _reserved(barrier: Barrier, storage_class: str) -> int:
    return barrier.ring(storage_class).active.encryptions


async def _store(sealed: SealedStore, storage_class: str, ring: Keyring, *, fresh: bool) -> Keyring:
    barrier = sealed.barrier
    await sealed.commit([Write(keyring(storage_class), barrier.encode_ring(storage_class, ring))])
    barrier.install(storage_class, ring, fresh=fresh)
    return ring
