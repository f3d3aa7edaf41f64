"""What the ``sys/replication`` endpoints need of replication. Implemented by ``sidecar.replication.manager``, by shape:
that package imports nothing from here.

``mode`` is ``"performance"`` or ``"dr"``. Refusals are plugin_api errors with the contract's texts; warnings travel in
the returned :class:`~plugin_api.request.Response`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from plugin_api.request import Response
from sidecar.request.types import Upstream


class FiltersAPI(Protocol):
    """Paths filters of performance replication, and mounts whose data is not here (contract 1.15)."""

    def hidden(self, mount_uuid: str) -> bool:
        """Whether a filter withholds a replicated mount from this cluster."""

    def not_held(self, mount_uuid: str) -> bool:
        """Whether a replicated mount's data is not here."""

    async def set(self, secondary_id: str, mode: str, paths: Sequence[str]) -> None:
        """Set the filter of a secondary."""

    async def delete(self, secondary_id: str) -> None:
        """Remove it, if there is one."""

    def get(self, secondary_id: str) -> dict[str, Any]:
        """Mode and paths. Raises NotFound."""

    def dynamic(self, kind: str, secondary_id: str) -> dict[str, Any]:
        """The mounts a filter withholds now, as the ``primary`` or the ``secondary`` sees it."""

    def lacking(self) -> dict[str, Any]:
        """The mounts that are not held."""

    async def accept_empty(self, paths: Sequence[str]) -> None:
        """Take mounts that are not held as empty."""

    async def mount_moved(self, source: str, target: str, move: Callable[[], Awaitable[None]]) -> None:
        """Move a mount under the filters that name it."""

    async def mount_removed(self, path: str) -> None:
        """A mount was removed."""


class FoundState(Protocol):
    """Whether all that a session has seen is here. ``missing``: not yet; ``upstream``: what is missing is on the
    replication primary."""

    @property
    def missing(self) -> bool: ...

    @property
    def upstream(self) -> bool: ...

    @property
    def warnings(self) -> Sequence[str]: ...


class SessionsAPI(Protocol):
    """``X-Vault-Index`` (contract 5.2)."""

    async def require(self, headers: Sequence[str]) -> FoundState:
        """Wait, bounded, until everything that ``headers`` name is here. Raises InvalidRequest."""

    def after(self, *, written: int, answered: str, asked: bool) -> str:
        """The header of an answer; empty where it has none. ``written``: the newest record committed here, 0 for none;
        ``answered``: the header of the primary's answer; ``asked``: also without a write."""


class ReplicationAPI(Upstream, Protocol):
    """Roles and status of this cluster; the calls run on the active node."""

    @property
    def filters(self) -> FiltersAPI:
        """Paths filters."""

    @property
    def sessions(self) -> SessionsAPI:
        """What clients' sessions have seen."""

    async def status(self, mode: str | None) -> dict[str, Any]:
        """The ``data`` of one mode, or ``{"dr": …, "performance": …}`` for None (contract 1.2)."""

    async def lacking_record(self, index: int) -> list[str]:
        """The known secondaries, as mode and id, that do not have record ``index`` of this primary's log. Those that
        are connected are waited for, briefly."""

    def require_steady(self) -> None:
        """Raises Unavailable while a committed change of role waits for the next tenure."""

    async def primary_enable(self, mode: str, primary_cluster_addr: str) -> Response:
        """Become a primary (contract 1.3)."""

    async def primary_disable(self, mode: str) -> Response:
        """Stop being a primary (contract 1.5)."""

    async def secondary_token(
        self,
        mode: str,
        id: str,  # noqa: A002 - the API's own name
        ttl_s: int,
        public_key: str,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The activation bundle for a new secondary: (payload to wrap, extra JWT claims such as ``ca_sha256``). The
        payload holds a private key and is never logged. With a public key the payload is ``token``, encrypted to it."""

    async def revoke_secondary(self, mode: str, id: str) -> None:  # noqa: A002 - the API's own name
        """Cut a secondary off for good (contract 1.7)."""

    async def merkle_check(self) -> Response:
        """Compare the index with everything stored (contract 1.14); runs in primaries, secondaries and clusters of
        their own."""

    async def reindex(self, diff: bool, force: bool, skip_flush: bool, deletions: int) -> Response:
        """Start a reindex in the background (contract 1.13). ``deletions``: how many entries ``force`` may give up,
        beyond what it may unasked."""

    async def recover(self, *, force: bool = False) -> Response:
        """Try to leave an adverse state (contract 1.13). With ``force`` a primary whose secondaries deny its log goes
        on with its store as it is."""

    async def secondary_enable(
        self, mode: str, token: str, primary_api_addr: str, ca_file: str, ca_path: str
    ) -> Response:
        """Become a secondary of the token's issuer; wipes this cluster (contract 1.9)."""

    async def secondary_preflight(
        self, mode: str, token: str, primary_api_addr: str, ca_file: str, ca_path: str
    ) -> Response:
        """Check whether :meth:`secondary_enable` would work; the token stays unused."""

    async def secondary_public_key(self, mode: str) -> Response:
        """A fresh key that an activation token can be encrypted to (contract 1.8)."""

    async def rotate_authority(self, mode: str, overlap_s: float, *, force: bool) -> Response:
        """Replace a primary's certificate authority, with overlap; ``force`` ends the overlap."""

    async def secondary_disable(self, mode: str) -> Response:
        """Stop being a secondary; the data stays (contract 1.11)."""

    async def primary_demote(self, mode: str) -> Response:
        """Become a secondary that follows nobody yet (contract 1.4)."""

    async def secondary_promote(self, mode: str, primary_cluster_addr: str, *, force: bool, preview: bool) -> Response:
        """Become the set's primary (contract 1.10); with ``preview`` say only what may be lost."""

    async def secondary_update_primary(
        self,
        mode: str,
        token: str,
        *,
        primary_api_addr: str = "",
        ca_file: str = "",
        ca_path: str = "",
        addresses: Sequence[str] = (),
    ) -> Response:
        """Follow another primary of the set; nothing is wiped (contract 1.12)."""

    async def accept_deletions(self, mode: str, deletions: int) -> Response:
        """Let a secondary's comparison with its primary delete so many entries, which the brake stopped."""

    async def lost_writes(self, mode: str) -> Response:
        """What this cluster held that its new primary never had: counts and ranges of each record."""

    async def lost_writes_read(self, mode: str, name: str, page: str, *, values: bool) -> Response:
        """One page of such a record: keys, with ``values`` also what they held."""

    async def lost_writes_delete(self, mode: str, name: str) -> None:
        """Forget such a record."""
