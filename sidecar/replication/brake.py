"""The mass-delete brake of a merkle sync. Pure.

A delete in the log is somebody's act and is applied, however many they are. A delete that a *comparison* derives is an
absence only, and an absence has other causes too: a primary rebuilt empty under its old identity, a store put back to
an old snapshot, an index with a hole. So what a comparison may delete is bounded, by class:

===== ================================================================ =============================================
class counted                                                          why
===== ================================================================ =============================================
``r`` every entry that would go, and at least by how much the primary  configuration and secrets go by the log
      has fewer
``l`` by how many entries the primary has fewer                        tokens and leases come and go by themselves
===== ================================================================ =============================================

More than the allowance stops the sync before a single one is deleted. An operator who knows better accepts the number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from consul_backend.allowance import DeleteAllowance

COUNTED_CLASS = "r"


@dataclass(frozen=True, slots=True)
class Shrink:
    """What a sync would do, were it not for the brake: ``deletions`` of ``here`` entries, of which ``allowed``."""

    deletions: int
    here: int
    allowed: int

    @property
    def text(self) -> str:
        """For logs and the status."""
        return (
            f"mass-delete brake: the comparison with the primary would delete {self.deletions} of {self.here} entries "
            f"here, {self.allowed} may go unasked; none of them was deleted"
        )


class Brake:
    """One sync's. ``here`` and ``there`` are entries by class, this cluster's and the primary's; ``accepted`` is how
    many deletions an operator agreed to beyond the allowance."""

    def __init__(
        self, allowance: DeleteAllowance, here: Mapping[str, int], there: Mapping[str, int], accepted: int = 0
    ) -> None:
        self._here = dict(here)
        self._allowed = {cls: allowance.allows(count) + accepted for cls, count in here.items()}
        self._shrink = {cls: max(0, count - there.get(cls, 0)) for cls, count in here.items()}
        self._counted = 0
        self._accepted = accepted

    @property
    def holds(self) -> bool:
        """Whether deletions wait for the end of the sync: until then it may still come to the brake. What an operator
        accepted is deleted as it comes."""
        return not self._accepted

    def count(self, deletions: int = 1) -> None:
        """A comparison found that many entries of the counted class that the primary does not have."""
        self._counted += deletions

    def forbids(self, deletions: int) -> bool:
        """Whether so many of the counted class are over the allowance."""
        return deletions > self._allowed.get(COUNTED_CLASS, 0)

    def _deletions(self, cls: str) -> int:
        return max(self._shrink[cls], self._counted if cls == COUNTED_CLASS else 0)

    @property
    def on(self) -> bool:
        """Whether some class is over its allowance."""
        return any(self._deletions(cls) > allowed for cls, allowed in self._allowed.items())

    def shrink(self) -> Shrink:
        """Over the classes that are over their allowance, of the others nothing is said."""
        over = [cls for cls, allowed in self._allowed.items() if self._deletions(cls) > allowed]
        return Shrink(
            sum([self._deletions(cls) for cls in over]),
            sum([self._here[cls] for cls in over]),
            sum([self._allowed[cls] for cls in over]),
        )


def by_class(counts: Mapping[str, int]) -> dict[str, int]:
    """Entries by class, of entries by ``<class>/<partition>``."""
    found: dict[str, int] = {}
    for name, count in counts.items():
        cls, _, _ = name.partition("/")
        found[cls] = found.get(cls, 0) + count
    return found
