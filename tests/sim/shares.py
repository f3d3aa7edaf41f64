"""Seeds of ``make test``, in several files of one share each, so that xdist spreads them over its workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.sim.runs import Kind, Totals, failure_text, run_seeds


@dataclass(frozen=True, slots=True)
class Seeds:
    """``count`` seeds from ``first`` on, in chunks that are dealt out to ``shares`` files. ``judge`` asserts of a
    chunk's totals that enough was done in it: a simulation in which nothing happens finds nothing. Every kind of thing
    happens in ``for_every_kind`` seeds; where a share has fewer, they are taken from ``more_first`` on."""

    kind: Kind
    first: int
    count: int
    shares: int
    chunk: int
    for_every_kind: int
    more_first: int
    judge: Callable[[Totals, range], None]
    _done: dict[int, Totals] = field(default_factory=dict)

    def chunks(self, share: int) -> list[int]:
        """The first seed of each chunk of a share, which are numbered from 0."""
        return list(range(self.first, self.first + self.count, self.chunk))[share :: self.shares]

    def run_chunk(self, first: int) -> Totals:
        """Run a chunk's seeds, once; the first that fails ends it, with the command that replays it."""
        if first not in self._done:
            seeds = range(first, min(first + self.chunk, self.first + self.count))
            totals, started_s = Totals(self.kind), time.perf_counter()
            for outcome in run_seeds(seeds, self.kind):
                assert not outcome.violations, failure_text(outcome, self.kind)
                totals.add(outcome)
            print(totals.text(time.perf_counter() - started_s))
            self.judge(totals, seeds)
            self._done[first] = totals
        return self._done[first]

    def share_totals(self, share: int) -> Totals:
        """Of the chunks of a share, run or not; of enough seeds for every kind of thing to happen."""
        totals = Totals(self.kind)
        for first in self.chunks(share):
            totals.merge(self.run_chunk(first))
        more = range(self.more_first, self.more_first + self.for_every_kind - totals.seeds)
        for outcome in run_seeds(more, self.kind):
            totals.add(outcome)
        return totals
