"""From requests and answers to audit entries.

A request is entered once its caller is known and before anything is done for it; an answer is entered as the bytes that
are about to leave, so that what an entry says and what a client got cannot differ.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from plugin_api.formats import format_time
from sidecar.api.decoding import client_token
from sidecar.core.audit.broker import AuditBroker, AuditFailed
from sidecar.core.audit.entries import Record
from sidecar.core.mounts import AUTH
from sidecar.core.node_settings import NodeSettings
from sidecar.request.call import Call, Identity
from sidecar.request.mount_view import MountView
from sidecar.request.types import HttpRequest, HttpResponse
from sidecar.version import PLUGIN_VERSION

# What an operator needs when no device works, and what is asked too often to be of interest.
NEVER = frozenset(
    {
        "sys/health",
        "sys/init",
        "sys/internal/ui/feature-flags",
        "sys/leader",
        "sys/rekey/init",
        "sys/rekey/update",
        "sys/rekey/verify",
        "sys/replication/dr/status",
        "sys/replication/performance/status",
        "sys/replication/status",
        "sys/seal",
        "sys/seal-status",
        "sys/step-down",
        "sys/unseal",
    }
)
# What both entries say of the mount.
_ABOUT = ("mount_point", "mount_type", "mount_accessor", "mount_class")
_NEVER_BELOW = "sys/rekey-recovery-key/"
_THREAD_BYTES_MIN = 16 * 1024
_OPERATIONS = {
    "DELETE": "delete",
    "GET": "read",
    "HEAD": "read",
    "LIST": "list",
    "PATCH": "patch",
    "POST": "update",
    "PUT": "update",
}


@dataclass(slots=True)
class Exchange:
    """One request on its way through the service; ``call`` is there once it could be decoded."""

    request: HttpRequest
    id: str
    call: Call | None = None


class Auditor:
    """Writes the entries of one tenure's requests to ``broker``."""

    def __init__(
        self, broker: AuditBroker, mounts: Callable[[], MountView], settings: NodeSettings, now: Callable[[], float]
    ) -> None:
        self._broker = broker
        self._mounts = mounts
        self._settings = settings
        self._now = now

    @property
    def enabled(self) -> bool:
        """Whether there is any device."""
        return self._broker.enabled

    async def request(self, call: Call) -> None:
        """Enter a request that is about to be carried out. Raises AuditFailed: it must not be."""
        if _is_exempt(call.path):
            return
        call.audited = False
        call.record = self._record(_of_call(call) | self._headers(call.headers), call, size_bytes=call.body_bytes)
        await self._broker.write(call.record)
        call.audited = True

    async def response(self, exchange: Exchange, response: HttpResponse) -> None:
        """Enter what is about to be sent, and before it the request where it was refused too early to be entered.
        Raises AuditFailed: the answer must not be shown."""
        call = exchange.call
        if _is_exempt(call.path if call is not None else exchange.request.path):
            return
        if call is not None and call.audited is False:
            raise AuditFailed  # the answer is that very refusal; trying again would only take as long again
        shown, status, error = await _shown(response)
        size_bytes = (call.body_bytes if call is not None else 0) + len(response.body)
        request = call.record if call is not None else None
        if request is None:
            fields = _of_call(call) if call is not None else _of_request(exchange)
            fields |= self._headers(exchange.request.headers)
            request = self._record(fields, call, status=status, error=error, size_bytes=size_bytes)
            await self._broker.write(request)
        about = {name: request.request[name] for name in _ABOUT if name in request.request}
        shown = {**about, "mount_running_plugin_version": request.request["mount_running_version"], **shown}
        await self._broker.write(
            request.answered(
                format_time(self._now()),
                shown,
                auth=shown.get("auth"),
                status=status,
                error=error,
                size_bytes=size_bytes,
            )
        )

    def _headers(self, sent: Mapping[str, str]) -> dict[str, Any]:
        """Those of the request's headers that operators want in the log."""
        audited = self._settings.audited_headers
        found = {name: [sent[name]] for name in sorted(audited) if name in sent}
        return {"headers": found} if found else {}

    def _record(
        self, request: dict[str, Any], call: Call | None, *, status: int = 200, error: str = "", size_bytes: int
    ) -> Record:
        auth = None
        if call is not None and call.identity is not None:
            auth = _auth(call.identity) | _policy_results(call, call.identity)
        mount, entry = self._mounts().serving(request["path"])
        about = {"mount_point": mount} if mount else {}
        running = PLUGIN_VERSION if entry is not None else ""
        if entry is not None:
            kind = "auth" if entry.table == AUTH else "secret"
            about |= {"mount_type": entry.type, "mount_accessor": entry.accessor, "mount_class": kind}
        return Record(
            time=format_time(self._now()),
            request={**request, **about, "mount_running_version": running},
            auth=auth,
            status=status,
            error=error,
            clear_request=frozenset(entry.config.audit_non_hmac_request_keys) if entry else frozenset(),
            clear_response=frozenset(entry.config.audit_non_hmac_response_keys) if entry else frozenset(),
            hashed_headers=frozenset(name for name, hashed in self._settings.audited_headers.items() if hashed),
            size_bytes=size_bytes,
        )


def _is_exempt(path: str) -> bool:
    trimmed = path.rstrip("/")
    return trimmed in NEVER or trimmed.startswith(_NEVER_BELOW)


def _of_call(call: Call) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "id": call.id,
        "operation": "help" if call.wants_help else call.operation.value,
        "client_token": call.token,
        "client_token_accessor": call.identity.caller.accessor if call.identity is not None else "",
        "path": call.path,
        "data": call.data,
        "remote_address": call.remote_address,
        "remote_port": call.remote_port,
        "wrap_ttl": call.wrap_ttl_s,
    }
    if call.forwarded_auth is not None:
        fields["replication_cluster"] = call.forwarded_auth.cluster_id
    return fields


def _of_request(exchange: Exchange) -> dict[str, Any]:
    """What is known of a request that could not be decoded: nothing of its body."""
    request = exchange.request
    return {
        "id": exchange.id,
        "operation": _OPERATIONS.get(request.method, ""),
        "client_token": client_token(request),
        "path": request.path,
        "remote_address": request.remote_address,
        "remote_port": request.remote_port,
    }


def _auth(identity: Identity) -> dict[str, Any]:
    caller, entry = identity.caller, identity.entry
    fields: dict[str, Any] = {
        "client_token": identity.token,
        "accessor": caller.accessor,
        "display_name": caller.display_name,
        "policies": list(identity.policies),
        "token_policies": list(identity.policies),
        "metadata": dict(caller.metadata),
        "entity_id": caller.entity_id,
    }
    if entry is not None:
        fields |= {
            "remaining_uses": entry.num_uses,
            "token_type": entry.type,
            "token_ttl": entry.ttl_s,
            "token_issue_time": _issued(entry.created_s),
        }
    return fields


@functools.lru_cache(maxsize=1024)
def _issued(created_s: int) -> str:
    return format_time(created_s)


def _policy_results(call: Call, identity: Identity) -> dict[str, Any]:
    """Whether the caller's policies allow the call, and which of them; nothing where they were not asked."""
    if call.allowed is None:
        return {}
    if not call.allowed:
        return {"policy_results": {"allowed": False}}
    granting = identity.acl.granting(call.path, call.operation)
    named = [{"name": name, "namespace_id": "root", "type": "acl"} for name in granting]
    return {"policy_results": {"allowed": True, "granting_policies": named}}


def _loaded(body: bytes) -> Any:
    """Raises ValueError."""
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:  # there are numbers that only the slower decoder can read
        return json.loads(body)


async def _shown(response: HttpResponse) -> tuple[dict[str, Any], int, str]:
    """The members of a response entry, the status where it is an error's (else 200), and the error's text."""
    if not response.body.strip():
        return {}, 200 if response.status < 400 else response.status, ""
    large = len(response.body) >= _THREAD_BYTES_MIN
    try:
        body = await asyncio.to_thread(_loaded, response.body) if large else _loaded(response.body)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raw = {"http_raw_body": response.body.decode("utf-8", "replace")}
        return {"data": raw}, 200 if response.status < 400 else response.status, ""
    if response.status >= 400 and "request_id" not in body:
        texts = [str(text) for text in body.pop("errors", None) or ()]
        # Nothing at a path is an answer, not a refusal.
        status = 200 if response.status == 404 and not texts else response.status
        return {"data": body}, status, "\n".join(texts)
    if "request_id" not in body:
        return {"data": body}, 200, ""
    shown = {"data": body.get("data"), "warnings": body.get("warnings"), "wrap_info": body.get("wrap_info")}
    if body.get("lease_id"):
        shown["secret"] = {"lease_id": body["lease_id"]}
    auth = body.get("auth")
    if auth:
        shown["auth"] = {
            **{name: auth.get(name) for name in _AUTH_MEMBERS},
            "token_ttl": auth.get("lease_duration"),
        }
    return shown, 200, ""


_AUTH_MEMBERS = (
    "client_token",
    "accessor",
    "display_name",
    "policies",
    "token_policies",
    "identity_policies",
    "metadata",
    "num_uses",
    "entity_id",
    "token_type",
)
