"""Every way to say where Consul is, against a real one: the forms of an address, and Consul's own variables."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from consul_backend.config import ConsulConfig
from consul_backend.errors import PermissionDenied, Unavailable
from consul_backend.store import ConsulStore
from consul_backend.txn import Set
from sidecar.dev_tls import dev_certificates
from tests.support.cluster import Cluster, Node, free_port
from tests.support.consul_server import ConsulServer

NAME = "consul.test"


@dataclass(frozen=True)
class Place:
    """One Consul and what it can be reached by; ``words`` stand for it in the tests' tables."""

    server: ConsulServer
    words: dict[str, str]

    def of(self, settings: dict[str, str]) -> dict[str, str]:
        return {name: text.format(**self.words) for name, text in settings.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A Consul on plain and secure ports of IPv4 and IPv6 and on a Unix socket; over TLS it wants a client
    certificate."""
    folder = tmp_path_factory.mktemp("consul")
    only_key, authorities = folder / "empty", folder / "authorities"
    only_key.mkdir()
    authorities.mkdir()
    secure, unix = free_port(), folder / "consul.sock"
    with dev_certificates(str(folder), [NAME]) as made:
        shutil.copy(made.ca, authorities / "ours.crt")
        (authorities / "another.pem").write_bytes(_another_authority(folder / "other"))
        settings = {
            "addresses": {"http": f"127.0.0.1 ::1 unix://{unix}", "https": "127.0.0.1 ::1"},
            "ports": {"https": secure},
            "ca_file": made.ca,
            "cert_file": made.certificate,
            "key_file": made.key,
            "verify_incoming_https": True,
        }
        with ConsulServer(settings=settings) as server:
            plain = server.address.rpartition(":")[2]
            token, wrong = folder / "token", folder / "wrong"
            token.write_text(f"{server.token}\n")
            wrong.write_text("nosuch\n")
            words = {"plain": plain, "secure": str(secure), "unix": str(unix), "token": server.token}
            words |= {"token_file": str(token), "wrong_file": str(wrong), "name": NAME}
            words |= {"ca": made.ca, "cert": made.certificate, "key": made.key}
            yield Place(server, words | {"ca_path": str(authorities), "empty": str(only_key)})


def _another_authority(folder: Path) -> bytes:
    folder.mkdir()
    with dev_certificates(str(folder), []) as made:
        return Path(made.ca).read_bytes()


async def used(config: ConsulConfig) -> None:
    """Everything a node does with Consul, on each kind of connection: transactions, keys, the agent, sessions."""
    store = ConsulStore(config)
    await store.open()
    try:
        await store.txn([Set("k", b"v")])
        item = await store.get("k", consistent=True)
        assert item is not None
        assert item.value == b"v"
        assert (await store.watch("k", 0, 1.0))[0] == item
        session = await store.create_session("test", beat_ttl_s=10.0, lock_delay_s=0.1)
        assert await store.renew_session(session)
        await store.destroy_session(session)
        await store.stop_beat()
    finally:
        await store.close()


CLIENT = {"CONSUL_CLIENT_CERT": "{cert}", "CONSUL_CLIENT_KEY": "{key}"}
TOKEN = {"CONSUL_HTTP_TOKEN": "{token}"}
SECURE = CLIENT | TOKEN | {"CONSUL_CACERT": "{ca}"}


@pytest.mark.parametrize(
    "environ",
    [
        TOKEN | {"CONSUL_HTTP_ADDR": "127.0.0.1:{plain}"},
        TOKEN | {"CONSUL_HTTP_ADDR": "http://127.0.0.1:{plain}"},
        TOKEN | {"CONSUL_HTTP_ADDR": "localhost:{plain}"},
        TOKEN | {"CONSUL_HTTP_ADDR": "[::1]:{plain}"},
        TOKEN | {"CONSUL_HTTP_ADDR": "http://[::1]:{plain}"},
        TOKEN | {"CONSUL_HTTP_ADDR": "unix://{unix}"},
        TOKEN | {"CONSUL_HTTP_ADDR": "unix://{unix}", "CONSUL_HTTP_SSL": "true"},
        TOKEN | {"CONSUL_HTTP_ADDR": "127.0.0.1:{plain}", "CONSUL_HTTP_SSL": "false", "CONSUL_HTTP_AUTH": "u:p"},
        {"CONSUL_HTTP_ADDR": "127.0.0.1:{plain}", "CONSUL_HTTP_TOKEN_FILE": "{token_file}"},
        {"CONSUL_HTTP_ADDR": "127.0.0.1:{plain}", "CONSUL_HTTP_TOKEN_FILE": "{token_file}", "CONSUL_HTTP_TOKEN": "no"},
        SECURE | {"CONSUL_HTTP_ADDR": "https://127.0.0.1:{secure}"},
        SECURE | {"CONSUL_HTTP_ADDR": "https://[::1]:{secure}"},
        SECURE | {"CONSUL_HTTP_ADDR": "127.0.0.1:{secure}", "CONSUL_HTTP_SSL": "1"},
        SECURE | {"CONSUL_HTTP_ADDR": "http://127.0.0.1:{secure}", "CONSUL_HTTP_SSL": "true"},
        SECURE | {"CONSUL_HTTP_ADDR": "https://127.0.0.1:{secure}", "CONSUL_TLS_SERVER_NAME": "{name}"},
        CLIENT | TOKEN | {"CONSUL_HTTP_ADDR": "https://127.0.0.1:{secure}", "CONSUL_CAPATH": "{ca_path}"},
        CLIENT | TOKEN | {"CONSUL_HTTP_ADDR": "https://127.0.0.1:{secure}", "CONSUL_HTTP_SSL_VERIFY": "false"},
    ],
    ids=lambda environ: " ".join(
        f"{name[7:]}={text}" for name, text in environ.items() if text not in ("{cert}", "{key}")
    ),
)
async def test_consuls_own_variables(place: Place, environ: dict[str, str]) -> None:
    await used(ConsulConfig.from_env({}, place.of(environ)))


STANZA = {"token": "{token}", "tls_cert_file": "{cert}", "tls_key_file": "{key}"}
ELSEWHERE = {
    "CONSUL_HTTP_ADDR": "https://127.0.0.1:1",
    "CONSUL_HTTP_SSL": "true",
    "CONSUL_HTTP_TOKEN": "no",
    "CONSUL_HTTP_TOKEN_FILE": "{wrong_file}",
}


@pytest.mark.parametrize(
    "stanza",
    [
        {"token": "{token}", "address": "127.0.0.1:{plain}"},
        {"token": "{token}", "address": "http://[::1]:{plain}", "scheme": "http"},
        {"token": "{token}", "address": "unix://{unix}"},
        {"token_file": "{token_file}", "address": "127.0.0.1:{plain}"},
        STANZA | {"address": "https://127.0.0.1:{secure}", "tls_ca_file": "{ca}"},
        STANZA | {"address": "127.0.0.1:{secure}", "scheme": "https", "tls_ca_path": "{ca_path}"},
        STANZA
        | {"address": "127.0.0.1:{secure}", "scheme": "https", "tls_ca_file": "{ca}", "tls_server_name": "{name}"},
        STANZA | {"address": "https://localhost:{secure}", "tls_skip_verify": "true"},
    ],
    ids=str,
)
async def test_a_stanza_wins_over_the_variables(place: Place, stanza: dict[str, str]) -> None:
    await used(ConsulConfig.from_env(place.of(stanza), place.of(ELSEWHERE)))


@pytest.mark.parametrize(
    ("environ", "refused", "why"),
    [
        (
            SECURE | {"CONSUL_HTTP_ADDR": "https://127.0.0.1:{secure}", "CONSUL_CACERT": "{cert}"},
            Unavailable,
            "certificate is not accepted",
        ),
        (TOKEN | {"CONSUL_HTTP_ADDR": "https://127.0.0.1:{secure}"}, Unavailable, "certificate is not accepted"),
        (
            TOKEN | {"CONSUL_HTTP_ADDR": "https://127.0.0.1:{secure}", "CONSUL_CAPATH": "{empty}"},
            Unavailable,
            "no file",
        ),
        (
            SECURE | {"CONSUL_HTTP_ADDR": "https://127.0.0.1:{secure}", "CONSUL_TLS_SERVER_NAME": "x"},
            Unavailable,
            "Hostname mismatch",
        ),
        ({"CONSUL_HTTP_ADDR": "127.0.0.1:{plain}", "CONSUL_HTTP_TOKEN_FILE": "{empty}"}, Unavailable, "token file"),
        ({"CONSUL_HTTP_ADDR": "127.0.0.1:{plain}", "CONSUL_HTTP_TOKEN_FILE": "{wrong_file}"}, Unavailable, "not know"),
        ({"CONSUL_HTTP_ADDR": "127.0.0.1:{plain}"}, PermissionDenied, "enied"),
        (
            TOKEN | {"CONSUL_HTTP_ADDR": "127.0.0.1:{plain}", "CONSUL_NAMESPACE": "team"},
            Unavailable,
            'namespace "team"',
        ),
        (TOKEN | {"CONSUL_HTTP_ADDR": "unix:///nosuch.sock"}, Unavailable, "No such file"),
    ],
    ids=range(9),
)
async def test_what_cannot_be_is_said_at_the_start(
    place: Place, environ: dict[str, str], refused: type[Exception], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consul_backend.store.READ_DEADLINE_S", 0.5)
    with pytest.raises(refused, match=why):
        await used(ConsulConfig.from_env({}, place.of(environ)))


def test_a_node_with_nothing_but_the_environment(place: Place, tmp_path: Path) -> None:
    """Over TLS with a client certificate and a token from a file, it leads, serves, and shows itself in the catalog."""
    variables = CLIENT | {"CONSUL_HTTP_ADDR": "https://127.0.0.1:{secure}", "CONSUL_CAPATH": "{ca_path}"}
    variables |= {"CONSUL_HTTP_TOKEN_FILE": "{token_file}"}
    node = Node("n", tmp_path, 'storage "consul" {}', environment=place.of(variables))
    cluster = Cluster([node])
    try:
        cluster.bootstrap()
        assert cluster.call("POST", "cubbyhole/a", {"b": "c"}).status == 204
        node.wait_until(
            "its entry in the catalog",
            lambda: any(
                "active" in entry["ServiceTags"] for entry in place.server.call("GET", "catalog/service/outrider").json
            ),
        )
    finally:
        cluster.stop()
