"""How many entries may be deleted, unasked, for no other reason than that a comparison did not find them. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeleteAllowance:
    """``entries``, or ``share`` (0..1) of what is here, whichever is more."""

    entries: int = 100
    share: float = 0.2

    def __post_init__(self) -> None:
        if self.entries < 0 or not 0 <= self.share <= 1:
            raise ValueError("an allowance's entries must not be negative, its share is from 0 to 1")

    def allows(self, here: int) -> int:
        """How many of ``here`` entries may go."""
        return max(self.entries, int(here * self.share))
