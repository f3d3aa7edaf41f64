"""What Consul decides inside a transaction, over any table of rows, in plain synchronous code.

The embedded store keeps the rows in SQLite (``embedded_engine.py``), the simulated Consul in a dict (``testing.py``):
the rules are written once, and one contract suite holds both against a real server. Sessions, lock-delays and
LockIndexes live in memory, as the processes they protect do.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from consul_backend.errors import Conflict, OpFailure
from consul_backend.physical import Item, Names, TxnResult
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

_NEVER = float("-inf")


class Table(Protocol):
    """Rows by key. Changes happen between :meth:`begin` and :meth:`commit` or :meth:`rollback`."""

    def begin(self) -> None:
        """Start a change."""

    def commit(self, index: int) -> None:
        """Keep the change; ``index`` is the store's index from now on. Raises OutcomeUnknown."""

    def rollback(self) -> None:
        """Undo everything since :meth:`begin`; nothing to undo is no failure."""

    def read(self, key: str) -> Item | None:
        """One row, with the changes of the change in progress."""

    def put(self, item: Item) -> None:
        """Insert or replace one row."""

    def delete(self, key: str) -> bool:
        """Remove one row; whether it was there."""

    def delete_tree(self, prefix: str) -> Sequence[str]:
        """Remove every row whose key begins with ``prefix``; their keys."""

    def locked(self) -> Sequence[Item]:
        """Every row that a session holds."""

    def names_below(self, prefix: str, names_max: int) -> Names | None:
        """Every key that begins with ``prefix``, without it, in byte order; None when there are more."""

    def names(self, prefix: str) -> list[str]:
        """Names one level below ``prefix``, folders with a slash, in byte order."""


@dataclass(slots=True)
class Beat:
    """When the process behind a set of sessions counts as dead, on the store's clock. Moved by each beat."""

    deadline_s: float = _NEVER


@dataclass(frozen=True, slots=True)
class _Session:
    beat: Beat
    lock_delay_s: float


@dataclass(slots=True)
class _Work:
    """One transaction in progress."""

    index: int
    written_index: int = 0
    items: list[Item] = field(default_factory=list)
    touched: dict[str, None] = field(default_factory=dict)
    lock_indexes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionSnapshot:
    """Sessions and what belongs to locks, as a snapshot of the store holds them (not the lock-delays: those are the
    leader's own)."""

    sessions: dict[str, _Session]
    lock_indexes: dict[str, int]
    deleted_at: int


class _Refused(Exception):
    """One operation's check failed."""


class Rules:
    """``on_change`` is called with the keys of every applied change, after its commit, in the order of the changes."""

    def __init__(
        self,
        table: Table,
        on_change: Callable[[Sequence[str]], None],
        *,
        index: int,
        new_session_id: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        self.index = index
        self._table = table
        self._on_change = on_change
        self._new_session_id = new_session_id
        self._sessions: dict[str, _Session] = {}
        self._lock_delays: dict[str, float] = {}
        self._lock_indexes: dict[str, int] = {}
        self._deleted_at = 0

    # -- reading

    def get_many(self, keys: Iterable[str], now_s: float) -> list[Item | None]:
        """The keys' items in order."""
        self.expire(now_s)
        return [self._table.read(key) for key in keys]

    def list(self, prefix: str) -> list[str]:
        """Names one level below ``prefix``, folders with a slash, in byte order."""
        return self._table.names(prefix)

    def names_below(self, prefix: str, names_max: int) -> Names | None:
        """Every name below ``prefix``, in byte order; None when there are more than ``names_max``."""
        return self._table.names_below(prefix, names_max)

    def look(self, key: str, now_s: float) -> tuple[Item | None, int, int]:
        """For a watcher: the item, the index of its last change (or of the last deletion), the store's index."""
        self.expire(now_s)
        item = self._table.read(key)
        return item, item.modify_index if item else self._deleted_at, self.index

    # -- writing

    def txn(self, ops: Sequence[Op], now_s: float) -> TxnResult:
        """Apply all or none. Raises Conflict with every refused operation, and what the table raises."""
        self.expire(now_s)
        delayed = self._delayed(ops, now_s)
        if delayed:
            raise Conflict(_conflict_text(delayed), delayed)
        failures: list[OpFailure] = []
        work = _Work(index=self.index + 1)
        self._table.begin()
        for position, op in enumerate(ops):
            try:
                self._apply(work, op)
            except _Refused as refusal:
                failures.append(OpFailure(position, str(refusal)))
        if failures or not work.touched:
            self._table.rollback()
        else:
            self._commit(work.index, list(work.touched))
            self._keep_lock_indexes(work)
        if failures:
            raise Conflict(_conflict_text(failures), tuple(failures))
        return TxnResult(work.written_index, tuple(work.items))

    def _delayed(self, ops: Sequence[Op], now_s: float) -> tuple[OpFailure, ...]:
        """Locks in their delay. Consul looks at these before anything else and then names no other refusal (its leader
        knows the delays, the replicated log does not)."""
        return tuple(
            OpFailure(position, f"failed to lock key {op.key!r} due to lock delay")
            for position, op in enumerate(ops)
            if isinstance(op, Lock) and self._lock_delays.get(op.key, _NEVER) > now_s
        )

    def _commit(self, index: int, touched: Sequence[str]) -> None:
        self._table.commit(index)
        self.index = index
        self._on_change(touched)

    # -- sessions

    def create_session(self, beat: Beat, lock_delay_s: float) -> str:
        """A session that lives while ``beat`` does."""
        session = self._new_session_id()
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

    def release_every_lock(self) -> None:
        """As when the sessions of every lock are long gone: no delay follows."""
        self._release(self._table.locked())

    def snapshot(self) -> SessionSnapshot:
        """What :meth:`restore` takes; the rows are the table's."""
        return SessionSnapshot(dict(self._sessions), dict(self._lock_indexes), self._deleted_at)

    def restore(self, snapshot: SessionSnapshot, touched: Sequence[str]) -> None:
        """Put the sessions back, after the rows. The store's index goes on: only rows go back to lower ones. Watchers
        of ``touched`` keys are told."""
        self._sessions, self._lock_indexes = dict(snapshot.sessions), dict(snapshot.lock_indexes)
        self._deleted_at = snapshot.deleted_at
        self.index += 1
        self._on_change(touched)

    def _invalidate(self, session: str, ended: _Session, now_s: float) -> None:
        held = [item for item in self._table.locked() if item.session == session]
        self._release(held)
        self._lock_delays.update({item.key: now_s + ended.lock_delay_s for item in held})

    def _release(self, held: Sequence[Item]) -> None:
        if not held:
            return
        index = self.index + 1
        self._table.begin()
        for item in held:
            self._table.put(Item(item.key, item.value, index))
        self._commit(index, [item.key for item in held])

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
        item = self._table.read(op.key)
        if item is None:
            raise _Refused(f"key {op.key!r} doesn't exist")
        work.items.append(item)

    def _do_set(self, work: _Work, op: Set) -> None:
        existing = self._table.read(op.key)
        # Whoever writes plainly resets the LockIndex, and so moves the ModifyIndex even with the value that is there.
        self._put(work, op.key, op.value, existing, existing.session if existing else "", 0)

    def _do_cas(self, work: _Work, op: Cas) -> None:
        existing = self._table.read(op.key)
        if (existing.modify_index if existing else 0) != op.index:
            raise _Refused(f"failed to set key {op.key!r}, index is stale")
        # Whoever writes plainly resets the LockIndex, and so moves the ModifyIndex even with the value that is there.
        self._put(work, op.key, op.value, existing, existing.session if existing else "", 0)

    def _do_lock(self, work: _Work, op: Lock) -> None:
        if op.session not in self._sessions:
            raise _Refused("invalid session")
        existing = self._table.read(op.key)
        if existing is not None and existing.session not in ("", op.session):
            raise _Refused(f"failed to lock key {op.key!r}, lock is already held")
        held = existing is not None and existing.session == op.session
        self._put(work, op.key, op.value, existing, op.session, self._lock_index(work, op.key) + (not held))

    def _do_unlock(self, work: _Work, op: Unlock) -> None:
        existing = self._table.read(op.key)
        if existing is None or existing.session != op.session:
            raise _Refused(f"failed to unlock key {op.key!r}, lock isn't held, or is held by another session")
        self._put(work, op.key, op.value, existing, "", self._lock_index(work, op.key))

    def _do_delete(self, work: _Work, op: Delete) -> None:
        if self._table.delete(op.key):
            work.touched[op.key] = None
            self._set_lock_index(work, op.key, 0)
            self._deleted_at = work.index

    def _do_delete_tree(self, work: _Work, op: DeleteTree) -> None:
        keys = self._table.delete_tree(op.prefix)
        if keys:
            work.touched.update(dict.fromkeys(keys))
            for key in keys:
                self._set_lock_index(work, key, 0)
            self._deleted_at = work.index

    def _do_check_index(self, op: CheckIndex) -> None:
        existing = self._table.read(op.key)
        if existing is None:
            raise _Refused(f"failed to check index of key {op.key!r}, key doesn't exist")
        if existing.modify_index != op.index:
            raise _Refused(f"key {op.key!r} has modify index {existing.modify_index}, expected {op.index}")

    def _do_check_session(self, op: CheckSession) -> None:
        existing = self._table.read(op.key)
        if existing is None:
            raise _Refused(f"failed to check session of key {op.key!r}, key doesn't exist")
        if existing.session != op.session:
            raise _Refused(f"key {op.key!r} is held by another session or none")

    def _do_check_not_exists(self, op: CheckNotExists) -> None:
        if self._table.read(op.key) is not None:
            raise _Refused(f"key {op.key!r} exists")

    def _lock_index(self, work: _Work, key: str) -> int:
        """How often the key was locked since it was written plainly: part of what makes two writes the same."""
        found = work.lock_indexes.get(key)
        return self._lock_indexes.get(key, 0) if found is None else found

    def _set_lock_index(self, work: _Work, key: str, lock_index: int) -> None:
        if lock_index or key in self._lock_indexes or key in work.lock_indexes:
            work.lock_indexes[key] = lock_index

    def _keep_lock_indexes(self, work: _Work) -> None:
        for key, lock_index in work.lock_indexes.items():
            if lock_index:
                self._lock_indexes[key] = lock_index
            else:
                self._lock_indexes.pop(key, None)

    def _put(self, work: _Work, key: str, value: bytes, existing: Item | None, session: str, lock_index: int) -> None:
        same = existing is not None and existing.value == value and existing.session == session
        if existing is not None and same and self._lock_index(work, key) == lock_index:
            work.written_index = max(work.written_index, existing.modify_index)
            return
        self._table.put(Item(key, value, work.index, session))
        work.written_index = work.index
        work.touched[key] = None
        self._set_lock_index(work, key, lock_index)


def _conflict_text(failures: Sequence[OpFailure]) -> str:
    first = failures[0]
    more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
    return f"operation {first.op_index}: {first.what}{more}"
