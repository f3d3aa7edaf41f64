"""The calls about paths filters and about mounts that are not held (contract 1.15). Performance replication only."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from plugin_api.errors import InvalidRequest, NotFound
from sidecar.replication import roles
from sidecar.replication.mode_manager import ModeManager
from sidecar.replication.roles import PrimaryRole, SecondaryRole
from sidecar.replication.selection import PathsFilter, check_filter, withheld

logger = logging.getLogger(__name__)


class Filters:
    """``manager`` is that of performance replication; ``steady`` raises while roles may not be changed."""

    def __init__(self, manager: ModeManager, steady: Callable[[], object]) -> None:
        self._manager = manager
        self._steady = steady

    def hidden(self, mount_uuid: str) -> bool:
        """Whether a replicated mount is withheld from this cluster: it is as if there were none."""
        return roles.hidden(self._manager.role, mount_uuid)

    def not_held(self, mount_uuid: str) -> bool:
        """Whether a replicated mount's data is not here."""
        return roles.not_held(self._manager.role, mount_uuid)

    async def set(self, secondary_id: str, mode: str, paths: Sequence[str]) -> None:
        """Set the filter of a secondary, known already or not. Raises InvalidRequest."""
        await self._store(roles.check_id(secondary_id), check_filter(mode, paths))

    async def delete(self, secondary_id: str) -> None:
        """Ship everything again; no filter is no error. Raises InvalidRequest."""
        await self._store(roles.check_id(secondary_id), None)

    def get(self, secondary_id: str) -> dict[str, Any]:
        """Raises NotFound where there is no filter, InvalidRequest on what is no primary."""
        role = roles.require_primary(self._manager.mode, self._manager.role)
        found = role.filters.get(secondary_id)
        if found is None:
            raise NotFound
        return {"mode": found.mode, "paths": list(found.paths)}

    def dynamic(self, kind: str, secondary_id: str) -> dict[str, Any]:
        """The mounts that a filter keeps from a secondary now, as its primary or it itself (``kind``) sees it. Raises
        NotFound for a secondary that nobody knows, InvalidRequest in another role."""
        role = self._manager.role
        mounts = self._manager.mounts()
        if kind == "primary":
            primary = roles.require_primary(self._manager.mode, role)
            if secondary_id not in primary.secondaries and secondary_id not in primary.filters:
                raise NotFound
            names = withheld(primary.filters.get(secondary_id), mounts)
        else:
            secondary = roles.require_secondary(self._manager.mode, role)
            if secondary_id != secondary.secondary_id:
                raise NotFound
            names = sorted(mount.path for mount in mounts if roles.hidden(role, mount.uuid))
        return {"dynamic_filtered_mounts": names, "dynamic_filtered_namespaces": []}

    def lacking(self) -> dict[str, Any]:
        """The mounts that exist in this set and whose data is not here."""
        return {"mounts": [mount.path for mount in self._manager.lacking()]}

    async def accept_empty(self, paths: Sequence[str]) -> None:
        """Take mounts that are not held as empty from now on; other clusters of the set follow, and delete theirs.
        Raises InvalidRequest."""
        self._steady()
        lacking = {mount.path: mount.uuid for mount in self._manager.lacking()}
        asked = [path.strip().strip("/") + "/" for path in paths]
        if not asked:
            raise InvalidRequest('"paths" must name at least one mount')
        unknown = sorted(set(asked) - lacking.keys())
        if unknown:
            raise InvalidRequest(f"not among the mounts whose data is not held here: {', '.join(unknown)[:512]}")
        given_up = [lacking[path] for path in asked]
        await self._manager.change(lambda role: roles.accept_empty(role, given_up))
        logger.warning("replication: mounts whose data is not held were accepted as empty: %s", ", ".join(asked))
        await self._changed()

    async def mount_moved(self, source: str, target: str, move: Callable[[], Awaitable[None]]) -> None:
        """Move a mount under the filters that name it: none lets its data go, before, after or in between."""
        role = self._manager.role
        before = role.filters if isinstance(role, PrimaryRole) else {}
        await self._refilter(lambda name, one: one.moved(source, target, keep=True))
        try:
            await move()
        except BaseException:
            await self._refilter(lambda name, one: before.get(name, one))
            raise
        await self._refilter(lambda name, one: before.get(name, one).moved(source, target, keep=False))

    async def mount_removed(self, path: str) -> None:
        """After an unmount: filters forget the path, as in Vault. A mount that comes there later is another one."""
        await self._refilter(lambda name, one: one.forgot(path))

    async def _refilter(self, change: Callable[[str, PathsFilter], PathsFilter]) -> None:
        before = self._manager.role
        if not isinstance(before, PrimaryRole) or roles.refilter(before, change) is before:
            return
        await self._manager.change(lambda role: roles.refilter(role, change))
        await self._changed()

    async def _store(self, secondary_id: str, paths_filter: PathsFilter | None) -> None:
        self._steady()
        mode = self._manager.mode
        await self._manager.change(lambda role: roles.set_filter(mode, role, secondary_id, paths_filter))
        shown = f"{paths_filter.mode} {', '.join(paths_filter.paths)[:512]}" if paths_filter else "none"
        logger.warning("replication: paths filter of secondary %s: %s", secondary_id, shown)
        await self._changed()

    async def _changed(self) -> None:
        """Running streams stop at once and begin by what holds now."""
        if self._manager.primary is not None:
            self._manager.primary.shipper.reselect()
        if not isinstance(self._manager.role, SecondaryRole):
            await self._manager.reselected()
