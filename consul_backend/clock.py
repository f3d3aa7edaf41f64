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
