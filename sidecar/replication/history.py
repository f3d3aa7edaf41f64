"""The replication epochs of a set, and where two clusters' histories part. Pure.

An epoch begins when a cluster becomes the set's primary: by enabling, or by promotion. Its number counts up, its id is
random; each promotion names the *fork point*, the position in the log of the epoch before up to which the promoted
cluster had followed it. Histories that hold one number with two ids have a fork: two clusters were promoted apart.

When a cluster comes to follow a primary whose history parts from its own, what it holds beyond the fork point exists
nowhere else: :func:`parting` finds that point in its own log, :mod:`sidecar.replication.lost_writes` keeps what lies
behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from consul_backend.position import Position

FORKED = "fork"
"""How every refusal begins that is about histories which part."""

HISTORY_MAX = 64
"""Epochs that are remembered; a cluster that slept through more of them is filled anew, with nothing kept."""


class Epoch(msgspec.Struct, frozen=True):
    """A replication epoch by name. An equal number with another id is a fork."""

    number: int
    id: str


class Promotion(msgspec.Struct, frozen=True, array_like=True):
    """How an epoch began. ``fork``: how far its primary had followed the epoch before; None for the first epoch, and
    where that was not known. ``generation`` and ``index``: its primary's store, and the newest record there before the
    epoch's own. Time in unix milliseconds."""

    number: int
    id: str
    time_ms: int = 0
    fork: Position | None = None
    generation: str = ""
    index: int = 0


History = tuple[Promotion, ...]
"""Epochs of one set, the oldest first."""


def extended(history: History, promotion: Promotion) -> History:
    """``history`` with one more epoch, bounded."""
    return (*history, promotion)[-HISTORY_MAX:]


def epoch_of(history: History) -> Epoch:
    """The newest epoch. ``history`` is not empty."""
    return Epoch(history[-1].number, history[-1].id)


def history_of_data(history: History, before: History, position: Position | None) -> History:
    """The epochs that a secondary's data is of. ``history`` is what its primary said last; until its ``position`` is in
    that primary's log, the data is still of the epochs ``before`` it met that primary."""
    if position is None or position.index == 0 or not before or not history:
        return history
    newest = history[-1]
    return history if newest.generation in ("", position.generation) else before


def fork_between(number: int, epoch_id: str, history: Sequence[Promotion]) -> str:
    """Why a cluster of that epoch must not follow a primary with that history; empty when it may."""
    if not epoch_id or not history:
        return ""
    newest = history[-1].number
    if number > newest:
        return f"{FORKED}: the primary's replication epoch {newest} is older than the other cluster's {number}"
    for promotion in history:
        if promotion.number == number and promotion.id != epoch_id:
            return f"{FORKED}: two primaries were promoted as replication epoch {number}"
    if number >= history[0].number and all(promotion.number != number for promotion in history):
        return f"{FORKED}: the other cluster's replication epoch {number} is none of the primary's"
    return ""


@dataclass(frozen=True, slots=True)
class Parting:
    """Where a cluster's own log leaves what its new primary has.

    ``own_max`` is the last own record known to be common, None where only positions tell. ``bounds``: the records that
    took this cluster past one of these positions (same source store, greater index) are not common either. Neither: the
    histories do not part. ``known`` False: no common epoch is remembered, and nothing can be told.
    """

    own_max: int | None = None
    bounds: tuple[Position, ...] = ()
    known: bool = True

    @property
    def parts(self) -> bool:
        """Whether anything may be lost."""
        return not self.known or self.own_max is not None or bool(self.bounds)

    def holds(self, index: int, position: Position | None) -> bool:
        """Whether own record ``index``, which left this cluster at ``position`` of its source, is common."""
        if self.own_max is not None and index > self.own_max:
            return False
        if position is None:
            return True
        for bound in self.bounds:
            if position.generation == bound.generation and position.index > bound.index:
                return False
        return True


def parting(mine: Sequence[Promotion], theirs: Sequence[Promotion], generation: str) -> Parting:
    """Where the log of this cluster, whose store is ``generation``, leaves the history of a new primary."""
    ids = {promotion.number: promotion.id for promotion in theirs}
    common = max((one.number for one in mine if ids.get(one.number) == one.id), default=None)
    if common is None:
        return Parting(known=not mine or not theirs)
    own_max: int | None = None
    bounds: list[Position] = []
    their_next = next((one for one in theirs if one.number > common), None)
    if their_next is not None:
        if their_next.fork is None:
            return Parting(known=False)
        if their_next.fork.generation == generation:
            own_max = their_next.fork.index
        else:
            bounds.append(their_next.fork)
    for later in [one for one in mine if one.number > common]:  # of each of them this cluster may hold records
        if later.generation == generation:
            own_max = later.index if own_max is None else min(own_max, later.index)
        else:
            bounds.append(Position("", later.generation, later.number, later.index, bytes(32)))
    return Parting(own_max, tuple(bounds))
