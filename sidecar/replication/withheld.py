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


def withheld_partitions(store: SecondaryStore, selection: Partitions) -> dict[str, int]:
    """Mounts that are here and that the selection does not permit, with how many entries each holds. What the primary
    merely does not hold itself is none of them."""
    if selection.only is None:
        return {}
    (storage_class,) = PERFORMANCE.classes
    names = [name for name in store.forest.names(storage_class) if is_mount(name) and not selection.permits(name)]
    return {name: store.forest.count(storage_class, name) for name in names}


async def drop_withheld(store: SecondaryStore, selection: Partitions, budget: Budget) -> int:
    """Delete what the selection does not permit; returns how many entries went. They are this cluster's own commits, so
    its DR secondaries drop the same. Safe to cut short and to repeat. Raises BackendError."""
    doomed = withheld_partitions(store, selection)
    if not doomed:
        return 0
    (storage_class,) = PERFORMANCE.classes
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
