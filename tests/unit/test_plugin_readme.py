"""The plugin README is true: its example runs, and its tables name what the code has."""

import re
from pathlib import Path
from typing import Any

import pytest

import plugin_api.errors
from plugin_api.engine import EngineContext
from plugin_api.errors import NotFound, PluginError, ReadOnlyStorage
from plugin_api.framework import FieldSpec, FieldType
from plugin_api.request import Operation
from plugin_api.testing import MemoryStorage, make_context, make_request

README = (Path(__file__).resolve().parents[2] / "plugin_api" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def example() -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "plugin_api/README.md", "exec"), namespace)
    return namespace


async def test_the_examples_own_tests_pass(example: dict[str, Any]) -> None:
    await example["test_counting"]()
    await example["test_badges"]()


async def test_the_example_keeps_the_promises_it_stands_under(example: dict[str, Any]) -> None:
    storage = MemoryStorage()
    counter = example["Counter"](make_context(storage=storage))
    await counter.handle(make_request(Operation.UPDATE, "up/a", {"step": "5"}))
    listed = await counter.handle(make_request(Operation.LIST, "up/"))
    assert listed.data == {"keys": ["a"]}
    with pytest.raises(NotFound):
        await counter.handle(make_request(Operation.READ, "up/b"))
    storage.read_only = True
    with pytest.raises(ReadOnlyStorage):
        await counter.handle(make_request(Operation.UPDATE, "up/a"))
    read = await counter.handle(make_request(Operation.READ, "up/a"))
    assert read.data == {"count": 5}


def rows(first_column: str) -> dict[str, list[str]]:
    table = README.split(f"| {first_column} |", 1)[1].split("\n\n", 1)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    found = {}
    for row in cells:
        name = re.match(r"`(\w+)", row[0])
        assert name is not None, row
        found[name[1]] = row[1:]
    return found


def test_the_table_of_errors_is_complete_and_right() -> None:
    classes = {
        name: value
        for name, value in vars(plugin_api.errors).items()
        if isinstance(value, type) and issubclass(value, PluginError)
    }
    documented = rows("raise")
    assert set(documented) == set(classes)
    for name, (status, _) in documented.items():
        assert status == ("forwarded" if name == "ReadOnlyStorage" else str(classes[name].status))


def test_the_table_of_field_types_is_complete_and_right() -> None:
    documented = rows("type")
    assert list(documented) == [kind.name for kind in FieldType]
    for name, (_, missing) in documented.items():
        assert repr(FieldSpec(FieldType[name]).missing()).replace("''", '""') == missing.strip("`")


def test_what_the_text_names_exists() -> None:
    for name in ("storage", "local_storage"):
        assert f"context.{name}" in README
        assert name in EngineContext.__dataclass_fields__
    groups = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for group in ("outrider.secrets", "outrider.auth"):
        assert group in README
        assert f'[project.entry-points."{group}"]' in groups
