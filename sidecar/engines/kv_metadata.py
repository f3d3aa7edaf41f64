"""KV version 2's rules on versions, apart from storage: what a write adds, what it prunes, what counts as deleted.

Times are unix microseconds, so that what is printed is what was stored.
"""

from __future__ import annotations

from typing import Any

import msgspec

from plugin_api.errors import InvalidRequest
from plugin_api.framework import format_duration, format_time_us, parse_int

MAX_VERSIONS_DEFAULT = 10

CUSTOM_KEYS_MAX = 64
CUSTOM_KEY_BYTES_MAX = 128
CUSTOM_VALUE_BYTES_MAX = 512


class Config(msgspec.Struct):
    """Settings of the mount. ``delete_version_after_s`` below zero means that no version ever deletes itself."""

    max_versions: int = 0
    cas_required: bool = False
    delete_version_after_s: int = 0

    def describe(self) -> dict[str, Any]:
        """As ``GET config`` shows it."""
        return {
            "cas_required": self.cas_required,
            "delete_version_after": format_duration(max(self.delete_version_after_s, 0)),
            "max_versions": self.max_versions,
        }


class Version(msgspec.Struct):
    """One version of a secret. ``deletion_us`` 0: never; in the future: it will delete itself."""

    created_us: int
    deletion_us: int = 0
    destroyed: bool = False

    def readable(self, now_us: int) -> bool:
        """Whether its data may still be given out."""
        return not self.destroyed and not self.deleted(now_us)

    def deleted(self, now_us: int) -> bool:
        """Whether its deletion time has come (which undelete can take back)."""
        return 0 < self.deletion_us <= now_us

    def describe(self) -> dict[str, Any]:
        """The part that every answer about a version shares."""
        return {
            "created_time": format_time_us(self.created_us),
            "deletion_time": format_time_us(self.deletion_us) if self.deletion_us else "",
            "destroyed": self.destroyed,
        }


class KeyMetadata(msgspec.Struct):
    """All that is known of one secret except the data. ``oldest`` stays 0 until a first version is pruned."""

    created_us: int
    updated_us: int
    current: int = 0
    oldest: int = 0
    versions: dict[int, Version] = {}
    max_versions: int = 0
    cas_required: bool = False
    delete_version_after_s: int = 0
    custom: dict[str, str] = {}

    def add_version(self, config: Config, now_us: int) -> int:
        """Add and number a version; it becomes the current one. Pruning is :meth:`prunable`'s."""
        self.current += 1
        after_s = self.delete_after_s(config)
        self.versions[self.current] = Version(now_us, now_us + after_s * 1_000_000 if after_s else 0)
        self.updated_us = now_us
        return self.current

    def delete_after_s(self, config: Config) -> int:
        """Life of a new version in seconds, 0 for ever: the shorter of the secret's and the mount's setting; a negative
        one switches it off."""
        own, mount = self.delete_version_after_s, config.delete_version_after_s
        if own < 0 or mount < 0:
            return 0
        return min(own, mount) if own and mount else own or mount

    def alive(self) -> list[int]:
        """Versions whose data is stored, deleted or not, oldest first."""
        return sorted(number for number, version in self.versions.items() if not version.destroyed)

    def prunable(self, config: Config) -> list[int]:
        """Versions, oldest first, that exceed what to keep: the secret's own setting, else the mount's, else 10."""
        keep = self.max_versions or config.max_versions or MAX_VERSIONS_DEFAULT
        return sorted(number for number in self.versions if number <= self.current - keep)

    def prune(self, numbers: list[int]) -> None:
        """Forget versions, oldest first, as :meth:`prunable` named them."""
        for number in numbers:
            del self.versions[number]
        self.oldest = max(self.oldest, numbers[-1] + 1) if numbers else self.oldest

    def describe(self) -> dict[str, Any]:
        """As ``GET metadata/<path>`` shows it."""
        return {
            "cas_required": self.cas_required,
            "created_time": format_time_us(self.created_us),
            "current_version": self.current,
            "custom_metadata": dict(self.custom) or None,
            "delete_version_after": format_duration(max(self.delete_version_after_s, 0)),
            "max_versions": self.max_versions,
            "oldest_version": self.oldest,
            "updated_time": format_time_us(self.updated_us),
            "versions": {str(number): version.describe() for number, version in sorted(self.versions.items())},
        }

    def describe_version(self, number: int) -> dict[str, Any]:
        """As data answers show one version."""
        shared = self.versions[number].describe()
        shown = {"created_time": shared["created_time"], "custom_metadata": dict(self.custom) or None}
        return shown | shared | {"version": number}


def check_cas(options: dict[str, Any], config: Config, metadata: KeyMetadata | None) -> None:
    """Refuse a write whose ``cas`` option is missing where required, or is not the current version (0: no version)."""
    if "cas" not in options:
        if config.cas_required or (metadata is not None and metadata.cas_required):
            raise InvalidRequest("check-and-set parameter required for this call")
        return
    try:
        if options["cas"] is None:
            raise ValueError
        cas = parse_int(options["cas"])
    except ValueError:
        raise InvalidRequest("error parsing check-and-set parameter") from None
    if cas != (metadata.current if metadata is not None else 0):
        raise InvalidRequest("check-and-set parameter did not match the current version")


def checked_custom(custom: dict[str, Any], *, nulls: bool) -> dict[str, str | None]:
    """Custom metadata within its limits; null values pass only where they mean removal. Raises InvalidRequest."""
    if len(custom) > CUSTOM_KEYS_MAX:
        raise InvalidRequest(
            f"custom_metadata validation failed: payload must contain at most {CUSTOM_KEYS_MAX} keys, "
            f"provided {len(custom)}"
        )
    checked: dict[str, str | None] = {}
    problems = []
    for name, value in custom.items():
        if value is None and nulls:
            checked[name] = None
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        problems += _custom_problems(name, value)
        checked[name] = value
    if problems:
        raise InvalidRequest(_multi_error([f"custom_metadata validation failed: {text}" for text in problems]))
    return checked


def _custom_problems(name: str, value: Any) -> list[str]:
    if not isinstance(value, str):
        return [f'value of key "{name}" must be a string']
    problems = []
    if not 1 <= len(name.encode()) <= CUSTOM_KEY_BYTES_MAX:
        problems.append(f"length of a key is {len(name.encode())} but must be between 1 and {CUSTOM_KEY_BYTES_MAX}")
    if not 1 <= len(value.encode()) <= CUSTOM_VALUE_BYTES_MAX:
        problems.append(
            f'length of value for key "{name}" is {len(value.encode())} but must be between 1 and '
            f"{CUSTOM_VALUE_BYTES_MAX}"
        )
    if not name.isprintable():
        problems.append("a key contains unprintable characters")
    if not value.isprintable():
        problems.append(f'value for key "{name}" contains unprintable characters')
    return problems


def _multi_error(texts: list[str]) -> str:
    count = "1 error" if len(texts) == 1 else f"{len(texts)} errors"
    return f"{count} occurred:\n" + "".join(f"\t* {text}\n" for text in texts) + "\n"
