"""What each stanza of the configuration means: one function per stanza, from a Reader to values."""

from __future__ import annotations

import re

from sidecar.config import ineffective
from sidecar.config.reader import ConfigError, Reader
from sidecar.config.values import (
    DEFAULT_LEASE_TTL_S,
    AuditSettings,
    ConsulConnection,
    ConsulStorage,
    ElectionSettings,
    EmbeddedStorage,
    InmemStorage,
    LogFileSettings,
    ReplicationSettings,
    ServiceRegistrationSettings,
    StoreSettings,
)

LOG_LEVEL_WORDS = ("trace", "debug", "info", "notice", "warn", "warning", "error", "err")
LOG_FORMATS = ("standard", "json")

_IN_MEMORY = ("inmem", "inmem_ha", "inmem_transactional", "inmem_transactional_ha")
_KEY_PREFIX = re.compile(r"(?:[A-Za-z0-9_-]+/)+")
_Storage = ConsulStorage | EmbeddedStorage | InmemStorage


def log_level(word: str) -> str:
    """The level's one name; Vault accepts several for some."""
    return {"warning": "warn", "err": "error", "notice": "info"}.get(word, word)


def read_log_file(top: Reader) -> LogFileSettings:
    """``log_file`` and ``log_rotate_*``, with Vault's defaults."""
    usual = LogFileSettings()
    return LogFileSettings(
        path=top.text("log_file"),
        # 0 is Vault's word for the default.
        rotate_duration_s=top.duration_s("log_rotate_duration", usual.rotate_duration_s) or usual.rotate_duration_s,
        rotate_bytes=top.size_bytes("log_rotate_bytes", usual.rotate_bytes, minimum=-1),
        rotate_max_files=top.integer("log_rotate_max_files", usual.rotate_max_files, minimum=-1),
    )


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
    reader.no_effect(ineffective.IN_REGISTRATION)
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
        reader.no_effect(ineffective.IN_CONSUL_STORAGE)
        reader.finish()
        return storage, registration
    if kind in ("embedded", "file"):
        storage = EmbeddedStorage(path=reader.text("path"))
    elif kind in _IN_MEMORY:
        storage = InmemStorage()
        reader.no_effect(ineffective.IN_MEMORY_STORAGE)
    else:
        raise ConfigError(
            f'{stanza.body.filename}:{stanza.line}: storage "{kind}" is not available; '
            'there are "consul", "embedded", "file" and "inmem"'
        )
    reader.finish()
    if kind == "file":
        top.warn(
            f'{stanza.body.filename}:{stanza.line}: storage "file" is the embedded store: one node, its own format in '
            "that directory; files of another server there are neither read nor changed"
        )
    if isinstance(storage, EmbeddedStorage) and not storage.path:
        raise ConfigError(f'{stanza.body.filename}:{stanza.line}: storage "{kind}" needs "path", a directory')
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


def read_replication(top: Reader) -> ReplicationSettings:
    """``replication {}``."""
    stanza = top.block("replication", labels=0)
    if stanza is None:
        return ReplicationSettings()
    reader = top.inner(stanza)
    settings = ReplicationSettings(
        best_effort_wal_wait_duration_s=reader.duration_s("best_effort_wal_wait_duration", 2.0),
        allow_forwarding_via_header=reader.boolean("allow_forwarding_via_header"),
        heartbeat_interval_s=reader.duration_s("heartbeat_interval", 5.0, minimum=0.1),
        sync_staging_bytes=reader.size_bytes("sync_staging_size", 64 * 2**20, minimum=2**20),
        sync_staging_entries=reader.integer("sync_staging_entries", 200_000, minimum=1),
        promotion_lag_max_s=reader.duration_s("promotion_lag_max", 0.0),
        secondary_certificate_ttl_s=reader.duration_s("secondary_certificate_ttl", 365 * 86400.0, minimum=10.0),
        certificate_check_interval_s=reader.duration_s("certificate_check_interval", 60.0, minimum=0.1),
        unasked_deletions=reader.integer("unasked_deletions", 100),
        unasked_deletions_percent=reader.integer("unasked_deletions_percent", 20),
    )
    if settings.unasked_deletions_percent > 100:
        raise reader.error("unasked_deletions_percent", "is a share of what is here: 0 to 100")
    reader.no_effect(ineffective.IN_REPLICATION)
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
    top.no_effect(ineffective.AT_TOP)
    if top.boolean("disable_clustering"):
        raise top.error("disable_clustering", "is not available: nodes and clusters talk over the cluster port")
    top.not_available(hsm='there is no such seal; there are "shamir", "static" and "transit"')
