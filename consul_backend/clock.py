"""Time as the store needs it, injected so that a simulation can drive it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """``monotonic`` is in seconds and counts through suspend; ``time_ms`` is unix time in milliseconds."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back and goes on while the machine sleeps."""

    def time_ms(self) -> int:
        """Wall-clock milliseconds since 1970; may jump."""


class SystemClock:
    """CLOCK_BOOTTIME: a lease must also run out while the machine is suspended, which CLOCK_MONOTONIC ignores."""

    def monotonic(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def time_ms(self) -> int:
        return time.time_ns() // 1_000_000


class SteadyTime:
    """Unix time that no step of the wall clock moves: where the clock stood at the beginning, and what has passed since
    by the monotonic one. What must not live longer because somebody set the clock back is measured by it.

    ``not_before_ms``: it begins there at the earliest, such as at the newest record of a log that is gone on with.
    """

    def __init__(self, clock: Clock, not_before_ms: int = 0) -> None:
        self._clock = clock
        self._began_ms = max(clock.time_ms(), not_before_ms)
        self._began_s = clock.monotonic()

    def time_ms(self) -> int:
        """Unix milliseconds."""
        return self._began_ms + int((self._clock.monotonic() - self._began_s) * 1000)

    def now_s(self) -> float:
        """Unix seconds."""
        return self._began_ms / 1000 + self._clock.monotonic() - self._began_s

    def wall_ahead_s(self) -> float:
        """How far the wall clock is ahead of it, in seconds; negative: behind."""
        return self._clock.time_ms() / 1000 - self.now_s()
