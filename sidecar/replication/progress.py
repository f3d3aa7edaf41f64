"""How far one secondary has come, how much may be on its way, and how far behind it is. Pure: times are parameters.

Rules of :class:`Progress` (the primary's view of one connection):

* ``durable <= applied <= sent``; none of the three ever goes back; an acknowledgement of what was not sent is a lie.
* What is sent and not yet applied is bounded in records and in bytes. One frame may always be on its way, whatever
  its size, or a large one would never leave.
* A slow secondary costs its window and nothing else.
"""

from __future__ import annotations

from collections import deque

from sidecar.replication.protocol import ProtocolViolation

CANARIES_MAX = 256
ECHOES_MAX = 64
DRIFT_MS_PER_S = 0.2
"""By how much two clocks that nobody sets move apart: twice what an uncorrected quartz does."""
_ROUNDING_MS = 2.0


class Progress:
    """Starts at the position the secondary's hello named."""

    def __init__(self, index: int, *, window_records: int, window_bytes: int) -> None:
        self.sent = index
        self.applied = index
        self.durable = index
        self.in_flight_bytes = 0
        self._window_records = window_records
        self._window_bytes = window_bytes
        self._in_flight: deque[tuple[int, int]] = deque()  # last index of a frame, its bytes
        self._canaries: deque[tuple[int, float]] = deque(maxlen=CANARIES_MAX)
        self._complete_at_s: float | None = None

    def has_room(self) -> bool:
        """Whether another frame may be sent now."""
        if not self._in_flight:
            return True
        return self.sent - self.applied < self._window_records and self.in_flight_bytes < self._window_bytes

    def sending(self, last: int, frame_bytes: int) -> None:
        """A frame that ends with record ``last`` leaves."""
        if last <= self.sent:
            raise ValueError(f"record {last} was sent before: {self.sent} is the newest")
        self.sent = last
        self.in_flight_bytes += frame_bytes
        self._in_flight.append((last, frame_bytes))

    def promised(self, index: int, captured_at_s: float) -> None:
        """*Complete up to index* leaves; it was true at ``captured_at_s`` on this node's monotonic clock."""
        self._canaries.append((index, captured_at_s))

    def acked(self, applied: int, durable: int) -> None:
        """The secondary's word. Raises ProtocolViolation when it cannot be true."""
        if not (self.applied <= applied <= self.sent and self.durable <= durable <= applied):
            raise ProtocolViolation(
                f"acknowledged {applied} (durable {durable}) after {self.applied} ({self.durable}) of {self.sent} sent"
            )
        self.applied, self.durable = applied, durable
        while self._in_flight and self._in_flight[0][0] <= applied:
            self.in_flight_bytes -= self._in_flight.popleft()[1]
        while self._canaries and self._canaries[0][0] <= applied:
            self._complete_at_s = self._canaries.popleft()[1]

    def lag_s(self, now_s: float) -> float | None:
        """Seconds since the newest instant whose every write the secondary is known to have; None before the first."""
        return None if self._complete_at_s is None else max(0.0, now_s - self._complete_at_s)


class ClockOffset:
    """The other cluster's clock minus ours, from heartbeats that echo ours.

    A sample is wrong by at most half its round trip, which the monotonic clock measures. The best one is believed as
    long as it can be true, given that clocks drift: a link that is full for an hour, with everything delayed one way,
    makes no other. A sample that contradicts it says that one of the clocks was set, and takes its place.
    """

    def __init__(self) -> None:
        self._sent: deque[tuple[int, float]] = deque(maxlen=ECHOES_MAX)  # our clock ms, when that was
        self._best: tuple[float, float, float] | None = None  # offset ms, error ms, when that was
        self.round_trip_ms = 0.0

    def sent(self, clock_ms: int, now_s: float) -> None:
        """A heartbeat with our clock's ``clock_ms`` leaves."""
        self._sent.append((clock_ms, now_s))

    def observe(self, *, their_clock_ms: int, echo_ms: int, echo_age_ms: int, now_ms: int, now_s: float) -> None:
        """One heartbeat: sent at ``their_clock_ms``, echoing ours of ``echo_ms`` which they held ``echo_age_ms``."""
        sent_at_s = next((at_s for clock_ms, at_s in reversed(self._sent) if clock_ms == echo_ms), None)
        if sent_at_s is None:
            return
        self.round_trip_ms = max(0.0, (now_s - sent_at_s) * 1000 - echo_age_ms)
        # Both clocks and the echo's age are whole milliseconds.
        offset_ms, error_ms = their_clock_ms + self.round_trip_ms / 2 - now_ms, self.round_trip_ms / 2 + _ROUNDING_MS
        if self._best is not None:
            best_ms, best_error_ms, at_s = self._best
            best_error_ms += (now_s - at_s) * DRIFT_MS_PER_S
            possible = abs(offset_ms - best_ms) <= error_ms + best_error_ms
            if possible and best_error_ms < error_ms:
                return
        self._best = (offset_ms, error_ms, now_s)

    @property
    def offset_ms(self) -> float:
        """0 until the first echo."""
        return self._best[0] if self._best else 0.0


class Lag:
    """How old the newest instant is whose every write is applied here. Goes on counting when the stream is cut."""

    def __init__(self) -> None:
        self._behind_s = 0.0
        self._as_of_s: float | None = None

    def complete(self, *, source_time_ms: int, now_ms: int, offset_ms: float, now_s: float) -> None:
        """Everything up to ``source_time_ms`` of the source's clock is applied; it is now ``now_ms`` on ours."""
        self._behind_s = max(0.0, (now_ms + offset_ms - source_time_ms) / 1000)
        self._as_of_s = now_s

    def resume(self, behind_s: float, now_s: float) -> None:
        """It was ``behind_s`` old when this node began."""
        self._behind_s, self._as_of_s = behind_s, now_s

    def lag_s(self, now_s: float) -> float | None:
        """None until a first canary was handled."""
        return None if self._as_of_s is None else self._behind_s + max(0.0, now_s - self._as_of_s)
