"""What a listener's and the server's settings do, and that each setting of Vault without effect says why."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from multidict import CIMultiDict

from sidecar import app
from sidecar.api.response_headers import ResponseHeaders
from sidecar.api.server import ServerLimits
from sidecar.config import ConfigError, ServerConfig, TelemetrySettings, ineffective, load, load_text
from sidecar.core.metrics import Metrics
from sidecar.pid_file import pid_file
from sidecar.request.types import Disclosure
from tests.support.service_node import Harness, running

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
STATES = ((False, False), (True, False), (True, True))


def config(listener: str = "", top: str = "") -> ServerConfig:
    return load_text(f'storage "inmem" {{}}\nlistener "tcp" {{ tls_disable = true\n{listener} }}\n{top}', "f")


def limits(listener: str) -> ServerLimits:
    return app.limits_of(config(listener).listeners[0])


def turn(node: Harness, standby: bool, sealed: bool) -> None:
    node.node.state = replace(node.node.state, standby=standby, sealed=sealed)


# ---- shown without a token


async def test_profiles_are_shown_to_anybody_where_the_listener_says_so() -> None:
    async with running(limits=limits("profiling { unauthenticated_pprof_access = true }")) as node:
        for standby, sealed in STATES:
            turn(node, standby, sealed)
            for path, word in (("", "threadcreate"), ("/goroutine", "tasks: "), ("/threadcreate", "thread MainThread")):
                async with node.session.get(f"{node.address}/v1/sys/pprof{path}") as answer:
                    assert (answer.status, answer.headers["Content-Type"][:10]) == (200, "text/plain")
                    assert word in await answer.text()
            assert "PYTHONTRACEMALLOC" in (await node.call("GET", "sys/pprof/heap", token=None)).errors[0]
            for path, status in (("nosuch", 404), ("profile?seconds=3600", 400), ("profile?seconds=-1", 400)):
                assert (await node.call("GET", f"sys/pprof/{path}", token=None)).status == status
            assert (await node.call("POST", "sys/pprof/goroutine", {}, token=None)).status == 405
        turn(node, standby=False, sealed=False)
        assert (await node.call("GET", "sys/in-flight-req", token=None)).status == 403, "another setting"
        assert (await node.call("GET", "sys/pprofile", token=None)).status == 403


async def test_one_profile_at_a_time_for_anybody() -> None:
    async with running(limits=limits("profiling { unauthenticated_pprof_access = true }")) as node:
        url = f"{node.address}/v1/sys/pprof/profile?seconds=1"

        async def status() -> int:
            async with node.session.get(url) as answer:
                return answer.status

        assert sorted(await asyncio.gather(status(), status())) == [200, 503]


@pytest.mark.parametrize(
    "setting",
    [
        "profiling { unauthenticated_in_flight_request_access = true }",
        "inflight_requests_logging { unauthenticated_in_flight_requests_access = true }",
    ],
)
async def test_requests_in_flight_are_shown_to_anybody_where_the_listener_says_so(setting: str) -> None:
    async with running(limits=limits(setting)) as node:
        keys = set()
        for standby, sealed in STATES:
            turn(node, standby, sealed)
            shown = await node.call("GET", "sys/in-flight-req", token=None)
            ((key, own),) = shown.body.items()
            assert (own["request_path"], own["request_method"]) == ("/v1/sys/in-flight-req", "GET")
            assert own["client_remote_address"].rpartition(":")[0] == "127.0.0.1"
            keys.add(key)
        assert len(keys) == len(STATES), "each had ended when the next was asked"


async def test_control_without_the_settings_nothing_is_shown() -> None:
    async with running(limits=limits("")) as node:
        for path in ("sys/pprof", "sys/pprof/goroutine", "sys/in-flight-req", "sys/metrics"):
            assert (await node.call("GET", path, token=None)).status == 403
    assert not app.shows_in_flight(config())
    assert app.shows_in_flight(config("profiling { unauthenticated_in_flight_request_access = true }"))


# ---- left out of answers that need no token


async def test_a_listener_hides_what_it_is_told_to() -> None:
    hides = "redact_addresses = true\nredact_cluster_name = true\nredact_version = true"
    async with running(limits=limits(hides)) as node:
        health = (await node.call("GET", "sys/health", token=None)).body
        assert (health["version"], health["cluster_name"], health["cluster_id"]) == ("", "", "id")
        status = (await node.call("GET", "sys/seal-status", token=None)).body
        assert (status["version"], status["cluster_name"]) == ("", "")
        leader = (await node.call("GET", "sys/leader", token=None)).body
        assert (leader["leader_address"], leader["leader_cluster_address"]) == ("", "")
        assert (leader["is_self"], leader["ha_enabled"]) == (True, True)
        turn(node, standby=True, sealed=True)
        shared = (await node.call("PUT", "sys/unseal", {"key": "00" * 33}, token=None)).body
        assert shared["version"] == ""
    async with running(limits=limits("redact_version = true")) as node:
        health = (await node.call("GET", "sys/health", token=None)).body
        assert (health["version"], health["cluster_name"]) == ("", "c")
        assert (await node.call("GET", "sys/leader", token=None)).body["leader_address"]
    assert Disclosure() == limits("").disclosure


# ---- headers

HEADERS = """custom_response_headers {
  "default" = {
    "Strict-Transport-Security" = ["max-age=60", "preload"]
    "X-Which" = ["default"]
  }
  "4xx" = { "X-Which" = ["4xx"] }
  "404" = { "x-which" = "404" }
}"""


async def test_headers_by_status_the_most_specific_wins() -> None:
    async with running(limits=limits(HEADERS)) as node:
        for path, status, which in (
            ("sys/health", 200, "default"),
            ("sys/mounts", 403, "4xx"),
            ("sys/nosuch/%ff", 400, "4xx"),
        ):
            async with node.session.get(f"{node.address}/v1/{path}") as answer:
                assert answer.status == status
                assert answer.headers.getall("X-Which") == [which]
                assert answer.headers.getall("Strict-Transport-Security") == ["max-age=60; preload"]
                assert answer.headers["Cache-Control"] == "no-store"
        async with node.session.get(f"{node.address}/other") as answer:
            assert (answer.status, answer.headers["X-Which"]) == (404, "404")
        monitor = f"{node.address}/v1/sys/monitor"
        async with node.session.get(monitor, headers={"X-Vault-Token": node.root}) as answer:
            assert (answer.status, answer.headers["X-Which"]) == (200, "default")


async def test_strict_transport_is_on_every_answer_unless_the_listener_says_otherwise() -> None:
    async with running() as node:
        for path in ("v1/sys/health", "v1/sys/mounts", "v1/sys/nosuch/%ff", "other", "v1/sys/internal/specs/openapi"):
            async with node.session.get(f"{node.address}/{path}") as answer:
                assert answer.headers.getall("Strict-Transport-Security") == ["max-age=31536000; includeSubDomains"]


def test_headers_that_are_refused_or_left_to_the_server() -> None:
    warned = config('custom_response_headers { "default" = { "X-Vault-Own" = ["a"]\n "Content-Length" = ["1"] } }')
    assert warned.listeners[0].response_headers == {"default": {}}
    assert [text.partition("header ")[2] for text in warned.warnings] == [
        '"X-Vault-Own" is the server\'s own and is left as it is',
        '"Content-Length" is the server\'s own and is left as it is',
    ]
    for bad in (
        '"6xx" = {}',
        '"2x" = {}',
        '"default" = { "a b" = ["c"] }',
        '"default" = { "a" = ["b\\nSet-Cookie: c"] }',
        '"default" = { "a" = [1] }',
        '"default" = "x"',
    ):
        with pytest.raises(ConfigError):
            config(f"custom_response_headers {{ {bad} }}")


async def test_a_sighup_reads_the_headers_of_a_running_listener_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "set_level", lambda _level: None)
    path = tmp_path / "c.hcl"

    def write(text: str) -> None:
        path.write_text(
            f'storage "inmem" {{}}\nlistener "tcp" {{ address = "127.0.0.1:8200"\n tls_disable = true\n{text} }}\n'
        )

    write('custom_response_headers { "default" = { "X-A" = ["1"] } }')
    loaded = load([str(path)], {}).listeners[0]
    rules = app.limits_of(loaded)
    served = [app.Served(loaded, rules.response_headers)]
    async with running(limits=rules) as node:

        async def headers() -> tuple[str | None, str | None]:
            async with node.session.get(f"{node.address}/v1/sys/health") as answer:
                return answer.headers.get("X-A"), answer.headers.get("X-B")

        assert await headers() == ("1", None)
        write('custom_response_headers { "2xx" = { "X-B" = ["2"] } }')
        app.reload_settings((str(path),), served, ())
        assert await headers() == (None, "2")
        write("nonsense = 1")
        app.reload_settings((str(path),), served, ())
        assert await headers() == (None, "2"), "what was loaded before stays"


def test_a_sighup_sets_the_log_level_only_where_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag, or sys/loggers, would be undone by a log rotation."""
    levels: list[str] = []
    monkeypatch.setattr(app, "set_level", levels.append)
    for name in ("VAULT_LOG_LEVEL", "OUTRIDER_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "c.hcl"
    rest = 'storage "inmem" {}\nlistener "tcp" { tls_disable = true }\n'
    path.write_text(rest)
    app.reload_settings((str(path),), (), ())
    assert levels == []
    path.write_text(f'log_level = "warn"\n{rest}')
    app.reload_settings((str(path),), (), ())
    monkeypatch.setenv("VAULT_LOG_LEVEL", "trace")
    path.write_text(rest)
    app.reload_settings((str(path),), (), ())
    assert levels == ["warn", "trace"]


def test_the_host_is_named_where_it_is_asked_for() -> None:
    assert config(top="enable_response_header_hostname = true").show_hostname
    named = app.limits_of(config().listeners[0], socket.gethostname()).response_headers
    assert named.added(204, CIMultiDict())["X-Vault-Hostname"] == socket.gethostname()
    assert limits("").response_headers.added(200, CIMultiDict()) == CIMultiDict()
    assert ResponseHeaders({}).added(200, CIMultiDict({"a": "b"})) == CIMultiDict({"a": "b"})


# ---- the server's own


def test_the_default_of_a_requests_time() -> None:
    top = 'default_max_request_duration = "20s"'
    assert config(top=top).listeners[0].max_request_duration_s == 20
    assert config('max_request_duration = "5s"', top).listeners[0].max_request_duration_s == 5
    assert config().listeners[0].max_request_duration_s == 90


def test_the_pid_file_is_there_while_the_server_runs(tmp_path: Path) -> None:
    path = tmp_path / "server.pid"
    assert config(top=f'pid_file = "{path}"').pid_file == str(path)
    with pid_file(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"
        assert path.stat().st_mode & 0o777 == 0o644
    assert not path.exists()
    with pid_file(str(path)):
        path.write_text("1\n")
    assert path.read_text() == "1\n", "another process's"
    with pytest.raises(OSError, match="No such file"), pid_file(str(tmp_path / "none" / "x")):
        pass
    with pid_file(""):
        pass


def test_telemetry_as_configured() -> None:
    text = """telemetry {
      disable_hostname = true
      metrics_prefix = "outrider"
      prefix_filter = ["+vault.token", "-vault.expire", "+vault.expire.num_leases"]
      filter_default = false
      usage_gauge_period = "none"
      maximum_gauge_cardinality = 7
      lease_metrics_epsilon = "30m"
      num_lease_metrics_buckets = 4
      add_lease_metrics_namespace_labels = true
    }"""
    loaded = config(top=text)
    assert loaded.warnings == ()
    assert loaded.telemetry == TelemetrySettings(
        86400.0,
        "outrider",
        ("+vault.token", "-vault.expire", "+vault.expire.num_leases"),
        False,
        0.0,
        7,
        1800.0,
        4,
        True,
    )
    assert config().telemetry == config(top="telemetry {}").telemetry == TelemetrySettings()
    assert len(config(top="telemetry { disable_hostname = false }").warnings) == 1
    for bad in (
        'usage_gauge_period = "often"',
        'usage_gauge_period = "1ms"',
        'prefix_filter = ["vault.token"]',
        'metrics_prefix = "a b"',
        "num_lease_metrics_buckets = 1000000",
        'lease_metrics_epsilon = "0s"',
    ):
        with pytest.raises(ConfigError):
            config(top=f"telemetry {{ {bad} }}")


def test_names_of_metrics_are_prefixed_and_filtered() -> None:
    metrics = Metrics()

    def shown() -> list[str]:
        body = metrics.as_json()
        return sorted(one["Name"] for kind in ("Gauges", "Counters", "Samples") for one in body[kind])

    for name in ("token.create", "expire.renew", "expire.num_leases", "core.unseal"):
        metrics.increment(name)
    metrics.sample("token.lookup", 1)
    with metrics.source(lambda: {"expire.leases": 1, "core.active": 1}):
        assert len(shown()) == 7
        metrics.configure("vault", ("+vault.token", "-vault.expire", "+vault.expire.num_leases"))
        assert shown() == [
            "vault.core.active",
            "vault.core.unseal",
            "vault.expire.num_leases",
            "vault.token.create",
            "vault.token.lookup",
        ]
        assert "vault_expire_renew" not in metrics.as_prometheus()
        assert "vault_expire_leases " not in metrics.as_prometheus()
        metrics.configure("vault", ("+vault.token", "-vault.token"), shown_otherwise=False)
        assert shown() == [], "of two that are equally long the one that hides counts"
        metrics.configure("vault", shown_otherwise=False)
        assert shown() == []
        metrics.configure("my.own")
        assert "my.own.core.active" in shown()
        assert "my_own_core_active 1" in metrics.as_prometheus()


# ---- what has no effect says so once, and why

PLACES: Mapping[str, tuple[Mapping[str, str], str, str]] = {
    "top": (ineffective.AT_TOP, "", "{}"),
    "telemetry": (ineffective.IN_TELEMETRY, "", "telemetry {{ {} }}"),
    "replication": (ineffective.IN_REPLICATION, "", "replication {{ {} }}"),
    "listener": (
        {**ineffective.IN_LISTENER, **ineffective.IN_TCP_LISTENER, **ineffective.WITHOUT_FORWARDED_FOR},
        "{}",
        "",
    ),
}
EVERY = [(place, name) for place, (names, _, _) in PLACES.items() for name in names]


@pytest.mark.parametrize(("place", "name"), EVERY)
def test_a_setting_without_effect_says_why(place: str, name: str) -> None:
    reasons, listener, top = PLACES[place]
    (warning,) = config(listener.format(f"{name} = true"), top.format(f"{name} = true")).warnings
    assert f'"{name}"' in warning
    assert warning.endswith(f"has no effect: {reasons[name]}")


def tables() -> list[Mapping[str, str]]:
    found: list[Any] = [value for name, value in vars(ineffective).items() if name.isupper() and name[0] != "_"]
    return [one for one in found if isinstance(one, Mapping)]


def test_the_page_names_every_setting() -> None:
    page = PAGE.read_text()
    missing = {name for table in tables() for name in table if f"`{name}`" not in page}
    assert not missing
