"""Transit: import, export, backup and certificates, with the vectors that standards give."""

from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding
from cryptography.x509.oid import NameOID

from plugin_api.errors import Failed, InvalidRequest, NotFound, ReadOnlyStorage, Unavailable
from plugin_api.testing import MemoryStorage
from sidecar.engines.transit import backup, wrapping
from sidecar.engines.transit.material import derive
from tests.support.transit_mount import READ, UPDATE, Mount, b64, un64

WRAPPING: dict[str, bytes] = {}
"""The wrapping key, made once for all tests here."""

DER, PEM = serialization.Encoding.DER, serialization.Encoding.PEM
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo


@pytest.fixture
async def mount() -> Mount:
    mount = Mount(MemoryStorage(WRAPPING))
    await mount.read("wrapping_key")
    WRAPPING["wrapping_key"] = mount.storage.entries["wrapping_key"]
    return mount


def pkcs8(key: Any) -> bytes:
    raw: bytes = key.private_bytes(DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return raw


def public_pem(key: Any) -> str:
    raw: bytes = key.public_bytes(PEM, SPKI)
    return raw.decode()


async def wrapped(mount: Mount, secret: bytes, algorithm: hashes.HashAlgorithm | None = None) -> str:
    """As the key wrapping guide says to do it."""
    key = serialization.load_pem_public_key((await mount.read("wrapping_key"))["public_key"].encode())
    assert isinstance(key, rsa.RSAPublicKey)
    assert key.key_size == 4096
    algorithm = algorithm or hashes.SHA256()
    ephemeral = bytes(range(32))
    outer = key.encrypt(ephemeral, padding.OAEP(padding.MGF1(algorithm), algorithm, None))
    return b64(outer + aes_key_wrap_with_padding(ephemeral, secret))


async def bring(mount: Mount, name: str, kind: str, secret: bytes, **body: Any) -> None:
    sent = {"type": kind, "ciphertext": await wrapped(mount, secret), **body}
    assert await mount(UPDATE, f"keys/{name}/import", sent) is None


# --- vectors ---


def test_hkdf_of_rfc_5869_case_3() -> None:
    expected = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    assert derive(b"\x0b" * 22, b"", 42).hex() == expected


def test_key_wrap_of_rfc_5649() -> None:
    # The second vector of section 6: a 192-bit key, a 7-byte secret.
    key = rsa.generate_private_key(65537, 2048)
    kek = bytes.fromhex("5840df6e29b02af1ab493b705bf16ea1ae8338f4dcc176a8")
    inner = bytes.fromhex("afbeb0f07dfbf5419200f2ccb50bb24f")
    outer = key.public_key().encrypt(kek, padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None))
    assert wrapping.unwrap(key, outer + inner, hashes.SHA256()) == bytes.fromhex("466f7250617369")


@pytest.mark.parametrize(
    ("kind", "key", "nonce", "associated", "plaintext", "sealed"),
    [
        (
            # McGrew and Viega's GCM, test case 4.
            "aes128-gcm96",
            "feffe9928665731c6d6a8f9467308308",
            "cafebabefacedbaddecaf888",
            "feedfacedeadbeeffeedfacedeadbeefabaddad2",
            "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
            "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
            "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e"
            "21d514b25466931c7d8f6a5aac84aa051ba30b396a0aac973d58e091"
            "5bc94fbc3221a5db94fae95ae7121a47",
        ),
        (
            # The same, test case 16.
            "aes256-gcm96",
            "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308",
            "cafebabefacedbaddecaf888",
            "feedfacedeadbeeffeedfacedeadbeefabaddad2",
            "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
            "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
            "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
            "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
            "76fc6ece0f4e1768cddf8853bb2d551b",
        ),
        (
            # RFC 8439, section 2.8.2.
            "chacha20-poly1305",
            "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f",
            "070000004041424344454647",
            "50515253c0c1c2c3c4c5c6c7",
            b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
            b"sunscreen would be it.".hex(),
            "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d6"
            "3dbea45e8ca9671282fafb69da92728b1a71de0a9e060b2905d6a5b67ecd3b36"
            "92ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc"
            "3ff4def08e4b7a9de576d26586cec64b61161ae10b594f09e26a7e902ecbd0600691",
        ),
    ],
)
async def test_aead_vectors_decrypt(
    mount: Mount, kind: str, key: str, nonce: str, associated: str, plaintext: str, sealed: str
) -> None:
    await bring(mount, "v", kind, bytes.fromhex(key))
    ciphertext = "vault:v1:" + b64(bytes.fromhex(nonce + sealed))
    opened = await mount.decrypt("v", ciphertext, associated_data=b64(bytes.fromhex(associated)))
    assert opened.hex() == plaintext


# --- import ---


@pytest.mark.parametrize("name", ["SHA1", "SHA224", "SHA-256", "sha384", "SHA512"])
async def test_every_hash_of_oaep(mount: Mount, name: str) -> None:
    algorithm = wrapping.oaep_hash(name)
    sent = {"ciphertext": await wrapped(mount, bytes(32), algorithm), "hash_function": name}
    await mount(UPDATE, "keys/k/import", sent)
    described = await mount.read("keys/k")
    assert (described["imported_key"], described["imported_key_allow_rotation"]) == (True, False)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("ed25519", ed25519.Ed25519PrivateKey.generate),
        ("ecdsa-p256", lambda: ec.generate_private_key(ec.SECP256R1())),
        ("ecdsa-p384", lambda: ec.generate_private_key(ec.SECP384R1())),
        ("ecdsa-p521", lambda: ec.generate_private_key(ec.SECP521R1())),
        ("rsa-2048", lambda: rsa.generate_private_key(65537, 2048)),
        ("rsa-3072", lambda: rsa.generate_private_key(65537, 3072)),
    ],
)
async def test_imported_keys_sign_and_come_back_as_they_were(mount: Mount, kind: str, make: Any) -> None:
    key = make()
    await bring(mount, "k", kind, pkcs8(key), exportable=True)
    signature = (await mount.post("sign/k", input=b64("x")))["signature"]
    assert await mount.post("verify/k", input=b64("x"), signature=signature) == {"valid": True}
    exported = (await mount.read("export/signing-key/k"))["keys"]["1"]
    public = (await mount.read("export/public-key/k"))["keys"]["1"]
    if kind == "ed25519":
        assert un64(exported) == key.private_bytes_raw() + key.public_key().public_bytes_raw()
        assert un64(public) == key.public_key().public_bytes_raw()
        return
    assert exported.startswith("-----BEGIN RSA PRIVATE" if kind.startswith("rsa") else "-----BEGIN EC PRIVATE")
    back = serialization.load_pem_private_key(exported.encode(), None)
    assert pkcs8(back) == pkcs8(key)
    assert public == public_pem(key.public_key())


async def test_hmac_import(mount: Mount) -> None:
    await bring(mount, "h", "hmac", bytes(range(48)), exportable=True, allow_rotation=True)
    assert (await mount.read("export/hmac-key/h"))["keys"] == {"1": b64(bytes(range(48)))}
    await mount.post("keys/h/rotate")
    assert len(un64((await mount.read("export/hmac-key/h/latest"))["keys"]["2"])) == 48


async def test_what_cannot_be_imported(mount: Mount) -> None:
    good = await wrapped(mount, bytes(32))
    small = rsa.generate_private_key(65537, 2048)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "either ciphertext or public_key"),
        ({"ciphertext": good, "public_key": "x"}, "either ciphertext or public_key"),
        ({"ciphertext": "%"}, "base64"),
        ({"ciphertext": b64(b"x")}, "failed to unwrap"),
        ({"ciphertext": b64(bytes(600))}, "failed to unwrap"),
        ({"ciphertext": good[:-8]}, "failed to unwrap"),
        ({"ciphertext": good, "hash_function": "SHA512"}, "failed to unwrap"),
        ({"ciphertext": good, "hash_function": "MD5"}, "unsupported hash function"),
        ({"ciphertext": good, "type": "aes128-gcm96"}, "invalid key size"),
        ({"ciphertext": good, "type": "ecdsa-p256"}, "PKCS #8"),
        ({"ciphertext": good, "type": "nothing"}, "unknown key type"),
        ({"ciphertext": good, "type": "rsa-2048", "derived": True}, "derivation"),
        ({"ciphertext": good, "auto_rotate_period": "2h"}, "allow_rotation must be set"),
        ({"ciphertext": await wrapped(mount, bytes(31)), "type": "hmac"}, "HMAC key"),
        ({"ciphertext": await wrapped(mount, pkcs8(small)), "type": "rsa-4096"}, "not of type"),
        ({"ciphertext": await wrapped(mount, pkcs8(small)), "type": "ed25519"}, "not of type"),
        ({"public_key": "x"}, "asymmetric key types only"),
        ({"public_key": "x", "type": "ecdsa-p256"}, "PEM"),
        ({"public_key": public_pem(small.public_key()), "type": "ecdsa-p256"}, "not of type"),
        ({"public_key": "x", "type": "ed25519", "derived": True}, "derived key"),
    ]
    for body, text in cases:
        assert text in await mount.refused("keys/k/import", **body), body
    assert not [path for path in mount.storage.entries if path != "wrapping_key"]


async def test_rsa_numbers_must_belong_together(mount: Mount) -> None:
    key = rsa.generate_private_key(65537, 2048)
    numbers = key.private_numbers()
    for field, value in (("d", numbers.d + 2), ("dmp1", numbers.dmp1 + 2), ("iqmp", numbers.iqmp + 2)):
        raw = pkcs8(key)
        old = getattr(numbers, field)
        size = (old.bit_length() + 7) // 8
        broken = raw.replace(old.to_bytes(size, "big"), value.to_bytes(size, "big"))
        assert broken != raw
        text = await mount.refused("keys/k/import", type="rsa-2048", ciphertext=await wrapped(mount, broken))
        assert "belong together" in text or "PKCS #8" in text


async def test_import_needs_a_free_name_and_import_version_an_imported_key(mount: Mount) -> None:
    await mount.post("keys/k")
    assert "existing key" in await mount.refused("keys/k/import", ciphertext=await wrapped(mount, bytes(32)))
    body = {"ciphertext": await wrapped(mount, bytes(32))}
    assert "imported key" in await mount.refused("keys/k/import_version", **body)
    assert "no existing key" in await mount.refused("keys/none/import_version", **body)


async def test_versions_of_imported_keys(mount: Mount) -> None:
    await bring(mount, "k", "aes256-gcm96", bytes(32))
    assert "does not allow rotation" in await mount.refused("keys/k/rotate")
    await mount(UPDATE, "keys/k/import_version", {"ciphertext": await wrapped(mount, bytes(range(32)))})
    assert (await mount.read("keys/k"))["latest_version"] == 2
    await bring(mount, "r", "aes256-gcm96", bytes(32), allow_rotation=True)
    answer = await mount.post("keys/r/rotate")
    assert answer["imported_key"] is False
    text = await mount.refused("keys/r/import_version", ciphertext=await wrapped(mount, bytes(32)))
    assert "imported key" in text


async def test_a_public_key_waits_for_its_private_half(mount: Mount) -> None:
    key, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    body = {"type": "ecdsa-p256", "public_key": public_pem(key.public_key()), "exportable": True}
    await mount(UPDATE, "keys/k/import", body)
    signature = "vault:v1:" + b64(key.sign(b"x", ec.ECDSA(hashes.SHA256())))
    assert await mount.post("verify/k", input=b64("x"), signature=signature) == {"valid": True}
    for path in ("sign/k", "keys/k/csr"):
        assert "no private key" in await mount.refused(path, input="")
    with pytest.raises(InvalidRequest, match="no private key"):
        await mount(READ, "export/signing-key/k")
    wrong = await wrapped(mount, pkcs8(other))
    assert "does not match" in await mount.refused("keys/k/import_version", ciphertext=wrong)
    assert "no such key version" in await mount.refused("keys/k/import_version", ciphertext=wrong, version=7)
    right = {"ciphertext": await wrapped(mount, pkcs8(key))}
    await mount(UPDATE, "keys/k/import_version", right)
    assert (await mount.read("keys/k"))["latest_version"] == 1
    assert (await mount.post("sign/k", input=""))["key_version"] == 1
    # Now that the latest has both halves, the next import is a new version.
    await mount(UPDATE, "keys/k/import_version", {"ciphertext": wrong})
    assert (await mount.read("keys/k"))["latest_version"] == 2


async def test_rsa_public_keys_encrypt(mount: Mount) -> None:
    key = rsa.generate_private_key(65537, 2048)
    await mount(UPDATE, "keys/r/import", {"type": "rsa-2048", "public_key": public_pem(key.public_key())})
    ciphertext = await mount.encrypt("r", b"x")
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    assert key.decrypt(un64(ciphertext.removeprefix("vault:v1:")), oaep) == b"x"
    assert "no private key" in await mount.refused("decrypt/r", ciphertext=ciphertext)


async def test_only_the_primary_makes_the_wrapping_key() -> None:
    mount = Mount()
    mount.storage.read_only = True
    with pytest.raises(ReadOnlyStorage):
        await mount(READ, "wrapping_key")


# --- export ---


async def test_exports(mount: Mount) -> None:
    await mount.post("keys/k", exportable=True)
    await mount.post("keys/k/rotate")
    answer = await mount.read("export/encryption-key/k")
    assert (answer["name"], answer["type"], list(answer["keys"])) == ("k", "aes256-gcm96", ["1", "2"])
    assert len(un64(answer["keys"]["1"])) == 32
    assert (await mount.read("export/encryption-key/k/latest"))["keys"] == {"2": answer["keys"]["2"]}
    assert (await mount.read("export/encryption-key/k/1"))["keys"] == {"1": answer["keys"]["1"]}
    await mount.post("keys/k/config", min_decryption_version=2)
    assert list((await mount.read("export/encryption-key/k"))["keys"]) == ["2"]
    for path, text in (
        ("export/encryption-key/k/1", "no such key version"),
        ("export/encryption-key/k/9", "no such key version"),
        ("export/encryption-key/k/x", "invalid key version"),
        ("export/signing-key/k", "not supported"),
        ("export/public-key/k", "no public key"),
        ("export/other/k", "invalid export type"),
        ("export/hmac-key/none", "not found"),
    ):
        with pytest.raises(InvalidRequest, match=text):
            await mount(READ, path)


async def test_what_is_not_exportable_stays(mount: Mount) -> None:
    await mount.post("keys/k", type="ecdsa-p256")
    for path in ("export/signing-key/k", "export/hmac-key/k", "byok-export/k/k"):
        with pytest.raises(InvalidRequest):
            await mount(READ, path)
    with pytest.raises(Failed, match="exporting is disallowed on the policy"):
        await mount(READ, "backup/k")
    await mount.post("keys/k/config", exportable=True)
    with pytest.raises(Failed, match="plaintext backup is disallowed on the policy"):
        await mount(READ, "backup/k")
    assert await mount.read("export/public-key/k")
    assert (await mount.read("export/certificate-chain/k"))["keys"] == {"1": ""}


@pytest.mark.parametrize("kind", ["aes256-gcm96", "ecdsa-p521", "ed25519", "hmac"])
async def test_a_key_moves_to_another_mount_wrapped(mount: Mount, kind: str) -> None:
    source = Mount()
    await source.post("keys/secret", type=kind, exportable=True)
    there = {"type": "rsa-4096", "public_key": (await mount.read("wrapping_key"))["public_key"]}
    await source(UPDATE, "keys/there/import", there)
    answer = await source.read("byok-export/there/secret/latest", hash="SHA384")
    body = {"type": kind, "ciphertext": answer["keys"]["1"], "hash_function": "SHA384", "exportable": True}
    await mount(UPDATE, "keys/secret/import", body)
    path = {"hmac": "export/hmac-key/secret", "aes256-gcm96": "export/encryption-key/secret"}.get(
        kind, "export/signing-key/secret"
    )
    assert (await mount.read(path))["keys"] == (await source.read(path))["keys"]
    with pytest.raises(InvalidRequest, match="must be an RSA key"):
        await source(READ, "byok-export/secret/secret")


async def test_every_usable_version_goes_wrapped(mount: Mount) -> None:
    """Without a version all of them, as many as export gives; each opens as what it was."""
    source = Mount()
    await source.post("keys/secret", exportable=True)
    for _ in range(2):
        await source.post("keys/secret/rotate")
    await source.post("keys/secret/config", min_decryption_version=2)
    there = {"type": "rsa-4096", "public_key": (await mount.read("wrapping_key"))["public_key"]}
    await source(UPDATE, "keys/there/import", there)
    answer = await source.read("byok-export/there/secret")
    plain = (await source.read("export/encryption-key/secret"))["keys"]
    assert (answer["name"], answer["type"], list(answer["keys"])) == ("secret", "aes256-gcm96", ["2", "3"])
    for version, ciphertext in answer["keys"].items():
        name = f"v{version}"
        await mount(UPDATE, f"keys/{name}/import", {"ciphertext": ciphertext, "exportable": True})
        assert (await mount.read(f"export/encryption-key/{name}"))["keys"] == {"1": plain[version]}
    await source.post("keys/kept")
    for path, text in (
        ("byok-export/there/kept", "not exportable"),
        ("byok-export/there/none", "not found"),
        ("byok-export/none/secret", "not found"),
    ):
        with pytest.raises(InvalidRequest, match=text):
            await source(READ, path)


# --- backup ---


async def test_a_backup_restores_everything(mount: Mount) -> None:
    await mount.post("keys/k", exportable=True, allow_plaintext_backup=True)
    first = await mount.encrypt("k", b"x")
    made = (await mount.post("hmac/k", input=""))["hmac"]
    for _ in range(70):
        await mount.post("keys/k/rotate")
    await mount.post("keys/k/config", min_encryption_version=3)
    text = (await mount.read("backup/k"))["backup"]
    other = Mount()
    assert await other(UPDATE, "restore", {"backup": text}) is None
    assert await other.read("keys/k") == await mount.read("keys/k")
    assert await other.decrypt("k", first) == b"x"
    assert await other.post("verify/k", input="", hmac=made) == {"valid": True}
    assert all(len(commit) <= 61 for commit in other.storage.commits)
    assert not [path for path in other.storage.entries if path.startswith("garbage/")]
    await other(UPDATE, "restore/renamed", {"backup": text})
    assert (await other.read("keys/renamed"))["name"] == "renamed"
    assert await other.decrypt("renamed", first) == b"x"


async def test_restoring_over_a_key_takes_force(mount: Mount) -> None:
    await mount.post("keys/k", exportable=True, allow_plaintext_backup=True)
    text = (await mount.read("backup/k"))["backup"]
    first = await mount.encrypt("k", b"x")
    await mount.post("keys/k/rotate")
    entries = len(mount.storage.entries)
    with pytest.raises(Failed, match='key "k" already exists'):
        await mount(UPDATE, "restore", {"backup": text})
    await mount(UPDATE, "restore", {"backup": text, "force": True})
    assert (await mount.read("keys/k"))["latest_version"] == 1
    assert await mount.decrypt("k", first) == b"x"
    assert len(mount.storage.entries) == entries - 1


async def test_a_restore_that_was_cut_short_leaves_the_old_key(mount: Mount) -> None:
    await mount.post("keys/k", exportable=True, allow_plaintext_backup=True)
    text = (await mount.read("backup/k"))["backup"]
    await mount.post("keys/k/rotate")
    ciphertext = await mount.encrypt("k", b"x")
    commit = mount.storage.commit
    for commits in range(3):
        left = commits

        async def cut_short(writes: Any) -> None:
            nonlocal left
            if not left:
                raise Unavailable("gone")
            left -= 1
            await commit(writes)

        mount.storage.commit = cut_short  # type: ignore[method-assign]  # a store that goes away
        with pytest.raises(Unavailable):
            await mount(UPDATE, "restore", {"backup": text, "force": True})
        mount.storage.commit = commit  # type: ignore[method-assign]  # stands in for one call
        assert await mount.decrypt("k", ciphertext) == b"x"
    await mount.engine._store.sweep()
    assert sorted(path.split("/")[0] for path in mount.storage.entries) == ["key", "version", "version", "wrapping_key"]


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa-p384", "rsa-2048", "hmac", "chacha20-poly1305"])
async def test_damaged_backups_are_refused(mount: Mount, kind: str) -> None:
    await mount.post("keys/k", type=kind, exportable=True, allow_plaintext_backup=True)
    text = un64((await mount.read("backup/k"))["backup"]).decode()
    damages = [
        "",
        "%",
        b64("x"),
        b64("{}"),
        b64("[" * 5000),
        b64(text.replace(backup.FORMAT, "other")),
        b64(text.replace(kind, "nothing")),
        b64(text.replace('"created_us":{"1"', '"created_us":{"2"')),
        b64(text.replace('"versions":{"1"', '"versions":{"2"')),
        b64(text.replace('"secret":"', '"secret":"AAAA')),
        b64(text.replace('"min_decryption":1', '"min_decryption":5')),
    ]
    for damaged in damages:
        assert await mount.refused("restore/new", backup=damaged)
    with pytest.raises(InvalidRequest, match="invalid name"):
        await mount(UPDATE, "restore", {"backup": b64(text), "name": "../x"})
    with pytest.raises(NotFound):
        await mount(READ, "keys/new")


# --- certificates ---


@pytest.mark.parametrize("kind", ["ecdsa-p256", "ed25519", "rsa-2048"])
async def test_certificate_requests_and_chains(mount: Mount, kind: str) -> None:
    await mount.post("keys/k", type=kind)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "example")])
    template = (
        x509.CertificateSigningRequestBuilder(name)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("example")]), critical=False)
        .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    )
    answer = await mount.post("keys/k/csr", csr=template.public_bytes(PEM).decode())
    made = x509.load_pem_x509_csr(answer["csr"].encode())
    assert made.is_signature_valid
    assert made.subject == name
    assert list(made.extensions) == list(template.extensions)
    assert x509.load_pem_x509_csr((await mount.post("keys/k/csr"))["csr"].encode()).subject == x509.Name([])
    issuer = ec.generate_private_key(ec.SECP256R1())
    when = datetime(2024, 1, 1, tzinfo=UTC)
    certificate = (
        (x509.CertificateBuilder(name, name, made.public_key(), 1, when, when).sign(issuer, hashes.SHA256()))
        .public_bytes(PEM)
        .decode()
    )
    assert await mount(UPDATE, "keys/k/set-certificate", {"certificate_chain": certificate}) is None
    assert (await mount.read("keys/k"))["keys"]["1"]["certificate_chain"] == certificate
    assert (await mount.read("export/certificate-chain/k"))["keys"] == {"1": certificate}
    await mount.post("keys/k/rotate")
    assert "not of this key version" in await mount.refused("keys/k/set-certificate", certificate_chain=certificate)


async def test_bad_certificate_requests(mount: Mount) -> None:
    await mount.post("keys/k", type="ecdsa-p256")
    await mount.post("keys/d", type="ed25519", derived=True)
    assert "template" in await mount.refused("keys/k/csr", csr="x")
    assert "invalid key version" in await mount.refused("keys/k/csr", version="x")
    assert "no such key version" in await mount.refused("keys/k/csr", version="2")
    assert "missing certificate_chain" in await mount.refused("keys/k/set-certificate")
    assert "certificate chain" in await mount.refused("keys/k/set-certificate", certificate_chain="x")
    assert "not derived" in await mount.refused("keys/d/csr")
