"""What holders of key shares do together: a threshold of them, given one by one under the nonce that names the attempt.

Used wherever shares are a permission: a root token, a rekey, the proof that new shares have arrived. Pure; the caller
draws the nonces.
"""

from __future__ import annotations

from dataclasses import dataclass

from plugin_api.errors import InvalidRequest
from sidecar.core.seal import SHARE_BYTES_MAX, SHARE_BYTES_MIN, InvalidShares, SealConfig, UnsealAttempt


@dataclass(frozen=True, slots=True)
class Words:
    """How error texts name the operation: ``rekey``; ``... during this rekey operation``; ``rekey aborted: ...``."""

    nonce: str
    repeated: str
    aborted: str
    invalid: str = ""


class Quorum:
    """Shares of one key, of which ``config.threshold`` are wanted. Starts over by itself once that many were given."""

    def __init__(self, config: SealConfig, nonce: str, words: Words) -> None:
        self.config = config
        self.nonce = nonce
        self._words = words
        self._held = UnsealAttempt(config)

    def __repr__(self) -> str:
        return f"Quorum({self._words.nonce}, {self.nonce}, {self.progress}/{self.config.threshold})"

    @property
    def progress(self) -> int:
        """How many different shares are held."""
        return self._held.progress

    def restart(self, nonce: str) -> None:
        """Forget the shares; from now on only ``nonce`` counts."""
        self._held.reset()
        self.nonce = nonce

    def give(self, share: bytes, nonce: str) -> bytes | None:
        """Take a share; the key they make once there are enough, which may be a wrong one. Raises InvalidRequest for
        another nonce, a share that cannot be one or was given before, and shares that contradict each other."""
        words = self._words
        if nonce != self.nonce:
            raise InvalidRequest(f'incorrect nonce supplied; nonce for this {words.nonce} operation is "{self.nonce}"')
        if len(share) < SHARE_BYTES_MIN:
            raise InvalidRequest(f"{words.invalid}key is shorter than minimum {SHARE_BYTES_MIN} bytes")
        if len(share) > SHARE_BYTES_MAX:
            raise InvalidRequest(f"{words.invalid}key is longer than maximum {SHARE_BYTES_MAX} bytes")
        if self._held.has(share):
            raise InvalidRequest(f"given key has already been provided during this {words.repeated} operation")
        try:
            return self._held.provide(share)
        except InvalidShares:
            raise InvalidRequest(f"{words.aborted}: the keys do not belong together") from None
