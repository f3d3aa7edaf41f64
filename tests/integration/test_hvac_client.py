"""hvac against a real process, method by method: what the client of most Python users expects (contract 7.3)."""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hvac
import pytest
from hvac import exceptions
from hvac.api import auth_methods, secrets_engines, system_backend

from tests.support.cluster import Cluster, Node, embedded_storage
from tests.support.hvac_coverage import Calls

SYSTEM = (
    system_backend.Audit,
    system_backend.Auth,
    system_backend.Capabilities,
    system_backend.Health,
    system_backend.Init,
    system_backend.Key,
    system_backend.Leader,
    system_backend.Lease,
    system_backend.Mount,
    system_backend.Namespace,
    system_backend.Policies,
    system_backend.Policy,
    system_backend.Quota,
    system_backend.Raft,
    system_backend.Seal,
    system_backend.Wrapping,
)
OTHERS = (
    auth_methods.AppRole,
    auth_methods.Token,
    auth_methods.Userpass,
    secrets_engines.KvV1,
    secrets_engines.KvV2,
    secrets_engines.Transit,
    hvac.Client,
)
UNAVAILABLE = (
    "Raft.",  # there is no Raft storage
    "Namespace.",  # one namespace, as in the open source server
    "Policies.create_or_update_egp",  # Sentinel is the enterprise server's
    "Policies.create_or_update_rgp",
    "Policies.delete_egp",
    "Policies.delete_rgp",
    "Policies.list_egp",
    "Policies.list_rgp",
    "Policies.read_egp",
    "Policies.read_rgp",
)


@dataclass
class Running:
    """An initialised, unsealed node and a client that holds its root token."""

    cluster: Cluster
    client: hvac.Client
    calls: Calls

    @property
    def node(self) -> Node:
        return self.cluster.nodes[0]

    def as_token(self, token: str) -> hvac.Client:
        return hvac.Client(self.node.address, token=token)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("hvac")
    cluster = Cluster([Node("hvac", home, embedded_storage(home))])
    calls = Calls()
    with calls.recorded(SYSTEM + OTHERS):
        try:
            cluster.start()
            client = hvac.Client(cluster.nodes[0].address)
            assert not client.sys.is_initialized()
            assert client.sys.read_init_status() == {"initialized": False}
            made = client.sys.initialize(secret_shares=5, secret_threshold=3)
            assert (len(made["keys"]), len(made["keys_base64"])) == (5, 5)
            cluster.keys, cluster.root = made["keys_base64"], made["root_token"]
            assert client.sys.is_sealed()
            client.sys.submit_unseal_key(cluster.keys[0])
            assert client.sys.read_seal_status()["progress"] == 1
            assert client.sys.submit_unseal_key(reset=True)["progress"] == 0
            assert not client.sys.submit_unseal_keys(cluster.keys[:3])["sealed"]
            client.token = cluster.root
            cluster.wait_active()
            yield Running(cluster, client, calls)
        finally:
            cluster.kill()


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_health_and_leader(running: Running) -> None:
    sys = running.client.sys
    assert sys.read_health_status().status_code == 200
    assert sys.read_health_status(method="GET")["initialized"] is True
    assert "ha_enabled" in sys.read_leader_status()
    assert sys.step_down().status_code == 204


def test_audit_devices(running: Running, tmp_path: Path) -> None:
    sys = running.client.sys
    with pytest.raises(exceptions.InvalidRequest):
        sys.enable_audit_device("nosuch")
    log = str(tmp_path / "audit.log")
    assert sys.enable_audit_device("file", options={"file_path": log}, description="d").status_code == 204
    assert sys.list_enabled_audit_devices()["data"]["file/"]["options"]["file_path"] == log
    assert sys.calculate_hash("file", "x")["data"]["hash"].startswith("hmac-sha256:")
    assert sys.disable_audit_device("file").status_code == 204
    assert "file/" not in sys.list_enabled_audit_devices()["data"]


def test_auth_methods_are_mounted_tuned_and_removed(running: Running) -> None:
    sys = running.client.sys
    assert "token/" in sys.list_auth_methods()["data"]
    assert sys.enable_auth_method("userpass", path="people", description="d").status_code == 204
    assert sys.read_auth_method_tuning("people")["data"]["max_lease_ttl"] == 2764800
    tuned = sys.tune_auth_method(
        "people",
        default_lease_ttl="30m",
        max_lease_ttl="1h",
        description="e",
        listing_visibility="unauth",
        audit_non_hmac_request_keys=["a"],
        audit_non_hmac_response_keys=["b"],
        passthrough_request_headers=["X-Forwarded-For"],
    )
    assert tuned.status_code == 204
    shown = sys.read_auth_method_tuning("people")["data"]
    assert (shown["default_lease_ttl"], shown["max_lease_ttl"], shown["description"]) == (1800, 3600, "e")
    assert shown["passthrough_request_headers"] == ["X-Forwarded-For"]
    assert sys.disable_auth_method("people").status_code == 204
    assert "people/" not in sys.list_auth_methods()["data"]


def test_capabilities(running: Running) -> None:
    sys = running.client.sys
    assert sys.get_capabilities(["secret/a"])["data"]["secret/a"] == ["root"]
    made = running.client.auth.token.create(policies=["default"])["auth"]
    assert sys.get_capabilities(["secret/a"], token=made["client_token"])["capabilities"] == ["deny"]
    assert sys.get_capabilities(["auth/token/lookup-self"], accessor=made["accessor"])["capabilities"] == ["read"]


def test_rekey_with_and_without_verification(running: Running) -> None:
    sys, cluster = running.client.sys, running.cluster
    with pytest.raises(exceptions.InvalidRequest, match="no backed-up keys found"):
        sys.read_backup_keys()
    started = sys.start_rekey(secret_shares=3, secret_threshold=2)
    assert started["started"]
    assert started["nonce"]
    assert sys.read_rekey_progress()["started"]
    sys.cancel_rekey()
    assert not sys.read_rekey_progress()["started"]
    nonce = sys.start_rekey(secret_shares=3, secret_threshold=2)["nonce"]
    sys.rekey(cluster.keys[0], nonce=nonce)
    done = sys.rekey_multi(cluster.keys[1:3], nonce=nonce)
    assert done["complete"]
    cluster.keys = done["keys_base64"]
    started = sys.start_rekey(secret_shares=3, secret_threshold=2, require_verification=True)
    done = sys.rekey_multi(cluster.keys[:2], nonce=started["nonce"])
    assert done["verification_required"]
    nonce = done["verification_nonce"]
    assert sys.read_rekey_verify_progress()["nonce"] == nonce
    again = sys.cancel_rekey_verify()
    nonce = again["nonce"] if isinstance(again, dict) else sys.read_rekey_verify_progress()["nonce"]
    sys.rekey_verify(done["keys"][0], nonce=nonce)
    assert sys.rekey_verify_multi([done["keys"][1]], nonce=nonce)["complete"]
    cluster.keys = done["keys_base64"]


def test_a_root_token_from_shares(running: Running) -> None:
    sys = running.client.sys
    otp = "a" * sys.read_root_generation_progress()["otp_length"]
    assert sys.start_root_token_generation(otp=otp)["started"]
    assert sys.cancel_root_generation().status_code == 204
    assert not sys.read_root_generation_progress()["started"]
    nonce = sys.start_root_token_generation(otp=otp)["nonce"]
    assert not sys.generate_root(running.cluster.keys[0], nonce)["complete"]
    done = sys.generate_root(running.cluster.keys[1], nonce)
    hidden = base64.b64decode(done["encoded_root_token"] + "==")
    token = bytes(left ^ right for left, right in zip(hidden, otp.encode(), strict=True)).decode()
    assert running.as_token(token).auth.token.lookup_self()["data"]["policies"] == ["root"]


def test_key_status_and_rotation(running: Running) -> None:
    sys = running.client.sys
    before = sys.get_encryption_key_status()["term"]
    assert sys.rotate_encryption_key().status_code == 204
    assert sys.get_encryption_key_status()["term"] == before + 1


def test_leases(running: Running) -> None:
    sys = running.client.sys
    with pytest.raises(exceptions.InvalidPath):
        sys.list_leases("secret/nosuch/")
    for call in (sys.read_lease, sys.renew_lease):
        with pytest.raises(exceptions.InvalidRequest):
            call("secret/nosuch/0123456789abcdefghijklmn")
    assert sys.revoke_lease("secret/nosuch/0123456789abcdefghijklmn").status_code == 204
    assert sys.revoke_prefix("secret/nosuch").status_code == 204
    assert sys.revoke_force("secret/nosuch").status_code == 204


def test_secrets_engines_are_mounted_tuned_moved_and_removed(running: Running) -> None:
    sys = running.client.sys
    assert sys.enable_secrets_engine("kv", path="one", options={"version": "1"}, description="d").status_code == 204
    assert sys.retrieve_mount_option("one", "version", "0") == "1"
    tuned = sys.tune_mount_configuration("one", default_lease_ttl="1800s", max_lease_ttl=3600, description="e")
    assert tuned.status_code == 204
    shown = sys.read_mount_configuration("one")["data"]
    assert (shown["default_lease_ttl"], shown["max_lease_ttl"], shown["description"]) == (1800, 3600, "e")
    assert sys.move_backend("one", "two")["data"]["migration_id"]
    assert {"two/", "sys/", "cubbyhole/"} <= set(sys.list_mounted_secrets_engines()["data"])
    assert sys.disable_secrets_engine("two").status_code == 204


def test_what_the_open_source_server_does_not_have_is_refused(running: Running) -> None:
    for call in (running.client.sys.list_namespaces, running.client.sys.read_raft_config):
        with pytest.raises(exceptions.InvalidPath):
            call()


def test_policies(running: Running) -> None:
    sys = running.client.sys
    rules = 'path "secret/*" { capabilities = ["read"] }'
    assert sys.create_or_update_acl_policy("mine", rules).status_code == 204
    assert "mine" in sys.list_acl_policies()["data"]["keys"]
    assert sys.read_acl_policy("mine")["data"]["policy"] == rules
    assert sys.delete_acl_policy("mine").status_code == 204
    sys.create_or_update_policy("dict", {"path": {"secret/*": {"capabilities": ["list"]}}})
    assert "dict" in sys.list_policies()["data"]["policies"]
    assert json.loads(sys.read_policy("dict")["data"]["rules"])["path"]["secret/*"]["capabilities"] == ["list"]
    sys.delete_policy("dict")
    with pytest.raises(exceptions.InvalidPath):
        sys.read_policy("dict")


def test_quotas(running: Running) -> None:
    sys = running.client.sys
    assert sys.create_or_update_quota("q", 1000.0, path="sys", interval="1m", block_interval="2m").status_code == 204
    assert sys.read_quota("q")["data"]["interval"] == 60
    assert sys.list_quotas()["data"]["keys"] == ["q"]
    assert sys.delete_quota("q").status_code == 204


def test_wrapping(running: Running) -> None:
    sys, client = running.client.sys, running.client
    wrapped = sys.wrap({"a": "b"}, ttl=60)
    token = wrapped["wrap_info"]["token"]
    assert wrapped["wrap_info"]["ttl"] == 60
    assert sys.unwrap(token)["data"] == {"a": "b"}
    with pytest.raises(exceptions.InvalidRequest):
        sys.unwrap(token)
    made = client.auth.token.create(ttl="1h", wrap_ttl="60s")
    assert client.sys.unwrap(made["wrap_info"]["token"])["auth"]["lease_duration"] == 3600


def test_tokens(running: Running) -> None:
    token = running.client.auth.token
    made = token.create(policies=["default"], ttl="1h", meta={"k": "v"}, display_name="d", num_uses=0)["auth"]
    assert made["lease_duration"] == 3600
    assert token.lookup(made["client_token"])["data"]["meta"] == {"k": "v"}
    assert token.lookup_accessor(made["accessor"])["data"]["id"] == ""
    assert made["accessor"] in token.list_accessors()["data"]["keys"]
    assert token.renew(made["client_token"], increment="2h")["auth"]["lease_duration"] == 7200
    assert token.renew_accessor(made["accessor"])["auth"]["client_token"] == ""
    assert running.as_token(made["client_token"]).auth.token.renew_self(increment="30m")["auth"]["renewable"]
    assert token.create(period="1h")["auth"]["lease_duration"] == 3600
    orphan = token.create_orphan(policies=["default"])["auth"]
    assert token.lookup(orphan["client_token"])["data"]["orphan"] is True
    assert token.revoke_and_orphan_children(orphan["client_token"]).status_code == 204
    assert token.revoke(made["client_token"]).status_code == 204
    with pytest.raises(exceptions.Forbidden, match="bad token"):
        token.lookup(made["client_token"])
    by_accessor = token.create()["auth"]
    assert token.revoke_accessor(by_accessor["accessor"]).status_code == 204
    own = running.as_token(token.create()["auth"]["client_token"])
    assert own.auth.token.revoke_self().status_code == 204
    assert not own.is_authenticated()
    assert token.tidy().status_code == 202


def test_token_roles(running: Running) -> None:
    token = running.client.auth.token
    written = token.create_or_update_role(
        "r", allowed_policies=["default"], orphan=True, token_period="1h", path_suffix="ab"
    )
    assert written.status_code == 204
    assert token.read_role("r")["data"]["orphan"] is True
    assert token.list_roles()["data"]["keys"] == ["r"]
    assert token.create(role_name="r")["auth"]["lease_duration"] == 3600
    assert token.delete_role("r").status_code == 204


def test_userpass(running: Running) -> None:
    sys, userpass = running.client.sys, running.client.auth.userpass
    sys.enable_auth_method("userpass")
    userpass.create_or_update_user("bob", password="one", policies=["default"])
    assert userpass.read_user("bob")["data"]["token_policies"] == ["default"]
    assert userpass.list_user()["data"]["keys"] == ["bob"]
    userpass.update_password_on_user("bob", "two")
    with pytest.raises(exceptions.InvalidRequest):
        hvac.Client(running.node.address).auth.userpass.login("bob", "one")
    client = hvac.Client(running.node.address)
    assert client.auth.userpass.login("bob", "two")["auth"]["metadata"] == {"username": "bob"}
    assert client.is_authenticated()
    client.logout(revoke_token=True)
    userpass.delete_user("bob")
    with pytest.raises(exceptions.InvalidPath):
        userpass.list_user()
    sys.disable_auth_method("userpass")


def test_approle(running: Running) -> None:
    sys, approle = running.client.sys, running.client.auth.approle
    sys.enable_auth_method("approle")
    approle.create_or_update_approle("app", token_policies=["default"], token_ttl="20m", bind_secret_id=True)
    assert approle.list_roles()["data"]["keys"] == ["app"]
    assert approle.read_role("app")["data"]["token_ttl"] == 1200
    approle.update_role_id("app", "known")
    assert approle.read_role_id("app")["data"]["role_id"] == "known"
    secret = approle.generate_secret_id("app", metadata={"k": "v"})["data"]
    assert approle.read_secret_id("app", secret["secret_id"])["data"]["metadata"] == {"k": "v"}
    accessor = secret["secret_id_accessor"]
    assert approle.list_secret_id_accessors("app")["data"]["keys"] == [accessor]
    assert approle.read_secret_id_accessor("app", accessor)["data"]["secret_id_accessor"] == accessor
    login = hvac.Client(running.node.address).auth.approle.login("known", secret["secret_id"])
    assert login["auth"]["metadata"]["role_name"] == "app"
    approle.create_custom_secret_id("app", "custom", metadata={})
    approle.destroy_secret_id("app", "custom")
    approle.destroy_secret_id_accessor("app", accessor)
    with pytest.raises(exceptions.InvalidRequest):
        hvac.Client(running.node.address).auth.approle.login("known", secret["secret_id"])
    approle.delete_role("app")
    sys.disable_auth_method("approle")


def test_kv_version_1(running: Running) -> None:
    sys, kv = running.client.sys, running.client.secrets.kv.v1
    sys.enable_secrets_engine("kv", path="kv1", options={"version": "1"})
    with pytest.raises(exceptions.InvalidPath):
        kv.read_secret("a", mount_point="kv1")
    assert kv.create_or_update_secret("a/b", {"x": "1"}, mount_point="kv1").status_code == 204
    assert kv.create_or_update_secret("a/b", {"x": "2"}, method="PUT", mount_point="kv1").status_code == 204
    assert kv.read_secret("a/b", mount_point="kv1")["data"] == {"x": "2"}
    assert kv.list_secrets("a", mount_point="kv1")["data"]["keys"] == ["b"]
    assert kv.delete_secret("a/b", mount_point="kv1").status_code == 204
    sys.disable_secrets_engine("kv1")


def test_kv_version_2(running: Running) -> None:
    sys, kv = running.client.sys, running.client.secrets.kv.v2
    sys.enable_secrets_engine("kv", path="secret", options={"version": "2"})
    kv.configure(max_versions=5, delete_version_after="1h")
    config = kv.read_configuration()["data"]
    assert (config["max_versions"], config["delete_version_after"]) == (5, "1h0m0s")
    kv.configure(delete_version_after="0s")
    assert kv.create_or_update_secret("a", {"x": 1}, cas=0)["data"]["version"] == 1
    with pytest.raises(exceptions.InvalidRequest, match="check-and-set"):
        kv.create_or_update_secret("a", {"x": 2}, cas=0)
    with warnings.catch_warnings():
        # hvac's own patch reads with a default that it is going to change.
        warnings.simplefilter("ignore", DeprecationWarning)
        kv.patch("a", {"y": 2})
    assert kv.read_secret("a", raise_on_deleted_version=True)["data"]["data"] == {"x": 1, "y": 2}
    assert kv.read_secret_version("a", version=1, raise_on_deleted_version=True)["data"]["data"] == {"x": 1}
    assert kv.list_secrets("")["data"]["keys"] == ["a"]
    kv.delete_latest_version_of_secret("a")
    with pytest.raises(exceptions.InvalidPath) as missing:
        kv.read_secret_version("a", raise_on_deleted_version=True)
    assert missing.value.json["data"]["metadata"]["deletion_time"]
    kv.undelete_secret_versions("a", [2])
    kv.delete_secret_versions("a", [1])
    kv.destroy_secret_versions("a", [1])
    kv.update_metadata("a", max_versions=3, custom_metadata={"k": "v"})
    metadata = kv.read_secret_metadata("a")["data"]
    assert metadata["versions"]["1"]["destroyed"] is True
    assert metadata["custom_metadata"] == {"k": "v"}
    kv.delete_metadata_and_all_versions("a")
    with pytest.raises(exceptions.InvalidPath):
        kv.read_secret_metadata("a")
    sys.disable_secrets_engine("secret")


def test_transit(running: Running) -> None:
    sys, transit = running.client.sys, running.client.secrets.transit
    sys.enable_secrets_engine("transit")
    transit.create_key("k", exportable=True, allow_plaintext_backup=True)
    transit.create_key("s", key_type="ed25519")
    assert transit.list_keys()["data"]["keys"] == ["k", "s"]
    encrypted = transit.encrypt_data("k", b64("text"))["data"]["ciphertext"]
    assert encrypted.startswith("vault:v1:")
    assert transit.decrypt_data("k", encrypted)["data"]["plaintext"] == b64("text")
    transit.rotate_key("k")
    assert transit.rewrap_data("k", encrypted)["data"]["ciphertext"].startswith("vault:v2:")
    assert set(transit.read_key("k")["data"]["keys"]) == {"1", "2"}
    assert set(transit.export_key("k", "encryption-key")["data"]["keys"]) == {"1", "2"}
    assert len(base64.b64decode(transit.generate_data_key("k", "plaintext")["data"]["plaintext"])) == 32
    assert transit.generate_random_bytes(16, output_format="hex")["data"]["random_bytes"]
    assert transit.hash_data(b64("text"), "sha2-256")["data"]["sum"]
    mac = transit.generate_hmac("k", b64("text"))["data"]["hmac"]
    assert transit.verify_signed_data("k", b64("text"), hmac=mac)["data"]["valid"]
    signed = transit.sign_data("s", b64("text"))["data"]["signature"]
    assert transit.verify_signed_data("s", b64("text"), signature=signed)["data"]["valid"]
    backup = transit.backup_key("k")["data"]["backup"]
    transit.rotate_key("k")
    transit.update_key_configuration("k", deletion_allowed=True, min_decryption_version=2, min_encryption_version=3)
    transit.trim_key("k", 2)
    transit.delete_key("k")
    transit.restore_key(backup, name="k")
    assert transit.decrypt_data("k", encrypted)["data"]["plaintext"] == b64("text")
    sys.disable_secrets_engine("transit")


def test_the_clients_own_verbs(running: Running) -> None:
    client = running.client
    client.write_data("cubbyhole/a", data={"x": "1"})
    assert client.read("cubbyhole/a")["data"] == {"x": "1"}
    assert client.list("cubbyhole/")["data"]["keys"] == ["a"]
    client.delete("cubbyhole/a")
    assert client.read("cubbyhole/a") is None
    client.write("cubbyhole/b", x="2")
    client.sys.create_or_update_policy("kept", 'path "a" { capabilities = ["read"] }')
    assert "capabilities" in client.get_policy("kept")
    assert client.get_policy("nosuch") is None
    made = client.auth.token.create(policies=["default"])["auth"]["client_token"]
    assert client.lookup_token(made)["data"]["id"] == made
    client.renew_token(made)
    client.revoke_token(made)
    wrapped = client.auth.token.create(policies=["default"], wrap_ttl="60s")["wrap_info"]["token"]
    holder = hvac.Client(running.node.address)
    holder.auth_cubbyhole(wrapped)
    assert holder.is_authenticated()
    assert client.seal_status["sealed"] is False
    assert client.key_status["term"] >= 1
    assert "is_self" in client.ha_status
    client.sys.enable_auth_method("userpass")
    client.auth.userpass.create_or_update_user("eve", password="pw")
    other = hvac.Client(running.node.address)
    other.login("/v1/auth/userpass/login/eve", json={"password": "pw"})
    assert other.is_authenticated()


def test_y_sealing_and_unsealing_again(running: Running) -> None:
    """After all others in this file: it needs their keys."""
    sys = running.client.sys
    assert sys.seal().status_code == 204
    assert sys.is_sealed()
    with pytest.raises(exceptions.VaultDown):
        running.client.auth.token.lookup_self()
    running.cluster.unseal()
    running.cluster.wait_active()
    assert running.client.is_authenticated()


def test_z_no_method_was_forgotten(running: Running) -> None:
    """The last: what the others called is all that hvac has for what is here."""
    assert running.calls.missing(UNAVAILABLE) == set()


def test_z_control_a_method_that_nobody_calls_is_missed() -> None:
    class Category:
        def called(self) -> None: ...

        def forgotten(self) -> None: ...

    calls = Calls()
    original: Any = Category.called
    with calls.recorded([Category]):
        Category().called()
    assert Category.called is original
    assert calls.missing(()) == {"Category.forgotten"}
    assert calls.missing(("Category.forg",)) == set()
