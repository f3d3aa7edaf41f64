"""The beat and the sessions bound to it.

A session's own TTL is slow (Consul waits for twice at least 10 s), so sessions here live by a check that this process
must pass again and again. But it is the local agent that notices a missed check: when the whole machine is lost, nobody
does. So a session also has a TTL, which :meth:`Sessions.renew` starts afresh and the leader alone counts.

The check belongs to a small service of its own, one per process, and not to the node:

* a failing *node* check takes every service of that node out of Consul's DNS and health answers;
* a service check needs only ``service`` write, a node check the right to write the node;
* the agent removes a dead process's leftover by itself (``DeregisterCriticalServiceAfter``).

``NodeChecks: []`` keeps Consul from adding ``serfHealth``, whose gossip would drop locks on a short network hiccup.
A session is made on the agent's own node and refused when that agent does not know the check, so an address that leads
to several agents is noticed at once.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid

import msgspec

from consul_backend.client import PooledConsul, UnknownToConsul, translated
from consul_backend.config import ConsulConfig
from consul_backend.errors import BackendError, OutcomeUnknown, PermissionDenied, Unavailable
from consul_backend.transport import Answer, Transport
from consul_backend.txn import require_session
from consul_backend.wire import PERMISSION_DENIED, clean, client_error

BEAT_SERVICE = "outrider-beat"
BEAT_TIMEOUT_S = 2.0
CALL_TIMEOUT_S = 10.0
REMOVE_DEAD_AFTER = "1m"
"""Consul's minimum."""
CHECK_SYNC_TIMEOUT_S = 5.0
CHECK_SYNC_RETRY_S = 0.02
LOCK_DELAY_MAX_S = 60.0
TTL_MIN_S = 10.0
"""Consul's default minimum, ``session_ttl_min``."""
TTL_BEATS = 3.0
TTL_MAX_S = 86_400.0
_TTL_RANGE = re.compile(rb"must be between \[([0-9hms.]+)=")


class _Created(msgspec.Struct):
    ID: str


class Sessions:
    """Sessions of one process. ``transport`` is the store's; the beat has a connection of its own. Close it."""

    def __init__(self, config: ConsulConfig, transport: Transport) -> None:
        self._transport = transport
        self._query = f"dc={config.datacenter}" if config.datacenter else ""
        self._consul = PooledConsul(transport, datacenter=config.datacenter, timeout_s=CALL_TIMEOUT_S)
        self._beat_transport = Transport(config, connections_max=1)
        self._beat_consul = PooledConsul(self._beat_transport, timeout_s=BEAT_TIMEOUT_S)
        self._check_id = f"{BEAT_SERVICE}:{uuid.uuid4()}"
        self._ttl_s = 0.0
        self._registered = False

    async def close(self) -> None:
        """Close the beat's connection; the check stays until it is missed."""
        await self._beat_transport.close()

    async def create(self, name: str, *, beat_ttl_s: float, lock_delay_s: float) -> str:
        """See ``PhysicalStore.create_session``. Raises Unavailable, PermissionDenied."""
        if not 0 <= lock_delay_s <= LOCK_DELAY_MAX_S:
            raise ValueError(f"Consul's lock-delay is 0 to {LOCK_DELAY_MAX_S:.0f} s, not {lock_delay_s}")
        if not self._registered or self._ttl_s != beat_ttl_s:
            self._ttl_s = beat_ttl_s
            await self._register()
        await self.beat()
        ask = {
            "Name": name,
            "NodeChecks": [],
            "ServiceChecks": [{"ID": self._check_id}],
            "Behavior": "release",
            "LockDelay": _milliseconds(lock_delay_s),
            "TTL": _milliseconds(min(max(TTL_MIN_S, TTL_BEATS * beat_ttl_s), TTL_MAX_S)),
        }
        deadline_s = time.monotonic() + CHECK_SYNC_TIMEOUT_S
        while True:
            try:
                answer = await self._transport.request(
                    "PUT",
                    "/v1/session/create",
                    query=self._query,
                    body=msgspec.json.encode(ask),
                    timeout_s=CALL_TIMEOUT_S,
                )
            except OutcomeUnknown as error:
                # A session nobody knows of holds no lock; it dies with the beat.
                raise Unavailable(f"creating a session: {error}") from error
            if answer.status == 200:
                return require_session(msgspec.json.decode(answer.body, type=_Created).ID)
            if time.monotonic() > deadline_s:
                raise _failure(answer)
            if allowed := _TTL_RANGE.search(answer.body):
                ask["TTL"] = allowed[1].decode("ascii")
                continue
            if not _awaits_check(answer):
                raise _failure(answer)
            await asyncio.sleep(CHECK_SYNC_RETRY_S)  # the agent tells the servers of a new check a moment later

    async def beat(self) -> None:
        """Pass the check; register it again where the agent has forgotten it. Raises Unavailable and nothing else."""
        if not self._ttl_s:
            return
        try:
            if not self._registered:
                await self._register()
            try:
                await self._pass()
            except UnknownToConsul:
                await self._register()
                await self._pass()
        except PermissionDenied as error:
            self._beat_transport.token.suspect()
            raise Unavailable(f"the beat was refused: {error}") from error

    async def renew(self, session: str) -> bool:
        """Start the session's TTL afresh. Whether it lives, by the word of a leader that has just proved itself to a
        quorum: one that was cut off still answers a renewal, so it is looked up as well.

        Raises Unavailable, PermissionDenied.
        """
        require_session(session)
        try:
            with translated("renew the session"):
                await self._consul.session.renew(session)
        except UnknownToConsul:
            return False
        with translated("look up the session"):
            _, found = await self._consul.session.info(session, consistency="consistent")
        if found is None:
            raise Unavailable("Consul renews a session and yet shows none")
        return True

    async def destroy(self, session: str) -> None:
        """End a session; an unknown one is no failure. Raises Unavailable, PermissionDenied."""
        require_session(session)
        with translated("destroy the session"):
            await self._consul.session.destroy(session)

    async def stop(self) -> None:
        """Remove the beat's service, and with it every session. Raises Unavailable."""
        self._ttl_s = 0.0
        if not self._registered:
            return
        self._registered = False
        try:
            with translated("remove the beat's service"):
                await self._beat_consul.agent.service.deregister(self._check_id)
        except UnknownToConsul:
            return
        except PermissionDenied as error:
            raise Unavailable(str(error)) from error

    async def _register(self) -> None:
        check = {
            "CheckID": self._check_id,
            "Name": "Outrider event loop",
            "TTL": _milliseconds(self._ttl_s),
            "Status": "passing",
            "DeregisterCriticalServiceAfter": REMOVE_DEAD_AFTER,
        }
        with translated("register the beat"):
            await self._beat_consul.agent.service.register(BEAT_SERVICE, service_id=self._check_id, check=check)
        self._registered = True

    async def _pass(self) -> None:
        with translated("pass the beat"):
            if not await self._beat_consul.agent.check.ttl_pass(self._check_id):
                raise UnknownToConsul("the agent does not know the beat's check")


def _milliseconds(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


def _awaits_check(answer: Answer) -> bool:
    text = answer.body.lower()
    return answer.status >= 500 and (b"missing check" in text or b"critical state" in text)


def _failure(answer: Answer) -> BackendError:
    text = clean(answer.body[:1000].decode("utf-8", "replace"))
    if PERMISSION_DENIED in text.lower():
        return PermissionDenied(f"Consul: {text}")
    return client_error(answer.status, answer.body) or Unavailable(f"Consul answered {answer.status}: {text}")
