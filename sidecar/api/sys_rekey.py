"""``sys/rekey/*``: new unseal key shares for the same root key (contract 4.6)."""

from __future__ import annotations

import asyncio
import base64
import logging
import uuid
from typing import Any

from consul_backend.errors import OutcomeUnknown
from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, PluginError
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.core.keys import SEAL
from sidecar.core.rekey import NewKeys, Rekey, Verification
from sidecar.core.seal import SealConfig, decode_share
from sidecar.core.seal_record import SealRecord
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields

log = logging.getLogger("core")

NOT_IN_PROGRESS = "no rekey configuration found"
UNCONFIRMED = (
    "the store did not confirm the new seal: keep the old key shares AND these until one of the two has unsealed a node"
)


class SysRekey:
    """Handlers of one tenure. A rekey in progress ends with it, and nothing has changed then; one change at a time."""

    def __init__(self, core: SysCore) -> None:
        self._core = core
        self._rekey: Rekey | None = None
        self._lock = asyncio.Lock()

    def routes(self) -> list[Route]:
        """Rows of the table. A rekey is open: the key shares are the permission."""
        read, update, delete = Operation.READ, Operation.UPDATE, Operation.DELETE
        refused = {read: self._no_recovery, update: self._no_recovery, delete: self._no_recovery}
        return [
            Route("rekey/init", {read: self._progress, update: self._begin, delete: self._cancel}, open=True),
            Route("rekey/update", {update: self._provide}, open=True),
            Route(
                "rekey/verify",
                {read: self._verify_progress, update: self._verify, delete: self._verify_again},
                open=True,
            ),
            Route("rekey/backup", {read: self._no_backup, delete: self._nothing}),
            Route("rekey/recovery-key-backup", {read: self._no_backup, delete: self._nothing}),
            Route("rekey-recovery-key/{rest*}", refused, open=True),
        ]

    async def _progress(self, call: Call, params: Params) -> Answer:
        return Answer(raw=await self._state())

    async def _begin(self, call: Call, params: Params) -> Answer:
        fields = Fields(call.data)
        target = SealConfig(fields.integer("secret_shares"), fields.integer("secret_threshold"))
        self._check_allowed()
        if fields.strings("pgp_keys"):
            raise InvalidRequest("encrypting keys or tokens with PGP is not supported")
        if fields.boolean("backup"):
            raise InvalidRequest("a backup of the new keys is not supported: it needs them encrypted with PGP")
        if fields.integer("stored_shares"):
            raise InvalidRequest("parameters stored_shares not applicable to seal type shamir")
        async with self._lock:
            if self._rekey is not None:
                raise InvalidRequest("rekey already in progress")
            self._rekey = Rekey(
                (await self._record()).config,
                target,
                require_verification=fields.boolean("require_verification"),
                new_nonce=_new_nonce,
            )
            log.info("rekey initialized: shares=%d threshold=%d", target.shares, target.threshold)
            return Answer(raw=await self._state())

    async def _cancel(self, call: Call, params: Params) -> None:
        async with self._lock:
            self._rekey = None

    async def _provide(self, call: Call, params: Params) -> Answer:
        share, nonce = _share(call)
        self._check_allowed()
        async with self._lock:
            rekey = self._started()
            unseal_key = rekey.provide(share, nonce)
            if unseal_key is None:
                return Answer(raw=await self._state())
            core = self._core
            made = rekey.make(
                await self._record(),
                unseal_key,
                core.sealed.barrier.root_fingerprint,
                core.now(),
                core.random_bytes,
            )
            if rekey.require_verification:
                return Answer(raw=_finished(rekey.nonce, made, rekey.verify_first(made.record)))
            return Answer(raw=await self._in_force(rekey, made))

    async def _in_force(self, rekey: Rekey, made: NewKeys) -> dict[str, Any]:
        """Commit the new seal record and answer with its shares. After a lost confirmation they are the only ones, or
        none: the operator gets them, and is told."""
        try:
            await self._commit(made.record)
        except OutcomeUnknown:
            log.error("rekey: %s", UNCONFIRMED)
            return _finished(rekey.nonce, made, None) | {"warnings": [UNCONFIRMED]}
        return _finished(rekey.nonce, made, None)

    async def _verify_progress(self, call: Call, params: Params) -> Answer:
        return Answer(raw=_verify_state(self._verifying()))

    async def _verify_again(self, call: Call, params: Params) -> Answer:
        async with self._lock:
            verification = self._verifying()
            verification.restart()
            return Answer(raw=_verify_state(verification))

    async def _verify(self, call: Call, params: Params) -> Answer:
        share, nonce = _share(call)
        self._check_allowed()
        async with self._lock:
            verification = self._verifying()
            record = verification.provide(share, nonce)
            if record is None:
                return Answer(raw=_verify_state(verification))
            await self._commit(record)
            return Answer(raw={"nonce": verification.nonce, "complete": True})

    async def _commit(self, record: SealRecord) -> None:
        """One entry, one fenced transaction: a node that starts now reads the old record or the new one. What was
        certainly not applied leaves the rekey where it is."""
        try:
            await self._core.sealed.commit([Write(SEAL, record.encode())])
        except OutcomeUnknown:
            self._rekey = None
            raise
        self._rekey = None
        log.info("security barrier rekeyed: shares=%d threshold=%d", record.shares, record.threshold)

    async def _no_backup(self, call: Call, params: Params) -> None:
        raise InvalidRequest("no backed-up keys found")

    async def _nothing(self, call: Call, params: Params) -> None:
        return None

    async def _no_recovery(self, call: Call, params: Params) -> None:
        raise InvalidRequest("recovery rekeying not supported")

    # -- state

    def _check_allowed(self) -> None:
        if not self._core.writable():
            raise InvalidRequest("rekeying can only be performed on the primary cluster when replication is activated")

    def _started(self) -> Rekey:
        if self._rekey is None:
            raise InvalidRequest(NOT_IN_PROGRESS)
        return self._rekey

    def _verifying(self) -> Verification:
        verification = self._started().verification
        if verification is None:
            raise InvalidRequest("no rekey verification in progress")
        return verification

    async def _record(self) -> SealRecord:
        raw = await self._core.sealed.get_raw(SEAL)
        if raw is None:
            raise PluginError("the seal record is missing")
        return SealRecord.decode(raw)

    async def _state(self) -> dict[str, Any]:
        rekey = self._rekey
        if rekey is None:
            return _shape("", required=(await self._record()).threshold)
        shape = _shape(rekey.nonce, required=rekey.required) | {
            "started": True,
            "t": rekey.target.threshold,
            "n": rekey.target.shares,
            "progress": rekey.progress,
            "verification_required": rekey.require_verification,
        }
        if rekey.verification is not None:
            shape["verification_nonce"] = rekey.verification.nonce
        return shape


def _new_nonce() -> str:
    return str(uuid.uuid4())


def _share(call: Call) -> tuple[bytes, str]:
    fields = Fields(call.data)
    text, nonce = fields.string("key"), fields.string("nonce")
    if not text:
        raise InvalidRequest("'key' must be specified in request body as JSON")
    return decode_share(text), nonce


def _shape(nonce: str, *, required: int) -> dict[str, Any]:
    return {
        "nonce": nonce,
        "started": False,
        "t": 0,
        "n": 0,
        "progress": 0,
        "required": required,
        "pgp_fingerprints": None,
        "backup": False,
        "verification_required": False,
    }


def _finished(nonce: str, made: NewKeys, verification: Verification | None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "nonce": nonce,
        "complete": True,
        "keys": [share.hex() for share in made.shares],
        "keys_base64": [base64.b64encode(share).decode() for share in made.shares],
        "pgp_fingerprints": None,
        "backup": False,
        "verification_required": verification is not None,
    }
    return body | ({"verification_nonce": verification.nonce} if verification is not None else {})


def _verify_state(verification: Verification) -> dict[str, Any]:
    return {
        "nonce": verification.nonce,
        "started": True,
        "t": verification.config.threshold,
        "n": verification.config.shares,
        "progress": verification.progress,
    }
