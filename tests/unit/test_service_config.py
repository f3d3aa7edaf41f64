"""``sys/config/*``, plugins, counters, the log as a stream and profiles over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from sidecar.core.audit.options import LocalRules
from tests.support.eventually import eventually
from tests.support.service_node import Harness, primary_and_secondary, replicate, running, with_bob, with_kv

PAGE = "https://app.example"


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


async def preflight(node: Harness, origin: str, method: str) -> aiohttp.ClientResponse:
    headers = {"Origin": origin, "Access-Control-Request-Method": method}
    async with node.session.options(f"{node.address}/v1/secret/data/a", headers=headers) as answer:
        await answer.read()
        return answer


async def test_no_page_may_call_unless_it_was_allowed(node: Harness) -> None:
    assert (await preflight(node, PAGE, "GET")).status == 405
    assert "Access-Control-Allow-Origin" not in (await node.call("GET", "sys/health", Origin=PAGE)).headers
    assert (await node.call("GET", "sys/config/cors")).body["enabled"] is False
    set_up = {"allowed_origins": [PAGE], "allowed_headers": "X-Custom,Authorization"}
    assert (await node.call("PUT", "sys/config/cors", set_up)).status == 204
    shown = (await node.call("GET", "sys/config/cors")).data
    assert shown["allowed_origins"] == [PAGE]
    assert shown["allowed_headers"].count("Authorization") == 1
    allowed = await preflight(node, PAGE, "LIST")
    assert allowed.status == 204
    assert allowed.headers["Access-Control-Allow-Origin"] == PAGE
    assert "X-Custom" in allowed.headers["Access-Control-Allow-Headers"]
    assert (await preflight(node, PAGE, "TRACE")).status == 405
    assert (await preflight(node, "https://other.example", "GET")).status == 403
    for path in ("sys/health", "sys/mounts"):
        assert (await node.call("GET", path, Origin=PAGE)).headers["Access-Control-Allow-Origin"] == PAGE
        stranger = await node.call("GET", path, Origin="https://other.example")
        assert (stranger.status, stranger.errors) == (403, ["origin not allowed"])
        assert (await node.call("GET", path)).status == 200
    assert (await node.call("DELETE", "sys/config/cors")).status == 204
    assert (await preflight(node, PAGE, "GET")).status == 405


@pytest.mark.parametrize("origins", [[], ["*", PAGE], ["https://a b"], ["https://a\r\nX: y"]])
async def test_origins_that_are_refused(node: Harness, origins: list[str]) -> None:
    assert (await node.call("PUT", "sys/config/cors", {"allowed_origins": origins})).status == 400


async def test_settings_reach_the_secondary_and_are_written_by_the_primary() -> None:
    async with primary_and_secondary() as (primary, secondary):
        assert (await secondary.call("PUT", "sys/config/cors", {"allowed_origins": "*"})).status == 204
        await replicate(primary, secondary)
        for one in (primary, secondary):
            assert (await one.call("GET", "sys/config/cors")).data["allowed_origins"] == ["*"]


async def test_chosen_request_headers_are_in_the_audit_log(tmp_path: Path) -> None:
    async with running(audit=LocalRules(directories=(str(tmp_path),), timeout_s=60)) as node:
        log = tmp_path / "audit.log"
        path = "sys/config/auditing/request-headers"
        assert (await node.call("PUT", f"{path}/X-Clear", {})).status == 204
        assert (await node.call("PUT", f"{path}/X-Hidden", {"hmac": True})).status == 204
        assert (await node.call("GET", f"{path}/x-HIDDEN")).data == {"x-hidden": {"hmac": True}}
        enabled = await node.call("PUT", "sys/audit/f", {"type": "file", "options": {"file_path": str(log)}})
        assert enabled.status == 204, enabled.errors
        await node.call("GET", "sys/mounts", X_Clear="one", X_Hidden="two", X_Other="three")
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        seen = [entry["request"]["headers"] for entry in entries if entry["request"]["path"] == "sys/mounts"]
        assert len(seen) == 2
        for headers in seen:
            assert headers["x-clear"] == ["one"]
            assert headers["x-hidden"][0].startswith("hmac-sha256:")
            assert len(headers) == 2
        assert "three" not in log.read_text()
        assert (await node.call("DELETE", f"{path}/x-clear")).status == 204
        assert (await node.call("LIST", path)).body["headers"] == {"x-hidden": {"hmac": True}}
        assert (await node.call("GET", f"{path}/x-clear")).status == 400
        assert (await node.call("PUT", f"{path}/a:b", {})).status == 400


async def test_headers_of_the_web_ui(node: Harness) -> None:
    path = "sys/config/ui/headers/Content-Security-Policy"
    assert (await node.call("LIST", "sys/config/ui/headers")).status == 404
    assert (await node.call("PUT", path, {"values": "a, b"})).status == 204
    assert (await node.call("GET", path)).data == {"value": "a, b"}
    assert (await node.call("GET", f"{path}?multivalue=true")).data == {"values": ["a, b"]}
    assert (await node.call("LIST", "sys/config/ui/headers")).data["keys"] == ["content-security-policy"]
    assert (await node.call("PUT", "sys/config/ui/headers/X-Vault-Token", {"values": "x"})).status == 400
    assert (await node.call("PUT", path, {"values": ["a\r\nb"]})).status == 400
    assert (await node.call("DELETE", path)).status == 204
    assert (await node.call("GET", path)).status == 404


async def test_the_catalog_of_plugins(node: Harness) -> None:
    catalog = (await node.call("GET", "sys/plugins/catalog")).data
    assert "kv" in catalog["secret"]
    assert catalog["database"] == []
    assert {"name": "kv", "type": "secret", "builtin": True}.items() <= next(
        one for one in catalog["detailed"] if one["name"] == "kv"
    ).items()
    assert "userpass" in (await node.call("LIST", "sys/plugins/catalog/auth")).data["keys"]
    assert (await node.call("LIST", "sys/plugins/catalog/database")).status == 404
    assert (await node.call("LIST", "sys/plugins/catalog/other")).status == 400
    assert (await node.call("GET", "sys/plugins/catalog/secret/kv")).data["builtin"] is True
    assert (await node.call("GET", "sys/plugins/catalog/secret/nosuch")).status == 404
    registered = await node.call("PUT", "sys/plugins/catalog/secret/mine", {"sha256": "00", "command": "x"})
    assert registered.status == 400
    assert "run inside the server" in registered.errors[0]
    assert (await node.call("DELETE", "sys/plugins/catalog/secret/mine")).status == 204
    assert (await node.call("DELETE", "sys/plugins/catalog/secret/kv")).status == 400


async def test_reload_makes_a_new_engine(node: Harness) -> None:
    await with_kv(node)
    await node.call("POST", "secret/data/a", {"data": {"x": 1}})
    before = node.service.mounts.router.get("secret/")
    assert (await node.call("PUT", "sys/plugins/reload/backend", {"mounts": ["secret/"]})).data["reload_id"]
    after = node.service.mounts.router.get("secret/")
    assert after is not before
    assert (await node.call("GET", "secret/data/a")).data["data"] == {"x": 1}
    assert (await node.call("PUT", "sys/plugins/reload/secret/kv")).status == 200
    assert node.service.mounts.router.get("secret/") is not after
    for body in ({}, {"plugin": "kv", "mounts": "secret"}, {"mounts": "nosuch"}):
        assert (await node.call("PUT", "sys/plugins/reload/backend", body)).status == 400


async def test_counters_count_what_there_is(node: Harness) -> None:
    await node.token('path "a" { capabilities = ["read"] }')
    tokens = (await node.call("GET", "sys/internal/counters/tokens")).data
    assert tokens["counters"]["service_tokens"]["total"] == 2
    assert (await node.call("GET", "sys/internal/counters/entities")).data["counters"]["entities"]["total"] == 0
    activity = "sys/internal/counters/activity"
    assert (await node.call("GET", activity)).status == 204
    for start, end in (
        ("2023-11-01T00:00:00Z", "2023-11-30T23:59:59Z"),
        ("1698796800", "1701388799"),
        ("2023-11-01T00:00:00%2B02:00", ""),
    ):
        assert (await node.call("GET", f"{activity}?start_time={start}&end_time={end}")).status == 204
    for query, text in (
        ("start_time=yesterday", "failed to parse start_time"),
        ("end_time=2023-11-01T00:00:00", "failed to parse end_time"),
        ("start_time=99999999999999999999", "failed to parse start_time"),
        ("start_time=1701388799&end_time=1698796800", "later than"),
    ):
        refused = await node.call("GET", f"{activity}?{query}")
        assert (refused.status, text in refused.errors[0]) == (400, True)
    assert (await node.call("GET", "sys/internal/counters/config")).data["queries_available"] is False
    assert (await node.call("GET", "sys/internal/ui/version")).data == {"version": "0.1.0"}


async def test_moving_an_auth_method_revokes_what_it_issued(node: Harness) -> None:
    await with_bob(node)
    login = await node.call("POST", "auth/userpass/login/bob", {"password": "pw"}, token=None)
    token = login.body["auth"]["client_token"]
    assert (await node.call("GET", "auth/token/lookup-self", token=token)).status == 200
    assert (await node.call("POST", "sys/remount", {"from": "auth/userpass", "to": "auth/moved"})).status == 200
    assert (await node.call("GET", "auth/token/lookup-self", token=token)).status == 403
    again = await node.call("POST", "auth/moved/login/bob", {"password": "pw"}, token=None)
    assert again.status == 200


async def test_a_refused_move_revokes_nothing(node: Harness) -> None:
    await with_bob(node)
    login = await node.call("POST", "auth/userpass/login/bob", {"password": "pw"}, token=None)
    for target in ("secret/x", "auth/token", "auth/userpass/below"):
        assert (await node.call("POST", "sys/remount", {"from": "auth/userpass", "to": target})).status == 400
    assert (await node.call("GET", "auth/token/lookup-self", token=login.body["auth"]["client_token"])).status == 200
    assert (await node.call("GET", "sys/remount/status/nosuch")).status == 404


async def test_the_type_of_tokens_follows_the_mount(node: Harness) -> None:
    await with_bob(node)
    tune = {"token_type": "batch", "description": "d", "listing_visibility": "unauth"}
    assert (await node.call("POST", "sys/auth/userpass/tune", tune)).status == 204
    login = await node.call("POST", "auth/userpass/login/bob", {"password": "pw"}, token=None)
    assert login.body["auth"]["token_type"] == "batch"
    shown = (await node.call("GET", "sys/auth/userpass/tune")).data
    assert tune.items() <= shown.items()
    assert (await node.call("POST", "sys/auth/userpass/tune", {"plugin_version": "v9.9.9"})).status == 400


async def test_the_log_streams_to_a_watcher_and_lets_go_of_it(node: Harness) -> None:
    handlers = list(logging.getLogger().handlers)
    logger = logging.getLogger("core")
    url = f"{node.address}/v1/sys/monitor"
    async with node.session.get(url, params={"log_level": "warn"}, headers={"X-Vault-Token": node.root}) as answer:
        assert answer.status == 200
        async with asyncio.timeout(120):
            await eventually(lambda: len(logging.getLogger().handlers) > len(handlers))
            logger.info("below the level")
            logger.warning("seen by the watcher")
            assert await answer.content.readline() == b"seen by the watcher\n"
    await eventually(lambda: logging.getLogger().handlers == handlers)
    for query in ("log_level=loud", "log_format=xml"):
        assert (await node.call("GET", f"sys/monitor?{query}")).status == 400
    assert (await node.call("GET", "sys/monitor", token=None)).status == 403


async def test_profiles_need_sudo_and_show_no_values(node: Harness) -> None:
    reader = await node.token('path "sys/pprof/*" { capabilities = ["read"] }')
    assert (await node.call("GET", "sys/pprof/goroutine", token=reader)).status == 403
    for path, word in (("goroutine", "tasks: "), ("threadcreate", "threads: "), ("profile?seconds=1", ";")):
        headers = {"X-Vault-Token": node.root}
        async with node.session.get(f"{node.address}/v1/sys/pprof/{path}", headers=headers) as answer:
            text = await answer.text()
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain")
        assert word in text
        assert node.root not in text
    assert (await node.call("GET", "sys/pprof/profile?seconds=3600")).status == 400


@pytest.mark.parametrize("path", ["heap", "allocs"])
async def test_memory_is_shown_while_it_is_traced(node: Harness, path: str) -> None:
    untraced = await node.call("GET", f"sys/pprof/{path}")
    assert (untraced.status, "PYTHONTRACEMALLOC" in untraced.errors[0]) == (400, True)
    reader = await node.token('path "sys/pprof/*" { capabilities = ["read"] }')
    assert (await node.call("GET", f"sys/pprof/{path}", token=reader)).status == 403
    tracemalloc.start()
    try:
        held = [bytes(100_000) for _ in range(20)]
        line = f"{__file__}:{sys._getframe().f_lineno - 1}"
        async with node.session.get(
            f"{node.address}/v1/sys/pprof/{path}", headers={"X-Vault-Token": node.root}
        ) as answer:
            rows = (await answer.text()).splitlines()
        (row,) = [row for row in rows if row.endswith(line)]
        assert int(row.split()[0]) >= sum(map(len, held))
    finally:
        tracemalloc.stop()


async def test_undeclared_parameters_are_named_and_not_seen(node: Harness) -> None:
    answer = await node.call("POST", "sys/capabilities-self", {"path": "a", "pth": "b"})
    assert answer.body["warnings"] == ["Endpoint ignored these unrecognized parameters: [pth]"]
    wrong = await node.call("POST", "sys/capabilities-self", {"paths": {"a": 1}})
    assert (wrong.status, wrong.errors[0].startswith('error converting input for field "paths"')) == (400, True)
