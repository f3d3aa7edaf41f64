"""``docs/compatibility.md`` says what the routing tables and the last recorded run of the tests say."""

from __future__ import annotations

import pytest

from scripts import compatibility
from tests.support.endpoints import Recorder, recorded


async def test_the_page_is_not_stale() -> None:
    expected = compatibility.page(await compatibility.served_endpoints(), compatibility.reached())
    assert compatibility.PAGE.read_text() == expected, "run make compatibility"


async def test_what_was_reached_is_still_served_and_its_tests_are_there() -> None:
    reached = compatibility.reached()
    assert not set(reached) - set(await compatibility.served_endpoints())
    files = {name for names in reached.values() for name in names}
    assert all((compatibility.ROOT / name).exists() for name in files)


def test_control_a_new_route_and_a_lost_test_change_the_page() -> None:
    served = [("sys", "GET", "health")]
    notes, compatibility.PARTLY = compatibility.PARTLY, {}
    try:
        page = compatibility.page(served, {served[0]: ["tests/unit/test_service.py"]})
        assert "| `GET sys/health` | done | service |  |" in page
        assert "| `GET sys/health` | partly |  | reached by no test" in compatibility.page(served, {})
        assert compatibility.page([*served, ("sys", "GET", "new")], {}) != compatibility.page(served, {})
        with pytest.raises(ValueError, match="what is served"):
            compatibility.page([("sys", "GET", "license/status")], {})
    finally:
        compatibility.PARTLY = notes


def test_control_a_claim_that_no_test_supports_is_found(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "REACHED", tmp_path / "reached.json")
    compatibility.REACHED.write_text('[["sys", "GET", "health", ["tests/unit/test_service.py"]]]')
    with pytest.raises(SystemExit):
        compatibility.verify(tmp_path / "empty")
    recorder = Recorder(tmp_path / "run")
    recorder._seen[("sys", "GET", "health")] = {"tests/unit/test_service.py"}
    recorder.save()
    compatibility.verify(tmp_path / "run")
    assert list(recorded(tmp_path / "run")) == [("sys", "GET", "health")]


async def test_what_clients_send_to_other_processes_counts_where_it_is_served(tmp_path) -> None:
    recorder = Recorder(tmp_path)
    for method, url in (
        ("PUT", "/v1/sys/replication/dr/secondary/promote"),
        ("GET", "/v1/sys/policies/acl?list=true"),
        ("GET", "/v1/sys/no/such/thing"),
        ("PATCH", "/v1/sys/health"),
        ("GET", "/v1/kv/other/server"),
    ):
        recorder._of_client(method, url)
    recorder.save()
    assert list(recorded(tmp_path, await compatibility.core_paths())) == [
        ("sys", "LIST", "policies/acl"),
        ("sys", "POST", "replication/dr/secondary/promote"),
    ]
