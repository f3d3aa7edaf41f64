"""The configuration as ``sys/config/state/sanitized`` shows it."""

from __future__ import annotations

from typing import Any

from sidecar.config import ConsulStorage, EmbeddedStorage, Listener, ServerConfig, TelemetrySettings

_NANOSECONDS = 10**9


def sanitized(config: ServerConfig) -> dict[str, Any]:
    """What ``sys/config/state/sanitized`` shows: nothing that opens anything. Names are Vault's, and what is shown is
    in force: a setting that a file may hold without effect stands there as it is here."""
    storage = config.storage
    kind = {ConsulStorage: "consul", EmbeddedStorage: "embedded"}.get(type(storage), "inmem")
    shown: dict[str, Any] = {
        "api_addr": config.api_addr,
        "cluster_addr": config.cluster_addr,
        "cluster_name": config.cluster_name,
        "default_lease_ttl": config.default_lease_ttl_s,
        "disable_cache": False,
        "disable_clustering": False,
        "disable_mlock": not config.lock_memory,
        "enable_response_header_hostname": config.show_hostname,
        "enable_ui": False,
        "listeners": [{"type": "tcp", "config": _listener(listener)} for listener in config.listeners]
        + [{"type": "unix", "config": {"address": listener.address}} for listener in config.unix_listeners],
        "log_file": config.log_file.path,
        "log_format": config.log_format,
        "log_level": config.log_level,
        "log_rotate_bytes": config.log_file.rotate_bytes,
        "log_rotate_duration": f"{config.log_file.rotate_duration_s:g}s",
        "log_rotate_max_files": config.log_file.rotate_max_files,
        "max_lease_ttl": config.max_lease_ttl_s,
        "pid_file": config.pid_file,
        "raw_storage_endpoint": False,
        "seals": [
            *({"type": kind, "disabled": True} for kind in config.seal.disabled),
            {"type": config.seal.kind, "disabled": False},
        ],
        "storage": {
            "type": kind,
            "api_addr": config.api_addr,
            "cluster_addr": config.cluster_addr,
            "disable_clustering": False,
        },
        "telemetry": _telemetry(config.telemetry),
    }
    if isinstance(storage, ConsulStorage) or config.service_registration.connection is not None:
        shown["service_registration"] = {"type": "consul"}
    return shown


def _listener(listener: Listener) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "address": listener.address,
        "cluster_address": listener.cluster_address,
        "tls_disable": listener.tls_disable,
    }
    if listener.tls_disable:
        return shown
    shown |= {
        "tls_cert_file": listener.tls_cert_file,
        "tls_key_file": listener.tls_key_file,
        "tls_min_version": listener.tls_min_version,
        "tls_max_version": listener.tls_max_version,
        "tls_require_and_verify_client_cert": listener.tls_require_and_verify_client_cert,
    }
    return shown | ({"tls_client_ca_file": listener.tls_client_ca_file} if listener.tls_client_ca_file else {})


def _telemetry(settings: TelemetrySettings) -> dict[str, Any]:
    """Times in nanoseconds, as Vault shows them here."""
    return {
        "add_lease_metrics_namespace_labels": settings.lease_namespace_label,
        "disable_hostname": True,
        "filter_default": settings.filter_default,
        "lease_metrics_epsilon": round(settings.lease_bucket_s * _NANOSECONDS),
        "maximum_gauge_cardinality": settings.label_values_max,
        "metrics_prefix": settings.prefix,
        "num_lease_metrics_buckets": settings.lease_buckets,
        "prefix_filter": list(settings.filters),
        "prometheus_retention_time": round(settings.prometheus_retention_s * _NANOSECONDS),
        "usage_gauge_period": round(settings.usage_period_s * _NANOSECONDS),
    }
