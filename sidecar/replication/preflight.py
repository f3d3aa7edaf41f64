"""Preflight of ``secondary/enable``: would it work? Nothing is used up and nothing is changed, here or there.

The bundle stays wrapped, so all of this is what can be seen without it: the token's own claims, what the primary's API
says to anybody (health, leader, replication status, a look-up of the wrapping token, which does not consume it), and a
TLS handshake with its cluster port that shows no client certificate and ends before anything is sent. The authority
that the status shows is held against the token's ``ca_sha256``; the certificate on the cluster port against that
authority. So whatever ends TLS on the way shows itself, by its certificate or by its ALPN.

Each check is *ok*, *failed* or *unknown* (what it needs could not be seen), with what was seen and what to do.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from consul_backend.clock import Clock
from consul_backend.limits import Limits
from plugin_api.errors import InvalidRequest, PluginError
from sidecar.replication import activation, sealed_token
from sidecar.replication.activation import ActivationRequest
from sidecar.replication.modes import Mode
from sidecar.replication.path_probe import Fault, probe
from sidecar.replication.protocol import PROTOCOL_VERSIONS
from sidecar.replication.sealed_token import ActivationKey
from sidecar.transport import certificates
from sidecar.transport.peer import read_answer

TIMEOUT_S = 5.0
SKEW_MAX_S = 30.0
"""Tokens forgive a minute; half of it is left for drift until the token is used."""
ANSWER_BYTES_MAX = 256 * 1024


class Result(enum.Enum):
    """Of one check."""

    OK = "ok"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what was seen, and what to do about it (empty when nothing)."""

    name: str
    result: Result
    seen: str
    action: str = ""

    def shown(self) -> dict[str, str]:
        """As the API shows it."""
        return {"check": self.name, "result": self.result.value, "seen": self.seen, "action": self.action}


@dataclass(frozen=True, slots=True)
class Here:
    """This cluster: why its role forbids it (empty: it does not), its store's limits, its activation key."""

    refusal: str
    limits: Limits
    clock: Clock
    key: ActivationKey | None = field(default=None, repr=False)


@dataclass(slots=True)
class _Primary:
    """What was learnt of the primary; empty where it was not."""

    ca_sha256: str = ""
    authority_pem: bytes = b""
    set_id: str = ""
    address: str = ""
    health: Mapping[str, Any] = field(default_factory=dict)
    status: Mapping[str, Any] = field(default_factory=dict)
    skew_s: float | None = None


async def preflight(mode: Mode, asked: ActivationRequest, here: Here) -> list[Check]:
    """All checks, in the order in which an activation would meet them. Raises nothing but what cancels it."""
    primary = _Primary()
    checks = [_role(here)]
    now_s = here.clock.time_ms() / 1000
    if sealed_token.is_sealed(asked.token):
        checks.append(_sealed(mode, asked.token, here, primary))
        checks.append(
            Check("primary-api", Result.UNKNOWN, "not looked at: an encrypted token needs no API of a primary")
        )
    else:
        token, check = _token(asked.token, now_s)
        checks.append(check)
        checks += await _api(mode, asked, here, token, primary)
    checks.append(_authority(primary))
    checks += await _cluster_port(mode, primary)
    checks += [_skew(primary), _versions(primary), _limits(primary, here.limits)]
    return checks


def _role(here: Here) -> Check:
    if here.refusal:
        return Check("role", Result.FAILED, here.refusal, "bring this cluster into a role that allows it")
    return Check("role", Result.OK, "this cluster may become a secondary; everything it holds would be replaced")


def _token(token: str, now_s: float) -> tuple[activation.ActivationToken | None, Check]:
    try:
        parsed = activation.parse_token(token, now_s=now_s)
    except InvalidRequest as error:
        return None, Check("token", Result.FAILED, str(error), "carry the token whole, or issue a new one")
    return parsed, Check("token", Result.OK, "whole and within its time")


def _sealed(mode: Mode, token: str, here: Here, primary: _Primary) -> Check:
    """Opening an encrypted token uses nothing up: it is used by the first call to the cluster port."""
    try:
        opened = sealed_token.open_bundle(
            mode, token, here.key, now_ms=here.clock.time_ms(), leeway_ms=activation.LEEWAY_S * 1000
        )
        bundle = activation.parse_bundle(opened.payload, opened.ca_sha256)
    except InvalidRequest as error:
        return Check("token", Result.FAILED, str(error), "make a key here, and a token for it on the primary")
    primary.ca_sha256, primary.authority_pem = opened.ca_sha256, bundle.authority_pem
    primary.set_id, primary.address = bundle.set_id, bundle.primary_cluster_addr
    return Check("token", Result.OK, "encrypted to this cluster's key, whole and within its time")


# ---- the primary's API


async def _api(
    mode: Mode, asked: ActivationRequest, here: Here, token: activation.ActivationToken | None, primary: _Primary
) -> list[Check]:
    name, lookup = "primary-api", "token-on-primary"
    blind = Check(lookup, Result.UNKNOWN, "the primary's API could not be asked")
    try:
        address = activation.api_address(asked.primary_api_addr or (token.api_addr if token else ""))
        trust = await asyncio.to_thread(activation.api_trust, address, asked.ca_file, asked.ca_path)
    except InvalidRequest as error:
        result = Result.FAILED if token or asked.primary_api_addr else Result.UNKNOWN
        return [Check(name, result, str(error), "give primary_api_addr, ca_file or ca_path as needed"), blind]
    session = aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        connector=aiohttp.TCPConnector(ssl=trust or False),
        headers={"X-Vault-Request": "true"},
    )
    async with session:
        try:
            before_s = here.clock.time_ms() / 1000
            primary.health = await _get(session, f"{address}/v1/sys/health?standbyok=true&perfstandbyok=true")
            after_s = here.clock.time_ms() / 1000
            status = await _get(session, f"{address}/v1/sys/replication/{mode.name}/status")
            leader = await _get(session, f"{address}/v1/sys/leader")
        except _NoAnswer as problem:
            return [Check(name, Result.FAILED, f"{address}: {problem.seen}", problem.action), blind]
        found = await _lookup(mode, session, address, token) if token else blind
    _learn(primary, status, leader, before_s, after_s)
    if token:
        primary.ca_sha256 = token.ca_sha256
    how = "" if trust else "; it is not https: anybody on the way can take the token"
    return [_api_check(mode, primary, address, how), found]


def _api_check(mode: Mode, primary: _Primary, address: str, how: str) -> Check:
    role = primary.status.get("mode", "nothing")
    if role != "primary":
        seen = f"{address} answers, and says that it is {role} in mode {mode.name}"
        return Check("primary-api", Result.FAILED, seen, "give the API address of the primary that issued the token")
    action = "use an https address, or an encrypted token (generate-public-key)" if how else ""
    return Check("primary-api", Result.OK, f"{address} answers as the {mode.name} primary{how}", action)


def _learn(
    primary: _Primary, status: Mapping[str, Any], leader: Mapping[str, Any], before_s: float, after_s: float
) -> None:
    data = status.get("data")
    primary.status = data if isinstance(data, dict) else {}
    primary.set_id = str(primary.status.get("cluster_id") or "")
    primary.address = _bundle_address(primary.status, leader)
    shown = primary.status.get("certificate_authority")
    if isinstance(shown, dict):
        primary.authority_pem = str(shown.get("certificate") or "").encode()
    server_s = primary.health.get("server_time_utc")
    if isinstance(server_s, int | float) and not isinstance(server_s, bool):
        # A clock in whole seconds, read somewhere between the two moments: only what is beyond both is skew.
        primary.skew_s = max(server_s - after_s, 0.0) or min(server_s + 1 - before_s, 0.0)


def _bundle_address(status: Mapping[str, Any], leader: Mapping[str, Any]) -> str:
    """The one address that the bundle names, by the primary's own rule: what is configured, else its active node."""
    known = status.get("cluster_addrs")
    first = known[0] if isinstance(known, list) and known else ""
    return str(status.get("primary_cluster_addr") or first or leader.get("leader_cluster_address") or "")


async def _lookup(mode: Mode, session: aiohttp.ClientSession, address: str, token: activation.ActivationToken) -> Check:
    try:
        path = await activation.look_up(session, address, token.wrapping_token)
        activation.check_origin(mode, path)
    except PluginError as error:
        return Check("token-on-primary", Result.FAILED, str(error), "issue a new token on the primary")
    return Check("token-on-primary", Result.OK, f"unused, made by {path}")


class _NoAnswer(Exception):
    def __init__(self, seen: str, action: str) -> None:
        super().__init__(seen)
        self.seen = seen
        self.action = action


async def _get(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    try:
        async with session.get(url, allow_redirects=False) as response:
            body = await read_answer(response, ANSWER_BYTES_MAX)
            status = response.status
    except aiohttp.ClientConnectorCertificateError:
        raise _NoAnswer(
            "its certificate is not signed by a CA that is trusted here, or is for another name",
            "give the CA of the primary's API with ca_file or ca_path, or the name its certificate has",
        ) from None
    except aiohttp.ClientConnectorSSLError:
        raise _NoAnswer("the TLS handshake failed", "check that the address is that of an https API") from None
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        cause = str(error) if isinstance(error, aiohttp.ClientConnectorError) else type(error).__name__
        raise _NoAnswer(
            f"no answer ({cause})", "check the address, and that firewalls let this cluster reach the primary's API"
        ) from None
    try:
        decoded = activation.json_object(body)
    except ValueError:
        raise _NoAnswer(
            f"it answers {status} with something that is no JSON", "check the address and what proxies are on the way"
        ) from None
    return decoded


# ---- the cluster port


def _authority(primary: _Primary) -> Check:
    if not primary.ca_sha256 or not primary.authority_pem:
        return Check("ca", Result.UNKNOWN, "the token's or the primary's certificate authority could not be seen")
    try:
        shown = certificates.fingerprint(certificates.each(primary.authority_pem)[0])
    except ValueError:
        return Check("ca", Result.UNKNOWN, "the primary's status does not show a certificate authority")
    if shown == primary.ca_sha256:
        return Check("ca", Result.OK, f"the primary's authority is the token's (sha256 {shown[:16]}...)")
    seen = f"the token names authority {primary.ca_sha256[:16]}..., the primary shows {shown[:16]}..."
    return Check(
        "ca", Result.FAILED, seen, "the token is another primary's, or older than its authority: issue a new one"
    )


async def _cluster_port(mode: Mode, primary: _Primary) -> list[Check]:
    reach, path = "cluster-port", "alpn-path"
    if not primary.address or not primary.set_id:
        unseen = "the primary's cluster address could not be seen"
        return [Check(reach, Result.UNKNOWN, unseen), Check(path, Result.UNKNOWN, unseen)]
    name = mode.server_name(primary.set_id)
    seen = await probe(primary.address, name, mode.alpn, primary.authority_pem, TIMEOUT_S)
    text = f"{seen.address}: {seen.text}"
    if seen.fault is Fault.UNREACHABLE:
        return [
            Check(reach, Result.FAILED, text, seen.action),
            Check(path, Result.UNKNOWN, "the cluster port was not reached"),
        ]
    result = {Fault.NONE: Result.OK, Fault.NO_AUTHORITY: Result.UNKNOWN}.get(seen.fault, Result.FAILED)
    return [
        Check(reach, Result.OK, f"{seen.address} accepts connections"),
        Check(path, result, text, seen.action),
    ]


# ---- clocks, versions, limits


def _skew(primary: _Primary) -> Check:
    if primary.skew_s is None:
        return Check("clock", Result.UNKNOWN, "the primary's clock could not be seen")
    if abs(primary.skew_s) <= SKEW_MAX_S:
        return Check("clock", Result.OK, f"the clocks differ by about {abs(primary.skew_s):.0f} s")
    side = "ahead of" if primary.skew_s > 0 else "behind"
    seen = f"the primary's clock is {abs(primary.skew_s):.0f} s {side} this node's"
    return Check("clock", Result.FAILED, seen, "synchronise both clocks: tokens are refused beyond a minute")


def _versions(primary: _Primary) -> Check:
    there = str(primary.health.get("version") or "")
    spoken = primary.status.get("protocol_versions")
    if not there or not isinstance(spoken, list):
        return Check("versions", Result.UNKNOWN, "the primary does not say which replication protocol it speaks")
    both = f"the primary runs {there} and speaks protocol {spoken}; this node speaks {list(PROTOCOL_VERSIONS)}"
    if set(PROTOCOL_VERSIONS) & set(spoken):
        return Check("versions", Result.OK, both)
    return Check(
        "versions", Result.FAILED, f"no common protocol: {both}", "upgrade the secondary first, then the primary"
    )


def _limits(primary: _Primary, here: Limits) -> Check:
    """Never a reason not to begin: what does not fit one commit here is applied in parts. But it costs time."""
    shown = primary.status.get("store_limits")
    try:
        there = Limits(
            ops_max=int(shown["operations"]),  # type: ignore[index]  # whatever it is not ends in the except below
            body_bytes_max=int(shown["body_bytes"]),  # type: ignore[index]  # as above
            prefix_bytes=int(shown["prefix_bytes"]),  # type: ignore[index]  # as above
        )
    except (TypeError, KeyError, ValueError):
        return Check("limits", Result.UNKNOWN, "the primary does not say what its store takes")
    seen = (
        f"a transaction takes {here.ops_max} operations and {here.body_bytes_max} bytes here, "
        f"{there.ops_max} and {there.body_bytes_max} there; "
        f"prefixes have {here.prefix_bytes} and {there.prefix_bytes} bytes"
    )
    smaller = here.ops_max < there.ops_max or here.body_bytes_max < there.body_bytes_max
    action = "raise Consul's limits here to the primary's: bigger records are applied in parts, which is slower"
    return Check("limits", Result.OK, seen, action if smaller else "")
