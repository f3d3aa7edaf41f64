"""``seal "transit"``: the transit engine of another server wraps the key. Parameters as Vault documents them.

What is sent there is a random key that exists for this purpose only, never the root key (see
:mod:`sidecar.core.seal_record`): the other server alone, or the store alone, opens nothing.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import random
import ssl
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import aiohttp

from sidecar.config import TransitSealSettings
from sidecar.core.seal import KEY_BYTES
from sidecar.core.seals import SealUnavailable, Wrapped

log = logging.getLogger("core.seal")

KIND = "transit"
CALL_TIMEOUT_S = 15.0
ANSWER_BYTES_MAX = 256 * 1024
_RENEW_AT = 2 / 3  # of the token's remaining time
_RENEW_RETRY_S = (1.0, 60.0)
_LOOK_AGAIN_S = 3600.0  # at a token that never expires by itself: it may have been replaced by another rule
_ERROR_TEXT_MAX = 200


class _Refused(Exception):
    """The other server answered with an error status."""

    def __init__(self, status: int, texts: str) -> None:
        super().__init__(texts)
        self.status = status


class TransitSeal:
    """Implements :class:`sidecar.core.seals.AutoSeal`."""

    kind = KIND

    def __init__(self, settings: TransitSealSettings) -> None:
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"TransitSeal({self._settings.address}, {self.key_id})"

    @property
    def key_id(self) -> str:
        """The key's place on the other server; transit itself notes in each ciphertext which version of it wrapped."""
        settings = self._settings
        return f"{settings.key_id_prefix}{settings.mount_path}/{settings.key_name}"

    async def wrap(self, key: bytes) -> Wrapped:
        data = await self._transit("encrypt", {"plaintext": base64.b64encode(key).decode()})
        ciphertext = data.get("ciphertext")
        if not isinstance(ciphertext, str) or not ciphertext:
            raise SealUnavailable(self._text("answered without a ciphertext"))
        return Wrapped(self.key_id, ciphertext.encode())

    async def unwrap(self, wrapped: Wrapped) -> bytes:
        data = await self._transit("decrypt", {"ciphertext": wrapped.blob.decode("utf-8", "replace")})
        try:
            key = base64.b64decode(data["plaintext"], validate=True)
        except (KeyError, TypeError, ValueError, binascii.Error):
            key = b""
        if len(key) != KEY_BYTES:
            raise SealUnavailable(self._text("answered without the key"))
        return key

    async def _transit(self, operation: str, body: dict[str, str]) -> dict[str, Any]:
        settings = self._settings
        path = f"{quote(settings.mount_path)}/{operation}/{quote(settings.key_name, safe='')}"
        try:
            answer = await self._call("POST", path, body)
        except _Refused as refused:
            raise SealUnavailable(
                self._text(f'refused to {operation} with the key "{settings.key_name}": {refused.status}: {refused}')
            ) from None
        data = answer.get("data")
        return data if isinstance(data, dict) else {}

    # -- its token

    async def run(self) -> None:
        """Renew the token before it expires. Without that the seal works until the token's end, so failures are
        logged and tried again."""
        if self._settings.disable_renewal:
            return
        failures = 0
        while True:
            try:
                wait_s = await self._renew_once()
                failures = 0
            except (SealUnavailable, _Refused) as error:
                low, high = _RENEW_RETRY_S
                wait_s = min(high, low * 2**failures)
                failures += 1
                log.warning("the transit seal's token could not be renewed, next try in %.0f s: %s", wait_s, error)
            await asyncio.sleep(wait_s * random.uniform(0.9, 1.0))  # noqa: S311 - jitter

    async def _renew_once(self) -> float:
        """Look at the token and renew it where it needs that; returns when to come again, in seconds."""
        found = (await self._call("GET", "auth/token/lookup-self", None)).get("data") or {}
        ttl_s = _number(found.get("ttl"))
        if ttl_s <= 0:
            return _LOOK_AGAIN_S  # a root token
        if not found.get("renewable"):
            log.warning("the transit seal's token is not renewable and ends in %.0f s: give the seal another", ttl_s)
            return max(60.0, ttl_s * _RENEW_AT)
        renewed = (await self._call("POST", "auth/token/renew-self", {})).get("auth") or {}
        left_s = _number(renewed.get("lease_duration")) or ttl_s
        log.debug("the transit seal's token was renewed for %.0f s", left_s)
        return max(1.0, left_s * _RENEW_AT)

    # -- HTTP

    async def _call(self, method: str, path: str, body: dict[str, str] | None) -> dict[str, Any]:
        url = f"{self._settings.address}/v1/{path}"
        try:
            status, answer, location = await self._once(method, url, body)
            if status in (301, 302, 307, 308):
                # A standby that does not forward names the active node; TLS is not given up for it.
                target = urljoin(url, location)
                if url.startswith("https://") and not target.startswith("https://"):
                    raise SealUnavailable(self._text("redirected from https to http, which is not followed"))
                status, answer, _ = await self._once(method, target, body)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise SealUnavailable(self._text(f"cannot be reached: {_cause(error)}")) from None
        if status not in (200, 204):
            texts = answer.get("errors")
            said = "; ".join(str(text) for text in texts) if isinstance(texts, list) else ""
            raise _Refused(status, said[:_ERROR_TEXT_MAX].strip() or "no reason given")
        return answer

    async def _once(self, method: str, url: str, body: dict[str, str] | None) -> tuple[int, dict[str, Any], str]:
        if self._session is None:
            self._session = await self._open()
        settings = self._settings
        headers = {"X-Vault-Token": settings.token, "X-Vault-Request": "true"}
        if settings.namespace:
            headers["X-Vault-Namespace"] = settings.namespace
        name = settings.tls_server_name or None
        async with self._session.request(
            method, url, json=body, headers=headers, allow_redirects=False, server_hostname=name
        ) as response:
            raw = b""
            async for part in response.content.iter_any():
                raw += part
                if len(raw) > ANSWER_BYTES_MAX:
                    raise SealUnavailable(self._text("gave an answer that is too long"))
            return response.status, _decoded(raw), response.headers.get("Location", "")

    async def _open(self) -> aiohttp.ClientSession:
        tls = await asyncio.to_thread(self._trust)
        return aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=CALL_TIMEOUT_S),
            connector=aiohttp.TCPConnector(ssl=tls if tls is not None else True, limit=4),
        )

    def _trust(self) -> ssl.SSLContext | None:
        settings = self._settings
        if urlsplit(settings.address).scheme != "https":
            return None
        try:
            context = ssl.create_default_context(cafile=settings.tls_ca_cert or None)
            if settings.tls_client_cert:
                context.load_cert_chain(settings.tls_client_cert, settings.tls_client_key or None)
        except (OSError, ssl.SSLError) as error:
            raise SealUnavailable(f"the transit seal's TLS files cannot be used: {error}") from None
        if settings.tls_skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _text(self, problem: str) -> str:
        return f"the transit server at {self._settings.address} {problem}"


def _decoded(raw: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(raw) if raw.strip() else {}
    except (ValueError, RecursionError):
        answer = {}
    return answer if isinstance(answer, dict) else {}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def _cause(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {CALL_TIMEOUT_S:g} s"
    return str(error) if isinstance(error, aiohttp.ClientConnectorError | OSError) else type(error).__name__
