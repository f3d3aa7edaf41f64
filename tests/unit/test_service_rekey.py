"""sys/rekey over HTTP: hvac where it has the call, and what the seal record opens with afterwards."""

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import hvac
import pytest

from consul_backend import errors as backend
from sidecar.core.keys import SEAL
from sidecar.core.seal_record import SealRecord
from tests.support.seal import opens
from tests.support.service_node import Harness, Reply, primary_and_secondary, running


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


async def put(node: Harness, path: str, body: Any = None) -> Reply:
    """Without a token: the shares are the permission."""
    return await node.call("PUT", f"sys/rekey/{path}", body or {}, token=None)


async def begin(node: Harness, shares: int = 5, threshold: int = 3, **more: Any) -> str:
    reply = await put(node, "init", {"secret_shares": shares, "secret_threshold": threshold, **more})
    assert reply.status == 200, reply.errors
    return str(reply.body["nonce"])


async def finish(node: Harness, nonce: str) -> dict[str, Any]:
    assert (await put(node, "update", {"key": node.keys[0].hex(), "nonce": nonce})).body["progress"] == 1
    reply = await put(node, "update", {"key": base64.b64encode(node.keys[2]).decode(), "nonce": nonce})
    assert reply.status == 200, reply.errors
    body: dict[str, Any] = reply.body
    return body


async def test_new_shares_replace_the_old_ones(node: Harness) -> None:
    before = (await node.call("GET", "sys/rekey/init", token=None)).body
    assert before == {
        "nonce": "",
        "started": False,
        "t": 0,
        "n": 0,
        "progress": 0,
        "required": 2,
        "pgp_fingerprints": None,
        "backup": False,
        "verification_required": False,
    }
    nonce = await begin(node)
    begun = (await node.call("GET", "sys/rekey/init", token=None)).body
    assert begun == before | {"nonce": nonce, "started": True, "t": 3, "n": 5}
    done = await finish(node, nonce)
    keys = [bytes.fromhex(key) for key in done["keys"]]
    assert [base64.b64decode(key) for key in done["keys_base64"]] == keys
    assert (len(keys), done["complete"], done["verification_required"], done["nonce"]) == (5, True, False, nonce)
    assert "verification_nonce" not in done
    assert opens(node, keys[1:4])
    assert not opens(node, node.keys[:2])
    record = SealRecord.decode(node.store.entries[SEAL])
    assert (record.shares, record.threshold) == (5, 3)
    assert (await node.call("GET", "sys/rekey/init", token=None)).body == before | {"required": 3}
    # The new shares count for everything that shares are asked for, and the old ones for nothing.
    attempt = (await node.call("PUT", "sys/generate-root/attempt", {}, token=None)).body
    assert attempt["required"] == 3


async def test_what_is_refused(node: Harness) -> None:
    for body, text in (
        ({"secret_shares": 0}, "invalid seal configuration: shares must be at least one"),
        ({"secret_shares": 2, "secret_threshold": 3}, "invalid seal configuration: threshold cannot be larger than"),
        ({"secret_shares": 3, "secret_threshold": 1}, "invalid seal configuration: threshold must be greater than one"),
        ({"secret_shares": 1, "secret_threshold": 1, "backup": True}, "cannot request a backup of the new keys"),
        ({"secret_shares": 1, "secret_threshold": 1, "pgp_keys": ["x"]}, "error parsing PGP key"),
        ({"secret_shares": 1, "secret_threshold": 1, "stored_shares": 1}, "parameters stored_shares not applicable"),
    ):
        reply = await put(node, "init", body)
        assert reply.status == 400
        assert reply.errors[0].startswith(text)
    key = node.keys[0].hex()
    assert (await put(node, "update", {"key": key, "nonce": "x"})).errors == ["no rekey configuration found"]
    assert (await put(node, "verify", {"key": key, "nonce": "x"})).errors == ["no rekey configuration found"]
    nonce = await begin(node)
    again = await put(node, "init", {"secret_shares": 1, "secret_threshold": 1})
    assert (again.status, again.errors) == (400, ["rekey already in progress"])
    assert (await put(node, "update", {"key": key, "nonce": "x"})).errors == [
        f'incorrect nonce supplied; nonce for this rekey operation is "{nonce}"'
    ]
    assert (await put(node, "update", {"nonce": nonce})).errors == ["'key' must be specified in request body as JSON"]
    assert (await put(node, "update", {"key": "00ff", "nonce": nonce})).errors == [
        "key is shorter than minimum 16 bytes"
    ]
    assert (await put(node, "verify", {"key": key, "nonce": nonce})).errors == ["no rekey verification in progress"]
    await put(node, "update", {"key": key, "nonce": nonce})
    assert (await put(node, "update", {"key": key, "nonce": nonce})).errors == [
        "given key has already been provided during this rekey operation"
    ]
    wrong = bytes([node.keys[1][0] ^ 1, *node.keys[1][1:]]).hex()
    failed = await put(node, "update", {"key": wrong, "nonce": nonce})
    assert failed.errors == ["rekey aborted: cipher: message authentication failed"]
    assert (await node.call("GET", "sys/rekey/init", token=None)).body["progress"] == 0
    for stranger in (None, {"nonce": "x"}):
        refused = await node.call("DELETE", "sys/rekey/init", stranger, token=None)
        assert (refused.status, "with its nonce, or with a token" in refused.errors[0]) == (400, True)
    assert (await node.call("DELETE", "sys/rekey/init", {"nonce": nonce}, token=None)).status == 204
    assert (await node.call("DELETE", "sys/rekey/init", token=None)).status == 204
    assert not (await node.call("GET", "sys/rekey/init", token=None)).body["started"]
    for path in ("backup", "recovery-key-backup"):
        assert (await node.call("GET", f"sys/rekey/{path}")).errors == ["no backed-up keys found"]
        assert (await node.call("GET", f"sys/rekey/{path}", token=None)).status == 403
        assert (await node.call("DELETE", f"sys/rekey/{path}")).status == 204
    for path in ("init", "update", "verify"):
        reply = await node.call("PUT", f"sys/rekey-recovery-key/{path}", {}, token=None)
        assert (reply.status, reply.errors) == (400, ["recovery rekeying not supported"])
    assert opens(node, node.keys[:2])


async def test_verified_keys_come_into_force_once_they_were_given_back(node: Harness) -> None:
    old_record = node.store.entries[SEAL]
    nonce = await begin(node, 3, 2, require_verification=True)
    done = await finish(node, nonce)
    keys = [bytes.fromhex(key) for key in done["keys"]]
    assert (done["complete"], done["verification_required"]) == (True, True)
    assert node.store.entries[SEAL] == old_record, "nothing is in force yet"
    state = (await node.call("GET", "sys/rekey/init", token=None)).body
    assert (state["started"], state["verification_nonce"]) == (True, done["verification_nonce"])
    late = await put(node, "update", {"key": node.keys[0].hex(), "nonce": nonce})
    assert late.status == 400
    assert done["verification_nonce"] in late.errors[0]

    verify = done["verification_nonce"]
    assert (await node.call("GET", "sys/rekey/verify", token=None)).body == {
        "nonce": verify,
        "started": True,
        "t": 2,
        "n": 3,
        "progress": 0,
    }
    assert (await put(node, "verify", {"key": done["keys"][0], "nonce": verify})).body["progress"] == 1
    restarted = (await node.call("DELETE", "sys/rekey/verify", token=None)).body
    assert (restarted["progress"], restarted["nonce"] != verify) == (0, True)
    stale = await put(node, "verify", {"key": done["keys"][0], "nonce": verify})
    assert stale.errors[0].startswith("incorrect nonce supplied; nonce for this verify operation is ")
    verify = restarted["nonce"]
    await put(node, "verify", {"key": node.keys[0].hex(), "nonce": verify})
    wrong = await put(node, "verify", {"key": node.keys[1].hex(), "nonce": verify})
    assert wrong.errors == ["rekey verification failed: these are not the new keys"]
    assert node.store.entries[SEAL] == old_record

    verify = (await node.call("GET", "sys/rekey/verify", token=None)).body["nonce"]
    await put(node, "verify", {"key": done["keys"][2], "nonce": verify})
    final = await put(node, "verify", {"key": done["keys_base64"][0], "nonce": verify})
    assert final.body == {"nonce": verify, "complete": True}
    assert opens(node, keys[:2])
    assert not opens(node, node.keys[:2])
    assert (await node.call("GET", "sys/rekey/verify", token=None)).errors == ["no rekey configuration found"]


async def test_a_cancelled_verification_leaves_the_old_keys(node: Harness) -> None:
    await finish(node, await begin(node, 1, 1, require_verification=True))
    assert (await node.call("DELETE", "sys/rekey/init", token=None)).status == 400
    node.clock.now_s += 600
    assert (await node.call("DELETE", "sys/rekey/init", token=None)).status == 204, "old enough to be forgotten"
    assert opens(node, node.keys[:2])
    assert (await node.call("GET", "sys/rekey/verify", token=None)).status == 400


async def test_a_store_that_refuses_changes_nothing_and_a_silent_one_loses_no_share(node: Harness) -> None:
    nonce = await begin(node, 1, 1)
    await put(node, "update", {"key": node.keys[0].hex(), "nonce": nonce})
    node.store.fail_next = backend.Overloaded("q")
    assert (await put(node, "update", {"key": node.keys[1].hex(), "nonce": nonce})).status == 503
    assert opens(node, node.keys[:2])
    state = (await node.call("GET", "sys/rekey/init", token=None)).body
    assert (state["started"], state["progress"]) == (True, 0)
    await put(node, "update", {"key": node.keys[0].hex(), "nonce": nonce})
    node.store.fail_next = backend.OutcomeUnknown("q")
    unsure = await put(node, "update", {"key": node.keys[1].hex(), "nonce": nonce})
    assert (unsure.status, len(unsure.body["keys"])) == (200, 1)
    assert "keep the old key shares AND these" in unsure.body["warnings"][0]
    assert not (await node.call("GET", "sys/rekey/init", token=None)).body["started"]


async def test_two_last_shares_at_once_make_one_set_of_keys(node: Harness) -> None:
    nonce = await begin(node, 1, 1)
    await put(node, "update", {"key": node.keys[0].hex(), "nonce": nonce})
    last = [{"key": node.keys[number].hex(), "nonce": nonce} for number in (1, 2)]
    answers = await asyncio.gather(*(put(node, "update", body) for body in last))
    assert sorted(answer.status for answer in answers) == [200, 400]
    (winner,) = (answer for answer in answers if answer.status == 200)
    assert opens(node, [bytes.fromhex(key) for key in winner.body["keys"]])


async def test_a_performance_secondary_is_not_rekeyed() -> None:
    text = "rekeying can only be performed on the primary cluster when replication is activated"
    async with primary_and_secondary() as (_, secondary):
        for path, body in (
            ("init", {"secret_shares": 1, "secret_threshold": 1}),
            ("update", {"key": secondary.keys[0].hex(), "nonce": "x"}),
            ("verify", {"key": secondary.keys[0].hex(), "nonce": "x"}),
        ):
            reply = await put(secondary, path, body)
            assert (reply.status, reply.errors) == (400, [text])
        assert (await secondary.call("GET", "sys/rekey/init", token=None)).status == 200


def drive_hvac(address: str, token: str, keys: list[str]) -> list[str]:
    client = hvac.Client(url=address, token=token)  # which is what lets it cancel: hvac sends no nonce
    assert not client.sys.read_rekey_progress()["started"]
    started = client.sys.start_rekey(secret_shares=2, secret_threshold=2, require_verification=True)
    assert client.sys.rekey(keys[0], nonce=started["nonce"])["progress"] == 1
    issued = client.sys.rekey(keys[1], nonce=started["nonce"])
    nonce = client.sys.read_rekey_verify_progress()["nonce"]
    assert client.sys.rekey_verify(issued["keys"][0], nonce=nonce)["progress"] == 1
    client.sys.cancel_rekey_verify()
    nonce = client.sys.read_rekey_verify_progress()["nonce"]
    final = client.sys.rekey_verify_multi(issued["keys"], nonce=nonce)
    assert final["complete"]
    client.sys.start_rekey(secret_shares=1, secret_threshold=1)
    client.sys.cancel_rekey()
    assert not client.sys.read_rekey_progress()["started"]
    new: list[str] = issued["keys"]
    return new


async def test_hvac_rekeys(node: Harness) -> None:
    keys = await asyncio.to_thread(drive_hvac, node.address, node.root, [key.hex() for key in node.keys])
    assert opens(node, [bytes.fromhex(key) for key in keys])
