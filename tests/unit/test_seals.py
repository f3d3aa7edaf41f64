"""Auto seals by themselves: static keys, the transit engine of another server, and what a record needs."""

import asyncio
import base64
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from plugin_api.errors import Unavailable
from sidecar.config import TransitSealSettings
from sidecar.core.keys import SEAL
from sidecar.core.seal import SealConfig
from sidecar.core.seal_record import (
    AutoPart,
    BadSealRecord,
    SealRecord,
    WrongKey,
    make_auto_part,
    make_seal_record,
    open_root_key,
)
from sidecar.core.seal_rewrap import is_newer, rewrap
from sidecar.core.seals import AutoSeal, Need, SealUnavailable, Wrapped, needed, prepare, unseal_root_key
from sidecar.core.seals.static import BadStaticKey, StaticKey, StaticSeal, load_static_key
from sidecar.core.seals.transit import TransitSeal
from tests.support.logical_store import make_sealed
from tests.support.service_node import running

KEY = bytes(range(32))


def static(key_id: str = "k1", key: bytes = KEY, previous: StaticKey | None = None) -> StaticSeal:
    return StaticSeal(StaticKey(key_id, key), previous)


def shares_only(root_key: bytes, share_key: bytes) -> SealRecord:
    return make_seal_record(root_key, share_key, SealConfig(5, 3), 1_700_000_000, os.urandom)


async def sealed_record(seal: AutoSeal, root_key: bytes, share_key: bytes = KEY) -> SealRecord:
    return shares_only(root_key, share_key).with_auto((await prepare(seal, os.urandom))(root_key))


# -- the record


async def test_a_record_opens_by_the_auto_seal_and_by_the_recovery_shares() -> None:
    root_key, share_key, seal = os.urandom(32), os.urandom(32), static()
    record = SealRecord.decode((await sealed_record(seal, root_key, share_key)).encode())
    assert record.kind == "static"
    assert record.auto is not None
    assert await unseal_root_key(seal, record.auto) == root_key
    assert open_root_key(record, share_key) == root_key
    assert record.with_auto(None).encode() == SealRecord.decode(record.with_auto(None).encode()).encode()
    assert record.with_auto(None).kind == "shamir"
    for secret in (root_key, share_key, KEY):
        assert secret not in record.encode()
        assert base64.b64encode(secret) not in record.encode()
        assert secret.hex() not in repr((record, seal))


async def test_the_auto_part_is_bound_to_its_seal_and_key() -> None:
    root_key, seal = os.urandom(32), static()
    raw = (await sealed_record(seal, root_key)).encode()
    renamed = SealRecord.decode(raw.replace(b'"k1"', b'"k2"'))
    assert renamed.auto is not None
    with pytest.raises(SealUnavailable):
        await unseal_root_key(StaticSeal(StaticKey("k2", KEY), None), renamed.auto)
    other = await sealed_record(seal, os.urandom(32))
    mixed = SealRecord.decode(raw).auto
    assert mixed is not None
    assert other.auto is not None
    swapped = replace(mixed, encrypted_root_key=other.auto.encrypted_root_key)
    with pytest.raises(WrongKey):
        await unseal_root_key(seal, swapped)


def test_records_of_versions_that_do_not_fit_are_refused() -> None:
    raw = shares_only(KEY, KEY).encode()
    for changed, text in ((b'"version":2', "version 2"), (b'"version":9', "version 9")):
        with pytest.raises(BadSealRecord, match=text):
            SealRecord.decode(raw.replace(b'"version":1', changed))


async def test_what_a_record_needs() -> None:
    shamir = shares_only(KEY, KEY)
    auto = await sealed_record(static("k1"), KEY)
    transit = TransitSeal(TransitSealSettings("http://h", "t", "k", "transit"))
    assert needed(shamir, None, ()) is Need.SHARES
    assert needed(shamir, static(), ()) is Need.MIGRATION
    assert needed(auto, None, ()) is Need.MIGRATION
    assert needed(auto, None, ("static",)) is Need.MIGRATION
    assert needed(auto, transit, ("static",)) is Need.MIGRATION
    assert needed(auto, static("k1"), ()) is Need.AUTO
    assert needed(auto, static("k2"), ()) is Need.AUTO, "it may know k1 as its previous key"
    assert needed(auto, static("k2"), ("static",)) is Need.MIGRATION
    assert needed(auto, static("k1"), ("static",)) is Need.AUTO, "done already"


# -- static keys


async def test_a_previous_static_key_opens_and_the_current_one_wraps() -> None:
    old = StaticKey("2024", os.urandom(32))
    wrapped = await StaticSeal(old, None).wrap(KEY)
    rotated = StaticSeal(StaticKey("2025", os.urandom(32)), old)
    assert await rotated.unwrap(wrapped) == KEY
    again = await rotated.wrap(KEY)
    assert (wrapped.key_id, again.key_id) == ("2024", "2025")
    with pytest.raises(SealUnavailable, match="has only '2024'") as unknown:
        await StaticSeal(old, None).unwrap(again)
    assert "previous_key" in str(unknown.value)
    with pytest.raises(SealUnavailable, match="another key"):
        await static("2024").unwrap(wrapped)
    with pytest.raises(SealUnavailable):
        await StaticSeal(old, None).unwrap(Wrapped("2024", b"short"))


def test_where_static_keys_come_from(tmp_path: Path) -> None:
    raw, hexed, text = tmp_path / "raw", tmp_path / "hex", tmp_path / "b64"
    raw.write_bytes(KEY)
    hexed.write_text(KEY.hex() + "\n")
    text.write_text(base64.b64encode(KEY).decode() + "\n")
    for path in (raw, hexed, text):
        path.chmod(0o600)
    environ = {"SEAL_KEY": base64.b64encode(KEY).decode(), "SHORT": "abcd"}
    warnings: list[str] = []
    for value in (
        KEY.hex(),
        base64.b64encode(KEY).decode(),
        "env://SEAL_KEY",
        *(f"file://{p}" for p in (raw, hexed, text)),
    ):
        assert load_static_key("current_key", "k", value, environ, warnings) == StaticKey("k", KEY)
    assert warnings == []
    raw.chmod(0o644)
    load_static_key("current_key", "k", f"file://{raw}", environ, warnings)
    assert "0644" in warnings[0]
    for value, where in (
        ("env://UNSET", "current_key: the environment variable UNSET is not set"),
        ("env://SHORT", "SHORT does not hold a key of 32 bytes"),
        (f"file://{tmp_path}/none", "No such file"),
        (KEY.hex()[:-2], "does not hold a key"),
        ("€", "does not hold a key"),
    ):
        with pytest.raises(BadStaticKey, match=where) as refused:
            load_static_key("current_key", "k", value, environ, warnings)
        assert value.startswith(("env", "file")) or value not in str(refused.value)


# -- transit


@dataclass
class TransitServer:
    """What the seal asks of another server. ``down`` is the status it answers everything with."""

    address: str = ""
    token: str = "hvs.seal"
    down: int = 0
    version: int = 1
    decrypts_from: int = 1
    renewable: bool = True
    ttl_s: float = 3600
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    renewed: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else {}
        self.seen.append((f"{request.method} {request.path}", body))
        if self.down:
            return web.json_response({"errors": ["Vault is sealed"]}, status=self.down)
        if request.headers["X-Vault-Token"] != self.token:
            return web.json_response({"errors": ["permission denied"]}, status=403)
        if request.path == "/v1/redirected/encrypt/k":
            return web.Response(status=307, headers={"Location": f"{self.address}/v1/transit/encrypt/k"})
        data: dict[str, Any] = {}
        if request.path == "/v1/transit/encrypt/k":
            data = {"ciphertext": f"vault:v{self.version}:{body['plaintext'][::-1]}"}
        elif request.path == "/v1/transit/decrypt/k":
            if not body["ciphertext"].startswith("vault:v"):
                return web.json_response({"errors": ["invalid ciphertext: no prefix"]}, status=400)
            _, version, text = body["ciphertext"].split(":", 2)
            if int(version[1:]) < self.decrypts_from:
                return web.json_response({"errors": ["ciphertext version is disallowed by policy"]}, status=400)
            data = {"plaintext": text[::-1]}
        elif request.path == "/v1/auth/token/lookup-self":
            data = {"ttl": self.ttl_s, "renewable": self.renewable}
        elif request.path == "/v1/auth/token/renew-self":
            self.renewed.set()
            return web.json_response({"auth": {"lease_duration": self.ttl_s}})
        else:
            return web.json_response({"errors": []}, status=404)
        return web.json_response({"data": data})


@pytest.fixture
async def server() -> AsyncIterator[TransitServer]:
    transit = TransitServer()
    runner = web.ServerRunner(web.Server(transit.handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    transit.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield transit
    await runner.cleanup()


class Heard(logging.Handler):
    """What was logged, to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put_nowait(record.getMessage())

    async def heard(self, text: str) -> None:
        while text not in await self._lines.get():
            pass


@pytest.fixture
def logged() -> Iterator[Heard]:
    handler = Heard()
    logger = logging.getLogger("core.seal")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


SealFactory = Callable[..., Awaitable[TransitSeal]]


@pytest.fixture
async def seal_of() -> AsyncIterator[SealFactory]:
    made: list[TransitSeal] = []

    async def make(server: TransitServer, **more: Any) -> TransitSeal:
        settings = {"token": "hvs.seal", "key_name": "k", "mount_path": "transit", **more}
        made.append(TransitSeal(TransitSealSettings(server.address, **settings)))
        return made[-1]

    yield make
    for seal in made:
        await seal.close()


async def test_transit_wraps_a_key_that_is_not_the_root_key(server: TransitServer, seal_of: SealFactory) -> None:
    root_key, seal = os.urandom(32), await seal_of(server)
    record = await sealed_record(seal, root_key)
    assert record.auto is not None
    assert (record.auto.kind, record.auto.key_id) == ("transit", "transit/k")
    assert await unseal_root_key(seal, record.auto) == root_key
    sent = [base64.b64decode(body["plaintext"]) for _, body in server.seen if "plaintext" in body]
    assert len(sent) == 1
    assert sent[0] != root_key
    assert "hvs.seal" not in repr(seal)


async def test_what_a_transit_server_says_no_with(server: TransitServer, seal_of: SealFactory) -> None:
    seal = await seal_of(server)
    wrapped = await seal.wrap(KEY)
    server.down = 503
    with pytest.raises(SealUnavailable, match=r'refused to decrypt with the key "k": 503: Vault is sealed'):
        await seal.unwrap(wrapped)
    server.down = 0
    with pytest.raises(SealUnavailable, match="400: invalid ciphertext"):
        await seal.unwrap(Wrapped("k", b"nothing"))
    with pytest.raises(SealUnavailable, match="403: permission denied") as denied:
        await (await seal_of(server, token="wrong-token")).wrap(KEY)
    assert "wrong-token" not in str(denied.value)
    with pytest.raises(SealUnavailable, match="without the key"):
        await seal.unwrap(Wrapped("k", b"vault:v1:QUJD"[::1]))
    gone = TransitServer("http://127.0.0.1:1")
    with pytest.raises(SealUnavailable, match="cannot be reached"):
        await (await seal_of(gone)).wrap(KEY)


async def test_transit_follows_one_redirect(server: TransitServer, seal_of: SealFactory) -> None:
    seal = await seal_of(server, mount_path="redirected")
    assert (await seal.wrap(KEY)).blob.startswith(b"vault:v1:")


async def test_transit_renews_its_token_until_it_is_told_not_to(
    server: TransitServer, seal_of: SealFactory, logged: Heard
) -> None:
    running = asyncio.create_task((await seal_of(server)).run())
    async with asyncio.timeout(120):
        await server.renewed.wait()
    running.cancel()
    asked = [what for what, _ in server.seen]
    assert asked == ["GET /v1/auth/token/lookup-self", "POST /v1/auth/token/renew-self"]
    await (await seal_of(server, disable_renewal=True)).run()
    assert len(server.seen) == 2

    server.renewable = False
    running = asyncio.create_task((await seal_of(server)).run())
    async with asyncio.timeout(120):
        await logged.heard("is not renewable")
    running.cancel()


async def test_a_token_that_cannot_be_renewed_is_tried_again(
    server: TransitServer, seal_of: SealFactory, logged: Heard
) -> None:
    server.down = 503
    running = asyncio.create_task((await seal_of(server)).run())
    async with asyncio.timeout(120):
        await logged.heard("could not be renewed")
        server.down = 0
        await server.renewed.wait()
    running.cancel()


async def test_a_key_that_was_rotated_there_wraps_anew_here(server: TransitServer, seal_of: SealFactory) -> None:
    """Older versions can then be given up on the other server; the shares stay what they were."""
    seal = await seal_of(server)
    store, sealed = make_sealed()
    root_key, lock = sealed.barrier.root_key(), asyncio.Lock()
    record = await sealed_record(seal, root_key)
    store.data[SEAL] = record.encode()
    assert not await rewrap(sealed, lambda: prepare(seal, os.urandom), lock)
    assert store.data[SEAL] == record.encode(), "the same version: nothing is written"
    server.version = 3
    assert await rewrap(sealed, lambda: prepare(seal, os.urandom), lock)
    server.decrypts_from = 3
    renewed = SealRecord.decode(store.data[SEAL])
    assert renewed.auto is not None
    assert await unseal_root_key(seal, renewed.auto) == root_key
    assert open_root_key(renewed, KEY) == root_key
    with pytest.raises(SealUnavailable, match="disallowed by policy"):
        await unseal_root_key(seal, record.auto)  # type: ignore[arg-type]  # it has one
    assert not await rewrap(sealed, lambda: prepare(seal, os.urandom), lock)


async def test_only_a_newer_version_of_the_same_key_counts(server: TransitServer, seal_of: SealFactory) -> None:
    def part(kind: str, key_id: str, blob: bytes) -> AutoPart:
        return make_auto_part(KEY, KEY, blob, kind, key_id, os.urandom)

    old = part("transit", "transit/k", b"vault:v9:x")
    assert is_newer(part("transit", "transit/k", b"vault:v10:x"), old)
    for other in (
        part("transit", "transit/k", b"vault:v9:y"),
        part("transit", "transit/k", b"vault:v2:y"),
        part("transit", "transit/other", b"vault:v10:x"),
        part("static", "transit/k", b"vault:v10:x"),
        part("transit", "transit/k", b"no version at all"),
    ):
        assert not is_newer(other, old)
    _, sealed = make_sealed()
    seal, lock = await seal_of(server), asyncio.Lock()
    assert not await rewrap(sealed, lambda: prepare(seal, os.urandom), lock), "there is no record"

    async def none() -> None:
        return None

    async def unreachable() -> Any:
        raise Unavailable("the transit server is away")

    assert not await rewrap(sealed, none, lock)
    assert not await rewrap(sealed, unreachable, lock), "it is for the next pass"


async def test_a_tenure_puts_its_root_key_under_the_newest_version(server: TransitServer, seal_of: SealFactory) -> None:
    seal = await seal_of(server)
    async with running() as node:
        stored = SealRecord.decode(node.store.entries[SEAL])
        root_key = node.service._sealed.barrier.root_key()
        record = stored.with_auto((await prepare(seal, os.urandom))(root_key))
        node.store.entries[SEAL] = record.encode()
        server.version = 2

        async def sealer() -> Any:
            return await prepare(seal, os.urandom)

        node.node.sealer = sealer  # type: ignore[method-assign]  # the configured seal
        work = asyncio.create_task(node.service.run())
        await node.store.until(lambda: node.store.entries[SEAL] != record.encode())
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        renewed = SealRecord.decode(node.store.entries[SEAL]).auto
        assert renewed is not None
        assert renewed.wrapped_key.startswith(b"vault:v2:")
