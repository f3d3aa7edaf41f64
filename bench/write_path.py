"""What this process does for one transaction of 61 writes, step by step: a profile of the write path without Consul.

Each step is run by itself, again and again; the best of many tries counts, so that other work on the machine does not.
*While nothing is committed* marks what happens between one answer of Consul and the next request: only these steps
slow a saturated store down, the others run while Consul works.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.report import result, table
from consul_backend.batching import Batch, Budget, Preparer, require_fits_alone, take
from consul_backend.limits import Limits, require_shape
from consul_backend.merkle import Forest, entry_digest
from consul_backend.merkle_pages import ExtentTable
from consul_backend.physical import LOCK_KEY
from consul_backend.txn import Cas, CheckIndex, CheckSession, Op
from consul_backend.value_cache import ValueCache
from consul_backend.wal import Record, Write, record_key
from consul_backend.wire import decode_results, encode_txn

WRITES = 61
SESSION = "0b8f2c1e-1c3d-4b5a-9a77-3f3a7f3a7f3a"
PREFIX = "outrider/bench/"
KEY = record_key("g1", 77, 512)


def best_us(step: Callable[..., Any], make: Callable[[], Any] | None, tries: int) -> float:
    """Microseconds of the fastest of ``tries``; ``make`` gives each its argument."""
    times = []
    for _ in range(tries):
        given = [make()] if make is not None else []
        started = time.perf_counter()
        step(*given)
        times.append(time.perf_counter() - started)
    return min(times) * 1e6


def answer_to(ops: list[Op]) -> bytes:
    """As Consul 1.8 writes it."""
    entries = [
        {"KV": {"LockIndex": 0, "Key": PREFIX + op.key, "Flags": 0, "Value": None, "CreateIndex": 9, "ModifyIndex": 99}}
        for op in ops
    ]
    return json.dumps({"Results": entries, "Errors": None}, separators=(",", ":")).encode()


def steps(value_bytes: int, tries: int) -> list[tuple[str, float, bool]]:
    """Name, microseconds for the whole transaction, whether nothing is committed meanwhile."""
    limits = Limits(prefix_bytes=len(PREFIX))
    preparer = Preparer("g1", limits)
    budget = Budget(limits, session=SESSION, record_key=KEY, writer="bench")
    writes = [Write(f"r/bench/key/{n}", os.urandom(value_bytes)) for n in range(WRITES)]
    prepared = [preparer.prepare_all([write]) for write in writes]
    batches = [Batch(one, None) for one in prepared]
    packing = take(deque(batches), budget, {})
    groups = packing.groups()

    def build() -> Record:
        return Record.build(
            index=77, prev_hash=bytes(32), epoch=1, writer="bench", batch_id=bytes(16), time_ms=1_700_000_000_000,
            kind="data", positions={}, groups=packing.groups(),
        )  # fmt: skip

    raw = build().encode()
    ops = [CheckSession(LOCK_KEY, SESSION), CheckIndex(KEY, 99), *[one.op for one in packing.entries.values()]]
    ops.append(Cas(KEY, raw, 0))
    answer = answer_to(ops)
    forest, marks, cache = Forest(), ExtentTable("g1"), ValueCache(64 * 2**20)
    for n in range(10_000):
        forest.change("r", "bench", f"key/{n}", bytes(20))
    entries = list(packing.entries.values())
    assert len(entries) == len(groups["r", "bench"]) == WRITES
    found: list[tuple[str, Callable[..., Any], Callable[[], Any] | None, bool]] = [
        ("prepare: names, operation, sizes, digest", lambda: [preparer.prepare_all([w]) for w in writes], None, False),
        ("  of that the entries' digests", lambda: [entry_digest(w.key, w.value or b"") for w in writes], None, False),
        (
            "batch and its check",
            lambda: [require_fits_alone(Batch(p, None), budget, {}) for p in prepared],
            None,
            False,
        ),
        ("pack", lambda queue: take(queue, budget, {}), lambda: deque(batches), True),
        ("build and encode the record", lambda: build().encode(), None, True),
        ("check the operations", lambda: require_shape(ops, limits), None, True),
        ("encode the request", lambda: encode_txn(ops, PREFIX), None, True),
        ("decode the answer", lambda: decode_results(ops, answer), None, True),
        ("change the index", lambda: [forest.change(*e.group, e.path, e.digest) for e in entries], None, False),
        ("mark extents", lambda: [marks.mark("r", "bench", n * 997, 5) for n in range(WRITES)], None, False),
        ("keep values in the cache", lambda: [cache.put(e.key, e.value) for e in entries], None, False),
    ]
    return [(name, best_us(step, make, tries), alone) for name, step, make, alone in found]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--value-bytes", type=int, default=256)
    parser.add_argument("--tries", type=int, default=1000)
    arguments = parser.parse_args()
    found = steps(arguments.value_bytes, arguments.tries)
    print(f"one transaction of {WRITES} writes of {arguments.value_bytes} B; microseconds, best of {arguments.tries}")
    table(
        ("step", "us", "us a write", "while nothing is committed"),
        [(name, f"{us:.1f}", f"{us / WRITES:.2f}", "yes" if alone else "") for name, us, alone in found],
    )
    total = sum(us for name, us, _ in found if not name.startswith(" "))
    waiting = sum(us for _, us, alone in found if alone)
    print(f"together {total:.0f} us, {total / WRITES:.1f} a write; {waiting:.0f} us while nothing is committed")
    result("write_path", {"steps_us": {name.strip(): round(us, 2) for name, us, _ in found}, "waiting_us": waiting})


if __name__ == "__main__":
    main()
