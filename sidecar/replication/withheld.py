"""A secondary gives up what a filter withholds from it."""

from __future__ import annotations

import logging

from consul_backend.failpoint import failpoint
from consul_backend.wal import Write
from sidecar.replication.committer import commit
from sidecar.replication.intake import Budget, split_writes
from sidecar.replication.modes import PERFORMANCE
from sidecar.replication.selection import Partitions, is_mount
from sidecar.replication.store_view import SecondaryStore

logger = logging.getLogger(__name__)


async def drop_withheld(store: SecondaryStore, selection: Partitions, budget: Budget) -> int:
    """Delete what the selection does not permit; returns how many entries went. They are this cluster's own commits, so
    its DR secondaries drop the same. What the primary merely does not hold itself is left alone. Safe to cut short and
    to repeat. Raises BackendError."""
    if selection.only is None:
        return 0
    (storage_class,) = PERFORMANCE.classes
    names = store.forest.names(storage_class)
    doomed = [name for name in names if is_mount(name) and not selection.permits(name)]
    if not doomed:
        return 0
    await store.load_index(storage_class)
    dropped = 0
    for name in doomed:
        keys = [f"{storage_class}/{name}/{path}" for path, _ in store.forest.keys(storage_class, name)]
        for piece in split_writes([Write(key, None) for key in keys], budget):
            await commit(store, piece, {})
            failpoint("filter:dropping")
        dropped += len(keys)
        logger.warning("replication: mount %s is withheld from this secondary: %d entries dropped", name, len(keys))
    return dropped
