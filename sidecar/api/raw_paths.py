"""The endpoints that a node of any role answers itself, without token and envelope (see :mod:`sidecar.api.front`)."""

from __future__ import annotations

from plugin_api.description import PathDescription
from plugin_api.framework import FieldSpec, FieldType
from plugin_api.request import Operation
from sidecar.request.route_table import BOOL, INT, LIST, STRING, takes

_READ, _BOTH, _WRITE = (Operation.READ,), (Operation.READ, Operation.UPDATE), (Operation.UPDATE,)
_FLAGS = ("standbyok", "perfstandbyok")
_CODES = (
    "activecode",
    "standbycode",
    "drsecondarycode",
    "performancestandbycode",
    "sealedcode",
    "uninitcode",
    "haunhealthycode",
    "removedcode",
)
_CODE = FieldSpec(FieldType.INT, description="Status to answer with in this state.")


def _raw(
    template: str, operations: tuple[Operation, ...], text: str, fields: dict[str, FieldSpec] | None = None
) -> PathDescription:
    return PathDescription(template, operations, {}, fields or {}, help=text, open=True, raw=True)


RAW_PATHS = (
    _raw(
        "sys/health",
        _READ,
        "The state of this node, as a status code too.",
        {name: FieldSpec(BOOL) for name in _FLAGS} | dict.fromkeys(_CODES, _CODE),
    ),
    _raw("sys/seal-status", _READ, "Whether this node is sealed, and how far unsealing is."),
    _raw("sys/leader", _READ, "The active node."),
    _raw(
        "sys/init",
        _BOTH,
        "Whether the cluster is initialised; initialise it.",
        takes(
            secret_shares=INT,
            secret_threshold=INT,
            stored_shares=INT,
            pgp_keys=LIST,
            recovery_shares=INT,
            recovery_threshold=INT,
            recovery_pgp_keys=LIST,
            root_token_pgp_key=STRING,
            disable_unseal_recovery=BOOL,
        ),
    ),
    _raw("sys/unseal", _WRITE, "Give one key share.", takes(key=STRING, reset=BOOL, migrate=BOOL)),
    _raw("sys/license/features", _READ, "What the web UI shows."),
    _raw("sys/internal/ui/feature-flags", _READ, "Flags of the web UI."),
)
