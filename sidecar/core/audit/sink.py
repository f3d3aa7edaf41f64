"""Where a device's lines go. A sink is used by one thread alone, and may block there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class SinkError(Exception):
    """The lines were not written, as far as can be known. The text is fit for a log and for an operator."""


class Sink(Protocol):
    """All methods block and raise SinkError or OSError."""

    def write(self, lines: Sequence[bytes]) -> None:
        """Write whole lines, in order; opens what is not open. After an error none of them counts as written."""

    def reopen(self) -> None:
        """Let go of the file or connection and open it again."""

    def close(self) -> None:
        """Let go of everything."""


class DiscardSink:
    """Takes everything and keeps nothing."""

    def write(self, lines: Sequence[bytes]) -> None:
        return

    def reopen(self) -> None:
        return

    def close(self) -> None:
        return


class RefusedSink(DiscardSink):
    """Stands for a device that this node cannot or may not run: every entry fails with ``reason``."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def write(self, lines: Sequence[bytes]) -> None:
        raise SinkError(self._reason)
