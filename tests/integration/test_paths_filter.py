"""Paths filters between clusters: in-memory stores, the real cluster port, the real manager."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import msgspec
import pytest

from consul_backend.failpoint import arm, declare, disarm
from plugin_api.errors import InvalidRequest, NotFound
from sidecar.failpoints import POINTS
from sidecar.replication.channel import ChannelClosed
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from sidecar.replication.protocol import Bye, DiffRequest, Extent, FetchRequest, Unframer, decode_from_fetch
from sidecar.replication.roles import Role
from sidecar.replication.selection import EVERYTHING
from sidecar.replication.shipper import SELECTION_CHANGED
from sidecar.replication.states import Phase
from tests.support.replication_cluster import Cluster, Pair, primary_in, until

KV = str(uuid.UUID(int=1))
PRIVATE = str(uuid.UUID(int=2))
LATER = str(uuid.UUID(int=3))


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """A primary with two mounts, ``kv/`` and ``private/``, an entry in each."""
    async with primary_in(PERFORMANCE) as pair:
        mount(pair.primary, "kv/", KV)
        mount(pair.primary, "private/", PRIVATE)
        yield pair


def mount(cluster: Cluster, path: str, mount_uuid: str) -> None:
    cluster.store.write((f"r/core/mounts/{mount_uuid}", path.encode()))
    cluster.store.write((f"r/{mount_uuid}/first", path.encode()))


def data_of(cluster: Cluster, mount_uuid: str) -> dict[str, bytes]:
    prefix = f"r/{mount_uuid}/"
    return {key[len(prefix) :]: value for key, value in cluster.store.data.items() if key.startswith(prefix)}


def same(primary: Cluster, secondary: Cluster, *without: str) -> bool:
    """Whether the secondary streams, and holds class r but those partitions, of which it holds nothing."""
    service = secondary.manager.performance.secondary
    wanted = {key: value for key, value in primary.store.replicated().items() if key.split("/", 2)[1] not in without}
    return service is not None and service.machine.phase is Phase.STREAM_WALS and secondary.store.replicated() == wanted


async def compared(primary: Cluster, secondary: Cluster) -> None:
    """Roots were found equal at the primary's newest record."""
    index = primary.store.head.index

    def is_compared() -> bool:
        service = secondary.manager.performance.secondary
        complete_at = service.applier.upstream.complete_at if service is not None else None
        return complete_at is not None and complete_at[0] >= index

    await until(is_compared)


def ever_in_log(cluster: Cluster, mount_uuid: str) -> bool:
    """Whether the cluster's own log ever held an entry of the mount."""
    prefix = f"r/{mount_uuid}/"
    return any(write.key.startswith(prefix) for record in cluster.store.log for write in record.writes())


async def test_what_is_denied_from_the_start_never_arrives(pair: Pair) -> None:
    primary = pair.primary
    await primary.manager.filters.set("eu", "deny", ["private/"])
    secondary = await pair.activate()
    await until(lambda: same(primary, secondary, PRIVATE))
    primary.store.write((f"r/{PRIVATE}/second", b"secret"))
    primary.store.write((f"r/{KV}/second", b"shared"), (f"r/{PRIVATE}/third", b"secret"))
    await until(lambda: same(primary, secondary, PRIVATE))
    await compared(primary, secondary)
    assert data_of(secondary, KV) == {"first": b"kv/", "second": b"shared"}
    assert not ever_in_log(secondary, PRIVATE)
    (stream,) = primary.manager.performance.primary.shipper._streams.values()
    asked = {f"r/{mount_uuid}/first": stream.takes(f"r/{mount_uuid}/first") for mount_uuid in (KV, PRIVATE)}
    assert list(asked.values()) == [True, False], "a reindex asks it for what it may have, and names nothing else"
    assert secondary.manager.filters.hidden(PRIVATE)
    assert not secondary.manager.filters.hidden(KV)
    assert primary.manager.filters.dynamic("primary", "eu")["dynamic_filtered_mounts"] == ["private/"]
    assert secondary.manager.filters.dynamic("secondary", "eu")["dynamic_filtered_mounts"] == ["private/"]
    assert (await secondary.manager.status("performance"))["mounts_withheld"] == 1
    status = await primary.manager.status("performance")
    assert status["paths_filters"] == {"eu": {"mode": "deny", "paths": 1}}


async def test_a_filter_takes_effect_on_a_running_stream_and_its_end_fills_again(pair: Pair) -> None:
    primary = pair.primary
    secondary = await pair.activate()
    await until(lambda: same(primary, secondary))
    await primary.manager.filters.set("eu", "deny", ["private/"])
    primary.store.write((f"r/{PRIVATE}/second", b"written under the filter"))
    await until(lambda: same(primary, secondary, PRIVATE))
    await compared(primary, secondary)
    assert data_of(secondary, PRIVATE) == {}, "what had been shipped is dropped"
    assert all(
        value is None or path == "first"
        for record in secondary.store.log
        for cls, partition, entries in record.groups()
        if partition == PRIVATE
        for path, value in entries
    ), "nothing of it arrived afterwards"
    await primary.manager.filters.delete("eu")
    await until(lambda: same(primary, secondary) and not secondary.manager.filters.not_held(PRIVATE))
    await compared(primary, secondary)
    assert data_of(secondary, PRIVATE) == {"first": b"private/", "second": b"written under the filter"}
    with pytest.raises(NotFound):
        primary.manager.filters.get("eu")


async def test_an_allow_list_lets_in_what_is_named_later_and_nothing_else(pair: Pair) -> None:
    primary = pair.primary
    await primary.manager.filters.set("eu", "allow", ["kv/", "team/"])
    secondary = await pair.activate()
    await until(lambda: same(primary, secondary, PRIVATE))
    mount(primary, "team/kv/", LATER)
    await until(lambda: same(primary, secondary, PRIVATE))
    unnamed = str(uuid.UUID(int=4))
    mount(primary, "other/", unnamed)
    primary.store.write((f"r/{LATER}/second", b"after"))
    await until(lambda: same(primary, secondary, PRIVATE, unnamed))
    await compared(primary, secondary)
    assert not ever_in_log(secondary, unnamed)


async def test_a_denied_mount_that_was_removed_meanwhile_is_not_shipped_late(pair: Pair) -> None:
    primary = pair.primary
    await primary.manager.filters.set("eu", "deny", ["private/"])
    secondary = await pair.activate()
    await until(lambda: same(primary, secondary, PRIVATE))
    await secondary.stop()
    primary.store.write((f"r/{PRIVATE}/late", b"secret"))
    primary.store.write((f"r/core/mounts/{PRIVATE}", None))
    primary.store.write((f"r/{PRIVATE}/first", None), (f"r/{PRIVATE}/late", None))
    await primary.manager.filters.mount_removed("private/")
    again = await pair.start("eu-again", secondary.store)
    await until(lambda: same(primary, again))
    await compared(primary, again)
    assert not ever_in_log(again, PRIVATE)


async def test_promotion_without_everything_is_refused_names_it_and_is_never_a_source_of_deletes(pair: Pair) -> None:
    primary = pair.primary
    await primary.manager.filters.set("eu", "deny", ["private/"])
    filtered = await pair.activate("eu")
    whole = await pair.activate("ap")
    await until(lambda: same(primary, filtered, PRIVATE) and same(primary, whole))
    await primary.stop()
    await until(lambda: not filtered.of(PERFORMANCE).secondary.applier.upstream.connected)
    with pytest.raises(InvalidRequest, match="private/"):
        await filtered.manager.secondary_promote("performance", "", force=False, preview=False)
    answer = await filtered.manager.secondary_promote("performance", "", force=True, preview=False)
    assert answer.data["promotion_forecast"]["mounts_not_held"] == ["private/"]
    assert filtered.manager.filters.not_held(PRIVATE)
    assert not filtered.manager.filters.hidden(PRIVATE), "it exists in this set: requests are told 503, not 404"
    assert filtered.manager.filters.lacking() == {"mounts": ["private/"]}

    token = await pair.token("ap2", of=filtered)
    await whole.manager.secondary_update_primary("performance", token, primary_api_addr=pair.api.address)
    filtered.store.write((f"r/{KV}/new", b"1"))
    await until(lambda: data_of(whole, KV).get("new") == b"1")
    await compared(filtered, whole)
    assert data_of(whole, PRIVATE) == {"first": b"private/"}, "not held is no deletion"
    assert not whole.manager.filters.not_held(PRIVATE)

    with pytest.raises(InvalidRequest, match="kv/"):
        await filtered.manager.filters.accept_empty(["kv/"])
    await filtered.manager.filters.accept_empty(["private"])
    assert not filtered.manager.filters.not_held(PRIVATE)
    await until(lambda: same(filtered, whole))
    assert data_of(whole, PRIVATE) == {}, "an operator said that it is empty"


async def test_a_fresh_secondary_of_a_primary_that_lacks_a_mount_lacks_it_too(pair: Pair) -> None:
    primary = pair.primary
    await primary.manager.filters.set("eu", "deny", ["private/"])
    filtered = await pair.activate("eu")
    await until(lambda: same(primary, filtered, PRIVATE))
    await primary.stop()
    await filtered.manager.secondary_promote("performance", "", force=True, preview=False)
    fresh = await pair.activate("ap", of=filtered)
    await until(lambda: same(filtered, fresh))
    await compared(filtered, fresh)
    assert fresh.manager.filters.not_held(PRIVATE)
    assert not fresh.manager.filters.not_held(KV)
    with pytest.raises(InvalidRequest, match="private/"):
        await fresh.manager.secondary_promote("performance", "", force=False, preview=False)


async def test_a_promoted_filtered_secondary_is_filled_when_it_follows_a_whole_primary_again(pair: Pair) -> None:
    primary = pair.primary
    await primary.manager.filters.set("eu", "deny", ["private/"])
    filtered = await pair.activate("eu")
    await until(lambda: same(primary, filtered, PRIVATE))
    await filtered.manager.secondary_promote("performance", "", force=True, preview=False)
    await filtered.manager.primary_demote("performance")
    assert filtered.manager.filters.not_held(PRIVATE)
    token = await pair.token("eu2")
    await filtered.manager.secondary_update_primary("performance", token, primary_api_addr=pair.api.address)
    await until(lambda: same(primary, filtered) and not filtered.manager.filters.not_held(PRIVATE))
    assert data_of(filtered, PRIVATE) == {"first": b"private/"}


async def test_the_dr_secondary_of_a_filtered_secondary_drops_the_same(pair: Pair) -> None:
    primary = pair.primary
    secondary = await pair.activate("eu")
    await until(lambda: same(primary, secondary))
    await secondary.manager.primary_enable("dr", "")
    mirror = await pair.activate("eu-dr", mode=DR, of=secondary)

    def mirrored(mode: Mode = DR) -> bool:
        return mirror.store.of_classes(mode.classes) == secondary.store.of_classes(mode.classes)

    await until(mirrored)
    assert data_of(mirror, PRIVATE)
    await primary.manager.filters.set("eu", "deny", ["private/"])
    await until(lambda: same(primary, secondary, PRIVATE) and mirrored())
    assert data_of(mirror, PRIVATE) == {}
    tenures = mirror.tenures
    await mirror.manager.secondary_disable("dr")
    await until(lambda: mirror.tenures > tenures)
    assert mirror.manager.filters.not_held(PRIVATE), "on its own it still knows what it never had"
    assert not mirror.manager.filters.not_held(KV)


async def test_a_disabled_filtered_secondary_knows_what_it_lacks(pair: Pair) -> None:
    primary = pair.primary
    await primary.manager.filters.set("eu", "deny", ["private/"])
    secondary = await pair.activate("eu")
    await until(lambda: same(primary, secondary, PRIVATE))
    await secondary.manager.secondary_disable("performance")
    assert secondary.manager.filters.lacking() == {"mounts": ["private/"]}
    await secondary.manager.filters.accept_empty(["private/"])
    assert secondary.manager.filters.lacking() == {"mounts": []}


async def test_a_crash_while_withheld_data_is_dropped_goes_on_dropping(pair: Pair) -> None:
    primary = pair.primary
    primary.store.write(*((f"r/{PRIVATE}/{n}", b"x") for n in range(150)))
    secondary = await pair.activate("eu")
    await until(lambda: same(primary, secondary))
    declare(POINTS)
    arm("filter:dropping=raise:2")
    try:
        await primary.manager.filters.set("eu", "deny", ["private/"])
        await until(secondary._task.done)
    finally:
        disarm()
    with pytest.raises(ExceptionGroup):
        await secondary.stop()
    await secondary.listener.close()
    pair.started.remove(secondary)
    assert 0 < len(data_of(secondary, PRIVATE)) < 100, "half of it is still there"
    assert secondary.manager.filters.hidden(PRIVATE), "and nobody sees it"
    again = await pair.start("eu-again", secondary.store)
    await until(lambda: same(primary, again, PRIVATE))
    await compared(primary, again)


async def test_a_secondary_cannot_fetch_what_is_withheld(pair: Pair) -> None:
    """It may claim any selection: the primary decides, at every request."""
    primary = pair.primary
    await primary.manager.filters.set("eu", "deny", ["private/"])
    secondary = await pair.activate("eu")
    await until(lambda: same(primary, secondary, PRIVATE))
    manager = secondary.manager.performance

    def claim(role: Role) -> Role:
        return msgspec.structs.replace(role, selection=EVERYTHING, held=EVERYTHING)

    await manager.change(claim)
    service = manager.secondary
    service._role = manager.role
    with pytest.raises(ChannelClosed, match=r"409.*say hello again"):
        await service._ask_diff(DiffRequest(bytes(16), bytes(20), {}))
    fetch = FetchRequest(1, bytes(32), False, bytes(16), [f"r/{PRIVATE}"], [Extent(0, 0, 0, b"")])
    frames = [frame for chunk in [c async for c in service._ask_entries(fetch)] for frame in Unframer().feed(chunk)]
    assert [decode_from_fetch(frame) for frame in frames] == [Bye("closing", SELECTION_CHANGED)]
    honest = msgspec.structs.replace(fetch, selection=primary.manager.performance.selected("eu"))
    with pytest.raises(ChannelClosed, match="400"):
        [chunk async for chunk in service._ask_entries(honest)]
