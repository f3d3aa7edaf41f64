"""The service of a DR secondary's active node: it answers what leads out of that role, and refuses everything else.

The store mirrors the primary's: its tokens, mounts and leases are there and must not be touched, so none of the parts
that serve clients is made. Who may do something holds a DR operation token, or enough key shares. Nothing is forwarded
to the primary. Audit devices are the primary's too and are not opened before promotion; what is done here is logged.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence

from plugin_api.errors import InvalidRequest
from plugin_api.request import Operation
from sidecar.api import envelopes, json_codec
from sidecar.api.decoding import decode
from sidecar.api.node_view import NodeView
from sidecar.api.replication_api import ReplicationAPI
from sidecar.api.statuses import refusal
from sidecar.api.sys_core import Handler, Params, Route
from sidecar.api.sys_replication import (
    accept_deletions,
    answer_of,
    lost_entries,
    lost_writes_routes,
    mode_of,
    promote,
    reindex,
    update_primary,
)
from sidecar.api.token_generation import TokenGeneration
from sidecar.core.barrier import Barrier
from sidecar.core.cluster import ClusterInfo
from sidecar.core.keys import LOCAL_KEYRING, REPLICATED_KEYRING
from sidecar.core.metrics import METRICS
from sidecar.core.node_settings import Cors
from sidecar.core.operation_tokens import OperationTokens
from sidecar.core.policies import PolicyStore
from sidecar.core.store_view import LogicalStore, SealedStore
from sidecar.core.token_entry import TokenEntry
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.pipeline import address_allowed
from sidecar.request.types import HttpRequest, HttpResponse

log = logging.getLogger("core")

PATH_DISABLED = "path disabled in replication DR secondary mode"
DR = "dr"
GENERATION = "replication/dr/secondary/generate-operation-token"
TOKEN_FIELD = "dr_operation_token"  # noqa: S105 - a name, not a secret

Action = Callable[[Fields], Awaitable[Answer | None]]


class MirrorService:
    """Made after recovery, thrown away at step-down, like the service of a cluster that serves."""

    def __init__(
        self,
        store: LogicalStore,
        barrier: Barrier,
        cluster: ClusterInfo,
        *,
        node: NodeView,
        replication: ReplicationAPI,
        now: Callable[[], float] = time.time,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.cluster = cluster
        self._node = node
        self._replication = replication
        self._sealed = SealedStore(store, barrier)
        self._policies = PolicyStore(self._sealed, lambda: False)
        self._tokens = OperationTokens(self._sealed, self._policies, now, random_bytes)
        self._routes = self._table(
            TokenGeneration(GENERATION, self._sealed, random_bytes, self._tokens.issue, is_root=False, now=now)
        )

    @property
    def cors(self) -> Cors:
        """No page of another origin: clients have no business here."""
        return Cors()

    def _table(self, generation: TokenGeneration) -> list[Route]:
        read, update = Operation.READ, Operation.UPDATE
        base = "replication/dr/secondary"
        actions: dict[str, Action] = {
            "promote": lambda fields: promote(self._replication, DR, fields),
            "disable": lambda fields: self._disable(),
            "update-primary": lambda fields: update_primary(self._replication, DR, fields),
            "generate-public-key": lambda fields: self._public_key(),
            "recover": lambda fields: self._recover(),
            "reindex": lambda fields: reindex(self._replication, fields),
            "merkle-check": lambda fields: self._merkle_check(),
            "accept-deletions": lambda fields: accept_deletions(self._replication, DR, fields),
        }
        rows = [
            Route("replication/status", {read: self._both}),
            Route("replication/{mode}/status", {read: self._one}),
            Route(f"{base}/promote", {read: self._promotion, update: self._by_token(actions["promote"])}),
            *(
                Route(f"{base}/{name}", {update: self._by_token(action)})
                for name, action in actions.items()
                if name != "promote"
            ),
            Route(f"{base}/operation-token/delete", {update: self._delete_token}),
            Route("seal", {update: self._by_token(lambda fields: self._seal())}),
        ]
        lost = lost_writes_routes(
            self._checked(lambda call, params: self._lost_writes(params)),
            self._checked(lambda call, params: lost_entries(self._replication, call, params, values=False)),
            self._checked(lambda call, params: lost_entries(self._replication, call, params, values=True)),
            self._checked(lambda call, params: self._lost_delete(params)),
        )
        return rows + generation.routes() + lost

    async def start(self) -> None:
        """Nothing is loaded: what is stored is the primary's."""

    async def run(self) -> None:
        """Nothing is expired, rotated or collected: that is the primary's work. Until cancelled."""
        await asyncio.get_running_loop().create_future()

    def gauges(self) -> dict[str, float]:
        """Nothing of its own."""
        return {}

    def audit_blocked(self) -> bool:
        """Never: no audit device is open."""
        return False

    def reopen_audit(self) -> None:
        """Nothing is open."""

    async def invalidate(self, keys: Sequence[str]) -> None:
        """Replication changed these logical keys. Raises WrongKey where a keyring is now another root key's."""
        for key, storage_class in ((REPLICATED_KEYRING, "r"), (LOCAL_KEYRING, "l")):
            if key in keys and (raw := await self._sealed.get_raw(key)) is not None:
                self._sealed.barrier.load_ring(storage_class, raw)
        self._policies.invalidate_keys(keys)

    async def handle(self, request: HttpRequest) -> HttpResponse:
        """Answer one request; errors are answers too."""
        request_id = str(uuid.uuid4())
        with METRICS.timer("core.handle_request"):
            response = await self._handled(request, request_id)
        METRICS.increment("core.response_status_code", code=str(response.status), type=f"{response.status // 100}xx")
        return response

    async def _handled(self, request: HttpRequest, request_id: str) -> HttpResponse:
        try:
            call = await decode(request, request_id)
            answer = await self._answer(call)
        except Exception as error:  # the edge: every error becomes an answer, and a defect is logged with its trace
            refused = refusal(error)
            if not refused.expected:
                log.exception("request failed: request_id=%s", request_id)
            return _json(refused.status, envelopes.errors(refused.texts))
        if answer is None or (answer.raw is None and answer.is_empty):
            return HttpResponse(204)
        if answer.raw is not None:
            return _json(answer.status, answer.raw)
        envelope = envelopes.success(
            call.id, answer.data, warnings=answer.warnings, mount_type="system", path=call.path
        )
        return _json(answer.status, envelope)

    async def _answer(self, call: Call) -> Answer | None:
        if call.forwarded_auth is None and call.path.startswith("sys/") and not call.wants_help:
            rest = call.path.removeprefix("sys/").rstrip("/")
            operation = Operation.UPDATE if call.operation is Operation.CREATE else call.operation
            for route in self._routes:
                match = route.regex.fullmatch(rest)
                handler = route.handlers.get(operation) if match is not None else None
                if match is not None and handler is not None:
                    return await handler(call, match.groupdict())
        raise InvalidRequest(PATH_DISABLED)

    # ---- who may

    def _by_token(self, action: Action) -> Handler:
        return self._checked(lambda call, params: action(Fields(call.data)))

    def _checked(self, handler: Callable[[Call, Params], Awaitable[Answer | None]]) -> Handler:
        """``handler`` for those who hold a DR operation token, in the body or where tokens usually are."""

        async def handle(call: Call, params: Params) -> Answer | None:
            token = Fields(call.data).string(TOKEN_FIELD) or call.token

            def allowed_from(entry: TokenEntry) -> bool:
                return address_allowed(entry.bound_cidrs, call.remote_address)

            await self._tokens.check(token, call.path, call.data, allowed_from)
            log.warning("DR operation: %s by %s", call.path, call.remote_address)
            return await handler(call, params)

        return handle

    async def _delete_token(self, call: Call, params: Params) -> None:
        await self._tokens.delete(Fields(call.data).string(TOKEN_FIELD))

    # ---- what

    async def _both(self, call: Call, params: Params) -> Answer:
        return Answer(await self._replication.status(None))

    async def _one(self, call: Call, params: Params) -> Answer:
        return Answer(await self._replication.status(mode_of(params)))

    async def _promotion(self, call: Call, params: Params) -> Answer:
        """What the web UI asks for: promotions once took key shares, and had progress."""
        return Answer({"progress": 0, "required": 1, "complete": False})

    async def _disable(self) -> Answer:
        return answer_of(await self._replication.secondary_disable(DR))

    async def _public_key(self) -> Answer:
        return answer_of(await self._replication.secondary_public_key(DR))

    async def _recover(self) -> Answer:
        return answer_of(await self._replication.recover())

    async def _merkle_check(self) -> Answer:
        return answer_of(await self._replication.merkle_check())

    async def _seal(self) -> None:
        await self._node.seal()

    async def _lost_writes(self, params: Params) -> Answer:
        return answer_of(await self._replication.lost_writes(mode_of(params)))

    async def _lost_delete(self, params: Params) -> None:
        await self._replication.lost_writes_delete(mode_of(params), params["id"])


def _json(status: int, body: dict[str, object]) -> HttpResponse:
    return HttpResponse(status, body=json_codec.encode(body))
