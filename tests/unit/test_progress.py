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
    ours = 1_700_000_000_000
    offset = ClockOffset()
    offset.observe(
        their_clock_ms=ours + out_ms + held_ms + skew_ms,
        echo_ms=ours,
        echo_age_ms=held_ms,
        now_ms=ours + out_ms + held_ms + back_ms,
    )
    assert abs(offset.offset_ms - skew_ms) <= (out_ms + back_ms) / 2


def test_the_shortest_round_trip_is_believed_and_a_set_clock_forgets():
    offset = ClockOffset()
    assert offset.offset_ms == 0
    offset.observe(their_clock_ms=5, echo_ms=0, echo_age_ms=0, now_ms=100)
    assert offset.offset_ms == 0
    offset.observe(their_clock_ms=2000, echo_ms=1000, echo_age_ms=0, now_ms=1400)
    offset.observe(their_clock_ms=3000, echo_ms=1999, echo_age_ms=0, now_ms=2001)
    offset.observe(their_clock_ms=5000, echo_ms=3000, echo_age_ms=0, now_ms=3900)
    assert offset.offset_ms == 1000
    offset.observe(their_clock_ms=5000, echo_ms=4000, echo_age_ms=0, now_ms=3000)
    assert offset.offset_ms == 0


def test_lag_goes_on_counting_when_the_stream_is_cut():
    lag = Lag()
    assert lag.lag_s(1.0) is None
    lag.complete(source_time_ms=10_000, now_ms=9_000, offset_ms=1_250, now_s=50.0)
    assert lag.lag_s(50.0) == 0.25
    assert lag.lag_s(60.0) == 10.25
    lag.complete(source_time_ms=21_000, now_ms=19_000, offset_ms=1_250, now_s=60.0)
    assert lag.lag_s(60.0) == 0.0
