"""What may be said about a device, and the device made from it.

Options come over the API and by replication; what they may ask of this machine is limited by :class:`LocalRules`, which
come from the server's own configuration only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from plugin_api.errors import InvalidRequest
from plugin_api.formats import parse_duration
from plugin_api.framework import parse_bool
from sidecar.core.audit.entries import Formatting
from sidecar.core.audit.file_sink import MODE, FileSink, StandardOutput
from sidecar.core.audit.hashing import Hasher
from sidecar.core.audit.sink import DiscardSink, Sink, SinkError
from sidecar.core.audit.socket_sink import TCP, TYPES, UNIX, SocketSink, split_host
from sidecar.core.audit.syslog_sink import FACILITIES, SyslogSink

Options = Mapping[str, str]

FILE, SOCKET, SYSLOG = "file", "socket", "syslog"
WRITE_TIMEOUT_MAX_S = 60.0
_ENTERPRISE = ("exclude", "fallback", "filter")
_PREFIX_CHARS_MAX = 256
_EXECUTE = 0o111


@dataclass(frozen=True, slots=True)
class LocalRules:
    """What this server's configuration allows. ``prefixing``: lines may begin with a text of the device's choice.
    ``directories``: files must be below one of them; none at all means anywhere. ``timeout_s``: how long a request
    waits for its entry to be written."""

    prefixing: bool = False
    directories: tuple[str, ...] = ()
    timeout_s: float = 2.0


def check_type(type_name: str) -> None:
    """Raises InvalidRequest for a type of device that does not exist."""
    if type_name not in _MAKERS:
        raise InvalidRequest(f'unknown backend type: "{type_name}"')


def formatting(options: Options, salt: bytes, rules: LocalRules) -> Formatting:
    """How the device writes. Raises InvalidRequest."""
    if options.get("format", "json") != "json":
        raise InvalidRequest('unknown format type: only "json" is available')
    for name in _ENTERPRISE:
        if options.get(name):
            raise InvalidRequest(f'the option "{name}" is not available')
    return Formatting(
        Hasher(salt, numbers=_boolean(options, "hmac_numbers")),
        raw=_boolean(options, "log_raw"),
        hmac_accessor=_boolean(options, "hmac_accessor", default=True),
        elide_lists=_boolean(options, "elide_list_responses"),
        prefix=_prefix(options, rules),
    )


def make_sink(type_name: str, options: Options, rules: LocalRules) -> Sink:
    """Where the device writes; nothing is opened yet. Raises InvalidRequest."""
    check_type(type_name)
    return _MAKERS[type_name](options, rules)


def _prefix(options: Options, rules: LocalRules) -> str:
    prefix = options.get("prefix", "")
    if prefix and not rules.prefixing:
        raise InvalidRequest("audit log prefixing is not allowed: set allow_audit_log_prefixing in the configuration")
    if len(prefix) > _PREFIX_CHARS_MAX or not prefix.isascii() or not prefix.isprintable():
        raise InvalidRequest(f"the prefix must be printable ASCII of at most {_PREFIX_CHARS_MAX} characters")
    return prefix


def _file(options: Options, rules: LocalRules) -> Sink:
    path = options.get("file_path") or options.get("path", "")
    if not path:
        raise InvalidRequest("file_path is required")
    mode = _mode(options)
    if path.lower() == "discard":
        return DiscardSink()
    if path.lower() == "stdout":
        return StandardOutput()
    if not path.isprintable() or path.endswith("/"):
        raise InvalidRequest("file_path must be a printable path of a file")
    prefix = options.get("prefix", "")
    return FileSink(path, mode=mode, prefix=prefix, directories=rules.directories, timeout_s=rules.timeout_s)


def _mode(options: Options) -> int | None:
    text = options.get("mode", "")
    if not text:
        return MODE
    try:
        mode = int(text, 8)
    except ValueError:
        raise InvalidRequest("mode must be an octal file mode, as 0600") from None
    if not 0 <= mode <= 0o777:
        raise InvalidRequest("mode must be an octal file mode, as 0600")
    if mode & _EXECUTE:
        raise InvalidRequest("mode must not make the file executable")
    return mode or None


def _socket(options: Options, rules: LocalRules) -> Sink:
    address = options.get("address", "")
    if not address:
        raise InvalidRequest("address is required")
    kind = options.get("socket_type", "") or TCP
    if kind not in TYPES:
        raise InvalidRequest(f"socket_type must be one of {', '.join(TYPES)}")
    if kind != UNIX:
        try:
            split_host(address)
        except SinkError as error:
            raise InvalidRequest(str(error)) from None
    try:
        timeout_s = parse_duration(options.get("write_timeout", "2s"))
    except ValueError:
        raise InvalidRequest("write_timeout must be a duration, as 2s") from None
    if not 0 < timeout_s <= WRITE_TIMEOUT_MAX_S:
        raise InvalidRequest(f"write_timeout must be more than 0 and at most {WRITE_TIMEOUT_MAX_S:g}s")
    return SocketSink(kind, address, timeout_s=timeout_s)


def _syslog(options: Options, rules: LocalRules) -> Sink:
    facility = (options.get("facility", "") or "AUTH").upper()
    if facility not in FACILITIES:
        raise InvalidRequest("facility must be the name of a syslog facility, as AUTH or LOCAL7")
    tag = options.get("tag", "") or "vault"
    if not tag.isascii() or not tag.isprintable() or len(tag) > 32 or any(mark in tag for mark in " :[]"):
        raise InvalidRequest("tag must be a short printable word")
    return SyslogSink(facility, tag, timeout_s=rules.timeout_s)


_MAKERS: Mapping[str, Callable[[Options, LocalRules], Sink]] = {FILE: _file, SOCKET: _socket, SYSLOG: _syslog}


def _boolean(options: Options, name: str, *, default: bool = False) -> bool:
    text = options.get(name, "")
    try:
        return parse_bool(text) if text else default
    except ValueError:
        raise InvalidRequest(f"{name} must be a boolean") from None
