"""One node's time as active."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Tenure:
    """``epoch`` numbers it, ``session`` fences it, ``epoch_index`` is the ModifyIndex of the epoch key it wrote."""

    epoch: int
    node_id: str
    session: str = field(repr=False)
    epoch_index: int
