"""The OpenAPI document, made from the tables that the requests themselves are routed by. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from plugin_api.description import PathDescription
from plugin_api.framework import FieldSpec, FieldType
from plugin_api.request import Operation

OPENAPI_VERSION = "3.0.2"
TITLE = "Outrider: Vault-compatible API"
_METHODS = {
    Operation.READ: "get",
    Operation.LIST: "get",
    Operation.UPDATE: "post",
    Operation.PATCH: "patch",
    Operation.DELETE: "delete",
}
_IN_BODY = frozenset({Operation.UPDATE, Operation.PATCH})
_WHOLE = frozenset({".*", ".+", "[^/]+"})
"""Expressions that say nothing more than that there is something."""
_DURATION = {"oneOf": [{"type": "integer"}, {"type": "string"}]}
_SCHEMAS: Mapping[FieldType, Mapping[str, Any]] = {
    FieldType.STRING: {"type": "string"},
    FieldType.INT: {"type": "integer"},
    FieldType.BOOL: {"type": "boolean"},
    FieldType.DURATION_S: _DURATION,
    FieldType.SIGNED_DURATION_S: _DURATION,
    FieldType.LIST: {"type": "array", "items": {"type": "string"}},
    FieldType.INT_LIST: {"type": "array", "items": {"type": "integer"}},
    FieldType.MAP: {"type": "object"},
    FieldType.ANY: {},
}


@dataclass(frozen=True, slots=True)
class MountDescription:
    """A mount's paths; ``path`` ends in ``/``, or is empty for paths that belong to none."""

    path: str
    type: str
    paths: tuple[PathDescription, ...]


def document(mounts: Iterable[MountDescription], version: str, *, generic: bool = False) -> dict[str, Any]:
    """The document. With ``generic``, mounts that can lie anywhere are shown under ``{…_mount_path}``."""
    paths: dict[str, dict[str, Any]] = {}
    shapes: dict[str, str] = {}
    for mount in mounts:
        prefix, parameters = _prefix(mount, generic=generic)
        for description in mount.paths:
            for path, method, operation in _operations(mount, prefix, parameters, description):
                # Two templates that differ in the names of their parameters only are one path to a client.
                known = shapes.setdefault(re.sub(r"\{\w+\}", "{}", path), path)
                if known == path:
                    paths.setdefault(path, {}).setdefault(method, operation)
    return {
        "openapi": OPENAPI_VERSION,
        "info": {
            "title": TITLE,
            "description": "HTTP API of this server, as it is mounted now.",
            "version": version,
        },
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": _components(), "securitySchemes": _security_schemes()},
    }


def matching(mount: MountDescription, rest: str) -> MountDescription:
    """``mount`` with those paths alone that serve ``rest``."""
    found = tuple(one for one in mount.paths if path_regex(one.template, one.parameters).fullmatch(rest.rstrip("/")))
    return MountDescription(mount.path, mount.type, found)


def path_regex(template: str, parameters: Mapping[str, str]) -> re.Pattern[str]:
    """What a template stands for."""
    pieces = re.split(r"\{(\w+)\}", template)
    pattern = "".join(
        f"(?:{parameters[piece]})" if place % 2 else re.escape(piece) for place, piece in enumerate(pieces)
    )
    return re.compile(pattern, re.DOTALL)


def _prefix(mount: MountDescription, *, generic: bool) -> tuple[str, list[dict[str, Any]]]:
    """Where a mount's paths begin, and the parameters of that place."""
    fixed = mount.path in ("", "sys/", "auth/token/", "cubbyhole/")
    if fixed or not generic:
        return "/" + mount.path, []
    name = f"{mount.type}_mount_path"
    parameter = {
        "name": name,
        "in": "path",
        "required": True,
        "description": "Path that the mount was enabled at.",
        "schema": {"type": "string", "default": mount.path.removeprefix("auth/").rstrip("/")},
    }
    return f"/{'auth/' if mount.path.startswith('auth/') else ''}{{{name}}}/", [parameter]


def _operations(
    mount: MountDescription, prefix: str, parameters: list[dict[str, Any]], description: PathDescription
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    in_path = parameters + [_path_parameter(name, regex) for name, regex in description.parameters.items()]
    for operation in description.operations:
        path = prefix + description.template
        if operation is Operation.LIST:
            # A path of its own: reading and listing are both GET, told apart by the query and the final slash.
            path = path.rstrip("/") + "/"
        yield path, _METHODS[operation], _operation(mount, path, operation, description, in_path)


def _operation(
    mount: MountDescription,
    path: str,
    operation: Operation,
    description: PathDescription,
    in_path: list[dict[str, Any]],
) -> dict[str, Any]:
    parameters = list(in_path)
    made: dict[str, Any] = {
        "operationId": _operation_id(operation, path),
        "summary": description.help,
        "tags": [mount.type],
    }
    if operation is Operation.LIST:
        parameters.append(_query("list", {"type": "string", "enum": ["true"]}, required=True))
    elif operation in _IN_BODY:
        if description.fields or description.free_form:
            made["requestBody"] = _body(operation, description)
    else:
        written = not _IN_BODY.isdisjoint(description.operations)
        parameters += [
            _query(name, _schema(spec))
            for name, spec in description.fields.items()
            if not written or operation in spec.query_of
        ]
    if parameters:
        made["parameters"] = parameters
    made["responses"] = _responses(description)
    made["security"] = [] if description.open else [{"token": []}, {"bearer": []}]
    if description.sudo:
        made["x-vault-sudo"] = True
    if description.open:
        made["x-vault-unauthenticated"] = True
    return made


def _operation_id(operation: Operation, path: str) -> str:
    # A hyphen within a word and the end of a segment stay apart: there are paths that differ in nothing else.
    words = re.sub(r"\{(\w+)\}", r"by_\1", path.lower().replace("-", "_"))
    return f"{operation.value}-{words.strip('/').replace('/', '-')}"


def _path_parameter(name: str, regex: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string", "minLength": 1}
    if regex not in _WHOLE:
        schema["pattern"] = f"^(?:{regex})$"
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _query(name: str, schema: Mapping[str, Any], *, required: bool = False) -> dict[str, Any]:
    parameter = {"name": name, "in": "query", "schema": dict(schema)}
    return parameter | ({"required": True} if required else {})


def _schema(spec: FieldSpec) -> dict[str, Any]:
    schema = dict(_SCHEMAS[spec.type])
    if spec.description:
        schema["description"] = spec.description
    if spec.default is not None:
        schema["default"] = spec.default
    return schema


def _body(operation: Operation, description: PathDescription) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    if description.fields:
        schema["properties"] = {name: _schema(spec) for name, spec in description.fields.items()}
    media = "application/merge-patch+json" if operation is Operation.PATCH else "application/json"
    return {"content": {media: {"schema": schema}}}


def _responses(description: PathDescription) -> dict[str, Any]:
    errors = _answer("The request was refused.", _json({"$ref": "#/components/schemas/Errors"}))
    if description.content_type != "application/json":
        good = _answer("OK", {description.content_type: {"schema": {"type": "string"}}})
    elif description.raw:
        good = _answer("OK", _json({"type": "object"}))
    else:
        good = _answer("OK", _json({"$ref": "#/components/schemas/Envelope"}))
    refused = _answer(
        "The request was refused, or there is nothing.",
        _json({"anyOf": [{"$ref": "#/components/schemas/Errors"}, {"$ref": "#/components/schemas/Envelope"}]}),
    )
    return {
        "200": good,
        "202": _answer("Accepted: it is done in the background.", good["content"]),
        "204": {"description": "Done; there is nothing to say."},
        "4XX": refused,
        "5XX": errors,
    }


def _answer(text: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": content}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _components() -> dict[str, Any]:
    texts = {"type": "array", "items": {"type": "string"}}
    thing = {"type": "object", "nullable": True}
    return {
        "Envelope": {
            "type": "object",
            "required": ["request_id", "lease_id", "renewable", "lease_duration", "data", "wrap_info", "auth"],
            "properties": {
                "request_id": {"type": "string"},
                "lease_id": {"type": "string"},
                "renewable": {"type": "boolean"},
                "lease_duration": {"type": "integer"},
                "data": thing,
                "wrap_info": thing,
                "warnings": {**texts, "nullable": True},
                "auth": thing,
                "mount_type": {"type": "string"},
            },
        },
        "Errors": {
            "type": "object",
            "required": ["errors"],
            "properties": {"errors": texts, "warnings": texts},
            "additionalProperties": False,
        },
    }


def _security_schemes() -> dict[str, Any]:
    return {
        "token": {"type": "apiKey", "in": "header", "name": "X-Vault-Token"},
        "bearer": {"type": "http", "scheme": "bearer"},
    }
