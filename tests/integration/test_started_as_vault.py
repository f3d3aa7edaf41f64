"""A client's own test suite starts ``vault`` from PATH: the same flags, signals, readiness and words must do."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hvac
import pytest
from cryptography import x509

from tests.support.cluster import ROOT
from tests.support.http_certificates import write_certificate
from tests.support.ports import free_port, two_free_ports

LAUNCHER = """#!{python}
import sys
from sidecar.__main__ import main
sys.exit(main())
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has a ``vault`` that is ours."""
    for name in ("vault", "outrider"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(LAUNCHER.format(python=sys.executable))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VAULT_", "OUTRIDER_"))}
    return {**kept, "PATH": f"{tmp_path / 'bin'}:{kept['PATH']}", "PYTHONPATH": str(ROOT)}


def output(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.mark.parametrize("flag", ["-version", "--version", "-v", "version"])
def test_the_version_can_be_read_by_those_who_parse_it(environment: dict[str, str], flag: str) -> None:
    text = output(environment, "vault", flag)
    assert re.findall(r"Vault v([0-9.]+)", text) == ["1.15.0"]
    assert text.split()[1].lstrip("v") == "1.15.0"
    assert "this is Outrider v" in text
    honest = output(environment, "outrider", flag)
    assert honest.startswith("Outrider v")
    assert "Vault v1.15.0 compatible" in honest


@pytest.fixture
def config(tmp_path: Path) -> tuple[Path, str, str]:
    """(a directory of configuration as people have it, the address, the certificate to trust)."""
    port = free_port()
    certificate, key = write_certificate(tmp_path, "127.0.0.1")
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "listener.hcl").write_text(
        f"""listener "tcp" {{
  tls_cert_file = "{certificate}"
  tls_key_file  = "{key}"
  tls_min_version = "tls10"
  address = "127.0.0.1:{port}"
  cluster_address = "127.0.0.1:{free_port()}"
}}
"""
    )
    (folder / "server.json").write_text(
        '{"backend": {"inmem": {}}, "disable_mlock": true, "default_lease_ttl": "768h", "max_lease_ttl": "768h"}'
    )
    return folder, f"https://127.0.0.1:{port}", str(certificate)


@pytest.fixture
def server(
    environment: dict[str, str], config: tuple[Path, str, str], tmp_path: Path
) -> Iterator[subprocess.Popen[str]]:
    folder, _, _ = config
    extra = tmp_path / "extra.hcl"
    extra.write_text('log_level = "debug"\n')
    with (tmp_path / "stdout").open("w") as stdout:
        process = subprocess.Popen(
            ["vault", "server", f"-config={folder}", f"-config={extra}"],
            env=environment,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ready(client: hvac.Client) -> None:
    """As hvac's own server manager waits."""
    for _ in range(1200):
        try:
            client.sys.is_initialized()
        except Exception:
            time.sleep(0.25)
        else:
            return
    raise AssertionError("the server did not answer")


def test_a_configuration_as_it_is_starts_and_stops_like_vault(
    server: subprocess.Popen[str], config: tuple[Path, str, str], tmp_path: Path
) -> None:
    _, address, certificate = config
    client = hvac.Client(address, verify=certificate)
    ready(client)
    made = client.sys.initialize(secret_shares=5, secret_threshold=3)
    client.token = made["root_token"]
    for _ in range(2):
        # A store of one node serves by the time its unsealing is answered; hvac's own tests seal it right then.
        client.sys.submit_unseal_keys(made["keys"])
        assert client.sys.read_health_status().status_code == 200
        client.sys.seal()
    client.sys.submit_unseal_keys(made["keys"])
    assert client.is_authenticated()
    server.send_signal(signal.SIGHUP)
    server.send_signal(signal.SIGTERM)
    _, errors = server.communicate(timeout=300)
    assert server.returncode == 0
    printed = (tmp_path / "stdout").read_text()
    for words in (
        "==> Vault server configuration:",
        "             Version: Vault v1.15.0 compatible; this is Outrider v",
        "             Storage: inmem",
        "==> Vault server started! Log data will stream in below:",
        "==> Vault reload triggered",
        "==> Vault shutdown triggered",
    ):
        assert words in printed, printed
    assert "too old" in errors


def test_the_dev_server_prints_what_scripts_look_for(environment: dict[str, str]) -> None:
    command = [
        "vault",
        "server",
        "-dev",
        "-dev-root-token-id=root",
        f"-dev-listen-address=127.0.0.1:{two_free_ports()}",
    ]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if "NOT be used in production" in line:
                break
    finally:
        process.terminate()
        process.wait(timeout=300)
        if process.stdout is not None:
            process.stdout.close()
    assert "WARNING! dev mode is enabled! In this mode, Vault runs entirely in-memory" in printed
    assert "Root Token: root" in printed
    assert re.search(r"^Unseal Key: \S+$", printed, re.MULTILINE)
    assert "export VAULT_ADDR='http://127.0.0.1:" in printed


def test_the_dev_servers_other_flags(environment: dict[str, str], tmp_path: Path) -> None:
    """A log file, JSON lines in it, and the KV engine as asked."""
    for flag, version in (("-dev-kv-v1", "1"), ("-dev-no-kv", "")):
        log, port = tmp_path / f"{flag}.log", two_free_ports()
        command = ["vault", "server", "-dev", "-dev-root-token-id=root", f"-dev-listen-address=127.0.0.1:{port}"]
        command += [flag, "-log-format=json", f"-log-file={log}", "-exit-on-core-shutdown", "-disable-gated-logs"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            assert process.stdout is not None
            while b"Development mode" not in process.stdout.readline():
                assert process.poll() is None, log.read_text()
            mounts = hvac.Client(f"http://127.0.0.1:{port}", token="root").sys.list_mounted_secrets_engines()["data"]
            assert ((mounts.get("secret/") or {}).get("options") or {}).get("version", "") == version
        finally:
            process.terminate()
            _, complaints = process.communicate(timeout=300)
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        assert any("active operation" in line["@message"] for line in lines)
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
        assert b"active operation" not in complaints


def test_the_dev_server_over_tls(environment: dict[str, str], tmp_path: Path) -> None:
    """A client that trusts what VAULT_CACERT names gets in, by a further name too; the files go with the server. The
    log file, moved away, is begun anew on SIGHUP."""
    log, port = tmp_path / "server.log", two_free_ports()
    command = ["vault", "server", "-dev-tls", "-dev-root-token-id=root", f"-dev-listen-address=127.0.0.1:{port}"]
    command += ["-dev-tls-san=10.1.2.3", "-dev-tls-san=dev.test", f"-log-file={log}"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        printed = ""
        while "Development mode" not in printed:
            printed += process.stdout.readline()
            assert process.poll() is None, log.read_text()
        exports = dict(re.findall(r"^    \$ export (\w+)='(.*)'$", printed, re.MULTILINE))
        assert exports["VAULT_ADDR"] == f"https://127.0.0.1:{port}"
        ca = Path(exports["VAULT_CACERT"])
        assert sorted(path.name for path in ca.parent.iterdir()) == ["vault-ca.pem", "vault-cert.pem", "vault-key.pem"]
        assert stat.S_IMODE((ca.parent / "vault-key.pem").stat().st_mode) == 0o600
        assert hvac.Client(exports["VAULT_ADDR"], token="root", verify=str(ca)).is_authenticated()
        status = subprocess.run(["vault", "status"], env=environment | exports, capture_output=True, timeout=300)
        assert status.returncode == 0, status.stderr
        for name in ("dev.test", "localhost"):
            context = ssl.create_default_context(cafile=str(ca))
            with socket.create_connection(("127.0.0.1", port)) as plain:
                context.wrap_socket(plain, server_hostname=name).close()
        names = x509.load_pem_x509_certificate((ca.parent / "vault-cert.pem").read_bytes()).extensions
        addresses = names.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.IPAddress)
        assert {str(address) for address in addresses} == {"127.0.0.1", "::1", "10.1.2.3"}
        log.rename(tmp_path / "server.log.1")
        process.send_signal(signal.SIGHUP)
        while "reload triggered" not in process.stdout.readline():
            assert process.poll() is None
    finally:
        process.terminate()
        process.communicate(timeout=300)
    assert "shutdown triggered" in log.read_text()
    assert "shutdown triggered" not in (tmp_path / "server.log.1").read_text()
    assert not ca.parent.exists()
