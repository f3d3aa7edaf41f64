"""From an HTTP request to a call: verb, parameters, token, wrapping (contract 5.2, 5.5)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from plugin_api.errors import InvalidRequest, PluginError
from plugin_api.formats import parse_duration_s
from plugin_api.request import Operation
from sidecar.api import json_codec
from sidecar.request.call import Call
from sidecar.request.fields import GO_BOOLEANS
from sidecar.request.types import HttpRequest

_THREAD_BYTES_MIN = 64 * 1024
_FORM_FIELDS_MAX = 1000
_MERGE_PATCH = "application/merge-patch+json"
_WRITES = frozenset({Operation.UPDATE, Operation.PATCH})
_OPERATIONS = {
    "LIST": Operation.LIST,
    "POST": Operation.UPDATE,
    "PUT": Operation.UPDATE,
    "PATCH": Operation.PATCH,
    "DELETE": Operation.DELETE,
}


class MethodNotAllowed(PluginError):
    """405 with an empty list of errors."""

    status = 405


# Of these the nonce stands in the body; a body of any other DELETE is not looked at.
_DELETED_WITH_A_BODY = frozenset(
    {
        "sys/generate-root/attempt",
        "sys/rekey-recovery-key/init",
        "sys/rekey/init",
        "sys/replication/dr/secondary/generate-operation-token/attempt",
    }
)


class UnsupportedMediaType(PluginError):
    """415."""

    status = 415


class UnknownPath(PluginError):
    """404 with an empty list of errors."""

    status = 404


async def decode(request: HttpRequest, request_id: str) -> Call:
    """The call of ``request``. Raises PluginError, JSONRefused."""
    operation, wants_help = _operation(request)
    path = request.path
    if not path.strip("/"):
        raise UnknownPath
    if operation in _WRITES and path.endswith("/"):
        raise InvalidRequest("cannot write to a path ending in '/'")
    if operation is Operation.LIST and not path.endswith("/"):
        path += "/"
    data = await _body(request, operation) if operation in _WRITES else query_data(request.query)
    if operation is Operation.DELETE and path in _DELETED_WITH_A_BODY and request.body.lstrip()[:1] == b"{":
        data = {**json_codec.decode_object(request.body), **data}
    return Call(
        operation=operation,
        path=path,
        data=data,
        id=request_id,
        token=client_token(request),
        remote_address=request.remote_address,
        remote_port=request.remote_port,
        wants_help=wants_help,
        wrap_ttl_s=_wrap_ttl_s(request),
        wrap_jwt=request.headers.get("X-Vault-Wrap-Format", "").lower() == "jwt",
        forwarded_auth=request.forwarded_auth,
        body_bytes=len(request.body),
        headers=request.headers,
    )


def client_token(request: HttpRequest) -> str:
    """The caller's token, from either header it may come in; empty if there is none."""
    token = request.headers.get("X-Vault-Token", "")
    if token:
        return token.strip()
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    return credentials.strip() if scheme.lower() == "bearer" else ""


def query_data(query: Mapping[str, list[str]]) -> dict[str, Any]:
    """Query parameters as the data of a read; those that steer the request itself are left out."""
    return {
        name: values[0] if len(values) == 1 else values
        for name, values in query.items()
        if name not in ("list", "help")
    }


def _operation(request: HttpRequest) -> tuple[Operation, bool]:
    method = request.method
    if method in ("GET", "HEAD"):
        if not request.query:
            return Operation.READ, False
        if _flag(request, "help"):
            return Operation.READ, True
        return (Operation.LIST if _flag(request, "list") else Operation.READ), False
    operation = _OPERATIONS.get(method)
    if operation is None:
        raise MethodNotAllowed
    return operation, False


def _flag(request: HttpRequest, name: str) -> bool:
    """A boolean query parameter. Raises InvalidRequest without text for anything that is none."""
    values = request.query.get(name)
    if not values or not values[0]:
        return False
    if values[0] not in GO_BOOLEANS:
        raise InvalidRequest
    return GO_BOOLEANS[values[0]]


async def _body(request: HttpRequest, operation: Operation) -> dict[str, Any]:
    body = request.body
    content_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if operation is Operation.PATCH and content_type != _MERGE_PATCH:
        raise UnsupportedMediaType(f"PATCH requires Content-Type of {_MERGE_PATCH}")
    # Tools send JSON under the content type of a form: what the body begins with decides.
    is_json = body.lstrip()[:1] in (b"", b"{", b"[") or body.strip() == b"null"
    if not is_json and content_type == "application/x-www-form-urlencoded":
        return _form(body)
    if len(body) < _THREAD_BYTES_MIN:
        return json_codec.decode_object(body)
    return await asyncio.to_thread(json_codec.decode_object, body)


def _form(body: bytes) -> dict[str, Any]:
    """A form; repeated keys are joined with commas."""
    try:
        pairs = parse_qsl(
            body.decode("utf-8"), keep_blank_values=True, errors="strict", max_num_fields=_FORM_FIELDS_MAX
        )
    except ValueError:
        raise InvalidRequest("error parsing form data") from None
    fields: dict[str, list[str]] = {}
    for name, value in pairs:
        fields.setdefault(name, []).append(value)
    return {name: ",".join(values) for name, values in fields.items()}


def _wrap_ttl_s(request: HttpRequest) -> int:
    text = request.headers.get("X-Vault-Wrap-TTL", "").strip()
    if not text:
        return 0
    try:
        seconds = parse_duration_s(text)
    except ValueError as error:
        raise InvalidRequest(f"error parsing X-Vault-Wrap-TTL header: {error}") from None
    if seconds < 0:
        raise InvalidRequest("requested wrap ttl cannot be negative")
    return seconds
