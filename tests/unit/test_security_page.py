"""``docs/security.md`` names tests that exist, and every statement once."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| (\d+) \|", re.MULTILINE)
NAMED = re.compile(r"`((?:unit|integration)/\w+\.py)::(\w+)`")


def test_every_named_test_is_there() -> None:
    named = NAMED.findall((ROOT / "docs" / "security.md").read_text())
    assert len(named) > 40
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()]
    assert not missing


def test_every_statement_has_its_row() -> None:
    rows = [int(number) for number in ROW.findall((ROOT / "docs" / "security.md").read_text())]
    assert rows == [*range(1, 19), *range(26, 29), *range(42, 49), *range(53, 57)]


def test_every_statement_of_the_page_has_a_test_and_a_control() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    for number in (*range(1, 19), *range(26, 29), *range(42, 49), *range(53, 57)):
        cells = re.search(rf"^\| {number} \|(.*)\|$", text, re.MULTILINE)[1].split("|")
        assert [bool(NAMED.search(cell)) for cell in cells[-2:]] == [True, True], f"statement {number}"
