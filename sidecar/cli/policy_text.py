"""``-output-policy``: the rule of a policy that a request needs. Pure.

Which paths take ``sudo`` is known to the server; this list is the same, and a test compares them.
"""

from __future__ import annotations

import json
import re

SUDO_PATHS = (
    "auth/token/accessors",
    "auth/token/revoke-orphan",
    "sys/audit",
    "sys/audit/{path*}",
    "sys/auth/{auth_path*}",
    "sys/config/auditing/request-headers",
    "sys/config/auditing/request-headers/{name}",
    "sys/config/cors",
    "sys/config/ui/headers",
    "sys/config/ui/headers/{name}",
    "sys/leases",
    "sys/leases/lookup/{prefix*}",
    "sys/leases/revoke-force/{prefix*}",
    "sys/leases/revoke-prefix/{prefix*}",
    "sys/plugins/catalog/{type}/{name}",
    "sys/pprof",
    "sys/pprof/{name}",
    "sys/quotas/config",
    "sys/remount",
    "sys/replication/performance/not-held/accept-empty",
    "sys/replication/primary/rotate-ca",
    "sys/replication/primary/secondary-token",
    "sys/replication/reindex",
    "sys/replication/secondary/accept-deletions",
    "sys/replication/{mode}/lost-writes",
    "sys/replication/{mode}/lost-writes/{id}",
    "sys/replication/{mode}/lost-writes/{id}/export",
    "sys/replication/{mode}/primary/rotate-ca",
    "sys/replication/{mode}/primary/secondary-token",
    "sys/replication/performance/secondary/accept-deletions",
    "sys/revoke-force/{prefix*}",
    "sys/revoke-prefix/{prefix*}",
    "sys/rotate",
    "sys/seal",
    "sys/step-down",
)
SUDO_TO_LIST = ("sys/leases/lookup",)
_CAPABILITIES = {
    "GET": ("read",),
    "LIST": ("list",),
    "PUT": ("create", "update"),
    "POST": ("create", "update"),
    "PATCH": ("patch",),
    "DELETE": ("delete",),
}


def policy_for(method: str, path: str, *, lists: bool) -> str:
    """The rule for one request; ``lists``: a GET that lists."""
    verb = "LIST" if lists else method
    capabilities = _CAPABILITIES[verb]
    if needs_sudo(path, lists=verb == "LIST"):
        capabilities += ("sudo",)
    listed = ", ".join(json.dumps(one) for one in capabilities)
    return f"path {json.dumps(path, ensure_ascii=False)} {{\n  capabilities = [{listed}]\n}}"


def needs_sudo(path: str, *, lists: bool) -> bool:
    """Whether the path takes the sudo capability."""
    paths = SUDO_PATHS + SUDO_TO_LIST if lists else SUDO_PATHS
    return any(_regex(template).fullmatch(path.rstrip("/")) for template in paths)


def _regex(template: str) -> re.Pattern[str]:
    escaped = re.sub(r"\\{\w+(\\\*)?\\}", lambda found: ".+" if found[1] else "[^/]+", re.escape(template))
    return re.compile(escaped)
