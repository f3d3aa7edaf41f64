"""Statement 12, by time: a login of a user there is none of, and a token that is nearly right, take as long as others.

``OUTRIDER_TIMING_PAIRS`` sets how many pairs of logins are compared: 30 here, 10,000 in ``make soak-timing``, where
each verdict is printed. Each has a control with a planted difference that the same test must notice.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import bcrypt
import pytest

from sidecar.auth import userpass
from sidecar.request.types import HttpRequest
from tests.support.leasing import make_setup
from tests.support.service_node import Harness, running, with_bob
from tests.support.timing import Verdict, compare, judge

LOGINS = int(os.environ.get("OUTRIDER_TIMING_PAIRS", "30"))
LOOKUPS = max(LOGINS, 3000)


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        await with_bob(harness)
        lockout = {"user_lockout_config": {"lockout_threshold": "1000000"}}
        assert (await harness.call("POST", "sys/auth/userpass/tune", lockout)).status == 204
        yield harness


def shown(name: str, verdict: Verdict) -> Verdict:
    print(f"{name}: {verdict}")
    return verdict


async def logins(node: Harness, pairs: int) -> Verdict:
    """A wrong password for a known and for an unknown user; the whole way of the request, by the processor's time."""

    async def refused(name: str) -> None:
        request = HttpRequest(
            "POST", f"auth/userpass/login/{name}", body=b'{"password":"wrong"}', remote_address="127.0.0.1"
        )
        assert (await node.service.handle(request)).status == 400

    return await compare(lambda: refused("bob"), lambda: refused("eve"), pairs)


async def judged(measure: Callable[[int], Awaitable[Verdict]], pairs: int, *, told: bool) -> Verdict:
    """The verdict on so many pairs; where a busy machine made it another than is expected, on more of them: what can
    be told apart can be told the better the more there are, and what chance told apart once it does not again."""
    verdict = await measure(pairs)
    for more in (2, 4, 8):
        if verdict.told_apart is told:
            break
        verdict = await measure(more * pairs)
    return verdict


async def test_12_an_unknown_user_takes_as_long_as_a_known_one(node: Harness) -> None:
    verdict = shown("login", await judged(partial(logins, node), LOGINS, told=False))
    assert not verdict.told_apart, verdict


async def test_12_control_with_a_sixteenth_more_work_an_unknown_user_is_told(
    node: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = bcrypt.checkpw

    def more_for_nobody(secret: bytes, expected: bytes) -> bool:
        if expected == userpass._NOBODY:
            bcrypt.hashpw(secret, bcrypt.gensalt(userpass.BCRYPT_COST - 4))
        return check(secret, expected)

    monkeypatch.setattr(bcrypt, "checkpw", more_for_nobody)
    verdict = shown("login, planted", await judged(partial(logins, node), 30, told=True))
    assert verdict.told_apart, verdict


async def lookups(slow_compare: bool, pairs: int) -> Verdict:
    """Tokens with nothing, and with all but the last character, in common with one that counts."""
    it = await make_setup()
    token = (await it.token()).token
    near = token[:-1] + ("A" if token[-1] != "A" else "B")
    far = "hvs." + "".join(reversed(token[4:]))

    async def look_up(tried: str) -> None:
        if slow_compare:
            for left, right in zip(tried, token, strict=True):
                if left != right:
                    break
        assert await it.leasing.tokens.lookup(tried) is None

    return await compare(lambda: look_up(near), lambda: look_up(far), pairs, clock_ns=time.perf_counter_ns)


async def test_12_a_token_that_is_nearly_right_takes_as_long_as_another() -> None:
    verdict = shown("token", await judged(partial(lookups, False), LOOKUPS, told=False))
    assert not verdict.told_apart, verdict


async def test_12_control_compared_by_character_it_is_told() -> None:
    verdict = shown("token, planted", await judged(partial(lookups, True), LOOKUPS, told=True))
    assert verdict.told_apart, verdict


def test_12_the_judge_lets_noise_pass_and_no_shift() -> None:
    """The test of the test: over many draws of equal and of shifted noise, with the outliers of a busy machine."""
    draw = random.Random(12)

    def noise(shift: float) -> list[int]:
        return [int(draw.gauss(shift, 1000) + (draw.random() < 0.05) * draw.uniform(-1, 1) * 1e6) for _ in range(2000)]

    assert not any(judge(noise(0), 1e6).told_apart for _ in range(200))
    assert all(judge(noise(200), 1e6).told_apart for _ in range(200))
