"""Errors an engine raises; each carries the HTTP status the client sees. Messages must never hold secrets."""

from __future__ import annotations


class PluginError(Exception):
    """Root of the errors that become an answer to the client."""

    status = 500


class InvalidRequest(PluginError):
    """400: the client's input is wrong."""

    status = 400


class Failed(PluginError):
    """500, as a multi-error: the request is well formed and cannot be done as things stand. What Vault's own engines
    answer where a client's mistake is found below the handler; new engines have :class:`InvalidRequest` for that."""


class InvalidCredentials(InvalidRequest):
    """400: what a login gave does not prove who it says it is. Raised by ``handle`` of a login only; the sidecar counts
    it against the identity (:meth:`~plugin_api.engine.Engine.login_identity`) and locks that out after some."""


class Irrevocable(PluginError):
    """Raised by ``revoke``: trying again has no use. The sidecar keeps the lease and shows it to operators."""


class PermissionDenied(PluginError):
    """403."""

    status = 403

    def __init__(self, message: str = "permission denied") -> None:
        super().__init__(message)


class NotFound(PluginError):
    """404; without a message the body is ``{"errors":[]}``."""

    status = 404


class UnsupportedPath(PluginError):
    """404 ``unsupported path`` (as a multi-error)."""

    status = 404

    def __init__(self) -> None:
        super().__init__("unsupported path")


class UnsupportedOperation(PluginError):
    """405 ``unsupported operation`` (as a multi-error)."""

    status = 405

    def __init__(self) -> None:
        super().__init__("unsupported operation")


class ReadOnlyStorage(PluginError):
    """This cluster may not write replicated storage. The sidecar forwards the whole request to the primary; so an
    engine must write storage before any effect that could not be repeated."""

    def __init__(self) -> None:
        super().__init__("cannot write to readonly storage")


class Unavailable(PluginError):
    """503: try again later."""

    status = 503
