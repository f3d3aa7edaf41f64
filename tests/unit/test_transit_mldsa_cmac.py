"""Transit: ML-DSA signatures and AES-CMACs."""

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import mldsa

from plugin_api.errors import InvalidRequest
from plugin_api.testing import MemoryStorage
from sidecar.engines.transit.signatures import make_cmac
from tests.support.transit_mount import READ, UPDATE, Mount, b64, un64

SETS = {
    "44": (mldsa.MLDSA44PublicKey, 2420),
    "65": (mldsa.MLDSA65PublicKey, 3309),
    "87": (mldsa.MLDSA87PublicKey, 4627),
}


@pytest.fixture
def mount() -> Mount:
    return Mount(MemoryStorage())


@pytest.mark.parametrize("parameter_set", SETS)
async def test_ml_dsa_signs_and_anybody_can_check(mount: Mount, parameter_set: str) -> None:
    """FIPS 204 gives the length of each set's signature; the library's own public key checks ours."""
    made = await mount.post("keys/k", type="ml-dsa", parameter_set=parameter_set)
    assert (made["type"], made["parameter_set"], made["supports_signing"]) == ("ml-dsa", parameter_set, True)
    assert not made["supports_encryption"]
    assert not made["supports_derivation"]
    signature = (await mount.post("sign/k", input=b64("message")))["signature"]
    raw = un64(signature.removeprefix("vault:v1:"))
    kind, length = SETS[parameter_set]
    assert len(raw) == length
    public = serialization.load_pem_public_key(made["keys"]["1"]["public_key"].encode())
    assert isinstance(public, kind)
    public.verify(raw, b"message")
    for text, valid in (("message", True), ("another", False)):
        assert await mount.post("verify/k", input=b64(text), signature=signature) == {"valid": valid}
    await mount.post("keys/k/rotate")
    assert (await mount.post("sign/k", input=b64("message")))["signature"].startswith("vault:v2:")
    assert await mount.post("verify/k", input=b64("message"), signature=signature) == {"valid": True}


async def test_an_ml_dsa_key_is_exported_backed_up_and_restored(mount: Mount) -> None:
    await mount.post("keys/k", type="ml-dsa", parameter_set="65", exportable=True, allow_plaintext_backup=True)
    signature = (await mount.post("sign/k", input=b64("m")))["signature"]
    exported = await mount(READ, "export/signing-key/k")
    assert exported is not None
    assert exported.data is not None
    assert exported.data["type"] == "ml-dsa"
    private = serialization.load_pem_private_key(exported.data["keys"]["1"].encode(), None)
    assert isinstance(private, mldsa.MLDSA65PrivateKey)
    backup = await mount(READ, "backup/k")
    assert backup is not None
    other = Mount(MemoryStorage())
    assert backup.data is not None
    await other(UPDATE, "restore/k", {"backup": backup.data["backup"]})
    assert await other.post("verify/k", input=b64("m"), signature=signature) == {"valid": True}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"type": "ml-dsa"}, "invalid parameter_set"),
        ({"type": "ml-dsa", "parameter_set": "99"}, "invalid parameter_set"),
        ({"type": "ml-dsa-44"}, "unknown key type"),
        ({"type": "ed25519", "parameter_set": "44"}, "parameter_set does not apply"),
        ({"type": "ml-dsa", "parameter_set": "44", "derived": True}, "key derivation"),
        ({"type": "aes256-cmac", "derived": True}, "key derivation"),
    ],
)
async def test_keys_that_are_not_made(mount: Mount, body: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        await mount.post("keys/k", **body)


async def test_an_ml_dsa_key_takes_no_hash(mount: Mount) -> None:
    await mount.post("keys/k", type="ml-dsa", parameter_set="44")
    with pytest.raises(InvalidRequest, match="only pure ML-DSA"):
        await mount.post("sign/k", input=b64("m"), prehashed=True)


# --- CMAC ---

RFC4493_KEY = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
RFC4493_MESSAGE = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e5130c81c46a35ce411")


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, "bb1d6929e95937287fa37d129b756746"),
        (16, "070a16b46b4d4144f79bdd9dd04a287c"),
        (40, "dfa66747de9ae63030ca32611497c827"),
    ],
)
def test_the_vectors_of_rfc_4493(length: int, expected: str) -> None:
    assert make_cmac(RFC4493_KEY, RFC4493_MESSAGE[:length], 16).hex() == expected
    assert make_cmac(RFC4493_KEY, RFC4493_MESSAGE[:length], 4).hex() == expected[:8]


@pytest.mark.parametrize("kind", ["aes128-cmac", "aes192-cmac", "aes256-cmac"])
async def test_a_cmac_is_made_and_checked(mount: Mount, kind: str) -> None:
    made = await mount.post("keys/k", type=kind)
    assert (made["type"], made["supports_signing"], made["supports_encryption"]) == (kind, False, False)
    cmac = (await mount.post("cmac/k", input=b64("m")))["cmac"]
    assert len(un64(cmac.removeprefix("vault:v1:"))) == 16
    short = (await mount.post("cmac/k/8", input=b64("m")))["cmac"]
    assert short == (await mount.post("cmac/k", input=b64("m"), mac_length=8))["cmac"]
    for text, body, valid in (
        ("m", {"cmac": cmac}, True),
        ("n", {"cmac": cmac}, False),
        ("m", {"cmac": short, "mac_length": 8}, True),
        ("m", {"cmac": short}, False),
    ):
        assert await mount.post("verify/k", input=b64(text), **body) == {"valid": valid}
    await mount.post("keys/k/rotate")
    batch = await mount.post("cmac/k", batch_input=[{"input": b64("m"), "key_version": 1}, {"input": b64("m")}])
    first, second = (result["cmac"] for result in batch["batch_results"])
    assert (first, second[:9]) == (cmac, "vault:v2:")


async def test_what_cmac_refuses(mount: Mount) -> None:
    await mount.post("keys/k", type="aes256-cmac")
    await mount.post("keys/h", type="hmac")
    for path, body, text in (
        ("cmac/h", {"input": b64("m")}, "CMAC is not supported for keys of type hmac"),
        ("cmac/k/3", {"input": b64("m")}, "mac_length must be 4 to 16 bytes"),
        ("cmac/k", {"input": b64("m"), "mac_length": 17}, "mac_length must be 4 to 16 bytes"),
        ("sign/k", {"input": b64("m")}, "signing is not supported"),
        ("encrypt/k", {"plaintext": b64("m")}, "encryption is not supported"),
        ("verify/h", {"input": b64("m"), "cmac": "vault:v1:AAAA"}, "CMAC is not supported"),
        ("verify/k", {"input": b64("m"), "cmac": "vault:v1:AAAA", "hmac": "vault:v1:AAAA"}, "one of 'signature'"),
    ):
        with pytest.raises(InvalidRequest, match=text):
            await mount.post(path, **body)
