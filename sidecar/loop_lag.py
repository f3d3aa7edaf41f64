"""How late the event loop is: what every beat, read lease and heartbeat of this process suffers alike."""

from __future__ import annotations

import asyncio

from sidecar.core.metrics import METRICS, Metrics

NAME = "runtime.event_loop_lag"


async def watch_loop_lag(metrics: Metrics = METRICS, period_s: float = 0.25) -> None:
    """Sample, in milliseconds, how much later than asked a sleep ends; until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + period_s
        await asyncio.sleep(period_s)
        metrics.sample(NAME, max(loop.time() - due_s, 0.0) * 1000)
