"""Key ceremonies, tokens, unwrap and versions on the command line: requests made, output, exit codes."""

from __future__ import annotations

import io
import json

import pytest

from tests.unit.test_cli import envelope, mount, run, server

__all__ = ["run", "server"]  # fixtures

IDLE = {"nonce": "", "started": False, "t": 0, "n": 0, "progress": 0, "required": 2, "verification_required": False}
STARTED = IDLE | {"nonce": "n-1", "started": True, "t": 3, "n": 5}


# --- rekey ----------------------------------------------------------------------------------------------------------


def test_rekey_of_recovery_shares_under_pgp_keys(server, run, tmp_path):
    (tmp_path / "k").write_bytes(b"\x99key")
    server.answer("PUT", "sys/rekey-recovery-key/init", (200, STARTED))
    run("operator", "rekey", "-target=recovery", "-init", "-n=1", "-t=1", f"-pgp-keys={tmp_path / 'k'}", "-backup")
    assert server.last["body"] == {
        "secret_shares": 1,
        "secret_threshold": 1,
        "require_verification": False,
        "pgp_keys": ["mWtleQ=="],
        "backup": True,
    }
    server.answer(
        "GET", "sys/rekey/recovery-key-backup", (200, {"data": {"nonce": "n-1", "keys_base64": {"fp": ["qg=="]}}})
    )
    code, out, _ = run("operator", "rekey", "-target=recovery", "-backup-retrieve")
    assert (code, "qg==" in out) == (0, True)
    server.answer("DELETE", "sys/rekey/backup", (204, None))
    assert run("operator", "rekey", "-backup-delete")[0] == 0
    server.answer("DELETE", "sys/rekey/init", (204, None))
    run("operator", "rekey", "-cancel", "-nonce=n-1")
    assert server.last["body"] == {"nonce": "n-1"}
    assert run("operator", "rekey", "-target=other", "-init")[0] == 1


def test_rekey_from_start_to_end(server, run):
    server.answer("PUT", "sys/rekey/init", (200, STARTED))
    code, out, _ = run("operator", "rekey", "-init", "-key-shares=5", "-t=3")
    assert (code, server.last["body"]) == (
        0,
        {"secret_shares": 5, "secret_threshold": 3, "require_verification": False},
    )
    assert "Nonce                    n-1\nStarted                  true\nRekey Progress           0/2\n" in out
    assert "X-Vault-Token" not in server.last["headers"]
    server.answer("GET", "sys/rekey/init", (200, STARTED))
    server.answer("PUT", "sys/rekey/update", (200, STARTED | {"progress": 1}))
    code, out, _ = run("operator", "rekey", "share-1")
    assert (code, server.last["body"]) == (0, {"key": "share-1", "nonce": "n-1"})
    assert "Rekey Progress           1/2\n" in out
    done = {"nonce": "n-1", "complete": True, "keys": ["aa"], "keys_base64": ["qg=="], "verification_required": False}
    server.answer("PUT", "sys/rekey/update", (200, done))
    code, out, _ = run("operator", "rekey", "-nonce=mine", "share-2")
    assert (code, server.last["body"]["nonce"]) == (0, "mine")
    assert out.startswith("Key 1: qg==\n\nOperation nonce: n-1\n")
    assert "replace all\nshares of before" in out
    assert json.loads(run("operator", "rekey", "-format=json", "share-2")[1])["keys_base64"] == ["qg=="]


def test_rekey_with_verification(server, run, monkeypatch):
    server.answer("GET", "sys/rekey/init", (200, STARTED | {"verification_required": True}))
    done = {"complete": True, "keys_base64": ["qg=="], "verification_required": True, "verification_nonce": "v-1"}
    server.answer("PUT", "sys/rekey/update", (200, done))
    monkeypatch.setattr("sys.stdin", io.StringIO("share\n"))
    out = run("operator", "rekey")[1]
    assert server.last["body"]["key"] == "share"
    assert "NOT in force yet" in out
    assert "-verify -nonce=v-1" in out
    state = {"nonce": "v-1", "started": True, "t": 2, "n": 3, "progress": 0}
    server.answer("GET", "sys/rekey/verify", (200, state))
    server.answer("PUT", "sys/rekey/verify", (200, state | {"progress": 1}), (200, {"nonce": "v-1", "complete": True}))
    assert "Rekey Progress    1/2\n" in run("operator", "rekey", "-verify", "new-1")[1]
    assert server.last["body"] == {"key": "new-1", "nonce": "v-1"}
    assert (
        run("operator", "rekey", "-verify", "new-2")[1] == "Success! Rekey verified: the new key shares are in force.\n"
    )
    server.answer("DELETE", "sys/rekey/verify", (200, state))
    assert run("operator", "rekey", "-verify", "-cancel")[0] == 0


def test_rekey_status_cancel_and_mistakes(server, run):
    server.answer("GET", "sys/rekey/init", (200, IDLE))
    server.answer("DELETE", "sys/rekey/init", (204, None))
    assert (
        run("operator", "rekey", "-status")[1]
        == "Key        Value\n---        -----\nNonce      n/a\nStarted    false\n"
    )
    assert run("operator", "rekey", "-cancel")[1] == "Success! Canceled rekeying (if it was started)\n"
    code, _, err = run("operator", "rekey", "share")
    assert (code, err) == (2, "No rekey is in progress; start one with -init\n")
    assert run("operator", "rekey", "-init", "-cancel")[0] == 1
    server.answer("GET", "sys/rekey/init", (200, STARTED))
    server.answer("PUT", "sys/rekey/update", (400, {"errors": ["incorrect nonce"]}))
    code, _, err = run("operator", "rekey", "s3cret-share")
    assert code == 2
    assert "incorrect nonce" in err
    assert "s3cret-share" not in err
    unsure = {"complete": True, "keys_base64": ["qg=="], "warnings": ["keep both"]}
    server.answer("PUT", "sys/rekey/update", (200, unsure))
    code, out, err = run("operator", "rekey", "share")
    assert (code, "keep both" in err, "qg==" in out) == (0, True, True)


# --- generate-root --------------------------------------------------------------------------------------------------

ATTEMPT = {
    "nonce": "g-1",
    "started": True,
    "progress": 0,
    "required": 2,
    "complete": False,
    "otp": "",
    "otp_length": 28,
}


def test_generate_root(server, run):
    server.answer("PUT", "sys/generate-root/attempt", (200, ATTEMPT | {"otp": "x" * 28}))
    code, out, _ = run("operator", "generate-root", "-init")
    assert (code, server.last["body"]) == (0, {})
    assert f"OTP           {'x' * 28}\n" in out
    run("operator", "generate-root", "-init", "-otp=mine")
    assert server.last["body"] == {"otp": "mine"}
    server.answer("GET", "sys/generate-root/attempt", (200, ATTEMPT))
    otp = run("operator", "generate-root", "-generate-otp")[1].strip()
    assert (len(otp), otp.isalnum()) == (28, True)
    assert "Progress      0/2\n" in run("operator", "generate-root", "-status")[1]
    done = ATTEMPT | {"progress": 2, "complete": True, "encoded_token": "abc", "otp_length": 0}
    server.answer("PUT", "sys/generate-root/update", (200, done))
    code, out, _ = run("operator", "generate-root", "share")
    assert (code, server.last["body"]) == (0, {"key": "share", "nonce": "g-1"})
    assert "Complete         true\nEncoded Token    abc\n" in out
    server.answer("DELETE", "sys/generate-root/attempt", (204, None))
    assert run("operator", "generate-root", "-cancel")[0] == 0
    server.answer("GET", "sys/generate-root/attempt", (200, ATTEMPT | {"started": False}))
    assert run("operator", "generate-root", "share")[0] == 2


def test_a_root_token_is_decoded_without_a_server(run):
    encoded, otp = "RlwKIB8PHygYACUYMCwgKC0FJyVcUWAdShA", "5rsHQwJlBoHjInLDnbWa2eXRrt"
    assert run("operator", "generate-root", f"-decode={encoded}", f"-otp={otp}")[:2] == (
        0,
        "s.yhNxUDZomryBllCgpDn48O8d\n",
    )
    for wrong in (("-decode=abc",), (f"-decode={encoded}", "-otp=short"), ("-decode=?", f"-otp={otp}")):
        code, out, err = run("operator", "generate-root", *wrong)
        assert (code, out) == (1, "")
        assert otp not in err


# --- data keys and members ------------------------------------------------------------------------------------------


def test_key_status_and_rotate(server, run):
    data = {"term": 2, "install_time": "2026-01-01T00:00:00Z", "encryptions": 7}
    server.answer("GET", "sys/key-status", (200, envelope(data) | data))
    server.answer("PUT", "sys/rotate", (204, None))
    shown = run("operator", "key-status")[1]
    assert "Key Term            2\n" in shown
    assert "Encryption Count    7\n" in shown
    assert run("operator", "rotate")[1] == f"Success! Rotated key\n\n{shown}"
    assert json.loads(run("operator", "rotate", "-format=json")[1]) == data


def test_members(server, run):
    nodes = [
        {"hostname": "one", "api_address": "https://a:8200", "cluster_address": "https://a:8201", "active_node": True,
         "version": "0.1.0", "last_echo": None},
        {"hostname": "two", "api_address": "https://b:8200", "cluster_address": "https://b:8201", "active_node": False,
         "version": "0.1.0", "last_echo": "then"},
    ]  # fmt: skip
    server.answer("GET", "sys/ha-status", (200, envelope({"nodes": nodes})))
    lines = run("operator", "members")[1].splitlines()
    assert lines[0].split("    ")[0] == "Host Name"
    assert lines[2].split() == ["one", "https://a:8200", "https://a:8201", "true", "0.1.0", "n/a"]
    assert lines[3].split()[-1] == "then"


# --- tokens ---------------------------------------------------------------------------------------------------------

AUTH = {
    "client_token": "hvs.new",
    "accessor": "acc",
    "policies": ["default"],
    "lease_duration": 3600,
    "renewable": True,
}


def test_token_create(server, run):
    for path in ("create", "create-orphan", "create/app"):
        server.answer("POST", f"auth/token/{path}", (200, envelope(auth=AUTH)))
    code, out, _ = run("token", "create")
    assert (code, server.last["body"]) == (0, {"renewable": True, "no_default_policy": False})
    assert out.splitlines()[2] == "token                hvs.new"
    run(
        "token", "create", "-policy=a", "-policy=b,c", "-ttl=1h", "-explicit-max-ttl=2h", "-period=30m", "-use-limit=3",
        "-renewable=false", "-no-default-policy", "-display-name=d", "-metadata=k=v", "-type=batch", "-id=mine",
    )  # fmt: skip
    assert server.last["body"] == {
        "policies": ["a", "b", "c"], "ttl": "1h", "explicit_max_ttl": "2h", "period": "30m", "num_uses": 3,
        "renewable": False, "no_default_policy": True, "display_name": "d", "meta": {"k": "v"}, "type": "batch",
        "id": "mine",
    }  # fmt: skip
    run("token", "create", "-orphan")
    assert server.last["path"] == "auth/token/create-orphan"
    assert run("token", "create", "-role=app", "-field=token")[1] == "hvs.new"
    assert server.last["path"] == "auth/token/create/app"
    assert run("token", "create", "-role=app", "-orphan")[0] == 1
    assert run("token", "create", "-metadata=x")[0] == 1


def test_token_lookup_renew_and_revoke(server, run):
    data = envelope({"id": "hvs.x", "ttl": 60})
    server.answer("GET", "auth/token/lookup-self", (200, data))
    for path in ("lookup", "lookup-accessor"):
        server.answer("POST", f"auth/token/{path}", (200, data))
    assert "id     hvs.x\n" in run("token", "lookup")[1]
    assert run("token", "lookup", "-field=ttl", "hvs.x")[1] == "60"
    assert server.last["body"] == {"token": "hvs.x"}
    run("token", "lookup", "-accessor", "acc")
    assert (server.last["path"], server.last["body"]) == ("auth/token/lookup-accessor", {"accessor": "acc"})
    assert run("token", "lookup", "-accessor")[0] == 1

    server.answer("PUT", "auth/token/renew-self", (200, envelope(auth=AUTH)))
    server.answer("PUT", "auth/token/renew", (200, envelope(auth=AUTH)))
    server.answer("POST", "auth/token/renew-accessor", (200, envelope(auth=AUTH)))
    run("token", "renew")
    assert server.last["body"] == {"increment": "0"}
    run("token", "renew", "-i=1h", "hvs.x")
    assert server.last["body"] == {"increment": "1h", "token": "hvs.x"}
    run("token", "renew", "-accessor", "acc")
    assert server.last["body"] == {"increment": "0", "accessor": "acc"}

    for path in ("revoke", "revoke-self", "revoke-orphan"):
        server.answer("PUT", f"auth/token/{path}", (204, None))
    server.answer("POST", "auth/token/revoke-accessor", (204, None))
    for words, path, body in (
        (("hvs.x",), "revoke", {"token": "hvs.x"}),
        (("-self",), "revoke-self", None),
        (("-mode=orphan", "hvs.x"), "revoke-orphan", {"token": "hvs.x"}),
        (("-accessor", "acc"), "revoke-accessor", {"accessor": "acc"}),
    ):
        assert run("token", "revoke", *words)[:2] == (0, "Success! Revoked token (if it existed)\n")
        assert (server.last["path"], server.last["body"]) == (f"auth/token/{path}", body)
    for words in ((), ("-self", "hvs.x"), ("-mode=path", "x"), ("-accessor", "-mode=orphan", "x")):
        assert run("token", "revoke", *words)[0] == 1


def test_unwrap(server, run, monkeypatch):
    server.answer("PUT", "sys/wrapping/unwrap", (200, envelope({"a": "b"})))
    assert run("unwrap", "-field=a", "hvs.wrapped")[1] == "b"
    assert (server.last["body"], server.last["headers"]["X-Vault-Token"]) == ({"token": "hvs.wrapped"}, "t0ken")
    run("unwrap")
    assert (server.last["body"], server.last["headers"]["X-Vault-Token"]) == ({}, "t0ken")
    monkeypatch.delenv("VAULT_TOKEN")
    run("unwrap", "hvs.wrapped")
    assert (server.last["body"], server.last["headers"]["X-Vault-Token"]) == ({}, "hvs.wrapped")
    assert run("unwrap")[0] == 1


# --- versions of a secret -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["undelete", "destroy"])
def test_kv_versions(server, run, what):
    mount(server, "secret/", "2")
    server.answer("PUT", f"secret/{what}/app/db", (204, None))
    code, out, _ = run("kv", what, "-versions=1,2", "-versions=4", "secret/app/db")
    assert (code, out) == (0, f"Success! Data written to: secret/{what}/app/db\n")
    assert server.last["body"] == {"versions": ["1", "2", "4"]}
    server.requests.clear()
    assert run("kv", what, "secret/app/db")[0] == 1
    assert server.requests == []
    mount(server, "kv/", "")
    assert run("kv", what, "-versions=1", "kv/app/db")[0] == 1


def test_kv_metadata(server, run):
    mount(server, "secret/", "2")
    version = {"created_time": "then", "deletion_time": "", "destroyed": False}
    data = {"max_versions": 0, "current_version": 10, "versions": {"10": version, "9": version | {"destroyed": True}}}
    server.answer("GET", "secret/metadata/app/db", (200, envelope(data)))
    server.answer("DELETE", "secret/metadata/app/db", (204, None))
    code, out, _ = run("kv", "metadata", "get", "secret/app/db")
    assert code == 0
    assert out.startswith("==== Metadata Path ====\nsecret/metadata/app/db\n\n")
    assert out.index("Version 9") < out.index("Version 10"), "by number"
    assert "max_versions       0\n" in out
    assert run("kv", "metadata", "get", "-field=current_version", "secret/app/db")[1] == "10"
    assert json.loads(run("kv", "metadata", "get", "-format=json", "secret/app/db")[1])["data"] == data
    deleted = run("kv", "metadata", "delete", "-mount=secret", "app/db")
    assert deleted[:2] == (0, "Success! Data deleted (if it existed) at: secret/metadata/app/db\n")
    assert run("kv", "metadata", "get", "secret/app/none")[0] == 2
    assert run("kv", "metadata", "explode")[0] == 127


# --- leases ---------------------------------------------------------------------------------------------------------


def test_leases(server, run):
    lease_id = "db/creds/app/abc"
    found = {"id": lease_id, "ttl": 60, "expire_time": "2024-01-01T00:00:00Z", "last_renewal": None, "renewable": True}
    server.answer("PUT", "sys/leases/lookup", (200, envelope(found)))
    code, out, _ = run("lease", "lookup", f"/{lease_id}/")
    assert (code, server.last["body"]) == (0, {"lease_id": lease_id})
    assert "expire_time     2024-01-01T00:00:00Z\n" in out
    assert run("lease", "lookup", "-field=ttl", lease_id)[1].strip() == "60"
    answer = {**envelope(None), "lease_id": lease_id, "lease_duration": 300, "renewable": True}
    server.answer("PUT", "sys/leases/renew", (200, answer))
    code, out, _ = run("lease", "renew", "-increment=5m", lease_id)
    assert (code, server.last["body"]) == (0, {"lease_id": lease_id, "increment": "5m"})
    assert "lease_duration     5m\n" in out
    assert json.loads(run("lease", "renew", "-format=json", lease_id)[1])["lease_duration"] == 300


def test_revoking_leases(server, run):
    for path in ("sys/leases/revoke", "sys/leases/revoke-prefix/db/creds", "sys/leases/revoke-force/db"):
        server.answer("PUT", path, (204, None))
    queued = "All revocation operations queued successfully!\n"
    assert run("lease", "revoke", "db/creds/app/abc")[:2] == (0, queued)
    assert server.last["body"] == {"lease_id": "db/creds/app/abc", "sync": False}
    assert run("lease", "revoke", "-sync", "db/x/abc")[1] == "Success! Revoked lease: db/x/abc\n"
    assert run("lease", "revoke", "-prefix", "db/creds/")[1] == queued
    assert run("lease", "revoke", "-prefix", "-sync", "db/creds/")[1] == (
        "Success! Revoked any leases with prefix: db/creds\n"
    )
    assert run("lease", "revoke", "-f", "-prefix", "db")[1].endswith(
        "Success! Force revoked any leases with prefix: db\n"
    )
    before = len(server.requests)
    for arguments in ((), ("-force", "db"), ("-prefix",), ("a", "b"), ("/",)):
        assert run("lease", "revoke", *arguments)[0] == 1
    assert len(server.requests) == before
