"""What keeps the keys in this process's memory, and the files it makes, from other eyes. Linux; elsewhere it says what
it could not do.

Memory can reach a disk as a core dump, as swap, or be read by another process of the same user. None of this protects
from root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path

_PR_SET_DUMPABLE = 4
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4  # <sys/mman.h>, <asm-generic/mman.h>
_CAP_IPC_LOCK = 14
UMASK = 0o077


def protect_process(*, lock_memory: bool) -> list[str]:
    """Files only for the owner, no core dumps, no other process may attach; with ``lock_memory`` no page goes to swap.
    Returns what could not be done, for the operator."""
    os.umask(UMASK)
    missing = []
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as error:
        missing.append(f"core dumps cannot be limited ({error}): switch them off for this service")
    if not _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0):
        missing.append("this process cannot be made undumpable: whoever runs as its user can read its memory")
    if lock_memory and (problem := _lock_memory()):
        missing.append(problem)
    return missing


def _lock_memory() -> str:
    """Keep every page in memory from when it is first touched. Tried only where no limit applies: with one, a later
    allocation would fail and end the process."""
    if not may_lock_memory():
        return (
            "memory is not locked and keys may reach the swap: give the process CAP_IPC_LOCK or LimitMEMLOCK=infinity, "
            "or say disable_mlock = true where there is no swap or it is encrypted"
        )
    if not _call("mlockall", _MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        return "memory could not be locked although this process may: keys may reach the swap"
    return ""


def may_lock_memory() -> bool:
    """Whether :func:`protect_process` could lock memory here."""
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        return True
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "CapEff":
                return bool(int(value, 16) >> _CAP_IPC_LOCK & 1)
    return False


def _call(name: str, *arguments: int) -> bool:
    """Whether a call into the C library succeeded."""
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return False
    return bool(function(*arguments) == 0)
