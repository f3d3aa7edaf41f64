"""A node whose Consul token has lost a right: it holds no role, stays unsealed, says what is missing, and tries again.

Whoever mends the policy has mended the node. Sealing it would add work for the holders of key shares and no safety:
nothing is served meanwhile, and the next tenure recovers from the store like any other.
"""

from __future__ import annotations

import logging

from consul_backend.complaints import Complaint
from consul_backend.errors import PermissionDenied

log = logging.getLogger("core")

PAUSE_MIN_S = 1.0
PAUSE_MAX_S = 10.0
HINT = "mend the token's policy (deploy/nomad/consul-acl-policy.hcl has every rule); this node tries again by itself"


class TokenRights:
    """``trouble`` is empty while nothing is known to be missing."""

    def __init__(self) -> None:
        self.trouble = ""
        self._pause_s = 0.0
        self._complaint = Complaint()

    def refused(self, error: PermissionDenied) -> float:
        """The store refused the token. For how many seconds to wait: longer from time to time."""
        self.trouble = f"{error}: {HINT}"
        self._pause_s = min(max(PAUSE_MIN_S, 2 * self._pause_s), PAUSE_MAX_S)
        if self._complaint.due(error):
            log.error("this node plays no role: %s (refused %d times)", self.trouble, self._complaint.times)
        return self._pause_s

    def accepted(self) -> None:
        """A role is played again."""
        self.trouble, self._pause_s = "", 0.0
        if self._complaint.over():
            log.warning("the store takes this node's token again")
