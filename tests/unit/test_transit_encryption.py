"""Transit: encrypt, decrypt, rewrap and data keys, against the published API."""

import asyncio
import threading
from typing import Any

import pytest

from plugin_api.errors import InvalidRequest, PluginError, ReadOnlyStorage, UnsupportedPath
from plugin_api.testing import make_request
from sidecar.engines.transit import run, work
from sidecar.engines.transit.keys import NOT_FOUND
from tests.support.transit_mount import CREATE, DELETE, UPDATE, Mount, b64, un64

AEAD_TYPES = ["aes128-gcm96", "aes256-gcm96", "chacha20-poly1305"]


@pytest.fixture
async def mount() -> Mount:
    mount = Mount()
    await mount.post("keys/k")
    return mount


@pytest.mark.parametrize("kind", [*AEAD_TYPES, "rsa-2048", "rsa-3072"])
async def test_every_encrypting_type(kind: str) -> None:
    mount = Mount()
    await mount.post("keys/k", type=kind)
    for plaintext in (b"", b"x", bytes(range(190))):
        ciphertext = await mount.encrypt("k", plaintext)
        assert ciphertext.startswith("vault:v1:")
        assert await mount.decrypt("k", ciphertext) == plaintext
        assert await mount.encrypt("k", plaintext) != ciphertext


async def test_the_answer_names_the_version(mount: Mount) -> None:
    answer = await mount.post("encrypt/k", plaintext=b64("x"))
    assert sorted(answer) == ["ciphertext", "key_version"]
    assert answer["key_version"] == 1
    assert len(un64(answer["ciphertext"].removeprefix("vault:v1:"))) == 12 + 1 + 16


async def test_associated_data_must_be_the_same(mount: Mount) -> None:
    ciphertext = await mount.encrypt("k", b"x", associated_data=b64("who"))
    assert await mount.decrypt("k", ciphertext, associated_data=b64("who")) == b"x"
    for other in ({}, {"associated_data": b64("other")}):
        assert "authentication failed" in await mount.refused("decrypt/k", ciphertext=ciphertext, **other)
    await mount.post("keys/r", type="rsa-2048")
    assert "associated_data" in await mount.refused("encrypt/r", plaintext="", associated_data=b64("who"))


async def test_rsa_paddings() -> None:
    mount = Mount()
    await mount.post("keys/r", type="rsa-2048")
    ciphertext = await mount.encrypt("r", b"x", padding_scheme="pkcs1v15")
    assert await mount.decrypt("r", ciphertext, padding_scheme="pkcs1v15") == b"x"
    assert "failed to RSA decrypt" in await mount.refused("decrypt/r", ciphertext=ciphertext)
    assert "padding" in await mount.refused("encrypt/r", plaintext="", padding_scheme="none")
    assert "too long" in await mount.refused("encrypt/r", plaintext=b64(bytes(191)))
    again = (await mount.post("rewrap/r", ciphertext=ciphertext, decrypt_padding_scheme="pkcs1v15"))["ciphertext"]
    assert await mount.decrypt("r", again) == b"x"


@pytest.mark.parametrize(
    "ciphertext",
    [
        "",
        "x",
        "vault:",
        "vault:v",
        "vault:v1",
        "vault:v0:AAAA",
        "vault:v-1:AAAA",
        "vault:v2:AAAA",
        "vault:v01:AAAA",
        "vault:vx:AAAA",
        "vault:v99999999999999999999:AAAA",
        "vault:v4294967297:AAAA",
        "vault:v1:",
        "vault:v1:%%%",
        "vault:v1:AAA",
        "vault:v1:AAAA",
        "vault:v1:" + b64(bytes(27)),
        "vault:v1:" + b64(bytes(28)),
        "vault:v1:é",
        "vault:v1:\ud800",
        "vault:v\u0661:AAAA",
    ],
)
@pytest.mark.parametrize("kind", ["aes256-gcm96", "rsa-2048"])
async def test_malformed_ciphertexts_are_the_clients_fault(ciphertext: str, kind: str) -> None:
    mount = Mount(CIPHERTEXT_MOUNT.storage)
    if not await mount.engine.exists(make_request(UPDATE, f"keys/{kind}")):
        await mount.post(f"keys/{kind}", type=kind)
    for path in ("decrypt", "rewrap"):
        assert await mount.refused(f"{path}/{kind}", ciphertext=ciphertext)
        batch = await mount.answer(f"{path}/{kind}", batch_input=[{"ciphertext": ciphertext}])
        assert batch.status == (400 if path == "decrypt" else 200)
        assert batch.data is not None
        assert "error" in batch.data["batch_results"][0]


CIPHERTEXT_MOUNT = Mount()


async def test_a_changed_ciphertext_is_refused(mount: Mount) -> None:
    ciphertext = await mount.encrypt("k", b"secret")
    raw = un64(ciphertext.removeprefix("vault:v1:"))
    for place in range(len(raw)):
        changed = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        assert "authentication failed" in await mount.refused("decrypt/k", ciphertext="vault:v1:" + b64(changed))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "missing plaintext to encrypt"),
        ({"plaintext": None}, "missing plaintext to encrypt"),
        ({"plaintext": "%"}, "failed to base64-decode plaintext"),
        ({"plaintext": "AA=A"}, "failed to base64-decode plaintext"),
        ({"plaintext": {}}, "expected type"),
        ({"plaintext": []}, "expected type"),
        ({"plaintext": "", "key_version": 2}, "higher than the latest"),
        ({"plaintext": "", "key_version": -1}, "negative"),
        ({"plaintext": "", "key_version": "x"}, "key_version"),
        ({"plaintext": "", "nonce": b64(bytes(12))}, "nonce not allowed"),
        ({"plaintext": "", "associated_data": "%"}, "associated_data"),
        ({"batch_input": []}, "missing batch input"),
        ({"batch_input": "x"}, "failed to parse batch input"),
        ({"batch_input": {}}, "failed to parse batch input"),
        ({"batch_input": [1]}, "failed to parse batch input"),
        ({"batch_input": [None]}, "failed to parse batch input"),
        ({"batch_input": [{"plaintext": 1}]}, "expected type"),
        ({"batch_input": [{"plaintext": "", "key_version": []}]}, "key_version"),
        ({"batch_input": [{"plaintext": "", "reference": 1}]}, "reference"),
        ({"plaintext": "", "partial_failure_response_code": 99}, "not an HTTP status"),
        ({"plaintext": "", "partial_failure_response_code": 204}, "not an HTTP status"),
    ],
)
async def test_bad_requests(mount: Mount, body: dict[str, Any], text: str) -> None:
    assert text in await mount.refused("encrypt/k", **body)


async def test_line_breaks_and_sloppy_last_bits_are_base64(mount: Mount) -> None:
    for text, plaintext in (("aGVs\nbG8=\r\n", b"hello"), ("adba32==", bytes.fromhex("69d6dadf"))):
        answer = await mount.post("encrypt/k", plaintext=text)
        assert await mount.decrypt("k", answer["ciphertext"]) == plaintext


# --- batches ---


async def test_a_batch_keeps_order_and_references(mount: Mount) -> None:
    items = [{"plaintext": b64(str(i)), "reference": f"r{i}"} for i in range(250)]
    made = (await mount.post("encrypt/k", batch_input=items, plaintext="ignored"))["batch_results"]
    assert [item["reference"] for item in made] == [f"r{i}" for i in range(250)]
    back = [{"ciphertext": item["ciphertext"]} for item in made]
    opened = (await mount.post("decrypt/k", batch_input=back))["batch_results"]
    assert [un64(item["plaintext"]) for item in opened] == [str(i).encode() for i in range(250)]
    assert all("reference" not in item for item in opened)


async def test_a_batch_that_fails_in_part(mount: Mount) -> None:
    items: list[dict[str, str]] = [{"plaintext": b64("a")}, {"plaintext": "%"}, {}]
    for body, status in (({}, 400), ({"partial_failure_response_code": 202}, 202)):
        response = await mount.answer("encrypt/k", batch_input=items, **body)
        assert response.status == status
        assert response.data is not None
        good, bad, missing = response.data["batch_results"]
        assert "ciphertext" in good
        assert bad == {"error": "failed to base64-decode plaintext"}
        assert missing == {"error": "missing plaintext to encrypt"}
    response = await mount.answer("encrypt/k", batch_input=items[1:], partial_failure_response_code=200)
    assert response.status == 400


# --- upsert ---


async def test_encrypting_makes_a_key_only_with_create() -> None:
    mount = Mount()
    assert await mount.engine.exists(make_request(UPDATE, "encrypt/new")) is False
    with pytest.raises(InvalidRequest, match=NOT_FOUND):
        await mount(UPDATE, "encrypt/new", {"plaintext": ""})
    response = await mount(CREATE, "encrypt/new", {"plaintext": b64("x"), "type": "chacha20-poly1305"})
    assert response is not None
    assert response.data is not None
    assert await mount.decrypt("new", response.data["ciphertext"]) == b"x"
    described = await mount.read("keys/new")
    assert (described["type"], described["derived"]) == ("chacha20-poly1305", False)
    assert await mount.engine.exists(make_request(UPDATE, "encrypt/new")) is True


async def test_a_context_makes_a_derived_key() -> None:
    mount = Mount()
    await mount(CREATE, "encrypt/d", {"plaintext": "", "context": b64("c"), "convergent_encryption": True})
    described = await mount.read("keys/d")
    assert (described["derived"], described["convergent_encryption"]) == (True, True)
    batch = [{"plaintext": "", "context": b64("c")}, {"plaintext": ""}]
    with pytest.raises(InvalidRequest, match="either in all the request blocks or in none"):
        await mount(CREATE, "encrypt/e", {"batch_input": batch})
    with pytest.raises(InvalidRequest, match="not supported"):
        await mount(CREATE, "encrypt/s", {"plaintext": "", "type": "ecdsa-p256"})
    assert await mount.engine.exists(make_request(UPDATE, "keys/s")) is False


async def test_upsert_can_be_forbidden() -> None:
    mount = Mount()
    assert await mount.read("config/keys") == {"disable_upsert": False}
    assert await mount.post("config/keys", disable_upsert=True) == {"disable_upsert": True}
    with pytest.raises(InvalidRequest, match=NOT_FOUND):
        await mount(CREATE, "encrypt/new", {"plaintext": ""})


# --- derived and convergent keys ---


@pytest.mark.parametrize("kind", AEAD_TYPES)
async def test_derived_keys_need_their_context(kind: str) -> None:
    mount = Mount()
    await mount.post("keys/d", type=kind, derived=True)
    ciphertext = await mount.encrypt("d", b"x", context=b64("c"))
    assert await mount.decrypt("d", ciphertext, context=b64("c")) == b"x"
    assert "authentication failed" in await mount.refused("decrypt/d", ciphertext=ciphertext, context=b64("other"))
    for body in ({}, {"context": ""}):
        assert await mount.refused("decrypt/d", ciphertext=ciphertext, **body) == run.NO_CONTEXT
    assert "base64-decode context" in await mount.refused("decrypt/d", ciphertext=ciphertext, context="%")
    assert await mount.encrypt("d", b"x", context=b64("c")) != ciphertext


@pytest.mark.parametrize("kind", AEAD_TYPES)
async def test_convergent_keys_give_the_same_for_the_same(kind: str) -> None:
    mount = Mount()
    await mount.post("keys/c", type=kind, derived=True, convergent_encryption=True)
    first = await mount.encrypt("c", b"x", context=b64("1"))
    assert await mount.encrypt("c", b"x", context=b64("1")) == first
    others = [
        await mount.encrypt("c", b"y", context=b64("1")),
        await mount.encrypt("c", b"x", context=b64("2")),
        await mount.encrypt("c", b"x", context=b64("1"), associated_data=b64("a")),
    ]
    nonces = {un64(text.removeprefix("vault:v1:"))[:12] for text in (first, *others)}
    assert len(nonces) == 4
    assert await mount.decrypt("c", first, context=b64("1")) == b"x"


# --- versions ---


async def test_old_versions_decrypt_until_the_minimum_rises(mount: Mount) -> None:
    first = await mount.encrypt("k", b"x")
    await mount.post("keys/k/rotate")
    assert (await mount.encrypt("k", b"x")).startswith("vault:v2:")
    assert (await mount.encrypt("k", b"x", key_version=1)).startswith("vault:v1:")
    assert await mount.decrypt("k", first) == b"x"
    await mount.post("keys/k/config", min_decryption_version=2)
    assert "too old" in await mount.refused("decrypt/k", ciphertext=first)
    assert "too old" in await mount.refused("rewrap/k", ciphertext=first)
    assert "minimum" in await mount.refused("encrypt/k", plaintext="", key_version=1)
    await mount.post("keys/k/config", min_decryption_version=1)
    assert await mount.decrypt("k", first) == b"x"


async def test_rewrap_goes_to_the_newest_or_the_asked_for(mount: Mount) -> None:
    first = await mount.encrypt("k", b"x")
    for _ in range(2):
        await mount.post("keys/k/rotate")
    answer = await mount.post("rewrap/k", ciphertext=first)
    assert answer["key_version"] == 3
    assert "plaintext" not in answer
    assert await mount.decrypt("k", answer["ciphertext"]) == b"x"
    batch = [{"ciphertext": first, "key_version": 2}, {"ciphertext": first}, {"ciphertext": "x"}]
    two, three, bad = (await mount.post("rewrap/k", batch_input=batch))["batch_results"]
    assert (two["key_version"], three["key_version"]) == (2, 3)
    assert "error" in bad


async def test_deleted_and_unsuitable_keys(mount: Mount) -> None:
    ciphertext = await mount.encrypt("k", b"x")
    await mount.post("keys/k/config", deletion_allowed=True)
    await mount(DELETE, "keys/k")
    assert await mount.refused("decrypt/k", ciphertext=ciphertext) == NOT_FOUND
    await mount.post("keys/k")
    assert "authentication failed" in await mount.refused("decrypt/k", ciphertext=ciphertext)
    for kind in ("ed25519", "ecdsa-p256", "hmac"):
        await mount.post(f"keys/{kind}", type=kind)
        assert "not supported" in await mount.refused(f"encrypt/{kind}", plaintext="")
        assert "not supported" in await mount.refused(f"decrypt/{kind}", ciphertext=ciphertext)
        assert "not supported" in await mount.refused(f"datakey/plaintext/{kind}")


# --- data keys ---


@pytest.mark.parametrize("bits", [128, 256, 512])
async def test_data_keys(mount: Mount, bits: int) -> None:
    answer = await mount.post("datakey/plaintext/k", bits=bits)
    assert len(un64(answer["plaintext"])) == bits // 8
    assert await mount.decrypt("k", answer["ciphertext"]) == un64(answer["plaintext"])
    assert sorted(await mount.post("datakey/wrapped/k", bits=bits)) == ["ciphertext", "key_version"]


async def test_bad_data_keys(mount: Mount) -> None:
    assert "must be 'plaintext' or 'wrapped'" in await mount.refused("datakey/other/k")
    assert "bit length" in await mount.refused("datakey/plaintext/k", bits=192)
    assert await mount.refused("datakey/plaintext/none") == NOT_FOUND
    with pytest.raises(UnsupportedPath):
        await mount(UPDATE, "datakey/plaintext/", {})


# --- where it runs ---


async def test_secondaries_use_keys_and_make_none(mount: Mount) -> None:
    ciphertext = await mount.encrypt("k", b"x")
    await mount.post("keys/k/config", auto_rotate_period="1h")
    secondary = Mount(mount.storage, mount.clock)
    mount.storage.read_only = True
    mount.clock.now_s += 7200
    assert await secondary.decrypt("k", ciphertext) == b"x"
    assert (await secondary.encrypt("k", b"x")).startswith("vault:v1:")
    await secondary.post("rewrap/k", ciphertext=ciphertext)
    await secondary.post("datakey/wrapped/k")
    commits = len(mount.storage.commits)
    with pytest.raises(ReadOnlyStorage):
        await secondary(CREATE, "encrypt/new", {"plaintext": ""})
    assert len(mount.storage.commits) == commits


async def test_what_replication_changed_is_read_again(mount: Mount) -> None:
    secondary = Mount(mount.storage, mount.clock)
    ciphertext = await secondary.encrypt("k", b"x")
    await mount.post("keys/k/rotate")
    assert (await secondary.encrypt("k", b"x")).startswith("vault:v1:")
    await secondary.engine.invalidate("key/k")
    assert (await secondary.encrypt("k", b"x")).startswith("vault:v2:")
    await mount.post("keys/k/config", deletion_allowed=True)
    await mount(DELETE, "keys/k")
    await secondary.engine.invalidate("key/k")
    assert await secondary.refused("decrypt/k", ciphertext=ciphertext) == NOT_FOUND


async def test_an_invalidation_beats_a_read_that_began_before_it(mount: Mount) -> None:
    secondary = Mount(mount.storage, mount.clock)
    reading, go_on = asyncio.Event(), asyncio.Event()
    get = mount.storage.get

    async def slow(path: str) -> bytes | None:
        raw = await get(path)
        reading.set()
        await go_on.wait()
        return raw

    mount.storage.get = slow  # type: ignore[method-assign]  # a store that answers late
    task = asyncio.create_task(secondary.encrypt("k", b"x"))
    await reading.wait()
    mount.storage.get = get  # type: ignore[method-assign]  # stands in for one call
    await mount.post("keys/k/rotate")
    await secondary.engine.invalidate("key/k")
    go_on.set()
    await task
    assert (await secondary.encrypt("k", b"x")).startswith("vault:v2:")


async def test_slow_and_large_work_leaves_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    mount = Mount()
    threads: list[bool] = []
    each = work._each

    def noted(function: Any, items: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return each(function, items)

    monkeypatch.setattr(work, "_each", noted)
    await mount.post("keys/k")
    await mount.post("keys/r", type="rsa-2048")
    await mount.encrypt("k", b"small")
    await mount.encrypt("k", bytes(100_000))
    ciphertext = await mount.encrypt("r", b"small")
    await mount.decrypt("r", ciphertext)
    assert threads == [True, False, False, False]


async def test_a_large_plaintext_goes_both_ways(mount: Mount) -> None:
    plaintext = bytes(range(256)) * 16_384
    assert await mount.decrypt("k", await mount.encrypt("k", plaintext)) == plaintext
    text = b64(plaintext)
    assert "base64-decode" in await mount.refused("encrypt/k", plaintext=text[:1000] + "==" + text[1002:])


async def test_damaged_storage_quotes_nothing(mount: Mount) -> None:
    for path in [path for path in mount.storage.entries if path.startswith(("key/", "version/"))]:
        raw, mount.storage.entries[path] = mount.storage.entries[path], b"secret rubbish"
        await mount.engine.invalidate("key/k")
        with pytest.raises(PluginError) as caught:
            await mount(UPDATE, "encrypt/k", {"plaintext": ""})
        assert caught.value.status == 500
        assert "rubbish" not in str(caught.value)
        mount.storage.entries[path] = raw
