"""Audit devices, tuning, moving, changes of secrets and looking around on the command line."""

from __future__ import annotations

import base64
import json
import shlex

import pytest
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap_with_padding
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.unit.test_cli import envelope, run, server

__all__ = ["run", "server"]  # fixtures


def versioned(server) -> None:
    found = envelope({"path": "secret/", "type": "kv", "options": {"version": "2"}})
    server.answer("GET", "sys/internal/ui/mounts/secret/a", (200, found))


# --- audit ----------------------------------------------------------------------------------------------------------


def test_audit_devices(server, run):
    server.answer("PUT", "sys/audit/main", (204, None))
    code, out, _ = run("audit", "enable", "-path=main", "-local", "file", "file_path=/var/log/a.log", "mode=0600")
    assert (code, out) == (0, "Success! Enabled the file audit device at: main/\n")
    options = {"file_path": "/var/log/a.log", "mode": "0600"}
    assert server.last["body"] == {"type": "file", "description": "", "local": True, "options": options}
    listed = {"main/": {"type": "file", "description": "d", "local": True, "options": options}}
    server.answer("GET", "sys/audit", (200, envelope(listed) | listed))
    assert run("audit", "list")[1] == "Path     Type    Description\n----     ----    -----------\nmain/    file    d\n"
    assert "local          file_path=/var/log/a.log mode=0600" in run("audit", "list", "-detailed")[1]
    assert json.loads(run("audit", "list", "-format=json")[1]) == listed
    server.answer("DELETE", "sys/audit/main", (204, None))
    assert run("audit", "disable", "main/")[0] == 0
    server.answer("GET", "sys/audit", (200, envelope({})))
    assert run("audit", "list")[::2] == (2, "No audit devices are enabled.\n")


# --- tune and move --------------------------------------------------------------------------------------------------


def test_tune(server, run):
    server.answer("POST", "sys/mounts/kv/tune", (204, None))
    code, out, _ = run(
        "secrets", "tune", "-default-lease-ttl=1h", "-options=a=b", "-version=2",
        "-audit-non-hmac-request-keys=x", "-audit-non-hmac-request-keys=y", "kv/",
    )  # fmt: skip
    assert (code, out) == (0, "Success! Tuned the secrets engine at: kv/\n")
    assert server.last["body"] == {
        "default_lease_ttl": "1h",
        "options": {"a": "b", "version": "2"},
        "audit_non_hmac_request_keys": ["x", "y"],
    }
    server.answer("POST", "sys/auth/approle/tune", (204, None))
    assert run("auth", "tune", "-token-type=batch", "approle")[0] == 0
    assert server.last["body"] == {"token_type": "batch"}
    assert run("secrets", "tune", "-options=bad", "kv")[0] == 1


@pytest.mark.parametrize(("end", "code"), [("success", 0), ("failure", 2)])
def test_move_waits_for_its_end(server, run, monkeypatch, end, code):
    monkeypatch.setattr("sidecar.cli.tuning._POLL_S", 0)
    server.answer("POST", "sys/remount", (200, envelope({"migration_id": "m-1"})))
    states = [(200, envelope({"migration_info": {"status": status}})) for status in ("in-progress", end)]
    server.answer("GET", "sys/remount/status/m-1", *states)
    assert run("auth", "move", "userpass", "people")[0] == code
    assert server.requests[0]["body"] == {"from": "auth/userpass", "to": "auth/people"}
    assert len(server.requests) == 3


# --- kv -------------------------------------------------------------------------------------------------------------


def test_kv_patch(server, run):
    versioned(server)
    server.answer("PATCH", "secret/data/a", (200, envelope({"version": 3})))
    code, out, _ = run("kv", "patch", "-cas=2", "secret/a", "x=1")
    assert (code, server.last["body"]) == (0, {"data": {"x": "1"}, "options": {"cas": 2}})
    assert server.last["headers"]["Content-Type"] == "application/merge-patch+json"
    assert "version    3" in out
    assert run("kv", "patch", "secret/a")[0] == 1


def test_kv_rollback_writes_only_over_what_it_saw(server, run):
    versioned(server)
    newest = envelope({"data": {"x": "new"}, "metadata": {"version": 5}})
    old = envelope({"data": {"x": "old"}, "metadata": {"version": 2}})
    server.answer("GET", "secret/data/a", (200, newest), (200, old))
    server.answer("PUT", "secret/data/a", (200, envelope({"version": 6})))
    assert run("kv", "rollback", "-version=2", "secret/a")[0] == 0
    assert server.requests[-2]["query"] == {"version": ["2"]}
    assert server.last["body"] == {"data": {"x": "old"}, "options": {"cas": 5}}
    gone = envelope({"data": None, "metadata": {"version": 2}})
    server.answer("GET", "secret/data/a", (200, newest), (200, gone))
    assert run("kv", "rollback", "-version=2", "secret/a")[0] == 2
    assert run("kv", "rollback", "secret/a")[0] == 1


def test_kv_metadata_put_and_versioning(server, run):
    versioned(server)
    server.answer("PUT", "secret/metadata/a", (204, None))
    code, _, _ = run(
        "kv", "metadata", "put", "-max-versions=3", "-cas-required", "-delete-version-after=1h",
        "-custom-metadata=owner=me", "secret/a",
    )  # fmt: skip
    assert (code, server.last["body"]) == (
        0,
        {"max_versions": 3, "cas_required": True, "delete_version_after": "1h", "custom_metadata": {"owner": "me"}},
    )
    server.answer("POST", "sys/mounts/secret/tune", (204, None))
    assert run("kv", "enable-versioning", "secret")[0] == 0
    assert server.last["body"] == {"options": {"version": "2"}}


# --- looking --------------------------------------------------------------------------------------------------------


def test_capabilities(server, run):
    server.answer("POST", "sys/capabilities-self", (200, envelope() | {"capabilities": ["update", "read"]}))
    assert run("token", "capabilities", "secret/a")[1] == "read, update\n"
    assert server.last["body"] == {"paths": ["secret/a"]}
    server.answer("POST", "sys/capabilities", (200, envelope({"secret/a": ["deny"]})))
    assert run("token", "capabilities", "other", "secret/a")[1] == "deny\n"
    assert server.last["body"] == {"token": "other", "paths": ["secret/a"]}


def test_help_of_a_path_plugins_and_the_token(server, run):
    server.answer("GET", "secret/a", (200, {"help": "Reads.\n", "see_also": None}))
    assert run("path-help", "secret/a")[1] == "Reads.\n"
    assert server.last["query"] == {"help": ["1"]}
    server.answer("GET", "sys/plugins/catalog", (200, envelope({"auth": ["approle"], "secret": ["kv"]})))
    assert run("plugin", "list", "auth")[1].splitlines()[-1] == "approle    auth"
    assert run("plugin", "list")[1].splitlines()[-1] == "kv         secret"
    assert run("print", "token")[1] == "t0ken\n"


def test_monitor_prints_lines_as_they_come(server, run):
    server.answer("GET", "sys/monitor", (200, {"line": 1}))
    assert run("monitor", "-log-level=debug")[:2] == (0, '{"line": 1}')
    assert server.last["query"] == {"log_level": ["debug"], "log_format": ["standard"]}
    server.answer("GET", "sys/monitor", (400, {"errors": ["unknown log level"]}))
    code, _, err = run("monitor", "-log-level=x")
    assert (code, "unknown log level" in err) == (2, True)


def test_metadata_is_patched(server, run):
    versioned(server)
    server.answer("PATCH", "secret/metadata/a", (204, None))
    code, out, _ = run(
        "kv", "metadata", "patch", "-max-versions=3", "-custom-metadata=owner=me", "-remove-custom-metadata=old",
        "secret/a",
    )  # fmt: skip
    assert (code, out) == (0, "Success! Data written to: secret/metadata/a\n")
    assert server.last["body"] == {"max_versions": 3, "custom_metadata": {"old": None, "owner": "me"}}
    assert server.last["headers"]["Content-Type"] == "application/merge-patch+json"


def test_patch_at_any_path(server, run):
    server.answer("PATCH", "some/thing", (204, None))
    assert run("patch", "some/thing", "a=b")[:2] == (0, "Success! Data written to: some/thing\n")
    assert (server.last["method"], server.last["body"]) == ("PATCH", {"a": "b"})
    assert run("patch", "some/thing")[0] == 1


def test_mounts_in_detail(server, run):
    mount = {
        "type": "kv", "accessor": "kv_1", "description": "", "local": True, "options": {"version": "2"}, "uuid": "u-1",
        "config": {"default_lease_ttl": 60, "max_lease_ttl": 0, "force_no_cache": False, "token_type": "batch"},
        "running_plugin_version": "v1", "deprecation_status": "supported",
    }  # fmt: skip
    server.answer("GET", "sys/mounts", (200, envelope({"kv/": mount})))
    lines = run("secrets", "list", "-detailed")[1].splitlines()
    assert lines[0].split("    ")[:3] == ["Path", "Plugin", "Accessor"]
    assert lines[2].split() == (
        ["kv/", "kv", "kv_1", "60", "system", "false", "local", "map[version=2]", "n/a", "u-1", "v1", "supported"]
    )
    server.answer("GET", "sys/auth", (200, envelope({"a/": mount})))
    header, _, row = run("auth", "list", "-detailed")[1].splitlines()
    assert ("Token Type" in header, row.split()[5]) == (True, "batch")


def test_what_is_known_of_a_plugin_and_of_versions(server, run):
    server.answer("GET", "sys/plugins/catalog/secret/kv", (200, envelope({"name": "kv", "builtin": True})))
    assert run("plugin", "info", "secret", "kv")[1].splitlines()[2:] == ["builtin    true", "name       kv"]
    server.answer("GET", "sys/plugins/catalog/secret/no", (404, {"errors": []}))
    assert run("plugin", "info", "secret", "no")[0] == 2
    history = {"keys": ["1.0"], "key_info": {"1.0": {"timestamp_installed": "2024-01-02T00:00:00Z"}}}
    server.answer("GET", "sys/version-history", (200, envelope(history)))
    assert run("version-history")[1].splitlines()[-1] == "1.0        2024-01-02T00:00:00Z    n/a"


def test_a_key_is_wrapped_for_the_engine_alone(server, run, tmp_path):
    private = rsa.generate_private_key(public_exponent=65537, key_size=4096)
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    server.answer("GET", "transit/wrapping_key", (200, envelope({"public_key": public})))
    server.answer("POST", "transit/keys/mine/import", (204, None))
    key = bytes(range(32))
    (tmp_path / "key").write_text(base64.b64encode(key).decode() + "\n")
    code, out, _ = run("transit", "import", "transit/keys/mine", f"@{tmp_path / 'key'}", "type=aes256-gcm96")
    assert (code, out) == (0, "Success! Imported the key to: transit/keys/mine\n")
    body = server.last["body"]
    assert (body["type"], body["hash_function"]) == ("aes256-gcm96", "SHA256")
    raw = base64.b64decode(body["ciphertext"])
    ephemeral = private.decrypt(raw[:512], padding.OAEP(padding.MGF1(SHA256()), SHA256(), None))
    assert aes_key_unwrap_with_padding(ephemeral, raw[512:]) == key
    for wrong in (("transit/mine", "aGk="), ("transit/keys/mine", "not base64!"), ("transit/keys/mine", "@/nowhere")):
        assert run("transit", "import", *wrong)[0] == 1
    server.answer("POST", "transit/keys/mine/import_version", (204, None))
    assert run("transit", "import-version", "transit/keys/mine", base64.b64encode(key).decode())[0] == 0


# --- flags of every command -----------------------------------------------------------------------------------------


def test_a_request_can_be_shown_as_curl(server, run):
    versioned(server)
    code, out, _ = run("kv", "put", "-output-curl-string", "-header=X-Trace=a b", "secret/a", "x=it's")
    assert code == 0
    assert [request["path"] for request in server.requests] == ["sys/internal/ui/mounts/secret/a"], (
        "nothing was written"
    )
    words = shlex.split(out)
    assert words[:3] == ["curl", "-X", "PUT"]
    assert words[-1].endswith("/v1/secret/data/a")
    assert json.loads(words[words.index("-d") + 1]) == {"data": {"x": "it's"}, "options": {}}
    assert "X-Vault-Token: $(outrider print token)" in out
    assert "t0ken" not in out
    assert "X-Trace: a b" in words


def test_headers_of_ones_own(server, run):
    server.answer("GET", "some/thing", (200, envelope({"a": 1})))
    assert run("read", "-header=X-Trace=1", "-header", "X-Other=a=b", "some/thing")[0] == 0
    assert (server.last["headers"]["X-Trace"], server.last["headers"]["X-Other"]) == ("1", "a=b")
    for wrong in ("nothing", "=x", "X-Vault-Token=t"):
        assert run("read", f"-header={wrong}", "some/thing")[0] == 1


def test_mounts_with_settings(server, run):
    server.answer("POST", "sys/mounts/kv", (204, None))
    code, _, _ = run(
        "secrets", "enable", "-options=a=b", "-listing-visibility=unauth", "-audit-non-hmac-request-keys=x",
        "-passthrough-request-headers=X-A", "-seal-wrap", "-force-no-cache", "kv-v2",
    )  # fmt: skip
    assert code == 0
    assert server.requests[-1]["path"] == "sys/mounts/kv"
    body = server.last["body"]
    assert (body["options"], body["seal_wrap"]) == ({"version": "2", "a": "b"}, True)
    assert body["config"] == {
        "listing_visibility": "unauth",
        "audit_non_hmac_request_keys": ["x"],
        "passthrough_request_headers": ["X-A"],
        "force_no_cache": True,
    }
    server.answer("POST", "sys/auth/approle", (204, None))
    assert run("auth", "enable", "-token-type=batch", "approle")[0] == 0
    assert server.last["body"]["config"] == {"token_type": "batch"}
    assert run("secrets", "enable", "-options=bad", "kv")[0] == 1
