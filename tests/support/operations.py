"""Any operation of a transaction, drawn by hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

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

SESSION = "01234567-89ab-cdef-0123-456789abcdef"

keys = st.from_regex(r"[A-Za-z0-9_-]{1,9}(/[A-Za-z0-9_-]{1,9}){0,3}", fullmatch=True)
values = st.binary(max_size=50)
indexes = st.integers(0, 2**63)
ops: st.SearchStrategy[Op] = st.one_of(
    st.builds(Get, keys),
    st.builds(Set, keys, values),
    st.builds(Cas, keys, values, indexes),
    st.builds(Lock, keys, values, st.just(SESSION)),
    st.builds(Unlock, keys, values, st.just(SESSION)),
    st.builds(Delete, keys),
    st.builds(DeleteTree, keys.map(lambda key: key + "/") | st.just("")),
    st.builds(CheckIndex, keys, indexes),
    st.builds(CheckSession, keys, st.just(SESSION)),
    st.builds(CheckNotExists, keys),
)
