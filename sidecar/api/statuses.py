"""Which status and texts an error becomes (contract 5.4). Pure; one table for every endpoint.

An error that is not in the table is a defect of ours: 500 ``internal error``, with nothing of it in the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from multidict import CIMultiDict

from consul_backend import errors as backend
from plugin_api.errors import Failed, PermissionDenied, PluginError, UnsupportedOperation, UnsupportedPath
from sidecar.api.envelopes import multi_error
from sidecar.api.json_codec import JSONRefused
from sidecar.core.barrier import DecryptionFailed
from sidecar.request.errors import JoinedError, TokenRefused

OUTCOME_UNKNOWN = (
    "the outcome of this request is not known: it may or may not have been applied; read before repeating it"
)


RETRY_AFTER_S = 1
"""An overload, a step-down or a lost leader of the store is over soon, or it is not over soon at all."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the client sees. ``expected`` is False for defects, which are logged with their trace. ``retry_after_s``
    goes out as Retry-After where the same request may succeed by then; 0 says nothing."""

    status: int
    texts: tuple[str, ...]
    expected: bool = True
    retry_after_s: int = 0

    def headers(self) -> CIMultiDict[str]:
        """What goes out besides status and texts."""
        return CIMultiDict({"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {})


def _again(text: str) -> Refusal:
    return Refusal(503, (text,), retry_after_s=RETRY_AFTER_S)


_BACKEND: tuple[tuple[type[BaseException], Refusal], ...] = (
    (backend.Overloaded, _again("the server is overloaded and did not apply this request; try again")),
    (backend.DeadlinePassed, _again("this request's time ran out while it waited; it was not applied; try again")),
    (backend.NotApplied, _again("this request was not applied: the node gave up leadership; try again")),
    (backend.FenceLost, _again("this node is no longer active; nothing was applied; try again")),
    (backend.OutcomeUnknown, Refusal(500, (OUTCOME_UNKNOWN,))),
    (backend.PermissionDenied, Refusal(500, ("the storage refused this server's own credentials",))),
    (backend.StoreWentBack, Refusal(503, ("the storage was changed underneath this server; an operator must decide",))),
    (backend.SentinelMissing, Refusal(503, ("the storage cannot be read with this server's credentials",))),
    (backend.Corrupt, Refusal(500, ("stored data failed its integrity check",))),
    (DecryptionFailed, Refusal(500, ("stored data failed its integrity check",))),
    (backend.Unavailable, _again("the storage is not available; try again")),
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
    if isinstance(error, UnsupportedPath | UnsupportedOperation | JoinedError | Failed):
        return multi_error(text)
    if isinstance(error, PermissionDenied) and text == "permission denied":
        return multi_error(text)
    return text
