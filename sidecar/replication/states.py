"""A secondary's state machine. Pure: events in, actions out.

Rule: the phase says what the one task that drives it is doing, and nothing else does.

* ``connecting`` opens the stream and says hello; the primary's answer decides.
* ``merkle-diff`` compares trees, ``merkle-sync`` fetches what differs, ``stream-wals`` opens the stream from the
  position they left, and follows it.
* Every completed comparison counts as a cycle until the stream shows that roots agree. The third that ends in another
  need for a diff is a *diff loop*: the machine stops in ``idle`` with an alarm, because a fourth would do no better.
* ``idle`` means that nothing is tried until an operator acts.
* ``braked`` means that a comparison would have deleted more than it may unasked (:mod:`sidecar.replication.brake`);
  nothing was deleted, and nothing is tried until an operator says to go on, or to begin anew.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

CYCLES_MAX = 3


class Phase(enum.Enum):
    """Values are what the status shows."""

    IDLE = "idle"
    CONNECTING = "connecting"
    MERKLE_DIFF = "merkle-diff"
    MERKLE_SYNC = "merkle-sync"
    STREAM_WALS = "stream-wals"
    BRAKED = "braked"


class Event(enum.Enum):
    """What happened to the driver."""

    START = "start"  # an operator, or the start of a tenure, wants replication to run
    STOP = "stop"  # an operator wants it to stop; also demotion and a blank update-primary
    ACCEPTED = "accepted"  # the primary accepted our position
    NEED_DIFF = "need-diff"  # the primary's record at our position is another or gone, or roots differ
    REFUSED = "refused"  # the primary refuses us: a fork, another set, revoked, no common version
    LOST = "lost"  # connection refused, cut, silent, or frames that do not verify
    EQUAL = "equal"  # the diff found equal roots and set the position
    DIFFERS = "differs"  # the diff found differences
    SYNCED = "synced"  # everything was fetched, roots are equal, the position is the guard
    MISMATCH = "mismatch"  # everything was fetched, and roots still differ
    BRAKED = "braked"  # the comparison would delete more than it may without being asked
    IN_STEP = "in-step"  # a root compared at one index while streaming was equal


class Action(enum.Enum):
    """What the driver does next."""

    REST = "rest"  # nothing, until START
    STREAM = "stream"  # open the stream from the position and apply it
    DIFF = "diff"
    SYNC = "sync"
    CONTINUE = "continue"  # go on with what is being done
    BACK_OFF = "back-off"  # wait, then STREAM


class IllegalEvent(Exception):
    """The driver reported something that cannot happen in this phase: a bug in the driver."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a secondary stands. ``cycles`` counts completed diffs since roots were last seen equal; ``reason`` is for
    people; ``alarm`` means an operator is needed."""

    phase: Phase = Phase.IDLE
    cycles: int = 0
    reason: str = ""
    alarm: bool = False


_TABLE: dict[tuple[Phase, Event], tuple[Phase, Action]] = {
    (Phase.IDLE, Event.START): (Phase.CONNECTING, Action.STREAM),
    (Phase.CONNECTING, Event.ACCEPTED): (Phase.STREAM_WALS, Action.CONTINUE),
    (Phase.CONNECTING, Event.NEED_DIFF): (Phase.MERKLE_DIFF, Action.DIFF),
    (Phase.CONNECTING, Event.LOST): (Phase.CONNECTING, Action.BACK_OFF),
    (Phase.CONNECTING, Event.REFUSED): (Phase.IDLE, Action.REST),
    (Phase.MERKLE_DIFF, Event.EQUAL): (Phase.STREAM_WALS, Action.STREAM),
    (Phase.MERKLE_DIFF, Event.DIFFERS): (Phase.MERKLE_SYNC, Action.SYNC),
    (Phase.MERKLE_DIFF, Event.LOST): (Phase.CONNECTING, Action.BACK_OFF),
    (Phase.MERKLE_DIFF, Event.REFUSED): (Phase.IDLE, Action.REST),
    (Phase.MERKLE_SYNC, Event.BRAKED): (Phase.BRAKED, Action.REST),
    (Phase.MERKLE_SYNC, Event.SYNCED): (Phase.STREAM_WALS, Action.STREAM),
    (Phase.MERKLE_SYNC, Event.MISMATCH): (Phase.MERKLE_DIFF, Action.DIFF),
    (Phase.MERKLE_SYNC, Event.LOST): (Phase.CONNECTING, Action.BACK_OFF),
    (Phase.MERKLE_SYNC, Event.REFUSED): (Phase.IDLE, Action.REST),
    (Phase.BRAKED, Event.START): (Phase.CONNECTING, Action.STREAM),
    (Phase.STREAM_WALS, Event.ACCEPTED): (Phase.STREAM_WALS, Action.CONTINUE),
    (Phase.STREAM_WALS, Event.IN_STEP): (Phase.STREAM_WALS, Action.CONTINUE),
    (Phase.STREAM_WALS, Event.NEED_DIFF): (Phase.MERKLE_DIFF, Action.DIFF),
    (Phase.STREAM_WALS, Event.LOST): (Phase.CONNECTING, Action.BACK_OFF),
    (Phase.STREAM_WALS, Event.REFUSED): (Phase.IDLE, Action.REST),
}
_TABLE |= {(phase, Event.STOP): (Phase.IDLE, Action.REST) for phase in Phase}

_COMPLETES_A_CYCLE = {Event.EQUAL, Event.SYNCED, Event.MISMATCH}


def step(machine: Machine, event: Event, reason: str = "") -> tuple[Machine, Action]:
    """The next state and what to do. Raises :class:`IllegalEvent` for a pair that is not in the table."""
    try:
        phase, action = _TABLE[machine.phase, event]
    except KeyError:
        raise IllegalEvent(f"{event.value} while {machine.phase.value}") from None
    if event is Event.START:
        return Machine(phase), action
    cycles = 0 if event is Event.IN_STEP else machine.cycles + (event in _COMPLETES_A_CYCLE)
    if phase is Phase.MERKLE_DIFF and cycles >= CYCLES_MAX:
        return Machine(Phase.IDLE, cycles, "diff-loop", alarm=True), Action.REST
    return Machine(phase, cycles, reason, alarm=event in (Event.REFUSED, Event.BRAKED)), action
