"""Readers of /proc: samples in, values out; nothing there is no error."""

from pathlib import Path

from sidecar.api import host_info

CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Some CPU @ 2.00GHz
stepping\t: 8
cpu MHz\t\t: 2000.5
cache size\t: 32768 KB
physical id\t: 0
core id\t\t: 1
cpu cores\t: 2
flags\t\t: fpu aes

processor\t: 1
model name\t: Some CPU @ 2.00GHz

"""
STAT = "cpu  30 0 10 100 0 0 0 0 0 0\ncpu0 20 0 5 50 1 0 0 0 0 0\ncpu1 10 0 5 50 0 0 0 0 0 0\nbtime 1700000000\n"
MEMINFO = (
    "MemTotal:       1000 kB\nMemFree:         200 kB\nMemAvailable:    400 kB\nBuffers: 1 kB\nHugePages_Total: 0\n"
)
MOUNTS = (
    "proc /proc proc rw 0 0\n/dev/sda1 / ext4 rw 0 0\n/dev/sda1 /again ext4 rw 0 0\n"
    "/dev/sdb1 /with\\040space xfs rw 0 0\ntmpfs /run tmpfs rw 0 0\nbroken\n"
)


def test_processors() -> None:
    first, second = host_info.cpus(CPUINFO)
    assert (first["cpu"], first["modelName"], first["mhz"]) == (0, "Some CPU @ 2.00GHz", 2000.5)
    assert (first["cacheSize"], first["cores"], first["flags"]) == (32768, 2, ["fpu", "aes"])
    assert (second["cpu"], second["mhz"]) == (1, 0.0)
    one, two = host_info.cpu_times(STAT, 10.0)
    assert (one["cpu"], one["user"], one["system"], one["idle"], one["iowait"]) == ("cpu0", 2.0, 0.5, 5.0, 0.1)
    assert (two["cpu"], two["user"]) == ("cpu1", 1.0)


def test_memory_is_in_bytes() -> None:
    found = host_info.memory(MEMINFO)
    assert (found["total"], found["available"], found["used"]) == (1024000, 409600, 614400)
    assert (found["usedPercent"], found["buffers"], found["swaptotal"]) == (60.0, 1024, 0)


def test_disks_are_named_once_and_hold_data() -> None:
    assert host_info.disks(MOUNTS) == [("/", "ext4"), ("/with space", "xfs")]
    usage = host_info.disk_usage("/", "ext4")
    assert usage is not None
    assert usage["total"] >= usage["used"] > 0
    assert host_info.disk_usage("/does/not/exist", "ext4") is None


def test_a_machine_without_proc(tmp_path: Path) -> None:
    found = host_info.host_info(tmp_path)
    assert (found["cpu"], found["cpu_times"], found["disk"]) == ([], [], [])
    assert found["memory"]["total"] == 0
    assert found["host"]["hostname"]


def test_this_machine() -> None:
    found = host_info.host_info()
    assert set(found) == {"timestamp", "cpu", "cpu_times", "disk", "host", "memory"}
    if host_info.PROC.is_dir():
        assert len(found["cpu_times"]) >= 1
        assert found["memory"]["total"] > found["memory"]["used"] > 0
        assert found["host"]["uptime"] > 0
