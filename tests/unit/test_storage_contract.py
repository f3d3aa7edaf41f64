"""The storage that the sidecar gives to plugins keeps the contract that plugins are tested against."""

import itertools

from consul_backend.embedded import EmbeddedStore
from plugin_api.testing import check_storage
from sidecar.core.store_view import SealedStore, View
from tests.support.logical_store import make_barrier, make_sealed
from tests.support.store import Cluster


async def test_a_mounts_view_keeps_the_contract() -> None:
    _, sealed = make_sealed()
    numbers = itertools.count()

    async def make() -> View:
        return View(sealed, "r", f"mount-{next(numbers)}")

    await check_storage(make)


async def test_a_folder_of_a_mounts_view_keeps_the_contract() -> None:
    _, sealed = make_sealed()
    numbers = itertools.count()

    async def make() -> View:
        return View(sealed, "l", "shared", prefix=f"folder-{next(numbers)}/")

    await check_storage(make)


async def test_the_whole_way_down_to_a_store_keeps_the_contract() -> None:
    physical = EmbeddedStore(None)
    await physical.open()
    try:
        cluster = Cluster(physical)
        await cluster.genesis()
        numbers = itertools.count()
        async with cluster.running() as store:
            sealed = SealedStore(store, make_barrier())

            async def make() -> View:
                return View(sealed, "r", f"mount-{next(numbers)}")

            await check_storage(make)
    finally:
        await physical.close()
