"""The merkle index alone, at a million keys: memory, a commit's work a key, the root after a change, a flush's size.

No store is involved: what is measured is what every commit and every flush of a big cluster pays in memory and CPU.
Work a key is processor time, since other work on the machine is not the index's; the rest is by the clock.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.report import PeakMemory, percentile, result, table
from consul_backend.checkpoint import DIRTY_MAX, Checkpoint, CheckpointLeaf, encode_checkpoint
from consul_backend.heads import encode_heads
from consul_backend.limits import base64_bytes
from consul_backend.merkle import Forest, bucket_of, entry_digest
from consul_backend.merkle_flush import FLUSH_BODY_BYTES, FLUSH_EXTENTS
from consul_backend.merkle_pages import ExtentTable, FlushPlan

PARTITION = "0b8f2c1e-77aa-4d1c-9d0e-2f6f3a5f9a10"
FOLDERS = 1000
MEMORY_BYTES_MAX = 150
GOAL_KEYS = 1_000_000
"""The memory goal is for so many: with fewer, a partition has more subpages than it has keys to share their cost."""
WORK_US_MAX = 20.0
_OPS_MAX = 61


@dataclass(slots=True)
class Figures:
    """What was measured; ``*_us`` and ``*_ms`` are medians unless named otherwise."""

    bytes_a_key: float
    path_bytes: float
    build_us_a_key: float
    work_us_a_key: float
    first_root_ms: float
    flush_all_s: float
    flush_all_mib: float
    root_ms: float
    root_p99_ms: float
    flush_bytes: float
    flush_bytes_max: int
    flush_ms: float
    extents: int


def path_of(number: int) -> str:
    """A path as a key-value engine would make it, of about 30 characters."""
    return f"team-{number % FOLDERS:04d}/app-{number * 2654435761 % 2**32:08x}/cfg{number % 97:02d}"


def build(keys: int) -> tuple[Forest, float]:
    """The forest and its bytes of memory a key, digests included."""
    digest = b"%020d" % 7
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    forest = Forest()
    for number in range(keys):
        forest.change("r", PARTITION, path_of(number), entry_digest("k", digest))
    forest.root("r")
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return forest, held / keys


def commit_work(forest: Forest, marks: ExtentTable, keys: int, rounds: int) -> float:
    """Microseconds of digest, index change and dirty mark for one key of a commit."""
    rng = random.Random(5)
    names = [path_of(rng.randrange(keys)) for _ in range(rounds)]
    value = rng.randbytes(256)
    started = time.process_time()
    for index, path in enumerate(names, 2):
        digest = entry_digest(f"r/{PARTITION}/{path}", value)
        marks.mark("r", PARTITION, forest.change("r", PARTITION, path, digest), index)
    return (time.process_time() - started) / rounds * 1e6


def roots_after_one_change(forest: Forest, keys: int, rounds: int) -> list[float]:
    """Milliseconds of a root after one key changed."""
    rng = random.Random(6)
    samples = []
    for _ in range(rounds):
        forest.change("r", PARTITION, path_of(rng.randrange(keys)), rng.randbytes(20))
        started = time.perf_counter()
        forest.root("r")
        samples.append((time.perf_counter() - started) * 1e3)
    return samples


def flush_everything(forest: Forest, marks: ExtentTable) -> None:
    """Store the whole index on paper, as many transactions as it takes."""
    for path, _ in forest.keys("r", PARTITION):
        marks.mark("r", PARTITION, bucket_of(path), 1)
    while marks.dirty_count:
        marks.flushed(plan_one(forest, marks, 1))


def plan_one(forest: Forest, marks: ExtentTable, index: int) -> FlushPlan:
    """The next flush, within the bounds that the flusher keeps."""
    return marks.plan(forest, index, extents_max=FLUSH_EXTENTS, ops_max=_OPS_MAX, body_bytes_max=FLUSH_BODY_BYTES)


def flushes_of_one_write(forest: Forest, marks: ExtentTable, keys: int, rounds: int) -> tuple[list[int], list[float]]:
    """Bytes of the request body, and milliseconds of CPU, of the flush that follows one random write."""
    rng = random.Random(7)
    sizes, times = [], []
    for round_number in range(rounds):
        path = path_of(rng.randrange(keys))
        marks.mark("r", PARTITION, forest.change("r", PARTITION, path, rng.randbytes(20)), round_number + 2)
        started = time.perf_counter()
        plan = plan_one(forest, marks, round_number + 2)
        times.append((time.perf_counter() - started) * 1e3)
        count, total = marks.total_after(plan)
        leaves = tuple(CheckpointLeaf("r", PARTITION, 12, 16 * number, 2) for number in range(DIRTY_MAX))
        checkpoint = Checkpoint(1, 1, round_number + 2, bytes(32), {}, leaves[:1], count, total, {})
        heads, _ = encode_heads("g/g1/heads/r/partition", forest, "r", PARTITION, round_number + 2)
        sizes.append(
            plan.body_bytes + base64_bytes(len(heads)) + base64_bytes(len(encode_checkpoint("g1", checkpoint)))
        )
        marks.flushed(plan)
    return sizes, times


def measure(keys: int, rounds: int) -> Figures:
    """All of it."""
    forest, bytes_a_key = build(keys)
    marks = ExtentTable("g1")
    started = time.process_time()
    again = Forest()
    for number in range(keys // 10):
        again.change("r", PARTITION, path_of(number), bytes(20))
    build_us = (time.process_time() - started) / (keys // 10) * 1e6
    started = time.process_time()
    again.root("r")
    first_root_ms = (time.process_time() - started) * 1e3
    del again
    with PeakMemory() as memory:
        started = time.perf_counter()
        flush_everything(forest, marks)
        flush_all_s = time.perf_counter() - started
    work_us = statistics.median(commit_work(forest, marks, keys, rounds * 20) for _ in range(3))
    while marks.dirty_count:
        marks.flushed(plan_one(forest, marks, 9))
    roots = roots_after_one_change(forest, keys, rounds)
    sizes, times = flushes_of_one_write(forest, marks, keys, rounds)
    return Figures(
        bytes_a_key=bytes_a_key,
        path_bytes=statistics.mean(len(path_of(number)) for number in range(min(keys, 1000))),
        build_us_a_key=build_us,
        work_us_a_key=work_us,
        first_root_ms=first_root_ms,
        flush_all_s=flush_all_s,
        flush_all_mib=memory.mib,
        root_ms=statistics.median(roots),
        root_p99_ms=percentile(roots, 0.99),
        flush_bytes=statistics.median(sizes),
        flush_bytes_max=max(sizes),
        flush_ms=statistics.median(times),
        extents=marks.count,
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=500)
    arguments = parser.parse_args()
    every = [(keys, measure(keys, arguments.rounds)) for keys in arguments.keys]
    rows = [
        ("memory a key, bytes", "bytes_a_key", "{:.0f}", f"<= {MEMORY_BYTES_MAX} at a million"),
        ("build a key, us", "build_us_a_key", "{:.1f}", ""),
        ("index work a key of a commit, us", "work_us_a_key", "{:.1f}", f"< {WORK_US_MAX:.0f}"),
        ("first root of a tenth of them, ms", "first_root_ms", "{:.0f}", ""),
        ("first flush of everything, s", "flush_all_s", "{:.2f}", ""),
        ("its memory at most, MiB", "flush_all_mib", "{:.1f}", ""),
        ("root after one change, ms", "root_ms", "{:.2f}", ""),
        ("the same, p99", "root_p99_ms", "{:.2f}", ""),
        ("flush of one random write, bytes", "flush_bytes", "{:,.0f}", "bounded"),
        ("the same, at most", "flush_bytes_max", "{:,}", "bounded"),
        ("planning that flush, ms", "flush_ms", "{:.2f}", ""),
        ("stored extents", "extents", "{:,}", ""),
    ]
    table(
        ("", *(f"{keys:,} keys" for keys, _ in every), "goal"),
        [(name, *(form.format(getattr(found, field)) for _, found in every), goal) for name, field, form, goal in rows],
    )
    for keys, found in every:
        small = found.bytes_a_key <= MEMORY_BYTES_MAX or keys < GOAL_KEYS
        met = small and found.work_us_a_key < WORK_US_MAX
        result("index", {"keys": keys, "met": met, **{name: getattr(found, name) for name in Figures.__slots__}})


if __name__ == "__main__":
    main()
