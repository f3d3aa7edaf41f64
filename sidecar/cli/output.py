"""What a command prints: Vault's tables, JSON, YAML, or one field. Pure text in, text out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

FORMATS = ("table", "json", "yaml", "raw", "pretty")
GAP = 4  # blanks between columns
Row = Sequence[Any]


def go_text(value: Any) -> str:
    """A value as Go's ``%v`` prints it, which is what Vault's tables show."""
    if value is None:
        return "<nil>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{' '.join(map(go_text, value))}]"
    if isinstance(value, Mapping):
        return f"map[{' '.join(f'{key}:{go_text(value[key])}' for key in sorted(value))}]"
    return str(value)


def human_duration(seconds: float) -> str:
    """``2764800`` as ``768h``, ``90`` as ``1m30s``."""
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, remaining = divmod(rest, 60)
    parts = [f"{hours}h" if hours else "", f"{minutes}m" if minutes else "", f"{remaining}s" if remaining else ""]
    return "".join(parts) or "0s"


def table(header: Row, rows: Sequence[Row]) -> str:
    """Columns under a header and dashes; an empty text shows as ``n/a``."""
    lines = [[str(cell) for cell in header], ["-" * len(str(cell)) for cell in header]]
    lines += [[(cell if isinstance(cell, str) else go_text(cell)) or "n/a" for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "".join(cell.ljust(width + GAP) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def pairs(rows: Sequence[Row]) -> str:
    """A table of keys and values."""
    return table(("Key", "Value"), rows)


def heading(text: str, width: int) -> str:
    """A heading centred over ``width`` columns, in equal signs of which at least two are on either side."""
    signs = width - (len(text) + 2)
    side = "=" * ((signs + 1) // 2 if signs > 0 else 2)
    return f"{side} {text} {side}"


def title(text: str, keys: Sequence[str]) -> str:
    """A heading over a table of pairs with these keys; the values' widths do not count, as in Vault."""
    return heading(text, max(map(len, keys), default=0) + GAP + len("Value"))


def encode(value: Any, form: str) -> str:
    """A JSON value as ``json``, ``yaml`` or, indented like JSON, anything else; without the last newline."""
    if form == "yaml":
        from sidecar.cli import yaml

        return yaml.dump(value).rstrip("\n")
    return json.dumps(value, indent=2, ensure_ascii=False)


def envelope(body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer as Vault's CLI shows it: fixed order, ``auth`` and ``wrap_info`` only where there is one."""
    names = ["request_id", "lease_id", "lease_duration", "renewable", "data", "warnings"]
    shown = {name: body.get(name) for name in names}
    shown.update({name: body[name] for name in ("auth", "wrap_info") if body.get(name)})
    return shown


_SECRET = ("request_id", "lease_id", "lease_duration", "renewable", "data", "warnings", "auth", "wrap_info")


def as_secret(body: dict[str, Any]) -> dict[str, Any]:
    """An answer without an envelope, such as that of ``sys/seal-status``, as one whose data it all is."""
    if not body or any(body.get(name) for name in _SECRET):
        return body
    return {"request_id": "", "lease_id": "", "lease_duration": 0, "renewable": False, "data": body, "warnings": None}


def secret_rows(body: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Keys and values of an answer: lease, token, wrapping and data, in Vault's order and under its names."""
    rows: list[tuple[str, Any]] = []
    duration = body.get("lease_duration") or 0
    if body.get("lease_id"):
        rows += [("lease_id", body["lease_id"]), ("lease_duration", human_duration(duration))]
        rows += [("lease_renewable", bool(body.get("renewable")))]
    elif duration:
        rows.append(("refresh_interval", human_duration(duration)))
    auth = body.get("auth")
    if auth:
        rows += auth_rows(auth)
    wrap = body.get("wrap_info")
    if wrap:
        rows += [
            ("wrapping_token:", wrap.get("token", "")),
            ("wrapping_accessor:", wrap.get("accessor", "")),
            ("wrapping_token_ttl:", human_duration(wrap.get("ttl") or 0)),
            ("wrapping_token_creation_time:", wrap.get("creation_time", "")),
            ("wrapping_token_creation_path:", wrap.get("creation_path", "")),
        ]
        if wrap.get("wrapped_accessor"):
            rows.append(("wrapped_accessor:", wrap["wrapped_accessor"]))
    data = body.get("data") or {}
    rows += [(key, data[key]) for key in sorted(data)]
    return rows


def auth_rows(auth: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """A token as ``login`` and ``token create`` show it."""

    def quoted(names: Sequence[str] | None) -> str:
        return f"[{' '.join(json.dumps(name) for name in names or ())}]"

    duration = auth.get("lease_duration") or 0
    rows: list[tuple[str, Any]] = [
        ("token", auth.get("client_token", "")),
        ("token_accessor", auth.get("accessor", "")),
        ("token_duration", human_duration(duration) if duration else "\N{INFINITY}"),
        ("token_renewable", bool(auth.get("renewable"))),
        ("token_policies", quoted(auth.get("token_policies") or auth.get("policies"))),
        ("identity_policies", quoted(auth.get("identity_policies"))),
        ("policies", quoted(auth.get("policies"))),
    ]
    return rows + [(f"token_meta_{key}", value) for key, value in sorted((auth.get("metadata") or {}).items())]


def field_of(body: Mapping[str, Any], name: str) -> Any:
    """One field of an answer, looked up in its data and then among the names of its table. Raises KeyError."""
    data = body.get("data") or {}
    if name in data:
        return data[name]
    named = {key.rstrip(":"): value for key, value in secret_rows(body)}
    return named[name]


def raw_field(value: Any, form: str) -> str:
    """A single value: text as it is, the rest as JSON."""
    if form in ("json", "yaml"):
        return encode(value, form)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
