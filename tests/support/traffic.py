"""Clients of a cluster that write, read and list all the time, and remember what they were told and when."""

from __future__ import annotations

import http.client
import itertools
import random
import threading
import time
import uuid
from collections.abc import Sequence
from functools import partial

from tests.sim.history import History, Listing, Read, Write
from tests.support.cluster import ClusterError, Node
from tests.support.faults import ACKED, FAILED, MOUNT, Client, outcome_of
from tests.support.load_threads import LoadThreads

KEYS = 12
FOLDER = "t"
RETRY_S = 0.02
OUTCOMES = {ACKED: "ok", FAILED: "fail"}


class Traffic(LoadThreads):
    """``writers`` and ``readers`` share ``KEYS`` keys. Every value is written once, so a value tells its write.

    ``timeout_s``: when a client gives up, not knowing the outcome. ``history`` has logical paths below the mount as
    keys; times are monotonic seconds of this process.
    """

    def __init__(
        self, nodes: Sequence[Node], token: str, *, writers: int = 4, readers: int = 2, timeout_s: float = 20.0
    ) -> None:
        self.history = History()
        self.odd: list[tuple[int, str]] = []
        self._nodes = nodes
        self._token = token
        self._timeout_s = timeout_s
        self._some = threading.Condition()
        self._acked_at_s: list[float] = []
        self._folder = f"{FOLDER}-{uuid.uuid4().hex[:6]}"
        writes = [partial(self._write, n) for n in range(writers)]
        super().__init__(writes + [partial(self._read, n) for n in range(readers)])

    # -- what the tests ask

    @property
    def acked(self) -> int:
        return len(self._acked_at_s)

    def count(self, outcome: str) -> int:
        """Writes that ended as ok, fail or unknown."""
        return sum(write.outcome == outcome and write.completed_s > 0 for write in tuple(self.history.writes))

    def operations(self) -> int:
        """Everything that was answered or whose outcome is to be judged."""
        history = self.history
        return len(history.writes) + len(history.reads) + len(history.listings)

    def wait_acked(self, count: int, timeout_s: float = 120.0) -> float:
        """Until ``count`` more writes are acknowledged than now: the floor of useful work before a fault, and the
        liveness after it. Returns how long that took. Raises ClusterError."""
        started_s = time.monotonic()
        with self._some:
            target = self.acked + count
            while self.acked < target:
                left_s = started_s + timeout_s - time.monotonic()
                if left_s <= 0:
                    done = count - (target - self.acked)
                    raise ClusterError(
                        f"{done} of {count} writes were acknowledged within {timeout_s:.0f} s; odd: {self.odd[-3:]}"
                    )
                self._some.wait(left_s)
        return time.monotonic() - started_s

    def gap_s(self, since_s: float = 0.0) -> float:
        """The longest time without an acknowledgement after ``since_s`` (monotonic): how long no node was active."""
        times = sorted(self._acked_at_s)
        pairs = itertools.pairwise(times)
        return max((after - before for before, after in pairs if after >= since_s), default=0.0)

    # -- clients

    def _write(self, number: int) -> None:
        clients = [Client(node, self._token, self._timeout_s) for node in self._nodes]
        chance, turn = random.Random(number), number
        count = 0
        while not self.stopped.is_set():
            count += 1
            path = f"{self._folder}/{chance.randrange(KEYS)}"
            value = f"{number}-{count}-{self._folder}"
            write = Write(0, f"writer {number}", {path: value.encode()}, time.monotonic())
            with self._some:
                self.history.writes.append(write)
                write.number = len(self.history.writes)
            self._put(clients[turn % len(clients)], write, path, value)
            if write.outcome != "ok":
                turn += 1
                self.stopped.wait(RETRY_S)

    def _put(self, client: Client, write: Write, path: str, value: str) -> None:
        try:
            status, body = client.call("PUT", f"{MOUNT}/{path}", {"v": value})
        except ConnectionRefusedError:
            write.outcome = "fail"
        except (OSError, http.client.HTTPException):
            write.outcome = "unknown"
        else:
            text = " ".join((body or {}).get("errors") or [])
            write.outcome = OUTCOMES.get(outcome_of(status, text), "unknown")
            self._note_odd(status, text)
        if write.outcome != "unknown":
            write.completed_s = time.monotonic()
        if write.outcome == "ok":
            with self._some:
                self._acked_at_s.append(write.completed_s)
                self._some.notify_all()

    def _note_odd(self, status: int, text: str) -> None:
        """A standby that cannot reach the active node redirects (307)."""
        if status not in (200, 204, 307, 500, 503) or "internal error" in text:
            self.odd.append((status, text))

    def _read(self, number: int) -> None:
        clients = [Client(node, self._token, self._timeout_s) for node in self._nodes]
        chance, turn = random.Random(-1 - number), number
        while not self.stopped.is_set():
            turn += 1
            listing = chance.random() < 0.1
            path = f"{self._folder}/" if listing else f"{self._folder}/{chance.randrange(KEYS)}"
            started_s = time.monotonic()
            try:
                status, body = clients[turn % len(clients)].call("LIST" if listing else "GET", f"{MOUNT}/{path}")
            except (OSError, http.client.HTTPException):
                self.stopped.wait(RETRY_S)
                continue
            ended_s, name = time.monotonic(), f"reader {number}"
            if status not in (200, 404):
                self._note_odd(status, " ".join((body or {}).get("errors") or []))
                self.stopped.wait(RETRY_S)
            elif listing:
                names = frozenset(body["data"]["keys"]) if status == 200 else frozenset()
                self.history.listings.append(Listing(name, path, names, started_s, ended_s))
            else:
                value = body["data"]["v"].encode() if status == 200 else None
                self.history.reads.append(Read(name, path, value, started_s, ended_s))
