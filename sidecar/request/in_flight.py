"""The requests that run at this moment on the active node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

    @contextmanager
    def holding(self, request_id: str, request: RequestUnderWay) -> Iterator[None]:
        """Count the request in for as long as the block runs."""
        self._requests[request_id] = request
        try:
            yield
        finally:
            del self._requests[request_id]

    def requests(self) -> dict[str, RequestUnderWay]:
        """Those of this moment."""
        return dict(self._requests)
