"""The generation pointer: which whole store is the current one, and which root key opens it.

A wipe (activation as a secondary) builds a new store under a fresh sub-prefix and then flips this pointer in one fenced
transaction; whatever fails before the flip leaves the cluster as it was.
"""

from __future__ import annotations

import logging

import msgspec

from consul_backend.errors import BackendError, Conflict, Corrupt, SentinelMissing
from consul_backend.failpoint import failpoint
from consul_backend.keys import own_folders
from consul_backend.physical import EPOCH_KEY, GENERATION_KEY, LOCK_KEY, SENTINEL_KEY, PhysicalStore
from consul_backend.replicated import drop_generation
from consul_backend.tenure import Tenure
from consul_backend.txn import Cas, CheckIndex, CheckSession, Op

log = logging.getLogger("core")


class Generation(msgspec.Struct, frozen=True):
    """``id``: the sub-prefix; ``store_id`` tells stores apart across wipes; ``root_fingerprint`` names the root key."""

    id: str
    store_id: str
    root_fingerprint: str


async def read_generation(physical: PhysicalStore) -> tuple[Generation, int] | None:
    """The pointer and its ModifyIndex, or None for a prefix that was never initialised.

    Raises SentinelMissing when only one of sentinel and pointer is there: that is no new cluster but a damaged or
    partly hidden one. Raises PermissionDenied, Unavailable, Corrupt.
    """
    sentinel, pointer = await physical.get_many([SENTINEL_KEY, GENERATION_KEY], consistent=True)
    if sentinel is None and pointer is None:
        return None
    if sentinel is None or pointer is None:
        missing = SENTINEL_KEY if sentinel is None else GENERATION_KEY
        raise SentinelMissing(
            f"the key {missing!r} is gone from this cluster's prefix while others are there: "
            "nothing is served or written; check the store's token and the prefix, then its backups"
        )
    return decode_generation(pointer.value), pointer.modify_index


def decode_generation(raw: bytes) -> Generation:
    """Raises Corrupt."""
    try:
        return msgspec.json.decode(raw, type=Generation)
    except msgspec.DecodeError as error:
        raise Corrupt(f"the key {GENERATION_KEY!r} does not hold a generation pointer: {error}") from None


def first_generation(generation: Generation) -> list[Op]:
    """Operations that make a prefix this cluster's own, if it is nobody's yet."""
    return [
        Cas(SENTINEL_KEY, generation.store_id.encode(), 0),
        Cas(GENERATION_KEY, msgspec.json.encode(generation), 0),
    ]


async def flip_generation(physical: PhysicalStore, tenure: Tenure, expected_index: int, target: Generation) -> None:
    """Make ``target`` the current store. Raises Conflict if the tenure is over or the pointer moved; OutcomeUnknown."""
    await physical.txn(
        [
            CheckSession(LOCK_KEY, tenure.session),
            CheckIndex(EPOCH_KEY, tenure.epoch_index),
            Cas(GENERATION_KEY, msgspec.json.encode(target), expected_index),
        ]
    )


async def drop_others(physical: PhysicalStore, kept: str, tenure: Tenure) -> None:
    """Delete every store but ``kept``, the one that the pointer named, read consistently, when ``tenure`` began. What
    cannot be deleted now is left to the next tenure."""
    for name in own_folders(await physical.list("g/", consistent=True)):
        generation = name.rstrip("/")
        if generation == kept:
            continue
        failpoint("activation:before-drop")
        try:
            await drop_generation(physical, generation, tenure)
            failpoint("activation:after-drop")
            log.info("deleted the replaced store generation %s", generation)
        except Conflict:
            return  # the tenure is over
        except BackendError as error:
            log.warning("the replaced store generation %s is not deleted yet: %s", generation, error)
