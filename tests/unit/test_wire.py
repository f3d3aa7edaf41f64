"""Consul's JSON: what is sent, compared with plain ``json``, and what is believed of the answers."""

from __future__ import annotations

import base64
import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consul_backend.errors import Conflict, PermissionDenied, TooLarge, Unavailable
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
from consul_backend.wire import (
    TEXT_CHARS_MAX,
    clean,
    client_error,
    decode_entries,
    decode_names,
    decode_results,
    encode_txn,
    refusal,
)
from tests.support.operations import SESSION, ops

VERBS = {
    Get: "get",
    Set: "set",
    Cas: "cas",
    Lock: "lock",
    Unlock: "unlock",
    Delete: "delete",
    DeleteTree: "delete-tree",
    CheckIndex: "check-index",
    CheckSession: "check-session",
    CheckNotExists: "check-not-exists",
}
WRITES = (Set, Cas, Lock, Unlock)
SILENT = (Delete, DeleteTree, CheckNotExists)


def plain(op: Op) -> dict[str, object]:
    """One operation as Consul's documentation has it."""
    fields: dict[str, object] = {"Verb": VERBS[type(op)]}
    fields["Key"] = "outrider/" + (op.prefix if isinstance(op, DeleteTree) else op.key)
    if isinstance(op, WRITES):
        fields["Value"] = base64.b64encode(op.value).decode()
    if isinstance(op, Cas | CheckIndex):
        fields["Index"] = op.index
    if isinstance(op, Lock | Unlock | CheckSession):
        fields["Session"] = op.session
    return {"KV": fields}


def entry(key: str, index: int, value: bytes | None = None) -> dict[str, object]:
    text = None if value is None else base64.b64encode(value).decode()
    return {"KV": {"LockIndex": 0, "Key": key, "Flags": 0, "Value": text, "CreateIndex": 1, "ModifyIndex": index}}


@settings(max_examples=40)
@given(st.lists(ops, max_size=12))
def test_the_request_is_what_plain_json_would_be(batch: list[Op]) -> None:
    assert json.loads(encode_txn(batch, "outrider/")) == [plain(op) for op in batch]


@settings(max_examples=40)
@given(st.lists(st.tuples(ops, st.integers(1, 2**40)), max_size=12))
def test_the_index_is_the_newest_that_was_written_and_gets_come_in_order(pairs: list[tuple[Op, int]]) -> None:
    batch = [op for op, _ in pairs]
    told = [
        entry("outrider/" + op.key, index, b"v%d" % index if isinstance(op, Get) else None)
        for op, index in pairs
        if not isinstance(op, (*SILENT,))
    ]
    answer = json.dumps({"Results": told, "Errors": None}).encode()
    index, entries = decode_results(batch, answer)
    assert index == max([index for op, index in pairs if isinstance(op, WRITES)], default=0)
    read = [(op.key, index) for op, index in pairs if isinstance(op, Get)]
    items = [one.item("outrider/") for one in entries]
    assert [(item.key, item.modify_index) for item in items] == read
    assert [item.value for item in items] == [b"v%d" % index for _, index in read]
    if told:
        with pytest.raises(PermissionDenied, match=f"{len(told) - 1} of {len(told)}"):
            decode_results(batch, json.dumps({"Results": told[1:]}).encode())
        with pytest.raises(PermissionDenied):
            decode_results(batch, b'{"Results":null,"Errors":null}')


@pytest.mark.parametrize("op", [Get("a"), Set("a", b"")])
@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"Results":[{"KV":{"Key":"a"}}]}', b'{"Results":[{}]}'])
def test_what_is_no_answer(op: Op, body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_results([op], body)


def test_entries_and_names() -> None:
    body = (
        b'[{"Key":"p/a","ModifyIndex":3,"Value":null,"Session":"s","Flags":0},'
        b'{"Key":"p/b","ModifyIndex":4,"Value":"eA=="}]'
    )
    first, second = (one.item("p/") for one in decode_entries(body))
    assert (first.key, first.value, first.modify_index, first.session) == ("a", b"", 3, "s")
    assert (second.key, second.value, second.modify_index, second.session) == ("b", b"x", 4, "")
    assert decode_names(b'["a/","b"]') == ["a/", "b"]


def test_refusals_name_operations_and_no_session() -> None:
    text = json.dumps(
        {"Errors": [{"OpIndex": 2, "What": f"session {SESSION}\nis gone"}, {"OpIndex": 5, "What": "stale"}]}
    )
    failure = refusal(text.encode())
    assert isinstance(failure, Conflict)
    assert [(one.op_index, one.what) for one in failure.failures] == [(2, "session <id> is gone"), (5, "stale")]
    assert str(failure) == "Consul refused the transaction: operation 2: session <id> is gone and 1 more"
    assert str(refusal(b'{"Errors":[{"OpIndex":2,"What":"x"}]}')).endswith("operation 2: x")
    assert "no operation named" in str(refusal(b'{"Errors":null}'))
    denied = refusal(b'{"Errors":[{"OpIndex":1,"What":"stale"},{"OpIndex":3,"What":"Permission denied: x"}]}')
    assert isinstance(denied, PermissionDenied)
    assert "operation 3" in str(denied)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, PermissionDenied),
        (403, PermissionDenied),
        (413, TooLarge),
        (400, None),
        (404, None),
        (409, None),
        (429, None),
    ],
)
def test_definite_refusals_by_status(status: int, kind: type[Exception] | None) -> None:
    failure = client_error(status, b"because of \xff this")
    assert type(failure) is (kind or type(None))
    if failure is not None:
        assert "because of" in str(failure)
        assert str(client_error(status, b"")).count("Consul: ") == 1
        assert len(str(client_error(status, b"x" * 5000))) == len("Consul: ") + TEXT_CHARS_MAX


def test_a_token_that_consul_does_not_know_is_waited_out() -> None:
    """A server that has just started knows none."""
    for body in (b"ACL not found", b"rpc error: acl not found"):
        failure = client_error(403, body)
        assert isinstance(failure, Unavailable)
        assert "does not know this token" in str(failure)


def test_texts_are_bounded_and_printable() -> None:
    assert TEXT_CHARS_MAX == 300
    assert clean(f" a {SESSION.upper()}\r\n\x1b[31m b ") == "a <id> [31m b"
    assert len(clean("y" * 1000)) == TEXT_CHARS_MAX
