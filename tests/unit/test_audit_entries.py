"""What an audit entry holds, and in which form."""

import hashlib
import hmac
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugin_api.errors import InvalidRequest
from sidecar.core.audit.entries import Formatting, Record, format_line, format_test
from sidecar.core.audit.hashing import Hasher
from sidecar.core.audit.options import LocalRules, formatting, make_sink
from sidecar.core.audit.table import AuditEntry

SALT = b"salt-of-a-device"
HOW = Formatting(Hasher(SALT))
RECORD = Record(
    time="2026-01-02T03:04:05.5Z",
    request={
        "id": "r-1",
        "operation": "update",
        "mount_type": "kv",
        "client_token": "hvs.token",
        "client_token_accessor": "acc",
        "path": "secret/data/a",
        "data": {"data": {"password": "s3cr3t", "pin": 1234, "on": True, "none": None, "list": ["x", 2, {"y": "z"}]}},
        "remote_address": "192.0.2.7",
        "wrap_ttl": 60,
    },
    auth={
        "client_token": "hvs.token",
        "accessor": "acc",
        "display_name": "userpass-bob",
        "policies": ["default"],
        "metadata": {"username": "bob"},
        "token_type": "service",
        "entity_id": "",
    },
)


def entry(record: Record, how: Formatting = HOW) -> dict[str, Any]:
    line = format_line(record, how)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    decoded: dict[str, Any] = json.loads(line)
    return decoded


def hashed(text: str) -> str:
    return "hmac-sha256:" + hmac.new(SALT, text.encode(), hashlib.sha256).hexdigest()


def test_a_request_entry_in_full() -> None:
    assert entry(RECORD) == {
        "time": "2026-01-02T03:04:05.5Z",
        "type": "request",
        "auth": {
            "client_token": hashed("hvs.token"),
            "accessor": hashed("acc"),
            "display_name": "userpass-bob",
            "policies": ["default"],
            "metadata": {"username": "bob"},
            "token_type": "service",
        },
        "request": {
            "id": "r-1",
            "operation": "update",
            "mount_type": "kv",
            "client_token": hashed("hvs.token"),
            "client_token_accessor": hashed("acc"),
            "path": "secret/data/a",
            "data": {
                "data": {
                    "password": hashed("s3cr3t"),
                    "pin": 1234,
                    "on": True,
                    "none": None,
                    "list": [hashed("x"), 2, {"y": hashed("z")}],
                }
            },
            "remote_address": "192.0.2.7",
            "wrap_ttl": 60,
            "namespace": {"id": "root"},
        },
    }


def test_a_response_entry_hashes_data_login_and_wrapping() -> None:
    response = {
        "mount_type": "kv",
        "data": {"keys": ["a", "b"], "accessor": "acc-2", "n": 1.5},
        "auth": {"client_token": "hvs.new", "accessor": "acc-3", "policies": ["p"], "token_ttl": 60},
        "wrap_info": {"token": "hvs.wrap", "accessor": "acc-4", "ttl": 60, "wrapped_accessor": "acc-5"},
        "warnings": ["w"],
        "secret": {"lease_id": "a/b/c"},
    }
    got = entry(replace(RECORD, response=response))
    assert got["type"] == "response"
    assert got["response"] == {
        "mount_type": "kv",
        "data": {"keys": [hashed("a"), hashed("b")], "accessor": hashed("acc-2"), "n": 1.5},
        "auth": {"client_token": hashed("hvs.new"), "accessor": hashed("acc-3"), "policies": ["p"], "token_ttl": 60},
        "wrap_info": {
            "token": hashed("hvs.wrap"),
            "accessor": hashed("acc-4"),
            "ttl": 60,
            "wrapped_accessor": hashed("acc-5"),
        },
        "warnings": ["w"],
        "secret": {"lease_id": "a/b/c"},
    }


def test_the_answers_entry_repeats_the_requests_on_each_device_in_its_own_form() -> None:
    other = Formatting(Hasher(b"another salt" * 2), hmac_accessor=False)
    request = RECORD
    asked = [json.loads(format_line(request, how)) for how in (HOW, other)]
    answer = request.answered("later", {"data": {"v": "x"}}, auth=None, status=200, error="", size_bytes=0)
    answered = [json.loads(format_line(answer, how)) for how in (HOW, other)]
    assert [one["request"] for one in answered] == [one["request"] for one in asked]
    assert [one.get("auth") for one in answered] == [one.get("auth") for one in asked]
    assert answered[0]["request"] != answered[1]["request"]
    assert [one["time"] for one in answered] == ["later"] * 2
    # The request of a login has no auth of its own: its answer has the new token's.
    login = replace(RECORD, auth=None)
    format_line(login, HOW)
    new = login.answered("later", {}, auth={"client_token": "new"}, status=200, error="", size_bytes=0)
    assert json.loads(format_line(new, HOW))["auth"]["client_token"] == HOW.hasher.text("new")


def test_accessors_stay_clear_where_the_device_wants_it() -> None:
    how = Formatting(Hasher(SALT), hmac_accessor=False)
    got = entry(replace(RECORD, response={"data": {"accessor": "acc-2", "other": "acc-2"}}), how)
    assert got["auth"]["accessor"] == got["request"]["client_token_accessor"] == "acc"
    assert got["auth"]["client_token"] == hashed("hvs.token")
    assert got["response"]["data"] == {"accessor": "acc-2", "other": hashed("acc-2")}


def test_raw_is_raw() -> None:
    line = format_line(
        replace(RECORD, status=400, error="no such thing", response={"data": {"k": "v"}}),
        Formatting(Hasher(SALT), raw=True),
    )
    got = json.loads(line)
    assert b"hmac-sha256" not in line
    assert got["auth"]["client_token"] == "hvs.token"
    assert got["response"]["data"] == {"error": "no such thing", "k": "v"}
    assert got["error"] == "no such thing"


def test_the_text_of_an_error_is_hashed_and_its_kind_is_clear() -> None:
    got = entry(replace(RECORD, status=400, error="bad value s3cr3t", response={"data": {}}))
    assert got["error"] == "1 error occurred:\n\t* invalid request\n\n"
    assert got["response"]["data"] == {"error": hashed("bad value s3cr3t")}
    assert entry(replace(RECORD, status=403))["error"] == "1 error occurred:\n\t* permission denied\n\n"
    assert entry(replace(RECORD, status=503))["error"] == "1 error occurred:\n\t* service unavailable\n\n"
    assert "error" not in entry(RECORD)


def test_lists_can_be_elided() -> None:
    data = {"keys": ["a", "b"], "key_info": {"a": {}, "b": {}}, "n": "x"}
    record = replace(RECORD, request={**RECORD.request, "operation": "list"}, response={"data": data})
    assert entry(record)["response"]["data"]["keys"] == [hashed("a"), hashed("b")]
    elided = entry(record, Formatting(Hasher(SALT), elide_lists=True))
    assert elided["response"]["data"] == {"keys": 2, "key_info": 2, "n": hashed("x")}
    read = replace(RECORD, response={"data": data})
    assert entry(read, Formatting(Hasher(SALT), elide_lists=True))["response"]["data"]["keys"] == [
        hashed("a"),
        hashed("b"),
    ]


def test_names_that_a_mount_leaves_clear() -> None:
    data = {"user": "u", "password": "p", "deep": {"user": ["v", {"password": "q", "user": 1}]}}
    record = replace(
        RECORD,
        request={**RECORD.request, "data": data},
        response={"data": data},
        clear_request=frozenset({"user"}),
        clear_response=frozenset({"password"}),
    )
    got = entry(record)
    assert got["request"]["data"] == {
        "user": "u",
        "password": hashed("p"),
        "deep": {"user": ["v", {"password": hashed("q"), "user": 1}]},
    }
    assert got["response"]["data"]["password"] == "p"
    assert got["response"]["data"]["user"] == hashed("u")


def test_a_token_in_a_path_is_hashed() -> None:
    record = replace(RECORD, request={**RECORD.request, "path": "auth/token/lookup/hvs.token"})
    assert entry(record)["request"]["path"] == f"auth/token/lookup/{hashed('hvs.token')}"


NASTY = 'a\r\n{"type":"request"}\x1b[31m\u2028\u2029\x7f\x85\u202e\ud800<script>$(id)`id`&\x00"\\'


def test_a_line_is_one_line_and_inert_whatever_it_holds() -> None:
    record = replace(RECORD, request={**RECORD.request, "path": NASTY, "data": {NASTY: NASTY}, "remote_address": NASTY})
    for how in (HOW, Formatting(Hasher(SALT), raw=True)):
        line = format_line(record, how)
        assert line[:-1].isascii()
        assert line[:-1].decode().isprintable()
        assert not set(b"<>&$`") & set(line)
        assert json.loads(line)["request"]["path"] == NASTY


@given(
    st.recursive(
        st.text() | st.integers() | st.booleans() | st.none(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
    )
)
def test_any_value_makes_one_line_and_no_text_stays(value: Any) -> None:
    line = format_line(replace(RECORD, request={**RECORD.request, "data": {"v": value}}), HOW)
    assert line.count(b"\n") == 1
    assert line[:-1].decode("ascii").isprintable()
    assert _shape(json.loads(line)["request"]["data"]["v"]) == _shape(value)


def _shape(value: Any) -> Any:
    """The value with every text, hashed or not, as one mark; lone surrogates in names survive JSON."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return [_shape(item) for item in value]
    if isinstance(value, dict):
        return {name: _shape(item) for name, item in value.items()}
    return value


def test_values_of_types_nobody_thought_of_are_hashed() -> None:
    class Odd:
        def __str__(self) -> str:
            return "s3cr3t"

    got = Hasher(SALT).values({"a": b"s3cr3t", "b": Odd(), "c": ("s3cr3t",)})
    assert got == {"a": hashed("s3cr3t"), "b": hashed("s3cr3t"), "c": [hashed("s3cr3t")]}
    assert Hasher(SALT).text("s3cr3t") == hashed("s3cr3t")
    assert Hasher(b"another").text("s3cr3t") != hashed("s3cr3t")


def test_the_prefix_begins_the_line() -> None:
    how = Formatting(Hasher(SALT), prefix="@cee: ")
    assert format_line(RECORD, how).startswith(b'@cee: {"time"')
    assert format_test("t", "i", "@cee: ").startswith(b'@cee: {"time"')


def test_nothing_shows_the_salt() -> None:
    made = AuditEntry(path="file/", type="file", uuid="u", salt=SALT, options={"file_path": "/x"})
    assert "salt-of" not in f"{made!r} {made} {HOW!r} {RECORD!r}"
    assert "s3cr3t" not in repr(RECORD)


@pytest.mark.parametrize(
    ("type_name", "options", "text"),
    [
        ("nosuch", {}, 'unknown backend type: "nosuch"'),
        ("file", {}, "file_path is required"),
        ("file", {"file_path": "/a\nb"}, "printable"),
        ("file", {"file_path": "/a/"}, "path of a file"),
        ("file", {"file_path": "/a", "mode": "0700"}, "executable"),
        ("file", {"file_path": "/a", "mode": "0601"}, "executable"),
        ("file", {"file_path": "/a", "mode": "rw"}, "octal"),
        ("file", {"file_path": "/a", "mode": "4600"}, "octal"),
        ("file", {"file_path": "/a", "mode": "-1"}, "octal"),
        ("socket", {}, "address is required"),
        ("socket", {"address": "host"}, "host:port"),
        ("socket", {"address": "h:1", "socket_type": "icmp"}, "socket_type"),
        ("socket", {"address": "h:1", "write_timeout": "soon"}, "write_timeout"),
        ("socket", {"address": "h:1", "write_timeout": "0s"}, "write_timeout"),
        ("syslog", {"facility": "nowhere"}, "facility"),
        ("syslog", {"tag": "a b"}, "tag"),
    ],
)
def test_options_of_a_sink_that_are_refused(type_name: str, options: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        make_sink(type_name, options, LocalRules())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "jsonx"}, "unknown format type"),
        ({"filter": "path == x"}, "not available"),
        ({"fallback": "true"}, "not available"),
        ({"log_raw": "perhaps"}, "log_raw must be a boolean"),
        ({"prefix": "#!/bin/sh "}, "not allowed"),
    ],
)
def test_options_of_the_form_that_are_refused(options: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        formatting(options, SALT, LocalRules())


def test_a_prefix_needs_the_servers_own_configuration_and_stays_one_line() -> None:
    rules = LocalRules(prefixing=True)
    assert formatting({"prefix": "x "}, SALT, rules).prefix == "x "
    for bad in ("a\nb", "\x1b", "é", "x" * 257):
        with pytest.raises(InvalidRequest, match="printable ASCII"):
            formatting({"prefix": bad}, SALT, rules)
