"""``cubbyhole/``: what one token keeps for itself. No other, root included, can see it; it goes with the token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from plugin_api.description import PathDescription
from plugin_api.errors import InvalidRequest, UnsupportedOperation, UnsupportedPath
from plugin_api.request import Operation
from sidecar.core.store_view import SealedStore, View
from sidecar.core.token_entry import SERVICE
from sidecar.core.tokens import cubbyhole
from sidecar.request.call import Answer, Call


class Cubbyhole:
    """The backend of the ``cubbyhole/`` mount."""

    type_name = "cubbyhole"
    replicated = False

    def __init__(self, sealed: SealedStore) -> None:
        self._sealed = sealed

    def is_open(self, rest: str, operation: Operation) -> bool:
        return False

    def needs_sudo(self, rest: str) -> bool:
        return False

    async def exists(self, call: Call, rest: str) -> bool | None:
        if not rest or rest.endswith("/"):
            return None
        return await self._view(call).get(rest) is not None

    async def handle(self, call: Call, rest: str) -> Answer | None:
        view = self._view(call)
        match call.operation:
            case Operation.LIST:
                names = await view.list(rest)
                return Answer({"keys": names}, mount_type=self.type_name) if names else Answer(status=404)
            case Operation.READ:
                data = await _read(view, rest)
                return Answer(data, mount_type=self.type_name) if data is not None else None
            case Operation.CREATE | Operation.UPDATE:
                if not call.data:
                    raise InvalidRequest("missing data fields")
                await view.put(_file(rest), json.dumps(dict(call.data)).encode())
            case Operation.DELETE:
                await view.delete(_file(rest))
            case _:
                raise UnsupportedOperation
        return None

    def help(self, rest: str) -> str:
        return "Stores what only the token that wrote it can read."

    def describe(self) -> Sequence[PathDescription]:
        operations = (Operation.READ, Operation.UPDATE, Operation.DELETE, Operation.LIST)
        return [PathDescription("{path}", operations, {"path": ".+"}, help=self.help(""), free_form=True)]

    def _view(self, call: Call) -> View:
        entry = call.known.entry
        if entry is None or entry.type != SERVICE:
            raise InvalidRequest('cubbyhole operations are only supported by "service" type tokens')
        return cubbyhole(self._sealed, entry)


async def _read(view: View, rest: str) -> dict[str, Any] | None:
    raw = await view.get(_file(rest))
    if raw is None:
        return None
    data: dict[str, Any] = json.loads(raw)
    return data


def _file(rest: str) -> str:
    if not rest or rest.endswith("/"):
        raise UnsupportedPath
    return rest
