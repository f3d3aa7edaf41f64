"""DR operation tokens: what lets somebody act on a DR secondary, which knows no other token (contract 1.16).

Either the one token that a threshold of key share holders generated on this cluster: it has no lifetime, is replaced by
the next one, and only its digest is kept (192 random bits need no salt). Or a batch token made on the primary whose
policies allow ``update`` on the path that is called: batch tokens carry themselves, and their policies are mirrored.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

from plugin_api.errors import InvalidRequest, PermissionDenied
from plugin_api.request import Operation
from sidecar.core.batch_tokens import KEY_LABEL, BatchTokens
from sidecar.core.policies import PolicyStore
from sidecar.core.store_view import SealedStore
from sidecar.core.token_entry import ROOT_POLICY, TokenEntry
from sidecar.core.token_ids import BATCH_PREFIX, RANDOM_LENGTH, SERVICE_PREFIX, base62

KEY = "c/replication/dr-operation-token"
MISSING = 'missing "dr_operation_token": a DR operation token is needed on a DR secondary'
_TOKEN_BYTES_MAX = 8192


class OperationTokens:
    """Makes and checks them. ``now`` returns unix seconds."""

    def __init__(
        self,
        sealed: SealedStore,
        policies: PolicyStore,
        now: Callable[[], float],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._sealed = sealed
        self._policies = policies
        self._now = now
        self._random_bytes = random_bytes
        self._batch = BatchTokens(sealed.barrier.derived_key(KEY_LABEL))

    async def issue(self) -> str:
        """A new token, which replaces the one before."""
        token = SERVICE_PREFIX + base62(RANDOM_LENGTH, self._random_bytes)
        await self._sealed.put(KEY, _digest(token))
        return token

    async def check(
        self, token: str, path: str, data: Mapping[str, Any], allowed_from: Callable[[TokenEntry], bool]
    ) -> None:
        """Raises InvalidRequest without a token, PermissionDenied unless it allows ``path``. ``allowed_from`` decides
        for a batch token whether the caller's address may use it."""
        if not token:
            raise InvalidRequest(MISSING)
        if len(token) > _TOKEN_BYTES_MAX or not token.isascii():
            raise PermissionDenied
        if token.startswith(BATCH_PREFIX):
            await self._check_batch(token, path, data, allowed_from)
        elif not await self._is_issued(token):
            raise PermissionDenied

    async def delete(self, token: str) -> None:
        """Forget the issued token, given itself. Raises InvalidRequest, PermissionDenied."""
        if not token:
            raise InvalidRequest(MISSING)
        if not token.isascii() or not await self._is_issued(token):
            raise PermissionDenied
        await self._sealed.delete(KEY)

    async def _is_issued(self, token: str) -> bool:
        stored = await self._sealed.get(KEY)
        return stored is not None and hmac.compare_digest(stored, _digest(token))

    async def _check_batch(
        self, token: str, path: str, data: Mapping[str, Any], allowed_from: Callable[[TokenEntry], bool]
    ) -> None:
        entry = self._batch.read(token)
        # One with a parent depends on a token that nothing here can look after: its parent may be revoked unseen.
        if entry is None or entry.parent or not entry.alive(self._now()) or ROOT_POLICY in entry.policies:
            raise PermissionDenied
        acl = await self._policies.acl(entry.policies)
        if not allowed_from(entry) or not acl.check(path, Operation.UPDATE, data, wrap_ttl_s=0).allowed:
            raise PermissionDenied


def _digest(token: str) -> bytes:
    return blake2b(token.encode(), digest_size=32, person=b"dr operation").digest()
