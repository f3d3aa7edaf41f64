"""Policies: parsing, precedence against a dumb model, parameters, and the store."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugin_api.errors import InvalidRequest, ReadOnlyStorage
from plugin_api.request import Operation
from sidecar.core import policies as policies_module
from sidecar.core.policies import ACL, DEFAULT_POLICY, Policy, PolicyStore, normalize_policies
from sidecar.core.policy_rules import path_order, pattern_matches
from tests.support.logical_store import make_sealed


def acl(*texts: str) -> ACL:
    return ACL(Policy.parse(f"p{number}", text) for number, text in enumerate(texts))


def rule(path: str, *capabilities: str) -> str:
    listed = ", ".join(f'"{capability}"' for capability in capabilities)
    return f'path "{path}" {{ capabilities = [{listed}] }}\n'


# -- the dumb model: every rule as a regular expression, priorities compared pair by pair as the manual words them


def model_regex(path: str) -> str:
    prefix, body = path.endswith("*"), path.removesuffix("*")
    parts = ["[^/]+" if segment == "+" else re.escape(segment) for segment in body.split("/")]
    return "/".join(parts) + (".*" if prefix else "")


def model_is_pattern(path: str) -> bool:
    return path.endswith("*") or "+" in path.split("/")


def first_wildcard(path: str) -> int:
    places = [place for place, char in enumerate(path) if char == "*"]
    places += [match.start() for match in re.finditer(r"(?:^|(?<=/))\+(?=/|$)", path)]
    return min(places)


def lower_priority(one: str, two: str) -> bool:
    """Whether ``one`` loses: its first wildcard is earlier; it ends in ``*`` and the other does not; it has more ``+``;
    it is shorter; it is the smaller text."""
    if first_wildcard(one) != first_wildcard(two):
        return first_wildcard(one) < first_wildcard(two)
    if one.endswith("*") != two.endswith("*"):
        return one.endswith("*")
    pluses = [path.split("/").count("+") for path in (one, two)]
    if pluses[0] != pluses[1]:
        return pluses[0] > pluses[1]
    if len(one) != len(two):
        return len(one) < len(two)
    return one < two


def model_capabilities(rules: list[tuple[str, frozenset[str]]], path: str) -> frozenset[str] | None:
    matching = {pattern for pattern, _ in rules if re.fullmatch(model_regex(pattern), path)}
    if not matching:
        return None
    if path in matching and not model_is_pattern(path):
        best = path
    else:
        compare = functools.cmp_to_key(lambda one, two: -1 if lower_priority(one, two) else 1)
        best = max(matching, key=compare)
    granted = frozenset().union(*(capabilities for pattern, capabilities in rules if pattern == best))
    return frozenset() if "deny" in granted else granted


SEGMENTS = st.sampled_from(["a", "b", "ab", "+"])
BODIES = st.lists(SEGMENTS, min_size=1, max_size=3).map("/".join)
PATTERNS = st.tuples(BODIES, st.sampled_from(["", "", "/", "*", "/*"])).map("".join).filter(lambda p: "+*" not in p)
GRANTS = st.frozensets(st.sampled_from(["read", "create", "update", "delete", "deny"]), max_size=3)
RULES = st.lists(st.tuples(PATTERNS, GRANTS), max_size=6)
PATHS = st.lists(st.sampled_from(["a", "b", "ab", "abb"]), min_size=1, max_size=4).map("/".join)


@settings(max_examples=400, deadline=None)
@given(RULES, st.integers(0, 6), PATHS, st.sampled_from([Operation.READ, Operation.CREATE, Operation.DELETE]))
def test_against_the_model(rules: list[tuple[str, frozenset[str]]], cut: int, path: str, operation: Operation):
    halves = [
        "".join(rule(pattern, *sorted(granted)) for pattern, granted in half) for half in (rules[:cut], rules[cut:])
    ]
    subject = acl(*halves)
    expected = model_capabilities(rules, path)
    assert subject.check(path, operation).allowed == (operation.value in (expected or ()))
    assert subject.capabilities(path) == (sorted(expected) if expected else ["deny"])


# -- single rules of precedence, as examples


def test_exact_beats_everything():
    subject = acl(rule("secret/*", "read"), rule("secret/a", "delete"), rule("secret/+", "update"))
    assert subject.capabilities("secret/a") == ["delete"]
    assert subject.capabilities("secret/b") == ["update"]
    assert subject.capabilities("secret/b/c") == ["read"]


def test_the_longest_prefix_decides():
    subject = acl(rule("secret/*", "read"), rule("secret/team*", "deny"), rule("secret/team/me/*", "update"))
    assert subject.check("secret/x", Operation.READ).allowed
    assert not subject.check("secret/teammate", Operation.READ).allowed
    assert subject.check("secret/team/me/x", Operation.UPDATE).allowed


def test_deny_wins_over_all_policies_of_one_path():
    subject = acl(rule("a/b", "read", "update"), rule("a/b", "deny"))
    decision = subject.check("a/b", Operation.READ)
    assert not decision.allowed
    assert subject.capabilities("a/b") == ["deny"]


def test_capabilities_of_several_policies_add_up():
    subject = acl(rule("a/b", "read"), rule("a/b", "list", "sudo"))
    assert subject.capabilities("a/b") == ["list", "read", "sudo"]
    assert subject.check("a/b", Operation.READ).sudo


def test_nothing_is_allowed_without_a_rule():
    assert not acl().check("a", Operation.READ).allowed
    assert acl().capabilities("a") == ["deny"]


def test_root_may_everything():
    subject = ACL([Policy("root", "", ()), Policy.parse("x", rule("a", "deny"))])
    decision = subject.check("a", Operation.DELETE)
    assert (decision.allowed, decision.sudo, decision.root) == (True, True, True)
    assert subject.capabilities("a") == ["root"]
    assert subject.resultant() == {"root": True}


def test_a_plus_stands_for_one_segment_that_is_not_empty():
    subject = acl(rule("secret/+/config", "read"), rule("kv/+", "list"))
    assert subject.check("secret/a/config", Operation.READ).allowed
    for path in ("secret//config", "secret/a/b/config", "secret/config", "secret/a/configs"):
        assert not subject.check(path, Operation.READ).allowed
    assert not subject.check("kv/", Operation.LIST).allowed


@pytest.mark.parametrize("path", ["secret/foo", "secret/foo/"])
def test_list_takes_either_spelling_of_a_folder(path: str):
    for written in ("secret/foo", "secret/foo/", "secret/*", "secret/+", "secret/+/"):
        assert acl(rule(written, "list")).check(path, Operation.LIST).allowed, written


def test_a_deny_below_a_folder_also_denies_listing_it():
    # A deny on the contents must not be got round by listing the parent under its other spelling.
    subject = acl(rule("secret/foo", "list"), rule("secret/foo/*", "deny"))
    assert subject.check("secret/foo/", Operation.LIST).reason == "denied by secret/foo/*"
    assert not subject.check("secret/foo", Operation.LIST).allowed
    subject = acl(rule("secret/+/", "deny"), rule("secret/*", "list"))
    assert not subject.check("secret/foo/", Operation.LIST).allowed
    assert not subject.check("secret/foo", Operation.LIST).allowed


def test_sudo_alone_grants_nothing():
    decision = acl(rule("sys/rotate", "sudo")).check("sys/rotate", Operation.UPDATE)
    assert (decision.allowed, decision.sudo) == (False, True)


def test_a_grant_of_one_thing_is_no_sudo_and_no_root():
    decision = acl(rule("a", "read")).check("a", Operation.READ)
    assert (decision.allowed, decision.sudo, decision.root) == (True, False, False)
    decision = acl(rule("a", "read", "sudo")).check("a", Operation.READ)
    assert (decision.allowed, decision.sudo, decision.root) == (True, True, False)
    decision = acl().check("a", Operation.READ)
    assert (decision.allowed, decision.sudo, decision.root) == (False, False, False)


def test_capabilities_of_a_folder_are_those_of_its_listing():
    subject = acl(rule("a", "list"), rule("b/", "read"), rule("c", "sudo"))
    assert subject.capabilities("a/") == ["list"]
    assert subject.capabilities("b/") == ["read"]
    assert subject.capabilities("b") == ["deny"], "the slash counts, where something is written with one"
    assert subject.capabilities("d/") == ["deny"]


def test_granting_names_the_policies_of_the_deciding_path_that_grant():
    subject = acl(rule("a", "read"), rule("a", "read", "list"), rule("a", "update") + rule("*", "read"))
    assert subject.granting("a", Operation.READ) == ["p0", "p1"]
    assert subject.granting("a/", Operation.LIST) == ["p1"]
    assert subject.granting("b", Operation.READ) == ["p2"]
    assert acl(rule("a", "read")).granting("b", Operation.READ) == []
    assert ACL([Policy("root", "", ())]).granting("a", Operation.READ) == ["root"]


def test_has_any_under():
    subject = acl(rule("secret/data/team/*", "read"), rule("other/x", "deny"), rule("+/shared", "read"))
    assert subject.has_any_under("secret/")
    assert subject.has_any_under("secret/data/team/a/")
    assert not subject.has_any_under("secret/metadata/x/y/")
    assert subject.has_any_under("other/"), "through the rule with the plus"
    assert not acl(rule("other/x", "deny")).has_any_under("other/")
    assert acl(rule("*", "read")).has_any_under("anything/")
    assert acl(rule("se*", "read")).has_any_under("secret/")
    assert not acl(rule("se*", "read")).has_any_under("kv/")
    assert not acl(rule("se", "read")).has_any_under("secret/"), "no prefix"
    assert not acl(rule("secret", "read")).has_any_under("secret/a/"), "ends above"
    assert acl(rule("secret*", "read")).has_any_under("secret/a/")
    assert acl(rule("secret/a/b", "read")).has_any_under("secret/a/")
    assert not acl(rule("x/se*", "read")).has_any_under("secret/a/")
    assert not acl(rule("se*", "read")).has_any_under("x/secret/"), "the prefix is of the first folder"
    assert not acl(rule("a/b/c", "read")).has_any_under("a/c/")
    assert not acl('path "a/b" {}').has_any_under("a/")
    assert ACL([Policy("root", "", ())]).has_any_under("a/")


def test_resultant():
    shown = acl(rule("a/b", "read"), rule("c/*", "list", "read")).resultant()
    assert shown["root"] is False
    assert shown["exact_paths"] == {"a/b": {"capabilities": ["read"]}}
    assert shown["glob_paths"] == {"c/": {"capabilities": ["list", "read"]}}


# -- parameters

PARAMETERS = """
path "kv/x" {
  capabilities = ["create", "update", "read"]
  allowed_parameters = { "Name" = [], "zone" = ["eu-*", "*-test", 7, true] }
  denied_parameters = { "name" = ["root*"] }
  required_parameters = ["NAME"]
}
"""


@pytest.mark.parametrize(
    ("data", "allowed"),
    [
        ({"name": "x"}, True),
        ({"NAME": "x"}, True),
        ({}, False),
        ({"zone": "eu-1"}, False),
        ({"name": "x", "zone": "eu-1"}, True),
        ({"name": "x", "zone": "my-test"}, True),
        ({"name": "x", "zone": 7}, True),
        ({"name": "x", "zone": True}, True),
        ({"name": "x", "zone": 1}, False),
        ({"name": "x", "zone": "us-1"}, False),
        ({"name": "rooty"}, False),
        ({"name": "x", "other": 1}, False),
    ],
)
@pytest.mark.parametrize("operation", [Operation.CREATE, Operation.UPDATE])
def test_parameters(data: dict, allowed: bool, operation: Operation):
    subject = acl(PARAMETERS)
    assert subject.check("kv/x", operation, data).allowed == allowed
    assert subject.check("kv/x", Operation.READ, data).allowed


@pytest.mark.parametrize(
    ("pattern", "fitting", "others"),
    [
        ('"*"', ["", "x"], [1]),
        ('"*a*"', ["a", "xax"], ["b", ""]),
        ('"a*"', ["a", "ab"], ["ba", ""]),
        ('"*a"', ["a", "ba"], ["ab", ""]),
        ('"a"', ["a"], ["aa", ""]),
        ('"1"', ["1"], [1, True]),
        ("1", [1], ["1", True, 0]),
        ("true", [True], ["true", 1, False]),
    ],
)
def test_patterns_of_values(pattern: str, fitting: list, others: list):
    subject = acl(f'path "a" {{ capabilities = ["update"] allowed_parameters = {{ "x" = [{pattern}] }} }}')
    for value in fitting + others:
        assert subject.check("a", Operation.UPDATE, {"x": value}).allowed is any(value is one for one in fitting), value


def test_parameters_with_a_star():
    open_rule = 'path "a" { capabilities = ["update"] allowed_parameters = { "x" = ["1"], "*" = [] } }'
    assert acl(open_rule).check("a", Operation.UPDATE, {"y": 1, "x": "1"}).allowed
    assert not acl(open_rule).check("a", Operation.UPDATE, {"x": "2"}).allowed
    closed = 'path "a" { capabilities = ["update"] denied_parameters { "*" = [] } }'
    assert not acl(closed).check("a", Operation.UPDATE, {"y": 1}).allowed
    assert acl(closed).check("a", Operation.UPDATE, {}).allowed


def test_parameters_of_several_policies():
    one = 'path "a" { capabilities = ["update"] allowed_parameters = { "x" = ["1"] } }'
    two = 'path "a" { capabilities = ["update"] allowed_parameters = { "x" = ["2"], "y" = [] } }'
    subject = acl(one, two)
    assert subject.check("a", Operation.UPDATE, {"x": "1", "y": "any"}).allowed
    assert subject.check("a", Operation.UPDATE, {"x": "2"}).allowed
    assert not subject.check("a", Operation.UPDATE, {"x": "3"}).allowed


@pytest.mark.parametrize(
    ("written", "seconds"),
    [('"2d"', 172800), ('"3h"', 10800), ('"1m30s"', 90), ('"2500ms"', 2.5), ('"1.5h"', 5400), ("45", 45), ('"45"', 45)],
)
def test_units_of_wrapping_bounds(written: str, seconds: float):
    one_ttl = f'path "a" {{ capabilities = ["read"] min_wrapping_ttl = {written} max_wrapping_ttl = {written} }}'
    (parsed,) = Policy.parse("x", one_ttl).rules
    assert (parsed.min_wrapping_ttl_s, parsed.max_wrapping_ttl_s) == (seconds, seconds)


def test_wrapping_bounds():
    subject = acl('path "a" { capabilities = ["read"] min_wrapping_ttl = "1m" max_wrapping_ttl = "1h30m" }')
    assert not subject.check("a", Operation.READ).allowed
    assert not subject.check("a", Operation.READ, wrap_ttl_s=59).allowed
    assert subject.check("a", Operation.READ, wrap_ttl_s=60).allowed
    assert subject.check("a", Operation.READ, wrap_ttl_s=5400).allowed
    assert not subject.check("a", Operation.READ, wrap_ttl_s=5401).allowed
    bounded = acl('path "a" { capabilities = ["read"] max_wrapping_ttl = "1h" }')
    assert not bounded.check("a", Operation.READ).allowed, "an answer that is not wrapped is not bounded"
    assert bounded.check("a", Operation.READ, wrap_ttl_s=0.5).allowed
    several = acl(*(f'path "a" {{ capabilities = ["read"] max_wrapping_ttl = {ttl} }}' for ttl in (30, 0, 20)))
    assert several.check("a", Operation.READ, wrap_ttl_s=20).allowed
    assert not several.check("a", Operation.READ, wrap_ttl_s=21).allowed, "bounds narrow"


# -- text


def test_json_and_hcl_say_the_same():
    hcl = 'path "secret/+" { capabilities = ["read"] required_parameters = ["a"] allowed_parameters = { "b" = ["c"] } }'
    json = (
        '{"path": {"secret/+": {"capabilities": ["read"], "required_parameters": ["a"],'
        ' "allowed_parameters": {"b": ["c"]}}}}'
    )
    assert Policy.parse("x", hcl).rules == Policy.parse("x", json).rules


@pytest.mark.parametrize(
    ("word", "capabilities"),
    [
        ("deny", ["deny"]),
        ("read", ["list", "read"]),
        ("write", ["create", "delete", "list", "read", "update"]),
        ("sudo", ["create", "delete", "list", "read", "sudo", "update"]),
    ],
)
def test_old_form(word: str, capabilities: list[str]):
    assert acl(f'path "a" {{ policy = "{word}" }}').capabilities("a") == capabilities


def test_a_rule_that_grants_nothing_takes_what_a_shorter_one_grants():
    subject = acl(rule("*", "read"), 'path "a" {}')
    assert subject.capabilities("a") == ["deny"]
    assert subject.capabilities("b") == ["read"]


@pytest.mark.parametrize("text", ['{"path": {}}', "path {}", 'name = "x"'])
def test_text_without_rules(text: str):
    assert Policy.parse("x", text).rules == ()


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a", False),
        ("a/b", "a/b/c", False),
        ("a/b", "a/x", False),
        ("a/b*", "a/bc/d", True),
        ("a/b*", "a/xb", False),
        ("a/*", "a/", True),
        ("a/*", "a", False),
        ("+/b", "a/b", True),
        ("+/b", "/b", False),
        ("a/+", "a/", False),
        ("+/b*", "a/b", True),
        ("+/b*", "a/c", False),
        ("a/+/*", "a/b/", True),
        ("a/+/*", "a//c", False),
    ],
)
def test_pattern_matches(pattern: str, path: str, matches: bool):
    assert pattern_matches(pattern, path) is matches


def test_path_order():
    """From the weakest to the strongest; the comparisons are the documented ones, one by one."""
    weakest_first = [
        "*",
        "+/a",  # the first wildcard at 0 as well, but no "*" at the end
        "a*",
        "a/+/+/*",  # the first wildcard at 2, a "*" at the end: more "+" lose
        "a/+/b*",
        "a/+/bb*",
        "aa*",
        "a/+/+/c",  # no "*" at the end
        "a/+/b",
        "a/+/bb",
        "a/+/cc",  # of the same length: the alphabet
        "a/b/*",
        "a/b/+",
        "a/b/c",
    ]
    assert sorted(weakest_first, key=path_order) == weakest_first


@pytest.mark.parametrize(
    "text",
    [
        'path "a" {',
        'path "a" { capabilities = ["fly"] }',
        'path "a" { capabilities = "read" }',
        'path "a" { capabilitys = ["read"] }',
        'path { capabilities = ["read"] }',
        'path "a" "b" { capabilities = ["read"] }',
        'paths "a" { capabilities = ["read"] }',
        'paths = "a"',
        'path "a/+*" { capabilities = ["read"] }',
        'path "a/*/b" { capabilities = ["read"] }',
        'path "a" { policy = "fly" }',
        'path "a" { policy = "read" capabilities = ["read"] }',
        'path "a" { capabilities = ["read"] min_wrapping_ttl = "soon" }',
        'path "a" { capabilities = ["read"] min_wrapping_ttl = "2h" max_wrapping_ttl = "1h" }',
        'path "a" { capabilities = ["read"] min_wrapping_ttl = -1 }',
        'path "a" { capabilities = ["read"] allowed_parameters = ["x"] }',
        'path "a" { capabilities = ["read"] required_parameters = "x" }',
        'path "a" { capabilities = ["read"] min_wrapping_ttl = "1h and more" }',
        'path "a" { capabilities = ["read"] min_wrapping_ttl = "inf" }',
        'path "a" { capabilities = ["read"] min_wrapping_ttl = true }',
        'path "a" { capabilities = ["read"] allowed_parameters = { x = "1" } }',
        'path "a" { capabilities = ["read"] allowed_parameters "x" { y = [] } }',
        'path "a" { capabilities = ["read"] allowed_parameters { x { y = [] } } }',
        'path "a" { capabilities = ["read"] allowed_parameters {} allowed_parameters {} }',
        'path "a" { capabilities = ["read"] subscribe_event_types = "x" }',
        'path "a/{{identity.entity.id}}" { capabilities = ["deny"] }',
        '{"path": {"a": {"capabilities": "read"}}}',
        "not a policy",
    ],
)
def test_text_that_is_refused(text: str):
    with pytest.raises(InvalidRequest, match="failed to parse policy"):
        Policy.parse("x", text)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80) | st.text('path "ab+*/" {}=[]\\,capabilities', max_size=80))
def test_no_text_breaks_the_parser(text: str):
    with contextlib.suppress(InvalidRequest):
        Policy.parse("x", text)


def test_a_template_without_an_identity_matches_nothing():
    subject = acl(rule("users/{{identity.entity.id}}/*", "read"))
    assert not subject.check("users/{{identity.entity.id}}/x", Operation.READ).allowed


def test_default_policy_parses():
    subject = acl(DEFAULT_POLICY)
    assert subject.check("auth/token/lookup-self", Operation.READ).allowed
    assert subject.check("cubbyhole/response", Operation.READ).allowed
    assert not subject.check("sys/mounts", Operation.READ).allowed


# -- the store


async def test_store_round_trip_and_names():
    store, sealed = make_sealed()
    policies = PolicyStore(sealed, lambda: True)
    await policies.put(" Team/Admin ", rule("a", "read"))
    assert (await policies.get("TEAM/admin")).text == rule("a", "read")
    assert await policies.list() == ["default", "root", "team/admin"]
    fresh = PolicyStore(sealed, lambda: True)
    assert (await fresh.get("team/admin")).rules == Policy.parse("x", rule("a", "read")).rules
    await policies.delete("Team/Admin")
    assert await policies.get("team/admin") is None
    await policies.delete("never-there")
    assert len(store.commits) == 3


@pytest.mark.parametrize("name", ["root", " Root", "ROOT ", "response-wrapping", "control-group"])
async def test_built_in_policies_cannot_be_changed(name: str):
    _, sealed = make_sealed()
    policies = PolicyStore(sealed, lambda: True)
    plain = name.strip().lower()
    with pytest.raises(InvalidRequest, match=f'cannot update "{plain}" policy'):
        await policies.put(name, rule("*", "read"))
    with pytest.raises(InvalidRequest, match=f'cannot delete "{plain}" policy'):
        await policies.delete(name)
    assert await policies.get(name) is not None


async def test_requests_the_store_refuses():
    store, sealed = make_sealed()
    policies = PolicyStore(sealed, lambda: False)
    with pytest.raises(InvalidRequest, match="'policy' parameter not supplied or empty"):
        await policies.put("a", "  ")
    with pytest.raises(InvalidRequest, match="failed to parse policy"):
        await policies.put("a", "nonsense")
    for name in ("", " ", "a/", "/a", "a\x00b", "a//b"):
        with pytest.raises(InvalidRequest):
            await policies.put(name, rule("a", "read"))
    with pytest.raises(InvalidRequest, match='cannot delete "default"'):
        await policies.delete("default")
    with pytest.raises(ReadOnlyStorage):
        await policies.put("a", rule("a", "read"))
    with pytest.raises(ReadOnlyStorage):
        await policies.delete("a")
    assert store.data == {}


async def test_large_policies_are_parsed_and_arranged_beside_the_loop(monkeypatch: pytest.MonkeyPatch):
    """A policy of thousands of rules takes a second of the processor, a small one no thread."""
    threads: dict[str, list[bool]] = {"parse": [], "acl": []}
    parse, arrange = Policy.parse, ACL.__init__

    def parsed(name: str, text: str) -> Policy:
        threads["parse"].append(threading.current_thread() is not threading.main_thread())
        return parse(name, text)

    def arranged(self: ACL, policies: Iterable[Policy]) -> None:
        threads["acl"].append(threading.current_thread() is not threading.main_thread())
        arrange(self, policies)

    _, sealed = make_sealed()
    policies = PolicyStore(sealed, lambda: True)
    monkeypatch.setattr(Policy, "parse", parsed)
    monkeypatch.setattr(ACL, "__init__", arranged)
    await policies.put("large", "".join(rule(f"a/{n}", "read") + "\n" for n in range(1000)))
    await policies.put("small", rule("b", "read"))
    assert (await policies.acl(["large", "small"])).check("a/999", Operation.READ).allowed
    assert (await policies.acl(["small"])).check("b", Operation.READ).allowed
    assert (await PolicyStore(sealed, lambda: True).get("large")) is not None
    built_in = 2
    del threads["parse"][2 : 2 + built_in]
    assert threads == {"parse": [True, False, True], "acl": [True, False]}


async def test_acl_follows_changes():
    store, sealed = make_sealed()
    policies = PolicyStore(sealed, lambda: True)
    assert not (await policies.acl(["a", "b"])).check("x", Operation.READ).allowed
    await policies.put("a", rule("x", "read"))
    assert (await policies.acl(["b", "a"])).check("x", Operation.READ).allowed
    reads = store.reads
    assert await policies.acl(["a", "b"]) is await policies.acl(["b", "a", "a"])
    assert store.reads == reads
    other = PolicyStore(sealed, lambda: True)
    await other.put("a", rule("x", "deny"))
    policies.invalidate_keys(["r/policy/acl/a", "r/core/keyring"])
    assert not (await policies.acl(["a", "b"])).check("x", Operation.READ).allowed
    assert (await policies.acl(["root"])).is_root


async def test_the_acls_used_last_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(policies_module, "_CACHED_ACLS_MAX", 2)
    policies = PolicyStore(make_sealed()[1], lambda: True)
    first, second = await policies.acl(["a"]), await policies.acl(["b"])
    assert await policies.acl(["a"]) is first
    third = await policies.acl(["c"])
    assert await policies.acl(["a"]) is first
    assert await policies.acl(["c"]) is third
    assert await policies.acl(["b"]) is not second


async def test_what_changes_while_it_is_read_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    store, sealed = make_sealed()
    policies = PolicyStore(sealed, lambda: True)
    await PolicyStore(sealed, lambda: True).put("a", rule("x", "read"))
    read = sealed.get

    async def overtaken(key: str) -> bytes | None:
        found = await read(key)
        policies.invalidate("a")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(sealed, "get", overtaken)
        assert (await policies.acl(["a"])).check("x", Operation.READ).allowed
    await PolicyStore(sealed, lambda: True).put("a", rule("x", "deny"))
    assert not (await policies.acl(["a"])).check("x", Operation.READ).allowed
    assert (await policies.get("a")).text == rule("x", "deny")
    reads = store.reads
    await policies.get("a")
    assert store.reads == reads, "what did not change is"


async def test_exists():
    policies = PolicyStore(make_sealed()[1], lambda: True)
    await policies.put("team/a", rule("x", "read"))
    assert [await policies.exists(name) for name in ("team/a", "root", "response-wrapping", "team")] == [
        True, True, True, False,
    ]  # fmt: skip


def test_normalize_policies():
    assert normalize_policies(["B", " a", "b", ""]) == ["a", "b", "default"]
    assert normalize_policies(["root"]) == ["root"]
    assert normalize_policies(["a"], default=False) == ["a"]
