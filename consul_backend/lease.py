"""The election's state table. One rule: every change of phase is a row here, and a pair that is not here is a bug.

STANDBY                watching the lock; may own a session that has not led yet
ACQUIRING              one transaction is under way that takes the lock and writes the next epoch
RESOLVING_REFUSED      it was refused: read lock and epoch to learn whether an earlier copy of it had landed
RESOLVING_UNKNOWN      its answer was lost: the same, and the session is given up unless it won, because the
                       transaction may still land later
LEADING                a tenure: this session is spent afterwards, whatever happens
RESIGNING              the lock is being released
"""

from __future__ import annotations

import enum


class Phase(enum.Enum):
    STANDBY = "standby"
    ACQUIRING = "acquiring"
    RESOLVING_REFUSED = "resolving-refused"
    RESOLVING_UNKNOWN = "resolving-unknown"
    LEADING = "leading"
    RESIGNING = "resigning"


class Event(enum.Enum):
    LOCK_FREE = "lock-free"
    LOCK_TAKEN = "lock-taken"
    ACQUIRED = "acquired"
    REFUSED = "refused"
    UNKNOWN = "unknown"
    FOUND_OURS = "found-ours"
    FOUND_LOCK_ONLY = "found-lock-only"
    FOUND_FOREIGN = "found-foreign"
    SESSION_GONE = "session-gone"
    STEP_DOWN = "step-down"
    RELEASED = "released"


class Action(enum.Enum):
    WAIT = "wait"
    ATTEMPT = "attempt"
    RESOLVE = "resolve"
    LEAD = "lead"
    ABANDON_SESSION = "abandon-session"
    RELEASE = "release"


class IllegalEvent(Exception):
    """An event that the table does not allow in this phase: a programming error."""


TABLE: dict[tuple[Phase, Event], tuple[Phase, Action]] = {
    (Phase.STANDBY, Event.LOCK_FREE): (Phase.ACQUIRING, Action.ATTEMPT),
    (Phase.STANDBY, Event.LOCK_TAKEN): (Phase.STANDBY, Action.WAIT),
    (Phase.STANDBY, Event.SESSION_GONE): (Phase.STANDBY, Action.ABANDON_SESSION),
    (Phase.ACQUIRING, Event.ACQUIRED): (Phase.LEADING, Action.LEAD),
    (Phase.ACQUIRING, Event.REFUSED): (Phase.RESOLVING_REFUSED, Action.RESOLVE),
    (Phase.ACQUIRING, Event.UNKNOWN): (Phase.RESOLVING_UNKNOWN, Action.RESOLVE),
    (Phase.ACQUIRING, Event.SESSION_GONE): (Phase.STANDBY, Action.ABANDON_SESSION),
    (Phase.RESOLVING_REFUSED, Event.FOUND_OURS): (Phase.LEADING, Action.LEAD),
    (Phase.RESOLVING_REFUSED, Event.FOUND_LOCK_ONLY): (Phase.STANDBY, Action.ABANDON_SESSION),
    (Phase.RESOLVING_REFUSED, Event.FOUND_FOREIGN): (Phase.STANDBY, Action.WAIT),
    (Phase.RESOLVING_REFUSED, Event.SESSION_GONE): (Phase.STANDBY, Action.ABANDON_SESSION),
    (Phase.RESOLVING_UNKNOWN, Event.FOUND_OURS): (Phase.LEADING, Action.LEAD),
    (Phase.RESOLVING_UNKNOWN, Event.FOUND_LOCK_ONLY): (Phase.STANDBY, Action.ABANDON_SESSION),
    (Phase.RESOLVING_UNKNOWN, Event.FOUND_FOREIGN): (Phase.STANDBY, Action.ABANDON_SESSION),
    (Phase.RESOLVING_UNKNOWN, Event.SESSION_GONE): (Phase.STANDBY, Action.ABANDON_SESSION),
    (Phase.LEADING, Event.SESSION_GONE): (Phase.STANDBY, Action.ABANDON_SESSION),
    (Phase.LEADING, Event.STEP_DOWN): (Phase.RESIGNING, Action.RELEASE),
    (Phase.RESIGNING, Event.RELEASED): (Phase.STANDBY, Action.ABANDON_SESSION),
    (Phase.RESIGNING, Event.SESSION_GONE): (Phase.STANDBY, Action.ABANDON_SESSION),
}


def step(phase: Phase, event: Event) -> tuple[Phase, Action]:
    """The next phase and what to do. Raises IllegalEvent for a pair that is not in the table."""
    try:
        return TABLE[phase, event]
    except KeyError:
        raise IllegalEvent(f"{event.value} while {phase.value}") from None
