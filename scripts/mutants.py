"""Change the pure modules one small step at a time and see whether their tests notice.

    python scripts/mutants.py [--module consul_backend.merkle] [--limit 50] [--seconds 60]

A *mutant* is a module with one comparison, arithmetic operator, constant, condition or returned value changed. Each
runs its module's unit tests in a forked child. One that a time limit ends (it may loop for ever) is printed and counts
as noticed. A mutant that passes them all *survived*: a test is missing, or the change makes no difference that counts.
The latter are listed with their reason in docs/mutants.md, in the words that this program prints; any other survivor
makes it fail.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import gc
import importlib
import math
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
EXPLAINED = ROOT / "docs" / "mutants.md"

TESTS = {
    "consul_backend.batching": ["batching", "packing_machine"],
    "consul_backend.checkpoint": ["checkpoint"],
    "consul_backend.extents": ["extents", "merkle"],
    "consul_backend.fenced": ["fenced", "replicated"],
    "consul_backend.heads": ["heads"],
    "consul_backend.keys": ["keys"],
    "consul_backend.large_batch": ["large_batch", "large_store"],
    "consul_backend.lease": ["lease"],
    "consul_backend.limits": ["limits", "packing_machine"],
    "consul_backend.merkle": ["forest_pages", "merkle", "merkle_machine", "lazy_index"],
    "consul_backend.merkle_pages": ["extent_table", "merkle", "merkle_machine", "lazy_index"],
    "consul_backend.recovery": ["recovery", "lazy_index", "large_crashes"],
    "consul_backend.retention": ["retention"],
    "consul_backend.wal": ["wal"],
    "consul_backend.wire": ["wire", "limits"],
    "sidecar.core.policies": ["policies", "policy_statements"],
    "sidecar.core.policy_rules": ["policies", "policy_statements"],
    "sidecar.core.quorum": ["seal_secrets", "seal"],
    "sidecar.core.seal": ["seal", "shares_keeping"],
    "sidecar.core.token_ids": ["tokens", "token_rights"],
    "sidecar.engines.transit.ciphers": ["transit_encryption", "transit_properties"],
    "sidecar.engines.transit.encoding": ["transit_encryption", "transit_signing", "transit_properties"],
    "sidecar.engines.transit.key_types": ["transit_keys", "transit_signing", "transit_encryption"],
    "sidecar.engines.transit.ring": ["transit_keys", "transit_encryption", "transit_exchange"],
    "sidecar.engines.transit.signatures": ["transit_signing", "transit_mldsa_cmac", "transit_properties"],
    "sidecar.hcl.json_form": ["hcl"],
    "sidecar.hcl.native": ["hcl"],
    "sidecar.hcl.scanner": ["hcl", "hcl_formatting"],
    "sidecar.replication.brake": ["brake"],
    "sidecar.replication.diff": ["diff_machine", "sync"],
    "sidecar.replication.heard": ["heard"],
    "sidecar.replication.history": ["replication_history", "session_index"],
    "sidecar.replication.session_index": ["session_index"],
    "sidecar.replication.states": ["replication_states"],
}
"""Module -> its tests in tests/unit/, those most likely to notice first."""

_PIPE_BYTES = 60_000  # what a pipe takes without a reader
_QUICK = "not costs_at_most"  # what measures memory takes seconds and notices nothing else

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
_NO_BEHAVIOUR = {"frozen", "gc", "slots", "strict"}
_UNTOUCHED = (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom)  # texts of errors are no behaviour


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What ``node`` may be replaced by."""
    if isinstance(node, ast.Compare):
        for n, operator in enumerate(node.ops):
            other = _COMPARISONS[type(operator)]()
            yield ast.Compare(node.left, [*node.ops[:n], other, *node.ops[n + 1 :]], node.comparators)
    elif isinstance(node, ast.Dict) and len(node.keys) > 1:
        for n in range(len(node.keys)):
            yield ast.Dict(node.keys[:n] + node.keys[n + 1 :], node.values[:n] + node.values[n + 1 :])
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        yield ast.BinOp(node.left, _ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.AugAssign) and type(node.op) in _ARITHMETIC:
        yield ast.AugAssign(node.target, _ARITHMETIC[type(node.op)](), node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):  # a bool is one too
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Continue | ast.Break) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield ast.Pass()


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Parent, field and position of every node that can be changed, annotations and texts left out."""
    for field, value in ast.iter_fields(tree):
        untouched = isinstance(tree, _UNTOUCHED) or (isinstance(tree, ast.keyword) and tree.arg in _NO_BEHAVIOUR)
        if untouched or field in {"annotation", "returns", "decorator_list", "type_comment"}:
            continue
        for position, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                yield tree, field, position
                yield from places(child)


def mutants(source: str) -> Iterator[tuple[int, str, ast.Module]]:
    """Line, the change in words (of a constant: and what it is part of), and the whole module, for each mutant of
    ``source``."""
    tree = ast.parse(source)
    for number, (parent, field, position) in enumerate(places(tree)):
        held = getattr(parent, field)
        node = held if position is None else held[position]
        where = f" in `{_text(parent)}`" if isinstance(node, ast.Constant) else ""
        for changed in changes(node):
            copied = copy.deepcopy(tree)
            parent, field, position = next(place for n, place in enumerate(places(copied)) if n == number)
            new = ast.copy_location(changed, node)
            if position is None:
                setattr(parent, field, new)
            else:
                getattr(parent, field)[position] = new
            yield node.lineno, _told(node, changed) + where, ast.fix_missing_locations(copied)


def _told(node: ast.AST, changed: ast.AST) -> str:
    if isinstance(node, ast.Dict) and isinstance(changed, ast.Dict):
        gone = next(n for n, key in enumerate(node.keys) if changed.keys[n : n + 1] != [key])
        return f"`{_text(node.keys[gone] or node)}` → `left out`"
    return f"`{_text(node)}` → `{_text(changed)}`"


def _text(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:90]


class Changed(MetaPathFinder, Loader):
    """Loads ``code`` whoever imports the module ``name``, its own package included."""

    def __init__(self, name: str, code: CodeType) -> None:
        self._name, self._code = name, code
        self.independent: list[str] = []

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """This loader for its module, nothing for others."""
        return spec_from_loader(fullname, self) if fullname == self._name else None

    def exec_module(self, module: ModuleType) -> None:
        """Run the code in the module. What was imported to its end by now does without the module."""
        self.independent = [name for name, known in sys.modules.items() if _is_complete(known)]
        exec(self._code, module.__dict__)


def _is_complete(module: ModuleType) -> bool:
    spec = getattr(module, "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)


class Patience:
    """A plugin of pytest that ends the process where one test takes more CPU than ``limit_s``."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._started_s = 0.0
        self.longest_s = 0.0

    def pytest_runtest_setup(self) -> None:
        """Counts from here."""
        self._started_s = time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(self._started_s + self._limit_s), resource.RLIM_INFINITY))

    def pytest_runtest_teardown(self) -> None:
        """Remembers the longest."""
        self.longest_s = max(self.longest_s, time.process_time() - self._started_s)


def run_tests(name: str, code: CodeType, tests: Sequence[str], limit_s: float) -> tuple[int, list[str]]:
    """The exit status of pytest with ``code`` as the module ``name``; how much CPU the longest test took, and what else
    may be imported beforehand."""
    if name in sys.modules:
        raise RuntimeError(f"{name} is imported already: nobody would get the changed one")
    changed, patience = Changed(name, code), Patience(limit_s)
    sys.meta_path.insert(0, changed)
    # That a test fails is enough; looking for the smallest way to make it fail takes most of the time.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile(
        "mutants", phases=phases, database=None, deadline=None, suppress_health_check=slow
    )
    # The profile is named here: tests/conftest.py loads one of its own before the tests are imported.
    options = ["-x", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-k", _QUICK]
    options += ["--hypothesis-seed=1", "--hypothesis-profile=mutants"]
    # File by file: importing all of them takes longer than most changes take to be noticed by the first.
    status = next((status for test in tests if (status := int(pytest.main([*options, test], plugins=[patience])))), 0)
    independent = [name for name in changed.independent if name.partition(".")[0] != "tests"]
    return status, [str(patience.longest_s), *independent]


def in_child(work: Callable[[], tuple[int, list[str]]], limit_s: float) -> tuple[int | None, list[str]]:
    """Do ``work`` in a forked child: its exit status, None if a signal or the time limit ended it, and what it said.
    This limit, of the clock, is for a child that waits for ever."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        status = 1
        with contextlib.suppress(BaseException):
            status, words = work()
            os.write(writing, " ".join(words).encode()[:_PIPE_BYTES])
        os._exit(status)
    os.close(writing)
    deadline = time.monotonic() + limit_s
    found, ended = os.waitpid(child, os.WNOHANG)
    while not found and time.monotonic() < deadline:
        time.sleep(0.02)
        found, ended = os.waitpid(child, os.WNOHANG)
    if not found:
        os.killpg(child, signal.SIGKILL)
        _, ended = os.waitpid(child, 0)
    with os.fdopen(reading) as said:
        code = os.waitstatus_to_exitcode(ended)
        return None if code < 0 else code, said.read().split()


def inherit(names: Sequence[str]) -> None:
    """Do once what every child would do: import modules, and have hypothesis look for constants in them."""
    for name in names:
        importlib.import_module(name)
    with warnings.catch_warnings(action="ignore"):  # that this is slow
        hypothesis.given(hypothesis.strategies.none())(lambda nothing: None)()
    gc.freeze()  # or each child's first collection copies all of it


def check(module: str, arguments: argparse.Namespace, explained: str) -> tuple[int, int, int]:
    """Run the mutants of one module; how many there were, how many survived, how many of these are not explained."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    files = [ROOT / "tests" / "unit" / f"test_{test}.py" for test in TESTS[module]]
    tests = [str(file) for file in files if file.exists()]
    started = time.monotonic()
    source = path.read_text()

    def outcome(code: CodeType, test_s: float) -> tuple[int | None, list[str]]:
        return in_child(lambda: run_tests(module, code, tests, test_s), arguments.seconds)

    status, said = outcome(compile(source, path, "exec"), arguments.seconds)
    if status != 0:
        raise RuntimeError(f"{module}: its tests fail, or take over {arguments.seconds:.0f} s, without any change")
    test_s = 5 + 4 * float(said[0])  # of CPU: the machine may have others to serve
    inherit(said[1:])
    every = list(mutants(source))
    if len(every) > arguments.limit:
        every = sorted(random.Random(1).sample(every, arguments.limit), key=lambda mutant: mutant[0])
    every = [mutant for mutant in every if mutant[0] >= arguments.from_line]
    survived = new = 0
    for line, change, tree in every:
        status, _ = outcome(compile(tree, path, "exec"), test_s)
        told = f"`{path.name}`: {change}"
        if status == 0:
            survived += 1
            new += told not in explained
            print(f"  {'explained' if told in explained else 'SURVIVED '} line {line}: {told}", flush=True)
        elif status is None:
            print(f"  timed out line {line}: {told}", flush=True)
    seconds = time.monotonic() - started
    print(
        f"{module}: {len(every)} mutants, {len(every) - survived} noticed, {survived} survived, {seconds:.0f} s",
        flush=True,
    )
    return len(every), survived, new


def main() -> int:
    """Exit status 1 when a mutant survived that docs/mutants.md does not explain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--module", action="append", choices=sorted(TESTS), help="default: all")
    parser.add_argument("--limit", type=int, default=100_000, help="this many mutants of each module, drawn at random")
    parser.add_argument("--from-line", type=int, default=1, help="those of this line and of later ones: to go on")
    parser.add_argument("--seconds", type=float, default=300.0, help="time limit of one run of a module's tests")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for ready in ("pytest", "hypothesis", "hypothesis.stateful", "pytest_asyncio", "msgspec", "aiohttp", "consul"):
        importlib.import_module(ready)  # children inherit them
    explained = EXPLAINED.read_text() if EXPLAINED.exists() else ""
    checks = [(module, arguments, explained) for module in arguments.module or sorted(TESTS)]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # each imports what others change
        try:
            totals = pool.starmap(check, checks, chunksize=1)
        except RuntimeError as error:
            sys.exit(str(error))
    made, survived, new = (sum(column) for column in zip(*totals, strict=True))
    print(f"{made} mutants, {made - survived} noticed, {survived - new} explained, {new} not explained")
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
