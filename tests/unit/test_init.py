"""The first entries of a store: everything a fresh cluster needs, and a secondary's own beginnings."""

from __future__ import annotations

import os

import pytest

from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest
from sidecar.core.barrier import load_barrier
from sidecar.core.cluster import ClusterInfo
from sidecar.core.init import Genesis, build_genesis, build_secondary_genesis
from sidecar.core.keys import CLUSTER, LOCAL_KEYRING, RAW_KEYS, REPLICATED_KEYRING, SEAL, TOKEN_SALT
from sidecar.core.mounts import AUTH, SECRETS, MountTable
from sidecar.core.policies import PolicyStore
from sidecar.core.seal import combine
from sidecar.core.seal_record import SealRecord, WrongKey, open_root_key, root_fingerprint
from sidecar.core.store_view import SealedStore
from sidecar.core.tokens import TokenStore
from tests.support.logical_store import FakeTime, MemoryLogicalStore, counting_bytes

# What one Consul transaction holds beside its guards and its log record (consul_backend/limits.py).
OPS_MAX = 60
BODY_BYTES_MAX = 524_288


def genesis(**options) -> Genesis:
    settings = {"shares": 5, "threshold": 3, "cluster_name": None, "now_s": 1_700_000_000.5, "random_bytes": os.urandom}
    return build_genesis(**{**settings, **options})


def store_of(writes: list[Write]) -> MemoryLogicalStore:
    store = MemoryLogicalStore()
    for write in writes:
        assert write.key not in store.data
        assert write.value is not None
        store.data[write.key] = write.value
    return store


async def unseal(store: MemoryLogicalStore, keys: list[bytes]) -> SealedStore:
    record = SealRecord.decode(store.data[SEAL])
    root_key = open_root_key(record, combine(keys[: record.threshold]))
    return SealedStore(store, await load_barrier(store.get, root_key))


async def test_a_fresh_cluster_is_complete():
    made = genesis(cluster_name="blue")
    store = store_of(made.writes)
    sealed = await unseal(store, made.keys)
    assert sealed.barrier.root_fingerprint == made.root_fingerprint
    tokens = TokenStore(sealed, FakeTime())
    await tokens.load()
    entry = await tokens.lookup(made.root_token)
    assert (entry.policies, entry.path, entry.display_name) == (("root",), "auth/token/root", "root")
    assert (entry.expires_s, entry.renewable, entry.orphan) == (0, False, True)
    assert await tokens.list_accessors() == [entry.accessor]
    mounts = MountTable(sealed, lambda: True)
    await mounts.load()
    assert [mount.path for mount in mounts.entries(SECRETS)] == ["cubbyhole/", "sys/"]
    assert [mount.path for mount in mounts.entries(AUTH)] == ["token/"]
    assert await PolicyStore(sealed, lambda: True).list() == ["default", "root"]
    assert await ClusterInfo.load(sealed) == made.cluster
    assert made.cluster.cluster_name == "blue"


def test_it_fits_into_one_transaction():
    writes = genesis(shares=255, threshold=255).writes
    assert len(writes) <= OPS_MAX
    assert sum(2 * (len(write.key) + len(write.value)) for write in writes) < BODY_BYTES_MAX // 4


def test_no_secret_is_stored_or_shown():
    made = genesis()
    stored = b"".join(write.value for write in made.writes)
    unseal_key = combine(made.keys[:3])
    root_key = open_root_key(SealRecord.decode(made.writes[0].value), unseal_key)
    for secret in (*made.keys, unseal_key, root_key, made.root_token.encode()):
        assert secret not in stored
        assert secret.hex() not in repr(made)
    assert made.root_token not in repr(made)
    assert root_fingerprint(root_key) == made.root_fingerprint


def test_shares_have_the_form_operators_know():
    assert {len(key) for key in genesis().keys} == {33}
    assert [len(key) for key in genesis(shares=1, threshold=1).keys] == [32]
    with pytest.raises(InvalidRequest, match="invalid seal configuration: threshold cannot be larger than shares"):
        genesis(shares=1, threshold=2)


def test_clusters_have_nothing_in_common():
    one, two = genesis(), genesis()
    assert one.root_fingerprint != two.root_fingerprint
    assert one.root_token != two.root_token
    assert one.cluster.cluster_id != two.cluster.cluster_id
    assert len(one.root_token) == 28
    assert one.cluster.cluster_name.startswith("vault-cluster-")
    assert len(one.cluster.cluster_name) == len("vault-cluster-") + 8
    assert genesis(root_token="dev").root_token == "dev"


async def test_a_secondary_takes_over_the_keys_and_keeps_its_own_identity():
    primary = genesis()
    stored = {write.key: write.value for write in primary.writes}
    root_key = open_root_key(SealRecord.decode(stored[SEAL]), combine(primary.keys[:3]))
    writes = build_secondary_genesis(
        root_key=root_key,
        replicated_keyring_raw=stored[REPLICATED_KEYRING],
        seal_raw=stored[SEAL],
        now_s=5,
        random_bytes=counting_bytes(),
        extra={"l/replication/performance": b"role", "c/x/y": b"z"},
        cluster_name="green",
    )
    store = store_of(writes)
    assert store.data[SEAL] == stored[SEAL]
    assert store.data[LOCAL_KEYRING] != stored[LOCAL_KEYRING]
    assert all(write.key.startswith(("l/", "c/")) or write.key in RAW_KEYS for write in writes)
    sealed = await unseal(store, primary.keys)
    assert await sealed.get("l/replication/performance") == b"role"
    assert await sealed.get("c/x/y") == b"z"
    own = await ClusterInfo.load(sealed)
    assert own.cluster_name == "green"
    assert own.cluster_id != primary.cluster.cluster_id
    # What the primary sends opens here; what is local to either opens on it alone.
    upstream = await unseal(store_of(primary.writes), primary.keys)
    assert sealed.barrier.open("r/p/k", upstream.barrier.seal("r/p/k", b"v")) == b"v"
    assert sealed.barrier.ring("l").active_id != upstream.barrier.ring("l").active_id
    tokens = TokenStore(sealed, FakeTime())
    await tokens.load()
    assert await tokens.lookup(primary.root_token) is None
    assert await sealed.get(TOKEN_SALT) != await upstream.get(TOKEN_SALT)
    mounts = MountTable(sealed, lambda: False)
    await mounts.load()
    assert [mount.path for mount in mounts.entries(SECRETS)] == ["cubbyhole/"]


def test_a_secondary_refuses_keys_that_do_not_belong_together():
    stored = {write.key: write.value for write in genesis().writes}
    common = {
        "replicated_keyring_raw": stored[REPLICATED_KEYRING],
        "seal_raw": stored[SEAL],
        "now_s": 0,
        "random_bytes": os.urandom,
    }
    with pytest.raises(WrongKey):
        build_secondary_genesis(root_key=os.urandom(32), extra={}, **common)
    with pytest.raises(ValueError, match="no replicated entries"):
        build_secondary_genesis(root_key=os.urandom(32), extra={"r/a/b": b""}, **common)


async def test_a_store_without_identity():
    made = genesis()
    store = store_of([write for write in made.writes if write.key != CLUSTER])
    with pytest.raises(LookupError):
        await ClusterInfo.load(await unseal(store, made.keys))
