"""Consul's JSON for keys and transactions, to and from values. Pure.

The text of a request is exactly what ``limits.py`` counts. Error texts are passed on without anything that looks like
an id: Consul names the sessions on both sides of a failed check.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from consul_backend.errors import BackendError, Conflict, OpFailure, PermissionDenied, TooLarge, Unavailable
from consul_backend.physical import Item
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

PERMISSION_DENIED = "permission denied"
TOKEN_UNKNOWN = "acl not found"  # noqa: S105 - an error text, not a secret
TEXT_CHARS_MAX = 300

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]+")


class _Named(msgspec.Struct, tag_field="Verb"):
    """Every operation names a key; the verb is written first."""

    Key: str


class _Get(_Named, tag="get"):
    pass


class _Delete(_Named, tag="delete"):
    pass


class _DeleteTree(_Named, tag="delete-tree"):
    pass


class _CheckNotExists(_Named, tag="check-not-exists"):
    pass


class _Set(_Named, tag="set"):
    Value: bytes


class _Cas(_Named, tag="cas"):
    Value: bytes
    Index: int


class _Lock(_Named, tag="lock"):
    Value: bytes
    Session: str


class _Unlock(_Named, tag="unlock"):
    Value: bytes
    Session: str


class _CheckIndex(_Named, tag="check-index"):
    Index: int


class _CheckSession(_Named, tag="check-session"):
    Session: str


class _Request(msgspec.Struct):
    KV: _Named


_TO_WIRE: dict[type[Op], Callable[[Any, str], _Named]] = {
    Get: lambda op, prefix: _Get(prefix + op.key),
    Cas: lambda op, prefix: _Cas(prefix + op.key, op.value, op.index),
    Lock: lambda op, prefix: _Lock(prefix + op.key, op.value, op.session),
    Unlock: lambda op, prefix: _Unlock(prefix + op.key, op.value, op.session),
    Delete: lambda op, prefix: _Delete(prefix + op.key),
    DeleteTree: lambda op, prefix: _DeleteTree(prefix + op.prefix),
    CheckIndex: lambda op, prefix: _CheckIndex(prefix + op.key, op.index),
    CheckSession: lambda op, prefix: _CheckSession(prefix + op.key, op.session),
    CheckNotExists: lambda op, prefix: _CheckNotExists(prefix + op.key),
}
_encode = msgspec.json.Encoder().encode


class Entry(msgspec.Struct):
    """One key as Consul shows it, its name with the store's prefix; an empty value comes as null."""

    Key: str
    ModifyIndex: int
    Value: bytes | None = None
    Session: str = ""

    def item(self, prefix: str) -> Item:
        """As the store shows it."""
        return Item(self.Key[len(prefix) :], self.Value or b"", self.ModifyIndex, self.Session)


class _Result(msgspec.Struct):
    KV: Entry


class _Written(msgspec.Struct, gc=False):
    ModifyIndex: int


class _WrittenResult(msgspec.Struct):
    KV: _Written


class _Error(msgspec.Struct):
    OpIndex: int
    What: str


class _TxnAnswer(msgspec.Struct):
    Results: list[_Result] | None = None
    Errors: list[_Error] | None = None


class _WrittenAnswer(msgspec.Struct):
    Results: list[_WrittenResult] | None = None


_decode_written = msgspec.json.Decoder(_WrittenAnswer).decode
_decode_txn = msgspec.json.Decoder(_TxnAnswer).decode
_decode_entries = msgspec.json.Decoder(list[Entry]).decode
_decode_names = msgspec.json.Decoder(list[str]).decode

_GIVES_NOTHING = frozenset((Delete, DeleteTree, CheckNotExists))
_WRITES = frozenset((Set, Cas, Lock, Unlock))


def encode_txn(ops: Sequence[Op], prefix: str) -> bytes:
    """The body of ``PUT /v1/txn``."""
    # A commit is nearly all sets, and nothing is committed while this runs: they take no detour by the table.
    return _encode(
        [_Request(_Set(prefix + op.key, op.value) if type(op) is Set else _TO_WIRE[type(op)](op, prefix)) for op in ops]
    )


def decode_results(ops: Sequence[Op], body: bytes) -> tuple[int, list[Entry]]:
    """Of an applied transaction: the newest index among the keys it wrote (0 if none), and what its gets read.

    Consul answers every operation that names one entry, in order. Raises PermissionDenied when it left some out, as it
    does for keys the token may not read, and msgspec.DecodeError for what is no answer.
    """
    kinds = [type(op) for op in ops]
    named = [kind for kind in kinds if kind not in _GIVES_NOTHING]
    if Get not in named:  # a commit: what it wrote is not told, so nothing but the index is decoded
        written = _decode_written(body).Results or []
        _require_all(named, written)
        return max([r.KV.ModifyIndex for kind, r in zip(named, written, strict=True) if kind in _WRITES], default=0), []
    results = _decode_txn(body).Results or []
    _require_all(named, results)
    index, entries = 0, []
    for kind, result in zip(named, results, strict=True):
        if kind in _WRITES:
            index = max(index, result.KV.ModifyIndex)
        elif kind is Get:
            entries.append(result.KV)
    return index, entries


def _require_all(named: Sequence[type[Op]], results: Sequence[object]) -> None:
    if len(named) != len(results):
        raise PermissionDenied(
            f"Consul answered {len(results)} of {len(named)} operations: the token may not read the rest"
        )


def decode_entries(body: bytes) -> list[Entry]:
    """The body of ``GET /v1/kv``. Raises msgspec.DecodeError."""
    return _decode_entries(body)


def decode_names(body: bytes) -> list[str]:
    """The body of ``GET /v1/kv?keys``. Raises msgspec.DecodeError."""
    return _decode_names(body)


def refusal(body: bytes) -> Conflict | PermissionDenied:
    """What a 409 means. A right that is missing comes the same way as a failed check. Raises msgspec.DecodeError."""
    failures = tuple([OpFailure(error.OpIndex, clean(error.What)) for error in _decode_txn(body).Errors or []])
    denied = [failure for failure in failures if PERMISSION_DENIED in failure.what.lower()]
    if denied:
        return PermissionDenied(f"Consul: permission denied for operation {denied[0].op_index} of the transaction")
    first = f"operation {failures[0].op_index}: {failures[0].what}" if failures else "no operation named"
    more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
    return Conflict(f"Consul refused the transaction: {first}{more}", failures)


def client_error(status: int, body: bytes) -> BackendError | None:
    """The definite failure that a 4xx other than 404 and 409 stands for, or None for any other status."""
    text = clean(body[: 4 * TEXT_CHARS_MAX].decode("utf-8", "replace"))
    if status in {401, 403}:
        return denied(text)
    if status == 413:
        return TooLarge(f"Consul: {text or 'the request is too large'}")
    return None


def denied(text: str) -> PermissionDenied | Unavailable:
    """What Consul means by refusing a token. One that it does not know may have been deleted; but a server that has
    just started knows none until it has read its log, so that is waited out and never taken for a lost right."""
    if TOKEN_UNKNOWN in text.lower():
        return Unavailable(
            f"Consul does not know this token ({text}): it was deleted, or that server has started a moment ago"
        )
    return PermissionDenied(f"Consul: {text or 'permission denied'}")


def clean(text: str) -> str:
    """An error text fit to pass on: no ids, one line, bounded."""
    return _UNPRINTABLE.sub(" ", _UUID.sub("<id>", text)).strip()[:TEXT_CHARS_MAX]
