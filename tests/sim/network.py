"""Between the nodes and the store: the plan's latency and faults, and who is cut off at the moment."""

from __future__ import annotations

import random

from consul_backend.testing_faults import Call, Journey, faulty_journey

STORM = 0.4
"""The chance of a fault per call during a storm."""


class SwarmNetwork:
    """``faults`` are probabilities per call; a storm makes each of them likelier for a while. ``stale_share`` of the
    reads go to a deposed leader, while there is one."""

    def __init__(
        self, seed: int, *, usual_s: float, late_s_max: float, stale_share: float, faults: dict[str, float]
    ) -> None:
        self._random = random.Random(f"network {seed}")
        self._usual_s = usual_s
        self._late_s_max = late_s_max
        self._stale_share = stale_share
        self._names = list(faults)
        self._weights = list(faults.values())
        self._total = sum(self._weights)
        self.calm = True
        self.stormy = False
        self.cut: set[str] = set()
        self.refused: set[str] = set()
        self.counts: dict[str, int] = {}

    def journey(self, call: Call) -> Journey:
        draw = self._random.random()
        rnd = self._random
        usual = Journey(
            rnd.expovariate(1.0 / self._usual_s),
            rnd.expovariate(1.0 / self._usual_s),
            stale=rnd.random() < self._stale_share,
        )
        if call.node in self.refused:
            return Journey(refused=True)
        if self.calm or not self._names:
            return usual
        if draw >= (max(STORM, self._total) if self.stormy else self._total):
            return usual
        fault = self._random.choices(self._names, self._weights)[0]
        self.counts[fault] = self.counts.get(fault, 0) + 1
        return faulty_journey(fault, self._random, usual=usual, late_s_max=self._late_s_max)

    def connected(self, node: str) -> bool:
        return node not in self.cut

    def heal(self) -> None:
        """No fault from here on."""
        self.calm, self.stormy = True, False
        self.cut.clear()
        self.refused.clear()
