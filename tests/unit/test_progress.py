"""Windows, clock offsets and lag, with time as a parameter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.replication.progress import ClockOffset, Lag, Progress
from sidecar.replication.protocol import ProtocolViolation


def test_the_window_bounds_records_and_bytes_but_lets_one_frame_pass():
    progress = Progress(10, window_records=3, window_bytes=100)
    assert progress.has_room()
    progress.sending(11, 1000)
    assert not progress.has_room()
    progress.acked(11, 11)
    assert progress.has_room()
    for last in (12, 13, 14):
        assert progress.has_room()
        progress.sending(last, 1)
    assert not progress.has_room()
    progress.acked(12, 12)
    assert progress.has_room()
    assert progress.in_flight_bytes == 2


@pytest.mark.parametrize(("applied", "durable"), [(13, 11), (10, 10), (11, 12), (11, 9)])
def test_acknowledgements_that_cannot_be_true(applied, durable):
    progress = Progress(10, window_records=9, window_bytes=100)
    progress.sending(12, 1)
    progress.acked(11, 10)
    with pytest.raises(ProtocolViolation):
        progress.acked(applied, durable)


def test_a_record_is_sent_once():
    progress = Progress(10, window_records=9, window_bytes=100)
    with pytest.raises(ValueError, match="sent before"):
        progress.sending(10, 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5), st.integers(0, 50)), max_size=60))
def test_in_flight_is_what_is_sent_and_not_applied(moves):
    progress = Progress(0, window_records=8, window_bytes=100)
    frames: list[tuple[int, int]] = []
    for send, step, size in moves:
        if send and progress.has_room():
            progress.sending(progress.sent + step, size)
            frames.append((progress.sent, size))
        elif not send:
            applied = min(progress.sent, progress.applied + step)
            progress.acked(applied, applied)
        assert progress.in_flight_bytes == sum(size for last, size in frames if last > progress.applied)
        assert progress.applied <= progress.sent


def test_lag_as_the_primary_sees_it():
    progress = Progress(0, window_records=8, window_bytes=100)
    assert progress.lag_s(5.0) is None
    progress.promised(0, 1.0)
    progress.acked(0, 0)
    assert progress.lag_s(1.5) == 0.5
    progress.sending(4, 1)
    progress.promised(4, 7.0)
    assert progress.lag_s(8.0) == 7.0
    progress.acked(4, 4)
    assert progress.lag_s(8.0) == 1.0


@given(
    skew_ms=st.integers(-7_200_000, 7_200_000),
    out_ms=st.integers(0, 300),
    held_ms=st.integers(0, 5000),
    back_ms=st.integers(0, 300),
)
def test_the_offset_is_wrong_by_at_most_half_a_round_trip(skew_ms, out_ms, held_ms, back_ms):
    trip = Trip(skew_ms)
    trip.make(out_ms, held_ms, back_ms)
    assert abs(trip.offset.offset_ms - skew_ms) <= (out_ms + back_ms) / 2 + 0.001
    assert trip.offset.round_trip_ms == pytest.approx(out_ms + back_ms, abs=0.001)


class Trip:
    """Heartbeats there and back. ``skew_ms`` is their clock minus ours, ``set_ms`` by how much ours was set."""

    def __init__(self, skew_ms=0):
        self.offset = ClockOffset()
        self.skew_ms = skew_ms
        self.set_ms = 0
        self._passed_ms = 0

    def _ours(self):
        return 1_700_000_000_000 + self._passed_ms + self.set_ms

    def make(self, out_ms, held_ms, back_ms, *, set_meanwhile_ms=0):
        echo_ms = self._ours()
        self.offset.sent(echo_ms, self._passed_ms / 1000)
        self.set_ms += set_meanwhile_ms
        self._passed_ms += out_ms + held_ms
        theirs_ms = 1_700_000_000_000 + self._passed_ms + self.skew_ms
        self._passed_ms += back_ms
        self.offset.observe(
            their_clock_ms=theirs_ms,
            echo_ms=echo_ms,
            echo_age_ms=held_ms,
            now_ms=self._ours(),
            now_s=self._passed_ms / 1000,
        )


def test_nothing_is_known_before_the_first_echo():
    offset = ClockOffset()
    offset.observe(their_clock_ms=5, echo_ms=0, echo_age_ms=0, now_ms=100, now_s=1.0)
    assert (offset.offset_ms, offset.round_trip_ms) == (0, 0)


def test_a_link_that_is_full_one_way_for_an_hour_does_not_move_the_offset():
    """Believed, each of these samples would halve the lag that is shown."""
    trip = Trip(skew_ms=240_000)
    trip.make(1, 5000, 1)
    for _ in range(100):
        trip.make(1, 5000, 30_000)
        assert abs(trip.offset.offset_ms - 240_000) < 1
    alone = Trip(skew_ms=240_000)
    alone.make(1, 5000, 30_000)
    assert abs(alone.offset.offset_ms - 240_000) > 10_000, "the control: what one of them says"
    assert trip.offset.round_trip_ms == pytest.approx(30_001)


@pytest.mark.parametrize("set_ms", [300_000, -300_000, 3_600_000, -50])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_a_clock_that_is_set_is_noticed_at_the_next_heartbeat(set_ms, whose):
    trip = Trip(skew_ms=1000)
    for _ in range(5):
        trip.make(1, 5000, 2)
    if whose == "ours":
        trip.make(1, 5000, 2, set_meanwhile_ms=set_ms)
        assert abs(trip.offset.offset_ms - (1000 - set_ms)) < 5
    else:
        trip.skew_ms += set_ms
        trip.make(1, 5000, 2)
        assert abs(trip.offset.offset_ms - (1000 + set_ms)) < 5


def test_an_old_sample_gives_way_to_a_slightly_worse_one():
    trip = Trip(skew_ms=0)
    trip.make(1, 0, 1)
    trip.skew_ms = 10  # drifted
    trip.make(1, 100_000, 9)
    assert trip.offset.offset_ms >= 6


def test_lag_goes_on_counting_when_the_stream_is_cut():
    lag = Lag()
    assert lag.lag_s(1.0) is None
    lag.complete(source_time_ms=10_000, now_ms=9_000, offset_ms=1_250, now_s=50.0)
    assert lag.lag_s(50.0) == 0.25
    assert lag.lag_s(60.0) == 10.25
    lag.complete(source_time_ms=21_000, now_ms=19_000, offset_ms=1_250, now_s=60.0)
    assert lag.lag_s(60.0) == 0.0
