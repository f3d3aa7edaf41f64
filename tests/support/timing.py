"""Whether two ways to be refused can be told apart by their time: a paired t-test.

Each sample is a pair, one call of either kind right after the other in an order that is drawn, so that whatever else
the machine does falls on both alike; of each pair only the difference counts. The processor's time is measured where
waiting means nothing. The tenth of the pairs with the largest differences, in either direction, is left out: those were
interrupted. ``|t|`` above 4.5 is the bound that leakage tests of cryptographic code use; equal calls pass it once in
100,000 runs.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

T_MAX = 4.5
_KEPT = 0.9
_WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """``difference_ns`` and ``detectable_ns``: the mean difference, and the smallest that would have been noticed."""

    t: float
    pairs: int
    mean_ns: float
    difference_ns: float
    detectable_ns: float

    @property
    def told_apart(self) -> bool:
        return abs(self.t) > T_MAX

    def __str__(self) -> str:
        return (
            f"t={self.t:+.2f} of {self.pairs} pairs: difference {self.difference_ns:+.0f} ns of {self.mean_ns:.0f} ns, "
            f"{self.detectable_ns:.0f} ns would have been noticed"
        )


async def compare(
    one: Callable[[], Awaitable[object]],
    other: Callable[[], Awaitable[object]],
    pairs: int,
    *,
    clock_ns: Callable[[], int] = time.process_time_ns,
) -> Verdict:
    """Measure both, ``pairs`` times."""

    async def took_ns(call: Callable[[], Awaitable[object]]) -> int:
        start_ns = clock_ns()
        await call()
        return clock_ns() - start_ns

    for _ in range(_WARM_UP):
        await one()
        await other()
    order = random.Random(pairs)
    differences, total_ns = [], 0
    gc.collect()
    gc.disable()
    try:
        for _ in range(pairs):
            if order.random() < 0.5:
                first_ns = await took_ns(one)
                second_ns = await took_ns(other)
            else:
                second_ns = await took_ns(other)
                first_ns = await took_ns(one)
            differences.append(first_ns - second_ns)
            total_ns += first_ns + second_ns
    finally:
        gc.enable()
    return judge(differences, total_ns / (2 * pairs))


def judge(differences_ns: list[int], mean_ns: float) -> Verdict:
    """The verdict on the differences of all pairs."""
    middle = statistics.median(differences_ns)
    kept = sorted(differences_ns, key=lambda value: abs(value - middle))[: max(int(len(differences_ns) * _KEPT), 2)]
    mean, spread = statistics.fmean(kept), statistics.stdev(kept) / math.sqrt(len(kept))
    t = mean / spread if spread else math.copysign(math.inf, mean) if mean else 0.0
    return Verdict(t, len(differences_ns), mean_ns, mean, T_MAX * spread)
