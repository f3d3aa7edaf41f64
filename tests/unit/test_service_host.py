"""What a node tells of itself, and the tools, over HTTP."""

import asyncio
import base64
import hashlib
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest

from sidecar.api.node_view import Member
from sidecar.api.sys_host import LOGGERS
from sidecar.core.keys import VERSIONS
from sidecar.core.version_history import VersionHistory
from sidecar.request.types import HttpRequest, HttpResponse
from tests.support.service_node import DENIED, JOINED, Harness, running, with_kv


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


@pytest.fixture
def levels() -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in LOGGERS}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


async def test_ha_status_names_every_node_heard_of(node: Harness) -> None:
    node.node.nodes = [
        Member("one", "https://a:8200", "https://a:8201", True, "0.1.0"),
        Member("two", "https://b:8200", "https://b:8201", False, "0.1.0", 1_700_000_000.25, 17, -1, 950),
    ]
    reply = await node.call("GET", "sys/ha-status")
    active, standby = reply.data["nodes"]
    assert active == {
        "hostname": "one",
        "api_address": "https://a:8200",
        "cluster_address": "https://a:8201",
        "active_node": True,
        "last_echo": None,
        "version": "0.1.0",
        "echo_duration_ms": 0,
        "clock_skew_ms": 0,
        "replication_primary_canary_age_ms": 0,
    }
    assert [standby[f"{name}_ms"] for name in ("echo_duration", "clock_skew")] == [17, -1]
    assert standby["replication_primary_canary_age_ms"] == 950
    assert (standby["active_node"], standby["last_echo"]) == (False, "2023-11-14T22:13:20.25Z")
    assert reply.body["nodes"] == reply.data["nodes"], "repeated beside the envelope"
    assert (await node.call("GET", "sys/ha-status", token=None)).status == 403


async def test_host_info_is_this_machines(node: Harness) -> None:
    reply = await node.call("GET", "sys/host-info")
    assert set(reply.data) == {"timestamp", "cpu", "cpu_times", "disk", "host", "memory"}
    assert (await node.call("GET", "sys/host-info", token=None)).status == 403
    token = await node.token('path "other" { capabilities = ["read"] }')
    assert (await node.call("GET", "sys/host-info", token=token)).errors == [DENIED]
    asked: list[HttpRequest] = []

    async def forward(request: HttpRequest) -> HttpResponse:
        asked.append(request)
        return HttpResponse(200)

    node.node.dispatched = forward
    node.node.state = replace(node.node.state, standby=True)
    standby = await node.call("GET", "sys/host-info")
    assert (standby.status, standby.errors) == (400, ["cannot forward local-only request"])
    assert asked == []


async def test_requests_under_way_are_shown(node: Harness) -> None:
    await with_kv(node)
    reached, go_on = asyncio.Event(), asyncio.Event()
    commit = node.store.commit

    async def slow(writes):
        reached.set()
        await go_on.wait()
        return await commit(writes)

    node.store.commit = slow
    writing = asyncio.create_task(node.call("POST", "secret/data/a", {"data": {"password": "hunter2"}}))
    await reached.wait()
    shown = (await node.call("GET", "sys/in-flight-req")).body
    go_on.set()
    assert (await writing).status == 200
    paths = {entry["request_path"]: entry for entry in shown.values()}
    assert set(paths) == {"/v1/secret/data/a", "/v1/sys/in-flight-req"}
    assert (paths["/v1/secret/data/a"]["request_method"], "hunter2" in str(shown)) == ("POST", False)
    host, _, port = paths["/v1/secret/data/a"]["client_remote_address"].rpartition(":")
    assert (host, int(port) > 1023) == ("127.0.0.1", True)
    assert HttpRequest("GET", "a", remote_address="::1", remote_port=5).remote == "[::1]:5"
    assert HttpRequest("GET", "a", remote_address="::1").remote == "::1"
    assert paths["/v1/secret/data/a"]["duration"].endswith(" microseconds")
    assert len((await node.call("GET", "sys/in-flight-req")).body) == 1, "no envelope around it"
    assert (await node.call("GET", "sys/in-flight-req", token=None)).status == 403


async def test_the_history_grows_when_a_new_version_leads(node: Harness) -> None:
    first = (await node.call("LIST", "sys/version-history")).data
    assert first["keys"] == ["0.1.0"]
    assert first["key_info"]["0.1.0"] == {
        "build_date": None,
        "previous_version": None,
        "timestamp_installed": first["key_info"]["0.1.0"]["timestamp_installed"],
    }
    index = node.store.index
    await node.call("GET", "sys/version-history?list=true")
    assert node.store.index == index, "what is known is not written again"
    node.clock.now_s += 60
    await VersionHistory(node.service._sealed, "0.2.0", node.clock).record()
    grown = (await node.call("LIST", "sys/version-history")).data
    assert grown["keys"] == ["0.1.0", "0.2.0"]
    assert grown["key_info"]["0.2.0"]["previous_version"] == "0.1.0"
    assert sum(key.startswith(VERSIONS) for key in node.store.entries) == 2


@pytest.mark.usefixtures("levels")
async def test_log_levels_are_changed_and_given_back(node: Harness) -> None:
    before = (await node.call("GET", "sys/loggers")).data
    assert set(before) == set(LOGGERS)
    assert (await node.call("POST", "sys/loggers/core", {"level": "trace"})).status == 204
    assert (await node.call("GET", "sys/loggers/core")).data == {"core": "trace"}
    assert logging.getLogger("core.request-forwarding").isEnabledFor(5), "what is below follows"
    assert (await node.call("GET", "sys/loggers")).data == before | {"core": "trace"}
    assert (await node.call("POST", "sys/loggers", {"level": "ERR"})).status == 204
    assert set((await node.call("GET", "sys/loggers")).data.values()) == {"error"}
    assert (await node.call("DELETE", "sys/loggers/core")).status == 204
    assert (await node.call("GET", "sys/loggers/core")).data == {"core": before["core"]}
    assert (await node.call("DELETE", "sys/loggers")).status == 204
    assert (await node.call("GET", "sys/loggers")).data == before
    unknown = await node.call("POST", "sys/loggers/nosuch", {"level": "info"})
    assert (unknown.status, unknown.errors) == (404, ['logger "nosuch" not found'])
    assert (await node.call("POST", "sys/loggers", {})).errors == ["level is required"]
    assert (await node.call("POST", "sys/loggers", {"level": "loud"})).status == 400


async def test_random(node: Harness) -> None:
    for path, body, size in (
        ("", {}, 32),
        ("", {"bytes": "7"}, 7),
        ("/5", {}, 5),
        ("/platform/6", {}, 6),
        ("/all", {"bytes": 3}, 3),
    ):
        raw = (await node.call("POST", f"sys/tools/random{path}", body)).data["random_bytes"]
        assert len(base64.b64decode(raw)) == size
    assert (
        len(bytes.fromhex((await node.call("POST", "sys/tools/random", {"format": "hex"})).data["random_bytes"])) == 32
    )
    for body, text in (
        ({"bytes": 0}, '"bytes" cannot be less than 1'),
        ({"bytes": 131073}, '"bytes" should be less than 131072'),
        ({"format": "octal"}, 'unsupported encoding format "octal"; must be "hex" or "base64"'),
        ({"source": "dice"}, 'unsupported entropy source "dice"; must be "platform" or "seal", or "all"'),
    ):
        reply = await node.call("POST", "sys/tools/random", body)
        assert (reply.status, reply.errors) == (400, [text])
    assert (await node.call("GET", "sys/tools/random")).errors == [JOINED.format("unsupported operation")]


async def test_hash(node: Harness) -> None:
    text = base64.b64encode(b"hello").decode()
    assert (await node.call("POST", "sys/tools/hash", {"input": text})).data["sum"] == hashlib.sha256(
        b"hello"
    ).hexdigest()
    for algorithm, name in (("sha2-512", "sha512"), ("sha3-384", "sha3_384"), ("sha2-224", "sha224")):
        body = {"input": text, "format": "base64"}
        found = (await node.call("POST", f"sys/tools/hash/{algorithm}", body)).data["sum"]
        assert base64.b64decode(found) == hashlib.new(name, b"hello").digest()
    for body, error in (
        ({"input": text, "algorithm": "md5"}, "unsupported algorithm md5"),
        ({"input": "?"}, "unable to decode input as base64"),
        ({"input": text, "format": "octal"}, 'unsupported encoding format "octal"; must be "hex" or "base64"'),
    ):
        reply = await node.call("POST", "sys/tools/hash", body)
        assert (reply.status, reply.errors) == (400, [error])
