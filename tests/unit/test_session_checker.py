"""The checker of session guarantees finds what it is there for, each with a history that must pass."""

import pytest

from tests.support.sessions import Event, violations


def test_an_honest_history_passes() -> None:
    assert not violations(
        [
            Event("s", "write", 1, "eu"),
            Event("s", "read", 1, "eu"),
            Event("s", "write", 2, "us"),
            Event("s", "refused", 0, "eu"),
            Event("s", "read", 1, "eu", indexed=False),
            Event("t", "read", 0, "eu"),
            Event("s", "read", 2, "eu"),
            Event("s", "write", 3, "eu", warned=True),
            Event("s", "read", 2, "eu", indexed=False),
            Event("s", "read", 2, "eu", warned=True),
        ]
    )


@pytest.mark.parametrize(
    ("events", "text"),
    [
        ([Event("s", "write", 2, "us"), Event("s", "read", 1, "eu")], "after its write of 2"),
        ([Event("s", "read", 2, "us"), Event("s", "read", 1, "eu")], "after it had read 2"),
        (
            [Event("s", "write", 2, "eu"), Event("s", "read", 1, "eu", indexed=False)],
            "had answered the write of 2 without a warning",
        ),
    ],
)
def test_each_broken_promise_is_found(events: list[Event], text: str) -> None:
    (found,) = violations(events)
    assert text in found
