"""A rekey: the root key stays, and what opens it becomes new. Pure but for the random bytes it is given.

Three things can be renewed, each authorised by a threshold of the shares in force (contract 4.6):

* the unseal shares of a cluster without an auto seal;
* the recovery shares of a cluster with one, which it keeps beside it;
* the auto seal's own part of the seal record, for which nobody is given any shares.

All are one new :class:`~sidecar.core.seal_record.SealRecord`. With verification asked for, it comes into force only
once a threshold of the *new* shares was given back: whoever loses the answer with the new shares has lost nothing.
"""

from __future__ import annotations

import enum
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from plugin_api.errors import InvalidRequest
from sidecar.core.pgp import PgpKey, encrypt_shares
from sidecar.core.quorum import Quorum, Words
from sidecar.core.seal import KEY_BYTES, SealConfig, split
from sidecar.core.seal_record import SealRecord, WrongKey, make_seal_record, open_root_key, root_fingerprint
from sidecar.core.seals import Sealer

CANCEL_NEEDS_NONCE_S = 600
"""So long after its start a rekey or a root generation is only cancelled by who knows its nonce (a rekey also at Vault,
since CVE-2025-4656)."""
_OLD_SHARES = Words("rekey", "rekey", "rekey aborted")
_NEW_SHARES = Words("verify", "verify", "rekey verification failed")


class Target(enum.Enum):
    """What a rekey renews."""

    UNSEAL_SHARES = "unseal shares"
    RECOVERY_SHARES = "recovery shares"
    AUTO_SEAL = "auto seal"


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for. ``keys`` are one for each share, or none."""

    target: Target
    shape: SealConfig
    keys: tuple[PgpKey, ...] = ()
    backup: bool = False
    require_verification: bool = False

    @property
    def fingerprints(self) -> list[str] | None:
        """Of the PGP keys, in order; None without any."""
        return [key.fingerprint for key in self.keys] or None


@dataclass(frozen=True, slots=True)
class NewKeys:
    """The new shares as they are handed out, once, under their PGP keys where there are any; and the record they
    open."""

    shares: Sequence[bytes] = field(repr=False)
    record: SealRecord


class Rekey:
    """One rekey: first the old shares, then the new record and, if that was asked for, the new shares back."""

    def __init__(
        self, in_force: SealRecord, request: Request, *, started_s: float, new_nonce: Callable[[], str]
    ) -> None:
        request.shape.validate()
        self.request = request
        self.started_s = started_s
        self.old_shares = Quorum(in_force.config, new_nonce(), _OLD_SHARES)
        self.new_shares: Quorum | None = None
        self._unproven = in_force
        self._new_nonce = new_nonce

    def __repr__(self) -> str:
        return f"Rekey({self.request.target.value}, {self.old_shares}, {self.new_shares})"

    @property
    def nonce(self) -> str:
        """Names the rekey."""
        return self.old_shares.nonce

    def authorise(self, share: bytes, nonce: str) -> bytes | None:
        """Take one old share; the old share key once there are enough, else None. Raises InvalidRequest."""
        if self.new_shares is not None:
            raise InvalidRequest(
                f'the new keys were issued and wait for verification; its nonce is "{self.new_shares.nonce}"'
            )
        return self.old_shares.give(share, nonce)

    def issue(
        self,
        in_force: SealRecord,
        share_key: bytes,
        fingerprint: str,
        sealer: Sealer | None,
        now_s: float,
        random_bytes: Callable[[int], bytes],
    ) -> NewKeys:
        """The new record, in the place of ``in_force``, whose root key ``share_key`` opens and ``fingerprint`` names.
        ``sealer`` is the configured auto seal's. Raises InvalidRequest, after which the old shares are asked for
        again."""
        root_key = _open(in_force, share_key, fingerprint)
        if self.request.target is Target.AUTO_SEAL:
            if sealer is None:
                raise InvalidRequest("rekey aborted: this node is not configured for the cluster's auto seal")
            return NewKeys((), replace(in_force, auto=sealer(root_key)))
        fresh, shape = random_bytes(KEY_BYTES), self.request.shape
        shares = split(fresh, shape.shares, shape.threshold, random_bytes)
        record = make_seal_record(root_key, fresh, shape, int(now_s), random_bytes).with_auto(in_force.auto)
        return NewKeys(encrypt_shares(shares, self.request.keys), record)

    def prove_first(self, record: SealRecord) -> Quorum:
        """Keep ``record`` back until a threshold of its shares was given back."""
        self._unproven = record
        self.new_shares = Quorum(record.config, self._new_nonce(), _NEW_SHARES)
        return self.new_shares

    def prove_again(self) -> Quorum:
        """Forget which new shares were given back; the nonce of before is worth nothing any more. Raises
        InvalidRequest."""
        proof = self.proof()
        proof.restart(self._new_nonce())
        return proof

    def proof(self) -> Quorum:
        """The new shares given back so far. Raises InvalidRequest where none are waited for."""
        if self.new_shares is None:
            raise InvalidRequest("no rekey verification in progress")
        return self.new_shares

    def prove(self, share: bytes, nonce: str) -> SealRecord | None:
        """Take one new share back; the record to commit once enough open it, else None. Raises InvalidRequest; a
        threshold of wrong shares starts the verification over."""
        proof, record = self.proof(), self._unproven
        share_key = proof.give(share, nonce)
        if share_key is None:
            return None
        try:
            open_root_key(record, share_key)
        except WrongKey:
            self.prove_again()
            raise InvalidRequest("rekey verification failed: these are not the new keys") from None
        return record

    def may_cancel(self, nonce: str, now_s: float) -> bool:
        """Whether a request to cancel with this nonce, or none, counts."""
        return nonce == self.nonce or (not nonce and now_s - self.started_s >= CANCEL_NEEDS_NONCE_S)


def _open(record: SealRecord, share_key: bytes, fingerprint: str) -> bytes:
    try:
        root_key = open_root_key(record, share_key)
    except WrongKey as error:
        raise InvalidRequest(f"rekey aborted: {error}") from None
    if not hmac.compare_digest(root_fingerprint(root_key), fingerprint):
        raise InvalidRequest("rekey aborted: the keys are those of another cluster")
    return root_key
