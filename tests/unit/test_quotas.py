"""Rate-limit quotas: which one counts, how it counts, and what a client is told."""

import asyncio
import json
from pathlib import Path
from typing import Any

import hvac
import pytest
from hvac import exceptions
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core import quotas
from sidecar.core.quotas import Limiter, RateLimitQuota
from sidecar.request.types import ForwardedAuth, HttpRequest
from tests.support.service_node import Harness, Reply, primary_and_secondary, replicate, running, with_kv


def test_the_most_specific_quota_counts() -> None:
    paths = ["", "secret/", "secret/data/*", "secret/data/app", "auth/userpass/"]
    wanted = {
        "secret/data/app": "secret/data/app",
        "secret/data/app/": "secret/data/app",
        "secret/data/app/x": "secret/data/*",
        "secret/metadata/app": "secret/",
        "secret": "secret/",
        "secrets/x": "",
        "auth/userpass/login/bob": "auth/userpass/",
        "sys/mounts": "",
    }
    for path, expected in wanted.items():
        matching = [quota for quota in (RateLimitQuota(p or "all", 1, p) for p in paths) if quota.matches(path)]
        assert max(matching, key=lambda quota: quota.specificity).path == expected


def test_a_client_gets_its_rate_and_no_more() -> None:
    limiter = Limiter(RateLimitQuota("q", rate=4, interval_s=2))
    assert [limiter.take("a", 0.0) for _ in range(5)] == [0, 0, 0, 0, 0.5]
    assert limiter.take("b", 0.0) == 0, "each client has its own"
    assert limiter.take("a", 0.5) == 0
    assert limiter.take("a", 0.5) > 0
    assert [limiter.take("a", 100.0) for _ in range(5)] == [0, 0, 0, 0, 0.5], "what was not used is not kept"
    assert limiter.take("a", 50.0) > 0, "a clock that goes back gives nothing"


def test_a_client_over_the_limit_can_be_blocked() -> None:
    limiter = Limiter(RateLimitQuota("q", rate=1, block_interval_s=60))
    assert [limiter.take("a", 0.0), limiter.take("a", 0.0)] == [0, 60]
    assert limiter.take("a", 59.0) == 1
    assert limiter.take("a", 60.0) == 0
    assert limiter.take("a", 60.0) == 60
    assert limiter.take("a", -3600.0) == 60, "a clock that goes back does not make it longer"


def test_a_rate_below_one() -> None:
    limiter = Limiter(RateLimitQuota("q", rate=0.5))
    assert [limiter.take("a", 0.0), limiter.take("a", 1.0), limiter.take("a", 2.0)] == [0, 1, 0]


@given(st.floats(0.1, 50), st.integers(1, 10), st.lists(st.floats(0, 3), max_size=200))
def test_no_window_lets_more_through_than_the_rate(rate: float, interval_s: int, pauses: list[float]) -> None:
    limiter = Limiter(RateLimitQuota("q", rate=rate, interval_s=interval_s))
    now_s, passed = 0.0, 0
    for pause_s in pauses:
        now_s += pause_s
        passed += limiter.take("a", now_s) == 0
    assert passed <= max(rate, 1) + rate / interval_s * now_s + 1e-6


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "CLIENTS_MAX", 10)
    limiter = Limiter(RateLimitQuota("q", rate=1))
    for number in range(100):
        limiter.take(str(number), 0.0)
    assert len(limiter._clients) == 10
    assert limiter.take("99", 0.0) > 0


# -- over HTTP


async def quota(node: Harness, name: str, **fields: Any) -> None:
    reply = await node.call("POST", f"sys/quotas/rate-limit/{name}", fields)
    assert reply.status == 204, reply.errors


async def spend(node: Harness, path: str, times: int) -> list[Reply]:
    return [await node.call("GET", path) for _ in range(times)]


async def test_a_client_over_its_quota_gets_429() -> None:
    async with running() as node:
        await with_kv(node)
        await quota(node, "kv", path="secret", rate=2, interval="1m")
        replies = await spend(node, "secret/data/a", 3)
        assert [reply.status for reply in replies] == [404, 404, 429]
        assert replies[-1].errors == ['request path "secret/data/a": rate limit quota exceeded']
        assert replies[-1].headers["Retry-After"] == "30"
        assert (await node.call("GET", "sys/mounts")).status == 200
        body = {"X-Vault-Token": node.root}
        async with node.session.post(f"{node.address}/v1/secret/data/a", data=b"{not json", headers=body) as answer:
            assert answer.status == 429, "decided before the body is parsed"
        request = HttpRequest("GET", "secret/data/a", remote_address="192.0.2.1")
        request.headers["X-Vault-Token"] = node.root
        assert (await node.service.handle(request)).status == 404, "another client has a quota of its own"
        node.clock.now_s += 30
        assert (await node.call("GET", "secret/data/a")).status == 404
        assert (await node.call("GET", "secret/data/a")).status == 429
        assert (await node.call("DELETE", "sys/quotas/rate-limit/kv")).status == 204
        assert (await node.call("GET", "secret/data/a")).status == 404


async def test_quotas_are_written_read_listed_and_refused() -> None:
    async with running() as node:
        assert (await node.call("LIST", "sys/quotas/rate-limit")).status == 404
        await quota(node, "all", rate="1000.5", interval="2s", block_interval=5, inheritable=True)
        assert (await node.call("GET", "sys/quotas/rate-limit/all")).data == {
            "block_interval": 5,
            "inheritable": True,
            "interval": 2,
            "name": "all",
            "path": "",
            "rate": 1000.5,
            "role": "",
            "type": "rate-limit",
        }
        await quota(node, "all", rate=500)
        changed = (await node.call("GET", "sys/quotas/rate-limit/all")).data
        assert (changed["rate"], changed["interval"]) == (500, 2), "the rest stays"
        await quota(node, "box", rate=1000, path="cubbyhole/a*")
        assert (await node.call("LIST", "sys/quotas/rate-limit")).data == {"keys": ["all", "box"]}
        useless = "a quota with a 'role' would never count there"
        bare = "with a 'role', 'path' must be that of an auth method, with nothing behind it"
        inherited = "'inheritable' is of quotas of a namespace, which are those without a path, and always"
        for fields, text in (
            ({}, "rate must be a positive number"),
            ({"rate": 0}, "rate must be a positive number"),
            ({"rate": "nan"}, "rate must be a positive number"),
            ({"rate": "many"}, "rate must be a positive number"),
            ({"rate": 1, "interval": 0}, "interval must be at least one second"),
            ({"rate": 1, "path": "nosuch/x"}, 'invalid path "nosuch/x": no mount serves it'),
            ({"rate": 1, "path": "sys/*/x"}, "a path may have '*' at its end only"),
            ({"rate": 1, "path": "/"}, 'the quota "all" has the same path'),
            ({"rate": 1, "path": "sys/", "role": "x"}, "logins at sys/ are to no role: " + useless),
            ({"rate": 1, "path": "auth/token", "role": "x"}, "logins at auth/token/ are to no role: " + useless),
            ({"rate": 1, "path": "auth/token/create", "role": "x"}, bare),
            ({"rate": 1, "role": "x"}, bare),
            ({"rate": 1, "path": "sys/", "inheritable": True}, inherited),
            ({"rate": 1, "path": "", "inheritable": False}, inherited),
            ({"rate": 1, "type": "lease-count"}, "'type' must be rate-limit"),
        ):
            reply = await node.call("POST", "sys/quotas/rate-limit/new", fields)
            assert (reply.status, reply.errors) == (400, [text]), fields
        assert (await node.call("GET", "sys/quotas/rate-limit/new")).status == 404
        assert (await node.call("POST", "sys/quotas/rate-limit/-x", {"rate": 1})).status == 400


async def test_quotas_survive_a_new_tenure_and_count_on_every_cluster() -> None:
    async with primary_and_secondary() as (primary, secondary):
        await with_kv(primary)
        await replicate(primary, secondary)
        await quota(secondary, "kv", path="secret", rate=1, interval="1m")
        assert (await primary.call("GET", "sys/quotas/rate-limit/kv")).data["path"] == "secret/"
        await replicate(primary, secondary)
        for cluster in (primary, secondary):
            assert [reply.status for reply in await spend(cluster, "secret/data/a", 2)] == [404, 429]
        forwarded = HttpRequest("GET", "secret/data/a", forwarded_auth=ForwardedAuth(policies=("root",)))
        for _ in range(3):
            assert (await primary.service.handle(forwarded)).status == 404, "counted where it came in"
        async with running(store=primary.store, genesis=primary.node.genesis) as again:
            assert [reply.status for reply in await spend(again, "secret/data/a", 2)] == [404, 429]


async def with_roles(node: Harness, *names: str) -> dict[str, dict[str, str]]:
    """An AppRole mount; returns what each role logs in with."""
    await node.call("POST", "sys/auth/approle", {"type": "approle"})
    logins = {}
    for name in names:
        await node.call("POST", f"auth/approle/role/{name}", {"token_policies": "p"})
        role_id = (await node.call("GET", f"auth/approle/role/{name}/role-id")).data["role_id"]
        secret_id = (await node.call("POST", f"auth/approle/role/{name}/secret-id")).data["secret_id"]
        logins[name] = {"role_id": role_id, "secret_id": secret_id}
    return logins


async def test_a_quota_of_a_role_counts_its_logins_alone() -> None:
    async with running() as node:
        logins = await with_roles(node, "slow", "fast")
        await quota(node, "role", path="auth/approle", role="slow", rate=1, interval="1m")
        assert (await node.call("GET", "sys/quotas/rate-limit/role")).data == {
            "block_interval": 0,
            "inheritable": False,
            "interval": 60,
            "name": "role",
            "path": "auth/approle/",
            "rate": 1,
            "role": "slow",
            "type": "rate-limit",
        }

        async def log_in(body: Any, **changes: Any) -> int:
            return (await node.call("POST", "auth/approle/login", {**body, **changes}, token=None)).status

        assert [await log_in(logins["slow"]) for _ in range(3)] == [200, 429, 429]
        assert [await log_in(logins["fast"]) for _ in range(3)] == [200, 200, 200], "of another role"
        assert await log_in(logins["slow"], secret_id="wrong") == 429, "also what would not have succeeded"
        assert await log_in({"role_id": "nosuch", "secret_id": "x"}) == 400
        assert await log_in({"role_id": ["no", "role"]}) == 400
        for _ in range(2):
            assert (await node.call("GET", "auth/approle/role/slow")).status == 200, "no login"
        async with node.session.post(f"{node.address}/v1/auth/approle/login", data=b"{not json") as answer:
            assert answer.status == 400, "its own error"
        # A quota of the whole mount is for the other roles; one of the role comes first.
        await quota(node, "mount", path="auth/approle", rate=2, interval="1m")
        assert [await log_in(logins["fast"]) for _ in range(3)] == [200, 200, 429]
        node.clock.now_s += 60
        assert [await log_in(logins["slow"]) for _ in range(2)] == [200, 429]
        other = {"path": "auth/approle", "role": "slow", "rate": 5}
        reply = await node.call("POST", "sys/quotas/rate-limit/other", other)
        assert reply.errors == ['the quota "role" has the same path and role']
        await node.call("POST", "sys/quotas/config", {"enable_rate_limit_response_headers": True})
        refused = await node.call("POST", "auth/approle/login", logins["slow"], token=None)
        assert (refused.status, refused.headers["X-Ratelimit-Limit"]) == (429, "1")
        assert (await node.call("POST", "sys/quotas/rate-limit/mount", {"role": "slow"})).status == 400
        assert (await node.call("POST", "sys/quotas/rate-limit/role", {"role": ""})).status == 400, "mount has that"


async def test_a_role_that_cannot_be_told_hinders_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as node:
        logins = await with_roles(node, "slow")
        await quota(node, "role", path="auth/approle", role="slow", rate=1, interval="1m")

        async def defect(*_: object) -> str:
            raise KeyError("secret")

        monkeypatch.setattr("sidecar.auth.approle.AppRole.login_role", defect)
        for _ in range(2):
            assert (await node.call("POST", "auth/approle/login", logins["slow"], token=None)).status == 200
        assert "the role of a login to auth/approle/login cannot be told" in caplog.text


async def test_quotas_move_and_end_with_their_mount() -> None:
    async with running() as node:
        await with_kv(node)
        await with_roles(node, "slow")
        await quota(node, "kv", path="secret", rate=1, interval="1m")
        await quota(node, "below", path="secret/data/*", rate=5)
        await quota(node, "role", path="auth/approle", role="slow", rate=5)
        for source, target in (("secret", "moved"), ("auth/approle", "auth/there")):
            assert (await node.call("POST", "sys/remount", {"from": source, "to": target})).status == 200
        listed = {}
        for name in (await node.call("LIST", "sys/quotas/rate-limit")).data["keys"]:
            listed[name] = (await node.call("GET", f"sys/quotas/rate-limit/{name}")).data["path"]
        assert listed == {"kv": "moved/", "below": "moved/data/*", "role": "auth/there/"}
        assert [reply.status for reply in await spend(node, "moved/config", 2)] == [200, 429]
        assert (await node.call("DELETE", "sys/mounts/moved")).status == 204
        assert (await node.call("LIST", "sys/quotas/rate-limit")).data == {"keys": ["role"]}
        async with running(store=node.store, genesis=node.node.genesis) as again:
            assert (await again.call("GET", "sys/quotas/rate-limit/role")).data["path"] == "auth/there/"
            assert (await again.call("DELETE", "sys/auth/there")).status == 204
            assert (await again.call("LIST", "sys/quotas/rate-limit")).status == 404


def drive_hvac(address: str, root: str) -> None:
    client = hvac.Client(url=address, token=root)
    client.sys.create_or_update_quota("slow", rate=1, path="cubbyhole", interval="1m")
    assert client.sys.read_quota("slow")["data"]["rate"] == 1
    assert client.sys.list_quotas()["data"]["keys"] == ["slow"]
    assert client.read("cubbyhole/a") is None
    with pytest.raises(exceptions.RateLimitExceeded):
        client.read("cubbyhole/a")
    client.sys.delete_quota("slow")
    assert client.read("cubbyhole/a") is None


async def test_hvac_sets_quotas() -> None:
    async with running() as node:
        await asyncio.to_thread(drive_hvac, node.address, node.root)


async def test_settings_of_all_quotas(tmp_path: Path) -> None:
    async with running() as node:
        audit = {"type": "file", "options": {"file_path": str(tmp_path / "log")}}
        assert (await node.call("PUT", "sys/audit/file", audit)).status == 204
        assert (await node.call("POST", "sys/quotas/rate-limit/q", {"rate": 1, "path": "auth/token"})).status == 204
        settings = {
            "enable_rate_limit_audit_logging": True,
            "enable_rate_limit_response_headers": True,
            "rate_limit_exempt_paths": ["auth/token/lookup*", "sys/x"],
        }
        assert (await node.call("POST", "sys/quotas/config", settings)).status == 204
        assert (await node.call("GET", "sys/quotas/config")).data == settings
        for _ in range(3):
            assert (await node.call("GET", "auth/token/lookup-self")).status == 200
        passed = await node.call("LIST", "auth/token/accessors")
        refused = await node.call("LIST", "auth/token/accessors")
        assert (passed.status, refused.status) == (200, 429)
        for reply in (passed, refused):
            assert (reply.headers["X-Ratelimit-Limit"], reply.headers["X-Ratelimit-Remaining"]) == ("1", "0")
        lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        assert any("429" in str(line) or "rate limit" in line.get("error", "") for line in lines)
        assert (
            await node.call("POST", "sys/quotas/config", {"enable_rate_limit_response_headers": False})
        ).status == 204
        assert (await node.call("GET", "sys/quotas/config")).data == {
            **settings,
            "enable_rate_limit_response_headers": False,
        }
        node.clock.now_s += 10
        assert "X-Ratelimit-Limit" not in (await node.call("LIST", "auth/token/accessors")).headers
