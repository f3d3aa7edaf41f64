"""One mounted transit engine with its storage and clock."""

import base64
from typing import Any

import pytest

from plugin_api.errors import InvalidRequest
from plugin_api.request import Operation, Response
from plugin_api.testing import MemoryStorage, SettableClock, make_context, make_request
from sidecar.engines.transit.engine import Transit

CREATE, READ, UPDATE, DELETE, LIST = (
    Operation.CREATE,
    Operation.READ,
    Operation.UPDATE,
    Operation.DELETE,
    Operation.LIST,
)


def b64(data: bytes | str) -> str:
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode()


def un64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


class Mount:
    """One mounted engine. Two mounts of one storage are two clusters, or one before and after a restart."""

    def __init__(self, storage: MemoryStorage | None = None, clock: SettableClock | None = None) -> None:
        self.storage = storage if storage is not None else MemoryStorage()
        self.clock = clock if clock is not None else SettableClock()
        self.engine = Transit(make_context(type_name="transit", storage=self.storage, now=self.clock))

    async def __call__(self, operation: Operation, path: str, data: Any = None) -> Response | None:
        return await self.engine.handle(make_request(operation, path, data))

    async def answer(self, path: str, **data: Any) -> Response:
        """A write that answers with something."""
        response = await self(UPDATE, path, data)
        assert response is not None
        return response

    async def post(self, path: str, **data: Any) -> dict[str, Any]:
        response = await self.answer(path, **data)
        assert response.data is not None
        return response.data

    async def read(self, path: str, **data: Any) -> dict[str, Any]:
        response = await self(READ, path, data)
        assert response is not None
        assert response.data is not None
        return response.data

    async def refused(self, path: str, **data: Any) -> str:
        """The text of a 400."""
        with pytest.raises(InvalidRequest) as caught:
            await self(UPDATE, path, data)
        return str(caught.value)

    async def encrypt(self, name: str, plaintext: bytes, **data: Any) -> str:
        return str((await self.post(f"encrypt/{name}", plaintext=b64(plaintext), **data))["ciphertext"])

    async def decrypt(self, name: str, ciphertext: str, **data: Any) -> bytes:
        return un64((await self.post(f"decrypt/{name}", ciphertext=ciphertext, **data))["plaintext"])
