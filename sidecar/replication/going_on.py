"""Out of an adverse state by an operator's call, and with the help of secondaries. To go on with a store that they deny
is one such call: see :mod:`sidecar.replication.denials`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from consul_backend.position import Position
from sidecar.replication import roles
from sidecar.replication.history import Promotion
from sidecar.replication.mode_manager import ModeManager
from sidecar.replication.roles import PrimaryRole, SecondaryRole
from sidecar.replication.texts import GOING_ON, RECOVERING, REINDEX_CANCELLED
from sidecar.replication.upkeep import IndexUpkeep
from sidecar.replication.wiring import ClusterStore

logger = logging.getLogger(__name__)


async def go_on(
    managers: Iterable[ModeManager], store: ClusterStore, began: Callable[[int, Position], Promotion]
) -> str:
    """Begin a new epoch in every mode that this cluster is primary of. It forks from the old one at the end of the log
    that this tenure found: later the log's own chain would have noticed. ``began`` makes an epoch of its number and
    fork point. Returns what to tell people; raises what a change of the role raises."""
    found = store.inherited
    for manager in managers:
        role = manager.role
        if not isinstance(role, PrimaryRole):
            continue
        fork = Position(role.set_id, store.generation, role.epoch.number, found.index, found.chain_hash)
        epoch = began(roles.next_number(role), fork)
        await manager.change(partial(roles.take_over, began=epoch))
        await manager.turn()
        logger.warning(
            "replication: an operator goes on with the store as it is: %s epoch %d begins after record %d",
            manager.mode.name,
            epoch.number,
            found.index,
        )
    return GOING_ON


async def begin_anew(managers: Iterable[ModeManager], upkeep: IndexUpkeep) -> str:
    """Cancel a running reindex, and have secondaries begin again. Returns what to tell people."""
    cancelled = upkeep.cancel()
    for manager in managers:
        if isinstance(manager.role, SecondaryRole):
            await manager.turn()
    return REINDEX_CANCELLED if cancelled else RECOVERING


async def of_secondaries(managers: Iterable[ModeManager], wanted: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """Entries (by key, with their digest) that this cluster lost, from whoever follows it."""
    found: dict[str, bytes] = {}
    for manager in managers:
        if manager.primary is not None:
            missing = {key: digest for key, digest in wanted.items() if key not in found}
            found |= await manager.primary.shipper.ask(missing)
    return found
