"""The opening of a stream: does the secondary's position lie on this primary's log? Pure."""

from __future__ import annotations

from dataclasses import dataclass

from consul_backend.limits import Limits
from consul_backend.position import Position
from sidecar.replication.history import History, Promotion, fork_between
from sidecar.replication.protocol import PROTOCOL_VERSIONS, Hello, HelloReply, is_none
from sidecar.replication.selection import EVERYTHING, Partitions

NO_MATCHING_WALS = "no matching WALs available"
LACKS_PARTITIONS = "the secondary does not hold every partition that it is sent now"


@dataclass(frozen=True, slots=True)
class Source:
    """A primary as a replication source: which set, which store, which replication epoch (number and random id), and
    the epochs of the set up to it; empty where only the newest matters."""

    cluster_id: str
    set_id: str
    generation: str
    epoch: int
    epoch_id: str
    history: History = ()


@dataclass(frozen=True, slots=True)
class Identity:
    """A secondary as it introduces itself. Empty ``set_id`` and ``epoch_id``: not known yet. ``held``: what of the
    set's data is here."""

    secondary_id: str
    store_id: str
    set_id: str = ""
    epoch: int = 0
    epoch_id: str = ""
    held: Partitions = EVERYTHING


@dataclass(frozen=True, slots=True)
class LogFacts:
    """What the primary's log says. ``hash_at_position`` is the chain hash of the record with the position's index;
    None when that index was collected or was never written."""

    head_index: int
    head_hash: bytes
    hash_at_position: bytes | None


def hello_of(identity: Identity, position: Position | None, limits: Limits) -> Hello:
    """The secondary's first frame."""
    return Hello(
        versions=PROTOCOL_VERSIONS,
        secondary_id=identity.secondary_id,
        store_id=identity.store_id,
        set_id=identity.set_id,
        epoch=identity.epoch,
        epoch_id=identity.epoch_id,
        position=position,
        ops_max=limits.ops_max,
        body_bytes_max=limits.body_bytes_max,
        prefix_bytes=limits.prefix_bytes,
        held=identity.held,
    )


def answer_hello(
    hello: Hello, source: Source, facts: LogFacts, limits: Limits, selection: Partitions = EVERYTHING
) -> HelloReply:
    """The primary's first frame. The caller has checked who the secondary is; here it is only about data. What of the
    ``selection`` the secondary does not hold is no matter of the log: only a diff brings it."""
    version = max(set(hello.versions) & set(PROTOCOL_VERSIONS), default=0)
    if not version:
        mode, reason = "refuse", "no common protocol version: upgrade the secondary first"
    elif problem := fork_problem(hello.set_id, hello.epoch, hello.epoch_id, source):
        mode, reason = "refuse", problem
    elif problem := _position_problem(hello.position, source, facts):
        mode, reason = "need-diff", problem
    elif not selection.within(hello.held):
        mode, reason = "need-diff", LACKS_PARTITIONS
    else:
        mode, reason = "accept", ""
    return HelloReply(
        version=version,
        mode=mode,
        reason=reason,
        cluster_id=source.cluster_id,
        set_id=source.set_id,
        generation=source.generation,
        epoch=source.epoch,
        epoch_id=source.epoch_id,
        head_index=facts.head_index,
        head_hash=facts.head_hash,
        ops_max=limits.ops_max,
        body_bytes_max=limits.body_bytes_max,
        prefix_bytes=limits.prefix_bytes,
        history=source.history,
        selection=selection,
    )


def fork_problem(set_id: str, epoch: int, epoch_id: str, source: Source) -> str:
    """Why a secondary of that set and epoch must not follow ``source``; empty when it may. Checked by both ends."""
    if set_id and set_id != source.set_id:
        return "the other cluster belongs to another replication set"
    return fork_between(epoch, epoch_id, source.history or (Promotion(source.epoch, source.epoch_id),))


def contradicts_log(hello: Hello, source: Source, facts: LogFacts) -> bool:
    """Whether the secondary holds records of this very store and epoch that the primary's log denies: one of the two
    stores was restored or changed underneath. A diff mends the data; a person should know."""
    position = hello.position
    if position is None or is_none(position):
        return False
    if (position.set_id, position.generation, position.epoch) != (source.set_id, source.generation, source.epoch):
        return False
    if position.index > facts.head_index:
        return True
    return facts.hash_at_position is not None and facts.hash_at_position != position.chain_hash


def _position_problem(position: Position | None, source: Source, facts: LogFacts) -> str:
    if position is None or is_none(position):
        return "the secondary has no position"
    if (position.set_id, position.generation, position.epoch) != (source.set_id, source.generation, source.epoch):
        return "the secondary's position is in another store or epoch"
    if position.index > facts.head_index:
        return f"the secondary is at {position.index}, after the primary's newest record {facts.head_index}"
    if facts.hash_at_position is None:
        return f"{NO_MATCHING_WALS}: record {position.index} was collected"
    if facts.hash_at_position != position.chain_hash:
        return f"diverged: the primary has another record {position.index}"
    return ""


def is_on_log(reply: HelloReply) -> bool:
    """Whether the primary found the position in the hello on its own log. Only then its mounts, and so what it does not
    select, are known to be those that this cluster had from it. A reason that is not understood proves nothing."""
    return reply.mode == "accept" or (reply.mode == "need-diff" and reply.reason == LACKS_PARTITIONS)


def source_of(reply: HelloReply) -> Source:
    """Whom the secondary talks to, from the answer to its hello."""
    return Source(reply.cluster_id, reply.set_id, reply.generation, reply.epoch, reply.epoch_id, reply.history)
