"""The wall clock is set by seconds or by hours: nothing lives longer for it (statement 32, fault F23)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import jwt
import pytest

from consul_backend.clock import SteadyTime
from plugin_api.errors import InvalidRequest
from sidecar.replication.activation import Bundle, bootstrap, parse_bundle
from sidecar.replication.modes import PERFORMANCE
from sidecar.replication.roles import BOOTSTRAP_GRACE_MS, PrimaryRole
from sidecar.wall_clock import watch_wall_clock
from tests.support.leasing_engine import TYPE, Outside, credentials_engine, registry_with
from tests.support.replication import FakeClock
from tests.support.replication_cluster import Cluster
from tests.support.service_node import FakeReplication, Harness, running

STEPS_S = (-7200, -300, -5, 5, 300, 7200)
TTL_S = 60


def test_it_goes_on_whatever_is_done_to_the_wall_clock() -> None:
    clock = FakeClock()
    steady = SteadyTime(clock)
    began_ms = steady.time_ms()
    for step_s in STEPS_S:
        clock.skew_ms += step_s * 1000
        clock.now_s += 10
    assert steady.time_ms() == began_ms + 10_000 * len(STEPS_S)
    assert steady.now_s() == pytest.approx(steady.time_ms() / 1000)
    clock.skew_ms -= 3_600_000
    assert steady.wall_ahead_s() == pytest.approx(sum(STEPS_S) - 3600)


def test_a_tenure_begins_no_earlier_than_the_log_it_goes_on_with() -> None:
    clock = FakeClock()
    newest_ms = clock.time_ms()
    clock.skew_ms -= 7_200_000  # set back before this node began to lead
    assert SteadyTime(clock, newest_ms).time_ms() == newest_ms
    assert SteadyTime(clock).time_ms() == newest_ms - 7_200_000, "without the log it would begin two hours ago"


def wall_of(clock: FakeClock) -> Callable[[], float]:
    return lambda: clock.time_ms() / 1000


@asynccontextmanager
async def served(clock: FakeClock, *, steady: bool = True) -> AsyncIterator[tuple[Harness, Outside]]:
    """A node with an engine that issues leases; by steady time, or as a control by the wall clock alone."""
    outside, engine = credentials_engine()
    wall = wall_of(clock)
    now = SteadyTime(clock).now_s if steady else wall
    registry = registry_with(engine)
    async with running(plugins=registry, replication=FakeReplication(), now=now, wall=wall) as node:
        assert (await node.call("POST", "sys/mounts/db", {"type": TYPE})).status == 204
        yield node, outside


async def given(node: Harness) -> dict[str, Any]:
    """One of everything that lives for a minute: tokens of both kinds, a lease, an activation token."""
    ttl = f"{TTL_S}s"
    service = await node.call("POST", "auth/token/create", {"policies": ["default"], "ttl": ttl})
    batch = await node.call("POST", "auth/token/create", {"policies": ["default"], "ttl": ttl, "type": "batch"})
    lease = await node.call("POST", "db/creds/app", {"ttl": TTL_S})
    activation = await node.call(
        "POST", "sys/replication/performance/primary/secondary-token", {"id": "eu", "ttl": ttl}
    )
    return {
        "service": service.body["auth"]["client_token"],
        "batch": batch.body["auth"]["client_token"],
        "lease": lease.body["lease_id"],
        "activation": activation.body["wrap_info"]["token"],
    }


async def alive(node: Harness, made: dict[str, Any]) -> dict[str, bool]:
    await node.service._leasing.expiration.sweep()
    found = {
        name: (await node.call("GET", "auth/token/lookup-self", token=made[name])).status == 200
        for name in ("service", "batch")
    }
    found["lease"] = (await node.call("PUT", "sys/leases/lookup", {"lease_id": made["lease"]})).status == 200
    # Its wrapped half: the JWT around it is judged by wall clocks, within a leeway.
    inner = str(jwt.decode(made["activation"], options={"verify_signature": False})["jti"])
    found["activation"] = (await node.call("POST", "sys/wrapping/lookup", {"token": inner}, token=None)).status == 200
    return found


@pytest.mark.parametrize("step_s", STEPS_S)
async def test_32_a_step_of_the_wall_clock_lengthens_and_shortens_nothing(step_s: int) -> None:
    clock = FakeClock()
    async with served(clock) as (node, outside):
        made = await given(node)
        clock.now_s += TTL_S // 2
        clock.skew_ms += step_s * 1000
        assert all((await alive(node, made)).values())
        clock.now_s += TTL_S // 2 - 2
        assert all((await alive(node, made)).values())
        clock.now_s += 3
        assert not any((await alive(node, made)).values())
        assert not outside.valid, "the lease was revoked where it was issued"


async def test_32_control_by_the_wall_clock_everything_would_live_on() -> None:
    clock = FakeClock()
    async with served(clock, steady=False) as (node, outside):
        made = await given(node)
        clock.skew_ms -= 7_200_000
        clock.now_s += 2 * TTL_S
        assert all((await alive(node, made)).values())
        assert outside.valid


@pytest.mark.parametrize("step_s", [-7200, -5, 5, 7200])
async def test_a_renewal_after_a_step_counts_from_now(step_s: int) -> None:
    clock = FakeClock()
    async with served(clock) as (node, _):
        made = await given(node)
        clock.now_s += 50
        clock.skew_ms += step_s * 1000
        renewed = await node.call("POST", "sys/leases/renew", {"lease_id": made["lease"], "increment": TTL_S})
        assert renewed.status == 200, renewed.errors
        clock.now_s += TTL_S - 2
        assert (await alive(node, made))["lease"]
        clock.now_s += 3
        assert not (await alive(node, made))["lease"]


async def test_32_an_unwrapped_activation_is_not_kept_alive_by_a_clock_that_is_set_back() -> None:
    primary = Cluster("us")
    clock = primary.clock = FakeClock()
    await primary.start()
    try:
        await primary.manager.primary_enable("performance", "")
        early, late = [await unwrapped(primary, name) for name in ("early", "late")]
        clock.skew_ms -= 7_200_000
        clock.now_s += TTL_S
        assert (await bootstrap(PERFORMANCE, early, store_id="s", timeout_s=20)).role.secondary_id == "early"
        clock.now_s += BOOTSTRAP_GRACE_MS / 1000 + 1
        with pytest.raises(InvalidRequest, match="this activation has expired"):
            await bootstrap(PERFORMANCE, late, store_id="s", timeout_s=20)
        role = primary.manager.performance.role
        assert isinstance(role, PrimaryRole)
        assert clock.time_ms() < role.secondaries["late"].expires_ms, "by the wall clock it would be good for hours"
    finally:
        await primary.stop()


async def unwrapped(primary: Cluster, name: str) -> Bundle:
    payload, claims = await primary.manager.secondary_token("performance", name, TTL_S, "")
    return parse_bundle(payload, claims["ca_sha256"])


async def test_a_clock_that_was_set_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.wall_clock.LOOK_S", 0.0)
    clock = FakeClock()
    steady = SteadyTime(clock)
    with caplog.at_level(logging.WARNING):
        watching = asyncio.create_task(watch_wall_clock(steady))
        for skew_ms, said in ((0, 0), (-300, 0), (-7_200_000, 1), (-7_200_000, 1), (0, 2)):
            clock.skew_ms = skew_ms
            for _ in range(3):
                await asyncio.sleep(0)
            assert caplog.text.count("the wall clock is") == said
        watching.cancel()
    assert "7200.0 s behind" in caplog.text
