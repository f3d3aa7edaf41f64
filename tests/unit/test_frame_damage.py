"""F20 and F21: frames that arrive damaged, cut, twice, too early, not at all, or from another session. None is applied.

Here with the codec alone, so that there can be many: 20,000 a run, a million in a soak. Each refused frame ends the
connection, and the next one begins after the last record that was accepted, as a hello does.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import pytest

from consul_backend.limits import Limits
from consul_backend.position import Position
from consul_backend.wal import GENESIS_PREV, CorruptRecord, Record, Write
from sidecar.replication import protocol
from sidecar.replication.intake import Batch, Budget, Intake
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from sidecar.replication.outgoing import frames_of
from sidecar.replication.protocol import CHECKSUM_BYTES, Frame, ProtocolViolation, RecordFrame, Skip, encode
from tests.support.faults import rounds
from tests.support.replication import MemoryStore

FRAMES = 20_000
RECORDS = 400
FORK = 150
"""Up to here the other history is the same, as that of a primary that was replaced."""
START = Position("set", "generation", 1, 0, GENESIS_PREV)


@dataclass
class Damage:
    """A wire that damages one frame in a hundred, in every way there is."""

    mode: Mode
    dice: random.Random
    log: list[Record]
    good: list[bytes]
    foreign: list[bytes | None]
    done: Counter[str] = field(default_factory=Counter)

    def carry(self, number: int) -> list[bytes]:
        """What arrives where frame ``number`` was sent."""
        if self.dice.random() >= 0.01:
            return [self.good[number]]
        kind = self.dice.choice(list(WAYS))
        arrives = WAYS[kind](self, number)
        self.done[kind] += arrives != [self.good[number]]
        return arrives


def flipped(wire: Damage, raw: bytes, first: int = 0) -> bytes:
    damaged = bytearray(raw)
    for _ in range(wire.dice.randint(1, 4)):
        damaged[wire.dice.randrange(first, len(raw))] ^= wire.dice.randint(1, 255)
    return bytes(damaged)


def resealed(wire: Damage, number: int) -> list[bytes]:
    """Damage above the checksum. A skip has nothing but its checksum, and what follows it does not fit then."""
    raw = wire.good[number]
    if isinstance(protocol.decode_from_primary(raw), Skip):
        return [raw]
    payload = flipped(wire, raw, CHECKSUM_BYTES)[CHECKSUM_BYTES:]
    return [zlib.crc32(payload).to_bytes(CHECKSUM_BYTES, "big") + payload]


WAYS: dict[str, Callable[[Damage, int], list[bytes]]] = {
    "changed": lambda wire, number: [flipped(wire, wire.good[number])],
    "changed above the checksum": resealed,
    "cut": lambda wire, number: [wire.good[number][: wire.dice.randrange(len(wire.good[number]))]],
    "longer": lambda wire, number: [wire.good[number] + wire.dice.randbytes(wire.dice.randint(1, 9))],
    "two in one": lambda wire, number: [wire.good[number] + wire.good[number]],
    "noise": lambda wire, number: [wire.dice.randbytes(wire.dice.randint(0, 200))],
    "twice": lambda wire, number: [wire.good[number]] * 2,
    "too early": lambda wire, number: wire.good[number : number + 2][::-1],
    "lost": lambda wire, number: wire.good[number + 1 : number + 2],
    "replayed": lambda wire, number: [wire.good[wire.dice.randrange(number + 1)], wire.good[number]],
    "of another history": lambda wire, number: [wire.foreign[number] or wire.good[number]],
    "of another session": lambda wire, number: [wire.dice.choice([*filter(None, wire.foreign)]), wire.good[number]],
}


def write_some(store: MemoryStore, dice: random.Random) -> None:
    while len(store.log) < RECORDS:
        keys = {f"{dice.choice('rrlc')}/p{dice.randint(0, 2)}/{dice.randint(0, 30)}" for _ in range(dice.randint(1, 4))}
        store.write(*((key, None if dice.random() < 0.2 else dice.randbytes(8)) for key in sorted(keys)))


def wire_of(mode: Mode, seed: int) -> Damage:
    dice = random.Random(seed)
    store, other = MemoryStore(), MemoryStore()
    write_some(store, random.Random(seed))
    for record in store.log[1:FORK]:
        other.write(*((write.key, write.value) for write in record.writes()))
    assert other.log[FORK - 1].chain_hash == store.log[FORK - 1].chain_hash
    write_some(other, random.Random(seed + 1))

    def frames(log: list[Record]) -> list[Frame]:
        return [frames_of([record], mode.classes)[0][0] for record in log]

    foreign: list[bytes | None] = [encode(frame) for frame in frames(other.log)]
    foreign[FORK] = None  # follows what both have: whose it is, the hello decides
    return Damage(mode, dice, store.log, [encode(frame) for frame in frames(store.log)], foreign)


def is_right(wire: Damage, batch: Batch) -> bool:
    """Whether that is one record of the primary's, with what travels of it."""
    if batch.position.index > len(wire.log):
        return False
    record = wire.log[batch.position.index - 1]
    good = [write for write in record.writes() if write.key[0] in wire.mode.classes]
    return batch.position.chain_hash == record.chain_hash and sorted(batch.writes, key=key_of) == sorted(
        good, key=key_of
    )


def key_of(write: Write) -> str:
    return write.key


def run(wire: Damage, count: int) -> tuple[int, int]:
    """Send so many frames; (batches applied that are not what the primary wrote, connections that were ended)."""
    budget = Budget.of(Limits())
    wrong = ended = sent = 0
    intake = Intake(wire.mode, START, budget)
    while sent < count:
        number = intake.last.index
        if number == len(wire.log):
            intake = Intake(wire.mode, START, budget)
            continue
        sent += 1
        try:
            for raw in wire.carry(number):
                frame = protocol.decode_from_primary(raw)
                if not isinstance(frame, RecordFrame | Skip):
                    raise ProtocolViolation("no part of the log")
                intake.accept(frame)
                batch = intake.take()
                assert batch is not None
                if not is_right(wire, batch):
                    wrong += 1
                    intake = Intake(wire.mode, START, budget)
                    break
        except ProtocolViolation:
            ended += 1
            intake = Intake(wire.mode, intake.last, budget)
    return wrong, ended


@pytest.mark.parametrize("mode", [PERFORMANCE, DR], ids=lambda mode: mode.name)
def test_of_many_frames_with_one_in_a_hundred_damaged_none_is_applied_wrongly(mode: Mode) -> None:
    for seed in range(rounds()):
        wire = wire_of(mode, seed)
        wrong, ended = run(wire, FRAMES)
        assert wrong == 0
        assert set(wire.done) == set(WAYS), "every way was tried"
        assert min(wire.done.values()) > 0
        print(f"{FRAMES} frames, {wire.done.total()} damaged, {ended} connections ended, 0 applied wrongly")


def test_what_a_checksum_lets_pass_the_digests_of_a_record_refuse() -> None:
    """The second line. (A skip has none: the next record does not follow it then, and the root is compared.)"""
    wire, accepted = wire_of(DR, 1), 0
    for raw in wire.good:
        for _ in range(20):
            try:
                frame = decode_unchecked(flipped(wire, raw, CHECKSUM_BYTES))
                if isinstance(frame, RecordFrame):
                    Record.decode(frame.raw)
                    accepted += 1
            except (msgspec.MsgspecError, CorruptRecord, UnicodeDecodeError):
                continue
    assert accepted == 0


def decode_unchecked(raw: bytes) -> object:
    return msgspec.msgpack.decode(raw[CHECKSUM_BYTES:], type=RecordFrame | Skip)


@pytest.mark.parametrize("without", ["checksum", "chain"])
def test_the_control_without_a_defence_frames_are_applied_wrongly(
    without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = wire_of(PERFORMANCE, 2)
    if without == "chain":
        decode = Record.decode
        monkeypatch.setattr(Record, "decode", lambda raw, expect_prev=None: decode(raw))
    else:  # then a changed skip counts
        monkeypatch.setattr(protocol, "decode_from_primary", decode_or_refuse)
    wrong, _ = run(wire, FRAMES)
    assert wrong > 0


def decode_or_refuse(raw: bytes) -> object:
    try:
        return decode_unchecked(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ProtocolViolation("does not decode") from None
