"""One operation of a key on every input of a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from plugin_api.errors import InvalidRequest
from sidecar.engines.transit.batch import ITEMS_PER_PAUSE, Inputs, Item
from sidecar.engines.transit.encoding import decode_base64
from sidecar.engines.transit.keys import Key, KeyStore
from sidecar.engines.transit.material import Material
from sidecar.engines.transit.ring import KeyRing
from sidecar.engines.transit.work import Workers

Versions = tuple[int, ...]
Result = dict[str, Any]
VersionsOf = Callable[[Item], Versions]
Work = Callable[[Item, Versions, Mapping[int, Material]], Result]

NO_CONTEXT = (
    "missing 'context' for key derivation; the key was created using a derived key, which means additional, "
    "per-request information must be included in order to perform operations with the key"
)


class Runner:
    """Loads the versions that the inputs need, then works on them where it does not hold up the event loop."""

    def __init__(self, store: KeyStore, workers: Workers) -> None:
        self.store = store
        self.workers = workers

    async def run(self, key: Key, sent: Inputs, versions_of: VersionsOf, work: Work, *, slow: bool) -> list[Result]:
        """A result for every input; one that failed is ``{"error": text}``. ``versions_of`` and ``work`` raise
        InvalidRequest for inputs that are wrong."""
        jobs: list[tuple[Item, Versions, str]] = []
        for count, item in enumerate(sent.items, 1):
            if count % ITEMS_PER_PAUSE == 0:
                await asyncio.sleep(0)
            try:
                jobs.append((item, versions_of(item), ""))
            except InvalidRequest as error:
                jobs.append((item, (), str(error)))
        materials = await self.store.material(key, {number for _, versions, _ in jobs for number in versions})

        def one(job: tuple[Item, Versions, str]) -> Result:
            item, versions, failure = job
            if failure:
                return {"error": failure}
            try:
                return work(item, versions, materials)
            except InvalidRequest as error:
                return {"error": str(error)}

        return await self.workers.map(one, jobs, slow=slow, size=lambda job: job[0].size())


def context_of(ring: KeyRing, item: Item) -> bytes | None:
    """The context of a derived key, None for others. Raises InvalidRequest."""
    if not ring.derived:
        return None
    context = decode_base64(item.text("context"), "context")
    if not context:
        raise InvalidRequest(NO_CONTEXT)
    return context
