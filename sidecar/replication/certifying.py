"""A primary's side of certificates: renews those of its secondaries, and ends an authority that was rotated out.

``POST /certificate`` is asked by a secondary that said hello before. Without a certificate request it answers which
authorities count and whether a new certificate is wanted; with one, also the certificate.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta

import msgspec

from consul_backend.clock import Clock
from consul_backend.errors import NotApplied, Overloaded
from consul_backend.errors import Unavailable as StoreUnavailable
from consul_backend.failpoint import failpoint
from plugin_api.errors import InvalidRequest, PermissionDenied, Unavailable
from sidecar.replication import authorities
from sidecar.replication.modes import Mode
from sidecar.replication.roles import KnownSecondary, PrimaryRole, Role
from sidecar.transport import certificates
from sidecar.transport.listener import ClusterListener

logger = logging.getLogger(__name__)

CERTIFICATE_PATH = "/certificate"
CERTIFICATE_BYTES_MAX = 64 * 1024
CHECK_S = 5.0
CUT_AFTER_S = 60.0
"""A certificate that was replaced opens nothing any more, but what was let in with it may end: a forwarded write that
is cut off would be one whose outcome nobody knows."""

ChangeRole = Callable[[Callable[[Role], PrimaryRole]], Awaitable[PrimaryRole]]
Newest = Callable[[], PrimaryRole | None]


class CertificateRequest(msgspec.Struct, frozen=True):
    """``POST /certificate``; ``request`` is a PKCS #10 request (DER), empty to ask whether one is wanted."""

    request: bytes = b""


class CertificateReply(msgspec.Struct, frozen=True):
    """``authorities`` are the PEM certificates that the primary may show from now on; ``wanted``: the secondary should
    renew its certificate now, whatever its age. ``certificate`` is PEM, empty unless asked for."""

    authorities: bytes
    wanted: bool
    certificate: bytes = b""


class Certifier:
    """One set's, for one tenure as primary. ``newest`` returns the newest committed role, ``change`` commits one."""

    def __init__(
        self,
        mode: Mode,
        listener: ClusterListener,
        clock: Clock,
        *,
        newest: Newest,
        change: ChangeRole,
        certificate_ttl_s: float,
        check_s: float = CHECK_S,
    ) -> None:
        self._mode = mode
        self._listener = listener
        self._clock = clock
        self._newest = newest
        self._change = change
        self._validity = timedelta(seconds=certificate_ttl_s)
        self._check_s = check_s
        self._shown_pem = b""
        self._woken = asyncio.Event()

    async def credentials(self, role: PrimaryRole) -> certificates.Credentials:
        """A certificate for the cluster port, signed by the authority that every secondary knows."""
        self._shown_pem = role.trusted_pem
        return await asyncio.to_thread(certificates.issue_server, role.authority, self._mode.server_name(role.set_id))

    async def answer(self, shown: str, known: KnownSecondary, asked: CertificateRequest) -> CertificateReply:
        """For the secondary that shows certificate ``shown``. Raises PermissionDenied, BackendError, Unavailable."""
        role = self._newest()
        if role is None:
            raise PermissionDenied("this cluster is not the primary any more")
        successor = certificates.fingerprint(role.renewing.certificate_pem)
        wanted = role.rotating and known.authority != successor
        if not asked.request:
            return CertificateReply(role.trusted_pem, wanted)
        try:
            certificate = await asyncio.to_thread(
                certificates.sign_request, role.renewing, asked.request, known.id, validity=self._validity
            )
        except ValueError as error:
            raise InvalidRequest(f"the certificate request is not acceptable: {error}") from None
        offered = certificates.fingerprint(certificate)
        failpoint("certificate:before-offer")
        after = await self._change(lambda newest: authorities.offer(self._mode, newest, shown, offered, successor))
        failpoint("certificate:after-offer")
        logger.info("replication: secondary %s received a renewed certificate", known.id)
        return CertificateReply(after.trusted_pem, False, certificate)

    def replaced(self, fingerprints: Sequence[str]) -> None:
        """These certificates were replaced: cut what is still open with them, later."""
        for one in fingerprints:
            asyncio.get_running_loop().call_later(CUT_AFTER_S, self._listener.cut, one)

    def wake(self) -> None:
        """The role was changed: look at it now."""
        self._woken.set()

    async def run(self) -> None:
        """Keep the cluster port's trust as the role has it, and end a rotation that is due, until cancelled."""
        while True:
            self._woken.clear()
            try:
                await self._look()
            except (Overloaded, NotApplied, StoreUnavailable, Unavailable, InvalidRequest) as error:
                logger.info("replication: the rotation of the authority goes on later: %s", error)
            try:
                async with asyncio.timeout(self._check_s):
                    await self._woken.wait()
            except TimeoutError:
                continue

    async def _look(self) -> None:
        role = self._newest()
        if role is None:
            return
        if authorities.due(role, now_ms=self._clock.time_ms()):
            await self.finish()
            role = self._newest()
        if role is not None and role.trusted_pem != self._shown_pem:
            name, trusted = self._mode.server_name(role.set_id), role.trusted_pem
            self._listener.renew(name, await self.credentials(role), trusted)

    async def finish(self) -> None:
        """End the old authority now. Raises InvalidRequest when nothing is rotated, BackendError."""
        late: list[str] = []
        dead: list[str] = []

        def end(newest: Role) -> PrimaryRole:
            after, fingerprints = authorities.finish(self._mode, newest)
            dead.extend(fingerprints)
            late.extend(known.id for known in after.secondaries.values() if known.fingerprint in fingerprints)
            return after

        failpoint("rotation:before-finish")
        after = await self._change(end)
        failpoint("rotation:after-finish")
        name = self._mode.server_name(after.set_id)
        self._listener.renew(name, await self.credentials(after), after.trusted_pem)
        for one in dead:
            self._listener.cut(one)
        if late:
            logger.error(
                "replication: the old authority of the %s set ended; these secondaries had not renewed their "
                "certificates and need a new token each (update-primary): %s",
                self._mode.name,
                ", ".join(sorted(late)),
            )
        else:
            logger.warning("replication: the old authority of the %s set ended", self._mode.name)
