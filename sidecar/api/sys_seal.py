"""``sys/seal``, ``sys/step-down``, key rotation, and a root token from key shares (contract 4.5, 4.7, 4.8)."""

from __future__ import annotations

import base64
import uuid
from typing import Any

from plugin_api.errors import InvalidRequest, PluginError
from plugin_api.formats import format_time
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.core.keys import SEAL
from sidecar.core.rotation import ENCRYPTIONS_MAX, rotate
from sidecar.core.seal import InvalidShares, SealConfig, UnsealAttempt, decode_share
from sidecar.core.seal_record import SealRecord, WrongKey, open_root_key, root_fingerprint
from sidecar.core.token_ids import RANDOM_LENGTH, SERVICE_PREFIX, base62
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields

OTP_LENGTH = len(SERVICE_PREFIX) + RANDOM_LENGTH
"""As long as a root token, which it hides by exclusive or."""
_SHARE_BYTES_MIN = 16


class SysSeal:
    """Handlers of one tenure. A root generation in progress ends with it."""

    def __init__(self, core: SysCore) -> None:
        self._core = core
        self._generation: RootGeneration | None = None

    def routes(self) -> list[Route]:
        """Rows of the table. Root generation is open: the key shares are the permission."""
        read, update, delete = Operation.READ, Operation.UPDATE, Operation.DELETE
        return [
            Route("seal", {update: self._seal}, sudo=True, help="Seal this node."),
            Route("step-down", {update: self._step_down}, sudo=True, help="Give up leadership."),
            Route("key-status", {read: self._key_status}, help="The active encryption key."),
            Route("rotate", {update: self._rotate}, sudo=True, help="Use a fresh encryption key from now on."),
            Route("rotate/config", {read: self._rotate_config}),
            Route(
                "generate-root/attempt",
                {read: self._progress, update: self._begin, delete: self._cancel},
                open=True,
            ),
            Route("generate-root/update", {update: self._provide}, open=True),
        ]

    async def _seal(self, call: Call, params: Params) -> None:
        await self._core.node.seal()

    async def _step_down(self, call: Call, params: Params) -> None:
        await self._core.node.step_down()

    async def _key_status(self, call: Call, params: Params) -> Answer:
        active = self._core.sealed.barrier.ring("r").active
        return Answer(
            {
                "term": active.term,
                "install_time": format_time(active.install_time_s),
                "encryptions": self._core.sealed.barrier.encryptions("r"),
            }
        )

    async def _rotate(self, call: Call, params: Params) -> None:
        if not self._core.writable():
            raise InvalidRequest("cannot rotate on a replication secondary")
        for storage_class in ("r", "l"):
            await rotate(self._core.sealed, storage_class, self._core.now())

    async def _rotate_config(self, call: Call, params: Params) -> Answer:
        return Answer({"enabled": True, "interval": 0, "max_operations": ENCRYPTIONS_MAX})

    # -- a root token from key shares

    async def _progress(self, call: Call, params: Params) -> Answer:
        return Answer(raw=await self._state())

    async def _begin(self, call: Call, params: Params) -> Answer:
        if self._generation is not None:
            raise InvalidRequest("root generation already in progress")
        fields = Fields(call.data)
        if fields.string("pgp_key"):
            raise InvalidRequest("encrypting keys or tokens with PGP is not supported")
        otp, made_here = fields.string("otp"), ""
        if not otp:
            otp = made_here = base62(OTP_LENGTH, self._core.random_bytes)
        if len(otp.encode()) != OTP_LENGTH:
            raise InvalidRequest("OTP string is wrong length")
        record = await self._record()
        if self._generation is not None:
            raise InvalidRequest("root generation already in progress")
        self._generation = RootGeneration(record.config, otp)
        return Answer(raw={**await self._state(), "otp": made_here})

    async def _cancel(self, call: Call, params: Params) -> None:
        self._generation = None

    async def _provide(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        text, nonce = fields.string("key"), fields.string("nonce")
        if not text:
            raise InvalidRequest("'key' must be specified in request body as JSON")
        share = decode_share(text)
        generation = self._generation
        if generation is None:
            raise InvalidRequest("no root generation in progress")
        unseal_key = generation.provide(share, nonce)
        if unseal_key is None:
            return Answer(raw={**await self._state(), "otp_length": 0})
        await self._verify(unseal_key)
        if self._generation is not generation:
            raise InvalidRequest("no root generation in progress")
        self._generation = None
        issued = await self._core.tokens.create_root()
        encoded = generation.encode(issued.token)
        return Answer(
            raw={
                **_shape(generation.nonce, started=True, progress=generation.required, required=generation.required),
                "complete": True,
                "encoded_token": encoded,
                "encoded_root_token": encoded,
                "otp_length": 0,
            }
        )

    async def _verify(self, unseal_key: bytes) -> None:
        """Raise unless the shares combine to the key that opens this cluster's own root key."""
        try:
            root_key = open_root_key(await self._record(), unseal_key)
        except WrongKey as error:
            raise InvalidRequest(f"root generation aborted: {error}") from None
        if root_fingerprint(root_key) != self._core.sealed.barrier.root_fingerprint:
            raise InvalidRequest("root generation aborted: the keys are those of another cluster")

    async def _record(self) -> SealRecord:
        raw = await self._core.sealed.get_raw(SEAL)
        if raw is None:
            raise PluginError("the seal record is missing")
        return SealRecord.decode(raw)

    async def _state(self) -> dict[str, Any]:
        if self._generation is None:
            return _shape("", started=False, progress=0, required=(await self._record()).threshold)
        generation = self._generation
        return _shape(generation.nonce, started=True, progress=generation.progress, required=generation.required)


class RootGeneration:
    """One attempt: shares so far, and the one-time pad that hides the token from whoever only sees the answers."""

    def __init__(self, config: SealConfig, otp: str) -> None:
        self.nonce = str(uuid.uuid4())
        self.required = config.threshold
        self._otp = otp.encode()
        self._attempt = UnsealAttempt(config)

    def __repr__(self) -> str:
        return f"RootGeneration({self.nonce}, {self.progress}/{self.required})"

    @property
    def progress(self) -> int:
        """How many shares are held."""
        return self._attempt.progress

    def provide(self, share: bytes, nonce: str) -> bytes | None:
        """The unseal key once enough shares are held, else None. Raises InvalidRequest."""
        if nonce != self.nonce:
            raise InvalidRequest(
                f'incorrect nonce supplied; nonce for this root generation operation is "{self.nonce}"'
            )
        if len(share) < _SHARE_BYTES_MIN:
            raise InvalidRequest(f"invalid key: key is shorter than minimum {_SHARE_BYTES_MIN} bytes")
        if self._attempt.has(share):
            raise InvalidRequest("given key has already been provided during this generation operation")
        try:
            return self._attempt.provide(share)
        except InvalidShares:
            raise InvalidRequest("root generation aborted: the keys do not belong together") from None

    def encode(self, token: str) -> str:
        """``token`` xor the one-time pad, in base64 without padding."""
        hidden = bytes(left ^ right for left, right in zip(token.encode(), self._otp, strict=True))
        return base64.b64encode(hidden).decode().rstrip("=")


def _shape(nonce: str, *, started: bool, progress: int, required: int) -> dict[str, Any]:
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
