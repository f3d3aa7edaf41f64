"""The bodies of the API's answers (contract 5.3, 5.4). Pure: values in, dictionaries in the right key order out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TOP_LEVEL = frozenset(
    {
        "sys/audit",
        "sys/auth",
        "sys/config/auditing/request-headers",
        "sys/config/cors",
        "sys/capabilities",
        "sys/capabilities-accessor",
        "sys/capabilities-self",
        "sys/ha-status",
        "sys/key-status",
        "sys/mounts",
        "sys/policy",
        "sys/rekey-recovery-key/backup",
        "sys/rekey/backup",
        "sys/rekey/recovery-key-backup",
        "sys/remount",
        "sys/rotate",
        "sys/wrapping/wrap",
    }
)
"""Paths whose data is repeated beside the envelope; old and new clients read it there."""
_TOP_LEVEL_BELOW = (
    "sys/audit/",
    "sys/audit-hash/",
    "sys/auth/",
    "sys/config/auditing/request-headers/",
    "sys/mounts/",
    "sys/policy/",
)


def repeats_data(path: str) -> bool:
    """Whether the members of ``data`` are repeated at the top level of the answer to ``path``."""
    trimmed = path.rstrip("/")
    return trimmed in TOP_LEVEL or trimmed.startswith(_TOP_LEVEL_BELOW)


def success(
    request_id: str,
    data: Mapping[str, Any] | None,
    *,
    auth: Mapping[str, Any] | None = None,
    wrap_info: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    lease_id: str = "",
    lease_duration_s: int = 0,
    renewable: bool = False,
    mount_type: str = "",
    path: str = "",
) -> dict[str, Any]:
    """The standard envelope. ``path`` decides about the repetition of ``data``."""
    body: dict[str, Any] = {
        "request_id": request_id,
        "lease_id": lease_id,
        "renewable": renewable,
        "lease_duration": lease_duration_s,
        "data": data,
        "wrap_info": wrap_info,
        "warnings": list(warnings) or None,
        "auth": auth,
    }
    if mount_type:
        body["mount_type"] = mount_type
    if data and repeats_data(path):
        return {**{name: value for name, value in data.items() if name not in body}, **body}
    return body


def errors(texts: Iterable[str], warnings: Sequence[str] = ()) -> dict[str, Any]:
    """``{"errors": […]}``; a text may not be empty, so none at all is the empty list."""
    body: dict[str, Any] = {"errors": [text for text in texts if text]}
    if warnings:
        body["warnings"] = list(warnings)
    return body


def multi_error(text: str) -> str:
    """One error in the shape that clients know from joined errors."""
    return f"1 error occurred:\n\t* {text}\n\n"


ZERO_TIME = "0001-01-01T00:00:00Z"
"""Go's zero time: *never*, or *not active*."""
