"""The trail of a forwarded request, and the rule that stops loops. Pure.

A hop is (cluster id, kind): *inner* from a standby to the active of its own cluster, *upward* from a performance
secondary to its primary. The rule: a request makes at most one inner and one upward hop per cluster, and never comes
back to a cluster it has left. So a trail over n clusters has at most 2n hops, whatever their roles claim.

The cluster id is each cluster's own (the one of sys/health), not the replication set's, which both ends share.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

INNER = "inner"
UPWARD = "upward"
HOPS_MAX = 16


class Hop(NamedTuple):
    """One hop, made *by* the cluster it names; ``kind`` is :data:`INNER` or :data:`UPWARD`."""

    cluster_id: str
    kind: str


Trail = tuple[Hop, ...]


class LoopRefused(Exception):
    """The hop would repeat one: answered with 503 and the trail."""

    status = 503

    def __init__(self, trail: Trail, cluster_id: str) -> None:
        super().__init__(f"request forwarding refused: cluster {cluster_id} was passed already ({show(trail)})")
        self.trail = trail


def trail_of(hops: Iterable[tuple[str, str]]) -> Trail:
    """Any iterable of pairs as a trail."""
    return tuple(Hop(cluster_id, kind) for cluster_id, kind in hops)


def extend(trail: Trail, cluster_id: str, kind: str) -> Trail:
    """``trail`` with the hop that ``cluster_id`` is about to make. Raises LoopRefused."""
    if kind not in (INNER, UPWARD) or len(trail) >= HOPS_MAX:
        raise LoopRefused(trail, cluster_id)
    came_from_own_standby = kind == UPWARD and trail[-1:] == (Hop(cluster_id, INNER),)
    before = trail[:-1] if came_from_own_standby else trail
    if any(hop.cluster_id == cluster_id for hop in before):
        raise LoopRefused(trail, cluster_id)
    return (*trail, Hop(cluster_id, kind))


def arrived(trail: Trail, cluster_id: str, kind: str) -> Trail:
    """``trail`` itself if a request may arrive in ``cluster_id`` by a hop of ``kind``. Raises LoopRefused.

    After an inner hop the last entry must be this cluster's own and no earlier one; after an upward hop the last entry
    must be an upward hop and this cluster must not appear at all.
    """
    if not trail or trail[-1].kind != kind or not well_formed(trail):
        raise LoopRefused(trail, cluster_id)
    if kind == INNER and trail[-1].cluster_id != cluster_id:
        raise LoopRefused(trail, cluster_id)
    seen = trail[:-1] if kind == INNER else trail
    if any(hop.cluster_id == cluster_id for hop in seen):
        raise LoopRefused(trail, cluster_id)
    return trail


def well_formed(trail: Trail) -> bool:
    """Whether ``trail`` could have grown by :func:`extend` alone."""
    grown: Trail = ()
    try:
        for hop in trail:
            grown = extend(grown, hop.cluster_id, hop.kind)
    except LoopRefused:
        return False
    return True


def show(trail: Trail) -> str:
    """``a:inner > a:upward``, for people; a trail of a liar is cut short."""
    shown = " > ".join(f"{hop.cluster_id[:64]}:{hop.kind[:16]}" for hop in trail[: HOPS_MAX // 2]) or "no hop yet"
    return f"{shown} > {len(trail) - HOPS_MAX // 2} more" if len(trail) > HOPS_MAX // 2 else shown
