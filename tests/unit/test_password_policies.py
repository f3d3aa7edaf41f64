"""Password policies: what is accepted, what is generated, and who can ask."""

from __future__ import annotations

import base64
import contextlib
import os
from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugin_api.engine import Engine, EngineContext
from plugin_api.errors import InvalidRequest, NotFound, ReadOnlyStorage
from plugin_api.request import Request, Response
from sidecar.core.password_policies import PasswordPolicies, PasswordPolicy
from tests.support.logical_store import make_sealed
from tests.support.service_node import primary_and_secondary, replicate, running

POLICY = """
length = 20
rule "charset" { charset = "abcdefghij" min-chars = 2 }
rule "charset" { charset = "ABC" min-chars = 3 }
rule "charset" { charset = "0123456789äöü" min_chars = 1 }
"""


def test_every_rule_holds() -> None:
    policy = PasswordPolicy.parse(POLICY)
    for _ in range(200):
        password = policy.generate(os.urandom)
        assert len(password) == 20
        assert set(password) <= set("abcdefghijABC0123456789äöü")
        assert sum(char in "abcdefghij" for char in password) >= 2
        assert sum(char in "ABC" for char in password) >= 3
        assert any(char in "0123456789äöü" for char in password)


@pytest.mark.parametrize("size", [3, 10, 26, 97, 300])
def test_no_character_is_likelier_than_another(size: int) -> None:
    alphabet = "".join(chr(0x4E00 + number) for number in range(size))
    policy = PasswordPolicy.parse(f'length = 100\nrule "charset" {{ charset = "{alphabet}" }}')
    seen = Counter(char for _ in range(60) for char in policy.generate(os.urandom))
    expected = 6000 / size
    # Six standard deviations: a test that fails once in a million runs, and for each kind of bias that was tried.
    assert all(abs(seen[char] - expected) < 6 * expected**0.5 + 1 for char in alphabet)


def test_a_charset_that_is_named_twice_counts_once() -> None:
    policy = PasswordPolicy.parse('length = 8\nrule "charset" { charset = "aab" }\nrule "charset" { charset = "bc" }')
    assert policy.alphabet == "abc"


def test_json_says_the_same() -> None:
    json = '{"length": 8, "rule": {"charset": {"charset": "abc", "min-chars": 1}}}'
    assert PasswordPolicy.parse(json) == PasswordPolicy.parse(
        'length = 8 rule "charset" { charset = "abc" min-chars = 1 }'
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "length = 20",
        'length = 3 rule "charset" { charset = "abc" }',
        'length = 101 rule "charset" { charset = "abc" }',
        'length = "20" rule "charset" { charset = "abc" }',
        'length = true rule "charset" { charset = "abc" }',
        'rule "charset" { charset = "abc" }',
        'length = 20 rule "other" { charset = "abc" }',
        'length = 20 rule "charset" { }',
        'length = 20 rule "charset" { charset = "" }',
        'length = 20 rule "charset" { charset = "a\\tb" }',
        'length = 20 rule "charset" { charset = 5 }',
        'length = 20 rule "charset" { charset = "abc" min-chars = -1 }',
        'length = 20 rule "charset" { charset = "abc" min-chars = "1" }',
        'length = 20 rule "charset" { charset = "abc" typo = 1 }',
        'length = 20 min = 1 rule "charset" { charset = "abc" }',
        'length = 20 rule "charset" { charset = "a" min-chars = 15 } rule "charset" { charset = "b" min-chars = 15 }',
        "not a policy {",
    ],
)
def test_texts_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="invalid password policy"):
        PasswordPolicy.parse(text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text('length=20rule"charset"{}min-chars abc\n', max_size=80))
def test_any_text_is_a_policy_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidRequest):
        PasswordPolicy.parse(text)


async def test_a_policy_that_is_all_but_impossible_is_not_stored() -> None:
    store, sealed = make_sealed()
    policies = PasswordPolicies(sealed, lambda: True, os.urandom)
    wide = "".join(chr(0x4E00 + number) for number in range(2000))
    with pytest.raises(InvalidRequest, match="hardly any"):
        await policies.put(
            "x", f'length = 4 rule "charset" {{ charset = "{wide}" }} rule "charset" {{ charset = "a" min-chars = 4 }}'
        )
    with pytest.raises(ReadOnlyStorage):
        await PasswordPolicies(sealed, lambda: False, os.urandom).put("x", POLICY)
    assert store.data == {}


async def test_over_http() -> None:
    async with primary_and_secondary() as (primary, secondary):
        path = "sys/policies/password/Mine"
        assert (await primary.call("LIST", "sys/policies/password")).status == 404
        encoded = base64.b64encode(POLICY.encode()).decode()
        assert (await secondary.call("PUT", path, {"policy": encoded})).status == 204
        await replicate(primary, secondary)
        assert (await secondary.call("GET", path)).data == {"policy": POLICY}
        assert (await secondary.call("LIST", "sys/policies/password")).data["keys"] == ["mine"]
        password = (await secondary.call("GET", f"{path}/generate")).data["password"]
        assert PasswordPolicy.parse(POLICY).rules[1].holds(password)
        assert (await primary.call("PUT", path, {"policy": ""})).errors == ["missing policy"]
        assert (await primary.call("GET", "sys/policies/password/nosuch/generate")).status == 404
        assert (await primary.call("DELETE", path)).status == 204
        assert (await primary.call("GET", path)).status == 404


class Generating(Engine):
    """Answers every read with a password."""

    type_name: ClassVar[str] = "kv"
    contexts: ClassVar[list[EngineContext]] = []

    def __init__(self, context: EngineContext) -> None:
        super().__init__(context)
        self.contexts.append(context)

    async def handle(self, request: Request) -> Response:
        return Response(data={"password": await self.context.generate_password(request.path)})


async def test_engines_generate_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.engines.kv.KV", Generating)
    async with running() as node:
        await node.call("PUT", "sys/policies/password/p", {"policy": POLICY})
        for path, local in (("shared", False), ("local", True)):
            assert (await node.call("POST", f"sys/mounts/{path}", {"type": "kv", "local": local})).status == 204
            assert len((await node.call("GET", f"{path}/p")).data["password"]) == 20
            assert (await node.call("GET", f"{path}/nosuch")).status == 404
        with pytest.raises(NotFound):
            await Generating.contexts[0].generate_password("nosuch")
