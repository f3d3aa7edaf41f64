"""Text that can be written."""

from __future__ import annotations


def is_encodable(text: str) -> bool:
    """Whether ``text`` is Unicode text: without lone surrogates, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
