"""``X-Vault-Index``: which writes a client's session has seen, and whether a cluster has them. Pure.

On the wire (contract 5.2) base64 of ``v1:<cluster id>:<local index>:<replicated index>:<hmac>``. The *local* index is
in the log of the cluster that answered, the *replicated* one in that of its replication set's primary; 0 is none.
Published clients parse the first four pieces and keep the greater of two values of one cluster, number by number. So
the numbers must never go down, although a promotion begins another log: above :data:`INDEX_BITS` bits of index stands
how many replication epochs came before (of mode dr for the local log, of mode performance for the other). The fifth
piece is opaque to clients: what the numbers are about, by eight bytes each of a hash (set, epoch, store generation),
then an HMAC-SHA256 over all of it under a key that every cluster of a set has and nobody else.

An index of an epoch that has passed is judged by the fork points of those after it: at or below every one of them it
was carried on, above one it was lost with the primary that had it, and waiting would be in vain.
"""

from __future__ import annotations

import base64
import binascii
import enum
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass

from consul_backend.position import Position
from sidecar.replication.history import History, Promotion

HEADER = "X-Vault-Index"
KEY_LABEL = b"outrider session index v1"
"""For the barrier's derived key."""

INDEX_BITS = 44
"""Records of one log: 500 years at 1,000 a second. Twenty bits are left for epochs."""

HEADER_CHARS_MAX = 1024
NAME_BYTES = 8
MAC_BYTES = 32
NO_NAME = bytes(NAME_BYTES)
_CLUSTER = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
_NUMBER = re.compile(r"[0-9]{1,20}\Z")
_TAIL_BYTES = 3 * NAME_BYTES + MAC_BYTES


class BadSessionIndex(Exception):
    """The header was not made by a cluster under this key, or was changed."""


def name_of(identifier: str) -> bytes:
    """What a set, an epoch or a store generation is called in a header."""
    return hashlib.sha256(identifier.encode()).digest()[:NAME_BYTES]


@dataclass(frozen=True, slots=True)
class Point:
    """A record: ``index`` in the log of replication epoch ``number`` (from 1 on). ``index`` 0: nothing."""

    number: int = 1
    index: int = 0


@dataclass(frozen=True, slots=True)
class SessionIndex:
    """What a header says. ``generation`` names the store whose log ``local`` is in; ``set`` and ``epoch`` name what
    ``replicated`` is about."""

    cluster_id: str
    local: Point
    generation: bytes = NO_NAME
    replicated: Point = Point()
    set: bytes = NO_NAME
    epoch: bytes = NO_NAME


def encode(state: SessionIndex, key: bytes) -> str:
    """The header."""
    text = f"v1:{state.cluster_id}:{_joined(state.local)}:{_joined(state.replicated)}"
    names = state.set + state.epoch + state.generation
    tail = names + _mac(key, text, names)
    return base64.b64encode(f"{text}:{tail.hex()}".encode()).decode("ascii")


def decode(header: str, key: bytes) -> SessionIndex:
    """Raises BadSessionIndex, whatever the text."""
    if len(header) > HEADER_CHARS_MAX:
        raise BadSessionIndex(f"longer than {HEADER_CHARS_MAX} characters")
    try:
        text = base64.b64decode(header, validate=True).decode("ascii")
        version, cluster_id, local, replicated, tail_hex = text.split(":")
        tail = bytes.fromhex(tail_hex)
    except (binascii.Error, ValueError):
        raise BadSessionIndex("it is not base64 of five pieces") from None
    if version != "v1" or not (_CLUSTER.match(cluster_id) and _NUMBER.match(local) and _NUMBER.match(replicated)):
        raise BadSessionIndex("a piece is malformed, or of another version")
    if len(tail) != _TAIL_BYTES:
        raise BadSessionIndex("its last piece has the wrong length")
    names, mac = tail[:-MAC_BYTES], tail[-MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(key, text.rpartition(":")[0], names)):
        raise BadSessionIndex("it was not made by a cluster of this replication set")
    return SessionIndex(
        cluster_id=cluster_id,
        local=_parted(int(local)),
        replicated=_parted(int(replicated)),
        set=names[:NAME_BYTES],
        epoch=names[NAME_BYTES : 2 * NAME_BYTES],
        generation=names[2 * NAME_BYTES :],
    )


def _mac(key: bytes, text: str, names: bytes) -> bytes:
    return hmac.digest(key, text.encode() + b":" + names, "sha256")


def _joined(point: Point) -> int:
    return (point.number - 1) << INDEX_BITS | point.index if point.index else 0


def _parted(number: int) -> Point:
    before, index = divmod(number, 1 << INDEX_BITS)
    return Point(before + 1, index)


class Verdict(enum.Enum):
    """Whether what a session has seen is here. LOST: it is not and never will be. ELSEWHERE: this cluster cannot tell,
    because the index is about a replication set, or a store, that it knows nothing of."""

    PRESENT = "present"
    MISSING = "missing"
    LOST = "lost"
    ELSEWHERE = "elsewhere"


@dataclass(frozen=True, slots=True)
class OwnLog:
    """This cluster's own log. ``history``: the epochs of its dr set, which say whose log it goes on from; empty without
    one."""

    cluster_id: str
    generation: str
    head_index: int
    history: History = ()

    @property
    def number(self) -> int:
        """Of the epoch of now."""
        return self.history[-1].number if self.history else 1


@dataclass(frozen=True, slots=True)
class SetLog:
    """The log of the performance set's primary as far as it is here: ``at`` is the newest record applied, or for the
    primary itself the newest written; None before the first."""

    set_id: str
    history: History
    at: Position | None

    @property
    def number(self) -> int:
        """Of the newest epoch known."""
        return self.history[-1].number


def judge_local(wanted: SessionIndex, own: OwnLog) -> Verdict:
    """Whether writes of this cluster itself are here. Those of other clusters' own data are never anywhere else."""
    point = wanted.local
    if not point.index or wanted.cluster_id != own.cluster_id:
        return Verdict.PRESENT
    if wanted.generation == name_of(own.generation):
        if _is_lost(point, own.generation, own.history):
            return Verdict.LOST
        return Verdict.PRESENT if point.index <= own.head_index else Verdict.MISSING
    began = _promotion(own.history, point.number)
    if began is not None and name_of(began.generation) == wanted.generation:
        return Verdict.LOST if _is_lost(point, began.generation, own.history) else Verdict.PRESENT
    # Another cluster under this one's identity: its successor, where this one has not heard of its replacement yet.
    return Verdict.MISSING if own.history and point.number > own.number else Verdict.ELSEWHERE


def judge_replicated(wanted: SessionIndex, cluster_id: str, log: SetLog | None, *, secondary: bool) -> Verdict:
    """Whether writes of the set's primary are here. On the cluster that answered, unless it is a secondary, the local
    index says as much."""
    point = wanted.replicated
    if not point.index or (wanted.cluster_id == cluster_id and not secondary):
        return Verdict.PRESENT
    if log is None or wanted.set != name_of(log.set_id):
        return Verdict.ELSEWHERE
    began = _promotion(log.history, point.number)
    if began is None:
        # A newer epoch: a secondary will meet it, a primary was replaced. One that is forgotten is too old to tell.
        return Verdict.MISSING if point.number > log.number else Verdict.LOST
    if name_of(began.id) != wanted.epoch:
        return Verdict.LOST  # another branch: two clusters were promoted apart
    if _is_lost(point, began.generation, log.history):
        return Verdict.LOST
    return Verdict.PRESENT if _is_applied(point, began, log) else Verdict.MISSING


def _is_applied(point: Point, began: Promotion, log: SetLog) -> bool:
    if log.at is None:
        return False
    if log.at.generation == began.generation:
        return point.index <= log.at.index
    now = epoch_at(log.at, log.history)
    return now is not None and now.number > point.number


def epoch_at(at: Position, history: Sequence[Promotion]) -> Promotion | None:
    """The epoch that the record at a position is of. A stream that went on when its primary began another epoch in the
    same log has positions that still name the one before. None where it is of no epoch in ``history``: a cluster that
    has met a primary of another branch, and does not have its data yet."""
    found = None
    for one in history:
        if one.generation == at.generation and (
            one.number == at.epoch or (at.epoch < one.number and one.index < at.index)
        ):
            found = one
    return found


def _promotion(history: Sequence[Promotion], number: int) -> Promotion | None:
    return next((one for one in history if one.number == number), None)


def _is_lost(point: Point, generation: str, history: Sequence[Promotion]) -> bool:
    """Whether some later primary did not have the record ``point``, which is in the log of ``generation``."""
    for later in history:
        if later.number <= point.number:
            continue
        fork = later.fork
        if fork is None:
            return True
        if fork.generation == generation:
            if point.index > fork.index:
                return True
            continue
        followed = _promotion(history, fork.epoch)
        if fork.epoch <= point.number or followed is None:
            return True
        if followed.generation == fork.generation and fork.index < followed.index:
            return True  # it had not received all of the epoch that it followed last
    return False
