"""Which methods of hvac's classes a test module has called, so that none is forgotten."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class Calls:
    """Names of methods, ``Class.method``, that were called, and of all there are."""

    def __init__(self) -> None:
        self.made: set[str] = set()
        self.known: set[str] = set()

    @contextmanager
    def recorded(self, classes: Iterable[type]) -> Iterator[Calls]:
        """Within the block, calls of the public methods of ``classes`` are noted."""
        undo: list[tuple[type, str, Any]] = []
        for owner in classes:
            for name, method in inspect.getmembers(owner, inspect.isfunction):
                if name.startswith("_") or name not in vars(owner):
                    continue
                self.known.add(f"{owner.__name__}.{name}")
                undo.append((owner, name, method))
                setattr(owner, name, self._noting(f"{owner.__name__}.{name}", method))
        try:
            yield self
        finally:
            for owner, name, method in undo:
                setattr(owner, name, method)

    def _noting(self, label: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def noting(*arguments: Any, **options: Any) -> Any:
            self.made.add(label)
            return method(*arguments, **options)

        return noting

    def missing(self, unavailable: Iterable[str]) -> set[str]:
        """Methods that nobody called; ``unavailable`` are ``Class.method`` or ``Class.`` for all of a class."""
        left = self.known - self.made
        return {label for label in left if not label.startswith(tuple(unavailable))}
