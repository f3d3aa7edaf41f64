"""Transit: properties that hold for any input, and inputs of any kind that never become a 5xx."""

import asyncio
import base64
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from plugin_api.errors import InvalidRequest
from plugin_api.request import Operation
from sidecar.engines.transit.ciphers import decrypt, encrypt
from sidecar.engines.transit.encoding import (
    PIECE_CHARS,
    decode_base64,
    decode_base64_url,
    encode_base64,
    encode_base64_url,
)
from sidecar.engines.transit.key_types import AEAD, KEY_TYPES, RSA
from sidecar.engines.transit.material import Material, generate, import_secret
from sidecar.engines.transit.signatures import Scheme, sign, verify
from sidecar.engines.transit.work import ITEMS_PER_TURN, Workers
from tests.support.transit_mount import Mount, b64

AEADS = [Material(kind, generate(kind)) for kind in KEY_TYPES.values() if kind.family == AEAD]
SIGNERS = [Material(kind, generate(kind)) for kind in KEY_TYPES.values() if kind.signs and kind.family != RSA]


@given(st.binary())
def test_base64_goes_both_ways(data: bytes) -> None:
    assert encode_base64(data) == base64.b64encode(data).decode()
    assert decode_base64(encode_base64(data), "x") == data
    assert decode_base64_url(encode_base64_url(data), "x") == data


def test_base64_in_pieces() -> None:
    for extra in range(-4, 8):
        data = bytes(range(256)) * (PIECE_CHARS // 4 * 3 // 256) + bytes(max(extra, 0))
        data = data[: len(data) + min(extra, 0)]
        text = base64.b64encode(data).decode()
        assert encode_base64(data) == text
        assert decode_base64(text, "x") == data


@given(st.sampled_from(AEADS), st.binary(), st.binary(), st.one_of(st.none(), st.binary(min_size=1)), st.booleans())
def test_what_is_encrypted_decrypts(
    material: Material, plaintext: bytes, associated: bytes, context: bytes | None, convergent: bool
) -> None:
    made = encrypt(material, plaintext, context=context, associated=associated, convergent=convergent, scheme="oaep")
    assert decrypt(material, made, context=context, associated=associated, scheme="oaep") == plaintext
    again = encrypt(material, plaintext, context=context, associated=associated, convergent=convergent, scheme="oaep")
    assert (again == made) is convergent


@given(st.sampled_from(SIGNERS), st.binary(), st.binary(), st.sampled_from(["asn1", "jws"]))
def test_what_is_signed_verifies(material: Material, data: bytes, other: bytes, marshaling: str) -> None:
    scheme = Scheme(marshaling=marshaling)
    made = sign(material, data, scheme, None)
    assert verify(material, data, made, scheme, None)
    assert verify(material, other, made, scheme, None) is (other == data)


@given(st.sampled_from(SIGNERS), st.binary())
def test_any_bytes_for_a_signature_are_just_wrong(material: Material, raw: bytes) -> None:
    assert not verify(material, b"x", encode_base64(raw), Scheme(), None)


@given(st.sampled_from(list(KEY_TYPES.values())), st.binary(max_size=600))
def test_any_bytes_for_a_key_are_a_key_or_refused(kind: Any, data: bytes) -> None:
    with suppress(InvalidRequest):
        import_secret(kind, data)


@given(st.lists(st.integers(0, 200_000), max_size=3 * ITEMS_PER_TURN), st.booleans())
@settings(deadline=None, max_examples=30)
def test_work_keeps_the_order(sizes: list[int], slow: bool) -> None:
    done = asyncio.run(Workers().map(lambda size: size + 1, sizes, slow=slow, size=lambda size: size))
    assert done == [size + 1 for size in sizes]


# --- any request ---

MOUNT = Mount()
TEXTS = st.one_of(
    st.text(max_size=30),
    st.binary(max_size=80).map(b64),
    st.binary(max_size=80).map(lambda raw: "vault:v1:" + b64(raw)),
    st.text(max_size=10).map(lambda text: "vault:v" + text),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), TEXTS)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.lists(
        st.dictionaries(st.sampled_from(["input", "plaintext", "ciphertext", "context", "hmac", "signature"]), SCALARS),
        max_size=3,
    ),
)
FIELDS = [
    "algorithm",
    "associated_data",
    "backup",
    "batch_input",
    "bits",
    "bytes",
    "certificate_chain",
    "ciphertext",
    "context",
    "csr",
    "format",
    "hash_algorithm",
    "hmac",
    "input",
    "key_version",
    "marshaling_algorithm",
    "min_decryption_version",
    "name",
    "nonce",
    "padding_scheme",
    "plaintext",
    "prehashed",
    "public_key",
    "salt_length",
    "signature",
    "signature_algorithm",
    "version",
]
PATHS = [
    "hash",
    "random",
    "restore",
    "datakey/plaintext/aes",
    *(f"{path}/{name}" for path in ("encrypt", "decrypt", "rewrap") for name in ("aes", "derived", "rsa")),
    *(f"{path}/{name}" for path in ("sign", "verify", "hmac") for name in ("ec", "ed", "rsa", "aes", "mac", "none")),
    *(
        f"keys/{name}/{path}"
        for path in ("config", "csr", "set-certificate", "import_version")
        for name in ("ec", "rsa")
    ),
]


async def _fill() -> None:
    types = {"aes": "aes256-gcm96", "rsa": "rsa-2048", "ec": "ecdsa-p256", "ed": "ed25519", "mac": "hmac"}
    for name, kind in types.items():
        await MOUNT.post(f"keys/{name}", type=kind)
    await MOUNT.post("keys/derived", derived=True)


@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6))
@settings(deadline=None, max_examples=600)
def test_no_request_is_a_server_error(path: str, body: dict[str, Any]) -> None:
    async def ask() -> None:
        # A KeyedLock and the workers belong to a loop; so does the mount.
        mount = Mount(MOUNT.storage)
        if not MOUNT.storage.entries:
            await _fill()
        with suppress(InvalidRequest):
            await mount(Operation.UPDATE, path, body)

    asyncio.run(ask())
