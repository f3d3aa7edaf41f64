"""python-consul2 over the pooled transport, for the agent's and the sessions' endpoints.

Its own asyncio transport opens a connection for every call, and its constructor lets ``CONSUL_*`` variables override
what it is given. Neither is used: the endpoint groups are put over :class:`~consul_backend.transport.Transport`, which
knows address, TLS and token. Keys and transactions do not go this way (``store.py``): python-consul2 turns a refused
transaction into text and drops Consul's index headers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from consul import base

from consul_backend.errors import OutcomeUnknown, Unavailable
from consul_backend.transport import Transport
from consul_backend.wire import clean, denied

CALL_TIMEOUT_S = 10.0

_UNKNOWN = re.compile(r"unknown (?:check|service)|does not have associated TTL", re.IGNORECASE)


class UnknownToConsul(Unavailable):
    """There is no such session, or the agent knows no such service or check (it restarted, or somebody removed it)."""


class _PooledHttp(base.HTTPClient):  # type: ignore[misc]  # python-consul2 has no types
    def __init__(self, transport: Transport, timeout_s: float) -> None:
        super().__init__()
        self.base_uri = ""
        self._transport = transport
        self._timeout_s = timeout_s

    async def get(self, callback: Callable[[Any], Any], path: str, params: Any = None, headers: Any = None) -> Any:
        return await self._call("GET", callback, path, params, "")

    async def put(
        self, callback: Callable[[Any], Any], path: str, params: Any = None, data: str = "", headers: Any = None
    ) -> Any:
        return await self._call("PUT", callback, path, params, data)

    async def post(
        self, callback: Callable[[Any], Any], path: str, params: Any = None, data: str = "", headers: Any = None
    ) -> Any:
        return await self._call("POST", callback, path, params, data)

    async def delete(
        self, callback: Callable[[Any], Any], path: str, params: Any = None, data: str = "", headers: Any = None
    ) -> Any:
        return await self._call("DELETE", callback, path, params, data)

    async def _call(self, method: str, callback: Callable[[Any], Any], path: str, params: Any, data: str) -> Any:
        encoded_path, _, query = self.uri(path, params).partition("?")
        answer = await self._transport.request(
            method, encoded_path, query=query, body=data.encode() or None, timeout_s=self._timeout_s
        )
        text = answer.body.decode("utf-8", "replace")
        return callback(base.Response(answer.status, answer.headers, text, answer.body))


class PooledConsul(base.Consul):  # type: ignore[misc]  # python-consul2 has no types
    """python-consul2's endpoint groups ``agent``, ``catalog``, ``health``, ``session`` and ``status``.

    Await its calls inside :func:`translated`.
    """

    def __init__(self, transport: Transport, *, datacenter: str = "", timeout_s: float = CALL_TIMEOUT_S) -> None:
        # The base constructor reads the environment; these are the attributes that its groups use.
        self.http = _PooledHttp(transport, timeout_s)
        self.token = None
        self.dc = datacenter or None
        self.consistency = "default"
        self.agent = base.Consul.Agent(self)
        self.catalog = base.Consul.Catalog(self)
        self.health = base.Consul.Health(self)
        self.session = base.Consul.Session(self)
        self.status = base.Consul.Status(self)


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """python-consul2's failures as ours: PermissionDenied, UnknownToConsul, Unavailable (``doing`` names the call).

    Use it for calls that may be repeated; an unknown outcome becomes Unavailable.
    """
    try:
        yield
    except base.ACLPermissionDenied as error:
        refused = denied(clean(str(error)))
        raise type(refused)(f"Consul refused to {doing}: {refused}") from None
    except base.ConsulException as error:
        text = clean(str(error))
        kind = UnknownToConsul if isinstance(error, base.NotFound) or _UNKNOWN.search(text) else Unavailable
        raise kind(f"Consul could not {doing}: {text}") from None
    except OutcomeUnknown as error:
        raise Unavailable(f"Consul did not answer when asked to {doing}: {error}") from error
    except (ValueError, KeyError) as error:
        raise Unavailable(f"Consul's answer when asked to {doing} makes no sense: {type(error).__name__}") from None
