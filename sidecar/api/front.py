"""The first to see a request, on a node of any role: raw endpoints, sealed answers, hand-over to the active node.

Everything here is answered without a token and without the store of a tenure; the rest goes to
:meth:`~sidecar.api.node_view.NodeView.dispatch`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from multidict import CIMultiDict

from plugin_api.errors import InvalidRequest
from plugin_api.formats import format_time
from sidecar.api import cors, envelopes, json_codec
from sidecar.api.decoding import MethodNotAllowed, client_token, query_data
from sidecar.api.directives import check_directives
from sidecar.api.health import health_code
from sidecar.api.init_request import init_request
from sidecar.api.metrics_answer import metrics_answer
from sidecar.api.node_view import NodeView, NotForwarded, SealStatus
from sidecar.api.pprof import PROFILE_S, TEXT_TYPE, Profiler
from sidecar.api.statuses import refusal
from sidecar.core.seal import decode_share
from sidecar.core.seal_record import SHAMIR
from sidecar.request.fields import Fields
from sidecar.request.in_flight import InFlight, RequestUnderWay
from sidecar.request.types import HttpRequest, HttpResponse

FEATURES = ("Performance Replication", "DR Replication")
"""What ``sys/license/features`` lists; the web UI shows its replication pages by it."""
LOCAL_ONLY = frozenset({"sys/host-info", "sys/metrics", "sys/monitor"})
PPROF = "sys/pprof"

RawHandler = Callable[[HttpRequest], Awaitable[HttpResponse]]


class Front:
    """One per node, for its whole life. ``header_forwarding``: clients may ask for it by header. ``in_flight`` is kept
    where a listener shows it to anybody."""

    def __init__(
        self,
        node: NodeView,
        *,
        now: Callable[[], float] = time.time,
        prometheus: bool = True,
        header_forwarding: bool = False,
        in_flight: InFlight | None = None,
    ) -> None:
        self._node = node
        self._forwarding = header_forwarding
        self._prometheus = prometheus
        self._in_flight = in_flight
        self._profiler = Profiler()
        self._now = now
        self._raw: dict[str, RawHandler] = {
            "sys/health": self._health,
            "sys/seal-status": self._seal_status,
            "sys/leader": self._leader,
            "sys/init": self._init,
            "sys/unseal": self._unseal,
            "sys/license/features": self._features,
            "sys/internal/ui/feature-flags": self._feature_flags,
        }

    async def handle(self, request: HttpRequest) -> HttpResponse:
        """Answer ``request``; only a defect raises."""
        if self._in_flight is None:
            return await self._handle(request)
        number = str(uuid.uuid4())
        self._in_flight.begin(number, RequestUnderWay(request.method, request.path, request.remote, self._now()))
        try:
            return await self._handle(request)
        finally:
            self._in_flight.end(number)

    async def _handle(self, request: HttpRequest) -> HttpResponse:
        try:
            raw = self._raw.get(request.path)
            if raw is not None and not cors.is_preflight(request):
                return await self._answered_here(raw, request)
            opened = self._opened(request)
            if opened is not None:
                _require(request, "GET")
                return await opened(request)
            check_directives(request.headers, forwarding=self._forwarding)
            if self._node.is_sealed():
                return _errors(503, "Vault is sealed")
            if not self._node.is_active():
                if request.path == "sys/seal":
                    return self._seal_on_standby(request)
                if request.path.rstrip("/") in LOCAL_ONLY or request.path.startswith(PPROF):
                    # Only the active node can check a token, and another node's answer would be of another machine.
                    return _errors(400, "cannot forward local-only request")
            return await self._dispatch(request)
        except Exception as error:
            answer = refusal(error)
            if not answer.expected:
                raise
            refused = _errors(answer.status, *answer.texts)
            refused.headers.extend(answer.headers())
            return refused

    async def _answered_here(self, raw: RawHandler, request: HttpRequest) -> HttpResponse:
        """For pages of other origins too, as far as this node knows which may."""
        allowed = self._node.cors()
        refused = cors.refusal(allowed, request)
        if refused is not None:
            return _errors(*refused)
        response = await raw(request)
        response.headers.update(cors.headers(allowed, request))
        return response

    async def _dispatch(self, request: HttpRequest) -> HttpResponse:
        if self._node.is_active():
            return await self._hand_over(request)
        if request.headers.get("X-Vault-No-Request-Forwarding"):
            return await self._redirect(request)
        return await self._hand_over(request)

    async def _hand_over(self, request: HttpRequest) -> HttpResponse:
        try:
            return await self._node.dispatch(request)
        except NotForwarded:
            return await self._redirect(request)

    async def _redirect(self, request: HttpRequest) -> HttpResponse:
        """307 to the active node: the client keeps method and body."""
        leader = await self._node.leader()
        if not leader.leader_address or leader.is_self:
            return _errors(503, "local node not active but active cluster node not found")
        location = leader.leader_address.rstrip("/") + (request.raw_target or f"/v1/{request.path}")
        return HttpResponse(307, CIMultiDict({"Location": location}))

    def _seal_on_standby(self, request: HttpRequest) -> HttpResponse:
        _require(request, "PUT", "POST")
        if not client_token(request):
            return _errors(403, "permission denied")
        return _errors(400, "error performing token check: Vault is in standby mode")

    async def _health(self, request: HttpRequest) -> HttpResponse:
        _require(request, "GET", "HEAD")
        health = await self._node.health()
        status = health_code(health, request.query)
        body: dict[str, Any] = {
            "initialized": health.initialized,
            "sealed": health.sealed,
            "standby": health.standby,
            "performance_standby": False,
            "replication_performance_mode": health.performance_mode,
            "replication_dr_mode": health.dr_mode,
            "server_time_utc": int(self._now()),
            "version": "" if request.disclosure.hides_version else self._node.version,
            "enterprise": True,
        }
        if not health.sealed:
            hidden = request.disclosure.hides_cluster_name
            body.update(cluster_name="" if hidden else health.cluster_name, cluster_id=health.cluster_id)
        body.update(
            echo_duration_ms=health.echo_ms,
            clock_skew_ms=health.clock_skew_ms,
            replication_primary_canary_age_ms=health.canary_age_ms,
        )
        if health.last_wal:
            body["last_wal"] = health.last_wal
        if health.standby and not health.sealed:
            body["ha_connection_healthy"] = health.ha_healthy
            if health.heartbeat_age_ms is not None:
                body["last_request_forwarding_heartbeat_ms"] = health.heartbeat_age_ms
        if health.audit_blocked:
            body["audit_blocked"] = True
        if health.sealed_reason:
            body["sealed_reason"] = health.sealed_reason
        if health.stopped_reason:
            body["stopped_reason"] = health.stopped_reason
        return _json(status, body)

    async def _seal_status(self, request: HttpRequest) -> HttpResponse:
        _require(request, "GET")
        return _json(200, self._seal_body(request, await self._node.seal_status()))

    def _seal_body(self, request: HttpRequest, status: SealStatus) -> dict[str, Any]:
        body: dict[str, Any] = {
            "type": status.type,
            "initialized": status.initialized,
            "sealed": status.sealed,
            "t": status.t,
            "n": status.n,
            "progress": status.progress,
            "nonce": status.nonce,
            "version": "" if request.disclosure.hides_version else self._node.version,
            "build_date": "",  # there for clients that expect it; as of a Vault that was built by hand
            "migration": status.migration,
            "recovery_seal": status.recovery_seal,
            "storage_type": self._node.storage_type,
        }
        if status.shares_issued_s:
            body["shares_issued"] = format_time(status.shares_issued_s)
        if status.recovery_seal:
            # The recovery shares are Shamir's, and unseal a node whose auto seal cannot.
            body.update(recovery_seal_type=SHAMIR, unseal_recovery_enabled=True)
        if not status.sealed:
            hidden = request.disclosure.hides_cluster_name
            body.update(cluster_name="" if hidden else status.cluster_name, cluster_id=status.cluster_id)
        if status.warnings:
            body["warnings"] = list(status.warnings)
        return body

    async def _leader(self, request: HttpRequest) -> HttpResponse:
        _require(request, "GET")
        health, leader = await self._node.health(), await self._node.leader()
        if leader.ha_enabled and (not health.initialized or health.sealed):
            return _errors(503, "Vault is sealed")
        known = leader.ha_enabled
        shown = known and not request.disclosure.hides_addresses
        active_since_s = leader.active_since_s if known else 0
        body: dict[str, Any] = {
            "ha_enabled": leader.ha_enabled,
            "is_self": leader.is_self and known,
            "active_time": format_time(active_since_s) if active_since_s else envelopes.ZERO_TIME,
            "leader_address": leader.leader_address if shown else "",
            "leader_cluster_address": leader.leader_cluster_address if shown else "",
            "performance_standby": False,
            "performance_standby_last_remote_wal": 0,
        }
        if leader.last_wal and known:
            body["last_wal"] = leader.last_wal
        return _json(200, body)

    async def _init(self, request: HttpRequest) -> HttpResponse:
        if request.method == "GET":
            return _json(200, {"initialized": (await self._node.health()).initialized})
        _require(request, "PUT", "POST")
        kind = self._node.seal_kind
        wanted = await asyncio.to_thread(init_request, Fields(json_codec.decode_object(request.body)), kind)
        outcome = await self._node.init(wanted.options)
        return _json(200, wanted.answer(outcome))

    async def _unseal(self, request: HttpRequest) -> HttpResponse:
        _require(request, "PUT", "POST")
        fields = Fields(json_codec.decode_object(request.body))
        reset, text = fields.boolean("reset"), fields.string("key")
        health = await self._node.health()
        if not health.initialized:
            raise InvalidRequest("Vault is not initialized")
        if reset:
            return _json(200, self._seal_body(request, await self._node.reset_unseal()))
        if not text:
            raise InvalidRequest("'key' must be specified in request body as JSON, or 'reset' set to true")
        migrate = fields.boolean("migrate")
        return _json(200, self._seal_body(request, await self._node.unseal(decode_share(text), migrate=migrate)))

    # -- on a listener that shows them to anybody, whatever this node's state

    def _opened(self, request: HttpRequest) -> RawHandler | None:
        shown, path = request.disclosure, request.path.rstrip("/")
        if shown.metrics and path == "sys/metrics":
            return self._metrics
        if shown.in_flight and path == "sys/in-flight-req":
            return self._requests_in_flight
        if shown.profiles and (path == PPROF or path.startswith(PPROF + "/")):
            return self._pprof
        return None

    async def _requests_in_flight(self, request: HttpRequest) -> HttpResponse:
        return _json(200, self._in_flight.shown(self._now()) if self._in_flight is not None else {})

    async def _pprof(self, request: HttpRequest) -> HttpResponse:
        name = request.path.rstrip("/")[len(PPROF) + 1 :]
        seconds = Fields(query_data(request.query)).duration_s("seconds", PROFILE_S)
        text = await self._profiler.text(name, seconds)
        return HttpResponse(200, CIMultiDict({"Content-Type": TEXT_TYPE}), text.encode())

    async def _metrics(self, request: HttpRequest) -> HttpResponse:
        answer = metrics_answer(request.query, prometheus=self._prometheus)
        return HttpResponse(answer.status, CIMultiDict({"Content-Type": answer.content_type}), answer.body)

    async def _features(self, request: HttpRequest) -> HttpResponse:
        _require(request, "GET")
        return _json(200, {"features": list(FEATURES)})

    async def _feature_flags(self, request: HttpRequest) -> HttpResponse:
        _require(request, "GET")
        return _json(200, {"feature_flags": None})


def _require(request: HttpRequest, *methods: str) -> None:
    if request.method not in methods:
        raise MethodNotAllowed


def _json(status: int, body: dict[str, Any]) -> HttpResponse:
    return HttpResponse(status, body=json_codec.encode(body))


def _errors(status: int, *texts: str) -> HttpResponse:
    return _json(status, envelopes.errors(texts))
