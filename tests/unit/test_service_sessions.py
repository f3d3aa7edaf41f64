"""``X-Vault-Index`` and ``X-Vault-Inconsistent`` at the API: who is told what, who waits, and who is sent on."""

import pytest

from tests.support.service_node import (
    FakeFound,
    FakeReplication,
    Harness,
    log_in,
    primary_and_secondary,
    replicate,
    running,
    with_bob,
    with_kv,
)

MISSING = "required index state not present"
SEEN = {"X_Vault_Index": "seen"}
FORWARD = {**SEEN, "X_Vault_Inconsistent": "forward-active-node"}


def sessions(harness: Harness) -> FakeReplication:
    assert harness.replication is not None
    return harness.replication


async def test_every_write_says_where_it_stands_and_a_read_only_when_asked() -> None:
    async with running(replication=FakeReplication()) as node:
        sessions(node).sessions.telling = True
        await with_kv(node)
        written = await node.call("POST", "secret/data/a", {"data": {"x": 1}})
        assert written.headers["X-Vault-Index"] == f"{node.store.index}||False"
        assert "X-Vault-Index" not in (await node.call("GET", "secret/data/a")).headers
        assert "X-Vault-Index" not in (await node.call("GET", "sys/health", token=None)).headers
        assert (await node.call("GET", "secret/data/a", **SEEN)).headers["X-Vault-Index"] == "0||True"
        begun = await node.call("GET", "secret/data/none", X_Vault_Index="")
        assert (begun.status, begun.headers["X-Vault-Index"]) == (404, "0||True"), "an empty one begins a session"
        assert sessions(node).sessions.required == [["seen"]]


async def test_an_answer_of_the_primary_is_told_in_this_clusters_words() -> None:
    async with primary_and_secondary() as (primary, secondary):
        await with_kv(primary)
        await replicate(primary, secondary)
        sessions(secondary).sessions.telling = True
        primary.service._replication = FakeReplication()  # type: ignore[assignment]  # a fake of its shape
        primary.service._replication.sessions.telling = True
        written = await secondary.call("POST", "secret/data/a", {"data": {"x": 1}})
        assert written.headers.getall("X-Vault-Index") == [f"0|{primary.store.index}||False|False"]


async def test_what_is_not_here_yet_is_412_for_everybody_but_operators() -> None:
    async with running(replication=FakeReplication()) as node:
        await with_kv(node)
        await with_bob(node)
        sessions(node).sessions.found = FakeFound(missing=True)
        for method, path, body in (
            ("GET", "secret/data/a", None),
            ("POST", "secret/data/a", {"data": {}}),
            ("POST", "auth/userpass/login/bob", {"password": "pw"}),
            ("GET", "no/such/mount", None),
        ):
            refused = await node.call(method, path, body, **SEEN)
            assert (refused.status, refused.errors) == (412, [MISSING]), path
            assert "X-Vault-Index" not in refused.headers
        assert (await node.call("GET", "secret/data/a")).status == 404, "who does not ask does not wait"
        assert (await node.call("GET", "sys/replication/status", **SEEN)).status == 200
        assert (await node.call("GET", "sys/health", token=None, **SEEN)).status == 200


async def test_repeated_headers_all_count() -> None:
    async with running(replication=FakeReplication()) as node:
        headers = [("X-Vault-Index", "one"), ("X-Vault-Index", "two"), ("X-Vault-Token", node.root)]
        async with node.session.get(f"{node.address}/v1/sys/mounts", headers=headers) as answer:
            assert answer.status == 200
        assert sessions(node).sessions.required == [["one", "two"]]


async def test_the_primary_answers_in_the_place_of_a_secondary_that_is_behind() -> None:
    async with primary_and_secondary(header_forwarding=True) as (primary, secondary):
        await with_kv(primary)
        await with_bob(primary)
        await replicate(primary, secondary)
        await secondary.call("POST", "sys/mounts/mine", {"type": "kv", "local": True})
        await primary.call("POST", "secret/data/a", {"data": {"x": 1}})
        token = await secondary.token('path "secret/data/b" { capabilities = ["read"] }')
        sessions(secondary).forwarded.clear()
        sessions(secondary).sessions.found = FakeFound(missing=True, upstream=True)
        assert (await secondary.call("GET", "secret/data/a", **SEEN)).status == 412, "only who asks is sent on"
        sent_on = await secondary.call("GET", "secret/data/a", **FORWARD)
        assert (sent_on.status, sent_on.data["data"]) == (200, {"x": 1})
        assert (await secondary.call("GET", "secret/data/a", token=token, **FORWARD)).status == 403, "decided here"
        assert len(sessions(secondary).forwarded) == 1
        for path in ("mine/a", "cubbyhole/a", "auth/token/lookup-self"):
            refused = await secondary.call("GET", path, **FORWARD)
            assert (refused.status, refused.errors) == (412, [MISSING]), f"nobody else has {path}"
        assert (await log_in(secondary, **FORWARD)).status == 412, "a token of the primary is worth nothing here"
        assert len(sessions(secondary).forwarded) == 1


async def test_what_is_missing_of_this_clusters_own_log_nobody_else_has() -> None:
    async with primary_and_secondary(header_forwarding=True) as (primary, secondary):
        await with_kv(primary)
        await replicate(primary, secondary)
        sessions(secondary).sessions.found = FakeFound(missing=True)
        assert (await secondary.call("GET", "secret/data/a", **FORWARD)).status == 412


async def test_what_was_lost_is_said_with_the_answer() -> None:
    async with running(replication=FakeReplication()) as node:
        await with_kv(node)
        sessions(node).sessions.found = FakeFound(warnings=("it was lost",))
        written = await node.call("POST", "secret/data/a", {"data": {"x": 1}}, **SEEN)
        assert written.body["warnings"] == ["it was lost"]
        assert (await node.call("GET", "secret/data/a", **SEEN)).body["warnings"] == ["it was lost"]
        moved = await node.call("POST", "sys/mounts/other", {"type": "kv"}, **SEEN)
        assert (moved.status, moved.body["warnings"]) == (200, ["it was lost"]), "a 204 has no room for it"
        absent = await node.call("GET", "secret/data/none", **SEEN)
        assert (absent.status, absent.body) == (404, {"errors": []})
        wrapped = await node.call("GET", "secret/data/a", X_Vault_Wrap_TTL="60", **SEEN)
        assert "it was lost" in wrapped.body["warnings"]
        assert wrapped.body["wrap_info"]["token"]


@pytest.mark.parametrize(
    ("headers", "allowed", "text"),
    [
        ({"X_Vault_Forward": "active-node"}, False, "forwarding via header X-Vault-Forward disabled in configuration"),
        (
            {"X_Vault_Inconsistent": "forward-active-node"},
            False,
            "forwarding via header X-Vault-Inconsistent=forward-active-node disabled in configuration",
        ),
        ({"X_Vault_Forward": "elsewhere"}, True, 'X-Vault-Forward may be "active-node"'),
        (
            {"X_Vault_Inconsistent": "guess"},
            True,
            'X-Vault-Inconsistent may be "fail", "await-state" or "forward-active-node"',
        ),
        ({"X_Vault_Forward": "active-node"}, True, ""),
        ({"X_Vault_Inconsistent": "forward-active-node"}, True, ""),
        ({"X_Vault_Inconsistent": "fail"}, False, ""),
        ({"X_Vault_Inconsistent": "await-state"}, False, ""),
    ],
)
async def test_directives_are_obeyed_or_refused(headers: dict[str, str], allowed: bool, text: str) -> None:
    async with running(header_forwarding=allowed) as node:
        answer = await node.call("GET", "sys/mounts", **headers)
        assert (answer.status, answer.errors) == ((400, [text]) if text else (200, []))
