"""The plugin framework: durations, field conversion, routing, warnings, the per-key lock."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugin_api.errors import InvalidRequest, ReadOnlyStorage, UnsupportedOperation, UnsupportedPath
from plugin_api.framework import (
    Fields,
    FieldSpec,
    FieldType,
    Path,
    PathEngine,
    format_duration,
    format_time,
    format_time_us,
    generic_name,
    parse_duration,
    parse_duration_s,
    writes,
)
from plugin_api.locks import KeyedLock
from plugin_api.request import Operation, Request, Response, list_response
from plugin_api.testing import MemoryStorage, check_storage, make_context, make_request

READ, UPDATE, CREATE, DELETE = Operation.READ, Operation.UPDATE, Operation.CREATE, Operation.DELETE


# --- durations and times ---


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (90, 90),
        ("90", 90),
        ("1h", 3600),
        ("1h30m", 5400),
        ("768h0m0s", 2764800),
        ("2d", 172800),
        ("1.5h", 5400),
        ("-1s", -1),
        ("-1", -1),
        ("500ms", 0.5),
        ("", 0),
        (None, 0),
        (1.5, 1.5),
        ("0", 0),
        ("1h 30m".replace(" ", ""), 5400),
    ],
)
def test_durations_are_read_as_numbers_or_go_text(value: object, seconds: float) -> None:
    assert parse_duration(value) == seconds
    assert parse_duration_s(value) == int(seconds)


@pytest.mark.parametrize(
    "value", ["h", "1x", "1h-1m", "--1s", "1 h", True, [], {}, "1e400", "1" * 40, float("nan"), "-"]
)
def test_what_is_no_duration_is_refused_without_repeating_it(value: object) -> None:
    with pytest.raises(ValueError, match="duration") as caught:
        parse_duration(value)
    if isinstance(value, str) and len(value) > 3:
        assert value not in str(caught.value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (5, "5s"),
        (60, "1m0s"),
        (90, "1m30s"),
        (3600, "1h0m0s"),
        (2764800, "768h0m0s"),
        (12319, "3h25m19s"),
        (0.5, "500ms"),
        (1.5, "1.5s"),
        (-1, "-1s"),
        (0.00025, "250µs"),
    ],
)
def test_durations_are_printed_as_go_prints_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(0, 10**9))
def test_a_printed_duration_reads_back(seconds: int) -> None:
    assert parse_duration_s(format_duration(seconds)) == seconds


def test_times_are_rfc3339_without_trailing_zeros() -> None:
    assert format_time(0) == "1970-01-01T00:00:00Z"
    assert format_time(1_700_000_000.25) == "2023-11-14T22:13:20.25Z"
    assert format_time_us(1_700_000_000_000_001) == "2023-11-14T22:13:20.000001Z"


# --- fields ---

SPECS = {
    "text": FieldSpec(FieldType.STRING),
    "count": FieldSpec(FieldType.INT, default=7),
    "on": FieldSpec(FieldType.BOOL),
    "ttl": FieldSpec(FieldType.DURATION_S),
    "age": FieldSpec(FieldType.SIGNED_DURATION_S),
    "names": FieldSpec(FieldType.LIST),
    "numbers": FieldSpec(FieldType.INT_LIST),
    "map": FieldSpec(FieldType.MAP),
    "any": FieldSpec(FieldType.ANY),
}


class Echo(PathEngine):
    """Answers with the fields it was given."""

    type_name = "echo"

    def paths(self) -> Sequence[Path]:
        return [
            Path("echo", SPECS, writes(self.echo) | {READ: self.echo}, help="Echoes."),
            Path("free/.*", {}, {UPDATE: self.echo}, free_form=True),
            Path("thing/" + generic_name("text"), SPECS, {READ: self.echo, CREATE: self.echo}, exists=self.known),
            Path("silent", {}, {UPDATE: self.silent, Operation.LIST: self.nothing}),
            Path("main", {}, {UPDATE: self.echo, READ: self.echo}, primary_only=True),
            Path("opt(?:/(?P<extra>[a-z]+))?", {}, {READ: self.echo}),
        ]

    async def echo(self, request: Request, fields: Fields) -> Response:
        return Response(data=dict(fields))

    async def silent(self, request: Request, fields: Fields) -> None:
        return None

    async def nothing(self, request: Request, fields: Fields) -> Response:
        return list_response([])

    async def known(self, request: Request, fields: Fields) -> bool:
        return fields["text"] == "known"


@pytest.fixture
def engine() -> Echo:
    return Echo(make_context())


async def echo(engine: Echo, path: str = "echo", operation: Operation = UPDATE, **data: Any) -> Response:
    response = await engine.handle(make_request(operation, path, data))
    assert response is not None
    return response


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("text", "a", "a"),
        ("text", 5, "5"),
        ("text", None, ""),
        ("count", 3, 3),
        ("count", "3", 3),
        ("count", "-3", -3),
        ("count", 3.0, 3),
        ("count", "", 0),
        ("on", True, True),
        ("on", "true", True),
        ("on", "1", True),
        ("on", 0, False),
        ("on", "F", False),
        ("on", "", False),
        ("ttl", "1h", 3600),
        ("ttl", 3600, 3600),
        ("ttl", "3600", 3600),
        ("age", "-1s", -1),
        ("names", ["a", "b"], ["a", "b"]),
        ("names", "a, b,", ["a", "b"]),
        ("names", None, []),
        ("numbers", ["2", 3], [2, 3]),
        ("numbers", "2,3", [2, 3]),
        ("numbers", 2, [2]),
        ("map", {"a": 1}, {"a": 1}),
        ("map", ["a=1", "b=x=y"], {"a": "1", "b": "x=y"}),
        ("map", None, {}),
        ("any", [1, {}], [1, {}]),
    ],
)
async def test_a_field_takes_every_spelling_of_its_type(engine: Echo, name: str, value: Any, expected: Any) -> None:
    response = await echo(engine, **{name: value})
    assert response.data is not None
    assert response.data[name] == expected
    assert response.warnings == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text", ["hidden"]),
        ("text", {"hidden": 1}),
        ("count", "hidden"),
        ("count", 1.5),
        ("count", True),
        ("count", 2**63),
        ("count", "9" * 30),
        ("count", float("inf")),
        ("on", "hidden"),
        ("on", []),
        ("ttl", "hidden"),
        ("ttl", "-1s"),
        ("ttl", True),
        ("names", [["hidden"]]),
        ("names", [{}]),
        ("numbers", ["hidden"]),
        ("numbers", [[1]]),
        ("map", 5),
        ("map", ["hidden"]),
    ],
)
async def test_a_wrong_type_is_400_and_never_quotes_the_value(engine: Echo, name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f'error converting input for field "{name}"') as caught:
        await echo(engine, **{name: value})
    assert caught.value.status == 400
    assert "hidden" not in str(caught.value)


@given(
    st.dictionaries(
        st.sampled_from(sorted(SPECS)),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        ),
    )
)
def test_any_json_either_converts_or_is_refused(data: dict[str, Any]) -> None:
    async def run() -> None:
        with contextlib.suppress(InvalidRequest):
            await echo(Echo(make_context()), **data)

    asyncio.run(run())


async def test_missing_fields_read_as_default_or_zero_and_are_not_shared(engine: Echo) -> None:
    response = await echo(engine)
    assert response.data == {
        "text": "", "count": 7, "on": False, "ttl": 0, "age": 0, "names": [], "numbers": [], "map": {}, "any": None,
    }  # fmt: skip
    fields = Fields(SPECS, {"text": "x"})
    fields["names"].append("changed")
    assert fields["names"] == []
    assert (fields.given("text"), fields.given("count")) == (True, False)
    assert "x" not in repr(fields).replace("text", "")


# --- routing ---


async def test_unknown_path_and_operation(engine: Echo) -> None:
    with pytest.raises(UnsupportedPath):
        await echo(engine, "nowhere")
    with pytest.raises(UnsupportedPath):
        await echo(engine, "echo/more")
    with pytest.raises(UnsupportedOperation):
        await echo(engine, "echo", DELETE)


async def test_create_and_update_stand_in_for_each_other(engine: Echo) -> None:
    await echo(engine, "free/x", CREATE)
    await echo(engine, "thing/x", UPDATE)
    with pytest.raises(UnsupportedOperation):
        await echo(engine, "free/x", Operation.PATCH)


async def test_captured_groups_are_fields_and_win_with_a_warning(engine: Echo) -> None:
    response = await echo(engine, "thing/name", READ, text="other", count=1)
    assert response.data is not None
    assert response.data["text"] == "name"
    assert response.warnings == [
        "Endpoint replaced the value of these parameters with the values captured from the endpoint's path: [text]"
    ]
    assert (await echo(engine, "thing/name", READ, text="name")).warnings == []
    assert (await echo(engine, "opt/x", READ)).data == {"extra": "x"}
    assert (await echo(engine, "opt", READ)).data == {}


async def test_unrecognised_parameters_are_named_in_order(engine: Echo) -> None:
    response = await echo(engine, b=1, a=2, text="")
    assert response.warnings == ["Endpoint ignored these unrecognized parameters: [a b]"]
    assert (await echo(engine, "free/x", a=1)).warnings == []
    assert (await echo(engine, "echo", READ, list="false", help="")).warnings == []


async def test_an_answer_without_body_stays_one(engine: Echo) -> None:
    assert await engine.handle(make_request(UPDATE, "silent", {"unknown": 1})) is None
    empty = await engine.handle(make_request(Operation.LIST, "silent", {"unknown": 1}))
    assert empty == Response(status=404)


async def test_existence_check_decides_create_or_update(engine: Echo) -> None:
    assert await engine.exists(make_request(UPDATE, "thing/known")) is True
    assert await engine.exists(make_request(UPDATE, "thing/new")) is False
    assert await engine.exists(make_request(UPDATE, "echo")) is None


@pytest.mark.parametrize("name", ["a", "a-b", "a.b", "A_1", "_x"])
async def test_generic_names(engine: Echo, name: str) -> None:
    assert (await echo(engine, f"thing/{name}", READ)).data is not None


@pytest.mark.parametrize("name", ["", "-a", "a-", ".a", "a.", "a b", "a/b", "é", "a\n"])
async def test_what_is_no_generic_name(engine: Echo, name: str) -> None:
    with pytest.raises(UnsupportedPath):
        await echo(engine, f"thing/{name}", READ)


async def test_primary_only_writes_leave_before_the_handler_runs() -> None:
    storage = MemoryStorage()
    storage.read_only = True
    engine = Echo(make_context(storage=storage))
    with pytest.raises(ReadOnlyStorage):
        await echo(engine, "main")
    await echo(engine, "main", READ)
    await echo(engine, "echo")


async def test_help_comes_from_the_matching_path(engine: Echo) -> None:
    assert engine.help("echo") == "Echoes."
    assert engine.help("nowhere") == ""


# --- lock and storage ---


async def test_keyed_lock_excludes_per_key_and_forgets() -> None:
    locks = KeyedLock()
    order: list[str] = []
    release = asyncio.Event()
    inside = asyncio.Event()

    async def hold(key: str, name: str, wait: bool) -> None:
        async with locks.hold(key):
            order.append(name)
            if wait:
                inside.set()
                await release.wait()

    async with asyncio.TaskGroup() as group:
        group.create_task(hold("a", "first", True))
        await inside.wait()
        second = group.create_task(hold("a", "second", False))
        await group.create_task(hold("b", "other", False))
        assert order == ["first", "other"]
        assert not second.done()
        release.set()
    assert order == ["first", "other", "second"]
    assert len(locks) == 0


async def test_a_cancelled_waiter_leaves_nothing_behind() -> None:
    locks = KeyedLock()
    async with locks.hold("a"):
        waiter = asyncio.create_task(locks.hold("a").__aenter__())
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert len(locks) == 1
    assert len(locks) == 0
    with pytest.raises(ZeroDivisionError):
        async with locks.hold("a"):
            _ = 1 / 0
    assert len(locks) == 0


async def test_memory_storage_keeps_the_storage_contract() -> None:
    async def make() -> MemoryStorage:
        return MemoryStorage()

    await check_storage(make)


async def test_the_suite_finds_a_storage_that_breaks_it() -> None:
    class Forgetful(MemoryStorage):
        async def commit(self, writes: Any) -> None:
            await super().commit(writes[:1])

    async def make() -> MemoryStorage:
        return Forgetful()

    with pytest.raises(AssertionError, match="every write of a batch"):
        await check_storage(make)


async def test_memory_storage_refuses_and_fails_on_demand() -> None:
    storage = MemoryStorage()
    storage.read_only = True
    with pytest.raises(ReadOnlyStorage):
        await storage.put("a", b"1")
    storage.read_only = False
    storage.fail_next = RuntimeError("lost")
    with pytest.raises(RuntimeError, match="lost"):
        await storage.put("a", b"1")
    assert await storage.get("a") is None
    await storage.put("a", b"1")
    assert await storage.get("a") == b"1"
