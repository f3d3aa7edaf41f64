"""What a promotion may lose, said before it is done, and what forbids it without ``force``. Pure.

Only the primary knows what it wrote last. A secondary knows what it applied, the newest record it ever heard of, and
when it last had everything. From these it says: so many records are known to be missing; beyond them there may be what
was written after the last word was heard; nothing older is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plugin_api.errors import InvalidRequest, Unavailable

EVERYTHING = "this secondary holds no complete copy of its primary's data"
NAMED_MAX = 20


@dataclass(frozen=True, slots=True)
class Standing:
    """A secondary at one moment. ``applied`` is the newest record applied, 0 for none; ``seen`` the primary's newest
    one heard of, kept over restarts, 0 before any word. Ages in seconds, None where nothing was ever heard of it.
    ``alive_at``: an address at which the primary answers, empty when none does. ``attached``: has a primary at all.
    ``not_held`` are the mounts whose data is not here."""

    attached: bool
    complete: bool
    applied: int
    seen: int
    heard_age_s: float | None
    complete_age_s: float | None
    connected: bool
    alive_at: str = ""
    lag_max_s: float = 0.0
    not_held: Sequence[str] = ()


def missing(standing: Standing) -> int:
    """How many records of the primary are known and not applied."""
    return max(standing.seen - standing.applied, 0)


def forecast(standing: Standing, *, named: bool = True) -> dict[str, Any]:
    """What ``preview`` and the status show; mounts by name only where the caller has been authorized (``named``).
    ``known_missing_records`` counts records of the primary's log, ``exact`` says that nothing else can be missing: the
    primary is gone for good and was idle, or was demoted, only it knows."""
    first = standing.applied + 1
    return {
        "complete_copy": standing.complete,
        "last_applied_wal": standing.applied,
        "last_seen_primary_wal": standing.seen,
        "known_missing_records": missing(standing),
        "known_missing_range": [first, standing.seen] if missing(standing) else [],
        "primary_heard_age_s": _rounded(standing.heard_age_s),
        "complete_age_s": _rounded(standing.complete_age_s),
        "primary_reachable_at": standing.alive_at,
        "may_be_lost": _sentence(standing),
        "mounts_not_held": list(standing.not_held) if named else len(standing.not_held),
        "objections": objections(standing, named=named),
    }


def objections(standing: Standing, *, named: bool = True) -> list[str]:
    """Why ``force`` is needed; empty when it is not."""
    found = []
    if standing.not_held:
        names = ": " + ", ".join(standing.not_held[:NAMED_MAX]) if named else ""
        found.append(
            f"this secondary does not hold the data of {len(standing.not_held)} mounts, "
            f"which would answer 503 after a promotion{names}"
        )
    if not standing.attached:
        return found
    if not standing.complete:
        found.append(EVERYTHING)
    if standing.alive_at:
        found.append(
            f"the primary is alive and reachable at {standing.alive_at}: demote it first; "
            "otherwise there would be two primaries",
        )
    if missing(standing):
        found.append(
            f"replication is still catching up: {missing(standing)} records of the primary are known and not applied "
            'here; retry later or use the "force" argument',
        )
    age_s = standing.complete_age_s
    if standing.lag_max_s > 0 and (age_s is None or age_s > standing.lag_max_s):
        age = "an unknown time" if age_s is None else f"{age_s:.1f} s"
        found.append(f"this secondary last had everything {age} ago, the configured limit is {standing.lag_max_s:g} s")
    return found


def require_safe(standing: Standing) -> None:
    """Raises Unavailable where waiting may help (503, as clients expect of a secondary that is catching up), else
    InvalidRequest, unless a promotion is safe as far as this secondary can tell."""
    found = objections(standing)
    if not found:
        return
    text = "; ".join(found) + f". {_sentence(standing)}"
    if missing(standing) and not standing.alive_at:
        raise Unavailable(text)
    raise InvalidRequest(f'{text} Use the "force" argument to promote all the same.')


def _sentence(standing: Standing) -> str:
    if not standing.attached:
        return "Nothing: this secondary follows nobody since it was demoted or told to forget its primary."
    if not standing.complete:
        return "Everything that this secondary has not received yet."
    if standing.heard_age_s is None:
        return (
            "What the primary wrote after this cluster last heard of it; when that was, and so how much, is not known."
        )
    known = f"{missing(standing)} known records" if missing(standing) else "No known record"
    age_s = standing.complete_age_s
    since = "" if age_s is None else f", and what the primary wrote in its last {age_s:.1f} s that never arrived"
    return f"{known}{since}."


def _rounded(age_s: float | None) -> float | None:
    return None if age_s is None else round(age_s, 3)
