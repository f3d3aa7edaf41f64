"""Packing driven at random: batches arrive, are withdrawn, travel alone, limits shrink; nothing is lost or moved."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from consul_backend.batching import OVERHEAD_OPS, Batch, Budget, NeedsParts, Packing, Preparer, require_fits_alone, take
from consul_backend.limits import Limits, body_bytes
from consul_backend.physical import LOCK_KEY
from consul_backend.position import Position
from consul_backend.txn import Cas, CheckIndex, CheckSession
from consul_backend.wal import Record, Write, record_key
from consul_backend.wire import encode_txn

SESSION = "0b8f2c1e-1c3d-4b5a-9a77-3f3a7f3a7f3a"
PREFIX = "outrider/"
KEY = record_key("g1", 2**40, 512)
FRAME_BYTES = 700
"""How much the packer may overestimate one transaction: sizes of numbers and frames that it does not know yet."""

keys = st.builds(
    "{}/{}/k{}".format, st.sampled_from("rl"), st.sampled_from(["one", "zwei ü", "p" * 3000]), st.integers(0, 30)
)
values = st.none() | st.integers(0, 3000).map(lambda size: b"v" * size)
writes = st.lists(st.builds(Write, keys, values), min_size=1, max_size=5)


class PackingMachine(RuleBasedStateMachine):
    """``waiting`` is the queue as a dumb packer would keep it; ``done`` is what was packed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self._size(Limits(ops_max=12, body_bytes_max=24_000, value_bytes_max=20_000, prefix_bytes=len(PREFIX)))
        self.queue: deque[Batch] = deque()
        self.positions: dict[str, Position] = {}
        self.arrived: list[Batch] = []
        self.done: list[Batch] = []
        self.gone: list[Batch] = []
        self.state: dict[str, bytes | None] = {}

    def _size(self, limits: Limits) -> None:
        self.limits = limits
        self.preparer = Preparer("g1", limits)
        self.budget = Budget(limits, session=SESSION, record_key=KEY, writer="node")

    @rule(entries=writes, position=st.none() | st.integers(0, 40), alone=st.booleans())
    def arrive(self, entries: list[Write], position: int | None, alone: bool) -> None:
        at = None if position is None else {"performance": Position("s" * position, "g", 1, 2, b"h" * 32)}
        batch = Batch(self.preparer.prepare_all(entries), at)
        batch.alone = alone and len(self.arrived) % 4 == 0
        try:
            require_fits_alone(batch, self.budget, self.positions)
        except NeedsParts:
            assert self._body([batch]) + FRAME_BYTES + 512 > self.limits.body_bytes_max or len(batch.writes) > (
                self.limits.ops_max - OVERHEAD_OPS
            ), "refused without need"
            return
        self.queue.append(batch)
        self.arrived.append(batch)

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        batch = data.draw(st.sampled_from(list(self.queue)))
        self.queue.remove(batch)
        self.gone.append(batch)

    @precondition(lambda self: self.queue)
    @rule()
    def pack(self) -> None:
        waiting = list(self.queue)
        packing = take(self.queue, self.budget, self.positions)
        assert packing.batches == waiting[: len(packing.batches)]
        assert list(self.queue) == waiting[len(packing.batches) :]
        assert packing.batches, "what fits alone is never stuck"
        assert all(not batch.alone for batch in packing.batches) or len(packing.batches) == 1
        body = self._encoded(packing)
        assert body <= self.limits.body_bytes_max
        assert len(packing.entries) <= self.limits.ops_max - OVERHEAD_OPS
        if self.queue and not self.queue[0].alone and not packing.batches[0].alone:
            more = [*packing.batches, self.queue[0]]
            keys = {key for batch in more for key in batch.writes}
            too_many = len(keys) > self.limits.ops_max - OVERHEAD_OPS
            assert (
                too_many
                or self._body(more) + FRAME_BYTES > self.limits.body_bytes_max
                or self._record(more) > (self.limits.value_bytes_max - FRAME_BYTES)
            ), "one more would have fitted"
        for batch in packing.batches:
            self.state |= {key: write.value for key, write in batch.writes.items()}
        assert {key: self.state[key] for key in packing.entries} == {
            key: write.value for key, write in packing.entries.items()
        }, "the last write of a key counts"
        self.positions = dict(packing.positions)
        self.done += packing.batches

    @rule(ops_max=st.integers(5, 12), body_bytes_max=st.integers(17_000, 24_000))
    def limits_change(self, ops_max: int, body_bytes_max: int) -> None:
        """As after a refused size: what is queued and does not fit any more is told so."""
        self._size(
            Limits(ops_max=ops_max, body_bytes_max=body_bytes_max, value_bytes_max=16_000, prefix_bytes=len(PREFIX))
        )
        for batch in list(self.queue):
            try:
                require_fits_alone(batch, self.budget, self.positions)
            except NeedsParts:
                self.queue.remove(batch)
                self.gone.append(batch)

    @invariant()
    def nothing_is_lost_and_order_is_kept(self) -> None:
        kept = [batch for batch in self.arrived if batch not in self.gone]
        assert [*self.done, *self.queue] == kept

    def _transaction(self, entries: dict[str, object], groups: object, positions: object) -> tuple[list[object], int]:
        record = Record.build(
            index=2**63 - 1, prev_hash=b"p" * 32, epoch=2**63 - 1, writer="node", batch_id=b"b" * 16,
            time_ms=2**63 - 1, kind="genesis", positions=positions, groups=groups,
        )  # fmt: skip
        raw = record.encode()
        ops = [CheckSession(LOCK_KEY, SESSION), CheckIndex(KEY, 2**64 - 1)]
        ops += [entry.op for entry in entries.values()]
        return [*ops, Cas(KEY, raw, 0)], len(raw)

    def _encoded(self, packing: Packing) -> int:
        ops, record_bytes = self._transaction(packing.entries, packing.groups(), packing.positions)
        assert record_bytes <= packing.record_bytes <= self.limits.value_bytes_max
        encoded = len(encode_txn(ops, PREFIX))
        assert encoded == body_bytes(ops, len(PREFIX))
        return encoded

    def _dumb(self, batches: list[Batch]) -> tuple[list[object], int]:
        entries: dict[str, object] = {}
        groups: dict[tuple[str, str], list[tuple[str, bytes | None]]] = {}
        positions = dict(self.positions)
        for batch in batches:
            entries |= batch.writes
            positions |= batch.positions or {}
        for entry in entries.values():
            groups.setdefault(entry.group, []).append((entry.path, entry.value))
        return self._transaction(entries, groups, positions)

    def _body(self, batches: list[Batch]) -> int:
        return body_bytes(self._dumb(batches)[0], len(PREFIX))

    def _record(self, batches: list[Batch]) -> int:
        return self._dumb(batches)[1]


TestPackingMachine = PackingMachine.TestCase
TestPackingMachine.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
