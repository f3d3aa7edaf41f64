"""Auto seals: what opens a node's root key without anybody's shares.

A seal wraps and unwraps one 32-byte key. Which seal guards a cluster stands in its seal record
(:mod:`sidecar.core.seal_record`); which one a node can use stands in its configuration. :func:`needed` compares them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from sidecar.core.seal import KEY_BYTES
from sidecar.core.seal_record import AutoPart, SealRecord, make_auto_part, open_auto_part


class SealUnavailable(Exception):
    """The seal cannot wrap or unwrap now. The text is for the operator and says what to look at; it holds no secret.
    Trying again may help, also after somebody has repaired something elsewhere."""


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A key that the seal's key ``key_id`` has wrapped."""

    key_id: str
    blob: bytes = field(repr=False)


class AutoSeal(Protocol):
    """One configured seal. Its own secrets are in no repr, log or error."""

    @property
    def kind(self) -> str:
        """``static``, ``transit``: what ``sys/seal-status`` calls ``type``."""

    @property
    def key_id(self) -> str:
        """The name of the key it wraps with."""

    async def wrap(self, key: bytes) -> Wrapped:
        """Wrap 32 bytes. Raises SealUnavailable."""

    async def unwrap(self, wrapped: Wrapped) -> bytes:
        """What :meth:`wrap` was given. Raises SealUnavailable."""

    async def run(self) -> None:
        """Keep it usable (renew its token), until cancelled or until there is nothing to do."""

    async def close(self) -> None:
        """Give back its connections."""


class Need(enum.Enum):
    """What has to happen before this node is unsealed."""

    SHARES = "a threshold of the unseal shares"
    AUTO = "the auto seal"
    MIGRATION = "a threshold of the shares, given to change the seal"


def needed(record: SealRecord, seal: AutoSeal | None, disabled: Collection[str]) -> Need:
    """Compare a cluster's seal record with the configured ``seal`` and the kinds of those that are ``disabled``, which
    is how a configuration says that the cluster is to leave them. Pure."""
    if seal is None:
        return Need.SHARES if record.auto is None else Need.MIGRATION
    if record.auto is None or record.auto.kind != seal.kind:
        return Need.MIGRATION
    if seal.kind in disabled and record.auto.key_id != seal.key_id:
        return Need.MIGRATION  # from one seal to another of its kind
    return Need.AUTO


Sealer = Callable[[bytes], AutoPart]
"""Makes the auto seal's part of a seal record from a root key."""


async def prepare(seal: AutoSeal, random_bytes: Callable[[int], bytes]) -> Sealer:
    """Wrap a fresh key with ``seal``, to put a root key under. Whoever makes a root key prepares first, so that a seal
    that does not work stops it before anything has changed. Raises SealUnavailable."""
    key = random_bytes(KEY_BYTES)
    wrapped = await seal.wrap(key)
    return lambda root_key: make_auto_part(root_key, key, wrapped.blob, seal.kind, wrapped.key_id, random_bytes)


async def unseal_root_key(seal: AutoSeal, auto: AutoPart) -> bytes:
    """The root key in ``auto``. Raises SealUnavailable, and WrongKey where the record was tampered with."""
    return open_auto_part(auto, await seal.unwrap(Wrapped(auto.key_id, auto.wrapped_key)))
