"""What can happen to one call on its way to the simulated Consul and back (``testing.py``). Pure.

A network decides the :class:`Journey` of each call. The named faults of :data:`FAULTS` are journeys; the others happen
to the server or to a node: :meth:`SimulatedConsul.change_leader`, :meth:`SimulatedConsul.end_session`,
:meth:`SimulatedStore.crash`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from consul_backend.txn import Op


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a client: the node it comes from, the method of ``PhysicalStore``, and a transaction's operations."""

    node: str
    verb: str
    ops: Sequence[Op] = ()


@dataclass(frozen=True, slots=True)
class Journey:
    """One call's fate. Times in seconds.

    ``request_s`` passes before the server has the call and ``answer_s`` before the client has the answer; None is
    never. ``reset_s``: the client sees its connection break then, if it has no answer yet. ``duplicate_s``: the server
    gets the call once more, that long after the first time. ``refused``: the connection was refused, nothing was sent.
    ``stale``: a read that is not consistent is answered by a deposed leader, if there is one.
    """

    request_s: float | None = 0.0
    answer_s: float | None = 0.0
    reset_s: float | None = None
    duplicate_s: float | None = None
    refused: bool = False
    stale: bool = False


class Network(Protocol):
    """What lies between the nodes and the store."""

    def journey(self, call: Call) -> Journey:
        """The fate of a call, decided when it is made."""

    def connected(self, node: str) -> bool:
        """Asked when a request or an answer arrives: False loses it."""


class PerfectNetwork:
    """Everything arrives at once."""

    def journey(self, call: Call) -> Journey:
        return Journey()

    def connected(self, node: str) -> bool:
        return True


FAULTS = (
    "request:refused",
    "request:lost",
    "request:reset",
    "request:delayed",
    "request:late",
    "request:duplicated",
    "answer:lost",
    "answer:reset",
    "answer:delayed",
    "answer:stale",
)
"""Every fault of a single call. *lost* is noticed by a time-out and *reset* at once; *late* is applied after the client
gave up."""


def faulty_journey(fault: str, random: Random, *, usual: Journey, late_s_max: float) -> Journey:
    """``usual`` with one fault of :data:`FAULTS`; delays are drawn up to ``late_s_max``. Raises ValueError."""
    request_s, answer_s = usual.request_s or 0.0, usual.answer_s or 0.0
    soon_s = request_s + answer_s + 0.001
    delay_s = random.uniform(0.0, late_s_max)
    match fault:
        case "request:refused":
            return Journey(refused=True)
        case "request:lost":
            return Journey(request_s=None)
        case "request:reset":
            return Journey(request_s=None, reset_s=soon_s)
        case "request:delayed":
            return Journey(request_s=request_s + delay_s, answer_s=answer_s)
        case "request:late":
            return Journey(request_s=soon_s + delay_s, answer_s=None, reset_s=soon_s)
        case "request:duplicated":
            return Journey(request_s=request_s, answer_s=answer_s, duplicate_s=delay_s)
        case "answer:lost":
            return Journey(request_s=request_s, answer_s=None)
        case "answer:reset":
            return Journey(request_s=request_s, answer_s=None, reset_s=soon_s)
        case "answer:delayed":
            return Journey(request_s=request_s, answer_s=answer_s + delay_s)
        case "answer:stale":
            return Journey(request_s=request_s, answer_s=answer_s, stale=True)
    raise ValueError(f"not a fault: {fault!r}; known: {', '.join(FAULTS)}")
