"""Has engines undo what they began outside and did not finish (:mod:`plugin_api.pending`), as Vault's rollback manager
does: every mount, once a minute, on the active node."""

from __future__ import annotations

import asyncio
import logging

from plugin_api.engine import Engine
from plugin_api.errors import PluginError
from plugin_api.pending import MIN_AGE_S, done, left_over
from sidecar.core.metrics import METRICS

log = logging.getLogger("core.rollback")

PASS_S = 60.0
UNDO_S_MAX = 60.0


def can_undo(engine: Engine) -> bool:
    """Whether the engine notes anything at all."""
    return type(engine).undo is not Engine.undo


async def undo_left_over(engine: Engine, *, min_age_s: float = MIN_AGE_S, force: bool = False) -> int:
    """Undo what has been noted for that long; returns how many could not be. With ``force`` those notes go too. An
    engine's failure is logged and left for the next pass. Raises what storage raises."""
    failed = 0
    context = engine.context
    with METRICS.timer(f"rollback.attempt.{context.mount.path.replace('/', '-')}"):
        for note in await left_over(context, min_age_s=min_age_s):
            try:
                async with asyncio.timeout(UNDO_S_MAX):
                    await engine.undo(note.data)
            except (PluginError, TimeoutError) as error:
                failed += 1
                log.warning("%s could not undo what it began: %s: %s", context.mount.path, type(error).__name__, error)
                if not force:
                    continue
            await done(context, note.id)
            log.info("%s has undone what it began and did not finish", context.mount.path)
    return failed
