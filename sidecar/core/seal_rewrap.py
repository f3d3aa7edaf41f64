"""The auto seal's part of the seal record follows the seal's key: when that was rotated where it is kept (another
server's transit engine), the root key is put under its newest version, so that older ones can be given up there.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable

from consul_backend.wal import Write
from plugin_api.errors import Unavailable
from sidecar.core.keys import SEAL
from sidecar.core.seal_record import AutoPart, SealRecord
from sidecar.core.seals import Sealer
from sidecar.core.store_view import SealedStore

log = logging.getLogger("core.seal")

SEAL_PASS_S = 3600.0
"""How often the active node looks whether its seal's key was rotated."""
SealerOf = Callable[[], Awaitable[Sealer | None]]
_VERSION = re.compile(rb"vault:v(\d{1,9}):")


def is_newer(fresh: AutoPart, stored: AutoPart) -> bool:
    """Whether ``fresh`` was wrapped by a newer version of the same key. Pure. A key that is another by name is a change
    of seal, which is settled when a node is unsealed."""
    if (fresh.kind, fresh.key_id) != (stored.kind, stored.key_id):
        return False
    return _version(fresh.wrapped_key) > _version(stored.wrapped_key)


def _version(wrapped: bytes) -> int:
    found = _VERSION.match(wrapped)
    return int(found[1]) if found else 0


async def rewrap(sealed: SealedStore, sealer_of: SealerOf, lock: asyncio.Lock) -> bool:
    """Replace the auto seal's part where a newer one can be made; whether it was. ``sealer_of`` gives the configured
    seal, None without one; one that cannot be used now can be at the next pass. ``lock`` is held by whoever writes the
    seal record of this tenure. Raises what the store raises."""
    try:
        sealer = await sealer_of()
    except Unavailable as error:
        log.warning("whether the seal's key was rotated cannot be told: %s", error)
        return False
    if sealer is None:
        return False
    fresh = sealer(sealed.barrier.root_key())
    async with lock:
        raw = await sealed.get_raw(SEAL)
        record = SealRecord.decode(raw) if raw is not None else None
        if record is None or record.auto is None or not is_newer(fresh, record.auto):
            return False
        await sealed.commit([Write(SEAL, record.with_auto(fresh).encode())])
    log.info("the root key is now sealed by a newer version of %s key %r", fresh.kind, fresh.key_id)
    return True
