"""Response wrapping: single use whatever happens at once, and the JWT form with everything it must refuse."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import jwt as pyjwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from consul_backend.errors import OutcomeUnknown, Unavailable
from plugin_api.errors import InvalidRequest, ReadOnlyStorage
from sidecar.core.keys import JWT_KEY, TOKEN_SALT
from sidecar.core.store_view import SealedStore
from sidecar.core.tokens import CreateToken, TokenStore
from sidecar.core.wrapping import Wrapping
from tests.support.logical_store import FakeTime, MemoryLogicalStore, expire, make_sealed

INVALID = "^wrapping token is not valid or does not exist$"
PAYLOAD = {"data": {"secret": "s3cr3t", "n": 1}, "lease_duration": 0}


class Setup:
    def __init__(self, store: MemoryLogicalStore, sealed: SealedStore) -> None:
        self.store, self.sealed, self.now = store, sealed, FakeTime()
        self.tokens = TokenStore(sealed, self.now)
        self.wrapping = Wrapping(sealed, self.tokens, self.now)

    def left(self) -> list[str]:
        return [key for key in self.store.below("") if key not in (TOKEN_SALT, JWT_KEY)]


@pytest.fixture
async def it() -> Setup:
    setup = Setup(*make_sealed())
    await setup.tokens.load()
    return setup


async def test_wrap_and_unwrap(it: Setup):
    commits = len(it.store.commits)
    info = await it.wrapping.wrap(PAYLOAD, 300, "kv/data/x")
    assert len(it.store.commits) == commits + 1
    assert (info.ttl_s, info.creation_path, info.creation_time_s) == (300, "kv/data/x", int(it.now()))
    assert info.token not in repr(info)
    entry = await it.tokens.lookup(info.token)
    assert (entry.policies, entry.num_uses, entry.renewable) == (("response-wrapping",), 1, False)
    assert entry.explicit_max_ttl_s == entry.ttl_s == 300
    assert await it.wrapping.lookup(info.token) == {
        "creation_ttl": 300,
        "creation_time": "2023-11-14T22:13:20Z",
        "creation_path": "kv/data/x",
    }
    assert await it.wrapping.unwrap(info.token) == PAYLOAD
    assert len(it.store.commits) == commits + 2
    assert it.left() == []
    with pytest.raises(InvalidRequest, match=INVALID):
        await it.wrapping.lookup(info.token)


async def test_a_hundred_unwraps_at_once(it: Setup):
    info = await it.wrapping.wrap(PAYLOAD, 300, "p")
    results = await asyncio.gather(*(it.wrapping.unwrap(info.token) for _ in range(100)), return_exceptions=True)
    assert [result for result in results if result == PAYLOAD] == [PAYLOAD]
    assert sum(isinstance(result, InvalidRequest) for result in results) == 99
    assert it.left() == []


async def test_unwrap_rewrap_and_use_at_once(it: Setup):
    for _ in range(20):
        info = await it.wrapping.wrap(PAYLOAD, 300, "p")
        calls = [it.wrapping.unwrap(info.token), it.wrapping.rewrap(info.token), it.tokens.use(info.token)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        served = [result for result in results if not isinstance(result, InvalidRequest) and result is not None]
        assert len(served) == 1


async def test_nothing_leaves_before_the_consumption_is_committed(it: Setup):
    info = await it.wrapping.wrap(PAYLOAD, 300, "p")
    it.store.fail = Unavailable("no store")
    with pytest.raises(Unavailable):
        await it.wrapping.unwrap(info.token)
    assert await it.wrapping.unwrap(info.token) == PAYLOAD


async def test_an_unknown_outcome_never_gives_the_payload_twice(it: Setup):
    info = await it.wrapping.wrap(PAYLOAD, 300, "p")
    it.store.fail, it.store.fail_applied = OutcomeUnknown("lost"), True
    with pytest.raises(OutcomeUnknown):
        await it.wrapping.unwrap(info.token)
    with pytest.raises(InvalidRequest, match=INVALID):
        await it.wrapping.unwrap(info.token)


async def test_tokens_that_cannot_be_unwrapped(it: Setup):
    other = await it.tokens.create(CreateToken(policies=["a", "response-wrapping"]))
    batch = await it.tokens.create(CreateToken(policies=["response-wrapping"], type="batch"))
    for token in ("", "hvs.nothing", other.token, batch.token, "a.b.c", "s.x.y", "..", "\ud800"):
        for method in (it.wrapping.lookup, it.wrapping.unwrap, it.wrapping.rewrap):
            with pytest.raises(InvalidRequest, match=INVALID):
                await method(token)
    assert await it.tokens.lookup(other.token) is not None, "trying to unwrap it must not consume an ordinary token"
    info = await it.wrapping.wrap(PAYLOAD, 300, "p")
    it.now.advance(300)
    with pytest.raises(InvalidRequest, match=INVALID):
        await it.wrapping.unwrap(info.token)


async def test_a_wrapping_token_without_ttl(it: Setup):
    with pytest.raises(InvalidRequest, match="endpoint requires response wrapping to be used"):
        await it.wrapping.wrap(PAYLOAD, 0, "p")


async def test_rewrap(it: Setup):
    info = await it.wrapping.wrap(PAYLOAD, 300, "kv/x", jwt=True, api_addr="https://a:8200", wrapped_accessor="acc")
    it.now.advance(100)
    again = await it.wrapping.rewrap(info.token)
    assert (again.ttl_s, again.creation_path, again.wrapped_accessor) == (300, "kv/x", "acc")
    assert again.creation_time_s == info.creation_time_s + 100
    assert claims_of(again.token)["addr"] == "https://a:8200"
    with pytest.raises(InvalidRequest, match=INVALID):
        await it.wrapping.unwrap(info.token)
    it.now.advance(299)
    assert await it.wrapping.unwrap(again.token) == PAYLOAD
    assert it.left() == []


async def test_an_expired_payload_is_swept(it: Setup):
    await it.wrapping.wrap(PAYLOAD, 60, "p")
    it.now.advance(200)
    await expire(it.tokens)
    assert it.left() == []


# -- the JWT form


def claims_of(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))


async def test_jwt_shape(it: Setup):
    info = await it.wrapping.wrap(
        PAYLOAD, 1800, "p", jwt=True, api_addr="https://primary:8200", extra_claims={"ca_sha256": "ff", "exp": 1}
    )
    head, _, signature = info.token.split(".")
    assert json.loads(base64.urlsafe_b64decode(head + "==")) == {"alg": "ES512", "typ": "JWT"}
    assert len(base64.urlsafe_b64decode(signature + "==")) == 132
    claims = claims_of(info.token)
    issued = int(it.now())
    assert claims.pop("jti").startswith("hvs.")
    assert claims == {
        "accessor": "",
        "addr": "https://primary:8200",
        "ca_sha256": "ff",
        "exp": issued + 1800,
        "iat": issued,
        "nbf": issued - 5,
        "type": "wrapping",
    }
    assert (await it.wrapping.lookup(info.token))["creation_path"] == "p"
    assert await it.wrapping.unwrap(info.token) == PAYLOAD
    with pytest.raises(InvalidRequest, match=INVALID):
        await it.wrapping.unwrap(info.token)


async def test_the_token_inside_a_jwt_redeems_too_but_only_once(it: Setup):
    info = await it.wrapping.wrap(PAYLOAD, 300, "p", jwt=True)
    bare = claims_of(info.token)["jti"]
    results = await asyncio.gather(
        *(it.wrapping.unwrap(token) for token in [bare, info.token] * 20), return_exceptions=True
    )
    assert results.count(PAYLOAD) == 1


async def test_one_key_for_all_and_after_a_restart(it: Setup):
    first, second = await asyncio.gather(
        it.wrapping.wrap(PAYLOAD, 300, "a", jwt=True), it.wrapping.wrap(PAYLOAD, 300, "b", jwt=True)
    )
    again = Wrapping(it.sealed, it.tokens, it.now)
    assert (await again.lookup(first.token))["creation_path"] == "a"
    assert (await again.lookup(second.token))["creation_path"] == "b"


async def test_a_secondary_makes_no_key(it: Setup):
    secondary = Wrapping(it.sealed, it.tokens, it.now, writable=lambda: False)
    with pytest.raises(ReadOnlyStorage):
        await secondary.wrap(PAYLOAD, 300, "p", jwt=True)
    assert it.left() == []
    info = await secondary.wrap(PAYLOAD, 300, "p")
    assert await secondary.unwrap(info.token) == PAYLOAD
    await it.wrapping.wrap(PAYLOAD, 300, "p", jwt=True)
    info = await secondary.wrap(PAYLOAD, 300, "p", jwt=True)
    assert await secondary.unwrap(info.token) == PAYLOAD


async def stored_key(it: Setup) -> ec.EllipticCurvePrivateKey:
    stored = json.loads(await it.sealed.get(JWT_KEY))
    assert stored["type"] == "p521"
    return ec.derive_private_key(int(stored["d"]), ec.SECP521R1())


async def test_forged_jwts(it: Setup):
    info = await it.wrapping.wrap(PAYLOAD, 300, "p", jwt=True)
    key = await stored_key(it)
    claims = claims_of(info.token)
    public_pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    stranger = ec.generate_private_key(ec.SECP521R1())
    p256 = ec.generate_private_key(ec.SECP256R1())

    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    header, body, signature = info.token.split(".")
    hmac_key = pyjwt.algorithms.HMACAlgorithm(pyjwt.algorithms.HMACAlgorithm.SHA256)
    signing_input = f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{body}"
    confused = base64.urlsafe_b64encode(hmac_key.sign(signing_input.encode(), public_pem)).decode().rstrip("=")
    forged = {
        "alg none": f"{part({'alg': 'none', 'typ': 'JWT'})}.{body}.",
        "alg none with signature": f"{part({'alg': 'none', 'typ': 'JWT'})}.{body}.{signature}",
        "HS256 with the public key": f"{signing_input}.{confused}",
        "another key": pyjwt.encode(claims, stranger, "ES512"),
        "another curve": pyjwt.encode(claims, p256, "ES256"),
        "key in the header": pyjwt.encode(claims, stranger, "ES512", headers={"jwk": {"kty": "EC"}, "kid": "../../x"}),
        "another type": pyjwt.encode({**claims, "type": "login"}, key, "ES512"),
        "no type": pyjwt.encode({k: v for k, v in claims.items() if k != "type"}, key, "ES512"),
        "another typ": pyjwt.encode(claims, key, "ES512", headers={"typ": "at+jwt"}),
        "unknown crit": pyjwt.encode(claims, key, "ES512", headers={"crit": ["exp2"], "exp2": 1}),
        "audience": pyjwt.encode({**claims, "aud": "someone"}, key, "ES512"),
        "no jti": pyjwt.encode({k: v for k, v in claims.items() if k != "jti"}, key, "ES512"),
        "jti that is no text": pyjwt.encode({**claims, "jti": 7}, key, "ES512"),
        "past": pyjwt.encode({**claims, "exp": int(it.now()) - 61}, key, "ES512"),
        "future": pyjwt.encode({**claims, "nbf": int(it.now()) + 61}, key, "ES512"),
        "never ends": pyjwt.encode({**claims, "exp": 1e400}, key, "ES512"),
        "changed body": f"{header}.{part({**claims, 'addr': 'https://evil'})}.{signature}",
        "no signature": f"{header}.{body}.",
    }
    for token in forged.values():
        for method in (it.wrapping.lookup, it.wrapping.unwrap, it.wrapping.rewrap):
            with pytest.raises(InvalidRequest, match=INVALID):
                await method(token)
    within = pyjwt.encode({**claims, "exp": int(it.now()) - 59}, key, "ES512")
    assert await it.wrapping.unwrap(within) == PAYLOAD
