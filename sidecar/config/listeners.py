"""``listener "tcp"`` and ``listener "unix"``: where the API port listens, and what the nodes tell of it."""

from __future__ import annotations

import ipaddress
import re
from typing import Any
from urllib.parse import urlsplit

from sidecar.config import ineffective
from sidecar.config.reader import ConfigError, Reader
from sidecar.config.response_headers import read_response_headers
from sidecar.config.values import (
    DevOptions,
    ForwardedForSettings,
    Listener,
    ProxyProtocolSettings,
    UnixListener,
    join_address,
    split_address,
)
from sidecar.hcl import Block

CLUSTER_PORT_OFFSET = 1  # the cluster port is the API port plus this, unless configured
MAX_REQUEST_SIZE_BYTES = 33554432
MAX_REQUEST_DURATION_S = 90.0
UNIX_ADDRESS = "/run/vault.sock"
OLD_TLS = {"tls10": "tls12", "tls11": "tls12"}
_BEHAVIORS = ("use_always", "allow_authorized", "deny_unauthorized")
_MODE = re.compile(r"0?[0-7]{3}", re.ASCII)


def read_listeners(top: Reader, dev: DevOptions | None) -> tuple[tuple[Listener, ...], tuple[UnixListener, ...]]:
    """Every ``listener``, TCP and Unix apart; ``-dev`` puts its own before them."""
    listeners: list[Listener] = []
    unix: list[UnixListener] = []
    duration_s = top.duration_s("default_max_request_duration", MAX_REQUEST_DURATION_S, minimum=1.0)
    if dev is not None:
        address = _address(dev.listen_address)
        if address is None:
            raise ConfigError("-dev-listen-address must be host:port")
        host, port = address
        listeners.append(
            Listener(
                join_address(host, port),
                _next_port(host, port),
                tls_disable=not dev.tls_cert_file,
                tls_cert_file=dev.tls_cert_file,
                tls_key_file=dev.tls_key_file,
                max_request_duration_s=duration_s,
            )
        )
    for stanza in top.blocks("listener"):
        place = f"{stanza.body.filename}:{stanza.line}"
        reader = top.inner(stanza)
        if _kind(stanza, place) == "unix":
            unix.append(_unix(reader, duration_s))
            reader.finish()
            continue
        listener = _listener(reader, duration_s)
        reader.finish()
        _check_listener(listener, reader, place)
        listeners.append(listener)
    addresses = [listener.address for listener in listeners if not listener.address.endswith(":0")]
    addresses += [listener.address for listener in unix]
    if len(set(addresses)) != len(addresses):
        raise ConfigError("two listeners have the same address")
    if unix and not listeners:
        raise ConfigError('a listener "unix" needs a listener "tcp" beside it, whose cluster port other nodes dial')
    return tuple(listeners), tuple(unix)


def _kind(stanza: Block, place: str) -> str:
    if len(stanza.labels) != 1:
        raise ConfigError(f'{place}: expected listener "tcp" {{...}}')
    if stanza.labels[0] not in ("tcp", "unix"):
        raise ConfigError(f'{place}: listener "{stanza.labels[0]}" is not available; there are "tcp" and "unix"')
    return stanza.labels[0]


def _listener(reader: Reader, duration_s: float) -> Listener:
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
        tls_min_version=reader.text_or_newer("tls_min_version", "tls12", ("tls12", "tls13"), OLD_TLS),
        tls_max_version=reader.text("tls_max_version", "tls13", ("tls12", "tls13")),
        forwarded_for=_forwarded_for(reader),
        proxy_protocol=_proxy_protocol(reader),
        **_rules(reader, duration_s),
    )
    reader.no_effect(ineffective.IN_TCP_LISTENER)
    if listener.tls_min_version > listener.tls_max_version:
        raise reader.error("tls_max_version", "is below tls_min_version")
    return listener


def _unix(reader: Reader, duration_s: float) -> UnixListener:
    mode = reader.text("socket_mode")
    if mode and not _MODE.fullmatch(mode):
        raise reader.error("socket_mode", 'must be an octal mode, as "660"')
    address = reader.text("address", UNIX_ADDRESS)
    if not address.startswith("/"):
        raise reader.error("address", "must be an absolute path")
    reader.no_effect(ineffective.IN_UNIX_LISTENER)
    return UnixListener(
        address,
        socket_mode=int(mode, 8) if mode else None,
        socket_user=reader.text("socket_user"),
        socket_group=reader.text("socket_group"),
        **_rules(reader, duration_s),
    )


def _rules(reader: Reader, duration_s: float) -> dict[str, Any]:
    """What every kind of listener is told about requests: the fields of RequestRules."""
    reader.no_effect(ineffective.IN_LISTENER)
    reader.not_available(chroot_namespace="there are no namespaces")
    profiles, in_flight = _profiling(reader)
    return {
        # 0 is Vault's word for the default.
        "max_request_size_bytes": reader.size_bytes("max_request_size", MAX_REQUEST_SIZE_BYTES)
        or MAX_REQUEST_SIZE_BYTES,
        "max_request_duration_s": reader.duration_s("max_request_duration", duration_s, minimum=1.0),
        "http_read_header_timeout_s": reader.duration_s("http_read_header_timeout", 10.0),
        "http_read_timeout_s": reader.duration_s("http_read_timeout", 30.0),
        "http_write_timeout_s": reader.duration_s("http_write_timeout", 60.0),
        "http_idle_timeout_s": reader.duration_s("http_idle_timeout", 300.0),
        "require_request_header": reader.boolean("require_request_header"),
        "unauthenticated_metrics_access": _metrics_access(reader),
        "unauthenticated_pprof_access": profiles,
        "unauthenticated_in_flight_request_access": in_flight,
        "redact_addresses": reader.boolean("redact_addresses"),
        "redact_cluster_name": reader.boolean("redact_cluster_name"),
        "redact_version": reader.boolean("redact_version"),
        "response_headers": read_response_headers(reader),
    }


def _proxy_protocol(reader: Reader) -> ProxyProtocolSettings | None:
    """Only ``proxy_protocol_behavior`` turns the header on."""
    addresses = _networks(reader, "proxy_protocol_authorized_addrs")
    behavior = reader.text("proxy_protocol_behavior", "", _BEHAVIORS)
    if not behavior:
        if addresses:
            raise reader.error("proxy_protocol_authorized_addrs", 'needs "proxy_protocol_behavior" beside it')
        return None
    if behavior != "use_always" and not addresses:
        raise reader.error("proxy_protocol_behavior", f'"{behavior}" needs "proxy_protocol_authorized_addrs"')
    if behavior == "use_always":
        reader.warn(
            f'{reader.place("proxy_protocol_behavior")}: with "use_always" everybody who can connect may claim any '
            "address; let nobody but the proxy reach this port"
        )
    return ProxyProtocolSettings(behavior, addresses)


def _forwarded_for(reader: Reader) -> ForwardedForSettings | None:
    """Only ``x_forwarded_for_authorized_addrs`` turns the header on."""
    addresses = _networks(reader, "x_forwarded_for_authorized_addrs")
    if not addresses:
        reader.no_effect(ineffective.WITHOUT_FORWARDED_FOR)
        return None
    return ForwardedForSettings(
        addresses,
        hop_skips=reader.integer("x_forwarded_for_hop_skips", 0),
        reject_not_authorized=reader.boolean("x_forwarded_for_reject_not_authorized", True),
        reject_not_present=reader.boolean("x_forwarded_for_reject_not_present", True),
    )


def _networks(reader: Reader, name: str) -> tuple[str, ...]:
    addresses = reader.texts(name)
    for text in addresses:
        try:
            ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise reader.error(name, "must hold addresses and networks only") from None
    return addresses


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


def _profiling(listener: Reader) -> tuple[bool, bool]:
    """Whether profiles, and requests in flight, are shown to anybody. The second also by its older spelling."""
    profiles = in_flight = False
    stanza = listener.block("profiling", labels=0)
    if stanza is not None:
        reader = listener.inner(stanza)
        profiles = reader.boolean("unauthenticated_pprof_access")
        in_flight = reader.boolean("unauthenticated_in_flight_request_access")
        reader.finish()
    older = listener.block("inflight_requests_logging", labels=0)
    if older is not None:
        reader = listener.inner(older)
        in_flight = reader.boolean("unauthenticated_in_flight_requests_access", in_flight)
        reader.finish()
    return profiles, in_flight


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
