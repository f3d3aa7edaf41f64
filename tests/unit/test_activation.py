"""Activation tokens and bundles: what is accepted, and every way it can be wrong."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from plugin_api.errors import InvalidRequest
from sidecar.replication import activation
from sidecar.replication.activation import api_address, build_bundle, parse_bundle, parse_token
from sidecar.replication.history import Epoch
from sidecar.transport import certificates

KEY = ec.generate_private_key(ec.SECP521R1())
NOW_S = 1_700_000_000.0
CLAIMS: dict[str, Any] = {
    "jti": "hvs.wrapping",
    "iat": int(NOW_S),
    "nbf": int(NOW_S) - 5,
    "exp": int(NOW_S) + 1800,
    "accessor": "",
    "addr": "https://us:8200",
    "type": "wrapping",
    "ca_sha256": "ab" * 32,
}
AUTHORITY = certificates.make_authority("the set's authority")
PAYLOAD, EXTRA, FINGERPRINT = build_bundle(
    AUTHORITY, secondary_id="eu", set_id="set", epoch=Epoch(3, "epoch"), primary_cluster_addr="https://us:8201"
)


def token(claims: dict[str, Any] | None = None, headers: dict[str, Any] | None = None, algorithm: str = "ES512") -> str:
    key: Any = {"ES512": KEY, "HS256": "secret" * 8, "none": None}[algorithm]
    return jwt.encode(CLAIMS | (claims or {}), key, algorithm=algorithm, headers=headers)


def test_a_proper_token() -> None:
    parsed = parse_token(token() + "\n", now_s=NOW_S)
    assert parsed.wrapping_token == "hvs.wrapping"
    assert (parsed.api_addr, parsed.ca_sha256) == ("https://us:8200", "ab" * 32)
    assert "hvs.wrapping" not in repr(parsed)


BAD_TOKENS: dict[str, Callable[[], str]] = {
    "empty": lambda: "",
    "a plain wrapping token": lambda: "hvs.CAESIJ",
    "two parts": lambda: ".".join(token().split(".")[:2]),
    "four parts": lambda: token() + ".x",
    "truncated signature": lambda: token()[:-8],
    "truncated payload": lambda: "{}.{}.{}".format(
        *(part[: len(part) - 9 * (n == 1)] for n, part in enumerate(token().split(".")))
    ),
    "not base64": lambda: "!!!." + token().split(".", 1)[1],
    "alg none": lambda: token(algorithm="none") + "AAAA",
    "HS256": lambda: token(algorithm="HS256"),
    "crit": lambda: token(headers={"crit": ["b64"]}),
    "another typ": lambda: token(headers={"typ": "at+jwt"}),
    **{
        f"a header {name}": lambda name=name: token(headers={name: "https://evil/keys"})
        for name in ("jku", "jwk", "kid", "x5u", "x5c")
    },
    "type is a list": lambda: _raw(type=["wrapping"]),
    "type is more": lambda: token({"type": "wrapping2"}),
    "type is less": lambda: token({"type": "wrap"}),
    "no type": lambda: _raw(type=None),
    "two hours late": lambda: token({"exp": int(NOW_S) - 7200}),
    "two hours early": lambda: token({"nbf": int(NOW_S) + 7200}),
    "not a wrapping token": lambda: token({"type": "login"}),
    "no ca_sha256": lambda: token({"ca_sha256": None}),
    "short ca_sha256": lambda: token({"ca_sha256": "ab"}),
    "jti of a wrong type": lambda: _raw(jti=7),
    "exp of a wrong type": lambda: _raw(exp="soon"),
    "exp missing": lambda: _raw(exp=None),
    "exp true": lambda: _raw(exp=True),
    "addr of a wrong type": lambda: _raw(addr=["https://us:8200"]),
    "payload is a list": lambda: "{}.{}.{}".format(token().split(".")[0], _part([]), token().split(".")[2]),
    "expired": lambda: token({"exp": int(NOW_S) - 61}),
    "not valid yet": lambda: token({"nbf": int(NOW_S) + 61}),
    "huge": lambda: token({"jti": "x" * 20_000}),
}


def _part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def _raw(**claims: Any) -> str:
    header, _, signature = token().split(".")
    return f"{header}.{_part(CLAIMS | claims)}.{signature}"


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_tokens_that_are_refused(name: str) -> None:
    bad = BAD_TOKENS[name]()
    with pytest.raises(InvalidRequest) as refused:
        parse_token(bad, now_s=NOW_S)
    assert "hvs.wrapping" not in str(refused.value)


def test_a_minute_of_skew_is_forgiven() -> None:
    parse_token(token({"exp": int(NOW_S) - 59}), now_s=NOW_S)
    parse_token(token({"nbf": int(NOW_S) + 59}), now_s=NOW_S)


@given(st.text(max_size=200) | st.binary(max_size=150).map(lambda raw: f"{_part(raw.hex())}.{_part(raw.hex())}.AA"))
def test_junk_is_refused_and_nothing_else(junk: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_token(junk, now_s=NOW_S)


def test_a_bundle_arrives_as_it_was_built() -> None:
    payload = json.loads(json.dumps(PAYLOAD))
    bundle = parse_bundle(payload, EXTRA["ca_sha256"])
    assert (bundle.secondary_id, bundle.set_id, bundle.epoch) == ("eu", "set", Epoch(3, "epoch"))
    assert bundle.primary_cluster_addr == "https://us:8201"
    assert certificates.fingerprint(bundle.credentials.certificate_pem) == FINGERPRINT
    assert certificates.fingerprint(bundle.authority_pem) == EXTRA["ca_sha256"]
    assert certificates.belongs(
        bundle.credentials.certificate_pem, bundle.credentials.key_pem, AUTHORITY.certificate_pem
    )
    assert "PRIVATE" not in repr(bundle)


def test_a_bundle_of_another_authority_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="authority is not the one"):
        parse_bundle(PAYLOAD, "00" * 32)


def test_a_bundle_whose_parts_do_not_fit_is_refused() -> None:
    other, _, _ = build_bundle(AUTHORITY, secondary_id="eu", set_id="set", epoch=Epoch(3, "e"), primary_cluster_addr="")
    mixed = PAYLOAD | {"client_key": other["client_key"]}
    with pytest.raises(InvalidRequest, match="do not belong together"):
        parse_bundle(mixed, EXTRA["ca_sha256"])


@pytest.mark.parametrize("damage", [*PAYLOAD, "client_key.type", "client_key.d", "epoch.number"])
def test_damaged_bundles_are_refused(damage: str) -> None:
    broken = copy.deepcopy(PAYLOAD)
    name, _, inner = damage.partition(".")
    if inner:
        broken[name][inner] = "damage"
    else:
        del broken[name]
    with pytest.raises(InvalidRequest, match="malformed"):
        parse_bundle(broken, EXTRA["ca_sha256"])


@pytest.mark.parametrize("junk", [None, 7, [], "x", {}, {"client_key": 7}])
def test_what_is_no_bundle_at_all_is_refused(junk: Any) -> None:
    with pytest.raises(InvalidRequest, match="malformed"):
        parse_bundle(junk, EXTRA["ca_sha256"])


def test_api_addresses() -> None:
    assert api_address("https://us:8200/") == "https://us:8200"
    assert api_address(" http://[::1]:8200 ") == "http://[::1]:8200"
    for bad in ("", "us:8200", "ftp://us", "https://us:8200/v1", "https://a@us:8200", "https://"):
        with pytest.raises(InvalidRequest):
            api_address(bad)


def test_unreadable_authorities_are_a_plain_refusal(tmp_path: Any) -> None:
    with pytest.raises(InvalidRequest, match="ca_file"):
        activation.api_trust("https://us", str(tmp_path / "missing.pem"), "")
    (tmp_path / "junk.pem").write_text("junk")
    with pytest.raises(InvalidRequest, match="ca_file"):
        activation.api_trust("https://us", "", str(tmp_path))
    assert activation.api_trust("http://us", str(tmp_path / "missing.pem"), "") is None


def test_a_ca_path_is_a_folder_of_pem_files(tmp_path: Any) -> None:
    (tmp_path / "a.pem").write_bytes(AUTHORITY.certificate_pem)
    context = activation.api_trust("https://us", "", str(tmp_path))
    assert context is not None
    assert "the set's authority" in json.dumps(context.get_ca_certs())
