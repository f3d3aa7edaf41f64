"""Transit: HMACs, signatures, hashes and random bytes, with the vectors that standards give."""

import hashlib
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from plugin_api.errors import UnsupportedPath
from plugin_api.testing import MemoryStorage
from sidecar.engines.transit import run
from sidecar.engines.transit.encoding import encode_base64_url
from sidecar.engines.transit.keys import NOT_FOUND
from tests.support.transit_mount import UPDATE, Mount, b64, un64

SIGNING = ["ed25519", "ecdsa-p256", "ecdsa-p384", "ecdsa-p521", "rsa-2048"]
SHARED = MemoryStorage()
"""Keys of every type, made once: an RSA key takes its time."""


@pytest.fixture
async def mount() -> Mount:
    mount = Mount(SHARED)
    if not SHARED.entries:
        for kind in (*SIGNING, "hmac", "aes256-gcm96"):
            await mount.post(f"keys/{kind}", type=kind)
    return mount


async def sign(mount: Mount, name: str, data: bytes, **body: Any) -> str:
    return str((await mount.post(f"sign/{name}", input=b64(data), **body))["signature"])


async def valid(mount: Mount, name: str, data: bytes, **body: Any) -> bool:
    answer = await mount.post(f"verify/{name}", input=b64(data), **body)
    assert list(answer) == ["valid"]
    return bool(answer["valid"])


# --- signatures ---


@pytest.mark.parametrize("kind", SIGNING)
@pytest.mark.parametrize("marshaling", ["asn1", "jws"])
async def test_every_signing_type(mount: Mount, kind: str, marshaling: str) -> None:
    signature = await sign(mount, kind, b"x", marshaling_algorithm=marshaling)
    assert signature.startswith("vault:v1:")
    body = {"signature": signature, "marshaling_algorithm": marshaling}
    assert await valid(mount, kind, b"x", **body)
    assert not await valid(mount, kind, b"y", **body)
    other = next(name for name in SIGNING if name != kind)
    assert not await valid(mount, other, b"x", **body)


@pytest.mark.parametrize(
    "name",
    ["sha1", "sha2-224", "sha2-256", "sha2-384", "sha2-512", "sha3-224", "sha3-256", "sha3-384", "sha3-512"],
)
@pytest.mark.parametrize("kind", ["ecdsa-p256", "ecdsa-p521", "rsa-2048"])
async def test_every_hash(mount: Mount, name: str, kind: str) -> None:
    signature = await sign(mount, f"{kind}/{name}", b"x", hash_algorithm="ignored")
    assert await valid(mount, kind, b"x", signature=signature, hash_algorithm=name)
    assert await valid(mount, kind, b"x", signature=signature, algorithm=name)
    other = "sha2-384" if name != "sha2-384" else "sha2-256"
    assert not await valid(mount, kind, b"x", signature=signature, hash_algorithm=other)


@pytest.mark.parametrize("kind", ["ecdsa-p256", "rsa-2048"])
async def test_prehashed_is_the_same_as_hashed(mount: Mount, kind: str) -> None:
    digest = hashlib.sha384(b"x").digest()
    signature = await sign(mount, kind, digest, prehashed=True, hash_algorithm="sha2-384")
    assert await valid(mount, kind, b"x", signature=signature, hash_algorithm="sha2-384")
    body = {"input": b64(b"short"), "prehashed": True, "hash_algorithm": "sha2-384"}
    assert "prehashed" in await mount.refused(f"sign/{kind}", **body)
    assert "prehashed" in await mount.refused(f"verify/{kind}", signature=signature, **body)


@pytest.mark.parametrize(
    ("salt", "others"), [("auto", ["auto"]), ("hash", ["auto", "32", "-1"]), ("20", ["auto", "20"]), ("0", ["auto"])]
)
async def test_pss_salts(mount: Mount, salt: str, others: list[str]) -> None:
    signature = await sign(mount, "rsa-2048", b"x", salt_length=salt)
    for other in others:
        assert await valid(mount, "rsa-2048", b"x", signature=signature, salt_length=other)
    assert not await valid(mount, "rsa-2048", b"x", signature=signature, salt_length="7")


async def test_pkcs1v15_and_the_bare_form(mount: Mount) -> None:
    signature = await sign(mount, "rsa-2048", b"x", signature_algorithm="pkcs1v15")
    assert await valid(mount, "rsa-2048", b"x", signature=signature, signature_algorithm="pkcs1v15")
    assert not await valid(mount, "rsa-2048", b"x", signature=signature)
    body = {"signature_algorithm": "pkcs1v15", "hash_algorithm": "none", "prehashed": True}
    bare = await sign(mount, "rsa-2048", b"any bytes", **body)
    assert await valid(mount, "rsa-2048", b"any bytes", signature=bare, **body)
    assert not await valid(mount, "rsa-2048", b"other", signature=bare, **body)
    assert "too long" in await mount.refused("sign/rsa-2048", input=b64(bytes(300)), **body)


async def test_other_programs_verify_what_was_signed(mount: Mount) -> None:
    version = (await mount.read("keys/rsa-2048"))["keys"]["1"]
    assert version["name"] == "rsa-2048"
    key = serialization.load_pem_public_key(version["public_key"].encode())
    assert isinstance(key, rsa.RSAPublicKey)
    made = un64((await sign(mount, "rsa-2048", b"x")).removeprefix("vault:v1:"))
    key.verify(made, b"x", padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH), hashes.SHA256())
    version = (await mount.read("keys/ecdsa-p521"))["keys"]["1"]
    curve = serialization.load_pem_public_key(version["public_key"].encode())
    assert isinstance(curve, ec.EllipticCurvePublicKey)
    made = un64((await sign(mount, "ecdsa-p521", b"x")).removeprefix("vault:v1:"))
    curve.verify(made, b"x", ec.ECDSA(hashes.SHA256()))


@pytest.mark.parametrize(
    ("name", "body", "text"),
    [
        ("ecdsa-p256", {}, "missing input"),
        ("ecdsa-p256", {"input": "%"}, "failed to base64-decode input"),
        ("ecdsa-p256", {"input": "", "hash_algorithm": "md5"}, "unsupported hash algorithm"),
        ("ecdsa-p256", {"input": "", "marshaling_algorithm": "x"}, "unsupported marshaling algorithm"),
        ("ecdsa-p256", {"input": "", "hash_algorithm": "none"}, "requires both"),
        (
            "ecdsa-p256",
            {"input": "", "hash_algorithm": "none", "prehashed": True, "signature_algorithm": "pkcs1v15"},
            "RSA keys only",
        ),
        ("rsa-2048", {"input": "", "signature_algorithm": "x"}, "unsupported signature algorithm"),
        ("rsa-2048", {"input": "", "salt_length": "x"}, "salt_length"),
        ("rsa-2048", {"input": "", "salt_length": "-2"}, "salt_length"),
        ("rsa-2048", {"input": "", "salt_length": "9" * 30}, "salt_length"),
        ("rsa-2048", {"input": "", "salt_length": 3000}, "too long"),
        ("rsa-2048", {"input": "", "key_version": 2}, "higher than the latest"),
        ("ed25519", {"input": "", "prehashed": True}, "pure Ed25519"),
        ("ed25519", {"input": "", "hash_algorithm": "sha2-512"}, "pure Ed25519"),
        ("aes256-gcm96", {"input": ""}, "not supported"),
        ("hmac", {"input": ""}, "not supported"),
        ("none", {"input": ""}, NOT_FOUND),
    ],
)
async def test_bad_requests_to_sign(mount: Mount, name: str, body: dict[str, Any], text: str) -> None:
    assert text in await mount.refused(f"sign/{name}", **body)


@pytest.mark.parametrize("kind", SIGNING)
@pytest.mark.parametrize(
    ("signature", "text"),
    [
        ("", "no prefix"),
        ("vault:v2:AAAA", "too new"),
        ("vault:vx:AAAA", "version number"),
        ("vault:v1:%", "base64-decode signature"),
    ],
)
async def test_what_is_no_signature(mount: Mount, kind: str, signature: str, text: str) -> None:
    assert text in await mount.refused(f"verify/{kind}", input="", signature=signature)


@pytest.mark.parametrize("kind", SIGNING)
@pytest.mark.parametrize(
    "body", ["", "AAAA", b64(bytes(64)), b64(bytes(256)), b64(b"\x30\x06\x02\x01\x00\x02\x01\x00")]
)
async def test_a_wrong_signature_is_just_not_valid(mount: Mount, kind: str, body: str) -> None:
    assert not await valid(mount, kind, b"x", signature="vault:v1:" + body)
    jws = "vault:v1:" + body.rstrip("=")
    assert not await valid(mount, kind, b"x", signature=jws, marshaling_algorithm="jws")


async def test_one_proof_and_the_same_in_every_input(mount: Mount) -> None:
    signature = await sign(mount, "ed25519", b"x")
    made = (await mount.post("hmac/ed25519", input=b64("x")))["hmac"]
    both = {"input": b64("x"), "signature": signature, "hmac": made}
    mixed = [{"input": b64("x"), "signature": signature}, {"input": b64("x"), "hmac": made}]
    for body in ({"input": b64("x")}, both, {"batch_input": [both]}, {"batch_input": mixed}):
        assert "one of 'signature', 'hmac' and 'cmac'" in await mount.refused("verify/ed25519", **body)


async def test_batches_sign_and_verify(mount: Mount) -> None:
    items = [{"input": b64("a"), "reference": "first"}, {}, {"input": "%"}, {"input": ""}]
    results = (await mount.post("sign/ecdsa-p256", batch_input=items))["batch_results"]
    assert [sorted(result) for result in results] == [
        ["key_version", "reference", "signature"],
        ["error"],
        ["error"],
        ["key_version", "signature"],
    ]
    assert results[1] == {"error": "missing input"}
    checks = [
        {"input": b64("a"), "signature": results[0]["signature"]},
        {"input": b64("b"), "signature": results[0]["signature"]},
        {"input": "", "signature": "x"},
    ]
    first, second, third = (await mount.post("verify/ecdsa-p256", batch_input=checks))["batch_results"]
    assert (first, second) == ({"valid": True}, {"valid": False})
    assert "no prefix" in third["error"]


async def test_derived_ed25519_keys() -> None:
    mount = Mount()
    await mount.post("keys/d", type="ed25519", derived=True)
    assert (await mount.read("keys/d"))["keys"]["1"]["public_key"] == ""
    first = await mount.post("sign/d", input=b64("x"), context=b64("1"))
    assert await mount.post("sign/d", input=b64("x"), context=b64("1")) == first
    assert (await mount.post("sign/d", input=b64("x"), context=b64("2")))["publickey"] != first["publickey"]
    shown = (await mount.read("keys/d", context=b64("1")))["keys"]["1"]
    assert (shown["name"], shown["public_key"]) == ("ed25519", first["publickey"])
    assert await valid(mount, "d", b"x", signature=first["signature"], context=b64("1"))
    assert not await valid(mount, "d", b"x", signature=first["signature"], context=b64("2"))
    assert await mount.refused("sign/d", input="") == run.NO_CONTEXT
    assert await mount.refused("verify/d", input="", signature=first["signature"]) == run.NO_CONTEXT


async def test_versions_of_signatures() -> None:
    mount = Mount()
    await mount.post("keys/k", type="ecdsa-p256")
    first = await sign(mount, "k", b"x")
    made = (await mount.post("hmac/k", input=b64("x")))["hmac"]
    await mount.post("keys/k/rotate")
    assert (await sign(mount, "k", b"x")).startswith("vault:v2:")
    assert (await sign(mount, "k", b"x", key_version=1)).startswith("vault:v1:")
    assert await valid(mount, "k", b"x", signature=first)
    await mount.post("keys/k/config", min_decryption_version=2)
    assert "too old" in await mount.refused("verify/k", input=b64("x"), signature=first)
    assert "too old" in await mount.refused("verify/k", input=b64("x"), hmac=made)
    for path in ("sign/k", "hmac/k"):
        assert "minimum" in await mount.refused(path, input="", key_version=1)


async def test_signing_works_on_secondaries(mount: Mount) -> None:
    secondary = Mount(MemoryStorage(SHARED.entries))
    secondary.storage.read_only = True
    signature = await sign(mount, "ecdsa-p521", b"x")
    assert await valid(secondary, "ecdsa-p521", b"x", signature=signature)
    assert await valid(mount, "rsa-2048", b"x", signature=await sign(secondary, "rsa-2048", b"x"))


# --- HMAC, hash, random ---


async def import_raw(kind: str, secret: bytes) -> Mount:
    """A mount whose key ``k`` is this one, as an import would leave it."""
    mount = Mount()
    await mount.post("keys/k", type=kind)
    store = mount.engine._store
    async with store._locks.hold("k"):
        ring = await store._known("k")
        record = await store._version(ring, 1)
        record.secret = secret
        record.hmac_key = secret if kind == "hmac" else record.hmac_key
        await store._commit(ring, {1: record})
    return mount


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sha2-224", "7fb3cb3588c6c1f6ffa9694d7d6ad2649365b0c1f65d69d1ec8333ea"),
        ("sha2-256", "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"),
        (
            "sha2-384",
            "88062608d3e6ad8a0aa2ace014c8a86f0aa635d947ac9febe83ef4e55966144b2a5ab39dc13814b94e3ab6e101a34f27",
        ),
        (
            "sha2-512",
            "fa73b0089d56a284efb0f0756c890be9b1b5dbdd8ee81a3655f83e33b2279d39"
            "bf3e848279a722c806b485a47e67c807b946a337bee8942674278859e13292fb",
        ),
    ],
)
async def test_hmac_of_rfc_4231_case_3(name: str, expected: str) -> None:
    # The key there has 20 bytes, fewer than an import takes.
    mount = await import_raw("hmac", b"\xaa" * 20)
    answer = await mount.post(f"hmac/k/{name}", input=b64(b"\xdd" * 50))
    assert answer == {"hmac": "vault:v1:" + b64(bytes.fromhex(expected))}
    assert await valid(mount, "k", b"\xdd" * 50, hmac=answer["hmac"], hash_algorithm=name)
    assert not await valid(mount, "k", b"\xdd" * 49, hmac=answer["hmac"], hash_algorithm=name)


async def test_ed25519_of_rfc_8032() -> None:
    mount = await import_raw(
        "ed25519", bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    )
    expected = bytes.fromhex(
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert await sign(mount, "k", b"\x72") == "vault:v1:" + b64(expected)


P256 = ec.EllipticCurvePublicNumbers(
    0x60FED4BA255A9D31C961EB74C6356D68C049B8923B61FA6CE669622E60F29FB6,
    0x7903FE1008B8BC99A41AE9E95628BC64F2F1B20C2D7E9F5177A3C294D4462299,
    ec.SECP256R1(),
)
P256_R = 0xEFD48B2AACB6A8FD1140DD9CD45E81D69D2C877B56AAF991C34D0EA84EAF3716
P256_S = 0xF7CB1C942D657C41D436C7A1B6E29F65F3E900DBB9AFF4064DC4AB2F843ACDA8


async def test_ecdsa_of_rfc_6979() -> None:
    mount = Mount()
    pem = P256.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    await mount(UPDATE, "keys/k/import", {"type": "ecdsa-p256", "public_key": pem.decode()})
    der = encode_dss_signature(P256_R, P256_S)
    assert await valid(mount, "k", b"sample", signature="vault:v1:" + b64(der))
    jws = encode_base64_url(P256_R.to_bytes(32, "big") + P256_S.to_bytes(32, "big"))
    assert await valid(mount, "k", b"sample", signature=f"vault:v1:{jws}", marshaling_algorithm="jws")
    assert not await valid(mount, "k", b"test", signature="vault:v1:" + b64(der))
    assert "no private key" in await mount.refused("sign/k", input="")


@pytest.mark.parametrize("kind", [*SIGNING, "hmac", "aes256-gcm96"])
async def test_every_type_makes_hmacs(mount: Mount, kind: str) -> None:
    made = (await mount.post(f"hmac/{kind}", input=b64("x"), algorithm="sha3-256"))["hmac"]
    assert await valid(mount, kind, b"x", hmac=made, hash_algorithm="sha3-256")
    assert not await valid(mount, kind, b"x", hmac=made)


@pytest.mark.parametrize("kind", ["hmac", "ecdsa-p256"])
async def test_the_hash_in_the_path_of_verify_wins_over_the_body(mount: Mount, kind: str) -> None:
    made = (await mount.post(f"hmac/{kind}/sha2-512", input=b64("x")))["hmac"]
    assert await valid(mount, f"{kind}/sha2-512", b"x", hmac=made)
    assert await valid(mount, f"{kind}/sha2-512", b"x", hmac=made, hash_algorithm="sha2-256")
    assert not await valid(mount, f"{kind}/sha2-512", b"y", hmac=made)
    assert not await valid(mount, kind, b"x", hmac=made)
    assert "unsupported hash" in await mount.refused(f"verify/{kind}/md5", input="", hmac=made)


async def test_a_signature_counts_under_the_hash_in_the_path_alone(mount: Mount) -> None:
    signature = await sign(mount, "ecdsa-p256/sha2-384", b"x")
    assert await valid(mount, "ecdsa-p256/sha2-384", b"x", signature=signature)
    assert not await valid(mount, "ecdsa-p256/sha2-256", b"x", signature=signature)
    assert not await valid(mount, "ecdsa-p256", b"x", signature=signature)


async def test_batches_of_hmacs(mount: Mount) -> None:
    items = [{"input": b64("a")}, {}, {"input": ""}, {"input": "%"}]
    one, two, three, four = (await mount.post("hmac/hmac", batch_input=items))["batch_results"]
    assert two == {"error": "missing input for HMAC"}
    assert "base64" in four["error"]
    checks = [{"input": b64("a"), "hmac": one["hmac"]}, {"input": b64("a"), "hmac": three["hmac"]}]
    results = (await mount.post("verify/hmac", batch_input=checks))["batch_results"]
    assert results == [{"valid": True}, {"valid": False}]


async def test_bad_hmacs(mount: Mount) -> None:
    assert "missing input" in await mount.refused("hmac/hmac")
    assert "unsupported hash" in await mount.refused("hmac/hmac/md5", input="")
    assert "unsupported hash" in await mount.refused("hmac/hmac", input="", algorithm="sha1")
    assert "no prefix" in await mount.refused("verify/hmac", input="", hmac="x")
    assert "base64" in await mount.refused("verify/hmac", input="", hmac="vault:v1:%")
    assert "not supported" in await mount.refused("verify/hmac", input="", signature="vault:v1:AAAA")
    assert not await valid(mount, "hmac", b"", hmac="vault:v1:")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sha2-256", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        ("sha3-256", "3a985da74fe225b2045c172d6bd390bd855f086e3e9d525b46bfe24511431532"),
    ],
)
async def test_hashes_of_abc(mount: Mount, name: str, expected: str) -> None:
    assert await mount.post(f"hash/{name}", input=b64("abc")) == {"sum": expected}
    answer = await mount.post("hash", input=b64("abc"), algorithm=name, format="base64")
    assert answer == {"sum": b64(bytes.fromhex(expected))}


async def test_bad_hashes(mount: Mount) -> None:
    assert "missing input" in await mount.refused("hash")
    assert "base64" in await mount.refused("hash", input="%")
    assert "unsupported hash" in await mount.refused("hash/sha1", input="")
    assert "encoding format" in await mount.refused("hash", input="", format="x")


async def test_random_bytes(mount: Mount) -> None:
    assert len(un64((await mount.post("random"))["random_bytes"])) == 32
    assert len((await mount.post("random/7", format="hex"))["random_bytes"]) == 14
    assert len(un64((await mount.post("random/all/9"))["random_bytes"])) == 9
    assert len(un64((await mount.post("random/platform", bytes="5"))["random_bytes"])) == 5
    assert await mount.post("random") != await mount.post("random")
    assert "less than 1" in await mount.refused("random/0")
    assert "less than 131072" in await mount.refused("random", bytes=131073)
    assert "entropy" in await mount.refused("random/seal")
    assert "encoding format" in await mount.refused("random", format="x")
    with pytest.raises(UnsupportedPath):
        await mount(UPDATE, "random/x", {})
