"""``user_lockout "all" {}`` and ``user_lockout "<auth method>" {}``: defaults for mounts that are not tuned."""

from __future__ import annotations

from collections.abc import Mapping

from sidecar.config.reader import ConfigError, Reader
from sidecar.config.values import LockoutStanza

KINDS = ("all", "approle", "ldap", "userpass")


def read_user_lockout(top: Reader) -> Mapping[str, LockoutStanza]:
    """Every stanza, by its label. Raises ConfigError."""
    found: dict[str, LockoutStanza] = {}
    for stanza in top.blocks("user_lockout"):
        place = f"{stanza.body.filename}:{stanza.line}"
        kind = stanza.labels[0] if len(stanza.labels) == 1 else ""
        if kind not in KINDS:
            raise ConfigError(f'{place}: expected user_lockout "all" {{...}}, or one of {", ".join(KINDS[1:])}')
        if kind in found:
            raise ConfigError(f'{place}: there are two stanzas user_lockout "{kind}"')
        reader = top.inner(stanza)
        found[kind] = LockoutStanza(
            threshold=_threshold(reader),
            duration_s=_duration(reader, "lockout_duration"),
            counter_reset_s=_duration(reader, "lockout_counter_reset"),
            disable=reader.optional_boolean("disable_lockout"),
        )
        reader.finish()
    return found


def _threshold(reader: Reader) -> int | None:
    """Vault writes it as text."""
    threshold = reader.integer("lockout_threshold", 0)
    return threshold or None


def _duration(reader: Reader, name: str) -> int | None:
    return int(reader.duration_s(name, 0.0)) or None
