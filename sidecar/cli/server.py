"""``outrider server``: the only command that loads the server."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from sidecar.cli.command import EXIT_LOCAL, Call, Command
from sidecar.cli.flags import Flag, UsageError

if TYPE_CHECKING:
    import socket

    from sidecar.config import DevOptions, LogFileSettings, ServerConfig

FORMATS = ("standard", "json")
LEVELS = ("trace", "debug", "info", "warn", "error")
_IMPLY_DEV = ("dev", "dev-tls", "dev-kv-v1", "dev-no-kv")


def run(call: Call) -> int:
    """Read the configuration, open what must be open before the server is loaded, and run it. What ``-dev-tls`` writes
    is removed when the server has ended."""
    from sidecar import config

    call.at_most(0)
    paths = call.values.texts("config")
    with ExitStack() as ending:
        try:
            dev = _dev_options(call, ending)
            if dev is not None:
                settings = config.load_dev(dev, paths, call.environ)
            elif not paths:
                raise UsageError("-config is needed (or -dev)")
            else:
                settings = config.load(paths, call.environ)
        except config.ConfigError as error:
            call.complain(f"Error loading configuration: {error}")
            return EXIT_LOCAL
        for warning in settings.warnings:
            call.complain(f"WARNING! {warning}")
        settings = _with_log_flags(call, settings)
        if settings.log_file.path:
            _log_to(settings.log_file)
        try:
            opened = _open_sockets(settings)
        except OSError as error:
            call.complain(f"Error initializing listener: {error}")
            return EXIT_LOCAL
        from sidecar.app import run_server

        return run_server(settings, dev, tuple(paths), opened)


def _dev_options(call: Call, ending: ExitStack) -> DevOptions | None:
    """What ``-dev`` was told, None without it; any flag that only it can mean turns it on, as in Vault."""
    from sidecar import config

    values = call.values
    if not any(values.flag(name) for name in _IMPLY_DEV):
        return None
    options = config.DevOptions(
        root_token_id=call.option("dev-root-token-id", "DEV_ROOT_TOKEN_ID") or None,
        listen_address=call.option("dev-listen-address", "DEV_LISTEN_ADDRESS", "127.0.0.1:8200"),
        kv_version="" if values.flag("dev-no-kv") else "1" if values.flag("dev-kv-v1") else "2",
    )
    if not values.flag("dev-tls"):
        return options
    from sidecar.dev_tls import dev_certificates

    names = [name.strip() for given in values.texts("dev-tls-san") for name in given.split(",") if name.strip()]
    with suppress(ValueError):  # what is no address is refused with the configuration
        names.append(config.split_address(options.listen_address)[0])
    try:
        made = ending.enter_context(dev_certificates(values.text("dev-tls-cert-dir"), names))
    except OSError as error:
        raise UsageError(f"-dev-tls: cannot write {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"-dev-tls-san: {error}") from error
    return replace(options, tls_ca_file=made.ca, tls_cert_file=made.certificate, tls_key_file=made.key)


def _with_log_flags(call: Call, settings: ServerConfig) -> ServerConfig:
    """The settings of the log as the flags have them. Raises UsageError."""
    from sidecar import config

    values = call.values
    if "log-level" in values:
        level = config.log_level(values.text("log-level").lower())
        if level not in LEVELS:
            raise UsageError(f"-log-level must be one of {', '.join(LEVELS)}")
        settings = replace(settings, log_level=level)
    if "log-format" in values:
        form = values.text("log-format").lower()
        if form not in FORMATS:
            raise UsageError(f"-log-format must be one of {', '.join(FORMATS)}")
        settings = replace(settings, log_format=form)
    file = settings.log_file
    if "log-rotate-duration" in values:
        try:
            duration_s = config.parse_duration_s(values.text("log-rotate-duration"))
        except ValueError:
            raise UsageError('-log-rotate-duration must be a duration, as "24h"') from None
        file = replace(file, rotate_duration_s=duration_s or config.LogFileSettings().rotate_duration_s)
    file = replace(
        file,
        path=values.text("log-file") or file.path,
        rotate_bytes=values.integer("log-rotate-bytes", file.rotate_bytes),
        rotate_max_files=max(values.integer("log-rotate-max-files", file.rotate_max_files), -1),
    )
    return replace(settings, log_file=file)


def _log_to(settings: LogFileSettings) -> None:
    """Put the log file in the place of standard error: whatever is written there goes to it."""
    from sidecar.log_file import LogFile

    file = LogFile(settings)
    try:
        file.open()
    except OSError as error:
        raise UsageError(f"log file: cannot open {file.path}: {error.strerror}") from error


def _open_sockets(settings: ServerConfig) -> list[list[socket.socket]]:
    """The API listeners' sockets, before the second that loading the server takes. Raises OSError."""
    from sidecar.api.sockets import listening_sockets
    from sidecar.config import split_address

    return [listening_sockets(*split_address(listener.address)) for listener in settings.listeners]


SERVER = Command(
    "server [flags]",
    "Run a node in the foreground. SIGINT or SIGTERM end it.",
    run,
    (
        Flag("config", "HCL or JSON file, or a directory of such; may be repeated, later ones win.", "texts"),
        Flag("log-level", "trace, debug, info, warn or error. VAULT_LOG_LEVEL.", default="info"),
        Flag("dev", "In memory, initialised and unsealed, for trying things out. Never for real data.", "bool"),
        Flag("dev-root-token-id", "The root token of -dev. VAULT_DEV_ROOT_TOKEN_ID."),
        Flag("dev-listen-address", "Where -dev listens. VAULT_DEV_LISTEN_ADDRESS.", default="127.0.0.1:8200"),
        Flag("dev-tls", "-dev with TLS: a CA and a certificate are made, and removed at the end.", "bool"),
        Flag(
            "dev-tls-cert-dir", "Where -dev-tls writes vault-ca.pem, vault-cert.pem and vault-key.pem. A new directory."
        ),
        Flag("dev-tls-san", "A DNS name or IP address for the certificate of -dev-tls; may be repeated.", "texts"),
        Flag("dev-no-store-token", "Accepted for compatibility: the token is never stored.", "bool"),
        Flag("dev-kv-v1", "Mount version 1 of the KV engine at secret/ in -dev.", "bool"),
        Flag("dev-no-kv", "Mount nothing at secret/ in -dev.", "bool"),
        Flag("log-format", "standard or json. VAULT_LOG_FORMAT.", default="standard"),
        Flag("log-file", "Append the log to this file, or to outrider.log in this directory, not to standard error."),
        Flag("log-rotate-duration", "Begin a new log file when this one is so old.", default="24h"),
        Flag("log-rotate-bytes", "Begin a new log file when this one is so large. 0 is no limit.", "int", "0"),
        Flag("log-rotate-max-files", "How many older log files are kept; 0 keeps all, -1 none.", "int", "0"),
        Flag("exit-on-core-shutdown", "Accepted: a node that cannot go on ends in any case.", "bool"),
        Flag("disable-gated-logs", "Accepted: no line of the log is held back.", "bool"),
    ),
    http=False,
    formats=False,
)
