"""Rate-limit quotas: how many requests one client address may make to a path, or logins to a role. Configuration is
replicated; counting is each cluster's own, in memory, on its active node."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from plugin_api.errors import InvalidRequest
from plugin_api.storage import Write
from sidecar.core.keys import QUOTA_CONFIG, QUOTAS
from sidecar.core.store_view import SealedStore, View, read_many

CLIENTS_MAX = 65_536
"""Of one quota; beyond, whoever asked longest ago is forgotten, which gives it a fresh start."""


class RateLimitQuota(msgspec.Struct, frozen=True):
    """One quota as stored: ``rate`` requests an ``interval_s``. ``path``: empty for everything, a mount or folder with
    a slash at its end, a prefix with ``*``, or one exact path. ``role``: only logins to that role of the auth method at
    ``path`` count. A client over the limit is refused for ``block_interval_s``, or with 0 until the rate allows the
    next request. ``inheritable`` is for namespaces: true of what has no path, and else false."""

    name: str
    rate: float
    path: str = ""
    interval_s: int = 1
    block_interval_s: int = 0
    inheritable: bool = False
    role: str = ""

    def check(self) -> None:
        """Raises InvalidRequest."""
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise InvalidRequest("rate must be a positive number")
        if self.interval_s < 1:
            raise InvalidRequest("interval must be at least one second")

    def matches(self, path: str, role: str = "") -> bool:
        """Whether a request to ``path`` counts here, which logs in to ``role`` if that is not empty."""
        return self.role in ("", role) and self.covers(path)

    def covers(self, path: str) -> bool:
        """Whether ``path`` is within this quota's."""
        if self.path.endswith("*"):
            return path.startswith(self.path[:-1])
        if not self.path or self.path.endswith("/"):
            return path.startswith(self.path) or path + "/" == self.path
        return path.rstrip("/") == self.path

    @property
    def specificity(self) -> tuple[int, int, int]:
        """Of all quotas that match, the one with the greatest counts."""
        exact = bool(self.path) and not self.path.endswith(("*", "/"))
        return int(bool(self.role)), int(exact), len(self.path.rstrip("*"))


@dataclass(slots=True)
class _Client:
    """What a client has left at ``at_s``, and until when it is refused whatever it has left."""

    left: float
    at_s: float
    blocked_until_s: float = 0.0


class Limiter:
    """Counts the requests of one quota: a bucket of ``rate`` requests for each client, refilled evenly."""

    def __init__(self, quota: RateLimitQuota) -> None:
        self.quota = quota
        self._capacity = max(quota.rate, 1.0)
        self._per_s = quota.rate / quota.interval_s
        self._clients: OrderedDict[str, _Client] = OrderedDict()

    def take(self, address: str, now_s: float) -> float:
        """0 if the request may pass, else the seconds until it is worth trying again."""
        client = self._clients.get(address)
        if client is None:
            client = self._clients[address] = _Client(self._capacity, now_s)
            if len(self._clients) > CLIENTS_MAX:
                self._clients.popitem(last=False)
        self._clients.move_to_end(address)
        client.blocked_until_s = min(client.blocked_until_s, now_s + self.quota.block_interval_s)
        if now_s < client.blocked_until_s:
            return client.blocked_until_s - now_s
        client.left = min(self._capacity, client.left + max(now_s - client.at_s, 0.0) * self._per_s)
        client.at_s = now_s
        if client.left >= 1.0:
            client.left -= 1.0
            return 0.0
        if self.quota.block_interval_s:
            client.blocked_until_s = now_s + self.quota.block_interval_s
            return float(self.quota.block_interval_s)
        return (1.0 - client.left) / self._per_s

    def left(self, address: str) -> tuple[int, int]:
        """(requests that a client has left, seconds until it has all of them again), as of its last request."""
        client = self._clients.get(address)
        left = self._capacity if client is None else client.left
        return int(left), math.ceil((self._capacity - left) / self._per_s)


@dataclass(frozen=True, slots=True)
class Exceeded:
    """A request that must be refused."""

    quota: str
    retry_after_s: int


class QuotaConfig(msgspec.Struct, frozen=True):
    """For all quotas: paths that never count (a trailing ``*`` is a prefix), whether what was refused is entered in the
    audit log, and whether answers say what is left."""

    exempt_paths: tuple[str, ...] = ()
    audit_refused: bool = False
    show_headers: bool = False

    def exempts(self, path: str) -> bool:
        """Whether a request to ``path`` counts nowhere."""
        return any(
            path.startswith(exempt[:-1]) if exempt.endswith("*") else path.rstrip("/") == exempt.rstrip("/")
            for exempt in self.exempt_paths
        )


class Quotas:
    """The quotas of a tenure. ``now`` returns seconds; should it go back, no client is refused for longer."""

    def __init__(self, sealed: SealedStore, writable: Callable[[], bool], now: Callable[[], float]) -> None:
        self._sealed = sealed
        self._now = now
        self._writable = writable
        _, partition, prefix = QUOTAS.split("/", 2)
        self._view = View(sealed, "r", partition, prefix, writable)
        self._limiters: dict[str, Limiter] = {}
        self._config_view = View(sealed, "r", partition, writable=writable)
        self.config = QuotaConfig()

    async def load(self) -> None:
        """Read every quota; counting goes on where a quota did not change."""
        config = await self._sealed.get(QUOTA_CONFIG)
        self.config = msgspec.msgpack.decode(config, type=QuotaConfig) if config else QuotaConfig()
        names = await self._sealed.list(QUOTAS)
        raws = await read_many(self._sealed, [QUOTAS + name for name in names])
        found = [msgspec.msgpack.decode(raw, type=RateLimitQuota) for raw in raws]
        self._limiters = {quota.name: self._limiter(quota) for quota in found}

    def _limiter(self, quota: RateLimitQuota) -> Limiter:
        known = self._limiters.get(quota.name)
        return known if known is not None and known.quota == quota else Limiter(quota)

    async def invalidate(self, keys: Iterable[str]) -> None:
        """Replication changed these logical keys."""
        if any(key.startswith(QUOTAS) or key == QUOTA_CONFIG for key in keys):
            await self.load()

    def by_role(self, path: str) -> bool:
        """Whether it makes a difference which role a request to ``path`` logs in to."""
        return any(limiter.quota.role and limiter.quota.covers(path) for limiter in self._limiters.values())

    def check(self, path: str, address: str, role: str = "") -> Exceeded | None:
        """Count a request; what it exceeds, or None if it may pass."""
        limiter = self._counting(path, role) if self._limiters else None
        if limiter is None:
            return None
        wait_s = limiter.take(address, self._now())
        return Exceeded(limiter.quota.name, max(math.ceil(wait_s), 1)) if wait_s else None

    def _counting(self, path: str, role: str) -> Limiter | None:
        matching = [limiter for limiter in self._limiters.values() if limiter.quota.matches(path, role)]
        if not matching or self.config.exempts(path):
            return None
        return max(matching, key=lambda one: one.quota.specificity)

    def headers(self, path: str, address: str, role: str = "") -> dict[str, str]:
        """What an answer tells its client of the limit and of what is left; nothing unless that is switched on."""
        limiter = self._counting(path, role) if self.config.show_headers else None
        if limiter is None:
            return {}
        left, reset_s = limiter.left(address)
        limit = f"{limiter.quota.rate:g}"
        return {"X-Ratelimit-Limit": limit, "X-Ratelimit-Remaining": str(left), "X-Ratelimit-Reset": str(reset_s)}

    async def configure(self, config: QuotaConfig) -> None:
        """Raises ReadOnlyStorage on a performance secondary."""
        await self._config_view.put("config", msgspec.msgpack.encode(config))
        self.config = config

    def get(self, name: str) -> RateLimitQuota | None:
        """The quota, or None."""
        limiter = self._limiters.get(name)
        return limiter.quota if limiter is not None else None

    def names(self) -> list[str]:
        """Sorted."""
        return sorted(self._limiters)

    async def put(self, quota: RateLimitQuota) -> None:
        """Store a quota; it counts from now on. Raises InvalidRequest, and ReadOnlyStorage on a performance
        secondary."""
        quota.check()
        for other in self._limiters.values():
            if (other.quota.path, other.quota.role) == (quota.path, quota.role) and other.quota.name != quota.name:
                same = "path and role" if quota.role else "path"
                raise InvalidRequest(f'the quota "{other.quota.name}" has the same {same}')
        await self._view.put(quota.name, msgspec.msgpack.encode(quota))
        self._limiters[quota.name] = self._limiter(quota)

    async def mount_gone(self, mount: str, target: str = "") -> None:
        """Quotas of a mount move to ``target`` with it, or end with it where there is none. Both paths end in a slash.
        Where this cluster may not write they stay: they are the primary's, whose mounts are other ones."""
        there = [one.quota for one in self._limiters.values() if one.quota.path.startswith(mount)]
        if not there or not self._writable():
            return
        moved = {quota.name: msgspec.structs.replace(quota, path=target + quota.path[len(mount) :]) for quota in there}
        await self._view.commit(
            [Write(name, msgspec.msgpack.encode(quota) if target else None) for name, quota in moved.items()]
        )
        for name, quota in moved.items():
            self._limiters.pop(name, None)
            if target:
                self._limiters[name] = self._limiter(quota)

    async def delete(self, name: str) -> None:
        """Nothing counts there any more. Raises ReadOnlyStorage on a performance secondary."""
        await self._view.delete(name)
        self._limiters.pop(name, None)
