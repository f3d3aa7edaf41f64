"""Says so when the wall clock was set: tokens and leases go on by the monotonic one, until the next tenure."""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn

from consul_backend.clock import SteadyTime

log = logging.getLogger("core")

LOOK_S = 10.0
NOTICED_S = 1.0


async def watch_wall_clock(steady: SteadyTime) -> NoReturn:
    """Until cancelled. Says nothing of less than a second, nor of the same difference twice."""
    said_s = 0.0
    while True:
        ahead_s = steady.wall_ahead_s()
        if abs(ahead_s - said_s) >= NOTICED_S:
            said_s = ahead_s
            log.warning(
                "the wall clock is %.1f s %s what tokens and leases live by: it was set, or was behind the log when "
                "this node began to lead; they go on by the monotonic clock until the next step-down",
                abs(ahead_s),
                "ahead of" if ahead_s > 0 else "behind",
            )
        await asyncio.sleep(LOOK_S)
