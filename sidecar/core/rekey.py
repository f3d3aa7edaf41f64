"""A rekey: the root key stays, the unseal key that guards it becomes a new one in new shares. Pure but for the random
bytes it is given.

The holders of the old shares agree by giving a threshold of them. With verification asked for, the new seal record
comes into force only once a threshold of the *new* shares was given back: whoever loses the answer with the new
shares has lost nothing.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field

from plugin_api.errors import InvalidRequest
from sidecar.core.seal import (
    KEY_BYTES,
    SHARE_BYTES_MAX,
    SHARE_BYTES_MIN,
    InvalidShares,
    SealConfig,
    UnsealAttempt,
    split,
)
from sidecar.core.seal_record import SealRecord, WrongKey, make_seal_record, open_root_key, root_fingerprint

NewNonce = Callable[[], str]


@dataclass(frozen=True, slots=True)
class NewKeys:
    """The new shares, shown once, and the record they open."""

    shares: list[bytes] = field(repr=False)
    record: SealRecord


class Verification:
    """Waits for a threshold of the new shares."""

    def __init__(self, record: SealRecord, new_nonce: NewNonce) -> None:
        self.config = record.config
        self.nonce = new_nonce()
        self._record = record
        self._new_nonce = new_nonce
        self._attempt = UnsealAttempt(record.config)

    def __repr__(self) -> str:
        return f"Verification({self.nonce}, {self.progress}/{self.config.threshold})"

    @property
    def progress(self) -> int:
        """How many new shares were given back."""
        return self._attempt.progress

    def restart(self) -> None:
        """Forget what was given back; the nonce of before is worth nothing any more."""
        self._attempt.reset()
        self.nonce = self._new_nonce()

    def provide(self, share: bytes, nonce: str) -> SealRecord | None:
        """The record to commit once enough shares open it, else None. Raises InvalidRequest; a threshold of wrong
        shares starts the verification over."""
        _check_nonce("verify", self.nonce, nonce)
        _check_share(self._attempt, share, "verify")
        try:
            unseal_key = self._attempt.provide(share)
            if unseal_key is None:
                return None
            open_root_key(self._record, unseal_key)
        except (InvalidShares, WrongKey):
            self.restart()
            raise InvalidRequest("rekey verification failed: these are not the new keys") from None
        return self._record


class Rekey:
    """One attempt. ``current`` is the shape of the shares in force, ``target`` of those to be made."""

    def __init__(
        self, current: SealConfig, target: SealConfig, *, require_verification: bool, new_nonce: NewNonce
    ) -> None:
        target.validate()
        self.target = target
        self.required = current.threshold
        self.require_verification = require_verification
        self.nonce = new_nonce()
        self.verification: Verification | None = None
        self._new_nonce = new_nonce
        self._attempt = UnsealAttempt(current)

    def __repr__(self) -> str:
        return f"Rekey({self.nonce}, {self.progress}/{self.required})"

    @property
    def progress(self) -> int:
        """How many old shares are held."""
        return self._attempt.progress

    def provide(self, share: bytes, nonce: str) -> bytes | None:
        """The old unseal key once enough of its shares are held, else None. Raises InvalidRequest."""
        if self.verification is not None:
            raise InvalidRequest(
                f'the new keys were issued and wait for verification; its nonce is "{self.verification.nonce}"'
            )
        _check_nonce("rekey", self.nonce, nonce)
        _check_share(self._attempt, share, "rekey")
        try:
            return self._attempt.provide(share)
        except InvalidShares:
            raise InvalidRequest("rekey aborted: the keys do not belong together") from None

    def make(
        self,
        record: SealRecord,
        unseal_key: bytes,
        fingerprint: str,
        now_s: float,
        random_bytes: Callable[[int], bytes],
    ) -> NewKeys:
        """New shares of a new unseal key for the root key in ``record``, which must have ``fingerprint``. Raises
        InvalidRequest where ``unseal_key`` does not open it."""
        try:
            root_key = open_root_key(record, unseal_key)
        except WrongKey as error:
            raise InvalidRequest(f"rekey aborted: {error}") from None
        if not hmac.compare_digest(root_fingerprint(root_key), fingerprint):
            raise InvalidRequest("rekey aborted: the keys are those of another cluster")
        fresh = random_bytes(KEY_BYTES)
        shares = split(fresh, self.target.shares, self.target.threshold, random_bytes)
        return NewKeys(shares, make_seal_record(root_key, fresh, self.target, int(now_s), random_bytes))

    def verify_first(self, record: SealRecord) -> Verification:
        """Keep ``record`` back until its shares were given back."""
        self.verification = Verification(record, self._new_nonce)
        return self.verification


def _check_nonce(what: str, wanted: str, given: str) -> None:
    if given != wanted:
        raise InvalidRequest(f'incorrect nonce supplied; nonce for this {what} operation is "{wanted}"')


def _check_share(attempt: UnsealAttempt, share: bytes, what: str) -> None:
    if len(share) < SHARE_BYTES_MIN:
        raise InvalidRequest(f"key is shorter than minimum {SHARE_BYTES_MIN} bytes")
    if len(share) > SHARE_BYTES_MAX:
        raise InvalidRequest(f"key is longer than maximum {SHARE_BYTES_MAX} bytes")
    if attempt.has(share):
        raise InvalidRequest(f"given key has already been provided during this {what} operation")
