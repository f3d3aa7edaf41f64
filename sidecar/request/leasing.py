"""From an engine's answer to a lease, and from a login to its count of failures."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from plugin_api.engine import MountInfo
from plugin_api.request import Lease
from sidecar.core.leases import Granted, Leases
from sidecar.core.lockout import Lockout
from sidecar.core.lockout_rules import LockoutSettings
from sidecar.core.mounts import MountEntry
from sidecar.request.call import Call


async def keep_lease(leases: Leases, call: Call, mount: MountInfo, lease: Lease) -> Granted:
    """The lease of an answer to ``call``. Raises what :meth:`~sidecar.core.leases.Leases.register` raises."""
    holder = call.identity.entry if call.identity is not None else None
    return await leases.register(call.path, mount, lease, holder)


@asynccontextmanager
async def guarded(
    lockout: Lockout, settings: LockoutSettings, entry: MountEntry, identity: str
) -> AsyncIterator[Callable[[], None]]:
    """One login of ``identity`` at the mount of ``entry``; gives what a success is told to. Raises PermissionDenied
    where the identity is locked out."""
    rules = settings.rules(entry.type, entry.config.user_lockout)
    if rules.disable:
        yield lambda: None
        return
    async with lockout.attempt(entry.accessor, identity, rules) as count:
        yield lambda: lockout.succeeded(count)
