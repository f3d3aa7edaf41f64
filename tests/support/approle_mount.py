"""One mounted approle with its storages and clock."""

from typing import Any

import pytest

from plugin_api.errors import InvalidRequest
from plugin_api.request import Auth, Operation, Response
from plugin_api.testing import MemoryStorage, SettableClock, make_context, make_request
from sidecar.auth.approle import AppRole

CREATE, READ, UPDATE, DELETE, LIST = (
    Operation.CREATE,
    Operation.READ,
    Operation.UPDATE,
    Operation.DELETE,
    Operation.LIST,
)


class Mount:
    """One mounted approle with its storages. Mounts that share ``storage`` are clusters of one set."""

    def __init__(self, storage: MemoryStorage | None = None) -> None:
        self.storage = storage if storage is not None else MemoryStorage()
        self.local = MemoryStorage()
        self.clock = SettableClock()
        self.engine = AppRole(
            make_context(
                path="auth/approle/",
                type_name="approle",
                storage=self.storage,
                local_storage=self.local,
                now=self.clock,
            )
        )

    async def __call__(self, operation: Operation, path: str, data: Any = None, **caller: Any) -> Response | None:
        return await self.engine.handle(make_request(operation, path, data, **caller))

    async def data(self, operation: Operation, path: str, data: Any = None) -> dict[str, Any]:
        response = await self(operation, path, data)
        assert response is not None
        assert response.data is not None
        return response.data

    async def role(self, name: str = "web", **fields: Any) -> str:
        """Create a role; its role id."""
        await self(CREATE, f"role/{name}", fields)
        return str((await self.data(READ, f"role/{name}/role-id"))["role_id"])

    async def secret_id(self, name: str = "web", **fields: Any) -> dict[str, Any]:
        return await self.data(UPDATE, f"role/{name}/secret-id", fields)

    async def login(self, role_id: Any, secret_id: Any = None, **caller: Any) -> Auth:
        response = await self(UPDATE, "login", {"role_id": role_id, "secret_id": secret_id}, **caller)
        assert response is not None
        assert response.auth is not None
        return response.auth

    async def refused(self, path: str, data: Any = None, operation: Operation = UPDATE) -> str:
        with pytest.raises(InvalidRequest) as caught:
            await self(operation, path, data)
        return str(caught.value)
