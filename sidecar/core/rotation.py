"""Rotation of data keys: by command, by the configured age or number of uses, and always well before a key has sealed
2^32 values (NIST SP 800-38D).

The stored bound of a key's uses is raised in reservations ahead of the uses: a crash wastes the rest of a reservation,
it never hides a use.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest
from sidecar.core.keyring import Keyring
from sidecar.core.keys import ROTATION, keyring
from sidecar.core.store_view import SealedStore

ENCRYPTIONS_MAX = 3_865_470_566  # Vault's number: nine tenths of 2^32
RESERVATION = 1 << 22
# Of a ring made with the store: its first entries, and what is written before the first pass here.
FIRST_RESERVATION = 1 << 10
OPERATIONS_MIN = 1_000_000
INTERVAL_MIN_S = 24 * 3600


class RotationPolicy(msgspec.Struct, frozen=True):
    """When keys are rotated by themselves: after ``max_operations`` uses, and at the age ``interval_s`` (0: at none).
    Not ``enabled``: only where a key would otherwise be used too often to be safe. Replicated; every cluster keeps to
    it for the rings that are its own."""

    enabled: bool = True
    interval_s: int = 0
    max_operations: int = ENCRYPTIONS_MAX

    def check(self) -> None:
        """Raises InvalidRequest."""
        if not OPERATIONS_MIN <= self.max_operations <= ENCRYPTIONS_MAX:
            raise InvalidRequest(f"max_operations must be between {OPERATIONS_MIN} and {ENCRYPTIONS_MAX}")
        if self.interval_s and self.interval_s < INTERVAL_MIN_S:
            raise InvalidRequest("interval must be greater or equal to 24 hours")

    @property
    def reservation(self) -> int:
        """How many uses are reserved ahead: more than there are between two passes, and not all of ``max_operations``,
        as a restart counts every reserved use as made."""
        return min(RESERVATION, self.max_operations // 4)

    def due(self, used: int, age_s: float) -> bool:
        """Whether a key of this many uses and this age is to be replaced."""
        if used >= ENCRYPTIONS_MAX:
            return True
        return self.enabled and (used >= self.max_operations or 0 < self.interval_s <= age_s)


async def rotation_policy(sealed: SealedStore) -> RotationPolicy:
    """The policy in force; the default until one is set."""
    raw = await sealed.get(ROTATION)
    return RotationPolicy() if raw is None else msgspec.json.decode(raw, type=RotationPolicy)


async def set_rotation_policy(sealed: SealedStore, policy: RotationPolicy) -> None:
    """Raises InvalidRequest. The caller tests first that this cluster may write it."""
    policy.check()
    await sealed.put(ROTATION, msgspec.json.encode(policy))


async def rotate(sealed: SealedStore, storage_class: str, now_s: float, reservation: int = RESERVATION) -> Keyring:
    """Give the class's ring a fresh active key. The caller tests first that this cluster may write it."""
    ring = sealed.barrier.new_ring(storage_class, now_s).with_encryptions(reservation)
    return await _store(sealed, storage_class, ring, fresh=True)


async def maintain_keyrings(sealed: SealedStore, now: Callable[[], float], writable: Callable[[], bool]) -> None:
    """One pass: rotate what is due, reserve uses where the reservation runs out. To be called every few seconds;
    the first pass of a tenure comes before it has sealed a reservation's worth of values."""
    policy = await rotation_policy(sealed)
    for storage_class in ("r", "l"):
        if storage_class == "r" and not writable():
            continue
        barrier = sealed.barrier
        used, active = barrier.encryptions(storage_class), barrier.ring(storage_class).active
        if policy.due(used, now() - active.install_time_s):
            await rotate(sealed, storage_class, now(), policy.reservation)
        elif active.encryptions - used < policy.reservation // 2:
            ring = barrier.ring(storage_class).with_encryptions(used + policy.reservation)
            await _store(sealed, storage_class, ring, fresh=False)


async def keep_keys(sealed: SealedStore, now_s: float) -> None:
    """Store every key of every ring in use now in the private ring, so that what they sealed opens here for good,
    whatever rings arrive from another cluster."""
    await _store(sealed, "c", sealed.barrier.private_ring(now_s), fresh=False)


async def _store(sealed: SealedStore, storage_class: str, ring: Keyring, *, fresh: bool) -> Keyring:
    barrier = sealed.barrier
    await sealed.commit([Write(keyring(storage_class), barrier.encode_ring(storage_class, ring))])
    barrier.install(storage_class, ring, fresh=fresh)
    return ring
