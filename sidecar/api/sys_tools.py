"""``sys/tools/random`` and ``sys/tools/hash``: small things that clients without a good library ask for."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Callable

from plugin_api.errors import InvalidRequest
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.route_table import INT, STRING, takes

RANDOM_BYTES_MAX = 128 * 1024
_SOURCES = ("platform", "seal", "all")
_ALGORITHMS = {
    f"{family}-{bits}": f"{name}{bits}"
    for family, name in (("sha2", "sha"), ("sha3", "sha3_"))
    for bits in (224, 256, 384, 512)
}
_FORMATS: dict[str, Callable[[bytes], str]] = {
    "hex": bytes.hex,
    "base64": lambda raw: base64.b64encode(raw).decode(),
}
_THREAD_BYTES_MIN = 1024 * 1024
_RANDOM = takes(bytes=INT, source=STRING, format=STRING)
_HASH = takes(input=STRING, algorithm=STRING, format=STRING)


class SysTools:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore) -> None:
        self._core = core

    def routes(self) -> list[Route]:
        """Rows of the table."""
        update = Operation.UPDATE
        return [
            Route("tools/random", {update: self._random}, help="Random bytes.", fields=_RANDOM),
            Route("tools/random/{first}", {update: self._random}, help="Random bytes.", fields=_RANDOM),
            Route("tools/random/{source}/{bytes}", {update: self._random}, help="Random bytes.", fields=_RANDOM),
            Route("tools/hash", {update: self._hash}, help="A digest of some data.", fields=_HASH),
            Route("tools/hash/{algorithm}", {update: self._hash}, help="A digest of some data.", fields=_HASH),
        ]

    async def _random(self, call: Call, params: Params) -> Answer:
        given = dict(params)
        first = given.pop("first", "")
        if first:
            given["source" if first in _SOURCES else "bytes"] = first
        fields = Fields({**call.data, **given})
        source, count = fields.string("source", "platform"), fields.integer("bytes", 32)
        encode = _format(fields.string("format", "base64"))
        if source not in _SOURCES:
            raise InvalidRequest(f'unsupported entropy source "{source}"; must be "platform" or "seal", or "all"')
        if count < 1:
            raise InvalidRequest('"bytes" cannot be less than 1')
        if count > RANDOM_BYTES_MAX:
            raise InvalidRequest(f'"bytes" should be less than {RANDOM_BYTES_MAX}')
        return Answer({"random_bytes": encode(self._core.random_bytes(count))})

    async def _hash(self, call: Call, params: Params) -> Answer:
        fields = Fields({**call.data, **params})
        algorithm = fields.string("algorithm", "sha2-256")
        encode = _format(fields.string("format", "hex"))
        if algorithm not in _ALGORITHMS:
            raise InvalidRequest(f"unsupported algorithm {algorithm}")
        try:
            raw = base64.b64decode(fields.string("input"), validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequest("unable to decode input as base64") from None
        name = _ALGORITHMS[algorithm]
        if len(raw) < _THREAD_BYTES_MIN:
            return Answer({"sum": encode(_digest(name, raw))})
        return Answer({"sum": encode(await asyncio.to_thread(_digest, name, raw))})


def _digest(name: str, raw: bytes) -> bytes:
    return hashlib.new(name, raw).digest()


def _format(name: str) -> Callable[[bytes], str]:
    if name not in _FORMATS:
        raise InvalidRequest(f'unsupported encoding format "{name}"; must be "hex" or "base64"')
    return _FORMATS[name]
