"""Transit: creating, reading, configuring, rotating, trimming and deleting keys."""

import asyncio
import threading
from typing import Any

import pytest

from plugin_api.errors import InvalidRequest, NotFound, PluginError, ReadOnlyStorage, Unavailable, UnsupportedOperation
from plugin_api.testing import make_request
from sidecar.engines.transit import keys
from sidecar.engines.transit.key_types import KEY_TYPES
from tests.support.transit_mount import CREATE, DELETE, LIST, READ, UPDATE, Mount, b64

WRITTEN_S = 1_700_000_000


@pytest.fixture
async def mount() -> Mount:
    mount = Mount()
    await mount.post("keys/k")
    return mount


async def test_a_new_key_describes_itself(mount: Mount) -> None:
    expected = {
        "name": "k",
        "type": "aes256-gcm96",
        "derived": False,
        "exportable": False,
        "allow_plaintext_backup": False,
        "deletion_allowed": False,
        "auto_rotate_period": 0,
        "min_available_version": 0,
        "min_decryption_version": 1,
        "min_encryption_version": 0,
        "latest_version": 1,
        "supports_encryption": True,
        "supports_decryption": True,
        "supports_signing": False,
        "supports_derivation": True,
        "imported_key": False,
        "keys": {"1": WRITTEN_S},
    }
    assert await mount.read("keys/k") == expected
    assert await mount.post("keys/other") == expected | {"name": "other"}


@pytest.mark.parametrize(
    ("kind", "encrypts", "signs", "derives"),
    [
        ("aes128-gcm96", True, False, True),
        ("chacha20-poly1305", True, False, True),
        ("ed25519", False, True, True),
        ("ecdsa-p256", False, True, False),
        ("ecdsa-p384", False, True, False),
        ("ecdsa-p521", False, True, False),
        ("rsa-2048", True, True, False),
        ("hmac", False, False, False),
    ],
)
async def test_what_types_can_do(kind: str, encrypts: bool, signs: bool, derives: bool) -> None:
    answer = await Mount().post("keys/k", type=kind)
    assert answer["type"] == kind
    assert (answer["supports_encryption"], answer["supports_decryption"]) == (encrypts, encrypts)
    assert (answer["supports_signing"], answer["supports_derivation"]) == (signs, derives)
    version = answer["keys"]["1"]
    if signs:
        assert version["creation_time"] == "2023-11-14T22:13:20Z"
        assert version["name"] == KEY_TYPES[kind].label
        assert version["certificate_chain"] == ""
    else:
        assert version == WRITTEN_S


@pytest.mark.parametrize(("kind", "bits"), [("rsa-3072", 3072), ("rsa-4096", 4096)])
async def test_keys_are_generated_away_from_the_loop(monkeypatch: pytest.MonkeyPatch, kind: str, bits: int) -> None:
    in_loop = []
    generate = keys.generate

    def noted(*args: Any) -> Any:
        in_loop.append(threading.current_thread() is threading.main_thread())
        return generate(*args)

    monkeypatch.setattr(keys, "generate", noted)
    mount = Mount()
    answer = await mount.post("keys/k", type=kind)
    assert (answer["type"], in_loop) == (f"rsa-{bits}", [False])


async def test_creating_again_changes_nothing(mount: Mount) -> None:
    response = await mount.answer("keys/k", type="ed25519", exportable=True)
    assert response.warnings == ["key k already existed"]
    assert response.data == await mount.read("keys/k")
    assert len(mount.storage.commits) == 1


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"type": "des"}, "unknown key type"),
        ({"type": ["x"]}, "type"),
        ({"type": "rsa-2048", "derived": True}, "derivation"),
        ({"type": "hmac", "derived": True}, "derivation"),
        ({"type": "ed25519", "derived": True, "convergent_encryption": True}, "convergent"),
        ({"convergent_encryption": True}, "requires derivation"),
        ({"auto_rotate_period": "59m"}, "at least an hour"),
        ({"auto_rotate_period": "-1h"}, "negative"),
        ({"auto_rotate_period": "x"}, "auto_rotate_period"),
        ({"key_size": 32}, "only be specified for HMAC"),
        ({"type": "hmac", "key_size": 31}, "key_size"),
        ({"type": "hmac", "key_size": 513}, "key_size"),
        ({"derived": "maybe"}, "derived"),
    ],
)
async def test_keys_that_cannot_be(body: dict[str, Any], text: str) -> None:
    mount = Mount()
    assert text in await mount.refused("keys/k", **body)
    assert mount.storage.entries == {}


async def test_hmac_keys_keep_their_size() -> None:
    mount = Mount()
    await mount.post("keys/h", type="hmac", key_size=64, exportable=True)
    await mount.post("keys/h/rotate")
    exported = (await mount.read("export/hmac-key/h"))["keys"]
    assert [len(text) for text in exported.values()] == [88, 88]


async def test_list_and_existence(mount: Mount) -> None:
    await mount.post("keys/a.b-c")
    response = await mount(LIST, "keys/")
    assert response is not None
    assert response.data == {"keys": ["a.b-c", "k"]}
    assert await mount.engine.exists(make_request(UPDATE, "keys/k")) is True
    assert await mount.engine.exists(make_request(UPDATE, "keys/none")) is False
    empty = await Mount()(LIST, "keys/")
    assert empty is not None
    assert empty.status == 404


async def test_unknown_keys(mount: Mount) -> None:
    with pytest.raises(NotFound):
        await mount(READ, "keys/none")
    for path in ("keys/none/config", "keys/none/rotate", "keys/none/trim"):
        assert "no existing key" in await mount.refused(path, min_available_version=1)
    with pytest.raises(InvalidRequest, match="not found"):
        await mount(DELETE, "keys/none")
    with pytest.raises(UnsupportedOperation):
        await mount(LIST, "keys/k")


# --- configuration ---


async def test_configuration(mount: Mount) -> None:
    for _ in range(3):
        await mount.post("keys/k/rotate")
    sent = {
        "min_decryption_version": 2,
        "min_encryption_version": "3",
        "deletion_allowed": True,
        "exportable": True,
        "allow_plaintext_backup": True,
        "auto_rotate_period": "24h",
    }
    answer = await mount.post("keys/k/config", **sent)
    expected = sent | {"min_encryption_version": 3, "auto_rotate_period": 86400}
    assert {name: answer[name] for name in sent} == expected
    assert list(answer["keys"]) == ["2", "3", "4"]
    # What is not sent stays; what was allowed cannot be taken back.
    answer = await mount.post("keys/k/config", exportable=False, allow_plaintext_backup=False, deletion_allowed=False)
    assert {name: answer[name] for name in sent} == expected | {"deletion_allowed": False}
    answer = await mount.post("keys/k/config", auto_rotate_period=0)
    assert answer["auto_rotate_period"] == 0


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"min_decryption_version": -1}, "negative"),
        ({"min_decryption_version": 4}, "latest key version is 3"),
        ({"min_encryption_version": -1}, "negative"),
        ({"min_encryption_version": 4}, "latest key version is 3"),
        ({"min_encryption_version": 1, "min_decryption_version": 2}, "greater than or equal"),
        ({"auto_rotate_period": "1m"}, "at least an hour"),
        ({"min_decryption_version": "x"}, "min_decryption_version"),
    ],
)
async def test_bad_configuration_changes_nothing(mount: Mount, body: dict[str, Any], text: str) -> None:
    for _ in range(2):
        await mount.post("keys/k/rotate")
    before = await mount.read("keys/k")
    assert text in await mount.refused("keys/k/config", **body, deletion_allowed=True)
    assert await mount.read("keys/k") == before


async def test_a_minimum_of_zero_is_one(mount: Mount) -> None:
    response = await mount.answer("keys/k/config", min_decryption_version=0)
    assert "forcing minimum to 1" in response.warnings[0]
    assert response.data is not None
    assert response.data["min_decryption_version"] == 1


# --- rotation ---


async def test_rotation_is_one_commit(mount: Mount) -> None:
    answer = await mount.post("keys/k/rotate")
    assert (answer["latest_version"], list(answer["keys"])) == (2, ["1", "2"])
    assert len(mount.storage.commits) == 2
    mount.storage.fail_next = Unavailable("later")
    with pytest.raises(Unavailable):
        await mount(UPDATE, "keys/k/rotate")
    assert (await mount.read("keys/k"))["latest_version"] == 2


async def test_rotations_at_once_all_count(mount: Mount) -> None:
    await asyncio.gather(*(mount(UPDATE, "keys/k/rotate") for _ in range(10)))
    assert (await mount.read("keys/k"))["latest_version"] == 11


async def test_automatic_rotation_happens_at_the_next_use(mount: Mount) -> None:
    await mount.post("keys/k/config", auto_rotate_period=3600)
    mount.clock.now_s += 3599
    assert (await mount.encrypt("k", b"x")).startswith("vault:v1:")
    mount.clock.now_s += 1
    made = await asyncio.gather(*(mount.encrypt("k", b"x") for _ in range(5)))
    assert {text[:9] for text in made} == {"vault:v2:"}
    mount.clock.now_s += 3600
    assert (await mount.read("keys/k"))["latest_version"] == 3


# --- trimming and deleting ---


async def test_trim_removes_for_ever(mount: Mount) -> None:
    old = await mount.encrypt("k", b"x")
    for _ in range(70):
        await mount.post("keys/k/rotate")
    await mount.post("keys/k/config", min_decryption_version=70, min_encryption_version=70)
    answer = await mount.post("keys/k/trim", min_available_version=70)
    assert (answer["min_available_version"], list(answer["keys"])) == (70, ["70", "71"])
    assert all(len(commit) <= 61 for commit in mount.storage.commits)
    assert len([path for path in mount.storage.entries if path.startswith("version/")]) == 2
    assert "too old" in await mount.refused("decrypt/k", ciphertext=old)
    assert "min available" in await mount.refused("keys/k/config", min_decryption_version=1)
    assert await mount.decrypt("k", await mount.encrypt("k", b"x")) == b"x"


@pytest.mark.parametrize(
    ("config", "minimum", "text"),
    [
        ({}, 2, "minimum encryption version is not set"),
        ({"min_encryption_version": 2}, 2, "minimum decryption version"),
        ({"min_encryption_version": 2, "min_decryption_version": 2}, 3, "minimum encryption version"),
        ({"min_encryption_version": 2, "min_decryption_version": 2}, 4, "latest key version"),
        ({"min_encryption_version": 2, "min_decryption_version": 2}, 0, "decremented"),
        ({}, -1, "decremented"),
    ],
)
async def test_bad_trims(mount: Mount, config: dict[str, Any], minimum: int, text: str) -> None:
    for _ in range(2):
        await mount.post("keys/k/rotate")
    await mount.post("keys/k/config", **config)
    entries = dict(mount.storage.entries)
    assert text in await mount.refused("keys/k/trim", min_available_version=minimum)
    assert mount.storage.entries == entries
    assert "missing min_available_version" in await mount.refused("keys/k/trim")


async def test_delete_must_be_allowed_and_leaves_nothing(mount: Mount) -> None:
    for _ in range(70):
        await mount.post("keys/k/rotate")
    with pytest.raises(InvalidRequest, match="not allowed"):
        await mount(DELETE, "keys/k")
    await mount.post("keys/k/config", deletion_allowed=True)
    assert await mount(DELETE, "keys/k") is None
    assert mount.storage.entries == {}
    assert all(len(commit) <= 61 for commit in mount.storage.commits)


async def test_a_delete_that_was_cut_short_is_finished_by_the_next(mount: Mount) -> None:
    await mount.post("keys/other")
    for name in ("k", "other"):
        await mount.post(f"keys/{name}/config", deletion_allowed=True)
    commit = mount.storage.commit
    left = 1

    async def cut_short(writes: Any) -> None:
        nonlocal left
        if not left:
            raise Unavailable("gone")
        left -= 1
        await commit(writes)

    mount.storage.commit = cut_short  # type: ignore[method-assign]  # a store that goes away
    with pytest.raises(Unavailable):
        await mount(DELETE, "keys/k")
    mount.storage.commit = commit  # type: ignore[method-assign]  # stands in for one call
    assert await mount.refused("encrypt/k", plaintext="") == keys.NOT_FOUND
    assert any(path.startswith("version/") for path in mount.storage.entries)
    await mount(DELETE, "keys/other")
    assert mount.storage.entries == {}


# --- settings, memory, secondaries ---


async def test_cache_settings(mount: Mount) -> None:
    assert await mount.read("cache-config") == {"size": 0}
    assert await mount.post("cache-config", size=10) == {"size": 10}
    assert await mount.read("cache-config") == {"size": 10}
    for size in (-1, 9):
        assert "greater or equal to 10" in await mount.refused("cache-config", size=size)
    for number in range(30):
        await mount.post(f"keys/n{number}")
    assert len(mount.engine._store._cached) == 10
    assert await mount.encrypt("k", b"x")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("keys/new", {}),
        ("keys/k", {}),
        ("keys/k/config", {}),
        ("keys/k/rotate", {}),
        ("keys/k/trim", {"min_available_version": 1}),
        ("keys/k/import", {}),
        ("keys/k/import_version", {}),
        ("keys/k/set-certificate", {}),
        ("restore", {"backup": "x"}),
        ("config/keys", {}),
        ("cache-config", {}),
    ],
)
async def test_whatever_writes_goes_to_the_primary(mount: Mount, path: str, body: dict[str, Any]) -> None:
    mount.storage.read_only = True
    for operation in (CREATE, UPDATE):
        with pytest.raises(ReadOnlyStorage):
            await mount(operation, path, body)
    with pytest.raises(ReadOnlyStorage):
        await mount(DELETE, "keys/k")


async def test_secrets_are_in_no_repr(mount: Mount) -> None:
    ciphertext = await mount.encrypt("k", b"x")
    key = await mount.engine._store.get("k")
    material = key.versions[1]
    for thing in (key, material, material.record, key.ring):
        assert repr(material.record.secret) not in repr(thing)
        assert b64(material.record.secret) not in repr(thing)
    assert ciphertext


async def test_a_version_that_vanished_is_an_error_of_its_own(mount: Mount) -> None:
    for path in [path for path in mount.storage.entries if path.startswith("version/")]:
        del mount.storage.entries[path]
    with pytest.raises(PluginError) as caught:
        await mount.encrypt("k", b"x")
    assert caught.value.status == 400
