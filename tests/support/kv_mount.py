"""One mounted key/value engine with its storage and clock."""

from typing import Any

from plugin_api.request import Operation, Response
from plugin_api.testing import MemoryStorage, SettableClock, make_context, make_request
from sidecar.engines.kv import KV

CREATE, READ, UPDATE, PATCH, DELETE, LIST = (
    Operation.CREATE,
    Operation.READ,
    Operation.UPDATE,
    Operation.PATCH,
    Operation.DELETE,
    Operation.LIST,
)

WRITTEN = "2023-11-14T22:13:20Z"
DESCRIBED = {"created_time": WRITTEN, "deletion_time": "", "destroyed": False, "custom_metadata": None}


class Mount:
    """One mounted engine with its storage and clock."""

    def __init__(self, version: str) -> None:
        self.storage = MemoryStorage()
        self.clock = SettableClock()
        options = {"version": version} if version else {}
        self.engine = KV(make_context(type_name="kv", options=options, storage=self.storage, now=self.clock))

    async def __call__(self, operation: Operation, path: str, data: Any = None) -> Response | None:
        return await self.engine.handle(make_request(operation, path, data))

    async def data(self, operation: Operation, path: str, data: Any = None) -> dict[str, Any]:
        response = await self(operation, path, data)
        assert response is not None
        assert response.data is not None
        return response.data

    async def put(self, path: str, **secret: Any) -> dict[str, Any]:
        return await self.data(CREATE, f"data/{path}", {"data": secret})

    async def put_if(self, version: Any, path: str = "a") -> dict[str, Any]:
        """A write with check-and-set."""
        return await self.data(Operation.UPDATE, f"data/{path}", {"data": {"x": 1}, "options": {"cas": version}})
