"""The sys/ endpoints of an active node over HTTP."""

import asyncio
import base64
from collections.abc import AsyncIterator

import pytest

from tests.support.service_node import (
    Harness,
    Reply,
    running,
    with_kv,
)


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


async def test_mounts(node: Harness) -> None:
    assert set((await node.call("GET", "sys/mounts")).data) == {"cubbyhole/", "sys/"}
    cases = {
        'cannot mount "sys/x/"': ("sys/x", {"type": "kv"}),
        "plugin not found in the catalog: nosuch": ("a", {"type": "nosuch"}),
        "backend type must be specified as a string": ("a", {}),
    }
    for text, (path, body) in cases.items():
        assert (await node.call("POST", f"sys/mounts/{path}", body)).errors == [text]
    await with_kv(node)
    twice = await node.call("POST", "sys/mounts/secret", {"type": "kv"})
    assert twice.errors == ["path is already in use at secret/"]
    listed = await node.call("GET", "sys/mounts")
    assert listed.body["secret/"] == listed.data["secret/"]
    assert listed.data["secret/"]["options"] == {"version": "2"}
    tuned = await node.call("POST", "sys/mounts/secret/tune", {"default_lease_ttl": "1h", "description": "d"})
    assert tuned.status == 204
    tuning = (await node.call("GET", "sys/mounts/secret/tune")).data
    assert (tuning["default_lease_ttl"], tuning["max_lease_ttl"], tuning["description"]) == (3600, 2764800, "d")
    assert (await node.call("GET", "sys/mounts/no/tune")).errors == ['cannot fetch sysview for path "no/"']
    downgrade = await node.call("POST", "sys/mounts/secret/tune", {"options": {"version": "1"}})
    assert downgrade.status == 400
    await node.call("POST", "secret/data/a", {"data": {"x": 1}})
    moved = await node.call("POST", "sys/remount", {"from": "secret", "to": "moved"})
    status = await node.call("GET", f"sys/remount/status/{moved.data['migration_id']}")
    assert status.data["migration_info"] == {
        "source_mount": "secret/",
        "target_mount": "moved/",
        "status": "success",
    }
    assert (await node.call("GET", "moved/data/a")).data["data"] == {"x": 1}
    assert (await node.call("GET", "secret/data/a")).status == 404
    assert (await node.call("DELETE", "sys/mounts/sys")).errors == ['cannot unmount "sys/"']
    assert (await node.call("DELETE", "sys/mounts/moved/")).status == 204
    assert (await node.call("DELETE", "sys/mounts/moved")).status == 204
    assert (await node.call("DELETE", "sys/auth/token")).errors == ["token credential backend cannot be disabled"]
    aliased = await node.call("POST", "sys/mounts/kv2", {"type": "kv-v2"})
    assert aliased.status == 204
    assert (await node.call("GET", "sys/mounts")).data["kv2/"]["options"] == {"version": "2"}


async def test_what_a_mount_is_told_about_seal_wrapping_is_shown_everywhere(node: Harness) -> None:
    """Kept and replicated with the mount, over tuning, moving and a restart; without effect, as in Vault's open
    server."""
    body = {"type": "kv", "seal_wrap": True, "external_entropy_access": "true"}
    assert (await node.call("POST", "sys/mounts/wrapped", body)).status == 204
    assert (await node.call("POST", "sys/auth/up", {"type": "userpass", "seal_wrap": True})).status == 204
    assert (await node.call("POST", "sys/mounts/plain", {"type": "kv"})).status == 204
    assert (await node.call("POST", "sys/mounts/wrapped/tune", {"description": "x"})).status == 204
    shown = (await node.call("GET", "sys/mounts")).data
    marks = {path: (one["seal_wrap"], one["external_entropy_access"]) for path, one in shown.items()}
    assert (marks["wrapped/"], marks["plain/"], marks["sys/"]) == ((True, True), (False, False), (False, False))
    assert (await node.call("GET", "sys/mounts/wrapped")).data["seal_wrap"]
    assert (await node.call("GET", "sys/auth")).data["up/"]["seal_wrap"]
    assert (await node.call("GET", "sys/internal/ui/mounts/wrapped")).data["seal_wrap"]
    assert (await node.call("POST", "sys/remount", {"from": "wrapped", "to": "moved"})).status == 200
    async with running(store=node.store, genesis=node.node.genesis) as later:
        shown = (await later.call("GET", "sys/mounts")).data
        assert (shown["moved/"]["seal_wrap"], shown["plain/"]["seal_wrap"]) == (True, False)
        assert (await later.call("POST", "moved/a", {"x": "y"})).status == 204
    wrong = await node.call("POST", "sys/mounts/other", {"type": "kv", "seal_wrap": "perhaps"})
    assert wrong.status == 400


async def test_the_data_of_an_unmounted_engine_is_deleted(node: Harness) -> None:
    await with_kv(node)
    for number in range(60):
        await node.call("POST", f"secret/data/{number}", {"data": {"x": number}})
    uuid = (await node.call("GET", "sys/mounts")).data["secret/"]["uuid"]
    assert any(uuid in key for key in node.store.entries)
    running_service = asyncio.create_task(node.service.run())
    await node.call("DELETE", "sys/mounts/secret")
    await node.store.until(lambda: not any(uuid in key for key in node.store.entries))
    running_service.cancel()
    await asyncio.gather(running_service, return_exceptions=True)


async def test_policies(node: Harness) -> None:
    text = 'path "a" { capabilities = ["read"] }'
    assert (await node.call("PUT", "sys/policies/acl/Mine", {"policy": text})).status == 204
    assert (await node.call("GET", "sys/policies/acl/mine")).data == {"name": "mine", "policy": text}
    legacy = await node.call("GET", "sys/policy/mine")
    assert (legacy.data, legacy.body["rules"]) == ({"name": "mine", "rules": text}, text)
    assert (await node.call("GET", "sys/policies/acl?list=true")).data["keys"] == ["default", "mine", "root"]
    assert (await node.call("PUT", "sys/policies/acl/x", {})).errors == ["'policy' parameter not supplied or empty"]
    bad = await node.call("PUT", "sys/policies/acl/x", {"policy": "path {"})
    assert bad.errors[0].startswith("failed to parse policy: ")
    assert (await node.call("PUT", "sys/policies/acl/root", {"policy": text})).errors == ['cannot update "root" policy']
    assert (await node.call("DELETE", "sys/policies/acl/root")).errors == ['cannot delete "root" policy']
    assert (await node.call("DELETE", "sys/policies/acl/mine")).status == 204
    gone = await node.call("GET", "sys/policies/acl/mine")
    assert (gone.status, gone.body) == (404, {"errors": []})


async def test_a_policy_may_come_in_base64(node: Harness) -> None:
    text = 'path "a/b/c/d/e/f" { capabilities = ["read", "list", "create", "update"] }  # ' + "long " * 20
    for sent in (base64.b64encode(text.encode()), base64.encodebytes(text.encode())):
        assert (await node.call("PUT", "sys/policies/acl/p", {"policy": sent.decode()})).status == 204
        assert (await node.call("GET", "sys/policies/acl/p")).data["policy"] == text
        assert (await node.call("DELETE", "sys/policies/acl/p")).status == 204
    bad = await node.call("PUT", "sys/policies/acl/p", {"policy": base64.b64encode(b"path {").decode()})
    assert bad.errors[0].startswith("failed to parse policy: ")
    old = await node.call("PUT", "sys/policy/p", {"rules": text})
    assert (old.status, old.body["warnings"]) == (200, ["'rules' is the old name of this parameter: use 'policy'"])
    assert (await node.call("GET", "sys/policy/p")).data["rules"] == text


async def test_capabilities(node: Harness) -> None:
    token = await node.token('path "secret/*" { capabilities = ["read", "list"] }')
    own = await node.call("POST", "sys/capabilities-self", {"paths": ["secret/a", "other"]}, token=token)
    assert own.data == {"secret/a": ["list", "read"], "other": ["deny"]}
    one = await node.call("POST", "sys/capabilities", {"path": "secret/a", "token": token})
    assert one.data["capabilities"] == ["list", "read"]
    assert one.body["capabilities"] == ["list", "read"]
    accessor = (await node.call("POST", "auth/token/lookup", {"token": token})).data["accessor"]
    by = await node.call("POST", "sys/capabilities-accessor", {"path": "x", "accessor": accessor})
    assert by.data["capabilities"] == ["deny"]
    for path in ("sys/replication/primary/enable", "sys/replication/secondary/enable"):
        legacy = await node.call("POST", "sys/capabilities-self", {"path": path})
        assert legacy.data["capabilities"] == ["root"]


async def test_what_the_cli_and_the_ui_ask_about_mounts(node: Harness) -> None:
    await with_kv(node)
    token = await node.token('path "secret/data/app/*" { capabilities = ["read"] }')
    found = await node.call("GET", "sys/internal/ui/mounts/secret/app/db", token=token)
    assert (found.data["path"], found.data["options"]["version"]) == ("secret/", "2")
    for path in ("other/x", "nosuch"):
        denied = await node.call("GET", f"sys/internal/ui/mounts/{path}", token=token)
        assert denied.status == 403
        assert denied.errors == [
            f'preflight capability check returned 403, please ensure client\'s policies grant access to path "{path}/"'
        ]
    assert (await node.call("GET", "sys/internal/ui/mounts/secret", token=None)).status == 403
    assert (await node.call("GET", "sys/internal/ui/mounts", token=None)).data == {"auth": {}, "secret": {}}
    await node.call("POST", "sys/mounts/secret/tune", {"listing_visibility": "unauth"})
    shown = (await node.call("GET", "sys/internal/ui/mounts", token=None)).data["secret"]["secret/"]
    assert shown == {"description": "", "options": {"version": "2"}, "type": "kv"}
    assert "secret/" in (await node.call("GET", "sys/internal/ui/mounts", token=token)).data["secret"]
    assert (await node.call("GET", "sys/internal/ui/resultant-acl")).data == {"root": True}
    assert (await node.call("GET", "sys/internal/ui/namespaces")).data == {"keys": [""]}
    assert (await node.call("GET", "sys/license/features", token=None)).body["features"]
    assert (await node.call("GET", "sys/internal/ui/feature-flags", token=None)).body == {"feature_flags": None}


async def test_a_root_token_from_key_shares(node: Harness) -> None:
    before = await node.call("GET", "sys/generate-root/attempt", token=None)
    assert (before.body["started"], before.body["otp_length"], before.body["required"]) == (False, 28, 2)
    begun = (await node.call("PUT", "sys/generate-root/attempt", {}, token=None)).body
    assert begun["started"]
    twice = await node.call("PUT", "sys/generate-root/attempt", {}, token=None)
    assert twice.errors == ["root generation already in progress"]
    hidden = (await node.call("GET", "sys/generate-root/attempt", token=None)).body
    assert (hidden["otp"], len(begun["otp"])) == ("", 28)

    async def provide(key: str, nonce: str = begun["nonce"]) -> Reply:
        return await node.call("PUT", "sys/generate-root/update", {"key": key, "nonce": nonce}, token=None)

    wrong = await provide(node.keys[0].hex(), "x")
    assert wrong.errors[0].startswith("incorrect nonce supplied; nonce for this root generation operation is ")
    assert (await provide("zz!")).errors == ["'key' must be a valid hex or base64 string"]
    assert (await provide("00ff")).errors == ["invalid key: key is shorter than minimum 16 bytes"]
    first = await provide(node.keys[0].hex())
    assert (first.body["progress"], first.body["complete"], first.body["otp_length"]) == (1, False, 0)
    assert (await provide(node.keys[0].hex())).errors == [
        "given key has already been provided during this generation operation"
    ]
    other = await provide(bytes([node.keys[1][0] ^ 1, *node.keys[1][1:]]).hex())
    assert other.errors == ["root generation aborted: cipher: message authentication failed"]
    assert (await node.call("GET", "sys/generate-root/attempt", token=None)).body["progress"] == 0
    await provide(base64.b64encode(node.keys[2]).decode())
    done = (await provide(node.keys[1].hex())).body
    assert done["complete"]
    assert "=" not in done["encoded_token"]
    raw = base64.b64decode(done["encoded_token"] + "==")
    token = bytes(left ^ right for left, right in zip(raw, begun["otp"].encode(), strict=True)).decode()
    assert (await node.call("GET", "auth/token/lookup-self", token=token)).data["policies"] == ["root"]
    assert (await provide(node.keys[0].hex())).errors == ["no root generation in progress"]
    assert (await node.call("PUT", "sys/generate-root/attempt", {"otp": "x"}, token=None)).errors == [
        "OTP string is wrong length"
    ]
    assert (await node.call("DELETE", "sys/generate-root/attempt", token=None)).status == 204


async def test_rotate_config(node: Harness) -> None:
    assert (await node.call("GET", "sys/rotate/config")).data == {
        "enabled": True,
        "interval": 0,
        "max_operations": 3_865_470_566,
    }
    body = {"max_operations": 2_000_000_000, "interval": "4320h"}
    assert (await node.call("POST", "sys/rotate/config", body)).status == 204
    wanted = {"enabled": True, "interval": "4320h0m0s", "max_operations": 2_000_000_000}
    assert (await node.call("GET", "sys/rotate/config")).data == wanted
    assert (await node.call("POST", "sys/rotate/config", {"enabled": False})).status == 204
    assert (await node.call("GET", "sys/rotate/config")).data == wanted | {"enabled": False}
    for bad in ({"max_operations": 10}, {"interval": "1h"}, {"interval": "soon"}):
        assert (await node.call("POST", "sys/rotate/config", bad)).status == 400
    assert (await node.call("GET", "sys/rotate/config")).data == wanted | {"enabled": False}
    assert (await node.call("POST", "sys/rotate/config", {"interval": "0"}, token=None)).status == 403
