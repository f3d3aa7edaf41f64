"""``user_lockout_config`` of an auth mount: how it is sent and how it is shown. Pure."""

from __future__ import annotations

from typing import Any

from plugin_api.errors import InvalidRequest
from sidecar.core.lockout_rules import TUNABLE_TYPES, LockoutRules, LockoutTuning
from sidecar.core.mounts import AUTH, MountEntry
from sidecar.request.fields import Fields


def tuned_lockout(entry: MountEntry, fields: Fields) -> LockoutTuning:
    """The mount's tuning with what was sent; 0 leaves a number to the server's configuration again. Raises
    InvalidRequest, also for mounts that have no lockout."""
    if entry.table != AUTH or entry.type not in TUNABLE_TYPES:
        raise InvalidRequest(f'tuning of user lockout configuration for auth type "{entry.type}" not allowed')
    old = entry.config.user_lockout or LockoutTuning()
    threshold = old.threshold
    if fields.given("lockout_threshold"):
        threshold = fields.integer("lockout_threshold")
        if threshold < 0:
            raise InvalidRequest("lockout_threshold must not be negative")
    return LockoutTuning(
        threshold=threshold or None,
        duration_s=_duration(fields, "lockout_duration", old.duration_s),
        counter_reset_s=_duration(fields, "lockout_counter_reset_duration", old.counter_reset_s),
        disable=fields.boolean("lockout_disable") if fields.given("lockout_disable") else old.disable,
    )


def _duration(fields: Fields, name: str, old_s: int | None) -> int | None:
    return (fields.duration_s(name) if fields.given(name) else old_s) or None


def shown_lockout(tuning: LockoutTuning) -> dict[str, Any]:
    """The members that Vault shows; 0 where the mount leaves it to the server's configuration."""
    rules = LockoutRules(tuning.threshold or 0, tuning.duration_s or 0, tuning.counter_reset_s or 0)
    return {
        "user_lockout_counter_reset_duration": rules.counter_reset_s,
        "user_lockout_disable": bool(tuning.disable),
        "user_lockout_duration": rules.duration_s,
        "user_lockout_threshold": rules.threshold,
    }
