"""A promoted cluster looks after the primary that it replaced: does that one still believe to be primary?

Two primaries are what a forced promotion risks, and neither would know: nobody follows both. So the new one says hello
to the old one now and then, with its old certificate and its new epoch. The old one, if it is there, cannot accept that
epoch; both then show the fork in their status until one of them is demoted.
"""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn

from sidecar.replication import protocol
from sidecar.replication.activation import secondary_identity
from sidecar.replication.channel import ChannelClosed, WebSocketChannel
from sidecar.replication.hello import Identity, fork_problem, hello_of, source_of
from sidecar.replication.history import Epoch
from sidecar.replication.modes import Mode
from sidecar.replication.primary import STREAM_PATH
from sidecar.replication.protocol import ProtocolViolation
from sidecar.replication.roles import SecondaryRole
from sidecar.replication.wiring import ReplicationOptions
from sidecar.transport.peer import PeerClient, PeerRefused, PeerUnreachable

logger = logging.getLogger(__name__)

BEATS_BETWEEN = 4


class FormerPrimary:
    """``former`` is the role this cluster had, ``epoch`` the one it began. ``sighted`` is a sentence for people while
    the former primary is seen to be one still, else empty."""

    def __init__(self, mode: Mode, former: SecondaryRole, epoch: Epoch, options: ReplicationOptions) -> None:
        self._mode = mode
        self._former = former
        self._epoch = epoch
        self._options = options
        self.sighted = ""

    async def watch(self) -> NoReturn:
        """Look for it every few beats, until cancelled."""
        while True:
            before, self.sighted = self.sighted, await self.look()
            if self.sighted and not before:
                logger.error("replication: fork: %s", self.sighted)
            await asyncio.sleep(self._options.beat_s * BEATS_BETWEEN)

    async def look(self) -> str:
        """What is to be said of it now."""
        for address in self._former.dial_order:
            try:
                problem = await self._ask(address)
            except (PeerUnreachable, PeerRefused, ChannelClosed, ProtocolViolation, TimeoutError, ValueError):
                continue
            return f"the former primary still is one, at {address}: {problem}" if problem else ""
        return ""

    async def _ask(self, address: str) -> str:
        """Say hello at one address; why its primary and this one are apart, empty when they are not."""
        former = self._former
        me = Identity(former.secondary_id, former.store_id, former.set_id, self._epoch.number, self._epoch.id)
        identity = secondary_identity(self._mode, former)
        client = PeerClient(identity, address, connect_timeout_s=self._options.probe_timeout_s)
        try:
            async with asyncio.timeout(2 * self._options.probe_timeout_s):
                channel = WebSocketChannel(
                    await client.websocket(STREAM_PATH, message_bytes_max=protocol.FRAME_BYTES_MAX)
                )
                await channel.send(protocol.encode(hello_of(me, None, self._options.limits)))
                reply = protocol.decode_hello_reply(await channel.recv())
                await channel.close("only asked")
        finally:
            await client.close()
        return fork_problem(me.set_id, me.epoch, me.epoch_id, source_of(reply))
