"""What a configuration for Vault may hold and means nothing here, each with the reason that its warning names."""

from __future__ import annotations

from collections.abc import Mapping

_ENTERPRISE = "a feature of the enterprise server that there is not here"
_PUSHED = "nothing is pushed; have sys/metrics scraped"
_PLUGINS = "no plugin is a program of its own"
_LIMITS_OF_JSON = "the bounds of a request's JSON are fixed: 300 levels, 100,000 values, and max_request_size"

AT_TOP: Mapping[str, str] = {
    "administrative_namespace_path": _ENTERPRISE,
    "cache_size": "the read cache is bounded in bytes; sidecar { cache_size = … }",
    "cluster_cipher_suites": "the cluster port speaks TLS 1.3 alone, whose suites are not chosen",
    "detect_deadlocks": "there are no locks of that kind",
    "disable_cache": "the read cache is kept exact by every commit",
    "disable_indexing": "there is no search",
    "disable_performance_standby": _ENTERPRISE,
    "disable_printable_check": "control characters are always refused",
    "disable_sealwrap": "nothing is seal-wrapped beside the root key",
    "disable_sentinel_trace": _ENTERPRISE,
    "enable_multiseal": "there is one seal",
    "enable_post_unseal_trace": "vault.core.post_unseal tells how long it took",
    "enable_raw_endpoint": "storage is not opened past the barrier",
    "enable_response_header_raft_node_id": "storage is not Raft",
    "enable_ui": "there is no web UI",
    "enable_unauthenticated_access": "set it in the listener's telemetry and profiling blocks",
    "entropy": _ENTERPRISE,
    "experiments": "there are none",
    "feature_flags": "there are none",
    "ha_backend": "the storage coordinates its nodes itself",
    "ha_storage": "the storage coordinates its nodes itself",
    "imprecise_lease_role_tracking": _ENTERPRISE,
    "introspection_endpoint": "sys/pprof and sys/monitor look into a node",
    "kms_library": _ENTERPRISE,
    "license_path": "there is no licence",
    "log_requests_level": "an audit device logs requests",
    "oidc_provider": "there is no identity engine yet",
    "plugin_directory": _PLUGINS,
    "plugin_file_permissions": _PLUGINS,
    "plugin_file_uid": _PLUGINS,
    "plugin_tmpdir": _PLUGINS,
    "post_unseal_trace_directory": "vault.core.post_unseal tells how long it took",
    "raw_storage_endpoint": "storage is not opened past the barrier",
    "remove_irrevocable_lease_after": _ENTERPRISE,
    "reporting": "nothing is reported to anybody",
    "request_limiter": "queues are bounded and answer 503 with Retry-After",
    "sentinel": _ENTERPRISE,
    "ui": "there is no web UI",
}

IN_TELEMETRY: Mapping[str, str] = {
    "add_mount_point_rollback_metrics": "there are no rollbacks of that kind",
    **dict.fromkeys(
        (
            "circonus_api_app", "circonus_api_token", "circonus_api_url", "circonus_broker_id",
            "circonus_broker_select_tag", "circonus_check_display_name", "circonus_check_force_metric_activation",
            "circonus_check_id", "circonus_check_instance_id", "circonus_check_search_tag", "circonus_check_tags",
            "circonus_submission_interval", "circonus_submission_url", "dogstatsd_addr", "dogstatsd_tags",
            "stackdriver_debug_logs", "stackdriver_location", "stackdriver_namespace", "stackdriver_project_id",
            "statsd_address", "statsite_address",
        ),
        _PUSHED,
    ),
    "enable_hostname_label": "whoever scrapes labels what it scraped; names never hold a host",
    "rollback_metrics_include_mount_point": "there are no rollbacks of that kind",
}  # fmt: skip

IN_LISTENER: Mapping[str, str] = dict.fromkeys(
    (
        "max_json_array_element_count",
        "max_json_depth",
        "max_json_object_entry_count",
        "max_json_string_value_length",
    ),
    _LIMITS_OF_JSON,
) | {
    "disable_replication_status_endpoints": _ENTERPRISE,
    "disable_request_limiter": "there is no such limiter",
    "max_token_header_size": "the size of a request's head is bounded: 8 KiB a line",
}
IN_TCP_LISTENER: Mapping[str, str] = {
    "tls_cipher_suites": "the TLS library's own choice of suites is used",
    "tls_prefer_server_cipher_suites": "deprecated and without effect in Vault too",
}
IN_UNIX_LISTENER: Mapping[str, str] = {"tls_disable": "there is no TLS on a Unix socket"}
WITHOUT_FORWARDED_FOR: Mapping[str, str] = dict.fromkeys(
    ("x_forwarded_for_hop_skips", "x_forwarded_for_reject_not_authorized", "x_forwarded_for_reject_not_present"),
    'only "x_forwarded_for_authorized_addrs" turns the header on',
)

_SESSION = "sidecar { } has the election's times"
IN_CONSUL_STORAGE: Mapping[str, str] = {
    "consistency_mode": "what matters is always read consistently",
    "lock_wait_time": _SESSION,
    "max_parallel": "connections are pooled and bounded",
    "session_ttl": _SESSION,
    "tls_min_version": "TLS 1.2 or newer is spoken to Consul",
}
IN_REGISTRATION: Mapping[str, str] = {"tls_min_version": "TLS 1.2 or newer is spoken to Consul"}
IN_MEMORY_STORAGE: Mapping[str, str] = dict.fromkeys(
    ("disable_transactions", "max_value_size"), "the embedded store always keeps Consul's limits and transactions"
)
IN_REPLICATION: Mapping[str, str] = dict.fromkeys(
    ("logshipper_buffer_length", "logshipper_buffer_size"), "sidecar { } bounds the log by records and by bytes"
) | {"resolver_discover_servers": "secondaries learn the primary's addresses from its heartbeats"}
IN_SEAL: Mapping[str, str] = {"recovery_keys_fallback": "recovery shares always open a node whose seal cannot"}
