"""Counters, gauges and samples of this process, in the two forms operators scrape.

One registry for the process, as there is one tree of loggers: :data:`METRICS`. Names are those of the API's telemetry
(``core.active``); what is measured in time is a sample in milliseconds. Nothing here may ever hold a secret or a value
that a client chose freely: names and labels are written in the code.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import mul
from typing import Any

INTERVAL_S = 10.0
PREFIX = "vault"
_QUANTILES = (0.5, 0.9, 0.99)
_RECENT_MAX = 1024
_LATEST_MAX = 256
_NOT_A_NAME = re.compile(r"[^a-zA-Z0-9_]")

Labels = tuple[tuple[str, str], ...]
Gauges = Callable[[], Mapping[str, float]]
"""By name; one with labels is a :class:`Labelled`."""


class Labelled(str):
    """The name of a gauge with labels: as a text it is unique, and sorts next to its like."""

    __slots__ = ("labels", "name")

    name: str
    labels: Labels

    def __new__(cls, name: str, /, **labels: str) -> Labelled:
        ordered = tuple(sorted(labels.items()))
        self = super().__new__(cls, name + _labels(ordered))
        self.name, self.labels = name, ordered
        return self


@dataclass(slots=True)
class _Window:
    """What happened to one series within one interval."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, values: Sequence[float]) -> None:
        self.count += len(values)
        self.total += sum(values)
        self.squares += sum(map(mul, values, values))
        self.low = min(self.low, *values)
        self.high = max(self.high, *values)

    def shown(self) -> dict[str, Any]:
        mean = self.total / self.count
        variance = max(self.squares / self.count - mean * mean, 0.0) * self.count / max(self.count - 1, 1)
        return {
            "Count": self.count,
            "Rate": self.total / INTERVAL_S,
            "Sum": self.total,
            "Min": self.low,
            "Max": self.high,
            "Mean": mean,
            "Stddev": math.sqrt(variance),
        }


@dataclass(slots=True, eq=False)
class _Series:
    """One name with its labels: totals since the start, this interval and the last whole one. ``latest`` are values of
    this interval that nothing has been worked out of yet: every request adds several, and to keep one costs the least.
    :meth:`settle` before anything else is read."""

    started: int
    count: int = 0
    total: float = 0.0
    window: _Window = field(default_factory=_Window)
    last: _Window | None = None
    recent: deque[float] | None = None
    latest: list[float] = field(default_factory=list)

    def add(self, value: float, interval: int) -> None:
        if interval != self.started:
            self.turn(interval)
        latest = self.latest
        latest.append(value)
        if len(latest) >= _LATEST_MAX:
            self.settle()

    def settle(self) -> None:
        """Work off the latest values."""
        values = self.latest
        if values:
            self.count += len(values)
            self.total += sum(values)
            self.window.add(values)
            if self.recent is not None:
                self.recent.extend(values)
            self.latest = []

    def turn(self, interval: int) -> None:
        """Begin a new interval where the old one is over."""
        self.settle()
        if interval != self.started:
            self.last = self.window if interval == self.started + 1 and self.window.count else None
            self.window, self.started = _Window(), interval


class _Timer:
    """Samples how long its block took, from when it was made. A class: a generator would cost more than most blocks
    that are timed."""

    __slots__ = ("_monotonic", "_series", "_started_s")

    def __init__(self, series: _Series, monotonic: Callable[[], float]) -> None:
        self._series = series
        self._monotonic = monotonic
        self._started_s = monotonic()

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        now_s = self._monotonic()
        self._series.add((now_s - self._started_s) * 1000, int(now_s // INTERVAL_S))


class LabelledCounter:
    """One counter with its labels, looked up once: for what every request counts."""

    __slots__ = ("_monotonic", "_series")

    def __init__(self, series: _Series, monotonic: Callable[[], float]) -> None:
        self._series = series
        self._monotonic = monotonic

    def increment(self) -> None:
        """Count one more."""
        self._series.add(1, int(self._monotonic() // INTERVAL_S))


@dataclass(frozen=True, slots=True)
class NameFilter:
    """Which names are shown: the longest of the ``rules`` (``+prefix``, ``-prefix``) that fits decides, of two that are
    equally long the one that hides, and without any ``otherwise``."""

    rules: tuple[str, ...] = ()
    otherwise: bool = True

    def shows(self, name: str) -> bool:
        """``name`` with its prefix, as ``vault.core.active``."""
        fitting = [rule for rule in self.rules if name.startswith(rule[1:])]
        if not fitting:
            return self.otherwise
        return max(fitting, key=lambda rule: (len(rule), rule[0] == "-"))[0] == "+"


class Metrics:
    """A registry. ``monotonic`` and ``unix`` return seconds."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic, unix: Callable[[], float] = time.time) -> None:
        self.monotonic = monotonic
        self._unix = unix
        self._counters: dict[tuple[str, Labels], _Series] = {}
        self._samples: dict[tuple[str, Labels], _Series] = {}
        self._timed: dict[str, _Series] = {}  # of the samples, by name, those without labels: looked up all the time
        self._sources: list[Gauges] = []
        self._totals: list[Gauges] = []
        self._prefix = PREFIX
        self._filter = NameFilter()

    def configure(self, prefix: str, rules: tuple[str, ...] = (), *, shown_otherwise: bool = True) -> None:
        """Begin every name with ``prefix``, and show only what the filter of ``rules`` lets through."""
        self._prefix, self._filter = prefix, NameFilter(rules, shown_otherwise)

    def increment(self, name: str, value: float = 1, /, **labels: str) -> None:
        """Count something."""
        self._series(self._counters, name, labels).add(value, self._interval())

    def counter(self, name: str, /, **labels: str) -> LabelledCounter:
        """:meth:`increment` of one counter, again and again."""
        return LabelledCounter(self._series(self._counters, name, labels), self.monotonic)

    def sample(self, name: str, value: float, /, **labels: str) -> None:
        """One measured value; milliseconds, where it is a time."""
        self._sampled(name, labels).add(value, self._interval())

    def timer(self, name: str, /, **labels: str) -> AbstractContextManager[None]:
        """Sample how long the block took, also where it fails. For a ``with`` statement, where its time begins."""
        series = None if labels else self._timed.get(name)
        if series is None:
            series = self._sampled(name, labels)
            if not labels:
                self._timed[name] = series
        return _Timer(series, self.monotonic)

    @contextmanager
    def source(self, gauges: Gauges, totals: Gauges = dict) -> Iterator[None]:
        """Ask ``gauges`` for values at each scrape, for as long as the block runs; ``totals`` for numbers that somebody
        else counts (the JSON form shows them among the gauges)."""
        self._sources.append(gauges)
        self._totals.append(totals)
        try:
            yield
        finally:
            self._sources.remove(gauges)
            self._totals.remove(totals)

    def as_json(self) -> dict[str, Any]:
        """The last whole interval, or the running one where there is none yet."""
        moment = datetime.fromtimestamp(self._unix() // INTERVAL_S * INTERVAL_S, UTC)
        return {
            "Timestamp": f"{moment:%Y-%m-%d %H:%M:%S} +0000 UTC",
            "Gauges": [
                {"Name": self._full(_name(name)), "Value": value, "Labels": dict(_labels_of(name))}
                for name, value in sorted((_asked(self._sources) | _asked(self._totals)).items())
                if self._shows(_name(name))
            ],
            "Points": [],
            "Counters": self._windows(self._counters),
            "Samples": self._windows(self._samples),
        }

    def as_prometheus(self) -> str:
        """Text format 0.0.4: totals since the process started; quantiles of the newest samples."""
        lines: list[str] = []
        announced = ""
        for kind, sources in (("gauge", self._sources), ("counter", self._totals)):
            for gauge, value in sorted(_asked(sources).items()):
                if not self._shows(_name(gauge)):
                    continue
                flat = self._flat(_name(gauge))
                if flat != announced:
                    lines.append(f"# TYPE {flat} {kind}")
                announced = flat
                lines.append(f"{flat}{_labels(_labels_of(gauge))} {_number(value)}")
        announced = ""
        for (name, labels), series in self._shown(self._counters):
            if name != announced:
                lines.append(f"# TYPE {self._flat(name)} counter")
            announced = name
            series.settle()
            lines.append(f"{self._flat(name)}{_labels(labels)} {_number(series.total)}")
        for (name, labels), series in self._shown(self._samples):
            if name != announced:
                lines.append(f"# TYPE {self._flat(name)} summary")
            announced = name
            series.settle()
            values = sorted(series.recent or ())
            for quantile in _QUANTILES:
                at = values[min(int(quantile * len(values)), len(values) - 1)]
                lines.append(f"{self._flat(name)}{_labels((*labels, ('quantile', str(quantile))))} {_number(at)}")
            lines.append(f"{self._flat(name)}_sum{_labels(labels)} {_number(series.total)}")
            lines.append(f"{self._flat(name)}_count{_labels(labels)} {series.count}")
        return "\n".join(lines) + "\n"

    def _windows(self, table: Mapping[tuple[str, Labels], _Series]) -> list[dict[str, Any]]:
        interval = self._interval()
        shown = []
        for (name, labels), series in self._shown(table):
            series.turn(interval)
            window = series.last or series.window
            if window.count:
                shown.append({"Name": self._full(name), **window.shown(), "Labels": dict(labels)})
        return shown

    def _shown(self, table: Mapping[tuple[str, Labels], _Series]) -> list[tuple[tuple[str, Labels], _Series]]:
        return sorted((item for item in table.items() if self._shows(item[0][0])), key=lambda item: item[0])

    def _shows(self, name: str) -> bool:
        return (not self._filter.rules and self._filter.otherwise) or self._filter.shows(self._full(name))

    def _full(self, name: str) -> str:
        return f"{self._prefix}.{name}"

    def _flat(self, name: str) -> str:
        return _NOT_A_NAME.sub("_", self._full(name))

    def _sampled(self, name: str, labels: Mapping[str, str]) -> _Series:
        series = self._series(self._samples, name, labels)
        if series.recent is None:
            series.recent = deque(maxlen=_RECENT_MAX)
        return series

    def _series(self, table: dict[tuple[str, Labels], _Series], name: str, labels: Mapping[str, str]) -> _Series:
        key = (name, tuple(sorted(labels.items())) if labels else ())
        series = table.get(key)
        if series is None:
            series = table[key] = _Series(self._interval())
        return series

    def _interval(self) -> int:
        return int(self.monotonic() // INTERVAL_S)


def _asked(sources: list[Gauges]) -> dict[str, float]:
    found: dict[str, float] = {}
    for source in sources:
        found.update(source())
    return found


def _name(gauge: str) -> str:
    return gauge.name if isinstance(gauge, Labelled) else gauge


def _labels_of(gauge: str) -> Labels:
    return gauge.labels if isinstance(gauge, Labelled) else ()


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = ((name, value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")) for name, value in labels)
    return "{" + ",".join(f'{_NOT_A_NAME.sub("_", name)}="{value}"' for name, value in escaped) + "}"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))


METRICS = Metrics()
"""The process's own."""
