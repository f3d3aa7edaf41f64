"""The log file: what is written goes there, it is rotated, and a rotation that fails loses no line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.config import ConfigError, LogFileSettings, load_text

# In a process of its own: the file takes the place of standard error.
WRITER = """
import json, logging, sys
from sidecar.config import LogFileSettings
from sidecar.log_file import LogFile, LogFileHandler
from sidecar.telemetry import configure_logging

file = LogFile(LogFileSettings(**json.loads(sys.argv[1])))
file.open()
handler = LogFileHandler(file)
configure_logging("info", "standard", handler)
log = logging.getLogger("t")
"""
FIVE = "for number in range(5):\n    log.info('line %d', number)\n"
ROTATED = re.compile(r"a-[0-9]{19}\.log")


def write(code: str, **settings: object) -> None:
    command = [sys.executable, "-c", WRITER + code, json.dumps(settings)]
    subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parents[2])


def messages(*paths: Path) -> list[str]:
    return [line.rpartition(": ")[2] for path in paths for line in path.read_text().splitlines()]


def rotated(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.name != "a.log")
    assert all(ROTATED.fullmatch(path.name) for path in found), found
    return found


def test_a_folder_holds_a_file_for_the_owner_alone(tmp_path: Path) -> None:
    for name in (tmp_path / "there", f"{tmp_path}/there/"):
        (tmp_path / "there").mkdir(exist_ok=True)
        write("print('x', file=sys.stderr)", path=str(name))
    made = tmp_path / "there" / "outrider.log"
    assert made.read_text() == "x\nx\n"
    assert made.stat().st_mode & 0o777 == 0o600


def test_without_a_bound_reached_there_is_one_file(tmp_path: Path) -> None:
    for _ in range(2):
        write(FIVE, path=str(tmp_path / "a.log"))
    assert rotated(tmp_path) == []
    assert messages(tmp_path / "a.log") == [f"line {number}" for number in range(5)] * 2


def test_a_file_that_is_large_enough_is_put_aside(tmp_path: Path) -> None:
    write(FIVE, path=str(tmp_path / "a.log"), rotate_bytes=1)
    older = rotated(tmp_path)
    assert len(older) == 4
    assert messages(*older, tmp_path / "a.log") == [f"line {number}" for number in range(5)]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (*older, tmp_path / "a.log"))
    write(FIVE, path=str(tmp_path / "a.log"), rotate_bytes=10**6)
    assert len(rotated(tmp_path)) == 4, "not yet"


def test_what_the_file_held_before_counts_too(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("x" * 999 + "\n")
    write(FIVE, path=str(tmp_path / "a.log"), rotate_bytes=1000)
    assert [path.stat().st_size for path in rotated(tmp_path)] == [1000]


def test_a_file_that_is_old_enough_is_put_aside(tmp_path: Path) -> None:
    write(FIVE, path=str(tmp_path / "a.log"), rotate_duration_s=1e-9)
    assert len(rotated(tmp_path)) == 5, "also the one without a line: its time is over all the same"
    assert messages(*rotated(tmp_path), tmp_path / "a.log") == [f"line {number}" for number in range(5)]


@pytest.mark.parametrize(("kept", "left"), [(2, 2), (9, 4), (-1, 0), (0, 4)])
def test_so_many_older_files_are_kept(tmp_path: Path, kept: int, left: int) -> None:
    others = ("a-notes.log", "a-1.log", "b-1234567890123456789.log")
    for name in others:
        (tmp_path / name).touch()
    write(FIVE, path=str(tmp_path / "a.log"), rotate_bytes=1, rotate_max_files=kept)
    for name in others:
        (tmp_path / name).unlink()  # they were none of ours
    older = rotated(tmp_path)
    assert messages(*older, tmp_path / "a.log") == [f"line {number}" for number in range(4 - left, 5)]


def test_a_rotation_that_fails_loses_no_line_and_says_so_once(tmp_path: Path) -> None:
    code = (
        "import pathlib\ndef refuse(*_): raise PermissionError(13, 'Permission denied')\npathlib.Path.rename = refuse\n"
    )
    write(code + FIVE, path=str(tmp_path / "a.log"), rotate_bytes=1)
    told = "Permission denied; tried again in 60 s"
    assert f"[ERROR] core: log_file: cannot rotate {tmp_path}/a.log: {told}" in (tmp_path / "a.log").read_text()
    assert messages(tmp_path / "a.log") == ["line 0", "line 1", told, "line 2", "line 3", "line 4"]


def test_reopening_follows_whoever_moved_the_file(tmp_path: Path) -> None:
    code = (
        "import os\nlog.info('before')\nos.rename(file.path, str(file.path) + '.1')\n"
        "log.info('between')\nhandler.reopen()\nlog.info('after')\nprint('also this', file=sys.stderr)\n"
    )
    write(code, path=str(tmp_path / "a.log"))
    assert messages(tmp_path / "a.log.1") == ["before", "between"]
    assert messages(tmp_path / "a.log") == ["after", "also this"]


def test_a_file_that_was_moved_away_hinders_no_rotation(tmp_path: Path) -> None:
    code = "import os\nlog.info('before')\nos.rename(file.path, str(file.path) + '.1')\nlog.info('after')\n"
    write(code, path=str(tmp_path / "a.log"), rotate_bytes=1)
    assert messages(tmp_path / "a.log.1") == ["before"]
    assert messages(tmp_path / "a.log") == ["after"]
    assert sorted(os.listdir(tmp_path)) == ["a.log", "a.log.1"]


def test_the_settings_and_their_defaults() -> None:
    rest = 'storage "inmem" {}\nlistener "tcp" { tls_disable = true }\n'
    assert load_text(rest).log_file == LogFileSettings()
    given = 'log_file = "/l/"\nlog_rotate_duration = "12h"\nlog_rotate_bytes = 5242880\nlog_rotate_max_files = -1\n'
    assert load_text(given + rest).log_file == LogFileSettings("/l/", 43200.0, 5242880, -1)
    assert load_text('log_rotate_duration = "0s"\n' + rest).log_file.rotate_duration_s == 86400.0
    for wrong in ("log_rotate_bytes = -2", 'log_rotate_duration = "soon"', 'log_rotate_max_files = "few"'):
        with pytest.raises(ConfigError, match=wrong.partition(" ")[0]):
            load_text(f"{wrong}\n{rest}")
