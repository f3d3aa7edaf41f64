"""The server's configuration: Vault's stanzas, read from HCL or JSON files, with environment overrides.

Precedence: environment, then files (a later file wins over an earlier one, listeners add up), then defaults.
``OUTRIDER_*`` wins over ``VAULT_*``. Flags are applied by the command line on top of the result.

A key that Vault knows and that means nothing here gives a warning; a key that would change what is promised (another
seal, a redaction) is refused; a key that nobody knows is refused with the nearest one that exists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from sidecar import hcl
from sidecar.config import stanzas
from sidecar.config.listeners import advertised, read_listeners
from sidecar.config.lockout import read_user_lockout
from sidecar.config.reader import ConfigError, Reader, parse_boolean, parse_duration_s
from sidecar.config.seals import read_seals
from sidecar.config.stanzas import log_level
from sidecar.config.telemetry import read_telemetry
from sidecar.config.values import (
    AuditSettings,
    ConsulConnection,
    ConsulStorage,
    DevOptions,
    ElectionSettings,
    EmbeddedStorage,
    ForwardedForSettings,
    InmemStorage,
    Listener,
    LockoutStanza,
    LogFileSettings,
    ProxyProtocolSettings,
    ReplicationSettings,
    RequestRules,
    SealSettings,
    ServerConfig,
    ServiceRegistrationSettings,
    StaticSealSettings,
    StoreSettings,
    TelemetrySettings,
    TransitSealSettings,
    UnixListener,
    join_address,
    split_address,
)

__all__ = [
    "AuditSettings",
    "ConfigError",
    "ConsulConnection",
    "ConsulStorage",
    "DevOptions",
    "ElectionSettings",
    "EmbeddedStorage",
    "ForwardedForSettings",
    "InmemStorage",
    "Listener",
    "LockoutStanza",
    "LogFileSettings",
    "ProxyProtocolSettings",
    "ReplicationSettings",
    "RequestRules",
    "SealSettings",
    "ServerConfig",
    "ServiceRegistrationSettings",
    "StaticSealSettings",
    "StoreSettings",
    "TelemetrySettings",
    "TransitSealSettings",
    "UnixListener",
    "join_address",
    "load",
    "load_dev",
    "load_text",
    "log_level",
    "parse_duration_s",
    "split_address",
]


def load(paths: Sequence[str], environ: Mapping[str, str] = os.environ) -> ServerConfig:
    """Read files, and every ``.hcl`` and ``.json`` of directories, in order. Raises ConfigError."""
    return _read(_bodies(paths), environ, None)


def load_dev(options: DevOptions, paths: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> ServerConfig:
    """The configuration of ``-dev``: in memory, one listener, with TLS where that was asked for; files may add to it.
    Raises ConfigError."""
    return _read(_bodies(paths), environ, options)


def load_text(text: str, filename: str = "<text>", environ: Mapping[str, str] | None = None) -> ServerConfig:
    """One file's content; without ``environ`` the environment has no say. Raises ConfigError."""
    return _read([_parse(text, filename)], environ or {}, None)


def _bodies(paths: Sequence[str]) -> list[hcl.Body]:
    bodies: list[hcl.Body] = []
    for name in paths:
        path = Path(name)
        files = [path]
        try:
            if path.is_dir():
                files = sorted(each for each in path.iterdir() if each.suffix in (".hcl", ".json"))
                if not files:
                    raise ConfigError(f"{path}: the directory holds no .hcl or .json file")
            bodies.extend(_parse(each.read_text(encoding="utf-8"), str(each)) for each in files)
        except OSError as error:
            raise ConfigError(f"{error.filename or path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: the file is not UTF-8 text") from error
    return bodies


def _parse(text: str, filename: str) -> hcl.Body:
    try:
        return hcl.parse_any(text, filename)
    except hcl.HCLError as error:
        raise ConfigError(str(error)) from error


def _environment(environ: Mapping[str, str], name: str) -> str:
    return environ.get(f"OUTRIDER_{name}") or environ.get(f"VAULT_{name}") or ""


def _read(bodies: Sequence[hcl.Body], environ: Mapping[str, str], dev: DevOptions | None) -> ServerConfig:
    warnings: list[str] = []
    top = Reader(bodies, "", warnings)
    storage, registration = stanzas.read_storage_and_registration(top, dev=dev is not None)
    listeners, unix_listeners = read_listeners(top, dev)
    api_addr, cluster_addr = top.text("api_addr"), top.text("cluster_addr")
    default_ttl_s, max_ttl_s = stanzas.read_lease_ttls(top)
    election, store, audit = stanzas.read_sidecar(top)
    replication = stanzas.read_replication(top)
    level = log_level(top.text("log_level", "", stanzas.LOG_LEVEL_WORDS))
    level = _environment_choice(environ, "LOG_LEVEL", stanzas.LOG_LEVEL_WORDS) or level
    log_format = top.text("log_format", "standard", stanzas.LOG_FORMATS)
    cluster_name = top.text("cluster_name")
    log_file, pid_file = stanzas.read_log_file(top), top.text("pid_file")
    show_hostname = top.boolean("enable_response_header_hostname")
    telemetry = read_telemetry(top)
    user_lockout = read_user_lockout(top)
    seal = read_seals(top, environ)
    lock_memory = not top.boolean("disable_mlock") and dev is None
    stanzas.read_the_rest(top)
    top.finish()
    if dev is not None and seal.seal is not None:
        raise ConfigError(f'-dev has one unseal key of its own: leave seal "{seal.kind}" out')
    if storage is None:
        raise ConfigError('no storage is configured; add storage "consul" {...} or storage "embedded" {...}')
    if not listeners:
        raise ConfigError('no listener is configured; add listener "tcp" {...}')
    api_addr, cluster_addr = advertised(
        listeners[0],
        _environment(environ, "API_ADDR") or api_addr,
        _environment(environ, "CLUSTER_ADDR") or cluster_addr,
        several_nodes=isinstance(storage, ConsulStorage),
    )
    return ServerConfig(
        storage=storage,
        listeners=listeners,
        api_addr=api_addr,
        cluster_addr=cluster_addr,
        cluster_name=cluster_name,
        default_lease_ttl_s=default_ttl_s,
        max_lease_ttl_s=max_ttl_s,
        log_level=level or "info",
        log_level_given=bool(level),
        log_format=_environment_choice(environ, "LOG_FORMAT", stanzas.LOG_FORMATS) or log_format,
        telemetry=telemetry,
        log_file=log_file,
        pid_file=pid_file,
        show_hostname=show_hostname,
        service_registration=registration,
        replication=replication,
        election=election,
        store=store,
        audit=audit,
        user_lockout=user_lockout,
        disable_user_lockout=_environment_flag(environ, "DISABLE_USER_LOCKOUT"),
        unix_listeners=unix_listeners,
        seal=seal,
        lock_memory=lock_memory,
        warnings=tuple(warnings),
    )


def _environment_flag(environ: Mapping[str, str], name: str) -> bool:
    text = _environment(environ, name)
    try:
        return bool(text) and parse_boolean(text)
    except ValueError:
        raise ConfigError(f"environment {name}: must be true or false") from None


def _environment_choice(environ: Mapping[str, str], name: str, choices: Sequence[str]) -> str:
    word = _environment(environ, name).lower()
    if word and word not in choices:
        raise ConfigError(f"environment {name}: must be one of {', '.join(choices)}")
    return log_level(word)
