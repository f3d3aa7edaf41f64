"""A request's way from a performance secondary to its primary, and the answer's way back. Pure.

The answer to a forwarded write is held until this cluster has applied it, so that the client reads its own write here;
if that takes too long the answer goes out with a warning instead of an error, because the write *did* succeed.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable

from multidict import CIMultiDict

from sidecar.replication.wiring import AuthLike, ForwardAnswer, RequestLike
from sidecar.transport.forwarding import ForwardedIdentity, ForwardRequest, ForwardResponse, header_pairs
from sidecar.transport.trail import UPWARD, extend, trail_of

STALL_WARNING = (
    "Timeout hit while waiting for local replicated cluster to apply primary's write; this client may encounter stale "
    "reads of values written during this operation."
)

HOP_BY_HOP = frozenset(
    {
        "connection",
        "content-length",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that belong to one connection; everything else travels."""


def travelling(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The headers that go over a hop."""
    return header_pairs((name, value) for name, value in headers if name.lower() not in HOP_BY_HOP)


def upward_request(request: RequestLike, auth: AuthLike, cluster_id: str) -> ForwardRequest:
    """``request`` as it goes up from ``cluster_id``. Raises LoopRefused."""
    return ForwardRequest(
        method=request.method,
        path=request.path,
        query={name: list(values) for name, values in request.query.items()},
        headers=travelling(request.headers.items()),
        body=request.body,
        remote_address=request.remote_address,
        trail=extend(trail_of(request.trail), cluster_id, UPWARD),
        raw_target=request.raw_target,
        auth=ForwardedIdentity(
            policies=tuple(auth.policies),
            display_name=auth.display_name,
            accessor=auth.accessor,
            entity_id=auth.entity_id,
            metadata=dict(auth.metadata),
            cluster_id=auth.cluster_id or cluster_id,
        ),
    )


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
