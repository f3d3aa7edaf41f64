"""``random`` and ``hash``: what needs no key."""

from __future__ import annotations

import hashlib
import secrets

from plugin_api.errors import InvalidRequest
from plugin_api.framework import Fields, FieldSpec, FieldType, Path, writes
from plugin_api.request import Request, Response
from sidecar.engines.transit.encoding import decode_base64, encode_base64
from sidecar.engines.transit.signatures import digest_name
from sidecar.engines.transit.work import Workers

RANDOM_BYTES_MAX = 128 * 1024

_TEXT = FieldType.STRING


class Tools:
    """Paths without keys."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def paths(self) -> list[Path]:
        """The table."""
        return [
            Path(
                r"random(?:/(?P<source>platform|seal|all))?(?:/(?P<in_path>[0-9]+))?",
                {
                    "bytes": FieldSpec(FieldType.INT, default=32, description="How many."),
                    "in_path": FieldSpec(FieldType.INT, description="How many."),
                    "source": FieldSpec(_TEXT, default="platform", description="platform or all."),
                    "format": FieldSpec(_TEXT, default="base64", description="hex or base64."),
                },
                writes(self._random),
                help="Random bytes of the operating system.",
            ),
            Path(
                "hash(?:/(?P<in_path>[^/]+))?",
                {
                    "input": FieldSpec(_TEXT, description="Base64 input."),
                    "algorithm": FieldSpec(_TEXT, description="Name of the hash."),
                    "format": FieldSpec(_TEXT, default="hex", description="hex or base64."),
                },
                writes(self._hash),
                help="Hashes.",
            ),
        ]

    async def _random(self, request: Request, fields: Fields) -> Response:
        count = fields["in_path"] if fields.given("in_path") else fields["bytes"]
        if count < 1:
            raise InvalidRequest('"bytes" cannot be less than 1')
        if count > RANDOM_BYTES_MAX:
            raise InvalidRequest(f'"bytes" should be less than {RANDOM_BYTES_MAX}')
        if fields["source"] not in ("", "platform", "all"):
            raise InvalidRequest("unsupported entropy source; this server has 'platform' only")
        return Response(data={"random_bytes": _formatted(secrets.token_bytes(count), fields)})

    async def _hash(self, request: Request, fields: Fields) -> Response:
        digest = digest_name(fields.get("in_path") or fields["algorithm"])
        _check_format(fields)
        if request.data.get("input") is None:
            raise InvalidRequest("missing input")

        def work(text: str) -> bytes:
            return hashlib.new(digest, decode_base64(text, "input")).digest()

        (made,) = await self._workers.map(work, [fields["input"]], slow=False, size=len)
        return Response(data={"sum": _formatted(made, fields)})


def _check_format(fields: Fields) -> None:
    if fields["format"] not in ("hex", "base64"):
        raise InvalidRequest('unsupported encoding format; must be "hex" or "base64"')


def _formatted(data: bytes, fields: Fields) -> str:
    _check_format(fields)
    return data.hex() if fields["format"] == "hex" else encode_base64(data)
