"""``operator diagnose``: whether a node could serve with this configuration here and now, without being one.

Nothing is written and nothing is kept: the store is read, ports are bound and let go again, an auto seal wraps a value
of its own. Every finding says what to do next. With a server running, its ports and its embedded store are in use,
which is told as a warning.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import resource
import shutil
import ssl
import stat
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509

from consul_backend.config import ConsulConfig
from consul_backend.embedded import LOCK_NAME
from consul_backend.errors import BackendError, PermissionDenied
from consul_backend.physical import EPOCH_KEY
from consul_backend.store import ConsulStore
from sidecar.api.sockets import listening_sockets
from sidecar.app import api_tls, make_seal
from sidecar.config import (
    ConfigError,
    ConsulConnection,
    ConsulStorage,
    EmbeddedStorage,
    Listener,
    ServerConfig,
    load,
    split_address,
)
from sidecar.core.seal import KEY_BYTES
from sidecar.core.seals import SealUnavailable
from sidecar.core.seals.static import BadStaticKey
from sidecar.hardening import may_lock_memory
from sidecar.token_rights import HINT

OK, WARNING, FAILURE, SKIPPED = "success", "warning", "failure", "skipped"
_ORDER = (SKIPPED, OK, WARNING, FAILURE)
OPEN_FILES_MIN = 8192
"""A listener takes 4,096 connections, each cluster port and the store some more."""
DISK_FREE_BYTES_MIN = 2**30
DISK_FREE_SHARE_MIN = 0.05
SLOW_S = 0.1
EXPIRES_SOON = timedelta(days=30)
CHECK_S_MAX = 30.0
_READS = 5


@dataclass
class Finding:
    """One check, with those it is made of. ``status`` is the worst of them all."""

    name: str
    status: str = OK
    message: str = ""
    advice: str = ""
    children: list[Finding] = field(default_factory=list)

    def add(self, *children: Finding) -> Finding:
        """Take these in."""
        self.children += children
        self.status = max((self.status, *(child.status for child in children)), key=_ORDER.index)
        return self

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        shown: dict[str, Any] = {"name": self.name, "status": self.status}
        shown |= {name: text for name in ("message", "advice") if (text := getattr(self, name))}
        return shown | ({"children": [child.shown() for child in self.children]} if self.children else {})


async def diagnose(paths: Sequence[str], environ: Mapping[str, str]) -> Finding:
    """Every check in its order. Raises nothing but what a defect raises."""
    root = Finding("Outrider Diagnose")
    parsed, config = _configuration(paths, environ)
    if config is None:
        return root.add(_system(None), parsed)
    storage = await _bounded("Check Storage", lambda: _storage(config))
    return root.add(
        _system(config),
        parsed,
        storage,
        await _bounded("Check Service Discovery", lambda: _registration(config)),
        await _bounded("Check Autounseal Encryption", lambda: _seal(config)),
        _api_address(config),
        _cluster_address(config),
        _listeners(config),
    )


async def _bounded(name: str, check: Callable[[], Awaitable[Finding]]) -> Finding:
    try:
        async with asyncio.timeout(CHECK_S_MAX):
            return await check()
    except TimeoutError:
        return Finding(name, FAILURE, f"no result within {CHECK_S_MAX:g} s", "look at the network on the way there")


# ---- the machine


def _system(config: ServerConfig | None) -> Finding:
    found = Finding("Check Operating System")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < OPEN_FILES_MIN:
        advice = f"raise it to at least {OPEN_FILES_MIN} (LimitNOFILE, ulimit -n)"
        found.add(Finding("Check Open File Limit", WARNING, f"{limit} files may be open", advice))
    else:
        found.add(Finding("Check Open File Limit", message=f"{limit}" if limit > 0 else "no limit"))
    found.add(*(_disk(path) for path in _places(config)))
    if config is not None and config.lock_memory and not may_lock_memory():
        found.add(
            Finding(
                "Check Memory Lock",
                WARNING,
                "memory cannot be locked: keys may reach the swap",
                "give the process CAP_IPC_LOCK or LimitMEMLOCK=infinity, or say disable_mlock = true",
            )
        )
    return found


def _places(config: ServerConfig | None) -> list[str]:
    places = ["/"]
    if config is not None and isinstance(config.storage, EmbeddedStorage):
        places.append(config.storage.path)
    if config is not None:
        places += config.audit.directories
    return places


def _disk(path: str) -> Finding:
    name = f"Check Disk Usage of {path}"
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        usage = shutil.disk_usage(place)
    except OSError as error:
        return Finding(name, WARNING, f"it cannot be told: {error.strerror}")
    free = f"{usage.free // 2**20} MiB free of {usage.total // 2**20}"
    if usage.free < DISK_FREE_BYTES_MIN or usage.free < usage.total * DISK_FREE_SHARE_MIN:
        return Finding(name, WARNING, free, "make room: an audit device that cannot write blocks every request")
    return Finding(name, message=free)


# ---- the configuration


def _configuration(paths: Sequence[str], environ: Mapping[str, str]) -> tuple[Finding, ServerConfig | None]:
    found = Finding("Parse Configuration")
    try:
        config = load(paths, environ)
    except ConfigError as error:
        found.add(Finding("Read Files", FAILURE, str(error), "mend it: a server does not start with it"))
        return found, None
    found.add(*(Finding("Setting", WARNING, warning) for warning in config.warnings))
    for path in paths:
        with contextlib.suppress(OSError):
            mode = stat.S_IMODE(os.stat(path).st_mode)
            if mode & 0o002:
                found.add(Finding("File Mode", FAILURE, f"{path} can be written by anybody", f"chmod o-w {path}"))
            elif mode & 0o004 and _holds_secrets(config):
                found.add(Finding("File Mode", WARNING, f"{path} holds a secret that anybody reads", "chmod o-rwx"))
    return found, config


def _holds_secrets(config: ServerConfig) -> bool:
    storage, seal = config.storage, config.seal.seal
    token = isinstance(storage, ConsulStorage) and bool(storage.connection.token)
    key = str(getattr(seal, "current_key", "") or getattr(seal, "token", ""))
    return token or (bool(key) and not key.startswith(("env://", "file://")))


# ---- the store


async def _storage(config: ServerConfig) -> Finding:
    found = Finding("Check Storage")
    storage = config.storage
    if isinstance(storage, EmbeddedStorage):
        return found.add(_embedded(Path(storage.path)))
    if not isinstance(storage, ConsulStorage):
        return found.add(Finding("Check Storage Type", WARNING, "everything is gone with the process: only for trials"))
    return found.add(*await _consul(storage.connection, storage.path))


async def _consul(connection: ConsulConnection, path: str) -> list[Finding]:
    try:
        consul = ConsulConfig.from_env({**connection.explicit(), "path": path})
    except ValueError as error:
        return [Finding("Create Storage Backend", FAILURE, str(error))]
    found = [Finding("Create Storage Backend", message=consul.address), *_consul_tls(consul)]
    host = urlsplit(consul.address if "://" in consul.address else f"//{consul.address}").hostname or ""
    if not consul.address.startswith("unix:") and not _is_local(host):
        advice = "use the agent of this machine: a node beats through it, and finds a dead server by it"
        found.append(Finding("Check Consul Direct Storage Access", WARNING, f"{host} is another machine", advice))
    found.append(await _access(ConsulStore(consul)))
    return found


async def _access(store: ConsulStore) -> Finding:
    name = "Check Storage Access"
    times_s: list[float] = []
    try:
        await store.open()
        for _ in range(_READS):
            started_s = time.monotonic()
            await store.get(EPOCH_KEY, consistent=True)
            times_s.append(time.monotonic() - started_s)
    except PermissionDenied as error:
        return Finding(name, FAILURE, str(error), HINT)
    except BackendError as error:
        text = f"{type(error).__name__}: {error}"
        return Finding(name, FAILURE, text, "is the agent running, and does it know a leader (consul operator raft)?")
    finally:
        await store.close()
    slowest_s = max(times_s)
    message = f"a consistent read took {slowest_s * 1000:.0f} ms at most"
    if slowest_s > SLOW_S:
        return Finding(name, WARNING, message, "every commit waits for the same: look at Consul's disks and network")
    return Finding(name, message=message)


def _consul_tls(consul: ConsulConfig) -> list[Finding]:
    name = "Check Consul TLS"
    if consul.tls_skip_verify:
        return [Finding(name, WARNING, "Consul's certificate is not verified", "give tls_ca_file instead")]
    found = [
        *([_certificate(name, consul.client_cert)] if consul.client_cert else []),
        *([_certificate(name, consul.ca_file)] if consul.ca_file else []),
    ]
    if consul.client_cert:
        try:
            ssl.create_default_context().load_cert_chain(consul.client_cert, consul.client_key or None)
        except (OSError, ssl.SSLError) as error:
            found.append(Finding(name, FAILURE, f"certificate and key do not load together: {_why(error)}"))
    return found


def _embedded(place: Path) -> Finding:
    name = "Check Embedded Store"
    if not place.exists():
        parent = next((each for each in place.parents if each.exists()), Path("/"))
        if not os.access(parent, os.W_OK | os.X_OK):
            return Finding(name, FAILURE, f"{place} is not there and cannot be made in {parent}", "make it, mode 0700")
        return Finding(name, message=f"{place} is made at the first start")
    if not place.is_dir() or not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        return Finding(name, FAILURE, f"{place} is no directory that this user may write to")
    if stat.S_IMODE(place.stat().st_mode) & 0o077:
        return Finding(name, WARNING, f"others may look into {place}", f"chmod 0700 {place}")
    if _is_locked(place / LOCK_NAME):
        return Finding(name, WARNING, "a server is running on it")
    return Finding(name, message=str(place))


def _is_locked(path: Path) -> bool:
    import fcntl

    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


async def _registration(config: ServerConfig) -> Finding:
    found = Finding("Check Service Discovery")
    connection = config.service_registration.connection
    if config.service_registration.disable or (connection is None and not isinstance(config.storage, ConsulStorage)):
        return Finding(found.name, SKIPPED, "the node does not register itself")
    if connection is None:
        return Finding(found.name, message="with the storage's agent")
    return found.add(*await _consul(connection, "outrider-diagnose/"))


# ---- the seal


async def _seal(config: ServerConfig) -> Finding:
    name = "Check Autounseal Encryption"
    try:
        seal = make_seal(config.seal)
    except BadStaticKey as error:
        return Finding(name, FAILURE, str(error))
    if seal is None:
        return Finding(name, SKIPPED, "key shares unseal this cluster")
    try:
        key = os.urandom(KEY_BYTES)
        if await seal.unwrap(await seal.wrap(key)) != key:
            return Finding(name, FAILURE, "what the seal wrapped comes back as something else")
    except SealUnavailable as error:
        return Finding(name, FAILURE, str(error), "a node that restarts now stays sealed")
    finally:
        await seal.close()
    return Finding(name, message=f'seal "{seal.kind}", key "{seal.key_id}"')


# ---- addresses and listeners


def _api_address(config: ServerConfig) -> Finding:
    name = "Determine Redirect Address"
    host = urlsplit(config.api_addr).hostname or ""
    if isinstance(config.storage, ConsulStorage) and _is_local(host):
        advice = "set api_addr to one that clients and the other nodes reach"
        return Finding(name, WARNING, f"{config.api_addr} means nothing on another machine", advice)
    return Finding(name, message=config.api_addr)


def _cluster_address(config: ServerConfig) -> Finding:
    name = "Check Cluster Address"
    host, port = split_address(config.listeners[0].cluster_address)
    bound = _bound(name, host, port)
    return bound if bound.status != OK else Finding(name, message=config.cluster_addr)


def _listeners(config: ServerConfig) -> Finding:
    found = Finding("Start Listeners")
    for listener in config.listeners:
        host, port = split_address(listener.address)
        one = Finding(f"Listener {listener.address}")
        one.add(_bound("Create Listener", host, port))
        if listener.tls_disable:
            one.add(Finding("Check Listener TLS", SKIPPED, "tls_disable is set: whoever is on the way reads along"))
        else:
            one.add(*_listener_tls(listener, urlsplit(config.api_addr).hostname or ""))
        found.add(one)
    for unix in config.unix_listeners:
        folder = os.path.dirname(unix.address)
        good = os.access(folder, os.W_OK | os.X_OK)
        message = "" if good else f"{folder} cannot be written to"
        found.add(Finding(f"Listener {unix.address}", OK if good else FAILURE, message))
    return found


def _bound(name: str, host: str, port: int) -> Finding:
    try:
        for opened in listening_sockets(host, port):
            opened.close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return Finding(name, WARNING, f"port {port} is in use", "by a server that runs already, or by a stranger")
        return Finding(name, FAILURE, f"{host}:{port}: {error.strerror}")
    return Finding(name, message=f"{host}:{port}")


def _listener_tls(listener: Listener, api_host: str) -> list[Finding]:
    name = "Check Listener TLS"
    try:
        api_tls(listener)
    except (OSError, ssl.SSLError) as error:
        return [Finding(name, FAILURE, _why(error), "the server would not start")]
    found = [_certificate(name, listener.tls_cert_file, api_host)]
    if listener.tls_client_ca_file:
        found.append(_certificate("Check Client CA", listener.tls_client_ca_file))
    return found


def _certificate(name: str, path: str, host: str = "") -> Finding:
    """The certificates in a file: their times, and whether the first is for ``host``."""
    try:
        certificates = x509.load_pem_x509_certificates(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        return Finding(name, FAILURE, f"{path}: {_why(error)}")
    now = datetime.now(UTC)
    ends = min(one.not_valid_after_utc for one in certificates)
    begins = max(one.not_valid_before_utc for one in certificates)
    if ends < now or begins > now:
        text = f"expired {ends:%Y-%m-%d}" if ends < now else f"counts only from {begins:%Y-%m-%d %H:%M} UTC on"
        return Finding(name, FAILURE, f"{path}: a certificate {text}", "renew it, or set the clock")
    if ends - now < EXPIRES_SOON:
        return Finding(name, WARNING, f"{path}: a certificate expires {ends:%Y-%m-%d}", "renew it; SIGHUP loads it")
    if host and not _is_for(certificates[0], host):
        return Finding(
            name, WARNING, f"{path}: it is not for {host}, which api_addr names", "nodes and clients refuse it"
        )
    return Finding(name, message=f"{path}: until {ends:%Y-%m-%d}")


def _is_for(certificate: x509.Certificate, host: str) -> bool:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host) in names.get_values_for_type(x509.IPAddress)
    found = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
    return host.lower() in found or f"*.{host.lower().partition('.')[2]}" in found


def _is_local(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host in ("localhost", "")


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return str(error.reason or error)
    return str((isinstance(error, OSError) and error.strerror) or error)
