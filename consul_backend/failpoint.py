"""Named places where a test makes this process fail. Without ``OUTRIDER_FAILPOINTS`` a point costs one comparison.

``OUTRIDER_FAILPOINTS="commit:after-reply=kill:3,flush:before-send=raise"`` arms two points: the first kills the process
(SIGKILL) the third time it is reached, the second raises :class:`FailpointHit` the first time. ``stop`` is SIGSTOP.
A point fires once.

Points outside this package are declared by their package; the process arms what the environment names when it starts.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

ENVIRONMENT = "OUTRIDER_FAILPOINTS"

POINTS: tuple[str, ...] = (
    "commit:before-build",
    "commit:before-send",
    "commit:after-reply",
    "commit:before-ack",
    "flush:before-send",
    "flush:after-reply",
    "flush:before-ack",
    "collect:before-send",
    "collect:after-reply",
    "recovery:after-checkpoint",
    "recovery:after-extents",
    "recovery:after-redo",
    "recovery:before-tenure",
    "recovery:after-tenure",
)
"""Every point of this package but those of large batches, the election and a reindex, so that a test can visit each;
a test compares the list with the sources."""

LARGE_POINTS: tuple[str, ...] = (
    "large:after-part",
    "large:before-commit",
    "large:after-commit",
    "large:after-chunk",
    "large:before-roll",
    "large:after-roll",
    "large:before-abort",
    "large:after-abort",
    "large:recovered",
)
"""The same for large batches: ``tests/unit/test_large_crashes.py`` dies at each."""

ELECTION_POINTS: tuple[str, ...] = (
    "election:before-acquire",
    "election:after-acquire",
    "election:after-release",
)
"""The same for the election: ``tests/integration/test_failpoints.py`` dies at each."""

REINDEX_POINTS: tuple[str, ...] = ("reindex:before-repair",)

_known: list[str] = [*POINTS, *LARGE_POINTS, *ELECTION_POINTS, *REINDEX_POINTS]

_SPEC = re.compile(r"(?P<name>[a-z:-]+)=(?P<action>kill|raise|stop)(?::(?P<hit>[1-9][0-9]*))?\Z")


class FailpointHit(Exception):
    """An armed point with the action ``raise``. No code of this project catches it."""


@dataclass(slots=True)
class _Armed:
    action: str
    hits_left: int


_armed: dict[str, _Armed] = {}


def declare(names: Sequence[str]) -> None:
    """Make the points of another package known."""
    _known.extend(name for name in names if name not in _known)


def arm_from_environment() -> None:
    """Arm what ``OUTRIDER_FAILPOINTS`` names, once every package has declared its points. Raises ValueError."""
    arm(os.environ.get(ENVIRONMENT, ""))


def arm(spec: str) -> None:
    """Arm the points named in ``spec`` (see the module text) besides those already armed. Raises ValueError."""
    for part in filter(None, (piece.strip() for piece in spec.split(","))):
        match = _SPEC.match(part)
        if match is None or match["name"] not in _known:
            raise ValueError(f"not a failpoint: {part!r}; known names: {', '.join(_known)}")
        _armed[match["name"]] = _Armed(match["action"], int(match["hit"] or 1))


def disarm() -> None:
    """Disarm every point."""
    _armed.clear()


def failpoint(name: str) -> None:
    """Fail here if a test asked for it."""
    if not _armed:
        return
    armed = _armed.get(name)
    if armed is None:
        return
    armed.hits_left -= 1
    if armed.hits_left > 0:
        return
    del _armed[name]
    if armed.action == "raise":
        raise FailpointHit(name)
    os.kill(os.getpid(), signal.SIGKILL if armed.action == "kill" else signal.SIGSTOP)
