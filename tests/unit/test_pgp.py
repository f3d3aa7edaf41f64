"""Shares and tokens under PGP keys: over HTTP, and opened by the holders' own tools."""

import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pysequoia import Cert, Tsk, decrypt
from pysequoia.packet import PacketPile

from plugin_api.errors import InvalidRequest
from sidecar.api.init_request import init_request
from sidecar.api.node_view import InitOutcome
from sidecar.core.keys import SEAL, UNSEAL_KEYS_BACKUP
from sidecar.core.pgp import parse_key, parse_keys
from sidecar.core.seal import combine
from sidecar.core.seal_record import SealRecord, open_root_key, root_fingerprint
from sidecar.request.fields import Fields
from tests.support.service_node import Harness, running

HOLDERS = [Tsk.generate(f"holder {number} <h{number}@example.com>") for number in range(3)]


def public(holder: Tsk) -> str:
    return base64.b64encode(bytes(holder.extract_certificate())).decode()


def opened(holder: Tsk, message: bytes) -> bytes:
    plain = decrypt(message, decryptor=holder.decryptor()).bytes
    assert plain is not None
    return bytes(plain)


def fingerprint(holder: Tsk) -> str:
    return str(holder.extract_certificate().fingerprint)


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        yield harness


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("keybase:somebody", "looked up by the client"),
        ("not base64!", "not base64"),
        (base64.b64encode(b"some bytes").decode(), "not an OpenPGP public key"),
        ("", "not an OpenPGP public key"),
        ("A" * 70_000, "longer than"),
    ],
)
def test_what_is_no_key(text: str, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as refused:
        parse_key(text)
    assert "Stack backtrace" not in str(refused.value)


def test_a_key_that_cannot_encrypt_is_found_out_at_once() -> None:
    cert = HOLDERS[0].extract_certificate()
    revocation = cert.revoke(HOLDERS[0].certifier())
    with pytest.raises(InvalidRequest, match="is revoked"):
        parse_key(base64.b64encode(bytes(cert) + bytes(revocation)).decode())
    without_subkeys = Cert.from_packets(list(PacketPile.from_bytes(bytes(cert)))[:4])
    with pytest.raises(InvalidRequest, match="cannot encrypt"):
        parse_key(base64.b64encode(bytes(without_subkeys)).decode())


def test_armored_keys_and_the_count() -> None:
    armored = base64.b64encode(str(HOLDERS[0].extract_certificate()).encode()).decode()
    assert parse_key(armored).fingerprint == fingerprint(HOLDERS[0])
    with pytest.raises(InvalidRequest, match="count mismatch"):
        parse_keys([armored], 2, "pgp_keys")
    assert parse_keys([], 2, "pgp_keys") == []


@pytest.mark.parametrize("recovery", [False, True])
def test_init_hands_out_shares_and_token_encrypted(recovery: bool) -> None:
    prefix = "recovery" if recovery else "secret"
    asked: dict[str, Any] = {
        f"{prefix}_shares": 3,
        f"{prefix}_threshold": 2,
        "recovery_pgp_keys" if recovery else "pgp_keys": [public(holder) for holder in HOLDERS],
        "root_token_pgp_key": public(HOLDERS[1]),
    }
    request = init_request(Fields(asked), "static" if recovery else "shamir")
    shares = (b"\x01" * 33, b"\x02" * 33, b"\x03" * 33)
    answer = request.answer(InitOutcome(shares, "hvs.root"))
    names = ("recovery_keys", "recovery_keys_base64") if recovery else ("keys", "keys_base64")
    assert set(answer) == {*names, "keys", "keys_base64", "root_token"}
    for holder, share, text, hexed in zip(HOLDERS, shares, answer[names[1]], answer[names[0]], strict=True):
        assert bytes.fromhex(hexed) == base64.b64decode(text)
        assert opened(holder, base64.b64decode(text)) == share.hex().encode()
    assert opened(HOLDERS[1], base64.b64decode(answer["root_token"])) == b"hvs.root"
    if recovery:
        assert answer["keys"] == answer["keys_base64"] == []


@pytest.mark.parametrize(
    ("kind", "asked", "text"),
    [
        (
            "shamir",
            {"recovery_shares": 1},
            "parameters recovery_shares,recovery_threshold not applicable to seal type shamir",
        ),
        ("shamir", {"stored_shares": 1}, "parameters stored_shares not applicable to seal type shamir"),
        ("shamir", {"recovery_pgp_keys": ["x"]}, "recovery_pgp_keys not applicable"),
        (
            "static",
            {"secret_shares": 5},
            "parameters secret_shares,secret_threshold not applicable to seal type static",
        ),
        ("static", {"pgp_keys": ["x"]}, "pgp_keys not applicable to seal type static"),
        ("static", {}, "recovery configuration must specify a positive number of shares"),
        ("static", {"recovery_shares": 2, "recovery_threshold": 1}, "threshold must be greater than one"),
        ("static", {"recovery_shares": 1, "recovery_threshold": 1, "disable_unseal_recovery": True}, "not available"),
    ],
)
def test_init_requests_that_do_not_fit_the_seal(kind: str, asked: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        init_request(Fields(asked), kind)


async def test_rekey_under_pgp_keys_with_a_backup(node: Harness) -> None:
    fingerprints = [fingerprint(holder) for holder in HOLDERS]
    body = {
        "secret_shares": 3,
        "secret_threshold": 2,
        "pgp_keys": [public(holder) for holder in HOLDERS],
        "backup": True,
    }
    started = (await node.call("PUT", "sys/rekey/init", body, token=None)).body
    assert (started["pgp_fingerprints"], started["backup"]) == (fingerprints, True)
    done: dict[str, Any] = {}
    for key in node.keys[:2]:
        done = (
            await node.call("PUT", "sys/rekey/update", {"key": key.hex(), "nonce": started["nonce"]}, token=None)
        ).body
    assert (done["complete"], done["pgp_fingerprints"], done["backup"]) == (True, fingerprints, True)
    shares = [
        bytes.fromhex(opened(holder, base64.b64decode(message)).decode())
        for holder, message in zip(HOLDERS, done["keys_base64"], strict=True)
    ]
    record = SealRecord.decode(node.store.entries[SEAL])
    assert root_fingerprint(open_root_key(record, combine(shares[1:]))) == node.node.genesis.root_fingerprint

    kept = await node.call("GET", "sys/rekey/backup")
    assert kept.data["keys"] == {name: [key] for name, key in zip(fingerprints, done["keys"], strict=True)}
    assert kept.body["keys_base64"] == kept.data["keys_base64"]
    assert kept.data["nonce"] == started["nonce"]
    assert (await node.call("GET", "sys/rekey/backup", token=None)).status == 403
    assert bytes.fromhex(done["keys"][0]) not in node.store.entries[UNSEAL_KEYS_BACKUP], "under the barrier"
    assert (await node.call("DELETE", "sys/rekey/backup")).status == 204
    assert (await node.call("GET", "sys/rekey/backup")).errors == ["no backed-up keys found"]


async def test_generate_root_for_a_pgp_key(node: Harness) -> None:
    begun = (await node.call("PUT", "sys/generate-root/attempt", {"pgp_key": public(HOLDERS[0])}, token=None)).body
    assert (begun["pgp_fingerprint"], begun["otp"], begun["started"]) == (fingerprint(HOLDERS[0]), "", True)
    done: dict[str, Any] = {}
    for key in node.keys[:2]:
        body = {"key": key.hex(), "nonce": begun["nonce"]}
        done = (await node.call("PUT", "sys/generate-root/update", body, token=None)).body
    assert (done["complete"], done["pgp_fingerprint"]) == (True, fingerprint(HOLDERS[0]))
    token = opened(HOLDERS[0], base64.b64decode(done["encoded_token"])).decode()
    assert (await node.call("GET", "auth/token/lookup-self", token=token)).data["policies"] == ["root"]


async def test_generate_root_takes_one_way_to_hide_the_token(node: Harness) -> None:
    both = {"pgp_key": public(HOLDERS[0]), "otp": "x" * 28}
    assert (await node.call("PUT", "sys/generate-root/attempt", both, token=None)).status == 400
    reply = await node.call("PUT", "sys/generate-root/attempt", {"pgp_key": "keybase:x"}, token=None)
    assert (reply.status, "looked up by the client" in reply.errors[0]) == (400, True)
