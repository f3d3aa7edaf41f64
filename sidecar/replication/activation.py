"""Activation: how a cluster becomes a secondary, or finds another primary, with nothing but one token.

On the primary, :func:`build_bundle` makes a client certificate for the new secondary; the bundle goes behind a
single-use wrapping token and its private key is kept nowhere. On the secondary, :func:`activate` reads the token,
checks where the wrapped bundle came from, unwraps it (which consumes it), checks that its authority is the one the
token names, and asks the primary over the cluster port for keyrings, root key and seal record. Nothing local changes
before that succeeded; what it returns is all that a new store generation needs, or a secondary that is pointed at
another primary.

The token is a JWT that the secondary has no key to verify. What protects it is TLS to the primary's API during the
unwrap; what it *says* is nevertheless held to one algorithm, one type and exact claims, so that no other token passes
for one.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from plugin_api.errors import InvalidRequest, PluginError, Unavailable
from sidecar.replication.history import Epoch, Promotion, epoch_of
from sidecar.replication.modes import MODES, PERFORMANCE, Mode
from sidecar.replication.roles import SecondaryRole, encode_role
from sidecar.replication.sealed_token import ActivationKey, is_sealed, open_bundle
from sidecar.replication.selection import EVERYTHING, NOTHING
from sidecar.transport import certificates
from sidecar.transport.certificates import Credentials
from sidecar.transport.forwarding import MalformedMessage, decode, encode
from sidecar.transport.peer import (
    PeerAnswer,
    PeerClient,
    PeerIdentity,
    PeerOutcomeUnknown,
    PeerUnreachable,
    read_answer,
)

BOOTSTRAP_PATH = "/bootstrap"
VERSIONS = (2,)
LEEWAY_S = 60
OTHER_SET = (
    "the token was issued by a primary of another replication set: disable replication here and enable this cluster as "
    "its secondary, which replaces everything it holds; the token is used up"
)
TOKEN_BYTES_MAX = 16 * 1024
_KEY_HEADERS = frozenset({"jku", "jwk", "kid", "x5u", "x5c", "x5t", "x5t#S256"})
BUNDLE_BYTES_MAX = 256 * 1024
BOOTSTRAP_BYTES_MAX = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ActivationRequest:
    """What a cluster that is to follow another one is given. Empty texts mean the token's own address and the system's
    authorities."""

    token: str = field(repr=False)
    primary_api_addr: str = ""
    ca_file: str = ""
    ca_path: str = ""


@dataclass(frozen=True, slots=True)
class ActivationToken:
    """What the JWT says. ``wrapping_token`` is the real secret."""

    wrapping_token: str = field(repr=False)
    api_addr: str
    ca_sha256: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """What was wrapped: where the primary is, whom to trust, and who we are to it."""

    secondary_id: str
    set_id: str
    epoch: Epoch
    primary_cluster_addr: str
    authority_pem: bytes
    credentials: Credentials


class BootstrapRequest(msgspec.Struct, frozen=True):
    """``POST /bootstrap``: the secondary claims its activation for the store it is about to build."""

    versions: tuple[int, ...]
    secondary_id: str
    set_id: str
    epoch: Epoch
    store_id: str


class BootstrapReply(msgspec.Struct, frozen=True):
    """The keys to the primary's data. ``keyrings`` (by logical key) and ``seal`` are the raw entries, still wrapped by
    the root key and by the unseal key; ``root_key`` is bare and travels inside mutual TLS only."""

    version: int
    set_id: str
    epoch: Epoch
    root_key: bytes
    keyrings: dict[str, bytes]
    seal: bytes
    api_addr: str
    cluster_addrs: tuple[str, ...]
    history: tuple[Promotion, ...]

    def __repr__(self) -> str:
        return f"BootstrapReply(set {self.set_id})"


@dataclass(frozen=True, slots=True)
class ActivationResult:
    """All that the secondary's new store generation is made of: keys, and its role. ``keyrings`` are raw entries by
    logical key. ``protected`` says whether the unwrap went over TLS."""

    mode: Mode
    root_key: bytes = field(repr=False)
    keyrings: Mapping[str, bytes] = field(repr=False)
    seal: bytes = field(repr=False)
    role: SecondaryRole
    protected: bool = True

    @property
    def entries(self) -> Mapping[str, bytes]:
        """Plaintext entries of the new store by logical key."""
        return {self.mode.role_key: encode_role(self.role)}


def build_bundle(
    authority: Credentials,
    *,
    secondary_id: str,
    set_id: str,
    epoch: Epoch,
    primary_cluster_addr: str,
    validity: timedelta = certificates.VALIDITY,
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(payload to wrap, extra JWT claims, fingerprint of the new client certificate).

    Takes milliseconds of CPU: run it in a thread. The private key is in the payload and nowhere else; its numbers are
    decimal strings because they are longer than any JSON number that parsers agree on.
    """
    client = certificates.issue_client(authority, secondary_id, validity=validity)
    x, y, d = certificates.key_numbers(client.key_pem)
    authority_der = certificates.pem_to_der(authority.certificate_pem)
    payload = {
        "id": secondary_id,
        "cluster_id": set_id,
        "epoch": {"number": epoch.number, "id": epoch.id},
        "primary_cluster_addr": primary_cluster_addr,
        "ca_cert": base64.b64encode(authority_der).decode("ascii"),
        "client_cert": base64.b64encode(certificates.pem_to_der(client.certificate_pem)).decode("ascii"),
        "client_key": {"type": "p521", "x": str(x), "y": str(y), "d": str(d)},
    }
    claims = {"ca_sha256": hashlib.sha256(authority_der).hexdigest()}
    return payload, claims, certificates.fingerprint(client.certificate_pem)


def parse_token(token: str, *, now_s: float) -> ActivationToken:
    """The activation token's content, unverified. Raises InvalidRequest saying what is wrong, never quoting it."""
    parts = token.strip().split(".")
    if len(token) > TOKEN_BYTES_MAX or len(parts) != 3 or not all(parts):
        raise InvalidRequest("error parsing activation token: it is not a JWT of three parts; was it truncated?")
    header, claims = _json_part(parts[0], "header"), _json_part(parts[1], "payload")
    if header.get("alg") != "ES512" or header.get("typ", "JWT") != "JWT" or "crit" in header:
        raise InvalidRequest("error parsing activation token: it is not an ES512 JWT as primaries issue")
    if not _KEY_HEADERS.isdisjoint(header):
        raise InvalidRequest("error parsing activation token: it names the key to check it with, as primaries never do")
    if len(_base64url(parts[2], "signature")) != 132:
        raise InvalidRequest("error parsing activation token: its signature is incomplete; was it truncated?")
    ca_sha256, jti, addr = claims.get("ca_sha256"), claims.get("jti"), claims.get("addr", "")
    if claims.get("type") != "wrapping" or not isinstance(ca_sha256, str) or len(ca_sha256) != 64:
        raise InvalidRequest("this token is not a replication activation token")
    if not isinstance(jti, str) or not jti or not isinstance(addr, str):
        raise InvalidRequest("error parsing activation token: a claim is missing or of a wrong type")
    _check_times(claims, now_s)
    return ActivationToken(wrapping_token=jti, api_addr=addr, ca_sha256=ca_sha256)


def parse_bundle(data: Any, ca_sha256: str) -> Bundle:
    """The unwrapped bundle, checked against the token and in itself. Raises InvalidRequest."""
    try:
        key = data["client_key"]
        if key["type"] != "p521":
            raise ValueError("unknown key type")
        authority_der = base64.b64decode(data["ca_cert"], validate=True)
        client_der = base64.b64decode(data["client_cert"], validate=True)
        bundle = Bundle(
            secondary_id=str(data["id"]),
            set_id=str(data["cluster_id"]),
            epoch=Epoch(int(data["epoch"]["number"]), str(data["epoch"]["id"])),
            primary_cluster_addr=str(data["primary_cluster_addr"]),
            authority_pem=certificates.der_to_pem(authority_der),
            credentials=Credentials(
                certificates.der_to_pem(client_der),
                certificates.key_from_numbers(int(key["x"]), int(key["y"]), int(key["d"])),
            ),
        )
    except (KeyError, TypeError, ValueError):
        raise InvalidRequest("the unwrapped activation bundle is malformed; the token is used up") from None
    if hashlib.sha256(authority_der).hexdigest() != ca_sha256:
        raise InvalidRequest("the unwrapped bundle's authority is not the one the activation token names")
    if not certificates.belongs(bundle.credentials.certificate_pem, bundle.credentials.key_pem, bundle.authority_pem):
        raise InvalidRequest("the unwrapped bundle's certificate, key and authority do not belong together")
    return bundle


async def activate(
    mode: Mode,
    asked: ActivationRequest,
    *,
    store_id: str,
    now_s: float,
    timeout_s: float = 30.0,
    set_id: str = "",
    key: ActivationKey | None = None,
) -> ActivationResult:
    """From token to everything a new store generation needs.

    With ``set_id`` only a primary of that set will do. ``key`` is this cluster's own, for a token that was encrypted to
    it: no call goes to the primary's API, and the store is the one the key was made for. Raises InvalidRequest (nothing
    consumed, or the bundle is bad) and Unavailable (the bundle is consumed and the primary's cluster port could not be
    used: a new token is needed).
    """
    if is_sealed(asked.token):
        opened = open_bundle(mode, asked.token, key, now_ms=int(now_s * 1000), leeway_ms=LEEWAY_S * 1000)
        bundle = await asyncio.to_thread(parse_bundle, opened.payload, opened.ca_sha256)
        if set_id and bundle.set_id != set_id:
            raise InvalidRequest(OTHER_SET)
        return await bootstrap(mode, bundle, store_id=key.store_id if key else store_id, timeout_s=timeout_s)
    parsed = parse_token(asked.token, now_s=now_s)
    address = api_address(asked.primary_api_addr or parsed.api_addr)
    trust = await asyncio.to_thread(api_trust, address, asked.ca_file, asked.ca_path)
    data = await unwrap(mode, address, parsed.wrapping_token, trust, timeout_s)
    bundle = await asyncio.to_thread(parse_bundle, data, parsed.ca_sha256)
    if set_id and bundle.set_id != set_id:
        raise InvalidRequest(OTHER_SET)
    result = await bootstrap(mode, bundle, store_id=store_id, timeout_s=timeout_s)
    return replace(result, protected=trust is not None)


def api_address(address: str) -> str:
    """``scheme://host:port`` without a trailing slash. Raises InvalidRequest."""
    parts = urlsplit(address.strip().rstrip("/"))
    if not address:
        raise InvalidRequest("the activation token names no API address; give primary_api_addr")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query or parts.username:
        raise InvalidRequest("the primary's API address is not an http or https URL of a host")
    return f"{parts.scheme}://{parts.netloc}"


def api_trust(address: str, ca_file: str, ca_path: str) -> ssl.SSLContext | None:
    """The TLS context for the unwrap, None for plain HTTP. Reads files. Raises InvalidRequest."""
    if address.startswith("http://"):
        return None
    try:
        if not ca_file and not ca_path:
            return ssl.create_default_context()
        context = ssl.create_default_context(cafile=ca_file or None)
        for pem in sorted(Path(ca_path).iterdir()) if ca_path else ():
            if pem.is_file():
                context.load_verify_locations(cafile=pem)
    except (OSError, ssl.SSLError, ValueError):
        raise InvalidRequest("error loading the CA certificates named by ca_file or ca_path") from None
    return context


async def unwrap(mode: Mode, address: str, wrapping_token: str, trust: ssl.SSLContext | None, timeout_s: float) -> Any:
    """Check that the wrapping token came from ``secondary-token`` and exchange it for the bundle, which consumes it."""
    session = aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        connector=aiohttp.TCPConnector(ssl=trust or False),
        headers={"X-Vault-Request": "true"},
    )
    async with session:
        check_origin(mode, await look_up(session, address, wrapping_token))
        headers = {"X-Vault-Token": wrapping_token}
        return _data(await _call(session, f"{address}/v1/sys/wrapping/unwrap", headers, {}))


async def look_up(session: aiohttp.ClientSession, address: str, wrapping_token: str) -> str:
    """The path that made a wrapping token; nothing is consumed. Raises InvalidRequest for one that is used up."""
    found = await _call(session, f"{address}/v1/sys/wrapping/lookup", {}, {"token": wrapping_token})
    return str(_data(found).get("creation_path"))


def check_origin(mode: Mode, path: str) -> None:
    """Raises InvalidRequest unless what ``path`` made is an activation token of that mode."""
    if path in {other.creation_path for other in MODES.values() if other is not mode}:
        raise InvalidRequest(
            f"this activation token is for another mode of replication ({path}); nothing was consumed",
        )
    if path != mode.creation_path:
        raise InvalidRequest(
            "the token was not created by secondary-token: somebody may have unwrapped and re-wrapped it; "
            "revoke this secondary id on the primary and issue a new token",
        )


async def bootstrap(mode: Mode, bundle: Bundle, *, store_id: str, timeout_s: float) -> ActivationResult:
    """Prove to the primary that we are this secondary and receive its keys. Raises Unavailable, InvalidRequest."""
    request = BootstrapRequest(VERSIONS, bundle.secondary_id, bundle.set_id, bundle.epoch, store_id)
    try:
        client = PeerClient(secondary_identity(mode, bundle), bundle.primary_cluster_addr)
    except ValueError as error:
        raise InvalidRequest(f"the activation bundle's primary_cluster_addr is unusable: {error}") from None
    try:
        answer = await client.post(
            BOOTSTRAP_PATH,
            encode(request),
            timeout_s=timeout_s,
            answer_bytes_max=BOOTSTRAP_BYTES_MAX,
        )
    except (PeerUnreachable, PeerOutcomeUnknown) as error:
        raise Unavailable(
            f"the primary's cluster address could not be used ({error}); nothing was changed here, "
            "but the activation token is used up: issue a new one",
        ) from error
    finally:
        await client.close()
    return _result(mode, bundle, _reply(mode, answer, bundle), store_id)


def secondary_identity(mode: Mode, known: Bundle | SecondaryRole) -> PeerIdentity:
    """How a secondary dials its primary."""
    return PeerIdentity(mode.server_name(known.set_id), mode.alpn, known.credentials, known.authority_pem)


def _reply(mode: Mode, answer: PeerAnswer, bundle: Bundle) -> BootstrapReply:
    if answer.status != 200:
        reason = answer.body[:300].decode("utf-8", "replace")
        if answer.status >= 500:
            raise Unavailable(f"the primary could not complete this activation, issue a new token: {reason}")
        raise InvalidRequest(f"the primary refused this activation: {reason}")
    try:
        reply = decode(answer.body, BootstrapReply, bytes_max=BOOTSTRAP_BYTES_MAX)
    except MalformedMessage as error:
        raise Unavailable(f"the primary's answer to the activation was not understood: {error}") from None
    if reply.version not in VERSIONS or reply.set_id != bundle.set_id or reply.epoch != bundle.epoch:
        raise InvalidRequest("the primary answered for another replication set or epoch")
    if reply.history and epoch_of(reply.history) != reply.epoch:
        raise InvalidRequest("the primary's answer contradicts itself about its replication epoch")
    whole = set(reply.keyrings) == mode.keyrings and all(reply.keyrings.values()) and bool(reply.history)
    if len(reply.root_key) != 32 or not reply.seal or not whole:
        raise InvalidRequest("the primary's answer to the activation is incomplete")
    return reply


def _result(mode: Mode, bundle: Bundle, reply: BootstrapReply, store_id: str) -> ActivationResult:
    role = SecondaryRole(
        set_id=bundle.set_id,
        history=reply.history,
        secondary_id=bundle.secondary_id,
        store_id=store_id,
        primary_cluster_addr=bundle.primary_cluster_addr,
        primary_api_addr=reply.api_addr,
        authority_pem=bundle.authority_pem,
        certificate_pem=bundle.credentials.certificate_pem,
        key_pem=bundle.credentials.key_pem,
        addresses=reply.cluster_addrs[:16],
        held=NOTHING if mode is PERFORMANCE else EVERYTHING,
    )
    return ActivationResult(mode=mode, root_key=reply.root_key, keyrings=reply.keyrings, seal=reply.seal, role=role)


async def _call(
    session: aiohttp.ClientSession,
    url: str,
    headers: Mapping[str, str],
    body: Mapping[str, str],
) -> dict[str, Any]:
    """One JSON call. 4xx is the token's fault, everything else the primary's."""
    try:
        async with session.post(url, headers=headers, json=body, allow_redirects=False) as response:
            raw = await read_answer(response, BUNDLE_BYTES_MAX)
            status, reason = response.status, response.reason or ""
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        cause = str(error) if isinstance(error, aiohttp.ClientConnectorError) else type(error).__name__
        raise InvalidRequest(f"error unwrapping secondary token: the primary's API did not answer: {cause}") from None
    if status != 200:
        message = f'error response unwrapping secondary token; status code is {status}, message is "{status} {reason}"'
        raise InvalidRequest(message) if 300 <= status < 500 else Unavailable(message)
    try:
        return json_object(raw)
    except ValueError:
        raise PluginError("error unwrapping secondary token: the primary's API did not answer with JSON") from None


def json_object(raw: bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError."""
    try:
        decoded = json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(decoded, dict):
        raise ValueError("not an object")
    return decoded


def _data(envelope: dict[str, Any]) -> dict[str, Any]:
    data = envelope.get("data")
    return data if isinstance(data, dict) else {}


def _json_part(part: str, name: str) -> dict[str, Any]:
    try:
        decoded = json.loads(_base64url(part, name))
    except (ValueError, RecursionError):
        decoded = None
    if not isinstance(decoded, dict):
        raise InvalidRequest(f"error parsing activation token: its {name} is not JSON; was it truncated?")
    return decoded


def _base64url(part: str, name: str) -> bytes:
    try:
        raw = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"error parsing activation token: its {name} is not base64; was it truncated?") from None
    return raw


def _check_times(claims: Mapping[str, Any], now_s: float) -> None:
    expires, not_before = claims.get("exp"), claims.get("nbf", 0)
    for claim in (expires, not_before):
        if isinstance(claim, bool) or not isinstance(claim, int | float):
            raise InvalidRequest("error parsing activation token: a time claim is missing or of a wrong type")
    if now_s > float(expires or 0) + LEEWAY_S:
        raise InvalidRequest("this activation token has expired; issue a new one on the primary")
    if now_s < float(not_before) - LEEWAY_S:
        raise InvalidRequest("this activation token is not valid yet; compare the clocks of both clusters")
