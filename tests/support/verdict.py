"""The judgement of a run on a real Consul, by the simulation's own witness and checkers.

Every transaction that the nodes' taps saw is put in the order in which Consul applied it (all keys that a transaction
writes get one ModifyIndex, above any before) and shown to the witness; what clients were told is then held against the
log, and the replayed rows against what Consul really holds.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from consul_backend.config import ConsulConfig
from consul_backend.memory_table import MemoryTable
from consul_backend.merkle import Forest
from consul_backend.physical import EPOCH_KEY, Item
from consul_backend.recovery import recover
from consul_backend.replicated import StoreOptions, physical_key
from consul_backend.store import ConsulStore
from consul_backend.tenure import Tenure
from consul_backend.testing import Applied
from consul_backend.txn import Cas, CheckIndex, CheckSession, Delete, DeleteTree, Lock, Op, Set, Unlock
from sidecar.core.barrier import Barrier, load_barrier
from sidecar.core.keys import LOCAL_KEYRING, REPLICATED_KEYRING, SEAL
from sidecar.core.seal import combine
from sidecar.core.seal_record import SealRecord, open_root_key
from sidecar.engines.json_values import decode_object
from sidecar.generation import decode_generation
from tests.sim.checkers import Exemption, data_is_fold, index_is_exact, landed, linearizable, stored_index_reaches
from tests.sim.fold import Fold
from tests.sim.history import NEVER, History, Listing, Read, Write
from tests.sim.witness import GENESIS_NODE, Violation, Witness
from tests.support.cluster import Cluster
from tests.support.consul_server import ConsulServer
from tests.support.consul_tap import ConsulTap, Exchange
from tests.support.faults import MOUNT

SEGMENT_RECORDS = StoreOptions().segment_records
_RECORD = re.compile(r"g/(?P<generation>[^/]+)/wal/[0-9]+/(?P<index>[0-9]+)\Z")


@dataclass(slots=True)
class Verdict:
    """What was checked and what does not hold."""

    violations: list[Violation] = field(default_factory=list)
    operations: int = 0
    acknowledged: int = 0
    records: int = 0
    transactions: int = 0
    epochs: int = 0

    def text(self) -> str:
        """One line for people."""
        return (
            f"{self.operations} operations checked ({self.acknowledged} writes acknowledged), {self.records} records,"
            f" {self.transactions} transactions, {self.epochs} tenures: {len(self.violations)} violations"
        )


@dataclass(slots=True)
class _Step:
    exchange: Exchange
    ops: list[Op]
    index: float

    @property
    def record(self) -> str:
        """The key of the record it writes, or ""."""
        return next((op.key for op in self.ops if isinstance(op, Cas) and _RECORD.match(op.key)), "")

    @property
    def session(self) -> str:
        return next((op.session for op in self.ops if isinstance(op, CheckSession | Lock | Unlock)), "")


@dataclass(slots=True)
class _Plain:
    """A witness as clients see its log: the load mount's entries decrypted, by path."""

    records: list[Any]
    fold: Fold


def judge(
    server: ConsulServer,
    cluster: Cluster,
    prefix: str,
    taps: Sequence[ConsulTap],
    histories: Sequence[History],
    mount_uuid: str,
    exempt: Sequence[Exemption] = (),
) -> Verdict:
    """The nodes are stopped. ``mount_uuid`` is the load mount's; ``server`` any Consul server with the store."""
    return _Judge(server, cluster, prefix, taps, mount_uuid).verdict(histories, exempt)


def load_mount_uuid(cluster: Cluster) -> str:
    """Of the load mount, while a node is active."""
    mounts = cluster.call("GET", "sys/mounts").body["data"]
    return str(mounts[f"{MOUNT}/"]["uuid"])


class _Judge:
    def __init__(
        self, server: ConsulServer, cluster: Cluster, prefix: str, taps: Sequence[ConsulTap], mount_uuid: str
    ) -> None:
        self._server = server
        self._prefix = prefix
        self._keys = cluster.keys
        self._mount = f"r/{mount_uuid}/"
        self._found: list[Violation] = []
        self._held = self._dump()
        self._generation = decode_generation(self._held["generation"].value).id
        self._table = MemoryTable()
        self._owners: dict[str, str] = {}
        self._first_sent_s: dict[bytes, float] = {}
        self._sent_s: dict[int, float] = {}
        self._steps = self._in_order([exchange for tap in taps for exchange in tuple(tap.exchanges)])
        self._witness = Witness(
            self._generation,
            self._table,
            lambda session: self._owners.get(session, "nobody"),
            self._found.append,
            segment_records=SEGMENT_RECORDS,
        )

    def verdict(self, histories: Sequence[History], exempt: Sequence[Exemption]) -> Verdict:
        for step in self._steps:
            self._replay(step)
        self._compare_rows()
        self._found += data_is_fold(self._witness, self._table, self._generation, SEGMENT_RECORDS)
        self._found += stored_index_reaches(self._witness, self._table, self._generation)
        forest, index = asyncio.run(self._recovered())
        self._found += index_is_exact(self._witness, forest, index, roots=True)
        plain = self._plain()
        history = self._logical(histories, plain)
        at, found = landed(history, plain)  # type: ignore[arg-type]  # its records are the witness's plain ones
        self._found += found
        self._found += linearizable(history, plain, at, exempt)  # type: ignore[arg-type]  # its records are the witness's plain ones
        return Verdict(
            self._found,
            operations=len(history.writes) + len(history.reads) + len(history.listings),
            acknowledged=history.acknowledged(),
            records=len(self._witness.records),
            transactions=len(self._steps),
            epochs=len({record.header.epoch for record in self._witness.records}),
        )

    # -- the store's own order

    def _dump(self) -> dict[str, Item]:
        rows = self._server.call("GET", f"kv/{self._prefix}?recurse&consistent", timeout_s=30.0).json
        items = {}
        for row in rows:
            key = row["Key"].removeprefix(self._prefix)
            value = base64.b64decode(row["Value"] or "")
            items[key] = Item(key, value, row["ModifyIndex"], row.get("Session", ""))
        return items

    def _in_order(self, exchanges: list[Exchange]) -> list[_Step]:
        exchanges.sort(key=lambda exchange: exchange.order or NEVER)
        steps: list[_Step] = []
        unknown: list[_Step] = []
        newest = 0.0
        for exchange in exchanges:
            step = _Step(exchange, self._ops(exchange.body), 0.0)
            if (raw := _value_of(step.ops, step.record)) is not None:
                self._first_sent_s[raw] = min(exchange.sent_s, self._first_sent_s.get(raw, NEVER))
            if exchange.status not in (0, 200, 500):
                continue
            if exchange.status != 200:
                unknown.append(step)
                continue
            step.index = _written_index(exchange) or newest
            newest = max(newest, step.index)
            steps.append(step)
        steps += self._resolved(unknown, steps)
        steps.sort(key=lambda step: (step.index, step.exchange.order))
        return steps

    def _resolved(self, unknown: list[_Step], known: list[_Step]) -> list[_Step]:
        """Consul itself never answered: what is in the store, or was built upon, was applied."""
        records = {step.record for step in known if step.record}
        found = []
        for step in unknown:
            if step.record:
                held = self._held.get(step.record)
                if step.record not in records and held is not None and held.value == _value_of(step.ops, step.record):
                    records.add(step.record)
                    step.index = held.modify_index
                    found.append(step)
            elif any(isinstance(op, Lock) for op in step.ops):
                later = [it.index for it in known if it.session == step.session and it.record]
                if later:
                    step.index = min(later) - 0.5
                    found.append(step)
            else:
                # A flush: later ones say more, so it is only too lenient to believe that it happened when it was sent.
                sent_s = step.exchange.sent_s
                before = [it.index for it in known if it.exchange.answered_s <= sent_s and it.session == step.session]
                if before:
                    step.index = max(before) + 0.5
                    found.append(step)
        return found

    def _ops(self, body: bytes) -> list[Op]:
        ops: list[Op] = []
        for item in json.loads(body):
            kv = item["KV"]
            key, value = kv["Key"].removeprefix(self._prefix), base64.b64decode(kv.get("Value") or "")
            match kv["Verb"]:
                case "set":
                    ops.append(Set(key, value))
                case "cas":
                    ops.append(Cas(key, value, kv["Index"]))
                case "lock":
                    ops.append(Lock(key, value, kv["Session"]))
                case "unlock":
                    ops.append(Unlock(key, value, kv["Session"]))
                case "delete":
                    ops.append(Delete(key))
                case "delete-tree":
                    ops.append(DeleteTree(key))
                case "check-session":
                    ops.append(CheckSession(key, kv["Session"]))
                case "check-index":
                    ops.append(CheckIndex(key, kv["Index"]))
                case _:
                    pass
        return ops

    def _replay(self, step: _Step) -> None:
        table, index = self._table, int(step.index)
        table.begin()
        node = step.exchange.node
        first = _RECORD.match(step.record)
        if first is not None:
            self._sent_s[int(first["index"])] = self._first_sent_s[_value_of(step.ops, step.record) or b""]
        if first is not None and int(first["index"]) == 1:
            node = GENESIS_NODE
        elif not step.session:
            self._found.append(Violation("fence", f"{node} sent an unfenced transaction: {step.ops[:2]}"))
        elif not step.record and not any(
            isinstance(op, Lock | Unlock) or (isinstance(op, CheckIndex | Cas) and op.key == EPOCH_KEY)
            for op in step.ops
        ):
            self._found.append(Violation("fence", f"{node} sent a transaction without record or epoch check"))
        for op in step.ops:
            match op:
                case Set(key, value) | Cas(key, value):
                    held = table.read(key)
                    table.put(Item(key, value, index, held.session if held is not None else ""))
                case Lock(key, value, session):
                    self._owners[session] = step.exchange.node
                    table.put(Item(key, value, index, session))
                case Unlock(key, value):
                    table.put(Item(key, value, index))
                case Delete(key):
                    table.delete(key)
                case DeleteTree(key):
                    table.delete_tree(key)
                case _:
                    pass
        self._witness.applied(Applied(node, step.ops, index, step.index))

    def _compare_rows(self) -> None:
        replayed = {item.key: item.value for item in self._table.items(f"g/{self._generation}/")}
        held = {key: item.value for key, item in self._held.items() if key.startswith(f"g/{self._generation}/")}
        differing = [key for key in replayed.keys() | held.keys() if replayed.get(key) != held.get(key)]
        # What Consul was asked for while it died may or may not be there; the index is checked by what it says.
        differing = [key for key in differing if "/merkle/" not in key and not key.endswith("/checkpoint")]
        if differing:
            what = f"{len(differing)} stored keys are not what the transactions wrote, first {min(differing)}"
            self._found.append(Violation("P4", what))

    async def _recovered(self) -> tuple[Forest, int]:
        store = ConsulStore(ConsulConfig(address=self._server.address, token=self._server.token, path=self._prefix))
        await store.open()
        try:
            # The tenure is nobody's: a recovery that wanted to write, because the index is damaged, would be refused.
            nobody = Tenure(0, "checker", str(uuid.uuid4()), 0)
            recovered = await recover(store, self._generation, nobody, SEGMENT_RECORDS)
            return recovered.forest, recovered.tip.record.index
        finally:
            await store.close()

    # -- what clients see

    def _plain(self) -> _Plain:
        barrier = asyncio.run(self._barrier())
        fold, plain = self._witness.fold, Fold()
        opened: dict[bytes, bytes] = {}

        def path_of(key: str) -> str:
            return key.removeprefix(self._mount)

        def value_of(key: str, value: bytes | None) -> bytes | None:
            if value is None:
                return None
            if value not in opened:
                opened[value] = str(decode_object(barrier.open(key, value))["v"]).encode()
            return opened[value]

        for effect in fold.effects:
            mine = {key: value for key, value in effect.items() if key.startswith(self._mount)}
            plain.effects.append({path_of(key): value_of(key, value) for key, value in mine.items()})
        for key, versions in fold.versions.items():
            if key.startswith(self._mount):
                plain.versions[path_of(key)] = [(index, value_of(key, value)) for index, value in versions]
        return _Plain(self._witness.records, plain)

    async def _barrier(self) -> Barrier:
        raw = {
            key: self._held[physical_key(self._generation, key)].value
            for key in (SEAL, REPLICATED_KEYRING, LOCAL_KEYRING)
        }
        root_key = open_root_key(
            SealRecord.decode(raw[SEAL]), combine([base64.b64decode(share) for share in self._keys])
        )

        async def read(key: str) -> bytes | None:
            return raw.get(key)

        return await load_barrier(read, root_key)

    def _logical(self, histories: Sequence[History], plain: _Plain) -> History:
        """One history; an acknowledged write gets the record that has its value (a value is written once)."""
        whole = History()
        where = {value: index for versions in plain.fold.versions.values() for index, value in versions}
        for history in histories:
            for write in history.writes:
                ((path, value),) = write.entries.items()
                index = 0
                if write.outcome == "ok":
                    index = where.get(value, 0) or self._shared(plain, path, write)
                whole.writes.append(
                    Write(
                        len(whole.writes),
                        write.client,
                        write.entries,
                        write.invoked_s,
                        write.completed_s if write.outcome != "unknown" else NEVER,
                        write.outcome,
                        index,
                    )
                )
            whole.reads += [Read(it.client, it.key, it.value, it.invoked_s, it.completed_s) for it in history.reads]
            whole.listings += [
                Listing(it.client, it.prefix, it.names, it.invoked_s, it.completed_s) for it in history.listings
            ]
        return whole

    def _shared(self, plain: _Plain, path: str, write: Write) -> int:
        """Several writes of one key in one transaction share its operation, and the last one's value is what is
        stored. So an acknowledged write that is in no record was in one that has its key and was first sent during
        the write. Of several the oldest: that says the least about what others may see, so it accuses nobody."""
        for index, _ in plain.fold.versions.get(path, ()):
            if write.invoked_s <= self._sent_s[index] <= write.completed_s:
                return index
        return 0


def _value_of(ops: list[Op], key: str) -> bytes | None:
    return next((op.value for op in ops if isinstance(op, Cas | Set) and op.key == key), None)


def _written_index(exchange: Exchange) -> int:
    """The ModifyIndex that the transaction gave: the highest of what it wrote; 0 when it only deleted."""
    verbs = [item["KV"]["Verb"] for item in json.loads(exchange.body)]
    named = [verb for verb in verbs if verb not in ("delete", "delete-tree", "check-not-exists")]
    results = json.loads(exchange.answer).get("Results") or []
    pairs = zip(named, results, strict=True)
    return max((it["KV"]["ModifyIndex"] for verb, it in pairs if verb in ("set", "cas", "lock", "unlock")), default=0)
