"""The two round trips of a merkle sync as calls to the primary's cluster port. Both raise ChannelClosed when it cannot
be reached, SyncRefused when it does not speak to this secondary."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sidecar.replication import protocol
from sidecar.replication.channel import ChannelClosed
from sidecar.replication.primary import DIFF_PATH, FETCH_PATH
from sidecar.replication.protocol import DiffReply, DiffRequest, FetchRequest
from sidecar.replication.sync import SyncRefused
from sidecar.transport.peer import PeerClient, PeerOutcomeUnknown, PeerUnreachable

DIFF_IDLE_S = 60.0
"""How long the primary, which compares meanwhile, may be silent. How long its answer takes is the link's matter."""


async def ask_diff(client: PeerClient, request: DiffRequest) -> DiffReply:
    """First round trip."""
    body = bytearray()
    try:
        async with client.stream(DIFF_PATH, protocol.encode(request), idle_timeout_s=DIFF_IDLE_S) as answer:
            async for piece in answer.pieces:
                body += piece
                if len(body) > protocol.DIFF_BYTES_MAX:
                    raise ChannelClosed(f"the primary's answer to the diff passes {protocol.DIFF_BYTES_MAX} bytes")
    except (PeerUnreachable, PeerOutcomeUnknown) as error:
        raise ChannelClosed(str(error)) from error
    if answer.status == 403:
        raise SyncRefused(_text(body))
    if answer.status != 200:
        raise ChannelClosed(f"the primary answered {answer.status} to the diff: {_text(body)}")
    return protocol.decode_diff_reply(bytes(body))


async def ask_entries(client: PeerClient, request: FetchRequest, idle_timeout_s: float) -> AsyncIterator[bytes]:
    """Second round trip: the body, as it comes."""
    try:
        async with client.stream(FETCH_PATH, protocol.encode(request), idle_timeout_s=idle_timeout_s) as answer:
            if answer.status == 403:
                raise SyncRefused("the primary refuses to send entries to this secondary")
            if answer.status != 200:
                raise ChannelClosed(f"the primary answered {answer.status} to the fetch")
            async for piece in answer.pieces:
                yield piece
    except (PeerUnreachable, PeerOutcomeUnknown) as error:
        raise ChannelClosed(str(error)) from error


def _text(body: bytes | bytearray) -> str:
    return body[:300].decode("utf-8", "replace")
