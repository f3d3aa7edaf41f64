"""Under which names a request is measured."""

from __future__ import annotations

import functools

from sidecar.core.metrics import METRICS, LabelledCounter


@functools.lru_cache(maxsize=64)
def answers(status: int) -> LabelledCounter:
    """What counts the answers with this status."""
    return METRICS.counter("core.response_status_code", code=str(status), type=f"{status // 100}xx")


def timed_as(path: str) -> str:
    """The name of the time that a request for ``path`` takes. Logins have one of their own: what they cost is meant to
    be much."""
    is_login = path.startswith("auth/") and ("/login/" in path or path.endswith("/login"))
    return "core.handle_login_request" if is_login else "core.handle_request"
