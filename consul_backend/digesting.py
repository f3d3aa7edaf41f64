"""Computing the index's digests a few pages at a time, so that a root that is asked for costs next to nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import NoReturn

from consul_backend.errors import NotLoaded
from consul_backend.merkle import Forest
from consul_backend.wal import Head

DIGEST_INTERVAL_S = 0.25
"""A root costs what was committed in this time at most: some 20 ms where the store takes 12,000 writes a second."""

_PAGES_BETWEEN_TURNS = 8  # a page of a million keys whose every subpage changed takes 0.8 ms


async def compute_digests(forest: Forest) -> None:
    """Compute every digest that is not known, up to the partitions' roots; pages that are not in memory are left."""
    for cls, partition in forest.undigested():
        for number, page in enumerate(forest.undigested_pages(cls, partition), 1):
            if not forest.is_cold(cls, partition, page):
                forest.page_digest(cls, partition, page)
            if number % _PAGES_BETWEEN_TURNS == 0:
                await asyncio.sleep(0)
        with contextlib.suppress(NotLoaded):
            forest.root_of([(cls, partition)])
        await asyncio.sleep(0)


async def keep_digested(forest: Forest, wait_head: Callable[[int], Awaitable[Head]]) -> NoReturn:
    """Compute them now and then, as long as anything is committed."""
    seen = 0
    while True:
        seen = (await wait_head(seen)).index
        await compute_digests(forest)
        await asyncio.sleep(DIGEST_INTERVAL_S)
