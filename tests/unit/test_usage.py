"""Usage gauges: what is counted, under which labels, and that counting is slow, bounded and can be interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from consul_backend import errors as backend
from sidecar.core.metrics import METRICS, Labelled
from sidecar.core.usage import (
    TokenShape,
    UsageSettings,
    kv_gauges,
    lease_gauges,
    token_gauges,
    ttl_label,
)
from sidecar.request import usage as counting
from sidecar.request.usage import Usage
from tests.support.service_node import Harness, log_in, running, with_bob, with_kv

OWN = {"cluster": "test", "namespace": "root"}


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


def usage_of(node: Harness, settings: UsageSettings | None = None) -> tuple[Usage, list[None]]:
    """Counts of ``node``, and how often it has paused."""
    service = node.service
    pauses: list[None] = []

    async def pause() -> None:
        pauses.append(None)
        await asyncio.sleep(0)

    made = Usage(
        service._sealed,
        service.mounts,
        settings or UsageSettings(),
        cluster="test",
        now=node.clock,
        gate=lambda: node.gate[0] if node.gate else None,
        pause=pause,
    )
    return made, pauses


# ---- the labels


@pytest.mark.parametrize(
    ("ttl_s", "label"),
    [(0, "+Inf"), (1, "1m"), (60, "1m"), (61, "10m"), (3600, "1h"), (2764800, "+Inf"), (2592000, "30d")],
)
def test_creation_ttls_in_steps(ttl_s: int, label: str) -> None:
    assert ttl_label(ttl_s) == label


def test_of_the_values_of_a_label_the_most_frequent_are_shown() -> None:
    shapes = {TokenShape((f"p{number}",), "userpass", "1h"): number + 1 for number in range(9)}
    found = token_gauges(shapes, "test", 2)
    assert found[Labelled("token.count", **OWN)] == 45
    shown = {one.labels for one in found if isinstance(one, Labelled) and one.name == "token.count.by_policy"}
    assert {dict(labels)["policy"] for labels in shown} == {"p8", "p7"}
    assert len(kv_gauges({"a/": 1, "b/": 2, "c/": 3}, "test", 2)) == 2


def test_leases_in_buckets_by_rounding() -> None:
    """As Vault: an hour's buckets, what ends in less than half an hour is in the first."""
    now_s = 1_700_000_000.0  # 22:13:20
    minute = int(now_s) // 60
    counts = {minute - 1000: 9, minute + 20: 1, minute + 40: 2, minute + 80: 4, minute + 100: 8, minute + 5000: 9}
    found = lease_gauges(counts, now_s, UsageSettings(buckets=3))
    assert found == {
        Labelled("expire.leases.by_expiration", expiring="2023-11-14 22:00:00 +0000 UTC"): 1.0,
        Labelled("expire.leases.by_expiration", expiring="2023-11-14 23:00:00 +0000 UTC"): 6.0,
        Labelled("expire.leases.by_expiration", expiring="2023-11-15 00:00:00 +0000 UTC"): 8.0,
    }
    named = lease_gauges(counts, now_s, UsageSettings(buckets=1, lease_namespace=True))
    assert [one.labels for one in named if isinstance(one, Labelled)] == [
        (("expiring", "2023-11-14 22:00:00 +0000 UTC"), ("namespace", "root"))
    ]


# ---- what is counted


async def test_tokens_secrets_and_leases_are_counted(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    await with_bob(node)
    assert (await log_in(node)).status == 200
    for ttl in ("30s", "30s", "2h"):
        await node.call("POST", "auth/token/create", {"policies": ["app", "ops"], "ttl": ttl})
    await node.call("POST", "auth/token/create", {"type": "batch", "ttl": "1h", "policies": ["app"]})
    await with_kv(node)
    assert (await node.call("POST", "sys/mounts/one", {"type": "kv"})).status == 204
    assert (await node.call("POST", "sys/mounts/empty", {"type": "kv"})).status == 204
    for path in ("a", "b/c", "b/d/e"):
        await node.call("POST", f"secret/data/{path}", {"data": {"x": "1"}})
        await node.call("POST", f"secret/data/{path}", {"data": {"x": "2"}})
        await node.call("POST", f"one/{path}", {"x": "1"})
    usage, pauses = usage_of(node)
    assert usage.gauges() == {}
    await usage.count()
    found = usage.gauges()

    def value(name: str, **labels: str) -> float | None:
        return found.get(Labelled(name, **OWN, **labels))

    assert value("token.count") == 5, "the root token, bob's and three; a batch token is stored nowhere"
    assert value("token.count.by_policy", policy="app") == 3
    assert value("token.count.by_policy", policy="root") == 1
    assert value("token.count.by_auth", auth_method="userpass") == 1
    assert value("token.count.by_auth", auth_method="token") == 4
    assert value("token.count.by_ttl", creation_ttl="1m") == 2
    assert value("token.count.by_ttl", creation_ttl="2h") == 1
    assert {mount: value("secret.kv.count", mount_point=mount) for mount in ("secret/", "one/", "empty/")} == {
        "secret/": 3,
        "one/": 3,
        "empty/": 0,
    }
    leases = {one: count for one, count in found.items() if one.startswith("expire.leases.by_expiration")}
    assert sorted(leases.values()) == [1, 2], "two within half an hour, one in two hours; bob's ends after the week"
    assert pauses

    # What a token is counted by is read once; a token that has gone is forgotten.
    async def unread(_: Any, keys: list[str]) -> list[bytes]:
        raise AssertionError(keys)

    monkeypatch.setattr(counting, "read_many", unread)
    assert (await node.call("DELETE", "sys/auth/userpass")).status == 204
    await usage.count()
    found = usage.gauges()
    assert value("token.count") == 4
    assert value("token.count.by_auth", auth_method="userpass") is None
    assert all(count >= 0 for count in found.values())


async def test_they_are_scraped_with_the_rest(node: Harness) -> None:
    await node.service._usage.count()
    with METRICS.source(node.service.gauges):
        text = METRICS.as_prometheus()
    cluster = node.node.genesis.cluster.cluster_name
    assert f'vault_token_count{{cluster="{cluster}",namespace="root"}} 1' in text
    assert f'vault_token_count_by_policy{{cluster="{cluster}",namespace="root",policy="root"}} 1' in text
    assert 'vault_metrics_collection_count{gauge="token"}' in text
    assert 'vault_core_mount_table_size{local="false",type="logical"}' in text


async def test_token_creations_by_method(node: Harness) -> None:
    await with_bob(node, token_ttl="10m")
    await log_in(node)
    text = METRICS.as_prometheus()
    assert (
        'vault_token_creation{auth_method="userpass",creation_ttl="10m",mount_point="auth/userpass/",'
        'namespace="root",token_type="service"}' in text
    )


# ---- slow, bounded, interruptible


async def test_leases_are_gone_on_with_where_a_pass_stopped(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    for minutes in range(1, 7):
        await node.call("POST", "auth/token/create", {"policies": ["app"], "ttl": f"{minutes * 10}m"})
    monkeypatch.setattr(counting, "PAUSE_S", 300.0)  # one call a pass
    usage, _ = usage_of(node)
    seen = []
    for _ in range(6):
        await usage.count()
        seen.append(sum(count for name, count in usage.gauges().items() if name.startswith("expire.")))
    assert seen == [1, 2, 3, 4, 5, 6]
    node.clock.now_s += 3 * 3600
    await usage.count()
    assert not [name for name in usage.gauges() if name.startswith("expire.")], "they have ended"


async def test_more_tokens_than_are_looked_into(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        await node.call("POST", "auth/token/create", {"policies": ["app"]})
    monkeypatch.setattr(counting, "TOKENS_MAX", 2)
    usage, _ = usage_of(node)
    await usage.count()
    tokens = {name: count for name, count in usage.gauges().items() if name.startswith("token.")}
    assert tokens == {Labelled("token.count", **OWN): 4.0}


async def test_a_mount_with_too_many_folders_is_not_counted(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    await with_kv(node, "1")
    assert (await node.call("POST", "sys/mounts/small", {"type": "kv"})).status == 204
    for number in range(5):
        await node.call("POST", f"secret/{number}/x", {"x": "1"})
    monkeypatch.setattr(counting, "FOLDERS_MAX", 3)
    usage, _ = usage_of(node)
    await usage.count()
    assert Labelled("secret.kv.count", **OWN, mount_point="small/") in usage.gauges()
    assert Labelled("secret.kv.count", **OWN, mount_point="secret/") not in usage.gauges()


async def test_what_cannot_be_read_stays_as_it_was_and_the_rest_goes_on(node: Harness) -> None:
    usage, _ = usage_of(node)
    await usage.count()
    before = usage.gauges()
    node.gate.append("being filled")
    await usage.count()
    node.gate.clear()
    listed = node.store.list

    async def failing(prefix: str) -> list[str]:
        if prefix.startswith("l/token/"):
            raise backend.Unavailable("gone")
        return await listed(prefix)

    node.store.list = failing  # type: ignore[method-assign]  # a store that cannot be read
    await usage.count()
    assert usage.gauges() == before


async def test_it_can_be_interrupted_and_switched_off(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    off, _ = usage_of(node, UsageSettings(period_s=0))
    await asyncio.wait_for(off.run(), 120)
    monkeypatch.setattr(counting, "FIRST_S", 0.0)
    stuck, started = asyncio.Event(), asyncio.Event()
    usage, _ = usage_of(node)

    async def forever() -> None:
        started.set()
        await stuck.wait()

    usage._pause = forever
    task = asyncio.create_task(usage.run())
    await started.wait()
    assert (await node.call("GET", "sys/mounts")).status == 200, "a request waits for nothing of it"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_loop_turns_while_known_tokens_are_looked_through(
    node: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100,000 names in one piece would hold it up for tenths of a second."""
    monkeypatch.setattr(counting, "_AT_A_TURN", 100)
    usage, _ = usage_of(node)
    shape = TokenShape(("app",), "token", "1h")
    usage._tokens = {str(number): shape for number in range(3000)}
    usage._shapes[shape] = 3000
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    turning = asyncio.create_task(turn())
    await asyncio.sleep(0)
    assert await usage._forget_gone([str(number) for number in range(1000, 4000)]) == [
        str(number) for number in range(3000, 4000)
    ]
    turning.cancel()
    assert turns >= 40, "30 for the names, 10 for those that are gone"
    assert (len(usage._tokens), usage._shapes) == (2000, {shape: 2000})


async def test_half_a_pass_is_none(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    await node.call("POST", "auth/token/create", {"policies": ["app"]})
    usage, _ = usage_of(node)
    await usage.count()
    before = usage.gauges()

    async def failing(_: Any, keys: list[str]) -> list[bytes]:
        raise backend.Unavailable("gone")

    await node.call("POST", "auth/token/create", {"policies": ["app"]})
    with monkeypatch.context() as patched:
        patched.setattr(counting, "read_many", failing)
        await usage.count()
    assert {name: count for name, count in usage.gauges().items() if name.startswith("token.")} == {
        name: count for name, count in before.items() if name.startswith("token.")
    }
    await usage.count()
    assert usage.gauges()[Labelled("token.count", **OWN)] == 3
