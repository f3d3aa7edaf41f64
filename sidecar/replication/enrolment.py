"""Who may follow this primary, and the keys for it: the calls of ``sys/replication`` about tokens and certificates."""

from __future__ import annotations

import asyncio
import hmac
import logging
import uuid
from datetime import timedelta
from typing import Any

from consul_backend.failpoint import failpoint
from plugin_api.errors import InvalidRequest
from plugin_api.request import Response
from sidecar.replication import authorities, roles, sealed_token
from sidecar.replication.activation import ActivationRequest, ActivationResult, activate, build_bundle
from sidecar.replication.allow_list import add_secondary, check_new, revoke
from sidecar.replication.mode_manager import ModeManager
from sidecar.replication.modes import Mode
from sidecar.replication.preflight import Here, Result, preflight
from sidecar.replication.roles import PrimaryRole, Role
from sidecar.replication.sealed_token import ActivationKey
from sidecar.replication.texts import AUTHORITY_ENDED, OTHER_ROOT_KEY, ROTATING_AUTHORITY
from sidecar.replication.wiring import Callbacks, SealedEntries
from sidecar.transport import certificates
from sidecar.transport.listener import ClusterListener

logger = logging.getLogger(__name__)


async def make_authority(mode: Mode, set_id: str) -> certificates.Credentials:
    """A certificate authority for a set."""
    return await asyncio.to_thread(certificates.make_authority, f"outrider {mode.name} replication {set_id}")


# ---- on a primary


async def issue(
    manager: ModeManager, listener: ClusterListener, secondary_id: str, ttl_s: int, public_key: str, own_addr: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(payload to wrap, extra JWT claims) for a new secondary, which is known from now on (contract 1.6). With a public
    key the payload is the token itself, encrypted. ``own_addr``: this node's cluster address."""
    if ttl_s <= 0:
        raise InvalidRequest('"ttl" must be positive')
    recipient = sealed_token.public_key(public_key) if public_key else None
    role = roles.require_primary(manager.mode, manager.role)
    check_new(role, roles.check_id(secondary_id))
    payload, claims, fingerprint = await asyncio.to_thread(
        build_bundle,
        role.authority,
        secondary_id=secondary_id,
        set_id=role.set_id,
        epoch=role.epoch,
        primary_cluster_addr=role.primary_cluster_addr or own_addr,
        validity=timedelta(seconds=manager.options.certificate_ttl_s),
    )
    now_ms = manager.clock.time_ms()
    expires_ms = now_ms + ttl_s * 1000
    if recipient is not None:  # before it is known: a bad key must leave nothing behind
        token = sealed_token.seal_bundle(
            manager.mode, recipient, payload, claims["ca_sha256"], not_before_ms=now_ms, expires_ms=expires_ms
        )
        payload, claims = {"token": token}, {}
    replaced: list[str] = []

    def add(newest: Role) -> PrimaryRole:
        primary = roles.require_primary(manager.mode, newest)
        if (primary.epoch, primary.authority_pem) != (role.epoch, role.authority_pem):
            raise InvalidRequest("replication was set up anew meanwhile; try again")
        after, before = add_secondary(
            manager.mode, newest, secondary_id, fingerprint, now_ms=manager.steady.time_ms(), ttl_ms=ttl_s * 1000
        )
        replaced.extend([before] if before else [])
        return after

    await manager.change(add)
    if manager.primary is not None:
        manager.primary.shipper.expect(secondary_id)
    for old in replaced:
        listener.cut(old)
    return payload, claims


async def revoke_secondary(manager: ModeManager, listener: ClusterListener, secondary_id: str) -> None:
    """Commit that it is unknown, then cut off whatever it has open."""
    doomed: list[str] = []

    def remove(newest: Role) -> PrimaryRole:
        after, fingerprints = revoke(manager.mode, newest, secondary_id)
        doomed.extend(fingerprints)
        return after

    await manager.change(remove)
    if manager.primary is not None:
        await manager.primary.dismiss(secondary_id, doomed)
    else:
        for fingerprint in doomed:
            listener.cut(fingerprint)
    logger.warning("replication: %s secondary %s was revoked", manager.mode.name, secondary_id)


async def rotate_authority(manager: ModeManager, overlap_s: float, *, force: bool) -> Response:
    """Introduce a second authority; the old one ends when every secondary has a certificate of the new one, or after
    ``overlap_s``. With ``force`` a rotation that is under way ends now."""
    role = roles.require_primary(manager.mode, manager.role)
    service = manager.primary
    if force:
        if service is None:
            raise InvalidRequest("this cluster is not serving its secondaries right now; try again")
        await service.certifier.finish()
        return Response(warnings=[AUTHORITY_ENDED])
    if overlap_s <= 0:
        raise InvalidRequest('"overlap" must be positive')
    successor = await make_authority(manager.mode, role.set_id)
    deadline_ms = manager.clock.time_ms() + int(overlap_s * 1000)
    after = await manager.change(
        lambda newest: authorities.begin(manager.mode, newest, successor, deadline_ms=deadline_ms)
    )
    failpoint("rotation:after-begin")
    if service is not None:
        service.certifier.wake()
    logger.warning("replication: the authority of the %s set is being rotated", manager.mode.name)
    late = authorities.waiting(after, now_ms=manager.clock.time_ms())
    data = {"deadline": deadline_ms // 1000, "waiting_for": late}
    return Response(data=data, warnings=[ROTATING_AUTHORITY])


# ---- on a secondary, or what is to be one


async def make_public_key(manager: ModeManager, sealed: SealedEntries) -> Response:
    """A fresh key pair, which replaces the one before; its private half stays here."""
    manager.require_steady()
    roles.require(manager.mode, manager.role, "secondary/generate-public-key")
    key = sealed_token.make_key(str(uuid.uuid4()), now_ms=manager.clock.time_ms())
    await sealed.put(sealed_token.key_entry(manager.mode), sealed_token.encode_key(key))
    return Response(data={"secondary_public_key": key.public_text})


async def key_of(manager: ModeManager, sealed: SealedEntries) -> ActivationKey | None:
    """This cluster's activation key of that mode, if it made one. Raises Corrupt."""
    return sealed_token.decode_key(await sealed.get(sealed_token.key_entry(manager.mode)))


async def activated(
    manager: ModeManager, sealed: SealedEntries, asked: ActivationRequest, *, set_id: str = ""
) -> ActivationResult:
    """What the token's issuer gives a new secondary; see :func:`activate`. Raises InvalidRequest, Unavailable."""
    return await activate(
        manager.mode,
        asked,
        store_id=str(uuid.uuid4()),
        now_s=manager.clock.time_ms() / 1000,
        timeout_s=manager.options.activation_timeout_s,
        set_id=set_id,
        key=await key_of(manager, sealed),
    )


async def checked(manager: ModeManager, sealed: SealedEntries, asked: ActivationRequest, refusal: str) -> Response:
    """What a preflight saw; ``refusal``: why this cluster may not become a secondary as it is, or empty."""
    here = Here(refusal, manager.options.limits, manager.clock, await key_of(manager, sealed))
    checks = await preflight(manager.mode, asked, here)
    ready = all(check.result is not Result.FAILED for check in checks)
    return Response(data={"ready": ready, "checks": [check.shown() for check in checks]})


async def point_at(
    manager: ModeManager, sealed: SealedEntries, callbacks: Callbacks, token: str, result: ActivationResult
) -> None:
    """Commit that this secondary follows who issued ``token``. Raises InvalidRequest if that has another root key."""
    if not hmac.compare_digest(result.root_key, callbacks.root_key()):
        raise InvalidRequest(OTHER_ROOT_KEY)
    await callbacks.keep_keys()
    failpoint("update-primary:before-commit")
    await manager.change(lambda newest: roles.point_at(manager.mode, newest, result.role))
    failpoint("update-primary:after-commit")
    await forget_key(manager, sealed, token)


async def forget_key(manager: ModeManager, sealed: SealedEntries, token: str) -> None:
    """``token`` was used: the key that opened it, if it was one, is not needed again."""
    if sealed_token.is_sealed(token):
        await sealed.delete(sealed_token.key_entry(manager.mode))
