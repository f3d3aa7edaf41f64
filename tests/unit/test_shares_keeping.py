"""A rekey of the primary reaches its secondaries: which shares open which cluster, at every moment."""

from __future__ import annotations

import asyncio
import os

import pytest

from consul_backend.errors import Overloaded
from consul_backend.wal import Write
from sidecar.core.barrier import load_barrier
from sidecar.core.init import build_genesis
from sidecar.core.keys import SEAL, SEAL_SHARES
from sidecar.core.seal import SealConfig, combine, split
from sidecar.core.seal_record import AutoPart, SealRecord, WrongKey, make_seal_record, open_root_key
from sidecar.core.store_view import SealedStore
from sidecar.shares_keeping import SharesKeeper
from tests.support.service_node import FakeReplication, MemoryStore, running

AUTO = AutoPart("static", "key-1", b"wrapped", b"encrypted")


class Secondary:
    """The store of a cluster that follows, and what a rekey of its primary makes."""

    def __init__(self) -> None:
        self.genesis = build_genesis(shares=1, threshold=1, cluster_name="c", now_s=1000.0, random_bytes=os.urandom)
        self.store = MemoryStore(self.genesis.writes)
        self.root_key = open_root_key(self.record, self.genesis.keys[0])
        self.follows = True
        self.modes = ("secondary", "disabled")

    async def start(self) -> SharesKeeper:
        self.sealed = SealedStore(self.store, await load_barrier(self.store.get, self.root_key))
        return SharesKeeper(self.sealed, lambda: self.modes, lambda: not self.follows, asyncio.Lock())

    @property
    def record(self) -> SealRecord:
        return SealRecord.decode(self.store.entries[SEAL])

    async def receive(self, created_s: int = 2000) -> list[bytes]:
        """The entry of a rekey, as replication applies it; its shares."""
        share_key = os.urandom(32)
        record = make_seal_record(self.root_key, share_key, SealConfig(3, 2), created_s, os.urandom)
        await self.sealed.put(SEAL_SHARES, record.encode())
        return split(share_key, 3, 2, os.urandom)

    def opened_by(self, shares: list[bytes]) -> bool:
        try:
            return open_root_key(self.record, combine(shares)) == self.root_key
        except WrongKey:
            return False


async def test_new_shares_take_the_place_of_the_old_ones_beside_an_auto_seal() -> None:
    secondary = Secondary()
    keeper = await secondary.start()
    await secondary.sealed.commit([Write(SEAL, secondary.record.with_auto(AUTO).encode())])
    shares = await secondary.receive()
    assert not secondary.opened_by(shares[:2]), "not in force yet"
    await keeper._once()
    assert secondary.opened_by(shares[1:])
    assert (secondary.record.auto, secondary.record.created_s) == (AUTO, 2000)
    index = secondary.store.index
    await keeper._once()
    assert secondary.store.index == index, "nothing is written twice"


@pytest.mark.parametrize("follows", [True, False])
async def test_older_shares_count_for_who_follows_and_not_for_a_primary(follows: bool) -> None:
    secondary = Secondary()
    secondary.follows = follows
    keeper = await secondary.start()
    older = await secondary.receive(created_s=500)
    await keeper._once()
    assert secondary.opened_by(older[:2]) == follows
    newer = await secondary.receive(created_s=3000)
    await keeper._once()
    assert secondary.opened_by(newer[:2]), "promoted before it had taken them over"


@pytest.mark.parametrize(
    ("modes", "follows", "published"),
    [
        (("primary", "disabled"), False, True),
        (("disabled", "primary"), False, True),
        (("disabled", "disabled"), False, False),
        (("secondary", "primary"), True, False),
    ],
)
async def test_a_primary_that_was_never_rekeyed_says_which_shares_count(
    modes: tuple[str, str], follows: bool, published: bool
) -> None:
    cluster = Secondary()
    cluster.modes, cluster.follows = modes, follows
    keeper = await cluster.start()
    await cluster.sealed.commit([Write(SEAL, cluster.record.with_auto(AUTO).encode())])
    await keeper._once()
    raw = await cluster.sealed.get(SEAL_SHARES)
    assert (raw is not None) == published
    if raw is not None:
        assert SealRecord.decode(raw) == cluster.record.with_auto(None), "its auto seal is nobody else's"


async def test_what_cannot_be_read_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    secondary = Secondary()
    keeper = await secondary.start()
    await secondary.sealed.put(SEAL_SHARES, b"{}")
    await keeper._once()
    assert open_root_key(secondary.record, secondary.genesis.keys[0]) == secondary.root_key
    assert "stay in force" in caplog.text


async def test_it_is_taken_at_the_start_and_when_it_arrives_and_again_after_a_full_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sidecar.shares_keeping.RETRY_S", 0.0)
    secondary = Secondary()
    keeper = await secondary.start()
    first = await secondary.receive()
    running_keeper = asyncio.create_task(keeper.run())
    await secondary.store.until(lambda: secondary.opened_by(first[:2]))
    second = await secondary.receive()
    secondary.store.fail_next = Overloaded("full")
    keeper.heard(["r/m/other", SEAL_SHARES])
    await secondary.store.until(lambda: secondary.opened_by(second[:2]))
    running_keeper.cancel()


async def test_a_rekey_commits_the_shares_for_the_secondaries_in_the_same_record() -> None:
    async with running(replication=FakeReplication()) as node:
        assert node.replication is not None
        node.replication.lacking = ["dr eu"]
        begun = await node.call("PUT", "sys/rekey/init", {"secret_shares": 1, "secret_threshold": 1}, token=None)
        before = node.store.index
        for key in node.keys[:2]:
            done = await node.call(
                "PUT", "sys/rekey/update", {"key": key.hex(), "nonce": begun.body["nonce"]}, token=None
            )
        assert node.store.index == before + 1
        assert node.replication.calls[-1] == ("lacking_record", node.store.index)
        assert "dr eu" in done.body["warnings"][0]
        assert "Keep the old shares" in done.body["warnings"][0]
        sent = await node.service._sealed.get(SEAL_SHARES)
        assert sent == node.store.entries[SEAL]
        assert node.store.entries[SEAL_SHARES] != sent, "encrypted like all that travels"
