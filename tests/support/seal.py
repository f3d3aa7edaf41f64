"""Looking into the stored seal record of a node."""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.core.keys import SEAL
from sidecar.core.seal import combine
from sidecar.core.seal_record import SealRecord, WrongKey, open_root_key, root_fingerprint
from tests.support.service_node import Harness


def opens(node: Harness, shares: Sequence[bytes]) -> bool:
    """Whether the stored seal record opens this cluster's root key with ``shares``."""
    record = SealRecord.decode(node.store.entries[SEAL])
    try:
        return root_fingerprint(open_root_key(record, combine(shares))) == node.node.genesis.root_fingerprint
    except WrongKey:
        return False
