"""Bodies of answers, and which status an error becomes (contract 5.3, 5.4)."""

import pytest

from consul_backend import errors as backend
from plugin_api.errors import (
    Failed,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    PluginError,
    ReadOnlyStorage,
    Unavailable,
    UnsupportedOperation,
    UnsupportedPath,
)
from sidecar.api import envelopes
from sidecar.api.json_codec import JSONRefused
from sidecar.api.statuses import refusal
from sidecar.request.errors import JoinedError, TokenRefused, UnknownMount


def test_the_envelope_has_its_keys_in_order_and_null_for_nothing() -> None:
    body = envelopes.success("id", {"a": 1}, path="secret/a")
    assert list(body) == [
        "request_id",
        "lease_id",
        "renewable",
        "lease_duration",
        "data",
        "wrap_info",
        "warnings",
        "auth",
    ]
    assert body["warnings"] is None
    assert body["auth"] is None
    assert body["lease_id"] == ""


@pytest.mark.parametrize(
    "path", ["sys/mounts", "sys/mounts/", "sys/mounts/a/b/tune", "sys/auth/token", "sys/policy/x", "sys/key-status"]
)
def test_some_answers_repeat_their_data(path: str) -> None:
    body = envelopes.success("id", {"secret/": {"type": "kv"}, "data": "mine"}, path=path)
    assert body["secret/"] == {"type": "kv"}
    assert body["data"] == {"secret/": {"type": "kv"}, "data": "mine"}


@pytest.mark.parametrize("path", ["secret/a", "sys/policies/acl", "sys/internal/ui/mounts", "sys/mountsx"])
def test_others_do_not(path: str) -> None:
    assert "x" not in envelopes.success("id", {"x": 1}, path=path)


def test_warnings_are_a_list_or_null() -> None:
    assert envelopes.success("id", None, warnings=["w"])["warnings"] == ["w"]
    assert envelopes.success("id", None, warnings=[])["warnings"] is None


def test_no_text_is_no_error() -> None:
    assert envelopes.errors([""]) == {"errors": []}
    assert envelopes.errors(["a"], ["w"]) == {"errors": ["a"], "warnings": ["w"]}


JOINED = "1 error occurred:\n\t* {}\n\n"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (InvalidRequest("no data provided"), 400, "no data provided"),
        (JoinedError("invalid accessor"), 400, JOINED.format("invalid accessor")),
        (NotFound(), 404, ""),
        (PermissionDenied(), 403, JOINED.format("permission denied")),
        (PermissionDenied("bad token"), 403, "bad token"),
        (TokenRefused(), 403, "permission denied"),
        (UnsupportedPath(), 404, JOINED.format("unsupported path")),
        (UnsupportedOperation(), 405, JOINED.format("unsupported operation")),
        (UnknownMount("a/b"), 404, 'no handler for route "a/b". route entry not found.'),
        (Unavailable("soon"), 503, "soon"),
        (ReadOnlyStorage(), 500, "cannot write to readonly storage"),
        (PluginError("broken"), 500, "broken"),
        (Failed("as things stand"), 500, JOINED.format("as things stand")),
        (JSONRefused("error parsing JSON"), 400, "error parsing JSON"),
        (backend.TooLarge("600000 bytes, limit 524288"), 413, "600000 bytes, limit 524288"),
    ],
)
def test_errors_become_the_answers_clients_know(error: Exception, status: int, text: str) -> None:
    answer = refusal(error)
    assert answer.expected
    assert (answer.status, answer.texts) == (status, (text,))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (backend.Unavailable("x"), 503),
        (backend.NotApplied("x"), 503),
        (backend.Overloaded("x"), 503),
        (backend.DeadlinePassed("x"), 503),
        (backend.FenceLost("x"), 503),
        (backend.StoreWentBack("x"), 503),
        (backend.SentinelMissing("x"), 503),
        (backend.OutcomeUnknown("x"), 500),
        (backend.Corrupt("x"), 500),
        (backend.ForeignWrite("x"), 500),
        (backend.PermissionDenied("x"), 500),
        (backend.Conflict("x"), 500),
    ],
)
def test_errors_of_the_store_say_nothing_of_it(error: Exception, status: int) -> None:
    answer = refusal(error)
    assert answer.status == status
    assert "x" not in answer.texts
    for_a_human = isinstance(error, backend.StoreWentBack | backend.SentinelMissing)
    assert dict(answer.headers()) == ({"Retry-After": "1"} if status == 503 and not for_a_human else {})
    if isinstance(error, backend.DeadlinePassed):
        assert "not applied" in answer.texts[0]
    if isinstance(error, backend.OutcomeUnknown):
        assert "may or may not" in answer.texts[0]


def test_a_defect_says_nothing() -> None:
    answer = refusal(KeyError("hvs.secret"))
    assert not answer.expected
    assert (answer.status, answer.texts) == (500, ("internal error",))
