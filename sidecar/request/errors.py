"""Refusals of the request pipeline itself, apart from what engines raise."""

from __future__ import annotations

from plugin_api.errors import InvalidRequest, PermissionDenied, PluginError


class TokenRefused(PermissionDenied):
    """No token, or none that counts. Its text stands alone, where a policy's refusal is one of several errors."""


class JoinedError(InvalidRequest):
    """A 400 whose text clients know in the shape of joined errors."""


class UnknownMount(PluginError):
    """404: no mount serves the path."""

    status = 404

    def __init__(self, path: str) -> None:
        super().__init__(f'no handler for route "{path}". route entry not found.')


class LoginNeedsPrimary(PluginError):
    """A login wanted to write replicated storage on a performance secondary: a token made by the primary would be
    worth nothing here, so the request is not forwarded."""

    status = 400

    def __init__(self) -> None:
        super().__init__("cannot write to readonly storage")


class StateMissing(PluginError):
    """412: what the session has seen (``X-Vault-Index``) is not here yet; the same request may succeed later."""

    status = 412

    def __init__(self) -> None:
        super().__init__("required index state not present")
