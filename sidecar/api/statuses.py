"""Which status and texts an error becomes (contract 5.4). Pure; one table for every endpoint.

An error that is not in the table is a defect of ours: 500 ``internal error``, with nothing of it in the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from consul_backend import errors as backend
from plugin_api.errors import PermissionDenied, PluginError, UnsupportedOperation, UnsupportedPath
from sidecar.api.envelopes import multi_error
from sidecar.api.json_codec import JSONRefused
from sidecar.core.barrier import DecryptionFailed
from sidecar.request.errors import JoinedError, TokenRefused

OUTCOME_UNKNOWN = (
    "the outcome of this request is not known: it may or may not have been applied; read before repeating it"
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the client sees. ``expected`` is False for defects, which are logged with their trace."""

    status: int
    texts: tuple[str, ...]
    expected: bool = True


_BACKEND: tuple[tuple[type[BaseException], Refusal], ...] = (
    (backend.Overloaded, Refusal(503, ("the server is overloaded and did not apply this request; try again",))),
    (backend.NotApplied, Refusal(503, ("this request was not applied: the node gave up leadership; try again",))),
    (backend.FenceLost, Refusal(503, ("this node is no longer active; nothing was applied; try again",))),
    (backend.OutcomeUnknown, Refusal(500, (OUTCOME_UNKNOWN,))),
    (backend.PermissionDenied, Refusal(500, ("the storage refused this server's own credentials",))),
    (backend.StoreWentBack, Refusal(503, ("the storage was changed underneath this server; an operator must decide",))),
    (backend.SentinelMissing, Refusal(503, ("the storage cannot be read with this server's credentials",))),
    (backend.Corrupt, Refusal(500, ("stored data failed its integrity check",))),
    (DecryptionFailed, Refusal(500, ("stored data failed its integrity check",))),
    (backend.Unavailable, Refusal(503, ("the storage is not available; try again",))),
)


def refusal(error: BaseException) -> Refusal:
    """The answer to ``error``."""
    if isinstance(error, PluginError):
        return Refusal(error.status, (_text(error),))
    if isinstance(error, JSONRefused):
        return Refusal(400, (str(error),))
    if isinstance(error, backend.TooLarge):
        # Sizes and limits only: the backend's own rule for its messages.
        return Refusal(413, (str(error),))
    for kind, answer in _BACKEND:
        if isinstance(error, kind):
            return answer
    return Refusal(500, ("internal error",), expected=False)


def _text(error: PluginError) -> str:
    text = str(error)
    if isinstance(error, TokenRefused):
        return text
    if isinstance(error, UnsupportedPath | UnsupportedOperation | JoinedError):
        return multi_error(text)
    if isinstance(error, PermissionDenied) and text == "permission denied":
        return multi_error(text)
    return text
