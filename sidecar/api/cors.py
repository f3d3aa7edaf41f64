"""Cross-origin requests of browsers: who is refused, what a preflight and the answers carry. Pure."""

from __future__ import annotations

from sidecar.core.node_settings import CORS_MAX_AGE_S, CORS_METHODS, Cors
from sidecar.request.types import HttpRequest


def is_preflight(request: HttpRequest) -> bool:
    """Whether a browser asks what it may send."""
    return request.method == "OPTIONS"


def concerns(cors: Cors, request: HttpRequest) -> bool:
    """Whether there is anything to look at. What a secondary forwards it has looked at itself."""
    return (cors.enabled or is_preflight(request)) and request.forwarded_auth is None


def refusal(cors: Cors, request: HttpRequest) -> tuple[int, str] | None:
    """(status, text) for a request that must not be run, or None. Requests without an origin come from no page."""
    origin = request.headers.get("Origin", "")
    if is_preflight(request) and not (cors.enabled and origin):
        return 405, ""
    if not cors.enabled or not origin:
        return None
    if not cors.allows(origin):
        return 403, "origin not allowed"
    wanted = request.headers.get("Access-Control-Request-Method", "")
    if is_preflight(request) and wanted not in CORS_METHODS:
        return 405, "method not allowed"
    return None


def headers(cors: Cors, request: HttpRequest) -> dict[str, str]:
    """What the answer to an admitted request carries for the browser; empty where none asked."""
    origin = request.headers.get("Origin", "")
    if not origin or not cors.allows(origin):
        return {}
    # One origin, never "*": an answer that a token paid for must not be readable from a cache by another page.
    found = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
    if is_preflight(request):
        found |= {
            "Access-Control-Allow-Methods": ",".join(CORS_METHODS),
            "Access-Control-Allow-Headers": ",".join(cors.headers),
            "Access-Control-Max-Age": str(CORS_MAX_AGE_S),
        }
    return found
