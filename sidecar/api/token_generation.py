"""A powerful token from key shares: a root token, or on a DR secondary a DR operation token (contract 1.16, 4.8)."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from plugin_api.errors import InvalidRequest, PluginError
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route
from sidecar.core.keys import SEAL
from sidecar.core.pgp import PgpKey, parse_key
from sidecar.core.quorum import Quorum, Words
from sidecar.core.rekey import CANCEL_NEEDS_NONCE_S
from sidecar.core.seal import SealConfig, decode_share
from sidecar.core.seal_record import SealRecord, WrongKey, open_root_key, root_fingerprint
from sidecar.core.store_view import SealedStore
from sidecar.core.token_ids import RANDOM_LENGTH, SERVICE_PREFIX, base62
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields

OTP_LENGTH = len(SERVICE_PREFIX) + RANDOM_LENGTH
"""As long as the token, which it hides by exclusive or."""
_WORDS = Words("root generation", "generation", "root generation aborted", invalid="invalid key: ")


class TokenGeneration:
    """Handlers below ``path`` for one tenure; an attempt in progress ends with it. ``issue`` makes the token;
    ``is_root`` says that the answer has it in ``encoded_root_token`` too. ``permitted`` tells whether a call's token
    may end an attempt that is not its own; raises where there is one that may not."""

    def __init__(
        self,
        path: str,
        sealed: SealedStore,
        random_bytes: Callable[[int], bytes],
        issue: Callable[[], Awaitable[str]],
        *,
        is_root: bool,
        now: Callable[[], float],
        permitted: Callable[[Call], Awaitable[bool]] | None = None,
    ) -> None:
        self._now = now
        self._permitted = permitted
        self._path = path
        self._sealed = sealed
        self._random_bytes = random_bytes
        self._issue = issue
        self._is_root = is_root
        self._generation: Generation | None = None

    def routes(self) -> list[Route]:
        """Rows of the table. They are open: the key shares are the permission."""
        read, update, delete = Operation.READ, Operation.UPDATE, Operation.DELETE
        attempt = {read: self._progress, update: self._begin, delete: self._cancel}
        return [
            Route(f"{self._path}/attempt", attempt, open=True),
            Route(f"{self._path}/update", {update: self._provide}, open=True),
        ]

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
            otp = made_here = base62(OTP_LENGTH, self._random_bytes)
        if key is None and len(otp.encode()) != OTP_LENGTH:
            raise InvalidRequest("OTP string is wrong length")
        record = await self._record()
        if self._generation is not None:
            raise InvalidRequest("root generation already in progress")
        self._generation = Generation(record.config, otp, key, started_s=self._now())
        return Answer(raw={**await self._state(), "otp": made_here})

    async def _cancel(self, call: Call, params: Params) -> None:
        nonce = Fields(call.data).string("nonce")
        allowed = not nonce and self._permitted is not None and await self._permitted(call)
        if self._generation is None:
            return
        if not allowed and not self._generation.may_cancel(nonce, self._now()):
            how = "its nonce" if self._permitted is None else "its nonce, or with a token"
            raise InvalidRequest(f"an attempt that was started within the last 10 minutes is cancelled with {how}")
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
        encoded = generation.encode(await self._issue())
        return Answer(
            raw={
                **_shape(generation.nonce, started=True, progress=generation.required, required=generation.required),
                "complete": True,
                "pgp_fingerprint": generation.fingerprint,
                "encoded_token": encoded,
                "encoded_root_token": encoded if self._is_root else "",
                "otp_length": 0,
            }
        )

    async def _verify(self, share_key: bytes) -> None:
        """Raise unless the shares combine to the key that opens this cluster's own root key."""
        try:
            root_key = open_root_key(await self._record(), share_key)
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
        if self._generation is None:
            return _shape("", started=False, progress=0, required=(await self._record()).threshold)
        generation = self._generation
        shape = _shape(generation.nonce, started=True, progress=generation.progress, required=generation.required)
        return shape | {"pgp_fingerprint": generation.fingerprint}


class Generation:
    """One attempt: shares so far, and what hides the token from whoever only sees the answers: a one-time pad, or a PGP
    key."""

    def __init__(self, config: SealConfig, otp: str, key: PgpKey | None = None, *, started_s: float) -> None:
        self._quorum = Quorum(config, str(uuid.uuid4()), _WORDS)
        self.nonce = self._quorum.nonce
        self.required = config.threshold
        self._otp = otp.encode()
        self._key = key
        self._started_s = started_s

    def __repr__(self) -> str:
        return f"Generation({self._quorum})"

    @property
    def progress(self) -> int:
        """How many shares are held."""
        return self._quorum.progress

    @property
    def fingerprint(self) -> str:
        """Of the PGP key; empty with a one-time pad."""
        return self._key.fingerprint if self._key else ""

    def may_cancel(self, nonce: str, now_s: float) -> bool:
        """Whether a request to cancel with this nonce, or none, counts."""
        return nonce == self.nonce or (not nonce and now_s - self._started_s >= CANCEL_NEEDS_NONCE_S)

    def provide(self, share: bytes, nonce: str) -> bytes | None:
        """The share key once enough shares are held, else None. Raises InvalidRequest."""
        return self._quorum.give(share, nonce)

    def encode(self, token: str) -> str:
        """``token`` under the PGP key, or xor the one-time pad; in base64, the latter without padding."""
        if self._key is not None:
            return base64.b64encode(self._key.encrypt(token.encode())).decode()
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
