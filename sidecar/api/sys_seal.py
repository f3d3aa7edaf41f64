"""``sys/seal``, ``sys/step-down``, key rotation, and a root token from key shares (contract 4.5, 4.7, 4.8)."""

from __future__ import annotations

import base64
import uuid
from typing import Any

from plugin_api.errors import InvalidRequest, PluginError, ReadOnlyStorage
from plugin_api.formats import format_time
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.core.keys import SEAL
from sidecar.core.pgp import PgpKey, parse_key
from sidecar.core.quorum import Quorum, Words
from sidecar.core.rotation import RotationPolicy, rotate, rotation_policy, set_rotation_policy
from sidecar.core.seal import SealConfig, decode_share
from sidecar.core.seal_record import SealRecord, WrongKey, open_root_key, root_fingerprint
from sidecar.core.token_ids import RANDOM_LENGTH, SERVICE_PREFIX, base62
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields

OTP_LENGTH = len(SERVICE_PREFIX) + RANDOM_LENGTH
"""As long as a root token, which it hides by exclusive or."""
_WORDS = Words("root generation", "generation", "root generation aborted", invalid="invalid key: ")


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
            Route(
                "rotate/config",
                {read: self._rotate_config, update: self._set_rotate_config},
                help="When encryption keys are rotated by themselves.",
            ),
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
        policy = await rotation_policy(self._core.sealed)
        interval = go_duration(policy.interval_s) if policy.interval_s else 0
        return Answer({"enabled": policy.enabled, "interval": interval, "max_operations": policy.max_operations})

    async def _set_rotate_config(self, call: Call, params: Params) -> None:
        if not self._core.writable():
            raise ReadOnlyStorage
        fields, old = Fields(call.data), await rotation_policy(self._core.sealed)
        policy = RotationPolicy(
            enabled=fields.boolean("enabled", old.enabled),
            interval_s=fields.duration_s("interval", old.interval_s),
            max_operations=fields.integer("max_operations", old.max_operations),
        )
        await set_rotation_policy(self._core.sealed, policy)

    # -- a root token from key shares

    async def _progress(self, call: Call, params: Params) -> Answer:
        return Answer(raw=await self._state())

    async def _begin(self, call: Call, params: Params) -> Answer:
        if self._generation is not None:
            raise InvalidRequest("root generation already in progress")
        fields = Fields(call.data)
        otp, pgp_text, made_here = fields.string("otp"), fields.string("pgp_key"), ""
        key = None
        if pgp_text:
            if otp:
                raise InvalidRequest("give otp or pgp_key, not both")
            key = parse_key(pgp_text)
        elif not otp:
            otp = made_here = base62(OTP_LENGTH, self._core.random_bytes)
        if key is None and len(otp.encode()) != OTP_LENGTH:
            raise InvalidRequest("OTP string is wrong length")
        record = await self._record()
        if self._generation is not None:
            raise InvalidRequest("root generation already in progress")
        self._generation = RootGeneration(record.config, otp, key)
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
        share_key = generation.provide(share, nonce)
        if share_key is None:
            return Answer(raw={**await self._state(), "otp_length": 0})
        await self._verify(share_key)
        if self._generation is not generation:
            raise InvalidRequest("no root generation in progress")
        self._generation = None
        issued = await self._core.tokens.create_root()
        encoded = generation.encode(issued.token)
        return Answer(
            raw={
                **_shape(generation.nonce, started=True, progress=generation.required, required=generation.required),
                "complete": True,
                "pgp_fingerprint": generation.fingerprint,
                "encoded_token": encoded,
                "encoded_root_token": encoded,
                "otp_length": 0,
            }
        )

    async def _verify(self, share_key: bytes) -> None:
        """Raise unless the shares combine to the key that opens this cluster's own root key."""
        try:
            root_key = open_root_key(await self._record(), share_key)
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
        shape = _shape(generation.nonce, started=True, progress=generation.progress, required=generation.required)
        return shape | {"pgp_fingerprint": generation.fingerprint}


class RootGeneration:
    """One attempt: shares so far, and what hides the token from whoever only sees the answers: a one-time pad, or a PGP
    key."""

    def __init__(self, config: SealConfig, otp: str, key: PgpKey | None = None) -> None:
        self._quorum = Quorum(config, str(uuid.uuid4()), _WORDS)
        self.nonce = self._quorum.nonce
        self.required = config.threshold
        self._otp = otp.encode()
        self._key = key

    def __repr__(self) -> str:
        return f"RootGeneration({self._quorum})"

    @property
    def progress(self) -> int:
        """How many shares are held."""
        return self._quorum.progress

    @property
    def fingerprint(self) -> str:
        """Of the PGP key; empty with a one-time pad."""
        return self._key.fingerprint if self._key else ""

    def provide(self, share: bytes, nonce: str) -> bytes | None:
        """The share key once enough shares are held, else None. Raises InvalidRequest."""
        return self._quorum.give(share, nonce)

    def encode(self, token: str) -> str:
        """``token`` under the PGP key, or xor the one-time pad; in base64, the latter without padding."""
        if self._key is not None:
            return base64.b64encode(self._key.encrypt(token.encode())).decode()
        hidden = bytes(left ^ right for left, right in zip(token.encode(), self._otp, strict=True))
        return base64.b64encode(hidden).decode().rstrip("=")


def go_duration(seconds: int) -> str:
    """As Go prints it: ``4320h0m0s``."""
    return f"{seconds // 3600}h{seconds // 60 % 60}m{seconds % 60}s"


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
