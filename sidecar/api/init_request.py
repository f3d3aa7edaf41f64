"""``sys/init``: what was asked for, checked whole before anything is made, and the answer (contract 4.4)."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plugin_api.errors import InvalidRequest
from sidecar.api.node_view import InitOptions, InitOutcome
from sidecar.core.pgp import PgpKey, encrypt_shares, parse_key, parse_keys
from sidecar.core.seal import SealConfig
from sidecar.core.seal_record import SHAMIR
from sidecar.request.fields import Fields


@dataclass(frozen=True, slots=True)
class InitRequest:
    """``recovery``: the shares are recovery shares. ``keys`` are one for each share, or none."""

    options: InitOptions
    recovery: bool
    keys: Sequence[PgpKey]
    root_token_key: PgpKey | None

    def answer(self, outcome: InitOutcome) -> dict[str, Any]:
        """The body: shares and root token, under their PGP keys where there are any."""
        shares = encrypt_shares(outcome.keys, self.keys)
        named = {"keys": [share.hex() for share in shares], "keys_base64": [_base64(share) for share in shares]}
        if self.recovery:
            named = {"keys": [], "keys_base64": [], **{f"recovery_{name}": value for name, value in named.items()}}
        token = outcome.root_token
        if self.root_token_key is not None:
            token = _base64(self.root_token_key.encrypt(token.encode()))
        return {**named, "root_token": token}


def init_request(fields: Fields, seal_kind: str) -> InitRequest:
    """Read a request for a node whose configured seal is ``seal_kind``. Raises InvalidRequest. PGP keys have encrypted
    once when this returns, so that nothing can be lost by them later."""
    recovery = seal_kind != SHAMIR
    kind, other = ("recovery", "secret") if recovery else ("secret", "recovery")
    for absent in ((f"{other}_shares", f"{other}_threshold"), ("stored_shares",) if not recovery else ()):
        if any(fields.integer(name) for name in absent):
            raise InvalidRequest(f"parameters {','.join(absent)} not applicable to seal type {seal_kind}")
    keys_name, other_keys = ("recovery_pgp_keys", "pgp_keys") if recovery else ("pgp_keys", "recovery_pgp_keys")
    if fields.strings(other_keys):
        raise InvalidRequest(f"parameters {other_keys} not applicable to seal type {seal_kind}")
    if fields.boolean("disable_unseal_recovery"):
        raise InvalidRequest("disable_unseal_recovery is not available: recovery shares always unseal a node")
    config = SealConfig(fields.integer(f"{kind}_shares"), fields.integer(f"{kind}_threshold"))
    if recovery and config.shares < 1:
        raise InvalidRequest("recovery configuration must specify a positive number of shares")
    config.validate()
    keys = parse_keys(fields.strings(keys_name), config.shares, keys_name)
    token_key = fields.string("root_token_pgp_key")
    return InitRequest(
        InitOptions(config.shares, config.threshold), recovery, keys, parse_key(token_key) if token_key else None
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
