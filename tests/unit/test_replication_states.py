"""The secondary's state table."""

from __future__ import annotations

import itertools

import pytest

from sidecar.replication.states import CYCLES_MAX, Action, Event, IllegalEvent, Machine, Phase, step

LEGAL = {
    Phase.IDLE: {Event.START, Event.STOP},
    Phase.CONNECTING: {Event.ACCEPTED, Event.NEED_DIFF, Event.LOST, Event.REFUSED, Event.STOP},
    Phase.MERKLE_DIFF: {Event.EQUAL, Event.DIFFERS, Event.LOST, Event.REFUSED, Event.STOP},
    Phase.BRAKED: {Event.START, Event.STOP},
    Phase.MERKLE_SYNC: {Event.SYNCED, Event.MISMATCH, Event.BRAKED, Event.LOST, Event.REFUSED, Event.STOP},
    Phase.STREAM_WALS: {Event.ACCEPTED, Event.IN_STEP, Event.NEED_DIFF, Event.LOST, Event.REFUSED, Event.STOP},
}


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, Event)))
def test_every_pair_is_legal_or_an_error(phase, event):
    if event in LEGAL[phase]:
        step(Machine(phase), event)
    else:
        with pytest.raises(IllegalEvent):
            step(Machine(phase), event)


def drive(*events: Event, machine: Machine | None = None) -> tuple[Machine, Action]:
    machine, action = machine or Machine(), Action.REST
    for event in events:
        machine, action = step(machine, event)
    return machine, action


def test_nothing_is_wrong_with_who_has_not_begun_or_begins():
    for machine, phase in ((Machine(), Phase.IDLE), (step(Machine(), Event.START)[0], Phase.CONNECTING)):
        assert (machine.phase, machine.cycles, machine.reason, machine.alarm) == (phase, 0, "", False)


def test_first_fill():
    machine, action = drive(Event.START, Event.NEED_DIFF)
    assert (machine.phase, action) == (Phase.MERKLE_DIFF, Action.DIFF)
    machine, action = drive(Event.DIFFERS, machine=machine)
    assert (machine.phase, action) == (Phase.MERKLE_SYNC, Action.SYNC)
    machine, action = drive(Event.SYNCED, machine=machine)
    assert (machine.phase, action) == (Phase.STREAM_WALS, Action.STREAM)
    machine, action = drive(Event.ACCEPTED, Event.IN_STEP, machine=machine)
    assert machine == Machine(Phase.STREAM_WALS)
    assert action is Action.CONTINUE


def test_a_lost_connection_is_tried_again_with_pauses():
    machine, action = drive(Event.START, Event.ACCEPTED, Event.LOST)
    assert (machine.phase, action) == (Phase.CONNECTING, Action.BACK_OFF)
    assert not machine.alarm


def test_a_refusal_waits_for_a_person():
    machine, _ = drive(Event.START)
    machine, action = step(machine, Event.REFUSED, "fork")
    assert machine == Machine(Phase.IDLE, 0, "fork", alarm=True)
    assert action is Action.REST


def test_the_brake_stops_until_a_person_says_how_to_go_on():
    machine, _ = drive(Event.START, Event.NEED_DIFF, Event.DIFFERS)
    machine, action = step(machine, Event.BRAKED, "too many")
    assert (machine, action) == (Machine(Phase.BRAKED, 0, "too many", alarm=True), Action.REST)
    assert step(machine, Event.START) == (Machine(Phase.CONNECTING), Action.STREAM)


@pytest.mark.parametrize(
    "cycle",
    [
        (Event.EQUAL, Event.ACCEPTED, Event.NEED_DIFF),
        (Event.DIFFERS, Event.SYNCED, Event.NEED_DIFF),
        (Event.DIFFERS, Event.MISMATCH),
    ],
)
def test_three_cycles_without_progress_raise_an_alarm(cycle):
    machine, action = drive(Event.START, Event.NEED_DIFF)
    assert CYCLES_MAX == 3
    for done in range(1, CYCLES_MAX + 1):
        assert machine.phase is Phase.MERKLE_DIFF
        machine, action = drive(*cycle, machine=machine)
        assert machine.cycles == done
    assert machine == Machine(Phase.IDLE, CYCLES_MAX, "diff-loop", alarm=True)
    assert action is Action.REST
    assert drive(Event.START, machine=machine)[0] == Machine(Phase.CONNECTING)


def test_cut_connections_are_no_cycles_and_equal_roots_forget_them():
    machine, _ = drive(Event.START, Event.NEED_DIFF)
    for _ in range(10):
        machine, _ = drive(Event.DIFFERS, Event.LOST, Event.NEED_DIFF, machine=machine)
    assert machine.phase is Phase.MERKLE_DIFF
    for _ in range(10):
        machine, _ = drive(Event.DIFFERS, Event.SYNCED, Event.ACCEPTED, Event.IN_STEP, Event.NEED_DIFF, machine=machine)
    assert machine.phase is Phase.MERKLE_DIFF
