"""Request targets are decoded once and refused rather than cleaned (reliability 6 A 5)."""

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.api.paths import QUERY_FIELDS_MAX, PathRefused, decode_path, decode_query, split_target


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ("/v1/secret/a", "v1/secret/a"),
        ("/v1/secret/", "v1/secret/"),
        ("/v1/a%20b", "v1/a b"),
        ("/v1/%C3%A9", "v1/é"),
        ("/v1/a+b", "v1/a+b"),
        ("/v1/a%25b", "v1/a%b"),
        ("/v1/a..b/...", "v1/a..b/..."),
        ("/v1/a@b:c,d;e=f&g", "v1/a@b:c,d;e=f&g"),
    ],
)
def test_paths_are_decoded_once(raw: str, path: str) -> None:
    assert decode_path(raw) == path


@pytest.mark.parametrize(
    "raw",
    [
        "/v1/../sys/x",
        "/v1/a/..",
        "/v1/./a",
        "/v1//a",
        "//v1/a",
        "/v1/a//",
        "/v1/%2e%2e/sys",
        "/v1/%2E./sys",
        "/v1/a%2fb",
        "/v1/a%2Fb",
        "/v1/a%5cb",
        "/v1/a\\b",
        "/v1/a%00",
        "/v1/a%0a",
        "/v1/a%7f",
        "/v1/%c0%ae%c0%ae/x",
        "/v1/%ff",
        "/v1/%ed%a0%80",
        "/v1/%e2%80%a8",
        "/v1/é",
        "/v1/a%",
        "/v1/a%2",
        "/v1/a%zz",
        "/v1/a#b",
        "v1/a",
        "/" + "a" * 5000,
    ],
)
def test_ambiguous_paths_are_refused(raw: str) -> None:
    with pytest.raises(PathRefused):
        decode_path(raw)


def test_only_origin_form_is_served() -> None:
    assert split_target("/v1/a?b=c?d") == ("/v1/a", "b=c?d")
    for target in ("http://evil/v1/a", "*", "evil:443", ""):
        with pytest.raises(PathRefused):
            split_target(target)


def test_every_value_of_a_query_is_kept() -> None:
    assert decode_query("a=1&b=&a=2&c=%C3%A9") == {"a": ["1", "2"], "b": [""], "c": ["é"]}
    for bad in ("a=%ff", "&".join(f"a{n}=1" for n in range(QUERY_FIELDS_MAX + 1))):
        with pytest.raises(PathRefused):
            decode_query(bad)


names = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="/\\"), min_size=1)


@given(st.lists(names, min_size=1, max_size=4))
def test_an_encoded_path_reads_back_or_is_refused(segments: list[str]) -> None:
    raw = "/" + "/".join(quote(segment, safe="") for segment in segments)
    if any(segment in (".", "..") for segment in segments):
        with pytest.raises(PathRefused):
            decode_path(raw)
    else:
        assert decode_path(raw) == "/".join(segments)


@given(st.text(st.characters(max_codepoint=255)))
def test_any_target_is_a_clean_path_or_refused(raw: str) -> None:
    try:
        path = decode_path("/" + raw)
    except PathRefused:
        return
    segments = path.split("/")
    assert not any(segment in (".", "..") for segment in segments)
    assert "" not in segments[:-1]
    assert all(character.isprintable() or character.isspace() for character in path)
