"""``outrider operator diagnose`` without a server: what it finds, what it says to do, and that it changes nothing."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import resource
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from consul_backend import store
from consul_backend.embedded import EmbeddedStore
from sidecar import diagnose
from sidecar.__main__ import main
from tests.support.ports import free_port


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that nothing is wrong with, whatever this one is."""
    for name in list(os.environ):
        if name.startswith(("VAULT_", "OUTRIDER_", "CONSUL_HTTP")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (100_000, 100_000))
    monkeypatch.setattr(diagnose, "DISK_FREE_BYTES_MIN", 0)
    monkeypatch.setattr(diagnose, "DISK_FREE_SHARE_MIN", 0.0)


def write_certificate(folder: Path, days: float = 365, begins_days: float = -1, name: str = "localhost") -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now + timedelta(days=begins_days))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def write_config(folder: Path, *, listener: str = "tls_disable = true", more: str = "", storage: str = "") -> Path:
    storage = storage or f'storage "embedded" {{ path = "{folder}/store" }}'
    path = folder / "c.hcl"
    path.write_text(
        f'{storage}\ndisable_mlock = true\nlistener "tcp" {{\n  address = "127.0.0.1:{free_port()}"\n'
        f'  cluster_address = "127.0.0.1:{free_port()}"\n  {listener}\n}}\n{more}\n'
    )
    path.chmod(0o600)
    return path


async def found(path: Path) -> diagnose.Finding:
    return await diagnose.diagnose([str(path)], {})


def flat(finding: diagnose.Finding) -> dict[str, diagnose.Finding]:
    return {finding.name: finding} | {name: one for child in finding.children for name, one in flat(child).items()}


async def test_nothing_to_complain_of(tmp_path: Path) -> None:
    result = await found(write_config(tmp_path))
    assert result.status == "success", result.shown()
    assert not (tmp_path / "store").exists(), "nothing was made"
    checks = flat(result)
    assert checks["Check Embedded Store"].message.endswith("is made at the first start")
    assert checks["Check Autounseal Encryption"].status == "skipped"


async def test_a_configuration_that_no_server_starts_with(tmp_path: Path) -> None:
    path = write_config(tmp_path, more="max_leas_ttl = 1")
    result = await found(path)
    assert result.status == "failure"
    assert 'did you mean "max_lease_ttl"?' in flat(result)["Read Files"].message
    assert "Check Storage" not in flat(result)
    warned = await found(write_config(tmp_path, more="ui = true"))
    assert (warned.status, flat(warned)["Setting"].message.endswith("there is no web UI")) == ("warning", True)


@pytest.mark.parametrize(("mode", "status"), [(0o600, "success"), (0o604, "warning"), (0o602, "failure")])
async def test_who_may_read_a_configuration_with_a_secret(tmp_path: Path, mode: int, status: str) -> None:
    key = os.urandom(32).hex()
    path = write_config(tmp_path, more=f'seal "static" {{ current_key_id = "k"\n current_key = "{key}" }}')
    path.chmod(mode)
    result = flat(await found(path))
    assert result["Parse Configuration"].status == status
    assert result["Check Autounseal Encryption"].message == 'seal "static", key "k"'
    assert key not in str(result["Outrider Diagnose"].shown())


async def test_a_seal_that_does_not_open(tmp_path: Path) -> None:
    for seal in (
        'seal "static" { current_key_id = "k"\n current_key = "env://NO_SUCH" }',
        f'seal "transit" {{ address = "http://127.0.0.1:{free_port()}"\n token = "t"\n key_name = "k"\n'
        ' mount_path = "transit/" }',
    ):
        result = flat(await found(write_config(tmp_path, more=seal)))
        assert result["Check Autounseal Encryption"].status == "failure"
        assert result["Outrider Diagnose"].status == "failure"


@pytest.mark.parametrize(
    ("days", "begins", "name", "status", "text"),
    [
        (365, -1, "localhost", "success", "until"),
        (10, -1, "localhost", "warning", "expires"),
        (-1, -3, "localhost", "failure", "expired"),
        (365, 1, "localhost", "failure", "counts only from"),
        (365, -1, "other.example", "warning", "not for vault.example"),
    ],
)
async def test_certificates(tmp_path: Path, days: float, begins: float, name: str, status: str, text: str) -> None:
    write_certificate(tmp_path, days, begins, name)
    listener = f'tls_cert_file = "{tmp_path}/cert.pem"\n  tls_key_file = "{tmp_path}/key.pem"'
    api = 'api_addr = "https://vault.example:8200"' if "vault.example" in text else ""
    result = flat(await found(write_config(tmp_path, listener=listener, more=api)))
    check = result["Check Listener TLS"]
    assert (check.status, text in check.message) == (status, True), check
    assert result["Start Listeners"].status == status


async def test_a_key_of_another_certificate(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_certificate(tmp_path)
    write_certificate(tmp_path / "other")
    listener = f'tls_cert_file = "{tmp_path}/cert.pem"\n  tls_key_file = "{tmp_path}/other/key.pem"'
    check = flat(await found(write_config(tmp_path, listener=listener)))["Check Listener TLS"]
    assert (check.status, "belong together" in check.message, "cert.pem" in check.message) == ("failure", True, True)


async def test_ports_and_a_store_in_use(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    running = EmbeddedStore(str(tmp_path / "store"))
    await running.open()
    try:
        address = next(line for line in path.read_text().splitlines() if "  address" in line)
        port = int(address.rpartition(":")[2].strip('"'))
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            taken.listen(1)
            result = flat(await found(path))
    finally:
        await running.close()
    assert (result["Create Listener"].status, "in use" in result["Create Listener"].message) == ("warning", True)
    assert result["Check Embedded Store"].message == "a server is running on it"
    assert result["Outrider Diagnose"].status == "warning"
    after = flat(await found(path))["Check Embedded Store"]
    assert (after.status, after.message) == ("success", str(tmp_path / "store"))


async def test_a_consul_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "READ_DEADLINE_S", 0.1)
    storage = f'storage "consul" {{ address = "127.0.0.1:{free_port()}"\n token = "s3cret" }}'
    api = 'api_addr = "http://10.0.0.7:8200"'
    result = flat(await found(write_config(tmp_path, storage=storage, more=api)))
    check = result["Check Storage Access"]
    assert (check.status, "Unavailable" in check.message) == ("failure", True)
    assert "s3cret" not in str(result["Outrider Diagnose"].shown())
    remote = f'storage "consul" {{ address = "0.0.0.0:{free_port()}" }}'
    result = flat(await found(write_config(tmp_path, storage=remote)))
    assert result["Determine Redirect Address"].status == "warning"
    assert result["Check Consul Direct Storage Access"].status == "warning"
    assert result["Check Storage"].status == "failure"


async def test_a_check_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def forever(_config: object) -> diagnose.Finding:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(diagnose, "_storage", forever)
    monkeypatch.setattr(diagnose, "CHECK_S_MAX", 0.01)
    check = flat(await found(write_config(tmp_path)))["Check Storage"]
    assert (check.status, check.message) == ("failure", "no result within 0.01 s")


async def test_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (1024, 1024))
    monkeypatch.setattr(diagnose, "DISK_FREE_SHARE_MIN", 2.0)
    monkeypatch.setattr(diagnose, "may_lock_memory", lambda: False)
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("disable_mlock = true", ""))
    checks = flat(await found(path))
    for name in ("Check Open File Limit", "Check Disk Usage of /", "Check Memory Lock"):
        assert (checks[name].status, bool(checks[name].advice)) == ("warning", True), name


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["operator", "diagnose", *words])
    return code, capsys.readouterr().out


def test_what_is_printed_and_the_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path)
    code, out = shown(capsys, f"-config={path}")
    assert (code, out.splitlines()[0]) == (0, "[ success ] Outrider Diagnose")
    assert "\n  [ success ] Check Storage\n    [ success ] Check Embedded Store" in out
    write_config(tmp_path, more="ui = true")
    code, out = shown(capsys, f"-config={path}", "-format=json")
    body: dict[str, Any] = json.loads(out)
    assert (code, body["status"], body["children"][1]["status"]) == (2, "warning", "warning")
    write_config(tmp_path, more="nonsense = 1")
    assert shown(capsys, f"-config={path}")[0] == 1
    assert main(["operator", "diagnose"]) == 1
