"""The approle auth method against the published API: roles, and logging in with them."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugin_api.errors import (
    InvalidRequest,
    NotFound,
    PermissionDenied,
    PluginError,
    ReadOnlyStorage,
    Unavailable,
    UnsupportedPath,
)
from plugin_api.request import Auth
from plugin_api.testing import make_request
from sidecar.auth.approle import WRONG_LOGIN, AppRole
from sidecar.auth.approle_records import Role
from sidecar.auth.cidrs import address_within, all_within
from tests.support.approle_mount import CREATE, DELETE, LIST, READ, UPDATE, Mount


@pytest.fixture
def mount() -> Mount:
    return Mount()


# --- roles ---


async def test_login_is_the_only_open_path() -> None:
    assert AppRole.unauthenticated == ("login",)


async def test_a_new_role_has_the_documented_defaults(mount: Mount) -> None:
    await mount.role(token_policies="Dev,ops")
    assert await mount.data(READ, "role/web") == {
        "bind_secret_id": True,
        "local_secret_ids": False,
        "secret_id_bound_cidrs": [],
        "secret_id_num_uses": 0,
        "secret_id_ttl": 0,
        "token_bound_cidrs": [],
        "token_explicit_max_ttl": 0,
        "token_max_ttl": 0,
        "token_no_default_policy": False,
        "token_num_uses": 0,
        "token_period": 0,
        "token_policies": ["dev", "ops"],
        "token_ttl": 0,
        "token_type": "default",
    }


async def test_roles_are_one_in_any_case_and_listed(mount: Mount) -> None:
    await mount.role("Web")
    await mount.role("app.x-1")
    assert await mount.engine.exists(make_request(UPDATE, "role/wEB")) is True
    assert await mount.engine.exists(make_request(UPDATE, "role/none")) is False
    assert await mount.data(LIST, "role/") == {"keys": ["app.x-1", "web"]}
    empty = await Mount()(LIST, "role/")
    assert empty is not None
    assert empty.status == 404


async def test_an_update_keeps_what_it_does_not_name(mount: Mount) -> None:
    role_id = await mount.role(token_ttl="20m", secret_id_num_uses="40")
    await mount(UPDATE, "role/web", {"token_max_ttl": "30m"})
    data = await mount.data(READ, "role/web")
    assert (data["token_ttl"], data["token_max_ttl"], data["secret_id_num_uses"]) == (1200, 1800, 40)
    assert await mount.data(READ, "role/web/role-id") == {"role_id": role_id}


async def test_old_names_still_work_and_new_ones_win(mount: Mount) -> None:
    await mount.role(policies="old", period="1h", bound_cidr_list="10.0.0.0/8")
    data = await mount.data(READ, "role/web")
    assert (data["token_policies"], data["policies"]) == (["old"], ["old"])
    assert (data["token_period"], data["period"]) == (3600, 3600)
    assert data["secret_id_bound_cidrs"] == data["bound_cidr_list"] == ["10.0.0.0/8"]
    await mount(UPDATE, "role/web", {"policies": "older", "token_policies": "new"})
    data = await mount.data(READ, "role/web")
    assert data["token_policies"] == ["new"]
    assert "policies" not in data


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"bind_secret_id": False}, "at least one constraint"),
        ({"secret_id_num_uses": -1}, "negative"),
        ({"secret_id_num_uses": "x"}, "secret_id_num_uses"),
        ({"secret_id_ttl": "-1s"}, "negative"),
        ({"secret_id_ttl": []}, "secret_id_ttl"),
        ({"secret_id_bound_cidrs": "10.0.0.0/99"}, "CIDR"),
        ({"token_bound_cidrs": "nowhere"}, "CIDR"),
        ({"token_type": "odd"}, "token_type"),
        ({"token_type": "batch", "token_num_uses": 1}, "token_type"),
        ({"token_ttl": "2h", "token_max_ttl": "1h"}, "token_ttl"),
        ({"bind_secret_id": "maybe"}, "bind_secret_id"),
        ({"role_id": "\ud800"}, "Unicode"),
        ({"token_policies": ["\ud800"]}, "Unicode"),
    ],
)
async def test_bad_roles_change_nothing(mount: Mount, body: dict[str, Any], text: str) -> None:
    assert text in await mount.refused("role/web", body, CREATE)
    assert mount.storage.entries == {}
    await mount.role(token_policies="dev")
    before = dict(mount.storage.entries)
    assert text in await mount.refused("role/web", body)
    assert mount.storage.entries == before


async def test_what_is_no_name(mount: Mount) -> None:
    for name in ("-a", "a.", "a b", "a@b"):
        with pytest.raises(UnsupportedPath):
            await mount(READ, f"role/{name}")
    assert "too long" in await mount.refused("role/" + "a" * 4096, {}, CREATE)


async def test_unknown_roles(mount: Mount) -> None:
    for path in ("role/none", "role/none/role-id", "role/none/policies"):
        with pytest.raises(NotFound):
            await mount(READ, path)
    assert await mount(DELETE, "role/none") is None
    for path in ("secret-id", "custom-secret-id", "secret-id/lookup", "secret-id-accessor/destroy"):
        body = {"secret_id": "x", "secret_id_accessor": "x"}
        assert "role does not exist" in await mount.refused(f"role/none/{path}", body)
    assert "role does not exist" in await mount.refused("role/none/secret-id/", operation=LIST)


async def test_role_ids_are_unique(mount: Mount) -> None:
    first = await mount.role("one", role_id="mine")
    assert first == "mine"
    assert "already in use" in await mount.refused("role/two", {"role_id": "mine"}, CREATE)
    await mount.role("two")
    assert "already in use" in await mount.refused("role/two/role-id", {"role_id": "mine"})
    assert "missing role_id" in await mount.refused("role/two/role-id", {})
    old = (await mount.data(READ, "role/two/role-id"))["role_id"]
    await mount(UPDATE, "role/two/role-id", {"role_id": "a/../ü b"})
    secret = (await mount.secret_id("two"))["secret_id"]
    assert (await mount.login("a/../ü b", secret)).alias == "a/../ü b"
    with pytest.raises(InvalidRequest, match=WRONG_LOGIN):
        await mount.login(old, secret)
    # What was given up is free again.
    await mount.role("three", role_id=old)


async def test_two_roles_at_once_cannot_take_one_role_id(mount: Mount) -> None:
    results = await asyncio.gather(
        *(mount(CREATE, f"role/r{number}", {"role_id": "mine"}) for number in range(5)), return_exceptions=True
    )
    assert sum(result is None for result in results) == 1


@pytest.mark.parametrize(
    ("path", "name", "value", "shown", "default"),
    [
        ("policies", "token_policies", "b,A", ["a", "b"], []),
        ("policies", "policies", ["a"], ["a"], []),
        ("period", "token_period", "1h", 3600, 0),
        ("period", "period", 60, 60, 0),
        ("bind-secret-id", "bind_secret_id", True, True, True),
        ("secret-id-bound-cidrs", "secret_id_bound_cidrs", "10.0.0.0/8", ["10.0.0.0/8"], []),
        ("bound-cidr-list", "bound_cidr_list", "10.0.0.0/8", ["10.0.0.0/8"], []),
        ("secret-id-num-uses", "secret_id_num_uses", 3, 3, 0),
        ("secret-id-ttl", "secret_id_ttl", "5m", 300, 0),
        ("token-bound-cidrs", "token_bound_cidrs", ["::1"], ["::1"], []),
        ("token-max-ttl", "token_max_ttl", 90, 90, 0),
        ("token-num-uses", "token_num_uses", "9", 9, 0),
        ("token-ttl", "token_ttl", "1m", 60, 0),
    ],
)
async def test_single_parameters(mount: Mount, path: str, name: str, value: Any, shown: Any, default: Any) -> None:
    await mount.role()
    assert await mount(UPDATE, f"role/web/{path}", {name: value}) is None
    answer = await mount.data(READ, f"role/web/{path}")
    assert set(map(repr, answer.values())) == {repr(shown)}
    assert await mount(DELETE, f"role/web/{path}") is None
    assert list((await mount.data(READ, f"role/web/{path}")).values()) == [default]
    assert "missing" in await mount.refused(f"role/web/{path}", {})
    with pytest.raises(NotFound):
        await mount(UPDATE, f"role/none/{path}", {name: value})


async def test_the_last_constraint_cannot_be_taken_away(mount: Mount) -> None:
    await mount.role(bind_secret_id=False, token_bound_cidrs="10.0.0.0/8")
    assert "constraint" in await mount.refused("role/web/token-bound-cidrs", operation=DELETE)
    await mount(DELETE, "role/web/bind-secret-id")
    await mount(DELETE, "role/web/token-bound-cidrs")
    assert "constraint" in await mount.refused("role/web/bind-secret-id", {"bind_secret_id": False})


async def test_a_role_of_an_old_name_inherits_nothing(mount: Mount) -> None:
    await mount.role(role_id="mine")
    secrets = [(await mount.secret_id())["secret_id"] for _ in range(40)]
    await mount(DELETE, "role/web")
    assert mount.storage.entries == {}
    assert all(len(commit) <= 61 for commit in mount.storage.commits)
    await mount.role(role_id="mine")
    with pytest.raises(InvalidRequest, match=WRONG_LOGIN):
        await mount.login("mine", secrets[0])


# --- login ---


async def test_a_login_makes_the_token_of_the_role(mount: Mount) -> None:
    role_id = await mount.role(token_policies="dev", token_ttl=60, token_num_uses=3, token_type="service")
    secret = (await mount.secret_id(metadata={"tag": "x", "role_name": "other"}))["secret_id"]
    assert await mount.login(role_id, secret) == Auth(
        policies=["dev"],
        metadata={"tag": "x", "role_name": "web"},
        ttl_s=60,
        num_uses=3,
        token_type="service",
        alias=role_id,
    )


async def test_every_failed_login_answers_the_same(mount: Mount) -> None:
    role_id = await mount.role()
    await mount.role("other")
    made = await mount.secret_id()
    elsewhere = (await mount.secret_id("other"))["secret_id"]
    pairs = [
        (role_id, "wrong"),
        (role_id, elsewhere),
        (role_id, made["secret_id_accessor"]),
        (role_id, made["secret_id"].upper()),
        ("unknown", made["secret_id"]),
        ("unknown", "wrong"),
        ("web", made["secret_id"]),
        ("\ud800", "\ud800"),
    ]
    for role, secret in pairs:
        with pytest.raises(InvalidRequest) as caught:
            await mount.login(role, secret)
        assert str(caught.value) == WRONG_LOGIN
    for role in (role_id, "unknown"):
        for secret in (None, ""):
            with pytest.raises(InvalidRequest, match="missing secret_id"):
                await mount.login(role, secret)
    for role in (None, ""):
        with pytest.raises(InvalidRequest, match="missing role_id"):
            await mount.login(role, "x")


async def test_an_unknown_role_takes_the_same_steps(mount: Mount) -> None:
    role_id = await mount.role()
    steps = []
    get = mount.storage.get

    async def noted(path: str) -> bytes | None:
        steps.append(path.split("/")[0])
        return await get(path)

    mount.storage.get = noted  # type: ignore[method-assign]  # a store that takes notes
    seen = []
    for role in (role_id, "unknown"):
        steps.clear()
        with pytest.raises(InvalidRequest):
            await mount.login(role, "wrong")
        seen.append([step for step in steps if step != "role"])
    assert seen[0] == seen[1] == ["role_id", "secret_id"]


async def test_a_role_without_secret_ids(mount: Mount) -> None:
    role_id = await mount.role(bind_secret_id=False, secret_id_bound_cidrs="10.0.0.0/8")
    assert (await mount.login(role_id, remote_address="10.1.2.3")).metadata == {"role_name": "web"}
    assert (await mount.login(role_id, "ignored", remote_address="::ffff:10.1.2.3")).metadata == {"role_name": "web"}
    for address in ("11.0.0.1", "", "::1"):
        with pytest.raises(InvalidRequest, match="source address"):
            await mount.login(role_id, remote_address=address)


async def test_addresses(mount: Mount) -> None:
    role_id = await mount.role(secret_id_bound_cidrs="10.0.0.0/8", token_bound_cidrs="10.0.0.0/9")
    body = {"cidr_list": "10.1.0.0/16,10.200.0.0/16", "token_bound_cidrs": "10.1.2.0/24"}
    secret = (await mount.secret_id(**body, num_uses=2))["secret_id"]
    for address, error in (
        ("11.1.2.3", InvalidRequest),
        ("10.2.0.1", InvalidRequest),
        ("10.1.3.3", PermissionDenied),
    ):
        with pytest.raises(error):
            await mount.login(role_id, secret, remote_address=address)
    # What was refused for its address has cost no use.
    for _ in range(2):
        auth = await mount.login(role_id, secret, remote_address="10.1.2.3")
        assert auth.bound_cidrs == ["10.1.2.0/24"]
    plain = (await mount.secret_id())["secret_id"]
    assert (await mount.login(role_id, plain, remote_address="10.1.2.3")).bound_cidrs == ["10.0.0.0/9"]


@pytest.mark.parametrize("uses", [1, 3])
async def test_uses_count_also_at_once(mount: Mount, uses: int) -> None:
    role_id = await mount.role()
    made = await mount.secret_id(num_uses=uses)
    results = await asyncio.gather(
        *(mount.login(role_id, made["secret_id"]) for _ in range(20)), return_exceptions=True
    )
    assert sum(isinstance(result, Auth) for result in results) == uses
    assert {str(result) for result in results if not isinstance(result, Auth)} == {WRONG_LOGIN}
    assert not [path for path in mount.storage.entries if path.startswith(("secret_id/", "accessor/"))]


async def test_a_use_that_could_not_be_stored_is_no_login(mount: Mount) -> None:
    role_id = await mount.role()
    secret = (await mount.secret_id(num_uses=1))["secret_id"]
    mount.storage.fail_next = Unavailable("later")
    with pytest.raises(Unavailable):
        await mount.login(role_id, secret)
    assert await mount.login(role_id, secret)


async def test_expired_secret_ids_are_none(mount: Mount) -> None:
    role_id = await mount.role()
    made = await mount.secret_id(ttl=60)
    await mount(UPDATE, "role/web/custom-secret-id", {"secret_id": "mine", "ttl": 60})
    mount.clock.now_s += 59
    assert await mount.login(role_id, made["secret_id"])
    mount.clock.now_s += 1
    with pytest.raises(InvalidRequest, match=WRONG_LOGIN):
        await mount.login(role_id, made["secret_id"])
    assert await mount(UPDATE, "role/web/secret-id/lookup", {"secret_id": made["secret_id"]}) is None
    with pytest.raises(NotFound):
        await mount(UPDATE, "role/web/secret-id-accessor/lookup", {"secret_id_accessor": made["secret_id_accessor"]})
    response = await mount(LIST, "role/web/secret-id/")
    assert response is not None
    assert response.status == 404
    # Its value is free again.
    await mount(UPDATE, "role/web/custom-secret-id", {"secret_id": "mine"})
    assert await mount.login(role_id, "mine")


# --- several clusters ---


async def test_secondaries_log_in_and_write_nothing_shared(mount: Mount) -> None:
    role_id = await mount.role()
    secret = (await mount.secret_id())["secret_id"]
    counted = await mount.secret_id(num_uses=2)
    secondary = Mount(mount.storage)
    mount.storage.read_only = True
    assert await secondary.login(role_id, secret)
    for operation, path, body in (
        (CREATE, "role/new", {}),
        (DELETE, "role/web", {}),
        (UPDATE, "role/web/role-id", {"role_id": "x"}),
        (UPDATE, "role/web/token-ttl", {"token_ttl": 1}),
        (DELETE, "role/web/token-ttl", {}),
        (UPDATE, "role/web/secret-id", {}),
        (UPDATE, "role/web/custom-secret-id", {"secret_id": "x"}),
        (UPDATE, "role/web/secret-id/destroy", {"secret_id": secret}),
        (UPDATE, "role/web/secret-id-accessor/destroy", {"secret_id_accessor": counted["secret_id_accessor"]}),
        (UPDATE, "login", {"role_id": role_id, "secret_id": counted["secret_id"]}),
    ):
        with pytest.raises(ReadOnlyStorage):
            await secondary(operation, path, body)
    body = {"secret_id_accessor": counted["secret_id_accessor"]}
    assert await secondary.data(UPDATE, "role/web/secret-id-accessor/lookup", body)


@pytest.mark.parametrize("name", ["local_secret_ids", "enable_local_secret_ids"])
async def test_local_secret_ids_stay_in_their_cluster(mount: Mount, name: str) -> None:
    role_id = await mount.role(**{name: True})
    assert (await mount.data(READ, "role/web/local-secret-ids")) == {"local_secret_ids": True}
    secondary = Mount(mount.storage)
    mount.storage.read_only = True
    shared = dict(mount.storage.entries)
    made = await secondary.secret_id(num_uses=2)
    assert mount.storage.entries == shared
    assert await secondary.login(role_id, made["secret_id"])
    with pytest.raises(InvalidRequest, match=WRONG_LOGIN):
        await mount.login(role_id, made["secret_id"])
    assert await secondary.data(LIST, "role/web/secret-id/") == {"keys": [made["secret_id_accessor"]]}
    await secondary(UPDATE, "role/web/secret-id/destroy", {"secret_id": made["secret_id"]})
    assert secondary.local.entries == {}
    mount.storage.read_only = False
    assert "only be modified during role creation" in await mount.refused("role/web", {name: False})
    await mount(UPDATE, "role/web", {name: True})


# --- tidy ---


async def tidy(mount: Mount) -> None:
    response = await mount(UPDATE, "tidy/secret-id")
    assert response is not None
    assert response.status == 202
    assert "successfully started" in response.warnings[0]
    await mount.engine.tidied()


async def test_tidy_removes_what_is_dead_and_nothing_else(mount: Mount) -> None:
    role_id = await mount.role()
    await mount.role("near", local_secret_ids=True)
    keep, keep_near = await mount.secret_id(), await mount.secret_id("near")
    for name in ("web", "near"):
        for _ in range(3):
            await mount.secret_id(name, ttl=60)
    left = Role.new("gone")
    mount.storage.entries |= {f"secret_id/{left.uid}/{n}": b"x" for n in range(70)}
    mount.local.entries |= {f"accessor/{left.uid}/{n}": b"x" for n in range(2)}
    mount.clock.now_s += 60
    mount.storage.read_only = True
    await tidy(mount)
    assert len(mount.local.entries) == 2
    assert len([path for path in mount.storage.entries if path.startswith("secret_id/")]) == 74
    mount.storage.read_only = False
    await tidy(mount)
    assert len([path for path in mount.storage.entries if path.startswith(("secret_id/", "accessor/"))]) == 2
    assert await mount.login(role_id, keep["secret_id"])
    assert await mount.data(LIST, "role/near/secret-id/") == {"keys": [keep_near["secret_id_accessor"]]}


async def test_one_tidy_at_a_time_and_its_failures_are_its_own(mount: Mount, caplog: pytest.LogCaptureFixture) -> None:
    await mount.role()
    await mount.secret_id(ttl=60)
    mount.clock.now_s += 60
    await mount(UPDATE, "tidy/secret-id")
    response = await mount(UPDATE, "tidy/secret-id")
    assert response is not None
    assert (response.status, response.warnings) == (202, ["Tidy operation already in progress."])
    for error in (Unavailable("later"), RuntimeError("the store's own")):
        await mount.engine.tidied()
        await mount.secret_id(ttl=60)
        mount.clock.now_s += 60
        mount.storage.fail_next = error
        await tidy(mount)
    assert len(caplog.records) == 2
    await tidy(mount)


# --- robustness ---


async def test_damaged_storage_quotes_nothing(mount: Mount) -> None:
    role_id = await mount.role()
    secret = (await mount.secret_id())["secret_id"]
    for path in [path for path in mount.storage.entries if path.startswith(("role/", "secret_id/"))]:
        raw, mount.storage.entries[path] = mount.storage.entries[path], b"secret rubbish"
        with pytest.raises(PluginError) as caught:
            await mount.login(role_id, secret)
        assert caught.value.status == 500
        assert "rubbish" not in str(caught.value)
        mount.storage.entries[path] = raw


def test_the_key_of_a_role_is_in_no_repr() -> None:
    role = Role.new("web")
    assert repr(role.hmac_key) not in repr(role)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)


@given(
    st.sampled_from(
        ["role/web", "role/web/secret-id", "role/web/custom-secret-id", "role/web/secret-id/lookup", "login"]
    ),
    st.dictionaries(
        st.sampled_from(
            ["role_id", "secret_id", "metadata", "cidr_list", "ttl", "num_uses", "token_policies", "bind_secret_id"]
        ),
        VALUES,
    ),
)
@settings(deadline=None)
def test_no_request_is_a_server_error(path: str, body: dict[str, Any]) -> None:
    async def ask() -> int:
        mount = Mount()
        await mount.role()
        try:
            await mount(UPDATE, path, json.loads(json.dumps(body)))
        except PluginError as error:
            return error.status
        return 200

    assert asyncio.run(ask()) in (200, 400)


@given(st.lists(st.ip_addresses().map(str), max_size=3), st.ip_addresses().map(str))
def test_networks(cidrs: list[str], address: str) -> None:
    assert address_within(cidrs, address) is (not cidrs or address in cidrs) or ":ffff:" in address.lower()
    assert address_within([*cidrs, "0.0.0.0/0", "::/0"], address)
    assert all_within(cidrs, ["0.0.0.0/0", "::/0"])
    assert all_within(cidrs, cidrs)
