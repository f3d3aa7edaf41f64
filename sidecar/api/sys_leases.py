"""``sys/leases/``, its older names, and ``sys/locked-users`` (contract 4.12; Vault's API documentation)."""

from __future__ import annotations

from typing import Any

from plugin_api.errors import InvalidRequest, NotFound
from plugin_api.formats import format_time
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.request.call import Answer, Call
from sidecar.request.fields import GO_BOOLEANS, Fields

LISTED_MAX = 10_000
TIDY_STARTED = (
    "Tidy operation successfully started. Any information from the operation will be printed to Vault's server logs."
)
TIDY_RUNNING = "Tidy operation already in progress."
_ROOT_NAMESPACE = {"namespace_id": "root", "namespace_path": ""}


class SysLeases:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore) -> None:
        self._core = core
        self._leases = core.leasing.leases
        self._revocation = core.leasing.revocation
        self._lockout = core.leasing.lockout

    def routes(self) -> list[Route]:
        """Rows of the table; a lease id in the URL has slashes, so those go last."""
        read, update, listing = Operation.READ, Operation.UPDATE, Operation.LIST
        rows = [
            Route("leases", {read: self._list_irrevocable}, sudo=True, help="Leases that could not be revoked."),
            Route("leases/count", {read: self._count}, help="How many leases could not be revoked."),
            Route("leases/lookup", {update: self._lookup, listing: self._list}, sudo_list=True),
            Route("leases/lookup/{prefix*}", {listing: self._list}, sudo=True, help="Lease ids below a prefix."),
            Route("leases/tidy", {update: self._tidy}, help="Look for leases whose token is gone."),
            Route("locked-users", {read: self._locked}, help="Users that are locked out."),
            Route("locked-users/{mount_accessor}/unlock/{alias_identifier*}", {update: self._unlock}),
        ]
        for folder in ("leases/", ""):
            rows += [
                Route(folder + "renew", {update: self._renew}, help="Let a secret live longer."),
                Route(folder + "renew/{lease_id*}", {update: self._renew}),
                Route(folder + "revoke", {update: self._revoke}, help="Revoke a lease."),
                Route(folder + "revoke/{lease_id*}", {update: self._revoke}),
                Route(folder + "revoke-prefix/{prefix*}", {update: self._revoke_prefix}, sudo=True),
                Route(folder + "revoke-force/{prefix*}", {update: self._revoke_force}, sudo=True),
            ]
        return rows

    # -- one lease

    async def _lookup(self, call: Call, params: Params) -> Answer:
        times = await self._leases.lookup(_lease_id(call, params))
        if times is None:
            raise InvalidRequest("invalid lease")
        now_s = int(self._core.now())
        return Answer(
            {
                "expire_time": format_time(times.expires_s),
                "id": times.id,
                "issue_time": format_time(times.issued_s),
                "last_renewal": format_time(times.last_renewal_s) if times.last_renewal_s else None,
                "renewable": times.renewable,
                "ttl": max(times.expires_s - now_s, 0),
            }
        )

    async def _renew(self, call: Call, params: Params) -> Answer:
        lease_id = _lease_id(call, params)
        granted = await self._leases.renew(lease_id, Fields(call.data).duration_s("increment"))
        entry = granted.entry
        return Answer(
            lease_id=entry.id,
            renewable=entry.renewable,
            lease_duration_s=entry.remaining_s(self._core.now()),
            warnings=list(granted.warnings),
        )

    async def _revoke(self, call: Call, params: Params) -> Answer | None:
        lease_id = _lease_id(call, params)
        sync = Fields(call.data).boolean("sync", default=True)
        await self._revocation.revoke(lease_id, sync=sync)
        return None if sync else Answer(status=202)

    # -- many

    async def _list(self, call: Call, params: Params) -> Answer:
        names = await self._leases.list(params.get("prefix", ""))
        return Answer({"keys": names}) if names else Answer(status=404)

    async def _revoke_prefix(self, call: Call, params: Params) -> Answer | None:
        sync = Fields(call.data).boolean("sync", default=True)
        await self._revocation.revoke_prefix(params["prefix"], sync=sync)
        return None if sync else Answer(status=202)

    async def _revoke_force(self, call: Call, params: Params) -> None:
        await self._revocation.revoke_prefix(params["prefix"], force=True)

    async def _tidy(self, call: Call, params: Params) -> Answer:
        started = self._core.leasing.tidying.ask()
        return Answer(status=202, warnings=[TIDY_STARTED if started else TIDY_RUNNING])

    # -- what could not be revoked

    async def _count(self, call: Call, params: Params) -> Answer:
        _only_irrevocable(call)
        counts = self._by_accessor()
        return Answer({"counts": counts, "lease_count": sum(counts.values())})

    async def _list_irrevocable(self, call: Call, params: Params) -> Answer:
        fields = _only_irrevocable(call)
        limit = _limit(fields)
        accessors = self._accessors()
        found = await self._revocation.irrevocable(limit)
        counts = self._by_accessor()
        data: dict[str, Any] = {
            "counts": counts,
            "lease_count": sum(counts.values()),
            "leases": [
                {
                    "error": lease.error,
                    "expire_time": format_time(lease.expires_s),
                    "lease_id": lease.id,
                    "mount_id": accessors.get(lease.mount, lease.mount),
                }
                for lease in found
            ],
        }
        cut = limit is not None and data["lease_count"] > limit
        warnings = [f"only {limit} of {data['lease_count']} leases are shown: limit=none shows all"] if cut else []
        return Answer(data, warnings=warnings)

    def _by_accessor(self) -> dict[str, int]:
        accessors = self._accessors()
        counts = self._revocation.irrevocable_by_mount()
        return {accessors.get(mount, mount): count for mount, count in sorted(counts.items())}

    def _accessors(self) -> dict[str, str]:
        table = self._core.mounts.table
        return {entry.uuid: entry.accessor for name in ("mounts", "auth") for entry in table.entries(name)}

    # -- users

    async def _locked(self, call: Call, params: Params) -> Answer:
        wanted = Fields(call.data).string("mount_accessor")
        locked = {name: users for name, users in self._lockout.locked().items() if wanted in ("", name)}
        mounts = [
            {"alias_identifiers": users, "counts": len(users), "mount_accessor": name}
            for name, users in sorted(locked.items(), key=lambda found: (-len(found[1]), found[0]))
        ]
        total = sum(len(users) for users in locked.values())
        spaces = [{**_ROOT_NAMESPACE, "counts": total, "mount_accessors": mounts}] if mounts else []
        return Answer({"by_namespace": spaces, "total": total})

    async def _unlock(self, call: Call, params: Params) -> None:
        await self._lockout.unlock(params["mount_accessor"], params["alias_identifier"])


def _lease_id(call: Call, params: Params) -> str:
    """From the body, which wins, or from the URL."""
    fields = Fields(call.data)
    lease_id = fields.string("lease_id") or fields.string("url_lease_id") or params.get("lease_id", "")
    if not lease_id:
        raise InvalidRequest("lease_id must be specified")
    return lease_id


def _only_irrevocable(call: Call) -> Fields:
    """As in Vault there is nothing to read for any other type."""
    fields = Fields(call.data)
    if fields.string("type").lower() != "irrevocable":
        raise NotFound
    children = fields.string("include_child_namespaces")
    if children and children not in GO_BOOLEANS:
        raise InvalidRequest('error converting input for field "include_child_namespaces": cannot parse as a boolean')
    return fields


def _limit(fields: Fields) -> int | None:
    """How many leases to show; None for all."""
    text = fields.string("limit").strip().lower()
    if text == "none":
        return None
    limit = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if text and limit <= 0:
        raise InvalidRequest("limit must be 'none' or a number greater than 0")
    return limit or LISTED_MAX
