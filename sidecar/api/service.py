"""The service of one tenure as active: everything between a request on this node and the replicated store.

Made after recovery, thrown away at step-down. :meth:`Service.start` loads, :meth:`Service.run` does the background
work, :meth:`Service.handle` may be called from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from multidict import CIMultiDict

from consul_backend.errors import BackendError
from plugin_api.errors import PermissionDenied, PluginError, ReadOnlyStorage, Unavailable
from sidecar.api import cors, envelopes, json_codec
from sidecar.api.auditing import Auditor, Exchange
from sidecar.api.decoding import decode
from sidecar.api.directives import FORWARD_ACTIVE, INCONSISTENT_HEADER, INDEX_HEADER
from sidecar.api.node_view import NodeView
from sidecar.api.own_cluster import is_own_clusters
from sidecar.api.replication_api import ReplicationAPI
from sidecar.api.request_metrics import answers, timed_as
from sidecar.api.responding import Responder, with_warnings
from sidecar.api.statuses import refusal
from sidecar.api.sys_core import ServiceOptions, SysCore
from sidecar.api.sys_table import sys_backend
from sidecar.core.audit.registry import AuditRegistry
from sidecar.core.barrier import Barrier
from sidecar.core.cluster import ClusterInfo
from sidecar.core.keys import REPLICATED_KEYRING
from sidecar.core.leasing import Leasing
from sidecar.core.metrics import METRICS
from sidecar.core.mounts import MountTable
from sidecar.core.node_settings import Cors, NodeSettings
from sidecar.core.password_policies import PasswordPolicies
from sidecar.core.policies import PolicyStore
from sidecar.core.quotas import Exceeded, Quotas
from sidecar.core.rotation import maintain_keyrings
from sidecar.core.schedule import Schedule
from sidecar.core.seal_rewrap import SEAL_PASS_S, rewrap
from sidecar.core.store_view import LogicalStore, SealedStore, TrackedWrites
from sidecar.core.token_roles import TokenRoles
from sidecar.core.version_history import VersionHistory
from sidecar.core.wrapping import Wrapping
from sidecar.request.call import Backend, Call
from sidecar.request.cubbyhole import Cubbyhole
from sidecar.request.errors import StateMissing
from sidecar.request.in_flight import RequestUnderWay
from sidecar.request.leasing import guarded, keep_lease
from sidecar.request.login import log_in
from sidecar.request.mount_view import GROUPS, Hooks, MountView, TtlDefaults
from sidecar.request.pending_work import PASS_S, can_undo, undo_left_over
from sidecar.request.pipeline import Pipeline
from sidecar.request.plugins import PluginRegistry
from sidecar.request.request_id import new_request_id
from sidecar.request.token_paths import TokenPaths
from sidecar.request.types import HttpRequest, HttpResponse
from sidecar.request.usage import Usage

log = logging.getLogger("core")

Gate = Callable[[], str | None]

__all__ = ["Service", "ServiceOptions"]

KEYRING_PASS_S = 10.0
_RETRY_S = 5.0
# What an operator needs while data is blocked: to see how it goes, and to get out.
_UNGATED = ("sys/replication/", "sys/seal", "sys/step-down")
_READ_ONLY = "cannot write to readonly storage"


def open_gate() -> str | None:
    """The gate that blocks nothing."""
    return None


class Service:
    """Answers requests on the active node.

    ``store`` holds ciphertext by logical key; ``node`` is asked to seal and to step down; ``replication`` is None where
    the cluster cannot take part in any. ``now`` is what tokens and leases live by, ``wall`` what is shown to people and
    other programs (None: the same). ``gate`` returns a reason while data must not be read (then 503), else None.
    """

    def __init__(
        self,
        store: LogicalStore,
        barrier: Barrier,
        cluster: ClusterInfo,
        options: ServiceOptions,
        *,
        node: NodeView,
        replication: ReplicationAPI | None = None,
        now: Callable[[], float] = time.time,
        wall: Callable[[], float] | None = None,
        gate: Gate = open_gate,
        plugins: PluginRegistry | None = None,
    ) -> None:
        self._replication = replication
        self._cluster = cluster
        self._options = options
        self._now = now
        self._gate = gate
        self._sealed = sealed = SealedStore(store, barrier)
        schedule = Schedule(sealed, now)
        self._leasing = Leasing(
            sealed, schedule, lambda mount: self._mounts.engine(mount), now, lambda: self._gate() is None
        )
        self._tokens = tokens = self._leasing.tokens
        self._policies = PolicyStore(sealed, self._writable)
        self._wrapping = Wrapping(sealed, tokens, now, writable=self._writable, wall=wall)
        self._responder = Responder(self._wrapping, options.api_addr)
        self._audit = AuditRegistry(sealed, self._writable, wall or now, options.audit)
        self._passwords = PasswordPolicies(sealed, self._writable, os.urandom)
        self._settings = NodeSettings(sealed, self._writable)
        self._auditor = Auditor(self._audit.broker, lambda: self._mounts, self._settings, wall or now)
        self._pipeline = Pipeline(lambda: self._mounts.router, tokens, self._policies, self._auditor)
        self._mounts = self._mount_view(plugins or PluginRegistry.installed())
        core = SysCore(
            sealed=sealed,
            tokens=tokens,
            leasing=self._leasing,
            policies=self._policies,
            mounts=self._mounts,
            wrapping=self._wrapping,
            pipeline=self._pipeline,
            node=node,
            replication=replication,
            cluster=cluster,
            options=options,
            now=now,
            writable=self._writable,
            mounts_changed=self._wake,
            audit=self._audit,
        )
        self._core = core
        self._quotas = Quotas(sealed, self._writable, now)
        self._mounts.install("sys/", sys_backend(core, self._quotas, self._settings, self._passwords))
        self._usage = Usage(
            sealed, self._mounts, options.usage, cluster=cluster.cluster_name, now=now, gate=lambda: self._gate()
        )
        self._work = asyncio.Event()
        self._gone_mounts: list[str] = []

    def _mount_view(self, plugins: PluginRegistry) -> MountView:
        options = self._options
        replication = self._replication
        table = MountTable(
            self._sealed,
            self._writable,
            plugin_types=lambda table: plugins.types(GROUPS[table]),
            hidden=replication.filters.hidden if replication is not None else lambda mount_uuid: False,
        )
        built_in: dict[str, Backend] = {
            "cubbyhole/": Cubbyhole(self._sealed),
            "auth/token/": TokenPaths(
                self._tokens,
                TokenRoles(self._sealed, self._writable),
                self._now,
                default_ttl_s=options.default_lease_ttl_s,
                max_ttl_s=options.max_lease_ttl_s,
                is_policy=self._policies.exists,
            ),
        }
        return MountView(
            table,
            self._sealed,
            plugins,
            built_in,
            hooks=Hooks(
                log_in=lambda call, mount, auth: log_in(self._tokens, call, mount, auth, self._now),
                keep_lease=lambda call, mount, lease: keep_lease(self._leasing.leases, call, mount, lease),
                guard=lambda entry, identity: guarded(self._leasing.lockout, options.lockout, entry, identity),
            ),
            writable=self._writable,
            now=self._now,
            defaults=TtlDefaults(options.default_lease_ttl_s, options.max_lease_ttl_s),
            generate_password=self._passwords.generate,
            not_held=replication.filters.not_held if replication is not None else lambda mount_uuid: False,
        )

    def _writable(self) -> bool:
        return self._replication is None or self._replication.is_primary_writable()

    @property
    def mounts(self) -> MountView:
        """What is mounted."""
        return self._mounts

    @property
    def seal_lock(self) -> asyncio.Lock:
        """Held by whoever writes the seal record."""
        return self._core.seal_lock

    @property
    def cors(self) -> Cors:
        """Which pages of other origins may call."""
        return self._settings.cors

    @property
    def cluster(self) -> ClusterInfo:
        """Who this cluster is."""
        return self._cluster

    async def reselected(self) -> None:
        """Which mounts a filter hides has changed, or whose data is held. Raises Unavailable: to be tried again."""
        await self._mounts.reselected(self._leasing.revocation.revoke_prefix)
        self._wake()

    # -- the tenure

    async def start(self) -> None:
        """Load tokens and mounts. Raises what the store raises."""
        await self._leasing.load()
        await self._mounts.table.load()
        self._mounts.refresh()
        await self._audit.load()
        await self._quotas.load()
        await self._settings.load()
        self._wake()

    async def run(self) -> None:
        """Expire tokens, rotate keys, delete what unmounted mounts left; until cancelled."""
        async with contextlib.aclosing(self), asyncio.TaskGroup() as tasks:
            tasks.create_task(self._leasing.run(), name="leases")
            tasks.create_task(self._keep_keyrings(), name="keyrings")
            tasks.create_task(self._keep_seal(), name="seal")
            tasks.create_task(self._undo_pending(), name="rollback")
            tasks.create_task(self._clean_up(), name="unmounted data")
            tasks.create_task(self._usage.run(), name="usage")
            versions = VersionHistory(self._sealed, self._core.node.version, self._now)
            tasks.create_task(self._note_version(versions), name="version history")

    async def aclose(self) -> None:
        """Let go of the audit devices; nothing that must be audited is answered from then on."""
        await self._audit.broker.close()

    def reopen_audit(self) -> None:
        """Open the files and connections of the audit devices again, for log rotation."""
        self._audit.broker.reopen()

    def gauges(self) -> dict[str, float]:
        """Values of this moment, by the names of the telemetry."""
        own: dict[str, float] = {
            "barrier.estimated_encryptions": float(self._sealed.barrier.encryptions("r")),
            "core.in_flight_requests": float(len(self._core.in_flight)),
        }
        return self._leasing.gauges() | self._mounts.table.gauges() | self._usage.gauges() | own

    def audit_blocked(self) -> bool:
        """Whether requests fail because no audit device works."""
        return self._audit.broker.blocked

    async def _keep_keyrings(self) -> None:
        while True:
            await self._tried(lambda: maintain_keyrings(self._sealed, self._now, self._writable), "keyrings")
            await asyncio.sleep(KEYRING_PASS_S)

    async def _keep_seal(self) -> None:
        """Put the root key under the newest version of the auto seal's key."""
        while True:
            await self._tried(lambda: rewrap(self._sealed, self._core.node.sealer, self._core.seal_lock), "seal")
            await asyncio.sleep(SEAL_PASS_S)

    async def _undo_pending(self) -> None:
        """Have engines undo what they have begun outside and did not finish."""
        while True:
            for engine in self._mounts.engines():
                if can_undo(engine):
                    await self._tried(functools.partial(undo_left_over, engine), "rollback")
            await asyncio.sleep(PASS_S)

    async def _note_version(self, versions: VersionHistory) -> None:
        await self._tried(versions.record, "version history")

    async def _clean_up(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            if not await self._tried(self._clean_up_once, "unmounted data"):
                self._work.set()
                await asyncio.sleep(_RETRY_S)

    async def _clean_up_once(self) -> None:
        while self._gone_mounts:
            await self._leasing.revocation.revoke_prefix(self._gone_mounts[0], sync=False)
            self._gone_mounts.pop(0)
        await self._mounts.table.purge()
        await self._mounts.initialize()

    async def _tried(self, work: Callable[[], Awaitable[object]], name: str) -> bool:
        """Whether ``work`` succeeded. A store that cannot write now is for those who run it; here it is for later."""
        try:
            await work()
        except (BackendError, ReadOnlyStorage) as error:  # the second: this cluster became a secondary meanwhile
            log.warning("%s: waiting for the store: %s", name, type(error).__name__)
            return False
        return True

    def _wake(self) -> None:
        self._work.set()

    async def invalidate(self, keys: Sequence[str]) -> None:
        """Replication changed these logical keys: forget what was made of their old values. Raises WrongKey where the
        replicated keyring is now another root key's."""
        if REPLICATED_KEYRING in keys:
            raw = await self._sealed.get_raw(REPLICATED_KEYRING)
            if raw is not None:
                self._sealed.barrier.load_ring("r", raw)
        self._policies.invalidate_keys(keys)
        await self._leasing.invalidate(keys)
        before = self._mounts.table.paths()
        if await self._mounts.table.invalidate(keys):
            self._mounts.refresh()
            # Tokens and leases are this cluster's own: those of a mount that the primary removed are revoked here.
            self._gone_mounts.extend(sorted(before - self._mounts.table.paths()))
            self._wake()
        await self._mounts.invalidate(keys)
        await self._audit.invalidate(keys)
        await self._quotas.invalidate(keys)
        await self._settings.invalidate(keys)

    # -- a request

    async def handle(self, request: HttpRequest) -> HttpResponse:
        """Answer one request; errors are answers too. ``position`` of the answer is the highest WAL index that the
        request committed here."""
        if cors.concerns(self.cors, request):
            return await self._cross_origin(request)
        return await self._counted(request)

    async def _cross_origin(self, request: HttpRequest) -> HttpResponse:
        refused = cors.refusal(self.cors, request)
        if refused is not None:
            return _json(refused[0], envelopes.errors((refused[1],)))
        response = HttpResponse(204) if cors.is_preflight(request) else await self._counted(request)
        response.headers.update(cors.headers(self.cors, request))
        return response

    async def _counted(self, request: HttpRequest) -> HttpResponse:
        if request.forwarded_auth is not None:
            return await self._run(request)
        role = await self._login_role(request) if self._quotas.by_role(request.path) else ""
        exceeded = self._quotas.check(request.path, request.remote_address, role)
        if exceeded is None:
            response = await self._run(request)
        else:
            response = await self._over_quota(request, exceeded)
        if self._quotas.config.show_headers:
            response.headers.update(self._quotas.headers(request.path, request.remote_address, role))
        return response

    async def _login_role(self, request: HttpRequest) -> str:
        """The role that a request logs in to. What stands in the way is met again by the request itself, and told
        there."""
        if self._gate() is not None:
            return ""
        try:
            return await self._mounts.login_role(await decode(request, ""))
        except Exception as error:  # the edge: a quota decides about requests of any kind
            if not refusal(error).expected:
                log.exception("the role of a login to %s cannot be told", request.path)
            return ""

    async def _over_quota(self, request: HttpRequest, exceeded: Exceeded) -> HttpResponse:
        response = _over_quota(request, exceeded)
        if self._quotas.config.audit_refused and self._auditor.enabled:
            return await self._audited(Exchange(request, new_request_id()), response)
        return response

    async def _run(self, request: HttpRequest) -> HttpResponse:
        exchange = Exchange(request, new_request_id())
        in_flight = self._core.in_flight
        in_flight.begin(exchange.id, RequestUnderWay(request.method, request.path, request.remote, self._now()))
        try:
            with TrackedWrites() as writes, METRICS.timer(timed_as(request.path)):
                response = await self._handled(exchange)
                if self._auditor.enabled:
                    response = await self._audited(exchange, response)
        finally:
            in_flight.end(exchange.id)
        answers(response.status).increment()
        response.position = max(response.position, writes.index)
        self._told(exchange, response)
        return response

    async def _audited(self, exchange: Exchange, response: HttpResponse) -> HttpResponse:
        try:
            await self._auditor.response(exchange, response)
        except Exception as error:  # the edge: whatever it is, nothing leaves that no device has taken
            return _refused(error, exchange.id)
        return response

    async def _handled(self, exchange: Exchange) -> HttpResponse:
        request = exchange.request
        try:
            call = exchange.call = await decode(request, exchange.id)
            reason = self._gate()
            if reason is not None and not call.path.startswith(_UNGATED):
                raise Unavailable(reason)
            if call.forwarded_auth is not None and is_own_clusters(call.path):
                raise PermissionDenied("this path belongs to one cluster: it is not run for another")
            warnings = await self._seen(request, call)
            try:
                answer = await self._pipeline.run(call)
            except ReadOnlyStorage:
                return with_warnings(await self._forwarded(request, call), warnings)
            return with_warnings(await self._responder.respond(call, answer), warnings)
        except Exception as error:  # the edge: every error becomes an answer, and a defect is logged with its trace
            return _refused(error, exchange.id)

    async def _seen(self, request: HttpRequest, call: Call) -> Sequence[str]:
        """Wait until what the session has seen is here, or mark the call for the primary; returns what the client must
        be warned of. Raises StateMissing, InvalidRequest."""
        headers = request.headers.getall(INDEX_HEADER, ())
        if self._replication is None or not any(headers) or call.path.startswith(_UNGATED):
            return ()
        found = await self._replication.sessions.require(headers)
        if found.missing:
            asks = request.headers.get(INCONSISTENT_HEADER, "") == FORWARD_ACTIVE
            if not (asks and found.upstream) or is_own_clusters(call.path):
                raise StateMissing
            call.stale = True
        return () if call.forwarded_auth is not None else found.warnings  # else the secondary says it

    def _told(self, exchange: Exchange, response: HttpResponse) -> None:
        """Put into the answer what the session has seen with it."""
        answered = response.headers.popall(INDEX_HEADER, [""])[0]
        if self._replication is None or response.status == StateMissing.status:
            return
        asked = INDEX_HEADER in exchange.request.headers
        header = self._replication.sessions.after(written=response.position, answered=answered, asked=asked)
        if header:
            response.headers[INDEX_HEADER] = header

    async def _forwarded(self, request: HttpRequest, call: Call) -> HttpResponse:
        """Run the whole request on the primary, as the caller that was found out here."""
        if call.identity is None or self._replication is None or request.forwarded_auth is not None:
            raise PluginError(_READ_ONLY)
        answer = await self._replication.forward_to_primary(request, call.identity.forwarded(self._cluster.cluster_id))
        response = HttpResponse(answer.status, CIMultiDict(answer.headers), answer.body)
        if call.wrap_ttl_s and response.status == 200:
            # The primary leaves this to us: a wrapping token of its own would be worth nothing here.
            envelope = json_codec.decode_object(response.body)
            auth = envelope.get("auth") or {}
            return await self._responder.wrapped(
                call, envelope, call.wrap_ttl_s, accessor=str(auth.get("accessor", ""))
            )
        return response


def _over_quota(request: HttpRequest, exceeded: Exceeded) -> HttpResponse:
    """Decided by path and address, and the role of a login: nothing of the request was carried out."""
    METRICS.increment("quota.rate_limit.violation", name=exceeded.quota)
    text = f'request path "{request.path}": rate limit quota exceeded'
    response = _json(429, envelopes.errors((text,)))
    response.headers["Retry-After"] = str(exceeded.retry_after_s)
    return response


def _json(status: int, body: dict[str, Any]) -> HttpResponse:
    return HttpResponse(status, body=json_codec.encode(body))


def _refused(error: Exception, request_id: str) -> HttpResponse:
    answer = refusal(error)
    texts = answer.texts
    if not answer.expected:
        log.exception("request failed: request_id=%s", request_id)
        texts = tuple(f"{text} (request {request_id})" for text in texts)
    response = _json(answer.status, envelopes.errors(texts))
    response.headers.extend(answer.headers())
    return response
