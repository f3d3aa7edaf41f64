"""The token store: one commit per change, exact caching, uses, renewal, revocation of trees, expiry."""

from __future__ import annotations

import asyncio
import base64
import hmac
import string
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consul_backend.errors import OutcomeUnknown, Unavailable
from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, PermissionDenied
from sidecar.core.batch_tokens import BatchTokens
from sidecar.core.expiration import Expiration
from sidecar.core.keyed_hash import KeyedHash
from sidecar.core.keys import CUBBYHOLES, TOKEN_IDS, TOKEN_SALT
from sidecar.core.locks import KeyedLocks
from sidecar.core.schedule import due_key, due_name
from sidecar.core.store_view import SealedStore
from sidecar.core.token_entry import SYSTEM_MAX_TTL_S, TokenEntry, format_duration, renewed_expiry
from sidecar.core.token_ids import AccessorEntry, base62, keyed_hash
from sidecar.core.tokens import CreateToken, TokenStore, cubbyhole
from tests.support.logical_store import FakeTime, MemoryLogicalStore, expire, make_barrier, make_sealed


async def make(**options) -> tuple[MemoryLogicalStore, SealedStore, FakeTime, TokenStore]:
    store, sealed = make_sealed()
    now = FakeTime()
    tokens = TokenStore(sealed, now, **options)
    await tokens.load()
    return store, sealed, now, tokens


async def restarted(sealed: SealedStore, now: FakeTime) -> TokenStore:
    tokens = TokenStore(sealed, now)
    await tokens.load()
    return tokens


def left(store: MemoryLogicalStore) -> list[str]:
    """What is stored beside the salt."""
    return [key for key in store.below("") if key != TOKEN_SALT]


async def test_a_token_is_one_commit_and_no_secret_is_stored():
    store, sealed, now, tokens = await make()
    before = len(store.commits)
    parent = await tokens.create(CreateToken(policies=["b", "a"], ttl_s=100))
    child = await tokens.create(CreateToken(policies=["a"], ttl_s=50, parent=parent.entry))
    assert len(store.commits) == before + 2
    assert len(store.commits[-1]) == 5
    assert parent.token.startswith("hvs.")
    assert len(parent.token) == 28
    assert parent.entry.policies == ("a", "b")
    assert parent.entry.expires_s == now() + 100
    assert not child.entry.orphan
    everything = repr(store.commits) + repr(parent) + repr(parent.entry)
    assert parent.token not in everything
    assert child.token[4:] not in everything
    again = await restarted(sealed, now)
    assert await again.lookup(child.token) == child.entry
    assert (await again.lookup_accessor(parent.entry.accessor)) == parent.entry
    assert await again.list_accessors() == sorted([parent.entry.accessor, child.entry.accessor])


@pytest.mark.parametrize("token", ["", "hvs.", "root", "hvs." + "a" * 24, "x" * 10_000, "hvb.", "hvb.!!", "\ud800"])
async def test_unknown_tokens(token: str):
    _, _, _, tokens = await make()
    assert await tokens.lookup(token) is None
    assert await tokens.use(token) is None
    await tokens.revoke(token)
    await tokens.revoke_orphan(token)
    with pytest.raises(InvalidRequest, match="token not found"):
        await tokens.renew(token)


async def test_lookups_of_a_known_token_read_nothing():
    store, _, _, tokens = await make()
    issued = await tokens.create(CreateToken(policies=["a"]))
    reads = store.reads
    for _ in range(10):
        assert await tokens.use(issued.token) == issued.entry
    assert store.reads == reads


async def test_the_cache_is_bounded_and_exact():
    _, sealed, now, tokens = await make(cache_max=3)
    issued = [await tokens.create(CreateToken(policies=[f"p{number}"])) for number in range(6)]
    assert len(tokens._cache) == 3
    for each in issued:
        assert await tokens.lookup(each.token) == each.entry
    other = await restarted(sealed, now)
    await other.revoke(issued[5].token)
    assert await tokens.lookup(issued[5].token) is not None, "only replication can tell"
    tokens.invalidate([TOKEN_IDS + issued[5].entry.id_hash, "r/policy/acl/x"])
    assert await tokens.lookup(issued[5].token) is None


async def test_a_read_that_overlaps_a_change_does_not_enter_the_cache():
    store, sealed, now, tokens = await make()
    issued = await tokens.create(CreateToken(policies=["a"]))
    reader = await restarted(sealed, now)

    async def slow_get(key: str) -> bytes | None:
        value = store.data.get(key)
        if key.startswith(TOKEN_IDS):
            started.set()
            await release.wait()
        return value

    started, release = asyncio.Event(), asyncio.Event()
    store.get = slow_get
    task = asyncio.create_task(reader.lookup(issued.token))
    await started.wait()
    reader.invalidate([TOKEN_IDS + issued.entry.id_hash])
    release.set()
    assert await task is not None
    assert len(reader._cache) == 0
    assert len(reader._loading) == 0


async def test_a_read_during_a_commit_does_not_undo_it_in_the_cache():
    store, _, _, tokens = await make(cache_max=1)
    issued = await tokens.create(CreateToken(policies=["a"], ttl_s=100))
    get, commit, applied = store.get, store.commit, asyncio.Event()
    reading, old = asyncio.Event(), None

    async def slow_get(key: str) -> bytes | None:
        value = store.data.get(key)
        reading.set()
        await applied.wait()
        return value

    async def slow_commit(writes: list[Write]):
        nonlocal old
        store.get = slow_get
        old = asyncio.create_task(tokens.lookup(issued.token))
        await reading.wait()
        store.get = get
        return await commit(writes)

    store.commit = slow_commit
    renewed = await tokens.renew(issued.token, 500)
    applied.set()
    assert await old == issued.entry, "the read began before the renewal was durable"
    assert await tokens.lookup(issued.token) == renewed.entry


async def test_expired_tokens_are_gone_at_once_and_swept_later():
    store, sealed, now, tokens = await make()
    issued = await tokens.create(CreateToken(policies=["a"], ttl_s=90))
    forever = await tokens.create_root()
    await cubbyhole(sealed, issued.entry).put("note", b"x")
    now.advance(89)
    assert await tokens.lookup(issued.token) is not None
    now.advance(1)
    assert await tokens.lookup(issued.token) is None
    assert await tokens.lookup_accessor(issued.entry.accessor) is None
    await expire(tokens)
    now.advance(120)
    tokens = await restarted(sealed, now)
    await expire(tokens)
    await tokens.revoke(forever.token)
    assert left(store) == []


async def test_a_renewed_token_is_not_swept():
    store, _, now, tokens = await make()
    issued = await tokens.create(CreateToken(policies=["a"], ttl_s=100))
    now.advance(90)
    renewed = await tokens.renew(issued.token, 500)
    assert renewed.entry.expires_s == now() + 500
    assert renewed.entry.last_renewal_s == now()
    now.advance(200)
    await expire(tokens)
    assert await tokens.lookup(issued.token) == renewed.entry
    now.advance(500)
    await expire(tokens)
    assert left(store) == []


async def test_a_stale_expiry_is_tidied_up():
    store, sealed, now, tokens = await make()
    await sealed.put(due_key(int(now()) - 300, due_name("token", "feedface")), b"")
    tokens = await restarted(sealed, now)
    await expire(tokens)
    assert left(store) == []


async def test_a_child_expires_with_its_parent():
    store, _, now, tokens = await make()
    parent = await tokens.create(CreateToken(policies=["a"], ttl_s=60))
    child = await tokens.create(CreateToken(policies=["a"], ttl_s=10_000, parent=parent.entry))
    now.advance(180)
    await expire(tokens)
    assert await tokens.lookup(child.token) is None
    assert left(store) == []


# -- counted uses


async def test_uses_are_counted_across_concurrent_requests():
    store, _, _, tokens = await make()
    issued = await tokens.create(CreateToken(policies=["a"], num_uses=5))
    used = await asyncio.gather(*(tokens.use(issued.token) for _ in range(50)))
    served = [entry for entry in used if entry is not None]
    assert sorted(entry.num_uses for entry in served) == [0, 1, 2, 3, 4]
    assert [entry.spent for entry in served].count(True) == 1
    assert await tokens.lookup(issued.token) is None
    (last,) = [entry for entry in served if entry.spent]
    await tokens.finish(last)
    assert left(store) == []


async def test_a_spent_token_that_nobody_finished_is_removed():
    store, _, now, tokens = await make()
    for _ in range(2):
        issued = await tokens.create(CreateToken(policies=["a"], num_uses=1))
        assert (await tokens.use(issued.token)).spent
    await expire(tokens)
    assert left(store) != [], "its request may still run"
    now.advance(200)
    await expire(tokens)
    assert left(store) == []


async def test_an_interrupted_revocation_is_finished_at_the_next_start():
    store, sealed, now, tokens = await make()
    issued = await tokens.create(CreateToken(policies=["a"], num_uses=1))
    assert (await tokens.use(issued.token)).spent
    tokens = await restarted(sealed, now)
    assert await tokens.lookup(issued.token) is None
    await expire(tokens)
    assert left(store) == []


async def test_a_use_that_could_not_be_committed_is_no_use():
    store, _, _, tokens = await make()
    issued = await tokens.create(CreateToken(policies=["a"], num_uses=1))
    store.fail = Unavailable("no store")
    with pytest.raises(Unavailable):
        await tokens.use(issued.token)
    assert (await tokens.use(issued.token)).spent


async def test_an_unknown_outcome_leaves_nothing_stale_in_the_cache():
    store, _, _, tokens = await make()
    issued = await tokens.create(CreateToken(policies=["a"], num_uses=1))
    store.fail, store.fail_applied = OutcomeUnknown("lost"), True
    with pytest.raises(OutcomeUnknown):
        await tokens.use(issued.token)
    assert await tokens.use(issued.token) is None


# -- renewal


async def test_renewal_stops_at_the_maximum():
    _, _, now, tokens = await make()
    issued = await tokens.create(CreateToken(policies=["a"], ttl_s=100, max_ttl_s=150))
    now.advance(99)
    renewed = await tokens.renew(issued.token, 100)
    assert renewed.entry.expires_s == issued.entry.created_s + 150
    assert renewed.warnings == [
        'TTL of "1m40s" exceeded the effective max_ttl of "51s"; TTL value is capped accordingly',
    ]
    now.advance(50)
    assert (await tokens.renew(issued.token, 100)).entry.expires_s == renewed.entry.expires_s
    now.advance(1)
    with pytest.raises(InvalidRequest, match="token not found"):
        await tokens.renew(issued.token)


async def test_periodic_tokens_live_as_long_as_they_are_renewed():
    _, _, now, tokens = await make()
    issued = await tokens.create(CreateToken(policies=["a"], period_s=60, max_ttl_s=100))
    for _ in range(10):
        now.advance(59)
        assert (await tokens.renew(issued.token, 99999)).entry.expires_s == now() + 60
    bounded = await tokens.create(CreateToken(policies=["a"], period_s=60, explicit_max_ttl_s=90))
    now.advance(50)
    assert (await tokens.renew(bounded.token)).entry.expires_s == bounded.entry.created_s + 90


async def test_tokens_that_cannot_be_renewed():
    _, _, _, tokens = await make()
    root = await tokens.create_root()
    fixed = await tokens.create(CreateToken(policies=["a"], renewable=False))
    batch = await tokens.create(CreateToken(policies=["a"], type="batch"))
    for issued in (root, fixed):
        with pytest.raises(InvalidRequest, match="lease is not renewable"):
            await tokens.renew(issued.token)
    with pytest.raises(InvalidRequest, match="batch tokens cannot be renewed"):
        await tokens.renew(batch.token)
    with pytest.raises(InvalidRequest, match="invalid accessor"):
        await tokens.renew_accessor("nothing")
    issued = await tokens.create(CreateToken(policies=["a"], ttl_s=10))
    assert (await tokens.renew_accessor(issued.entry.accessor, 20)).entry.remaining_s(0) > 0


@settings(max_examples=300)
@given(
    ttl=st.integers(1, 10_000),
    explicit=st.integers(0, 10_000),
    maximum=st.integers(0, 10_000),
    period=st.sampled_from([0, 0, 1, 500]),
    elapsed=st.integers(0, 10_000),
    increment=st.integers(-10, 2**70),
)
def test_no_renewal_makes_a_token_immortal(
    ttl: int, explicit: int, maximum: int, period: int, elapsed: int, increment: int
):
    entry = TokenEntry(
        id_hash="h",
        accessor="a",
        policies=(),
        path="p",
        created_s=1_000_000,
        expires_s=1_000_000 + ttl,
        ttl_s=ttl,
        explicit_max_ttl_s=explicit,
        max_ttl_s=maximum,
        period_s=period,
    )
    now_s = 1_000_000 + min(elapsed, ttl - 1)
    expires_s, _ = renewed_expiry(entry, increment, now_s)
    assert expires_s > now_s
    limit = maximum or SYSTEM_MAX_TTL_S
    if not period:
        assert expires_s <= max(1_000_000 + limit, entry.expires_s)
    assert expires_s <= now_s + max(limit, ttl)
    if explicit:
        assert expires_s <= max(1_000_000 + explicit, entry.expires_s)


# -- creation


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"ttl_s": -1}, "must not be negative"),
        ({"num_uses": -1}, "must not be negative"),
        ({"type": "robot"}, 'invalid "token_type" value'),
        ({"id": "a.b"}, "cannot have a '.'"),
        ({"id": ""}, "cannot have a '.'"),
        ({"type": "batch", "id": "x"}, "batch tokens cannot have a custom ID"),
        ({"type": "batch", "period_s": 1}, 'batch tokens cannot have "period" set'),
        ({"type": "batch", "num_uses": 1}, 'batch tokens cannot have "num_uses" set'),
        ({"type": "batch", "policies": ["root"]}, "batch tokens cannot be root tokens"),
    ],
)
async def test_tokens_that_cannot_be_made(fields: dict, text: str):
    _, _, _, tokens = await make()
    with pytest.raises(InvalidRequest) as caught:
        await tokens.create(CreateToken(**{"policies": ["a"], **fields}))
    assert text in str(caught.value)


async def test_ttls_of_new_tokens():
    _, _, _, tokens = await make()

    async def ttl(**fields: int) -> tuple[int, list[str]]:
        issued = await tokens.create(CreateToken(policies=["a"], **fields))
        return issued.entry.ttl_s, issued.warnings

    assert await ttl() == (SYSTEM_MAX_TTL_S, [])
    assert await ttl(default_ttl_s=60) == (60, [])
    assert await ttl(ttl_s=3600, explicit_max_ttl_s=60) == (
        60,
        ['TTL of "1h" exceeded the explicit max_ttl of "1m"; TTL value is capped accordingly'],
    )
    assert await ttl(explicit_max_ttl_s=60) == (60, [])
    assert await ttl(ttl_s=9999 * 3600) == (
        SYSTEM_MAX_TTL_S,
        ['TTL of "9999h" exceeded the effective max_ttl of "768h"; TTL value is capped accordingly'],
    )
    assert await ttl(default_ttl_s=100, max_ttl_s=50) == (50, [])
    root = await tokens.create_root("dev-root")
    assert (root.token, root.entry.expires_s, root.entry.renewable) == ("dev-root", 0, False)
    short = await tokens.create(CreateToken(policies=["root"], ttl_s=60))
    with pytest.raises(InvalidRequest, match="expiring root tokens cannot create non-expiring root tokens"):
        await tokens.create(CreateToken(policies=["root"], parent=short.entry))


async def test_custom_tokens_are_made_once():
    _, _, _, tokens = await make()
    await tokens.create_root("mine")
    with pytest.raises(InvalidRequest, match="duplicate"):
        await tokens.create_root("mine")


def test_format_duration():
    assert [format_duration(s) for s in (0, 5, 60, 3661, 2_764_800)] == ["0s", "5s", "1m", "1h1m1s", "768h"]


@given(st.binary(max_size=64), st.text())
def test_names_are_hmacs(salt: bytes, text: str):
    expected = hmac.digest(salt, text.encode("utf-8", "surrogatepass"), "sha256")
    assert KeyedHash(salt).digest(text.encode("utf-8", "surrogatepass")) == expected
    assert keyed_hash(salt, text) == expected[:20].hex()


def test_a_key_that_would_have_to_be_hashed_first_is_refused():
    with pytest.raises(ValueError, match="one block"):
        KeyedHash(bytes(65))


def test_base62_is_uniform():
    source = iter([bytes(range(256))] * 4)
    text = base62(900, lambda count: next(source))
    assert len(text) == 900
    assert all(text[: 3 * 248].count(character) == 3 * 4 for character in set(text)), "none comes more often"
    assert set(text) == set(string.ascii_letters + string.digits)
    drawn = iter([bytes(range(256))])
    assert base62(248, lambda count: next(drawn)) == text[:248], "one draw was enough"


async def test_a_new_salt_has_32_bytes():
    _, sealed, _, _ = await make()
    assert len(await sealed.get(TOKEN_SALT)) == 32


# -- revocation


async def test_revoking_a_childless_token_is_one_commit():
    store, sealed, _, tokens = await make()
    issued = await tokens.create(CreateToken(policies=["a"]))
    await cubbyhole(sealed, issued.entry).put("x/y", b"1")
    before = len(store.commits)
    await tokens.revoke_accessor(issued.entry.accessor)
    assert len(store.commits) == before + 1
    assert left(store) == []
    with pytest.raises(InvalidRequest, match="invalid accessor"):
        await tokens.revoke_accessor(issued.entry.accessor)


async def test_revoking_a_tree():
    store, sealed, _, tokens = await make()
    root = await tokens.create(CreateToken(policies=["a"]))
    bystander = await tokens.create(CreateToken(policies=["a"]))
    grown = [root]
    for number in range(150):
        parent = grown[number // 3]
        grown.append(await tokens.create(CreateToken(policies=["a"], parent=parent.entry)))
    for number in range(200):
        await cubbyhole(sealed, grown[1].entry).put(f"k{number}", b"")
    await tokens.revoke(root.token)
    for each in grown:
        assert await tokens.lookup(each.token) is None
    assert await tokens.lookup(bystander.token) is not None
    await tokens.revoke(bystander.token)
    assert left(store) == []


async def test_a_deep_chain_of_tokens():
    store, _, _, tokens = await make()
    last = root = await tokens.create(CreateToken(policies=["a"]))
    for _ in range(1100):  # deeper than Python recurses
        last = await tokens.create(CreateToken(policies=["a"], parent=last.entry))
    await tokens.revoke(root.token)
    assert left(store) == []


async def test_a_wide_tree_ends_side_by_side():
    """Ten thousand children one after the other would outlast the request that asks for it."""
    store, sealed, _, tokens = await make()
    root = await tokens.create(CreateToken(policies=["a"]))
    for number in range(64):
        child = await tokens.create(CreateToken(policies=["a"], parent=root.entry))
        below = await tokens.create(CreateToken(policies=["a"], parent=child.entry))
        if number % 16 == 0:
            for name in range(60):
                await cubbyhole(sealed, below.entry).put(f"k{name}", b"")
    commit, under_way, most = store.commit, 0, 0

    async def slow(writes: list[Write], **options: object):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(20):
            await asyncio.sleep(0)
        under_way -= 1
        return await commit(writes)

    store.commit = slow
    await tokens.revoke(root.token)
    assert left(store) == []
    assert most >= 16


async def test_all_below_is_unusable_before_the_chain_goes():
    store, _, _, tokens = await make()
    chain = [await tokens.create(CreateToken(policies=["a"]))]
    for _ in range(99):
        chain.append(await tokens.create(CreateToken(policies=["a"], parent=chain[-1].entry)))
    commit, gone = store.commit, 0
    usable: list[int] = []

    async def watched(writes: list[Write], **options: object):
        nonlocal gone
        gone += sum(write.value is None and write.key.startswith(TOKEN_IDS) for write in writes)
        if gone > 2:
            usable.append(sum([await tokens.lookup(each.token) is not None for each in chain]))
        return await commit(writes)

    store.commit = watched
    await tokens.revoke(chain[0].token)
    assert left(store) == []
    assert usable
    assert not any(usable)


@pytest.mark.parametrize("crash_after", range(12))
async def test_a_revocation_that_is_cut_short_ends_all_the_same(crash_after: int):
    store, sealed, now, tokens = await make()
    root = await tokens.create(CreateToken(policies=["a"]))
    for _ in range(3):
        child = await tokens.create(CreateToken(policies=["a"], parent=root.entry))
        await tokens.create(CreateToken(policies=["a"], parent=child.entry))
    commit, done = store.commit, len(store.commits)

    async def failing(writes: list[Write], **options: object):
        if len(store.commits) - done >= crash_after:
            raise Unavailable("crash")
        return await commit(writes)

    store.commit = failing
    try:
        await tokens.revoke(root.token)
    except Unavailable:
        # At once for everybody, unless not even the first commit happened.
        assert crash_after == 0 or await tokens.lookup(root.token) is None
    store.commit = commit
    tokens = await restarted(sealed, now)
    if crash_after == 0:
        await tokens.revoke(root.token)
    await expire(tokens)
    assert left(store) == []


async def test_revoking_without_the_children():
    store, _, _, tokens = await make()
    parent = await tokens.create(CreateToken(policies=["a"]))
    children = [await tokens.create(CreateToken(policies=["a"], parent=parent.entry)) for _ in range(5)]
    await tokens.revoke_orphan(parent.token)
    assert await tokens.lookup(parent.token) is None
    for child in children:
        assert (await tokens.lookup(child.token)).orphan
        await tokens.revoke(child.token)
    assert left(store) == []


async def test_no_child_outlives_a_concurrent_revocation():
    store, _, _, tokens = await make()
    parent = await tokens.create(CreateToken(policies=["a"]))
    late = CreateToken(policies=["a"], parent=parent.entry)
    commit, begun, release = store.commit, asyncio.Event(), asyncio.Event()

    async def slow(writes: list[Write]):
        begun.set()
        await release.wait()
        return await commit(writes)

    store.commit = slow
    creation = asyncio.create_task(tokens.create(late))
    await begun.wait()
    store.commit = commit
    revocation = asyncio.create_task(tokens.revoke(parent.token))
    for _ in range(50):
        await asyncio.sleep(0)
    release.set()
    child = await creation
    await revocation
    assert await tokens.lookup(child.token) is None
    assert left(store) == []
    with pytest.raises(PermissionDenied, match="parent token lookup failed"):
        await tokens.create(late)


async def test_creations_and_a_revocation_at_once():
    store, _, _, tokens = await make()
    parent = await tokens.create(CreateToken(policies=["a"]))
    calls = [tokens.create(CreateToken(policies=["a"], parent=parent.entry)) for _ in range(10)]
    calls.insert(5, tokens.revoke(parent.token))
    await asyncio.gather(*calls, return_exceptions=True)
    assert left(store) == []


async def test_cubbyholes_are_apart():
    store, sealed, _, tokens = await make()
    one, two = [await tokens.create(CreateToken(policies=["a"])) for _ in range(2)]
    await cubbyhole(sealed, one.entry).put("x", b"1")
    assert await cubbyhole(sealed, two.entry).get("x") is None
    assert store.below(CUBBYHOLES) == [f"{CUBBYHOLES}{one.entry.id_hash}/x"]


# -- batch tokens


async def test_batch_tokens_are_not_stored():
    store, _, now, tokens = await make()
    parent = await tokens.create(CreateToken(policies=["a"]))
    before = len(store.commits)
    orphan = await tokens.create(CreateToken(policies=["a"], type="batch", ttl_s=60))
    child = await tokens.create(CreateToken(policies=["a"], type="batch", ttl_s=600, parent=parent.entry))
    assert len(store.commits) == before
    assert orphan.token.startswith("hvb.")
    for issued in (orphan, child):
        found = await tokens.use(issued.token)
        assert found == issued.entry
        assert (found.accessor, found.type, found.renewable) == ("", "batch", False)
        with pytest.raises(InvalidRequest, match="batch tokens cannot be revoked"):
            await tokens.revoke(issued.token)
        with pytest.raises(InvalidRequest, match="batch tokens cannot create more tokens"):
            await tokens.create(CreateToken(policies=["a"], parent=found))
    assert await tokens.lookup(orphan.token[:-3] + "AAA") is None
    await tokens.revoke(parent.token)
    assert await tokens.lookup(child.token) is None
    now.advance(60)
    assert await tokens.lookup(orphan.token) is None


async def test_batch_tokens_on_the_other_clusters_of_a_set():
    _, _, now, primary = await make()
    parent = await primary.create(CreateToken(policies=["a"]))
    orphan = await primary.create(CreateToken(policies=["a"], type="batch"))
    child = await primary.create(CreateToken(policies=["a"], type="batch", parent=parent.entry))
    # Another cluster: the same root key, a store and a token salt of its own.
    other = TokenStore(SealedStore(MemoryLogicalStore(), make_sealed()[1].barrier), now)
    await other.load()
    assert (await other.lookup(orphan.token)).policies == ("a",)
    assert await other.lookup(child.token) is None, "its parent is not known there"
    own = await other.create(CreateToken(policies=["b"], type="batch"))
    assert (await primary.lookup(own.token)).policies == ("b",)
    # A cluster that is not of this set.
    foreign = TokenStore(SealedStore(MemoryLogicalStore(), make_barrier(2)), now)
    await foreign.load()
    assert await foreign.lookup(orphan.token) is None


@given(st.binary(max_size=200))
def test_no_bytes_make_a_batch_token(raw: bytes):
    tokens = BatchTokens(bytes(32))
    assert tokens.read("hvb." + base64.urlsafe_b64encode(raw).decode()) is None
    assert tokens.read("hvb." + raw.decode("latin-1")) is None


# -- tidy


async def test_tidy_removes_what_leads_nowhere_and_nothing_else():
    store, sealed, _, tokens = await make()
    parent = await tokens.create(CreateToken(policies=["a"], ttl_s=600))
    child = await tokens.create(CreateToken(policies=["a"], ttl_s=600, parent=parent.entry))
    await cubbyhole(sealed, child.entry).put("kept", b"1")
    whole = left(store)
    ghost = "ab" * 20
    await sealed.commit(
        [
            Write(f"l/token/accessor/{'cd' * 20}", msgspec.msgpack.encode(AccessorEntry("x", ghost))),
            Write(f"l/token/parent/{parent.entry.id_hash}/{ghost}", b""),
            *(Write(f"{CUBBYHOLES}{ghost}/{number}", b"") for number in range(20)),
        ]
    )
    await sealed.commit([Write(f"{CUBBYHOLES}{ghost}/deep/{number}", b"") for number in range(50)])
    running = asyncio.create_task(tokens.run())
    assert tokens.ask_for_tidy()
    assert not tokens.ask_for_tidy(), "one at a time"
    async with asyncio.timeout(120):
        await tokens.tidied()
    assert tokens.ask_for_tidy()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert left(store) == whole
    assert await tokens.lookup(child.token) == child.entry


# -- the loop


async def test_run_survives_a_store_that_cannot_write(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sidecar.core.expiration.RETRY_S", 0.0)
    store, _, now, tokens = await make()
    await tokens.create(CreateToken(policies=["a"], ttl_s=60))
    now.advance(180)
    store.fail = Unavailable("not now")
    commit, tidy = store.commit, asyncio.Event()

    async def watched(writes: list[Write]):
        head = await commit(writes)
        if not left(store):
            tidy.set()
        return head

    store.commit = watched
    task = asyncio.create_task(Expiration(tokens.schedule, tokens.expire).run())
    async with asyncio.timeout(120):
        await tidy.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_use_before_load_is_an_error():
    _, sealed = make_sealed()
    with pytest.raises(RuntimeError, match="before load"):
        await TokenStore(sealed, FakeTime()).lookup("hvs.x")


async def test_locks_leave_nothing_behind():
    locks = KeyedLocks()
    order: list[str] = []

    async def worker(name: str, mark: str) -> None:
        async with locks.hold(name):
            order.append(mark + "+")
            await asyncio.sleep(0)
            order.append(mark + "-")

    await asyncio.gather(worker("a", "1"), worker("a", "2"), worker("b", "3"))
    assert len(locks) == 0
    assert order.index("1-") < order.index("2+")
    task = asyncio.create_task(worker("a", "x"))
    async with locks.hold("a"):
        await asyncio.sleep(0)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(locks) == 0


async def test_a_shared_lock_keeps_holders_out_and_lets_no_stream_of_sharers_starve_one():
    locks = KeyedLocks()
    order: list[str] = []
    leave = asyncio.Event()

    async def share(mark: str) -> None:
        async with locks.share("a"):
            order.append(mark)
            await leave.wait()

    async def hold() -> None:
        async with locks.hold("a"):
            order.append("alone")

    first = [asyncio.create_task(share(mark)) for mark in ("1", "2")]
    await asyncio.sleep(0)
    assert order == ["1", "2"]
    later = [asyncio.create_task(hold()), asyncio.create_task(share("3"))]
    for _ in range(3):
        await asyncio.sleep(0)
    assert order == ["1", "2"]
    leave.set()
    await asyncio.gather(*first, *later)
    assert order == ["1", "2", "alone", "3"]
    assert len(locks) == 0


async def test_siblings_are_created_at_once_and_one_chosen_id_only_once():
    store, sealed = make_sealed()
    tokens = TokenStore(sealed, FakeTime())
    await tokens.load()
    parent = (await tokens.create_root()).entry
    under_way, most = 0, 0
    plain = store.commit

    async def slow(writes):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        try:
            return await plain(writes)
        finally:
            under_way -= 1

    store.commit = slow
    spec = CreateToken(policies=("p",), path="auth/token/create", parent=parent, ttl_s=60)
    await asyncio.gather(*(tokens.create(spec) for _ in range(5)))
    assert most == 5
    chosen = replace(spec, id="my-own-name")
    outcomes = await asyncio.gather(*(tokens.create(chosen) for _ in range(3)), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["InvalidRequest", "InvalidRequest", "IssuedToken"]
