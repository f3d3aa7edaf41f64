"""Audit devices, tuning, moving, changes of secrets and looking around on the command line."""

from __future__ import annotations

import json

import pytest

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
