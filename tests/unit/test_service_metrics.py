"""sys/metrics over HTTP: with a token, and without one where the listener says so."""

import json
from dataclasses import replace
from typing import Any

import pytest

from sidecar.api.server import ServerLimits
from sidecar.config import ConfigError, load_text
from sidecar.core.metrics import METRICS
from sidecar.request.types import Disclosure
from tests.support.service_node import Harness, log_in, running, with_bob, with_kv


async def scrape(node: Harness, query: str = "", token: str | None = "root") -> tuple[int, str, str]:
    headers = {} if token is None else {"X-Vault-Token": node.root if token == "root" else token}
    async with node.session.get(f"{node.address}/v1/sys/metrics{query}", headers=headers) as answer:
        return answer.status, answer.headers["Content-Type"], await answer.text()


def names(body: dict[str, Any]) -> set[str]:
    return {entry["Name"] for group in ("Gauges", "Counters", "Samples") for entry in body[group]}


async def test_metrics_need_a_token() -> None:
    async with running() as node:
        await with_kv(node)
        await node.call("POST", "secret/data/a", {"data": {"password": "hunter2"}})
        await node.call("POST", "auth/token/create", {"ttl": "1h"})
        status, kind, text = await scrape(node)
        assert (status, kind) == (200, "text/plain; charset=utf-8")
        body = json.loads(text)
        assert set(body) == {"Timestamp", "Gauges", "Points", "Counters", "Samples"}
        assert {"vault.barrier.put", "vault.core.handle_request", "vault.token.create", "vault.token.lookup"} <= names(
            body
        )
        assert "hunter2" not in text
        with METRICS.source(node.service.gauges):
            status, kind, text = await scrape(node, "?format=prometheus")
        assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
        for name in (
            "core_in_flight_requests 1",
            "barrier_estimated_encryptions",
            'core_response_status_code{code="200"',
        ):
            assert f"vault_{name}" in text
        assert node.root not in text
        for token in (None, "nosuch"):
            assert (await scrape(node, token=token))[0] == 403
        poor = await node.token('path "other" { capabilities = ["read"] }')
        assert (await scrape(node, token=poor))[0] == 403
        node.node.state = replace(node.node.state, standby=True)
        status, _, text = await scrape(node)
        assert (status, json.loads(text)["errors"]) == (400, ["cannot forward local-only request"])


async def test_a_listener_may_show_them_to_anybody() -> None:
    async with running(limits=ServerLimits(disclosure=Disclosure(metrics=True))) as node:
        for standby, sealed in ((False, False), (True, False), (True, True)):
            node.node.state = replace(node.node.state, standby=standby, sealed=sealed)
            assert (await scrape(node, token=None))[0] == 200
        async with node.session.post(f"{node.address}/v1/sys/metrics") as answer:
            assert answer.status == 405


async def test_prometheus_can_be_off() -> None:
    async with running(limits=ServerLimits(disclosure=Disclosure(metrics=True)), prometheus=False) as node:
        for token in (None, "root"):
            status, kind, text = await scrape(node, "?format=prometheus", token=token)
            assert (status, text) == (400, "prometheus is not enabled")
            assert kind.startswith("text/plain")
            assert (await scrape(node, token=token))[0] == 200
    async with running(prometheus=False) as node:
        assert (await scrape(node, "?format=prometheus"))[::2] == (400, "prometheus is not enabled")


def config(listener: str = "", top: str = "") -> Any:
    return load_text(f'storage "inmem" {{}}\nlistener "tcp" {{ tls_disable = true\n{listener} }}\n{top}', "f")


def test_what_the_configuration_says() -> None:
    assert not config().listeners[0].unauthenticated_metrics_access
    assert config("telemetry { unauthenticated_metrics_access = true }").listeners[0].unauthenticated_metrics_access
    assert config(top='telemetry { prometheus_retention_time = "0s" }').telemetry.prometheus_retention_s == 0
    warned = config(top='telemetry { statsd_address = "x" disable_hostname = true }')
    assert warned.telemetry.prometheus_retention_s == 86400
    assert len(warned.warnings) == 1
    for listener, top in (
        ("telemetry { disallow_metrics = true }", ""),
        ("telemetry { nosuch = true }", ""),
        ("", "telemetry { nosuch = 1 }"),
    ):
        with pytest.raises(ConfigError):
            config(listener, top)


async def test_the_names_that_dashboards_of_vault_ask_for() -> None:
    """Contract 8.2 and 8.3: each after what it counts was done once."""
    async with running() as node:
        await with_kv(node, "1")
        await with_bob(node)
        await log_in(node)
        await node.call("POST", "secret/a", {"x": "y"})
        await node.call("DELETE", "secret/a")
        await node.call("PUT", "sys/policies/acl/p", {"policy": 'path "a" { capabilities = ["read"] }'})
        token = (await node.call("POST", "auth/token/create", {"policies": ["p"]})).body["auth"]["client_token"]
        await node.call("POST", "auth/token/lookup", {"token": token})
        await node.call("GET", "secret/a", token=token)
        await node.call("LIST", "sys/policies/acl")
        await node.call("DELETE", "sys/policies/acl/p")
        await node.call("POST", "auth/token/revoke", {"token": token})
        with METRICS.source(node.service.gauges):
            body = METRICS.as_json()
            text = METRICS.as_prometheus()
    for name in (
        "barrier.delete",
        "core.check_token",
        "core.fetch_acl_and_token",
        "core.handle_login_request",
        "core.handle_request",
        "core.mount_table.num_entries",
        "expire.fetch-lease-times-by-token",
        "policy.delete_policy",
        "policy.get_policy",
        "policy.list_policies",
        "policy.set_policy",
        "route.create.secret-",
        "route.delete.secret-",
        "route.update.sys-",
        "token.create",
        "token.lookup",
        "token.revoke",
    ):
        assert f"vault.{name}" in names(body), name
    assert 'vault_core_mount_table_num_entries{local="false",type="logical"} 2' in text
    assert 'vault_core_mount_table_num_entries{local="true",type="logical"} 1' in text
    assert "vault_route_delete_secret_" in text
