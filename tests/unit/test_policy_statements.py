"""Attacks on policies that must be refused (statements 6 to 9), each with the defence switched off once: a test that
still passes then would prove nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugin_api.request import Operation
from sidecar.core import policies as policies_module
from sidecar.core.mounts import MountTable
from sidecar.core.policies import ACL, Policy
from tests.support.service_node import Harness, running, with_kv


@pytest.fixture
async def node() -> AsyncIterator[Harness]:
    async with running() as harness:
        await with_kv(harness, "1")
        yield harness


# -- 6: one policy, one user, whatever the spelling

SPELLINGS = ("team", "TEAM", " Team ", "tEaM")


async def spelled_apart(node: Harness) -> int:
    """How many policies there are after writing one under every spelling."""
    for spelling in SPELLINGS:
        await node.call("PUT", f"sys/policies/acl/{spelling}", {"policy": 'path "x" { capabilities = ["read"] }'})
    return len((await node.call("LIST", "sys/policies/acl")).data["keys"]) - 2


async def test_6_spellings_of_a_policy_name_are_one_policy(node: Harness) -> None:
    assert await spelled_apart(node) == 1
    child = await node.token('path "auth/token/create" { capabilities = ["update"] }')
    for spelling in ("Root", "ROOT ", " root"):
        body = {"policy": 'path "*" { capabilities = ["sudo"] }'}
        refused = await node.call("PUT", f"sys/policies/acl/{spelling}", body)
        assert refused.errors == ['cannot update "root" policy']
        assert (await node.call("POST", "auth/token/create", {"policies": [spelling]}, token=child)).status == 400


async def test_6_control_without_one_spelling_there_are_several(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies_module, "normalize_name", lambda name: name)
    assert await spelled_apart(node) == len(SPELLINGS)


async def test_6_spellings_of_a_user_name_are_one_user(node: Harness) -> None:
    assert (await node.call("POST", "sys/auth/userpass", {"type": "userpass"})).status == 204
    await node.call("POST", "auth/userpass/users/Bob", {"password": "one"})
    await node.call("POST", "auth/userpass/users/bOB", {"password": "two"})
    assert (await node.call("LIST", "auth/userpass/users")).data["keys"] == ["bob"]
    for spelling in ("bob", "BOB"):
        old = await node.call("POST", f"auth/userpass/login/{spelling}", {"password": "one"}, token=None)
        new = await node.call("POST", f"auth/userpass/login/{spelling}", {"password": "two"}, token=None)
        assert (old.status, new.status) == (400, 200)


# -- 7: a deny on a wildcard covers listing its folder too

DENIED_FOLDER = """
path "secret/*" { capabilities = ["read", "list"] }
path "secret/team/*" { capabilities = ["deny"] }
"""


async def listings(node: Harness) -> list[int]:
    await node.call("PUT", "secret/team/key", {"x": "1"})
    token = await node.token(DENIED_FOLDER)
    asked = [("LIST", "secret/team"), ("LIST", "secret/team/"), ("GET", "secret/team?list=true")]
    return [(await node.call(method, path, token=token)).status for method, path in asked]


async def test_7_a_denied_folder_cannot_be_listed(node: Harness) -> None:
    assert await listings(node) == [403, 403, 403]


async def test_7_control_by_one_spelling_alone_it_could(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ACL, "_list_rule", lambda self, path: self._rule(path.rstrip("/")))
    assert await listings(node) == [200, 200, 200]


# -- 8: a template without an identity grants nothing, and cannot be filled by what a client chooses

TEMPLATED = 'path "secret/{{identity.entity.metadata.team}}/*" { capabilities = ["read"] }'
FILLED = ("secret/*/x", "secret/+/x", "secret/a/x", "secret//x", "secret/{{identity.entity.metadata.team}}/x")


def reached(acl: ACL) -> list[str]:
    return [path for path in FILLED if acl.check(path, Operation.READ).allowed]


async def test_8_a_template_that_cannot_be_filled_matches_nothing(node: Harness) -> None:
    assert reached(ACL([Policy.parse("p", TEMPLATED)])) == []
    token = await node.token(TEMPLATED)
    for path in ("secret/a/x", "secret/+/x"):
        assert (await node.call("GET", path, token=token)).status == 403
    denied = await node.call("PUT", "sys/policies/acl/d", {"policy": TEMPLATED.replace('"read"', '"deny"')})
    assert denied.status == 400


def test_8_control_taken_literally_it_would_match() -> None:
    rendered = TEMPLATED.replace("{{identity.entity.metadata.team}}", "+")
    assert reached(ACL([Policy.parse("p", rendered)])) != []


# -- 9: a policy grants nothing on what is made later under a similar name

NESTED = 'path "secret/team/" { capabilities = ["list"] }\npath "secret/team/a" { capabilities = ["read"] }'


async def mounted_later(node: Harness) -> list[int]:
    token = await node.token(NESTED)
    later = ("secret/team", "secret/team/a", "secret-team", "secre")
    statuses = [(await node.call("POST", f"sys/mounts/{path}", {"type": "kv"})).status for path in later]
    for path in ("secret-team/a", "secret/team/a/b", "secret/teama", "secret/TEAM/a"):
        assert (await node.call("GET", path, token=token)).status == 403
    return statuses


async def test_9_no_mount_can_come_to_lie_below_a_rule(node: Harness) -> None:
    assert await mounted_later(node) == [400, 400, 204, 204]


async def test_9_control_without_the_check_it_could(node: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MountTable, "_require_free", lambda self, table, path: None)
    assert await mounted_later(node) == [204, 204, 204, 204]


# -- parameters of several policies against a dumb model

NAMES = st.sampled_from(["a", "b", "*"])
VALUES = st.lists(st.sampled_from(["x", "y", "x*", "*y"]), max_size=2)
LISTED = st.dictionaries(NAMES, VALUES, max_size=2)
RULE = st.tuples(LISTED, LISTED, st.lists(st.sampled_from(["a", "b"]), max_size=1, unique=True))
SENT = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.sampled_from(["x", "y", "xy", "z"]), max_size=3)


def hcl(rule: tuple[Mapping[str, list[str]], Mapping[str, list[str]], list[str]]) -> str:
    def listed(values: list[str]) -> str:
        return "[" + ", ".join(f'"{value}"' for value in values) + "]"

    def table(name: str, members: Mapping[str, list[str]]) -> str:
        return f"{name} = {{" + ", ".join(f'"{key}" = {listed(values)}' for key, values in members.items()) + "}\n"

    allowed, denied, required = rule
    lines = [table("allowed_parameters", allowed)] if allowed else []
    lines += [table("denied_parameters", denied)] if denied else []
    lines += [f"required_parameters = {listed(required)}\n"] if required else []
    return 'path "p" {\ncapabilities = ["update"]\n' + "".join(lines) + "}"


def fits(value: str, patterns: list[str]) -> bool:
    """Without patterns anything fits."""
    plain = {"x": {"x"}, "y": {"y"}, "x*": {"x", "xy"}, "*y": {"y", "xy"}}
    return not patterns or any(value in plain[pattern] for pattern in patterns)


def together(rules: list[Any], part: int) -> dict[str, list[str]]:
    """Lists of several policies under one name add up; one that is empty means any value."""
    merged: dict[str, list[str]] = {}
    for rule in rules:
        for name, values in rule[part].items():
            known = merged.get(name)
            merged[name] = values if known is None else [] if not known or not values else known + values
    return merged


def model_allows(rules: list[Any], sent: dict[str, str]) -> bool:
    allowed, denied = together(rules, 0), together(rules, 1)
    if any(name not in sent for rule in rules for name in rule[2]):
        return False
    for name, value in sent.items():
        if "*" in denied or (name in denied and fits(value, denied[name])):
            return False
        if allowed:
            patterns = allowed.get(name, allowed.get("*"))
            if patterns is None or not fits(value, patterns):
                return False
    return True


@settings(max_examples=400, deadline=None)
@given(st.lists(RULE, min_size=1, max_size=3), SENT)
def test_parameters_against_the_model(rules: list[Any], sent: dict[str, str]) -> None:
    acl = ACL([Policy.parse(f"p{number}", hcl(rule)) for number, rule in enumerate(rules)])
    assert acl.check("p", Operation.UPDATE, sent).allowed == model_allows(rules, sent)
    assert acl.check("p", Operation.PATCH, sent).allowed is False


# -- listing against a dumb model: both spellings of a folder, a deny on either, an exact rule before a pattern

FOLDER_RULES = st.lists(
    st.tuples(
        st.sampled_from(["s/a", "s/a/", "s/*", "s/a*", "s/a/*", "s/+", "s/+/", "+/a", "+/a/", "*"]),
        st.sampled_from(["list", "read", "deny"]),
    ),
    max_size=5,
    unique_by=lambda rule: rule[0],
)


@settings(max_examples=400, deadline=None)
@given(FOLDER_RULES)
def test_listing_against_the_model(rules: list[tuple[str, str]]) -> None:
    acl = ACL([Policy.parse("p", "".join(f'path "{path}" {{ capabilities = ["{word}"] }}\n' for path, word in rules))])
    exact = dict(rules)
    if "deny" in (_word(rules, "s/a"), _word(rules, "s/a/")):
        expected = False
    else:
        word = exact.get("s/a/") or exact.get("s/a") or _word(rules, "s/a/") or _word(rules, "s/a")
        expected = word == "list"
    for spelling in ("s/a", "s/a/"):
        assert acl.check(spelling, Operation.LIST).allowed == expected


def _word(rules: list[tuple[str, str]], path: str) -> str | None:
    """The capability of the rule that decides about exactly ``path``, by asking for each in turn."""
    acl = ACL([Policy.parse("p", "".join(f'path "{one}" {{ capabilities = ["{word}"] }}\n' for one, word in rules))])
    for word, operation in (("read", Operation.READ), ("list", Operation.UPDATE)):
        renamed = [(one, "update" if known == "list" else known) for one, known in rules]
        other = ACL(
            [Policy.parse("p", "".join(f'path "{one}" {{ capabilities = ["{known}"] }}\n' for one, known in renamed))]
        )
        if other.check(path, operation).allowed:
            return word
    return "deny" if acl.check(path, Operation.READ).reason.startswith("denied by") else None
