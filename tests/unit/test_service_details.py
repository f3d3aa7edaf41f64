"""Details of Vault's API that an operator stumbles over: warnings, texts, fields and help."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.service_node import Harness, running, with_kv


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


# -- tokens


async def test_a_policy_that_does_not_exist_is_named(node: Harness) -> None:
    await node.call("PUT", "sys/policies/acl/here", {"policy": 'path "a" { capabilities = ["read"] }'})
    made = await node.call("POST", "auth/token/create", {"policies": ["here", "nosuch", "other"]})
    assert made.body["warnings"] == ['Policy "nosuch" does not exist', 'Policy "other" does not exist']
    assert made.body["auth"]["policies"] == ["default", "here", "nosuch", "other"]
    assert (await node.call("POST", "auth/token/create", {"policies": ["here"]})).body["warnings"] is None
    assert (await node.call("POST", "auth/token/create")).body["warnings"] is None, "root's own"


@pytest.mark.parametrize(
    ("asked", "ttl_s", "warnings"),
    [
        ({"explicit_max_ttl": "1h"}, 3600, None),
        (
            {"ttl": "2h", "explicit_max_ttl": "1h"},
            3600,
            ['TTL of "2h" exceeded the explicit max_ttl of "1h"; TTL value is capped accordingly'],
        ),
        (
            {"ttl": "1h", "explicit_max_ttl": "9999h"},
            3600,
            ['Explicit max TTL of "9999h" is greater than system/mount allowed value; value is being capped to "768h"'],
        ),
        ({"period": "1h", "explicit_max_ttl": "9999h"}, 3600, None),
    ],
)
async def test_what_is_capped_is_said(
    node: Harness, asked: dict[str, str], ttl_s: int, warnings: list[str] | None
) -> None:
    made = await node.call("POST", "auth/token/create", {"policies": ["default"], **asked})
    assert (made.body["auth"]["lease_duration"], made.body["warnings"]) == (ttl_s, warnings)


async def test_a_role_whose_tokens_are_capped_says_so(node: Harness) -> None:
    written = await node.call("POST", "auth/token/roles/long", {"token_explicit_max_ttl": "9999h"})
    assert written.status == 200
    assert "greater than system/mount allowed value of 2764800 seconds" in written.body["warnings"][0]
    assert (await node.call("POST", "auth/token/roles/short", {"token_explicit_max_ttl": "1h"})).status == 204


async def test_a_role_of_approle_with_longer_lives_than_the_mount_says_so(node: Harness) -> None:
    await node.call("POST", "sys/auth/approle", {"type": "approle"})
    written = await node.call("POST", "auth/approle/role/r", {"token_max_ttl": "9999h"})
    assert "token_max_ttl is greater than the backend mount's maximum TTL value" in written.body["warnings"][0]
    assert (await node.call("POST", "auth/approle/role/r", {"token_max_ttl": "1h"})).status == 204


# -- mounts


async def test_a_mount_that_no_engine_would_serve_is_not_made(node: Harness) -> None:
    refused = await node.call("POST", "sys/mounts/kv", {"type": "kv", "options": {"version": "9"}})
    assert (refused.status, refused.errors) == (400, ["invalid kv version: it must be 1 or 2"])
    assert "kv/" not in (await node.call("GET", "sys/mounts")).data


async def test_token_types_are_for_methods_that_make_tokens(node: Harness) -> None:
    await with_kv(node)
    await node.call("POST", "sys/auth/userpass", {"type": "userpass"})
    tune = {"token_type": "batch"}
    refused = await node.call("POST", "sys/mounts/secret/tune", tune)
    assert (refused.status, refused.errors) == (400, ["'token_type' can only be modified on auth mounts"])
    refused = await node.call("POST", "sys/auth/token/tune", tune)
    assert refused.errors == ["'token_type' cannot be set for 'token' or 'ns_token' auth mounts"]
    assert (await node.call("POST", "sys/auth/userpass/tune", tune)).status == 204


async def test_ttls_in_the_wrong_order_are_refused_in_vaults_words(node: Harness) -> None:
    config = {"default_lease_ttl": "2h", "max_lease_ttl": "1h"}
    refused = await node.call("POST", "sys/mounts/kv", {"type": "kv", "config": config})
    assert refused.errors == ["backend max lease TTL of 3600 would be less than backend default lease TTL of 7200"]


# -- help


async def test_help_at_a_mount_lists_what_it_serves(node: Harness) -> None:
    await with_kv(node)
    text = (await node.call("GET", "secret?help=1")).body["help"]
    assert text.startswith("## DESCRIPTION")
    assert "    data/{path}\n        Writes, patches, reads and deletes data of a secret.\n" in text
    assert text.index("    config\n") < text.index("    data/{path}\n") < text.index("    undelete/{path}\n")
    assert (await node.call("GET", "secret/?help=1")).body["help"] == text
    assert "    policies/acl/{name}\n" in (await node.call("GET", "sys?help=1")).body["help"]


async def test_help_at_a_path_names_its_parameters(node: Harness) -> None:
    await with_kv(node)
    text = (await node.call("GET", "secret/data/a/b?help=1")).body["help"]
    assert text.splitlines()[:2] == ["Request:        data/a/b", "Matching Route: data/{path}"]
    for line in ("    data (map)", "    path (string)", "    version (integer)"):
        assert line in text.splitlines()
    assert "    read, update, patch, delete" in text.splitlines()
    assert "    ttl (duration)" in (await node.call("GET", "auth/token/create?help=1")).body["help"]


# -- the audit log


async def test_an_entry_says_which_policies_let_the_caller(node: Harness, tmp_path: Path) -> None:
    await with_kv(node)
    log = tmp_path / "audit.log"
    await node.call("POST", "sys/audit/file", {"type": "file", "options": {"file_path": str(log)}})
    for name, path in (("reader", "secret/data/a"), ("writer", "secret/data/+"), ("other", "b")):
        await node.call("PUT", f"sys/policies/acl/{name}", {"policy": f'path "{path}" {{ capabilities = ["read"] }}'})
    made = await node.call("POST", "auth/token/create", {"policies": ["reader", "writer", "other"]})
    token = made.body["auth"]["client_token"]
    log.write_bytes(b"")
    assert (await node.call("GET", "secret/data/a", token=token)).status == 404
    assert (await node.call("DELETE", "secret/data/a", token=token)).status == 403
    assert (await node.call("GET", "sys/mounts")).status == 200
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    allowed, denied, root = (
        [entry["auth"]["policy_results"] for entry in entries if entry["request"]["operation"] == operation and paths]
        for operation, paths in (("read", True), ("delete", True), ("read", True))
    )
    reader = {"name": "reader", "namespace_id": "root", "type": "acl"}
    assert allowed[0] == allowed[1] == {"allowed": True, "granting_policies": [reader]}
    assert denied == [{"allowed": False}, {"allowed": False}]
    assert root[-1]["granting_policies"] == [{"name": "root", "namespace_id": "root", "type": "acl"}]
    request, response = entries[0]["request"], entries[1]["response"]
    assert (request["mount_class"], response["mount_class"]) == ("secret", "secret")
    assert request["mount_running_version"].startswith("v")
    assert response["mount_running_plugin_version"] == request["mount_running_version"]


# -- health and high availability


async def test_health_tells_of_heartbeats_on_every_node(node: Harness) -> None:
    body = (await node.call("GET", "sys/health")).body
    times = {name: body[name] for name in body if name.endswith("_ms")}
    assert times == {"echo_duration_ms": 0, "clock_skew_ms": 0, "replication_primary_canary_age_ms": 0}


# -- tokens from key shares, and experiments


async def test_an_encoded_token_is_decoded_without_a_token(node: Harness) -> None:
    begun = (await node.call("PUT", "sys/generate-root/attempt", {}, token=None)).body
    for key in node.keys[:2]:
        body = {"key": key.hex(), "nonce": begun["nonce"]}
        done = (await node.call("PUT", "sys/generate-root/update", body, token=None)).body
    asked = {"encoded_token": done["encoded_token"], "otp": begun["otp"]}
    token = (await node.call("POST", "sys/decode-token", asked, token=None)).data["token"]
    assert (await node.call("GET", "auth/token/lookup-self", token=token)).data["policies"] == ["root"]
    for wrong, text in (
        ({}, "missing encoded_token"),
        ({"encoded_token": "aGk"}, "missing otp"),
        (asked | {"otp": "short"}, "the encoded token and the OTP are not of one length"),
        (asked | {"encoded_token": "!" * 38}, "the encoded token cannot be decoded with this OTP"),
    ):
        refused = await node.call("POST", "sys/decode-token", wrong, token=None)
        assert (refused.status, refused.errors) == (400, [text])


async def test_there_are_no_experiments(node: Harness) -> None:
    assert (await node.call("GET", "sys/experiments")).data == {"available": [], "enabled": []}
