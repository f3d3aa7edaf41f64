"""The embedded store's file: Consul's rules (``kv_rules.py``) over rows in SQLite.

One :class:`Engine` is used by one thread (``embedded.py`` owns it). Everything Consul decides inside a transaction is
decided inside one SQLite transaction. Opening a file releases every lock in it: the processes that held them are gone.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from consul_backend.errors import Corrupt, OutcomeUnknown, Unavailable
from consul_backend.kv_rules import Beat, Rules
from consul_backend.physical import Item, Names, TxnResult
from consul_backend.txn import Op

__all__ = ["Beat", "Engine"]

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


class Engine:
    """``on_change`` is called with the keys of every applied change, in this thread, after the commit.

    Every method raises Unavailable or Corrupt when the file does not do what it should; nothing was changed then.
    """

    def __init__(self, path: str | None, on_change: Callable[[Sequence[str]], None]) -> None:
        self._path = path or ":memory:"
        self._on_change = on_change
        self._db: sqlite3.Connection | None = None
        self._rules_now: Rules | None = None

    def open(self) -> None:
        """Open or create the file and release its locks. Raises Corrupt, Unavailable."""
        with _translated(None):
            if self._path != ":memory:":
                # SQLite gives its other files this one's mode.
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            try:
                _prepare(db)
                index = int(db.execute("SELECT value FROM store_index").fetchone()[0])
                rules = Rules(_SqliteTable(db), self._on_change, index=index)
                rules.release_every_lock()
            except BaseException:
                db.close()
                raise
        self._db, self._rules_now = db, rules

    def close(self) -> None:
        """Close the file. Further calls raise Unavailable."""
        db, self._db, self._rules_now = self._db, None, None
        if db is not None:
            db.close()

    def get_many(self, keys: Iterable[str], now_s: float) -> list[Item | None]:
        """See :meth:`Rules.get_many`."""
        with self._open() as rules:
            return rules.get_many(keys, now_s)

    def list(self, prefix: str) -> list[str]:
        """See :meth:`Rules.list`."""
        with self._open() as rules:
            return rules.list(prefix)

    def names_below(self, prefix: str, names_max: int) -> Names | None:
        """See :meth:`Rules.names_below`."""
        with self._open() as rules:
            return rules.names_below(prefix, names_max)

    def look(self, key: str, now_s: float) -> tuple[Item | None, int, int]:
        """See :meth:`Rules.look`."""
        with self._open() as rules:
            return rules.look(key, now_s)

    def txn(self, ops: Sequence[Op], now_s: float) -> TxnResult:
        """See :meth:`Rules.txn`. Raises Conflict, Unavailable, OutcomeUnknown."""
        with self._open() as rules:
            return rules.txn(ops, now_s)

    def create_session(self, beat: Beat, lock_delay_s: float) -> str:
        """See :meth:`Rules.create_session`."""
        with self._open() as rules:
            return rules.create_session(beat, lock_delay_s)

    def session_alive(self, session: str, now_s: float) -> bool:
        """See :meth:`Rules.session_alive`."""
        with self._open() as rules:
            return rules.session_alive(session, now_s)

    def destroy_session(self, session: str, now_s: float) -> None:
        """See :meth:`Rules.destroy_session`."""
        with self._open() as rules:
            rules.destroy_session(session, now_s)

    def expire(self, now_s: float) -> None:
        """See :meth:`Rules.expire`."""
        with self._open() as rules:
            rules.expire(now_s)

    def next_deadline(self) -> float | None:
        """See :meth:`Rules.next_deadline`."""
        with self._open() as rules:
            return rules.next_deadline()

    @contextmanager
    def _open(self) -> Iterator[Rules]:
        if self._rules_now is None:
            raise Unavailable("the embedded store is closed")
        with _translated(self._db):
            yield self._rules_now


class _SqliteTable:
    """Keeps :class:`consul_backend.kv_rules.Table`; what SQLite raises is translated around the calls."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def begin(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def commit(self, index: int) -> None:
        self._db.execute("UPDATE store_index SET value = ?", (index,))
        try:
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self.rollback()
            raise OutcomeUnknown(f"embedded store: {error}") from error

    def rollback(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def read(self, key: str) -> Item | None:
        row = self._db.execute("SELECT value, modify_index, session FROM kv WHERE key = ?", (key.encode(),)).fetchone()
        return None if row is None else Item(key, row[0], row[1], row[2])

    def put(self, item: Item) -> None:
        self._db.execute(
            "INSERT INTO kv VALUES (?1, ?2, ?3, ?4)"
            " ON CONFLICT (key) DO UPDATE SET value = ?2, modify_index = ?3, session = ?4",
            (item.key.encode(), item.value, item.modify_index, item.session),
        )

    def delete(self, key: str) -> bool:
        return self._db.execute("DELETE FROM kv WHERE key = ?", (key.encode(),)).rowcount > 0

    def delete_tree(self, prefix: str) -> Sequence[str]:
        start = prefix.encode()
        end = start[:-1] + bytes([start[-1] + 1]) if start else b"\xff"
        rows = self._db.execute("DELETE FROM kv WHERE key >= ? AND key < ? RETURNING key", (start, end))
        return [key.decode() for (key,) in rows]

    def locked(self) -> Sequence[Item]:
        rows = self._db.execute("SELECT key, value, modify_index, session FROM kv WHERE session != ''").fetchall()
        return [Item(key.decode(), value, index, session) for key, value, index, session in rows]

    def names(self, prefix: str) -> list[str]:
        start = prefix.encode()
        end = start[:-1] + _AFTER_SLASH if start else b"\xff"
        cursor, names = start, list[str]()
        while True:
            rows = self._db.execute(
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

    def names_below(self, prefix: str, names_max: int) -> Names | None:
        start = prefix.encode()
        end = start[:-1] + _AFTER_SLASH if start else b"\xff"
        rows = self._db.execute(
            "SELECT key FROM kv WHERE key >= ? AND key < ? ORDER BY key LIMIT ?", (start, end, names_max + 1)
        ).fetchall()
        return [key[len(start) :].decode() for (key,) in rows] if len(rows) <= names_max else None


@contextmanager
def _translated(db: sqlite3.Connection | None) -> Iterator[None]:
    """SQLite's errors as ours; the change in progress is undone, so a failure leaves the file as it was."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if db is not None and db.in_transaction:
            db.execute("ROLLBACK")
        kind = Unavailable if isinstance(error, sqlite3.OperationalError) else Corrupt
        raise kind(f"embedded store: {error}") from error


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
