"""The status code of ``sys/health`` (contract 4.1). Pure; the order of the rows is the rule."""

from __future__ import annotations

from collections.abc import Mapping

from plugin_api.errors import InvalidRequest
from sidecar.api.node_view import NodeHealth
from sidecar.request.fields import GO_BOOLEANS

_DEFAULTS = {
    "activecode": 200,
    "standbycode": 429,
    "drsecondarycode": 472,
    "sealedcode": 503,
    "uninitcode": 501,
    "haunhealthycode": 474,
}


def health_code(health: NodeHealth, query: Mapping[str, list[str]]) -> int:
    """Which status the node answers. Raises InvalidRequest without text for a parameter that cannot be read."""
    codes = {name: _code(query, name, default) for name, default in _DEFAULTS.items()}
    # Codes of states this server never has are read all the same: a bad one is refused.
    for name in ("performancestandbycode", "removedcode"):
        _code(query, name, 0)
    standby_ok = _flag(query, "standbyok")
    _flag(query, "perfstandbyok")
    if not health.initialized:
        return codes["uninitcode"]
    if health.sealed or health.stopped_reason:
        return codes["sealedcode"]  # either serves nothing before an operator has done something
    if health.standby and not health.ha_healthy:
        return codes["haunhealthycode"]
    if health.dr_mode == "secondary":
        return codes["drsecondarycode"]
    if health.standby and not standby_ok:
        return codes["standbycode"]
    return codes["activecode"]


def _code(query: Mapping[str, list[str]], name: str, default: int) -> int:
    values = query.get(name)
    if not values:
        return default
    if not (values[0].isascii() and values[0].isdigit() and 100 <= int(values[0][:4]) <= 599):
        raise InvalidRequest
    return int(values[0])


def _flag(query: Mapping[str, list[str]], name: str) -> bool:
    values = query.get(name)
    if not values:
        return False
    if values[0] == "":
        return True
    if values[0] not in GO_BOOLEANS:
        raise InvalidRequest
    return GO_BOOLEANS[values[0]]
