"""The mount tables: validation, collisions, tuning, data of mounts that went, and changes that replication brings."""

from __future__ import annotations

import asyncio
import random

import pytest

from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, ReadOnlyStorage
from sidecar.core.mounts import (
    AUTH,
    SECRETS,
    MountConfig,
    MountTable,
    built_in_mounts,
    clean_mount_path,
    encode_mount,
)
from sidecar.core.store_view import SealedStore, View
from tests.support.logical_store import MemoryLogicalStore, make_sealed

TYPES = {SECRETS: {"kv", "transit"}, AUTH: {"userpass"}}


async def make(writable: bool = True) -> tuple[MemoryLogicalStore, SealedStore, MountTable]:
    store, sealed = make_sealed()
    await sealed.commit([encode_mount(entry) for entry in built_in_mounts(random.randbytes)])
    table = MountTable(sealed, lambda: writable, plugin_types=TYPES.__getitem__)
    await table.load()
    return store, sealed, table


async def test_built_in_mounts():
    _, _, table = await make()
    assert [entry.path for entry in table.entries(SECRETS)] == ["cubbyhole/", "sys/"]
    assert [entry.full_path for entry in table.entries(AUTH)] == ["auth/token/"]
    assert table.find(SECRETS, "cubbyhole").local
    assert not table.find(SECRETS, "sys/").local


async def test_mounts_survive_a_restart():
    store, sealed, table = await make()
    made = await table.mount(
        SECRETS, "team/kv", "kv", description="d", options={"version": "2"}, config=MountConfig(max_lease_ttl_s=60)
    )
    local = await table.mount(AUTH, "up", "userpass", local=True)
    assert made.path == "team/kv/"
    assert made.accessor.startswith("kv_")
    assert local.accessor.startswith("auth_userpass_")
    assert made.key == f"r/core/mounts/{made.uuid}" in store.data
    assert local.key == f"l/core/auth/{local.uuid}" in store.data
    again = MountTable(sealed, lambda: True)
    await again.load()
    for name in (SECRETS, AUTH):
        assert again.entries(name) == table.entries(name)
    assert again.find(SECRETS, "team/kv") == made


@pytest.mark.parametrize(
    ("table_name", "path", "type_name", "text"),
    [
        (SECRETS, "kv", "nosuch", "plugin not found in the catalog: nosuch"),
        (SECRETS, "kv", "", "backend type must be specified as a string"),
        (SECRETS, "auth/x", "kv", 'cannot mount "auth/x/"'),
        (SECRETS, "sys", "kv", 'cannot mount "sys/"'),
        (SECRETS, "cubbyhole/", "kv", 'cannot mount "cubbyhole/"'),
        (SECRETS, "identity", "kv", 'cannot mount "identity/"'),
        (SECRETS, "audit/x", "kv", 'cannot mount "audit/x/"'),
        (AUTH, "token", "userpass", "path is already in use at token/"),
        (SECRETS, "used", "kv", "path is already in use at used/"),
        (SECRETS, "used/below", "kv", "path is already in use at used/"),
        (SECRETS, "deep", "kv", "path is already in use at deep/er/"),
        (AUTH, "used", "kv", "plugin not found in the catalog: kv"),
    ],
)
async def test_mounts_that_are_refused(table_name: str, path: str, type_name: str, text: str):
    _, _, table = await make()
    await table.mount(SECRETS, "used/", "kv")
    await table.mount(SECRETS, "deep/er", "kv")
    with pytest.raises(InvalidRequest) as caught:
        await table.mount(table_name, path, type_name)
    assert str(caught.value) == text


async def test_similar_names_do_not_collide():
    _, _, table = await make()
    for path in ("used", "usedtoo", "use", "system", "authx"):
        await table.mount(SECRETS, path, "kv")
    await table.mount(AUTH, "used", "userpass")


@pytest.mark.parametrize(
    "path", ["", "/", "/a", "a//b", "../a", "a/./b", "a\nb", "a*", "a/+", "a?b", "a#", "a%2fb", " a"]
)
def test_paths_that_are_refused(path: str):
    with pytest.raises(InvalidRequest):
        clean_mount_path(path)


@pytest.mark.parametrize(
    "config",
    [
        MountConfig(default_lease_ttl_s=-1),
        MountConfig(default_lease_ttl_s=2, max_lease_ttl_s=1),
        MountConfig(max_lease_ttl_s=2**40),
        MountConfig(listing_visibility="loud"),
        MountConfig(token_type="robot"),
    ],
)
async def test_configs_that_are_refused(config: MountConfig):
    _, _, table = await make()
    with pytest.raises(InvalidRequest):
        await table.mount(SECRETS, "a", "kv", config=config)
    with pytest.raises(InvalidRequest):
        await table.tune(SECRETS, "sys", config=config)


async def test_two_mounts_of_one_path_at_once():
    _, _, table = await make()
    results = await asyncio.gather(*(table.mount(SECRETS, "a", "kv") for _ in range(5)), return_exceptions=True)
    assert [isinstance(result, InvalidRequest) for result in results].count(False) == 1


async def test_tune():
    _, sealed, table = await make()
    made = await table.mount(SECRETS, "a", "kv", options={"version": "1"}, description="d")
    tuned = await table.tune(SECRETS, "a/", config=MountConfig(listing_visibility="unauth"), options={"version": "2"})
    assert (tuned.uuid, tuned.description, tuned.options) == (made.uuid, "d", {"version": "2"})
    assert (await table.tune(SECRETS, "a", description="")).config.listing_visibility == "unauth"
    with pytest.raises(InvalidRequest, match='cannot fetch sysview for path "nosuch/"'):
        await table.tune(SECRETS, "nosuch", description="x")
    with pytest.raises(InvalidRequest, match='cannot fetch sysview for path "auth/nosuch/"'):
        await table.tune(AUTH, "nosuch", description="x")
    again = MountTable(sealed, lambda: True)
    await again.load()
    assert again.find(SECRETS, "a") == table.find(SECRETS, "a")


async def test_unmount_deletes_the_data():
    store, sealed, table = await make()
    made = await table.mount(SECRETS, "a", "kv")
    kept = await table.mount(SECRETS, "b", "kv")
    for entry in (made, kept):
        for number in range(130):
            await View(sealed, "r", entry.uuid).put(f"f{number % 7}/k{number}", b"v")
        await View(sealed, "l", entry.uuid).put("local", b"v")
    assert await table.unmount(SECRETS, "a") == made
    assert table.find(SECRETS, "a") is None
    assert await table.unmount(SECRETS, "a") is None
    # A crash before the data went: the next active finds the mark.
    again = MountTable(sealed, lambda: True)
    await again.load()
    assert await again.purge() == 131
    assert store.below(f"r/{made.uuid}/") == store.below(f"l/{made.uuid}/") == []
    assert len(store.below(f"r/{kept.uuid}/")) == 130
    assert not [key for key in store.data if "/purge/" in key]
    assert await again.purge() == 0


async def test_what_cannot_be_unmounted():
    _, _, table = await make()
    for path in ("sys", "cubbyhole/", "auth", "identity"):
        with pytest.raises(InvalidRequest, match="cannot unmount"):
            await table.unmount(SECRETS, path)
    with pytest.raises(InvalidRequest, match="token credential backend cannot be disabled"):
        await table.unmount(AUTH, "token")


async def test_remount():
    _, _, table = await make()
    made = await table.mount(SECRETS, "a", "kv")
    auth = await table.mount(AUTH, "up", "userpass")
    moved = await table.remount("a", "b/c")
    assert (moved.path, moved.uuid, moved.accessor) == ("b/c/", made.uuid, made.accessor)
    assert table.find(SECRETS, "a") is None
    assert (await table.remount("auth/up/", "auth/down")).uuid == auth.uuid
    for source, target, text in (
        ("nosuch", "x", 'no matching mount at "nosuch/"'),
        ("b/c", "sys/x", 'cannot mount "sys/x/"'),
        ("sys", "x", 'cannot unmount "sys/"'),
        ("b/c", "auth/x", "between the auth and the secrets table"),
        ("b/c", "b", "path is already in use at b/c/"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await table.remount(source, target)
        assert text in str(caught.value)


async def test_a_secondary_changes_only_what_is_local():
    store, sealed, table = await make(writable=False)
    primary = MountTable(sealed, lambda: True)
    shared = await primary.mount(SECRETS, "shared", "kv")
    assert await table.invalidate([shared.key])
    local = await table.mount(SECRETS, "mine", "kv", local=True)
    with pytest.raises(ReadOnlyStorage):
        await table.mount(SECRETS, "other", "kv")
    with pytest.raises(ReadOnlyStorage):
        await table.unmount(SECRETS, "shared")
    with pytest.raises(ReadOnlyStorage):
        await table.tune(SECRETS, "shared", description="x")
    with pytest.raises(ReadOnlyStorage):
        await table.remount("shared", "elsewhere")
    assert await table.tune(SECRETS, "mine", description="x")
    assert await table.unmount(SECRETS, "mine")
    assert local.key not in store.data


async def test_replication_changes_the_tables():
    store, sealed, table = await make(writable=False)
    primary = MountTable(sealed, lambda: True)
    await primary.load()
    made = await primary.mount(SECRETS, "a", "kv")
    assert not await table.invalidate(["r/policy/acl/x", "r/core/keyring", f"r/{made.uuid}/x"])
    assert table.find(SECRETS, "a") is None
    assert await table.invalidate(["r/policy/acl/x", made.key])
    assert table.find(SECRETS, "a") == made
    await View(sealed, "l", made.uuid).put("counter", b"1")
    await View(sealed, "r", made.uuid).put("data", b"1")
    await sealed.commit([Write(made.key, None)])
    assert await table.invalidate([made.key])
    assert table.find(SECRETS, "a") is None
    assert await table.purge() == 1, "its local data only; the rest is the primary's to delete"
    assert store.below(f"r/{made.uuid}/") != []
    assert store.below(f"l/{made.uuid}/") == []


async def test_a_local_mount_hides_what_the_primary_mounts_later():
    _, sealed, table = await make(writable=False)
    local = await table.mount(SECRETS, "a", "kv", local=True)
    primary = MountTable(sealed, lambda: True)
    shared = await primary.mount(SECRETS, "a", "kv")
    await table.invalidate([shared.key])
    assert table.find(SECRETS, "a") == local
    await table.unmount(SECRETS, "a")
    assert table.find(SECRETS, "a") == shared
