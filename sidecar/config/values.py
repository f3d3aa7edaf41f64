"""The server's configuration as values. Times in seconds, sizes in bytes; an address is ``host:port``.

Read by :mod:`sidecar.config`; import the names from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

DEFAULT_LEASE_TTL_S = 2764800
API_PORT = 8200


@dataclass(frozen=True, slots=True)
class ConsulConnection:
    """How to reach Consul. An empty text or None is "not configured": there ``CONSUL_*`` or a default applies."""

    address: str = ""
    scheme: str = ""
    token: str = field(default="", repr=False)
    token_file: str = ""
    datacenter: str = ""
    namespace: str = ""
    tls_ca_file: str = ""
    tls_ca_path: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""
    tls_server_name: str = ""
    tls_skip_verify: bool | None = None

    def explicit(self) -> dict[str, str]:
        """What was configured, under the names of ``consul_backend``'s ConsulConfig. Holds the token."""
        skip = "" if self.tls_skip_verify is None else str(self.tls_skip_verify).lower()
        named = {
            "address": self.address,
            "scheme": self.scheme,
            "token": self.token,
            "token_file": self.token_file,
            "datacenter": self.datacenter,
            "namespace": self.namespace,
            "ca_file": self.tls_ca_file,
            "ca_path": self.tls_ca_path,
            "client_cert": self.tls_cert_file,
            "client_key": self.tls_key_file,
            "tls_server_name": self.tls_server_name,
            "tls_skip_verify": skip,
        }
        return {name: value for name, value in named.items() if value}


@dataclass(frozen=True, slots=True)
class ConsulStorage:
    """``storage "consul"``. ``path`` is the key prefix; it ends in a slash and does not begin with one."""

    connection: ConsulConnection = field(default_factory=ConsulConnection)
    path: str = "outrider/"


@dataclass(frozen=True, slots=True)
class EmbeddedStorage:
    """``storage "embedded"``: SQLite in the directory ``path``, for one node."""

    path: str


@dataclass(frozen=True, slots=True)
class InmemStorage:
    """``storage "inmem"``: gone with the process."""


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """What audit devices may do on this machine; the devices themselves are made over the API. No ``directories``
    means that files may be anywhere."""

    allow_prefixing: bool = False
    directories: tuple[str, ...] = ()
    timeout_s: float = 2.0


@dataclass(frozen=True, slots=True)
class ForwardedForSettings:
    """The ``x_forwarded_for_*`` keys of a listener; ``authorized_addrs`` are addresses and networks."""

    authorized_addrs: tuple[str, ...]
    hop_skips: int = 0
    reject_not_authorized: bool = True
    reject_not_present: bool = True


@dataclass(frozen=True, slots=True)
class ProxyProtocolSettings:
    """``proxy_protocol_behavior`` and the addresses and networks it trusts."""

    behavior: str
    authorized_addrs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRules:
    """What a listener of any kind lets a request do, and what its answers hold. A time of 0 is no limit.
    ``response_headers``: values by name, by section (``default``, ``2xx``, ``307``)."""

    max_request_size_bytes: int = 33554432
    max_request_duration_s: float = 90.0
    http_read_header_timeout_s: float = 10.0
    http_read_timeout_s: float = 30.0
    http_write_timeout_s: float = 60.0
    http_idle_timeout_s: float = 300.0
    require_request_header: bool = False
    unauthenticated_metrics_access: bool = False
    unauthenticated_pprof_access: bool = False
    unauthenticated_in_flight_request_access: bool = False
    redact_addresses: bool = False
    redact_cluster_name: bool = False
    redact_version: bool = False
    response_headers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Listener(RequestRules):
    """``listener "tcp"``. Addresses are ``host:port``; TLS 1.2 or newer unless ``tls_disable``."""

    address: str
    cluster_address: str
    tls_disable: bool = False
    tls_cert_file: str = ""
    tls_key_file: str = ""
    tls_client_ca_file: str = ""
    tls_require_and_verify_client_cert: bool = False
    tls_disable_client_certs: bool = False
    tls_min_version: str = "tls12"
    tls_max_version: str = "tls13"
    forwarded_for: ForwardedForSettings | None = None
    proxy_protocol: ProxyProtocolSettings | None = None


@dataclass(frozen=True, slots=True)
class UnixListener(RequestRules):
    """``listener "unix"``: ``address`` is a path. Without mode, user and group it is the process' own, mode 0700."""

    address: str
    socket_mode: int | None = None
    socket_user: str = ""
    socket_group: str = ""


@dataclass(frozen=True, slots=True)
class StaticSealSettings:
    """``seal "static"``. The keys are as they were given: base64 or hex, ``env://NAME`` or ``file://PATH``."""

    current_key_id: str
    current_key: str = field(repr=False)
    previous_key_id: str = ""
    previous_key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class TransitSealSettings:
    """``seal "transit"``, its environment variables included; empty texts are not used. ``address`` and
    ``mount_path`` end in no slash."""

    address: str
    token: str = field(repr=False)
    key_name: str
    mount_path: str
    namespace: str = ""
    key_id_prefix: str = ""
    disable_renewal: bool = False
    tls_ca_cert: str = ""
    tls_client_cert: str = ""
    tls_client_key: str = ""
    tls_server_name: str = ""
    tls_skip_verify: bool = False


@dataclass(frozen=True, slots=True)
class SealSettings:
    """``seal`` None is Shamir's. ``disabled`` are the types of the stanzas that say so: the cluster leaves them."""

    seal: StaticSealSettings | TransitSealSettings | None = None
    disabled: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """``shamir``, ``static``, ``transit``."""
        if self.seal is None:
            return "shamir"
        return "static" if isinstance(self.seal, StaticSealSettings) else "transit"


@dataclass(frozen=True, slots=True)
class ServiceRegistrationSettings:
    """How the node shows itself in Consul's catalog. ``connection`` None means the storage's own; ``address`` replaces
    the host of ``api_addr``."""

    disable: bool = False
    service: str = "outrider"
    tags: tuple[str, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict)
    address: str = ""
    check_timeout_s: float = 5.0
    connection: ConsulConnection | None = None


@dataclass(frozen=True, slots=True)
class ReplicationSettings:
    """``replication {}``. ``best_effort_wal_wait_duration_s`` bounds the wait for one's own forwarded write,
    and for what a session has seen; ``allow_forwarding_via_header``: clients may have such requests forwarded instead;
    ``sync_staging_*`` what a merkle sync holds in memory to commit it as one; ``promotion_lag_max_s`` what a promotion
    may lose without ``force``, 0 for no limit; ``secondary_certificate_ttl_s``: life of a secondary's certificate,
    renewed after two thirds of it; ``unasked_deletions`` and ``unasked_deletions_percent`` what a comparison may delete
    without being asked for the number, whichever is more."""

    best_effort_wal_wait_duration_s: float = 2.0
    heartbeat_interval_s: float = 5.0
    sync_staging_bytes: int = 64 * 2**20
    sync_staging_entries: int = 200_000
    promotion_lag_max_s: float = 0.0
    secondary_certificate_ttl_s: float = 365 * 86400.0
    certificate_check_interval_s: float = 60.0
    allow_forwarding_via_header: bool = False
    unasked_deletions: int = 100
    unasked_deletions_percent: int = 20


@dataclass(frozen=True, slots=True)
class ElectionSettings:
    """From ``sidecar {}``; see ``consul_backend.election.ElectionOptions`` for what each means."""

    beat_ttl_s: float = 3.0
    beat_interval_s: float = 1.0
    lock_delay_s: float = 0.5
    step_down_grace_s: float = 10.0


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """From ``sidecar {}``: the bounds of the replicated store. ``wal_keep_bytes`` and ``wal_keep_records`` are soft, up
    to four times as much is kept for a secondary that lags."""

    cache_bytes: int = 64 * 2**20
    wal_keep_records: int = 16384
    wal_keep_bytes: int = 256 * 2**20
    flush_interval_s: float = 1.0


@dataclass(frozen=True, slots=True)
class LockoutStanza:
    """What one stanza ``user_lockout`` sets; None where it says nothing. Durations in seconds."""

    threshold: int | None = None
    duration_s: int | None = None
    counter_reset_s: int | None = None
    disable: bool | None = None


@dataclass(frozen=True, slots=True)
class TelemetrySettings:
    """``telemetry {}``. ``prometheus_retention_s`` 0: no Prometheus form. ``prefix`` begins every name. ``filters`` are
    ``+prefix`` and ``-prefix``, of which the longest that fits a name decides, else ``filter_default``.
    ``usage_period_s``: how often what is stored is counted, 0 for never; ``label_values_max``: of one label of such a
    count; ``lease_bucket_s`` and ``lease_buckets``: the counts of leases by when they expire."""

    prometheus_retention_s: float = 86400.0
    prefix: str = "vault"
    filters: tuple[str, ...] = ()
    filter_default: bool = True
    usage_period_s: float = 600.0
    label_values_max: int = 500
    lease_bucket_s: float = 3600.0
    lease_buckets: int = 168
    lease_namespace_label: bool = False


@dataclass(frozen=True, slots=True)
class LogFileSettings:
    """``log_file`` and ``log_rotate_*``. No ``path``: the log goes to standard error. ``rotate_bytes`` 0 or less is no
    limit; ``rotate_max_files`` is how many older files are kept, 0 for all and -1 for none."""

    path: str = ""
    rotate_duration_s: float = 86400.0
    rotate_bytes: int = 0
    rotate_max_files: int = 0


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything ``outrider server`` needs to know. ``warnings`` are shown by the command before it starts the
    server. ``log_level_given``: a file or the environment says it, so that a SIGHUP sets it again."""

    storage: ConsulStorage | EmbeddedStorage | InmemStorage
    listeners: tuple[Listener, ...]
    api_addr: str
    cluster_addr: str
    cluster_name: str = ""
    default_lease_ttl_s: int = DEFAULT_LEASE_TTL_S
    max_lease_ttl_s: int = DEFAULT_LEASE_TTL_S
    log_level: str = "info"
    log_level_given: bool = False
    log_format: str = "standard"
    service_registration: ServiceRegistrationSettings = field(default_factory=ServiceRegistrationSettings)
    replication: ReplicationSettings = field(default_factory=ReplicationSettings)
    election: ElectionSettings = field(default_factory=ElectionSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    audit: AuditSettings = field(default_factory=AuditSettings)
    user_lockout: Mapping[str, LockoutStanza] = field(default_factory=dict)
    disable_user_lockout: bool = False
    unix_listeners: tuple[UnixListener, ...] = ()
    seal: SealSettings = field(default_factory=SealSettings)
    lock_memory: bool = True
    log_file: LogFileSettings = field(default_factory=LogFileSettings)
    pid_file: str = ""
    show_hostname: bool = False
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DevOptions:
    """What ``-dev`` was told. ``root_token_id`` None lets the server choose one; ``kv_version`` is mounted at
    ``secret/``, empty for none. ``tls_*_file``: what ``-dev-tls`` made; all empty without it."""

    root_token_id: str | None = field(default=None, repr=False)
    listen_address: str = "127.0.0.1:8200"
    kv_version: str = "2"
    tls_ca_file: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""


def join_address(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(text: str) -> tuple[str, int]:
    """Host and port of ``host:port``, ``host``, ``:port``, ``[v6]:port``. No host is every IPv4 address. Raises
    ValueError."""
    if "{{" in text:
        raise ValueError("address templates are not available")
    parts = urlsplit(f"//{text}")
    if not text.strip() or parts.path or parts.query or parts.fragment or "@" in text or any(map(str.isspace, text)):
        raise ValueError("not host:port")
    port = parts.port
    return parts.hostname or "0.0.0.0", API_PORT if port is None else port  # noqa: S104 - as Vault reads ":8200"
