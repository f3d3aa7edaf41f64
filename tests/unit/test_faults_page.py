"""docs/faults.md names every fault that is answered for, and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
FAULTS = {*range(1, 30), *range(41, 49)}
REFERENCE = re.compile(r"`(?P<file>[\w/]+\.py|…)(?:::(?P<name>\w+)(?:\[[^\]]*\])?)?(?P<open>…?)`")


def rows() -> list[list[str]]:
    """The cells of the tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]


def path_of(name: str) -> Path:
    """A test's file; without a folder it is one of tests/integration."""
    return ROOT / name if name.startswith("tests/") else ROOT / "tests" / "integration" / name


def test_every_fault_has_its_row() -> None:
    named = {int(number) for cells in rows() for number in re.findall(r"\bF(\d+)\b", cells[0])}
    assert named >= FAULTS, sorted(FAULTS - named)


def test_every_test_that_is_named_exists() -> None:
    missing, found = [], 0
    for cells in rows():
        file = ""
        for match in REFERENCE.finditer(cells[-1]):
            file = file if match["file"] == "…" else match["file"]
            found += 1
            path = path_of(file)
            if not path.exists() or (match["name"] and f"def {match['name']}" not in path.read_text(encoding="utf-8")):
                missing.append(match[0])
    assert missing == []
    assert found > 60
