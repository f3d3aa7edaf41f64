"""Who this cluster is. Class ``l``: a DR secondary that is promoted takes over the identity."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import msgspec

from sidecar.core.keys import CLUSTER
from sidecar.core.store_view import SealedStore


class ClusterInfo(msgspec.Struct, frozen=True):
    """``cluster_id`` is a UUID made at initialisation; ``cluster_name`` is configured or made up."""

    cluster_id: str
    cluster_name: str

    @classmethod
    def generate(cls, cluster_name: str | None, random_bytes: Callable[[int], bytes]) -> ClusterInfo:
        """A new identity."""
        name = cluster_name or f"vault-cluster-{random_bytes(4).hex()}"
        return cls(str(uuid.UUID(bytes=random_bytes(16), version=4)), name)

    def encode(self) -> bytes:
        """As stored, before the barrier."""
        return msgspec.json.encode(self)

    @classmethod
    async def load(cls, sealed: SealedStore) -> ClusterInfo:
        """Raises LookupError where the store holds none: it was not initialised by this program."""
        raw = await sealed.get(CLUSTER)
        if raw is None:
            raise LookupError("the store holds no cluster identity")
        return msgspec.json.decode(raw, type=cls)
