"""Policies as text and as rules. Pure.

A policy is HCL or JSON: ``path "secret/data/+/x*" { capabilities = ["read"] }``. Everything that could be a typing
error is refused, for a rule that silently does not apply is worse than none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from plugin_api.errors import InvalidRequest
from sidecar.hcl import Block, Body, HCLError, parse_any

CAPABILITIES = frozenset(
    {"create", "read", "update", "patch", "delete", "list", "sudo", "deny", "recover", "subscribe"}
)
"""``recover`` and ``subscribe`` are known so that newer servers' policies load; nothing here asks for them."""

# The form of before capabilities: one word per rule.
_LEGACY = {
    "deny": {"deny"},
    "read": {"read", "list"},
    "write": {"create", "read", "update", "delete", "list"},
    "sudo": {"create", "read", "update", "delete", "list", "sudo"},
}
_RULE_KEYS = frozenset(
    {
        "capabilities",
        "policy",
        "allowed_parameters",
        "denied_parameters",
        "required_parameters",
        "min_wrapping_ttl",
        "max_wrapping_ttl",
        "subscribe_event_types",
        "comment",
    },
)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(d|h|ms|m|s)")
_UNIT_S = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}

Parameters = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Rule:
    """What one path of one policy grants. ``path`` as written; parameter names in lower case.

    An empty value list means any value. Wrapping TTLs in seconds, 0 means no bound.
    """

    path: str
    capabilities: frozenset[str]
    allowed_parameters: Parameters
    denied_parameters: Parameters
    required_parameters: tuple[str, ...]
    min_wrapping_ttl_s: float
    max_wrapping_ttl_s: float

    @property
    def denies(self) -> bool:
        """Whether the rule forbids the path whatever else is granted."""
        return "deny" in self.capabilities

    @property
    def is_prefix(self) -> bool:
        """Whether a trailing ``*`` lets any rest follow."""
        return self.path.endswith("*")

    @property
    def has_wildcard(self) -> bool:
        """Whether ``+`` stands for a whole segment somewhere."""
        return any(segment == "+" for segment in self.path.removesuffix("*").split("/"))


@dataclass(frozen=True, slots=True)
class Policy:
    """One named policy: the text as its author wrote it, and its rules."""

    name: str
    text: str
    rules: tuple[Rule, ...]

    @classmethod
    def parse(cls, name: str, text: str) -> Policy:
        """Raises InvalidRequest that says where the text is wrong."""
        try:
            body = parse_any(text, "policy")
            return cls(name, text, tuple(_rules(body)))
        except HCLError as error:
            raise InvalidRequest(f"failed to parse policy: {error}") from None


def _rules(body: Body) -> list[Rule]:
    for key in body.attributes:
        if key != "name":
            raise _error(f'invalid key "{key}"')
    rules = []
    for block in body.blocks:
        if block.type != "path":
            raise _error(f'invalid key "{block.type}" on line {block.line}')
        if not block.labels and not block.body.attributes and not block.body.blocks:
            continue
        if len(block.labels) != 1:
            raise _error(f"a path rule needs exactly one path (line {block.line})")
        rules.append(_rule(block.labels[0].removeprefix("/"), block))
    return rules


def _rule(path: str, block: Block) -> Rule:
    fields = _fields(block)
    for key in fields:
        if key not in _RULE_KEYS:
            raise _error(f'path "{path}": invalid key "{key}" on line {block.line}')
    if "+*" in path or "*" in path.removesuffix("*"):
        raise _error(f'path "{path}": "*" may stand only at the end, and not right after "+"')
    if "capabilities" in fields and "policy" in fields:
        raise _error(f'path "{path}": specify either "capabilities" or "policy"')
    if "policy" in fields:
        legacy = fields["policy"]
        if not isinstance(legacy, str) or legacy not in _LEGACY:
            raise _error(f'path "{path}": invalid policy')
        capabilities = frozenset(_LEGACY[legacy])
    else:
        capabilities = frozenset(_words(path, "capabilities", fields.get("capabilities", [])))
        unknown = sorted(capabilities - CAPABILITIES)
        if unknown:
            raise _error(f'path "{path}": invalid capability "{unknown[0]}"')
    if "deny" in capabilities:
        capabilities = frozenset({"deny"})
        if "{{" in path:
            raise _error(f'path "{path}": a deny rule with a template would silently not apply')
    _words(path, "subscribe_event_types", fields.get("subscribe_event_types", []))
    minimum, maximum = (_seconds(path, key, fields.get(key, 0)) for key in ("min_wrapping_ttl", "max_wrapping_ttl"))
    if maximum and minimum > maximum:
        raise _error(f'path "{path}": max_wrapping_ttl cannot be less than min_wrapping_ttl')
    return Rule(
        path,
        capabilities,
        _parameters(path, "allowed_parameters", fields.get("allowed_parameters", {})),
        _parameters(path, "denied_parameters", fields.get("denied_parameters", {})),
        tuple(word.lower() for word in _words(path, "required_parameters", fields.get("required_parameters", []))),
        minimum,
        maximum,
    )


def _fields(block: Block) -> dict[str, Any]:
    """Attributes and unlabelled blocks alike: HCL 1 makes no difference between ``a = {}`` and ``a {}``."""
    fields: dict[str, Any] = {name: attribute.value for name, attribute in block.body.attributes.items()}
    for inner in block.body.blocks:
        if inner.labels or inner.body.blocks or inner.type in fields:
            raise _error(f'invalid "{inner.type}" on line {inner.line}')
        fields[inner.type] = {name: attribute.value for name, attribute in inner.body.attributes.items()}
    return fields


def _words(path: str, key: str, value: object) -> Sequence[str]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise _error(f'path "{path}": "{key}" must be a list of strings')
    return value


def _parameters(path: str, key: str, value: object) -> dict[str, tuple[Any, ...]]:
    if not isinstance(value, dict) or not all(isinstance(values, list) for values in value.values()):
        raise _error(f'path "{path}": "{key}" must map parameter names to lists')
    return {name.lower(): tuple(values) for name, values in value.items()}


def _seconds(path: str, key: str, value: object) -> float:
    text = str(value)
    parts = _DURATION_PART.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return sum(float(number) * _UNIT_S[unit] for number, unit in parts)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not math.isfinite(seconds) or seconds < 0:
        raise _error(f'path "{path}": "{key}" must be a duration')
    return seconds


def _error(message: str) -> InvalidRequest:
    return InvalidRequest(f"failed to parse policy: {message}")


def path_order(path: str) -> tuple[int, bool, int, int, str]:
    """Among several patterns that match, the greatest by this order decides (Vault's published rules): later first
    wildcard, no trailing ``*``, fewer ``+`` segments, longer, later in the alphabet."""
    segments = path.split("/")
    wildcards = [position for position, segment in enumerate(segments) if segment == "+"]
    first = len(path)
    if path.endswith("*"):
        first = len(path) - 1
    if wildcards:
        first = min(first, sum(len(segment) + 1 for segment in segments[: wildcards[0]]))
    return first, not path.endswith("*"), -len(wildcards), len(path), path


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether ``pattern`` (with ``+`` segments or a trailing ``*``) covers ``path``."""
    is_prefix = pattern.endswith("*")
    wanted = pattern.removesuffix("*").split("/")
    given = path.split("/")
    if len(given) < len(wanted) or (len(given) > len(wanted) and not is_prefix):
        return False
    last = len(wanted) - 1
    for position, segment in enumerate(wanted):
        if segment == "+":
            # A wildcard stands for something: "a/+" is not a rule about listing "a/".
            if not given[position]:
                return False
        elif is_prefix and position == last:
            if not given[position].startswith(segment):
                return False
        elif segment != given[position]:
            return False
    return True


def merge(rules: Sequence[Rule]) -> Rule:
    """Several policies' rules for one path as one: capabilities add up, a deny decides, bounds narrow."""
    first = rules[0]
    if len(rules) == 1:
        return first
    capabilities = frozenset().union(*(rule.capabilities for rule in rules))
    if "deny" in capabilities:
        return replace(first, capabilities=frozenset({"deny"}))
    minima = [rule.min_wrapping_ttl_s for rule in rules]
    maxima = [rule.max_wrapping_ttl_s for rule in rules if rule.max_wrapping_ttl_s]
    return Rule(
        first.path,
        capabilities,
        _merged_parameters([rule.allowed_parameters for rule in rules]),
        _merged_parameters([rule.denied_parameters for rule in rules]),
        tuple(dict.fromkeys(name for rule in rules for name in rule.required_parameters)),
        max(minima),
        min(maxima, default=0),
    )


def _merged_parameters(several: Sequence[Parameters]) -> dict[str, tuple[Any, ...]]:
    merged: dict[str, tuple[Any, ...]] = {}
    for parameters in several:
        for name, values in parameters.items():
            if name in merged and (not values or not merged[name]):
                merged[name] = ()
            else:
                merged[name] = merged.get(name, ()) + values
    return merged
