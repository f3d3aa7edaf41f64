"""The requests that run at this moment."""

from __future__ import annotations

from typing import Any

import msgspec

from plugin_api.formats import format_time


class RequestUnderWay(msgspec.Struct, frozen=True):
    """One of them; ``started_s`` is unix seconds."""

    method: str
    path: str
    remote: str
    started_s: float


class InFlight:
    """Requests by id."""

    def __init__(self) -> None:
        self._requests: dict[str, RequestUnderWay] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def begin(self, request_id: str, request: RequestUnderWay) -> None:
        """Count the request in."""
        self._requests[request_id] = request

    def end(self, request_id: str) -> None:
        """It is answered."""
        del self._requests[request_id]

    def shown(self, now_s: float) -> dict[str, dict[str, Any]]:
        """Those of this moment as ``sys/in-flight-req`` answers them; ``now_s`` is unix seconds."""
        return {
            request_id: {
                "start_time": format_time(request.started_s),
                "client_remote_address": request.remote,
                "request_path": f"/v1/{request.path}",
                "request_method": request.method,
                "client_id": "",
                "duration": f"{max(int((now_s - request.started_s) * 1e6), 0)} microseconds",
            }
            for request_id, request in self._requests.items()
        }

    def requests(self) -> dict[str, RequestUnderWay]:
        """Those of this moment."""
        return dict(self._requests)
