"""What tests that break things share: writers that keep a history, its judgement, and a checker of a whole store."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from consul_backend.chunks import read_value
from consul_backend.embedded import EmbeddedStore
from consul_backend.failpoint import ENVIRONMENT
from consul_backend.keys import decode_path
from consul_backend.merkle import Forest, entry_digest
from consul_backend.physical import PhysicalStore
from consul_backend.recovery import recover
from consul_backend.replicated import StoreOptions
from consul_backend.tenure import Tenure
from consul_backend.wal import Record
from consul_backend.wal_reader import list_segment, list_segments, scan_records
from sidecar.generation import read_generation
from tests.support.cluster import ClusterError, Node
from tests.support.load_threads import LoadThreads
from tests.support.store import committed_writes

MOUNT = "load"
ROUNDS = "OUTRIDER_FAULT_ROUNDS"
RETRY_S = 0.02

ACKED, FAILED, UNKNOWN = "acked", "failed", "unknown"


class Client:
    """One kept connection to one node."""

    def __init__(self, node: Node, token: str, timeout_s: float = 40.0) -> None:
        self._node = node
        self._token = token
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPConnection | None = None

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and decoded body. Raises ConnectionRefusedError (certainly not sent), OSError, HTTPException."""
        if self._connection is None:
            connection = http.client.HTTPConnection("127.0.0.1", self._node.api_port, timeout=self._timeout_s)
            connection.connect()
            self._connection = connection
        try:
            self._connection.request(
                method, f"/v1/{path}", json.dumps(body) if body is not None else None, {"X-Vault-Token": self._token}
            )
            answer = self._connection.getresponse()
            raw = answer.read()
        except (OSError, http.client.HTTPException):
            self.close()
            raise
        return answer.status, json.loads(raw) if raw.strip() else None

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One write: its path below the mount, its value, what the client was told and when (monotonic seconds)."""

    path: str
    value: str
    outcome: str
    status: int
    text: str
    at_s: float


def outcome_of(status: int, text: str) -> str:
    """What an honest client concludes. Only an answer that says so leaves the outcome open."""
    if status < 300:
        return ACKED
    return UNKNOWN if "unknown" in text or "may have been" in text or "outcome" in text else FAILED


class Writers(LoadThreads):
    """Threads that write, each its own keys, one after the other, through any node that takes them.

    ``distinct``: how many keys a writer has; 0 for a new one each time (then :meth:`judge` can tell every attempt).
    ``pace_s``: what a writer waits after an acknowledgement.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        token: str,
        prefix: str,
        *,
        writers: int = 4,
        distinct: int = 0,
        pace_s: float = 0.01,
    ) -> None:
        self._nodes = nodes
        self._token = token
        self._prefix = f"{prefix}-{uuid.uuid4().hex[:6]}"
        self._distinct = distinct
        self._pace_s = pace_s
        self._some = threading.Condition()
        self.attempts: list[Attempt] = []
        super().__init__([partial(self._write, n) for n in range(writers)])

    def _write(self, number: int) -> None:
        clients = [Client(node, self._token) for node in self._nodes]
        turn = number
        for n in itertools.count():
            if self.stopped.is_set():
                break
            path = f"{self._prefix}/{number}-{n % self._distinct if self._distinct else n}"
            attempt = self._attempt(clients[turn % len(clients)], path, f"{number}-{n}")
            with self._some:
                self.attempts.append(attempt)
                self._some.notify_all()
            turn += attempt.outcome != ACKED
            self.stopped.wait(self._pace_s if attempt.outcome == ACKED else RETRY_S)
        for client in clients:
            client.close()

    def _attempt(self, client: Client, path: str, value: str) -> Attempt:
        try:
            status, body = client.call("PUT", f"{MOUNT}/{path}", {"v": value})
        except ConnectionRefusedError as error:
            return Attempt(path, value, FAILED, 0, str(error), time.monotonic())
        except (OSError, http.client.HTTPException) as error:
            return Attempt(path, value, UNKNOWN, 0, repr(error), time.monotonic())
        text = " ".join((body or {}).get("errors") or [])
        return Attempt(path, value, outcome_of(status, text), status, text, time.monotonic())

    def of(self, outcome: str) -> list[Attempt]:
        """The attempts that ended so."""
        return [attempt for attempt in tuple(self.attempts) if attempt.outcome == outcome]

    def wait_acked(self, count: int, timeout_s: float = 120.0) -> None:
        """Until ``count`` more writes are acknowledged than now. Raises ClusterError."""
        target = len(self.of(ACKED)) + count
        deadline = time.monotonic() + timeout_s
        with self._some:
            while len(self.of(ACKED)) < target:
                if not self._some.wait(deadline - time.monotonic()) and time.monotonic() > deadline:
                    last = self.attempts[-1] if self.attempts else None
                    raise ClusterError(f"no {count} acknowledgements within {timeout_s:.0f} s; last: {last}")

    def longest_gap_s(self) -> float:
        """The longest time without an acknowledgement, between the first and the last."""
        times = sorted(attempt.at_s for attempt in self.of(ACKED))
        return max((after - before for before, after in itertools.pairwise(times)), default=0.0)

    def judge(self, node: Node, token: str = "") -> None:
        """Every acknowledged write is there with its value, every refused one is not; asserts. For distinct keys."""
        client = Client(node, token or self._token)
        wrong = []
        for attempt in self.attempts:
            status, body = client.call("GET", f"{MOUNT}/{attempt.path}")
            found = body["data"]["v"] if status == 200 else None
            if status not in (200, 404) or (attempt.outcome, found) not in {
                (ACKED, attempt.value),
                (FAILED, None),
                (UNKNOWN, attempt.value),
                (UNKNOWN, None),
            }:
                wrong.append((attempt, status, found))
        client.close()
        assert not wrong, f"{len(wrong)} of {len(self.attempts)} writes are not as answered: {wrong[:5]}"
        odd = [attempt for attempt in self.attempts if "internal error" in attempt.text]
        assert not odd, f"defects were answered: {odd[:5]}"


def rounds() -> int:
    """How often a fault is repeated: once, unless a soak says more by the environment."""
    return int(os.environ.get(ROUNDS, "1"))


def mount_load(call: Any) -> None:
    """Mount a kv v1 at ``load/``; ``call`` is a cluster's. One write there is one entry."""
    reply = call("POST", f"sys/mounts/{MOUNT}", {"type": "kv"})
    assert reply.status == 204, reply.errors


def arm(node: Node, spec: str) -> None:
    """Have ``node`` fail at the points that ``spec`` names from its next start on; "" for none."""
    node.environment = {ENVIRONMENT: spec} if spec else {}


def await_killed(node: Node, timeout_s: float = 120.0) -> None:
    """Wait for the node to die by SIGKILL of itself. Raises ClusterError."""
    process = node.process
    assert process is not None
    node.wait_until(f"die of {node.environment}", lambda: process.poll() is not None, timeout_s)
    assert process.returncode == -signal.SIGKILL, f"it exited with {process.returncode}\n{node.log_tail()}"
    node.kill()


@dataclass(slots=True)
class StoreFacts:
    """A checked store: generation id, oldest and newest record, entries by logical key, the root of class ``r``."""

    generation: str
    oldest: int
    records: list[Record] = field(repr=False)
    data: dict[str, bytes] = field(repr=False)
    root: bytes = b""

    def replicated(self) -> dict[str, bytes]:
        """The entries of class ``r``."""
        return {key: value for key, value in self.data.items() if key.startswith("r/")}


async def check_store(physical: PhysicalStore) -> StoreFacts:
    """Nobody writes meanwhile, and no large batch is in progress. Asserts: the log is dense and chained; the index that
    recovery makes is the one computed from the data; with the whole log, the data are its fold. Changes nothing."""
    found = await read_generation(physical)
    assert found is not None, "the store is empty"
    generation = found[0].id
    segment_records = StoreOptions().segment_records
    indexes = [
        index
        for segment in await list_segments(physical, generation)
        for index in await list_segment(physical, generation, segment, segment_records)
    ]
    assert indexes == list(range(indexes[0], indexes[-1] + 1)), "the log has a hole"
    records: list[Record] = []
    async for piece in scan_records(physical, generation, indexes[0], indexes[-1], segment_records):
        records += [record for record, _ in piece]
    data = await _entries(physical, generation)
    forest = Forest()
    forest.apply((key, entry_digest(key, value)) for key, value in data.items())
    # The tenure is nobody's: a recovery that wanted to write, because the index is damaged, would be refused.
    nobody = Tenure(0, "checker", str(uuid.uuid4()), 0)
    recovered = await recover(physical, generation, nobody, segment_records)
    for cls in "rlc":
        assert recovered.forest.root(cls) == forest.root(cls), f"the index of class {cls} is not that of the data"
    if indexes[0] == 1:
        folded: dict[str, bytes | None] = {}
        for _, writes in committed_writes(records):
            folded.update((write.key, write.value) for write in writes)
        assert {key: value for key, value in folded.items() if value is not None} == data, "data are not the log's fold"
    return StoreFacts(generation, indexes[0], records, data, forest.root("r"))


async def _entries(physical: PhysicalStore, generation: str) -> dict[str, bytes]:
    root = f"g/{generation}/d/"
    folders, names = [root], []
    while folders:
        folder = folders.pop()
        for name in await physical.list(folder, consistent=True):
            (folders if name.endswith("/") else names).append(folder + name)
    found: dict[str, bytes] = {}
    for name, item in zip(names, await physical.get_many(names, consistent=True), strict=True):
        assert item is not None
        value = await read_value(physical, generation, item.value, consistent=True)
        assert value is not None, "chunks are missing"
        found[decode_path(name.removeprefix(root))] = value
    return found


def check_embedded(directory: Path) -> StoreFacts:
    """:func:`check_store` of a stopped node's embedded store."""

    async def check() -> StoreFacts:
        physical = EmbeddedStore(str(directory))
        await physical.open()
        try:
            return await check_store(physical)
        finally:
            await physical.close()

    return asyncio.run(check())
