"""``outrider server``: the only command that loads the server."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from sidecar.cli.command import EXIT_LOCAL, Call, Command
from sidecar.cli.flags import Flag, UsageError

if TYPE_CHECKING:
    import socket

    from sidecar.config import ServerConfig

FORMATS = ("standard", "json")
LOG_NAME = "outrider.log"
LEVELS = ("trace", "debug", "info", "warn", "error")


def _log_to(path: str) -> None:
    """Put a file, for the owner alone, in the place of standard error: whatever is written there goes to it."""
    if path.endswith("/") or os.path.isdir(path):
        path = os.path.join(path, LOG_NAME)
    try:
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"log file: cannot open {path}: {error.strerror}") from error
    sys.stderr.flush()
    os.dup2(log, sys.stderr.fileno())
    os.close(log)


def run(call: Call) -> int:
    from sidecar import config

    call.at_most(0)
    paths = call.values.texts("config")
    dev: config.DevOptions | None = None
    try:
        if call.values.flag("dev"):
            dev = config.DevOptions(
                root_token_id=call.option("dev-root-token-id", "DEV_ROOT_TOKEN_ID") or None,
                listen_address=call.option("dev-listen-address", "DEV_LISTEN_ADDRESS", "127.0.0.1:8200"),
                kv_version="" if call.values.flag("dev-no-kv") else "1" if call.values.flag("dev-kv-v1") else "2",
            )
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
    if "log-level" in call.values:
        level = config.log_level(call.values.text("log-level").lower())
        if level not in LEVELS:
            raise UsageError(f"-log-level must be one of {', '.join(LEVELS)}")
        settings = replace(settings, log_level=level)
    if "log-format" in call.values:
        form = call.values.text("log-format").lower()
        if form not in FORMATS:
            raise UsageError(f"-log-format must be one of {', '.join(FORMATS)}")
        settings = replace(settings, log_format=form)
    if log_file := call.values.text("log-file") or settings.log_file:
        _log_to(log_file)
    try:
        opened = _open_sockets(settings)
    except OSError as error:
        call.complain(f"Error initializing listener: {error}")
        return EXIT_LOCAL
    from sidecar.app import run_server

    return run_server(settings, dev, tuple(paths), opened)


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
        Flag("dev-no-store-token", "Accepted for compatibility: the token is never stored.", "bool"),
        Flag("dev-kv-v1", "Mount version 1 of the KV engine at secret/ in -dev.", "bool"),
        Flag("dev-no-kv", "Mount nothing at secret/ in -dev.", "bool"),
        Flag("log-format", "standard or json. VAULT_LOG_FORMAT.", default="standard"),
        Flag("log-file", "Append the log to this file, or to outrider.log in this directory, not to standard error."),
        Flag("exit-on-core-shutdown", "Accepted: a node that cannot go on ends in any case.", "bool"),
        Flag("disable-gated-logs", "Accepted: no line of the log is held back.", "bool"),
    ),
    http=False,
    formats=False,
)
