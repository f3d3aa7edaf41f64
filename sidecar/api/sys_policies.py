"""``sys/policies/acl``, ``sys/policy`` and ``sys/capabilities*`` (contract 4.12)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plugin_api.errors import InvalidRequest, NotFound
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.core.password_policies import decoded_text
from sidecar.core.policies import ACL
from sidecar.core.token_entry import TokenEntry
from sidecar.request.call import Answer, Call
from sidecar.request.errors import JoinedError
from sidecar.request.fields import Fields
from sidecar.request.route_table import LIST, STRING, takes


class SysPolicies:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore) -> None:
        self._core = core

    def routes(self) -> list[Route]:
        """Rows of the table."""
        read, update, delete, listing = Operation.READ, Operation.UPDATE, Operation.DELETE, Operation.LIST
        text, paths = takes(policy=STRING, rules=STRING), takes(path=LIST, paths=LIST)
        both = {read: self._list, listing: self._list}
        legacy = {read: self._list_legacy, listing: self._list_legacy}
        one = {read: self._read, update: self._write, delete: self._delete}
        legacy_one = {**one, read: self._read_legacy}
        return [
            Route("policies/acl", both, help="ACL policies.", fields={}),
            Route("policies/acl/{name*}", one, help="One ACL policy.", fields=text),
            Route("policy", legacy, help="ACL policies, in the older form.", fields={}),
            Route("policy/{name*}", legacy_one, help="One ACL policy, in the older form.", fields=text),
            Route(
                "capabilities",
                {update: self._capabilities},
                help="What a token may do at some paths.",
                fields=paths | takes(token=STRING),
            ),
            Route(
                "capabilities-self",
                {update: self._capabilities_self},
                help="What the caller may do at some paths.",
                fields=paths,
            ),
            Route(
                "capabilities-accessor",
                {update: self._capabilities_accessor},
                help="What a token may do at some paths, by its accessor.",
                fields=paths | takes(accessor=STRING),
            ),
            Route(
                "internal/ui/resultant-acl",
                {read: self._resultant},
                help="The caller's rules, for the web UI.",
                fields={},
            ),
        ]

    async def _list(self, call: Call, params: Params) -> Answer:
        return Answer({"keys": await self._core.policies.list()})

    async def _list_legacy(self, call: Call, params: Params) -> Answer:
        names = await self._core.policies.list()
        return Answer({"keys": names, "policies": names})

    async def _read(self, call: Call, params: Params) -> Answer:
        policy = await self._core.policies.get(params["name"])
        if policy is None:
            raise NotFound
        return Answer({"name": policy.name, "policy": policy.text})

    async def _read_legacy(self, call: Call, params: Params) -> Answer:
        policy = await self._core.policies.get(params["name"])
        if policy is None:
            raise NotFound
        return Answer({"name": policy.name, "rules": policy.text})

    async def _write(self, call: Call, params: Params) -> Answer | None:
        fields = Fields(call.data)
        text = fields.string("policy")
        # ``rules`` is the name that the parameter had in the older endpoint.
        old = "" if text else fields.string("rules")
        await self._core.policies.put(params["name"], decoded_text(text or old))
        return Answer(warnings=["'rules' is the old name of this parameter: use 'policy'"]) if old else None

    async def _delete(self, call: Call, params: Params) -> None:
        await self._core.policies.delete(params["name"])

    async def _capabilities(self, call: Call, params: Params) -> Answer:
        token = Fields(call.data).string("token")
        entry = await self._core.tokens.lookup(token) if token else call.known.entry
        if entry is None:
            raise InvalidRequest("invalid token")
        return await self._of_entry(call, entry)

    async def _capabilities_self(self, call: Call, params: Params) -> Answer:
        return _capabilities(call, call.known.acl)

    async def _capabilities_accessor(self, call: Call, params: Params) -> Answer:
        entry = await self._core.tokens.lookup_accessor(Fields(call.data).string("accessor"))
        if entry is None:
            raise JoinedError("invalid accessor")
        return await self._of_entry(call, entry)

    async def _of_entry(self, call: Call, entry: TokenEntry) -> Answer:
        return _capabilities(call, await self._core.policies.acl(entry.policies))

    async def _resultant(self, call: Call, params: Params) -> Answer:
        return Answer(call.known.acl.resultant())


def _capabilities(call: Call, acl: ACL) -> Answer:
    paths: Sequence[str] = Fields(call.data).strings("paths") or Fields(call.data).strings("path")
    if not paths:
        raise InvalidRequest("paths must be supplied")
    data: dict[str, Any] = {path: acl.capabilities(path.removeprefix("/")) for path in paths}
    if len(paths) == 1:
        data["capabilities"] = data[paths[0]]
    return Answer(data)
