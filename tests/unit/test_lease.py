"""The election's table: every pair of phase and event is either a row or an error, and the rows keep the rules."""

import itertools

import pytest

from consul_backend.lease import TABLE, Action, Event, IllegalEvent, Phase, step


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, Event)))
def test_every_pair_is_a_row_or_an_error(phase: Phase, event: Event) -> None:
    if (phase, event) in TABLE:
        assert step(phase, event) == TABLE[phase, event]
    else:
        with pytest.raises(IllegalEvent, match=phase.value):
            step(phase, event)


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
