"""Where the simulated world takes the place of the real one under production code, for one run.

Replaced are sockets (``PeerClient``, websockets, HTTP answers), certificates, threads, chance, and the unwrapping of an
activation token over the API of the primary. Everything between is the code that ships.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from aiohttp import web

from consul_backend import lazy_index
from plugin_api.errors import InvalidRequest
from sidecar.replication import (
    activation,
    authorities,
    enrolment,
    former,
    manager,
    primary,
    secondary,
    upstream,
)
from sidecar.replication.activation import ActivationRequest, ActivationResult, Bundle, bootstrap
from sidecar.replication.modes import Mode
from sidecar.transport import certificates
from tests.sim.clusters import papers
from tests.sim.clusters.links import Links
from tests.sim.clusters.port import PortClient, StreamResponse, accept_websocket
from tests.sim.loop import SimLoop

THREAD_S = 0.002
OTHER_SET = activation.OTHER_SET


class Tokens:
    """Activation tokens on their way: single use, as the wrapping that production code puts them in is."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[str, Any]] = {}
        self._number = 0

    def wrap(self, payload: dict[str, Any]) -> str:
        """What an operator carries."""
        self._number += 1
        self._waiting[f"token-{self._number}"] = payload
        return f"token-{self._number}"

    async def activate(
        self,
        mode: Mode,
        asked: ActivationRequest,
        *,
        store_id: str,
        timeout_s: float = 30.0,
        set_id: str = "",
        **_: Any,
    ) -> ActivationResult:
        """``activation.activate`` from the unwrapped bundle on."""
        payload = self._waiting.pop(asked.token, None)
        if payload is None:
            raise InvalidRequest("the token is used up")
        bundle = Bundle(
            payload["id"],
            payload["set_id"],
            payload["epoch"],
            payload["address"],
            payload["authority"],
            payload["credentials"],
        )
        if set_id and bundle.set_id != set_id:
            raise InvalidRequest(OTHER_SET)
        return await bootstrap(mode, bundle, store_id=store_id, timeout_s=timeout_s)


async def inline(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``asyncio.to_thread`` without a thread."""
    await asyncio.sleep(THREAD_S)
    return work(*args, **kwargs)


@contextmanager
def simulated(loop: SimLoop, links: Links, tokens: Tokens, seed: int) -> Iterator[None]:
    """Production code runs in that world inside."""
    rnd = random.Random(f"chance {seed}")
    printer = papers.Printer()
    client = partial(PortClient, links)
    numbered = SimpleNamespace(uuid4=lambda: uuid.UUID(int=rnd.getrandbits(128), version=4))
    same: Callable[[Any], Any] = lambda socket: socket  # noqa: E731 - the choice of doing nothing
    pages = SimpleNamespace(Response=web.Response, StreamResponse=StreamResponse, BaseRequest=web.BaseRequest)
    replaced: list[tuple[Any, str, Any]] = [
        (asyncio, "to_thread", inline),
        (lazy_index, "time", SimpleNamespace(monotonic=loop.time)),
        (activation, "PeerClient", client),
        (secondary, "PeerClient", client),
        (secondary, "WebSocketChannel", same),
        (secondary, "_RANDOM", rnd),
        (secondary, "Syncer", partial(secondary.Syncer, random_bytes=rnd.randbytes)),
        (former, "PeerClient", client),
        (former, "WebSocketChannel", same),
        (primary, "WebSocketChannel", SimpleNamespace(accept=accept_websocket)),
        (primary, "peer_of", lambda request: request.peer),
        (primary, "web", pages),
        (manager, "uuid", numbered),
        (enrolment, "activate", tokens.activate),
        (enrolment, "uuid", numbered),
        (upstream, "uuid", numbered),
        (enrolment, "build_bundle", printer.bundle),
        (authorities, "fingerprint", papers.fingerprint),
        (certificates, "make_authority", printer.authority),
        (certificates, "issue_server", printer.server),
        (certificates, "fingerprint", papers.fingerprint),
        (certificates, "period_s", papers.period_s),
    ]
    with ExitStack() as stack:
        for owner, name, stand_in in replaced:
            stack.enter_context(patch.object(owner, name, stand_in))
        yield
