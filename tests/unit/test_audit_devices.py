"""Devices against real files, FIFOs and sockets: order, bounds, and what happens when they do not work."""

import asyncio
import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sidecar.core.audit.broker import AuditBroker, AuditFailed
from sidecar.core.audit.device import Device
from sidecar.core.audit.entries import Formatting, Record, format_line
from sidecar.core.audit.file_sink import FileSink
from sidecar.core.audit.hashing import Hasher
from sidecar.core.audit.options import LocalRules
from sidecar.core.audit.sink import DiscardSink, Sink, SinkError
from sidecar.core.audit.socket_sink import SocketSink
from sidecar.core.audit.syslog_sink import SyslogSink
from sidecar.core.audit.table import AuditEntry
from sidecar.core.metrics import Metrics

HOW = Formatting(Hasher(b"salt"))
LINES = [b'{"n":1}\n', b'{"n":2}\n']


def record(number: int) -> Record:
    return Record(time="t", request={"id": str(number), "path": "p"})


class HungSink(DiscardSink):
    """Takes nothing until it is let go."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.entered = threading.Event()
        self.lines: list[bytes] = []

    def write(self, lines: Sequence[bytes]) -> None:
        self.entered.set()
        self.free.wait(60)
        self.lines.extend(lines)


class ListSink(DiscardSink):
    """Keeps lines, and fails while it is told to."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.wrong = ""

    def write(self, lines: Sequence[bytes]) -> None:
        if self.wrong:
            raise SinkError(self.wrong)
        self.lines.extend(lines)


# -- files


@contextlib.contextmanager
def file_sink(path: Path, **options: object) -> Iterator[FileSink]:
    sink = FileSink(str(path), timeout_s=0.1, **options)  # type: ignore[arg-type]  # passed on as it came
    try:
        yield sink
    finally:
        sink.close()


def test_a_file_is_made_0600_whatever_the_umask_and_its_directory_0700(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with file_sink(tmp_path / "new" / "deep" / "audit.log") as sink:
            sink.write(LINES)
        with file_sink(tmp_path / "group.log", mode=0o640) as sink:
            sink.write(LINES)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new" / "deep" / "audit.log").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "new" / "deep").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "group.log").stat().st_mode) == 0o640
    assert (tmp_path / "group.log").read_bytes() == b"".join(LINES)


def test_an_existing_audit_log_is_appended_to_and_gets_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    path.write_bytes(LINES[0])
    path.chmod(0o644)
    with file_sink(path, mode=None) as sink:
        sink.write(LINES[1:])
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with file_sink(path) as sink:
        sink.write(LINES[:1])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == LINES[0] + LINES[1] + LINES[0]


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [(b"", 0o700, "executable"), (b"#!/bin/sh\n", 0o600, "no audit log"), (b"ssh-rsa AAAA\n", 0o600, "no audit log")],
)
def test_programs_and_configuration_are_not_appended_to(tmp_path: Path, content: bytes, mode: int, why: str) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    path.chmod(mode)
    with file_sink(path) as sink, pytest.raises(SinkError, match=why):
        sink.write(LINES)
    assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_files_stay_below_the_directories_of_the_configuration(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    for path in (outside / "a.log", inside / ".." / "out" / "a.log", inside / "link" / "a.log"):
        with file_sink(path, directories=[str(inside)]) as sink, pytest.raises(SinkError, match="outside"):
            sink.write(LINES)
    with file_sink(inside / "a.log", directories=[str(inside)]) as sink:
        sink.write(LINES)
    assert list(outside.iterdir()) == []


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with file_sink(tmp_path) as sink, pytest.raises(OSError, match="directory"):
        sink.write(LINES)


def test_a_removed_file_is_made_again_and_a_renamed_one_is_kept_until_reopened(tmp_path: Path) -> None:
    path, moved = tmp_path / "audit.log", tmp_path / "audit.log.1"
    with file_sink(path) as sink:
        sink.write(LINES)
        path.unlink()
        sink.write(LINES[:1])
        assert path.read_bytes() == LINES[0]
        path.rename(moved)
        sink.write(LINES[1:])
        assert not path.exists()
        sink.reopen()
        sink.write(LINES[:1])
    assert moved.read_bytes() == b"".join(LINES)
    assert path.read_bytes() == LINES[0]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.log"
    real = os.write
    with file_sink(path) as sink:
        sink.write(LINES[:1])

        def half(fd: int, data: bytes) -> int:
            if len(data) < 5:
                raise OSError(28, "No space left on device")
            return real(fd, data[:5])

        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            sink.write(LINES[1:])
        monkeypatch.undo()
        assert path.read_bytes() == LINES[0]
        sink.write(LINES[1:])
    assert path.read_bytes() == b"".join(LINES)


def test_dev_full_fails() -> None:
    with file_sink(Path("/dev/full")) as sink, pytest.raises(OSError, match="No space"):
        sink.write(LINES)


def test_a_fifo_without_a_reader_fails_at_once_and_works_once_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with file_sink(path) as sink:
        with pytest.raises(OSError, match="No such device"):
            sink.write(LINES)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        sink.write(LINES)
        assert os.read(reader, 100) == b"".join(LINES)
        os.close(reader)
        with pytest.raises(OSError, match="Broken pipe"):
            sink.write(LINES)
        with pytest.raises(OSError, match="No such device"):
            sink.write(LINES)


def test_a_full_pipe_fails_within_its_time_and_goes_on_with_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    long = [json.dumps({"n": number, "fill": "x" * 5000}).encode() + b"\n" for number in range(100)]
    with file_sink(path) as sink:
        with pytest.raises(SinkError, match="nothing reads"):
            sink.write(long)
        got = bytearray()
        while True:
            try:
                got += os.read(reader, 65536)
            except BlockingIOError:
                break
        sink.write(LINES)
        got += os.read(reader, 65536)
    os.close(reader)
    numbers = [json.loads(line)["n"] for line in got.splitlines()]
    assert numbers == [*range(len(numbers) - 2), 1, 2]


# -- sockets and syslog


@contextlib.contextmanager
def listening(family: int, kind: int, address: object) -> Iterator[socket.socket]:
    with socket.socket(family, kind) as server:
        server.bind(address)  # type: ignore[arg-type]  # a path or a pair, as the family wants it
        server.settimeout(5)
        if kind == socket.SOCK_STREAM:
            server.listen()
        yield server


def test_tcp_notices_that_the_other_side_went_and_connects_again() -> None:
    with listening(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)) as server:
        sink = SocketSink("tcp", f"127.0.0.1:{server.getsockname()[1]}", timeout_s=1)
        sink.write(LINES)
        first, _ = server.accept()
        with first:
            assert first.recv(100) == b"".join(LINES)
        sink.write(LINES[:1])
        second, _ = server.accept()
        with second:
            assert second.recv(100) == LINES[0]
        sink.close()
    with pytest.raises(OSError, match="refused"):
        sink.write(LINES)


def test_a_tcp_receiver_that_takes_nothing_is_given_up_in_time() -> None:
    with listening(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)) as server:
        sink = SocketSink("tcp", f"127.0.0.1:{server.getsockname()[1]}", timeout_s=0.1)
        with pytest.raises(TimeoutError):
            sink.write([b"x" * 32 * 2**20 + b"\n"])
        sink.close()


def test_udp_sends_one_datagram_a_line() -> None:
    with listening(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)) as server:
        sink = SocketSink("udp", f"127.0.0.1:{server.getsockname()[1]}", timeout_s=1)
        sink.write(LINES)
        assert [server.recv(100), server.recv(100)] == LINES
        sink.close()


def test_unix_stream(tmp_path: Path) -> None:
    with listening(socket.AF_UNIX, socket.SOCK_STREAM, str(tmp_path / "s")) as server:
        sink = SocketSink("unix", str(tmp_path / "s"), timeout_s=1)
        sink.write(LINES)
        accepted, _ = server.accept()
        with accepted:
            assert accepted.recv(100) == b"".join(LINES)
        sink.close()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_syslog_gets_priority_tag_and_line(tmp_path: Path, kind: int) -> None:
    with listening(socket.AF_UNIX, kind, str(tmp_path / "log")) as server:
        sink = SyslogSink("LOCAL7", "outrider", timeout_s=1, sockets=(str(tmp_path / "none"), str(tmp_path / "log")))
        sink.write(LINES[:1])
        if kind == socket.SOCK_STREAM:
            accepted, _ = server.accept()
            with accepted:
                got = accepted.recv(200)
            assert got.endswith(b"\n")
        else:
            got = server.recv(200)
        assert got.startswith(b"<190>")
        assert got.rstrip().endswith(f'outrider[{os.getpid()}]: {{"n":1}}'.encode())
        sink.close()


def test_no_syslog(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="no syslog"):
        SyslogSink("AUTH", "t", timeout_s=1, sockets=(str(tmp_path / "none"),)).write(LINES)


# -- one device


@contextlib.asynccontextmanager
async def device(sink: Sink, **options: int) -> AsyncIterator[Device]:
    made = Device("d/", HOW, sink, **options)
    try:
        yield made
    finally:
        if isinstance(sink, HungSink):
            sink.free.set()
        assert await made.close() is None


async def test_lines_are_written_in_the_order_they_were_handed_over(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    async with device(FileSink(str(path), timeout_s=1)) as made:
        futures = []
        for number in range(2000):
            futures.append(made.submit(b'{"n":%d}\n' % number))
            if number % 500 == 0:
                made.ask_to_reopen()
        assert set(await asyncio.gather(*futures)) == {None}
    assert [json.loads(line)["n"] for line in path.read_bytes().splitlines()] == list(range(2000))


async def test_lines_of_one_turn_are_one_write_and_so_are_those_that_come_meanwhile() -> None:
    """Each write wakes a thread, which costs more than the line."""

    class Counting(HungSink):
        def __init__(self) -> None:
            super().__init__()
            self.writes: list[list[bytes]] = []

        def write(self, lines: Sequence[bytes]) -> None:
            self.writes.append(list(lines))
            super().write(lines)

    sink = Counting()
    async with device(sink) as made:
        futures = [made.submit(b"a%d" % number) for number in range(3)]
        await asyncio.to_thread(sink.entered.wait)
        for number in range(3):
            futures.append(made.submit(b"b%d" % number))
            await asyncio.sleep(0)
        sink.free.set()
        assert set(await asyncio.gather(*futures)) == {None}
    assert sink.writes == [[b"a0", b"a1", b"a2"], [b"b0", b"b1", b"b2"]]


async def test_what_waits_for_a_hung_device_is_bounded() -> None:
    sink = HungSink()
    async with device(sink, queue_bytes_max=100) as made:
        waiting = [made.submit(b"x" * 40) for _ in range(2)]
        assert await made.submit(b"x" * 40) == "too much waits to be written"
        assert made.failing
        sink.free.set()
        assert await asyncio.gather(*waiting) == [None, None]
        assert not made.failing


async def test_a_defect_of_a_sink_is_an_answer_too(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(DiscardSink):
        def write(self, lines: Sequence[bytes]) -> None:
            raise ZeroDivisionError

    async with device(Broken()) as made:
        assert await made.submit(b"x\n") == "ZeroDivisionError"
    assert await made.submit(b"x\n") == "the device is closed"
    assert "defect" in caplog.text


# -- several devices


def entry(name: str) -> AuditEntry:
    return AuditEntry(path=f"{name}/", type="file", uuid=name, salt=b"salt", options={"file_path": "discard"})


@contextlib.asynccontextmanager
async def broker(*sinks: Sink, timeout_s: float = 60.0) -> AsyncIterator[AuditBroker]:
    made = AuditBroker(LocalRules(timeout_s=timeout_s))
    for number, sink in enumerate(sinks):
        made.employ(entry(str(number)), Device(str(number), HOW, sink))
    try:
        yield made
    finally:
        for sink in sinks:
            if isinstance(sink, HungSink):
                sink.free.set()
        await made.close()


async def test_every_device_gets_every_entry() -> None:
    one, two = ListSink(), ListSink()
    async with broker(one, two) as made:
        for number in range(3):
            await made.write(record(number))
    assert one.lines == two.lines
    assert [json.loads(line)["request"]["id"] for line in one.lines] == ["0", "1", "2"]


async def test_one_device_that_works_is_enough_and_none_is_not() -> None:
    bad, good = ListSink(), ListSink()
    async with broker(bad, good) as made:
        bad.wrong = "disk on fire"
        await made.write(record(1))
        assert not made.blocked
        good.wrong = "too"
        with pytest.raises(AuditFailed):
            await made.write(record(2))
        assert made.blocked
        good.wrong = ""
        await made.write(record(3))
        assert not made.blocked


async def test_a_hung_device_is_waited_for_once_and_catches_up() -> None:
    hung, good = HungSink(), ListSink()
    async with broker(hung, good, timeout_s=0.2) as made:
        loop = asyncio.get_running_loop()
        started = loop.time()
        await made.write(record(0))
        assert loop.time() - started >= 0.2
        started = loop.time()
        for number in range(1, 50):
            await made.write(record(number))
        assert loop.time() - started < 20 * 0.2, "49 times would take longer"
        hung.free.set()
        while made.blocked or len(hung.lines) < 50:
            await made.write(record(99))
    assert [json.loads(line)["request"]["id"] for line in hung.lines[:50]] == [str(number) for number in range(50)]


async def test_a_device_that_fails_slowly_is_not_waited_for_each_time() -> None:
    """A pipe that nobody reads fails after its time-out: that must not become the time of every request."""

    class FailsThenHangs(HungSink):
        def write(self, lines: Sequence[bytes]) -> None:
            if self.entered.is_set():
                self.free.wait(60)
            self.entered.set()
            raise SinkError("nothing reads what is written")

    slow, good = FailsThenHangs(), ListSink()
    async with broker(slow, good, timeout_s=60) as made:
        async with asyncio.timeout(120):
            for number in range(20):
                await made.write(record(number))
    assert len(good.lines) == 20


async def test_the_last_device_holds_a_request_up_no_longer_than_the_bound() -> None:
    hung = HungSink()
    async with broker(hung, timeout_s=0.1) as made:
        for _ in range(2):
            async with asyncio.timeout(120):
                with pytest.raises(AuditFailed):
                    await made.write(record(1))
        assert made.blocked
        hung.free.set()
        async with asyncio.timeout(120):
            await made.write(record(2))
        assert not made.blocked


async def test_entries_are_measured_of_all_devices_and_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    monkeypatch.setattr("sidecar.core.audit.broker.METRICS", metrics)

    def counted() -> dict[str, int]:
        lines = [line.split() for line in metrics.as_prometheus().splitlines() if line.startswith("vault_audit_")]
        return {
            name.removeprefix("vault_audit_"): int(value) for name, value in lines if name.endswith(("_count", "e"))
        }

    answered = record(1).answered("t", {}, auth=None, status=200, error="", size_bytes=0)
    none = {"log_request_failure": 0, "log_response_failure": 0}
    one = ListSink()
    async with broker(one, timeout_s=30) as made:
        assert counted() == none, "there before the first failure"
        await made.write(record(1))
        await made.write(answered)
        assert counted() == none | dict.fromkeys(
            ("log_request_count", "log_response_count", "0_log_request_count", "0_log_response_count"), 1
        )
        one.wrong = "disk on fire"
        with pytest.raises(AuditFailed):
            await made.write(answered)
        assert {name: counted()[name] for name in none} == {"log_request_failure": 0, "log_response_failure": 1}
        assert counted()["0_log_response_count"] == 2, "a refusal takes its time too"
    hung, good = HungSink(), ListSink()
    made = AuditBroker(LocalRules(timeout_s=30))
    slow = Device("hung/", HOW, hung)
    slow.stall()  # so that nothing waits for it
    for device in (slow, Device("good/", HOW, good)):
        made.employ(entry(device.name.rstrip("/")), device)
    await made.write(record(2))
    assert "hung__log_request_count" not in counted(), "not written yet"
    hung.free.set()
    async with asyncio.timeout(120):
        while counted().get("hung__log_request_count") != 1:
            await made.write(answered)
    assert counted()["good__log_request_count"] == 1
    await made.close()


async def test_nothing_is_written_after_the_end() -> None:
    sink = ListSink()
    async with broker(sink) as made:
        await made.close()
        with pytest.raises(AuditFailed):
            await made.write(record(1))
    assert made.enabled
    assert sink.lines == []


async def test_a_device_that_hangs_at_the_end_is_left_behind() -> None:
    hung = HungSink()
    async with broker(hung, timeout_s=0.05) as made:
        with pytest.raises(AuditFailed):
            await made.write(record(1))
        async with asyncio.timeout(120):
            await made.close()


async def test_large_entries_are_formatted_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def formatted(shown: Record, how: Formatting) -> bytes:
        threads.append(threading.current_thread())
        return format_line(shown, how)

    monkeypatch.setattr("sidecar.core.audit.broker.format_line", formatted)
    sink = ListSink()
    async with broker(sink) as made:
        await made.write(replace(record(1), size_bytes=2**20))
        await made.write(record(2))
    assert threads[0] is not threading.main_thread()
    assert threads[1] is threading.main_thread()
    assert [json.loads(line)["request"]["id"] for line in sink.lines] == ["1", "2"]


def test_a_process_ends_although_a_device_hangs(tmp_path: Path) -> None:
    """A thread stuck in a write must not keep the interpreter."""
    program = """
import asyncio, threading
from sidecar.core.audit.broker import AuditBroker, AuditFailed
from sidecar.core.audit.device import Device
from sidecar.core.audit.entries import Formatting, Record
from sidecar.core.audit.hashing import Hasher
from sidecar.core.audit.options import LocalRules
from sidecar.core.audit.sink import DiscardSink
from sidecar.core.audit.table import AuditEntry

class Hung(DiscardSink):
    def write(self, lines):
        threading.Event().wait()

async def main():
    broker = AuditBroker(LocalRules(timeout_s=0.05))
    device = Device("a/", Formatting(Hasher(b"s")), Hung())
    broker.employ(AuditEntry(path="a/", type="file", uuid="u", salt=b"s"), device)
    try:
        await broker.write(Record(time="t", request={"id": "1", "path": "p"}))
    except AuditFailed:
        print("refused")
    await broker.close()

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
