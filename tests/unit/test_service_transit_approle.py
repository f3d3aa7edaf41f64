"""Transit and approle behind a whole active node: every method that hvac has, access rules, and a secondary."""

import asyncio
import base64
from collections.abc import AsyncIterator

import hvac
import pytest
from hvac import exceptions

from tests.support.service_node import Harness, primary_and_secondary, replicate, running


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


# --- hvac ---


def drive_transit_keys(address: str, root: str) -> None:
    client = hvac.Client(url=address, token=root)
    client.sys.enable_secrets_engine("transit")
    transit = client.secrets.transit
    with pytest.raises(exceptions.InvalidPath):
        transit.list_keys()
    assert transit.create_key("k", exportable=True, allow_plaintext_backup=True)["data"]["name"] == "k"
    for kind in ("chacha20-poly1305", "ed25519", "ecdsa-p256", "ecdsa-p384", "ecdsa-p521", "rsa-2048"):
        transit.create_key(kind, key_type=kind)
        assert transit.read_key(kind)["data"]["type"] == kind
    assert "k" in transit.list_keys()["data"]["keys"]
    keys = transit.read_key("k")["data"]["keys"]
    assert list(keys) == ["1"]
    assert isinstance(keys["1"], int)
    transit.rotate_key("k")
    config = transit.update_key_configuration(
        "k", min_decryption_version=1, min_encryption_version=2, deletion_allowed=True, auto_rotate_period="24h"
    )
    assert config["data"]["auto_rotate_period"] == 86400
    assert list(transit.export_key("k", "encryption-key")["data"]["keys"]) == ["1", "2"]
    assert list(transit.export_key("k", "hmac-key", version="latest")["data"]["keys"]) == ["2"]
    backup = transit.backup_key("k")["data"]["backup"]
    assert transit.restore_key(backup, name="copy").status_code == 204
    with pytest.raises(exceptions.InternalServerError):
        transit.restore_key(backup)
    transit.restore_key(backup, force=True)
    transit.update_key_configuration("k", min_decryption_version=2)
    assert transit.trim_key("k", 2)["data"]["min_available_version"] == 2
    assert transit.delete_key("k").status_code == 204
    with pytest.raises(exceptions.InvalidPath):
        transit.read_key("k")
    with pytest.raises(exceptions.InvalidRequest):
        transit.delete_key("ed25519")


def drive_transit_data(address: str, root: str) -> None:
    client = hvac.Client(url=address, token=root)
    client.sys.enable_secrets_engine("transit", path="crypto")
    transit, mount = client.secrets.transit, {"mount_point": "crypto"}
    transit.create_key("k", **mount)
    plaintext = b64("hi itsame hvac")
    ciphertext = transit.encrypt_data("k", plaintext, **mount)["data"]["ciphertext"]
    assert ciphertext.startswith("vault:v1:")
    assert transit.decrypt_data("k", ciphertext, **mount)["data"]["plaintext"] == plaintext
    batch = transit.encrypt_data("k", batch_input=[{"plaintext": plaintext}], **mount)["data"]["batch_results"]
    opened = transit.decrypt_data("k", batch_input=[{"ciphertext": batch[0]["ciphertext"]}], **mount)
    assert opened["data"]["batch_results"] == [{"plaintext": plaintext}]
    with_data = transit.encrypt_data("k", plaintext, associated_data=b64("who"), **mount)["data"]["ciphertext"]
    assert transit.decrypt_data("k", with_data, associated_data=b64("who"), **mount)["data"]["plaintext"] == plaintext
    with pytest.raises(exceptions.InvalidRequest):
        transit.decrypt_data("k", with_data, **mount)
    transit.rotate_key("k", **mount)
    assert transit.rewrap_data("k", ciphertext, **mount)["data"]["ciphertext"].startswith("vault:v2:")
    # A key that is not there is made, because root may create.
    upserted = transit.encrypt_data("new", plaintext, context=b64("c"), type="chacha20-poly1305", **mount)
    assert upserted["data"]["key_version"] == 1
    assert transit.read_key("new", **mount)["data"]["derived"] is True
    made = transit.generate_data_key("k", "plaintext", bits=512, **mount)["data"]
    assert transit.decrypt_data("k", made["ciphertext"], **mount)["data"]["plaintext"] == made["plaintext"]
    assert len(transit.generate_random_bytes(7, "hex", **mount)["data"]["random_bytes"]) == 14
    summed = transit.hash_data(b64("abc"), "sha2-256", "hex", **mount)["data"]["sum"]
    assert summed == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    made = transit.generate_hmac("k", b64("x"), algorithm="sha2-512", **mount)["data"]["hmac"]
    checked = transit.verify_signed_data("k", b64("x"), hmac=made, hash_algorithm="sha2-512", **mount)
    assert checked["data"] == {"valid": True}
    for kind in ("ed25519", "ecdsa-p384", "rsa-2048"):
        transit.create_key(kind, key_type=kind, **mount)
        signed = transit.sign_data(kind, b64("x"), marshaling_algorithm="jws", salt_length="hash", **mount)["data"]
        for text, valid in (("x", True), ("y", False)):
            checked = transit.verify_signed_data(
                kind, b64(text), signature=signed["signature"], marshaling_algorithm="jws", salt_length="hash", **mount
            )
            assert checked["data"] == {"valid": valid}
    signed = transit.sign_data("ed25519", batch_input=[{"input": b64("x")}], **mount)["data"]["batch_results"]
    assert signed[0]["signature"].startswith("vault:v1:")


def drive_approle(address: str, root: str) -> None:
    client = hvac.Client(url=address, token=root)
    client.sys.enable_auth_method("approle")
    approle = client.auth.approle
    approle.create_or_update_approle(
        "app",
        token_policies=["default"],
        token_ttl="20m",
        token_max_ttl="30m",
        secret_id_num_uses=40,
        secret_id_ttl="10m",
        token_bound_cidrs=["127.0.0.0/8"],
        token_type="service",
        enable_local_secret_ids=False,
    )
    assert approle.list_roles()["data"]["keys"] == ["app"]
    assert approle.read_role("app")["data"]["token_type"] == "service"
    approle.update_role_id("app", "my-role-id")
    assert approle.read_role_id("app")["data"] == {"role_id": "my-role-id"}
    made = approle.generate_secret_id("app", metadata={"tag": "x"}, cidr_list=["127.0.0.1/32"])["data"]
    assert approle.read_secret_id("app", made["secret_id"])["data"]["metadata"] == {"tag": "x"}
    shown = approle.read_secret_id_accessor("app", made["secret_id_accessor"])["data"]
    assert shown["cidr_list"] == ["127.0.0.1/32"]
    assert approle.list_secret_id_accessors("app")["data"]["keys"] == [made["secret_id_accessor"]]
    custom = approle.create_custom_secret_id("app", "custom", metadata={"a": "b"})["data"]
    assert custom["secret_id"] == "custom"

    machine = hvac.Client(url=address)
    auth = machine.auth.approle.login("my-role-id", made["secret_id"])["auth"]
    assert auth["metadata"] == {"role_name": "app", "tag": "x"}
    assert (auth["lease_duration"], auth["policies"]) == (1200, ["default"])
    assert machine.auth.token.lookup_self()["data"]["path"] == "auth/approle/login"
    assert machine.auth.token.lookup_self()["data"]["display_name"] == "approle"

    wrapped = approle.generate_secret_id("app", wrap_ttl="60s")
    assert wrapped["data"] is None
    unwrapped = hvac.Client(url=address, token=wrapped["wrap_info"]["token"]).sys.unwrap()["data"]
    assert machine.auth.approle.login("my-role-id", unwrapped["secret_id"])["auth"]["client_token"]

    assert approle.destroy_secret_id("app", made["secret_id"]).status_code == 204
    assert approle.destroy_secret_id_accessor("app", custom["secret_id_accessor"]).status_code == 204
    errors = []
    for pair in (("my-role-id", made["secret_id"]), ("my-role-id", "x"), ("nobody", made["secret_id"])):
        with pytest.raises(exceptions.InvalidRequest) as caught:
            hvac.Client(url=address).auth.approle.login(*pair)
        errors.append(caught.value.errors)
    assert errors == [["invalid role or secret ID"]] * 3
    with pytest.raises(exceptions.InvalidPath):
        approle.read_secret_id_accessor("app", made["secret_id_accessor"])
    assert approle.delete_role("app").status_code == 204
    with pytest.raises(exceptions.InvalidPath):
        approle.read_role("app")


@pytest.mark.parametrize("drive", [drive_transit_keys, drive_transit_data, drive_approle])
async def test_hvac(node: Harness, drive: object) -> None:
    assert callable(drive)
    await asyncio.to_thread(drive, node.address, node.root)


# --- over HTTP ---


async def test_encrypting_creates_only_for_those_who_may(node: Harness) -> None:
    await node.call("POST", "sys/mounts/transit", {"type": "transit"})
    uses = await node.token('path "transit/encrypt/*" { capabilities = ["update"] }')
    makes = await node.token('path "transit/encrypt/*" { capabilities = ["create", "update"] }')
    body = {"plaintext": b64("x")}
    assert (await node.call("POST", "transit/encrypt/k", body, token=uses)).status == 403
    assert (await node.call("POST", "transit/encrypt/k", body, token=makes)).status == 200
    reply = await node.call("POST", "transit/encrypt/k", body, token=uses)
    assert (reply.status, reply.body["mount_type"]) == (200, "transit")
    assert (await node.call("POST", "transit/decrypt/k", body, token=uses)).status == 403


async def test_a_batch_with_failures_answers_400_with_its_results(node: Harness) -> None:
    await node.call("POST", "sys/mounts/transit", {"type": "transit"})
    await node.call("POST", "transit/keys/k", {})
    items = [{"plaintext": b64("x")}, {"plaintext": "%"}]
    reply = await node.call("POST", "transit/encrypt/k", {"batch_input": items})
    assert reply.status == 400
    good, bad = reply.data["batch_results"]
    assert (list(good), list(bad)) == (["ciphertext", "key_version"], ["error"])
    reply = await node.call("POST", "transit/encrypt/k", {"batch_input": items, "partial_failure_response_code": 207})
    assert reply.status == 207


async def test_both_are_in_the_catalog(node: Harness) -> None:
    catalog = (await node.call("GET", "sys/plugins/catalog")).data
    assert "transit" in catalog["secret"]
    assert "approle" in catalog["auth"]


async def test_a_secondary_uses_keys_and_the_primary_makes_them() -> None:
    async with primary_and_secondary() as (primary, secondary):
        assert (await secondary.call("POST", "sys/mounts/transit", {"type": "transit"})).status == 204
        await replicate(primary, secondary)
        assert (await secondary.call("POST", "transit/keys/k", {})).status == 200
        assert (await secondary.call("POST", "transit/encrypt/new", {"plaintext": b64("x")})).status == 200
        assert (await primary.call("LIST", "transit/keys")).data["keys"] == ["k", "new"]
        await replicate(primary, secondary)
        assert secondary.replication is not None
        forwarded = len(secondary.replication.forwarded)
        sealed = (await secondary.call("POST", "transit/encrypt/k", {"plaintext": b64("x")})).data["ciphertext"]
        assert (await primary.call("POST", "transit/decrypt/k", {"ciphertext": sealed})).data["plaintext"] == b64("x")
        made = (await secondary.call("POST", "transit/hmac/k", {"input": ""})).data["hmac"]
        checked = await secondary.call("POST", "transit/verify/k", {"input": "", "hmac": made})
        assert checked.data == {"valid": True}
        assert len(secondary.replication.forwarded) == forwarded
        assert (await secondary.call("POST", "transit/keys/k/rotate", {})).data["latest_version"] == 2
        assert len(secondary.replication.forwarded) == forwarded + 1
        await replicate(primary, secondary)
        reply = await secondary.call("POST", "transit/encrypt/k", {"plaintext": b64("x")})
        assert reply.data["key_version"] == 2


async def test_secret_ids_on_a_secondary() -> None:
    async with primary_and_secondary() as (primary, secondary):
        await primary.call("POST", "sys/auth/approle", {"type": "approle"})
        await primary.call("POST", "auth/approle/role/far", {"token_policies": "default"})
        await primary.call("POST", "auth/approle/role/near", {"local_secret_ids": True})
        await replicate(primary, secondary)
        assert secondary.replication is not None
        logins = []
        for role in ("far", "near"):
            role_id = (await secondary.call("GET", f"auth/approle/role/{role}/role-id")).data["role_id"]
            forwarded = len(secondary.replication.forwarded)
            made = (await secondary.call("POST", f"auth/approle/role/{role}/secret-id", {})).data
            assert len(secondary.replication.forwarded) == forwarded + (role == "far")
            logins.append({"role_id": role_id, "secret_id": made["secret_id"]})
        await replicate(primary, secondary)
        for body in logins:
            reply = await secondary.call("POST", "auth/approle/login", body, token=None)
            assert reply.status == 200, reply.errors
            token = reply.body["auth"]["client_token"]
            assert (await secondary.call("GET", "auth/token/lookup-self", token=token)).status == 200
        statuses = [(await primary.call("POST", "auth/approle/login", body, token=None)).status for body in logins]
        assert statuses == [200, 400]
        # A use that the primary would have to count makes no token here.
        made = (await secondary.call("POST", "auth/approle/role/far/secret-id", {"num_uses": 1})).data
        await replicate(primary, secondary)
        body = {"role_id": logins[0]["role_id"], "secret_id": made["secret_id"]}
        reply = await secondary.call("POST", "auth/approle/login", body, token=None)
        assert (reply.status, reply.errors) == (400, ["cannot write to readonly storage"])
