"""The configuration as ``sys/config/state/sanitized`` shows it."""

from __future__ import annotations

from typing import Any

from sidecar.config import ConsulStorage, EmbeddedStorage, ServerConfig


def sanitized(config: ServerConfig) -> dict[str, Any]:
    """What ``sys/config/state/sanitized`` shows: nothing that opens anything."""
    storage = config.storage
    kind = {ConsulStorage: "consul", EmbeddedStorage: "embedded"}.get(type(storage), "inmem")
    return {
        "api_addr": config.api_addr,
        "cluster_addr": config.cluster_addr,
        "cluster_name": config.cluster_name,
        "default_lease_ttl": config.default_lease_ttl_s,
        "max_lease_ttl": config.max_lease_ttl_s,
        "listeners": [
            {
                "type": "tcp",
                "config": {
                    "address": listener.address,
                    "cluster_address": listener.cluster_address,
                    "tls_disable": listener.tls_disable,
                },
            }
            for listener in config.listeners
        ]
        + [{"type": "unix", "config": {"address": listener.address}} for listener in config.unix_listeners],
        "log_format": config.log_format,
        "log_level": config.log_level,
        "seals": [
            *({"type": kind, "disabled": True} for kind in config.seal.disabled),
            {"type": config.seal.kind, "disabled": False},
        ],
        "storage": {
            "type": kind,
            "api_addr": config.api_addr,
            "cluster_addr": config.cluster_addr,
        },
    }
