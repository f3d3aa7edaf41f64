"""The first entries of a store: of a new cluster, and of a cluster that becomes a secondary. Pure but for the random
bytes it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from consul_backend.wal import Write
from sidecar.core.barrier import Barrier
from sidecar.core.cluster import ClusterInfo
from sidecar.core.keyring import KEY_BYTES, Keyring
from sidecar.core.keys import (
    CLUSTER,
    LOCAL_KEYRING,
    POLICIES,
    PRIVATE_CLUSTER,
    PRIVATE_KEYRING,
    REPLICATED_KEYRING,
    SEAL,
    TOKEN_SALT,
)
from sidecar.core.mounts import built_in_cubbyhole, built_in_mounts, encode_mount
from sidecar.core.policies import DEFAULT, DEFAULT_POLICY
from sidecar.core.rotation import FIRST_RESERVATION
from sidecar.core.seal import SealConfig, split
from sidecar.core.seal_record import make_seal_record
from sidecar.core.seals import Sealer
from sidecar.core.token_entry import ROOT_POLICY, TokenEntry
from sidecar.core.token_ids import RANDOM_LENGTH, SALT_BYTES, SERVICE_PREFIX, base62, creation, keyed_hash


@dataclass(frozen=True, slots=True)
class Genesis:
    """``writes`` are ciphertext, ready for the store. ``keys`` and ``root_token`` are shown to the operator once."""

    writes: list[Write] = field(repr=False)
    keys: list[bytes] = field(repr=False)
    root_token: str = field(repr=False)
    root_fingerprint: str
    cluster: ClusterInfo


def build_genesis(
    *,
    shares: int,
    threshold: int,
    cluster_name: str | None,
    now_s: float,
    random_bytes: Callable[[int], bytes],
    root_token: str | None = None,
    sealer: Sealer | None = None,
) -> Genesis:
    """A new cluster: keys, mounts, policies and one root token (``root_token`` is a custom one, for development).
    ``sealer`` is that of the auto seal, with which the shares are recovery shares. Raises InvalidRequest for an
    impossible seal configuration."""
    config = SealConfig(shares, threshold)
    config.validate()
    share_key, root_key = random_bytes(KEY_BYTES), random_bytes(KEY_BYTES)
    record = make_seal_record(root_key, share_key, config, int(now_s), random_bytes)
    if sealer is not None:
        record = record.with_auto(sealer(root_key))
    replicated, local = (_reserved(Keyring.generate(now_s, random_bytes)) for _ in range(2))
    barrier = Barrier(root_key, replicated, local, random_bytes=random_bytes)
    cluster = ClusterInfo.generate(cluster_name, random_bytes)
    salt = random_bytes(SALT_BYTES)
    token = root_token or SERVICE_PREFIX + base62(RANDOM_LENGTH, random_bytes)
    plain = [
        Write(CLUSTER, cluster.encode()),
        Write(TOKEN_SALT, salt),
        Write(POLICIES + DEFAULT, DEFAULT_POLICY.encode()),
        *(encode_mount(entry) for entry in built_in_mounts(random_bytes)),
        *creation(_root_entry(token, salt, int(now_s), random_bytes), salt),
    ]
    writes = [
        Write(SEAL, record.encode()),
        Write(REPLICATED_KEYRING, barrier.encode_ring("r", replicated)),
        Write(LOCAL_KEYRING, barrier.encode_ring("l", local)),
        *_sealed(plain, barrier),
    ]
    keys = split(share_key, shares, threshold, random_bytes)
    return Genesis(writes, keys, token, barrier.root_fingerprint, cluster)


def build_secondary_genesis(
    *,
    root_key: bytes,
    replicated_keyring_raw: bytes,
    seal_raw: bytes,
    now_s: float,
    random_bytes: Callable[[int], bytes],
    extra: Mapping[str, bytes],
    cluster_name: str | None = None,
) -> list[Write]:
    """A cluster that becomes a secondary: the primary's root key and replicated keyring as they arrived, a seal record
    for them, and a local keyring, identity and token salt of its own. ``extra`` has further plaintext entries of class
    ``l`` or ``c``, and replaces what would be made here. Raises WrongKey where keyring and root key do not belong
    together."""
    if any(key.startswith("r/") for key in extra):
        raise ValueError("a secondary makes no replicated entries")
    replicated = Keyring.decode(replicated_keyring_raw, root_key, REPLICATED_KEYRING)
    local = _reserved(Keyring.generate(now_s, random_bytes))
    barrier = Barrier(root_key, replicated, local, random_bytes=random_bytes)
    cubbyhole = encode_mount(built_in_cubbyhole(random_bytes))
    plain = {
        CLUSTER: ClusterInfo.generate(cluster_name, random_bytes).encode(),
        TOKEN_SALT: random_bytes(SALT_BYTES),
        cubbyhole.key: cubbyhole.value,
        **extra,
    }
    return [
        Write(SEAL, seal_raw),
        Write(REPLICATED_KEYRING, replicated_keyring_raw),
        Write(LOCAL_KEYRING, barrier.encode_ring("l", local)),
        *_sealed([Write(key, value) for key, value in plain.items()], barrier),
    ]


def build_mirror_genesis(
    *,
    root_key: bytes,
    keyrings: Mapping[str, bytes],
    seal_raw: bytes,
    now_s: float,
    random_bytes: Callable[[int], bytes],
    extra: Mapping[str, bytes],
    cluster_name: str | None = None,
) -> list[Write]:
    """A cluster that becomes a DR secondary: everything of classes ``r`` and ``l`` is the primary's and will arrive;
    its own are a private keyring, and under it an identity and ``extra``, plaintext entries of class ``c``.
    ``keyrings`` are the primary's as they arrived. Raises WrongKey where they and the root key do not belong
    together."""
    if any(not key.startswith("c/") for key in extra):
        raise ValueError("a DR secondary makes no entries that its primary has too")
    replicated, local = (Keyring.decode(keyrings[name], root_key, name) for name in (REPLICATED_KEYRING, LOCAL_KEYRING))
    private = Keyring.generate(now_s, random_bytes)
    barrier = Barrier(root_key, replicated, local, private, random_bytes=random_bytes)
    plain = {PRIVATE_CLUSTER: ClusterInfo.generate(cluster_name, random_bytes).encode(), **extra}
    return [
        Write(SEAL, seal_raw),
        Write(REPLICATED_KEYRING, keyrings[REPLICATED_KEYRING]),
        Write(LOCAL_KEYRING, keyrings[LOCAL_KEYRING]),
        Write(PRIVATE_KEYRING, barrier.encode_ring("c", private)),
        *_sealed([Write(key, value) for key, value in plain.items()], barrier),
    ]


def _root_entry(token: str, salt: bytes, now_s: int, random_bytes: Callable[[int], bytes]) -> TokenEntry:
    return TokenEntry(
        id_hash=keyed_hash(salt, token),
        accessor=base62(RANDOM_LENGTH, random_bytes),
        policies=(ROOT_POLICY,),
        path="auth/token/root",
        created_s=now_s,
        display_name="root",
    )


def _reserved(ring: Keyring) -> Keyring:
    return ring.with_encryptions(FIRST_RESERVATION)


def _sealed(plain: list[Write], barrier: Barrier) -> list[Write]:
    return [Write(w.key, barrier.seal(w.key, w.value)) for w in plain if w.value is not None]
