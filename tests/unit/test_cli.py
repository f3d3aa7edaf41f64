"""The command line against a server of the test that records each request: verbs, bodies, output, exit codes."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from sidecar import config
from sidecar.__main__ import main
from sidecar.cli import client, flags, output, registry, values, yaml
from tests.support.ports import free_port


class Server(ThreadingHTTPServer):
    """Answers from ``answers``: (method, path) → (status, body, headers); the last of several answers stays."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict = {}
        self.requests: list = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, method: str, path: str, *answers) -> None:
        """Each answer is (status, body) or (status, body, headers)."""
        self.answers[method, path] = list(answers)

    @property
    def last(self) -> dict:
        return self.requests[-1]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def _any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        parts = urlsplit(self.path)
        raw = self.rfile.read(length)
        self.server.requests.append({
            "method": self.command, "path": parts.path.removeprefix("/v1/"), "query": parse_qs(parts.query),
            "body": json.loads(raw) if raw else None, "headers": dict(self.headers),
        })  # fmt: skip
        queue = self.server.answers.get((self.command, parts.path.removeprefix("/v1/")), [(404, {"errors": []})])
        status, body, *headers = queue.pop(0) if len(queue) > 1 else queue[0]
        payload = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers[0] if headers else {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = _any

    def log_message(self, *_args) -> None:
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("VAULT_", "OUTRIDER_")):
            monkeypatch.delenv(name)
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VAULT_ADDR", running.address)
    monkeypatch.setenv("VAULT_TOKEN", "t0ken")
    monkeypatch.setattr(client, "ATTEMPT_WAIT_S", (0.0, 0.0))
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def run(capsys):
    def call(*argv: str) -> tuple[int, str, str]:
        code = main(list(argv))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def envelope(data=None, **more) -> dict:
    return {"request_id": "r", "lease_id": "", "renewable": False, "lease_duration": 0, "data": data,
            "wrap_info": None, "warnings": None, "auth": None} | more  # fmt: skip


SEALED = {"type": "shamir", "initialized": True, "sealed": True, "t": 2, "n": 3, "progress": 1, "nonce": "n-1",
          "version": "1.15.0+outrider.0.1.0", "storage_type": "consul"}  # fmt: skip
UNSEALED = SEALED | {"sealed": False, "progress": 0, "nonce": "", "cluster_name": "us-east", "cluster_id": "c-1"}


# --- the program ----------------------------------------------------------------------------------------------------


def test_help_and_unknown_commands(run):
    assert run()[0] == 127
    code, out, err = run("-h")
    assert (code, out) == (0, "")
    assert "replication" in err
    code, _, err = run("statsu")
    assert code == 127
    assert 'unknown command "statsu"; did you mean "status"?' in err
    assert run("operator", "explode")[0] == 127
    assert run("operator")[0] == 1
    assert run("operator", "--help")[0] == 0
    assert run("-version")[1] == run("version")[1] == "Outrider v0.1.0, Vault v1.15.0 compatible\n"


@pytest.mark.parametrize("name", sorted(registry.COMMANDS))
def test_every_command_has_help_that_begins_with_its_name(run, name):
    code, _, err = run(*name, "-h")
    assert code == 0
    assert err.startswith(f"Usage: outrider {' '.join(name)}")
    assert (len(name) == 1) or name[0] in registry.GROUPS


@pytest.mark.parametrize(
    "argv",
    [
        ("status", "extra"),
        ("read",),
        ("read", "-nope", "a"),
        ("read", "-field"),
        ("read", "-format=xml", "a"),
        ("write", "secret/a"),
        ("write", "secret/a", "novalue"),
        ("write", "secret/a", "x=@/does/not/exist"),
        ("write", "-force=perhaps", "secret/a"),
        ("kv", "put", "secret/a"),
        ("kv", "get"),
        ("operator", "init", "-key-shares=many"),
        ("login", "-method=magic"),
        ("login", "-method=userpass", "password=x"),
        ("replication", "secondary-token"),
        ("policy", "write", "p", "/does/not/exist"),
        ("server",),
        ("server", "-config=/does/not/exist"),
    ],
)
def test_usage_errors_are_1_and_reach_no_server(server, run, argv):
    code, out, err = run(*argv)
    assert (code, out) == (1, "")
    assert err
    assert server.requests == []


@pytest.mark.parametrize("name", sorted(name for name in registry.COMMANDS if name != ("server",)))
def test_a_call_imports_neither_the_server_nor_its_libraries(name):
    script = (
        "import sys; sys.stdin.close()\n"
        "from sidecar.__main__ import main\n"
        f"main({[*name, '-address=http://127.0.0.1:9', 'a', 'b=c']!r} if {name!r} != ('version',) else ['version'])\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    unwanted = {"aiohttp", "cryptography", "msgspec", "asyncio", "dataclasses", "consul_backend", "plugin_api"}
    unwanted |= {"sidecar.app", "sidecar.config", "sidecar.hcl"}
    assert not loaded & unwanted
    assert f"sidecar.cli.{registry.COMMANDS[name].module}" in loaded


# --- status and operator ------------------------------------------------------------------------------------------


def test_status_of_an_active_node(server, run):
    server.answer("GET", "sys/seal-status", (200, UNSEALED))
    leader = {"ha_enabled": True, "is_self": True, "active_time": "2026-01-01T00:00:00Z"}
    server.answer("GET", "sys/leader", (200, leader | {"leader_cluster_address": "https://a:8201"}))
    code, out, err = run("status")
    assert (code, err) == (0, "")
    assert out == (
        "Key             Value\n"
        "---             -----\n"
        "Seal Type       shamir\n"
        "Initialized     true\n"
        "Sealed          false\n"
        "Total Shares    3\n"
        "Threshold       2\n"
        "Version         1.15.0+outrider.0.1.0\n"
        "Storage Type    consul\n"
        "Cluster Name    us-east\n"
        "Cluster ID      c-1\n"
        "HA Enabled      true\n"
        "HA Cluster      https://a:8201\n"
        "HA Mode         active\n"
        "Active Since    2026-01-01T00:00:00Z\n"
    )
    assert "X-Vault-Token" not in server.last["headers"]
    code, out, _ = run("status", "-format=json")
    assert (json.loads(out)["sealed"], json.loads(out)["is_self"]) == (False, True)


def test_status_of_a_sealed_node_is_2_and_asks_for_no_leader(server, run):
    server.answer("GET", "sys/seal-status", (200, SEALED))
    code, out, _ = run("status")
    assert code == 2
    assert "Unseal Progress    1/2\nUnseal Nonce       n-1\n" in out
    assert [request["path"] for request in server.requests] == ["sys/seal-status"]


def test_status_of_a_standby(server, run):
    server.answer("GET", "sys/seal-status", (200, UNSEALED))
    server.answer("GET", "sys/leader", (200, {"ha_enabled": True, "is_self": False, "leader_address": "http://b:8200"}))
    assert "HA Mode                standby\nActive Node Address    http://b:8200\n" in run("status")[1]


def test_status_without_a_server_is_1(run, monkeypatch):
    code, _, err = run("status", "-address=http://127.0.0.1:9")
    assert code == 1
    assert err == "Error checking seal status: GET http://127.0.0.1:9/v1/sys/seal-status: connection refused\n"
    assert run("read", "-address=http://127.0.0.1:9", "a")[0] == 2
    assert run("read", "-address=ftp://x", "a")[0] == 1


def test_https_to_a_server_without_tls_says_what_to_do(server, run):
    code, _, err = run("status", f"-address={server.address.replace('http', 'https')}")
    assert code == 1
    assert "the server does not speak TLS; use an http:// address" in err


def test_operator_init_with_an_auto_seal_and_pgp_keys(server, run, tmp_path):
    binary, armored, encoded = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    binary.write_bytes(b"\x99key")
    armored.write_text("-----BEGIN PGP PUBLIC KEY BLOCK-----\n")
    encoded.write_text(base64.b64encode(b"\x99key").decode() + "\n")
    server.answer("GET", "sys/seal-status", (200, {"recovery_seal": True}))
    server.answer("PUT", "sys/init", (200, {"keys": [], "recovery_keys_base64": ["qg=="], "root_token": "hvs.root"}))
    files = f"{binary},{armored},{encoded}"
    code, out, err = run(
        "operator", "init", "-recovery-shares=3", "-recovery-threshold=2", f"-recovery-pgp-keys={files}",
        f"-root-token-pgp-key={binary}", "-key-shares=7",
    )  # fmt: skip
    assert (code, "-key-shares is ignored: this server unseals itself" in err) == (0, True)
    assert out.startswith("Recovery Key 1: qg==\n")
    key = base64.b64encode(b"\x99key").decode()
    armored_key = base64.b64encode(armored.read_bytes()).decode()
    assert server.last["body"] == {
        "recovery_shares": 3, "recovery_threshold": 2, "recovery_pgp_keys": [key, armored_key, key],
        "root_token_pgp_key": key,
    }  # fmt: skip
    for bad, text in (("keybase:joe", "not fetched from Keybase"), ("/no/such", "No such file")):
        code, _, err = run("operator", "init", f"-recovery-pgp-keys={bad}")
        assert (code, text in err) == (1, True)


def test_operator_init(server, run):
    server.answer("GET", "sys/seal-status", (200, {"recovery_seal": False}))
    server.answer("PUT", "sys/init", (200, {"keys": ["aa"], "keys_base64": ["qg=="], "root_token": "hvs.root"}))
    code, out, _ = run("operator", "init", "-key-shares=1", "-t", "1")
    assert code == 0
    assert out.startswith("Unseal Key 1: qg==\n\nInitial Root Token: hvs.root\n")
    assert server.last["body"] == {"secret_shares": 1, "secret_threshold": 1}
    _, out, _ = run("operator", "init", "-format=json")
    assert json.loads(out) == {
        "unseal_keys_b64": ["qg=="], "unseal_keys_hex": ["aa"], "unseal_shares": 5, "unseal_threshold": 3,
        "recovery_keys_b64": [], "recovery_keys_hex": [], "recovery_keys_shares": 0, "recovery_keys_threshold": 0,
        "root_token": "hvs.root",
    }  # fmt: skip
    server.answer("GET", "sys/init", (200, {"initialized": False}))
    assert run("operator", "init", "-status")[0] == 2


def test_operator_unseal_takes_the_key_from_argument_or_standard_input(server, run, monkeypatch):
    server.answer("PUT", "sys/unseal", (200, SEALED))
    code, out, _ = run("operator", "unseal", "abc")
    assert (code, server.last["body"]) == (0, {"key": "abc"})
    assert "Unseal Progress    1/2" in out
    monkeypatch.setattr("sys.stdin", io.StringIO("from-stdin\n"))
    run("operator", "unseal")
    assert server.last["body"] == {"key": "from-stdin"}
    run("operator", "unseal", "-migrate", "abc")
    assert server.last["body"] == {"key": "abc", "migrate": True}
    run("operator", "unseal", "-reset")
    assert server.last["body"] == {"reset": True}


def test_operator_seal_and_step_down(server, run):
    server.answer("PUT", "sys/seal", (204, None))
    server.answer("PUT", "sys/step-down", (204, None))
    assert run("operator", "seal")[:2] == (0, "Success! Outrider is sealed.\n")
    assert run("operator", "step-down")[:2] == (0, f"Success! Stepped down: {server.address}\n")
    assert server.last["headers"]["X-Vault-Token"] == "t0ken"


# --- data -----------------------------------------------------------------------------------------------------------


def test_read_as_table_json_yaml_raw_and_field(server, run):
    answer = envelope({"b": [1, "x"], "a": {"k": None}, "e": ""}, lease_duration=2764800)
    server.answer("GET", "secret/a", (200, answer))
    assert run("read", "secret/a") == (
        0,
        "Key                 Value\n"
        "---                 -----\n"
        "refresh_interval    768h\n"
        "a                   map[k:<nil>]\n"
        "b                   [1 x]\n"
        "e                   n/a\n",
        "",
    )
    assert json.loads(run("read", "-format=json", "secret/a")[1]) == {
        "request_id": "r", "lease_id": "", "lease_duration": 2764800, "renewable": False, "data": answer["data"],
        "warnings": None,
    }  # fmt: skip
    assert "data:\n  b:\n  - 1\n  - x\n  a:\n    k: null\n" in run("read", "--format", "yaml", "secret/a")[1]
    assert json.loads(run("read", "-format=raw", "secret/a")[1]) == answer
    assert run("read", "-field=e", "secret/a")[1] == ""
    assert run("read", "-field=b", "secret/a")[1] == '[1, "x"]'
    assert run("read", "-field=zz", "secret/a")[0] == 1


def test_read_of_an_answer_without_an_envelope_shows_all_of_it(server, run):
    server.answer("GET", "sys/seal-status", (200, SEALED))
    assert run("read", "-field=sealed", "sys/seal-status")[1] == "true"
    shown = json.loads(run("read", "-format=json", "sys/seal-status")[1])
    assert shown["data"] == SEALED
    assert shown["lease_id"] == ""
    assert "storage_type    consul\n" in run("read", "sys/seal-status")[1]


def test_read_passes_pairs_as_query_and_escapes_the_path(server, run):
    server.answer("GET", "secret/a%20b%3Fc", (200, envelope({"k": "v"})))
    assert run("read", "/secret/a b?c", "version=2")[0] == 0
    assert server.last["query"] == {"version": ["2"]}


def test_nothing_there_is_2(server, run):
    code, out, err = run("read", "secret/none")
    assert (code, out, err) == (2, "", "No value found at secret/none\n")
    assert run("list", "secret/none")[::2] == (2, "No value found at secret/none\n")
    assert run("read", "-format=json", "secret/none")[1] == "{}\n"


def test_an_error_has_vaults_layout(server, run):
    server.answer("GET", "secret/a", (403, {"errors": ["1 error occurred:\n\t* permission denied\n\n"]}))
    code, out, err = run("read", "secret/a")
    assert (code, out) == (2, "")
    assert err.startswith(
        "Error reading secret/a: Error making API request.\n\n"
        f"URL: GET {server.address}/v1/secret/a\nCode: 403. Errors:\n\n* 1 error occurred:\n"
    )
    assert "t0ken" not in err


def test_write_pairs_files_standard_input_and_force(server, run, monkeypatch, tmp_path):
    server.answer("PUT", "secret/a", (204, None))
    (tmp_path / "f").write_text("from file\n")
    monkeypatch.setattr("sys.stdin", io.StringIO('{"whole": [1]}'))
    code, out, _ = run("write", "secret/a", "a=1", f"f=@{tmp_path}/f", "m=x", "m=y", "q=a=b", "at=\\@x", "-")
    assert (code, out) == (0, "Success! Data written to: secret/a\n")
    assert server.last["method"] == "PUT"
    assert server.last["body"] == {"a": "1", "f": "from file\n", "m": ["x", "y"], "q": "a=b", "at": "@x", "whole": [1]}
    run("write", "-f", "secret/a")
    assert server.last["body"] is None
    assert server.last["headers"]["Content-Length"] == "4", "the body is null"
    assert server.last["headers"]["X-Vault-Request"] == "true"


def test_a_wrapped_answer(server, run):
    wrap = {
        "token": "eyJ",
        "accessor": "acc",
        "ttl": 1800,
        "creation_time": "then",
        "creation_path": "p",
        "wrapped_accessor": "",
    }
    server.answer("PUT", "sys/wrapping/wrap", (200, envelope(wrap_info=wrap)))
    _, out, _ = run("write", "sys/wrapping/wrap", "a=b")
    assert server.last["headers"]["X-Vault-Wrap-TTL"] == "5m"
    assert out.splitlines()[2:5] == [
        "wrapping_token:                  eyJ",
        "wrapping_accessor:               acc",
        "wrapping_token_ttl:              30m",
    ]
    assert run("write", "-field=wrapping_token", "-wrap-ttl=1h", "sys/wrapping/wrap", "a=b")[1] == "eyJ"
    assert server.last["headers"]["X-Vault-Wrap-TTL"] == "1h"


def test_warnings_go_to_standard_error(server, run):
    server.answer("PUT", "a", (200, envelope(warnings=["be careful"])))
    code, out, err = run("write", "-f", "a")
    assert (code, out) == (0, "")
    assert "  * be careful\n" in err
    assert json.loads(run("write", "-f", "-format=json", "a")[1])["warnings"] == ["be careful"]


def test_list_and_delete(server, run):
    server.answer("GET", "secret", (200, envelope({"keys": ["a", "b/"]})))
    server.answer("DELETE", "secret/a", (204, None))
    assert run("list", "secret/")[:2] == (0, "Keys\n----\na\nb/\n")
    assert server.last["query"] == {"list": ["true"]}
    assert json.loads(run("list", "-format=json", "secret")[1]) == ["a", "b/"]
    assert run("delete", "secret/a")[:2] == (0, "Success! Data deleted (if it existed) at: secret/a\n")


# --- the client's rules ---------------------------------------------------------------------------------------------


def test_retries_of_5xx_and_412_but_not_501(server, run):
    for status in (500, 503, 412):
        server.requests.clear()
        server.answer("GET", "a", (status, {"errors": ["x"]}), (status, {"errors": ["x"]}), (200, envelope({"k": "v"})))
        assert run("read", "a")[0] == 0
        assert len(server.requests) == 3
    server.requests.clear()
    server.answer("GET", "a", (503, {"errors": ["x"]}))
    assert run("read", "a")[0] == 2
    assert len(server.requests) == 3
    for status in (501, 400, 429):
        server.requests.clear()
        server.answer("GET", "a", (status, {"errors": ["x"]}))
        assert run("read", "a")[0] == 2
        assert len(server.requests) == 1


def test_max_retries_from_the_environment(server, run, monkeypatch):
    monkeypatch.setenv("VAULT_MAX_RETRIES", "0")
    server.answer("GET", "a", (500, {"errors": ["x"]}))
    run("read", "a")
    assert len(server.requests) == 1


def test_one_redirect_keeps_method_body_and_token(server, run):
    server.answer("PUT", "a", (307, None, {"Location": f"{server.address}/v1/b"}))
    server.answer("PUT", "b", (204, None))
    assert run("write", "a", "k=v")[0] == 0
    assert (server.last["path"], server.last["body"]) == ("b", {"k": "v"})
    assert server.last["headers"]["X-Vault-Token"] == "t0ken"
    server.answer("PUT", "b", (307, None, {"Location": f"{server.address}/v1/a"}))
    code, _, err = run("write", "a", "k=v")
    assert code == 2
    assert "redirected twice" in err


def test_no_redirect_from_https_to_http(monkeypatch):
    caller = client.Client(client.ClientOptions("https://a:1", token="t"))
    reply = client.Reply(307, "GET", "https://a:1/v1/x", "", None)
    monkeypatch.setattr(caller, "_exchange", lambda *_: (reply, "http://a:1/v1/x"))
    with pytest.raises(client.LocalError, match="protocol downgrade"):
        caller.get("x")


def test_outrider_variables_win_and_flags_win_over_both(server, run, monkeypatch):
    server.answer("GET", "a", (200, envelope({"k": "v"})))
    monkeypatch.setenv("OUTRIDER_TOKEN", "own")
    monkeypatch.setenv("VAULT_NAMESPACE", "ns1/")
    monkeypatch.setenv("OUTRIDER_FORMAT", "json")
    monkeypatch.setenv("VAULT_FORMAT", "yaml")
    assert json.loads(run("read", "a")[1])["data"] == {"k": "v"}
    assert server.last["headers"]["X-Vault-Token"] == "own"
    assert server.last["headers"]["X-Vault-Namespace"] == "ns1/"
    assert "data:\n  k: v" in run("read", "-format=yaml", "a")[1]
    monkeypatch.setenv("OUTRIDER_ADDR", "http://127.0.0.1:9")
    assert run("read", "a")[0] == 2
    assert run("read", f"-address={server.address}", "a")[0] == 0
    monkeypatch.setenv("VAULT_CLIENT_TIMEOUT", "soon")
    assert run("read", "a")[0] == 1


def self_signed(folder) -> tuple[str, str]:
    """A certificate for the name outrider.test, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "outrider.test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("outrider.test")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(cert_file), str(key_file)


def test_tls(server, run, tmp_path):
    cert_file, key_file = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert_file, key_file)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.answer("GET", "a", (200, envelope({"k": "v"})))
    address = f"-address={server.address.replace('http', 'https')}"
    code, _, err = run("read", address, "a")
    assert code == 2
    assert "certificate verification failed" in err
    assert run("read", address, "-tls-skip-verify", "a")[0] == 0
    assert run("read", address, f"-ca-cert={cert_file}", "-tls-server-name=outrider.test", "a")[0] == 0
    code, _, err = run("read", address, f"-ca-cert={cert_file}", "a")
    assert code == 2
    assert "certificate verification failed" in err, "the address is not the certificate's name"
    code, _, err = run("read", address, f"-ca-cert={tmp_path}/none", "a")
    assert code == 2
    assert "cannot load the TLS files" in err


def test_a_token_that_no_header_can_carry_is_not_shown(server, run, monkeypatch):
    monkeypatch.setenv("VAULT_TOKEN", "s3cret\nline")
    code, _, err = run("read", "a")
    assert code == 2
    assert "s3cret" not in err


# --- login ----------------------------------------------------------------------------------------------------------

AUTH = {
    "client_token": "hvs.new",
    "accessor": "acc",
    "policies": ["default", "dev"],
    "token_policies": ["default", "dev"],
    "identity_policies": None,
    "metadata": {"username": "ann"},
    "lease_duration": 3600,
    "renewable": True,
}


def test_login_with_userpass_stores_the_token_for_later_calls(server, run, monkeypatch, tmp_path):
    monkeypatch.delenv("VAULT_TOKEN")
    server.answer("PUT", "auth/userpass/login/ann", (200, envelope(auth=AUTH)))
    server.answer("GET", "a", (200, envelope({"k": "v"})))
    code, out, _ = run("login", "-method=userpass", "username=ann", "password=pw")
    assert (code, server.last["body"]) == (0, {"password": "pw"})
    assert "token                  hvs.new\n" in out
    assert "token_duration         1h\n" in out
    assert 'token_policies         ["default" "dev"]\n' in out
    assert "token_meta_username    ann\n" in out
    stored = tmp_path / ".vault-token"
    assert stored.read_text() == "hvs.new"
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == [".vault-token"]
    run("read", "a")
    assert server.last["headers"]["X-Vault-Token"] == "hvs.new"


def test_login_without_storing_and_with_a_prompt(server, run, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("typed\n"))
    server.answer("PUT", "auth/people/login/ann", (200, envelope(auth=AUTH)))
    code, out, _ = run("login", "-method=userpass", "-path=people", "-token-only", "username=ann")
    assert (code, out, server.last["body"]) == (0, "hvs.new\n", {"password": "typed"})
    code, _, err = run("login", "-method=userpass", "-path=people", "-no-store", "username=ann", "password=x")
    assert code == 0
    assert "VAULT_TOKEN environment variable is set" in err
    assert not list(tmp_path.iterdir())


def test_login_with_a_token_checks_it(server, run, tmp_path):
    data = {"id": "hvs.x", "accessor": "acc", "ttl": 0, "renewable": False, "policies": ["root"], "meta": None}
    server.answer("GET", "auth/token/lookup-self", (200, envelope(data)))
    code, out, _ = run("login", "hvs.x")
    assert code == 0
    assert "token_duration       \N{INFINITY}\n" in out
    assert server.last["headers"]["X-Vault-Token"] == "hvs.x"
    server.answer("GET", "auth/token/lookup-self", (403, {"errors": ["permission denied"]}))
    code, _, err = run("login", "hvs.wrong")
    assert code == 2
    assert "hvs.wrong" not in err
    assert (tmp_path / ".vault-token").read_text() == "hvs.x"


# --- kv -------------------------------------------------------------------------------------------------------------


def mount(server, path, version):
    options = {"version": version} if version else None
    for below in ("", "app", "app/db", "app/none"):
        server.answer("GET", f"sys/internal/ui/mounts/{path}{below}".rstrip("/"),
                      (200, envelope({"path": path, "type": "kv", "options": options})))  # fmt: skip


def test_kv_version_2(server, run):
    mount(server, "secret/", "2")
    metadata = {"created_time": "then", "version": 2, "destroyed": False, "deletion_time": ""}
    server.answer("GET", "secret/data/app/db", (200, envelope({"data": {"pw": "x"}, "metadata": metadata})))
    server.answer("PUT", "secret/data/app/db", (200, envelope(metadata)))
    server.answer("DELETE", "secret/data/app/db", (204, None))
    server.answer("PUT", "secret/delete/app/db", (204, None))
    server.answer("GET", "secret/metadata/app", (200, envelope({"keys": ["db"]})))
    code, out, _ = run("kv", "get", "secret/app/db")
    assert code == 0
    assert out == (
        "=== Secret Path ===\nsecret/data/app/db\n\n"
        "====== Metadata ======\n"
        "Key              Value\n---              -----\ncreated_time     then\ndeletion_time    n/a\n"
        "destroyed        false\nversion          2\n\n"
        "=== Data ===\nKey    Value\n---    -----\npw     x\n"
    )
    assert run("kv", "get", "-field=pw", "-version=1", "secret/app/db")[1] == "x"
    assert server.last["query"] == {"version": ["1"]}
    assert run("kv", "get", "-mount=secret", "-field=pw", "app/db")[1] == "x"
    assert json.loads(run("kv", "get", "-format=json", "secret/app/db")[1])["data"]["data"] == {"pw": "x"}
    assert run("kv", "put", "-cas=2", "secret/app/db", "pw=y")[0] == 0
    assert server.last["body"] == {"data": {"pw": "y"}, "options": {"cas": 2}}
    assert run("kv", "put", "-field=version", "secret/app/db", "pw=y")[1] == "2"
    assert server.last["body"] == {"data": {"pw": "y"}, "options": {}}
    assert run("kv", "delete", "secret/app/db")[0] == 0
    assert run("kv", "delete", "-versions=1,2", "secret/app/db")[0] == 0
    assert server.last["body"] == {"versions": ["1", "2"]}
    assert run("kv", "list", "secret/app")[1] == "Keys\n----\ndb\n"


def test_kv_get_of_a_deleted_version_shows_its_metadata_and_is_2(server, run):
    mount(server, "secret/", "2")
    deleted = envelope({"data": None, "metadata": {"deletion_time": "then", "version": 1}})
    server.answer("GET", "secret/data/app/db", (404, deleted))
    code, out, _ = run("kv", "get", "secret/app/db")
    assert code == 2
    assert "deletion_time    then" in out
    assert run("kv", "get", "-field=x", "secret/app/db")[::2] == (2, "No data found at secret/data/app/db\n")
    assert run("kv", "get", "secret/app/none")[::2] == (2, "No value found at secret/data/app/none\n")


def test_kv_version_1(server, run):
    mount(server, "kv/", "")
    server.answer("GET", "kv/app/db", (200, envelope({"pw": "x"}, lease_duration=2764800)))
    server.answer("PUT", "kv/app/db", (204, None))
    assert run("kv", "get", "kv/app/db")[1] == "=== Data ===\nKey    Value\n---    -----\npw     x\n"
    assert run("kv", "put", "kv/app/db", "pw=y")[1] == "Success! Data written to: kv/app/db\n"
    assert server.last["body"] == {"pw": "y"}
    assert run("kv", "put", "-cas=1", "kv/app/db", "pw=y")[0] == 1
    assert run("kv", "get", "-version=1", "kv/app/db")[0] == 1
    assert run("kv", "get", "kv")[0] == 1


def test_kv_without_permission_for_the_mount_says_so(server, run):
    server.answer(
        "GET", "sys/internal/ui/mounts/other/x", (403, {"errors": ["preflight capability check returned 403"]})
    )
    code, _, err = run("kv", "get", "other/x")
    assert code == 2
    assert "preflight capability check" in err


# --- replication ----------------------------------------------------------------------------------------------------


def test_replication_verbs_call_vaults_paths(server, run, monkeypatch):
    base = "sys/replication/performance"
    server.answer("PUT", f"{base}/primary/enable", (200, envelope(warnings=["brief"])))
    server.answer("PUT", f"{base}/secondary/enable", (200, envelope(warnings=["brief"])))
    server.answer("PUT", f"{base}/primary/revoke-secondary", (204, None))
    wrap = {"token": "eyJ", "accessor": "a", "ttl": 1800, "creation_time": "t", "creation_path": "p"}
    server.answer("PUT", f"{base}/primary/secondary-token", (200, envelope(wrap_info=wrap)))
    assert run("replication", "enable-primary", "-primary-cluster-addr=https://x:1")[0] == 0
    assert server.last["body"] == {"primary_cluster_addr": "https://x:1"}
    assert run("replication", "secondary-token", "-field=wrapping_token", "-ttl=5m", "eu-west")[1] == "eyJ"
    assert server.last["body"] == {"id": "eu-west", "ttl": "5m"}
    assert run("replication", "secondary-token", "-id=eu-west")[0] == 0
    assert run("replication", "enable-secondary", "eyJ", "-primary-api-addr=http://p:1", "-ca-file=/ca")[0] == 0
    assert server.last["body"] == {"token": "eyJ", "primary_api_addr": "http://p:1", "ca_file": "/ca"}
    monkeypatch.setattr("sys.stdin", io.StringIO("typed\n"))
    run("replication", "enable-secondary")
    assert server.last["body"] == {"token": "typed"}
    assert run("replication", "revoke", "eu-west")[0] == 0
    assert server.last["body"] == {"id": "eu-west"}


def test_replication_status(server, run):
    peer = {
        "node_id": "eu-west",
        "connection_status": "connected",
        "last_heartbeat": "now",
        "api_address": "http://e:1",
    }
    state = {"mode": "primary", "state": "running", "merkle_root": "abc", "last_wal": 7, "secondaries": [peer],
             "known_secondaries": ["eu-west"], "last_sync": {"by": "wal"}}  # fmt: skip
    server.answer("GET", "sys/replication/status", (200, envelope({"dr": {"mode": "disabled"}, "performance": state})))
    code, out, _ = run("replication", "status")
    assert code == 0
    performance, _, dr = out.partition("\n\n===== dr =====\n")
    assert "mode                 primary\nstate                running\n" in performance
    assert "last_sync.by         wal\n" in performance
    assert "\n\nsecondaries:\nId         Connection    Last Heartbeat    API Address\n" in performance
    assert "eu-west    connected     now               http://e:1" in performance
    assert dr.endswith("mode    disabled\n")
    assert json.loads(run("replication", "status", "-format=json")[1])["data"]["performance"] == state


# --- policies and mounts --------------------------------------------------------------------------------------------


def test_policies(server, run, tmp_path, monkeypatch):
    for method in ("PUT", "DELETE"):
        server.answer(method, "sys/policies/acl/dev", (204, None))
    server.answer("GET", "sys/policies/acl/dev", (200, envelope({"name": "dev", "policy": 'path "a" {}\n'})))
    server.answer("GET", "sys/policies/acl", (200, envelope({"keys": ["default", "dev"]})))
    (tmp_path / "p.hcl").write_text('path "a" {}')
    assert run("policy", "write", "dev", str(tmp_path / "p.hcl"))[:2] == (0, "Success! Uploaded policy: dev\n")
    assert server.last["body"] == {"policy": 'path "a" {}'}
    monkeypatch.setattr("sys.stdin", io.StringIO("text"))
    run("policy", "write", "dev", "-")
    assert server.last["body"] == {"policy": "text"}
    assert run("policy", "read", "dev")[1] == 'path "a" {}\n'
    assert run("policy", "read", "other")[::2] == (2, "No policy named: other\n")
    assert run("policy", "list")[1] == "default\ndev\n"
    assert run("policy", "delete", "dev")[0] == 0


def test_mounts(server, run):
    server.answer("POST", "sys/mounts/secret", (204, None))
    server.answer("POST", "sys/auth/people", (204, None))
    server.answer("DELETE", "sys/mounts/secret", (204, None))
    listed = {"secret/": {"type": "kv", "accessor": "kv_1", "description": "mine"}}
    server.answer("GET", "sys/mounts", (200, envelope(listed) | listed))
    assert run("secrets", "enable", "-path=secret/", "-max-lease-ttl=1h", "kv-v2")[1] == (
        "Success! Enabled the kv secrets engine at: secret/\n"
    )
    assert server.last["body"] == {"type": "kv", "description": "", "local": False, "config": {"max_lease_ttl": "1h"},
                                   "options": {"version": "2"}}  # fmt: skip
    assert run("auth", "enable", "-path=people", "-local", "userpass")[0] == 0
    assert server.last["body"] == {"type": "userpass", "description": "", "local": True, "config": {}}
    assert run("secrets", "list")[1] == (
        "Path       Type    Accessor    Description\n"
        "----       ----    --------    -----------\n"
        "secret/    kv      kv_1        mine\n"
    )
    assert run("secrets", "disable", "secret/")[0] == 0


# --- server ---------------------------------------------------------------------------------------------------------


def test_server_hands_configuration_and_dev_options_to_the_application(run, monkeypatch, tmp_path):
    started = []

    def run_server(settings, dev, paths, sockets):
        (opened,) = sockets
        with socket.create_connection(opened[0].getsockname()):  # who comes while the server is loaded is not refused
            started.append((settings, dev, paths))
        for each in opened:
            each.close()
        return 0

    application = type(sys)("sidecar.app")
    application.run_server = run_server
    monkeypatch.setitem(sys.modules, "sidecar.app", application)
    for name in ("VAULT_DEV_LISTEN_ADDRESS", "OUTRIDER_DEV_LISTEN_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VAULT_DEV_ROOT_TOKEN_ID", "root")
    address = f"127.0.0.1:{free_port()}"
    assert run("server", "-dev", f"-dev-listen-address={address}", "-log-level=WARNING")[0] == 0
    settings, dev, paths = started.pop()
    assert paths == ()
    assert dev == config.DevOptions("root", address)
    assert (settings.log_level, settings.api_addr) == ("warn", f"http://{address}")
    (tmp_path / "a.hcl").write_text('storage "inmem" {}\nui = true')
    taken = f'address = "{address}"\n tls_disable = true'
    (tmp_path / "b.hcl").write_text(f'listener "tcp" {{ {taken} }}')
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        code, _, err = run("server", f"-config={tmp_path}")
    assert code == 1
    assert "Error initializing listener: [Errno 98] Address already in use" in err
    code, _, err = run("server", f"-config={tmp_path}/a.hcl", "-config", f"{tmp_path}/b.hcl")
    assert code == 0
    assert err == f'WARNING! {tmp_path}/a.hcl:2: "ui" has no effect: there is no web UI\n'
    settings, dev, paths = started.pop()
    assert paths == (f"{tmp_path}/a.hcl", f"{tmp_path}/b.hcl")
    assert (settings.storage, dev) == (config.InmemStorage(), None)
    (tmp_path / "b.hcl").write_text("listener tcp { tls_disabel = true }")
    code, _, err = run("server", f"-config={tmp_path}")
    assert code == 1
    assert 'b.hcl:1: unknown key "tls_disabel" in listener "tcp"; did you mean "tls_disable"?' in err
    assert started == []


# --- pure parts -----------------------------------------------------------------------------------------------------

FLAGS = (flags.Flag("force", "", "bool", aliases=("f",)), flags.Flag("field", ""), flags.Flag("config", "", "texts"))


def test_flags_with_one_or_two_dashes_anywhere_before_the_double_dash():
    given_values, arguments = flags.parse(
        ["a", "--field=x=y", "-f", "-config", "1", "--config=2", "-", "--", "-x"], FLAGS
    )
    assert (given_values.text("field"), given_values.flag("force"), given_values.texts("config")) == (
        "x=y",
        True,
        ["1", "2"],
    )
    assert arguments == ["a", "-", "-x"]
    with pytest.raises(flags.UsageError, match=r"not defined: -fild; did you mean -field\?"):
        flags.parse(["-fild=1"], FLAGS)
    with pytest.raises(flags.HelpWanted):
        flags.parse(["-help"], FLAGS)


def test_data_arguments_never_show_a_value_in_an_error():
    for bad in (["s3cret"], ["=s3cret"], ["a=-", "s3cret"]):
        with pytest.raises(flags.UsageError) as caught:
            values.parse_data(bad, lambda: "")
        assert "s3cret" not in str(caught.value)
    with pytest.raises(flags.UsageError, match="asked for twice"):
        values.parse_data(["a=-", "b=-"], lambda: "")
    with pytest.raises(flags.UsageError, match="not JSON"):
        values.parse_data(["-"], lambda: "s3cret")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (90, "1m30s"), (3600, "1h"), (2764800, "768h"), (5405, "1h30m5s")]
)
def test_durations_are_shown_as_vault_shows_them(seconds, text):
    assert output.human_duration(seconds) == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values)
def test_yaml_reads_back_as_the_same_value(value):
    assert read_yaml(yaml.dump(value)) == value


def read_yaml(text: str):
    """An independent reader of the subset: indentation gives structure, every quoted scalar is JSON."""
    lines = text.removesuffix("\n").split("\n")

    def scalar(word: str):
        try:
            return json.loads(word)
        except ValueError:
            return word

    def split(line: str):
        """Key and rest of ``key: rest``; a quoted key may hold anything."""
        if line.startswith('"'):
            key, end = json.JSONDecoder().raw_decode(line)
            return (key, line[end + 1 :].strip()) if line[end : end + 1] == ":" else None
        key, colon, rest = line.partition(":")
        return (str(key), rest.strip()) if colon and not line.startswith(("[", "{")) else None

    def block(at: int, indent: int):
        line = lines[at][indent:]
        if line.startswith("- "):
            items = []
            while at < len(lines) and lines[at][:indent].strip() == "" and lines[at][indent:].startswith("- "):
                lines[at] = " " * (indent + 2) + lines[at][indent + 2 :]
                item, at = block(at, indent + 2)
                items.append(item)
            return items, at
        if split(line) is None:
            return scalar(line), at + 1
        members = {}
        while (
            at < len(lines)
            and len(lines[at]) - len(lines[at].lstrip(" ")) == indent
            and (pair := split(lines[at][indent:]))
        ):
            key, rest = pair
            if rest:
                members[key], at = scalar(rest), at + 1
            else:
                deeper = len(lines[at + 1]) - len(lines[at + 1].lstrip(" "))
                members[key], at = block(at + 1, deeper)
        return members, at

    return block(0, 0)[0]
