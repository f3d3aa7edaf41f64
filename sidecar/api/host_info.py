"""What ``sys/host-info`` tells of the machine, from ``/proc`` and the standard library. The readers are pure: text of a
file in, values out; a machine without ``/proc`` gives less, never an error."""

from __future__ import annotations

import os
import platform
import socket
import time
from pathlib import Path
from typing import Any

from plugin_api.formats import format_time

PROC = Path("/proc")
# Kernel interfaces that look like file systems and hold nothing.
_NO_DISKS = frozenset(
    {
        "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "fusectl",
        "hugetlbfs", "mqueue", "nsfs", "overlay", "proc", "pstore", "ramfs", "rpc_pipefs", "securityfs", "squashfs",
        "sysfs", "tmpfs", "tracefs",
    }
)  # fmt: skip
_TIMES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guestNice")


def host_info(proc: Path = PROC) -> dict[str, Any]:
    """Everything at this moment. Reads files and asks file systems: to be called in a thread."""
    return {
        "timestamp": format_time(time.time()),
        "cpu": cpus(_text(proc / "cpuinfo")),
        "cpu_times": cpu_times(_text(proc / "stat"), _ticks_per_s()),
        "disk": [usage for point in disks(_text(proc / "self" / "mounts")) if (usage := disk_usage(*point))],
        "host": host(_text(proc / "stat"), _text(proc / "uptime")),
        "memory": memory(_text(proc / "meminfo")),
    }


def cpus(cpuinfo: str) -> list[dict[str, Any]]:
    """One entry a processor, from ``/proc/cpuinfo``."""
    found = []
    for block in cpuinfo.split("\n\n"):
        fields = {
            name.strip(): value.strip() for name, _, value in (line.partition(":") for line in block.splitlines())
        }
        if "processor" not in fields:
            continue
        found.append(
            {
                "cpu": _integer(fields["processor"]),
                "vendorId": fields.get("vendor_id", ""),
                "family": fields.get("cpu family", ""),
                "model": fields.get("model", ""),
                "stepping": _integer(fields.get("stepping", "")),
                "physicalId": fields.get("physical id", ""),
                "coreId": fields.get("core id", ""),
                "cores": _integer(fields.get("cpu cores", "1")),
                "modelName": fields.get("model name", ""),
                "mhz": _number(fields.get("cpu MHz", "")),
                "cacheSize": _integer(fields.get("cache size", "").removesuffix("KB").strip()),
                "flags": fields.get("flags", "").split(),
                "microcode": fields.get("microcode", ""),
            }
        )
    return found


def cpu_times(stat: str, ticks_per_s: float) -> list[dict[str, Any]]:
    """Seconds each processor spent in each state, from ``/proc/stat``."""
    found = []
    for line in stat.splitlines():
        name, *numbers = line.split()
        if name.startswith("cpu") and name != "cpu":
            seconds = (_number(number) / ticks_per_s for number in numbers)
            found.append({"cpu": name, **dict(zip(_TIMES, seconds, strict=False))})
    return found


def disks(mounts: str) -> list[tuple[str, str]]:
    """(mount point, file system type) of what may hold data, each device once, from ``/proc/self/mounts``."""
    found: dict[str, tuple[str, str]] = {}
    for line in mounts.splitlines():
        parts = line.split(" ")
        if len(parts) >= 3 and parts[2] not in _NO_DISKS:
            point = parts[1].encode().decode("unicode_escape") if "\\" in parts[1] else parts[1]
            found.setdefault(parts[0], (point, parts[2]))
    return list(found.values())


def disk_usage(point: str, kind: str) -> dict[str, Any] | None:
    """Bytes and inodes of one file system; None where it cannot be asked."""
    try:
        stat = os.statvfs(point)
    except OSError:
        return None
    total, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    used = total - stat.f_bfree * stat.f_frsize
    inodes_used = stat.f_files - stat.f_ffree
    return {
        "path": point,
        "fstype": kind,
        "total": total,
        "free": free,
        "used": used,
        "usedPercent": _percent(used, used + free),
        "inodesTotal": stat.f_files,
        "inodesUsed": inodes_used,
        "inodesFree": stat.f_ffree,
        "inodesUsedPercent": _percent(inodes_used, stat.f_files),
    }


def memory(meminfo: str) -> dict[str, Any]:
    """Bytes, from ``/proc/meminfo``."""
    kib = {}
    for line in meminfo.splitlines():
        name, _, rest = line.partition(":")
        kib[name] = _integer(rest.split()[0] if rest.split() else "")
    total, available = kib.get("MemTotal", 0), kib.get("MemAvailable", 0)
    names = {
        "total": "MemTotal",
        "available": "MemAvailable",
        "free": "MemFree",
        "active": "Active",
        "inactive": "Inactive",
        "buffers": "Buffers",
        "cached": "Cached",
        "shared": "Shmem",
        "slab": "Slab",
        "dirty": "Dirty",
        "swaptotal": "SwapTotal",
        "swapfree": "SwapFree",
    }
    found: dict[str, Any] = {name: kib.get(field, 0) * 1024 for name, field in names.items()}
    used = max(total - available, 0)
    return found | {"used": used * 1024, "usedPercent": _percent(used, total)}


def host(stat: str, uptime: str) -> dict[str, Any]:
    """Name, age and system of the machine."""
    boot_s = next((_integer(line.split()[1]) for line in stat.splitlines() if line.startswith("btime ")), 0)
    names = platform.uname()
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    return {
        "hostname": socket.gethostname(),
        "uptime": int(_number(uptime.split()[0])) if uptime.split() else 0,
        "bootTime": boot_s,
        "procs": sum(entry.name.isdigit() for entry in os.scandir(PROC)) if PROC.is_dir() else 0,
        "os": names.system.lower(),
        "platform": release.get("ID", ""),
        "platformFamily": release.get("ID_LIKE", release.get("ID", "")),
        "platformVersion": release.get("VERSION_ID", ""),
        "kernelVersion": names.release,
        "kernelArch": names.machine,
    }


def _ticks_per_s() -> float:
    return float(os.sysconf("SC_CLK_TCK")) if hasattr(os, "sysconf") else 100.0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _integer(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _percent(part: float, whole: float) -> float:
    return round(100 * part / whole, 2) if whole else 0.0
