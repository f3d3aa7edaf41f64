"""Every replication endpoint in every combination of roles: what is allowed, and the text of what is not."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.replication import roles
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from tests.support.role_node import role_node

DISABLED_PATH = "path disabled in replication DR secondary mode"
KINDS = ("disabled", "primary", "secondary")

# What a request holds, and what its answer begins with where it is allowed: a text of its own where it needs more than
# this node has, so that "allowed" is told from "refused because of the role".
REQUESTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "primary/enable": ({}, 200, "This cluster is being enabled as a primary"),
    "primary/demote": ({}, 200, "This cluster is being demoted"),
    "primary/disable": ({}, 200, "This cluster is having replication disabled"),
    "primary/secondary-token": ({"id": "eu"}, 200, ""),
    "primary/revoke-secondary": ({"id": "eu"}, 400, 'no secondary with the id "eu"'),
    "primary/rotate-ca": ({"overlap": "1h"}, 200, "Both certificate authorities count"),
    "secondary/enable": ({"token": "x.y.z"}, 400, "error parsing activation token"),
    "secondary/generate-public-key": ({}, 200, ""),
    "secondary/promote": ({"force": True}, 200, "This cluster is being promoted"),
    "secondary/disable": ({}, 200, "This cluster is having replication disabled"),
    "secondary/update-primary": ({"token": ""}, 200, "This secondary follows nobody"),
}
BY_OPERATION_TOKEN = (
    "secondary/promote",
    "secondary/disable",
    "secondary/update-primary",
    "secondary/generate-public-key",
)
# The set-up that the other mode forbids although the role allows it.
FORBIDDEN_BY_THE_OTHER = "secondary/enable"


@pytest.mark.parametrize("operation", roles.TABLE)
@pytest.mark.parametrize("mode", [PERFORMANCE, DR], ids=lambda mode: mode.name)
@pytest.mark.parametrize("other", ["disabled", "primary", "secondary"])
@pytest.mark.parametrize("kind", KINDS)
async def test_an_operation_in_a_role(kind: str, other: str, mode: Mode, operation: str) -> None:
    performance, disaster = (kind, other) if mode is PERFORMANCE else (other, kind)
    node = await role_node(performance, disaster)
    body, status, text = REQUESTS[operation]
    reply = await node.call("POST", f"sys/replication/{mode.name}/{operation}", body)
    said = " ".join([*reply.errors, *((reply.body or {}).get("warnings") or [])])
    if disaster == "secondary":
        if mode is DR and operation in BY_OPERATION_TOKEN:
            assert (reply.status, reply.errors) == (403, ["1 error occurred:\n\t* permission denied\n\n"]), (
                "root is nobody"
            )
        else:
            assert (reply.status, reply.errors) == (400, [DISABLED_PATH])
        return
    outcome = roles.TABLE[operation][kind]
    if isinstance(outcome, roles.Refused):
        assert reply.status == 400
        expected = outcome.text.format(label=mode.label)
        if mode is DR and outcome.text == "this cluster is not a {label} secondary":
            expected = "Not a DR secondary."
        assert reply.errors == [expected]
    elif operation == FORBIDDEN_BY_THE_OTHER and other != "disabled":
        assert reply.status == 400
        assert "disable it first" in said
    else:
        assert reply.status == status, said
        assert text in said
        if status == 200:
            assert (
                node.replication.performance if mode is PERFORMANCE else node.replication.dr
            ).role.kind == outcome.kind
            assert bool(node.restarts) == (mode is DR and "secondary" in (kind, outcome.kind))


@pytest.mark.parametrize("operation", roles.TABLE)
@pytest.mark.parametrize("kind", KINDS)
async def test_the_old_spelling_means_performance(kind: str, operation: str) -> None:
    body, _, _ = REQUESTS[operation]
    old, new = [await role_node(kind, "disabled") for _ in range(2)]
    said = await old.call("POST", f"sys/replication/{operation}", body)
    now = await new.call("POST", f"sys/replication/performance/{operation}", body)
    assert (said.status, said.errors) == (now.status, now.errors)
    assert old.replication.performance.role.kind == new.replication.performance.role.kind


@pytest.mark.parametrize("operation", roles.TABLE)
async def test_on_a_dr_secondary_the_operation_token_counts(operation: str) -> None:
    node = await role_node("primary", "secondary")
    token = await node.service._tokens.issue()  # type: ignore[union-attr]  # the role decides which service it is
    body, status, text = REQUESTS[operation]
    reply = await node.call(
        "POST", f"sys/replication/dr/{operation}", {**body, "dr_operation_token": token}, token=None
    )
    said = " ".join([*reply.errors, *((reply.body or {}).get("warnings") or [])])
    if operation in BY_OPERATION_TOKEN:
        assert reply.status == status, said
        assert text in said
    else:
        assert (reply.status, reply.errors) == (400, [DISABLED_PATH])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "sys/mounts"),
        ("GET", "auth/token/lookup-self"),
        ("POST", "auth/token/create"),
        ("PUT", "sys/step-down"),
        ("GET", "sys/metrics"),
        ("GET", "sys/host-info"),
        ("GET", "secret/data/x"),
        ("LIST", "secret/metadata"),
        ("DELETE", "sys/mounts/secret"),
        ("POST", "sys/wrapping/unwrap"),
        ("POST", "sys/rekey/init"),
        ("POST", "sys/generate-root/attempt"),
        ("POST", "sys/rotate"),
        ("POST", "sys/replication/reindex"),
        ("POST", "sys/replication/recover"),
        ("POST", "sys/replication/merkle-check"),
        ("GET", "sys/replication/dr/secondary/disable"),
        ("GET", "nosuch"),
    ],
)
@pytest.mark.parametrize("token", ["root", None])
async def test_a_dr_secondary_refuses_the_rest_whoever_asks(method: str, path: str, token: str | None) -> None:
    node = await role_node("primary", "secondary")
    before = dict(node.store.data)
    reply = await node.call(method, path, {} if method in ("POST", "PUT") else None, token=token)
    assert (reply.status, reply.errors) == (400, [DISABLED_PATH])
    assert node.store.data == before


async def test_what_a_dr_secondary_answers_without_a_token() -> None:
    node = await role_node("primary", "secondary")
    both = await node.call("GET", "sys/replication/status", token=None)
    assert both.body["data"]["performance"] == {"mode": "disabled"}
    assert both.body["data"]["dr"]["mode"] == "secondary"
    one = await node.call("GET", "sys/replication/dr/status", token=None)
    assert (one.body["data"]["mode"], one.body["data"]["state"]) == ("secondary", "idle")
    promotion = await node.call("GET", "sys/replication/dr/secondary/promote", token=None)
    assert promotion.body["data"] == {"progress": 0, "required": 1, "complete": False}


async def test_the_operation_token_is_made_from_key_shares() -> None:
    node = await role_node("disabled", "secondary")
    base = "sys/replication/dr/secondary/generate-operation-token"
    idle = await node.call("GET", f"{base}/attempt", token=None)
    assert (idle.body["started"], idle.body["required"], idle.body["otp_length"]) == (False, 2, 28)
    started = (await node.call("POST", f"{base}/attempt", {"attempt": True}, token=None)).body
    assert len(started["otp"]) == 28
    assert (await node.call("GET", f"{base}/attempt", token=None)).body["otp"] == ""
    again = await node.call("POST", f"{base}/attempt", {}, token=None)
    assert (again.status, again.errors) == (400, ["root generation already in progress"])
    shares = [key.hex() for key in node.genesis.keys]
    wrong = await node.call("POST", f"{base}/update", {"key": shares[0], "nonce": "x"}, token=None)
    assert "incorrect nonce supplied" in wrong.errors[0]
    first = await node.call("POST", f"{base}/update", {"key": shares[0], "nonce": started["nonce"]}, token=None)
    assert (first.body["progress"], first.body["complete"]) == (1, False)
    same = await node.call("POST", f"{base}/update", {"key": shares[0], "nonce": started["nonce"]}, token=None)
    assert "already been provided" in same.errors[0]
    last = await node.call("POST", f"{base}/update", {"key": shares[1], "nonce": started["nonce"]}, token=None)
    assert (last.body["complete"], last.body["encoded_root_token"]) == (True, "")
    token = decoded(last.body["encoded_token"], started["otp"])
    preview = {"dr_operation_token": token, "preview": True}
    assert (await node.call("POST", "sys/replication/dr/secondary/promote", preview, token=None)).status == 200
    assert token not in str(node.store.data), "only its digest is kept"

    deleted = await node.call(
        "POST", "sys/replication/dr/secondary/operation-token/delete", {"dr_operation_token": token}, token=None
    )
    assert deleted.status == 204
    assert (await node.call("POST", "sys/replication/dr/secondary/promote", preview, token=None)).status == 403


def decoded(encoded: str, otp: str) -> str:
    import base64

    raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4))
    return bytes(left ^ right for left, right in zip(raw, otp.encode(), strict=True)).decode()


@pytest.mark.parametrize("token", ["", "hvs.wrong", "hvb.AAAA", "ä", "x" * 9000])
async def test_operation_tokens_that_count_for_nothing(token: str) -> None:
    node = await role_node("disabled", "secondary")
    body = {"dr_operation_token": token, "preview": True}
    reply = await node.call("POST", "sys/replication/dr/secondary/promote", body, token=None)
    assert reply.status == (400 if not token else 403)
    if not token:
        assert "dr_operation_token" in reply.errors[0]
    delete = await node.call(
        "POST", "sys/replication/dr/secondary/operation-token/delete", {"dr_operation_token": token}, token=None
    )
    assert delete.status == (400 if not token else 403)


async def test_the_operation_token_survives_the_promotion_until_it_is_deleted() -> None:
    node = await role_node("disabled", "secondary")
    token = await node.service._tokens.issue()  # type: ignore[union-attr]  # the role decides which service it is
    key = next(key for key in node.store.data if key.endswith("dr-operation-token"))
    promoted = await role_node("disabled", "primary")
    promoted.store.data[key] = b""
    refused = await promoted.call(
        "POST", "sys/replication/dr/secondary/promote", {"dr_operation_token": token}, token=None
    )
    assert (refused.status, refused.errors) == (400, ["Not a DR secondary."])
    for action in (
        "disable",
        "update-primary",
        "recover",
        "reindex",
        "merkle-check",
        "accept-deletions",
        "generate-operation-token/attempt",
    ):
        reply = await promoted.call("POST", f"sys/replication/dr/secondary/{action}", {}, token=None)
        assert (reply.status, reply.errors) == (400, ["Not a DR secondary."]), action


async def test_a_change_that_ends_the_tenure_lets_no_other_follow() -> None:
    node = await role_node("primary", "primary")
    assert (await node.call("POST", "sys/replication/dr/primary/demote", {})).status == 200
    assert node.restarts
    for path in ("performance/primary/disable", "performance/primary/demote", "dr/primary/enable"):
        reply = await node.call("POST", f"sys/replication/{path}", {})
        assert reply.status == 503, reply.errors
    for action in ("promote", "generate-operation-token/attempt"):
        reply = await node.call("POST", f"sys/replication/dr/secondary/{action}", {}, token=None)
        assert reply.status == 503, "it is one in a moment"


async def test_sealing_a_dr_secondary_takes_an_operation_token() -> None:
    node = await role_node("disabled", "secondary")
    assert (await node.call("PUT", "sys/seal", {})).status == 403
    token = await node.service._tokens.issue()  # type: ignore[union-attr]  # the role decides which service it is
    assert (await node.call("PUT", "sys/seal", {}, token=token)).status == 204
    assert node.node.asked == ["seal"]


@pytest.mark.parametrize(
    ("disaster", "call", "shown"),
    [
        ("secondary", ("secondary/promote", {"force": True}), "secondary"),
        ("secondary", ("secondary/disable", {}), "secondary"),
        ("primary", ("primary/demote", {}), "secondary"),
    ],
)
async def test_health_does_not_promise_a_service_before_the_next_tenure(
    disaster: str, call: tuple[str, dict[str, Any]], shown: str
) -> None:
    node = await role_node("disabled", disaster)
    token = await node.service._tokens.issue() if disaster == "secondary" else None  # type: ignore[union-attr]  # the role decides
    path, body = call
    reply = await node.call("POST", f"sys/replication/dr/{path}", {**body, "dr_operation_token": token})
    assert reply.status == 200, reply.errors
    assert node.restarts
    assert node.replication.modes()[1] == shown
