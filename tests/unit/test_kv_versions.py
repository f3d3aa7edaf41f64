"""The key/value engine, version 2, against the published API: life and end of versions, metadata, patches, failures."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugin_api.errors import InvalidRequest, NotFound, PluginError, ReadOnlyStorage
from plugin_api.request import Operation
from plugin_api.testing import MemoryStorage
from sidecar.engines.json_values import encode_json, keys_only, merge_patch
from tests.support.kv_mount import CREATE, DELETE, DESCRIBED, PATCH, READ, UPDATE, WRITTEN, Mount


@pytest.fixture
def v2() -> Mount:
    return Mount("2")


# --- deletion, undeletion, destruction ---


async def test_v2_deleted_version_is_404_with_data(v2: Mount) -> None:
    await v2.put("a", x=1)
    v2.clock.now_s += 1
    assert await v2(DELETE, "data/a") is None
    response = await v2(READ, "data/a")
    assert response is not None
    assert response.status == 404
    assert response.data == {
        "data": None,
        "metadata": DESCRIBED | {"version": 1, "deletion_time": "2023-11-14T22:13:21Z"},
    }
    v2.clock.now_s += 1
    await v2(DELETE, "data/a")
    metadata = await v2.data(READ, "metadata/a")
    assert metadata["versions"]["1"]["deletion_time"] == "2023-11-14T22:13:21Z"


async def test_v2_delete_undelete_destroy_by_number(v2: Mount) -> None:
    for n in range(4):
        await v2.put("a", x=n)
    assert await v2(UPDATE, "delete/a", {"versions": ["1", "2", "99"]}) is None
    assert await v2(UPDATE, "undelete/a", {"versions": [2]}) is None
    assert await v2(UPDATE, "destroy/a", {"versions": "3,1"}) is None
    versions = (await v2.data(READ, "metadata/a"))["versions"]
    assert [(bool(v["deletion_time"]), v["destroyed"]) for v in versions.values()] == [
        (True, True), (False, False), (False, True), (False, False),
    ]  # fmt: skip
    assert (await v2.data(READ, "data/a", {"version": 2}))["data"] == {"x": 1}
    destroyed = await v2(READ, "data/a", {"version": 3})
    assert destroyed is not None
    assert destroyed.data is not None
    assert (destroyed.status, destroyed.data["data"], destroyed.data["metadata"]["destroyed"]) == (404, None, True)
    await v2(UPDATE, "undelete/a", {"versions": [1, 3]})
    assert (await v2.data(READ, "metadata/a"))["versions"]["3"]["destroyed"]
    assert sorted(path for path in v2.storage.entries if path.startswith("versions/")) == [
        "versions/a/2",
        "versions/a/4",
    ]


@pytest.mark.parametrize("verb", ["delete", "undelete", "destroy"])
async def test_v2_version_calls_need_numbers_and_forgive_absence(v2: Mount, verb: str) -> None:
    for body in ({}, {"versions": []}, {"versions": ""}):
        with pytest.raises(InvalidRequest, match="No version number provided"):
            await v2(UPDATE, f"{verb}/a", body)
    assert await v2(UPDATE, f"{verb}/a", {"versions": [1]}) is None
    assert await v2(DELETE, "data/a") is None
    assert await v2(DELETE, "metadata/a") is None
    assert v2.storage.commits == []
    with pytest.raises(InvalidRequest, match='"versions"'):
        await v2(UPDATE, f"{verb}/a", {"versions": ["x"]})


async def test_v2_delete_metadata_removes_everything(v2: Mount) -> None:
    for n in range(3):
        await v2.put("a", x=n)
    commits = len(v2.storage.commits)
    assert await v2(DELETE, "metadata/a") is None
    assert v2.storage.entries == {}
    assert len(v2.storage.commits) == commits + 1
    assert (await v2.put("a", x=1))["version"] == 1


async def test_v2_many_versions_go_in_bounded_commits(v2: Mount) -> None:
    await v2(UPDATE, "metadata/a", {"max_versions": 200})
    for n in range(150):
        await v2.put("a", x=n)
    await v2(UPDATE, "destroy/a", {"versions": list(range(1, 51))})
    await v2(UPDATE, "metadata/a", {"max_versions": 20})
    await v2.put("a", x="last")
    metadata = await v2.data(READ, "metadata/a")
    assert sorted(map(int, metadata["versions"])) == list(range(132, 152))
    assert metadata["oldest_version"] == 132
    assert sum(path.startswith("versions/") for path in v2.storage.entries) == 20
    await v2(UPDATE, "metadata/a", {"max_versions": 500})
    for n in range(100):
        await v2.put("a", x=n)
    await v2(DELETE, "metadata/a")
    assert v2.storage.entries == {}
    assert max(len(batch) for batch in v2.storage.commits) <= 40


async def test_v2_a_crash_between_steps_leaves_no_version_without_data(v2: Mount) -> None:
    await v2(UPDATE, "metadata/a", {"max_versions": 100})
    for n in range(80):
        await v2.put("a", x=n)
    steps = 0

    async def stop_after_two(writes: Any) -> None:
        nonlocal steps
        steps += 1
        if steps > 2:
            raise RuntimeError("crash")
        await MemoryStorage.commit(v2.storage, writes)

    v2.storage.commit = stop_after_two  # type: ignore[method-assign]  # stands in for one call
    with pytest.raises(RuntimeError):
        await v2(DELETE, "metadata/a")
    metadata = await v2.data(READ, "metadata/a")
    for number, version in metadata["versions"].items():
        assert version["destroyed"] != (f"versions/a/{number}" in v2.storage.entries)


# --- limits of versions, deletion in time ---


async def test_v2_keeps_ten_versions_unless_told(v2: Mount) -> None:
    for n in range(12):
        await v2.put("a", x=n)
    metadata = await v2.data(READ, "metadata/a")
    assert sorted(map(int, metadata["versions"])) == list(range(3, 13))
    assert (metadata["oldest_version"], metadata["current_version"], metadata["max_versions"]) == (3, 12, 0)
    with pytest.raises(NotFound):
        await v2(READ, "data/a", {"version": 2})
    assert "versions/a/2" not in v2.storage.entries


async def test_v2_the_secrets_own_limit_wins_over_the_mounts(v2: Mount) -> None:
    await v2(UPDATE, "config", {"max_versions": 3})
    await v2(UPDATE, "metadata/a", {"max_versions": 2})
    for path in ("a", "b"):
        for n in range(5):
            await v2.put(path, x=n)
    assert list((await v2.data(READ, "metadata/a"))["versions"]) == ["4", "5"]
    assert list((await v2.data(READ, "metadata/b"))["versions"]) == ["3", "4", "5"]


@pytest.mark.parametrize(
    ("mount", "own", "life_s"),
    [("0s", "0s", 0), ("1h", "0s", 3600), ("0s", "1h", 3600), ("1h", "30m", 1800), ("1h", "2h", 3600),
     ("-1s", "1h", 0), ("1h", "-1s", 0)],
)  # fmt: skip
async def test_v2_versions_delete_themselves(v2: Mount, mount: str, own: str, life_s: int) -> None:
    await v2(UPDATE, "config", {"delete_version_after": mount})
    await v2(UPDATE, "metadata/a", {"delete_version_after": own})
    written = await v2.put("a", x=1)
    assert bool(written["deletion_time"]) == bool(life_s)
    v2.clock.now_s += life_s - 1 if life_s else 10**8
    response = await v2(READ, "data/a")
    assert response is not None
    assert response.status == 200
    if life_s:
        v2.clock.now_s += 1
        response = await v2(READ, "data/a")
        assert response is not None
        assert response.status == 404
        await v2(UPDATE, "undelete/a", {"versions": [1]})
        assert (await v2.data(READ, "data/a"))["data"] == {"x": 1}


# --- settings and metadata ---


async def test_v2_config_round_trip(v2: Mount) -> None:
    assert await v2.data(READ, "config") == {"cas_required": False, "delete_version_after": "0s", "max_versions": 0}
    assert await v2(CREATE, "config", {"max_versions": "5", "delete_version_after": "3h25m19s"}) is None
    assert await v2(UPDATE, "config", {"cas_required": True}) is None
    assert await v2.data(READ, "config") == {
        "cas_required": True, "delete_version_after": "3h25m19s", "max_versions": 5,
    }  # fmt: skip
    with pytest.raises(InvalidRequest):
        await v2(UPDATE, "config", {"max_versions": -1})


async def test_v2_metadata_shape(v2: Mount) -> None:
    await v2.put("a", x=1)
    v2.clock.now_s += 0.5
    await v2.put("a", x=2)
    assert await v2.data(READ, "metadata/a") == {
        "cas_required": False,
        "created_time": WRITTEN,
        "current_version": 2,
        "custom_metadata": None,
        "delete_version_after": "0s",
        "max_versions": 0,
        "oldest_version": 0,
        "updated_time": "2023-11-14T22:13:20.5Z",
        "versions": {
            "1": {"created_time": WRITTEN, "deletion_time": "", "destroyed": False},
            "2": {"created_time": "2023-11-14T22:13:20.5Z", "deletion_time": "", "destroyed": False},
        },
    }
    with pytest.raises(NotFound):
        await v2(READ, "metadata/none")


async def test_v2_metadata_before_data(v2: Mount) -> None:
    assert await v2(CREATE, "metadata/a", {"max_versions": 4, "custom_metadata": {"owner": "me"}}) is None
    with pytest.raises(NotFound):
        await v2(READ, "data/a")
    metadata = await v2.data(READ, "metadata/a")
    assert (metadata["current_version"], metadata["versions"], metadata["max_versions"]) == (0, {}, 4)
    assert (await v2.put_if(0))["custom_metadata"] == {"owner": "me"}
    assert await v2(CREATE, "metadata/b", {}) is None
    with pytest.raises(NotFound):
        await v2(READ, "metadata/b")


async def test_v2_custom_metadata_is_replaced_by_put_and_merged_by_patch(v2: Mount) -> None:
    await v2(CREATE, "metadata/a", {"custom_metadata": {"a": "1", "b": "2"}, "max_versions": 5})
    await v2(PATCH, "metadata/a", {"custom_metadata": {"b": None, "c": "3"}})
    metadata = await v2.data(READ, "metadata/a")
    assert (metadata["custom_metadata"], metadata["max_versions"]) == ({"a": "1", "c": "3"}, 5)
    await v2(PATCH, "metadata/a", {"max_versions": None})
    assert (await v2.data(READ, "metadata/a"))["max_versions"] == 0
    await v2(UPDATE, "metadata/a", {"custom_metadata": {"z": "9"}})
    assert (await v2.data(READ, "metadata/a"))["custom_metadata"] == {"z": "9"}
    await v2(PATCH, "metadata/a", {"custom_metadata": None})
    assert (await v2.data(READ, "metadata/a"))["custom_metadata"] is None
    with pytest.raises(NotFound):
        await v2(PATCH, "metadata/none", {"max_versions": 1})


@pytest.mark.parametrize(
    "custom",
    [{str(n): "x" for n in range(65)}, {"k" * 129: "x"}, {"k": "v" * 513}, {"k": "\x00"}, {"\n": "v"}, {"k": ["v"]},
     {"k": None}, {"": "v"}, {"k": ""}, {"k": True}],
)  # fmt: skip
async def test_v2_custom_metadata_limits(v2: Mount, custom: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="custom_metadata validation failed"):
        await v2(CREATE, "metadata/a", {"custom_metadata": custom})
    assert v2.storage.entries == {}


async def test_v2_custom_metadata_at_its_limits(v2: Mount) -> None:
    custom = {f"{n:0128}": "v" * 512 for n in range(64)}
    await v2(CREATE, "metadata/a", {"custom_metadata": custom})
    with pytest.raises(InvalidRequest, match="at most 64"):
        await v2(PATCH, "metadata/a", {"custom_metadata": {"one": "more"}})
    assert (await v2.data(READ, "metadata/a"))["custom_metadata"] == custom


async def test_v2_cas_required_that_has_no_effect_warns(v2: Mount) -> None:
    await v2(UPDATE, "config", {"cas_required": True})
    response = await v2(UPDATE, "metadata/a", {"cas_required": False})
    assert response is not None
    assert response.warnings == [
        '"cas_required" set to false, but is mandated by backend config. This value will be ignored.'
    ]


# --- patch and subkeys ---


async def test_v2_patch_merges_into_a_new_version(v2: Mount) -> None:
    await v2.put("a", keep=1, gone=2, deep={"x": 1, "y": 2})
    patch = {"data": {"gone": None, "deep": {"y": None, "z": 3}, "new": [1]}, "options": {"cas": 1}}
    assert (await v2.data(PATCH, "data/a", patch))["version"] == 2
    assert (await v2.data(READ, "data/a"))["data"] == {"keep": 1, "deep": {"x": 1, "z": 3}, "new": [1]}
    assert (await v2.data(READ, "data/a", {"version": 1}))["data"]["gone"] == 2
    with pytest.raises(InvalidRequest, match="did not match"):
        await v2(PATCH, "data/a", patch)


async def test_v2_patch_needs_something_to_patch(v2: Mount) -> None:
    with pytest.raises(NotFound):
        await v2(PATCH, "data/a", {"data": {"x": 1}})
    await v2(CREATE, "metadata/a", {"max_versions": 1})
    with pytest.raises(NotFound):
        await v2(PATCH, "data/a", {"data": {"x": 1}})
    await v2.put("a", x=1)
    with pytest.raises(InvalidRequest, match="no data provided"):
        await v2(PATCH, "data/a", {})
    await v2(DELETE, "data/a")
    response = await v2(PATCH, "data/a", {"data": {"x": 1}})
    assert response is not None
    assert response.data is not None
    assert (response.status, response.data["version"]) == (404, 1)


async def test_v2_subkeys(v2: Mount) -> None:
    await v2.put("a", foo="secret", bar={"baz": {"deep": "secret"}, "none": {}}, arr=[{"x": 1}])
    read = await v2.data(READ, "subkeys/a")
    assert read["subkeys"] == {"foo": None, "bar": {"baz": {"deep": None}, "none": None}, "arr": None}
    assert read["metadata"] == DESCRIBED | {"version": 1}
    assert (await v2.data(READ, "subkeys/a", {"depth": "1"}))["subkeys"] == {"foo": None, "bar": None, "arr": None}
    assert (await v2.data(READ, "subkeys/a", {"depth": 2}))["subkeys"]["bar"] == {"baz": None, "none": None}
    with pytest.raises(InvalidRequest):
        await v2(READ, "subkeys/a", {"depth": -1})
    await v2(DELETE, "data/a")
    response = await v2(READ, "subkeys/a")
    assert response is not None
    assert response.data is not None
    assert (response.status, response.data["subkeys"]) == (404, None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=3), JSON), st.dictionaries(st.text(max_size=3), JSON))
def test_merge_patch_is_idempotent_and_changes_no_argument(target: dict[str, Any], patch: dict[str, Any]) -> None:
    before = (encode_json(target), encode_json(patch))
    once = merge_patch(target, patch)
    assert merge_patch(once, patch) == once
    assert (encode_json(target), encode_json(patch)) == before
    assert merge_patch(target, {}) == target


@given(st.dictionaries(st.text(max_size=3), JSON), st.integers(0, 4))
def test_subkeys_hold_no_value(secret: dict[str, Any], depth: int) -> None:
    def leaves(value: Any, level: int) -> None:
        assert value is None or (isinstance(value, dict) and (not depth or level < depth))
        for item in (value or {}).values():
            leaves(item, level + 1)

    leaves(keys_only(secret, depth), 0)
    assert set(keys_only(secret, depth)) == set(secret)


# --- secondary, damage ---


@pytest.mark.parametrize(
    ("operation", "path"),
    [(CREATE, "data/a"), (PATCH, "data/none"), (DELETE, "data/none"), (UPDATE, "destroy/none"),
     (DELETE, "metadata/none"), (UPDATE, "config"), (UPDATE, "metadata/a")],
)  # fmt: skip
async def test_v2_on_a_secondary_nothing_is_decided_from_its_own_copy(
    v2: Mount, operation: Operation, path: str
) -> None:
    await v2.put("a", x=1)
    v2.storage.read_only = True
    with pytest.raises(ReadOnlyStorage):
        await v2(operation, path, {"data": {"x": 1}, "versions": [1], "options": {"cas": 77}})
    assert (await v2.data(READ, "data/a"))["data"] == {"x": 1}


async def test_v2_damage_is_an_error_not_an_absence(v2: Mount) -> None:
    await v2.put("a", x=1)
    await v2.put("b", x=1)
    del v2.storage.entries["versions/a/1"]
    v2.storage.entries["metadata/b"] = b"\xc1 rubbish"
    for path in ("data/a", "data/b"):
        with pytest.raises(PluginError) as caught:
            await v2(READ, path)
        assert caught.value.status == 500
    with pytest.raises(PluginError):
        await v2(PATCH, "data/a", {"data": {"x": 1}})


async def test_v2_a_read_that_races_with_destruction_looks_again(v2: Mount) -> None:
    await v2.put("a", x=1)
    get = v2.storage.get

    async def destroy_under_the_reader(path: str) -> bytes | None:
        if path == "versions/a/1":
            v2.storage.get = get  # type: ignore[method-assign]  # stands in for one call
            await v2(UPDATE, "destroy/a", {"versions": [1]})
        return await get(path)

    v2.storage.get = destroy_under_the_reader  # type: ignore[method-assign]  # stands in for one call
    response = await v2(READ, "data/a")
    assert response is not None
    assert response.data is not None
    assert (response.status, response.data["metadata"]["destroyed"]) == (404, True)


async def test_v2_metadata_of_a_later_build_with_more_fields_still_reads(v2: Mount) -> None:
    await v2.put("a", x=1)
    record = msgspec.msgpack.decode(v2.storage.entries["metadata/a"])
    v2.storage.entries["metadata/a"] = msgspec.msgpack.encode(record | {"added_later": 1})
    assert (await v2.data(READ, "data/a"))["data"] == {"x": 1}
