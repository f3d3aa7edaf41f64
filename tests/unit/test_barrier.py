"""The barrier, its keyrings, their rotation, and storage seen through it."""

from __future__ import annotations

import asyncio
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plugin_api.storage
from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, ReadOnlyStorage
from sidecar.core import rotation
from sidecar.core.barrier import (
    OVERHEAD_BYTES,
    Barrier,
    BarrierMissing,
    DecryptionFailed,
    UnknownKey,
    load_barrier,
)
from sidecar.core.keyring import BadKeyring, Keyring
from sidecar.core.keys import LOCAL_KEYRING, PRIVATE_KEYRING, REPLICATED_KEYRING, SEAL
from sidecar.core.seal_record import WrongKey
from sidecar.core.store_view import SealedStore, TrackedWrites, View
from tests.support.logical_store import MemoryLogicalStore, make_barrier, make_sealed

BARRIER = make_barrier()


@given(st.sampled_from("rlc"), st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.binary(max_size=200))
def test_round_trip(storage_class: str, path: str, value: bytes):
    key = f"{storage_class}/part/{path}"
    blob = BARRIER.seal(key, value)
    assert len(blob) == len(value) + OVERHEAD_BYTES
    assert BARRIER.open(key, blob) == value


@settings(deadline=None)
@given(st.integers(0, (OVERHEAD_BYTES + 10) * 8 - 1))
def test_no_bit_may_change(bit: int):
    blob = bytearray(BARRIER.seal("r/p/k", b"0123456789"))
    blob[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(DecryptionFailed):
        BARRIER.open("r/p/k", bytes(blob))


@pytest.mark.parametrize("length", range(OVERHEAD_BYTES + 3))
def test_no_part_may_be_cut_off(length: int):
    blob = BARRIER.seal("r/p/k", b"abc")
    with pytest.raises(DecryptionFailed):
        BARRIER.open("r/p/k", blob[:length])


@pytest.mark.parametrize("other", ["r/p/k2", "r/p2/k", "l/p/k", "c/p/k", "r/p/k/", "r/pk"])
def test_a_value_moved_to_another_key_does_not_open(other: str):
    blob = BARRIER.seal("r/p/k", b"secret")
    with pytest.raises(DecryptionFailed):
        BARRIER.open(other, blob)


def test_local_classes_share_a_ring_but_not_their_values():
    blob = BARRIER.seal("l/p/k", b"secret")
    with pytest.raises(DecryptionFailed) as caught:
        BARRIER.open("c/p/k", blob)
    assert not isinstance(caught.value, UnknownKey)


def test_errors_name_the_partition_and_nothing_else():
    with pytest.raises(DecryptionFailed) as caught:
        BARRIER.open("r/p/private/name", BARRIER.seal("r/p/other", b"secret"))
    assert "r/p" in str(caught.value)
    assert "name" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_no_nonce_comes_twice():
    blobs = [BARRIER.seal("r/p/k", b"same") for _ in range(2000)]
    assert len({blob[9:21] for blob in blobs}) == 2000


def test_no_key_in_any_repr():
    barrier = make_barrier()
    shown = repr(barrier) + repr(barrier.ring("r")) + repr(barrier.ring("r").active)
    for secret in (barrier.root_key(), barrier.ring("r").active.key, barrier.ring("l").active.key):
        assert secret.hex() not in shown
        assert repr(secret) not in shown


async def test_big_values_are_sealed_in_a_thread():
    value = os.urandom(300_000)
    before = BARRIER.encryptions("r")
    blobs = await asyncio.gather(*(BARRIER.seal_value("r/p/big", value) for _ in range(8)))
    assert BARRIER.encryptions("r") == before + 8
    assert await BARRIER.open_value("r/p/big", blobs[3]) == value
    with pytest.raises(DecryptionFailed):
        await BARRIER.open_value("r/p/other", blobs[0])


# -- keyrings


def test_keyring_round_trip_is_bound_to_root_key_and_place():
    root_key = os.urandom(32)
    ring = Keyring.generate(5, os.urandom).rotated(9, os.urandom).with_encryptions(7)
    raw = ring.encode(root_key, REPLICATED_KEYRING, os.urandom)
    again = Keyring.decode(raw, root_key, REPLICATED_KEYRING)
    assert again == ring
    assert (again.active.term, again.active.install_time_s, again.active.encryptions) == (2, 9, 7)
    for key, place in ((os.urandom(32), REPLICATED_KEYRING), (root_key, LOCAL_KEYRING), (b"short", LOCAL_KEYRING)):
        with pytest.raises(WrongKey):
            Keyring.decode(raw, key, place)
    with pytest.raises(WrongKey):
        Keyring.decode(b"", root_key, REPLICATED_KEYRING)


def test_keyring_whose_content_makes_no_sense():
    root_key = os.urandom(32)
    ring = Keyring.generate(0, os.urandom)
    headless = Keyring(ring.keys, b"12345678")
    with pytest.raises(BadKeyring):
        Keyring.decode(headless.encode(root_key, SEAL, os.urandom), root_key, SEAL)


async def test_load_barrier():
    store, barrier = MemoryLogicalStore(), make_barrier()
    store.data[REPLICATED_KEYRING] = barrier.encode_ring("r", barrier.ring("r"))
    with pytest.raises(BarrierMissing):
        await load_barrier(store.get, barrier.root_key())
    store.data[LOCAL_KEYRING] = barrier.encode_ring("l", barrier.ring("l"))
    again = await load_barrier(store.get, barrier.root_key())
    assert again.open("l/p/k", barrier.seal("l/p/k", b"v")) == b"v"
    assert again.root_fingerprint == barrier.root_fingerprint
    with pytest.raises(WrongKey):
        await load_barrier(store.get, os.urandom(32))


async def test_rotation_keeps_old_values_readable_and_is_durable():
    store, sealed = make_sealed()
    await sealed.put("r/p/old", b"1")
    await rotation.rotate(sealed, "r", 50)
    await sealed.put("r/p/new", b"2")
    assert store.data["r/p/old"][1:9] != store.data["r/p/new"][1:9]
    assert sealed.barrier.ring("r").active.term == 2
    assert sealed.barrier.encryptions("r") == 1
    store.data[LOCAL_KEYRING] = sealed.barrier.encode_ring("l", sealed.barrier.ring("l"))
    again = SealedStore(store, await load_barrier(store.get, sealed.barrier.root_key()))
    assert [await again.get("r/p/old"), await again.get("r/p/new")] == [b"1", b"2"]


async def test_a_rotation_that_was_not_committed_is_not_used():
    store, sealed = make_sealed()
    store.fail = RuntimeError("store is gone")
    with pytest.raises(RuntimeError):
        await rotation.rotate(sealed, "l", 0)
    assert sealed.barrier.ring("l").active.term == 1


async def test_uses_are_counted_ahead_of_a_crash(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rotation, "RESERVATION", 100)
    store, sealed = make_sealed()
    uses = 0
    for tenure in range(4):
        await rotation.maintain_keyrings(sealed, lambda: 0.0, lambda: True)
        for number in range(30):
            await sealed.put(f"r/p/{tenure}-{number}", b"v")
            uses += 1
        # A crash: only what is stored survives, and that must not have missed a use.
        sealed = SealedStore(store, await load_barrier(store.get, sealed.barrier.root_key()))
        assert sealed.barrier.encryptions("r") >= uses


async def test_rotation_by_itself_long_before_the_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rotation, "ENCRYPTIONS_MAX", 10)
    _, sealed = make_sealed()
    for number in range(11):
        await sealed.put(f"l/p/{number}", b"v")
        await sealed.put(f"r/p/{number}", b"v")
    await rotation.maintain_keyrings(sealed, lambda: 0.0, lambda: False)
    assert sealed.barrier.ring("l").active.term == 2
    assert sealed.barrier.ring("r").active.term == 1, "a secondary leaves the primary's ring alone"


async def test_rotation_as_configured():
    _, sealed = make_sealed()
    day_s, now_s = 24 * 3600, 0.0
    ring = lambda: sealed.barrier.ring("l").active  # noqa: E731 - read anew each time

    async def one_pass() -> int:
        await rotation.maintain_keyrings(sealed, lambda: now_s, lambda: True)
        return ring().term

    assert await one_pass() == 1
    now_s = 10.0**9
    assert await one_pass() == 1, "age alone is no reason by default"
    await rotation.set_rotation_policy(sealed, rotation.RotationPolicy(interval_s=day_s))
    assert (await one_pass(), ring().install_time_s) == (2, int(now_s))
    assert await one_pass() == 2
    now_s += day_s
    assert await one_pass() == 3
    await rotation.set_rotation_policy(sealed, rotation.RotationPolicy(enabled=False, interval_s=day_s))
    now_s += day_s
    assert await one_pass() == 3
    assert rotation.RotationPolicy(enabled=False).due(rotation.ENCRYPTIONS_MAX, 0), "never beyond what is safe"


async def test_rotation_by_uses_counts_them_over_a_crash():
    """Statement 44: whatever crashes, no key is used more often than configured (but for one pass's uses)."""
    policy = rotation.RotationPolicy(max_operations=1_000_000)
    store, sealed = make_sealed()
    await rotation.set_rotation_policy(sealed, policy)
    per_tenure, terms = policy.reservation // 8, set()
    uses: dict[int, int] = {}
    for _ in range(40):
        await rotation.maintain_keyrings(sealed, lambda: 0.0, lambda: True)
        term = sealed.barrier.ring("l").active.term
        sealed.barrier._rings["l"].used += per_tenure  # as that many seals do
        uses[term] = uses.get(term, 0) + per_tenure
        terms.add(term)
        store.data[REPLICATED_KEYRING] = store.data.get(
            REPLICATED_KEYRING, sealed.barrier.encode_ring("r", sealed.barrier.ring("r"))
        )
        sealed = SealedStore(store, await load_barrier(store.get, sealed.barrier.root_key()))
    assert len(terms) > 2
    assert max(uses.values()) <= policy.max_operations


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (rotation.RotationPolicy(max_operations=999_999), "max_operations must be between 1000000 and 3865470566"),
        (rotation.RotationPolicy(max_operations=rotation.ENCRYPTIONS_MAX + 1), "max_operations must be between"),
        (rotation.RotationPolicy(interval_s=3600), "interval must be greater or equal to 24 hours"),
    ],
)
async def test_rotation_policies_that_are_refused(policy: rotation.RotationPolicy, text: str):
    _, sealed = make_sealed()
    with pytest.raises(InvalidRequest, match=text):
        await rotation.set_rotation_policy(sealed, policy)
    assert await rotation.rotation_policy(sealed) == rotation.RotationPolicy()


def test_a_ring_that_arrives_by_replication():
    primary, secondary = make_barrier(), make_barrier()
    rotated = primary.new_ring("r", 1)
    raw = primary.encode_ring("r", rotated)
    primary.install("r", rotated)
    blob = primary.seal("r/p/k", b"v")
    with pytest.raises(UnknownKey):
        secondary.open("r/p/k", blob)
    secondary.load_ring("r", raw)
    assert secondary.open("r/p/k", blob) == b"v"
    with pytest.raises(WrongKey):
        Barrier(os.urandom(32), rotated, rotated).load_ring("r", raw)


# -- storage through the barrier


async def test_nothing_but_ciphertext_reaches_the_store():
    store, sealed = make_sealed()
    with TrackedWrites() as tracker:
        await sealed.commit([Write("r/p/a", b"visible"), Write("c/p/b", b"visible"), Write("l/p/c", None)])
        assert tracker.index == 1
    assert not any(b"visible" in value for value in store.data.values())
    assert await sealed.get("r/p/a") == b"visible"
    assert await sealed.get("l/p/c") is None


async def test_raw_entries_pass_unchanged():
    store, sealed = make_sealed()
    await sealed.commit([Write(SEAL, b"raw"), sealed.encode(Write(LOCAL_KEYRING, b"raw too"))])
    assert (store.data[SEAL], store.data[LOCAL_KEYRING]) == (b"raw", b"raw too")
    assert await sealed.get(SEAL) == b"raw"
    assert await sealed.get_raw(SEAL) == b"raw"


async def test_positions_are_those_of_the_task():
    _, sealed = make_sealed()

    async def write(count: int) -> int:
        with TrackedWrites() as tracker:
            async with asyncio.TaskGroup() as group:
                for number in range(count):
                    group.create_task(sealed.put(f"r/p/{number}", b""))
            return tracker.index

    with TrackedWrites() as outer:
        assert await write(0) == 0
        first = await write(3)
        assert first == 3
        assert outer.index == 0, "a nested block collects for itself"
    await sealed.put("r/p/x", b"")
    assert outer.index == 0


async def test_view_is_confined():
    store, sealed = make_sealed()
    await sealed.put("r/other/secret", b"x")
    view = View(sealed, "r", "mine", "folder/")
    await view.put("a/b", b"1")
    await view.commit([plugin_api.storage.Write("c", b"2"), plugin_api.storage.Write("a//d", b"3")])
    assert store.below("r/mine/") == ["r/mine/folder/a//d", "r/mine/folder/a/b", "r/mine/folder/c"]
    assert await view.list() == ["a/", "c"]
    assert await view.list("a/") == ["/", "b"]
    assert await view.get("a/b") == b"1"
    await view.delete("c")
    assert await view.get("c") is None
    for path in ("", "/a", "a/", "..", "../other/secret", "a/../../other", ".", "a/./b", "\ud800"):
        with pytest.raises(InvalidRequest):
            await view.get(path)
        with pytest.raises(InvalidRequest):
            await view.put(path, b"")
    for prefix in ("a", "../", "/", "a/../"):
        with pytest.raises(InvalidRequest):
            await view.list(prefix)


async def test_view_is_read_only_where_the_cluster_is():
    store, sealed = make_sealed()
    shared = View(sealed, "r", "m", writable=lambda: False)
    local = View(sealed, "l", "m", writable=lambda: False)
    with pytest.raises(ReadOnlyStorage):
        await shared.put("k", b"v")
    with pytest.raises(ReadOnlyStorage):
        await shared.delete("k")
    await local.put("k", b"v")
    assert list(store.data) == ["l/m/k"]


# --- the private ring: what a cluster keeps for itself when another's rings take the place of its own


def rings() -> tuple[Keyring, Keyring]:
    return Keyring.generate(1, os.urandom), Keyring.generate(1, os.urandom)


async def test_what_was_sealed_before_opens_whatever_rings_arrive():
    root = os.urandom(32)
    replicated, local = rings()
    barrier = Barrier(root, replicated, local)
    sealed = SealedStore(MemoryLogicalStore(), barrier)
    blobs = {key: barrier.seal(key, key.encode()) for key in ("r/m/a", "l/t/b", "c/own/c")}
    other_replicated, other_local = rings()
    arriving = Barrier(root, other_replicated, other_local)
    await rotation.keep_keys(sealed, 5)
    for storage_class, ring in (("r", other_replicated), ("l", other_local)):
        barrier.load_ring(storage_class, arriving.encode_ring(storage_class, ring))
    for key, blob in blobs.items():
        assert barrier.open(key, blob) == key.encode()
    with pytest.raises(UnknownKey):
        arriving.open("r/m/a", blobs["r/m/a"])

    own = barrier.seal("c/own/d", b"x")
    raws = {
        REPLICATED_KEYRING: arriving.encode_ring("r", other_replicated),
        LOCAL_KEYRING: arriving.encode_ring("l", other_local),
        PRIVATE_KEYRING: await sealed.get_raw(PRIVATE_KEYRING),
    }

    async def read(key: str) -> bytes | None:
        return raws[key]

    again = await load_barrier(read, root)
    assert again.open("c/own/d", own) == b"x"
    assert again.open("l/t/b", blobs["l/t/b"]) == b"l/t/b"
    raws[PRIVATE_KEYRING] = None
    without = await load_barrier(read, root)
    with pytest.raises(UnknownKey):
        without.open("c/own/d", own)


async def test_keeping_keys_twice_keeps_one_active_key_and_all_others():
    replicated, local = rings()
    barrier = Barrier(os.urandom(32), replicated, local)
    sealed = SealedStore(MemoryLogicalStore(), barrier)
    await rotation.keep_keys(sealed, 5)
    first = barrier.ring("c")
    barrier.install("r", replicated.rotated(6, os.urandom))
    await rotation.keep_keys(sealed, 7)
    assert barrier.ring("c").active_id == first.active_id
    assert set(first.keys) < set(barrier.ring("c").keys)
    assert replicated.active_id in barrier.ring("c").keys


def test_class_c_is_the_local_rings_where_there_is_no_private_one():
    replicated, local = rings()
    barrier = Barrier(os.urandom(32), replicated, local)
    assert barrier.ring("c") is barrier.ring("l")
    blob = barrier.seal("c/own/a", b"x")
    assert blob[1:9] == local.active_id


def test_what_another_cluster_reserved_counts_as_used():
    root = os.urandom(32)
    replicated, local = rings()
    barrier = Barrier(root, replicated, local)
    barrier.seal("r/m/a", b"x")
    ahead = replicated.with_encryptions(1_000_000)
    barrier.load_ring("r", barrier.encode_ring("r", ahead))
    assert barrier.encryptions("r") >= 1_000_000
    barrier.load_ring("r", barrier.encode_ring("r", replicated.with_encryptions(10)))
    assert barrier.encryptions("r") >= 1_000_000, "an older ring takes nothing back"
