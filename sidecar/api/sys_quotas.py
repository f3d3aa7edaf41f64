"""``sys/quotas/rate-limit``: how often one client may ask (contract 7.3, 5.4)."""

from __future__ import annotations

import re

import msgspec

from plugin_api.errors import InvalidRequest, NotFound
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.core.quotas import QuotaConfig, Quotas, RateLimitQuota
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.route_table import BOOL, DURATION, LIST, STRING, takes

_NAME = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)


_FIELDS = takes(
    rate=STRING, path=STRING, interval=DURATION, block_interval=DURATION, role=STRING, type=STRING, inheritable=BOOL
)


class SysQuotas:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore, quotas: Quotas) -> None:
        self._core = core
        self._quotas = quotas

    def routes(self) -> list[Route]:
        """Rows of the table."""
        read, update, delete, listing = Operation.READ, Operation.UPDATE, Operation.DELETE, Operation.LIST
        return [
            Route(
                "quotas/config",
                {read: self._config, update: self._configure},
                sudo=True,
                help="Settings of all rate limits.",
                fields=takes(
                    rate_limit_exempt_paths=LIST,
                    enable_rate_limit_audit_logging=BOOL,
                    enable_rate_limit_response_headers=BOOL,
                ),
            ),
            Route("quotas/rate-limit", {listing: self._list}, help="Rate limits by name.", fields={}),
            Route(
                "quotas/rate-limit/{name}",
                {read: self._read, update: self._write, delete: self._delete},
                help="One rate limit.",
                fields=_FIELDS,
            ),
        ]

    async def _config(self, call: Call, params: Params) -> Answer:
        config = self._quotas.config
        return Answer(
            {
                "enable_rate_limit_audit_logging": config.audit_refused,
                "enable_rate_limit_response_headers": config.show_headers,
                "rate_limit_exempt_paths": list(config.exempt_paths),
            }
        )

    async def _configure(self, call: Call, params: Params) -> None:
        fields, old = Fields(call.data), self._quotas.config
        exempt = old.exempt_paths
        if fields.given("rate_limit_exempt_paths"):
            exempt = tuple(path.strip("/") for path in fields.strings("rate_limit_exempt_paths"))
        await self._quotas.configure(
            QuotaConfig(
                exempt_paths=exempt,
                audit_refused=fields.boolean("enable_rate_limit_audit_logging", old.audit_refused),
                show_headers=fields.boolean("enable_rate_limit_response_headers", old.show_headers),
            )
        )

    async def _list(self, call: Call, params: Params) -> Answer:
        names = self._quotas.names()
        return Answer({"keys": names}) if names else Answer(status=404)

    async def _read(self, call: Call, params: Params) -> Answer:
        quota = self._quotas.get(params["name"])
        if quota is None:
            raise NotFound
        return Answer(
            {
                "block_interval": quota.block_interval_s,
                "inheritable": quota.inheritable,
                "interval": quota.interval_s,
                "name": quota.name,
                "path": quota.path,
                # As Go writes it: a whole number without its point.
                "rate": int(quota.rate) if quota.rate.is_integer() else quota.rate,
                "role": quota.role,
                "type": "rate-limit",
            }
        )

    async def _write(self, call: Call, params: Params) -> None:
        name, fields = params["name"], Fields(call.data)
        if not _NAME.fullmatch(name):
            raise InvalidRequest("invalid quota name: letters, digits, '.', '-' and '_' are allowed")
        if fields.string("type", "rate-limit") != "rate-limit":
            raise InvalidRequest("'type' must be rate-limit")
        old = self._quotas.get(name)
        if old is None and not fields.given("rate"):
            raise InvalidRequest("rate must be a positive number")
        quota = old or RateLimitQuota(name, 1.0)
        changes: dict[str, object] = {}
        if fields.given("rate"):
            changes["rate"] = _rate(fields.string("rate"))
        if fields.given("path"):
            changes["path"] = self._path(fields.string("path"))
        for parameter, attribute in (("interval", "interval_s"), ("block_interval", "block_interval_s")):
            if fields.given(parameter):
                changes[attribute] = fields.duration_s(parameter)
        if fields.given("role"):
            changes["role"] = fields.string("role")
        quota = msgspec.structs.replace(quota, **changes)
        if quota.role:
            self._check_role(quota)
        if fields.given("inheritable") and fields.boolean("inheritable") != (quota.path == ""):
            raise InvalidRequest(
                "'inheritable' is of quotas of a namespace, which are those without a path, and always"
            )
        await self._quotas.put(msgspec.structs.replace(quota, inheritable=quota.path == ""))

    def _check_role(self, quota: RateLimitQuota) -> None:
        mounts = self._core.mounts
        if mounts.router.get(quota.path) is None:
            raise InvalidRequest("with a 'role', 'path' must be that of an auth method, with nothing behind it")
        if not mounts.has_login_roles(quota.path):
            raise InvalidRequest(
                f"logins at {quota.path} are to no role: a quota with a 'role' would never count there"
            )

    def _path(self, text: str) -> str:
        """A mount gets its slash; what is below no mount could never be asked for."""
        path = text.strip("/")
        if not path:
            return ""
        router = self._core.mounts.router
        if router.get(path + "/") is not None:
            return path + "/"
        if router.match(path.rstrip("*")) is None:
            raise InvalidRequest(f'invalid path "{path}": no mount serves it')
        if "*" in path[:-1]:
            raise InvalidRequest("a path may have '*' at its end only")
        return path

    async def _delete(self, call: Call, params: Params) -> None:
        await self._quotas.delete(params["name"])


def _rate(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidRequest("rate must be a positive number") from None
