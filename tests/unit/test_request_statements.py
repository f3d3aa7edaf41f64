"""Attacks on the way of a request that must be refused (statements 1 to 5, 18, 45, 53, 56), each with the defence
switched off once: a test that still passes then would prove nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import posixpath
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from consul_backend.errors import FenceLost, NotApplied
from sidecar.api import json_codec, paths, service
from sidecar.api.server import ServerLimits
from sidecar.api.statuses import Refusal
from sidecar.core.audit import entries as audit_entries
from sidecar.core.audit.hashing import Hasher
from sidecar.core.barrier import Barrier, DecryptionFailed
from sidecar.core.policies import Policy, PolicyStore
from sidecar.telemetry import JSONFormatter, TextFormatter
from tests.support.service_node import Harness, Reply, running, with_kv

MEBIBYTE = 1024 * 1024
CANARY = "canary-5f1c"


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        await with_kv(harness, "1")
        yield harness


async def audited(node: Harness, log: Path, **options: str) -> None:
    body = {"type": "file", "options": {"file_path": str(log), **options}}
    assert (await node.call("PUT", "sys/audit/file", body)).status == 204


async def raw(node: Harness, head: bytes, pieces: Callable[[], AsyncIterator[bytes]] | None = None) -> tuple[int, int]:
    """(status, bytes of body that the server took before it answered)."""
    host, port = node.address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    sent = 0
    try:
        writer.write(head)
        answer = asyncio.create_task(reader.readline())
        if pieces is not None:
            async for piece in pieces():
                writer.write(piece)
                await asyncio.wait({answer, asyncio.create_task(writer.drain())}, return_when=asyncio.FIRST_COMPLETED)
                if answer.done() or writer.is_closing():
                    break
                sent += len(piece)
        async with asyncio.timeout(120):
            return int((await answer).split()[1]), sent
    finally:
        writer.close()


# -- 1: bodies above the cap

HEAD = "PUT /v1/secret/a HTTP/1.1\r\nHost: h\r\nX-Vault-Token: {}\r\n{}\r\n\r\n"


def announced(node: Harness, size: int) -> bytes:
    return HEAD.format(node.root, f"Content-Length: {size}").encode()


def chunked(node: Harness) -> bytes:
    return HEAD.format(node.root, "Transfer-Encoding: chunked").encode()


async def endless() -> AsyncIterator[bytes]:
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    for _ in range(64):
        yield piece


async def test_1_a_body_above_the_cap_is_refused_before_it_is_read() -> None:
    async with running(limits=ServerLimits(body_bytes_max=MEBIBYTE)) as node:
        tracemalloc.start()
        try:
            assert await raw(node, announced(node, MEBIBYTE + 1)) == (413, 0)
            status, taken = await raw(node, chunked(node), endless)
            assert status == 413
            assert taken < 3 * MEBIBYTE
            assert tracemalloc.get_traced_memory()[1] < 8 * MEBIBYTE
        finally:
            tracemalloc.stop()


async def test_1_control_with_a_higher_cap_it_is_read() -> None:
    async with running(limits=ServerLimits(body_bytes_max=64 * MEBIBYTE)) as node:
        await with_kv(node, "1")

        async def whole() -> AsyncIterator[bytes]:
            yield b'{"x":1}' + b" " * (MEBIBYTE - 6)

        assert (await raw(node, announced(node, MEBIBYTE + 1), whole))[0] == 204


# -- 2: very many values in one body

BOMB = b'{"a":[' + b",".join([b"{}"] * 80_000) + b"]}"


async def bomb(
    node: Harness, hashed: list[int], monkeypatch: pytest.MonkeyPatch, body: bytes = BOMB
) -> tuple[int, int]:
    """(status, most bytes allocated)."""
    values = Hasher.values

    def counting(self: Hasher, *arguments: Any) -> Any:
        hashed.append(1)
        return values(self, *arguments)

    monkeypatch.setattr(Hasher, "values", counting)
    tracemalloc.start()
    try:
        async with node.session.put(
            f"{node.address}/v1/secret/a", data=body, headers={"X-Vault-Token": node.root}
        ) as answer:
            return answer.status, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


async def test_2_very_many_values_cost_little_and_reach_no_audit(
    node: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await audited(node, tmp_path / "log")
    hashed: list[int] = []
    status, peak = await bomb(node, hashed, monkeypatch)
    assert status == 400
    assert peak < 8 * len(BOMB)
    assert len(hashed) < 20


async def test_2_control_without_the_bound_they_are_all_hashed(
    node: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await audited(node, tmp_path / "log")
    monkeypatch.setattr(json_codec, "VALUES_MAX", 10**9)
    hashed: list[int] = []
    small = BOMB[: len(BOMB) // 4].rpartition(b",")[0] + b"]}"
    status, peak = await bomb(node, hashed, monkeypatch, small)
    assert status == 204
    assert peak > 16 * len(small)
    assert len(hashed) > 19_000


# -- 3: the rate limit comes before the parser


async def parsed(node: Harness, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], int]:
    """(statuses of five requests with junk, how often the parser was asked)."""
    asked: list[bytes] = []
    decode = json_codec.decode_object

    def counting(body: bytes) -> dict[str, Any]:
        asked.append(body)
        return decode(body)

    monkeypatch.setattr(json_codec, "decode_object", counting)
    statuses = []
    for _ in range(5):
        async with node.session.put(f"{node.address}/v1/secret/a", data=b'{"a":[[[[') as answer:
            statuses.append(answer.status)
    return statuses, len(asked)


async def test_3_junk_at_rate_is_refused_unparsed(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await node.call("POST", "sys/quotas/rate-limit/q", {"rate": 1, "path": "secret"})).status == 204
    assert await parsed(node, monkeypatch) == ([400, 429, 429, 429, 429], 1)


async def test_3_control_without_the_quota_all_is_parsed(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await parsed(node, monkeypatch) == ([400] * 5, 5)


# -- 4: JSON that two readers could read differently

AMBIGUOUS = {
    "nested": b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "digits": b'{"a":' + b"1" * 4000 + b"}",
    "nan": b'{"a":NaN}',
    "infinity": b'{"a":-Infinity}',
    "too large": b'{"a":1e999}',
    "twice": b'{"a":1,"a":2}',
    "surrogate": b'{"a":"\\ud800"}',
    "utf-16": '{"a":1}'.encode("utf-16"),
}


async def written(node: Harness, body: bytes) -> int:
    async with node.session.put(
        f"{node.address}/v1/secret/a", data=body, headers={"X-Vault-Token": node.root}
    ) as answer:
        return answer.status


@pytest.mark.parametrize("kind", AMBIGUOUS)
async def test_4_ambiguous_json_is_refused(node: Harness, kind: str) -> None:
    assert await written(node, AMBIGUOUS[kind]) == 400
    assert (await node.call("GET", "secret/a")).status == 404


@pytest.mark.parametrize("kind", ["digits", "nan", "infinity", "too large", "twice", "utf-16"])
async def test_4_control_another_parser_would_take_it(
    node: Harness, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_codec, "decode_object", json.loads)
    assert await written(node, AMBIGUOUS[kind]) == 204


# -- 5: paths that mean something else after cleaning

HIDDEN = (
    "secret/a/../b",
    "secret/./b",
    "secret//b",
    "secret/%2e%2e/secret/b",
    "secret/a%2f..%2fb",
    "secret/b%00",
    "secret/%c0%ae%c0%ae/b",
    "secret/a\\..\\b",
)


async def reading(node: Harness, path: str) -> tuple[int, bytes]:
    host, port = node.address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        f"GET /v1/{path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nX-Vault-Token: {node.root}\r\n\r\n".encode()
    )
    async with asyncio.timeout(120):
        answer = await reader.read()
    writer.close()
    return int(answer.split()[1]), answer


@pytest.mark.parametrize("path", HIDDEN)
async def test_5_a_path_is_refused_and_not_cleaned(node: Harness, path: str) -> None:
    await node.call("PUT", "secret/b", {"x": CANARY})
    status, answer = await reading(node, path)
    assert status == 400
    assert CANARY.encode() not in answer


async def test_5_control_a_server_that_cleans_would_run_it(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    await node.call("PUT", "secret/b", {"x": CANARY})
    monkeypatch.setattr(paths, "decode_path", lambda path: posixpath.normpath(unquote(path)).lstrip("/"))
    reached = [path for path in HIDDEN if CANARY.encode() in (await reading(node, path))[1]]
    assert len(reached) >= 5


# -- 18: what an error says

SESSION = "3f0c8d2e-0000-4000-8000-00000000cafe"


async def refused_answers(node: Harness) -> str:
    """Everything that clients are told by errors with something to hide."""
    texts = []
    for error in (FenceLost(f"session {SESSION} lost r/secret/key"), NotApplied(SESSION), ValueError(SESSION)):
        node.store.fail_next = error
        texts.append(str((await node.call("PUT", "secret/a", {"x": "1"})).body))
    bodies = ({"type": {"password": CANARY}}, {"type": CANARY, "config": {"default_lease_ttl": [CANARY]}})
    texts += [str((await node.call("POST", "sys/mounts/other", body)).body) for body in bodies]
    async with node.session.put(f"{node.address}/v1/secret/a", data=f'{{"x":"{CANARY}'.encode()) as answer:
        texts.append(await answer.text())
    return "".join(texts).replace(f"plugin not found in the catalog: {CANARY}", "")


async def test_18_errors_repeat_no_value_and_no_name_of_others(node: Harness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1, logger="core")
    told = await refused_answers(node)
    assert SESSION not in told
    assert CANARY not in told
    assert "r/secret/key" not in told


async def test_18_control_the_errors_texts_would(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "refusal", lambda error: Refusal(500, (str(error),)))
    assert SESSION in await refused_answers(node)


async def test_a_defect_is_answered_with_its_request_id_and_logged_with_it(
    node: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(self: object, name: str) -> None:
        raise RuntimeError(f"internal detail {SESSION}")

    monkeypatch.setattr(PolicyStore, "get", broken)
    reply = await node.call("GET", "sys/policies/acl/a")
    assert reply.status == 500
    assert len(reply.errors) == 1
    assert SESSION not in reply.errors[0]
    request_id = reply.errors[0].removeprefix("internal error (request ").removesuffix(")")
    record = next(record for record in caplog.records if request_id in record.getMessage())
    assert record.exc_info is not None
    monkeypatch.undo()
    assert (await node.call("GET", "sys/policies/acl/default")).status == 200


# -- a request that fails changes nothing

CHANGES: list[tuple[str, str, Any]] = [
    ("PUT", "sys/policies/acl/a", {"policy": 'path "new" { capabilities = ["read"] }'}),
    ("DELETE", "sys/policies/acl/a", None),
    ("PUT", "sys/policies/password/p", {"policy": 'length = 9 rule "charset" { charset = "new" }'}),
    ("POST", "sys/mounts/more", {"type": "kv"}),
    ("DELETE", "sys/mounts/secret", None),
    ("POST", "sys/mounts/secret/tune", {"description": "new", "default_lease_ttl": "1h"}),
    ("POST", "sys/mounts/secret/tune", {"options": {"version": "2"}}),
    ("POST", "sys/remount", {"from": "secret", "to": "moved"}),
    ("POST", "sys/auth/userpass", {"type": "userpass"}),
    ("PUT", "sys/config/cors", {"allowed_origins": "*"}),
    ("PUT", "sys/config/auditing/request-headers/x-new", {}),
    ("PUT", "sys/config/ui/headers/x-new", {"values": "v"}),
    ("POST", "sys/quotas/rate-limit/q", {"rate": 1000}),
    ("POST", "auth/token/create", {"policies": ["a"]}),
    ("POST", "auth/token/roles/r", {"orphan": True}),
    ("PUT", "secret/a", {"x": "new"}),
    ("DELETE", "secret/a", None),
    ("PUT", "cubbyhole/a", {"x": "new"}),
    ("PUT", "sys/rotate", {}),
]
SEEN = (
    "sys/mounts",
    "sys/auth",
    "sys/policies/acl?list=true",
    "sys/policies/acl/a",
    "sys/policies/password?list=true",
    "sys/config/cors",
    "sys/config/auditing/request-headers",
    "sys/config/ui/headers",
    "sys/quotas/rate-limit?list=true",
    "auth/token/accessors?list=true",
    "auth/token/roles?list=true",
    "secret/a",
    "cubbyhole/a",
    "sys/internal/ui/mounts/secret",
)


async def state(node: Harness) -> list[Any]:
    replies: list[Reply] = [await node.call("GET", path) for path in SEEN]
    return [(reply.status, reply.body.get("data"), reply.errors) for reply in replies]


async def failed(node: Harness, method: str, path: str, body: Any) -> tuple[Any, Any]:
    """What could be seen before and after a change that the store did not apply."""
    await node.call("PUT", "sys/policies/acl/a", {"policy": 'path "old" { capabilities = ["read"] }'})
    await node.call("PUT", "secret/a", {"x": "old"})
    before, entries = await state(node), dict(node.store.entries)
    node.store.fail_next = NotApplied("given up")
    reply = await node.call(method, path, body)
    assert reply.status == 503, reply
    assert node.store.fail_next is None
    assert node.store.entries == entries
    return before, await state(node)


@pytest.mark.parametrize(("method", "path", "body"), CHANGES, ids=lambda value: value if isinstance(value, str) else "")
async def test_a_request_that_fails_changes_nothing(node: Harness, method: str, path: str, body: Any) -> None:
    before, after = await failed(node, method, path, body)
    assert after == before
    assert (await node.call(method, path, body)).status in (200, 204), "it works once the store does"


async def test_control_a_change_made_too_early_is_seen(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    put = PolicyStore.put

    async def hasty(self: PolicyStore, name: str, text: str) -> None:
        self._policies[name] = Policy.parse(name, text)
        await put(self, name, text)

    await node.call("PUT", "sys/policies/acl/a", {"policy": 'path "old" { capabilities = ["read"] }'})
    before, after = None, None

    monkeypatch.setattr(PolicyStore, "put", hasty)
    before, after = await failed(node, *CHANGES[0])
    assert after != before


# -- 45: one changed bit


async def flipped(node: Harness, log: Path) -> list[Reply]:
    """Read a secret once for every sixteenth bit of what is stored of it, changed each time."""
    await node.call("PUT", "secret/a", {"x": CANARY})
    await audited(node, log)
    uuid = (await node.call("GET", "sys/mounts")).data["secret/"]["uuid"]
    key = f"r/{uuid}/a"
    good = node.store.entries[key]
    replies = []
    for bit in range(0, 8 * len(good), 16):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        node.store.entries[key] = bytes(bad)
        replies.append(await node.call("GET", "secret/a"))
    node.store.entries[key] = good
    assert (await node.call("GET", "secret/a")).data == {"x": CANARY}
    return replies


async def test_45_one_changed_bit_fails_closed_and_is_audited(node: Harness, tmp_path: Path) -> None:
    log = tmp_path / "log"
    replies = await flipped(node, log)
    for reply in replies:
        assert reply.status == 500
        assert reply.errors == ["stored data failed its integrity check"]
        assert set(reply.body) == {"errors"}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    failures = [line for line in lines if line["type"] == "response" and line.get("error")]
    assert len(failures) == len(replies)


async def test_45_control_without_authentication_damage_is_served(
    node: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Barrier.open

    def trusting(self: Barrier, key: str, blob: bytes) -> bytes:
        try:
            return opened(self, key, blob)
        except DecryptionFailed:
            return b'{"x":"whatever came out"}'

    monkeypatch.setattr(Barrier, "open", trusting)
    assert {reply.status for reply in await flipped(node, tmp_path / "log")} == {200}


def test_45_the_cipher_itself_refuses() -> None:
    cipher = AESGCM(bytes(32))
    sealed = bytearray(cipher.encrypt(bytes(12), b"text", b"key"))
    sealed[0] ^= 1
    with pytest.raises(InvalidTag):
        cipher.decrypt(bytes(12), bytes(sealed), b"key")


# -- 53: secrets in every shape

DIGITS = 8675309123


async def send_everywhere(node: Harness) -> None:
    """The canary as text, number, list, member, name of a form field's value, query, header, token, broken body."""
    await node.call("PUT", "secret/a", {"t": CANARY, "n": DIGITS, "l": [CANARY, {"m": CANARY}], "f": DIGITS / 4})
    await node.call("GET", "secret/a", X_Canary=CANARY)
    await node.call("GET", f"sys/internal/ui/mounts?x={CANARY}")
    await node.call("GET", "secret/a", token=f"hvs.{CANARY}")
    await node.call("POST", "sys/wrapping/wrap", {"x": CANARY}, X_Vault_Wrap_TTL="60")
    await node.call("POST", "sys/mounts/bad", {"type": [{"x": CANARY}]})
    for body, kind in ((f'{{"x":"{CANARY}'.encode(), "application/json"), (f"x={CANARY}".encode(), FORM)):
        headers = {"X-Vault-Token": node.root, "Content-Type": kind}
        async with node.session.put(f"{node.address}/v1/secret/b", data=body, headers=headers) as answer:
            await answer.read()


FORM = "application/x-www-form-urlencoded"


async def test_53_no_shape_of_a_secret_passes_in_clear(node: Harness, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert (await node.call("PUT", "sys/config/auditing/request-headers/x-canary", {"hmac": True})).status == 204
    await audited(node, log, hmac_numbers="true")
    await send_everywhere(node)
    text = log.read_text()
    assert len(text.splitlines()) > 10
    assert CANARY not in text
    assert str(DIGITS) not in text
    assert str(DIGITS / 4) not in text


async def test_53_control_raw_entries_hold_them_all(node: Harness, tmp_path: Path) -> None:
    log = tmp_path / "log"
    await node.call("PUT", "sys/config/auditing/request-headers/x-canary", {"hmac": True})
    await audited(node, log, log_raw="true")
    await send_everywhere(node)
    text = log.read_text()
    assert text.count(CANARY) > 8
    assert str(DIGITS) in text


async def test_53_numbers_are_in_clear_where_the_device_was_not_told(node: Harness, tmp_path: Path) -> None:
    log = tmp_path / "log"
    await audited(node, log)
    await node.call("PUT", "secret/a", {"n": DIGITS})
    assert str(DIGITS) in log.read_text()


# -- 56: nothing a client sends forges a line

EVIL = 'a\r\n{"type":"forged"}\x1b[31m\u2028\u2029\u202e\x00'


async def send_evil(node: Harness) -> None:
    await node.call("PUT", "secret/a", {EVIL: EVIL})
    await node.call("POST", "auth/token/create", {"display_name": EVIL, "meta": {EVIL: EVIL}, "policies": [EVIL]})
    await node.call("PUT", "sys/policies/acl/%20x%E2%80%A8", {"policy": EVIL})
    await node.call("POST", "sys/mounts/m", {"type": "kv", "description": EVIL})


async def written_by_evil(node: Harness, log: Path) -> None:
    await audited(node, log, log_raw="true")
    await send_evil(node)


def lines_of(log: Path) -> list[str]:
    return log.read_bytes().decode().split("\n")[:-1]


async def test_56_every_line_is_one_object_of_plain_text(node: Harness, tmp_path: Path) -> None:
    await written_by_evil(node, tmp_path / "log")
    lines = lines_of(tmp_path / "log")
    assert len(lines) >= 8
    for line in lines:
        assert json.loads(line)["type"] in ("request", "response")
        assert line.isascii()
        assert line.isprintable()


async def test_56_control_an_encoder_that_keeps_text_would_break_lines(
    node: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_entries, "_text", lambda value: json.dumps(value, ensure_ascii=False))
    await written_by_evil(node, tmp_path / "log")
    assert not all(line.isprintable() for line in lines_of(tmp_path / "log"))


@pytest.mark.parametrize("formatter", [TextFormatter(), JSONFormatter()])
def test_56_the_servers_own_log_keeps_to_a_line(formatter: logging.Formatter) -> None:
    record = logging.LogRecord("core", logging.INFO, __file__, 1, "path=%s", (EVIL,), None)
    line = formatter.format(record)
    assert "\n" not in line
    assert line.replace("\u202e", "").isprintable()
    plain = logging.Formatter().format(record)
    assert "\n" in plain
