"""What somebody else wrote into the data keys: counted, and named in the log before anybody asks."""

from __future__ import annotations

import logging

from consul_backend.complaints import Complaint
from consul_backend.errors import ForeignWrite
from consul_backend.keys import public_name

log = logging.getLogger("core.foreign")

# As many partitions as a cluster may have mounts; who damages more of them is told of the first ones again.
_NAMES_MAX = 10_000


class ForeignWrites:
    """Of one tenure. ``count`` is a metric: anything but 0 says that somebody else writes below the prefix."""

    def __init__(self) -> None:
        self.count = 0
        self._complaints: dict[str, Complaint] = {}

    def read(self, key: str) -> ForeignWrite:
        """A reader met a value that no record of this cluster wrote; what to raise. Names class and partition only."""
        self.count += 1
        name = public_name(key)
        error = ForeignWrite(f"the stored value of {name} is not what the index says")
        if self._due(name, error):
            log.error("%s: somebody else changed it; merkle-check names what, reindex restores it", error)
        return error

    def found(self, key: str, what: str) -> None:
        """A check met it. Said of ten thousand entries of a partition a few times only."""
        self.count += 1
        name = f"{public_name(key)}, was changed by somebody else: {what}"
        if self._due(name, name):
            log.error("%s", name)

    def _due(self, name: str, what: object) -> bool:
        if name not in self._complaints and len(self._complaints) >= _NAMES_MAX:
            self._complaints.clear()
        return self._complaints.setdefault(name, Complaint()).due(what)
