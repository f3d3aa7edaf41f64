"""What a tenure reads before its API answers is put right from the log first.

A wrong value there would keep out the API by which a reindex is asked for, and a name that is gone would not be missed:
a mount that is in no list is served as if there were none.
"""

from __future__ import annotations

from consul_backend.reindex import heal
from consul_backend.replicated import ReplicatedStore
from sidecar.core.keys import QUOTA_CONFIG, REPLICATED_KEYRING, SEAL, TOKEN_SALT, VERSIONS


def _partition(key: str) -> tuple[str, str]:
    cls, name, _ = key.split("/", 2)
    return cls, name


# Small ones: the core of each class, and the quotas.
_PARTITIONS = tuple(_partition(key) for key in (REPLICATED_KEYRING, VERSIONS, SEAL, QUOTA_CONFIG))
_KEYS = (TOKEN_SALT,)


async def heal_needed(store: ReplicatedStore) -> None:
    """What cannot be put right is named in the log and left as it is. Raises FenceLost, and what reading raises."""
    await heal(store.inspected(), _PARTITIONS, _KEYS)
