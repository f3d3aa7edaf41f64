"""The small ``sys/`` endpoints that clients call on their way (contract 4.12)."""

from __future__ import annotations

import base64
import binascii

from plugin_api.errors import InvalidRequest
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields
from sidecar.request.route_table import STRING, takes


class SysMisc:
    """Handlers of one tenure."""

    def __init__(self, core: SysCore) -> None:
        self._core = core

    def routes(self) -> list[Route]:
        """Rows of the table."""
        return [
            Route("internal/ui/namespaces", {Operation.READ: self._namespaces}, help="Namespaces: the one.", fields={}),
            Route("experiments", {Operation.READ: self._experiments}, help="Experiments: there are none.", fields={}),
            Route(
                "decode-token",
                {Operation.UPDATE: self._decode},
                open=True,
                help="The token that a root generation has encoded.",
                fields=takes(encoded_token=STRING, otp=STRING),
            ),
        ]

    async def _namespaces(self, call: Call, params: Params) -> Answer:
        return Answer({"keys": [""]})

    async def _experiments(self, call: Call, params: Params) -> Answer:
        return Answer({"available": [], "enabled": []})

    async def _decode(self, call: Call, params: Params) -> Answer:
        """For clients that cannot do exclusive or themselves; nothing of this server comes into it."""
        fields = Fields(call.data)
        encoded, otp = fields.string("encoded_token"), fields.string("otp").encode()
        if not encoded or not otp:
            raise InvalidRequest("missing encoded_token" if not encoded else "missing otp")
        try:
            raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
            if len(raw) != len(otp):
                raise InvalidRequest("the encoded token and the OTP are not of one length")
            token = bytes(left ^ right for left, right in zip(raw, otp, strict=True)).decode()
        except (binascii.Error, ValueError):
            raise InvalidRequest("the encoded token cannot be decoded with this OTP") from None
        return Answer({"token": token})
