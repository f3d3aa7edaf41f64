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

DIFF_TIMEOUT_S = 60.0


async def ask_diff(client: PeerClient, request: DiffRequest) -> DiffReply:
    """First round trip."""
    try:
        answer = await client.post(
            DIFF_PATH,
            protocol.encode(request),
            timeout_s=DIFF_TIMEOUT_S,
            answer_bytes_max=protocol.DIFF_BYTES_MAX,
        )
    except (PeerUnreachable, PeerOutcomeUnknown) as error:
        raise ChannelClosed(str(error)) from error
    if answer.status == 403:
        raise SyncRefused(_text(answer.body))
    if answer.status != 200:
        raise ChannelClosed(f"the primary answered {answer.status} to the diff: {_text(answer.body)}")
    return protocol.decode_diff_reply(answer.body)


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


def _text(body: bytes) -> str:
    return body[:300].decode("utf-8", "replace")
