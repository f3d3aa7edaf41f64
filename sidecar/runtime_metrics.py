"""What the process itself costs, by the names of the API's telemetry: memory, tasks and threads, garbage collection.

The names are those that dashboards of Vault ask for; a *goroutine* here is a task of the event loop or a thread.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sidecar.core.metrics import METRICS, Metrics

_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")


def runtime_gauges() -> dict[str, float]:
    """Values of this moment; memory only where the system tells it. To be called in the event loop."""
    found = {"runtime.num_goroutines": float(len(asyncio.all_tasks()) + threading.active_count())}
    try:
        size, resident = (int(pages) * _PAGE_BYTES for pages in _STATM.read_text(encoding="ascii").split()[:2])
    except (OSError, ValueError):
        return found
    return found | {"runtime.sys_bytes": float(size), "runtime.alloc_bytes": float(resident)}


def runtime_totals() -> dict[str, float]:
    """What only grows."""
    return {"runtime.total_gc_runs": float(sum(generation["collections"] for generation in gc.get_stats()))}


@contextmanager
def measured_collections(metrics: Metrics = METRICS) -> Iterator[None]:
    """Sample, in the block, for how long each garbage collection held everything up (nanoseconds)."""
    began_ns = 0

    def measure(phase: str, _: dict[str, Any]) -> None:
        nonlocal began_ns
        if phase == "start":
            began_ns = time.perf_counter_ns()
        else:
            metrics.sample("runtime.gc_pause_ns", time.perf_counter_ns() - began_ns)

    gc.callbacks.append(measure)
    try:
        yield
    finally:
        gc.callbacks.remove(measure)
