"""sys/rekey-recovery-key over HTTP: the recovery shares of a cluster whose auto seal opens it."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pysequoia import Tsk, decrypt

from consul_backend import errors as backend
from sidecar.core.init import build_genesis
from sidecar.core.keys import RECOVERY_KEYS_BACKUP, SEAL, SEAL_SHARES
from sidecar.core.seal_record import SealRecord, root_fingerprint
from sidecar.core.seals import prepare, unseal_root_key
from sidecar.core.seals.static import StaticKey, StaticSeal
from tests.support.seal import opens
from tests.support.service_node import Harness, Reply, running

AUTO = StaticSeal(StaticKey("k1", os.urandom(32)), None)
BASE = "sys/rekey-recovery-key"


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    genesis = build_genesis(
        shares=3,
        threshold=2,
        cluster_name="test",
        now_s=1_700_000_000.0,
        random_bytes=os.urandom,
        sealer=await prepare(AUTO, os.urandom),
    )
    async with running(genesis=genesis) as harness:
        harness.node.auto_seal = AUTO
        yield harness


async def put(node: Harness, path: str, body: Any = None) -> Reply:
    """Without a token: the shares are the permission."""
    return await node.call("PUT", f"{BASE}/{path}", body or {}, token=None)


async def begun(node: Harness, **more: Any) -> str:
    reply = await put(node, "init", {"secret_shares": 3, "secret_threshold": 2, **more})
    assert reply.status == 200, reply.errors
    return str(reply.body["nonce"])


async def issued(node: Harness, nonce: str) -> dict[str, Any]:
    reply = None
    for key in node.keys[:2]:
        reply = await put(node, "update", {"key": key.hex(), "nonce": nonce})
        assert reply.status == 200, reply.errors
    assert reply is not None
    body: dict[str, Any] = reply.body
    return body


async def opens_itself(node: Harness) -> bool:
    record = SealRecord.decode(node.store.entries[SEAL])
    assert record.auto is not None
    return root_fingerprint(await unseal_root_key(AUTO, record.auto)) == node.node.genesis.root_fingerprint


async def test_new_recovery_shares_and_the_auto_seal_goes_on_opening(node: Harness) -> None:
    idle = (await node.call("GET", f"{BASE}/init", token=None)).body
    assert idle == {
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
    nonce = await begun(node, secret_shares=5, secret_threshold=3)
    state = (await node.call("GET", f"{BASE}/init", token=None)).body
    assert state == idle | {"nonce": nonce, "started": True, "t": 3, "n": 5}
    assert not (await node.call("GET", "sys/rekey/init", token=None)).body["started"], "the seal's own is another"
    done = await issued(node, nonce)
    shares = [bytes.fromhex(key) for key in done["keys"]]
    assert (len(shares), done["complete"], done["verification_required"]) == (5, True, False)
    assert opens(node, shares[1:4])
    assert not opens(node, node.keys[:2])
    assert await opens_itself(node)
    assert SEAL_SHARES in node.store.entries, "what the secondaries learn them by"
    assert (await node.call("GET", f"{BASE}/init", token=None)).body == idle | {"required": 3}


async def test_who_may_cancel_and_that_nothing_has_changed(node: Harness) -> None:
    before = node.store.entries[SEAL]
    nonce = await begun(node)
    await put(node, "update", {"key": node.keys[0].hex(), "nonce": nonce})
    for stranger in (None, {"nonce": "x"}):
        refused = await node.call("DELETE", f"{BASE}/init", stranger, token=None)
        assert (refused.status, "with its nonce, or with a token" in refused.errors[0]) == (400, True)
    weak = await node.token('path "secret/*" { capabilities = ["read"] }')
    assert (await node.call("DELETE", f"{BASE}/init", token=weak)).status == 403
    assert (await node.call("GET", f"{BASE}/init", token=None)).body["progress"] == 1, "still there"
    assert (await node.call("DELETE", f"{BASE}/init", {"nonce": nonce}, token=None)).status == 204
    assert (await put(node, "update", {"key": node.keys[1].hex(), "nonce": nonce})).errors == [
        "no rekey configuration found"
    ]
    await begun(node)
    assert (await node.call("DELETE", f"{BASE}/init")).status == 204, "a token that may delete it needs no nonce"
    assert (await node.call("DELETE", f"{BASE}/init", token=None)).status == 204, "nothing to cancel"
    assert node.store.entries[SEAL] == before


async def test_recovery_shares_that_must_be_given_back_first(node: Harness) -> None:
    before = node.store.entries[SEAL]
    assert (await node.call("GET", f"{BASE}/verify", token=None)).errors == ["no rekey configuration found"]
    assert (await node.call("DELETE", f"{BASE}/verify", token=None)).errors == ["no rekey configuration found"]
    nonce = await begun(node, require_verification=True)
    assert (await node.call("GET", f"{BASE}/verify", token=None)).errors == ["no rekey verification in progress"]
    done = await issued(node, nonce)
    assert (done["complete"], done["verification_required"]) == (True, True)
    verify = done["verification_nonce"]
    waiting = {"nonce": verify, "started": True, "t": 2, "n": 3, "progress": 0}
    assert (await node.call("GET", f"{BASE}/verify", token=None)).body == waiting
    first = await put(node, "verify", {"key": done["keys"][2], "nonce": verify})
    assert first.body == waiting | {"progress": 1}
    again = (await node.call("DELETE", f"{BASE}/verify", token=None)).body
    assert (again["progress"], again["nonce"] != verify) == (0, True)
    stale = await put(node, "verify", {"key": done["keys"][2], "nonce": verify})
    assert stale.errors[0].startswith("incorrect nonce supplied; nonce for this verify operation is ")
    assert node.store.entries[SEAL] == before, "the old shares are in force until the new ones came back"

    answers = [
        (await put(node, "verify", {"key": key, "nonce": again["nonce"]})).body for key in done["keys_base64"][:2]
    ]
    assert answers[1] == {"nonce": again["nonce"], "complete": True}
    assert opens(node, [base64.b64decode(key) for key in done["keys_base64"][1:]])
    assert not opens(node, node.keys[:2])
    assert await opens_itself(node)


async def test_wrong_shares_given_back_leave_the_old_ones_in_force(node: Harness) -> None:
    done = await issued(node, await begun(node, require_verification=True))
    body = {"nonce": done["verification_nonce"]}
    await put(node, "verify", body | {"key": node.keys[0].hex()})
    wrong = await put(node, "verify", body | {"key": node.keys[1].hex()})
    assert wrong.errors == ["rekey verification failed: these are not the new keys"]
    assert opens(node, node.keys[:2])


async def test_what_the_store_refuses_is_given_back_again(node: Harness) -> None:
    done = await issued(node, await begun(node, require_verification=True))
    body = {"nonce": done["verification_nonce"]}
    await put(node, "verify", body | {"key": done["keys"][0]})
    node.store.fail_next = backend.Overloaded("q")
    assert (await put(node, "verify", body | {"key": done["keys"][1]})).status == 503
    assert opens(node, node.keys[:2])
    body = {"nonce": (await node.call("GET", f"{BASE}/verify", token=None)).body["nonce"]}
    answers = [(await put(node, "verify", body | {"key": key})).body for key in done["keys"][:2]]
    assert answers[1]["complete"]
    assert opens(node, [bytes.fromhex(key) for key in done["keys"][:2]])


async def test_recovery_shares_under_pgp_keys_with_a_backup(node: Harness) -> None:
    holders = [Tsk.generate(f"holder {number} <h{number}@example.com>") for number in range(3)]
    certificates = [holder.extract_certificate() for holder in holders]
    names = [str(one.fingerprint) for one in certificates]
    keys = [base64.b64encode(bytes(one)).decode() for one in certificates]
    for path in (f"{BASE}/backup", "sys/rekey/recovery-key-backup"):
        assert (await node.call("GET", path)).errors == ["no backed-up keys found"]
    nonce = await begun(node, pgp_keys=keys, backup=True)
    done = await issued(node, nonce)
    assert (done["pgp_fingerprints"], done["backup"]) == (names, True)
    shares = []
    for holder, message in zip(holders, done["keys_base64"], strict=True):
        plain = decrypt(base64.b64decode(message), decryptor=holder.decryptor()).bytes
        assert plain is not None
        shares.append(bytes.fromhex(bytes(plain).decode()))
    assert opens(node, shares[:2])

    kept = await node.call("GET", f"{BASE}/backup")
    assert kept.data == {
        "nonce": nonce,
        "keys": {name: [key] for name, key in zip(names, done["keys"], strict=True)},
        "keys_base64": {name: [key] for name, key in zip(names, done["keys_base64"], strict=True)},
    }
    assert kept.body["keys_base64"] == kept.data["keys_base64"], "old clients read it beside the envelope"
    assert (await node.call("GET", "sys/rekey/recovery-key-backup")).data == kept.data
    assert (await node.call("GET", "sys/rekey/backup")).errors == ["no backed-up keys found"]
    for method in ("GET", "DELETE"):
        assert (await node.call(method, f"{BASE}/backup", token=None)).status == 403
    assert bytes.fromhex(done["keys"][0]) not in node.store.entries[RECOVERY_KEYS_BACKUP], "under the barrier"
    assert (await node.call("DELETE", f"{BASE}/backup")).status == 204
    assert RECOVERY_KEYS_BACKUP not in node.store.entries
    assert (await node.call("GET", f"{BASE}/backup")).errors == ["no backed-up keys found"]
    assert (await node.call("DELETE", f"{BASE}/backup")).status == 204
