"""Who this cluster is. Class ``l``: a DR secondary that is promoted takes over the identity of its primary; until then
it has one of its own, class ``c``."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import msgspec

from sidecar.core.keys import CLUSTER, PRIVATE_CLUSTER
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
    async def load(cls, sealed: SealedStore, *, mirror: bool = False) -> ClusterInfo:
        """``mirror``: of a DR secondary. Raises LookupError where the store holds none: it was not initialised by this
        program."""
        raw = await sealed.get(PRIVATE_CLUSTER) if mirror else None
        if raw is None:
            raw = await sealed.get(CLUSTER)
        if raw is None:
            raise LookupError("the store holds no cluster identity")
        return msgspec.json.decode(raw, type=cls)
