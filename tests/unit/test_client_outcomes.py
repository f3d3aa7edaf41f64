"""What is said of clients' own tests: a failure is one unless it is known, and so is a pass that should not be."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.client_outcomes import Fails, NotRun, Outcome, Step, Suite, Verdict, judge, read_junit, read_suites, table

SUITES = Path(__file__).resolve().parents[2] / "scripts" / "client_suites.toml"
PASSED, FAILED, SKIPPED = Outcome.PASSED, Outcome.FAILED, Outcome.SKIPPED
SUITE = Suite("client==1", [], fails=[Fails(["t.py::T::test_pki_*", "t.py::T::test_once"], "no pki")])


def test_what_is_known_to_fail_is_counted_with_its_reason() -> None:
    outcomes = {"t.py::T::test_a": PASSED, "t.py::T::test_b": SKIPPED, "t.py::T::test_pki_a": FAILED}
    verdict = judge(SUITE, outcomes | {"t.py::T::test_pki_b": FAILED, "t.py::T::test_once": FAILED})
    assert (verdict.passed, verdict.skipped, verdict.known) == (1, 1, {"no pki": 3})
    assert verdict.good
    assert "no pki" in table({"client": verdict})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"t.py::T::test_a": FAILED}, "FAILED t.py::T::test_a"),
        ({"t.py::T::test_pki_a": PASSED}, "take it off the list: t.py::T::test_pki_a"),
        ({"t.py::T::test_once": None}, "NOT THERE although it is excluded: t.py::T::test_once"),
        ({"t.py::T::test_a": None}, "NOTHING PASSED"),
    ],
)
def test_anything_else_is_said_and_is_not_good(changed: dict[str, Outcome | None], said: str) -> None:
    usual: dict[str, Outcome | None] = {
        "t.py::T::test_a": PASSED,
        "t.py::T::test_pki_a": FAILED,
        "t.py::T::test_once": FAILED,
    }
    assert judge(SUITE, {test: outcome for test, outcome in usual.items() if outcome}).good
    verdict = judge(SUITE, {test: outcome for test, outcome in (usual | changed).items() if outcome})
    assert not verdict.good
    assert said in table({"client": verdict})


def test_a_report_of_pytest_is_read_by_the_ids_that_pytest_takes(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.a.test_x.TestX" name="test_ok" file="tests/a/test_x.py" />
        <testcase classname="tests.a.test_x" name="test_bad[1]" file="tests/a/test_x.py"><failure /></testcase>
        <testcase classname="tests.a.test_x.TestX" name="test_set_up" file="tests/a/test_x.py"><error /></testcase>
        <testcase classname="tests.a.test_x.TestX" name="test_set_up" file="tests/a/test_x.py" />
        <testcase classname="tests.a.test_x.TestX" name="test_old" file="tests/a/test_x.py"><skipped /></testcase>
        </testsuite></testsuites>"""
    )
    assert read_junit(report) == {
        "tests/a/test_x.py::TestX::test_ok": PASSED,
        "tests/a/test_x.py::test_bad[1]": FAILED,
        "tests/a/test_x.py::TestX::test_set_up": FAILED,
        "tests/a/test_x.py::TestX::test_old": SKIPPED,
    }


def test_a_step_is_a_code_a_name_a_command_and_its_input() -> None:
    assert Step.parse("2 bao kv get kv/none") == Step("bao kv get kv/none", 2, "", "")
    assert Step.parse("0 id=bao read -field=x y") == Step("bao read -field=x y", 0, "", "id")
    assert Step.parse('0 bao policy write p - <<< path "a" {}') == Step("bao policy write p -", 0, 'path "a" {}', "")


def test_the_lists_can_be_read_and_each_package_has_a_version() -> None:
    suites = read_suites(SUITES)
    assert {"hvac", "async-hvac", "vault-cli", "bao"} <= set(suites)
    for suite in suites.values():
        assert all("==" in package for package in (suite.package, *suite.needs))
        assert suite.tests or suite.steps()
        assert all(group.reason for group in (*suite.fails, *suite.not_run))
    left_out = Suite("client==1", [], not_run=[NotRun(["aws", "pki"], "none", "tests/test_{}.py")])
    assert left_out.ignored_files() == ["tests/test_aws.py", "tests/test_pki.py"]
    assert not Verdict("client==1").good
