"""The embedded store's tables and Consul's rules over them, in plain synchronous code.

One :class:`Engine` is used by one thread (``embedded.py`` owns it). Everything Consul decides inside a transaction is
decided here inside one SQLite transaction. Sessions and lock-delays live in memory, as the process they protect does;
opening a file releases every lock in it.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from consul_backend.errors import Conflict, Corrupt, OpFailure, OutcomeUnknown, Unavailable
from consul_backend.physical import Item, TxnResult
from consul_backend.txn import (
    Cas,
    CheckIndex,
    CheckNotExists,
    CheckSession,
    Delete,
    DeleteTree,
    Get,
    Lock,
    Op,
    Set,
    Unlock,
)

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x4F555452
_LIST_PAGE_ROWS = 256
_AFTER_SLASH = b"0"
"""The byte that follows ``/``: a scan jumps over a whole folder to it."""

_SCHEMA = """
CREATE TABLE kv (
    key BLOB PRIMARY KEY NOT NULL,
    value BLOB NOT NULL,
    modify_index INTEGER NOT NULL,
    session TEXT NOT NULL DEFAULT ''
);
CREATE TABLE store_index (one INTEGER PRIMARY KEY CHECK (one = 1), value INTEGER NOT NULL);
INSERT INTO store_index VALUES (1, 1);
"""


@dataclass(slots=True)
class Beat:
    """When the process behind a set of sessions counts as dead, on the store's clock. Moved by each beat."""

    deadline_s: float = float("-inf")


@dataclass(frozen=True, slots=True)
class _Session:
    beat: Beat
    lock_delay_s: float


@dataclass(slots=True)
class _Work:
    """One transaction in progress."""

    index: int
    now_s: float
    written_index: int = 0
    items: list[Item] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)


class _Refused(Exception):
    """One operation's check failed."""


class Engine:
    """``on_change`` is called with the keys of every applied change, in this thread, after the commit."""

    def __init__(self, path: str | None, on_change: Callable[[frozenset[str]], None]) -> None:
        self._path = path or ":memory:"
        self._on_change = on_change
        self._sessions: dict[str, _Session] = {}
        self._lock_delays: dict[str, float] = {}
        self._index = 0
        self._deleted_at = 0
        self._db: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open or create the file and release its locks. Raises Corrupt, Unavailable."""
        with self._translated():
            db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            try:
                _prepare(db)
                self._index = int(db.execute("SELECT value FROM store_index").fetchone()[0])
                held = db.execute("SELECT 1 FROM kv WHERE session != '' LIMIT 1").fetchone()
            except BaseException:
                db.close()
                raise
        self._db = db
        if held:
            self._release_locks("session != ''", (), {})

    def close(self) -> None:
        """Close the file. Further calls raise Unavailable."""
        if self._db is not None:
            self._db.close()
            self._db = None

    # -- reading

    def get_many(self, keys: Iterable[str], now_s: float) -> list[Item | None]:
        """The keys' items in order."""
        self.expire(now_s)
        with self._translated():
            return [self._read(key) for key in keys]

    def list(self, prefix: str) -> list[str]:
        """Names one level below ``prefix``, folders with a slash, in byte order."""
        start = prefix.encode()
        end = start[:-1] + _AFTER_SLASH if start else b"\xff"
        cursor, names = start, list[str]()
        while True:
            with self._translated():
                rows = self._connection.execute(
                    "SELECT key FROM kv WHERE key >= ? AND key < ? ORDER BY key LIMIT ?", (cursor, end, _LIST_PAGE_ROWS)
                ).fetchall()
            for (key,) in rows:
                name, slash, _ = key[len(start) :].partition(b"/")
                names.append((name + slash).decode())
                if slash:
                    cursor = start + name + _AFTER_SLASH
                    break
                cursor = key + b"\0"
            if not rows:
                return names

    def look(self, key: str, now_s: float) -> tuple[Item | None, int, int]:
        """For a watcher: the item, the index of its last change (or of the last deletion), the store's index."""
        self.expire(now_s)
        with self._translated():
            item = self._read(key)
        return item, item.modify_index if item else self._deleted_at, self._index

    # -- writing

    def txn(self, ops: Sequence[Op], now_s: float) -> TxnResult:
        """Apply all or none. Raises Conflict with every refused operation, Unavailable, OutcomeUnknown."""
        self.expire(now_s)
        db = self._connection
        work = _Work(index=self._index + 1, now_s=now_s)
        failures: list[OpFailure] = []
        with self._translated():
            db.execute("BEGIN IMMEDIATE")
            for position, op in enumerate(ops):
                try:
                    self._apply(work, op)
                except _Refused as refusal:
                    failures.append(OpFailure(position, str(refusal)))
            if failures or not work.touched:
                db.execute("ROLLBACK")
            else:
                db.execute("UPDATE store_index SET value = ?", (work.index,))
        if failures:
            raise Conflict(_conflict_text(failures), tuple(failures))
        if work.touched:
            self._commit(work.index, work.touched)
        return TxnResult(work.written_index, tuple(work.items))

    # -- sessions

    def create_session(self, beat: Beat, lock_delay_s: float) -> str:
        """A session that lives while ``beat`` does."""
        session = str(uuid.uuid4())
        self._sessions[session] = _Session(beat, lock_delay_s)
        return session

    def session_alive(self, session: str, now_s: float) -> bool:
        """Whether the session exists at ``now_s``."""
        self.expire(now_s)
        return session in self._sessions

    def destroy_session(self, session: str, now_s: float) -> None:
        """End a session: its locks are free after its lock-delay."""
        ended = self._sessions.pop(session, None)
        if ended is not None:
            self._invalidate(session, ended, now_s)

    def expire(self, now_s: float) -> None:
        """End every session whose beat was missed."""
        for session in [name for name, it in self._sessions.items() if it.beat.deadline_s <= now_s]:
            self._invalidate(session, self._sessions.pop(session), now_s)

    def next_deadline(self) -> float | None:
        """When the earliest session dies unless its beat comes, or None without sessions."""
        return min((it.beat.deadline_s for it in self._sessions.values()), default=None)

    def _invalidate(self, session: str, ended: _Session, now_s: float) -> None:
        until = now_s + ended.lock_delay_s
        with self._translated():
            rows = self._connection.execute("SELECT key FROM kv WHERE session = ?", (session,)).fetchall()
        if rows:
            self._release_locks("session = ?", (session,), {key.decode(): until for (key,) in rows})

    def _release_locks(self, where: str, parameters: tuple[str, ...], delays: dict[str, float]) -> None:
        db, index = self._connection, self._index + 1
        with self._translated():
            db.execute("BEGIN IMMEDIATE")
            rows = db.execute(f"SELECT key FROM kv WHERE {where}", parameters).fetchall()  # noqa: S608 - two constants
            db.execute(f"UPDATE kv SET session = '', modify_index = ? WHERE {where}", (index, *parameters))  # noqa: S608
            db.execute("UPDATE store_index SET value = ?", (index,))
        self._lock_delays.update(delays)
        self._commit(index, {key.decode() for (key,) in rows})

    # -- operations of a transaction

    def _apply(self, work: _Work, op: Op) -> None:
        match op:
            case Get():
                self._do_get(work, op)
            case Set():
                self._do_set(work, op)
            case Cas():
                self._do_cas(work, op)
            case Lock():
                self._do_lock(work, op)
            case Unlock():
                self._do_unlock(work, op)
            case Delete():
                self._do_delete(work, op)
            case DeleteTree():
                self._do_delete_tree(work, op)
            case CheckIndex():
                self._do_check_index(op)
            case CheckSession():
                self._do_check_session(op)
            case CheckNotExists():
                self._do_check_not_exists(op)

    def _do_get(self, work: _Work, op: Get) -> None:
        item = self._read(op.key)
        if item is None:
            raise _Refused(f"key {op.key!r} doesn't exist")
        work.items.append(item)

    def _do_set(self, work: _Work, op: Set) -> None:
        existing = self._read(op.key)
        self._put(work, op.key, op.value, existing, existing.session if existing else "")

    def _do_cas(self, work: _Work, op: Cas) -> None:
        existing = self._read(op.key)
        if (existing.modify_index if existing else 0) != op.index:
            raise _Refused(f"failed to set key {op.key!r}, index is stale")
        self._put(work, op.key, op.value, existing, existing.session if existing else "")

    def _do_lock(self, work: _Work, op: Lock) -> None:
        if self._lock_delays.get(op.key, float("-inf")) > work.now_s:
            raise _Refused(f"failed to lock key {op.key!r} due to lock delay")
        if op.session not in self._sessions:
            raise _Refused("invalid session")
        existing = self._read(op.key)
        if existing is not None and existing.session not in ("", op.session):
            raise _Refused(f"failed to lock key {op.key!r}, lock is already held")
        self._put(work, op.key, op.value, existing, op.session)

    def _do_unlock(self, work: _Work, op: Unlock) -> None:
        existing = self._read(op.key)
        if existing is None or existing.session != op.session:
            raise _Refused(f"failed to unlock key {op.key!r}, lock isn't held, or is held by another session")
        self._put(work, op.key, op.value, existing, "")

    def _do_delete(self, work: _Work, op: Delete) -> None:
        deleted = self._connection.execute("DELETE FROM kv WHERE key = ?", (op.key.encode(),))
        if deleted.rowcount:
            work.touched.add(op.key)
            self._deleted_at = work.index

    def _do_delete_tree(self, work: _Work, op: DeleteTree) -> None:
        start = op.prefix.encode()
        end = start[:-1] + bytes([start[-1] + 1]) if start else b"\xff"
        rows = self._connection.execute("DELETE FROM kv WHERE key >= ? AND key < ? RETURNING key", (start, end))
        keys = [key.decode() for (key,) in rows]
        if keys:
            work.touched.update(keys)
            self._deleted_at = work.index

    def _do_check_index(self, op: CheckIndex) -> None:
        existing = self._read(op.key)
        if existing is None:
            raise _Refused(f"failed to check index of key {op.key!r}, key doesn't exist")
        if existing.modify_index != op.index:
            raise _Refused(f"key {op.key!r} has modify index {existing.modify_index}, expected {op.index}")

    def _do_check_session(self, op: CheckSession) -> None:
        existing = self._read(op.key)
        if existing is None:
            raise _Refused(f"failed to check session of key {op.key!r}, key doesn't exist")
        if existing.session != op.session:
            raise _Refused(f"key {op.key!r} is held by another session or none")

    def _do_check_not_exists(self, op: CheckNotExists) -> None:
        if self._read(op.key) is not None:
            raise _Refused(f"key {op.key!r} exists")

    # -- rows

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise Unavailable("the embedded store is closed")
        return self._db

    def _read(self, key: str) -> Item | None:
        row = self._connection.execute(
            "SELECT value, modify_index, session FROM kv WHERE key = ?", (key.encode(),)
        ).fetchone()
        return None if row is None else Item(key, row[0], row[1], row[2])

    def _put(self, work: _Work, key: str, value: bytes, existing: Item | None, session: str) -> None:
        if existing is not None and existing.value == value and existing.session == session:
            work.written_index = max(work.written_index, existing.modify_index)
            return
        self._connection.execute(
            "INSERT INTO kv VALUES (?1, ?2, ?3, ?4)"
            " ON CONFLICT (key) DO UPDATE SET value = ?2, modify_index = ?3, session = ?4",
            (key.encode(), value, work.index, session),
        )
        work.written_index = work.index
        work.touched.add(key)

    def _commit(self, index: int, touched: set[str]) -> None:
        try:
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            raise OutcomeUnknown(f"embedded store: {error}") from error
        self._index = index
        self._on_change(frozenset(touched))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Nothing is committed inside: a failure leaves the file as it was."""
        try:
            yield
        except sqlite3.OperationalError as error:
            self._roll_back()
            raise Unavailable(f"embedded store: {error}") from error
        except sqlite3.DatabaseError as error:
            self._roll_back()
            raise Corrupt(f"embedded store: {error}") from error

    def _roll_back(self) -> None:
        if self._db is not None and self._db.in_transaction:
            self._db.execute("ROLLBACK")


def _prepare(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version == 0 and not db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
        db.executescript(
            f"BEGIN; {_SCHEMA} PRAGMA application_id = {_APPLICATION_ID};"
            f" PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
    elif version != SCHEMA_VERSION or db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
        raise Corrupt(f"the embedded store's file has schema {version} of another program or version")


def _conflict_text(failures: Sequence[OpFailure]) -> str:
    first = failures[0]
    more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
    return f"operation {first.op_index}: {first.what}{more}"
