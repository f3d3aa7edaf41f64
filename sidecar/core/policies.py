"""Access control: what a set of policies allows (pure), and the store of policies."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, ReadOnlyStorage
from plugin_api.request import Operation
from sidecar.core.keys import POLICIES
from sidecar.core.metrics import METRICS
from sidecar.core.policy_rules import Policy, Rule, merge, path_order, pattern_matches
from sidecar.core.store_view import SealedStore

__all__ = ["ACL", "DEFAULT_POLICY", "Decision", "Policy", "PolicyStore", "Rule", "normalize_policies"]

ROOT = "root"
DEFAULT = "default"
RESPONSE_WRAPPING = "response-wrapping"
CONTROL_GROUP = "control-group"

DEFAULT_POLICY = """
# What every token may do unless it was made without the default policy.

# Look at, renew and give up itself, and ask what it may do.
path "auth/token/lookup-self" { capabilities = ["read"] }
path "auth/token/renew-self" { capabilities = ["update"] }
path "auth/token/revoke-self" { capabilities = ["update"] }
path "sys/capabilities-self" { capabilities = ["update"] }
path "sys/internal/ui/resultant-acl" { capabilities = ["read"] }

# Renew and look up a lease, whose id is hard to guess.
path "sys/renew" { capabilities = ["update"] }
path "sys/leases/renew" { capabilities = ["update"] }
path "sys/leases/lookup" { capabilities = ["update"] }

# Use its own cubbyhole.
path "cubbyhole/*" { capabilities = ["create", "read", "update", "delete", "list"] }

# Wrap, and look at and unwrap what it was handed.
path "sys/wrapping/wrap" { capabilities = ["update"] }
path "sys/wrapping/lookup" { capabilities = ["update"] }
path "sys/wrapping/unwrap" { capabilities = ["update"] }

# General purpose tools.
path "sys/tools/hash" { capabilities = ["update"] }
path "sys/tools/hash/*" { capabilities = ["update"] }
""".lstrip()

_RESPONSE_WRAPPING_POLICY = """
path "cubbyhole/response" { capabilities = ["create", "read"] }
path "sys/wrapping/unwrap" { capabilities = ["update"] }
""".lstrip()

_CONTROL_GROUP_POLICY = """
path "cubbyhole/control-group" { capabilities = ["update", "create", "read"] }
path "sys/wrapping/unwrap" { capabilities = ["update"] }
""".lstrip()

_WRITES = frozenset({Operation.CREATE, Operation.UPDATE, Operation.PATCH})
_CAPABILITY = {operation: operation.value for operation in Operation}  # an enum works its value out each time
_HIDDEN = frozenset({RESPONSE_WRAPPING, CONTROL_GROUP})
_CACHED_ACLS_MAX = 4096
# Above these, parsing and arranging rules goes to a thread: a policy may hold thousands of them.
_CHARACTERS_IN_THE_LOOP_MAX = 8192
_RULES_IN_THE_LOOP_MAX = 200


@dataclass(frozen=True, slots=True)
class Decision:
    """``sudo``: the deciding rule grants the sudo capability too. ``reason`` is for logs and tests, not for clients."""

    allowed: bool
    sudo: bool = False
    root: bool = False
    reason: str = ""


_MAY, _MAY_WITH_SUDO, _ROOT_MAY = Decision(True), Decision(True, sudo=True), Decision(True, sudo=True, root=True)


class ACL:
    """What a set of policies allows; policies add up, except that a deny on the deciding path always wins."""

    def __init__(self, policies: Iterable[Policy]) -> None:
        policies = list(policies)
        self.is_root = any(policy.name == ROOT for policy in policies)
        by_path: dict[str, list[Rule]] = {}
        self._sources: dict[str, list[tuple[str, frozenset[str]]]] = {}
        for policy in policies:
            for rule in policy.rules:
                # A template names the caller's identity; without one it can match nothing.
                if "{{" not in rule.path:
                    by_path.setdefault(rule.path, []).append(rule)
                    self._sources.setdefault(rule.path, []).append((policy.name, rule.capabilities))
        rules = [merge(several) for several in by_path.values()]
        self._exact = {rule.path: rule for rule in rules if not rule.is_prefix and not rule.has_wildcard}
        patterns = [rule for rule in rules if rule.is_prefix or rule.has_wildcard]
        self._patterns = sorted(patterns, key=lambda rule: path_order(rule.path), reverse=True)
        # A prefix without wildcards needs no looking at segments.
        self._matchers = [(None if rule.has_wildcard else rule.path[:-1], rule) for rule in self._patterns]

    def check(
        self,
        path: str,
        operation: Operation,
        data: Mapping[str, Any] | None = None,
        *,
        wrap_ttl_s: float = 0,
    ) -> Decision:
        """Whether ``operation`` at ``path`` (without ``/v1/``) with these parameters is allowed."""
        if self.is_root:
            return _ROOT_MAY
        rule = self._list_rule(path) if operation is Operation.LIST else self._rule(path)
        if rule is None:
            return Decision(allowed=False, reason="no rule for the path")
        if rule.denies:
            return Decision(allowed=False, reason=f"denied by {rule.path}")
        sudo = "sudo" in rule.capabilities
        reason = ""
        if _CAPABILITY[operation] not in rule.capabilities:
            reason = f"{rule.path} does not grant {operation.value}"
        elif not _wrapping_fits(rule, wrap_ttl_s):
            reason = f"{rule.path} bounds the wrapping TTL"
        elif operation in _WRITES:
            reason = _parameter_problem(rule, data or {})
        if not reason:
            return _MAY_WITH_SUDO if sudo else _MAY
        return Decision(allowed=False, sudo=sudo, reason=reason)

    def capabilities(self, path: str) -> list[str]:
        """Sorted names of what is granted at ``path``; ``["root"]`` for root, ``["deny"]`` for nothing."""
        if self.is_root:
            return ["root"]
        rule = self._rule(path)
        if rule is None and path.endswith("/"):
            rule = self._list_rule(path)
        if rule is None or rule.denies or not rule.capabilities:
            return ["deny"]
        return sorted(rule.capabilities)

    def granting(self, path: str, operation: Operation) -> list[str]:
        """The policies that grant ``operation`` at ``path``, by name; for the audit log, of a call that was allowed."""
        if self.is_root:
            return [ROOT]
        rule = self._list_rule(path) if operation is Operation.LIST else self._rule(path)
        if rule is None:
            return []
        return sorted({name for name, granted in self._sources[rule.path] if operation.value in granted})

    def has_any_under(self, prefix: str) -> bool:
        """Whether anything at or below ``prefix`` (a mount's path) may be granted."""
        rules = [*self._exact.values(), *self._patterns]
        return self.is_root or any(
            rule.capabilities and not rule.denies and _may_meet(rule.path, prefix) for rule in rules
        )

    def resultant(self) -> dict[str, Any]:
        """The rules as the web UI asks for them."""
        if self.is_root:
            return {"root": True}
        exact = {rule.path: {"capabilities": sorted(rule.capabilities)} for rule in self._exact.values()}
        globs = {rule.path.removesuffix("*"): {"capabilities": sorted(rule.capabilities)} for rule in self._patterns}
        return {"root": False, "exact_paths": exact, "glob_paths": globs}

    def _rule(self, path: str) -> Rule | None:
        exact = self._exact.get(path)
        if exact is not None:
            return exact
        for prefix, rule in self._matchers:
            if pattern_matches(rule.path, path) if prefix is None else path.startswith(prefix):
                return rule
        return None

    def _list_rule(self, path: str) -> Rule | None:
        """LIST names a folder, which a rule may write with or without its slash. A deny on either spelling counts."""
        bare = path.removesuffix("/")
        folder, trimmed = self._rule(bare + "/"), self._rule(bare)
        for rule in (folder, trimmed):
            if rule is not None and rule.denies:
                return rule
        if folder is not None and folder.path == bare + "/":
            return folder
        if trimmed is not None and trimmed.path == bare:
            return trimmed
        return folder or trimmed


def _may_meet(pattern: str, prefix: str) -> bool:
    """Whether some path below ``prefix`` could match ``pattern``."""
    is_prefix = pattern.endswith("*")
    wanted, folders = pattern.removesuffix("*").split("/"), prefix.removesuffix("/").split("/")
    for position, segment in enumerate(folders):
        if position >= len(wanted):
            return is_prefix
        if wanted[position] in ("+", segment):
            continue
        last = position == len(wanted) - 1
        return last and is_prefix and segment.startswith(wanted[position])
    return True


def _wrapping_fits(rule: Rule, wrap_ttl_s: float) -> bool:
    if rule.max_wrapping_ttl_s and not 0 < wrap_ttl_s <= rule.max_wrapping_ttl_s:
        return False
    return wrap_ttl_s >= rule.min_wrapping_ttl_s


def _parameter_problem(rule: Rule, data: Mapping[str, Any]) -> str:
    given = {name.lower(): value for name, value in data.items()}
    for name in rule.required_parameters:
        if name not in given:
            return f"{rule.path} requires a parameter"
    denied = rule.denied_parameters
    for name, value in given.items():
        if "*" in denied or (name in denied and _value_listed(value, denied[name])):
            return f"{rule.path} denies a parameter"
    allowed = rule.allowed_parameters
    if not allowed:
        return ""
    for name, value in given.items():
        if name in allowed:
            fits = _value_listed(value, allowed[name])
        else:
            fits = "*" in allowed and _value_listed(value, allowed["*"])
        if not fits:
            return f"{rule.path} does not allow a parameter"
    return ""


def _value_listed(value: Any, listed: Sequence[Any]) -> bool:
    """An empty list means any value; strings may begin or end with ``*``."""
    if not listed:
        return True
    return any(_value_matches(value, pattern) for pattern in listed)


def _value_matches(value: Any, pattern: Any) -> bool:
    if isinstance(pattern, str) and isinstance(value, str):
        starts, ends = pattern.startswith("*"), pattern.endswith("*")
        middle = pattern[starts : len(pattern) - ends]
        if starts and ends:
            return middle in value
        if starts:
            return value.endswith(middle)
        return value.startswith(middle) if ends else value == pattern
    # True == 1 in Python, but not in a policy.
    return isinstance(value, bool) == isinstance(pattern, bool) and bool(value == pattern)


def normalize_name(name: str) -> str:
    """One spelling for one policy: lower case, no space around it. Raises InvalidRequest for an unusable name."""
    normal = name.strip().lower()
    if not normal or not normal.isprintable() or not all(normal.split("/")):
        raise InvalidRequest("a policy name must be printable, not empty, and not begin or end with '/'")
    return normal


def normalize_policies(names: Iterable[str], *, default: bool = True) -> list[str]:
    """Sorted names without repetition, with ``default`` added where asked for and root is not among them."""
    normal = {name.strip().lower() for name in names if name.strip()}
    if default and ROOT not in normal:
        normal.add(DEFAULT)
    return sorted(normal)


class PolicyStore:
    """Policies by name, replicated. Reads are cached; the one writer and :meth:`invalidate` keep the cache exact."""

    def __init__(self, sealed: SealedStore, writable: Callable[[], bool]) -> None:
        self._sealed = sealed
        self._writable = writable
        self._builtin = {
            ROOT: Policy(ROOT, "", ()),
            RESPONSE_WRAPPING: Policy.parse(RESPONSE_WRAPPING, _RESPONSE_WRAPPING_POLICY),
            CONTROL_GROUP: Policy.parse(CONTROL_GROUP, _CONTROL_GROUP_POLICY),
        }
        self._policies: dict[str, Policy] = {}
        self._acls: OrderedDict[tuple[str, ...], ACL] = OrderedDict()
        self._changes = 0

    async def get(self, name: str) -> Policy | None:
        """The policy, or None. ``root`` has an empty text."""
        name = normalize_name(name)
        if name in self._builtin:
            return self._builtin[name]
        if name in self._policies:
            return self._policies[name]
        changes = self._changes
        with METRICS.timer("policy.get_policy"):
            raw = await self._sealed.get(POLICIES + name)
        policy = None if raw is None else await _parse(name, raw.decode())
        if policy is not None and changes == self._changes:
            self._policies[name] = policy
        return policy

    async def exists(self, name: str) -> bool:
        """Whether there is a policy of this name, the built-in ones among them."""
        return await self.get(name) is not None

    async def put(self, name: str, text: str) -> None:
        """Store a policy. Raises InvalidRequest, ReadOnlyStorage."""
        name = normalize_name(name)
        if name in self._builtin:
            raise InvalidRequest(f'cannot update "{name}" policy')
        if not text.strip():
            raise InvalidRequest("'policy' parameter not supplied or empty")
        policy = await _parse(name, text)
        self._require_writable()
        with METRICS.timer("policy.set_policy"):
            await self._sealed.commit([Write(POLICIES + name, text.encode())])
        self.invalidate(name)
        self._policies[name] = policy

    async def delete(self, name: str) -> None:
        """Remove a policy; a missing one is no failure. Raises InvalidRequest, ReadOnlyStorage."""
        name = normalize_name(name)
        if name in self._builtin or name == DEFAULT:
            raise InvalidRequest(f'cannot delete "{name}" policy')
        self._require_writable()
        with METRICS.timer("policy.delete_policy"):
            await self._sealed.commit([Write(POLICIES + name, None)])
        self.invalidate(name)

    async def list(self) -> list[str]:
        """Sorted names, with root and without those that only the server itself hands out."""
        with METRICS.timer("policy.list_policies"):
            stored = {name for name in await _names(self._sealed, POLICIES) if name not in _HIDDEN}
        return sorted({ROOT, DEFAULT, *stored})

    async def acl(self, names: Sequence[str]) -> ACL:
        """What ``names`` together allow. A policy that does not exist grants nothing."""
        key = tuple(sorted(set(names)))
        cached = self._acls.get(key)
        if cached is not None:
            self._acls.move_to_end(key)
            return cached
        changes = self._changes
        found = [policy for name in key if (policy := await self.get(name)) is not None]
        large = sum(len(policy.rules) for policy in found) > _RULES_IN_THE_LOOP_MAX
        acl = await asyncio.to_thread(ACL, found) if large else ACL(found)
        if changes == self._changes:
            self._acls[key] = acl
            if len(self._acls) > _CACHED_ACLS_MAX:
                self._acls.popitem(last=False)
        return acl

    def invalidate(self, name: str) -> None:
        """Forget ``name``: replication changed it."""
        self._changes += 1
        self._policies.pop(name, None)
        self._acls.clear()

    def invalidate_keys(self, keys: Iterable[str]) -> None:
        """:meth:`invalidate` for those of the changed logical keys that are policies."""
        for key in keys:
            if key.startswith(POLICIES):
                self.invalidate(key.removeprefix(POLICIES))

    def _require_writable(self) -> None:
        if not self._writable():
            raise ReadOnlyStorage


async def _parse(name: str, text: str) -> Policy:
    """:meth:`Policy.parse`, where it does not hold up the loop."""
    if len(text) <= _CHARACTERS_IN_THE_LOOP_MAX:
        return Policy.parse(name, text)
    return await asyncio.to_thread(Policy.parse, name, text)


async def _names(sealed: SealedStore, prefix: str) -> list[str]:
    """Names below ``prefix`` at any depth: a policy name may hold slashes."""
    names: list[str] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        for name in await sealed.list(prefix + folder):
            if name.endswith("/"):
                folders.append(folder + name)
            else:
                names.append(folder + name)
    return names
