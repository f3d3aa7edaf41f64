"""A simulated Consul: the physical store for tests of what stands on it, with faults to order and time injected.

The rules of transactions, sessions and locks are the embedded store's own (``kv_rules.py``); the contract suite runs
against this store, the embedded one and a real server, so none of them can drift. On top of the rules stands what a
network and a cluster of servers add: a call is a message that may be lost, late, repeated or answered by a leader that
no longer is one. A call that was sent happens on the server's side whatever becomes of its client.

Nothing here touches the operating system: timers are the running loop's, the clock is given, random choices come from
one seeded source. On a loop with virtual time, hours pass in seconds.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from consul_backend.clock import Clock
from consul_backend.errors import BackendError, OutcomeUnknown, SentinelMissing, Unavailable
from consul_backend.kv_rules import Beat, Rules, SessionSnapshot
from consul_backend.limits import Limits, require_fit, require_key, require_prefix
from consul_backend.memory_table import MemoryTable
from consul_backend.physical import SENTINEL_KEY, Item, Names, TxnResult, writes_sentinel
from consul_backend.testing_faults import Call, Journey, Network, PerfectNetwork
from consul_backend.txn import Op, require_session


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a client waits, in seconds; the defaults are ConsulStore's."""

    write_s: float = 10.0
    read_s: float = 5.0
    read_deadline_s: float = 15.0
    read_retry_s: float = 0.05
    beat_s: float = 2.0
    watch_margin_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Applied:
    """One transaction that changed something, in the store's own order: what observers are told."""

    node: str
    ops: Sequence[Op]
    index: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole store at one moment, as ``consul snapshot save`` keeps it."""

    table: MemoryTable
    sessions: SessionSnapshot


class _NoAnswer(Exception):
    """The client stopped waiting."""


@dataclass(slots=True, eq=False)
class _Request:
    """A call on its way. ``work`` is done on the server; its result, or what it raised, travels back."""

    call: Call
    journey: Journey
    work: Callable[[_Request], Any]
    reply: asyncio.Future[Any]
    agent_only: bool = False
    term: int = 0
    patience: asyncio.TimerHandle | None = field(default=None)
    waiting: asyncio.TimerHandle | None = field(default=None)

    def settle(self, outcome: Any) -> None:
        """The client has its answer, or gave up; only the first counts."""
        if self.patience is not None:
            self.patience.cancel()
        if self.reply.done():
            return
        if isinstance(outcome, Exception):
            self.reply.set_exception(outcome)
        else:
            self.reply.set_result(outcome)


_BLOCKED = object()
"""What a call returns that is to be answered later."""


class SimulatedConsul:
    """The servers as one. ``on_applied`` is told of each transaction that wrote, when it was applied.

    ``seed`` decides session ids and what a change of leader does to calls under way.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        limits: Limits | None = None,
        network: Network | None = None,
        timeouts: Timeouts | None = None,
        seed: int = 0,
        on_applied: Callable[[Applied], None] = lambda applied: None,
    ) -> None:
        self.limits = limits or Limits()
        self.network = network or PerfectNetwork()
        self.timeouts = timeouts or Timeouts()
        self.random = random.Random(seed)  # noqa: S311 - a simulation's choices, not secrets
        self.table = MemoryTable()
        self.rules = Rules(self.table, self._changed, index=1, new_session_id=self._new_session_id)
        self.session_owners: dict[str, str] = {}
        self._clock = clock
        self._on_applied = on_applied
        self._context = contextvars.Context()
        self._watching: dict[str, list[_Request]] = {}
        self._expiry: asyncio.TimerHandle | None = None
        self._term = 1
        self._leader_at = float("-inf")
        self._deposed: MemoryTable | None = None
        self._deposed_until = float("-inf")
        self._held: list[_Request] = []

    def client(self, node: str = "") -> SimulatedStore:
        """A handle of one process, with a beat of its own. Open it."""
        return SimulatedStore(self, node)

    # -- what happens to the servers

    def change_leader(self, without_s: float, *, stale_s: float = 0.0) -> None:
        """No leader for ``without_s`` seconds, then another one. Calls under way may be applied and yet end in an
        error; blocking queries end in errors. For ``stale_s`` after the new leader has come, the old one still answers
        reads that are not consistent, with what it knew at this moment."""
        self._term += 1
        self._leader_at = max(self._leader_at, self.now() + without_s)
        if stale_s > 0.0:
            self._deposed, self._deposed_until = self.table.copy(), self._leader_at + stale_s
        for requests in list(self._watching.values()):
            for request in list(requests):
                self._end_watch(request, Unavailable("simulated Consul: rpc error: leadership lost"))
        self._at(self._leader_at - self.now(), self._new_leader)

    def end_session(self, session: str) -> None:
        """An operator destroys a session; also what a missed beat does."""
        self.rules.destroy_session(session, self.now())

    def snapshot(self) -> Snapshot:
        """``consul snapshot save``."""
        return Snapshot(self.table.copy(), self.rules.snapshot())

    def restore(self, snapshot: Snapshot) -> None:
        """``consul snapshot restore``, under whoever runs: rows and sessions as they were, the store's index goes on,
        watchers wake."""
        touched = self.table.restore(snapshot.table)
        self.rules.restore(snapshot.sessions, touched)
        self._deposed = None
        self._arm_expiry()

    def has_leader(self) -> bool:
        """Whether transactions are served now."""
        return self.now() >= self._leader_at

    def close(self) -> None:
        """Stop the timers of the server's side; nothing is answered any more."""
        self._term += 1
        self._leader_at = float("inf")
        if self._expiry is not None:
            self._expiry.cancel()
        for requests in self._watching.values():
            for request in requests:
                if request.waiting is not None:
                    request.waiting.cancel()

    def now(self) -> float:
        """Seconds on the servers' clock."""
        return self._clock.monotonic()

    def _new_leader(self) -> None:
        if not self.has_leader():
            return
        self.rules.expire(self.now())
        held, self._held = self._held, []
        for request in held:
            self._serve(request)

    # -- calls

    def send(self, request: _Request, timeout_s: float) -> None:
        """Put a call on its way."""
        journey = request.journey
        if journey.request_s is not None:
            self._at(journey.request_s, partial(self._arrive, request))
        reset_s = float("inf") if journey.reset_s is None else journey.reset_s
        request.patience = self._at(min(timeout_s, reset_s), partial(request.settle, _NoAnswer()))

    def _arrive(self, request: _Request) -> None:
        if not self.network.connected(request.call.node):
            return
        if request.journey.duplicate_s is not None:
            echo = asyncio.get_running_loop().create_future()
            quiet = Journey(answer_s=None)
            again = _Request(request.call, quiet, request.work, echo, request.agent_only)
            self._at(request.journey.duplicate_s, partial(self._arrive, again))
        self._serve(request)

    def _serve(self, request: _Request) -> None:
        if not request.agent_only and not self.has_leader():
            if self.random.random() < 0.5:
                self._held.append(request)
            else:
                self._answer(request, OutcomeUnknown("simulated Consul: 500 No cluster leader"))
            return
        request.term = self._term
        try:
            outcome = request.work(request)
        except BackendError as error:
            outcome = error
        if outcome is not _BLOCKED:
            self._answer(request, outcome)

    def _answer(self, request: _Request, outcome: Any) -> None:
        if request.journey.answer_s is not None:
            self._at(request.journey.answer_s, partial(self._receive, request, outcome))

    def _receive(self, request: _Request, outcome: Any) -> None:
        if not self.network.connected(request.call.node):
            return
        if request.term not in (0, self._term) and not request.agent_only and self.random.random() < 0.5:
            outcome = OutcomeUnknown("simulated Consul: 500 leadership lost while committing log")
        request.settle(outcome)

    def _at(self, delay_s: float, action: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(max(0.0, delay_s), action, context=self._context)

    # -- work of single calls

    def apply(self, call: Call) -> TxnResult:
        """A transaction arrives."""
        before = self.rules.index
        result = self.rules.txn(call.ops, self.now())
        if self.rules.index != before:
            self._on_applied(Applied(call.node, call.ops, self.rules.index, self.now()))
        return result

    def read(self, keys: Sequence[str], stale: bool) -> list[Item | None]:
        """A read arrives, at a deposed leader if there is one and ``stale``."""
        if stale and self._deposed is not None and self.now() < self._deposed_until:
            return [self._deposed.read(key) for key in keys]
        return self.rules.get_many(keys, self.now())

    def names(self, prefix: str, stale: bool) -> list[str]:
        """A list arrives, as :meth:`read`."""
        if stale and self._deposed is not None and self.now() < self._deposed_until:
            return self._deposed.names(prefix)
        return self.rules.list(prefix)

    def names_below(self, prefix: str, names_max: int, stale: bool) -> list[str] | None:
        """As :meth:`names`, at any depth."""
        if stale and self._deposed is not None and self.now() < self._deposed_until:
            return self._deposed.names_below(prefix, names_max)
        return self.rules.names_below(prefix, names_max)

    def watch(self, request: _Request, key: str, index: int, wait_s: float) -> Any:
        """A blocking query arrives."""
        item, changed_at, store_index = self.rules.look(key, self.now())
        if not index or changed_at > index:
            return item, item.modify_index if item else store_index
        end = partial(self._end_watch, request, (item, index))
        request.waiting = self._at(wait_s, end)
        self._watching.setdefault(key, []).append(request)
        return _BLOCKED

    def _end_watch(self, request: _Request, outcome: Any) -> None:
        if request.waiting is not None:
            request.waiting.cancel()
        for key, requests in list(self._watching.items()):
            if request in requests:
                requests.remove(request)
                if not requests:
                    del self._watching[key]
        self._answer(request, outcome)

    def _changed(self, keys: Sequence[str]) -> None:
        for key in keys:
            for request in self._watching.pop(key, ()):
                if request.waiting is not None:
                    request.waiting.cancel()
                item, _, store_index = self.rules.look(key, self.now())
                self._answer(request, (item, item.modify_index if item else store_index))

    # -- sessions

    def create_session(self, node: str, beat: Beat, lock_delay_s: float) -> str:
        """A session arrives; it lives while ``beat`` does."""
        session = self.rules.create_session(beat, lock_delay_s)
        self.session_owners[session] = node
        self._arm_expiry()
        return session

    def beat(self, beat: Beat, ttl_s: float) -> None:
        """A beat reaches the agent. What was missed is missed, unless the servers could not be told."""
        if self.has_leader():
            self.rules.expire(self.now())
        beat.deadline_s = self.now() + ttl_s

    def stop_beat(self, beat: Beat) -> None:
        """The agent forgets the beat's check, and tells the servers."""
        beat.deadline_s = float("-inf")
        if self.has_leader():
            self.rules.expire(self.now())

    def _arm_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        deadline_s = self.rules.next_deadline()
        if deadline_s is not None:
            self._expiry = self._at(deadline_s - self.now(), self._expire)

    def _expire(self) -> None:
        if self.has_leader():
            self.rules.expire(self.now())
        self._expiry = None
        deadline_s = self.rules.next_deadline()
        if deadline_s is not None:
            # Without a leader nothing expires before there is one; then at once.
            self._expiry = self._at(max(deadline_s, self._leader_at, self.now() + 0.001) - self.now(), self._expire)

    def _new_session_id(self) -> str:
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))


class SimulatedStore:
    """One process's handle on a :class:`SimulatedConsul`; see ``physical.py`` for the rules."""

    def __init__(self, consul: SimulatedConsul, node: str) -> None:
        self._consul = consul
        self._node = node
        self._beat = Beat()
        self._beat_ttl_s = 0.0
        self._opened = False
        self._sentinel_seen = False

    @property
    def kind(self) -> str:
        return "consul"

    @property
    def limits(self) -> Limits:
        return self._consul.limits

    async def open(self) -> None:
        if not self._opened:
            self._opened = True
            await self.get(SENTINEL_KEY)

    async def close(self) -> None:
        """Idempotent; sessions die by their missing beat."""
        self._opened = False

    def crash(self) -> None:
        """The process is gone: what it sent may still arrive, nothing reaches it, and it beats no more."""
        self._opened = False

    async def get(self, key: str, *, consistent: bool = False) -> Item | None:
        return (await self.get_many([key], consistent=consistent))[0]

    async def get_many(self, keys: Sequence[str], *, consistent: bool = False) -> list[Item | None]:
        for key in keys:
            require_key(key)
        items: list[Item | None] = []
        step = self.limits.ops_max
        for first in range(0, len(keys), step):
            chunk = tuple(keys[first : first + step])
            items += await self._read("get", partial(self._consul.read, chunk), consistent)
        if any(item is not None and item.key == SENTINEL_KEY for item in items):
            self._sentinel_seen = True
        return items

    async def list(self, prefix: str, *, consistent: bool = False) -> list[str]:
        if prefix and not prefix.endswith("/"):
            raise ValueError(f"a list prefix ends in a slash: {prefix!r}")
        require_prefix(prefix)
        names: list[str] = await self._read("list", partial(self._consul.names, prefix), consistent)
        if await self.get(SENTINEL_KEY, consistent=True) is None and self._sentinel_seen:
            raise SentinelMissing("the sentinel is gone: an empty or short list proves nothing")
        return names

    async def names_below(self, prefix: str, names_max: int, *, consistent: bool = False) -> Names | None:
        if prefix and not prefix.endswith("/"):
            raise ValueError(f"a list prefix ends in a slash: {prefix!r}")
        require_prefix(prefix)
        ask = partial(self._consul.names_below, prefix, names_max)
        names: list[str] | None = await self._read("list", ask, consistent)
        if await self.get(SENTINEL_KEY, consistent=True) is None and self._sentinel_seen:
            raise SentinelMissing("the sentinel is gone: an empty or short list proves nothing")
        return names

    async def txn(self, ops: Sequence[Op]) -> TxnResult:
        require_fit(ops, self.limits)
        call = Call(self._node, "txn", tuple(ops))
        try:
            result: TxnResult = await self._exchange(call, lambda _: self._consul.apply(call), self._timeouts.write_s)
        except _NoAnswer:
            raise OutcomeUnknown("simulated Consul: no answer to a transaction") from None
        self._sentinel_seen = self._sentinel_seen or writes_sentinel(ops)
        return result

    async def watch(self, key: str, index: int, wait_s: float) -> tuple[Item | None, int]:
        require_key(key)
        timeout_s = wait_s * 17 / 16 + self._timeouts.watch_margin_s
        found: tuple[Item | None, int] = await self._certain(
            "watch", lambda request: self._consul.watch(request, key, index, wait_s), timeout_s
        )
        return found

    async def create_session(self, name: str, *, beat_ttl_s: float, lock_delay_s: float) -> str:
        self._beat_ttl_s = beat_ttl_s
        await self.beat()
        session: str = await self._certain(
            "create_session", lambda _: self._consul.create_session(self._node, self._beat, lock_delay_s)
        )
        return session

    async def beat(self) -> None:
        await self._certain(
            "beat", lambda _: self._consul.beat(self._beat, self._beat_ttl_s), self._timeouts.beat_s, agent_only=True
        )

    async def renew_session(self, session: str) -> bool:
        require_session(session)
        alive: bool = await self._certain(
            "renew_session", lambda _: self._consul.rules.session_alive(session, self._consul.now())
        )
        return alive

    async def destroy_session(self, session: str) -> None:
        await self._certain("destroy_session", lambda _: self._consul.end_session(session))

    async def stop_beat(self) -> None:
        await self._certain("stop_beat", lambda _: self._consul.stop_beat(self._beat), agent_only=True)

    @property
    def _timeouts(self) -> Timeouts:
        return self._consul.timeouts

    async def _read(self, verb: str, work: Callable[[bool], Any], consistent: bool) -> Any:
        """A read, again and again while the store is unavailable, as ConsulStore does."""
        consul, pause_s = self._consul, self._timeouts.read_retry_s
        deadline = consul.now() + self._timeouts.read_deadline_s
        while True:
            try:
                return await self._certain(verb, lambda request: work(request.journey.stale and not consistent))
            except Unavailable:
                pause_s *= consul.random.uniform(1.0, 2.0)
                if not self._opened or consul.now() + pause_s > deadline:
                    raise
            await asyncio.sleep(min(pause_s, 1.0))

    async def _certain(
        self, verb: str, work: Callable[[_Request], Any], timeout_s: float | None = None, *, agent_only: bool = False
    ) -> Any:
        """A call that may be repeated: no answer is Unavailable."""
        call = Call(self._node, verb)
        try:
            return await self._exchange(call, work, timeout_s or self._timeouts.read_s, agent_only=agent_only)
        except (OutcomeUnknown, _NoAnswer):
            raise Unavailable(f"simulated Consul: no answer to {verb}") from None

    async def _exchange(
        self, call: Call, work: Callable[[_Request], Any], timeout_s: float, *, agent_only: bool = False
    ) -> Any:
        if not self._opened:
            raise Unavailable("the simulated store is not open")
        journey = self._consul.network.journey(call)
        if journey.refused:
            raise Unavailable("simulated Consul: connection refused")
        request = _Request(call, journey, work, asyncio.get_running_loop().create_future(), agent_only)
        self._consul.send(request, timeout_s)
        try:
            return await request.reply
        finally:
            if request.patience is not None:
                request.patience.cancel()
