"""``custom_response_headers`` of a listener: headers on its answers by their status. Pure.

Of one header the most specific section counts: a status, then its class (``4xx``), then ``default``. What the server
sets itself is never replaced, but for :data:`STRICT_TRANSPORT`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from multidict import CIMultiDict

DEFAULT = "default"
STRICT_TRANSPORT = "Strict-Transport-Security"
STRICT_TRANSPORT_VALUE = "max-age=31536000; includeSubDomains"
"""On every answer unless the listener says otherwise, as in Vault since 1.9. Browsers heed it over TLS alone."""
_STRICT_TRANSPORT = STRICT_TRANSPORT.lower()
Sections = Mapping[str, Mapping[str, str]]
"""Values of headers by their names, by section: ``default``, ``2xx``, ``307``."""


class ResponseHeaders:
    """The headers of one listener."""

    def __init__(self, sections: Sections) -> None:
        self.replace(sections)

    def replace(self, sections: Sections) -> None:
        """Others from now on."""
        self._sections = sections
        self._of = functools.lru_cache(maxsize=128)(self._merged)

    @property
    def in_use(self) -> bool:
        """Whether any answer has more headers than the server's own."""
        return bool(self._sections)

    def added(self, status: int, own: CIMultiDict[str]) -> CIMultiDict[str]:
        """``own``, the server's headers of an answer, with those that are configured for its status."""
        if self._sections:
            for name, value in self._of(status):
                if name.lower() == _STRICT_TRANSPORT:
                    own[name] = value
                own.setdefault(name, value)
        return own

    def _merged(self, status: int) -> tuple[tuple[str, str], ...]:
        merged: CIMultiDict[str] = CIMultiDict()
        for section in (DEFAULT, f"{status // 100}xx", str(status)):
            merged.update(self._sections.get(section, {}))
        return tuple(merged.items())
