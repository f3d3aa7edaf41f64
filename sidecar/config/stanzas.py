"""What each stanza of the configuration means: one function per stanza, from a Reader to values."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from sidecar.config.reader import ConfigError, Reader
from sidecar.config.values import (
    DEFAULT_LEASE_TTL_S,
    AuditSettings,
    ConsulConnection,
    ConsulStorage,
    DevOptions,
    ElectionSettings,
    EmbeddedStorage,
    ForwardedForSettings,
    InmemStorage,
    Listener,
    ReplicationSettings,
    ServiceRegistrationSettings,
    StoreSettings,
    join_address,
    split_address,
)

LOG_LEVEL_WORDS = ("trace", "debug", "info", "notice", "warn", "warning", "error", "err")
LOG_FORMATS = ("standard", "json")
PROMETHEUS_RETENTION_S = 86400.0
CLUSTER_PORT_OFFSET = 1  # the cluster port is the API port plus this, unless configured

_KEY_PREFIX = re.compile(r"(?:[A-Za-z0-9_-]+/)+")
_Storage = ConsulStorage | EmbeddedStorage | InmemStorage

_NO_MEANING_AT_TOP = (
    "administrative_namespace_path", "cache_size", "cluster_cipher_suites", "default_max_request_duration",
    "detect_deadlocks", "disable_cache", "disable_indexing", "disable_performance_standby",
    "disable_printable_check", "disable_sealwrap", "disable_sentinel_trace", "enable_post_unseal_trace",
    "enable_response_header_hostname", "enable_response_header_raft_node_id", "enable_ui",
    "enable_unauthenticated_access", "entropy", "experiments", "feature_flags", "ha_backend", "ha_storage",
    "imprecise_lease_role_tracking",
    "introspection_endpoint", "kms_library", "license_path", "log_file", "log_requests_level", "log_rotate_bytes",
    "log_rotate_duration", "log_rotate_max_files", "oidc_provider", "pid_file", "plugin_directory",
    "plugin_file_permissions", "plugin_file_uid", "plugin_tmpdir", "raw_storage_endpoint", "enable_raw_endpoint",
    "remove_irrevocable_lease_after", "reporting", "request_limiter", "sentinel", "ui",
)  # fmt: skip


_NO_MEANING_IN_TELEMETRY = (
    "add_lease_metrics_namespace_labels", "add_mount_point_rollback_metrics", "circonus_api_app", "circonus_api_token",
    "circonus_api_url", "circonus_broker_id", "circonus_broker_select_tag", "circonus_check_display_name",
    "circonus_check_force_metric_activation", "circonus_check_id", "circonus_check_instance_id",
    "circonus_check_search_tag", "circonus_check_tags", "circonus_submission_interval", "circonus_submission_url",
    "disable_hostname", "dogstatsd_addr", "dogstatsd_tags", "enable_hostname_label", "filter_default",
    "lease_metrics_epsilon", "maximum_gauge_cardinality", "metrics_prefix", "num_lease_metrics_buckets",
    "prefix_filter", "stackdriver_debug_logs", "stackdriver_location", "stackdriver_namespace",
    "stackdriver_project_id", "statsd_address", "statsite_address", "usage_gauge_period",
)  # fmt: skip


def log_level(word: str) -> str:
    """The level's one name; Vault accepts several for some."""
    return {"warning": "warn", "err": "error", "notice": "info"}.get(word, word)


def read_lease_ttls(top: Reader) -> tuple[int, int]:
    """default_lease_ttl and max_lease_ttl in seconds."""
    default_s = int(top.duration_s("default_lease_ttl", DEFAULT_LEASE_TTL_S, minimum=1))
    max_s = int(top.duration_s("max_lease_ttl", DEFAULT_LEASE_TTL_S, minimum=1))
    if default_s > max_s:
        longer = "default_lease_ttl" if top.place("default_lease_ttl") else "max_lease_ttl"
        raise top.error(longer, f"leaves default_lease_ttl ({default_s} s) longer than max_lease_ttl ({max_s} s)")
    return default_s, max_s


def read_storage_and_registration(top: Reader, *, dev: bool) -> tuple[_Storage | None, ServiceRegistrationSettings]:
    """The two stanzas that may name Consul: as in Vault, ``storage "consul"`` also holds the registration's settings
    unless there is a stanza for it, and no other storage registers unasked. No storage is None."""
    storage, inherited = _read_storage(top, dev=dev)
    stanza = top.block("service_registration", labels=1)
    if stanza is None:
        return storage, inherited
    reader = top.inner(stanza)
    if stanza.labels[0] != "consul":
        raise ConfigError(f'{stanza.body.filename}:{stanza.line}: service_registration can only be "consul"')
    connection = _connection(reader)
    reader.no_effect("tls_min_version")
    registration = _registration(reader, connection if connection != ConsulConnection() else None)
    reader.finish()
    return storage, registration


def _read_storage(top: Reader, *, dev: bool) -> tuple[_Storage | None, ServiceRegistrationSettings]:
    off = ServiceRegistrationSettings(disable=True)
    stanza = top.block("storage", labels=1)
    legacy = top.block("backend", labels=1)
    if stanza is not None and legacy is not None:
        raise top.error("backend", 'is the old name of "storage"; give one of them')
    stanza = stanza or legacy
    if stanza is None:
        return InmemStorage() if dev else None, off
    reader = top.inner(stanza)
    kind = stanza.labels[0]
    storage: _Storage
    if kind == "consul":
        storage = ConsulStorage(_connection(reader), _key_prefix(reader))
        registration = _registration(reader, None)
        reader.no_effect("consistency_mode", "lock_wait_time", "max_parallel", "session_ttl", "tls_min_version")
        reader.finish()
        return storage, registration
    if kind == "embedded":
        storage = EmbeddedStorage(path=reader.text("path"))
    elif kind == "inmem":
        storage = InmemStorage()
    else:
        raise ConfigError(
            f'{stanza.body.filename}:{stanza.line}: storage "{kind}" is not available; '
            'there are "consul", "embedded" and "inmem"'
        )
    reader.finish()
    if isinstance(storage, EmbeddedStorage) and not storage.path:
        raise ConfigError(f'{stanza.body.filename}:{stanza.line}: storage "embedded" needs "path", a directory')
    return storage, off


def _key_prefix(reader: Reader) -> str:
    """Consul's KV URLs clean a path and go elsewhere; with these characters they never do."""
    path = reader.text("path", "outrider/").strip("/") + "/"
    if not _KEY_PREFIX.fullmatch(path):
        raise reader.error("path", "must be a key prefix: letters, digits, - and _ between slashes")
    return path


def _connection(reader: Reader) -> ConsulConnection:
    return ConsulConnection(
        address=reader.text("address"),
        scheme=reader.text("scheme", choices=("http", "https")),
        token=reader.text("token"),
        token_file=reader.text("token_file"),
        datacenter=reader.text("datacenter"),
        namespace=reader.text("namespace"),
        tls_ca_file=reader.text("tls_ca_file"),
        tls_ca_path=reader.text("tls_ca_path"),
        tls_cert_file=reader.text("tls_cert_file"),
        tls_key_file=reader.text("tls_key_file"),
        tls_server_name=reader.text("tls_server_name"),
        tls_skip_verify=reader.optional_boolean("tls_skip_verify"),
    )


def _registration(reader: Reader, connection: ConsulConnection | None) -> ServiceRegistrationSettings:
    return ServiceRegistrationSettings(
        disable=reader.boolean("disable_registration"),
        service=reader.text("service", "outrider"),
        tags=reader.texts("service_tags"),
        meta=reader.mapping("service_meta"),
        address=reader.text("service_address"),
        check_timeout_s=reader.duration_s("check_timeout", 5.0, minimum=1.0),
        connection=connection,
    )


def read_listeners(top: Reader, dev: DevOptions | None) -> tuple[Listener, ...]:
    """Every ``listener "tcp"``; ``-dev`` puts its own before them."""
    listeners: list[Listener] = []
    if dev is not None:
        address = _address(dev.listen_address)
        if address is None:
            raise ConfigError("-dev-listen-address must be host:port")
        host, port = address
        listeners.append(Listener(join_address(host, port), _next_port(host, port), tls_disable=True))
    for stanza in top.blocks("listener"):
        place = f"{stanza.body.filename}:{stanza.line}"
        if len(stanza.labels) != 1:
            raise ConfigError(f'{place}: expected listener "tcp" {{...}}')
        if stanza.labels[0] != "tcp":
            raise ConfigError(f'{place}: listener "{stanza.labels[0]}" is not available; there is "tcp"')
        reader = top.inner(stanza)
        listener = _listener(reader)
        reader.finish()
        _check_listener(listener, reader, place)
        listeners.append(listener)
    addresses = [listener.address for listener in listeners if not listener.address.endswith(":0")]
    if len(set(addresses)) != len(addresses):
        raise ConfigError("two listeners have the same address")
    return tuple(listeners)


def _listener(reader: Reader) -> Listener:
    host, port = _listener_address(reader, "address", "127.0.0.1:8200")
    cluster_host, cluster_port = _listener_address(reader, "cluster_address", _next_port(host, port))
    listener = Listener(
        address=join_address(host, port),
        cluster_address=join_address(cluster_host, cluster_port),
        tls_disable=reader.boolean("tls_disable"),
        tls_cert_file=reader.text("tls_cert_file"),
        tls_key_file=reader.text("tls_key_file"),
        tls_client_ca_file=reader.text("tls_client_ca_file"),
        tls_require_and_verify_client_cert=reader.boolean("tls_require_and_verify_client_cert"),
        tls_disable_client_certs=reader.boolean("tls_disable_client_certs"),
        tls_min_version=reader.text("tls_min_version", "tls12", ("tls12", "tls13")),
        max_request_size_bytes=reader.size_bytes("max_request_size", 33554432, minimum=1),
        max_request_duration_s=reader.duration_s("max_request_duration", 90.0, minimum=1.0),
        require_request_header=reader.boolean("require_request_header"),
        unauthenticated_metrics_access=_metrics_access(reader),
        forwarded_for=_forwarded_for(reader),
    )
    reader.no_effect(
        "custom_response_headers", "http_idle_timeout", "http_read_header_timeout", "http_read_timeout",
        "http_write_timeout", "inflight_requests_logging", "max_json_depth", "profiling",
        "tls_cipher_suites", "tls_max_version", "tls_prefer_server_cipher_suites",
    )  # fmt: skip
    reader.not_available(
        proxy_protocol_behavior="connections that begin with a PROXY header would be refused",
        proxy_protocol_authorized_addrs="connections that begin with a PROXY header would be refused",
        chroot_namespace="there are no namespaces",
        redact_addresses="addresses would be shown all the same",
        redact_cluster_name="the name would be shown all the same",
        redact_version="the version would be shown all the same",
    )
    return listener


def _forwarded_for(reader: Reader) -> ForwardedForSettings | None:
    """Only ``x_forwarded_for_authorized_addrs`` turns the header on."""
    addresses = reader.texts("x_forwarded_for_authorized_addrs")
    if not addresses:
        reader.no_effect(
            "x_forwarded_for_hop_skips", "x_forwarded_for_reject_not_authorized", "x_forwarded_for_reject_not_present"
        )
        return None
    for text in addresses:
        try:
            ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise reader.error("x_forwarded_for_authorized_addrs", "must hold addresses and networks only") from None
    return ForwardedForSettings(
        addresses,
        hop_skips=reader.integer("x_forwarded_for_hop_skips", 0),
        reject_not_authorized=reader.boolean("x_forwarded_for_reject_not_authorized", True),
        reject_not_present=reader.boolean("x_forwarded_for_reject_not_present", True),
    )


def _metrics_access(listener: Reader) -> bool:
    stanza = listener.block("telemetry", labels=0)
    if stanza is None:
        return False
    reader = listener.inner(stanza)
    is_open = reader.boolean("unauthenticated_metrics_access")
    reader.not_available(
        disallow_metrics="metrics would be shown all the same, to those with a token",
        metrics_only="everything else would be served all the same",
    )
    reader.finish()
    return is_open


def read_telemetry(top: Reader) -> float:
    """``telemetry {}``: how long Prometheus' form is kept, in seconds; 0 turns it off. Nothing is pushed anywhere."""
    stanza = top.block("telemetry", labels=0)
    if stanza is None:
        return PROMETHEUS_RETENTION_S
    reader = top.inner(stanza)
    retention_s = reader.duration_s("prometheus_retention_time", PROMETHEUS_RETENTION_S)
    reader.no_effect(*_NO_MEANING_IN_TELEMETRY)
    reader.finish()
    return retention_s


def _check_listener(listener: Listener, reader: Reader, place: str) -> None:
    """What no key can tell by itself; after the misspelt keys, which are often the cause."""
    if not listener.tls_disable:
        for name in ("tls_cert_file", "tls_key_file"):
            if not getattr(listener, name):
                raise ConfigError(f'{place}: listener "tcp" needs "{name}" (or "tls_disable = true")')
    if listener.tls_require_and_verify_client_cert and listener.tls_disable_client_certs:
        raise reader.error("tls_disable_client_certs", "contradicts tls_require_and_verify_client_cert")


def _address(text: str) -> tuple[str, int] | None:
    try:
        return split_address(text)
    except ValueError:
        return None


def _listener_address(reader: Reader, name: str, default: str) -> tuple[str, int]:
    address = _address(reader.text(name, default))
    if address is None:
        raise reader.error(name, 'must be host:port, as "127.0.0.1:8200"')
    return address


def _next_port(host: str, port: int) -> str:
    """The cluster address that belongs to an API address; port 0 (any free one) stays 0."""
    return join_address(host, min(port + CLUSTER_PORT_OFFSET, 65535) if port else 0)


def read_replication(top: Reader) -> ReplicationSettings:
    """``replication {}``."""
    stanza = top.block("replication", labels=0)
    if stanza is None:
        return ReplicationSettings()
    reader = top.inner(stanza)
    settings = ReplicationSettings(
        best_effort_wal_wait_duration_s=reader.duration_s("best_effort_wal_wait_duration", 2.0),
        heartbeat_interval_s=reader.duration_s("heartbeat_interval", 5.0, minimum=0.1),
        sync_staging_bytes=reader.size_bytes("sync_staging_size", 64 * 2**20, minimum=2**20),
        sync_staging_entries=reader.integer("sync_staging_entries", 200_000, minimum=1),
        promotion_lag_max_s=reader.duration_s("promotion_lag_max", 0.0),
    )
    reader.no_effect("logshipper_buffer_length", "logshipper_buffer_size", "resolver_discover_servers")
    if reader.boolean("allow_forwarding_via_header"):
        raise reader.error("allow_forwarding_via_header", "is not available: such a request would not be forwarded")
    if reader.text("allow_forwarding_via_token"):
        raise reader.error("allow_forwarding_via_token", "is not available: such a request would not be forwarded")
    reader.finish()
    return settings


def read_sidecar(top: Reader) -> tuple[ElectionSettings, StoreSettings, AuditSettings]:
    """``sidecar {}``: what Vault has no word for."""
    prefixing = top.boolean("allow_audit_log_prefixing")
    stanza = top.block("sidecar", labels=0)
    if stanza is None:
        return ElectionSettings(), StoreSettings(), AuditSettings(prefixing)
    reader = top.inner(stanza)
    election = ElectionSettings(
        beat_ttl_s=reader.duration_s("beat_ttl", 3.0, minimum=0.5),
        beat_interval_s=reader.duration_s("beat_interval", 1.0, minimum=0.1),
        lock_delay_s=reader.duration_s("lock_delay", 0.5, minimum=0.05),
        step_down_grace_s=reader.duration_s("step_down_grace", 10.0),
    )
    store = StoreSettings(
        cache_bytes=reader.size_bytes("cache_size", 64 * 2**20),
        wal_keep_records=reader.integer("wal_keep_records", 16384, minimum=1),
        wal_keep_bytes=reader.size_bytes("wal_keep_size", 256 * 2**20, minimum=2**20),
        flush_interval_s=reader.duration_s("flush_interval", 1.0, minimum=0.01),
    )
    audit = AuditSettings(
        allow_prefixing=prefixing,
        directories=reader.texts("audit_directories"),
        timeout_s=reader.duration_s("audit_timeout", 2.0, minimum=0.1),
    )
    reader.finish()
    if election.beat_interval_s * 2 > election.beat_ttl_s:
        raise reader.error(
            "beat_interval" if reader.place("beat_interval") else "beat_ttl",
            "leaves no room for one lost beat: beat_ttl must be at least twice beat_interval",
        )
    if any(not path.startswith("/") for path in audit.directories):
        raise reader.error("audit_directories", "must be absolute paths")
    return election, store, audit


def read_the_rest(top: Reader) -> None:
    """Keys without a home of their own: most mean nothing here, some must not be passed over."""
    top.no_effect(*_NO_MEANING_AT_TOP)
    if top.boolean("disable_clustering"):
        raise top.error("disable_clustering", "is not available: nodes and clusters talk over the cluster port")
    top.not_available(hsm='there is no such seal; there are "shamir", "static" and "transit"')


def advertised(listener: Listener, api_addr: str, cluster_addr: str, *, several_nodes: bool) -> tuple[str, str]:
    """What other nodes and clusters are told: api_addr and cluster_addr as URLs, made from the first listener where
    they are not configured."""
    host, port = split_address(listener.address)
    unspecified = host in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
    if not api_addr and unspecified and several_nodes:
        raise ConfigError("api_addr is needed: the listener is on every address, and other nodes need one to go to")
    scheme = "http" if listener.tls_disable else "https"
    if not api_addr:
        api_addr = f"{scheme}://{join_address('127.0.0.1' if unspecified else host, port)}"
    api_addr = _url(api_addr, "api_addr", ("http", "https"))
    if not cluster_addr:
        api_host = urlsplit(api_addr).hostname or host
        cluster_addr = join_address(api_host, split_address(listener.cluster_address)[1])
    if "://" not in cluster_addr:
        cluster_addr = f"https://{cluster_addr}"
    cluster_addr = _url(cluster_addr, "cluster_addr", ("https",))
    if urlsplit(cluster_addr).port is None:
        raise ConfigError("cluster_addr must name a port, as https://10.0.0.7:8201")
    return api_addr, cluster_addr


def _url(text: str, name: str, schemes: tuple[str, ...]) -> str:
    expected = f"{name} must be {' or '.join(f'{scheme}://host:port' for scheme in schemes)}"
    try:
        parts = urlsplit(text)
        sound = parts.port is None or parts.port >= 0
    except ValueError:
        raise ConfigError(expected) from None
    if not sound or parts.scheme not in schemes or not parts.hostname or "@" in parts.netloc or "{" in text:
        raise ConfigError(expected)
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigError(f"{expected}, without a path")
    return f"{parts.scheme}://{parts.netloc}"
