"""Every parser of what strangers send, with inputs put together from the words it knows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugin_api.errors import InvalidRequest
from sidecar.core.policies import Policy
from tests.support.fuzz_targets import TARGETS, WORDS


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_ends_in_a_value_or_its_error(name: str) -> None:
    pieces = st.one_of(st.sampled_from(WORDS[name]), st.sampled_from(WORDS[name]), st.binary(max_size=6))

    @settings(max_examples=250, deadline=None)
    @given(st.lists(pieces, max_size=16).map(b"".join))
    def check(raw: bytes) -> None:
        TARGETS[name](raw)

    check()


def test_control_another_error_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, text: str) -> Policy:
        if "+" in text:
            raise IndexError
        raise InvalidRequest("no policy")

    monkeypatch.setattr(Policy, "parse", broken)
    with pytest.raises(IndexError):
        test_any_input_ends_in_a_value_or_its_error("policy")
