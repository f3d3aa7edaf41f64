"""``sys/rekey/*`` and ``sys/rekey-recovery-key/*``: new shares, or a new auto-seal key, for the same root key
(contract 4.6)."""

from __future__ import annotations

import base64
import logging
import uuid
from typing import Any

import msgspec

from consul_backend.errors import OutcomeUnknown
from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, PluginError
from plugin_api.request import Operation
from sidecar.api.sys_core import Params, Route, SysCore
from sidecar.core.keys import RECOVERY_KEYS_BACKUP, SEAL, SEAL_SHARES, UNSEAL_KEYS_BACKUP
from sidecar.core.pgp import parse_keys
from sidecar.core.quorum import Quorum
from sidecar.core.rekey import NewKeys, Rekey, Request, Target
from sidecar.core.seal import SealConfig, decode_share
from sidecar.core.seal_record import SHAMIR, SealRecord
from sidecar.request.call import Answer, Call
from sidecar.request.fields import Fields

log = logging.getLogger("core")

NOT_IN_PROGRESS = "no rekey configuration found"
UNCONFIRMED = (
    "the store did not confirm the new seal: keep the old key shares AND these until one of the two has unsealed a node"
)
STILL_OLD = (
    "these secondaries have not received the new key shares, and the old ones open them until they have: {names}. Keep "
    'the old shares until "shares_issued" in their sys/seal-status is the same as here'
)


class Backup(msgspec.Struct):
    """What is kept of a rekey with ``backup``: PGP messages by the fingerprint of their key."""

    nonce: str
    messages: dict[str, list[bytes]]


class SysRekey:
    """Handlers of one tenure for one prefix: ``rekey``, or with ``recovery`` ``rekey-recovery-key``. A rekey in
    progress ends with the tenure, and nothing has changed then; one change at a time."""

    def __init__(self, core: SysCore, *, recovery: bool = False) -> None:
        self._core = core
        self._recovery = recovery
        self._rekey: Rekey | None = None
        self._lock = core.seal_lock

    def routes(self) -> list[Route]:
        """Rows of the table. A rekey is open: the key shares are the permission."""
        read, update, delete = Operation.READ, Operation.UPDATE, Operation.DELETE
        prefix = "rekey-recovery-key" if self._recovery else "rekey"
        backup = {read: self._read_backup, delete: self._delete_backup}
        return [
            Route(f"{prefix}/init", {read: self._progress, update: self._begin, delete: self._cancel}, open=True),
            Route(f"{prefix}/update", {update: self._provide}, open=True),
            Route(
                f"{prefix}/verify",
                {read: self._verify_progress, update: self._verify, delete: self._verify_again},
                open=True,
            ),
            Route("rekey/recovery-key-backup" if self._recovery else "rekey/backup", backup),
            *([Route("rekey-recovery-key/backup", backup)] if self._recovery else []),
        ]

    # -- the old shares

    async def _progress(self, call: Call, params: Params) -> Answer:
        return Answer(raw=self._state(await self._in_force()))

    async def _begin(self, call: Call, params: Params) -> Answer:
        record = await self._in_force()
        request = _request(Fields(call.data), self._target(record))
        self._check_allowed()
        async with self._lock:
            if self._rekey is not None:
                raise InvalidRequest("rekey already in progress")
            record = await self._in_force()
            self._rekey = Rekey(record, request, started_s=self._core.now(), new_nonce=_new_nonce)
            log.info(
                "rekey of the %s initialized: shares=%d threshold=%d",
                request.target.value,
                request.shape.shares,
                request.shape.threshold,
            )
            return Answer(raw=self._state(record))

    async def _cancel(self, call: Call, params: Params) -> None:
        nonce = Fields(call.data).string("nonce")
        if not nonce and call.token:
            # Clients that know of no nonce: who may delete this path by a token need not know it.
            async with self._core.pipeline.identified(call):
                self._core.pipeline.authorize(call)
        allowed = call.identity is not None
        async with self._lock:
            if self._rekey is None:
                return
            if not allowed and not self._rekey.may_cancel(nonce, self._core.now()):
                raise InvalidRequest(
                    "a rekey that was started within the last 10 minutes is cancelled with its nonce, or with a token"
                )
            self._rekey = None

    async def _provide(self, call: Call, params: Params) -> Answer:
        record = await self._in_force()
        share, nonce = _share(call)
        self._check_allowed()
        async with self._lock:
            rekey = self._started()
            share_key = rekey.authorise(share, nonce)
            if share_key is None:
                return Answer(raw=self._state(record))
            core = self._core
            record = await self._in_force()
            renews_auto = rekey.request.target is Target.AUTO_SEAL
            sealer = await core.node.sealer() if renews_auto and core.node.seal_kind == record.kind else None
            made = rekey.issue(
                record, share_key, core.sealed.barrier.root_fingerprint, sealer, core.now(), core.random_bytes
            )
            if rekey.request.require_verification:
                if (backup := self._backup(rekey, made)) is not None:
                    await core.sealed.commit([backup])
                return Answer(raw=_finished(rekey, made, rekey.prove_first(made.record)))
            return Answer(raw=await self._put_in_force(rekey, made))

    async def _put_in_force(self, rekey: Rekey, made: NewKeys) -> dict[str, Any]:
        """Commit the new seal record and answer with its shares. After a lost confirmation they are the only ones, or
        none: the operator gets them, and is told."""
        try:
            warnings = await self._commit(rekey, made.record, self._backup(rekey, made))
        except OutcomeUnknown:
            log.error("rekey: %s", UNCONFIRMED)
            return _finished(rekey, made, None) | {"warnings": [UNCONFIRMED]}
        return _finished(rekey, made, None) | warnings

    # -- the new shares back

    async def _verify_progress(self, call: Call, params: Params) -> Answer:
        await self._in_force()
        return Answer(raw=_proof_state(self._started().proof()))

    async def _verify_again(self, call: Call, params: Params) -> Answer:
        async with self._lock:
            return Answer(raw=_proof_state(self._started().prove_again()))

    async def _verify(self, call: Call, params: Params) -> Answer:
        await self._in_force()
        share, nonce = _share(call)
        self._check_allowed()
        async with self._lock:
            rekey = self._started()
            record = rekey.prove(share, nonce)
            if record is None:
                return Answer(raw=_proof_state(rekey.proof()))
            warnings = await self._commit(rekey, record, None)
            return Answer(raw={"nonce": nonce, "complete": True} | warnings)

    async def _commit(self, rekey: Rekey, record: SealRecord, backup: Write | None) -> dict[str, Any]:
        """One fenced transaction: a node that starts now reads the old record or the new one, and the secondaries get
        the new one by it. What was certainly not applied leaves the rekey where it is. Returns what to add to the
        answer: which secondaries the old shares open still."""
        writes = [Write(SEAL, record.encode()), *([backup] if backup else [])]
        new_shares = rekey.request.target is not Target.AUTO_SEAL
        if new_shares:
            writes.append(Write(SEAL_SHARES, record.with_auto(None).encode()))
        try:
            head = await self._core.sealed.commit(writes)
        except OutcomeUnknown:
            self._rekey = None
            raise
        self._rekey = None
        log.info("security barrier rekeyed: shares=%d threshold=%d", record.shares, record.threshold)
        replication = self._core.replication
        late = await replication.lacking_record(head.index) if new_shares and replication is not None else []
        if not late:
            return {}
        log.warning("rekey: not received yet by these secondaries: %s", ", ".join(late))
        return {"warnings": [STILL_OLD.format(names=", ".join(late))]}

    # -- PGP messages kept for those who lost theirs

    @property
    def _backup_key(self) -> str:
        return RECOVERY_KEYS_BACKUP if self._recovery else UNSEAL_KEYS_BACKUP

    def _backup(self, rekey: Rekey, made: NewKeys) -> Write | None:
        if not rekey.request.backup:
            return None
        messages: dict[str, list[bytes]] = {}
        for key, message in zip(rekey.request.keys, made.shares, strict=True):
            messages.setdefault(key.fingerprint, []).append(message)
        return Write(self._backup_key, msgspec.json.encode(Backup(rekey.nonce, messages)))

    async def _read_backup(self, call: Call, params: Params) -> Answer:
        raw = await self._core.sealed.get(self._backup_key)
        if raw is None:
            raise InvalidRequest("no backed-up keys found")
        kept = msgspec.json.decode(raw, type=Backup)
        return Answer(
            {
                "nonce": kept.nonce,
                "keys": {name: [each.hex() for each in found] for name, found in kept.messages.items()},
                "keys_base64": {name: [_base64(each) for each in found] for name, found in kept.messages.items()},
            }
        )

    async def _delete_backup(self, call: Call, params: Params) -> None:
        if await self._core.sealed.get_raw(self._backup_key) is not None:
            await self._core.sealed.delete(self._backup_key)

    # -- state

    def _target(self, record: SealRecord) -> Target:
        self._check_seal(record)
        if self._recovery:
            return Target.RECOVERY_SHARES
        return Target.UNSEAL_SHARES if record.kind == SHAMIR else Target.AUTO_SEAL

    def _check_seal(self, record: SealRecord) -> None:
        if self._recovery and record.auto is None:
            raise InvalidRequest("recovery rekeying not supported")

    def _check_allowed(self) -> None:
        if not self._core.writable():
            raise InvalidRequest("rekeying can only be performed on the primary cluster when replication is activated")

    def _started(self) -> Rekey:
        if self._rekey is None:
            raise InvalidRequest(NOT_IN_PROGRESS)
        return self._rekey

    async def _in_force(self) -> SealRecord:
        raw = await self._core.sealed.get_raw(SEAL)
        if raw is None:
            raise PluginError("the seal record is missing")
        record = SealRecord.decode(raw)
        self._check_seal(record)
        return record

    def _state(self, record: SealRecord) -> dict[str, Any]:
        rekey = self._rekey
        shape: dict[str, Any] = {
            "nonce": "",
            "started": False,
            "t": 0,
            "n": 0,
            "progress": 0,
            "required": record.threshold,
            "pgp_fingerprints": None,
            "backup": False,
            "verification_required": False,
        }
        if rekey is None:
            return shape
        request = rekey.request
        shape |= {
            "nonce": rekey.nonce,
            "started": True,
            "t": request.shape.threshold,
            "n": request.shape.shares,
            "progress": rekey.old_shares.progress,
            "required": rekey.old_shares.config.threshold,
            "pgp_fingerprints": request.fingerprints,
            "backup": request.backup,
            "verification_required": request.require_verification,
        }
        return shape | ({"verification_nonce": rekey.new_shares.nonce} if rekey.new_shares else {})


def _request(fields: Fields, target: Target) -> Request:
    shape = SealConfig(fields.integer("secret_shares"), fields.integer("secret_threshold"))
    shape.validate()
    texts, backup = fields.strings("pgp_keys"), fields.boolean("backup")
    verification = fields.boolean("require_verification")
    if target is Target.AUTO_SEAL:
        # What guards the root key is the auto seal's own: there is nobody to hand a share to.
        if (shape.shares, shape.threshold) != (1, 1) or fields.integer("stored_shares", 1) != 1:
            raise InvalidRequest("secret_shares, secret_threshold and stored_shares must be 1 with an auto seal")
        if texts or backup or verification:
            raise InvalidRequest("pgp_keys, backup and require_verification do not apply: no key shares are issued")
    elif fields.integer("stored_shares"):
        raise InvalidRequest(f"parameters stored_shares not applicable to {target.value}")
    if backup and not texts:
        raise InvalidRequest("cannot request a backup of the new keys without providing PGP keys for encryption")
    return Request(target, shape, tuple(parse_keys(texts, shape.shares, "pgp_keys")), backup, verification)


def _new_nonce() -> str:
    return str(uuid.uuid4())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _share(call: Call) -> tuple[bytes, str]:
    fields = Fields(call.data)
    text, nonce = fields.string("key"), fields.string("nonce")
    if not text:
        raise InvalidRequest("'key' must be specified in request body as JSON")
    return decode_share(text), nonce


def _finished(rekey: Rekey, made: NewKeys, proof: Quorum | None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "nonce": rekey.nonce,
        "complete": True,
        "keys": [share.hex() for share in made.shares],
        "keys_base64": [_base64(share) for share in made.shares],
        "pgp_fingerprints": rekey.request.fingerprints,
        "backup": rekey.request.backup,
        "verification_required": proof is not None,
    }
    return body | ({"verification_nonce": proof.nonce} if proof is not None else {})


def _proof_state(proof: Quorum) -> dict[str, Any]:
    return {
        "nonce": proof.nonce,
        "started": True,
        "t": proof.config.threshold,
        "n": proof.config.shares,
        "progress": proof.progress,
    }
