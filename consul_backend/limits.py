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
from dataclasses import dataclass, replace

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

_REFUSALS = {
    "ops": re.compile(r"operations \(\d+ > (\d+)\)"),
    "value": re.compile(r"too large \(\d+ > (\d+) bytes\)"),
    "body": re.compile(r"max size: (\d+)"),
}
"""What Consul says with a 413, each with the limit that holds (1.8.7 and 1.14 sources)."""

_OPS_OLD = 64

OPS_MIN = 4
"""Fence, chain check, one data operation and the record: with fewer nothing can be committed."""

BODY_BYTES_MIN = 16 * 1024
"""A body limit below this leaves no room for a record of ordinary entries."""

KEY_BYTES_MAX = 16 * 1024
"""Our own cap on a physical key; Consul 1.8 takes a million characters, but every one counts against the body."""

_SAFE_KEY = re.compile(r"[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*\Z")
_SAFE_KEYS = re.compile(r"(?:[A-Za-z0-9_-]++(?:/[A-Za-z0-9_-]++)*+\n)++\Z")
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

_VALUED = (Set, Cas, Lock, Unlock)

BODY_OVERHEAD_BYTES = 1
"""Brackets around the operations, less the comma that the last one does not have."""


def base64_bytes(value_bytes: int) -> int:
    """Bytes of a value of that size in base64 with padding."""
    return (value_bytes + 2) // 3 * 4


def op_bytes(op: Op, prefix_bytes: int = 0) -> int:
    """Exact bytes of ``op`` in a request body, separator included, under a store prefix of ``prefix_bytes``."""
    kind = type(op)
    size = _OVERHEAD[kind] + prefix_bytes
    # This runs for every operation of every commit: the commonest kind first, and no isinstance.
    if kind is Set:
        return size + len(op.key) + (len(op.value) + 2) // 3 * 4  # type: ignore[union-attr]  # kind is Set
    return size + _variable_bytes(op)


def _variable_bytes(op: Op) -> int:
    match op:
        case DeleteTree():
            return len(op.prefix)
        case Set():
            return len(op.key) + base64_bytes(len(op.value))
        case Cas():
            return len(op.key) + base64_bytes(len(op.value)) + len(str(op.index))
        case Lock() | Unlock():
            return len(op.key) + base64_bytes(len(op.value)) + len(op.session)
        case CheckIndex():
            return len(op.key) + len(str(op.index))
        case CheckSession():
            return len(op.key) + len(op.session)
        case Get() | Delete() | CheckNotExists():
            return len(op.key)


def body_bytes(ops: Iterable[Op], prefix_bytes: int = 0) -> int:
    """Exact bytes of the request body that holds ``ops``."""
    return BODY_OVERHEAD_BYTES + sum([op_bytes(op, prefix_bytes) for op in ops])


def fits(ops: Sequence[Op], limits: Limits) -> bool:
    """Whether one transaction may hold ``ops``."""
    return excess(ops, limits) is None


def excess(ops: Sequence[Op], limits: Limits) -> str | None:
    """Which limit ``ops`` exceed, in words with both numbers, or None when they fit."""
    return _shape_excess(ops, limits) or _body_excess(body_bytes(ops, limits.prefix_bytes), limits)


def require_fit(ops: Sequence[Op], limits: Limits) -> None:
    """The gate of every ``txn``. Raises TooLarge; ValueError for no operations or a key outside the alphabet."""
    require_shape(ops, limits)
    require_body(body_bytes(ops, limits.prefix_bytes), limits)


def require_shape(ops: Sequence[Op], limits: Limits) -> None:
    """All of :func:`require_fit` but the body's size, for a store that has the body in hand anyway."""
    if not ops:
        raise ValueError("a transaction needs at least one operation")
    problem = _shape_excess(ops, limits)
    if problem is not None:
        raise TooLarge(problem)
    keys = [op.prefix + "x" if isinstance(op, DeleteTree) else op.key for op in ops]
    text = "\n".join(keys) + "\n"  # one match for all: this runs for every operation of every commit
    if not _SAFE_KEYS.match(text) or text.count("\n") != len(keys) or max(map(len, keys)) > KEY_BYTES_MAX:
        for key in keys:
            require_key(key)


def require_body(size_bytes: int, limits: Limits) -> None:
    """Raises TooLarge for a request body over the limit."""
    problem = _body_excess(size_bytes, limits)
    if problem is not None:
        raise TooLarge(problem)


def _shape_excess(ops: Sequence[Op], limits: Limits) -> str | None:
    if len(ops) > limits.ops_max:
        return f"{len(ops)} operations, the store takes {limits.ops_max} in one transaction"
    value_bytes = max([len(op.value) for op in ops if isinstance(op, _VALUED)], default=0)
    if value_bytes > limits.value_bytes_max:
        return f"a value of {value_bytes} bytes, the store takes {limits.value_bytes_max}"
    return None


def _body_excess(size_bytes: int, limits: Limits) -> str | None:
    if size_bytes <= limits.body_bytes_max:
        return None
    return f"a request of {size_bytes} bytes, the store takes {limits.body_bytes_max}"


def learnt(limits: Limits, ops_count: int, size_bytes: int, text: str) -> Limits:
    """The limits that a refusal for size (413) of ``ops_count`` operations in ``size_bytes`` bytes teaches: what its
    text says, or else less than what was refused. Never more than before, never less than a commit needs."""
    numbers = {what: int(found.group(1)) for what, pattern in _REFUSALS.items() if (found := pattern.search(text))}
    if "value" in numbers:
        return replace(limits, value_bytes_max=max(1, min(numbers["value"], limits.value_bytes_max)))
    if "ops" in numbers or (not numbers and ops_count > _OPS_OLD):
        ops_max = min(numbers.get("ops", _OPS_OLD), ops_count - 1, limits.ops_max)
        return replace(limits, ops_max=max(OPS_MIN, ops_max))
    body = min(numbers.get("body", size_bytes // 2), size_bytes - 1, limits.body_bytes_max)
    return replace(limits, body_bytes_max=max(BODY_BYTES_MIN, body))


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
