"""JSON documents as the engines keep them: stored text, merge patches, and key structure without values."""

from __future__ import annotations

from typing import Any

import msgspec

from plugin_api.errors import InvalidRequest, PluginError

# Made once: a decoder of a type that is no class of its own takes longer to make than a secret to read.
_decode_object = msgspec.json.Decoder(dict[str, Any]).decode


def encode_json(value: Any) -> bytes:
    """Compact JSON. Raises InvalidRequest for what JSON cannot hold (lone surrogates, too deep a nesting)."""
    try:
        return msgspec.json.encode(value)
    except (UnicodeEncodeError, RecursionError, TypeError):
        raise InvalidRequest("the data cannot be represented as JSON") from None


def decode_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that :func:`encode_json` wrote. Raises PluginError without quoting what is stored."""
    try:
        return _decode_object(raw)
    except (msgspec.DecodeError, RecursionError):
        raise PluginError("a stored value is not a JSON object") from None


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396: null removes, objects merge, anything else replaces. Neither argument is changed."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def keys_only(value: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """The same object with null for every leaf. An empty object, an array, and with ``depth`` > 0 whatever lies at that
    level, is a leaf."""
    return {
        name: keys_only(item, depth - 1 if depth else 0) if isinstance(item, dict) and item and depth != 1 else None
        for name, item in value.items()
    }
