"""Wires one node together and runs it. Constructors and their order, no behaviour: what starts last stops first.

The API port opens before the node is unsealed and closes after it has stepped down; the store closes last.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import ipaddress
import logging
import os
import signal
import socket
import ssl
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from consul_backend.clock import SystemClock
from consul_backend.config import ConsulConfig
from consul_backend.election import ElectionOptions
from consul_backend.embedded import EmbeddedStore
from consul_backend.errors import BackendError
from consul_backend.failpoint import arm_from_environment, declare
from consul_backend.physical import PhysicalStore
from consul_backend.replicated import StoreOptions
from consul_backend.store import ConsulStore
from sidecar import garbage
from sidecar.api.client_address import ForwardedFor
from sidecar.api.front import Front
from sidecar.api.listening import SocketAccess
from sidecar.api.proxy_protocol import Behavior, ProxyRule
from sidecar.api.response_headers import DEFAULT, ResponseHeaders, Sections
from sidecar.api.server import ApiServer, ServerLimits
from sidecar.auto_unseal import keep_unsealed
from sidecar.config import (
    ConfigError,
    ConsulStorage,
    DevOptions,
    EmbeddedStorage,
    Listener,
    RequestRules,
    SealSettings,
    ServerConfig,
    TransitSealSettings,
    UnixListener,
    load,
    split_address,
)
from sidecar.core.metrics import METRICS
from sidecar.core.seals import AutoSeal
from sidecar.core.seals.static import BadStaticKey, StaticSeal, load_static_key
from sidecar.core.seals.transit import TransitSeal
from sidecar.dev import DevServer, print_dev_banner
from sidecar.failpoints import POINTS
from sidecar.hardening import protect_process
from sidecar.leading import ScopeParts
from sidecar.log_file import LogFile, LogFileHandler
from sidecar.loop_lag import watch_loop_lag
from sidecar.measured_store import MeasuredStore
from sidecar.mesh.registration import NoRegistration, Registrar, ServiceRegistration
from sidecar.node import Node, NodeIdentity
from sidecar.pid_file import pid_file
from sidecar.request.in_flight import InFlight
from sidecar.request.types import Disclosure
from sidecar.roles import RoleOptions, Roles
from sidecar.runtime_metrics import measured_collections, runtime_gauges, runtime_totals
from sidecar.sealing import Sealing
from sidecar.telemetry import configure_logging, set_level
from sidecar.transport.listener import ClusterListener
from sidecar.version import product, version_text

log = logging.getLogger("core")

OpenSockets = Sequence[Sequence[socket.socket]]
"""The listening sockets of each API listener."""


def run_server(
    config: ServerConfig, dev: DevOptions | None, config_paths: tuple[str, ...], sockets: OpenSockets
) -> int:
    """Run until SIGINT or SIGTERM; returns the exit code. ``config_paths`` are read again on SIGHUP. ``sockets`` are
    those of the API listeners, in their order."""
    log_handler = LogFileHandler(LogFile(config.log_file)) if config.log_file.path else None
    configure_logging(config.log_level, config.log_format, log_handler)
    reopen_log = (log_handler.reopen,) if log_handler is not None else ()
    for warning in protect_process(lock_memory=config.lock_memory):
        log.warning("%s", warning)
    declare(POINTS)
    arm_from_environment()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    garbage.settle()
    named = config.telemetry
    METRICS.configure(named.prefix, named.filters, shown_otherwise=named.filter_default)
    try:
        with pid_file(config.pid_file):
            asyncio.run(_serve(config, dev, config_paths, sockets, reopen_log))
    except BackendError as error:
        print(f"Error initializing storage: {error}", file=sys.stderr)
        return 1
    except ConfigError as error:
        print(f"Error loading configuration: {error}", file=sys.stderr)
        return 1
    except BadStaticKey as error:
        print(f"Error initializing seal: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        what = "pid_file" if error.filename and error.filename == config.pid_file else "listener"
        print(f"Error initializing {what}: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(
    config: ServerConfig,
    dev: DevOptions | None,
    config_paths: tuple[str, ...],
    sockets: OpenSockets,
    reopen_log: Sequence[Callable[[], None]],
) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    async with contextlib.AsyncExitStack() as stack:
        physical = MeasuredStore(make_physical(config))
        await physical.open()
        stack.push_async_callback(physical.close)
        seal = make_seal(config.seal)
        if seal is not None:
            stack.push_async_callback(seal.close)
        node = make_node(config, physical, seal)
        front = make_front(config, node)
        stack.enter_context(METRICS.source(node.gauges, node.totals))
        stack.enter_context(METRICS.source(runtime_gauges, runtime_totals))
        stack.enter_context(measured_collections())
        cluster_listener = ClusterListener(*split_address(config.listeners[0].cluster_address))
        await cluster_listener.start()
        stack.push_async_callback(cluster_listener.close)
        registration = make_registration(config, node.identity)
        stack.push_async_callback(registration.close)
        served = await open_listeners(config, sockets, front, stack)
        print_banner(config, physical.kind)
        reopen = (*reopen_log, node.reopen_audit)
        loop.add_signal_handler(signal.SIGHUP, reload_settings, config_paths, served, reopen)
        roles = Roles(
            node,
            physical,
            cluster_listener,
            registration,
            ScopeParts.of(config),
            clock=SystemClock(),
            election_options=election_options(config),
            store_options=store_options(config),
            options=RoleOptions(),
        )
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(roles.run(), name="roles"),
                tasks.create_task(registration.run(), name="service registration"),
                tasks.create_task(watch_loop_lag(), name="event loop lag"),
            ]
            if seal is not None:
                running.append(tasks.create_task(keep_unsealed(node.sealing, seal), name="auto-unseal"))
            if dev is not None:
                print_dev_banner(config, await DevServer(node, front).prepare(dev), dev.tls_ca_file)
            await stopping.wait()
            print(f"==> {product()} shutdown triggered", flush=True)
            log.info("shutdown triggered")
            for task in running:
                task.cancel()


def make_physical(config: ServerConfig) -> PhysicalStore:
    """The store that the configuration names, not opened yet. Raises ConfigError."""
    storage = config.storage
    if isinstance(storage, ConsulStorage):
        return ConsulStore(_consul_config("storage", {**storage.connection.explicit(), "path": storage.path}))
    return EmbeddedStore(storage.path if isinstance(storage, EmbeddedStorage) else None)


def _consul_config(stanza: str, explicit: Mapping[str, str]) -> ConsulConfig:
    """The configuration and the environment together. Raises ConfigError."""
    try:
        return ConsulConfig.from_env(explicit)
    except ValueError as error:
        raise ConfigError(f'{stanza} "consul": {error}') from error


def make_seal(settings: SealSettings) -> AutoSeal | None:
    """The auto seal that the configuration names; None for Shamir's. Raises BadStaticKey."""
    seal = settings.seal
    if seal is None:
        return None
    if isinstance(seal, TransitSealSettings):
        return TransitSeal(seal)
    warnings: list[str] = []
    current = load_static_key("current_key", seal.current_key_id, seal.current_key, os.environ, warnings)
    previous = None
    if seal.previous_key:
        previous = load_static_key("previous_key", seal.previous_key_id, seal.previous_key, os.environ, warnings)
    for warning in warnings:
        log.warning("seal: %s", warning)
    return StaticSeal(current, previous)


def make_node(config: ServerConfig, physical: PhysicalStore, seal: AutoSeal | None) -> Node:
    """This process as a node of its cluster, under an id that it has until it ends."""
    identity = NodeIdentity(str(uuid.uuid4()), config.api_addr, config.cluster_addr)
    sealing = Sealing(
        physical,
        node_id=identity.node_id,
        cluster_name=config.cluster_name,
        clock=SystemClock(),
        seal=seal,
        disabled_seals=config.seal.disabled,
    )
    ha_enabled = isinstance(config.storage, ConsulStorage)
    return Node(identity, sealing, storage_type=physical.kind, ha_enabled=ha_enabled)


def make_front(config: ServerConfig, node: Node) -> Front:
    """What answers the API of this node, whatever its role."""
    return Front(
        node,
        prometheus=config.telemetry.prometheus_retention_s > 0,
        header_forwarding=config.replication.allow_forwarding_via_header,
        in_flight=InFlight() if shows_in_flight(config) else None,
    )


def make_registration(config: ServerConfig, identity: NodeIdentity) -> Registrar:
    """Consul's catalog, where the cluster lives on Consul or the configuration says where else to register."""
    settings = config.service_registration
    connection = settings.connection
    if connection is None and isinstance(config.storage, ConsulStorage):
        connection = config.storage.connection
    if settings.disable or connection is None:
        return NoRegistration()
    api = urlsplit(identity.api_addr)
    return ServiceRegistration.of(
        _consul_config("service_registration", connection.explicit()),
        service=settings.service,
        tags=settings.tags,
        meta=settings.meta,
        address=settings.address or api.hostname or "",
        port=api.port or 8200,
        check_ttl_s=settings.check_timeout_s,
    )


def election_options(config: ServerConfig) -> ElectionOptions:
    """The election's times as configured."""
    settings = config.election
    return ElectionOptions(
        beat_ttl_s=settings.beat_ttl_s,
        beat_interval_s=settings.beat_interval_s,
        lock_delay_s=settings.lock_delay_s,
        step_down_grace_s=settings.step_down_grace_s,
    )


def store_options(config: ServerConfig) -> StoreOptions:
    """The replicated store's bounds as configured."""
    settings, usual, sync = config.store, StoreOptions(), config.replication
    return StoreOptions(
        # What a sync stages comes as one batch, with some values twice: its entry and the record that replaced it.
        staged_entries_max=max(usual.staged_entries_max, 2 * sync.sync_staging_entries),
        staged_bytes_max=max(usual.staged_bytes_max, 2 * sync.sync_staging_bytes),
        cache_bytes_max=settings.cache_bytes,
        wal_keep_records=settings.wal_keep_records,
        wal_keep_bytes=settings.wal_keep_bytes,
        flush_interval_s=settings.flush_interval_s,
    )


def shows_in_flight(config: ServerConfig) -> bool:
    """Whether any listener shows the requests in flight to anybody."""
    return any(rules.unauthenticated_in_flight_request_access for rules in (*config.listeners, *config.unix_listeners))


@dataclass(frozen=True, slots=True)
class Served:
    """A listener at work, with what SIGHUP changes of it."""

    listener: Listener | UnixListener
    headers: ResponseHeaders
    tls: ssl.SSLContext | None = None


async def open_listeners(
    config: ServerConfig, sockets: OpenSockets, front: Front, stack: contextlib.AsyncExitStack
) -> list[Served]:
    """Serve every API listener; returns what SIGHUP reads again of each."""
    served = []
    hostname = hostname_shown(config)
    for listener, opened in zip(config.listeners, sockets, strict=True):
        limits = replace(limits_of(listener, hostname), forwarded_for=forwarded_for(listener))
        server = ApiServer(front.handle, limits=limits)
        stack.push_async_callback(server.close)
        tls = None
        if not listener.tls_disable:
            tls = api_tls(listener)
        served.append(Served(listener, limits.response_headers, tls))
        rule = proxy_rule(listener)
        await server.listen(*split_address(listener.address), tls=tls, proxy=rule, listeners=opened)
    for unix in config.unix_listeners:
        limits = limits_of(unix, hostname)
        served.append(Served(unix, limits.response_headers))
        server = ApiServer(front.handle, limits=limits)
        stack.push_async_callback(server.close)
        await server.listen_unix(unix.address, SocketAccess(unix.socket_mode, unix.socket_user, unix.socket_group))
    return served


def hostname_shown(config: ServerConfig) -> str:
    """The name of this host where every answer has it, else ""."""
    return socket.gethostname() if config.show_hostname else ""


def limits_of(rules: RequestRules, hostname: str = "") -> ServerLimits:
    """A listener's bounds as configured. ``hostname`` is named in every answer."""
    return ServerLimits(
        body_bytes_max=rules.max_request_size_bytes,
        request_timeout_s=rules.max_request_duration_s,
        head_timeout_s=rules.http_read_header_timeout_s,
        body_timeout_s=rules.http_read_timeout_s,
        write_timeout_s=rules.http_write_timeout_s,
        idle_timeout_s=rules.http_idle_timeout_s
        or rules.http_read_timeout_s
        or rules.http_read_header_timeout_s
        or 3600.0,
        require_request_header=rules.require_request_header,
        disclosure=Disclosure(
            metrics=rules.unauthenticated_metrics_access,
            profiles=rules.unauthenticated_pprof_access,
            in_flight=rules.unauthenticated_in_flight_request_access,
            hides_addresses=rules.redact_addresses,
            hides_cluster_name=rules.redact_cluster_name,
            hides_version=rules.redact_version,
        ),
        response_headers=ResponseHeaders(header_sections(rules, hostname)),
    )


def header_sections(rules: RequestRules, hostname: str) -> Sections:
    """What a listener adds to its answers as configured."""
    sections = {name: dict(headers) for name, headers in rules.response_headers.items()}
    if hostname:
        sections.setdefault(DEFAULT, {})["X-Vault-Hostname"] = hostname
    return sections


def proxy_rule(listener: Listener) -> ProxyRule | None:
    """The listener's rule for PROXY headers; None takes none."""
    settings = listener.proxy_protocol
    if settings is None:
        return None
    return ProxyRule(Behavior(settings.behavior), networks(settings.authorized_addrs))


def networks(texts: Sequence[str]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """Addresses and networks as configured."""
    return tuple(ipaddress.ip_network(text, strict=False) for text in texts)


def forwarded_for(listener: Listener) -> ForwardedFor | None:
    """The listener's rule for ``X-Forwarded-For``; None believes nobody."""
    settings = listener.forwarded_for
    if settings is None:
        return None
    return ForwardedFor(
        networks(settings.authorized_addrs),
        hop_skips=settings.hop_skips,
        reject_not_authorized=settings.reject_not_authorized,
        reject_not_present=settings.reject_not_present,
    )


def api_tls(listener: Listener) -> ssl.SSLContext:
    """The server context of one API listener. Raises OSError, ssl.SSLError for unusable files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    versions = {"tls12": ssl.TLSVersion.TLSv1_2, "tls13": ssl.TLSVersion.TLSv1_3}
    context.minimum_version = versions[listener.tls_min_version]
    context.maximum_version = versions[listener.tls_max_version]
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, listener)
    if listener.tls_disable_client_certs:
        return context
    if listener.tls_client_ca_file:
        try:
            context.load_verify_locations(listener.tls_client_ca_file)
        except OSError as error:
            why = "no PEM certificates" if isinstance(error, ssl.SSLError) else error.strerror
            raise OSError(f'tls_client_ca_file "{listener.tls_client_ca_file}": {why}') from None
        context.verify_mode = ssl.CERT_OPTIONAL
    if listener.tls_require_and_verify_client_cert:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load_pair(context: ssl.SSLContext, listener: Listener) -> None:
    """Raises OSError that names the files. An encrypted key is refused, as OpenSSL would ask a terminal."""
    try:
        context.load_cert_chain(listener.tls_cert_file, listener.tls_key_file or None, password=lambda: "")
    except OSError as error:
        files = f'tls_cert_file "{listener.tls_cert_file}", tls_key_file "{listener.tls_key_file}"'
        odd = isinstance(error, ssl.SSLError)
        why = "no PEM files that belong together, or the key is encrypted" if odd else error.strerror
        raise OSError(f"{files}: {why}") from None


def reload_settings(
    config_paths: tuple[str, ...],
    served: Sequence[Served],
    reopen: Sequence[Callable[[], None]],
) -> None:
    """SIGHUP: the log file and the audit files, the log level, and of each API listener its response headers, and its
    certificates for new connections."""
    print(f"==> {product()} reload triggered", flush=True)
    for reopen_one in reopen:
        try:
            reopen_one()
        except OSError as error:
            log.error("the log file cannot be opened again, it is written to as before: %s", error)
    try:
        if config_paths:
            config = load(config_paths)
            if config.log_level_given:  # else it stays as a flag has it, or sys/loggers
                set_level(config.log_level)
            every: list[Listener | UnixListener] = [*config.listeners, *config.unix_listeners]
            rules = {one.address: one for one in every}
            for one in served:
                if (again := rules.get(one.listener.address)) is not None:
                    one.headers.replace(header_sections(again, hostname_shown(config)))
        for one in served:
            listener = one.listener
            if one.tls is not None and isinstance(listener, Listener):
                api_tls(listener)  # tried on a context of its own: half a pair would break the one in use
                _load_pair(one.tls, listener)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError, ConfigError a ValueError
        log.error("the reload failed, what was loaded before stays in force: %s", error)


def print_banner(config: ServerConfig, storage_kind: str) -> None:
    """What the server runs with, in the shape operators know."""
    rows = {
        "Api Address": config.api_addr,
        "Cluster Address": config.cluster_addr,
        "Listener 1": _described(config.listeners[0]),
        **{f"Listener {n}": _described(each) for n, each in enumerate(config.listeners[1:], start=2)},
        **{f"Unix Listener {n}": each.address for n, each in enumerate(config.unix_listeners, start=1)},
        "Log Level": config.log_level,
        "Storage": storage_kind + (" (HA available)" if storage_kind == "consul" else ""),
        "Version": version_text(),
    }
    print(f"==> {product()} server configuration:\n")
    for name, value in rows.items():
        print(f"{name:>20}: {value}")
    print(f"\n==> {product()} server started! Log data will stream in below:\n", flush=True)


def _described(listener: Listener) -> str:
    return (
        f'tcp (addr: "{listener.address}", cluster address: "{listener.cluster_address}", '
        f'max_request_duration: "{listener.max_request_duration_s:g}s", '
        f'max_request_size: "{listener.max_request_size_bytes}", '
        f'tls: "{"disabled" if listener.tls_disable else "enabled"}")'
    )
