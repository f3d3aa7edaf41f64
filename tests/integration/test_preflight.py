"""Preflight against real listeners and proxies: what is wrong is named, and the token stays unused."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from consul_backend.limits import Limits
from sidecar.replication import preflight
from sidecar.replication.modes import DR, PERFORMANCE
from sidecar.replication.roles import PrimaryRole
from sidecar.transport import certificates
from sidecar.transport.certificates import Credentials
from sidecar.transport.listener import ClusterListener
from tests.support.replication_cluster import OPTIONS, Cluster, Pair, PrimaryApi, primary_in, until

NAMES = [
    "role",
    "token",
    "primary-api",
    "token-on-primary",
    "ca",
    "cluster-port",
    "alpn-path",
    "clock",
    "versions",
    "limits",
]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who answers late here is a machine that is busy."""
    monkeypatch.setattr(preflight, "TIMEOUT_S", 120.0)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with primary_in(PERFORMANCE) as pair:
        pair.api.status_of, pair.api.leader = pair.primary, {"leader_cluster_address": pair.primary.address}
        yield pair


async def checked(pair: Pair, token: str | None = None, **fields: str) -> dict[str, tuple[str, str, str]]:
    """(result, seen, action) by check, of a fresh cluster's preflight."""
    fresh = await pair.start("fresh")
    return await checked_by(fresh, token or await pair.token(), **fields)


async def checked_by(
    cluster: Cluster, token: str, *, mode: str = "performance", api: str = "", ca_file: str = ""
) -> dict[str, tuple[str, str, str]]:
    before = dict(cluster.store.data)
    answer = (await cluster.manager.secondary_preflight(mode, token, api, ca_file, "")).data
    assert cluster.store.data == before
    assert cluster.flipped == []
    found = {check["check"]: (check["result"], check["seen"], check["action"]) for check in answer["checks"]}
    assert answer["ready"] == all(result != "failed" for result, _, _ in found.values())
    assert all(action for result, _, action in found.values() if result == "failed"), "what to do is said"
    return found


def failed(found: dict[str, tuple[str, str, str]]) -> list[str]:
    return [name for name, (result, _, _) in found.items() if result == "failed"]


def only(address: str) -> dict[str, Any]:
    """A status that names one cluster address and no other."""
    return {"primary_cluster_addr": address, "cluster_addrs": None}


@contextlib.asynccontextmanager
async def standing_in(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Something else at the primary's cluster address."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


async def _drop(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    writer.close()


def server_tls(credentials: Credentials, folder: Path, alpn: list[str] | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pem = folder / "server.pem"
    pem.write_bytes(credentials.certificate_pem + credentials.key_pem)
    context.load_cert_chain(pem)
    if alpn:
        context.set_alpn_protocols(alpn)
    return context


async def test_a_good_token_passes_every_check_and_is_still_good(pair: Pair) -> None:
    token, fresh = await pair.token(), await pair.start("fresh")
    found = await checked_by(fresh, token)
    assert list(found) == NAMES
    assert {name: result for name, (result, _, _) in found.items()} == dict.fromkeys(NAMES, "ok")
    assert "not https" in found["primary-api"][1]
    assert "TLS reaches the primary itself" in found["alpn-path"][1]
    assert "/v1/sys/wrapping/unwrap" not in pair.api.calls
    await checked_by(fresh, token)  # as often as one likes
    await fresh.manager.secondary_enable("performance", token, "", "", "")
    assert len(fresh.flipped) == 1
    used = await checked_by(await pair.start("late"), token)
    assert failed(used) == ["token-on-primary"]
    assert "issue a new token" in used["token-on-primary"][2]


async def test_the_primary_sees_nobody(pair: Pair) -> None:
    role = pair.primary.of(PERFORMANCE).role
    await checked(pair)
    after = pair.primary.of(PERFORMANCE).role
    assert isinstance(role, PrimaryRole)
    assert isinstance(after, PrimaryRole)
    assert [known.store_id for known in after.secondaries.values()] == [""]
    await until(lambda: pair.primary.listener.statistics()["connections"] == 0)


async def test_a_role_that_forbids_it(pair: Pair) -> None:
    found = await checked_by(pair.primary, await pair.token())
    assert failed(found) == ["role"]
    assert "already" in found["role"][1] or "is a performance replication primary" in found["role"][1]


async def test_a_damaged_token(pair: Pair) -> None:
    found = await checked(pair, (await pair.token())[:-9])
    assert failed(found) == ["token"]
    assert found["token-on-primary"][0] == found["ca"][0] == "unknown"


async def test_a_token_of_the_other_mode_and_a_rewrapped_one(pair: Pair) -> None:
    await pair.primary.manager.primary_enable("dr", "")
    found = await checked(pair, await pair.token("x", DR))
    assert "another mode" in found["token-on-primary"][1]
    assert failed(found) == ["token-on-primary", "ca"]
    pair.api.creation_path = "sys/wrapping/wrap"
    assert "re-wrapped" in (await checked(pair, await pair.token("y")))["token-on-primary"][1]


async def test_an_api_that_is_not_there(pair: Pair) -> None:
    async with standing_in(_drop) as address:
        pass
    found = await checked(pair, api=address.replace("https", "http"))
    assert failed(found) == ["primary-api"]
    assert [found[name][0] for name in ("ca", "cluster-port", "alpn-path", "clock", "versions", "limits")] == (
        ["unknown"] * 6
    )


async def test_an_api_that_is_no_api(pair: Pair) -> None:
    async with standing_in(_http) as address:
        found = await checked(pair, api=address.replace("https", "http"))
    assert failed(found) == ["primary-api"]
    assert "no JSON" in found["primary-api"][1]


async def test_an_api_whose_authority_is_not_trusted(pair: Pair, tmp_path: Path) -> None:
    authority = certificates.make_authority("api")
    secure = PrimaryApi()
    secure.wrapped, secure.paths, secure.status_of, secure.leader = (
        pair.api.wrapped,
        pair.api.paths,
        pair.primary,
        pair.api.leader,
    )
    await secure.start(server_tls(_for_loopback(authority), tmp_path))
    ca_file, other = tmp_path / "ca.pem", tmp_path / "other.pem"
    ca_file.write_bytes(authority.certificate_pem)
    other.write_bytes(certificates.make_authority("other").certificate_pem)
    try:
        found = await checked(pair, api=secure.address, ca_file=str(other))
        assert failed(found) == ["primary-api"]
        assert "ca_file" in found["primary-api"][2]
        good = await checked(pair, await pair.token("again"), api=secure.address, ca_file=str(ca_file))
        assert failed(good) == []
        assert "https" not in good["primary-api"][2]
        missing = await checked(pair, await pair.token("third"), api=secure.address, ca_file="/nonexistent")
        assert failed(missing) == ["primary-api"]
    finally:
        await secure.stop()


def _for_loopback(authority: Credentials) -> Credentials:
    return certificates._issue(
        authority,
        "api",
        x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
        ExtendedKeyUsageOID.SERVER_AUTH,
    )


async def test_an_api_of_somebody_who_is_no_primary(pair: Pair) -> None:
    pair.api.status = {"mode": "secondary"}
    found = await checked(pair)
    assert failed(found) == ["primary-api"]
    assert "says that it is secondary" in found["primary-api"][1]


async def test_a_cluster_port_that_is_shut(pair: Pair) -> None:
    async with standing_in(_drop) as address:
        pass
    pair.api.status, pair.api.leader = only(address), {}
    found = await checked(pair)
    assert failed(found) == ["cluster-port"]
    assert found["alpn-path"][0] == "unknown"
    pair.api.leader = {"leader_cluster_address": pair.primary.address}
    found = await checked(pair, await pair.token("other"))
    assert failed(found) == ["cluster-port"], "the bundle names one address: another one does not help"
    pair.api.status = {"cluster_addrs": None}  # nothing is configured: the active node's
    assert failed(await checked(pair, await pair.token("third"))) == []


async def test_a_proxy_that_ends_tls_is_named(pair: Pair, tmp_path: Path) -> None:
    """A layer-7 balancer in front of the cluster port, as most people have one in front of the API."""
    balancer = certificates.issue_server(certificates.make_authority("corporate CA"), "balancer.example")
    async with standing_in(_drop, server_tls(balancer, tmp_path, ["http/1.1"])) as address:
        pair.api.status, pair.api.leader = only(address), {}
        found = await checked(pair)
    assert failed(found) == ["alpn-path"]
    _, seen, action = found["alpn-path"]
    assert "TLS-terminating proxy" in seen
    assert "balancer.example" in seen
    assert "corporate CA" in seen
    assert "layer 4" in action


async def test_a_port_that_does_not_speak_tls(pair: Pair) -> None:
    async with standing_in(_http) as address:
        pair.api.status, pair.api.leader = only(address), {}
        found = await checked(pair)
    assert failed(found) == ["alpn-path"]
    assert "does not speak TLS" in found["alpn-path"][1]


async def test_a_standbys_port(pair: Pair) -> None:
    standby = ClusterListener("127.0.0.1", 0)
    await standby.start()
    try:
        pair.api.status = only(f"https://127.0.0.1:{standby.port}")
        pair.api.leader = {}
        found = await checked(pair)
    finally:
        await standby.close()
    assert failed(found) == ["alpn-path"]
    assert "standby" in found["alpn-path"][2]


async def test_the_right_certificate_with_another_protocol(pair: Pair, tmp_path: Path) -> None:
    role = pair.primary.of(PERFORMANCE).role
    assert isinstance(role, PrimaryRole)
    right = certificates.issue_server(role.authority, PERFORMANCE.server_name(role.set_id))
    wrong = certificates.issue_server(role.authority, "another-name")
    for credentials, alpn, text in ((right, None, "not the protocol"), (wrong, [PERFORMANCE.alpn], "is not for")):
        async with standing_in(_drop, server_tls(credentials, tmp_path, alpn)) as address:
            pair.api.status, pair.api.leader = only(address), {}
            found = await checked(pair, await pair.token("eu" if alpn else "us"))
        assert failed(found) == ["alpn-path"]
        assert text in found["alpn-path"][1]


async def test_an_authority_that_is_not_the_tokens(pair: Pair) -> None:
    payload, _ = await pair.primary.manager.secondary_token("performance", "eu", 1800, "")
    found = await checked(pair, pair.api.wrap(payload, {"ca_sha256": "00" * 32}))
    assert failed(found) == ["ca"]
    pair.api.status = {"certificate_authority": None}  # a primary of an older version
    found = await checked(pair, await pair.token("other"))
    assert failed(found) == []
    assert (found["ca"][0], found["alpn-path"][0]) == ("unknown", "unknown")
    assert "ALPN replication_v1" in found["alpn-path"][1]


@pytest.mark.parametrize(("skew_s", "result"), [(0, "ok"), (-20, "ok"), (120, "failed"), (-120, "failed")])
async def test_clocks(pair: Pair, skew_s: int, result: str) -> None:
    pair.api.skew_s = skew_s
    found = await checked(pair)
    assert found["clock"][0] == result
    if skew_s:
        assert ("ahead" in found["clock"][1]) == (skew_s > 30)


async def test_versions(pair: Pair) -> None:
    pair.api.status = {"protocol_versions": [99]}
    found = await checked(pair)
    assert failed(found) == ["versions"]
    assert "upgrade the secondary first" in found["versions"][2]
    pair.api.status = {"protocol_versions": None}
    assert (await checked(pair, await pair.token("other")))["versions"][0] == "unknown"


async def test_limits(pair: Pair) -> None:
    small = replace(OPTIONS, limits=Limits(ops_max=32))
    fresh = await pair.start("small", options=small)
    found = await checked_by(fresh, await pair.token())
    assert (found["limits"][0], "slower" in found["limits"][2]) == ("ok", True)
    assert (await checked(pair, await pair.token("a")))["limits"][2] == ""
    for shown in (None, {"operations": "many"}, {"operations": 1, "body_bytes": 1, "prefix_bytes": 0}):
        pair.api.status = {"store_limits": shown}
        assert (await checked(pair, await pair.token("b")))["limits"][0] == "unknown"


async def test_an_encrypted_token_needs_no_api(pair: Pair) -> None:
    fresh = await pair.start("fresh")
    key = (await fresh.manager.secondary_public_key("performance")).data["secondary_public_key"]
    payload, _ = await pair.primary.manager.secondary_token("performance", "eu", 1800, key)
    found = await checked_by(fresh, payload["token"])
    assert failed(found) == []
    assert [found[name][0] for name in ("token", "ca", "cluster-port", "alpn-path")] == ["ok"] * 4
    assert pair.api.calls == []
    other: dict[str, Any] = await checked_by(await pair.start("thief"), payload["token"])
    assert failed(other) == ["token"]
    await fresh.manager.secondary_enable("performance", payload["token"], "", "", "")
