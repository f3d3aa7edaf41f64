"""Commands of Vault's that this program does not have, and what to do instead. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_RAFT = "storage is Consul: its own tools show peers and take snapshots (consul operator raft, consul snapshot save)"
_PLUGINS = "plugins run inside the server and come with it"
_AGENT = "Vault's own agent and proxy work with this server: run them against its address"
_ENTERPRISE = "there is one namespace, and no licence"
_TO_COME = "there is no such engine yet"

COMMANDS: Mapping[tuple[str, ...], str] = {
    ("agent",): _AGENT,
    ("proxy",): _AGENT,
    ("events",): "there are no events yet",
    ("hcp",): "there is nothing of a cloud here",
    ("license",): _ENTERPRISE,
    ("namespace",): _ENTERPRISE,
    ("operator", "import"): "secrets are not imported from elsewhere; write them with kv put",
    ("operator", "migrate"): "another server's storage is not read: replicate, or copy secret by secret over the API",
    ("operator", "raft"): _RAFT,
    ("operator", "utilization"): _ENTERPRISE,
    ("pki",): _TO_COME,
    ("plugin", "deregister"): _PLUGINS,
    ("plugin", "register"): _PLUGINS,
    ("plugin", "runtime"): _PLUGINS,
    ("ssh",): _TO_COME,
}


def instead(tokens: Sequence[str]) -> str:
    """What to do instead of such a command, "" for any other."""
    return COMMANDS.get(tuple(tokens[:1])) or COMMANDS.get(tuple(tokens[:2])) or ""
