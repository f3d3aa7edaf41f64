"""The requests that run at this moment on the active node."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestUnderWay:
    """One of them; ``started_s`` is unix seconds."""

    method: str
    path: str
    remote_address: str
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

    def requests(self) -> dict[str, RequestUnderWay]:
        """Those of this moment."""
        return dict(self._requests)
