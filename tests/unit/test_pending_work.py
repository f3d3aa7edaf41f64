"""What an engine began outside and did not finish is undone, whatever died in between: plugin_api.pending."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest

from consul_backend.errors import Unavailable
from consul_backend.wal import Write
from plugin_api.engine import Engine
from plugin_api.errors import PluginError
from plugin_api.framework import Fields, Path, PathEngine, generic_name
from plugin_api.pending import FOLDER, MIN_AGE_S, begin, done, left_over
from plugin_api.request import IssuedLease, Lease, Operation, Request, Response
from plugin_api.testing import MemoryStorage, SettableClock, make_context
from sidecar.request import pending_work
from sidecar.request.pending_work import can_undo, undo_left_over
from sidecar.request.plugins import SECRETS, PluginRegistry
from tests.support.service_node import Harness, running


class Database:
    """The world outside. ``stop_at`` names the step at which the node dies; ``refuses``: it cannot be reached."""

    def __init__(self) -> None:
        self.users: set[str] = set()
        self.undone: list[str] = []
        self.stop_at = ""
        self.refuses = False

    def reached(self, step: str) -> None:
        if self.stop_at == step:
            raise asyncio.CancelledError


class Users(PathEngine):
    """``user/<name>`` makes a user and leases it."""

    type_name = "users"
    database: ClassVar[Database]

    def paths(self) -> Sequence[Path]:
        return [Path("user/" + generic_name("name"), {}, {Operation.READ: self._make})]

    async def _make(self, request: Request, fields: Fields) -> Response:
        user = f"{fields['name']}-{request.id}"
        note = await begin(self.context, {"user": user})
        self.database.reached("noted")
        self.database.users.add(user)
        self.database.reached("made")
        return Response(data={"user": user}, lease=Lease(ttl_s=60, internal={"user": user}, pending=note))

    async def revoke(self, lease: IssuedLease) -> None:
        self.database.users.discard(lease.internal["user"])

    async def undo(self, data: Mapping[str, Any]) -> None:
        if self.database.refuses:
            raise PluginError("the database cannot be reached")
        self.database.undone.append(data["user"])
        self.database.users.discard(data["user"])


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def engine(database: Database) -> type[Users]:
    class Bound(Users):
        pass

    Bound.database = database
    return Bound


@pytest.fixture
async def node(engine: type[Users]) -> AsyncIterator[Harness]:
    class Registry(PluginRegistry):
        def types(self, group: str) -> list[str]:
            return sorted([*super().types(group), *(["users"] if group == SECRETS else [])])

        def load(self, group: str, type_name: str) -> type[Engine]:
            return engine if type_name == "users" else super().load(group, type_name)

    async with running(plugins=Registry(PluginRegistry.installed()._found)) as harness:
        yield harness


def notes(node: Harness) -> list[str]:
    return [key for key in node.store.entries if f"/{FOLDER}" in key]


async def a_pass(node: Harness) -> None:
    (one,) = [found for found in node.service.mounts.engines() if can_undo(found)]
    await undo_left_over(one)


@pytest.mark.parametrize("local", [False, True], ids=["replicated mount", "local mount"])
async def test_the_commit_of_the_lease_ends_the_note(node: Harness, database: Database, local: bool) -> None:
    await node.call("POST", "sys/mounts/db", {"type": "users", "local": local})
    seen: list[Sequence[Write]] = []
    commit = node.store.commit

    async def watched(writes: Sequence[Write]) -> Any:
        seen.append(writes)
        return await commit(writes)

    node.store.commit = watched  # type: ignore[method-assign]  # only looks on
    made = await node.call("GET", "db/user/ada")
    assert made.body["lease_id"]
    assert notes(node) == []
    (ending,) = [
        writes for writes in seen if any(f"/{FOLDER}" in write.key and write.value is None for write in writes)
    ]
    assert any(write.key.startswith("l/expire/db/user/ada/") for write in ending), "one commit, the lease's"
    node.clock.now_s += MIN_AGE_S
    await a_pass(node)
    assert database.users == {made.data["user"]}
    assert database.undone == []


@pytest.mark.parametrize("step", ["noted", "made"])
async def test_what_a_dead_node_left_is_undone_by_the_next(node: Harness, database: Database, step: str) -> None:
    await node.call("POST", "sys/mounts/db", {"type": "users"})
    (one,) = [found for found in node.service.mounts.engines() if can_undo(found)]
    database.stop_at = step
    with pytest.raises(asyncio.CancelledError):
        await one.handle(Request(operation=Operation.READ, path="user/ada", id="r1"))
    assert (len(notes(node)), len(database.users)) == (1, int(step == "made"))
    await a_pass(node)
    assert database.undone == [], "it may still be under way"
    node.clock.now_s += MIN_AGE_S
    await a_pass(node)
    assert (database.undone, database.users, notes(node)) == (["ada-r1"], set(), [])


async def test_a_lease_that_could_not_be_kept_is_undone_in_the_end(node: Harness, database: Database) -> None:
    """Taking it back at once is tried too; here the database is away just then."""
    await node.call("POST", "sys/mounts/db", {"type": "users"})
    commit = node.store.commit

    async def refusing(writes: Sequence[Write]) -> Any:
        if any(write.key.startswith("l/expire/") for write in writes):
            raise Unavailable("no store")
        return await commit(writes)

    node.store.commit = refusing  # type: ignore[method-assign]  # the planted fault
    assert (await node.call("GET", "db/user/ada")).status == 503
    node.store.commit = commit  # type: ignore[method-assign]  # stands in for one call
    assert len(notes(node)) == 1
    node.clock.now_s += MIN_AGE_S
    await a_pass(node)
    assert (len(database.undone), database.users, notes(node)) == (1, set(), [])


async def test_without_the_note_the_user_would_stay(
    node: Harness, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: an engine that notes nothing."""

    async def nothing(context: Any, data: dict[str, Any]) -> str:
        return "none"

    monkeypatch.setitem(globals(), "begin", nothing)
    await node.call("POST", "sys/mounts/db", {"type": "users"})
    (one,) = [found for found in node.service.mounts.engines() if can_undo(found)]
    database.stop_at = "made"
    with pytest.raises(asyncio.CancelledError):
        await one.handle(Request(operation=Operation.READ, path="user/ada", id="r1"))
    node.clock.now_s += MIN_AGE_S
    await a_pass(node)
    assert database.users == {"ada-r1"}


async def test_what_cannot_be_undone_now_is_tried_again_and_holds_up_nothing(
    engine: type[Users], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SettableClock()
    storage = MemoryStorage()
    one = engine(make_context(local_storage=storage, now=clock))
    for user in ("a", "b"):
        await begin(one.context, {"user": user})
        clock.now_s += 1
    await storage.put(FOLDER + "junk", b"not a note")
    clock.now_s += MIN_AGE_S
    database.refuses = True
    assert await undo_left_over(one) == 2
    assert [note.data["user"] for note in await left_over(one.context)] == ["a", "b"], "oldest first"
    database.refuses = False
    assert await undo_left_over(one) == 0
    assert database.undone == ["a", "b"]
    note = await begin(one.context, {"user": "c"})
    await done(one.context, note)
    await done(one.context, note)
    assert await left_over(one.context, min_age_s=0) == []

    async def hang(data: Mapping[str, Any]) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(pending_work, "UNDO_S_MAX", 0.01)
    monkeypatch.setattr(one, "undo", hang)
    await begin(one.context, {"user": "d"})
    assert await undo_left_over(one, min_age_s=0) == 1


async def test_a_mount_goes_when_its_engine_has_undone_everything(node: Harness, database: Database) -> None:
    await node.call("POST", "sys/mounts/db", {"type": "users"})
    (one,) = [found for found in node.service.mounts.engines() if can_undo(found)]
    database.stop_at = "made"
    with pytest.raises(asyncio.CancelledError):
        await one.handle(Request(operation=Operation.READ, path="user/ada", id="r1"))
    database.refuses = True
    refused = await node.call("DELETE", "sys/mounts/db")
    assert (refused.status, "could not undo" in refused.errors[0]) == (400, True)
    assert "db/" in (await node.call("GET", "sys/mounts")).data
    database.refuses = False
    assert (await node.call("DELETE", "sys/mounts/db")).status == 204
    assert database.users == set()


async def test_the_service_does_it_by_itself(
    node: Harness, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.call("POST", "sys/mounts/db", {"type": "users"})
    (one,) = [found for found in node.service.mounts.engines() if can_undo(found)]
    await begin(one.context, {"user": "ada"})
    node.clock.now_s += MIN_AGE_S
    work = asyncio.create_task(node.service.run())
    await node.store.until(lambda: not notes(node))
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    assert database.undone == ["ada"]
