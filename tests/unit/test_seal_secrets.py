"""Statements 46 and 47, F48: what shares, keys and their holders' mistakes leave behind."""

import base64
import logging
import os
import traceback
from collections.abc import AsyncIterator

import pytest

from consul_backend.clock import SystemClock
from consul_backend.embedded import EmbeddedStore
from plugin_api.errors import InvalidRequest
from sidecar.api.node_view import InitOptions
from sidecar.core.quorum import Quorum, Words
from sidecar.core.seal import InvalidShares, SealConfig, combine, split
from sidecar.core.seals.static import StaticKey, StaticSeal
from sidecar.sealing import Sealing

WORDS = Words("test", "test", "test aborted")


@pytest.fixture
async def sealing() -> AsyncIterator[Sealing]:
    store = EmbeddedStore(None)
    await store.open()
    seal = StaticSeal(StaticKey("k", os.urandom(32)), None)
    yield Sealing(store, node_id="n", cluster_name="c", clock=SystemClock(), seal=seal)
    await store.close()


def spellings(secret: bytes) -> list[str]:
    return [secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1], repr(list(secret))[1:-1]]


async def test_no_key_in_a_repr_an_exception_or_the_log(sealing: Sealing, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    outcome = await sealing.init(InitOptions(3, 2))
    assert await sealing.unseal_by_itself()
    assert sealing.opened is not None
    root_key = sealing.opened.root_key
    seen = [repr(sealing), repr(sealing.opened), repr(outcome), repr(await sealing.status())]
    sealing.seal()
    await sealing.unseal(outcome.keys[0])
    seen.append(repr(vars(sealing)))
    try:
        await sealing.unseal(bytes([outcome.keys[1][0] ^ 1, *outcome.keys[1][1:]]))
    except InvalidRequest as error:
        seen += [repr(error), "".join(traceback.format_exception(error))]
    else:
        raise AssertionError("a wrong share unsealed")
    everything = "\n".join([*seen, caplog.text])
    for secret in (root_key, *outcome.keys, outcome.root_token.encode()):
        for spelling in spellings(secret):
            assert spelling not in everything
    assert outcome.root_token not in everything


async def test_wrong_and_mixed_shares_are_told_from_nothing_else(sealing: Sealing) -> None:
    """Shares of two different keys, of which each would do with its like: the attempt starts over, and says no more."""
    first = (await sealing.init(InitOptions(3, 2))).keys
    other = split(os.urandom(32), 3, 2, os.urandom)
    texts = set()
    for mixed in ((first[0], other[0]), (other[0], other[1]), (first[1], b"\x01" * 33)):
        await sealing.unseal(mixed[0])
        await sealing.unseal(mixed[0])  # a repeated share is not progress
        assert (await sealing.status()).progress == 1
        with pytest.raises(InvalidRequest) as refused:
            await sealing.unseal(mixed[1])
        texts.add(str(refused.value))
        status = await sealing.status()
        assert (status.sealed, status.progress, status.nonce) == (True, 0, "")
    assert texts == {"Unseal failed, invalid key: cipher: message authentication failed"}
    for share in first[:2]:
        await sealing.unseal(share)
    assert not (await sealing.status()).sealed


@pytest.mark.parametrize(
    "shares", [[b"a" * 32 + b"\x00", b"b" * 32 + b"\x01"], [b"a" * 32 + b"\x01", b"b" * 32 + b"\x01"]]
)
def test_shares_at_zero_and_at_one_place_are_refused(shares: list[bytes]) -> None:
    with pytest.raises(InvalidShares):
        combine(shares)
    quorum = Quorum(SealConfig(3, 2), "n", WORDS)
    quorum.give(shares[0], "n")
    with pytest.raises(InvalidRequest, match="do not belong together") as refused:
        quorum.give(shares[1], "n")
    assert "aaa" not in str(refused.value)
    assert quorum.progress == 0


def test_a_share_is_no_shorter_and_no_longer_than_one_can_be() -> None:
    for size, refused in ((15, "shorter"), (16, ""), (33, ""), (34, "longer")):
        quorum = Quorum(SealConfig(3, 2), "n", WORDS)
        if refused:
            with pytest.raises(InvalidRequest, match=refused):
                quorum.give(b"x" * size, "n")
        else:
            assert quorum.give(b"x" * size, "n") is None
        assert quorum.progress == (0 if refused else 1)


def test_a_quorum_listens_to_its_nonce_only() -> None:
    key = os.urandom(32)
    shares = split(key, 3, 2, os.urandom)
    quorum = Quorum(SealConfig(3, 2), "n-1", WORDS)
    assert quorum.give(shares[0], "n-1") is None
    with pytest.raises(InvalidRequest, match="incorrect nonce"):
        quorum.give(shares[1], "n-0")
    assert quorum.progress == 1
    quorum.restart("n-2")
    assert quorum.progress == 0
    with pytest.raises(InvalidRequest, match="incorrect nonce"):
        quorum.give(shares[0], "n-1")
    quorum.give(shares[2], "n-2")
    assert quorum.give(shares[0], "n-2") == key
    assert shares[0].hex() not in repr(quorum)
