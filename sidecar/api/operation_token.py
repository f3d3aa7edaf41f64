"""``sys/replication/dr/secondary/generate-operation-token``: a DR operation token from key shares (contract 1.16)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from plugin_api.errors import InvalidRequest, PluginError
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route
from sidecar.api.sys_seal import OTP_LENGTH, RootGeneration
from sidecar.core.keys import SEAL
from sidecar.core.operation_tokens import OperationTokens
from sidecar.core.seal import decode_share
from sidecar.core.seal_record import SealRecord, WrongKey, open_root_key, root_fingerprint
from sidecar.core.store_view import SealedStore
from sidecar.core.token_ids import base62
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields

PATH = "replication/dr/secondary/generate-operation-token"


class OperationTokenGeneration:
    """Handlers of one tenure as DR secondary; an attempt in progress ends with it."""

    def __init__(self, sealed: SealedStore, tokens: OperationTokens, random_bytes: Callable[[int], bytes]) -> None:
        self._sealed = sealed
        self._tokens = tokens
        self._random_bytes = random_bytes
        self._attempt: RootGeneration | None = None

    def routes(self) -> list[Route]:
        """Rows of the table. They are open: the key shares are the permission."""
        read, update, delete = Operation.READ, Operation.UPDATE, Operation.DELETE
        return [
            Route(f"{PATH}/attempt", {read: self._progress, update: self._begin, delete: self._cancel}, open=True),
            Route(f"{PATH}/update", {update: self._provide}, open=True),
        ]

    async def _progress(self, call: Call, params: Params) -> Answer:
        return Answer(raw=await self._state())

    async def _begin(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        if fields.string("pgp_key"):
            raise InvalidRequest("encrypting keys or tokens with PGP is not supported")
        otp, made_here = fields.string("otp"), ""
        if not otp:
            otp = made_here = base62(OTP_LENGTH, self._random_bytes)
        if len(otp.encode()) != OTP_LENGTH:
            raise InvalidRequest("OTP string is wrong length")
        record = await self._record()
        if self._attempt is not None:
            raise InvalidRequest("root generation already in progress")
        self._attempt = RootGeneration(record.config, otp)
        return Answer(raw={**await self._state(), "otp": made_here})

    async def _cancel(self, call: Call, params: Params) -> None:
        self._attempt = None

    async def _provide(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        text, nonce = fields.string("key"), fields.string("nonce")
        if not text:
            raise InvalidRequest("'key' must be specified in request body as JSON")
        share = decode_share(text)
        attempt = self._attempt
        if attempt is None:
            raise InvalidRequest("no root generation in progress")
        unseal_key = attempt.provide(share, nonce)
        if unseal_key is None:
            return Answer(raw={**await self._state(), "otp_length": 0})
        await self._verify(unseal_key)
        if self._attempt is not attempt:
            raise InvalidRequest("no root generation in progress")
        self._attempt = None
        token = await self._tokens.issue()
        shape = _shape(attempt.nonce, started=True, progress=attempt.required, required=attempt.required)
        return Answer(raw={**shape, "complete": True, "encoded_token": attempt.encode(token), "otp_length": 0})

    async def _verify(self, unseal_key: bytes) -> None:
        """Raise unless the shares combine to the key that opens this cluster's own root key."""
        try:
            root_key = open_root_key(await self._record(), unseal_key)
        except WrongKey as error:
            raise InvalidRequest(f"root generation aborted: {error}") from None
        if root_fingerprint(root_key) != self._sealed.barrier.root_fingerprint:
            raise InvalidRequest("root generation aborted: the keys are those of another cluster")

    async def _record(self) -> SealRecord:
        raw = await self._sealed.get_raw(SEAL)
        if raw is None:
            raise PluginError("the seal record is missing")
        return SealRecord.decode(raw)

    async def _state(self) -> dict[str, Any]:
        attempt = self._attempt
        if attempt is None:
            return _shape("", started=False, progress=0, required=(await self._record()).threshold)
        return _shape(attempt.nonce, started=True, progress=attempt.progress, required=attempt.required)


def _shape(nonce: str, *, started: bool, progress: int, required: int) -> dict[str, Any]:
    """The contract's fields; a DR operation token never fills ``encoded_root_token``."""
    return {
        "nonce": nonce,
        "started": started,
        "progress": progress,
        "required": required,
        "complete": False,
        "encoded_token": "",
        "encoded_root_token": "",
        "pgp_fingerprint": "",
        "otp": "",
        "otp_length": OTP_LENGTH,
    }
