"""The approle auth method against the published API: secret ids."""

from typing import Any

import pytest

from plugin_api.errors import (
    InvalidRequest,
    NotFound,
)
from plugin_api.request import Operation
from sidecar.auth.approle import WRONG_LOGIN
from sidecar.auth.approle_records import NEVER
from tests.support.approle_mount import DELETE, LIST, UPDATE, Mount


@pytest.fixture
def mount() -> Mount:
    return Mount()


def stored(mount: Mount) -> bytes:
    """Everything in storage as one text."""
    both = {**mount.storage.entries, **{f"local {path}": raw for path, raw in mount.local.entries.items()}}
    return b"\n".join(path.encode() + b" " + raw for path, raw in both.items())


# --- secret ids ---


async def test_secret_ids_are_stored_as_hmacs_only(mount: Mount) -> None:
    role_id = await mount.role()
    made = await mount.secret_id(metadata='{"tag": "x"}')
    assert sorted(made) == ["secret_id", "secret_id_accessor", "secret_id_num_uses", "secret_id_ttl"]
    custom = await mount.data(UPDATE, "role/web/custom-secret-id", {"secret_id": "my/secret ü"})
    assert custom["secret_id"] == "my/secret ü"
    for secret in (made["secret_id"], "my/secret ü"):
        assert (await mount.login(role_id, secret)).alias == role_id
        assert secret.encode() not in stored(mount)


async def test_a_secret_id_of_ones_own(mount: Mount) -> None:
    await mount.role()
    await mount(UPDATE, "role/web/custom-secret-id", {"secret_id": "mine"})
    assert "already registered" in await mount.refused("role/web/custom-secret-id", {"secret_id": "mine"})
    for body in ({}, {"secret_id": ""}, {"secret_id": None}):
        assert "missing secret_id" in await mount.refused("role/web/custom-secret-id", body)


async def test_lookups(mount: Mount) -> None:
    await mount.role()
    made = await mount.secret_id(
        metadata={"tag": "production"}, cidr_list="10.0.0.0/8", token_bound_cidrs=["10.1.0.0/16"], num_uses=5, ttl="10m"
    )
    expected = {
        "secret_id_accessor": made["secret_id_accessor"],
        "secret_id_num_uses": 5,
        "secret_id_ttl": 600,
        "creation_time": "2023-11-14T22:13:20Z",
        "last_updated_time": "2023-11-14T22:13:20Z",
        "expiration_time": "2023-11-14T22:23:20Z",
        "metadata": {"tag": "production"},
        "cidr_list": ["10.0.0.0/8"],
        "token_bound_cidrs": ["10.1.0.0/16"],
    }
    assert await mount.data(UPDATE, "role/web/secret-id/lookup", {"secret_id": made["secret_id"]}) == expected
    body = {"secret_id_accessor": made["secret_id_accessor"]}
    assert await mount.data(UPDATE, "role/WEB/secret-id-accessor/lookup", body) == expected
    endless = await mount.secret_id()
    shown = await mount.data(UPDATE, "role/web/secret-id/lookup", {"secret_id": endless["secret_id"]})
    assert shown["expiration_time"] == NEVER


async def test_lookups_of_what_is_not_there(mount: Mount) -> None:
    await mount.role()
    await mount.role("other")
    elsewhere = await mount.secret_id("other")
    for secret in ("none", elsewhere["secret_id"], elsewhere["secret_id_accessor"]):
        assert await mount(UPDATE, "role/web/secret-id/lookup", {"secret_id": secret}) is None
        assert await mount(UPDATE, "role/web/secret-id/destroy", {"secret_id": secret}) is None
    for accessor in ("none", elsewhere["secret_id_accessor"], elsewhere["secret_id"]):
        for path in ("lookup", "destroy"):
            with pytest.raises(NotFound, match="accessor"):
                await mount(UPDATE, f"role/web/secret-id-accessor/{path}", {"secret_id_accessor": accessor})
    for path in ("secret-id/lookup", "secret-id/destroy", "secret-id-accessor/lookup", "secret-id-accessor/destroy"):
        assert "missing secret_id" in await mount.refused(f"role/web/{path}", {})
    assert await mount.data(LIST, "role/other/secret-id/") == {"keys": [elsewhere["secret_id_accessor"]]}


@pytest.mark.parametrize("operation", [UPDATE, DELETE])
async def test_destroying(mount: Mount, operation: Operation) -> None:
    role_id = await mount.role()
    one, two, three = [await mount.secret_id() for _ in range(3)]
    accessors = {made["secret_id_accessor"] for made in (one, two, three)}
    assert set((await mount.data(LIST, "role/web/secret-id"))["keys"]) == accessors
    await mount(operation, "role/web/secret-id/destroy", {"secret_id": one["secret_id"]})
    body = {"secret_id_accessor": two["secret_id_accessor"]}
    await mount(operation, "role/web/secret-id-accessor/destroy", body)
    assert await mount.data(LIST, "role/web/secret-id/") == {"keys": [three["secret_id_accessor"]]}
    for made in (one, two):
        with pytest.raises(InvalidRequest, match=WRONG_LOGIN):
            await mount.login(role_id, made["secret_id"])
    await mount(operation, "role/web/secret-id/destroy", {"secret_id": three["secret_id"]})
    response = await mount(LIST, "role/web/secret-id/")
    assert response is not None
    assert response.status == 404
    assert not [path for path in mount.storage.entries if path.startswith(("secret_id/", "accessor/"))]


@pytest.mark.parametrize(
    ("role", "body", "text"),
    [
        ({}, {"num_uses": -1}, "negative"),
        ({"secret_id_num_uses": 5}, {"num_uses": 6}, "num_uses"),
        ({"secret_id_num_uses": 5}, {"num_uses": 0}, "num_uses"),
        ({"secret_id_ttl": 60}, {"ttl": 61}, "ttl"),
        ({"secret_id_ttl": 60}, {"ttl": 0}, "ttl"),
        ({}, {"ttl": "x"}, "ttl"),
        ({}, {"cidr_list": "x"}, "CIDR"),
        ({"secret_id_bound_cidrs": "10.0.0.0/8"}, {"cidr_list": "11.0.0.0/8"}, "within"),
        ({"secret_id_bound_cidrs": "10.0.0.0/8"}, {"cidr_list": "::1"}, "within"),
        ({"token_bound_cidrs": "10.0.0.0/8"}, {"token_bound_cidrs": "0.0.0.0/0"}, "within"),
        ({}, {"metadata": "x"}, "metadata"),
        ({}, {"metadata": "[]"}, "metadata"),
        ({}, {"metadata": '{"a": 1}'}, "metadata"),
        ({}, {"metadata": {"a": ["x"]}}, "metadata"),
        ({}, {"metadata": 3}, "metadata"),
        ({}, {"metadata": "[" * 5000}, "metadata"),
        ({}, {"metadata": {"a": "\ud800"}}, "Unicode"),
        ({"bind_secret_id": False, "token_bound_cidrs": "::1"}, {}, "bind_secret_id is not set"),
    ],
)
async def test_bad_secret_ids(mount: Mount, role: dict[str, Any], body: dict[str, Any], text: str) -> None:
    await mount.role(**role)
    for path, more in (("secret-id", {}), ("custom-secret-id", {"secret_id": "mine"})):
        assert text in await mount.refused(f"role/web/{path}", body | more)
    assert not [path for path in mount.storage.entries if path.startswith("secret_id/")]


async def test_limits_of_the_role_are_the_defaults(mount: Mount) -> None:
    await mount.role(secret_id_num_uses=5, secret_id_ttl="1m")
    made = await mount.secret_id()
    assert (made["secret_id_num_uses"], made["secret_id_ttl"]) == (5, 60)
    made = await mount.secret_id(num_uses=2, ttl=30)
    assert (made["secret_id_num_uses"], made["secret_id_ttl"]) == (2, 30)
    await mount.role("endless")
    assert (await mount.secret_id("endless", ttl="99999h"))["secret_id_ttl"] == 2764800
