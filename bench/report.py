"""What every benchmark prints: a table for people, then one last line of JSON for programs."""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least ``share`` (0..1) of all samples do not exceed; 0.0 for none."""
    if not samples:
        return 0.0
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, max(0, int(share * len(ordered) + 0.999999) - 1))]


def spread(samples: Sequence[float]) -> str:
    """``median [min-max]``."""
    return f"{statistics.median(samples):,.0f} [{min(samples):,.0f}-{max(samples):,.0f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


class PeakMemory:
    """``with PeakMemory() as memory: ...``: by how much the process grew at its largest meanwhile, in MiB (``mib``);
    0.0 where the kernel does not let the mark be reset."""

    mib = 0.0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
            self._before = _status_kib("VmRSS")
        except OSError:
            self._before = 0
        return self

    def __exit__(self, *_: object) -> None:
        self.mib = max(0.0, (_status_kib("VmHWM") - self._before) / 1024) if self._before else 0.0


def _status_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"no {name}")


def result(name: str, figures: dict[str, Any]) -> None:
    """The last line: the figures as JSON."""
    print(json.dumps({"benchmark": name, **figures}), flush=True)
