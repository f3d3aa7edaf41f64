"""What clients' test suites are to do, what they did, and whether that is what is known of them. Pure but for reading
the two files."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

import msgspec


class Outcome(enum.Enum):
    """What became of one test."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


class NotRun(msgspec.Struct, forbid_unknown_fields=True):
    """Files left out: ``files`` with each of ``tests`` in its place, or ``tests`` themselves."""

    tests: list[str]
    reason: str
    files: str = "{}"


class Fails(msgspec.Struct, forbid_unknown_fields=True):
    """Tests that must fail, by patterns of their ids."""

    tests: list[str]
    reason: str


class Step(NamedTuple):
    """A command line, its standard input and the exit code it must have; later lines know its output as ``name``."""

    line: str
    code: int
    input: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Step:
        """Of ``<code> [<name>=]<command> [<<< <input>]``. Raises ValueError."""
        code, _, rest = text.partition(" ")
        line, _, given = rest.partition(" <<< ")
        named = re.match(r"([a-z_]+)=", line)
        return cls(line[named.end() :] if named else line, int(code), given, named[1] if named else "")


class Suite(msgspec.Struct, forbid_unknown_fields=True):
    """One entry of ``client_suites.toml``, which explains the fields."""

    package: str
    needs: list[str]
    tests: list[str] = []
    arguments: list[str] = []
    environment: dict[str, str] = {}
    files: dict[str, str] = {}
    copies: list[tuple[str, str]] = []
    dev_server: bool = False
    prepare: list[list[str]] = []
    commands: str = ""
    not_run: list[NotRun] = []
    fails: list[Fails] = []

    def steps(self) -> list[Step]:
        """The command lines, without comments. Raises ValueError for one that is not written as a step is."""
        lines = (line.strip() for line in self.commands.splitlines())
        return [Step.parse(line) for line in lines if line and not line.startswith("#")]

    def ignored_files(self) -> list[str]:
        """The files that are not run."""
        return [group.files.format(test) for group in self.not_run for test in group.tests]


@dataclass(frozen=True)
class Verdict:
    """``known`` counts tests that failed as they must, by reason. ``failed`` and ``surprising`` are ids, ``missing``
    the patterns of ``fails`` that no test has."""

    package: str
    passed: int = 0
    skipped: int = 0
    known: Mapping[str, int] = field(default_factory=dict)
    not_run: Mapping[str, int] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    surprising: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether everything was as it is known, and something passed at all."""
        return bool(self.passed) and not (self.failed or self.surprising or self.missing)


def read_suites(path: Path) -> dict[str, Suite]:
    """The suites by name. Raises msgspec.ValidationError for a field that is not one."""
    return msgspec.toml.decode(path.read_bytes(), type=dict[str, Suite])


def read_junit(path: Path) -> dict[str, Outcome]:
    """What each test of a pytest report did, by the id that pytest takes; a test whose fixture failed has failed."""
    outcomes: dict[str, Outcome] = {}
    for case in ET.parse(path).getroot().iter("testcase"):
        file, name = case.get("file") or "", case.get("name") or ""
        module = re.sub(r"\.py$", "", file).replace("/", ".")
        inside = (case.get("classname") or "").removeprefix(module).strip(".").replace(".", "::")
        identity = "::".join(part for part in (file, inside, name) if part)
        outcome = Outcome.PASSED
        if case.find("failure") is not None or case.find("error") is not None:
            outcome = Outcome.FAILED
        elif case.find("skipped") is not None:
            outcome = Outcome.SKIPPED
        if outcomes.get(identity) is not Outcome.FAILED:
            outcomes[identity] = outcome
    return outcomes


def judge(suite: Suite, outcomes: Mapping[str, Outcome]) -> Verdict:
    """Compare what the tests did with what is known of them."""
    known: dict[str, int] = {}
    excused: set[str] = set()
    surprising: list[str] = []
    missing: list[str] = []
    for group in suite.fails:
        for pattern in group.tests:
            matching = [test for test in outcomes if fnmatchcase(test, pattern)]
            if not matching:
                missing.append(pattern)
            for test in matching:
                excused.add(test)
                if outcomes[test] is Outcome.PASSED:
                    surprising.append(test)
                elif outcomes[test] is Outcome.FAILED:
                    known[group.reason] = known.get(group.reason, 0) + 1
    return Verdict(
        package=suite.package,
        passed=sum(outcome is Outcome.PASSED for test, outcome in outcomes.items() if test not in excused),
        skipped=sum(outcome is Outcome.SKIPPED for outcome in outcomes.values()),
        known=known,
        not_run={group.reason: len(group.tests) for group in suite.not_run},
        failed=tuple(test for test, outcome in outcomes.items() if outcome is Outcome.FAILED and test not in excused),
        surprising=tuple(surprising),
        missing=tuple(missing),
    )


def table(verdicts: Mapping[str, Verdict]) -> str:
    """A table for people, and beneath it the reasons, and whatever is not as it is known."""
    lines = [f"{'package':<28}{'passed':>8}{'failed':>8}{'excluded':>10}{'skipped by itself':>19}"]
    notes: list[str] = []
    for name, verdict in verdicts.items():
        known, wrong = sum(verdict.known.values()), len(verdict.failed)
        lines.append(f"{verdict.package:<28}{verdict.passed:>8}{wrong:>8}{known:>10}{verdict.skipped:>19}")
        notes += [f"{name}: excluded {count}: {reason}" for reason, count in verdict.known.items()]
        notes += [f"{name}: {count} files not run: {reason}" for reason, count in verdict.not_run.items()]
        notes += [f"{name}: FAILED {test}" for test in verdict.failed]
        notes += [
            f"{name}: PASSED although it is excluded, take it off the list: {test}" for test in verdict.surprising
        ]
        notes += [f"{name}: NOT THERE although it is excluded: {pattern}" for pattern in verdict.missing]
        if not verdict.passed:
            notes.append(f"{name}: NOTHING PASSED")
    return "\n".join(["", *lines, "", *notes])
