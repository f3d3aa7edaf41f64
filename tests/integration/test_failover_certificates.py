"""A failover to a DR secondary right after a certificate was renewed: nobody is locked out. Over real TLS."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from sidecar.replication import primary as primary_module
from sidecar.replication.modes import DR, PERFORMANCE
from sidecar.replication.roles import SecondaryRole
from sidecar.transport import certificates
from tests.integration.test_certificate_rotation import Later
from tests.support.replication_cluster import OPTIONS, Cluster, Pair, in_step, primary_in, until

QUICK = replace(OPTIONS, certificate_check_s=0.05)


@pytest.fixture
async def pair(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    """us, primary in both modes, and its API; it waits for its mirrors longer than any test does."""
    monkeypatch.setattr(primary_module, "FOLLOWED_WAIT_S", 600.0)
    async with primary_in(PERFORMANCE, DR, primary=Cluster("us", options=QUICK)) as pair:
        yield pair


def shown(cluster: Cluster) -> str:
    """The fingerprint of the certificate that a performance secondary holds."""
    role = cluster.of(PERFORMANCE).role
    assert isinstance(role, SecondaryRole)
    return certificates.fingerprint(role.certificate_pem)


def overdue(secondary: Cluster) -> None:
    """Its certificate looks old from now on."""
    service = secondary.of(PERFORMANCE).secondary
    assert service is not None
    service._renewal._clock = Later()


@contextlib.contextmanager
def slow(store: Any) -> Any:
    """A store whose commits wait until the event is set."""
    inner, go_on = store.commit, asyncio.Event()

    async def commit(*arguments: Any, **options: Any) -> Any:
        await go_on.wait()
        return await inner(*arguments, **options)

    store.commit = commit
    try:
        yield go_on
    finally:
        go_on.set()
        store.commit = inner


async def promoted(mirror: Cluster) -> None:
    """By force, its primary being gone; waits for the tenure that this begins."""
    tenures = mirror.tenures
    await mirror.manager.secondary_promote("dr", "", force=True, preview=False)
    await until(lambda: mirror.tenures > tenures and mirror.manager.modes()[1] == "primary")


async def with_mirrors(pair: Pair) -> tuple[Cluster, Cluster, Cluster]:
    """eu, a performance secondary of us; and the DR secondaries of us and of eu."""
    eu = await pair.activate("eu", QUICK)
    us_dr = await pair.activate("us-dr", QUICK, mode=DR)
    await eu.manager.primary_enable("dr", "")
    eu_dr = await pair.activate("eu-dr", QUICK, mode=DR, of=eu)
    await until(lambda: in_step(pair.primary, eu) and in_step(pair.primary, us_dr, DR) and in_step(eu, eu_dr, DR))
    return eu, us_dr, eu_dr


async def test_a_certificate_is_handed_over_when_the_primarys_mirror_knows_it(pair: Pair) -> None:
    us = pair.primary
    eu, us_dr, _ = await with_mirrors(pair)
    first = shown(eu)
    with slow(us_dr.store) as go_on:
        overdue(eu)
        known = lambda: us.of(PERFORMANCE).role.secondaries["eu"].next_fingerprint  # noqa: E731 - the role moves
        await until(lambda: bool(known()))
        offered = known()
        await asyncio.sleep(0.3)
        assert shown(eu) == first, "the mirror does not have it yet"
        go_on.set()
        await until(lambda: shown(eu) == offered)
    await us.stop()
    await promoted(us_dr)
    us_dr.store.write(("r/m/after", b"1"))
    await eu.manager.secondary_update_primary("performance", "", addresses=[us_dr.address])
    await until(lambda: in_step(us_dr, eu))
    assert shown(eu) == offered


async def test_a_certificate_is_used_when_the_secondarys_mirror_has_it(pair: Pair) -> None:
    us = pair.primary
    eu, _, eu_dr = await with_mirrors(pair)
    first = shown(eu)
    with slow(eu_dr.store) as go_on:
        overdue(eu)
        await until(lambda: shown(eu) != first)
        await asyncio.sleep(0.3)
        assert us.of(PERFORMANCE).role.by_fingerprint(first) is not None, "nobody gave the first one up"
        go_on.set()
        await until(lambda: us.of(PERFORMANCE).role.by_fingerprint(first) is None)
    await eu.stop()
    await promoted(eu_dr)
    assert shown(eu_dr) == shown(eu)
    us.store.write(("r/m/after", b"1"))
    await until(lambda: in_step(us, eu_dr))


async def test_the_control_who_does_not_wait_is_locked_out(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mirror is cut off, and nobody waits for it: promoted, it shows a certificate that nobody knows any more."""
    monkeypatch.setattr(primary_module, "FOLLOWED_WAIT_S", 0.0)
    us = pair.primary
    eu, _, eu_dr = await with_mirrors(pair)
    first = shown(eu)
    await eu_dr.stop()
    overdue(eu)
    await until(lambda: us.of(PERFORMANCE).role.by_fingerprint(first) is None)
    await eu.stop()
    again = await pair.start("eu-dr-again", eu_dr.store, QUICK)
    await promoted(again)
    assert shown(again) == first
    await until(lambda: (service := again.of(PERFORMANCE).secondary) is not None and service._failures >= 3)
    service = again.of(PERFORMANCE).secondary
    assert service is not None
    assert not service.connected_to
    # What is left is a token.
    token = await pair.token("eu-again")
    await again.manager.secondary_update_primary("performance", token)
    await until(lambda: in_step(us, again))
