"""The userpass auth method against the published API."""

import threading
from typing import Any

import bcrypt
import pytest

from plugin_api.errors import InvalidRequest, NotFound, PermissionDenied, PluginError, ReadOnlyStorage, UnsupportedPath
from plugin_api.request import Auth, Operation, Response
from plugin_api.testing import MemoryStorage, make_context, make_request
from sidecar.auth import userpass
from sidecar.auth.token_parameters import TokenParameters
from sidecar.auth.userpass import User, Userpass

CREATE, READ, UPDATE, DELETE, LIST = (
    Operation.CREATE,
    Operation.READ,
    Operation.UPDATE,
    Operation.DELETE,
    Operation.LIST,
)
INVALID_LOGIN = "invalid username or password"


class Mount:
    """One mounted userpass with its storage."""

    def __init__(self) -> None:
        self.storage = MemoryStorage()
        self.engine = Userpass(make_context(path="auth/userpass/", type_name="userpass", storage=self.storage))

    async def __call__(self, operation: Operation, path: str, data: Any = None, **caller: Any) -> Response | None:
        return await self.engine.handle(make_request(operation, path, data, **caller))

    async def login(self, name: str, password: Any, **caller: Any) -> Auth:
        response = await self(UPDATE, f"login/{name}", {"password": password}, **caller)
        assert response is not None
        assert response.auth is not None
        return response.auth

    async def read(self, name: str) -> dict[str, Any]:
        response = await self(READ, f"users/{name}")
        assert response is not None
        assert response.data is not None
        return response.data


@pytest.fixture
def mount(monkeypatch: pytest.MonkeyPatch) -> Mount:
    monkeypatch.setattr(userpass, "BCRYPT_COST", 4)
    return Mount()


async def test_login_is_the_only_open_path() -> None:
    assert Userpass.unauthenticated == ("login/*",)


async def test_create_and_log_in(mount: Mount) -> None:
    assert await mount(CREATE, "users/alice", {"password": "pw", "token_policies": "Dev, ops,dev"}) is None
    auth = await mount.login("alice", "pw")
    assert auth == Auth(
        display_name="alice",
        policies=["dev", "ops"],
        metadata={"username": "alice"},
        alias="alice",
        token_type="default",
    )
    assert auth.renewable


async def test_names_are_one_in_any_case(mount: Mount) -> None:
    await mount(CREATE, "users/Alice", {"password": "pw"})
    assert (await mount.login("ALICE", "pw")).metadata == {"username": "alice"}
    assert await mount.engine.exists(make_request(UPDATE, "users/aLiCe")) is True
    response = await mount(LIST, "users/")
    assert response is not None
    assert response.data == {"keys": ["alice"]}


@pytest.mark.parametrize("name", ["-a", "a.", ".a", "a@b", "a b", "a/b", ""])
async def test_what_is_no_name(mount: Mount, name: str) -> None:
    for operation, path in ((UPDATE, f"login/{name}"), (CREATE, f"users/{name}x/y"), (READ, f"users/{name}x@")):
        with pytest.raises(UnsupportedPath):
            await mount(operation, path, {"password": "pw"})


async def test_a_user_needs_a_password_only_at_first(mount: Mount) -> None:
    with pytest.raises(InvalidRequest, match="missing password"):
        await mount(CREATE, "users/alice", {"token_policies": "dev"})
    assert mount.storage.entries == {}
    await mount(CREATE, "users/alice", {"password": "pw"})
    await mount(UPDATE, "users/alice", {"token_policies": ["dev"]})
    assert (await mount.login("alice", "pw")).policies == ["dev"]
    await mount(UPDATE, "users/alice", {"password": "new"})
    assert (await mount.login("alice", "new")).policies == ["dev"]


async def test_every_failed_login_answers_the_same(mount: Mount) -> None:
    await mount(CREATE, "users/alice", {"password": "pw"})
    long = "pw" + "x" * 100
    for name, password in (("alice", "wrong"), ("nobody", "pw"), ("alice", "PW"), ("alice", long), ("nobody", long)):
        with pytest.raises(InvalidRequest) as caught:
            await mount.login(name, password)
        assert str(caught.value) == INVALID_LOGIN
    for name in ("alice", "nobody"):
        for body in ({}, {"password": ""}, {"password": None}):
            with pytest.raises(InvalidRequest, match="missing password"):
                await mount(UPDATE, f"login/{name}", body)


async def test_an_unknown_user_costs_a_hash_too(monkeypatch: pytest.MonkeyPatch) -> None:
    mount = Mount()
    await mount(CREATE, "users/alice", {"password": "pw"})
    compared: list[bytes] = []
    check = bcrypt.checkpw

    def noted(secret: bytes, expected: bytes) -> bool:
        compared.append(expected)
        return check(secret, expected)

    monkeypatch.setattr(userpass.bcrypt, "checkpw", noted)
    for name, password in (("alice", "wrong"), ("nobody", "wrong"), ("nobody", "x" * 100)):
        with pytest.raises(InvalidRequest, match=INVALID_LOGIN):
            await mount.login(name, password)
    costs = {expected.split(b"$")[2] for expected in compared}
    assert (len(compared), costs) == (3, {b"%02d" % userpass.BCRYPT_COST})


async def test_hashing_leaves_the_loop_free(monkeypatch: pytest.MonkeyPatch) -> None:
    mount = Mount()
    threads: list[str] = []
    check = bcrypt.checkpw

    def noted(secret: bytes, expected: bytes) -> bool:
        threads.append(threading.current_thread().name)
        return check(secret, expected)

    monkeypatch.setattr(userpass.bcrypt, "checkpw", noted)
    with pytest.raises(InvalidRequest):
        await mount.login("nobody", "pw")
    assert threads
    assert threads[0] != "MainThread"


@pytest.mark.parametrize("password", ["x" * 72, "é" * 36, "a\x00b", "\ud800", 12345])
async def test_unusual_passwords(mount: Mount, password: Any) -> None:
    await mount(CREATE, "users/alice", {"password": password})
    await mount.login("alice", password)
    with pytest.raises(InvalidRequest, match=INVALID_LOGIN):
        await mount.login("alice", str(password)[:-1] + "?")


@pytest.mark.parametrize("password", ["x" * 73, "é" * 37])
async def test_too_long_a_password_is_refused_when_set(mount: Mount, password: str) -> None:
    with pytest.raises(InvalidRequest, match="72 bytes"):
        await mount(CREATE, "users/alice", {"password": password})
    assert mount.storage.entries == {}


async def test_an_imported_hash(mount: Mount) -> None:
    imported = bcrypt.hashpw(b"pw", bcrypt.gensalt(4)).decode()
    await mount(CREATE, "users/alice", {"password_hash": imported})
    await mount.login("alice", "pw")
    await mount(CREATE, "users/bob", {"password_hash": imported.replace("$2b$", "$2y$")})
    await mount.login("bob", "pw")
    for bad in ("plain", imported[:-1], "$2b$99$" + imported[7:], imported + "\n"):
        with pytest.raises(InvalidRequest, match="bcrypt hash"):
            await mount(CREATE, "users/carol", {"password_hash": bad})
    with pytest.raises(InvalidRequest, match="mutually exclusive"):
        await mount(CREATE, "users/carol", {"password_hash": imported, "password": "pw"})


async def test_read_shows_parameters_and_never_the_hash(mount: Mount) -> None:
    await mount(CREATE, "users/alice", {"password": "pw"})
    assert await mount.read("alice") == {
        "token_bound_cidrs": [],
        "token_explicit_max_ttl": 0,
        "token_max_ttl": 0,
        "token_no_default_policy": False,
        "token_num_uses": 0,
        "token_period": 0,
        "token_policies": [],
        "token_ttl": 0,
        "token_type": "default",
    }
    with pytest.raises(NotFound):
        await mount.read("nobody")
    assert "$2b$" not in repr(User(b"$2b$10$hash", TokenParameters()))


async def test_token_parameters_reach_the_login(mount: Mount) -> None:
    parameters = {
        "password": "pw",
        "token_ttl": "1h",
        "token_max_ttl": 7200,
        "token_explicit_max_ttl": "3h",
        "token_period": "10m",
        "token_num_uses": "5",
        "token_type": "service",
        "token_no_default_policy": "true",
        "token_bound_cidrs": "10.0.0.0/8,192.0.2.1",
    }
    await mount(CREATE, "users/alice", parameters)
    auth = await mount.login("alice", "pw", remote_address="10.1.2.3")
    assert (auth.ttl_s, auth.max_ttl_s, auth.explicit_max_ttl_s, auth.period_s) == (3600, 7200, 10800, 600)
    assert (auth.num_uses, auth.token_type, auth.no_default_policy) == (5, "service", True)
    assert auth.bound_cidrs == ["10.0.0.0/8", "192.0.2.1"]
    assert (await mount.read("alice"))["token_ttl"] == 3600


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"token_type": "nosuch"}, "invalid 'token_type' value"),
        ({"token_ttl": "2h", "token_max_ttl": "1h"}, "'token_ttl' cannot be greater than 'token_max_ttl'"),
        ({"token_num_uses": -1}, "'token_num_uses' cannot be negative"),
        ({"token_type": "batch", "token_num_uses": 1}, "limited use count"),
        ({"token_bound_cidrs": "nonsense"}, "bound_cidrs"),
        ({"token_ttl": "-1s"}, '"token_ttl"'),
        ({"token_ttl": "soon"}, '"token_ttl"'),
    ],
)
async def test_wrong_token_parameters_change_nothing(mount: Mount, parameters: dict[str, Any], text: str) -> None:
    await mount(CREATE, "users/alice", {"password": "pw"})
    before = dict(mount.storage.entries)
    with pytest.raises(InvalidRequest) as caught:
        await mount(UPDATE, "users/alice", parameters | {"password": "other"})
    assert text in str(caught.value)
    assert mount.storage.entries == before


@pytest.mark.parametrize(
    ("address", "allowed"),
    [("10.255.0.1", True), ("::ffff:10.0.0.1", True), ("2001:db8::1", True), ("11.0.0.1", False), ("", False),
     ("garbage", False)],
)  # fmt: skip
async def test_bound_networks(mount: Mount, address: str, allowed: bool) -> None:
    await mount(CREATE, "users/alice", {"password": "pw", "token_bound_cidrs": ["10.0.0.0/8", "2001:db8::/32"]})
    if allowed:
        await mount.login("alice", "pw", remote_address=address)
    else:
        with pytest.raises(PermissionDenied):
            await mount.login("alice", "pw", remote_address=address)
        with pytest.raises(InvalidRequest, match=INVALID_LOGIN):
            await mount.login("alice", "wrong", remote_address=address)


async def test_deprecated_parameters_still_work_and_show(mount: Mount) -> None:
    await mount(CREATE, "users/alice", {"password": "pw", "policies": "dev,root", "ttl": "1h", "max_ttl": "2h"})
    data = await mount.read("alice")
    assert (data["policies"], data["token_policies"]) == (["root"], ["root"])
    assert (data["ttl"], data["token_ttl"], data["max_ttl"]) == (3600, 3600, 7200)
    await mount(UPDATE, "users/alice", {"token_policies": ["dev"], "policies": ["ignored"]})
    data = await mount.read("alice")
    assert data["token_policies"] == ["dev"]
    assert "policies" not in data


async def test_password_and_policies_of_their_own(mount: Mount) -> None:
    for path in ("password", "policies"):
        with pytest.raises(InvalidRequest, match="username does not exist"):
            await mount(UPDATE, f"users/alice/{path}", {"password": "pw", "policies": "x"})
    await mount(CREATE, "users/alice", {"password": "pw"})
    await mount(UPDATE, "users/alice/password", {"password": "new"})
    await mount(UPDATE, "users/alice/policies", {"policies": ["b", "a"]})
    assert (await mount.login("alice", "new")).policies == ["a", "b"]
    assert (await mount.read("alice"))["policies"] == ["a", "b"]
    await mount(UPDATE, "users/alice/policies", {"token_policies": "c"})
    assert "policies" not in await mount.read("alice")
    with pytest.raises(InvalidRequest, match="missing password"):
        await mount(UPDATE, "users/alice/password", {})


async def test_delete_and_empty_list(mount: Mount) -> None:
    await mount(CREATE, "users/alice", {"password": "pw"})
    for _ in range(2):
        assert await mount(DELETE, "users/alice") is None
    with pytest.raises(InvalidRequest, match=INVALID_LOGIN):
        await mount.login("alice", "pw")
    response = await mount(LIST, "users/")
    assert response is not None
    assert (response.status, response.data) == (404, None)


async def test_a_secondary_logs_in_and_sends_writes_away(mount: Mount) -> None:
    await mount(CREATE, "users/alice", {"password": "pw"})
    mount.storage.read_only = True
    assert (await mount.login("alice", "pw")).display_name == "alice"
    for operation, path in ((CREATE, "users/bob"), (DELETE, "users/none"), (UPDATE, "users/none/password")):
        with pytest.raises(ReadOnlyStorage):
            await mount(operation, path, {"password": "pw"})


async def test_a_secret_of_the_wrong_type_is_not_quoted(mount: Mount) -> None:
    for path in ("users/alice", "login/alice"):
        with pytest.raises(InvalidRequest) as caught:
            await mount(UPDATE, path, {"password": ["hunter2"]})
        assert "hunter2" not in str(caught.value)


async def test_damage_is_an_error_not_a_missing_user(mount: Mount) -> None:
    mount.storage.entries["user/alice"] = b"\xc1 rubbish"
    with pytest.raises(PluginError) as caught:
        await mount.login("alice", "pw")
    assert caught.value.status == 500


async def test_the_default_cost_is_what_vault_uses() -> None:
    mount = Mount()
    await mount(CREATE, "users/alice", {"password": "pw"})
    assert b"$2b$10$" in mount.storage.entries["user/alice"]
