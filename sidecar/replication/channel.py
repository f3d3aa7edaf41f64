"""The way frames travel: a small interface, and a websocket that keeps to it."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Protocol

from aiohttp import ClientConnectionError, ClientWebSocketResponse, WSMsgType, web

from sidecar.replication.protocol import FRAME_BYTES_MAX

CLOSE_TIMEOUT_S = 2.0
FRAME_PATIENCE_S = 300.0
"""How long one frame may take to arrive: the largest one, at 64 kbit/s."""
_LAST_DATA_RECV = 52  # offset of tcpi_last_data_recv, milliseconds, in linux/tcp.h


class ChannelClosed(Exception):
    """The peer is gone, or this side closed. What was sent before may or may not have arrived."""


class Channel(Protocol):
    """Whole frames in order, both ways. Any number of senders, one receiver."""

    async def send(self, frame: bytes) -> None:
        """Hand over one frame; waits while the peer reads slowly. Raises ChannelClosed."""

    async def recv(self) -> bytes:
        """The next frame. Raises ChannelClosed."""

    def silent_s(self) -> float:
        """Seconds since the newest byte of the peer came in, be its frame whole or not; infinite where nobody can
        tell."""

    async def close(self, reason: str) -> None:
        """End the channel within a short bounded time; ``reason`` reaches the peer if it still listens."""


async def hear(
    channel: Channel, beat_s: float, silent_beats_max: int, on_sign: Callable[[], None] = lambda: None
) -> bytes:
    """The next frame of a peer that sends one each ``beat_s``. Raises ChannelClosed, also when nothing at all came for
    ``silent_beats_max`` beats.

    On a narrow link one frame may take longer than that, and every heartbeat waits behind it. To give the peer up then
    would be to begin the same frame again, for ever; so a frame that is arriving is a sign of life, which ``on_sign``
    hears, for a bounded time.
    """
    silent = 0
    for _ in range(max(silent_beats_max, int(FRAME_PATIENCE_S / beat_s))):
        try:
            async with asyncio.timeout(beat_s):
                return await channel.recv()
        except TimeoutError:
            if channel.silent_s() < beat_s:
                on_sign()
                silent = 0
                continue
            silent += 1
            if silent >= silent_beats_max:
                break
    raise ChannelClosed(f"no heartbeat for {beat_s * silent_beats_max:g} s")


class WebSocketChannel:
    """One aiohttp websocket: a server's from :meth:`accept`, a client's from ``ws_connect``, which must set
    ``max_msg_size`` and no compression.

    Only binary messages of at most ``FRAME_BYTES_MAX`` bytes pass; anything else closes the channel. No compression: a
    small message must not become a large one.
    """

    def __init__(
        self,
        socket: ClientWebSocketResponse | web.WebSocketResponse,
        transport: asyncio.Transport | None = None,
    ) -> None:
        self._socket = socket
        self._transport = transport
        self._sending = asyncio.Lock()

    @classmethod
    async def accept(cls, request: web.BaseRequest) -> WebSocketChannel:
        """The server side of an upgrade request. Raises aiohttp's HTTPBadRequest when it is not one."""
        socket = web.WebSocketResponse(
            max_msg_size=FRAME_BYTES_MAX, compress=False, autoping=True, timeout=CLOSE_TIMEOUT_S
        )
        await socket.prepare(request)
        return cls(socket, request.transport)

    @property
    def socket(self) -> ClientWebSocketResponse | web.WebSocketResponse:
        """The response a server handler has to return after serving."""
        return self._socket

    async def send(self, frame: bytes) -> None:
        if len(frame) > FRAME_BYTES_MAX:
            raise ValueError(f"a frame of {len(frame)} bytes exceeds the limit of {FRAME_BYTES_MAX}")
        try:
            async with self._sending:
                await self._socket.send_bytes(frame)
        except (ClientConnectionError, ConnectionError, RuntimeError) as error:
            raise ChannelClosed(f"the connection is gone ({type(error).__name__})") from error

    async def recv(self) -> bytes:
        try:
            message = await self._socket.receive()
        except (ClientConnectionError, ConnectionError, RuntimeError) as error:
            raise ChannelClosed(f"the connection is gone ({type(error).__name__})") from error
        if message.type is WSMsgType.BINARY:
            return bytes(message.data)
        if message.type is WSMsgType.CLOSE:
            raise ChannelClosed(f"the peer closed the stream: {message.extra or message.data}")
        if message.type is WSMsgType.TEXT:
            await self.close("only binary messages are spoken here")
        raise ChannelClosed(f"the stream ended ({message.type.name.lower()})")

    def silent_s(self) -> float:
        carrier = self._socket if isinstance(self._socket, ClientWebSocketResponse) else self._transport
        try:
            found = carrier.get_extra_info("socket") if carrier is not None else None
            facts = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104) if found is not None else b""
            return float(struct.unpack_from("=I", facts, _LAST_DATA_RECV)[0]) / 1000
        except (OSError, AttributeError, struct.error):  # closed meanwhile (asyncio's TLS transport too), or no Linux
            return float("inf")

    async def close(self, reason: str) -> None:
        message = reason.encode()[:120]  # a close frame holds at most 123 bytes of reason
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._socket.close(message=message)
        except (TimeoutError, ClientConnectionError, ConnectionError, RuntimeError):
            pass  # the peer is gone or stuck, which is why we close
        if self._transport is not None and _unsent_bytes(self._transport):
            self._transport.abort()  # a peer that does not read would keep what was not sent for as long as it likes


def _unsent_bytes(transport: asyncio.Transport) -> int:
    try:
        return transport.get_write_buffer_size()
    except AttributeError:  # asyncio's TLS transport (3.11), once it was closed twice
        return 0
