"""KV version 1: one JSON object per path, kept and given back as it came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from plugin_api.errors import InvalidRequest, NotFound
from plugin_api.framework import Fields, FieldSpec, FieldType, Path, PathEngine, parse_duration_s, writes
from plugin_api.request import Operation, Request, Response, list_response
from sidecar.engines import kv_upgrade
from sidecar.engines.json_values import decode_object, encode_json

_HELP = "Reads, writes, lists and deletes a secret at this path; all that is written comes back as it is."


class KVv1(PathEngine):
    """Storage: ``<path>`` holds the JSON object of that path."""

    type_name: ClassVar[str] = "kv"

    def paths(self) -> Sequence[Path]:
        operations = writes(self._write) | {
            Operation.READ: self._read,
            Operation.DELETE: self._delete,
            Operation.LIST: self._list,
        }
        fields = {"path": FieldSpec(FieldType.STRING)}
        return [
            Path("(?P<path>.*)", fields, operations, exists=self._exists, help=_HELP, free_form=True, primary_only=True)
        ]

    async def _exists(self, request: Request, fields: Fields) -> bool:
        return _names_a_secret(request.path) and await self.context.storage.exists(request.path)

    async def _read(self, request: Request, fields: Fields) -> Response:
        raw = await self.context.storage.get(request.path) if _names_a_secret(request.path) else None
        if raw is None:
            raise NotFound
        data = decode_object(raw)
        return Response(data=data, lease_duration_s=self._lease_s(data))

    async def _write(self, request: Request, fields: Fields) -> None:
        if not _names_a_secret(request.path):
            raise InvalidRequest("cannot write to a path ending in '/'")
        if not request.data:
            raise InvalidRequest("missing data fields")
        await self.context.storage.put(request.path, encode_json(dict(request.data)))

    async def _delete(self, request: Request, fields: Fields) -> None:
        if _names_a_secret(request.path):
            await self.context.storage.delete(request.path)

    async def _list(self, request: Request, fields: Fields) -> Response:
        prefix = request.path
        if prefix and not prefix.endswith("/"):
            prefix += "/"
        names = await self.context.storage.list(prefix)
        # The mark of an upgrade that was asked for and never came to be.
        return list_response([name for name in names if prefix or name != kv_upgrade.FOLDER])

    def _lease_s(self, data: dict[str, Any]) -> int:
        """How long a reader may keep the value: its own ``ttl`` or ``lease``, if that is a duration."""
        text = data.get("ttl", data.get("lease"))
        if text is not None:
            try:
                return parse_duration_s(text)
            except ValueError:
                pass
        return self.context.mount.default_lease_ttl_s


def _names_a_secret(path: str) -> bool:
    return bool(path) and not path.endswith("/")
