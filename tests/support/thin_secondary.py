"""A secondary that keeps nothing: it speaks the real protocol over the real cluster port, checks every frame as a real
one does, acknowledges, and remembers where it is. Fifty of them fit into one process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from consul_backend.limits import Limits
from consul_backend.position import Position
from sidecar.replication import protocol as wire
from sidecar.replication.activation import secondary_identity
from sidecar.replication.channel import ChannelClosed, WebSocketChannel
from sidecar.replication.hello import Identity, hello_of
from sidecar.replication.intake import Budget, Intake
from sidecar.replication.modes import Mode
from sidecar.replication.primary import STREAM_PATH
from sidecar.replication.roles import SecondaryRole
from sidecar.transport.peer import PeerClient

BEAT_S = 0.5


class ThinSecondary:
    """``role`` comes from an activation. ``pause_s`` is how long it takes over each record; one that is ``stuck`` says
    that it lives and reads nothing."""

    def __init__(self, mode: Mode, role: SecondaryRole, *, pause_s: float = 0.0, stuck: bool = False) -> None:
        self._mode = mode
        self._role = role
        self._pause_s = pause_s
        self._stuck = stuck
        self.position: Position | None = None
        self.joined = asyncio.Event()
        self.records = 0
        self.entries = 0
        self.bytes = 0
        self.ended = ""

    @property
    def index(self) -> int:
        """The last record it checked."""
        return self.position.index if self.position is not None else 0

    async def run(self) -> None:
        """Stream from the primary's head on, until cancelled or cut."""
        client = PeerClient(secondary_identity(self._mode, self._role), self._role.dial_order[0])
        try:
            await self._dial(client)  # to learn where the head is
            channel, reply = await self._dial(client)
            if reply.mode != "accept" or self.position is None:
                raise ChannelClosed(f"{reply.mode}: {reply.reason}")
            self.joined.set()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._beat(channel))
                if not self._stuck:
                    tasks.create_task(self._read(channel, self.position))
        except* ChannelClosed as closed:
            self.ended = str(closed.exceptions[0])
        finally:
            await client.close()

    async def _dial(self, client: PeerClient) -> tuple[WebSocketChannel, wire.HelloReply]:
        channel = WebSocketChannel(await client.websocket(STREAM_PATH, message_bytes_max=wire.FRAME_BYTES_MAX))
        epoch = self._role.epoch
        identity = Identity(
            self._role.secondary_id, self._role.store_id, self._role.set_id, epoch.number, epoch.id
        )  # it claims to hold everything: only the stream is wanted
        await channel.send(wire.encode(hello_of(identity, self.position, Limits())))
        reply = wire.decode_hello_reply(await channel.recv())
        if self.position is None:
            self.position = Position(reply.set_id, reply.generation, reply.epoch, reply.head_index, reply.head_hash)
            await channel.close("now it knows where to begin")
        return channel, reply

    async def _read(self, channel: WebSocketChannel, position: Position) -> None:
        intake = Intake(self._mode, position, Budget.of(Limits()))
        while True:
            raw = await channel.recv()
            frame = wire.decode_from_primary(raw)
            self.bytes += len(raw)
            if not isinstance(frame, wire.RecordFrame | wire.Skip | wire.PartFrame):
                continue
            intake.accept(frame)
            batch = intake.take()
            if batch is None:
                continue
            if self._pause_s:
                await asyncio.sleep(self._pause_s)
            self.position = batch.position
            self.records += 1
            self.entries += len(batch.writes)
            await channel.send(wire.encode(wire.Ack(self.index, self.index)))

    async def _beat(self, channel: WebSocketChannel) -> None:
        while True:
            await channel.send(wire.encode(wire.Heartbeat(0, 0, 0, self.index, "", ())))
            await asyncio.sleep(BEAT_S)


@contextlib.asynccontextmanager
async def following(secondaries: Sequence[ThinSecondary]) -> AsyncIterator[None]:
    """All of them at work inside the block."""
    tasks = [asyncio.create_task(one.run()) for one in secondaries]
    try:
        for one, task in zip(secondaries, tasks, strict=True):
            waiting = asyncio.create_task(one.joined.wait())
            await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if task.done():
                task.result()
                raise ChannelClosed(one.ended)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
