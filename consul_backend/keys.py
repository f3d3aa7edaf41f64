"""Names of keys: reversible, and safe for every Consul. Pure.

A *logical* key is ``<class>/<partition>/<path>``: class ``r``, ``l`` or ``c``; a partition without slashes; a path that
is any non-empty text. A *physical* key holds only segments of ``[A-Za-z0-9_-]`` joined by ``/``: Consul's KV address
cleans or refuses other names, and differently from version to version (301 to another key, 400, 500).

One segment is written like this: ASCII letters, digits and ``-`` stand for themselves; every other UTF-8 byte is ``_``
and two upper-case hex digits; the empty segment is ``_``. The encoding is one to one: what no text encodes to is
refused on decoding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from consul_backend.errors import Corrupt

CLASSES = frozenset("rlc")

_PLAIN = re.compile(r"[A-Za-z0-9-]+\Z")
_ESCAPED = re.compile(rb"[A-Za-z0-9-]|_[0-9A-F]{2}")
_LITERAL = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-")
_CODE = tuple(chr(byte) if byte in _LITERAL else f"_{byte:02X}" for byte in range(256))


def encode_segment(text: str) -> str:
    """One path segment in the safe alphabet. Raises ValueError for text that UTF-8 cannot hold (a lone surrogate)."""
    if _PLAIN.match(text):
        return text
    if not text:
        return "_"
    return "".join([_CODE[byte] for byte in text.encode()])


def decode_segment(encoded: str) -> str:
    """The text of one segment. Raises Corrupt for anything :func:`encode_segment` does not produce."""
    if _PLAIN.match(encoded):
        return encoded
    if encoded == "_":
        return ""
    try:
        raw = encoded.encode("ascii")
        parts = _ESCAPED.findall(raw)
        if sum(map(len, parts)) != len(raw):
            raise ValueError("stray character")
        codes = [part[0] if len(part) == 1 else int(part[1:], 16) for part in parts]
        text = bytes(codes).decode()
    except ValueError:
        raise Corrupt(f"stored key segment {encoded!r} is not in this store's encoding") from None
    if encode_segment(text) != encoded:
        raise Corrupt(f"stored key segment {encoded!r} is not in this store's encoding")
    return text


def encode_path(path: str) -> str:
    """Every segment of a path, encoded; slashes stay. ``a//b`` keeps its empty segment, ``a/`` its last one."""
    return "/".join([encode_segment(segment) for segment in path.split("/")])


def decode_path(encoded: str) -> str:
    """The path that :func:`encode_path` wrote. Raises Corrupt."""
    return "/".join([decode_segment(segment) for segment in encoded.split("/")])


def split_key(key: str) -> tuple[str, str, str]:
    """Class, partition and path of a logical key. Raises ValueError when one is missing or the class unknown."""
    cls, _, rest = key.partition("/")
    partition, slash, path = rest.partition("/")
    if cls not in CLASSES or not partition or not slash or not path:
        raise ValueError(f"not a logical key: {key!r}")
    return cls, partition, path


@lru_cache(maxsize=4096)
def encode_partition(cls: str, partition: str) -> str:
    """``<class>/<encoded partition>``: the part of a physical key that thousands of keys share."""
    return f"{cls}/{encode_segment(partition)}"


def split_prefix(prefix: str) -> tuple[str, str, str]:
    """Class, partition and folder (without its last slash, perhaps empty) of a list prefix. Raises ValueError."""
    parts = prefix.split("/", 2)
    if len(parts) != 3 or parts[0] not in CLASSES or not parts[1] or (parts[2] and parts[2][-1] != "/"):
        raise ValueError(f"not a list prefix: {prefix!r}")
    return parts[0], parts[1], parts[2].removesuffix("/")


def decode_name(name: str) -> str:
    """One name of a listing, decoded; folders keep their slash. Raises Corrupt."""
    folder = name.endswith("/")
    decoded = decode_segment(name.removesuffix("/"))
    return f"{decoded}/" if folder else decoded


def may_be_ours(name: str) -> bool:
    """Whether this program can have written a name of a listing. What it cannot have written, not even a request for it
    may be made of: Consul cleans such names, or refuses them."""
    try:
        decode_name(name)
    except Corrupt:
        return False
    return True


def own_folders(names: Iterable[str]) -> list[str]:
    """Of the names of a listing the folders that may be ours."""
    return [name for name in names if name.endswith("/") and may_be_ours(name)]


def public_name(key: str) -> str:
    """A key's class and partition, for messages; paths may be nobody else's business."""
    cls, partition, _ = key.split("/", 2)
    return f"an entry of class {cls}, partition {partition}"
