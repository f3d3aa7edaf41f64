"""Settings that operators change while the server runs: CORS, audited request headers, headers of the web UI.

All are replicated. Each is one entry, read at the start of a tenure and kept in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import msgspec

from plugin_api.errors import InvalidRequest, ReadOnlyStorage
from sidecar.core.keys import AUDITED_HEADERS, CORS, UI_HEADERS
from sidecar.core.store_view import SealedStore

CORS_METHODS = ("DELETE", "GET", "LIST", "OPTIONS", "PATCH", "POST", "PUT")
CORS_HEADERS = (
    "Authorization",
    "Content-Type",
    "X-Requested-With",
    "X-Vault-MFA",
    "X-Vault-No-Request-Forwarding",
    "X-Vault-Policy-Override",
    "X-Vault-Token",
    "X-Vault-Wrap-Format",
    "X-Vault-Wrap-TTL",
)
"""Request headers that a browser may always send."""
CORS_MAX_AGE_S = 300
_T = TypeVar("_T")
NAMES_MAX = 128
"""Of audited headers and of UI headers."""


class Cors(msgspec.Struct, frozen=True):
    """Which pages of other origins may call this API from a browser; an origin ``*`` means every one."""

    enabled: bool = False
    origins: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()

    def allows(self, origin: str) -> bool:
        """Whether a page of ``origin`` may."""
        return self.enabled and ("*" in self.origins or origin in self.origins)


def checked_cors(origins: Sequence[str], headers: Sequence[str]) -> Cors:
    """An enabled setting. Raises InvalidRequest."""
    if not origins:
        raise InvalidRequest("at least one origin or the wildcard must be provided")
    if "*" in origins and len(origins) > 1:
        raise InvalidRequest("to allow all origins the '*' must be the only value for allowed_origins")
    for text in (*origins, *headers):
        if not text.isascii() or not text.isprintable() or " " in text:
            raise InvalidRequest("origins and header names are printable ASCII without blanks")
    known = {name.lower() for name in CORS_HEADERS}
    return Cors(True, tuple(origins), CORS_HEADERS + tuple(name for name in headers if name.lower() not in known))


def checked_header_name(name: str) -> str:
    """``name`` as headers are compared. Raises InvalidRequest."""
    lowered = name.lower()
    if not lowered or len(lowered) > NAMES_MAX or not all(char.isalnum() or char in "-_" for char in lowered):
        raise InvalidRequest("a header name holds letters, digits, '-' and '_'")
    if not lowered.isascii():
        raise InvalidRequest("a header name is ASCII")
    return lowered


class NodeSettings:
    """The settings of one tenure. ``audited_headers``: lower-case name → whether values are hashed. ``ui_headers``:
    name → values."""

    def __init__(self, sealed: SealedStore, writable: Callable[[], bool]) -> None:
        self._sealed = sealed
        self._writable = writable
        self.cors = Cors()
        self.audited_headers: dict[str, bool] = {}
        self.ui_headers: dict[str, list[str]] = {}

    async def load(self) -> None:
        """Read all. Raises what the store raises."""
        cors, audited, ui = [await self._sealed.get(key) for key in (CORS, AUDITED_HEADERS, UI_HEADERS)]
        self.cors = msgspec.json.decode(cors, type=Cors) if cors else Cors()
        self.audited_headers = msgspec.json.decode(audited, type=dict[str, bool]) if audited else {}
        self.ui_headers = msgspec.json.decode(ui, type=dict[str, list[str]]) if ui else {}

    async def invalidate(self, keys: Iterable[str]) -> None:
        """Replication changed these logical keys."""
        if not {CORS, AUDITED_HEADERS, UI_HEADERS}.isdisjoint(keys):
            await self.load()

    async def set_cors(self, cors: Cors) -> None:
        """Raises ReadOnlyStorage."""
        await self._store(CORS, cors)
        self.cors = cors

    async def set_audited_header(self, name: str, *, hashed: bool | None) -> None:
        """``hashed`` None: no longer in the audit log. Raises InvalidRequest, ReadOnlyStorage."""
        changed = _with(self.audited_headers, checked_header_name(name), hashed)
        await self._store(AUDITED_HEADERS, changed)
        self.audited_headers = changed

    async def set_ui_header(self, name: str, values: Sequence[str] | None) -> None:
        """``values`` None removes the header. Raises InvalidRequest, ReadOnlyStorage."""
        checked = checked_header_name(name)
        if checked.startswith("x-vault-"):
            raise InvalidRequest("X-Vault headers cannot be set")
        if values is not None and not all(value.isascii() and value.isprintable() for value in values):
            raise InvalidRequest("a header's value is printable ASCII")
        changed = _with(self.ui_headers, checked, None if values is None else list(values))
        await self._store(UI_HEADERS, changed)
        self.ui_headers = changed

    async def _store(self, key: str, value: object) -> None:
        if not self._writable():
            raise ReadOnlyStorage
        await self._sealed.put(key, msgspec.json.encode(value))


def _with(old: Mapping[str, _T], name: str, value: _T | None) -> dict[str, _T]:
    changed = {known: kept for known, kept in old.items() if known != name}
    if value is not None:
        changed[name] = value
    if len(changed) > NAMES_MAX:
        raise InvalidRequest(f"no more than {NAMES_MAX} headers can be set")
    return changed
