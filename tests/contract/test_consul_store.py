"""What only real Consul can show: lost rights, restarts, silence; and the catalog entry."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from consul_backend import store as store_module
from consul_backend.catalog import Registration
from consul_backend.config import ConsulConfig
from consul_backend.errors import OutcomeUnknown, PermissionDenied, SentinelMissing, Unavailable
from consul_backend.physical import LOCK_KEY, SENTINEL_KEY
from consul_backend.sessions import BEAT_SERVICE
from consul_backend.store import ConsulStore
from consul_backend.txn import CheckNotExists, Get, Lock, Set
from tests.support.consul_server import ConsulServer
from tests.support.eventually import eventually

SESSIONS = 'session_prefix "" { policy = "write" }'


def keys(path: str, policy: str = "write") -> str:
    return f'key_prefix "{path}" {{ policy = "{policy}" }}'


# -- a token that loses its rights


async def narrowed(
    server: ConsulServer, factory: Any, path: str, before: str, after: str, *, sentinel: bool = False
) -> ConsulStore:
    """A store that was opened, and wrote, with one policy, and now has another."""
    policy = server.create_policy(before)
    store: ConsulStore = await factory(token=server.create_token(policy))
    await store.txn([Set("folder/a", b"1"), Set("folder/b", b"2"), *([Set(SENTINEL_KEY, b"")] if sentinel else [])])
    server.change_policy(policy, after)
    return store


async def test_without_rights_nothing_is_reported_missing(
    consul_server: ConsulServer, consul_store_factory: Any, consul_path: str
) -> None:
    store = await narrowed(consul_server, consul_store_factory, consul_path, keys(consul_path), SESSIONS)
    for call in (
        store.get("folder/a"),
        store.get("nothing"),
        store.get("folder/a", consistent=True),
        store.get_many(["folder/a", "nothing"]),
        store.txn([Get("folder/a")]),
        store.txn([CheckNotExists("nothing")]),
        store.txn([Set("folder/a", b"")]),
        store.list("folder/"),
        store.watch("folder/a", 0, 1.0),
    ):
        with pytest.raises(PermissionDenied):
            await call


async def test_a_list_that_became_shorter_is_not_believed(
    consul_server: ConsulServer, consul_store_factory: Any, consul_path: str
) -> None:
    """The token keeps one key and loses the rest, the sentinel included."""
    store = await narrowed(
        consul_server,
        consul_store_factory,
        consul_path,
        keys(consul_path),
        keys(consul_path + "folder/a"),
        sentinel=True,
    )
    with pytest.raises((PermissionDenied, SentinelMissing)):
        await store.list("folder/")


async def test_one_hidden_key_among_many_is_noticed(
    consul_server: ConsulServer, consul_store_factory: Any, consul_path: str
) -> None:
    store = await narrowed(
        consul_server, consul_store_factory, consul_path, keys(consul_path), keys(consul_path + "folder/a")
    )
    assert (await store.get("folder/a")) is not None
    with pytest.raises(PermissionDenied):
        await store.get_many(["folder/a", "folder/b"])


async def test_a_token_that_may_only_read_writes_nothing(
    consul_server: ConsulServer, consul_store_factory: Any, consul_path: str
) -> None:
    store = await narrowed(
        consul_server, consul_store_factory, consul_path, keys(consul_path), keys(consul_path, "read")
    )
    with pytest.raises(PermissionDenied):
        await store.txn([Set("folder/a", b"changed")])
    assert consul_server.raw_get(f"{consul_path}folder/a") == b"1"


@pytest.mark.parametrize("token", ["00000000-1111-2222-3333-444444444444", "not-a-token"])
async def test_an_unknown_token_cannot_open(
    consul_store_factory: Any, token: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Waited out, because a server that has just started knows no token yet; whoever watches is told at once."""
    monkeypatch.setattr("consul_backend.store.READ_DEADLINE_S", 0.2)
    with pytest.raises(Unavailable, match="does not know this token"):
        await consul_store_factory(token=token)
    said = [record.getMessage() for record in caplog.records if record.name == "core.consul"]
    assert said
    assert "does not know this token" in said[0]
    assert "trying again for 0 s at most" in said[0]
    assert token not in caplog.text


async def test_sessions_need_their_own_rights(
    consul_server: ConsulServer, consul_store_factory: Any, consul_path: str
) -> None:
    services = 'service_prefix "outrider" { policy = "write" }'
    for rules in (keys(consul_path) + services, keys(consul_path) + SESSIONS):
        store = await consul_store_factory(token=consul_server.create_token(consul_server.create_policy(rules)))
        with pytest.raises((PermissionDenied, Unavailable), match="denied"):
            await store.create_session("x", beat_ttl_s=5, lock_delay_s=0)


# -- sessions on the wire


async def test_a_session_hangs_on_the_beat_alone(consul_server: ConsulServer, consul_store_factory: Any) -> None:
    def beats() -> set[str]:
        return {entry["ServiceID"] for entry in consul_server.call("GET", f"catalog/service/{BEAT_SERVICE}").json}

    store = await consul_store_factory()
    others = beats()  # of nodes that other tests have killed
    session = await store.create_session("wire", beat_ttl_s=5, lock_delay_s=0.25)
    assert beats() > others
    (shown,) = consul_server.call("GET", f"session/info/{session}").json
    assert shown["NodeChecks"] == []
    assert [check["ID"].split(":")[0] for check in shown["ServiceChecks"]] == [BEAT_SERVICE]
    assert (shown["Behavior"], shown["TTL"], shown["LockDelay"]) == ("release", "15000ms", 250_000_000)
    await store.stop_beat()
    await eventually(lambda: beats() <= others)  # the agent tells the servers a moment later


async def test_a_consul_that_allows_only_longer_sessions_is_obeyed() -> None:
    with ConsulServer(settings={"session_ttl_min": "1m30s"}) as server:
        store = ConsulStore(ConsulConfig(address=server.address, token=server.token, path="outrider/"))
        await store.open()
        session = await store.create_session("long", beat_ttl_s=5, lock_delay_s=0)
        assert server.call("GET", f"session/info/{session}").json[0]["TTL"] == "1m30s"
        assert await store.renew_session(session) is True
        await store.stop_beat()
        await store.close()


async def test_a_beat_the_agent_forgot_is_registered_again(
    consul_server: ConsulServer, consul_store_factory: Any
) -> None:
    store = await consul_store_factory()
    session = await store.create_session("forgotten", beat_ttl_s=5, lock_delay_s=0)
    for name in consul_server.call("GET", "agent/services").json:
        if name.startswith(BEAT_SERVICE):
            consul_server.call("PUT", f"agent/service/deregister/{name}")
    await store.beat()
    assert [name for name in consul_server.call("GET", "agent/services").json if name.startswith(BEAT_SERVICE)]
    fresh = await store.create_session("again", beat_ttl_s=5, lock_delay_s=0)
    assert await store.renew_session(fresh) is True
    assert await store.renew_session(session) is False


# -- Consul in trouble


async def test_a_killed_server(
    own_consul_server: ConsulServer, consul_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "READ_DEADLINE_S", 120.0)  # how long a start takes says how busy the machine is
    server = own_consul_server
    store = ConsulStore(ConsulConfig(address=server.address, token=server.token, path=consul_path))
    await store.open()
    await store.txn([Set("a", b"1")])
    server.kill()
    with pytest.raises((Unavailable, OutcomeUnknown)):
        await store.txn([Set("a", b"2")])  # the pooled connection may take the request to its grave
    with pytest.raises(Unavailable, match="cannot connect"):
        await store.txn([Set("a", b"3")])
    with pytest.raises(Unavailable):
        await store.watch("a", 0, 0.1)
    reading = asyncio.create_task(store.get("a"))
    await asyncio.to_thread(server.restart)
    item = await reading
    assert item is not None
    assert item.value == b"1"
    await store.close()


async def test_a_frozen_server(own_consul_server: ConsulServer, consul_path: str) -> None:
    server = own_consul_server
    config = ConsulConfig(address=server.address, token=server.token, path=consul_path)
    store = ConsulStore(config)
    await store.open()
    store._timeout_s = 0.3  # not before, since a busy machine may not answer within that
    server.freeze()
    started = time.monotonic()
    with pytest.raises(OutcomeUnknown, match="timed out"):
        await store.txn([Set("a", b"1")])
    assert time.monotonic() - started < 2
    server.thaw()
    await store.get("b")
    await store.close()


@pytest.mark.parametrize("limit", [100_000])
async def test_a_server_with_a_smaller_body_limit(limit: int, consul_path: str) -> None:
    limits = {"limits": {"txn_max_req_len": limit, "kv_max_value_size": limit}}
    with ConsulServer(settings=limits) as server:
        store = ConsulStore(ConsulConfig(address=server.address, token=server.token, path=consul_path))
        await store.open()
        assert store.limits.body_bytes_max == 65_536
        await store.close()


async def test_a_server_whose_limit_the_index_would_not_fit_is_refused_with_the_setting_to_raise(
    consul_path: str,
) -> None:
    limits = {"limits": {"txn_max_req_len": 60_000, "kv_max_value_size": 60_000}}
    with ConsulServer(settings=limits) as server:
        store = ConsulStore(ConsulConfig(address=server.address, token=server.token, path=consul_path))
        with pytest.raises(Unavailable, match=r"65536 bytes: raise limits\.txn_max_req_len"):
            await store.open()
        await store.close()


# -- the catalog


async def test_registration(own_consul_server: ConsulServer) -> None:
    consul_server = own_consul_server  # on a shared one others' nodes are registered too
    config = ConsulConfig(address=consul_server.address, token=consul_server.token)
    entry = Registration(
        config,
        service="outrider",
        id="outrider:10.0.0.1:8200",
        address="10.0.0.1",
        port=8200,
        tags=["standby"],
        meta={"version": "1"},
        check_ttl_s=30,
    )

    async def until(expected: tuple[str, list[str]]) -> dict[str, Any]:
        """The agent tells the servers of a change a moment after it took it."""
        deadline = time.monotonic() + 60
        while True:
            found = consul_server.call("GET", "health/service/outrider").json
            mine = [check for check in found[0]["Checks"] if check["ServiceID"]] if found else []
            if mine and (mine[0]["Status"], found[0]["Service"]["Tags"]) == expected:
                return {**found[0], "Mine": mine}
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.02)

    await entry.register()
    found = await until(("critical", ["standby"]))
    assert (found["Service"]["Address"], found["Service"]["Port"]) == ("10.0.0.1", 8200)
    assert found["Service"]["Meta"] == {"version": "1"}
    assert [check["ServiceID"] for check in found["Mine"]] == ["outrider:10.0.0.1:8200"]
    await entry.check(True, "Outrider Unsealed")
    assert (await until(("passing", ["standby"])))["Mine"][0]["Output"] == "Outrider Unsealed"
    await entry.set_tags(["active", "initialized"])
    await until(("passing", ["active", "initialized"]))
    await entry.check(False, "Outrider Sealed")
    await until(("critical", ["active", "initialized"]))
    consul_server.call("PUT", f"agent/service/deregister/{entry.entry.id}")
    await entry.check(True, "Outrider Unsealed")
    await until(("passing", ["active", "initialized"]))
    await entry.deregister()
    await entry.deregister()
    await entry.close()
    await entry.close()
    assert await shown_nothing(consul_server)


async def shown_nothing(server: ConsulServer) -> bool:
    deadline = time.monotonic() + 60
    while server.call("GET", "health/service/outrider").json:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


async def test_a_registration_without_rights(consul_server: ConsulServer) -> None:
    config = ConsulConfig(address=consul_server.address, token=consul_server.token)
    entry = Registration(config, service="postgres", id="x", address="", port=1)
    with pytest.raises(PermissionDenied):
        await entry.register()
    await entry.close()


async def test_the_environment_does_not_redirect_us(consul_store_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """python-consul2 would let these override the explicit address and token."""
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "127.0.0.1:1")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "wrong")
    store = await consul_store_factory()
    session = await store.create_session("env", beat_ttl_s=5, lock_delay_s=0)
    await store.txn([Lock(LOCK_KEY, b"", session)])


async def test_a_token_without_rights_is_told_which_it_lacks_when_the_store_is_opened(
    consul_server: ConsulServer, consul_store_factory: Any, consul_path: str
) -> None:
    token = consul_server.create_token(consul_server.create_policy(SESSIONS))
    with pytest.raises(PermissionDenied, match=f'needed: key_prefix "{consul_path}" with policy "read"'):
        await consul_store_factory(token=token)
