"""Audit through the whole service: what is entered, what never is in clear, and when nothing may leave."""

import asyncio
import contextlib
import json
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import hvac
import pytest

from sidecar.core.audit.options import LocalRules
from tests.support.service_node import (
    DENIED,
    Harness,
    Reply,
    log_in,
    primary_and_secondary,
    replicate,
    running,
    with_bob,
    with_kv,
)

INTERNAL = ["internal error"]


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


async def enable(
    harness: Harness, path: Path | str, name: str = "file", *, local: bool = False, **options: Any
) -> Reply:
    body = {"type": "file", "options": {"file_path": str(path), **options}, "local": local}
    return await harness.call("PUT", f"sys/audit/{name}", body)


async def enabled(harness: Harness, path: Path | str, name: str = "file", **options: Any) -> None:
    reply = await enable(harness, path, name, **options)
    assert reply.status == 204, reply.errors


def text(path: Path) -> str:
    return path.read_text()


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def put_directory(path: Path) -> None:
    """Put what no line can be appended to in the place of a file."""
    path.unlink()
    path.mkdir()


def entries(path: Path) -> list[dict[str, Any]]:
    """Every entry, oldest first, without the test of the device and the request that enabled it."""
    lines = [json.loads(line) for line in text(path).splitlines()]
    return [line for line in lines if not line["request"]["path"].startswith("sys/audit/")]


# -- what is entered


async def test_request_and_response_are_entered_in_this_order(node: Harness, path: Path) -> None:
    await with_kv(node)
    await enabled(node, path)
    assert (
        await node.call("POST", "secret/data/a", {"data": {"password": "s3cr3t"}, "options": {"cas": 0}})
    ).status == 200
    got = await node.call("GET", "secret/data/a")
    written, answered, asked, shown = entries(path)
    assert [line["type"] for line in (written, answered, asked, shown)] == ["request", "response"] * 2
    assert written["request"]["operation"] == "create"
    assert written["request"]["path"] == "secret/data/a"
    assert written["request"]["mount_type"] == "kv"
    assert written["request"]["mount_point"] == "secret/"
    assert written["request"]["remote_address"] == "127.0.0.1"
    assert written["request"]["remote_port"] > 1023, "of the client's connection"
    assert written["request"]["data"]["options"] == {"cas": 0}
    assert written["auth"]["display_name"] == "root"
    assert written["auth"]["policies"] == ["root"]
    assert written["auth"]["token_type"] == "service"
    assert answered["request"]["id"] == written["request"]["id"]
    assert answered["response"]["data"]["version"] == 1
    assert asked["request"]["operation"] == "read"
    assert shown["response"]["data"]["metadata"]["destroyed"] is False
    assert shown["request"]["id"] == got.body["request_id"]
    password = await node.call("PUT", "sys/audit-hash/file", {"input": "s3cr3t"})
    assert password.data == {"hash": password.body["hash"]}
    assert written["request"]["data"]["data"]["password"] == password.data["hash"]
    assert shown["response"]["data"]["data"]["password"] == password.data["hash"]
    token = (await node.call("PUT", "sys/audit-hash/file", {"input": node.root})).data["hash"]
    assert written["auth"]["client_token"] == written["request"]["client_token"] == token


async def test_enabling_lists_devices_and_enters_itself(node: Harness, path: Path) -> None:
    assert (await node.call("GET", "sys/audit")).data == {}
    await enabled(node, path)
    listed = await node.call("GET", "sys/audit")
    device = {
        "description": "",
        "local": False,
        "options": {"file_path": str(path)},
        "path": "file/",
        "type": "file",
    }
    assert listed.data == {"file/": device}
    assert listed.body["file/"] == device
    lines = [json.loads(line) for line in text(path).splitlines()]
    assert [(line["type"], line["request"]["path"]) for line in lines[:3]] == [
        ("request", "sys/audit/test"),
        ("request", "sys/audit/file"),
        ("response", "sys/audit/file"),
    ]
    assert mode_of(path) == 0o600
    assert (await node.call("DELETE", "sys/audit/file")).status == 204
    assert (await node.call("DELETE", "sys/audit/file")).status == 204
    assert (await node.call("GET", "sys/audit")).data == {}
    assert (await node.call("PUT", "sys/audit-hash/file", {"input": "x"})).errors == ["unknown audit backend"]


async def test_a_login_a_token_and_a_wrapped_answer(node: Harness, path: Path) -> None:
    await with_bob(node)
    await enabled(node, path)
    login = (await log_in(node)).body["auth"]
    wrapped = (await node.call("GET", "auth/token/lookup-self", X_Vault_Wrap_TTL="60")).body["wrap_info"]
    inner = await node.call("POST", "sys/wrapping/unwrap", token=wrapped["token"])
    assert inner.data["display_name"] == "root"
    written = text(path)
    for secret in (login["client_token"], login["accessor"], wrapped["token"], wrapped["accessor"], node.root, '"pw"'):
        assert secret not in written
    asked, answered, _, wrapping, _, unwrapped = entries(path)
    assert "auth" not in asked
    assert answered["auth"] == answered["response"]["auth"]
    assert answered["auth"]["policies"] == ["default"]
    assert answered["auth"]["metadata"] == {"username": "bob"}
    assert wrapping["request"]["wrap_ttl"] == 60
    assert wrapping["response"]["wrap_info"]["ttl"] == 60
    assert wrapping["response"]["wrap_info"]["creation_path"] == "auth/token/lookup-self"
    assert "data" not in wrapping["response"]
    assert unwrapped["response"]["data"]["num_uses"] == 0


async def test_refusals_are_entered_twice_with_their_kind(node: Harness, path: Path) -> None:
    await with_kv(node)
    token = await node.token('path "secret/data/mine" { capabilities = ["read"] }')
    await enabled(node, path)
    assert (await node.call("GET", "secret/data/other", token=token)).errors == [DENIED]
    assert (await node.call("GET", "secret/data/mine", token=token)).status == 404
    assert (await node.call("GET", "secret/data/mine", token="hvs.nosuch")).status == 403
    assert (await node.call("POST", "sys/mounts/x", {"type": "canary"})).status == 400
    assert (await node.call("GET", "nosuch/path")).status == 404
    assert (await node.call("DELETE", "sys/mounts")).status == 405
    kinds = [(line["type"], line.get("error", "").strip().rpartition("* ")[2]) for line in entries(path)]
    assert kinds == [
        ("request", "permission denied"),
        ("response", "permission denied"),
        ("request", ""),
        ("response", ""),
        ("request", "permission denied"),
        ("response", "permission denied"),
        ("request", ""),
        ("response", "invalid request"),
        ("request", "unsupported path"),
        ("response", "unsupported path"),
        ("request", ""),
        ("response", "unsupported operation"),
    ]
    assert "canary" not in text(path)
    denied = entries(path)[0]
    assert denied["auth"]["policies"][0] == "default"


async def test_a_body_that_cannot_be_read_is_left_out(node: Harness, path: Path) -> None:
    await with_kv(node)
    await enabled(node, path)
    for body in (b'{"data": "canary', b'{"a":1,"a":"canary"}', b"[" * 400 + b'"canary"', b"\xff\xfecanary"):
        async with node.session.post(
            f"{node.address}/v1/secret/data/a", data=body, headers={"X-Vault-Token": node.root}
        ) as answer:
            assert answer.status == 400
    lines = entries(path)
    assert len(lines) == 8
    assert "canary" not in text(path)
    for line in lines:
        assert "data" not in line["request"]
        assert line["request"]["path"] == "secret/data/a"
        assert line["request"]["operation"] == "update"
        assert line["error"] == "1 error occurred:\n\t* invalid request\n\n"


async def test_answers_that_are_no_json_are_hashed_whole(node: Harness, path: Path) -> None:
    await enabled(node, path)
    async with node.session.get(
        f"{node.address}/v1/sys/metrics?format=prometheus", headers={"X-Vault-Token": node.root}
    ) as answer:
        assert answer.status == 200
    shown = entries(path)[1]["response"]["data"]
    assert set(shown) == {"http_raw_body"}
    assert shown["http_raw_body"].startswith("hmac-sha256:")


async def test_some_paths_are_never_entered(node: Harness, path: Path) -> None:
    await enabled(node, path)
    for name in ("sys/health", "sys/seal-status", "sys/leader", "sys/init", "sys/internal/ui/feature-flags"):
        await node.call("GET", name)
    for name in ("sys/replication/status", "sys/replication/performance/status", "sys/rekey/init"):
        await node.call("GET", name)
    await node.call("PUT", "sys/step-down")
    assert entries(path) == []
    await node.call("GET", "sys/generate-root/attempt")
    assert [line["request"]["path"] for line in entries(path)] == ["sys/generate-root/attempt"] * 2


async def test_a_client_cannot_write_lines_or_colours(node: Harness, path: Path) -> None:
    await enabled(node, path)
    for target in ("secret/%0a%7b%22type%22:1%7d", "secret/%E2%80%A8x", "secret/%24(id)%60id%60"):
        async with node.session.get(f"{node.address}/v1/{target}", headers={"X-Vault-Token": "\x9b31m"}):
            pass
    for line in text(path).encode().splitlines():
        assert json.loads(line)["type"] in ("request", "response")
        assert line.decode("ascii").isprintable()
        assert b"$(" not in line


async def test_mounts_name_what_stays_clear_and_lists_can_be_elided(node: Harness, path: Path, tmp_path: Path) -> None:
    await with_kv(node, "1")
    tuning = {"audit_non_hmac_request_keys": ["user"], "audit_non_hmac_response_keys": ["user", "error"]}
    assert (await node.call("POST", "sys/mounts/secret/tune", tuning)).status == 204
    await enabled(node, path)
    await enabled(node, tmp_path / "short.log", "short", elide_list_responses="true")
    await node.call("POST", "secret/a", {"user": "alice", "password": "canary"})
    await node.call("GET", "secret/a")
    await node.call("LIST", "secret/")
    lines = entries(path)
    assert lines[0]["request"]["data"]["user"] == lines[3]["response"]["data"]["user"] == "alice"
    assert lines[3]["response"]["data"]["password"].startswith("hmac-sha256:")
    assert lines[5]["response"]["data"]["keys"][0].startswith("hmac-sha256:")
    assert entries(tmp_path / "short.log")[5]["response"]["data"]["keys"] == 1
    assert "canary" not in text(path)


async def test_raw_entries_and_clear_accessors(node: Harness, path: Path, tmp_path: Path) -> None:
    await with_kv(node)
    await enabled(node, path, log_raw=True)
    await enabled(node, tmp_path / "b", "b", hmac_accessor=False)
    await node.call("POST", "secret/data/a", {"data": {"password": "s3cr3t"}})
    raw, half = entries(path)[0], entries(tmp_path / "b")[0]
    assert raw["request"]["data"]["data"]["password"] == "s3cr3t"
    assert raw["auth"]["client_token"] == node.root
    assert half["auth"]["accessor"] == raw["auth"]["accessor"]
    assert half["auth"]["client_token"].startswith("hmac-sha256:")


CANARY = "canary-7f3a"


async def test_canaries_never_appear_in_clear(
    node: Harness, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A secret in every place a client can put one, that is no name, no path and no metadata of a token. The control
    is a device that hashes nothing: there it is found."""
    await with_kv(node)
    await with_bob(node, password=CANARY)
    await enabled(node, path)
    await enabled(node, tmp_path / "control.log", "control", log_raw="true")
    secret: dict[str, Any] = {"text": CANARY, "list": [CANARY, [CANARY]], "map": {"deep": [{"x": CANARY}]}}
    await node.call("POST", "secret/data/a", {"data": secret, "options": {"cas": CANARY}})
    await node.call("POST", "secret/data/a", {"data": secret})
    assert (await node.call("GET", "secret/data/a")).data["data"] == secret
    await node.call("POST", "secret/data/a", {"data": CANARY})
    await node.call("POST", "secret/metadata/a", {"custom_metadata": {"x": CANARY}, "max_versions": CANARY})
    await node.call("PATCH", "secret/data/a", {"data": {"text": CANARY}}, Content_Type="application/merge-patch+json")
    await node.call("GET", f"secret/data/a?version={CANARY}")
    await node.call("GET", f"secret/data/a?help=1&x={CANARY}")
    await node.call("POST", "cubbyhole/x", {CANARY[:3]: CANARY})
    await node.call("GET", "cubbyhole/x")
    await node.call("POST", "auth/userpass/login/bob", {"password": CANARY}, token=None)
    await node.call("POST", "auth/userpass/login/bob", {"password": CANARY + "x"}, token=None)
    await node.call("POST", "auth/userpass/users/eve", {"password": CANARY, "token_ttl": CANARY})
    await node.call("POST", "auth/token/lookup", {"token": CANARY})
    await node.call("POST", "auth/token/revoke-accessor", {"accessor": CANARY})
    await node.call("GET", "secret/data/a", token=CANARY)
    await node.call("GET", "secret/data/a", token=None, Authorization=f"Bearer {CANARY}")
    await node.call("GET", "secret/data/a", X_Vault_Wrap_TTL=CANARY)
    await node.call("POST", "sys/wrapping/wrap", secret, X_Vault_Wrap_TTL="60")
    await node.call("POST", "sys/wrapping/unwrap", {"token": CANARY})
    await node.call("POST", "sys/mounts/x", {"type": CANARY, "description": CANARY})
    await node.call("POST", "sys/audit/x", {"type": CANARY, "options": {"file_path": CANARY, "mode": CANARY}})
    await node.call("PUT", "sys/policies/acl/p", {"policy": f'path "{CANARY}" {{ capabilities = ["x"] }}'})
    await node.call("POST", "sys/capabilities-self", {"paths": ["a"], "token": CANARY})
    async with node.session.post(
        f"{node.address}/v1/secret/data/a",
        data={"data": CANARY},
        headers={"X-Vault-Token": node.root, "X-Secret": CANARY},
    ):
        pass
    lines = text(path).splitlines()
    assert len(lines) >= 50
    for line in lines:
        assert CANARY not in line
        assert "hvs." not in line
    assert CANARY not in caplog.text
    control = text(tmp_path / "control.log").splitlines()
    assert sum(CANARY in line for line in control) >= 30
    assert sum("hvs." in line for line in control) >= 30


async def test_numbers_and_booleans_stay_clear(node: Harness, path: Path) -> None:
    await with_kv(node)
    await enabled(node, path)
    values = {"i": 7, "f": 1.5, "t": True, "f2": False, "n": None, "big": 2**70}
    await node.call("POST", "secret/data/a", {"data": values})
    await node.call("GET", "secret/data/a")
    assert entries(path)[0]["request"]["data"]["data"] == values
    assert entries(path)[3]["response"]["data"]["data"] == values


# -- blocking


def counted(path: Path) -> int:
    return len(text(path).splitlines())


async def test_no_device_no_entry_no_cost(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> None:
        raise AssertionError("nothing is audited without a device")

    monkeypatch.setattr("sidecar.api.auditing.Auditor.request", never)
    monkeypatch.setattr("sidecar.api.auditing.Auditor.response", never)
    assert (await node.call("GET", "sys/mounts")).status == 200


async def test_a_request_that_cannot_be_entered_is_not_carried_out(node: Harness, tmp_path: Path) -> None:
    await with_kv(node)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with reading(fifo):
        await enabled(node, fifo)
        assert (await node.call("POST", "secret/data/a", {"data": {"v": 1}})).status == 200
    before = dict(node.store.entries)
    for method, name in (("POST", "secret/data/a"), ("GET", "secret/data/a"), ("DELETE", "sys/audit/file")):
        refused = await node.call(method, name, {"data": {"v": "canary"}} if method == "POST" else None)
        assert (refused.status, refused.body) == (500, {"errors": INTERNAL})
    assert node.store.entries == before
    assert node.service.audit_blocked()
    for name in ("sys/health", "sys/seal-status", "sys/leader", "sys/replication/status"):
        assert (await node.call("GET", name)).status == 200
    with reading(fifo):
        assert (await node.call("GET", "secret/data/a")).data["data"] == {"v": 1}
        assert not node.service.audit_blocked()
    assert (await node.call("PUT", "sys/seal")).status == 204


async def test_an_answer_that_cannot_be_entered_is_not_shown(
    node: Harness, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device fails between request and answer."""
    await with_kv(node)
    await enabled(node, path)
    await node.call("POST", "secret/data/a", {"data": {"v": "canary"}})
    real, calls = os.write, [0]

    def second_fails(fd: int, data: bytes) -> int:
        if b'"type":"response"' in bytes(data):
            calls[0] += 1
            raise OSError(28, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", second_fails)
    for name in ("secret/data/a", "secret/data/nosuch", "nosuch/x"):
        refused = await node.call("GET", name)
        assert (refused.status, refused.body) == (500, {"errors": INTERNAL})
    created = await node.call("POST", "auth/token/create", {})
    assert (created.status, created.body) == (500, {"errors": INTERNAL})
    assert calls[0] == 4
    monkeypatch.undo()
    assert (await node.call("GET", "secret/data/a")).status == 200


async def test_a_full_pipe_refuses_in_time_and_the_server_stays_up(node: Harness, tmp_path: Path) -> None:
    await with_kv(node)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with reading(fifo) as reader:
        await enabled(node, fifo)
        async with asyncio.timeout(120):
            while (await node.call("POST", "secret/data/a", {"data": {"v": ["x"] * 100}})).status == 200:
                pass
            assert (await node.call("GET", "secret/data/a")).errors == INTERNAL
            assert (await node.call("GET", "sys/health")).status == 200
            with contextlib.suppress(BlockingIOError):
                while os.read(reader, 65536):
                    pass
            while (await node.call("GET", "secret/data/a")).status != 200:
                await asyncio.to_thread(drain, reader)


def drain(reader: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(reader, 65536):
            pass


@contextlib.contextmanager
def reading(fifo: Path) -> Any:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield reader
    finally:
        os.close(reader)


async def test_without_the_devices_veto_the_answer_would_leave(
    node: Harness, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the tests above: it is the broker alone that holds an answer back."""

    async def nothing(*_: object) -> None:
        return

    await enabled(node, path)
    put_directory(path)
    assert (await node.call("GET", "sys/mounts")).errors == INTERNAL
    monkeypatch.setattr("sidecar.core.audit.broker.AuditBroker.write", nothing)
    assert (await node.call("GET", "sys/mounts")).status == 200


async def test_a_removed_file_is_made_again_and_nothing_goes_unaudited(node: Harness, path: Path) -> None:
    await enabled(node, path)
    os.unlink(path)
    assert (await node.call("GET", "sys/mounts")).status == 200
    assert len(entries(path)) == 2
    put_directory(path)
    assert (await node.call("GET", "sys/mounts")).errors == INTERNAL
    os.rmdir(path)
    assert (await node.call("GET", "sys/mounts")).status == 200
    assert len(entries(path)) == 2


async def test_with_two_devices_one_may_fail_or_hang(node: Harness, path: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    await enabled(node, path)
    with reading(fifo):
        await enabled(node, fifo, "pipe")
        async with asyncio.timeout(120):
            for _ in range(100):  # more than the pipe holds, and nobody reads
                assert (await node.call("GET", "sys/mounts")).status == 200
    assert (await node.call("GET", "sys/mounts")).status == 200
    assert len(entries(path)) == 202
    put_directory(path)
    assert (await node.call("GET", "sys/mounts")).errors == INTERNAL


async def test_reopening_for_log_rotation(node: Harness, path: Path, tmp_path: Path) -> None:
    await enabled(node, path)
    await node.call("GET", "sys/mounts")
    os.rename(path, tmp_path / "audit.log.1")
    await node.call("GET", "sys/mounts")
    node.service.reopen_audit()
    await node.call("GET", "sys/mounts")
    assert len(entries(tmp_path / "audit.log.1")) == 4
    assert len(entries(path)) == 2


async def test_many_requests_at_once_are_all_entered_before_their_answers(node: Harness, path: Path) -> None:
    await with_kv(node)
    await enabled(node, path)
    await asyncio.gather(*(node.call("POST", f"secret/data/{n}", {"data": {"n": n}}) for n in range(100)))
    seen: dict[str, list[str]] = {}
    for line in entries(path):
        seen.setdefault(line["request"]["id"], []).append(line["type"])
    assert list(seen.values()) == [["request", "response"]] * 100


# -- devices


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("x", {"type": "nosuch"}, 'unknown backend type: "nosuch"'),
        ("x", {}, 'unknown backend type: ""'),
        ("x", {"type": "file"}, "file_path is required"),
        ("x", {"type": "file", "options": {"file_path": "/x", "mode": "0755"}}, "executable"),
        ("x", {"type": "file", "options": {"file_path": "/x", "prefix": "import os#"}}, "not allowed"),
        ("x", {"type": "file", "options": {"file_path": "/proc/nosuch"}}, "sanity check failed"),
        ("x", {"type": "socket", "options": {"address": "127.0.0.1:1"}}, "Connection refused"),
        ("a*b", {"type": "file", "options": {"file_path": "discard"}}, "mount path"),
        ("taken", {"type": "file", "options": {"file_path": "discard"}}, "path already in use"),
        ("taken/below", {"type": "file", "options": {"file_path": "discard"}}, "path already in use"),
    ],
)
async def test_devices_that_are_refused_change_nothing(
    node: Harness, name: str, body: dict[str, Any], reason: str
) -> None:
    await enabled(node, "discard", "taken")
    before = dict(node.store.entries)
    refused = await node.call("PUT", f"sys/audit/{name}", body)
    assert refused.status == 400
    assert reason in refused.errors[0]
    assert node.store.entries == before


async def test_the_configuration_limits_where_files_may_be(tmp_path: Path) -> None:
    rules = LocalRules(prefixing=True, directories=(str(tmp_path / "logs"),), timeout_s=60)
    (tmp_path / "logs").mkdir()
    async with running(audit=rules) as node:
        assert "outside" in (await enable(node, tmp_path / "x.py")).errors[0]
        assert "outside" in (await enable(node, tmp_path / "logs/../x.py")).errors[0]
        assert not (tmp_path / "x.py").exists()
        await enabled(node, tmp_path / "logs/a.log", prefix="@cee: ")
        await node.call("GET", "sys/mounts")
    assert all(line.startswith('@cee: {"time"') for line in (tmp_path / "logs/a.log").read_text().splitlines())


async def test_sys_audit_needs_sudo(node: Harness) -> None:
    token = await node.token('path "sys/audit*" { capabilities = ["create", "read", "update", "delete"] }')
    assert (await node.call("GET", "sys/audit", token=token)).errors == [DENIED]
    assert (await node.call("PUT", "sys/audit/x", {"type": "file"}, token=token)).errors == [DENIED]
    assert (await node.call("DELETE", "sys/audit/x", token=token)).errors == [DENIED]
    assert (await node.call("PUT", "sys/audit-hash/x", {"input": "i"}, token=token)).errors == ["unknown audit backend"]
    assert (await node.call("PUT", "sys/audit-hash/x", {})).errors == ['the "input" parameter is empty']


async def test_devices_and_salts_survive_a_new_tenure(path: Path) -> None:
    async with running() as node:
        await enabled(node, path)
        before = (await node.call("PUT", "sys/audit-hash/file", {"input": "x"})).data["hash"]
        store, genesis = node.store, node.node.genesis
    count = counted(path)
    async with running(store=store, genesis=genesis) as again:
        assert (await again.call("PUT", "sys/audit-hash/file", {"input": "x"})).data["hash"] == before
    assert counted(path) == count + 2
    assert before.encode() not in b"".join(store.entries.values())
    assert not any(b"file_path" in value for value in store.entries.values())


async def test_a_device_that_cannot_be_opened_stops_a_new_tenures_requests(path: Path) -> None:
    async with running() as node:
        await enabled(node, path)
        store, genesis = node.store, node.node.genesis
    put_directory(path)
    async with running(store=store, genesis=genesis) as again:
        assert (await again.call("GET", "sys/mounts")).errors == INTERNAL
        assert (await again.call("GET", "sys/seal-status")).status == 200
        os.rmdir(path)
        assert (await again.call("GET", "sys/mounts")).status == 200


# -- replication


async def test_a_replicated_device_arrives_and_goes(path: Path) -> None:
    async with primary_and_secondary() as (primary, secondary):
        asked = await enable(secondary, path)  # not local: the primary's to decide
        assert asked.status == 204, asked.errors
        assert set((await primary.call("GET", "sys/audit")).data) == {"file/"}
        assert (await secondary.call("GET", "sys/audit")).data == {}
        await replicate(primary, secondary)
        assert set((await secondary.call("GET", "sys/audit")).data) == {"file/"}
        hashes = [
            (await node.call("PUT", "sys/audit-hash/file", {"input": "x"})).data["hash"]
            for node in (primary, secondary)
        ]
        assert hashes[0] == hashes[1]
        os.unlink(path)
        assert (await secondary.call("GET", "sys/mounts")).status == 200
        assert [line["request"]["path"] for line in entries(path)] == ["sys/mounts"] * 2
        assert (await secondary.call("DELETE", "sys/audit/file")).status == 204
        await replicate(primary, secondary)
        os.unlink(path)
        assert (await secondary.call("GET", "sys/mounts")).status == 200
        assert path.name not in os.listdir(path.parent)


async def test_local_devices_stay_where_they_are(path: Path, tmp_path: Path) -> None:
    async with primary_and_secondary() as (primary, secondary):
        await enabled(primary, tmp_path / "p.log", "p", local=True)
        await enabled(secondary, path, local=True)
        await replicate(primary, secondary)
        assert (await secondary.call("GET", "sys/audit")).data["file/"]["local"] is True
        assert set((await secondary.call("GET", "sys/audit")).data) == {"file/"}
        assert set((await primary.call("GET", "sys/audit")).data) == {"p/"}


async def test_a_forwarded_request_is_entered_where_it_runs_and_where_it_came_in(path: Path, tmp_path: Path) -> None:
    async with primary_and_secondary() as (primary, secondary):
        await enabled(primary, tmp_path / "p.log", "p", local=True)
        await enabled(secondary, path, local=True)
        put = await secondary.call("PUT", "sys/policies/acl/x", {"policy": 'path "canary" { capabilities = ["read"] }'})
        assert put.status == 204, put.errors
        there, here = entries(tmp_path / "p.log"), entries(path)
        assert [line["type"] for line in there] == [line["type"] for line in here] == ["request", "response"]
        assert there[0]["request"]["replication_cluster"] == secondary.service.cluster.cluster_id
        assert there[0]["auth"]["display_name"] == "root"
        assert "client_token" not in there[0]["auth"]
        assert "canary" not in text(path) + text(tmp_path / "p.log")


async def test_an_answer_that_the_primary_could_not_enter_does_not_leave_it(tmp_path: Path) -> None:
    async with primary_and_secondary() as (primary, secondary):
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        with reading(fifo):
            await enabled(primary, fifo, local=True)
        refused = await secondary.call("PUT", "sys/policies/acl/x", {"policy": 'path "a" { capabilities = ["read"] }'})
        assert (refused.status, refused.body) == (500, {"errors": INTERNAL})


async def test_an_arriving_device_that_this_node_may_not_run_stops_requests(path: Path) -> None:
    """Rather no answer than one that the set's operator believes to be audited."""
    async with running() as primary:
        await enabled(primary, path)
        store, genesis = primary.store, primary.node.genesis
    elsewhere = LocalRules(directories=("/nonexistent",), timeout_s=0.3)
    async with running(store=store, genesis=genesis, audit=elsewhere) as secondary:
        assert (await secondary.call("GET", "sys/mounts")).errors == INTERNAL
        assert secondary.service.audit_blocked()


# -- clients


async def test_hvac(node: Harness, path: Path) -> None:
    def drive() -> None:
        client = hvac.Client(node.address, token=node.root)
        client.sys.enable_audit_device("file", description="d", options={"file_path": str(path)}, path="one")
        devices = client.sys.list_enabled_audit_devices()["data"]
        assert devices["one/"]["type"] == "file"
        assert devices["one/"]["description"] == "d"
        answer = client.sys.calculate_hash("one", "hash-me")
        assert answer["data"]["hash"].startswith("hmac-sha256:")
        with pytest.raises(hvac.exceptions.InvalidRequest):
            client.sys.enable_audit_device("nosuch")
        client.sys.disable_audit_device("one")
        assert client.sys.list_enabled_audit_devices()["data"] == {}

    await asyncio.to_thread(drive)
    assert counted(path) > 5
