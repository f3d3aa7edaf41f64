"""The transit secrets engine: encryption, signatures and HMACs with keys that stay here.

On a performance secondary everything that only uses a key works locally; whatever writes one goes to the primary. Keys
rotate by themselves when they are next used or read after their period is over, on the primary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from plugin_api.engine import EngineContext
from plugin_api.framework import Path, PathEngine
from sidecar.engines.transit.certificates import Certificates
from sidecar.engines.transit.encryption import Encryption
from sidecar.engines.transit.exchange import Exchange
from sidecar.engines.transit.keys import KeyStore
from sidecar.engines.transit.management import Management
from sidecar.engines.transit.run import Runner
from sidecar.engines.transit.signing import Signing
from sidecar.engines.transit.tools import Tools
from sidecar.engines.transit.work import Workers


class Transit(PathEngine):
    """One ``transit`` mount."""

    type_name: ClassVar[str] = "transit"

    def __init__(self, context: EngineContext) -> None:
        self._workers = Workers()
        self._store = KeyStore(context, self._workers)
        super().__init__(context)

    def paths(self) -> Sequence[Path]:
        runner = Runner(self._store, self._workers)
        management = Management(self.context, self._store, self._workers)
        return [
            *Encryption(runner, management.settings.may_upsert).paths(),
            *Signing(runner).paths(),
            *Tools(self._workers).paths(),
            *management.paths(),
            *Certificates(self._store, self._workers).paths(),
            *Exchange(self.context, self._store, self._workers).paths(),
        ]

    async def invalidate(self, path: str) -> None:
        self._store.invalidate(path)
