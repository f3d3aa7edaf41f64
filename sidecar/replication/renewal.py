"""A secondary's side of certificates: asks its primary for a new one in time, and learns which authorities count.

Asked is on a timer, over whatever connection works. Nothing is used before it is committed here; until its first use
the certificate before counts too, so that a crash at any step leaves one that works.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from consul_backend.clock import Clock
from consul_backend.errors import NotApplied, Overloaded
from consul_backend.errors import Unavailable as StoreUnavailable
from consul_backend.failpoint import failpoint
from plugin_api.errors import Unavailable
from sidecar.replication.certifying import CERTIFICATE_BYTES_MAX, CertificateReply, CertificateRequest
from sidecar.replication.roles import SecondaryRole
from sidecar.transport import certificates
from sidecar.transport.certificates import Credentials
from sidecar.transport.forwarding import MalformedMessage, decode, encode
from sidecar.transport.peer import PeerAnswer, PeerOutcomeUnknown, PeerUnreachable

logger = logging.getLogger(__name__)

RENEW_AT = 2 / 3
"""Of a certificate's life."""
EXPIRY_WARNING_S = 24 * 60 * 60.0

Post = Callable[[bytes], Awaitable[PeerAnswer]]
Keep = Callable[[bytes, Credentials, bytes], Awaitable[SecondaryRole | None]]


class Renewal:
    """``role`` is the role in use; ``post`` sends one body to the primary; ``keep`` commits (certificate that is
    replaced, new credentials, authorities) and returns the role with them, or None."""

    def __init__(self, clock: Clock, *, role: Callable[[], SecondaryRole], post: Post, keep: Keep) -> None:
        self._clock = clock
        self._role = role
        self._post = post
        self._keep = keep

    async def once(self) -> SecondaryRole | None:
        """Renew if it is time or if the primary wants it; the new role if anything changed. Whatever fails is said in
        the log and tried again the next time. Raises nothing but what ends the tenure."""
        role = self._role()
        try:
            return await self._renew(role)
        except (PeerUnreachable, PeerOutcomeUnknown, Unavailable, _Refused, MalformedMessage) as error:
            cause: Exception = error
        except (Overloaded, NotApplied, StoreUnavailable) as error:
            cause = error
        _, expires_s = certificates.period_s(role.certificate_pem)
        left_s = expires_s - self._clock.time_ms() / 1000
        log = logger.error if left_s < EXPIRY_WARNING_S else logger.info
        log("replication: the certificate (%.0f s left) was not renewed, next time: %s", left_s, cause)
        return None

    async def _renew(self, role: SecondaryRole) -> SecondaryRole | None:
        told = await self._ask(b"")
        if not told.wanted and not renewal_due(role.certificate_pem, self._clock.time_ms() / 1000):
            if told.authorities == role.authority_pem:
                return None
            return await self._keep(role.certificate_pem, role.credentials, told.authorities)
        request, key_pem = await asyncio.to_thread(certificates.make_request, role.secondary_id)
        told = await self._ask(request)
        if not told.certificate or not certificates.belongs(told.certificate, key_pem, told.authorities):
            raise _Refused("the primary's certificate is not for the key that was sent, or of none of its authorities")
        failpoint("certificate:before-keep")
        kept = await self._keep(role.certificate_pem, Credentials(told.certificate, key_pem), told.authorities)
        failpoint("certificate:after-keep")
        return kept

    async def _ask(self, request: bytes) -> CertificateReply:
        answer = await self._post(encode(CertificateRequest(request)))
        if answer.status != 200:
            raise _Refused(f"the primary answered {answer.status}: {answer.body[:300].decode('utf-8', 'replace')}")
        told = decode(answer.body, CertificateReply, bytes_max=CERTIFICATE_BYTES_MAX)
        try:
            certificates.each(told.authorities)
        except ValueError:
            raise _Refused("the primary named no authority") from None
        return told


class _Refused(Exception):
    """The primary's answer is no certificate."""


def renewal_due_s(certificate_pem: bytes) -> float:
    """When (Unix seconds) a certificate is to be renewed."""
    issued_s, expires_s = certificates.period_s(certificate_pem)
    return issued_s + RENEW_AT * (expires_s - issued_s)


def renewal_due(certificate_pem: bytes, now_s: float) -> bool:
    """Whether that time has come."""
    return now_s >= renewal_due_s(certificate_pem)


def reason_lost(problems: Sequence[str], certificate_pem: bytes, now_ms: int) -> str:
    """Why no address of the primary could be used, for people. An expired certificate looks like any refusal."""
    reason = "; ".join(problems) or "no address of the primary is known"
    if now_ms / 1000 < certificates.period_s(certificate_pem)[1]:
        return reason
    return f"this secondary's certificate expired: it needs a new token of its primary (update-primary); {reason}"
