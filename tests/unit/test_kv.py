"""The key/value engine against the published API: version 1, and writing and reading in version 2."""

import asyncio
from typing import Any

import pytest

from plugin_api.errors import InvalidRequest, NotFound, PluginError, UnsupportedOperation
from plugin_api.request import Operation
from plugin_api.testing import make_request
from tests.support.kv_mount import CREATE, DELETE, DESCRIBED, LIST, PATCH, READ, UPDATE, Mount


@pytest.fixture
def v1() -> Mount:
    return Mount("1")


@pytest.fixture
def v2() -> Mount:
    return Mount("2")


# --- choosing ---


async def test_version_option_chooses_the_engine() -> None:
    assert await Mount("")(CREATE, "data/a", {"x": 1}) is None
    assert await Mount("2").put("a", x=1)
    with pytest.raises(InvalidRequest):
        Mount("3")


# --- version 1 ---


async def test_v1_gives_back_what_was_written(v1: Mount) -> None:
    secret = {"a": "1", "n": {"deep": [1, 2.5, None, True]}, "big": 10**25, "é": "ü"}
    assert await v1(CREATE, "some/path", secret) is None
    response = await v1(READ, "some/path")
    assert response is not None
    assert response.data == secret
    assert (response.lease_duration_s, response.renewable, response.warnings) == (2764800, False, [])


@pytest.mark.parametrize(
    ("secret", "lease_s"),
    [
        ({"ttl": "1h"}, 3600),
        ({"ttl": 30}, 30),
        ({"lease": "5m"}, 300),
        ({"ttl": "soon"}, 2764800),
        ({"ttl": []}, 2764800),
    ],
)
async def test_v1_lease_comes_from_the_secret(v1: Mount, secret: dict[str, Any], lease_s: int) -> None:
    await v1(CREATE, "a", secret)
    response = await v1(READ, "a")
    assert response is not None
    assert response.lease_duration_s == lease_s
    assert response.data == secret


async def test_v1_missing_empty_and_folders(v1: Mount) -> None:
    with pytest.raises(NotFound):
        await v1(READ, "nothing")
    with pytest.raises(InvalidRequest, match="missing data fields"):
        await v1(CREATE, "a", {})
    for path in ("", "a/"):
        with pytest.raises(NotFound):
            await v1(READ, path)
        assert await v1(DELETE, path) is None
        assert await v1.engine.exists(make_request(UPDATE, path)) is False
        with pytest.raises(InvalidRequest, match="cannot write to a path ending in '/'"):
            await v1(CREATE, path, {"x": 1})
    assert await v1(DELETE, "nothing") is None


async def test_v1_lists_one_level(v1: Mount) -> None:
    for path in ("a", "a/b", "c/d/e"):
        await v1(CREATE, path, {"x": 1})
    assert await v1.data(LIST, "") == {"keys": ["a", "a/", "c/"]}
    assert await v1.data(LIST, "a/") == {"keys": ["b"]}
    assert await v1.data(LIST, "c") == {"keys": ["d/"]}
    empty = await v1(LIST, "none/")
    assert empty is not None
    assert (empty.status, empty.data, empty.warnings) == (404, None, [])


async def test_v1_existence_and_delete(v1: Mount) -> None:
    assert await v1.engine.exists(make_request(UPDATE, "a")) is False
    await v1(CREATE, "a", {"path": "kept", "x": 1})
    assert await v1.engine.exists(make_request(UPDATE, "a")) is True
    assert await v1.data(READ, "a") == {"path": "kept", "x": 1}
    await v1(DELETE, "a")
    assert v1.storage.entries == {}


async def test_v1_refuses_patch_and_what_json_cannot_hold(v1: Mount) -> None:
    with pytest.raises(UnsupportedOperation):
        await v1(PATCH, "a", {"x": 1})
    with pytest.raises(InvalidRequest, match="JSON"):
        await v1(CREATE, "a", {"x": "\ud800"})
    assert v1.storage.entries == {}


async def test_v1_damaged_storage_is_an_error_that_quotes_nothing(v1: Mount) -> None:
    v1.storage.entries["a"] = b"secret-looking rubbish"
    with pytest.raises(PluginError) as caught:
        await v1(READ, "a")
    assert caught.value.status == 500
    assert "rubbish" not in str(caught.value)


# --- version 2: writing and reading ---


async def test_v2_write_answers_with_the_version(v2: Mount) -> None:
    assert await v2.put("a", x=1) == DESCRIBED | {"version": 1}
    assert (await v2.put("a", x=2))["version"] == 2


async def test_v2_read_current_and_named_versions(v2: Mount) -> None:
    await v2.put("a/b", x="one")
    await v2.put("a/b", x="two")
    assert await v2.data(READ, "data/a/b") == {"data": {"x": "two"}, "metadata": DESCRIBED | {"version": 2}}
    for version in ("1", 1):
        assert (await v2.data(READ, "data/a/b", {"version": version}))["data"] == {"x": "one"}
    assert (await v2.data(READ, "data/a/b", {"version": "0"}))["data"] == {"x": "two"}
    for version in (3, -1):
        with pytest.raises(NotFound):
            await v2(READ, "data/a/b", {"version": version})
    with pytest.raises(NotFound):
        await v2(READ, "data/none")
    with pytest.raises(InvalidRequest, match='"version"'):
        await v2(READ, "data/a/b", {"version": "x"})


async def test_v2_a_write_is_one_commit(v2: Mount) -> None:
    await v2.put("a", x=1)
    assert [{write.path for write in batch} for batch in v2.storage.commits] == [{"versions/a/1", "metadata/a"}]
    v2.storage.fail_next = RuntimeError("lost")
    with pytest.raises(RuntimeError):
        await v2.put("a", x=2)
    assert (await v2.data(READ, "data/a"))["data"] == {"x": 1}


@pytest.mark.parametrize("body", [{}, {"data": None}, {"options": {"cas": 0}}])
async def test_v2_write_needs_data(v2: Mount, body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="no data provided"):
        await v2(CREATE, "data/a", body)


@pytest.mark.parametrize("data", ["x", "a=b", ["a=b"], 5, True])
async def test_v2_data_must_be_an_object(v2: Mount, data: Any) -> None:
    with pytest.raises(InvalidRequest, match='field "data"'):
        await v2(CREATE, "data/a", {"data": data})
    assert v2.storage.entries == {}


async def test_v2_an_empty_object_is_data(v2: Mount) -> None:
    await v2.data(CREATE, "data/a", {"data": {}})
    assert (await v2.data(READ, "data/a"))["data"] == {}


async def test_v2_paths_must_name_a_secret(v2: Mount) -> None:
    for path in ("data/", "metadata/", "delete/"):
        with pytest.raises(InvalidRequest, match="missing path"):
            await v2(UPDATE, path, {"data": {"x": 1}, "versions": [1], "max_versions": 1})
    for path in ("data/", "metadata/", "subkeys/", "data/a/", "metadata/a/"):
        with pytest.raises(NotFound):
            await v2(READ, path)
        assert not await v2.engine.exists(make_request(UPDATE, path))
    with pytest.raises(InvalidRequest):
        await v2(CREATE, "data/a/", {"data": {"x": 1}})


@pytest.mark.parametrize(
    ("operation", "command"), [(READ, "get"), (CREATE, "put"), (UPDATE, "put"), (LIST, "list"), (DELETE, "delete")]
)
async def test_v2_paths_of_version_1_are_404_with_a_warning(v2: Mount, operation: Operation, command: str) -> None:
    response = await v2(operation, "foo", {"x": 1})
    assert response is not None
    assert (response.status, response.data) == (404, None)
    assert response.warnings == [
        "Invalid path for a versioned K/V secrets engine. See the API docs for the appropriate API endpoints to use. "
        f"If using the Vault CLI, use 'vault kv {command}' for this operation."
    ]


async def test_v2_nested_names_do_not_collide(v2: Mount) -> None:
    await v2.put("a", who="a")
    await v2.put("a/1", who="a/1")
    await v2.put("a", who="a again")
    assert (await v2.data(READ, "data/a", {"version": 1}))["data"] == {"who": "a"}
    assert (await v2.data(READ, "data/a/1"))["data"] == {"who": "a/1"}
    assert await v2.data(LIST, "metadata/") == {"keys": ["a", "a/"]}
    assert await v2.data(LIST, "metadata/a") == {"keys": ["1"]}
    await v2(DELETE, "metadata/a")
    assert (await v2.data(READ, "data/a/1"))["data"] == {"who": "a/1"}


async def test_v2_list_of_nothing_is_404(v2: Mount) -> None:
    response = await v2(LIST, "metadata/")
    assert response is not None
    assert (response.status, response.data) == (404, None)
    with pytest.raises(UnsupportedOperation):
        await v2(LIST, "data/")


async def test_v2_existence_makes_create_or_update(v2: Mount) -> None:
    assert await v2.engine.exists(make_request(UPDATE, "data/a")) is False
    await v2.put("a", x=1)
    assert await v2.engine.exists(make_request(UPDATE, "data/a")) is True
    assert await v2.engine.exists(make_request(UPDATE, "metadata/a")) is True
    assert await v2.engine.exists(make_request(UPDATE, "delete/a")) is None
    assert await v2.engine.exists(make_request(UPDATE, "config")) is None


# --- check-and-set ---


async def test_v2_cas_zero_creates_only(v2: Mount) -> None:
    assert (await v2.put_if(0))["version"] == 1
    with pytest.raises(InvalidRequest, match="check-and-set parameter did not match the current version"):
        await v2.put_if(0)
    assert (await v2.put_if("1"))["version"] == 2
    await v2(DELETE, "data/a")
    with pytest.raises(InvalidRequest):
        await v2.put_if(0)
    assert (await v2.put_if(2))["version"] == 3


@pytest.mark.parametrize("value", ["x", None, [], True, 1.5])
async def test_v2_cas_that_is_no_number(v2: Mount, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="error parsing check-and-set parameter"):
        await v2.put_if(value)


async def test_v2_cas_required_by_mount_or_secret(v2: Mount) -> None:
    await v2(UPDATE, "metadata/a", {"cas_required": True})
    with pytest.raises(InvalidRequest, match="check-and-set parameter required for this call"):
        await v2.put("a", x=1)
    assert (await v2.put_if(0))["version"] == 1
    await v2.put("b", x=1)
    await v2(UPDATE, "config", {"cas_required": "true"})
    with pytest.raises(InvalidRequest, match="required"):
        await v2.put("b", x=2)
    with pytest.raises(InvalidRequest, match="required"):
        await v2(PATCH, "data/b", {"data": {"x": 2}})


async def test_v2_concurrent_cas_lets_one_through(v2: Mount) -> None:
    results = await asyncio.gather(*(v2.put_if(0) for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(result, dict) for result in results) == 1
    numbers = await asyncio.gather(*(v2.put("b", x=n) for n in range(8)))
    assert sorted(answer["version"] for answer in numbers) == list(range(1, 9))
