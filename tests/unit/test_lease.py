"""The election's table: every pair of phase and event is either a row or an error, and the rows keep the rules."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from consul_backend.lease import TABLE, Action, Event, IllegalEvent, Phase, step


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, Event)))
def test_every_pair_is_a_row_or_an_error(phase: Phase, event: Event) -> None:
    if (phase, event) in TABLE:
        assert step(phase, event) == TABLE[phase, event]
    else:
        with pytest.raises(IllegalEvent, match=phase.value):
            step(phase, event)


def test_whatever_can_happen_in_a_phase_has_its_row() -> None:
    """What the world can do at each point; an outcome without a row would end the election in an exception."""
    found = {Event.FOUND_OURS, Event.FOUND_LOCK_ONLY, Event.FOUND_FOREIGN}
    possible = {
        Phase.STANDBY: {Event.LOCK_FREE, Event.LOCK_TAKEN},
        Phase.ACQUIRING: {Event.ACQUIRED, Event.REFUSED, Event.UNKNOWN},
        Phase.RESOLVING_REFUSED: found,
        Phase.RESOLVING_UNKNOWN: found,
        Phase.LEADING: {Event.STEP_DOWN},
        Phase.RESIGNING: {Event.RELEASED},
    }
    for phase, events in possible.items():
        assert {event for at, event in TABLE if at is phase} == events | {Event.SESSION_GONE}


def test_only_a_won_lock_leads() -> None:
    leading = {pair for pair, (phase, _) in TABLE.items() if phase is Phase.LEADING}
    assert {event for _, event in leading} == {Event.ACQUIRED, Event.FOUND_OURS}


def test_a_tenure_always_costs_its_session() -> None:
    """Every way out of LEADING ends in ABANDON_SESSION, so that no later tenure reuses the session."""
    for event in Event:
        if (Phase.LEADING, event) not in TABLE:
            continue
        phase, action = step(Phase.LEADING, event)
        while phase is Phase.RESIGNING:
            phase, action = step(phase, Event.RELEASED)
        assert (phase, action) == (Phase.STANDBY, Action.ABANDON_SESSION)


def test_an_unknown_outcome_never_keeps_a_session_that_did_not_win() -> None:
    for event in (Event.FOUND_FOREIGN, Event.FOUND_LOCK_ONLY, Event.SESSION_GONE):
        assert step(Phase.RESOLVING_UNKNOWN, event) == (Phase.STANDBY, Action.ABANDON_SESSION)


def test_every_phase_can_lose_its_session() -> None:
    for phase in Phase:
        assert step(phase, Event.SESSION_GONE)[0] is Phase.STANDBY


class ElectionMachine(RuleBasedStateMachine):
    """Any run of events that the table allows: what happens to sessions on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = Phase.STANDBY
        self.session = 0
        self.led: list[int] = []
        self.in_doubt = False

    @rule(event=st.sampled_from(list(Event)))
    def happen(self, event: Event) -> None:
        before = self.phase
        if (before, event) not in TABLE:
            with pytest.raises(IllegalEvent):
                step(before, event)
            return
        self.phase, action = step(before, event)
        assert (action is Action.LEAD) == (self.phase is Phase.LEADING)
        assert (action is Action.ATTEMPT) == (self.phase is Phase.ACQUIRING)
        assert (action is Action.RELEASE) == (self.phase is Phase.RESIGNING)
        assert (action is Action.RESOLVE) == (self.phase in {Phase.RESOLVING_REFUSED, Phase.RESOLVING_UNKNOWN})
        if action is Action.ATTEMPT:
            assert not self.in_doubt, "a transaction of this session may still land"
            assert self.session not in self.led, "a session serves one tenure"
        if self.phase is Phase.RESOLVING_UNKNOWN:
            self.in_doubt = True
        if action is Action.LEAD:
            self.led.append(self.session)
            self.in_doubt = False
        if action is Action.ABANDON_SESSION:
            self.session += 1
            self.in_doubt = False
        assert action is not Action.WAIT or not self.in_doubt, "waits with a session that may yet win the lock"

    @invariant()
    def no_session_led_twice(self) -> None:
        assert len(set(self.led)) == len(self.led)

    @invariant()
    def there_is_a_way_to_lead_again(self) -> None:
        assert any(phase is self.phase for phase, _ in TABLE)


TestElectionMachine = ElectionMachine.TestCase
TestElectionMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
