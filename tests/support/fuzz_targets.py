"""Parsers of what strangers send: each takes any bytes and ends with a value or with the one error it promises.

Hypothesis runs them in the tests; ``make fuzz`` runs them under atheris, which follows the branches.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable

from plugin_api.errors import InvalidRequest
from plugin_api.formats import DURATION_S_MAX, parse_duration
from sidecar.api import json_codec, paths
from sidecar.core.batch_tokens import BatchTokens
from sidecar.core.password_policies import PasswordPolicy, TooStrict
from sidecar.core.policies import ACL, Operation, Policy
from sidecar.core.seal import decode_share
from sidecar.hcl import HCLError, parse_any

_TOKENS = BatchTokens(bytes(32))


def policy(raw: bytes) -> None:
    """A policy that parses can be asked about any path."""
    text = raw.decode("utf-8", "replace")
    with contextlib.suppress(InvalidRequest):
        acl = ACL([Policy.parse("p", text)])
        for path in (text[:40], "secret/a", ""):
            for operation in Operation:
                acl.check(path, operation, {"a": text[:9]})
            acl.capabilities(path)
            acl.has_any_under(path)
        json.dumps(acl.resultant())


def hcl(raw: bytes) -> None:
    """HCL in either form."""
    with contextlib.suppress(HCLError):
        parse_any(raw.decode("utf-8", "replace"))


def body(raw: bytes) -> None:
    """A body that is taken can be written, and reads back as itself."""
    with contextlib.suppress(json_codec.JSONRefused):
        value = json_codec.decode(raw)
        assert json_codec.decode(json_codec.encode(value)) == value


def path(raw: bytes) -> None:
    """A path that is taken has no segment that another layer might read differently."""
    with contextlib.suppress(paths.PathRefused):
        target, query = paths.split_target(raw.decode("latin-1"))
        paths.decode_query(query)
        decoded = paths.decode_path(target)
        segments = decoded.rstrip("/").split("/")
        assert not {".", ".."} & set(segments)
        assert "" not in segments[1:]
        assert all(ord(char) >= 32 and char != "\x7f" for char in decoded)


def token(raw: bytes) -> None:
    """Nothing but what was made here reads as a batch token."""
    assert _TOKENS.read("hvb." + raw.decode("latin-1")) is None


def duration(raw: bytes) -> None:
    """A duration that is taken is within bounds."""
    with contextlib.suppress(ValueError):
        assert abs(parse_duration(raw.decode("utf-8", "replace"))) <= DURATION_S_MAX


def password_policy(raw: bytes) -> None:
    """A policy that parses gives passwords, or says that it cannot."""
    with contextlib.suppress(InvalidRequest, TooStrict):
        parsed = PasswordPolicy.parse(raw.decode("utf-8", "replace"))
        assert len(parsed.generate(os.urandom)) == parsed.length


def share(raw: bytes) -> None:
    """An unseal share, in hex or base64."""
    with contextlib.suppress(InvalidRequest):
        decode_share(raw.decode("utf-8", "replace"))


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (policy, hcl, body, path, token, duration, password_policy, share)
}

WORDS: dict[str, list[bytes]] = {
    "policy": [
        b'path "',
        b'" { capabilities = ["',
        b'"] }',
        b"read",
        b"+/",
        b"*",
        b'{"path":{"',
        b"{{identity.",
        b"deny",
    ],
    "hcl": [b'a "b" {', b"}", b"<<EOT\n", b"\nEOT\n", b"# ", b"/*", b'= "${', b"\\u00", b"[", b"],", b'{"a":[{'],
    "body": [b'{"', b'":', b"[", b"]", b"}", b"1e9", b"-0", b"\\ud800", b"NaN", b"\xff", b"null", b","],
    "path": [b"/v1/", b"..", b"%2e", b"%2f", b"//", b"?a=", b"&", b"%c0%ae", b"\xc3\xa9", b"%zz"],
    "token": [b"AAAA", b"-_", b"==", b"hvb."],
    "duration": [b"1h", b"30m", b"-", b".5", b"9" * 20, b"ns", b"\xc2\xb5s", b"d"],
    "password_policy": [b"length = 20\n", b'rule "charset" {', b'charset = "', b'"\n', b"min-chars = 1", b"}"],
    "share": [b"00", b"ff", b"=", b"/+", b"-_"],
}
"""What inputs are put together from, besides any bytes."""
