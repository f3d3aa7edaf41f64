"""Lines appended to a file, a FIFO, a character device or standard output.

A file is never made or kept executable, and one that does not look like an audit log is not appended to: whoever may
enable a device must not thereby be able to write into programs, keys or configuration.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sidecar.core.audit.sink import SinkError

MODE = 0o600
_EXECUTE = 0o111
_DIRECTORY_MODE = 0o700
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


class FileSink:
    """Appends to ``path``. ``mode`` is set on the file whatever the umask, None leaves an existing file's mode.
    ``prefix`` is what the device's lines begin with. With ``directories`` the file must be below one of them, wherever
    links lead. A reader of a FIFO that takes nothing for ``timeout_s`` fails the write; a file on a disk that hangs
    blocks the thread for as long as the disk does."""

    def __init__(
        self,
        path: str,
        *,
        mode: int | None = MODE,
        prefix: str = "",
        directories: Sequence[str] = (),
        timeout_s: float,
    ) -> None:
        self._path = path
        self._mode = mode
        self._directories = directories
        self._begins_with = (b"{", prefix.encode() + b"{")
        self._timeout_s = timeout_s
        self._fd = -1
        self._regular = False
        self._rest = b""  # what is missing of a line that a FIFO took half of

    def write(self, lines: Sequence[bytes]) -> None:
        fd = self._ready()
        data = b"".join(lines)
        if self._regular:
            self._append(fd, data)
            return
        try:
            self._feed(fd, data)
        except OSError as error:
            if error.errno == errno.EPIPE:
                self.close()
            raise

    def reopen(self) -> None:
        self.close()
        self._ready()

    def close(self) -> None:
        fd, self._fd, self._rest = self._fd, -1, b""
        if fd >= 0:
            os.close(fd)

    def _ready(self) -> int:
        # Whoever reads a file that was removed? A renamed one (log rotation) is kept until it is reopened.
        if self._fd >= 0 and self._regular and os.fstat(self._fd).st_nlink == 0:
            self.close()
        if self._fd < 0:
            self._fd = self._open()
        return self._fd

    def _open(self) -> int:
        if self._directories and not _is_below(self._path, self._directories):
            raise SinkError("the path is outside the directories that the configuration allows for audit files")
        folder = os.path.dirname(os.path.abspath(self._path))
        if not os.path.isdir(folder):
            _make_directories(folder)
        fd = os.open(self._path, _FLAGS, MODE if self._mode is None else self._mode)
        try:
            self._check(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check(self, fd: int) -> None:
        found = os.fstat(fd)
        self._regular = stat.S_ISREG(found.st_mode)
        if not (self._regular or stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode)):
            raise SinkError("it is no file that lines can be appended to")
        if not self._regular:
            return
        if found.st_mode & _EXECUTE:
            raise SinkError("the file is executable")
        if found.st_size and not _beginning(self._path, max(map(len, self._begins_with))).startswith(self._begins_with):
            raise SinkError("the file exists and is no audit log")
        if self._mode is not None and stat.S_IMODE(found.st_mode) != self._mode:
            os.fchmod(fd, self._mode)

    def _append(self, fd: int, data: bytes) -> None:
        start, done = os.fstat(fd).st_size, 0
        view = memoryview(data)
        try:
            while done < len(view):
                done += os.write(fd, view[done:])
        except OSError:
            # A full disk takes a part: half a line would run into the next one.
            if done and os.fstat(fd).st_size == start + done:
                os.ftruncate(fd, start)
            raise

    def _feed(self, fd: int, data: bytes) -> None:
        data = self._rest + data
        done, deadline = 0, time.monotonic() + self._timeout_s
        ready = select.poll()
        ready.register(fd, select.POLLOUT)
        try:
            while done < len(data):
                try:
                    done += os.write(fd, data[done : done + select.PIPE_BUF])
                except BlockingIOError:
                    left_ms = (deadline - time.monotonic()) * 1000
                    if left_ms <= 0 or not ready.poll(left_ms):
                        raise SinkError("nothing reads what is written") from None
        finally:
            # The reader must not see half a line followed by another: the rest of a begun one comes first next time.
            line_end = data.find(b"\n", done) + 1
            begun = done > 0 and done < len(data) and data[done - 1 : done] != b"\n"
            self._rest = data[done:line_end] if begun else self._rest[done:]


class StandardOutput:
    """Lines on the process's standard output. Whether that blocks is up to who reads it."""

    def write(self, lines: Sequence[bytes]) -> None:
        data = memoryview(b"".join(lines))
        done = 0
        while done < len(data):
            done += os.write(1, data[done:])

    def reopen(self) -> None:
        sys.stdout.flush()

    def close(self) -> None:
        return


def _is_below(path: str, directories: Sequence[str]) -> bool:
    wanted = Path(os.path.realpath(path))
    return any(wanted.is_relative_to(os.path.realpath(allowed)) for allowed in directories)


def _make_directories(folder: str) -> None:
    """``folder`` and what is missing above it, open to nobody else."""
    parent = os.path.dirname(folder)
    if not os.path.isdir(parent):
        _make_directories(parent)
    try:
        os.mkdir(folder, _DIRECTORY_MODE)
    except FileExistsError:
        return


def _beginning(path: str, size: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.read(fd, size)
    finally:
        os.close(fd)
