"""Which partitions travel to one secondary of a performance set: paths filters, and what comes of them. Pure.

A filter names mounts, or folders of mounts, by path; what it selects are partitions, by mount uuid, so a record can be
judged without knowing what it holds. The agreement of both ends is a *positive* list: with a filter, a mount's
partition travels only if it is named. A mount that nobody knows any more, or does not know yet, does not travel.

System areas (``core``, ``policy``, …) and the built-in mounts travel always; classes other than ``r`` are not selected.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import Annotated, NamedTuple

import msgspec

from plugin_api.errors import InvalidRequest

ALLOW = "allow"
DENY = "deny"
PATHS_MAX = 1024
PATH_CHARS_MAX = 512
SELECTED_MAX = 32_768
"""Mounts in one selection: what a frame of the protocol has room for."""

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NEVER_FILTERED = ("sys/", "cubbyhole/", "identity/", "auth/", "auth/token/", "audit/")
_BUILT_IN = frozenset({"system", "cubbyhole", "token", "identity"})

MountId = Annotated[str, msgspec.Meta(max_length=64)]
MountIds = Annotated[tuple[MountId, ...], msgspec.Meta(max_length=SELECTED_MAX)]


class Mount(NamedTuple):
    """A replicated mount, as filters see it: ``path`` is the full one (``auth/x/``), ``type`` that of its engine."""

    path: str
    uuid: str
    type: str

    @property
    def filterable(self) -> bool:
        """Built-in mounts are not: every cluster needs them, or has its own."""
        return self.type not in _BUILT_IN


class PathsFilter(msgspec.Struct, frozen=True):
    """What an operator set for one secondary. Every path ends in ``/``."""

    mode: str
    paths: tuple[str, ...]

    def passes(self, mount: Mount) -> bool:
        """Whether the mount's data may travel."""
        if not mount.filterable:
            return True
        named = any(mount.path.startswith(path) for path in self.paths)
        return named == (self.mode == ALLOW)

    def moved(self, source: str, target: str, *, keep: bool) -> PathsFilter:
        """The filter for a mount that moves from ``source`` to ``target``: both are named while it moves (``keep``),
        afterwards the new path alone. A filter that does not name the mount itself is unchanged."""
        if source not in self.paths:
            return self
        stay = [path for path in self.paths if keep or path != source]
        return PathsFilter(self.mode, tuple(dict.fromkeys([*stay, target])))

    def forgot(self, path: str) -> PathsFilter:
        """The filter after the mount at ``path`` was removed."""
        return PathsFilter(self.mode, tuple(other for other in self.paths if other != path))


class Partitions(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, dict=True):
    """A set of partitions: every system area, and of the mounts those in ``only`` (None: all) but ``without``. Both
    are sorted, so that equal sets are equal."""

    only: MountIds | None = None
    without: MountIds = ()

    @cached_property
    def _only(self) -> frozenset[str]:
        return frozenset(self.only or ())

    @cached_property
    def _without(self) -> frozenset[str]:
        return frozenset(self.without)

    def permits(self, mount_uuid: str) -> bool:
        """Whether a mount's partition is in ``only``, present or not."""
        return self.only is None or mount_uuid in self._only

    def has(self, mount_uuid: str) -> bool:
        """Whether a mount's partition is in the set."""
        return self.permits(mount_uuid) and mount_uuid not in self._without

    def takes(self, storage_class: str, partition: str) -> bool:
        """Whether a partition of a class is in the set."""
        if self is EVERYTHING or storage_class != "r" or (self.only is None and not self.without):
            return True
        return self.has(partition) or not is_mount(partition)

    def within(self, other: Partitions) -> bool:
        """Whether everything in this set is in ``other``."""
        if self is other:
            return True
        if other.only is not None and (self.only is None or not (self._only - self._without) <= other._only):
            return False
        return not any(self.has(mount_uuid) for mount_uuid in other.without)


EVERYTHING = Partitions()
NOTHING = Partitions(only=())


def is_mount(partition: str) -> bool:
    """Whether a partition of class ``r`` belongs to a mount: those are named by uuid, system areas by words."""
    return _UUID.fullmatch(partition) is not None


def partitions(only: Iterable[str] | None, without: Iterable[str] = ()) -> Partitions:
    """The set in its one form."""
    return Partitions(None if only is None else tuple(sorted(set(only))), tuple(sorted(set(without))))


def selection_for(filtered: PathsFilter | None, mounts: Collection[Mount], not_held: Collection[str]) -> Partitions:
    """What travels to a secondary with that filter: ``without`` are the mounts the primary itself does not hold."""
    unheld = frozenset(not_held)
    lacking = [mount.uuid for mount in mounts if mount.uuid in unheld]
    if filtered is None:
        return partitions(None, lacking) if lacking else EVERYTHING
    return partitions([mount.uuid for mount in mounts if filtered.passes(mount)], lacking)


def withheld(filtered: PathsFilter | None, mounts: Collection[Mount]) -> list[str]:
    """The paths of the mounts that a filter keeps back now."""
    return [] if filtered is None else sorted(mount.path for mount in mounts if not filtered.passes(mount))


# ---- what a secondary holds


def narrowed(held: Partitions, selection: Partitions) -> Partitions:
    """What is held once a selection is accepted and before anything new was received."""
    if selection.only is None:
        return held
    kept = selection.only if held.only is None else set(held.only) & set(selection.only)
    return partitions(kept, held.without)


def filled(held: Partitions, selection: Partitions) -> Partitions:
    """What is held when everything of the selection is here. What the primary does not hold itself stays as it was."""
    return partitions(selection.only, [one for one in selection.without if not held.has(one)])


# ---- what requests name


def check_filter(mode: str, paths: Sequence[str]) -> PathsFilter:
    """A filter as an operator gave it. Unknown mounts may be named: they may come. Raises InvalidRequest."""
    mode = {"whitelist": ALLOW, "blacklist": DENY, "": ALLOW}.get(mode, mode)
    if mode not in (ALLOW, DENY):
        raise InvalidRequest(f'"mode" must be "{ALLOW}" or "{DENY}"')
    if not paths:
        raise InvalidRequest('"paths" must name at least one mount; delete the filter to ship everything')
    if len(paths) > PATHS_MAX:
        raise InvalidRequest(f'"paths" may name {PATHS_MAX} mounts at most')
    return PathsFilter(mode, tuple(dict.fromkeys(_check_path(path) for path in paths)))


def _check_path(path: str) -> str:
    clean = path.strip().strip("/") + "/"
    if clean == "/" or len(clean) > PATH_CHARS_MAX or not clean.isprintable() or "//" in clean:
        raise InvalidRequest('"paths" holds what is no path of a mount')
    if clean in _NEVER_FILTERED or clean.startswith(("sys/", "cubbyhole/", "identity/", "auth/token/")):
        raise InvalidRequest(f'"{clean}" cannot be filtered: every cluster needs it, or has its own')
    return clean
