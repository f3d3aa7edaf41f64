"""What secondaries say of this primary's log: that it lacks, or has another of, a record that they hold.

The record was committed here once, under this very store and epoch, so the store under this cluster was put back (an
old snapshot of Consul was restored) while no node that knew better was left to notice. From then on the log would part
from what every secondary has, and clients were promised what is gone. So the cluster stops: nothing is read or written
for clients until an operator decides (``sys/replication/recover`` with ``force``): then a new replication epoch begins
at the log's end of before this tenure. Secondaries fall in with it by a merkle sync and keep what only they have as
*lost writes*. A secondary that is not to be believed is revoked instead, which withdraws its word.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from consul_backend.position import Position
from sidecar.replication.hello import LogFacts
from sidecar.replication.protocol import Hello

log = logging.getLogger("replication.denials")

STOPPED = (
    "this cluster serves nothing: a secondary has records that its log denies, so the store was restored or changed "
    "underneath. See sys/replication/status; sys/replication/recover with force=true goes on with the store as it is"
)

Denied = Callable[[str, str], None]
"""Hears a secondary's id, and why it denies this log; empty when it does not."""


def unheard(secondary_id: str, reason: str) -> None:
    """Nobody wants to know."""


def denial(hello: Hello, position: Position, facts: LogFacts) -> str:
    """The words for a position that contradicts the log."""
    what = f"ends at {facts.head_index}" if position.index > facts.head_index else "has another of that number"
    return f"secondary {hello.secondary_id} has record {position.index} of this store, whose log {what}"


class Denials:
    """Of both modes, in one tenure. ``restrict`` has the write gate set anew; ``set_gate`` closes reads with a text and
    opens them with None."""

    def __init__(self, restrict: Callable[[], None], set_gate: Callable[[str | None], None]) -> None:
        self._restrict = restrict
        self._set_gate = set_gate
        self._told: dict[tuple[str, str], str] = {}
        self._filling: str | None = None

    @property
    def stopped(self) -> str | None:
        """Why nothing is served, or None."""
        return STOPPED if self._told else None

    def fill(self, reason: str | None) -> None:
        """Reads wait for this too: what is served is not all there, or (None) it is."""
        self._filling = reason
        self._set_gate(self.stopped or reason)

    def of(self, mode: str) -> list[tuple[str, str]]:
        """Secondary and reason, in one mode."""
        return sorted((name, reason) for (told_mode, name), reason in self._told.items() if told_mode == mode)

    def tell(self, mode: str, secondary_id: str, reason: str) -> None:
        """A secondary denies the log, or (empty reason) does not."""
        key = (mode, secondary_id)
        if not reason:
            if self._told.pop(key, None) is not None and not self._told:
                log.warning("nobody denies this cluster's log any more: it serves again")
                self._change()
            return
        first = not self._told
        if key not in self._told:
            log.error("%s: the store was restored or changed underneath. %s", reason, STOPPED)
        self._told[key] = reason
        if first:
            self._change()

    def _change(self) -> None:
        self._restrict()
        self.fill(self._filling)

    def forget(self, mode: str) -> None:
        """This cluster is no primary of that mode any more, or that of another epoch."""
        for told_mode, name in list(self._told):
            if told_mode == mode:
                self.tell(mode, name, "")
