"""Checker P9: what a client's session may rely on. Events of real clients in, violations out. Pure.

Every session has one key of its own and counts up what it writes there, so that a value says how much a read reflects.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One answered request. ``did`` is ``write``, ``read`` or ``refused`` (412). ``value``: what was written or read, 0
    for nothing. ``via`` names the cluster that answered; ``indexed``: it was shown all that the session had seen;
    ``warned``: the answer said that something may be missing."""

    session: str
    did: str
    value: int
    via: str
    indexed: bool = True
    warned: bool = False


def violations(events: Iterable[Event]) -> list[str]:
    """What P9 forbids, in words. Events of one session are in the order of its requests, which do not overlap."""
    found: list[str] = []
    written: dict[str, int] = {}
    seen: dict[str, int] = {}
    written_via: dict[tuple[str, str], int] = {}
    for event in events:
        name = event.session
        if event.did == "write":
            written[name] = event.value
            written_via[name, event.via] = 0 if event.warned else event.value
            continue
        if event.did != "read":
            continue
        if event.indexed and not event.warned:
            if event.value < written.get(name, 0):
                found.append(f"{name}: read {event.value} at {event.via} after its write of {written[name]}")
            if event.value < seen.get(name, 0):
                found.append(f"{name}: read {event.value} at {event.via} after it had read {seen[name]}")
        if event.value < written_via.get((name, event.via), 0):
            found.append(
                f"{name}: {event.via} showed {event.value}, and had answered the write of "
                f"{written_via[name, event.via]} without a warning"
            )
        seen[name] = max(seen.get(name, 0), event.value)
    return found
