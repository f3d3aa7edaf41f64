"""Failed logins: one count an identity, whatever the spelling, the concurrency or the node (statements 12 and 13)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import bcrypt
import pytest

from plugin_api.errors import InvalidCredentials, PermissionDenied
from sidecar.core import lockout as lockout_module
from sidecar.core.expiration import Expiration
from sidecar.core.lockout import Lockout
from sidecar.core.lockout_rules import LockoutRules, LockoutSettings, LockoutTuning
from sidecar.core.schedule import Schedule
from tests.support.logical_store import FakeTime, make_sealed
from tests.support.service_node import DENIED, Harness, Reply, running, with_bob

RULES = LockoutRules()
WRONG = (400, ["invalid username or password"])
LOCKED = (403, [DENIED])


class Setup:
    def __init__(self) -> None:
        self.store, self.sealed = make_sealed()
        self.now = FakeTime()
        self.checked = 0

    async def start(self) -> Lockout:
        self.schedule = Schedule(self.sealed, self.now)
        await self.schedule.load()
        self.lockout = Lockout(self.sealed, self.schedule, self.now)
        await self.lockout.load()
        return self.lockout

    async def try_in(self, right: bool, identity: str = "bob", rules: LockoutRules = RULES) -> str:
        try:
            async with self.lockout.attempt("auth_userpass_1", identity, rules) as count:
                self.checked += 1
                await asyncio.sleep(0)
                if not right:
                    raise InvalidCredentials("wrong")
                self.lockout.succeeded(count)
                return "in"
        except InvalidCredentials:
            return "wrong"
        except PermissionDenied:
            return "locked"


@pytest.fixture
async def it() -> Setup:
    setup = Setup()
    await setup.start()
    return setup


async def test_the_threshold_locks_and_time_unlocks(it: Setup) -> None:
    assert [await it.try_in(False) for _ in range(6)] == ["wrong"] * 5 + ["locked"]
    assert await it.try_in(True) == "locked"
    assert await it.try_in(True, "alice") == "in"
    it.now.advance(899)
    assert await it.try_in(True) == "locked"
    it.now.advance(1)
    assert [await it.try_in(False) for _ in range(6)] == ["wrong"] * 5 + ["locked"]


async def test_a_success_and_a_pause_start_anew(it: Setup) -> None:
    for _ in range(3):
        assert [await it.try_in(False) for _ in range(4)] == ["wrong"] * 4
        assert await it.try_in(True) == "in"
    assert [await it.try_in(False) for _ in range(4)] == ["wrong"] * 4
    it.now.advance(901)
    assert [await it.try_in(False) for _ in range(5)] == ["wrong"] * 5
    assert await it.try_in(True) == "locked"


async def test_simultaneous_tries_are_no_more_than_one_after_the_other(it: Setup) -> None:
    outcomes = await asyncio.gather(*(it.try_in(False) for _ in range(100)))
    assert sorted(outcomes) == ["locked"] * 95 + ["wrong"] * 5
    assert it.checked == 5, "no password was looked at that should not have been"


async def test_simultaneous_right_logins_all_get_in(it: Setup) -> None:
    assert await asyncio.gather(*(it.try_in(True) for _ in range(100))) == ["in"] * 100


async def test_a_lock_survives_the_node_and_leaves_nothing_behind(it: Setup) -> None:
    for _ in range(5):
        await it.try_in(False)
    await it.start()
    assert await it.try_in(True) == "locked"
    assert it.lockout.locked() == {"auth_userpass_1": ["bob"]}
    assert it.lockout.locked_count == 1
    it.now.advance(900)
    assert it.lockout.locked() == {}
    await Expiration(it.schedule, it.lockout.expire).sweep()
    assert it.store.data == {}
    await it.start()
    assert await it.try_in(True) == "in"


async def test_unlocking(it: Setup) -> None:
    for _ in range(5):
        await it.try_in(False)
    await it.lockout.unlock("auth_userpass_2", "bob")
    assert await it.try_in(True) == "locked"
    await it.lockout.unlock("auth_userpass_1", "Bob")
    await it.lockout.unlock("auth_userpass_1", "nobody")
    assert it.store.data == {}
    assert await it.try_in(True) == "in"


async def test_replication_brings_locks(it: Setup) -> None:
    for _ in range(5):
        await it.try_in(False)
    keys = it.store.below("l/lockout/")
    it.lockout = Lockout(it.sealed, it.schedule, it.now)
    await it.lockout.invalidate([*keys, "r/core/mounts/x"])
    assert await it.try_in(True) == "locked"


async def test_memory_and_store_are_bounded(it: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockout_module, "COUNTED_MAX", 20)
    monkeypatch.setattr(lockout_module, "STORED_MAX", 3)
    for number in range(10):
        for _ in range(5):
            await it.try_in(False, f"user{number}")
    assert len(it.store.below("l/lockout/")) == 3
    assert it.lockout.locked_count == 10
    for number in range(100):
        await it.try_in(False, f"x{number}")
    assert len(it.lockout._counts) == 20
    assert it.lockout.locked_count == 10, "counts are forgotten before locks"
    await it.try_in(False, "y" * 2**20)
    assert max(len(count.identity) for count in it.lockout._counts.values()) <= 512


def test_precedence() -> None:
    settings = LockoutSettings(
        by_type={
            "all": LockoutTuning(duration_s=600, counter_reset_s=600),
            "userpass": LockoutTuning(threshold=25, duration_s=300),
            "ldap": LockoutTuning(disable=True),
        }
    )
    assert settings.rules("userpass", None) == LockoutRules(25, 300, 600)
    assert settings.rules("approle", None) == LockoutRules(5, 600, 600)
    assert settings.rules("ldap", None).disable
    assert settings.rules("ldap", LockoutTuning(disable=False)).disable is False
    assert settings.rules("userpass", LockoutTuning(threshold=2)) == LockoutRules(2, 300, 600)
    off = LockoutSettings(disabled=True)
    assert off.rules("userpass", LockoutTuning(disable=False)).disable


# -- over HTTP


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Costs of the hashes that passwords were compared with; the comparison itself costs nothing here."""
    found: list[int] = []

    def compared(password: bytes, hashed: bytes) -> bool:
        found.append(int(hashed.split(b"$")[2]))
        return password == b"pw"

    monkeypatch.setattr(bcrypt, "checkpw", compared)
    return found


@pytest.fixture
async def node(checks: list[int]) -> AsyncIterator[Harness]:
    async with running() as harness:
        await with_bob(harness)
        yield harness


async def login(node: Harness, name: str, password: str) -> tuple[int, list[str]]:
    reply = await node.call("POST", f"auth/userpass/login/{name}", {"password": password}, token=None)
    return (reply.status, reply.errors)


async def accessor(node: Harness, path: str = "userpass") -> str:
    return str((await node.call("GET", f"sys/auth/{path}")).data["accessor"])


async def test_every_spelling_counts_for_one_user(node: Harness) -> None:
    for name in ("bob", "BOB", "Bob", "bOb", "boB"):
        assert await login(node, name, "wrong") == WRONG
    for name in ("bob", "BOB"):
        assert await login(node, name, "pw") == LOCKED
    for name in ("bob%20", "%20bob", "bob/", "bob%0a"):
        assert (await login(node, name, "pw"))[0] in (400, 404, 405), "no spelling reaches the user around the count"
    listed = (await node.call("GET", "sys/locked-users")).data
    name = await accessor(node)
    assert listed == {
        "by_namespace": [
            {
                "namespace_id": "root",
                "namespace_path": "",
                "counts": 1,
                "mount_accessors": [{"alias_identifiers": ["bob"], "counts": 1, "mount_accessor": name}],
            }
        ],
        "total": 1,
    }
    assert node.service.gauges()["core.locked_users"] == 1
    assert (await node.call("GET", "sys/locked-users?mount_accessor=other")).data["total"] == 0
    assert (await node.call("POST", f"sys/locked-users/{name}/unlock/BOB")).status == 204
    assert (await node.call("POST", f"sys/locked-users/{name}/unlock/nobody")).status == 204
    assert (await login(node, "bob", "pw"))[0] == 200


async def test_parallel_tries_over_http(node: Harness, checks: list[int]) -> None:
    found = await asyncio.gather(*(login(node, name, "wrong") for name in ["bob", "BOB"] * 20))
    assert found.count(WRONG) == 5
    assert found.count(LOCKED) == 35
    assert len(checks) == 5


async def test_an_unknown_user_is_answered_and_costs_as_a_known_one(node: Harness, checks: list[int]) -> None:
    """Statement 12, by counted work: the same number of hashes of the same cost, the same answers, the same lock."""
    for name in ("bob", "nobody"):
        checks.clear()
        answers = [await login(node, name, "wrong" * 30 if number == 3 else "wrong") for number in range(8)]
        assert answers == [WRONG] * 5 + [LOCKED] * 3
        assert checks == [10] * 5


async def test_what_proves_nothing_about_a_password_is_not_counted(node: Harness) -> None:
    for _ in range(10):
        reply = await node.call("POST", "auth/userpass/login/bob", {}, token=None)
        assert reply.errors == ["missing password"]
    assert (await login(node, "bob", "pw"))[0] == 200


async def approle(node: Harness) -> tuple[str, str]:
    await node.call("POST", "sys/auth/approle", {"type": "approle"})
    await node.call("POST", "auth/approle/role/app", {})
    role_id = (await node.call("GET", "auth/approle/role/app/role-id")).data["role_id"]
    secret_id = (await node.call("POST", "auth/approle/role/app/secret-id", {})).data["secret_id"]
    return role_id, secret_id


async def test_approle_has_it_too_for_known_and_unknown_roles(node: Harness) -> None:
    role_id, secret_id = await approle(node)

    async def try_in(role: Any, secret: str) -> Reply:
        return await node.call("POST", "auth/approle/login", {"role_id": role, "secret_id": secret}, token=None)

    assert (await try_in(role_id, secret_id)).status == 200
    for role in (role_id, "unknown", 12345):
        replies = [await try_in(role, "wrong") for _ in range(7)]
        assert [reply.status for reply in replies] == [400] * 5 + [403] * 2
        assert replies[0].errors == ["invalid role or secret ID"]
    assert (await try_in(role_id, secret_id)).errors == [DENIED]
    name = await accessor(node, "approle")
    assert (await node.call("POST", f"sys/locked-users/{name}/unlock/{role_id}")).status == 204
    assert (await try_in(role_id, secret_id)).status == 200


async def test_a_mount_can_be_tuned(node: Harness) -> None:
    tune = {"lockout_threshold": "2", "lockout_duration": "1m", "lockout_counter_reset_duration": 30}
    reply = await node.call("POST", "sys/auth/userpass/tune", {"user_lockout_config": tune})
    assert reply.status == 204, reply.errors
    shown = {
        "user_lockout_counter_reset_duration": 30,
        "user_lockout_disable": False,
        "user_lockout_duration": 60,
        "user_lockout_threshold": 2,
    }
    read = (await node.call("GET", "sys/auth/userpass/tune")).data
    assert {name: read[name] for name in shown} == shown
    assert "user_lockout_config" not in read
    listed = (await node.call("GET", "sys/auth")).data["userpass/"]["config"]
    assert listed["user_lockout_config"] == shown
    assert [(await login(node, "bob", "wrong"))[0] for _ in range(3)] == [400, 400, 403]
    node.clock.now_s += 60
    assert (await login(node, "bob", "pw"))[0] == 200
    await node.call("POST", "sys/auth/userpass/tune", {"user_lockout_config": {"lockout_disable": True}})
    assert [(await login(node, "bob", "wrong"))[0] for _ in range(8)] == [400] * 8
    read = (await node.call("GET", "sys/auth/userpass/tune")).data
    assert (read["user_lockout_disable"], read["user_lockout_threshold"]) == (True, 2)


@pytest.mark.parametrize(
    "config", [{"lockout_threshold": -1}, {"lockout_threshold": "x"}, {"lockout_duration": "-1s"}, "x", 5]
)
async def test_tuning_that_makes_no_sense(node: Harness, config: Any) -> None:
    reply = await node.call("POST", "sys/auth/userpass/tune", {"user_lockout_config": config})
    assert reply.status == 400


async def test_only_methods_that_have_it_can_be_tuned(node: Harness) -> None:
    reply = await node.call("POST", "sys/auth/token/tune", {"user_lockout_config": {"lockout_threshold": 2}})
    assert reply.errors == ['tuning of user lockout configuration for auth type "token" not allowed']


async def test_a_server_without_lockouts(checks: list[int]) -> None:
    async with running(lockout=LockoutSettings(disabled=True)) as node:
        await with_bob(node)
        assert [await login(node, "bob", "wrong") for _ in range(8)] == [WRONG] * 8
        assert len(checks) == 8, "each try is one at the password: what the lockout is there to prevent"
        assert (await login(node, "bob", "pw"))[0] == 200
