"""A request's way from a performance secondary to its primary, and the answer's way back. Pure.

The answer to a forwarded write is held until this cluster has applied it, so that the client reads its own write here;
if that takes too long the answer goes out with a warning instead of an error, because the write *did* succeed.
"""

from __future__ import annotations

import json
import uuid

from multidict import CIMultiDict

from sidecar.replication.wiring import AuthLike, ForwardAnswer
from sidecar.transport.forwarding import (
    ForwardedIdentity,
    ForwardRequest,
    ForwardResponse,
    RequestLike,
    forwarded,
    travelling,
)
from sidecar.transport.trail import UPWARD, extend, trail_of

STALL_WARNING = (
    "Timeout hit while waiting for local replicated cluster to apply primary's write; this client may encounter stale "
    "reads of values written during this operation."
)


def upward_request(request: RequestLike, auth: AuthLike, cluster_id: str) -> ForwardRequest:
    """``request`` as it goes up from ``cluster_id``. Raises LoopRefused."""
    identity = ForwardedIdentity(
        policies=tuple(auth.policies),
        display_name=auth.display_name,
        accessor=auth.accessor,
        entity_id=auth.entity_id,
        metadata=dict(auth.metadata),
        cluster_id=auth.cluster_id or cluster_id,
    )
    return forwarded(request, extend(trail_of(request.trail), cluster_id, UPWARD), identity)


def answer_of(response: ForwardResponse, *, late: bool) -> ForwardAnswer:
    """The client's answer; ``late`` adds the contract's warning to a successful one."""
    headers = CIMultiDict(travelling(response.headers))
    position = response.position.index if response.position is not None else 0
    answer = ForwardAnswer(response.status, headers, response.body, position)
    return with_warning(answer, STALL_WARNING) if late and 200 <= response.status < 300 else answer


def with_warning(answer: ForwardAnswer, warning: str) -> ForwardAnswer:
    """The same answer with one more entry in ``warnings``. An empty one (204) becomes an envelope, since a warning
    needs a body; a body that is no JSON object passes unchanged."""
    if not answer.body:
        envelope: object = {
            "request_id": str(uuid.uuid4()),
            "lease_id": "",
            "renewable": False,
            "lease_duration": 0,
            "data": None,
            "wrap_info": None,
            "warnings": None,
            "auth": None,
        }
    else:
        try:
            envelope = json.loads(answer.body)
        except (ValueError, RecursionError):
            return answer
    if not isinstance(envelope, dict):
        return answer
    envelope["warnings"] = [*(envelope.get("warnings") or []), warning]
    headers = CIMultiDict(answer.headers)
    headers["Content-Type"] = "application/json"
    status = 200 if answer.status == 204 else answer.status
    return ForwardAnswer(status, headers, json.dumps(envelope).encode() + b"\n", answer.position)
