"""Audit entries in Vault's JSON form, one object a line. Pure.

A line holds nothing but printable ASCII: control characters, line separators and text that turns direction come out
escaped, and so do the characters with a meaning to shells and to markup, so that a line is inert wherever it is
written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from http.client import responses
from typing import Any

import msgspec

from sidecar.core.audit.hashing import Hasher

_ACTIVE = re.compile(r"[<>&$`\x7f]")
_encode = msgspec.json.Encoder().encode
_ENCODER = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), allow_nan=False)
_ROOT_NAMESPACE = {"id": "root"}
_PHRASES = {
    400: "invalid request",
    403: "permission denied",
    404: "unsupported path",
    405: "unsupported operation",
    412: "required index state not present",
    429: "rate limit quota exceeded",
    500: "internal error",
}

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Formatting:
    """How one device writes. ``raw`` writes everything in clear."""

    hasher: Hasher = field(repr=False)
    raw: bool = False
    hmac_accessor: bool = True
    elide_lists: bool = False
    prefix: str = ""


@dataclass(slots=True)
class Record:
    """One event, in clear. The members of ``auth``, ``request`` and ``response`` are named as in the entry; those that
    must be hashed are known by name. ``response`` None makes a request entry. ``status`` 400 and above says that the
    request was refused, ``error`` with which text. ``clear_request`` and ``clear_response`` name the members of data
    that the mount leaves in clear, ``hashed_headers`` the request headers whose values are hashed. ``size_bytes``
    tells how much work it is to format. ``asked`` is what was formatted of the request: see :meth:`answered`."""

    time: str
    request: Fields = field(repr=False)
    auth: Fields | None = field(default=None, repr=False)
    response: Fields | None = field(default=None, repr=False)
    status: int = 200
    error: str = field(default="", repr=False)
    clear_request: Set[str] = frozenset()
    clear_response: Set[str] = frozenset()
    hashed_headers: Set[str] = frozenset()
    size_bytes: int = 0
    asked: list[Asked] = field(default_factory=list, init=False, repr=False, compare=False)

    def answered(
        self, time: str, response: Fields, *, auth: Fields | None, status: int, error: str, size_bytes: int
    ) -> Record:
        """The answer to this request. Its entry repeats the request's, which is hashed and encoded once for both."""
        record = Record(
            time,
            self.request,
            self.auth or auth,
            response,
            status,
            error,
            self.clear_request,
            self.clear_response,
            self.hashed_headers,
            size_bytes,
        )
        record.asked = self.asked
        return record


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asked, and for what, as the entries of one device have it: JSON texts."""

    how: Formatting
    auth: Fields | None = field(repr=False)
    auth_text: str
    request_text: str


def format_line(record: Record, how: Formatting) -> bytes:
    """The line of ``record`` on one device, with its newline."""
    asked = _asked(record, how)
    parts = [f'"time":{_text(record.time)},"type":"{"request" if record.response is None else "response"}"']
    if asked.auth_text:
        parts.append(f'"auth":{asked.auth_text}')
    parts.append(f'"request":{asked.request_text}')
    if record.response is not None and (response := _response(record, record.response, how)):
        parts.append(f'"response":{_text(response)}')
    if record.status >= 400:
        # An error's text may repeat what the client sent: it is hashed as data of the response.
        parts.append(f'"error":{_text(record.error if how.raw and record.error else refusal_phrase(record.status))}')
    return f"{how.prefix}{{{','.join(parts)}}}\n".encode()


def _asked(record: Record, how: Formatting) -> Asked:
    for made in record.asked:
        if made.how is how and made.auth is record.auth:
            return made
    hashes: dict[str, str] = {}  # token and accessor stand in both
    auth = _auth(record.auth, how, hashes)
    made = Asked(how, record.auth, _text(auth) if auth else "", _text(_request(record, how, hashes)))
    record.asked.append(made)
    return made


def refusal_phrase(status: int) -> str:
    """What is said in clear about a refused request: its kind, in the shape of joined errors."""
    phrase = _PHRASES.get(status) or responses.get(status, "error").lower()
    return f"1 error occurred:\n\t* {phrase}\n\n"


def format_test(time: str, request_id: str, prefix: str) -> bytes:
    """The line that a new device must take before it is enabled."""
    request = {"id": request_id, "operation": "update", "namespace": _ROOT_NAMESPACE, "path": "sys/audit/test"}
    line = _text({"time": time, "type": "request", "auth": {"token_type": "default"}, "request": request})
    return f"{prefix}{line}\n".encode()


def _auth(auth: Fields | None, how: Formatting, hashes: dict[str, str]) -> dict[str, Any]:
    if auth is None:
        return {}
    return _present({**auth, **_secrets(auth, how, ("client_token",), ("accessor",), hashes)})


def _request(record: Record, how: Formatting, hashes: dict[str, str]) -> dict[str, Any]:
    request = dict(record.request)
    request["namespace"] = _ROOT_NAMESPACE
    request |= _secrets(request, how, ("client_token",), ("client_token_accessor",), hashes)
    token = record.request.get("client_token", "")
    if token and not how.raw and token in request["path"]:
        request["path"] = request["path"].replace(token, request["client_token"])
    request["data"] = _data(request.get("data"), how, record.clear_request)
    headers = request.get("headers")
    if headers and not how.raw:
        request["headers"] = {
            name: [how.hasher.text(value) if name in record.hashed_headers else value for value in values]
            for name, values in headers.items()
        }
    return _present(request)


def _response(record: Record, response: Fields, how: Formatting) -> dict[str, Any]:
    shown = dict(response)
    data = response.get("data")
    if record.error:
        data = {"error": record.error, **(data or {})}
    if how.elide_lists and record.request.get("operation") == "list":
        data = _elided(data)
    shown["data"] = _data(data, how, record.clear_response)
    if data and not how.hmac_accessor and isinstance(data.get("accessor"), str):
        shown["data"]["accessor"] = data["accessor"]
    shown["auth"] = _auth(response.get("auth"), how, {})
    wrapping = response.get("wrap_info")
    if wrapping:
        hashed = _secrets(wrapping, how, ("token",), ("accessor", "wrapped_accessor"), {})
        shown["wrap_info"] = _present({**wrapping, **hashed})
    return _present(shown)


def _secrets(
    fields: Fields, how: Formatting, tokens: tuple[str, ...], accessors: tuple[str, ...], hashes: dict[str, str]
) -> dict[str, str]:
    """Those of the named members that are there, hashed as the device wants it. ``hashes`` are those known already."""
    if how.raw:
        return {}
    hashed = {}
    for name in tokens + accessors if how.hmac_accessor else tokens:
        text = fields.get(name)
        if text:
            if text not in hashes:
                hashes[text] = how.hasher.text(text)
            hashed[name] = hashes[text]
    return hashed


def _data(data: Fields | None, how: Formatting, clear: Set[str]) -> dict[str, Any]:
    if not data:
        return {}
    return dict(data) if how.raw else dict(how.hasher.values(data, clear))


def _elided(data: Fields | None) -> Fields | None:
    """Lists of names as their length: they can be long, and hashes of names tell little."""
    if data is None:
        return None
    shorter = dict(data)
    if isinstance(shorter.get("keys"), list):
        shorter["keys"] = len(shorter["keys"])
    if isinstance(shorter.get("key_info"), Mapping):
        shorter["key_info"] = len(shorter["key_info"])
    return shorter


def _present(fields: Fields) -> dict[str, Any]:
    """Without what says nothing; False stays, for it says something."""
    return {name: value for name, value in fields.items() if value or value is False}


def _text(value: Any) -> str:
    """As inert JSON."""
    try:
        text = _encode(value).decode()
    except (OverflowError, UnicodeEncodeError):  # numbers and surrogates that only the slower encoder can write
        text = ""
    if not text or not text.isascii():
        text = _ENCODER.encode(value)
    return _ACTIVE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
