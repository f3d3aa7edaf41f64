"""Unseals the node with its auto seal, as often and as long as that takes.

A seal that does not work (another server that is down, a key that is not the one) never ends the process: it is said in
the log and in ``sys/seal-status``, and tried again.
"""

from __future__ import annotations

import asyncio
import logging
import random

from plugin_api.errors import Unavailable
from sidecar.core.seals import AutoSeal
from sidecar.sealing import Sealing

log = logging.getLogger("core.seal")

RETRY_S = (0.5, 30.0)
POLL_S = 1.0
"""How often a node looks whether its cluster has been initialized, by another node."""


async def keep_unsealed(sealing: Sealing, seal: AutoSeal) -> None:
    """Run ``seal`` and unseal whenever the node is sealed and may open itself; until cancelled."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(seal.run(), name="auto seal")
        failures = 0
        while True:
            changed = sealing.changed
            if not sealing.opens_itself:
                await changed.wait()
                continue
            wait_s = POLL_S
            try:
                if await sealing.unseal_by_itself():
                    failures = 0
                    continue
            except Unavailable as error:
                low, high = RETRY_S
                wait_s = min(high, low * 2**failures)
                failures = min(failures + 1, 16)
                log.warning("auto-unseal failed, next try in %.1f s: %s", wait_s, error)
            try:
                async with asyncio.timeout(wait_s * random.uniform(0.8, 1.0)):  # noqa: S311 - jitter
                    await changed.wait()
            except TimeoutError:
                continue
