"""``custom_response_headers`` of a listener: header values by section, as ``default``, ``2xx`` and ``307``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sidecar.config.reader import Reader

_SECTION = re.compile(r"default|[1-5]xx|[1-5][0-9][0-9]", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}", re.ASCII)
_VALUE = re.compile(r"[\x20-\x7e]{0,4096}", re.ASCII)
_OURS = frozenset(
    {"cache-control", "connection", "content-length", "content-type", "date", "keep-alive", "location", "retry-after",
     "server", "te", "trailer", "transfer-encoding", "upgrade"}
)  # fmt: skip
_OURS_BEGIN = "x-vault-"


def read_response_headers(listener: Reader) -> Mapping[str, Mapping[str, str]]:
    """Every section. Several values of one header are joined with ``;``, as Vault does. A header that the server sets
    itself is left out with a warning. Raises ConfigError."""
    stanza = listener.block("custom_response_headers", labels=0)
    if stanza is None:
        return {}
    reader = listener.inner(stanza)
    sections: dict[str, dict[str, str]] = {}
    for section in sorted({*stanza.body.attributes, *(block.type for block in stanza.body.blocks)}):
        if not _SECTION.fullmatch(section):
            raise reader.error(section, 'must be "default", a status as "307" or a class as "3xx"')
        found = sections.setdefault(section, {})
        for block in reader.blocks(section):
            inner = reader.inner(block)
            for name in block.body.attributes:
                values = inner.texts_as_given(name)
                if not _NAME.fullmatch(name):
                    raise inner.error(name, "is no name of a header")
                if any(not _VALUE.fullmatch(value) for value in values):
                    raise inner.error(name, "must hold printable ASCII only")
                if name.lower() in _OURS or name.lower().startswith(_OURS_BEGIN):
                    inner.warn(f'{inner.place(name)}: the header "{name}" is the server\'s own and is left as it is')
                    continue
                found[name] = "; ".join(values)
            inner.finish()
    reader.finish()
    return sections
