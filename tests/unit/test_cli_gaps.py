"""Commands and flags of Vault's command line that came late: policy fmt, -output-policy, usage, help, reload."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import shutil
import socketserver
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from sidecar import config, hcl
from sidecar.cli import elsewhere, registry
from sidecar.cli import server as server_command
from sidecar.cli.client import ClientOptions, LocalError, _tls_context
from sidecar.cli.policy_text import SUDO_PATHS, SUDO_TO_LIST, needs_sudo, policy_for
from sidecar.dev_tls import dev_certificates
from sidecar.request.route_table import RouteBackend
from tests.support.service_node import running
from tests.unit.test_cli import envelope, run, server

__all__ = ["run", "server"]  # fixtures


# --- policy fmt -----------------------------------------------------------------------------------------------------


def test_a_policy_file_is_laid_out(run, tmp_path):
    path = tmp_path / "p.hcl"
    path.write_text('path "a/*" {\ncapabilities=["read" ,"list"]\n}')
    path.chmod(0o640)
    code, out, _ = run("policy", "fmt", str(path))
    assert (code, out) == (0, f"Success! Formatted policy: {path}\n")
    assert path.read_text() == 'path "a/*" {\n  capabilities = ["read", "list"]\n}\n'
    assert path.stat().st_mode & 0o777 == 0o640
    before = path.stat().st_ino
    assert run("policy", "fmt", str(path))[0] == 0
    assert path.stat().st_ino == before, "nothing to change, nothing written"
    link = tmp_path / "link.hcl"
    path.write_text("a=1")
    link.symlink_to(path)
    assert run("policy", "fmt", str(link))[0] == 0
    assert (link.is_symlink(), path.read_text()) == (True, "a = 1\n")
    assert sorted(os.listdir(tmp_path)) == ["link.hcl", "p.hcl"]


def test_what_is_no_policy_file_stays_as_it_is(run, tmp_path):
    path = tmp_path / "p.hcl"
    path.write_text('path "a" {\n')
    code, _, err = run("policy", "fmt", str(path))
    assert (code, err) == (
        1,
        f"Error formatting policy: {path}:2:1: expected a name, found the end of the file\n",
    )
    assert path.read_text() == 'path "a" {\n'
    path.write_bytes(b"\xff")
    assert "it is not UTF-8 text" in run("policy", "fmt", str(path))[2]
    assert "No such file" in run("policy", "fmt", str(tmp_path / "none"))[2]
    assert run("policy", "fmt")[0] == 1


# --- -output-policy -------------------------------------------------------------------------------------------------


def test_the_policy_that_a_request_needs(server, run):
    for words, path, capabilities in (
        (("read", "secret/a"), "secret/a", ["read"]),
        (("list", "secret/"), "secret", ["list"]),
        (("write", "secret/a", "x=y"), "secret/a", ["create", "update"]),
        (("delete", "secret/a"), "secret/a", ["delete"]),
        (("patch", "secret/a", "x=y"), "secret/a", ["patch"]),
        (("audit", "list"), "sys/audit", ["read", "sudo"]),
        (("operator", "rotate"), "sys/rotate", ["create", "update", "sudo"]),
        (("token", "create"), "auth/token/create", ["create", "update"]),
        (("read", 'od"d'), 'od"d', ["read"]),
    ):
        code, out, _ = run(*words[:1], *words[1:], "-output-policy")
        assert code == 0, words
        (block,) = hcl.parse(out).blocks
        assert (block.type, block.labels) == ("path", (path,))
        assert block.body.attributes["capabilities"].value == capabilities
    assert [one for one in server.requests if not one["path"].startswith("sys/internal/ui/mounts")] == []


async def test_the_paths_that_take_sudo_are_the_servers(run):
    async with running() as node:
        for mount, backend in node.service.mounts.router.items():
            if not isinstance(backend, RouteBackend):
                continue
            for route in backend._routes:
                path = mount + route.template.replace("*}", "}").replace("{mode}", "performance")
                for lists in (False, True):
                    expected = route.sudo or (lists and route.sudo_list)
                    assert needs_sudo(path, lists=lists) == expected, path
    assert len(set(SUDO_PATHS) | set(SUDO_TO_LIST)) == len(SUDO_PATHS) + len(SUDO_TO_LIST)
    assert policy_for("GET", "sys/leases/lookup", lists=True).count("sudo") == 1


# --- usage, help, reload, and what there is not ---------------------------------------------------------------------


def test_usage_says_that_nothing_is_recorded(server, run):
    server.answer("GET", "sys/internal/counters/activity", (204, None))
    code, out, err = run("operator", "usage", "-start-time=2026-01", "-end-time=2026-02-01T00:00:00Z")
    assert (code, out) == (0, "")
    assert "No data is available" in err
    assert server.last["query"] == {"start_time": ["2026-01-01T00:00:00Z"], "end_time": ["2026-02-01T00:00:00Z"]}
    total = {"clients": 5, "entity_clients": 2}
    server.answer("GET", "sys/internal/counters/activity", (200, envelope({"total": total})))
    assert "clients           5" in run("operator", "usage")[1], "another server's"


def test_help_of_an_auth_method_by_path_or_type(server, run):
    mounts = {"staff/": {"type": "userpass"}, "token/": {"type": "token"}}
    server.answer("GET", "sys/auth", (200, envelope(mounts) | mounts))
    server.answer("GET", "auth/staff/", (200, {"help": "how to log in\n"}))
    for word in ("staff", "staff/", "userpass"):
        assert run("auth", "help", word)[::2] == (0, "")
        assert server.last["query"] == {"help": ["1"]}
    assert run("auth", "help", "userpass")[1] == "how to log in\n"
    assert run("auth", "help", "ldap")[::2] == (2, "Error: there is no auth method at or of type ldap\n")


def test_engines_are_loaded_anew(server, run):
    server.answer("PUT", "sys/plugins/reload/backend", (200, envelope({"reload_id": "r"})))
    server.answer("PUT", "sys/plugins/reload/secret/kv", (200, envelope({"reload_id": "r"})))
    assert run("plugin", "reload", "-plugin=kv")[:2] == (0, "Success! Reloaded: kv\n")
    assert server.last["body"] == {"plugin": "kv"}
    assert run("plugin", "reload", "-mounts=a/,b/", "-mounts=c/")[:2] == (0, "Success! Reloaded: a/, b/, c/\n")
    assert server.last["body"] == {"mounts": ["a/", "b/", "c/"]}
    assert json.loads(run("plugin", "reload", "-format=json", "secret", "kv")[1]) == {"reload_id": "r"}
    assert run("plugin", "reload")[0] == 1
    assert run("plugin", "reload", "-plugin=kv", "-mounts=a/")[0] == 1


@pytest.mark.parametrize("words", elsewhere.COMMANDS)
def test_commands_that_there_are_not_say_what_to_do_instead(run, words):
    code, _, err = run(*words, "x")
    assert code == 1
    assert "is not available: " in err
    assert words not in registry.COMMANDS
    assert run("nosuch")[0] == run("operator", "nosuch")[0] == 127


def test_the_log_file_of_the_configuration_and_that_of_the_command_line(run, monkeypatch, tmp_path):
    written = []
    application = type(sys)("sidecar.app")

    def run_server(_settings, _dev, _paths, opened):
        for one in itertools.chain(*opened):
            one.close()
        return 0

    application.run_server = run_server
    monkeypatch.setitem(sys.modules, "sidecar.app", application)
    monkeypatch.setattr(server_command, "_log_to", written.append)
    (tmp_path / "a.hcl").write_text(
        f'log_file = "{tmp_path}/a.log"\nlog_rotate_max_files = 3\nstorage "inmem" {{}}\n'
        'listener "tcp" { address = "127.0.0.1:0"\n tls_disable = true }'
    )
    assert run("server", f"-config={tmp_path}/a.hcl")[0] == 0
    assert run("server", f"-config={tmp_path}/a.hcl", "-log-file=/b.log")[0] == 0
    rotated = ("-log-rotate-duration=90m", "-log-rotate-bytes", "4096", "-log-rotate-max-files=-1")
    assert run("server", f"-config={tmp_path}/a.hcl", *rotated)[0] == 0
    assert written == [
        config.LogFileSettings(f"{tmp_path}/a.log", rotate_max_files=3),
        config.LogFileSettings("/b.log", rotate_max_files=3),
        config.LogFileSettings(f"{tmp_path}/a.log", rotate_duration_s=5400.0, rotate_bytes=4096, rotate_max_files=-1),
    ]
    assert run("server", f"-config={tmp_path}/a.hcl", "-log-rotate-duration=soon")[0] == 1


def test_dev_flags_turn_dev_on_and_its_certificates_go_with_the_server(run, monkeypatch, tmp_path):
    seen = []
    application = type(sys)("sidecar.app")

    def run_server(settings, dev, _paths, opened):
        for one in itertools.chain(*opened):
            one.close()
        made = [dev.tls_ca_file, dev.tls_cert_file, dev.tls_key_file]
        seen.append((settings.api_addr, settings.listeners[0].tls_disable, [Path(name).exists() for name in made], dev))
        return 0

    application.run_server = run_server
    monkeypatch.setitem(sys.modules, "sidecar.app", application)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    anywhere = "-dev-listen-address=127.0.0.1:0"
    folder = tmp_path / "certificates"
    assert run("server", "-dev-tls", anywhere, f"-dev-tls-cert-dir={folder}")[0] == 1, "it must be there"
    folder.mkdir()
    assert run("server", "-dev-tls", anywhere, f"-dev-tls-cert-dir={folder}", "-dev-tls-san=a.test,b.test")[0] == 0
    assert run("server", "-dev", "-dev-tls", anywhere)[0] == 0
    for address, without_tls, there, dev in seen:
        assert (address, without_tls, there) == ("https://127.0.0.1:0", False, [True, True, True])
        assert Path(dev.tls_ca_file).name == "vault-ca.pem"
        assert not Path(dev.tls_ca_file).exists()
    assert [entry.name for entry in folder.iterdir()] == [], "a directory that was given stays"
    assert list((tmp_path / "tmp").iterdir()) == []
    assert run("server", "-dev-kv-v1", anywhere)[0] == 0
    assert (seen[-1][1], seen[-1][3].kv_version) == (True, "1")
    code, _, err = run("server", "-dev-tls", anywhere, "-dev-tls-san=b\u00fccher")
    assert code == 1
    assert "-dev-tls-san: " in err


def test_a_server_is_reached_over_its_unix_socket(run, monkeypatch, tmp_path):
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers["Host"], self.headers["X-Vault-Token"]))
            body = json.dumps(envelope({"a": "b"})).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    path = tmp_path / "o.sock"
    with socketserver.UnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            monkeypatch.setenv("VAULT_TOKEN", "t")
            assert run("read", f"-address=unix://{path}", "-field=a", "secret/x")[:2] == (0, "b")
            monkeypatch.setenv("VAULT_ADDR", f"unix://{path}")
            assert run("read", "-field=a", "secret/x")[0] == 0
            curl = run("read", "-output-curl-string", "secret/x")[1]
        finally:
            server.shutdown()
            thread.join()
    assert seen == [("/v1/secret/x", "localhost", "t")] * 2
    assert f"--unix-socket {path} " in curl
    assert "http://localhost/v1/secret/x" in curl
    code, _, err = run("read", "secret/x")
    assert code == 2
    assert "connection refused" in err
    code, _, err = run("read", f"-address=unix://{tmp_path}/none", "secret/x")
    assert "No such file" in err


def test_a_directory_of_authorities_may_name_its_files_as_it_likes(tmp_path):
    """As in Vault; OpenSSL alone would look for names made of hashes."""
    folder = tmp_path / "cas"
    folder.mkdir()
    with pytest.raises(LocalError, match="no certificate in"):
        _tls_context(ClientOptions(address="https://127.0.0.1:1", ca_path=str(folder)))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with dev_certificates(str(tmp_path / name), []) as made:
            shutil.copy(made.ca, folder / f"{name}.crt")
    context = _tls_context(ClientOptions(address="https://127.0.0.1:1", ca_path=str(folder)))
    assert context.cert_store_stats()["x509_ca"] == 2
    one = _tls_context(
        ClientOptions(address="https://127.0.0.1:1", ca_path=str(folder), ca_file=str(folder / "one.crt"))
    )
    assert one.cert_store_stats()["x509_ca"] == 1


# --- flags ----------------------------------------------------------------------------------------------------------


def test_capabilities_by_accessor(server, run):
    server.answer("POST", "sys/capabilities-accessor", (200, envelope({"a": ["read"]}) | {"capabilities": ["read"]}))
    assert run("token", "capabilities", "-accessor", "acc", "a")[:2] == (0, "read\n")
    assert server.last["body"] == {"accessor": "acc", "paths": ["a"]}
    assert run("token", "capabilities", "-accessor", "a")[0] == 1


def test_lockout_is_tuned(server, run):
    server.answer("POST", "sys/auth/userpass/tune", (204, None))
    words = ("-user-lockout-threshold=3", "-user-lockout-duration=5m", "-user-lockout-disable=false")
    assert run("auth", "tune", *words, "-user-lockout-counter-reset-duration=1m", "userpass/")[0] == 0
    assert server.last["body"] == {
        "user_lockout_config": {
            "lockout_threshold": "3",
            "lockout_duration": "5m",
            "lockout_disable": "false",
            "lockout_counter_reset_duration": "1m",
        }
    }


async def test_what_the_command_sends_about_lockout_the_server_takes():
    async with running() as node:
        assert (await node.call("POST", "sys/auth/userpass", {"type": "userpass"})).status == 204
        body = {"lockout_threshold": "3", "lockout_duration": "5m", "lockout_disable": "false"}
        tuned = await node.call("POST", "sys/auth/userpass/tune", {"user_lockout_config": body})
        assert tuned.status == 204
        shown = (await node.call("GET", "sys/auth/userpass/tune")).data
        assert (shown["user_lockout_threshold"], shown["user_lockout_duration"]) == (3, 300)


def test_mounts_by_the_name_of_a_plugin(server, run):
    server.answer("POST", "sys/mounts/kv", (204, None))
    assert run("secrets", "enable", "-plugin-name=kv", "-external-entropy-access", "plugin")[0] == 0
    assert (server.last["body"]["type"], server.last["body"]["external_entropy_access"]) == ("kv", True)
    assert run("secrets", "enable")[0] == 1


def test_plugins_and_names_in_detail(server, run):
    one = {"name": "kv", "type": "secret", "version": "v1", "deprecation_status": "supported", "builtin": True}
    server.answer("GET", "sys/plugins/catalog", (200, envelope({"secret": ["kv"], "auth": [], "detailed": [one]})))
    assert "kv      secret    v1         supported" in run("plugin", "list", "-detailed", "secret")[1]
    info = {"a": {"ttl": 1, "type": "x"}, "b": {}}
    server.answer("GET", "some/path", (200, envelope({"keys": ["a", "b"], "key_info": info})))
    lines = run("list", "-detailed", "some/path")[1].splitlines()
    assert [line.split() for line in lines[2:]] == [["a", "1", "x"], ["b", "n/a", "n/a"]]
    assert run("list", "some/path")[1].split() == ["Keys", "----", "a", "b"]


def secret(server, path="secret/data/a"):
    mount = envelope({"path": "secret/", "type": "kv", "options": {"version": "2"}})
    server.answer("GET", "sys/internal/ui/mounts/secret/a", (200, mount))
    old = {"data": {"x": "1", "y": "2"}, "metadata": {"version": 4}}
    server.answer("GET", path, (200, envelope(old)))
    server.answer("PUT", path, (200, envelope({"version": 5})))
    server.answer("PATCH", path, (200, envelope({"version": 5})))


def test_a_secret_is_patched_by_either_method(server, run):
    secret(server)
    assert run("kv", "patch", "-remove-data=y", "secret/a", "z=3")[0] == 0
    assert (server.last["method"], server.last["body"]) == ("PATCH", {"data": {"z": "3", "y": None}, "options": {}})
    assert run("kv", "patch", "-method=rw", "-remove-data=y", "secret/a", "z=3")[0] == 0
    assert server.last["method"] == "PUT"
    assert server.last["body"] == {"data": {"x": "1", "z": "3"}, "options": {"cas": 4}}
    server.answer("PATCH", "secret/data/a", (405, {"errors": []}))
    assert run("kv", "patch", "secret/a", "z=3")[0] == 0
    assert server.last["body"] == {"data": {"x": "1", "y": "2", "z": "3"}, "options": {"cas": 4}}
    assert run("kv", "patch", "-method=patch", "secret/a", "z=3")[0] == 2
    assert run("kv", "patch", "-method=both", "secret/a", "z=3")[0] == 1
    assert run("kv", "patch", "secret/a")[0] == 1
    server.answer("PATCH", "secret/data/a", (403, {"errors": ["permission denied"]}))
    assert run("kv", "patch", "secret/a", "z=3")[0] == 2
    assert server.last["method"] == "PATCH", "nothing is written by another way than asked for"
