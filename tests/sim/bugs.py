"""Bugs on purpose, to check the checkers: each takes away or spoils one thing that the store's correctness rests on.

They live in ``bugs_*.py`` and are patched in; no production code knows of them. A bug that no seed catches means that
the simulation has gone blind (``test_planted_bugs.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module

from tests.sim.focus import ANY, Focus

Patch = Callable[[ExitStack], None]


@dataclass(frozen=True, slots=True)
class Bug:
    """How to plant it, what it spoils, and the trouble in which that shows."""

    plant: Patch
    text: str
    focus: Focus


BUGS: dict[str, Bug] = {}


def bug(name: str, focus: Focus = ANY) -> Callable[[Patch], Patch]:
    """Register a bug; its docstring says what it spoils."""

    def register(plant: Patch) -> Patch:
        BUGS[name] = Bug(plant, (plant.__doc__ or "").strip(), focus)
        return plant

    return register


for _name in ("bugs_writing", "bugs_keeping"):
    import_module(f"tests.sim.{_name}")
