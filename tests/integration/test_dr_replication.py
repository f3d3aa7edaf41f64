"""Disaster recovery over real TLS and in-memory stores: both modes at once, demotion, promotion, failback, forks."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest

from consul_backend.errors import NotApplied
from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, NotFound, PluginError, ReadOnlyStorage, Unavailable
from sidecar.core.write_gate import GatedStore
from sidecar.replication import protocol as wire
from sidecar.replication import roles, texts
from sidecar.replication.activation import OTHER_SET, secondary_identity
from sidecar.replication.history import Epoch
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from sidecar.replication.primary import ALIVE_PATH, FETCH_PATH
from sidecar.replication.roles import PrimaryRole, SecondaryRole
from sidecar.replication.wiring import Executed, ReplicationOptions
from sidecar.transport.forwarding import ForwardRequest
from sidecar.transport.peer import PeerClient, PeerIdentity, PeerOutcomeUnknown, PeerUnreachable
from tests.support.replication_cluster import (
    Auth,
    Cluster,
    Pair,
    Request,
    Store,
    in_step,
    primary_in,
    until,
)

BOTH = (DR, PERFORMANCE)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """A cluster that is primary in both modes."""
    async with primary_in(*BOTH) as pair:
        yield pair


async def followed(pair: Pair, mode: Mode, name: str = "eu") -> Cluster:
    secondary = await pair.activate(name, mode=mode)
    await until(lambda: in_step(pair.primary, secondary, mode))
    return secondary


async def promote(cluster: Cluster, mode: Mode, *, force: bool = False) -> dict[str, object]:
    """Promote, and wait for the tenure that a DR promotion begins."""
    tenures = cluster.tenures
    response = await cluster.manager.secondary_promote(mode.name, "", force=force, preview=False)
    assert response.warnings[0] == texts.PROMOTING
    if mode is DR:
        await until(lambda: cluster.tenures > tenures)
    await until(lambda: (primary := cluster.of(mode).primary) is not None and primary.serving.is_set())
    return dict((response.data or {})["promotion_forecast"])


async def demote(cluster: Cluster, mode: Mode) -> None:
    tenures = cluster.tenures
    assert (await cluster.manager.primary_demote(mode.name)).warnings == [texts.DEMOTING]
    if mode is DR:
        await until(lambda: cluster.tenures > tenures)
    await until(lambda: cluster.of(mode).secondary is not None)


async def follow(pair: Pair, secondary: Cluster, primary: Cluster, mode: Mode, name: str) -> None:
    """Point a secondary at another primary and wait until it is in step."""
    token = await pair.token(name, mode, primary)
    response = await secondary.manager.secondary_update_primary(mode.name, token)
    assert response.warnings[0] == texts.UPDATING_PRIMARY
    await until(lambda: in_step(primary, secondary, mode))


async def test_a_dr_secondary_mirrors_everything_but_what_is_private(pair: Pair) -> None:
    primary = pair.primary
    primary.store.write(("r/m/a", b"1"), ("l/token/id/t", b"2"), ("c/core/leader", b"mine"))
    performance = await followed(pair, PERFORMANCE, "perf")
    mirror = await followed(pair, DR, "mirror")
    primary.store.write(("r/m/b", b"3"), ("l/token/id/u", b"4"), ("l/token/id/t", None))
    await until(lambda: in_step(primary, mirror, DR) and in_step(primary, performance))
    assert mirror.store.data["l/token/id/u"] == b"4"
    assert "l/token/id/t" not in mirror.store.data
    assert "l/token/id/u" not in performance.store.data
    assert mirror.store.data.get("c/core/leader") is None
    assert mirror.store.data[PERFORMANCE.role_key] == primary.store.data[PERFORMANCE.role_key]
    assert mirror.store.data[DR.role_key] != primary.store.data[DR.role_key]
    assert b"PRIVATE KEY" in primary.store.data[DR.role_key], "the authority's key is there, and only there"

    ours, theirs = await primary.manager.status(None), await mirror.manager.status(None)
    assert theirs["performance"] == {"mode": "disabled"}
    assert mirror.manager.modes() == ("primary", "secondary"), "health shows the mirrored performance role"
    await until(lambda: mirror.of(DR).secondary.machine.cycles == 0)
    assert (await primary.manager.status("dr"))["merkle_root"] == (await mirror.manager.status("dr"))["merkle_root"]
    assert ours["dr"]["merkle_root"] != ours["performance"]["merkle_root"]
    gauges = mirror.manager.gauges()
    assert gauges["replication.dr.state.stream-wals"] == gauges["replication.dr.connected"] == 1
    assert sum(value for name, value in gauges.items() if ".state." in name) == 1
    assert not any(name.startswith("replication.performance") for name in gauges), "that role is the primary's"
    assert primary.manager.gauges()["replication.performance.secondaries_connected"] == 1
    assert ours["dr"]["known_secondaries"] == ["mirror"]
    assert ours["performance"]["known_secondaries"] == ["perf"]
    assert ours["dr"]["cluster_id"] != ours["performance"]["cluster_id"]


async def test_nothing_but_replication_writes_what_a_secondary_mirrors(pair: Pair) -> None:
    mirror, performance = await followed(pair, DR, "mirror"), await followed(pair, PERFORMANCE, "perf")
    for key in ("r/m/x", "l/token/x"):
        with pytest.raises(Exception, match="DR secondary"):
            await GatedStore(mirror.store, mirror.writes).commit([Write(key, b"1")])
    with pytest.raises(ReadOnlyStorage):
        await GatedStore(performance.store, performance.writes).commit([Write("r/m/x", b"1")])
    for cluster, key in ((mirror, "c/own/x"), (performance, "l/token/x"), (pair.primary, "r/m/x")):
        await GatedStore(cluster.store, cluster.writes).commit([Write(key, b"1")])
    await until(lambda: in_step(pair.primary, mirror, DR))


async def test_a_token_works_in_its_own_mode_only(pair: Pair) -> None:
    fresh = await pair.start("fresh")
    for mode, other in ((DR, PERFORMANCE), (PERFORMANCE, DR)):
        token = await pair.token(f"x-{mode.name}", mode)
        with pytest.raises(InvalidRequest, match="another mode of replication"):
            await fresh.manager.secondary_enable(other.name, token, "", "", "")
        assert not fresh.flipped
        assert fresh.manager.modes() == ("disabled", "disabled"), "nothing was consumed, nothing changed"


async def test_a_mirror_is_not_made_of_a_cluster_that_replicates(pair: Pair) -> None:
    performance = await followed(pair, PERFORMANCE, "perf")
    with pytest.raises(InvalidRequest, match="performance replication enabled"):
        await performance.manager.secondary_enable("dr", await pair.token("y", DR), "", "", "")
    other = await pair.start("other")
    await other.manager.primary_enable("dr", "")
    with pytest.raises(InvalidRequest, match="DR replication enabled"):
        await other.manager.secondary_enable("performance", await pair.token("z"), "", "", "")


@pytest.mark.parametrize("mode", BOTH)
async def test_promotion_is_refused_while_the_primary_lives(pair: Pair, mode: Mode) -> None:
    secondary = await followed(pair, mode)
    with pytest.raises(InvalidRequest, match="alive and reachable"):
        await secondary.manager.secondary_promote(mode.name, "", force=False, preview=False)
    # Also when no stream is open: it is looked for.
    service = secondary.of(mode).secondary
    assert service is not None
    service.connected_to = ""
    with pytest.raises(InvalidRequest, match="alive and reachable"):
        await secondary.manager.secondary_promote(mode.name, "", force=False, preview=False)
    preview = await secondary.manager.secondary_promote(mode.name, "", force=False, preview=True)
    assert preview.data is not None
    assert "alive" in preview.data["promotion_forecast"]["objections"][0]
    assert secondary.of(mode).role.kind == "secondary"


@pytest.mark.parametrize("mode", BOTH)
async def test_a_planned_failover_and_back_loses_nothing(pair: Pair, mode: Mode) -> None:
    primary, secondary = pair.primary, await followed(pair, mode)
    primary.store.write(("r/m/before", b"1"))
    await demote(primary, mode)
    assert secondary.store.data["r/m/before"] == b"1", "a demotion waits for connected secondaries"
    forecast = await promote(secondary, mode)
    assert (forecast["known_missing_records"], forecast["objections"]) == (0, [])
    role = secondary.of(mode).role
    assert isinstance(role, PrimaryRole)
    assert role.epoch.number == 2
    secondary.store.write(("r/m/after", b"2"))
    await follow(pair, primary, secondary, mode, "us")
    assert primary.store.data["r/m/after"] == b"2"
    assert (await primary.manager.lost_writes(mode.name)).data == {"lost_writes": []}
    assert primary.kept_keys, "the old keys stay usable whatever keyrings arrive"

    await demote(secondary, mode)
    await promote(primary, mode)
    await follow(pair, secondary, primary, mode, "eu")
    role = primary.of(mode).role
    assert isinstance(role, PrimaryRole)
    assert [one.number for one in role.history] == [1, 2, 3]
    assert [one["number"] for one in (await secondary.manager.status(mode.name))["epochs"]] == [1, 2, 3]
    assert (await secondary.manager.lost_writes(mode.name)).data == {"lost_writes": []}


@pytest.mark.parametrize("mode", BOTH)
async def test_what_a_dead_primary_had_and_nobody_else_is_kept_when_it_returns(pair: Pair, mode: Mode) -> None:
    primary, secondary = pair.primary, await followed(pair, mode)
    primary.store.write(("r/m/shared", b"old"), ("r/m/doomed", b"x"))
    await until(lambda: in_step(primary, secondary, mode))
    await primary.stop()
    first = primary.store.head.index + 1
    primary.store.write(("r/m/lost", b"1"), ("l/token/lost", b"own"))
    primary.store.write(("c/private/x", b"nobody's business"))
    primary.store.write(("r/m/shared", b"lost too"), ("r/m/doomed", None))
    last = primary.store.head.index
    await promote(secondary, mode)
    secondary.store.write(("r/m/new", b"2"))

    returned = await pair.start("us", primary.store)
    await demote(returned, mode)
    await follow(pair, returned, secondary, mode, "us")
    assert returned.store.data["r/m/shared"] == b"old"
    assert "r/m/lost" not in returned.store.data
    record = (await returned.manager.lost_writes(mode.name)).data["lost_writes"][0]
    entries = 4 if mode is DR else 3
    assert (record["first_wal"], record["last_wal"]) == (first, last)
    assert (record["records"], record["entries"], record["exact"], record["complete"]) == (2, entries, True, True)
    listed = (await returned.manager.lost_writes_read(mode.name, record["id"], "", values=False)).data["lost_entries"]
    assert all("value" not in entry for entry in listed)
    keys = [(entry["key"], entry["deleted"]) for entry in listed]
    assert ("r/m/lost", False) in keys
    assert ("r/m/doomed", True) in keys
    assert (("l/token/lost", False) in keys) == (mode is DR)
    exported = (await returned.manager.lost_writes_read(mode.name, record["id"], "", values=True)).data["lost_entries"]
    assert {entry.get("value") for entry in exported if entry["key"] == "r/m/shared"} == {"bG9zdCB0b28="}
    status = await returned.manager.status(mode.name)
    assert status["lost_writes"] == [record]
    await returned.manager.lost_writes_delete(mode.name, record["id"])
    with pytest.raises(NotFound):
        await returned.manager.lost_writes_read(mode.name, record["id"], "", values=False)


async def test_what_was_lost_is_said_to_be_more_when_the_log_is_too_short(pair: Pair) -> None:
    primary, secondary = pair.primary, await followed(pair, DR)
    await primary.stop()
    for number in range(10):
        primary.store.write((f"r/m/{number}", b"x"))
    await promote(secondary, DR)
    primary.store.oldest_index = primary.store.head.index - 3
    returned = await pair.start("us", primary.store)
    await demote(returned, DR)
    await follow(pair, returned, secondary, DR, "us")
    record = (await returned.manager.lost_writes("dr")).data["lost_writes"][0]
    assert (record["records"], record["exact"]) == (4, False)


@pytest.mark.parametrize("mode", BOTH)
async def test_two_primaries_by_force_show_the_fork_and_do_not_merge(pair: Pair, mode: Mode) -> None:
    a, b = pair.primary, await followed(pair, mode, "b")
    c = await followed(pair, mode, "c")
    await promote(b, mode, force=True)
    await promote(c, mode, force=True)
    b.store.write(("r/m/only-b", b"1"))
    c.store.write(("r/m/only-c", b"1"))
    # b gives up: its operator demotes it and points it at c, which is what accepts the fork.
    await demote(b, mode)
    await follow(pair, b, c, mode, "b-again")
    assert "r/m/only-b" not in b.store.data
    record = (await b.manager.lost_writes(mode.name)).data["lost_writes"][0]
    shown = (await b.manager.lost_writes_read(mode.name, record["id"], "", values=False)).data["lost_entries"]
    assert {entry["key"] for entry in shown} - {PERFORMANCE.role_key} == {"r/m/only-b"}
    assert record["exact"]
    # a secondary that nobody pointed anywhere refuses a primary of another branch
    role = b.of(mode).role
    assert isinstance(role, SecondaryRole)
    assert role.epoch == c.of(mode).role.epoch
    # the first primary lives on in epoch 1, and comes home too
    a.store.write(("r/m/only-a", b"1"))
    await demote(a, mode)
    await follow(pair, a, c, mode, "a")
    assert "r/m/only-a" not in a.store.data
    assert (await a.manager.lost_writes(mode.name)).data["lost_writes"][0]["entries"] == 1


async def test_a_chain_of_three_follows_without_a_wipe(pair: Pair) -> None:
    """us is DR primary of eu; a third follows us, then eu after the failover, by update-primary."""
    us, eu, third = pair.primary, await followed(pair, DR, "eu"), await followed(pair, DR, "third")
    us.store.write(*((f"r/m/{number}", b"v") for number in range(50)))
    await until(lambda: in_step(us, eu, DR) and in_step(us, third, DR))
    await us.stop()
    await promote(eu, DR)
    eu.store.write(("r/m/new", b"1"))
    before = third.store.head.index
    await follow(pair, third, eu, DR, "third-again")
    written = [write.key for record in third.store.log[before:] for write in record.writes()]
    assert {key for key in written if key.startswith("r/")} == {"r/m/new"}, "only the difference was written"
    assert (await third.manager.lost_writes("dr")).data == {"lost_writes": []}


async def test_a_secondary_that_was_ahead_of_the_promoted_one_keeps_what_it_had(pair: Pair) -> None:
    us, slow, fast = pair.primary, await followed(pair, DR, "slow"), await followed(pair, DR, "fast")
    us.store.write(("r/m/both", b"1"))  # so that what the other was filled with is no more than this one has
    await until(lambda: in_step(us, slow, DR) and in_step(us, fast, DR))
    await slow.stop()
    us.store.write(("r/m/only-fast", b"1"))
    await until(lambda: in_step(us, fast, DR))
    await us.stop()
    slow = await pair.start("slow", slow.store)
    await promote(slow, DR)
    await follow(pair, fast, slow, DR, "fast-again")
    assert "r/m/only-fast" not in fast.store.data
    record = (await fast.manager.lost_writes("dr")).data["lost_writes"][0]
    assert (record["entries"], record["exact"]) == (1, True)


async def test_update_primary_wants_the_same_set_and_forgets_on_demand(pair: Pair) -> None:
    secondary = await followed(pair, DR)
    stranger = await pair.start("stranger")
    await stranger.manager.primary_enable("dr", "")
    with pytest.raises(InvalidRequest, match=OTHER_SET[:40]):
        await secondary.manager.secondary_update_primary("dr", await pair.token("x", DR, stranger))
    assert in_step(pair.primary, secondary, DR), "nothing changed"
    assert (await secondary.manager.secondary_update_primary("dr", "")).warnings == [texts.FORGETTING]
    await until(lambda: (service := secondary.of(DR).secondary) is not None and service.state == "idle")
    status = await secondary.manager.status("dr")
    assert (status["state"], status["secondary_id"], status["primaries"]) == ("idle", "", [])
    assert "update-primary" in status["state_reason"]
    pair.primary.store.write(("r/m/later", b"1"))
    await follow(pair, secondary, pair.primary, DR, "again")
    assert secondary.store.data["r/m/later"] == b"1"


async def test_update_primary_by_addresses_keeps_the_credentials(pair: Pair) -> None:
    secondary = await followed(pair, DR)
    addresses = [f"https://127.0.0.1:{pair.primary.listener.port}"]
    await secondary.manager.secondary_update_primary("dr", "", addresses=["https://127.0.0.1:1", *addresses])
    await until(lambda: in_step(pair.primary, secondary, DR))
    with pytest.raises(InvalidRequest, match="cannot be given together"):
        await secondary.manager.secondary_update_primary("dr", "x.y.z", addresses=addresses)


async def test_a_promoted_mirror_of_a_performance_primary_is_one_under_a_new_epoch(pair: Pair) -> None:
    us, mirror = pair.primary, await followed(pair, DR, "mirror")
    perf = await followed(pair, PERFORMANCE, "perf")
    late = await pair.token("late")
    await until(lambda: in_step(us, mirror, DR))
    await us.stop()
    await promote(mirror, DR)
    assert mirror.manager.modes() == ("primary", "primary")
    role = mirror.of(PERFORMANCE).role
    assert isinstance(role, PrimaryRole)
    assert role.epoch.number == 2
    # The performance secondary knows the authority already: its addresses lead it there, it learns the epoch by itself.
    mirror.store.write(("r/m/new", b"1"))
    await perf.manager.secondary_update_primary("performance", "", addresses=[mirror.address])
    await until(lambda: in_step(mirror, perf))
    after = perf.of(PERFORMANCE).role
    assert isinstance(after, SecondaryRole)
    assert after.epoch == role.epoch
    fresh = await pair.start("fresh")
    with pytest.raises((InvalidRequest, Unavailable)):
        await fresh.manager.secondary_enable("performance", late, "", "", "")
    assert not fresh.flipped, "a token of the old epoch is void"


async def test_a_promoted_mirror_of_a_performance_secondary_reconnects_as_that_secondary(pair: Pair) -> None:
    us, eu = pair.primary, await followed(pair, PERFORMANCE, "eu")
    await eu.manager.primary_enable("dr", "")
    mirror = await pair.activate("eu-mirror", mode=DR, of=eu)
    await until(lambda: in_step(eu, mirror, DR))
    us.store.write(("r/m/x", b"1"))
    eu.store.write(("l/token/eu", b"2"))
    await until(lambda: in_step(us, eu) and in_step(eu, mirror, DR))
    assert mirror.store.data["r/m/x"] == b"1"
    await eu.stop()
    await promote(mirror, DR)
    assert mirror.manager.modes() == ("secondary", "primary")
    assert mirror.store.positions["performance"] == eu.store.positions["performance"], "it goes on where eu was"
    await until(lambda: in_step(us, mirror))
    us.store.write(("r/m/y", b"1"))
    await until(lambda: mirror.store.data.get("r/m/y") == b"1")
    service = mirror.of(PERFORMANCE).secondary
    assert service is not None
    assert service.last_sync is None or service.last_sync.by == "wal"


async def test_a_disabled_mirror_is_a_cluster_of_its_own(pair: Pair) -> None:
    mirror = await followed(pair, DR, "mirror")
    tenures = mirror.tenures
    assert (await mirror.manager.secondary_disable("dr")).warnings == [texts.DISABLING]
    await until(lambda: mirror.tenures > tenures)
    assert mirror.manager.modes() == ("disabled", "disabled"), "and not a second performance primary"
    assert mirror.manager.is_primary_writable()
    await GatedStore(mirror.store, mirror.writes).commit([Write("r/m/own", b"1")])


async def test_a_promoted_performance_secondary_keeps_what_is_its_own_and_takes_secondaries(pair: Pair) -> None:
    us, eu = pair.primary, await followed(pair, PERFORMANCE, "eu")
    eu.store.write(("l/token/eu", b"mine"))
    await us.stop()
    await promote(eu, PERFORMANCE)
    assert eu.store.data["l/token/eu"] == b"mine"
    assert eu.manager.is_primary_writable()
    asia = await pair.activate("asia", of=eu)
    eu.store.write(("r/m/new", b"1"))
    await until(lambda: in_step(eu, asia))
    assert asia.of(PERFORMANCE).role.epoch == Epoch(2, eu.of(PERFORMANCE).role.epoch.id)


async def test_a_configured_lag_needs_force(pair: Pair) -> None:
    options = ReplicationOptions(
        beat_s=0.1, reconnect_min_s=0.02, reconnect_max_s=0.1, probe_timeout_s=0.5, promotion_lag_max_s=0.05
    )
    secondary = await pair.activate("eu", options, mode=DR)
    await until(lambda: in_step(pair.primary, secondary, DR))
    await pair.primary.stop()
    await asyncio.sleep(0.1)  # the lag itself is what passes
    with pytest.raises(InvalidRequest, match=r"the configured limit is 0\.05 s"):
        await secondary.manager.secondary_promote("dr", "", force=False, preview=False)
    await promote(secondary, DR, force=True)


async def test_a_mirror_that_was_never_filled_is_promoted_by_force_only(pair: Pair) -> None:
    fresh = await pair.start("fresh")
    await fresh.manager.secondary_enable("dr", await pair.token("eu", DR), "", "", "")
    await fresh.stop()
    await pair.primary.stop()
    store = Store("eu")
    store.write(*fresh.flipped[0].entries.items())
    secondary = await pair.start("eu", store)
    with pytest.raises(InvalidRequest, match="no complete copy"):
        await secondary.manager.secondary_promote("dr", "", force=False, preview=False)
    forecast = await promote(secondary, DR, force=True)
    assert forecast["complete_copy"] is False


async def test_wrong_roles_are_refused_with_the_contracts_texts(pair: Pair) -> None:
    us, mirror = pair.primary, await followed(pair, DR, "mirror")
    for mode, text in ((DR, "Not a DR secondary."), (PERFORMANCE, "not a performance replication secondary")):
        for call in (
            us.manager.secondary_promote(mode.name, "", force=True, preview=False),
            us.manager.secondary_update_primary(mode.name, ""),
            us.manager.secondary_disable(mode.name),
        ):
            with pytest.raises(InvalidRequest, match=text):
                await call
    for call in (mirror.manager.primary_enable("performance", ""), mirror.manager.primary_demote("performance")):
        with pytest.raises(InvalidRequest, match="path disabled in replication DR secondary mode"):
            await call
    with pytest.raises(InvalidRequest, match="not a DR replication primary"):
        await mirror.manager.primary_demote("dr")
    assert roles.TABLE


@pytest.mark.parametrize("mode", BOTH)
async def test_ten_failovers_in_a_row_keep_what_was_acknowledged_and_replicated(pair: Pair, mode: Mode) -> None:
    """Every other one forced with the primary dead, the rest planned; the old primary always comes back by itself."""
    clusters = {"us": pair.primary, "eu": await followed(pair, mode)}
    names = ["us", "eu"]
    kept: dict[str, bytes] = {}
    epochs: list[int] = []
    for round_ in range(10):
        primary, secondary = clusters[names[0]], clusters[names[1]]
        for number in range(20):
            key, value = f"r/m/{round_}-{number}", str(number).encode()
            primary.store.write((key, value), ("r/m/shared", value))
            kept |= {key: value, "r/m/shared": value}
        await until(lambda primary=primary, secondary=secondary: in_step(primary, secondary, mode))
        if round_ % 2:
            await demote(primary, mode)
        else:
            await primary.stop()
            primary.store.write((f"r/m/lost-{round_}", b"nobody has it"))
        await promote(secondary, mode)
        if not round_ % 2:
            clusters[names[0]] = primary = await pair.start(names[0], primary.store)
            await demote(primary, mode)
        await follow(pair, primary, secondary, mode, f"{names[0]}-{round_}")
        names.reverse()
        new = clusters[names[0]]
        role = new.of(mode).role
        assert isinstance(role, PrimaryRole)
        epochs.append(role.epoch.number)
        for store in (new.store, clusters[names[1]].store):
            assert {key: store.data.get(key) for key in kept} == kept, f"round {round_}"
    assert epochs == list(range(2, 12))
    lost = [head for cluster in clusters.values() for head in cluster.of(mode).lost_heads]
    shown = set()
    for cluster in clusters.values():
        for head in cluster.of(mode).lost_heads:
            assert not head.at_least
            shown |= {
                entry.key for page in range(1, head.pages + 1) for entry in await cluster.of(mode).lost.page(head, page)
            }
    assert len(lost) == 5
    assert {key for key in shown if key.startswith("r/m/")} == {f"r/m/lost-{round_}" for round_ in range(0, 10, 2)}


@pytest.mark.parametrize("mode", BOTH)
async def test_no_write_is_let_in_after_a_demotion_and_all_before_it_arrive(pair: Pair, mode: Mode) -> None:
    primary, secondary = pair.primary, await followed(pair, mode)
    gated = GatedStore(primary.store, primary.writes)
    done: dict[str, int] = {}
    refused = 0

    async def writer(name: int) -> None:
        nonlocal refused
        for number in itertools.count():  # until it is refused, however quick this machine is
            try:
                head = await gated.commit([Write(f"r/m/{name}-{number}", b"x")])
            except (ReadOnlyStorage, NotApplied):
                refused += 1
                return
            done[f"r/m/{name}-{number}"] = head.index

    async with asyncio.TaskGroup() as tasks:
        for name in range(8):
            tasks.create_task(writer(name))
        await until(lambda: len(done) > 20)
        await demote(primary, mode)
    position = primary.store.positions[mode.name]
    assert done
    assert refused
    assert max(done.values()) <= position.index, "its own position is the end of what it wrote"
    assert {key for key in secondary.store.data if key.startswith("r/m/")} == set(done)
    forecast = await promote(secondary, mode)
    assert forecast["objections"] == []


async def test_a_request_that_is_forwarded_during_the_demotion_is_refused_clearly(pair: Pair) -> None:
    primary, secondary = pair.primary, await followed(pair, PERFORMANCE)
    gated = GatedStore(primary.store, primary.writes)

    async def execute(request: ForwardRequest) -> Executed:
        try:
            head = await gated.commit([Write(f"r/m/{request.path}", request.body)])
        except (ReadOnlyStorage, NotApplied):
            return Executed(503, [], b'{"errors":["try again"]}', 0)
        return Executed(204, [], b"", head.index)

    primary.execute = execute
    outcomes: list[int | str] = []

    async def client(number: int) -> None:
        for count in range(30):
            try:
                answer = await secondary.manager.forward_to_primary(Request(path=f"{number}-{count}"), Auth())
                outcomes.append(answer.status)
            except Unavailable:
                outcomes.append("unavailable")
            except PluginError as error:
                outcomes.append("unknown" if "may have been carried out" in str(error) else str(error))

    async with asyncio.TaskGroup() as tasks:
        for number in range(4):
            tasks.create_task(client(number))
        await until(lambda: 204 in outcomes)
        await demote(primary, PERFORMANCE)
    assert {"unavailable", 503} & set(outcomes) <= set(outcomes) <= {204, 503, "unavailable", "unknown"}
    written = [key for key in primary.store.data if key.startswith("r/m/")]
    assert outcomes.count(204) <= len(written) <= outcomes.count(204) + outcomes.count("unknown")


@pytest.mark.parametrize("mode", BOTH)
async def test_two_primaries_see_each_other_until_one_is_demoted(pair: Pair, mode: Mode) -> None:
    us, eu = pair.primary, await followed(pair, mode)
    await promote(eu, mode, force=True)

    async def forks(cluster: Cluster) -> list[dict[str, str]]:
        return list((await cluster.manager.status(mode.name)).get("forks", []))

    await until(lambda: (former := eu.of(mode).former) is not None and bool(former.sighted))
    (theirs,) = await forks(eu)
    assert us.address in theirs["reason"]
    (ours,) = await forks(us)
    assert ours["node_id"] == "eu"
    assert "epoch 1 is older than the other cluster's 2" in ours["reason"]
    await demote(us, mode)
    await until(lambda: (former := eu.of(mode).former) is not None and not former.sighted)
    assert await forks(eu) == []
    await follow(pair, us, eu, mode, "us")
    assert await forks(eu) == []


async def test_after_a_planned_failover_nobody_is_suspected(pair: Pair) -> None:
    us, eu = pair.primary, await followed(pair, DR)
    await demote(us, DR)
    await promote(eu, DR)
    former = eu.of(DR).former
    assert former is not None
    assert await former.look() == ""
    await follow(pair, us, eu, DR, "us")
    assert await former.look() == ""


@pytest.mark.parametrize("mode", BOTH)
async def test_twenty_planned_failovers_under_load_lose_no_acknowledged_write(pair: Pair, mode: Mode) -> None:
    """Writers try both clusters all the time; whatever either acknowledged is on both in the end."""
    here, there = pair.primary, await followed(pair, mode)
    clusters = (here, there)
    acknowledged: set[str] = set()
    over = asyncio.Event()

    async def writer(name: int) -> None:
        number = 0
        while not over.is_set():
            for cluster in clusters:
                number += 1
                key = f"r/m/{name}-{number}"
                try:
                    await GatedStore(cluster.store, cluster.writes).commit([Write(key, b"x")])
                    acknowledged.add(key)
                except (ReadOnlyStorage, NotApplied):
                    pass
            await asyncio.sleep(0.002)

    epochs: list[int] = []
    async with asyncio.TaskGroup() as tasks:
        for name in range(3):
            tasks.create_task(writer(name))
        for turn in range(20):
            await demote(here, mode)
            await promote(there, mode)
            token = await pair.token(f"turn-{turn}", mode, there)
            await here.manager.secondary_update_primary(mode.name, token)
            await until(
                lambda here=here: (found := here.of(mode).secondary) is not None and found.state == "stream-wals"
            )
            role = there.of(mode).role
            assert isinstance(role, PrimaryRole)
            epochs.append(role.epoch.number)
            here, there = there, here
        over.set()
    await until(lambda: in_step(here, there, mode))
    assert epochs == list(range(2, 22))
    assert len(acknowledged) > 100
    assert {key for key in here.store.data if key.startswith("r/m/")} == acknowledged
    for cluster in clusters:
        assert (await cluster.manager.lost_writes(mode.name)).data == {"lost_writes": []}


@pytest.mark.parametrize("mode", BOTH)
async def test_a_revoked_secondary_is_cut_and_stays_out(pair: Pair, mode: Mode) -> None:
    secondary = await followed(pair, mode)
    other = await followed(pair, DR if mode is PERFORMANCE else PERFORMANCE, "eu-2")
    await pair.primary.manager.revoke_secondary(mode.name, "eu")
    await until(lambda: (found := secondary.of(mode).secondary) is not None and not found.connected_to)
    status = await pair.primary.manager.status(mode.name)
    assert (status["known_secondaries"], status["secondaries"]) == ([], [])
    pair.primary.store.write(("r/m/secret", b"1"))
    await until(lambda: "r/m/secret" in other.store.data)
    await secondary.manager.recover()
    await until(lambda: (found := secondary.of(mode).secondary) is not None and found.state == "idle")
    assert "r/m/secret" not in secondary.store.data


@pytest.mark.parametrize(
    ("mode", "partition", "status"),
    [
        (PERFORMANCE, "r/m", 200),
        (PERFORMANCE, "l/token", 400),
        (PERFORMANCE, "c/core", 400),
        (PERFORMANCE, "m", 400),
        (DR, "l/token", 200),
        (DR, "c/replication", 400),
        (DR, "r/m/x", 400),
    ],
)
async def test_a_secondary_is_given_nothing_of_another_class(
    pair: Pair, mode: Mode, partition: str, status: int
) -> None:
    secondary = await followed(pair, mode)
    pair.primary.store.write(("r/m/a", b"1"), ("l/token/a", b"2"), ("c/core/a", b"3"))
    role = secondary.of(mode).role
    assert isinstance(role, SecondaryRole)
    head = pair.primary.store.head
    request = wire.FetchRequest(head.index, head.chain_hash, True, bytes(16), [partition], [wire.Extent(0, 0, 0, b"")])
    client = PeerClient(secondary_identity(mode, role), pair.primary.address)
    try:
        answer = await client.post(FETCH_PATH, wire.encode(request), timeout_s=60)
    finally:
        await client.close()
    assert answer.status == status
    if status == 200:
        assert b"l/token/a" in answer.body if mode is DR else b"r/m/a" in answer.body
    else:
        assert b"does not travel" in answer.body


async def test_a_certificate_of_one_mode_opens_nothing_of_the_other(pair: Pair) -> None:
    secondary = await followed(pair, PERFORMANCE)
    role, chief = secondary.of(PERFORMANCE).role, pair.primary.of(DR).role
    assert isinstance(role, SecondaryRole)
    assert isinstance(chief, PrimaryRole)
    for alpn in (PERFORMANCE.alpn, DR.alpn):
        identity = PeerIdentity(DR.server_name(chief.set_id), alpn, role.credentials, chief.authority_pem)
        client = PeerClient(identity, pair.primary.address)
        try:
            with pytest.raises((PeerUnreachable, PeerOutcomeUnknown)):
                await client.post(ALIVE_PATH, b"", timeout_s=60)
        finally:
            await client.close()
