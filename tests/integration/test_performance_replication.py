"""Two clusters on loopback: activation, streaming, forwarding, revocation, over real TLS and in-memory stores."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import pytest
from multidict import CIMultiDict

from plugin_api.errors import InvalidRequest, PluginError, Unavailable
from sidecar.replication import roles
from sidecar.replication.activation import bootstrap, parse_bundle, secondary_identity
from sidecar.replication.modes import PERFORMANCE
from sidecar.replication.states import Phase
from sidecar.replication.upstream import STALL_WARNING
from sidecar.replication.wiring import Executed, ForwardAnswer, ReplicationOptions
from sidecar.transport.forwarding import ForwardRequest
from sidecar.transport.peer import PeerClient
from tests.support.replication_cluster import (
    MATERIAL,
    Auth,
    Pair,
    Request,
    in_step,
    primary_in,
    until,
)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with primary_in(PERFORMANCE) as pair:
        yield pair


async def test_from_token_to_streaming(pair: Pair) -> None:
    primary = pair.primary
    primary.store.write(*((f"r/m/key-{n}", b"value %d" % n) for n in range(300)))
    primary.store.write(("l/token/secret", b"the primary's own"))
    secondary = await pair.activate()
    await until(lambda: in_step(primary, secondary))
    assert "l/token/secret" not in secondary.store.data
    assert secondary.gates[0] is not None, "reads are refused until there is data"
    assert secondary.gates[-1] is None

    primary.store.write(("r/m/later", b"x"), ("r/m/key-0", None))
    await until(lambda: in_step(primary, secondary))
    await until(lambda: {"r/m/later", "r/m/key-0"} <= set(secondary.applied))
    await until(
        lambda: (
            secondary.manager.performance.secondary is not None
            and secondary.manager.performance.secondary.machine.cycles == 0
        )
    )

    ours, theirs = await primary.manager.status("performance"), await secondary.manager.status("performance")
    assert ours["merkle_root"] == theirs["merkle_root"]
    assert ours["known_secondaries"] == ["eu"]
    assert ours["secondaries"][0]["connection_status"] == "connected"
    assert ours["state"] == "running"
    assert (theirs["state"], theirs["connection_state"]) == ("stream-wals", "ready")
    assert theirs["secondary_id"] == "eu"
    assert theirs["cluster_id"] == ours["cluster_id"]
    await until(lambda: secondary.store.head.index > 0)
    assert theirs["last_sync"]["by"] == "merkle"
    assert theirs["last_sync"]["round_trips"] == 2
    assert theirs["last_sync"]["keys"] >= 300
    both = await primary.manager.status(None)
    assert both["dr"] == {"mode": "disabled"}


async def test_the_activation_result_holds_keys_and_role(pair: Pair) -> None:
    fresh = await pair.start("fresh")
    await fresh.manager.secondary_enable("performance", await pair.token(), "", "", "")
    result = fresh.flipped[0]
    assert (result.root_key, result.seal) == (MATERIAL.root_key, MATERIAL.seal)
    assert result.keyrings == {"r/core/keyring": b"raw keyring"}, "the local keyring goes to nobody else"
    assert set(result.entries) == {PERFORMANCE.role_key}
    assert "kkkk" not in repr(result)
    assert "PRIVATE" not in repr(result)
    assert fresh.manager.modes()[0] == "bootstrapping", "until the flip ends the tenure"
    assert await fresh.manager.status("performance") == {"mode": "bootstrapping"}
    with pytest.raises(InvalidRequest, match="running already"):
        await fresh.manager.primary_enable("performance", "")


async def test_a_restart_catches_up_by_the_log(pair: Pair) -> None:
    primary = pair.primary
    secondary = await pair.activate()
    await until(lambda: in_step(primary, secondary))
    await secondary.stop()
    for n in range(100):
        primary.store.write(*((f"r/m/{n}-{m}", b"v") for m in range(10)))
    again = await pair.start("eu", secondary.store)
    await until(lambda: in_step(primary, again))
    service = again.manager.performance.secondary
    assert service is not None
    await until(lambda: service.last_sync is not None)
    status = await again.manager.status("performance")
    assert status["last_sync"]["by"] == "wal"
    assert status["last_sync"]["keys"] == 1000
    assert again.gates[0] is None


async def test_a_forwarded_write_is_readable_here_when_it_is_answered(pair: Pair) -> None:
    primary, secondary = pair.primary, await pair.activate()
    await until(lambda: in_step(primary, secondary))
    request = Request(headers=CIMultiDict({"X-Custom": "yes", "Connection": "close", "Host": "x"}), body=b"mine")
    request.trail = (("cluster-eu", "inner"),)
    answer = await secondary.manager.forward_to_primary(request, Auth())
    assert (answer.status, answer.body) == (204, b"")
    assert secondary.store.data["r/m/secret/data/a"] == b"mine"
    seen = primary.executed[0]
    assert seen.headers == [("X-Custom", "yes")]
    assert seen.remote_address == "10.1.1.1"
    assert [tuple(hop) for hop in seen.trail] == [("cluster-eu", "inner"), ("cluster-eu", "upward")]
    assert seen.auth is not None
    assert (seen.auth.policies, seen.auth.display_name) == (("default",), "userpass-ann")
    assert seen.auth.cluster_id == "cluster-eu"


async def test_a_write_that_arrives_late_is_answered_with_the_warning(pair: Pair) -> None:
    primary = pair.primary
    secondary = await pair.activate(options=ReplicationOptions(beat_s=0.1, wal_wait_s=0.05, reconnect_min_s=0.02))
    await until(lambda: in_step(primary, secondary))

    async def answers(status: int, body: bytes) -> ForwardAnswer:
        async def execute(_: ForwardRequest) -> Executed:
            return Executed(status, [("Content-Type", "application/json")], body, primary.store.head.index + 1000)

        primary.execute = execute
        return await secondary.manager.forward_to_primary(Request(), Auth())

    late = await answers(204, b"")
    assert late.status == 200
    assert json.loads(late.body)["warnings"] == [STALL_WARNING]
    late = await answers(200, b'{"data":{"version":1},"warnings":["other"]}')
    assert json.loads(late.body) == {"data": {"version": 1}, "warnings": ["other", STALL_WARNING]}
    refused = await answers(400, b'{"errors":["no"]}')
    assert (refused.status, refused.body) == (400, b'{"errors":["no"]}')


async def test_forwarding_refuses_a_loop_with_its_trail(pair: Pair) -> None:
    secondary = await pair.activate()
    await until(lambda: in_step(pair.primary, secondary))
    for trail in ((("cluster-us", "upward"),), (("cluster-eu", "upward"),)):
        with pytest.raises(Unavailable, match=trail[0][0]):
            await secondary.manager.forward_to_primary(Request(trail=trail), Auth())
    assert pair.primary.executed == []


async def test_a_lost_answer_is_an_unknown_outcome_and_never_repeated(pair: Pair) -> None:
    primary, secondary = pair.primary, await pair.activate()
    await until(lambda: in_step(primary, secondary))
    entered = asyncio.Event()

    async def hang(_: ForwardRequest) -> Executed:
        entered.set()
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    primary.execute = hang
    forwarding = asyncio.create_task(secondary.manager.forward_to_primary(Request(), Auth()))
    await entered.wait()
    for connection in next(iter(primary.listener._entries.values())).connections.copy():
        connection.abort()
    with pytest.raises(PluginError, match="may have been carried out") as lost:
        await forwarding
    assert not isinstance(lost.value, Unavailable)
    assert len(primary.executed) == 1


async def test_forwarding_to_a_primary_that_is_down_is_certainly_not_done(pair: Pair) -> None:
    secondary = await pair.activate()
    await until(lambda: in_step(pair.primary, secondary))
    await pair.primary.manager.primary_disable("performance")
    with pytest.raises(Unavailable, match="was not carried out"):
        await secondary.manager.forward_to_primary(Request(), Auth())
    assert (await pair.primary.manager.status("performance")) == {"mode": "disabled"}
    await until(
        lambda: (
            secondary.manager.performance.secondary is not None
            and secondary.manager.performance.secondary.state == "idle"
        )
    )
    assert (await secondary.manager.status("performance"))["connection_state"] == "transient_failure"


async def test_a_revoked_secondary_is_out_at_once_and_stays_out(pair: Pair) -> None:
    primary, secondary = pair.primary, await pair.activate()
    await until(lambda: in_step(primary, secondary))
    service = secondary.manager.performance.secondary
    assert service is not None
    await primary.manager.revoke_secondary("performance", "eu")
    assert primary.listener.statistics()["connections"] == 0
    await until(lambda: not service.connected_to)
    status = await primary.manager.status("performance")
    assert (status["known_secondaries"], status["secondaries"]) == ([], [])
    await until(lambda: service.machine.phase is Phase.IDLE)
    assert "revoked" in (await secondary.manager.status("performance"))["state_reason"]

    primary.store.write(("r/m/after", b"secret"))
    await secondary.stop()
    again = await pair.start("eu", secondary.store)
    retry = again.manager.performance.secondary
    assert retry is not None
    await until(lambda: retry._failures >= 3)
    with pytest.raises((Unavailable, PluginError)):
        await again.manager.forward_to_primary(Request(), Auth())
    assert "r/m/after" not in again.store.data
    assert primary.executed == []
    with pytest.raises(InvalidRequest):
        await primary.manager.revoke_secondary("performance", "eu")


async def test_a_token_is_good_once(pair: Pair) -> None:
    token = await pair.token()
    first, second = await pair.start("first"), await pair.start("second")
    results = await asyncio.gather(
        *(one.manager.secondary_enable("performance", token, "", "", "") for one in (first, second)),
        return_exceptions=True,
    )
    assert sorted(isinstance(result, BaseException) for result in results) == [False, True]
    loser = next(result for result in results if isinstance(result, BaseException))
    assert isinstance(loser, InvalidRequest)
    assert 'status code is 400, message is "400 Bad Request"' in str(loser)
    assert len(first.flipped) + len(second.flipped) == 1


async def test_a_copied_bundle_is_of_no_use_to_another_store(pair: Pair) -> None:
    payload, claims = await pair.primary.manager.secondary_token("performance", "eu", 1800, "")
    bundle = parse_bundle(payload, claims["ca_sha256"])
    await bootstrap(PERFORMANCE, bundle, store_id="first", timeout_s=60)
    with pytest.raises(InvalidRequest, match="used already"):
        await bootstrap(PERFORMANCE, bundle, store_id="second", timeout_s=60)


async def test_issuing_again_voids_the_first_certificate(pair: Pair) -> None:
    payload, claims = await pair.primary.manager.secondary_token("performance", "eu", 1800, "")
    await pair.primary.manager.secondary_token("performance", "eu", 1800, "")
    with pytest.raises((InvalidRequest, Unavailable)):
        await bootstrap(PERFORMANCE, parse_bundle(payload, claims["ca_sha256"]), store_id="first", timeout_s=60)


async def test_a_rewrapped_token_is_refused_before_it_is_consumed(pair: Pair) -> None:
    fresh = await pair.start("fresh")
    token = await pair.token()
    pair.api.creation_path = "sys/wrapping/wrap"
    with pytest.raises(InvalidRequest, match="re-wrapped"):
        await fresh.manager.secondary_enable("performance", token, "", "", "")
    assert pair.api.calls == ["/v1/sys/wrapping/lookup"]
    assert fresh.flipped == []


async def test_a_token_of_another_primary_is_refused(pair: Pair) -> None:
    """The bundle comes from one primary, the token (and its ca_sha256) from another."""
    fresh = await pair.start("fresh")
    payload, _ = await pair.primary.manager.secondary_token("performance", "eu", 1800, "")
    token = pair.api.wrap(payload, {"ca_sha256": "00" * 32})
    with pytest.raises(InvalidRequest, match="authority is not the one"):
        await fresh.manager.secondary_enable("performance", token, "", "", "")
    assert fresh.flipped == []


async def test_an_unreachable_primary_leaves_everything_as_it_was(pair: Pair) -> None:
    fresh = await pair.start("fresh")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{free.getsockname()[1]}"
    payload, claims = await pair.primary.manager.secondary_token("performance", "eu", 1800, "")
    token = pair.api.wrap(payload | {"primary_cluster_addr": f"https://{dead}"}, claims)
    before = dict(fresh.store.data)
    with pytest.raises(Unavailable, match="nothing was changed here"):
        await fresh.manager.secondary_enable("performance", token, "", "", "")
    assert (fresh.flipped, fresh.store.data, fresh.manager.modes()[0]) == ([], before, "disabled")
    with pytest.raises(InvalidRequest, match="did not answer"):
        await fresh.manager.secondary_enable("performance", await pair.token("eu-2"), f"http://{dead}", "", "")


async def test_only_disabled_clusters_are_activated(pair: Pair) -> None:
    secondary = await pair.activate()
    for cluster in (secondary, pair.primary):
        with pytest.raises(InvalidRequest):
            await cluster.manager.secondary_enable("performance", await pair.token("other"), "", "", "")
    with pytest.raises(InvalidRequest):
        await secondary.manager.primary_enable("performance", "")
    with pytest.raises(InvalidRequest):
        await secondary.manager.secondary_token("performance", "x", 60, "")
    assert not secondary.manager.is_primary_writable()
    assert pair.primary.manager.is_primary_writable()


async def test_a_secondary_can_leave_with_its_data(pair: Pair) -> None:
    pair.primary.store.write(("r/m/a", b"1"))
    secondary = await pair.activate()
    await until(lambda: in_step(pair.primary, secondary))
    await secondary.manager.secondary_disable("performance")
    assert secondary.manager.is_primary_writable()
    assert secondary.store.data["r/m/a"] == b"1"
    assert (await secondary.manager.status("performance")) == {"mode": "disabled"}
    assert await secondary.manager.performance._learned(["https://late:8201"]) is None, (
        "a late heartbeat does not bring it back"
    )
    await until(lambda: pair.primary.listener.statistics()["connections"] == 0)


async def test_addresses_of_heartbeats_are_stored(pair: Pair) -> None:
    secondary = await pair.activate()
    address = f"https://127.0.0.1:{pair.primary.listener.port}"
    await until(lambda: in_step(pair.primary, secondary))
    role = roles.decode_role(secondary.store.data[PERFORMANCE.role_key])
    assert isinstance(role, roles.SecondaryRole)
    assert role.addresses == (address,)
    pair.primary.addresses.append("https://127.0.0.1:2")
    await until(lambda: b"127.0.0.1:2" in secondary.store.data[PERFORMANCE.role_key])
    assert (await secondary.manager.status("performance"))["known_primary_cluster_addrs"] == [
        address,
        "https://127.0.0.1:2",
    ]


async def test_a_dead_address_is_passed_over(pair: Pair) -> None:
    """The newest known address may be a node that is gone: the next one is tried."""
    primary, secondary = pair.primary, await pair.activate()
    await until(lambda: in_step(primary, secondary))
    await secondary.stop()
    await until(lambda: secondary.manager.performance.secondary is None)
    again = await pair.start("eu", secondary.store)
    await again.manager.performance._learned(["https://127.0.0.1:1", "https://127.0.0.1:2"])
    await again.stop()
    third = await pair.start("eu", again.store)
    primary.store.write(("r/m/through", b"x"))
    await until(lambda: in_step(primary, third))


async def test_the_primary_learns_nothing_from_strangers_on_its_calls(pair: Pair) -> None:
    """A certificate that never said hello gets neither diff, entries nor forwarding."""
    payload, claims = await pair.primary.manager.secondary_token("performance", "eu", 1800, "")
    bundle = parse_bundle(payload, claims["ca_sha256"])
    client = PeerClient(secondary_identity(PERFORMANCE, bundle), f"127.0.0.1:{pair.primary.listener.port}")
    try:
        for path in ("/diff", "/fetch", "/forward"):
            assert (await client.post(path, b"junk", timeout_s=60)).status == 403
        assert (await client.post("/bootstrap", b"junk", timeout_s=60)).status == 400
        assert (await client.post("/bootstrap", b"x" * 100_000, timeout_s=60)).status == 400
        assert (await client.post("/nothing", b"", timeout_s=60)).status == 404
    finally:
        await client.close()
