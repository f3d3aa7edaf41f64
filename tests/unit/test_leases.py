"""Leases: made, renewed and revoked, whatever fails or crashes on the way (reliability statements 10, 11, 15)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consul_backend.errors import OutcomeUnknown, Unavailable
from consul_backend.wal import Write
from plugin_api.engine import MountInfo
from plugin_api.errors import InvalidRequest, Irrevocable, PermissionDenied, PluginError
from plugin_api.request import Lease
from sidecar.core.expiration import JOBS_PER_GROUP_MAX
from sidecar.core.keys import LEASES_BY_TOKEN
from sidecar.core.lease_entry import LeaseEntry, first_expiry, is_lease_id, renewed_expiry
from sidecar.core.lease_revocation import AT_ONCE, ATTEMPTS_MAX, each_of
from sidecar.core.lease_tidy import tidy
from sidecar.core.token_entry import BATCH
from tests.support.leasing import MOUNT, Setup, make_setup


@pytest.fixture
async def it() -> Setup:
    return await make_setup()


# -- making and ending


async def test_a_lease_is_one_commit_and_shows_nothing_of_the_secret(it: Setup) -> None:
    holder = await it.token()
    before = len(it.store.commits)
    granted = await it.lease(holder.entry, internal={"credential": "s3cret"})
    assert len(it.store.commits) == before + 1
    assert len(it.store.commits[-1]) == 3
    entry = granted.entry
    assert entry.id.startswith("db/creds/app/")
    assert len(entry.name) == 24
    everything = repr(granted) + repr(entry) + repr(entry.issued("db/")) + repr(it.store.data)
    assert "s3cret" not in everything
    assert await it.leasing.leases.load(entry.id) == entry


async def test_a_lease_is_revoked_at_its_end_and_not_before(it: Setup) -> None:
    holder = await it.token()
    await it.lease(holder.entry)
    await it.expire(99)
    assert it.outside.calls == []
    await it.expire(1)
    assert it.outside.calls == ["app-0"]
    assert it.outside.valid == set()
    token_lease = [key for key in it.left() if "auth/token/create/h" not in key and "token-" not in key]
    assert token_lease == []
    await it.expire(1000)
    assert it.outside.calls == ["app-0"], "once"


async def test_a_renewed_lease_lives_on(it: Setup) -> None:
    holder = await it.token()
    entry = (await it.lease(holder.entry, max_ttl_s=1000)).entry
    await it.expire(90)
    granted = await it.leasing.leases.renew(entry.id, 200)
    assert granted.entry.expires_s == it.now() + 200
    assert it.outside.renewals == [("app-0", 200)]
    await it.start()
    await it.expire(199)
    assert it.outside.calls == []
    await it.expire(1)
    assert it.outside.calls == ["app-0"]


async def test_what_the_engine_grants_counts(it: Setup) -> None:
    holder = await it.token()
    entry = (await it.lease(holder.entry, max_ttl_s=1000)).entry
    it.outside.renewed_ttl_s = 50
    assert (await it.leasing.leases.renew(entry.id, 500)).entry.expires_s == it.now() + 50
    it.outside.fail = PluginError("x")
    before = dict(it.store.data)
    with pytest.raises(PluginError, match="cannot be renewed"):
        await it.leasing.leases.renew(entry.id, 500)
    assert it.store.data == before


async def test_what_cannot_be_renewed(it: Setup) -> None:
    holder = await it.token()
    fixed = (await it.lease(holder.entry, renewable=False)).entry
    with pytest.raises(InvalidRequest, match="lease is not renewable"):
        await it.leasing.leases.renew(fixed.id)
    ended = (await it.lease(holder.entry)).entry
    it.now.advance(100)
    with pytest.raises(InvalidRequest, match="lease expired"):
        await it.leasing.leases.renew(ended.id)
    token_lease = f"auth/token/create/h{holder.entry.id_hash}"
    with pytest.raises(InvalidRequest, match="tokens cannot be renewed through this endpoint"):
        await it.leasing.leases.renew(token_lease)
    for unknown in ("db/creds/app/nothing", "", "/", "db//x", "../x", "\ud800", "h" + "0" * 40, "x" * 10_000):
        with pytest.raises(InvalidRequest, match="lease not found"):
            await it.leasing.leases.renew(unknown)
        assert await it.leasing.leases.lookup(unknown) is None
        await it.leasing.revocation.revoke(unknown)


async def test_another_clusters_lease_is_as_unknown_as_none(it: Setup) -> None:
    """Statement 15."""
    other = await make_setup()
    foreign = (await other.lease((await other.token()).entry)).entry
    for lease_id in (foreign.id, "db/creds/app/" + "A" * 24):
        with pytest.raises(InvalidRequest, match=r"^lease not found$"):
            await it.leasing.leases.renew(lease_id)
        await it.leasing.revocation.revoke(lease_id)
    assert other.outside.calls == []


# -- with its token (statement 11)


async def test_a_lease_ends_with_its_token(it: Setup) -> None:
    holder, bystander = await it.token(), await it.token()
    for number in range(70):
        await it.lease(holder.entry, path=f"db/creds/r{number % 3}")
    await it.lease(bystander.entry, role="other")
    await it.leasing.tokens.revoke(holder.token)
    assert it.outside.calls == [], "marked in the store; a slow engine holds no token up"
    await it.start()
    await it.expire()
    assert len(it.outside.calls) == 70
    assert it.outside.valid == {"other-70"}


async def test_a_lease_does_not_outlive_a_token_that_expires(it: Setup) -> None:
    holder = await it.token(ttl_s=30)
    await it.lease(holder.entry, ttl_s=3000)
    await it.expire(29)
    assert it.outside.calls == []
    await it.expire(1)
    assert it.outside.calls == ["app-0"]
    assert it.left() == []


async def test_a_lease_does_not_outlive_its_tokens_parent(it: Setup) -> None:
    parent = await it.token()
    child = await it.token(parent=parent.entry)
    await it.lease(child.entry)
    await it.leasing.tokens.revoke(parent.token)
    await it.expire()
    assert it.outside.valid == set()
    assert it.left() == []


async def test_a_lease_of_a_batch_token_is_no_longer_than_the_token(it: Setup) -> None:
    parent = await it.token()
    for owner in (parent.entry, None):
        batch = await it.token(type=BATCH, ttl_s=60, parent=owner)
        entry = (await it.lease(batch.entry, ttl_s=3000, max_ttl_s=9000)).entry
        assert entry.expires_s == batch.entry.expires_s
        it.now.advance(50)
        renewed = await it.leasing.leases.renew(entry.id, 3000)
        assert renewed.entry.expires_s == batch.entry.expires_s, "nor is it after a renewal"
        await it.expire(10)
        assert it.outside.valid == set()


async def test_a_lease_of_a_batch_token_ends_with_the_parent(it: Setup) -> None:
    parent = await it.token()
    batch = await it.token(type=BATCH, ttl_s=600, parent=parent.entry)
    await it.lease(batch.entry, ttl_s=300)
    await it.leasing.tokens.revoke(parent.token)
    await it.expire()
    assert it.outside.valid == set()


@pytest.mark.parametrize("kind", ["revoked", "expired batch", "orphan batch", "last use", "none"])
async def test_what_cannot_be_leased_is_taken_back_at_once(it: Setup, kind: str) -> None:
    error, text = PermissionDenied, "permission denied"
    holder: Any = (await it.token()).entry
    if kind == "revoked":
        await it.leasing.tokens.revoke_entry(holder)
    elif kind == "none":
        holder, error, text = None, InvalidRequest, "needs a token of this cluster"
    elif kind == "last use":
        token = await it.token(num_uses=1)
        holder = await it.leasing.tokens.use(token.token)
        error, text = InvalidRequest, "token had one use left, so leased credentials were immediately revoked"
    else:
        parent = holder if kind == "expired batch" else None
        holder = (await it.token(type=BATCH, ttl_s=60, parent=parent)).entry
        it.now.advance(60)
    before = it.left()
    with pytest.raises(error, match=text):
        await it.lease(holder)
    assert it.outside.valid == set()
    assert it.left() == before


async def test_a_lease_and_its_tokens_end_at_once_leave_no_credential(it: Setup) -> None:
    """Whichever comes first, nothing is valid afterwards."""
    for _ in range(10):
        holder = await it.token()
        await asyncio.gather(
            *(it.lease(holder.entry) for _ in range(20)),
            it.leasing.tokens.revoke(holder.token),
            *(it.lease(holder.entry) for _ in range(20)),
            return_exceptions=True,
        )
        await it.expire()
        assert it.outside.valid == set()
        assert it.left() == []


@pytest.mark.parametrize("error", [Unavailable("no"), OutcomeUnknown("who knows")])
async def test_a_lease_that_could_not_be_stored_is_taken_back(it: Setup, error: Exception) -> None:
    holder = await it.token()
    it.store.fail, it.store.fail_applied = error, isinstance(error, OutcomeUnknown)
    with pytest.raises(type(error)):
        await it.lease(holder.entry)
    assert it.outside.valid == set()
    await it.start()
    await it.expire(100)
    assert it.outside.valid == set()


async def test_a_secret_that_cannot_be_taken_back_is_named(it: Setup) -> None:
    it.outside.fail = ValueError("with the s3cret")
    with pytest.raises(PluginError, match="revoke it by hand") as found:
        await it.lease(None)
    assert "s3cret" not in str(found.value)


# -- failures


async def test_a_failed_revocation_is_repeated_with_growing_pauses_over_restarts(it: Setup) -> None:
    holder = await it.token()
    await it.lease(holder.entry)
    it.outside.fail = PluginError("the database is away")
    await it.expire(100)
    moments = [0]
    for second in range(1, 200):
        await it.start()
        before = len(it.outside.calls)
        await it.expire(1)
        if len(it.outside.calls) > before:
            moments.append(second)
    pauses = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert len(pauses) >= 3
    for number, pause in enumerate(pauses):
        assert 0.8 * 10 * 2**number - 1 <= pause <= 1.2 * 10 * 2**number + 1
    it.outside.fail = None
    await it.expire(300)
    assert it.outside.valid == set()


async def give_up(it: Setup) -> None:
    for _ in range(ATTEMPTS_MAX):
        await it.expire(400)


async def test_after_enough_failures_it_is_irrevocable_and_listed(it: Setup) -> None:
    holder = await it.token(ttl_s=100_000)
    entry = (await it.lease(holder.entry)).entry
    it.outside.fail = PluginError("the database is away")
    await give_up(it)
    assert len(it.outside.calls) == ATTEMPTS_MAX
    await it.start()
    await it.expire(4000)
    assert len(it.outside.calls) == ATTEMPTS_MAX, "not tried again by itself"
    revocation = it.leasing.revocation
    assert revocation.irrevocable_count == 1
    assert revocation.irrevocable_by_mount() == {MOUNT: 1}
    (found,) = await revocation.irrevocable(None)
    assert (found.id, found.mount, found.error) == (entry.id, MOUNT, "the database is away")
    with pytest.raises(InvalidRequest, match="lease expired"):
        await it.leasing.leases.renew(entry.id)
    with pytest.raises(InvalidRequest, match="the database is away"):
        await revocation.revoke(entry.id)
    assert revocation.irrevocable_count == 0, "asked again, it has all its tries again"
    it.outside.fail = None
    await it.expire(400)
    assert it.outside.valid == set()
    assert not [key for key in it.left() if entry.name in key]


async def test_a_token_can_end_while_its_lease_is_irrevocable(it: Setup) -> None:
    holder = await it.token(ttl_s=100_000)
    entry = (await it.lease(holder.entry)).entry
    it.outside.fail = Irrevocable("never")
    await it.expire(100)
    await it.leasing.tokens.revoke(holder.token)
    assert await it.leasing.tokens.lookup(holder.token) is None
    await it.expire()
    assert it.leasing.revocation.irrevocable_count == 1
    assert [key for key in it.left() if entry.name not in key] == []


@pytest.mark.parametrize("case", ["engine says so", "no engine"])
async def test_what_has_no_use_is_not_repeated(it: Setup, case: str) -> None:
    holder = await it.token()
    await it.lease(holder.entry)
    if case == "no engine":
        it.mounted.clear()
    else:
        it.outside.fail = Irrevocable("that system was taken down")
    await it.expire(100)
    assert it.leasing.revocation.irrevocable_count == 1
    assert len(it.outside.calls) <= 1
    (found,) = await it.leasing.revocation.irrevocable(10)
    assert found.error in ("that system was taken down", "the mount that issued it is gone or not available")


async def test_what_an_engine_raises_by_mistake_is_not_shown(it: Setup, caplog: pytest.LogCaptureFixture) -> None:
    holder = await it.token()
    entry = (await it.lease(holder.entry)).entry
    it.outside.fail = KeyError("s3cret")
    with pytest.raises(InvalidRequest, match=r"internal error \(KeyError\)") as found:
        await it.leasing.revocation.revoke(entry.id)
    assert "s3cret" not in str(found.value)
    assert "an engine failed to revoke" in caplog.text


async def test_an_engine_that_hangs_is_given_up(it: Setup) -> None:
    it.leasing.revocation._attempt_s_max = 0.01
    holder = await it.token()
    entry = (await it.lease(holder.entry)).entry
    it.outside.hang = True
    with pytest.raises(InvalidRequest, match="did not finish within"):
        await it.leasing.revocation.revoke(entry.id)


async def test_a_hanging_engine_holds_up_neither_its_token_nor_other_mounts() -> None:
    it = await make_setup(mounts=2)
    holder = await it.token()
    for _ in range(JOBS_PER_GROUP_MAX + 20):
        await it.lease(holder.entry)
    other = MOUNT[:-1] + "1"
    slow, it.outside.hang = it.outside, True
    await it.expire_in_background(100)
    await slow.until(lambda: slow.running == JOBS_PER_GROUP_MAX)
    await it.leasing.tokens.revoke(holder.token)
    assert await it.leasing.tokens.lookup(holder.token) is None
    fine = await it.token()
    it.outside.hang = False
    await it.lease(fine.entry, role="fine", mount=other, path="db1/creds/fine", ttl_s=1)
    it.now.advance(1)
    it.leasing.expiration.wake()
    await slow.until(lambda: not any(credential.startswith("fine") for credential in slow.valid))
    assert slow.most_running <= JOBS_PER_GROUP_MAX + 1
    slow.release.set()
    await slow.until(lambda: not slow.valid)
    await it.stop()


# -- crashes


@pytest.mark.parametrize("how", ["expire", "revoke", "prefix", "token"])
async def test_a_crash_at_any_step_of_a_revocation_is_made_good(how: str) -> None:
    """The store fails at each commit in turn, as for a node that dies there; the next node finishes."""
    for crash_after in range(6):
        it = await make_setup()
        holder = await it.token(ttl_s=50_000)
        entry = (await it.lease(holder.entry)).entry
        commit, commits = it.store.commit, 0

        async def failing(writes: Sequence[Write], at: int = crash_after, commit: Any = commit) -> Any:
            nonlocal commits
            commits += 1
            if commits > at:
                raise Unavailable("crash")
            return await commit(writes)

        it.store.commit = failing
        try:
            match how:
                case "expire":
                    await it.expire(100)
                case "revoke":
                    await it.leasing.revocation.revoke(entry.id)
                case "prefix":
                    await it.leasing.revocation.revoke_prefix("db")
                case "token":
                    await it.leasing.tokens.revoke(holder.token)
        except Unavailable:
            pass
        it.store.commit = commit
        called = len(it.outside.calls)
        await it.start()
        if how != "token" or await it.leasing.tokens.lookup(holder.token) is None:
            await it.leasing.tokens.sweep()
        # What nobody has made due ends at its own time.
        await it.expire(100)
        assert it.outside.valid == set(), crash_after
        assert len(it.outside.calls) - called <= 1
        assert not [key for key in it.left() if entry.name in key]


async def test_a_revocation_that_was_begun_is_finished_long_before_the_leases_end(it: Setup) -> None:
    holder = await it.token(ttl_s=50_000)
    entry = (await it.lease(holder.entry, ttl_s=20_000)).entry
    it.outside.hang = True
    killed = asyncio.create_task(it.leasing.revocation.revoke(entry.id))
    await it.outside.until(lambda: it.outside.running == 1)
    killed.cancel()
    await asyncio.gather(killed, return_exceptions=True)
    it.outside.hang = False
    await it.start()
    await it.expire(1)
    assert it.outside.valid == set()


# -- many


async def test_revoking_below_a_prefix(it: Setup) -> None:
    holder = await it.token()
    for role in ("a", "a", "b", "ab"):
        await it.lease(holder.entry, role=role)
    leases = it.leasing.leases
    assert await leases.list("db/creds") == ["a/", "ab/", "b/"]
    assert len(await leases.list("db/creds/a/")) == 2
    assert await it.leasing.revocation.revoke_prefix("db/creds/a") == 2
    assert {credential[:-2] for credential in it.outside.valid} == {"b", "ab"}
    (one,) = await leases.list("db/creds/b")
    assert await it.leasing.revocation.revoke_prefix(f"db/creds/b/{one}") == 1
    assert await it.leasing.revocation.revoke_prefix("db", sync=False) == 1
    assert {credential[:-2] for credential in it.outside.valid} == {"ab"}
    await it.expire()
    assert it.outside.valid == set()
    for nothing in ("", "/", "nosuch", "db/../db", "x//y"):
        assert await it.leasing.revocation.revoke_prefix(nothing) == 0
    assert await it.leasing.tokens.lookup(holder.token) is not None


async def test_a_prefix_with_failures_is_tried_whole_and_names_one(it: Setup) -> None:
    holder = await it.token()
    for role in ("a", "bad", "c"):
        await it.lease(holder.entry, role=role)
    it.outside.failing["bad"] = PluginError("away")
    with pytest.raises(InvalidRequest, match=r'failed to revoke 1 of 3 leases below "db"; "db/creds/bad/.*": away'):
        await it.leasing.revocation.revoke_prefix("db")
    assert {credential[:3] for credential in it.outside.valid} == {"bad"}
    assert await it.leasing.revocation.revoke_prefix("db", force=True) == 1
    assert {credential[:3] for credential in it.outside.valid} == {"bad"}, "forgotten, not revoked"
    assert not [key for key in it.left() if "/db/" in key]


async def test_tokens_below_a_prefix_are_revoked(it: Setup) -> None:
    tokens = [await it.token(path=f"auth/userpass/login/u{number}") for number in range(100)]
    other = await it.token(path="auth/userpass2/login/u1")
    assert len(await it.leasing.leases.list("auth/userpass/login")) == 100
    assert await it.leasing.revocation.revoke_prefix("auth/userpass/") == 100
    for issued in tokens:
        assert await it.leasing.tokens.lookup(issued.token) is None
    assert await it.leasing.tokens.lookup(other.token) is not None
    await it.leasing.revocation.revoke(f"auth/userpass2/login/u1/h{other.entry.id_hash}")
    assert await it.leasing.tokens.lookup(other.token) is None


async def test_work_on_many_is_bounded_and_stops_at_an_error() -> None:
    running = most = done = 0

    async def work(name: str) -> None:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        done += 1
        if name == "500":
            raise Unavailable("no")

    await each_of([str(number) for number in range(400)], work)
    assert (done, most) == (400, AT_ONCE)
    with pytest.raises(Unavailable):
        await each_of([str(number) for number in range(450, 2000)], work)
    assert done < 600


async def test_a_prefix_that_is_asked_for_again_writes_nothing_again(it: Setup) -> None:
    """Of thousands, which a request has no time for: each try begins where the one before ended."""
    holder = (await it.token()).entry
    for _ in range(5):
        await it.lease(holder)
    await it.leasing.revocation.revoke_prefix("db/", sync=False)
    commits = len(it.store.commits)
    it.now.advance(3)
    assert await it.leasing.revocation.revoke_prefix("db/", sync=False) == 5
    assert len(it.store.commits) == commits
    await it.expire()
    assert it.outside.valid == set()
    assert len(it.outside.calls) == 5


async def test_a_prefix_that_its_client_gave_up_is_finished_all_the_same(it: Setup) -> None:
    holder = await it.token()
    for _ in range(100):
        await it.lease(holder.entry)
    it.outside.hang = True
    revoking = asyncio.create_task(it.leasing.revocation.revoke_prefix("db"))
    await it.outside.until(lambda: it.outside.running == AT_ONCE)
    revoking.cancel()
    await asyncio.gather(revoking, return_exceptions=True)
    it.outside.hang = False
    await it.start()
    await it.expire(1)
    assert it.outside.valid == set()


async def test_of_two_who_revoke_one_asks_and_both_hear_of_it(it: Setup) -> None:
    holder = await it.token()
    entry = (await it.lease(holder.entry)).entry
    it.outside.fail, it.outside.hang = PluginError("away"), True
    both = [asyncio.create_task(it.leasing.revocation.revoke(entry.id)) for _ in range(2)]
    await it.outside.until(lambda: it.outside.running == 1)
    it.outside.release.set()
    errors = await asyncio.gather(*both, return_exceptions=True)
    assert [str(error) for error in errors] == [f'failed to revoke "{entry.id}": away'] * 2
    assert len(it.outside.calls) == 1


# -- tidy


async def test_tidy_puts_right_what_should_not_be(it: Setup) -> None:
    holder, lost = await it.token(), await it.token(ttl_s=9000)
    kept = (await it.lease(holder.entry, role="kept")).entry
    orphan = (await it.lease(lost.entry, role="orphan")).entry
    whole = set(it.left())
    unscheduled = [key for key in it.left() if "/due/" in key and kept.name in key]
    gone = [key for key in it.store.below("l/token/id/") if lost.entry.id_hash in key]
    ghost = f"{LEASES_BY_TOKEN}{'ab' * 20}/{'x' * 24}"
    await it.sealed.commit([Write(key, None) for key in unscheduled + gone])
    await it.sealed.put(ghost, b"db/creds/x/nothing")
    it.leasing.tokens.invalidate(gone)
    done = await tidy(it.sealed, it.leasing.leases, it.leasing.revocation)
    assert (done.leases, done.revoked, done.restored, done.deleted) == (4, 1, 1, 2)
    await it.expire()
    assert it.outside.valid == {"kept-0"}
    assert not [key for key in it.left() if orphan.name in key]
    assert {key for key in whole if kept.name in key} <= set(it.left())
    assert ghost not in it.left()
    assert (await tidy(it.sealed, it.leasing.leases, it.leasing.revocation)).deleted == 0


async def test_a_cluster_that_may_not_expires_nothing(it: Setup) -> None:
    """A disaster-recovery secondary, or a store that is being filled."""
    holder = await it.token()
    await it.lease(holder.entry)
    it.enabled = False
    await it.expire(50_000)
    assert it.outside.calls == []
    it.enabled = True
    await it.expire()
    assert it.outside.valid == set()


# -- how long (statement 10)

SECONDS = st.integers(-(2**62), 2**62) | st.integers(-10, 10_000)
POSITIVE = st.integers(1, 10_000)


@settings(deadline=None)
@given(SECONDS, SECONDS, POSITIVE, POSITIVE, st.integers(0, 10_000))
def test_no_first_ttl_passes_a_maximum(ttl_s: int, max_ttl_s: int, mount_max_s: int, now_s: int, token_s: int) -> None:
    mount = MountInfo("db/", "t", "u", "a", default_lease_ttl_s=min(60, mount_max_s), max_lease_ttl_s=mount_max_s)
    found_s, found_max_s, _ = first_expiry(Lease(ttl_s=ttl_s, max_ttl_s=max_ttl_s), mount, now_s, token_s)
    assert found_s <= mount_max_s
    assert found_max_s <= mount_max_s
    if token_s:
        assert now_s + found_s <= token_s


@settings(deadline=None)
@given(SECONDS, POSITIVE, POSITIVE, st.integers(0, 10_000), st.integers(0, 20_000))
def test_no_renewal_passes_a_maximum(
    wanted_s: int, max_ttl_s: int, mount_max_s: int, token_s: int, later_s: int
) -> None:
    issued_s, ttl_s = 1000, min(max_ttl_s, mount_max_s)
    expires_s = min(issued_s + ttl_s, issued_s + token_s) if token_s else issued_s + ttl_s
    entry = LeaseEntry(
        "x", "m", issued_s, expires_s, expires_s, ttl_s, max_ttl_s, token_expires_s=issued_s + token_s if token_s else 0
    )
    found_s, _ = renewed_expiry(entry, wanted_s, mount_max_s, issued_s + later_s)
    assert found_s <= max(issued_s + min(max_ttl_s, mount_max_s), expires_s)
    if token_s:
        assert found_s <= issued_s + token_s


def test_what_can_be_a_lease_id() -> None:
    assert is_lease_id("a/b c/\N{SNOWMAN}/ABC")
    assert is_lease_id("a\u00a0b/c")
    for text in ("", "/", "a/", "/a", "a//b", ".", "a/../b", "a/./b", "\ud800"):
        assert not is_lease_id(text)
