"""Headers by which a client says from which state, or from which node, it wants its answer (contract 5.2).

One that asks for a routing this server does not offer is refused, not ignored: ignoring it would answer from another
state, or another namespace, than the client asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

from plugin_api.errors import InvalidRequest, PluginError

INDEX_HEADER = "X-Vault-Index"
INCONSISTENT_HEADER = "X-Vault-Inconsistent"
FORWARD_HEADER = "X-Vault-Forward"
FORWARD_ACTIVE = "forward-active-node"
_FORWARD_VALUE = "active-node"
_WAITING = ("", "fail", "await-state")
_DISABLED = "forwarding via header {header} disabled in configuration"


class NamespacesNotEnabled(PluginError):
    """403."""

    status = 403

    def __init__(self) -> None:
        super().__init__("namespaces feature not enabled")


def check_directives(headers: Mapping[str, str], *, forwarding: bool) -> None:
    """Raises InvalidRequest, NamespacesNotEnabled. ``forwarding``: clients may ask for it."""
    forward = headers.get(FORWARD_HEADER, "")
    if forward and not forwarding:
        raise InvalidRequest(_DISABLED.format(header=FORWARD_HEADER))
    if forward not in ("", _FORWARD_VALUE):
        raise InvalidRequest(f'{FORWARD_HEADER} may be "{_FORWARD_VALUE}"')
    inconsistent = headers.get(INCONSISTENT_HEADER, "")
    if inconsistent == FORWARD_ACTIVE and not forwarding:
        raise InvalidRequest(_DISABLED.format(header=f"{INCONSISTENT_HEADER}={FORWARD_ACTIVE}"))
    if inconsistent not in (*_WAITING, FORWARD_ACTIVE):
        raise InvalidRequest(f'{INCONSISTENT_HEADER} may be "fail", "await-state" or "{FORWARD_ACTIVE}"')
    if headers.get("X-Vault-Namespace", "").strip("/") not in ("", "root"):
        raise NamespacesNotEnabled
