"""The two kinds of replication, and all that tells them apart. Pure.

What is shipped, to whom it is offered and where its role is kept are the fields of one value; whatever handles
replication is given that value and asks it. A cluster has a role in each mode, independently (architecture, section 1).

===========  ============================  =====================  ================================
mode         ships                         role entry             the set's authority reaches
===========  ============================  =====================  ================================
performance  class ``r``                   class ``l``            the DR secondaries of its primary
dr           classes ``r`` and ``l``       class ``c``            nobody
===========  ============================  =====================  ================================
"""

from __future__ import annotations

from dataclasses import dataclass

from plugin_api.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Mode:
    """``classes`` are those whose entries travel, the order being that of comparisons. ``alpn`` are Vault's published
    protocol names (contract, section 6). ``label`` is what messages to people call it."""

    name: str
    label: str
    classes: tuple[str, ...]
    alpn: str
    role_key: str

    def __repr__(self) -> str:
        return f"Mode({self.name})"

    @property
    def keyrings(self) -> frozenset[str]:
        """The entries that hold data keys of what travels: applied, and loaded, before any entry under them."""
        return frozenset(f"{cls}/core/keyring" for cls in self.classes)

    @property
    def creation_path(self) -> str:
        """Where a wrapped activation bundle of this mode was made."""
        return f"sys/replication/{self.name}/primary/secondary-token"

    def server_name(self, set_id: str) -> str:
        """The SNI name of a set."""
        return f"{set_id}.{self.name}.outrider"


PERFORMANCE = Mode("performance", "performance replication", ("r",), "replication_v1", "l/replication/performance")
DR = Mode("dr", "DR replication", ("r", "l"), "replication_dr_v1", "c/replication/dr")
MODES = {mode.name: mode for mode in (PERFORMANCE, DR)}


def mode_named(name: str) -> Mode:
    """The mode of that name. Raises InvalidRequest."""
    try:
        return MODES[name]
    except KeyError:
        raise InvalidRequest(f'unknown replication mode "{name}"') from None
