"""When failed logins lock an identity out, and who decides it. Pure.

Precedence: the mount's own tuning, the configuration of its type, that of ``all`` types, the defaults; a server that
was started with lockouts disabled has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

TUNABLE_TYPES = frozenset({"approle", "ldap", "userpass"})
"""Auth methods for which Vault has lockouts; no others can be tuned or configured."""


class LockoutTuning(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one place sets; None leaves it to the next. Durations in seconds."""

    threshold: int | None = None
    duration_s: int | None = None
    counter_reset_s: int | None = None
    disable: bool | None = None


@dataclass(frozen=True, slots=True)
class LockoutRules:
    """What counts for one mount. After ``threshold`` failures, each within ``counter_reset_s`` of the one before, an
    identity is locked out for ``duration_s``."""

    threshold: int = 5
    duration_s: int = 900
    counter_reset_s: int = 900
    disable: bool = False


@dataclass(frozen=True, slots=True)
class LockoutSettings:
    """What the server was started with: ``by_type`` by auth method, or ``all``."""

    disabled: bool = False
    by_type: Mapping[str, LockoutTuning] = field(default_factory=dict)

    def rules(self, type_name: str, tuning: LockoutTuning | None) -> LockoutRules:
        """The rules of a mount of that type."""
        rules = LockoutRules()
        for layer in (self.by_type.get("all"), self.by_type.get(type_name), tuning):
            if layer is not None:
                rules = LockoutRules(
                    threshold=rules.threshold if layer.threshold is None else layer.threshold,
                    duration_s=rules.duration_s if layer.duration_s is None else layer.duration_s,
                    counter_reset_s=rules.counter_reset_s if layer.counter_reset_s is None else layer.counter_reset_s,
                    disable=rules.disable if layer.disable is None else layer.disable,
                )
        return LockoutRules(rules.threshold, rules.duration_s, rules.counter_reset_s, True) if self.disabled else rules
