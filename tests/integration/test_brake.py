"""No delete follows from an answer that is merely empty: a primary rebuilt empty, a Consul token that lost its rights
in the middle of a scan; and a mass delete that somebody did make goes through."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from consul_backend.allowance import DeleteAllowance
from consul_backend.errors import BackendError
from consul_backend.index_check import Progress
from consul_backend.reindex import ReindexOptions, reindex
from consul_backend.replicated import StoreOptions, physical_key
from consul_backend.txn import Delete
from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest
from sidecar.replication.modes import PERFORMANCE
from sidecar.replication.secondary import SecondaryService
from sidecar.replication.staging import Staging
from sidecar.replication.states import Phase
from tests.contract.test_consul_store import SESSIONS, keys
from tests.support.consul_server import ConsulServer
from tests.support.replication_cluster import OPTIONS, Pair, Store, in_step, primary_in, until
from tests.support.replication_cluster import Cluster as Site
from tests.support.store import GENERATION, Cluster, key

STILL = StoreOptions(segment_records=64, flush_interval_s=3600, collect_interval_s=3600, cache_bytes_max=0)
FORGETFUL = StoreOptions(segment_records=8, wal_keep_records=4, flush_interval_s=3600, collect_interval_s=3600)
ENTRIES = 1_000
REST = f'{SESSIONS} service_prefix "" {{ policy = "write" }} node_prefix "" {{ policy = "read" }}'


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with primary_in(PERFORMANCE, primary=Site("us")) as pair:
        yield pair


def fill(store: Store, count: int = ENTRIES) -> None:
    for start in range(0, count, 50):
        store.write(*((f"r/m/{number}", b"value") for number in range(start, start + 50)))


async def rebuilt_empty(pair: Pair) -> Site:
    """The primary's store is gone, and somebody has put back what it was when replication was enabled."""
    role_key = PERFORMANCE.role_key
    store = Store("us-rebuilt")
    store.write((role_key, pair.primary.store.data[role_key]))
    await pair.primary.stop()
    return await pair.start("us", store)


async def braked(secondary: Site, not_this: SecondaryService | None = None) -> SecondaryService:
    """Its service, once the brake has stopped it."""
    found: list[SecondaryService] = []

    def is_braked() -> bool:
        service = secondary.manager.performance.secondary
        if service is None or service is not_this or service.machine.phase is not Phase.BRAKED:
            return False
        found.append(service)
        return True

    await until(is_braked)
    return found[0]


async def test_a_primary_rebuilt_empty_is_never_followed_by_deletes(pair: Pair) -> None:
    fill(pair.primary.store)
    secondary = await pair.activate()
    await until(lambda: in_step(pair.primary, secondary))
    held = secondary.store.replicated()
    rebuilt = await rebuilt_empty(pair)
    await secondary.manager.secondary_update_primary("performance", "", addresses=[rebuilt.address])
    before = await braked(secondary)
    status = await secondary.manager.status("performance")
    assert (status["state"], status["alarm"]) == ("idle", True)
    assert "mass-delete brake" in status["state_reason"]
    assert status["brake"]["deletions"] >= ENTRIES
    gauges = secondary.manager.gauges()
    assert gauges["replication.performance.state.braked"] == 1
    assert gauges["replication.performance.brake_deletions"] == status["brake"]["deletions"]
    assert secondary.store.replicated() == held
    assert secondary.gates[-1] is None, "it serves what it has"

    with pytest.raises(InvalidRequest, match="less than"):
        await secondary.manager.accept_deletions("performance", ENTRIES - 1)
    await secondary.manager.recover()  # begins anew, and comes to the same end
    await braked(secondary, not_this=before)
    assert secondary.store.replicated() == held

    await secondary.manager.accept_deletions("performance", status["brake"]["deletions"])
    await until(lambda: in_step(rebuilt, secondary))
    assert secondary.store.replicated() == rebuilt.store.replicated()
    service = secondary.manager.performance.secondary
    assert service is not None
    assert service.shrink is None
    with pytest.raises(InvalidRequest, match="stopped nothing"):
        await secondary.manager.accept_deletions("performance", 10)


async def test_a_mix_that_the_brake_stopped_is_shown_to_nobody(pair: Pair) -> None:
    """As many entries as before and all of them others, more than fits the staging bound: some are here already when
    the brake stops the deletion of the old ones."""
    fill(pair.primary.store)
    small = replace(OPTIONS, staging=Staging(entries_max=50))
    secondary = await pair.activate(options=small)
    await until(lambda: in_step(pair.primary, secondary))
    rebuilt = await rebuilt_empty(pair)
    for start in range(0, ENTRIES, 50):
        rebuilt.store.write(*((f"r/m/other-{number}", b"value") for number in range(start, start + 50)))
    await secondary.manager.secondary_update_primary("performance", "", addresses=[rebuilt.address])
    service = await braked(secondary)
    assert service.shrink is not None
    assert service.shrink.deletions == ENTRIES
    assert "mass-delete brake" in str(secondary.gates[-1])
    here = [name for name in secondary.store.data if name.startswith("r/m/")]
    assert sum("other" not in name for name in here) == ENTRIES < len(here)
    await secondary.manager.accept_deletions("performance", ENTRIES)
    await until(lambda: in_step(rebuilt, secondary))
    assert secondary.gates[-1] is None


async def test_a_primary_that_forgot_its_mounts_withholds_nothing_that_is_here(pair: Pair) -> None:
    """With a filter, what travels is a list of mounts. A primary rebuilt empty has none, so nothing may be here; but
    what it withholds is dropped only if it knows our position, or after a comparison that the brake lets through."""
    mount = "0b8f2c1e-77aa-4d1c-9d0e-2f6f3a5f9a10"
    store = pair.primary.store
    store.write((f"r/core/mounts/{mount}", b"secret/"))
    for start in range(0, ENTRIES, 50):
        store.write(*((f"r/{mount}/{number}", b"value") for number in range(start, start + 50)))
    secondary = await pair.activate()
    await pair.primary.manager.filters.set("eu", "deny", ["other/"])

    def here() -> int:
        return sum(name.startswith(f"r/{mount}/") for name in secondary.store.data)

    await until(lambda: in_step(pair.primary, secondary) and here() == ENTRIES)
    rebuilt = await rebuilt_empty(pair)
    await secondary.manager.secondary_update_primary("performance", "", addresses=[rebuilt.address])
    service = await braked(secondary)
    assert service.shrink is not None
    assert service.shrink.deletions >= ENTRIES
    assert here() == ENTRIES
    await secondary.manager.accept_deletions("performance", service.shrink.deletions)
    await until(lambda: here() == 0)


async def test_a_mass_delete_in_the_log_is_not_braked(pair: Pair) -> None:
    fill(pair.primary.store)
    secondary = await pair.activate()
    await until(lambda: in_step(pair.primary, secondary))
    for start in range(0, ENTRIES, 50):
        pair.primary.store.write(*((f"r/m/{number}", None) for number in range(start, start + 50)))
    await until(lambda: in_step(pair.primary, secondary))
    assert not any(name.startswith("r/m/") for name in secondary.store.data)
    service = secondary.manager.performance.secondary
    assert service is not None
    assert (service.last_sync is None or service.last_sync.by == "merkle", service.shrink) == (True, None)


class Narrowed:
    """A physical store whose token loses its rights while it lists, after ``after`` lists."""

    def __init__(self, inner: Any, after: int, narrow: Any) -> None:
        self._inner = inner
        self._left = after
        self._narrow = narrow

    async def list(self, prefix: str, *, consistent: bool = False) -> Any:
        self._count()
        return await self._inner.list(prefix, consistent=consistent)

    async def names_below(self, prefix: str, limit: int, *, consistent: bool = False) -> Any:
        self._count()
        return await self._inner.names_below(prefix, limit, consistent=consistent)

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._narrow()

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


@pytest.mark.parametrize("sentinel_stays", [False, True])
async def test_a_token_that_loses_its_rights_in_the_middle_of_a_scan_deletes_nothing(
    consul_server: ConsulServer, consul_store_factory: Any, consul_path: str, sentinel_stays: bool
) -> None:
    """Lists become short, without an error. With ``sentinel_stays`` even the sentinel can still be read, so only the
    proof key by key is left. A reindex by force would give up every entry it takes for lost."""
    policy = consul_server.create_policy(keys(consul_path) + REST)
    physical = await consul_store_factory(token=consul_server.create_token(policy))
    cluster = Cluster(physical)
    await cluster.genesis()
    async with cluster.running(STILL) as store:
        names = [key(f"folder-{number % 4}/{number}") for number in range(200)]
        for start in range(0, 200, 50):
            await store.commit([Write(name, name.encode()) for name in names[start : start + 50]])
        kept = keys(f"{consul_path}g/{GENERATION}/d/r/{names[0].split('/')[1]}/folder-0/")
        if sentinel_stays:
            kept += "".join(
                f'key "{consul_path}{name}" {{ policy = "write" }}' for name in ("sentinel", "lock", "epoch")
            )
        parts = store.inspected()
        parts.physical = Narrowed(  # type: ignore[assignment]  # a physical store by shape
            physical, 5, lambda: consul_server.change_policy(policy, kept + REST)
        )
        everything = DeleteAllowance(share=1.0)
        with pytest.raises(BackendError):
            await reindex(parts, ReindexOptions(force=True, allowance=everything), Progress())
        consul_server.change_policy(policy, keys(consul_path) + REST)
        stored = await physical.get_many([physical_key(GENERATION, name) for name in names], consistent=True)
        assert all(item is not None for item in stored)
        assert [await store.get(name) for name in names] == [name.encode() for name in names]
        report = await reindex(store.inspected(), ReindexOptions(force=True, allowance=everything), Progress())
        assert (report.dropped, report.restored, report.quarantined, report.unresolved) == (0, 0, 0, 0)


async def test_a_reindex_by_force_gives_up_no_more_than_was_named(consul_store_factory: Any) -> None:
    """Entries that are truly gone, with proof, and no longer in the log."""
    cluster = Cluster(await consul_store_factory())
    await cluster.genesis()
    async with cluster.running(FORGETFUL) as store:
        names = [key(f"{number}") for number in range(150)]
        for start in range(0, 150, 50):
            await store.commit([Write(name, b"value") for name in names[start : start + 50]])
        for number in range(40):
            await store.commit([Write(key("other"), b"%d" % number)])
        await store.flush()
        assert await store.collect()
        await cluster.inner.txn([Delete(physical_key(GENERATION, name)) for name in names[:60]])
        await cluster.inner.txn([Delete(physical_key(GENERATION, name)) for name in names[60:120]])
        allowance = DeleteAllowance(entries=100, share=0.2)
        first = await reindex(store.inspected(), ReindexOptions(force=True, allowance=allowance), Progress())
        assert (first.braked, first.dropped, first.unresolved) == (120, 0, 120)
        assert store.forest.digest_of(names[0]) is not None
        options = ReindexOptions(force=True, accepted=120, allowance=allowance)
        second = await reindex(store.inspected(), options, Progress())
        assert (second.braked, second.dropped, second.unresolved) == (0, 120, 0)
        assert store.forest.digest_of(names[0]) is None
