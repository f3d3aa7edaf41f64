"""Several listeners on one real process: TLS with client certificates and a reload, a Unix socket, a PROXY header."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import ssl
import stat
from pathlib import Path

import pytest

from sidecar.transport.certificates import Credentials, issue_client, issue_server, make_authority
from tests.support.cluster import Node, embedded_storage
from tests.support.ports import free_port

SOCKET = "api.sock"


def write_pair(home: Path, name: str, credentials: Credentials) -> None:
    (home / f"{name}.pem").write_bytes(credentials.certificate_pem)
    (home / f"{name}.key").write_bytes(credentials.key_pem)


def context_for(authority: Credentials, home: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority.certificate_pem.decode())
    if home is not None:
        context.load_cert_chain(home / "client.pem", home / "client.key")
    return context


def status(port: int, context: ssl.SSLContext) -> int:
    connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=60)
    try:
        connection.request("GET", "/v1/sys/seal-status")
        return connection.getresponse().status
    finally:
        connection.close()


def version(port: int, authority: Credentials, most: ssl.TLSVersion) -> str | None:
    context = context_for(authority)
    context.maximum_version = most
    plain = socket.create_connection(("localhost", port), 60)
    with plain, context.wrap_socket(plain, server_hostname="localhost") as secure:
        return secure.version()


def listeners(home: Path, open_port: int, strict_port: int, proxy_port: int) -> str:
    """Four of them: TLS for anybody, TLS 1.3 for known clients, behind a proxy, and a Unix socket."""
    pair = f'tls_cert_file = "{home}/server.pem"\n  tls_key_file = "{home}/server.key"'
    return f'''
listener "tcp" {{
  address = "127.0.0.1:{open_port}"
  {pair}
}}
listener "tcp" {{
  address = "127.0.0.1:{strict_port}"
  {pair}
  tls_min_version = "tls13"
  tls_client_ca_file = "{home}/clients.pem"
  tls_require_and_verify_client_cert = true
}}
listener "tcp" {{
  address = "127.0.0.1:{proxy_port}"
  tls_disable = true
  proxy_protocol_behavior = "deny_unauthorized"
  proxy_protocol_authorized_addrs = "192.0.2.1"
}}
listener "unix" {{
  address = "{home / SOCKET}"
  socket_mode = "660"
}}
'''


def test_tls_unix_and_proxy_listeners_beside_each_other(tmp_path: Path) -> None:
    first, second, clients = (make_authority(name) for name in ("first", "second", "clients"))
    write_pair(tmp_path, "server", issue_server(first, "localhost"))
    write_pair(tmp_path, "client", issue_client(clients, "me"))
    (tmp_path / "clients.pem").write_bytes(clients.certificate_pem)
    open_port, strict_port, proxy_port = free_port(), free_port(), free_port()
    path = tmp_path / SOCKET
    node = Node(
        "n",
        tmp_path,
        embedded_storage(tmp_path / "store"),
        settings=listeners(tmp_path, open_port, strict_port, proxy_port),
    )
    try:
        node.start()
        # TLS 1.2 and 1.3; a client certificate where it is asked for.
        assert version(open_port, first, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        assert version(open_port, first, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises((ssl.SSLError, ConnectionError)):
            version(strict_port, first, ssl.TLSVersion.TLSv1_2)
        assert status(open_port, context_for(first)) == 200
        assert status(strict_port, context_for(first, tmp_path)) == 200
        with pytest.raises((ssl.SSLError, ConnectionError)):
            status(strict_port, context_for(first))

        with socket.socket(socket.AF_UNIX) as local:
            local.connect(str(path))
            local.sendall(b"GET /v1/sys/seal-status HTTP/1.0\r\n\r\n")
            assert local.recv(100).startswith(b"HTTP/1.0 200")
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with socket.create_connection(("127.0.0.1", proxy_port), 60) as refused:
            try:
                refused.sendall(b"PROXY TCP4 203.0.113.9 10.0.0.1 1 2\r\nGET /v1/sys/health HTTP/1.0\r\n\r\n")
                assert refused.recv(100) == b""
            except ConnectionError:
                pass

        # A new pair is read on SIGHUP; a connection of before goes on.
        kept = http.client.HTTPSConnection("localhost", open_port, context=context_for(first), timeout=60)
        kept.request("GET", "/v1/sys/seal-status")
        kept.getresponse().read()
        write_pair(tmp_path, "server", issue_server(second, "localhost"))
        reload(node)
        node.wait_until("show the new certificate", lambda: speaks(open_port, second))
        assert status(strict_port, context_for(second, tmp_path)) == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            status(open_port, context_for(first))
        kept.request("GET", "/v1/sys/seal-status")
        assert kept.getresponse().status == 200
        kept.close()

        # A certificate without its key changes nothing: what was loaded before stays whole.
        (tmp_path / "server.pem").write_bytes(issue_server(first, "localhost").certificate_pem)
        reload(node)
        node.wait_until("refuse the pair", lambda: "the reload failed" in node.log_path.read_text(encoding="utf-8"))
        assert status(open_port, context_for(second)) == 200
        node.stop()
        assert not path.exists()
        for made in (tmp_path / "store").iterdir():
            assert stat.S_IMODE(made.stat().st_mode) == 0o600, made
        assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
    finally:
        node.kill()


def reload(node: Node) -> None:
    assert node.process is not None
    os.kill(node.process.pid, signal.SIGHUP)


def speaks(port: int, authority: Credentials) -> bool:
    try:
        return status(port, context_for(authority)) == 200
    except ssl.SSLCertVerificationError:
        return False
