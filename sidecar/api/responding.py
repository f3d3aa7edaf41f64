"""From a backend's answer to a response: envelope, wrapping, and the shapes that have none (contract 5.3, 5.5)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from multidict import CIMultiDict

from plugin_api.errors import InvalidRequest, ReadOnlyStorage
from plugin_api.formats import format_time
from sidecar.api import envelopes, json_codec
from sidecar.core.wrapping import WrapInfo, Wrapping
from sidecar.request.call import Answer, Call
from sidecar.request.types import HttpResponse


class Responder:
    """Makes the responses of one tenure. ``api_addr`` goes into wrapping tokens that name their server."""

    def __init__(self, wrapping: Wrapping, api_addr: str) -> None:
        self._wrapping = wrapping
        self._api_addr = api_addr

    async def respond(self, call: Call, answer: Answer) -> HttpResponse:
        """The response to ``call``. Raises PluginError where it cannot be wrapped."""
        response = await self._respond(call, answer)
        response.headers.update(answer.headers)
        return response

    async def _respond(self, call: Call, answer: Answer) -> HttpResponse:
        if answer.plain is not None or answer.stream is not None:
            headers = CIMultiDict({"Content-Type": answer.content_type})
            return HttpResponse(answer.status, headers, answer.plain or b"", stream=answer.stream)
        if answer.raw is not None:
            return _json(answer.status, answer.raw)
        if answer.stored is not None:
            return _json(200, {**answer.stored, "request_id": call.id})
        if answer.wrap_info is not None:
            return _json(200, envelopes.success("", None, wrap_info=_wrap_info(answer.wrap_info)))
        if answer.status >= 400 and answer.is_empty:
            return _json(answer.status, envelopes.errors(()))
        if answer.is_empty:
            return HttpResponse(204 if answer.status == 200 else answer.status)
        envelope = self._envelope(call, answer)
        asked_ttl_s = 0 if call.forwarded_auth is not None else call.wrap_ttl_s
        if answer.status >= 400 or not (asked_ttl_s or answer.wrap):
            return _json(answer.status, envelope)
        ttl_s = asked_ttl_s
        if answer.wrap is not None:
            ttl_s = min(answer.wrap.ttl_s, asked_ttl_s or answer.wrap.ttl_s)
        return await self.wrapped(
            call,
            envelope,
            ttl_s,
            jwt=answer.wrap is not None and answer.wrap.jwt,
            claims=answer.wrap.claims if answer.wrap is not None else {},
            accessor=str((answer.auth or {}).get("accessor", "")),
        )

    def _envelope(self, call: Call, answer: Answer) -> dict[str, Any]:
        return envelopes.success(
            call.id,
            answer.data,
            auth=answer.auth,
            warnings=answer.warnings,
            lease_id=answer.lease_id,
            lease_duration_s=answer.lease_duration_s,
            renewable=answer.renewable,
            mount_type=answer.mount_type,
            path=call.path,
        )

    async def wrapped(
        self,
        call: Call,
        envelope: dict[str, Any],
        ttl_s: int,
        *,
        jwt: bool = False,
        claims: Mapping[str, Any] | None = None,
        accessor: str = "",
    ) -> HttpResponse:
        """``envelope`` behind a wrapping token. Raises InvalidRequest."""
        try:
            info = await self._wrapping.wrap(
                envelope,
                ttl_s,
                call.path,
                jwt=jwt or call.wrap_jwt,
                api_addr=self._api_addr,
                extra_claims=claims,
                wrapped_accessor=accessor,
            )
        except ReadOnlyStorage:
            # The request itself has been carried out: it must not be forwarded for the sake of its wrapping.
            raise InvalidRequest("wrapping as a JWT needs a key that only the primary can make") from None
        warnings = envelope.get("warnings") or ()
        return _json(200, envelopes.success("", None, wrap_info=_wrap_info(info), warnings=warnings))


def _wrap_info(info: WrapInfo) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "token": info.token,
        "accessor": info.accessor,
        "ttl": info.ttl_s,
        "creation_time": format_time(info.creation_time_s),
        "creation_path": info.creation_path,
    }
    return fields | ({"wrapped_accessor": info.wrapped_accessor} if info.wrapped_accessor else {})


def _json(status: int, body: dict[str, Any]) -> HttpResponse:
    return HttpResponse(status, body=json_codec.encode(body))


def with_warnings(response: HttpResponse, warnings: Sequence[str]) -> HttpResponse:
    """``response`` with more entries in ``warnings``. An empty one (204) becomes an envelope, which a warning needs;
    errors and bodies that are no envelope pass unchanged."""
    if not warnings or response.status >= 300 or response.stream is not None:
        return response
    if response.body:
        try:
            envelope = json_codec.decode_object(response.body)
        except json_codec.JSONRefused:
            return response
        if "warnings" not in envelope:
            return response
    else:
        envelope = envelopes.success(str(uuid.uuid4()), None)
    envelope["warnings"] = [*(envelope["warnings"] or ()), *warnings]
    made = _json(200 if response.status == 204 else response.status, envelope)
    made.headers.extend(response.headers)
    made.position = response.position
    return made
