"""What every cluster's log says about the others' logs: judged at each record, in the order in which stores apply them.

Nothing here trusts a secondary's word: a record's header names the position that the secondary claims to be at, the
witnesses of both clusters know what is true there.

* P5: with its position a secondary's data is exactly its source's at that record, of what travels.
* P6: data is a mix only while the position says so.
* P9: a position never goes back in one source.
* P10: what a demoted cluster has and its new primary never had is in its lost-writes record, and nothing else.
* P11: what travels is written in a secondary by replication alone; an epoch has one primary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from consul_backend.position import Position
from consul_backend.wal import Record
from sidecar.replication.lost_writes import LostEntry, LostHead
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from sidecar.replication.protocol import is_none
from sidecar.replication.roles import PrimaryRole, Role, SecondaryRole, decode_role
from tests.sim.fold import Entries, Fold
from tests.sim.witness import Violation

if TYPE_CHECKING:
    from tests.sim.clusters.cluster import Cluster
    from tests.sim.clusters.world import SetWorld

Origin = tuple[str, int]
"""A record that a client's write made: the cluster it was made in, and its number there."""


class Log(NamedTuple):
    """What a checker of clients' writes looks at in a witness."""

    fold: Fold


@dataclass(slots=True)
class View:
    """One cluster in one mode. ``origins`` has one item per record of its own log: the origins that came with it, and
    whether they replace all before."""

    role: Role
    position: Position | None = None
    mixed: bool = False
    source: str = ""
    origins: list[tuple[bool, frozenset[Origin]]] = field(default_factory=list)


def class_of(key: str) -> str:
    """A logical key's class."""
    return key.partition("/")[0]


def partition_of(key: str) -> str:
    """A logical key's partition."""
    return key.split("/", 2)[1]


class Lineage:
    """One world's."""

    def __init__(self, world: SetWorld) -> None:
        self._world = world
        self._views: dict[tuple[str, str], View] = {}
        self._epochs: dict[tuple[str, str, int, str], str] = {}
        self._reported: dict[tuple[str, str], set[Origin]] = {}
        self._received: dict[str, dict[int, tuple[str, ...]]] = {}
        self._mirrored: tuple[bool, frozenset[Origin]] = (False, frozenset())
        """What came to the performance view of a DR secondary with the record in hand."""
        self.counts: dict[str, int] = {}

    def is_mix(self, cluster: Cluster) -> bool:
        """Whether a cluster's data is a mix by its newest record."""
        return any(
            self._view(cluster, mode).mixed and isinstance(self._view(cluster, mode).role, SecondaryRole)
            for mode in (PERFORMANCE, DR)
        )

    def own_log(self, cluster: Cluster) -> Log:
        """A cluster's log without what it received from another: what its own clients wrote."""
        received = self._received.get(cluster.name, {})
        fold = cluster.witness.fold
        versions = {
            key: [(at, value) for at, value in some if class_of(key) not in received.get(at, ())]
            for key, some in fold.versions.items()
        }
        return Log(Fold(effects=fold.effects, versions=versions))

    def _view(self, cluster: Cluster, mode: Mode) -> View:
        found = self._views.get((cluster.name, mode.name))
        if found is None:
            found = self._views[cluster.name, mode.name] = View(decode_role(None))
        return found

    def recorded(self, cluster: Cluster, record: Record, effects: Entries) -> None:
        """A record was written."""
        for mode in (DR, PERFORMANCE):  # a mirror's performance role is its primary's
            self._recorded(cluster, mode, record, effects)

    def _recorded(self, cluster: Cluster, mode: Mode, record: Record, effects: Entries) -> None:
        view = self._view(cluster, mode)
        role_raw = effects.get(mode.role_key)
        before = view.role
        if mode is DR:
            self._mirrored = (False, frozenset())
        position = record.header.positions.get(mode.name)
        moved = position != view.position
        travels = {key: value for key, value in effects.items() if class_of(key) in mode.classes}
        if record.index == 1:
            view.mixed = True
        if self._is_mirrored(cluster, mode):
            view.origins.append(self._mirrored)
        elif isinstance(before, SecondaryRole) and (
            role_raw is None or isinstance(decode_role(role_raw), SecondaryRole)
        ):
            self._followed(cluster, mode, view, record, travels, position)
        else:
            written = bool(travels) and record.index > 1
            own = frozenset({(cluster.name, record.index)}) if written else frozenset()
            view.origins.append((False, own))
        if moved:
            view.position = position
            view.mixed = is_none(position)
        if role_raw is not None:
            view.role = decode_role(role_raw)
            self._became(cluster, mode, view, before, record, effects)

    def _is_mirrored(self, cluster: Cluster, mode: Mode) -> bool:
        """Whether a cluster's role in that mode is a copy of its DR primary's."""
        return mode is PERFORMANCE and isinstance(self._view(cluster, DR).role, SecondaryRole)

    # -- following

    def _followed(
        self,
        cluster: Cluster,
        mode: Mode,
        view: View,
        record: Record,
        travels: Mapping[str, bytes | None],
        position: Position | None,
    ) -> None:
        role = view.role
        assert isinstance(role, SecondaryRole)
        new = (False, frozenset[Origin]())
        if travels:
            self._received.setdefault(cluster.name, {})[record.index] = mode.classes
        if position is None or is_none(position):
            if position == view.position and travels and position is not None and not view.mixed:
                self._violated(cluster, "P6", f"record {record.index} writes what travels and has no position")
        elif position == view.position:
            kept = [key for key in travels if is_taken(role, key) and key not in mode.keyrings]
            if kept:
                what = f"record {record.index} writes {min(kept)}, which is its primary's, and not from its primary"
                self._violated(cluster, "P11", what)
        else:
            new = self._moved(cluster, mode, view, record, travels, position)
        view.origins.append(new)

    def _moved(
        self,
        cluster: Cluster,
        mode: Mode,
        view: View,
        record: Record,
        travels: Mapping[str, bytes | None],
        position: Position,
    ) -> tuple[bool, frozenset[Origin]]:
        source = self._world.by_generation(position.generation)
        if source is None or source is cluster:
            self._violated(cluster, "P5", f"record {record.index} names a position in an unknown store")
            return False, frozenset()
        there = source.witness.records[position.index - 1] if position.index <= source.head else None
        if there is None or there.chain_hash != position.chain_hash:
            self._violated(
                cluster, "P5", f"record {record.index} is at {position.index} of {source.name}, no such record"
            )
            return False, frozenset()
        last = view.position
        follows = last is not None and not view.mixed and last.generation == position.generation
        source_view = self._view(source, mode)
        self._count("record applied" if follows else "state taken over")
        self._kept(cluster, source.role(mode), travels, record.index)
        if follows and last is not None and position.index >= last.index:
            changed = {
                key
                for effects in source.witness.fold.effects[last.index : position.index]
                for key in effects
                if class_of(key) in mode.classes
            }
            self._compare(cluster, mode, view.role, source, position.index, changed | travels.keys(), record.index)
            if mode is DR:
                mirrored = self._view(source, PERFORMANCE).origins[last.index : position.index]
                self._mirrored = (any(one for one, _ in mirrored), _all(mirrored))
            return False, _all(source_view.origins[last.index : position.index])
        if follows and last is not None:
            self._violated(cluster, "P9", f"record {record.index} goes back from {last.index} to {position.index}")
        self.compare_all(cluster, mode, source, position.index, f"record {record.index}")
        if mode is DR:
            self._mirrored = (True, self.origins(source, PERFORMANCE, position.index))
        return True, self.origins(source, mode, position.index)

    def _kept(self, cluster: Cluster, theirs: Role, travels: Mapping[str, bytes | None], index: int) -> None:
        """P7: nothing is deleted here because a primary does not hold it."""
        lacking = theirs.not_held if isinstance(theirs, PrimaryRole) else ()
        gone = [key for key, value in travels.items() if value is None and partition_of(key) in lacking]
        if gone:
            what = f"record {index} deletes {min(gone)}, of a mount that its primary does not hold"
            self._violated(cluster, "P7", what)

    def compare_all(self, cluster: Cluster, mode: Mode, source: Cluster, index: int, what: str) -> None:
        """All that travels."""
        keys = {key for one in (cluster, source) for key in one.witness.fold.versions if class_of(key) in mode.classes}
        self._compare(cluster, mode, self._view(cluster, mode).role, source, index, keys, what)

    def _compare(
        self,
        cluster: Cluster,
        mode: Mode,
        role: Role,
        source: Cluster,
        index: int,
        keys: Iterable[str],
        what: int | str,
    ) -> None:
        wrong = [
            key
            for key in keys
            if cluster.witness.newest(key) != source.value_at(key, index)
            and is_taken(role, key)
            and key not in mode.keyrings
        ]
        if wrong:
            where = f"record {what}" if isinstance(what, int) else what
            text = f"{where} stands at {index} of {source.name}, but differs there in {len(wrong)} keys, {min(wrong)}"
            self._violated(cluster, "P5", text)

    # -- roles

    def _became(self, cluster: Cluster, mode: Mode, view: View, before: Role, record: Record, effects: Entries) -> None:
        role = view.role
        if self._is_mirrored(cluster, mode):
            return
        if isinstance(role, PrimaryRole):
            owner = self._epochs.setdefault((mode.name, role.set_id, role.epoch.number, role.epoch.id), cluster.name)
            if owner != cluster.name:
                what = f"epoch {role.epoch.number} has two primaries in mode {mode.name}: {owner} and {cluster.name}"
                self._violated(cluster, "P11", what)
        if isinstance(before, PrimaryRole) and isinstance(role, SecondaryRole):
            self._ended(cluster, mode, record)
        if isinstance(before, SecondaryRole) and isinstance(role, SecondaryRole) and before.history != role.history:
            self._adopted(cluster, mode, view, role, effects)

    def _ended(self, cluster: Cluster, mode: Mode, record: Record) -> None:
        """P11: a demotion names the end of its log, and nothing that travels is written behind that."""
        end = record.header.positions.get(mode.name)
        if end is None or end.generation != cluster.generation:
            self._violated(cluster, "P11", f"record {record.index} demotes and does not say where its log ends")
            return
        for index in range(end.index + 1, record.index):
            if any(class_of(key) in mode.classes for key in cluster.witness.fold.effects[index - 1]):
                what = f"record {record.index} demotes at {end.index}, and record {index} writes what travels"
                self._violated(cluster, "P11", what)

    def origins(self, cluster: Cluster, mode: Mode, index: int) -> frozenset[Origin]:
        """Every write that cluster had, in one way or another, as of its record ``index``."""
        found: set[Origin] = set()
        for replaces, came in self._view(cluster, mode).origins[:index]:
            if replaces:
                found = set()
            found |= came
        return frozenset(found)

    # -- what is lost

    def _adopted(self, cluster: Cluster, mode: Mode, view: View, role: SecondaryRole, effects: Entries) -> None:
        """A cluster comes to follow a history that may part from its own: the report against the truth."""
        newest = role.epoch
        owner = self._epochs.get((mode.name, role.set_id, newest.number, newest.id))
        if owner is None or view.mixed:
            return
        primary = self._world.clusters[owner]
        self._count("history adopted")
        mine = self.origins(cluster, mode, cluster.head)
        known = self._reported.setdefault((cluster.name, mode.name), set())
        lost = mine - self.origins(primary, mode, primary.head)
        unsaid = lost - known
        known |= lost
        head_key = next((key for key in effects if key.startswith(f"c/replication/lost/{mode.name}/")), None)
        if head_key is None:
            if unsaid:
                what = f"{len(unsaid)} records exist here and not on {primary.name}, none is reported: {min(unsaid)}"
                self._violated(cluster, "P10", what)
            return
        raw = effects[head_key]
        assert raw is not None
        head = msgspec.msgpack.decode(raw, type=LostHead)
        self._count("loss reported")
        reported = self._pages(cluster, head_key, head)
        own = {index for name, index in lost if name == cluster.name}
        truth = {
            (key, index, value)
            for index in own
            for key, value in cluster.witness.fold.effects[index - 1].items()
            if class_of(key) in mode.classes
        }
        missing = truth - reported
        if missing and not head.at_least:
            self._violated(cluster, "P10", f"{len(missing)} lost entries are not reported, first {min(missing)[:2]}")
        said = {(key, value) for key, _, value in reported}
        silent = [one for one in self._brought(cluster, mode, unsaid) if one not in said]
        if silent and not head.at_least:
            self._violated(
                cluster, "P10", f"{len(silent)} entries that only this cluster has are not reported: {min(silent)}"
            )
        too_many = {one for one in reported - truth if (cluster.name, one[1]) in mine - lost}
        if too_many and head.certain:
            self._violated(cluster, "P10", f"{len(too_many)} entries are reported as lost and are not")
        if not head.at_least and len(own) == len(lost) and head.certain and head.records != len(own):
            self._violated(cluster, "P10", f"{head.records} records are reported as lost, {len(own)} are")
        if head.at_least and head.certain and cluster.witness.oldest_index <= self._last_common(cluster, mode, own):
            self._violated(cluster, "P10", "the report says at least, and the log reaches far enough")

    def _last_common(self, cluster: Cluster, mode: Mode, own: Iterable[int]) -> int:
        """The newest record of what travels before those that are lost; 0 for none."""
        effects = cluster.witness.fold.effects
        before = range(min(own, default=1) - 1, 0, -1)
        return next((at for at in before if any(class_of(key) in mode.classes for key in effects[at - 1])), 0)

    def _brought(self, cluster: Cluster, mode: Mode, lost: Iterable[Origin]) -> Iterable[tuple[str, bytes]]:
        """Entries of other clusters' writes that came here: where several came together only the last is kept."""
        for name, index in lost:
            if name == cluster.name:
                continue
            for key, value in self._world.clusters[name].witness.fold.effects[index - 1].items():
                here = cluster.witness.fold.versions.get(key, ())
                travels = class_of(key) in mode.classes and key not in mode.keyrings
                if value is not None and travels and any(one == value for _, one in here):
                    yield key, value

    def _pages(self, cluster: Cluster, head_key: str, head: LostHead) -> set[tuple[str, int, bytes | None]]:
        found: set[tuple[str, int, bytes | None]] = set()
        for number in range(1, head.pages + 1):
            raw = cluster.witness.newest(head_key.replace("/head", f"/page-{number:06d}"))
            if raw is None:
                self._violated(cluster, "P10", f"page {number} of a lost-writes record is missing")
                return found
            entries = msgspec.msgpack.decode(raw, type=list[LostEntry])
            found |= {(entry.key, entry.index, entry.value) for entry in entries}
        if head.entries != len(found):
            self._violated(cluster, "P10", f"a lost-writes record says {head.entries} entries and has {len(found)}")
        return found

    def _violated(self, cluster: Cluster, checker: str, text: str) -> None:
        self._world.report(Violation(checker, f"{cluster.name}: {text}"))

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def is_taken(role: Role, key: str) -> bool:
    """Whether a key belongs to what a cluster in that role is sent and holds."""
    if not isinstance(role, SecondaryRole):
        return True
    cls, partition = class_of(key), partition_of(key)
    return role.selection.takes(cls, partition) and role.held.takes(cls, partition)


def _all(origins: Iterable[tuple[bool, frozenset[Origin]]]) -> frozenset[Origin]:
    return frozenset(origin for _, some in origins for origin in some)
