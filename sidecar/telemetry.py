"""Logs in the shape operators of this field know: UTC milliseconds, bracketed level, dotted logger name, message.

A message is one line whatever it holds: control characters are escaped, so that nothing a client sent forges a line.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

_LEVELS = {"CRITICAL": "ERROR", "WARNING": "WARN"}
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), 127)} | {0x2028: "\\u2028", 0x2029: "\\u2029"}
_ESCAPES[ord("\n")] = "\\n"
TRACE = 5


def _stamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{int(record.msecs):03d}Z"


class TextFormatter(logging.Formatter):
    """``2026-11-21T10:10:31.450Z [INFO]  core: message``."""

    def format(self, record: logging.LogRecord) -> str:
        level = _LEVELS.get(record.levelname, record.levelname)
        bracketed = f"[{level}]"
        lines = [f"{_stamp(record)} {bracketed:7} {record.name}: {record.getMessage().translate(_ESCAPES)}"]
        if record.exc_info:
            # Indented, so that no line of a trace can pass for a record of its own.
            lines += ["    " + line.translate(_ESCAPES) for line in self.formatException(record.exc_info).splitlines()]
        return "\n".join(lines)


class JSONFormatter(logging.Formatter):
    """One object a line with ``@level @message @module @timestamp``."""

    def format(self, record: logging.LogRecord) -> str:
        level = _LEVELS.get(record.levelname, record.levelname).lower()
        entry = {
            "@level": level,
            "@message": record.getMessage(),
            "@module": record.name,
            "@timestamp": _stamp(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure_logging(level: str, log_format: str, handler: logging.Handler | None = None) -> None:
    """Send everything at ``level`` (trace, debug, info, warn, error) and above to ``handler``, else to standard
    error."""
    logging.addLevelName(TRACE, "TRACE")
    handler = handler or logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(level)
    # Its access log repeats client paths, and its errors repeat what our own front already reports with a request id.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)


def set_level(level: str) -> None:
    """Change the level of a running process; SIGHUP uses it."""
    numbers = {"trace": TRACE, "debug": 10, "info": 20, "warn": 30, "warning": 30, "error": 40, "err": 40}
    logging.getLogger().setLevel(numbers[level.lower()])
