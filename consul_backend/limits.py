"""What one store transaction may hold, and how big an operation is on the wire. Pure.

Every number here has a source, and every store enforces the same ones by :func:`require_fit`, so that what passes on
EmbeddedStore passes on Consul.

==================  ========  =======================================================================================
``ops_max``             64    operations of one transaction on Consul 1.8 (measured: 65 answers 413); 128 since 1.14
``body_bytes_max``  524288    the whole JSON body of ``PUT /v1/txn``, base64 counted (``txn_max_req_len``, measured)
``value_bytes_max`` 524288    one value (``kv_max_value_size``); inside a transaction the body limit is met long before
==================  ========  =======================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from consul_backend.errors import TooLarge
from consul_backend.txn import (
    Cas,
    CheckIndex,
    CheckNotExists,
    CheckSession,
    Delete,
    DeleteTree,
    Get,
    Lock,
    Op,
    Set,
    Unlock,
)

OPS_MIN = 4
"""Fence, chain check, one data operation and the record: with fewer nothing can be committed."""

BODY_BYTES_MIN = 16 * 1024
"""A body limit below this leaves no room for a record of ordinary entries."""

KEY_BYTES_MAX = 16 * 1024
"""Our own cap on a physical key; Consul 1.8 takes a million characters, but every one counts against the body."""

_SAFE_KEY = re.compile(r"[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*\Z")
_SAFE_PREFIX = re.compile(r"(?:[A-Za-z0-9_-]+/)*[A-Za-z0-9_-]*\Z")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one transaction of a store may hold. ``prefix_bytes`` is what the store writes before every key."""

    ops_max: int = 64
    body_bytes_max: int = 524_288
    value_bytes_max: int = 524_288
    prefix_bytes: int = 0

    def __post_init__(self) -> None:
        if self.ops_max < OPS_MIN:
            raise ValueError(f"{self.ops_max} operations a transaction are too few: {OPS_MIN} are needed")
        if self.body_bytes_max < BODY_BYTES_MIN:
            raise ValueError(f"a body of {self.body_bytes_max} bytes is too small: {BODY_BYTES_MIN} are needed")
        if self.value_bytes_max < 1 or self.prefix_bytes < 0:
            raise ValueError("limits are positive numbers")


# The exact text each operation becomes, without key, value, session and index. One comma or bracket belongs to each.
_OVERHEAD = {
    Get: len('{"KV":{"Verb":"get","Key":""}},'),
    Set: len('{"KV":{"Verb":"set","Key":"","Value":""}},'),
    Cas: len('{"KV":{"Verb":"cas","Key":"","Value":"","Index":}},'),
    Lock: len('{"KV":{"Verb":"lock","Key":"","Value":"","Session":""}},'),
    Unlock: len('{"KV":{"Verb":"unlock","Key":"","Value":"","Session":""}},'),
    Delete: len('{"KV":{"Verb":"delete","Key":""}},'),
    DeleteTree: len('{"KV":{"Verb":"delete-tree","Key":""}},'),
    CheckIndex: len('{"KV":{"Verb":"check-index","Key":"","Index":}},'),
    CheckSession: len('{"KV":{"Verb":"check-session","Key":"","Session":""}},'),
    CheckNotExists: len('{"KV":{"Verb":"check-not-exists","Key":""}},'),
}

BODY_OVERHEAD_BYTES = 1
"""Brackets around the operations, less the comma that the last one does not have."""


def base64_bytes(value_bytes: int) -> int:
    """Bytes of a value of that size in base64 with padding."""
    return (value_bytes + 2) // 3 * 4


def op_bytes(op: Op, prefix_bytes: int = 0) -> int:
    """Exact bytes of ``op`` in a request body, separator included, under a store prefix of ``prefix_bytes``."""
    size = _OVERHEAD[type(op)] + prefix_bytes
    if isinstance(op, DeleteTree):
        return size + len(op.prefix)
    size += len(op.key)
    if isinstance(op, Set):
        return size + base64_bytes(len(op.value))
    if isinstance(op, Cas):
        return size + base64_bytes(len(op.value)) + len(str(op.index))
    if isinstance(op, Lock | Unlock):
        return size + base64_bytes(len(op.value)) + len(op.session)
    if isinstance(op, CheckIndex):
        return size + len(str(op.index))
    if isinstance(op, CheckSession):
        return size + len(op.session)
    return size


def body_bytes(ops: Iterable[Op], prefix_bytes: int = 0) -> int:
    """Exact bytes of the request body that holds ``ops``."""
    return BODY_OVERHEAD_BYTES + sum([op_bytes(op, prefix_bytes) for op in ops])


def fits(ops: Sequence[Op], limits: Limits) -> bool:
    """Whether one transaction may hold ``ops``."""
    return excess(ops, limits) is None


def excess(ops: Sequence[Op], limits: Limits) -> str | None:
    """Which limit ``ops`` exceed, in words with both numbers, or None when they fit."""
    if len(ops) > limits.ops_max:
        return f"{len(ops)} operations, the store takes {limits.ops_max} in one transaction"
    for op in ops:
        if isinstance(op, Set | Cas | Lock | Unlock) and len(op.value) > limits.value_bytes_max:
            return f"a value of {len(op.value)} bytes, the store takes {limits.value_bytes_max}"
    size = body_bytes(ops, limits.prefix_bytes)
    if size > limits.body_bytes_max:
        return f"a request of {size} bytes, the store takes {limits.body_bytes_max}"
    return None


def require_fit(ops: Sequence[Op], limits: Limits) -> None:
    """The gate of every store's ``txn``. Raises TooLarge; ValueError for no operations or a key
    outside the alphabet."""
    if not ops:
        raise ValueError("a transaction needs at least one operation")
    for op in ops:
        if isinstance(op, DeleteTree):
            require_prefix(op.prefix)
        else:
            require_key(op.key)
    problem = excess(ops, limits)
    if problem is not None:
        raise TooLarge(problem)


def require_key(key: str) -> str:
    """``key`` if every Consul version stores it as written, else ValueError."""
    if not _SAFE_KEY.match(key) or len(key) > KEY_BYTES_MAX:
        raise ValueError(f"not a physical key: {key[:80]!r}")
    return key


def require_prefix(prefix: str) -> str:
    """``prefix`` if it can begin a physical key (it may be empty), else ValueError."""
    if not _SAFE_PREFIX.match(prefix) or len(prefix) > KEY_BYTES_MAX:
        raise ValueError(f"not a physical key prefix: {prefix[:80]!r}")
    return prefix
