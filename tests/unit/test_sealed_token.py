"""Activation tokens that are encrypted to one secondary: what opens, and everything that does not."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consul_backend.errors import Corrupt
from plugin_api.errors import InvalidRequest
from sidecar.replication import sealed_token
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from sidecar.replication.sealed_token import ActivationKey, Opened

NOW_MS = 1_700_000_000_000
KEY = sealed_token.make_key("store", now_ms=NOW_MS)
BUNDLE: dict[str, Any] = {"id": "eu", "client_key": "very secret"}


def sealed(key: ActivationKey = KEY, mode: Mode = PERFORMANCE) -> str:
    recipient = sealed_token.public_key(key.public_text)
    return sealed_token.seal_bundle(
        mode, recipient, BUNDLE, "ab" * 32, not_before_ms=NOW_MS, expires_ms=NOW_MS + 60_000
    )


def opened(token: str, *, key: ActivationKey | None = KEY, mode: Mode = PERFORMANCE, now_ms: int = NOW_MS) -> Opened:
    return sealed_token.open_bundle(mode, token, key, now_ms=now_ms, leeway_ms=60_000)


def test_what_is_encrypted_to_a_key_opens_with_it_and_is_seen_nowhere() -> None:
    token = sealed()
    found = opened(token + "\n")
    assert (found.payload, found.ca_sha256) == (BUNDLE, "ab" * 32)
    assert "secret" not in repr(found)
    assert KEY.private.hex() not in repr(KEY)
    assert str(KEY.private) not in repr(KEY)
    raw = base64.urlsafe_b64decode(token.removeprefix(sealed_token.TOKEN_PREFIX) + "==")
    assert b"secret" not in raw


def test_no_two_tokens_are_encrypted_alike() -> None:
    assert sealed() != sealed()


def test_texts_are_safe_in_a_shell() -> None:
    for text in (KEY.public_text, sealed()):
        assert text.replace("-", "").replace("_", "").replace(".", "").isalnum()


@pytest.mark.parametrize(
    ("key", "mode", "now_ms", "text"),
    [
        pytest.param(sealed_token.make_key("s", now_ms=NOW_MS), PERFORMANCE, NOW_MS, "does not hold", id="another key"),
        pytest.param(None, PERFORMANCE, NOW_MS, "does not hold", id="no key"),
        pytest.param(KEY, DR, NOW_MS, "another mode", id="another mode"),
        pytest.param(KEY, PERFORMANCE, NOW_MS + 120_001, "expired", id="expired"),
        pytest.param(KEY, PERFORMANCE, NOW_MS - 60_001, "compare the clocks", id="not valid yet"),
        pytest.param(KEY, PERFORMANCE, NOW_MS + sealed_token.KEY_LIFE_MS + 1, "does not hold", id="the key expired"),
    ],
)
def test_what_is_refused(key: ActivationKey | None, mode: Mode, now_ms: int, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        opened(sealed(), key=key, mode=mode, now_ms=now_ms)


def test_a_minute_of_skew_is_forgiven() -> None:
    opened(sealed(), now_ms=NOW_MS + 119_000)
    opened(sealed(), now_ms=NOW_MS - 59_000)


def test_every_bit_counts() -> None:
    raw = bytearray(base64.urlsafe_b64decode(sealed().removeprefix(sealed_token.TOKEN_PREFIX) + "=="))
    for at in (0, 31, 32, len(raw) - 1):
        raw[at] ^= 1
        text = sealed_token.TOKEN_PREFIX + base64.urlsafe_b64encode(bytes(raw)).rstrip(b"=").decode()
        with pytest.raises(InvalidRequest):
            opened(text)
        raw[at] ^= 1
    opened(sealed_token.TOKEN_PREFIX + base64.urlsafe_b64encode(bytes(raw)).rstrip(b"=").decode())  # the control


@given(st.binary(max_size=200))
def test_junk_is_refused_and_nothing_else(junk: bytes) -> None:
    text = base64.urlsafe_b64encode(junk).rstrip(b"=").decode()
    with pytest.raises(InvalidRequest):
        opened(sealed_token.TOKEN_PREFIX + text)
    with pytest.raises(InvalidRequest):
        sealed_token.public_key(text)


BAD_KEYS = {
    "nothing": "",
    "no prefix": "AAAA",
    "prefix alone": "ork1.",
    "no base64": "ork1.!!",
    "short": KEY.public_text[:-4],
    "long": KEY.public_text + "AAAA",
}


@pytest.mark.parametrize("bad", BAD_KEYS.values(), ids=BAD_KEYS)
def test_public_keys_that_are_refused(bad: str) -> None:
    with pytest.raises(InvalidRequest, match="generate-public-key"):
        sealed_token.public_key(bad)


def test_a_point_that_gives_everybody_the_same_secret_is_no_key() -> None:
    with pytest.raises(InvalidRequest, match="not a usable key"):
        sealed_token.seal_bundle(PERFORMANCE, bytes(32), BUNDLE, "", not_before_ms=0, expires_ms=1)


def test_the_stored_half_survives_storage() -> None:
    assert sealed_token.decode_key(sealed_token.encode_key(KEY)) == KEY
    assert sealed_token.decode_key(None) is None
    with pytest.raises(Corrupt):
        sealed_token.decode_key(b"\xc1")
    assert sealed_token.key_entry(DR).startswith("c/")
