"""A good part of hvac's own test suite, unchanged, starting this server as ``vault``; ``make clients`` runs it whole,
and other clients'."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from scripts.client_outcomes import read_suites, table
from scripts.client_suites import CACHE, SUITES, make_programs, run_suite

PARTS = (
    "auth_methods/test_approle.py",
    "auth_methods/test_token.py",
    "secrets_engines/test_kv_v2.py",
    "system_backend/test_seal.py",
    "system_backend/test_wrapping.py",
)


@pytest.mark.timeout(900)
def test_hvacs_own_tests_pass_against_this_server(tmp_path: Path) -> None:
    whole = read_suites(SUITES)["hvac"]
    tests = [f"{whole.tests[0]}/api/{part}" for part in PARTS]
    part = msgspec.structs.replace(whole, tests=tests, fails=[], not_run=[])
    verdict = run_suite("hvac", {"hvac": part}, make_programs(tmp_path))
    assert verdict.good, table({"hvac": verdict}) + f"\nsee {CACHE}/output-*.txt"
    assert verdict.passed >= 70
