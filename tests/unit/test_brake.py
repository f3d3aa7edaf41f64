"""The mass-delete brake: what a comparison may delete unasked, and what happens to the rest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_backend.allowance import DeleteAllowance
from sidecar.replication.brake import Brake, by_class
from sidecar.replication.diff import Range
from sidecar.replication.filling import Filling
from sidecar.replication.modes import DR
from sidecar.replication.protocol import NONE_POSITION
from sidecar.replication.staging import Staging
from sidecar.replication.states import Event
from tests.unit.test_sync import Pair, fill

STRICT = DeleteAllowance(entries=10, share=0.1)
NONE_BRAKED = DeleteAllowance(share=1.0)


def test_the_allowance_is_the_larger_of_both():
    assert [STRICT.allows(here) for here in (0, 50, 100, 1000)] == [10, 10, 10, 100]
    for wrong in ({"entries": -1}, {"share": 1.1}, {"share": -0.1}):
        with pytest.raises(ValueError, match="allowance"):
            DeleteAllowance(**wrong)


def test_classes_are_judged_apart():
    """Many tokens must not hide that the configuration went."""
    here = by_class({"r/a": 400, "r/b": 100, "l/token": 100_000})
    assert here == {"r": 500, "l": 100_000}
    brake = Brake(STRICT, here, {"r": 440, "l": 99_000})
    assert brake.on
    assert (brake.shrink().deletions, brake.shrink().here, brake.shrink().allowed) == (60, 500, 50)
    assert not Brake(STRICT, here, {"r": 450, "l": 90_000}).on
    assert Brake(STRICT, here, {"r": 500, "l": 89_999}).on
    assert Brake(STRICT, here, {}).shrink().deletions == 100_500, "an answer without counts proves nothing"
    assert not Brake(STRICT, here, {}, accepted=100_500).on


@given(st.integers(0, 500), st.integers(0, 500), st.lists(st.integers(1, 50), max_size=20), st.integers(0, 300))
def test_it_is_on_exactly_over_the_allowance(here, there, counted, accepted):
    brake = Brake(STRICT, {"r": here}, {"r": there}, accepted)
    for number in counted:
        brake.count(number)
    deletions = max(here - there, sum(counted))
    assert brake.on == (deletions > STRICT.allows(here) + accepted)
    assert brake.shrink().deletions == (deletions if brake.on else 0)


@given(st.integers(0, 500), st.integers(0, 300), st.integers(0, 300))
def test_what_is_over_the_allowance_is_forbidden(here, accepted, deletions):
    brake = Brake(STRICT, {"r": here}, {"r": here}, accepted)
    assert brake.forbids(deletions) is (deletions > STRICT.allows(here) + accepted)


def test_a_class_at_its_allowance_is_not_over_it_and_only_the_replicated_one_counts_what_was_found():
    brake = Brake(STRICT, {"r": 100, "l": 200}, {"r": 90, "l": 100})
    assert (brake.shrink().deletions, brake.shrink().here, brake.shrink().allowed) == (100, 200, 20)
    equal = Brake(DeleteAllowance(entries=0, share=0.0), {"r": 5, "l": 5}, {"r": 5, "l": 5})
    assert not equal.on
    equal.count()
    assert (equal.on, equal.shrink().deletions, equal.shrink().here) == (True, 1, 5)
    local = Brake(STRICT, {"l": 5}, {"l": 5})
    assert (local.forbids(0), local.forbids(1)) == (False, True), "of a class that is not here nothing may go"


def test_progress_counts_entries_and_what_is_left():
    ranges = [Range("r/core"), Range("r/a"), Range("r/b", 2, 1), Range("r/b", 2, 3)]
    filling = Filling(ranges, {"r/core": 1, "r/a": 100, "r/b": 10}, kept=7, started_s=50.0)
    assert filling.total == 1 + 100 + 3 + 3
    before = filling.progress(0, 50.0)
    assert (before.done, before.kept, before.entries_per_s, before.eta_s) == (0, 7, 0.0, None)
    filling.advance(1, 41)
    filling.advance(1, 20)
    halfway = filling.progress(4096, 60.0)
    assert (halfway.done, halfway.total, halfway.bytes) == (21, 107, 4096), "what a finished range received is its own"
    assert halfway.eta_s == pytest.approx(86 / 2.1)
    filling.advance(1, 500)
    assert filling.progress(0, 60.0).done == 101, "never more than there is"
    filling.advance(4, 0)
    assert filling.progress(0, 70.0).done == 107


async def test_a_primary_that_was_rebuilt_empty_deletes_nothing_and_is_not_even_asked_for_entries():
    pair = Pair()
    fill(pair.secondary, 900)
    pair.secondary.positions = {"performance": pair.at(1)}
    before, position = pair.secondary.replicated(), pair.secondary.positions
    result = await pair.sync()
    assert (result.event, result.round_trips, result.keys) == (Event.BRAKED, 1, 0)
    assert (result.shrink.deletions, result.shrink.here, result.shrink.allowed) == (900, 900, 180)
    assert "900 of 900" in result.reason
    assert (pair.secondary.replicated(), pair.secondary.positions) == (before, position)
    assert (pair.gates, pair.applied) == ([], [])
    again = await pair.sync(accepted_deletions=900)
    assert (again.event, again.keys, pair.secondary.replicated()) == (Event.SYNCED, 900, {})


@pytest.mark.parametrize("bounds", [Staging(), Staging(entries_max=20)])
async def test_entries_that_would_be_replaced_are_counted_to_the_last_one(bounds):
    """As many on both sides, so no count tells it: the ids do. With little room for staging some of it is committed
    before, but no deletion."""
    pair = Pair()
    fill(pair.primary, 300, partition="p")
    for start in range(0, 300, 50):
        pair.secondary.write(*((f"r/p/other-{number}", b"old") for number in range(start, start + 50)))
    before = pair.secondary.replicated()
    result = await pair.sync(staging=bounds)
    assert (result.event, result.shrink.deletions) == (Event.BRAKED, 300)
    assert before.items() <= pair.secondary.replicated().items()
    control = await pair.sync(staging=bounds, allowance=NONE_BRAKED)
    assert control.event is Event.SYNCED
    pair.assert_in_step(pair.primary.head.index)


@pytest.mark.parametrize("bounds", [Staging(), Staging(entries_max=20)])
async def test_deletions_within_the_allowance_go_at_the_end(bounds):
    pair = Pair()
    fill(pair.primary, 300)
    fill(pair.secondary, 280, value=b"older")
    pair.secondary.write(*((f"r/p/gone-{number}", b"x") for number in range(40)))
    pair.secondary.positions = {"performance": NONE_POSITION}
    seen: list[int] = []
    pair.meanwhile = lambda step: seen.append(sum(key.startswith("r/p/gone") for key in pair.secondary.data))
    assert (await pair.sync(staging=bounds)).event is Event.SYNCED
    assert set(seen) == {40}, "held until everything was received"
    pair.assert_in_step(pair.primary.head.index)


async def test_what_is_deleted_in_the_log_meanwhile_needs_nobody_s_leave():
    """The comparison finds everything; all of it is deleted, by the log, before the guard."""
    pair = Pair()
    fill(pair.primary, 300)
    fill(pair.secondary, 300)
    pair.primary.write(("r/p/0", b"new"))

    def delete_all(step: str) -> None:
        if step == "diff":
            for start in range(0, 300, 50):
                pair.primary.write(*((f"r/p/{number}", None) for number in range(start, start + 50)))

    pair.meanwhile = delete_all
    result = await pair.sync(allowance=DeleteAllowance(entries=0, share=0.0))
    assert result.event is Event.SYNCED
    assert pair.secondary.replicated() == {}


@pytest.mark.parametrize("churn", [True, False])
async def test_tokens_and_leases_come_and_go_but_do_not_all_go(churn):
    pair = Pair(DR)
    fill(pair.primary, 50)
    fill(pair.secondary, 50)
    pair.secondary.write(*((f"l/token/old-{number}", b"t") for number in range(60)))
    if churn:
        pair.primary.write(*((f"l/token/new-{number}", b"t") for number in range(55)))
    result = await pair.sync(allowance=STRICT)
    assert result.event is (Event.SYNCED if churn else Event.BRAKED)
    assert sum(key.startswith("l/token/old") for key in pair.secondary.data) == (0 if churn else 60)
