"""A listener's files that cannot be used are named, and nothing asks a terminal for a password."""

from __future__ import annotations

import ssl
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from sidecar.app import api_tls
from sidecar.config.values import Listener
from tests.support.http_certificates import write_certificate


@pytest.fixture
def listener(tmp_path: Path) -> Listener:
    certificate, key = write_certificate(tmp_path, "127.0.0.1")
    return Listener("127.0.0.1:0", "127.0.0.1:0", tls_cert_file=str(certificate), tls_key_file=str(key))


def test_a_pair_that_fits_is_taken(listener: Listener) -> None:
    assert isinstance(api_tls(listener), ssl.SSLContext)


@pytest.mark.parametrize("name", ["tls_cert_file", "tls_key_file", "tls_client_ca_file"])
def test_a_file_that_is_missing_is_named(listener: Listener, tmp_path: Path, name: str) -> None:
    path = str(tmp_path / "missing.pem")
    with pytest.raises(OSError, match="No such file") as refused:
        api_tls(replace(listener, **{name: path}))
    assert f'{name} "{path}"' in str(refused.value)


def test_an_authority_that_is_none_is_named(listener: Listener, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing of the kind")
    with pytest.raises(OSError, match=r"tls_client_ca_file .*no PEM certificates"):
        api_tls(replace(listener, tls_client_ca_file=str(tmp_path / "ca.pem")))


def test_an_encrypted_key_is_refused_and_no_password_asked_for(listener: Listener) -> None:
    path = Path(listener.tls_key_file)
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"password")
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    with pytest.raises(OSError, match="or the key is encrypted"):
        api_tls(listener)
