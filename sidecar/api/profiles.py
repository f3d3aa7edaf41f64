"""What a running process does and holds, as text: stacks of tasks and threads, samples of the processor, memory.

Only names of functions, files and lines come out, never a value.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
import tracemalloc
from collections import Counter
from types import CodeType, FrameType

SAMPLE_INTERVAL_S = 0.01
_DEPTH_MAX = 128
_HEAP_ROWS = 100


def stacks() -> str:
    """Every task of the running loop and every thread, innermost call last."""
    tasks = sorted(asyncio.all_tasks(), key=lambda task: task.get_name())
    parts = [f"tasks: {len(tasks)}\n"]
    for task in tasks:
        frames = task.get_stack(limit=_DEPTH_MAX)
        parts.append(f"\ntask {task.get_name()}:\n" + "".join(_frame_line(frame, frame.f_lineno) for frame in frames))
    return "".join(parts) + "\n" + thread_stacks()


def thread_stacks() -> str:
    """Every thread, innermost call last."""
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [f"threads: {len(frames)}\n"]
    for ident, frame in frames.items():
        parts.append(f"\nthread {names.get(ident, ident)}:\n")
        parts += [_frame_line(one, line) for one, line in traceback.walk_stack(frame)][:_DEPTH_MAX][::-1]
    return "".join(parts)


def _frame_line(frame: FrameType, line: int) -> str:
    return f"    {frame.f_code.co_filename}:{line} {frame.f_code.co_qualname}\n"


def sample(seconds: float) -> str:
    """Blocks for ``seconds`` and samples all other threads; one folded stack a line with its count, as flame-graph
    tools read it. Call it in a thread."""
    counts: Counter[tuple[CodeType, ...]] = Counter()
    own = threading.get_ident()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(SAMPLE_INTERVAL_S)
        for ident, frame in sys._current_frames().items():
            if ident != own:
                counts[_codes(frame)] += 1
    return "".join(f"{';'.join(map(_label, stack))} {count}\n" for stack, count in counts.most_common())


def _codes(frame: FrameType | None) -> tuple[CodeType, ...]:
    found: list[CodeType] = []
    while frame is not None and len(found) < _DEPTH_MAX:
        found.append(frame.f_code)
        frame = frame.f_back
    return tuple(reversed(found))


def _label(code: CodeType) -> str:
    module = code.co_filename.rsplit("/", 1)[-1].removesuffix(".py")
    return f"{module}.{code.co_qualname}"


def heap() -> str:
    """Memory by the line that asked for it, greatest first. Raises LookupError while it is not traced."""
    if not tracemalloc.is_tracing():
        raise LookupError
    statistics = tracemalloc.take_snapshot().statistics("lineno")
    current, peak = tracemalloc.get_traced_memory()
    rows = [f"traced: {current} bytes now, {peak} bytes at most\n"]
    for row in statistics[:_HEAP_ROWS]:
        frame = row.traceback[0]
        rows.append(f"{row.size} bytes in {row.count} blocks: {frame.filename}:{frame.lineno}\n")
    return "".join(rows)
