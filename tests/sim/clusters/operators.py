"""Operators: they activate, promote, demote, point and revoke by the calls of ``sys/replication``, and mend in the end.

One act at a time; what fails is let be, as a person would who tries again later. An operator remembers who is meant to
be primary in each mode; :meth:`Operator.mend` brings everybody back under it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from consul_backend.errors import BackendError
from consul_backend.position import Position
from plugin_api.errors import PluginError
from sidecar.replication.activation import ActivationRequest
from sidecar.replication.modes import MODES, PERFORMANCE, Mode
from sidecar.replication.roles import DisabledRole, PrimaryRole, Role, SecondaryRole
from sidecar.replication.states import Phase
from tests.sim.clusters.cluster import Cluster, Gone
from tests.sim.clusters.node import KEYRINGS, SEAL_KEY, Order, SetNode
from tests.sim.clusters.plan import Follow
from tests.sim.history import Write
from tests.sim.loop import Process
from tests.sim.witness import Violation

if TYPE_CHECKING:
    from tests.sim.clusters.world import SetWorld

REFUSALS = (PluginError, BackendError, Gone)
PAUSE_S = 0.3
LOOK_S = 0.05
STUCK_S = 4.0
"""How long a secondary may need to find its primary before an operator points it there again."""


class Operator:
    """One world's. ``primary``: who is meant to be, by mode."""

    def __init__(self, world: SetWorld) -> None:
        self._world = world
        self._random = random.Random(f"operator {world.plan.seed}")
        self.primary: dict[str, str] = {}
        self.busy = False
        self._members: dict[str, list[str]] = {}
        self._numbers = 0
        self._waits_since: dict[tuple[str, str], float] = {}
        self._patience_s: dict[tuple[str, str], float] = {}
        self._ids: dict[tuple[str, str], str] = {}

    def members(self, mode: Mode) -> list[str]:
        """The clusters of that mode's set, its primary among them."""
        return [name for name in self._members.get(mode.name, ()) if not self._mirrors(mode, name)]

    def _mirrors(self, mode: Mode, name: str) -> bool:
        """Whether a cluster has that role from its DR primary only."""
        cluster = self._world.clusters[name]
        return mode is PERFORMANCE and cluster.secondary_role(MODES["dr"]) is not None

    # -- the beginning

    async def enlist(self, follow: Follow) -> bool:
        """Activate a cluster as the plan has it; whether that worked."""
        world, mode = self._world, MODES[follow.mode]
        source, cluster = world.clusters[follow.source], world.clusters[follow.who]
        try:
            if mode.name not in self.primary:
                await source.ask(lambda node: node.manager.primary_enable(mode.name, ""))
                self.primary[mode.name] = source.name
                self._members[mode.name] = [source.name]
            token = await self._token(source, mode, follow.who)
            setup = Process(f"{follow.who}.setup")
            world.links.place(setup, follow.who)
            asked = ActivationRequest(token)
            result = await setup.spawn(world.tokens.activate(mode, asked, store_id=f"store-{follow.who}"))
        except REFUSALS as error:
            world.log(f"operator: {follow.who} is not activated yet: {error!r}")
            return False
        entries = {key: b"own keyring of " + follow.who.encode() for key in KEYRINGS} | {SEAL_KEY: b"seal"}
        await cluster.found(entries | dict(result.keyrings) | dict(result.entries))
        self._members[mode.name].append(follow.who)
        return True

    async def _token(self, source: Cluster, mode: Mode, who: str) -> str:
        self._numbers += 1
        secondary_id = f"{who}-{self._numbers}"

        async def issue(node: SetNode) -> tuple[Any, Any]:
            return await node.manager.secondary_token(mode.name, secondary_id, 1800, "")

        payload, _ = await source.ask(issue)
        payload["address"] = (source.active() or source.nodes[0]).address
        self._ids[mode.name, who] = secondary_id
        return self._world.tokens.wrap(payload)

    # -- acts

    def act(self, what: str, one: Cluster, other: Cluster) -> None:
        """Begin an act, unless another is under way."""
        acts: dict[str, Callable[[Cluster, Mode], Coroutine[Any, Any, None]]] = {
            "force-promote": self._force_promote,
            "switch-over": self._switch_over,
            "revoke": self._revoke,
            "repoint": self._repoint,
            "detach": self._detach,
            "recover": self._recover,
            "restart-sync": self._repoint,
            "filter": self._filter,
            "keyring": self._keyring,
        }
        followers = [
            (cluster, mode) for mode in MODES.values() for cluster in (one, other) if self._is_member(cluster, mode)
        ]
        followers = [(cluster, mode) for cluster, mode in followers if self.primary[mode.name] != cluster.name]
        if self.busy or not followers:
            return
        cluster, mode = followers[0]
        self.busy = True
        self._world.spawn(self._try(what, acts[what], cluster, mode))

    def _is_member(self, cluster: Cluster, mode: Mode) -> bool:
        return cluster.name in self.members(mode)

    async def _try(
        self, what: str, act: Callable[[Cluster, Mode], Coroutine[Any, Any, None]], cluster: Cluster, mode: Mode
    ) -> None:
        self._world.log(f"operator: {what} {cluster.name} in mode {mode.name}")
        try:
            await act(cluster, mode)
            self._world.count(what)
        except REFUSALS as error:
            self._world.log(f"operator: {what} {cluster.name}: {error!r}")
        finally:
            self.busy = False

    async def _call(self, cluster: Cluster, work: Callable[[SetNode], Awaitable[Any]]) -> Any:
        """One call of the API on a cluster's active node."""
        return await cluster.ask(work, patience_s=15.0)

    async def _force_promote(self, cluster: Cluster, mode: Mode) -> None:
        """What an operator does who believes the primary dead, and who may be wrong."""

        async def promote(node: SetNode) -> None:
            stood = node.store.positions.get(mode.name) if node.store is not None else None
            await asyncio.sleep(LOOK_S)
            preview = await node.manager.secondary_promote(mode.name, "", force=True, preview=True)
            self._judge_forecast(cluster, node, mode, stood, preview.data["promotion_forecast"])  # type: ignore[index]  # a preview always has data
            await node.manager.secondary_promote(mode.name, "", force=True, preview=False)

        was = cluster.role(mode)
        try:
            await self._call(cluster, promote)
        finally:
            self._chosen(cluster, mode, was)

    def _chosen(self, cluster: Cluster, mode: Mode, was: Role) -> None:
        """It is to be primary, if its log says that it became one."""
        if isinstance(was, PrimaryRole) or not isinstance(cluster.role(mode), PrimaryRole):
            return
        before = self.primary[mode.name]
        self.primary[mode.name] = cluster.name
        self._world.log(f"operator: {cluster.name} is {mode.name} primary after {before}")
        if mode is not PERFORMANCE and not isinstance(cluster.role(PERFORMANCE), DisabledRole):
            members = self._members.setdefault(PERFORMANCE.name, [])
            if self.primary.get(PERFORMANCE.name) == before:
                self.primary[PERFORMANCE.name] = cluster.name
            if cluster.name not in members:
                members.append(cluster.name)

    async def _switch_over(self, cluster: Cluster, mode: Mode) -> None:
        """An orderly change of primary: nothing may be lost, so nothing is forced."""
        old = self._world.clusters[self.primary[mode.name]]
        await self._call(old, lambda node: node.manager.primary_demote(mode.name))

        async def promote(node: SetNode) -> None:
            await node.manager.secondary_promote(mode.name, "", force=False, preview=False)

        was = cluster.role(mode)
        for _ in range(10):
            try:
                await self._call(cluster, promote)
                break
            except REFUSALS as error:
                self._world.log(f"operator: {cluster.name} is not promoted yet: {error!r}")
                if isinstance(cluster.role(mode), PrimaryRole):
                    break
                await self._pause()
        else:
            await self._force_promote(cluster, mode)
        self._chosen(cluster, mode, was)
        await self._pause()
        if self.primary[mode.name] == cluster.name:
            await self._point(old, mode)

    async def _pause(self) -> None:
        await asyncio.sleep(PAUSE_S)

    async def _point(self, cluster: Cluster, mode: Mode) -> None:
        """``update-primary`` with a fresh token of whoever is meant to be primary."""
        primary = self._world.clusters[self.primary[mode.name]]
        token = await self._token(primary, mode, cluster.name)
        await self._call(
            cluster,
            lambda node: node.manager.secondary_update_primary(mode.name, token),
        )

    async def _repoint(self, cluster: Cluster, mode: Mode) -> None:
        await self._point(cluster, mode)

    async def _detach(self, cluster: Cluster, mode: Mode) -> None:
        """``update-primary`` with a blank token: it follows nobody for a while."""
        await self._call(
            cluster,
            lambda node: node.manager.secondary_update_primary(mode.name, ""),
        )

    async def _recover(self, cluster: Cluster, mode: Mode) -> None:
        await self._call(cluster, lambda node: node.manager.recover())

    async def _revoke(self, cluster: Cluster, mode: Mode) -> None:
        """It is cut off at once; in the end it gets another token."""
        primary = self._world.clusters[self.primary[mode.name]]
        role = primary.role(mode)
        secondary_id = self._ids.get((mode.name, cluster.name), "")
        known = role.secondaries.get(secondary_id) if isinstance(role, PrimaryRole) else None
        if known is None:
            return

        async def revoke(node: SetNode) -> None:
            await node.manager.revoke_secondary(mode.name, secondary_id)
            self._world.streams.revoked(primary.name, known.fingerprints)

        await self._call(primary, revoke)

    async def _filter(self, cluster: Cluster, mode: Mode) -> None:
        """A paths filter comes, or goes."""
        primary = self._world.clusters[self.primary[mode.name]]
        role = primary.role(mode)
        secondary_id = self._ids.get((mode.name, cluster.name), "")
        if mode is not PERFORMANCE or not isinstance(role, PrimaryRole):
            return

        async def change(node: SetNode) -> None:
            if secondary_id in role.filters:
                await node.manager.filters.delete(secondary_id)
            else:
                await node.manager.filters.set(secondary_id, self._random.choice(("allow", "deny")), ["two/"])

        await self._call(primary, change)

    async def _keyring(self, cluster: Cluster, mode: Mode) -> None:
        """The primary's keyring is rotated."""
        world = self._world
        primary = world.clusters[self.primary[mode.name]]
        number = len(world.writes)
        write = Write(number, "operator", {KEYRINGS[0]: b"keyring of batch %d" % number}, world.loop.time())
        world.writes.append(write)
        await self._call(primary, lambda node: node.order(Order(number, dict(write.entries))))

    # -- looking

    def follows(self, cluster: Cluster, mode: Mode) -> bool:
        """Whether a cluster streams from the set's primary, having been in step with it."""
        node, primary = cluster.active(), self._world.clusters[self.primary[mode.name]]
        role, theirs = cluster.role(mode), primary.role(mode)
        if node is None or not isinstance(role, SecondaryRole) or not isinstance(theirs, PrimaryRole):
            return False
        service = node.mode(mode.name).secondary
        if service is None or service.machine.phase is not Phase.STREAM_WALS or not service.applier.upstream.connected:
            return False
        source = service.applier.upstream.source
        return source is not None and source.generation == primary.generation and role.epoch == theirs.epoch

    def _judge_forecast(
        self, cluster: Cluster, node: SetNode, mode: Mode, position: Position | None, said: dict[str, Any]
    ) -> None:
        """P10: what a promotion says that it may lose, against what it would lose now. ``position`` is where the store
        stood a moment before."""
        world = self._world
        now = node.store.positions.get(mode.name) if node.store is not None else None
        if now is None or position is None or now.generation != position.generation:
            return  # it came to follow another store meanwhile
        source = world.by_generation(position.generation) if position.index else None
        if source is None:
            return
        world.count("forecast")
        now_s = world.loop.time()
        applied, seen = said["last_applied_wal"], said["last_seen_primary_wal"]
        service = node.mode(mode.name).secondary
        problem = ""
        real = source.head - position.index
        if applied < position.index or applied > source.head:
            problem = f"says {applied} is applied, the store stands at {position.index} of {source.head}"
        elif service is not None and service.applier.upstream.source is not None:
            upstream = service.applier.upstream.source
            if upstream.generation == source.generation and said["known_missing_records"] > real:
                problem = f"says {said['known_missing_records']} records are missing, {real} are"
            heard = world.streams.heard_head(node, mode, before_s=now_s - 1.0)
            if upstream.generation == source.generation and seen < heard:
                problem = f"knows of record {seen} of its primary, and was told of {heard}"
            age_s = said["complete_age_s"]
            if upstream.generation == source.generation and age_s is not None:
                due_s = now_s - age_s - 0.5 - 4 * world.plan.link.delay_s
                missing = [at_s for at_s in source.times[applied:] if at_s <= due_s]
                if missing:
                    problem = f"says everything of {age_s:.2f} s ago is here, {len(missing)} older records are not"
        if problem:
            world.report(Violation("P10", f"{cluster.name}: the forecast {problem}"))

    def describe(self) -> str:
        """Where everybody stands, for a run that got stuck."""
        found = [f"primary {self.primary}"]
        for mode in MODES.values():
            for name in self.members(mode):
                cluster = self._world.clusters[name]
                node = cluster.active()
                service = node.mode(mode.name).secondary if node is not None else None
                machine = f"{service.machine} at {service.applier.position}" if service is not None else ""
                found.append(f"{name} {mode.name} {cluster.role(mode)!r} head {cluster.head} {machine}")
        return "; ".join(found)

    # -- mending

    async def mend(self) -> None:
        """One round: whoever is not where it should be is put there."""
        self._crown()
        for mode in MODES.values():
            for name in self.members(mode):
                try:
                    await self._mend(self._world.clusters[name], mode)
                except REFUSALS as error:
                    self._world.log(f"operator: mending {name} in mode {mode.name}: {error!r}")

    def _crown(self) -> None:
        """Where the performance primary became somebody's mirror another one is to be primary: one that is, or any."""
        members = self.members(PERFORMANCE)
        if not members or self.primary[PERFORMANCE.name] in members:
            return
        roles = [(self._world.clusters[name].role(PERFORMANCE), name) for name in members]
        ruling = [(role.epoch.number, name) for role, name in roles if isinstance(role, PrimaryRole)]
        self.primary[PERFORMANCE.name] = max(ruling)[1] if ruling else members[0]

    async def _mend(self, cluster: Cluster, mode: Mode) -> None:
        role, world = cluster.role(mode), self._world
        if cluster.name == self.primary[mode.name]:
            if isinstance(role, SecondaryRole):
                await self._force_promote(cluster, mode)
            return
        if isinstance(role, PrimaryRole):
            await self._call(cluster, lambda node: node.manager.primary_demote(mode.name))
            return
        if self.follows(cluster, mode):
            self._waits_since.pop((cluster.name, mode.name), None)
            return
        node = cluster.active()
        service = node.mode(mode.name).secondary if node is not None else None
        key = (cluster.name, mode.name)
        since_s = self._waits_since.setdefault(key, world.loop.time())
        patience_s = self._patience_s.get(key, STUCK_S)
        resting = service is not None and service.machine.phase is Phase.IDLE
        if resting or world.loop.time() - since_s > patience_s:
            # Longer the next time: each token begins the sync anew, and what is lost is written down before it.
            self._patience_s[key] = 2 * patience_s
            self._waits_since.pop(key, None)
            await self._point(cluster, mode)
