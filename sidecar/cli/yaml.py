"""JSON values as block-style YAML. Pure. Whatever could be read as anything but text is quoted as in JSON."""

from __future__ import annotations

import json
import re
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./@-]*(?: [A-Za-z0-9_./@-]+)*", re.ASCII)
_NOT_TEXT = {"null", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", "inf", "infinity"}


def dump(value: Any) -> str:
    """The document, with a newline at its end."""
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        lines: list[str] = []
        for key, member in value.items():
            inner = _lines(member)
            if isinstance(member, dict | list) and member:
                indent = "" if isinstance(member, list) else "  "
                lines.append(f"{_scalar(str(key))}:")
                lines += [f"{indent}{line}" for line in inner]
            else:
                lines.append(f"{_scalar(str(key))}: {inner[0]}")
        return lines
    if isinstance(value, list) and value:
        lines = []
        for member in value:
            first, *others = _lines(member)
            lines.append(f"- {first}")
            lines += [f"  {line}" for line in others]
        return lines
    return [_scalar(value)]


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _NOT_TEXT:
        return value
    return json.dumps(value)
