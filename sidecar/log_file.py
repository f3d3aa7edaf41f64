"""``log_file``: the server's log in a file instead of standard error, rotated by age and size.

The file takes the place of descriptor 2, so that whatever is written there goes to it: lines of the log, warnings of
libraries, the stacks of SIGUSR2, the interpreter's last words. Rotation is Vault's: the file is renamed to
``NAME-<Unix nanoseconds>.EXT`` and begun anew, and of the renamed ones so many are kept.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from sidecar.config import LogFileSettings

DEFAULT_NAME = "outrider.log"
_RETRY_S = 60.0


class LogFile:
    """The file of one process. Not thread-safe: :class:`LogFileHandler` calls it under its lock."""

    def __init__(self, settings: LogFileSettings) -> None:
        given = settings.path
        self.path = Path(given, DEFAULT_NAME) if given.endswith("/") or os.path.isdir(given) else Path(given)
        self._settings = settings
        self._opened_s = time.monotonic()
        self._not_before_s = 0.0

    def open(self) -> None:
        """Let standard error be the file, made for the owner alone where there is none. Raises OSError."""
        log = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            sys.stderr.flush()
            os.dup2(log, sys.stderr.fileno())
        finally:
            os.close(log)
        self._opened_s = time.monotonic()

    def rotate_where_due(self) -> str:
        """Begin a new file where this one is old or large enough. What stood in the way, else ``""``: then the file is
        written to as before, and it is tried again a minute later."""
        now_s = time.monotonic()
        if now_s < self._not_before_s or not self._due(now_s):
            return ""
        try:
            self._rotate()
        except OSError as error:
            self._not_before_s = now_s + _RETRY_S
            return f"log_file: cannot rotate {self.path}: {error.strerror}; tried again in {_RETRY_S:g} s"
        return ""

    def _due(self, now_s: float) -> bool:
        settings = self._settings
        if now_s - self._opened_s >= settings.rotate_duration_s:
            return True
        return settings.rotate_bytes > 0 and os.fstat(sys.stderr.fileno()).st_size >= settings.rotate_bytes

    def _rotate(self) -> None:
        # Where somebody has moved the file away already there is nothing to rename, only a new one to begin.
        with suppress(FileNotFoundError):
            self.path.rename(self.path.with_name(f"{self._stem}-{time.time_ns()}{self._suffix}"))
        self.open()
        self._prune()

    def _prune(self) -> None:
        kept = self._settings.rotate_max_files
        if kept == 0:
            return
        pattern = re.compile(rf"{re.escape(self._stem)}-[0-9]{{19}}{re.escape(self._suffix)}", re.ASCII)
        older = sorted(name for name in os.listdir(self.path.parent) if pattern.fullmatch(name))
        for name in older[: max(len(older) - max(kept, 0), 0)]:
            with suppress(FileNotFoundError):
                self.path.with_name(name).unlink()

    @property
    def _suffix(self) -> str:
        return self.path.suffix or ".log"

    @property
    def _stem(self) -> str:
        return self.path.name.removesuffix(self.path.suffix)


class LogFileHandler(logging.StreamHandler[TextIO]):
    """Writes records to standard error, which is ``file``, and has it rotated between two of them."""

    def __init__(self, file: LogFile) -> None:
        super().__init__(sys.stderr)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        problem = self._file.rotate_where_due()
        super().emit(record)
        if problem:
            super().emit(logging.LogRecord("core", logging.ERROR, __file__, 0, problem, None, None))

    def reopen(self) -> None:
        """Let go of the file and open it by its name again, for whoever has moved it away. Raises OSError."""
        self.acquire()
        try:
            self._file.open()
        finally:
            self.release()
