"""``sys/policies/password``: policies of generated passwords, and passwords by them."""

from __future__ import annotations

from plugin_api.errors import NotFound
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route
from sidecar.core.password_policies import PasswordPolicies, decoded_text
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.route_table import STRING, takes


class SysPasswords:
    """Handlers of one tenure."""

    def __init__(self, policies: PasswordPolicies) -> None:
        self._policies = policies

    def routes(self) -> list[Route]:
        """Rows of the table."""
        read, update, delete, listing = Operation.READ, Operation.UPDATE, Operation.DELETE, Operation.LIST
        return [
            Route(
                "policies/password",
                {listing: self._list, read: self._list},
                help="Policies of generated passwords.",
                fields={},
            ),
            Route(
                "policies/password/{name}",
                {read: self._read, update: self._write, delete: self._delete},
                help="One policy of generated passwords.",
                fields=takes(policy=STRING, entropy_source=STRING),
            ),
            Route(
                "policies/password/{name}/generate",
                {read: self._generate},
                help="A password that keeps the policy.",
                fields={},
            ),
        ]

    async def _list(self, call: Call, params: Params) -> Answer:
        names = await self._policies.list()
        return Answer({"keys": names}) if names else Answer(status=404)

    async def _read(self, call: Call, params: Params) -> Answer:
        text = await self._policies.get(params["name"])
        if text is None:
            raise NotFound
        return Answer({"policy": text})

    async def _write(self, call: Call, params: Params) -> None:
        await self._policies.put(params["name"], decoded_text(Fields(call.data).string("policy")))

    async def _delete(self, call: Call, params: Params) -> None:
        await self._policies.delete(params["name"])

    async def _generate(self, call: Call, params: Params) -> Answer:
        return Answer({"password": await self._policies.generate(params["name"])})
