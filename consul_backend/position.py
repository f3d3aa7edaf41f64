"""Where a secondary stands in its primary's write-ahead log: a bare index is not a position."""

from __future__ import annotations

import msgspec


class Position(msgspec.Struct, frozen=True, array_like=True):
    """``index`` and ``chain_hash`` (32 bytes) of the last record handled, in the set ``set_id`` at the source's store
    ``generation`` and replication ``epoch``. Equal indexes with different hashes mean divergence."""

    set_id: str
    generation: str
    epoch: int
    index: int
    chain_hash: bytes
