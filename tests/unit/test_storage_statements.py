"""What lies in storage, and the files beside it (statements 42 to 44, 46 and 55), each with the defence switched off
once: a test that still passes then would prove nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sidecar.core import rotation, seal
from sidecar.core.audit.file_sink import FileSink
from sidecar.core.audit.sink import SinkError
from sidecar.core.barrier import Barrier, DecryptionFailed, load_barrier
from sidecar.core.keyring import Keyring
from sidecar.core.keys import REPLICATED_KEYRING
from sidecar.core.seal import InvalidShares, combine, split
from sidecar.core.store_view import SealedStore
from tests.support.logical_store import make_barrier, make_sealed

# -- 42: a value at another key, an older value in its place


def moved(barrier: Barrier) -> bytes:
    """What a reader gets of a value that somebody moved to another key of the store."""
    return barrier.open("r/p/mine", barrier.seal("r/p/theirs", b"secret"))


def test_42_a_value_moved_to_another_key_does_not_open() -> None:
    with pytest.raises(DecryptionFailed):
        moved(make_barrier())


def test_42_control_bound_to_no_key_it_opens_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cipher:
        """AES-GCM without the key's name as associated data."""

        def __init__(self, key: bytes) -> None:
            self._cipher = AESGCM(key)

        def encrypt(self, nonce: bytes, data: bytes, _: bytes | None) -> bytes:
            return self._cipher.encrypt(nonce, data, None)

        def decrypt(self, nonce: bytes, data: bytes, _: bytes | None) -> bytes:
            return self._cipher.decrypt(nonce, data, None)

    monkeypatch.setattr("sidecar.core.barrier.AESGCM", Cipher)
    assert moved(make_barrier()) == b"secret"


# -- 43: nonces

SEALS = 2000
NONCE = slice(9, 21)


def nonces(*barriers: Barrier) -> list[bytes]:
    return [barrier.seal("r/p/k", b"same")[NONCE] for barrier in barriers for _ in range(SEALS)]


def two_nodes(**options: Any) -> tuple[Barrier, Barrier]:
    """Two processes that hold the same keys: standby and active, before and after a restart, a fork or a snapshot."""
    one = make_barrier()
    rings = (one.root_key(), one.ring("r"), one.ring("l"))
    return Barrier(*rings, **options), Barrier(*rings, **options)


def test_43_no_nonce_comes_twice_on_two_nodes_with_one_key() -> None:
    found = nonces(*two_nodes())
    assert len(set(found)) == 2 * SEALS


def test_43_control_counted_from_a_start_they_come_twice() -> None:
    """A counter in each process, which is what a nonce must not be made of."""

    class Counter:
        def __init__(self) -> None:
            self.value = 0

        def __call__(self, size: int) -> bytes:
            self.value += 1
            return self.value.to_bytes(size, "big")

    one, two = two_nodes()
    one._random_bytes, two._random_bytes = Counter(), Counter()
    assert len(set(nonces(one, two))) == SEALS


def test_43_a_forked_process_takes_its_nonces_from_the_system() -> None:
    barrier = make_barrier()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, barrier.seal("r/p/k", b"same")[NONCE])
        os._exit(0)
    ours = barrier.seal("r/p/k", b"same")[NONCE]
    os.waitpid(child, 0)
    theirs = os.read(reading, 64)
    os.close(reading)
    os.close(writing)
    assert len(theirs) == 12
    assert theirs != ours


# -- 44: uses of a key


async def most_uses_of_a_key(*, counted: bool) -> tuple[int, int]:
    """(the most uses that any key had over 40 crashes, how many it may have); without ``counted``, by a server that
    knows of no use from before its start."""
    policy = rotation.RotationPolicy(max_operations=1_000_000)
    store, sealed = make_sealed()
    await rotation.set_rotation_policy(sealed, policy)
    per_tenure = policy.reservation // 8
    uses: dict[int, int] = {}
    for _ in range(40):
        await rotation.maintain_keyrings(sealed, lambda: 0.0, lambda: True)
        term = sealed.barrier.ring("l").active.term
        sealed.barrier._rings["l"].used += per_tenure  # as that many seals do
        uses[term] = uses.get(term, 0) + per_tenure
        store.data.setdefault(REPLICATED_KEYRING, sealed.barrier.encode_ring("r", sealed.barrier.ring("r")))
        sealed = SealedStore(store, await load_barrier(store.get, sealed.barrier.root_key()))
        if not counted:
            sealed.barrier._rings["l"].floor = 0
    return max(uses.values()), policy.max_operations


async def test_44_no_key_is_used_more_often_than_it_may() -> None:
    most, allowed = await most_uses_of_a_key(counted=True)
    assert most <= allowed


async def test_44_control_forgotten_over_a_crash_it_is() -> None:
    most, allowed = await most_uses_of_a_key(counted=False)
    assert most > allowed


def test_44_the_hard_limit_is_far_below_what_is_safe() -> None:
    assert rotation.ENCRYPTIONS_MAX < 2**32
    assert Keyring.generate(0, os.urandom).active.term == 1


# -- 46: shares

BAD_SHARES = {
    "at zero": [b"a" * 32 + b"\x00", b"b" * 32 + b"\x01"],
    "at one place": [b"a" * 32 + b"\x01", b"b" * 32 + b"\x01"],
}


@pytest.mark.parametrize("shares", BAD_SHARES.values(), ids=BAD_SHARES)
def test_46_shares_at_zero_and_at_one_place_are_refused(shares: list[bytes]) -> None:
    with pytest.raises(InvalidShares):
        combine(shares)
    secret = os.urandom(32)
    made = split(secret, 255, 3, os.urandom)
    assert len({share[-1] for share in made} - {0}) == 255
    assert combine(made[100:103]) == secret


def test_46_control_unchecked_a_share_at_zero_decides_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one share at zero the others have no weight: whatever the honest holder gives, the outcome is the same."""
    monkeypatch.setattr(seal, "_check_points", lambda points: None)
    forged = b"a" * 32 + b"\x00"
    outcomes = {combine([forged, os.urandom(32) + b"\x01"]) for _ in range(8)}
    assert len(outcomes) == 1


# -- 55: files that are no audit log

VICTIMS = {
    "a program": (b"", 0o700),
    "a script": (b"#!/bin/sh\n", 0o600),
    "keys": (b"ssh-rsa AAAA\n", 0o600),
    "configuration": (b'storage "consul" {}\n', 0o640),
}


def written_to(path: Path, victim: tuple[bytes, int]) -> bool:
    content, mode = victim
    path.write_bytes(content)
    path.chmod(mode)
    sink = FileSink(str(path), timeout_s=0.1)
    try:
        sink.write([b'{"line":1}\n'])
    except SinkError:
        pass
    finally:
        sink.close()
    return path.read_bytes() != content


@pytest.mark.parametrize("victim", VICTIMS.values(), ids=VICTIMS)
def test_55_programs_and_configuration_are_not_written_to(tmp_path: Path, victim: tuple[bytes, int]) -> None:
    assert not written_to(tmp_path / "victim", victim)


@pytest.mark.parametrize("victim", VICTIMS.values(), ids=VICTIMS)
def test_55_control_unchecked_they_are(
    tmp_path: Path, victim: tuple[bytes, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def anything(self: FileSink, fd: int) -> None:
        self._regular = True

    monkeypatch.setattr(FileSink, "_check", anything)
    assert written_to(tmp_path / "victim", victim)
