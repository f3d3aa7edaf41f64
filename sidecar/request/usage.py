"""Counting what is stored, for the usage gauges: in the background of the active node, slowly, never for a request.

One call to the store at a time, with a pause after each, and a bounded number of calls a pass, whatever there is to
count. What a pass has not reached is gone on with in the next one: the counts are as old as that takes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping

import msgspec

from consul_backend.errors import BackendError
from plugin_api.errors import NotFound, PluginError
from plugin_api.request import Operation, Request
from sidecar.core.barrier import DecryptionFailed
from sidecar.core.keys import LEASES_DUE, TOKEN_IDS
from sidecar.core.lockout import DUE_GROUP as LOCKOUTS
from sidecar.core.metrics import METRICS
from sidecar.core.mounts import AUTH, SECRETS, MountEntry
from sidecar.core.schedule import MINUTE_S
from sidecar.core.store_view import SealedStore, read_many
from sidecar.core.token_entry import TokenEntry
from sidecar.core.usage import TokenShape, UsageSettings, kv_gauges, lease_gauges, token_gauges, token_total, ttl_label
from sidecar.request.mount_view import MountView

log = logging.getLogger("core")

PAUSE_S = 0.05
"""After each call to the store: at most twenty a second, whatever a store takes for one."""
FIRST_S = 30.0
"""How long a tenure goes on before the first pass."""
TOKENS_MAX = 100_000
"""Of more only the number is told."""
FOLDERS_MAX = 5_000
"""Of one KV mount; one that has more is not counted."""
_READ_AT_ONCE = 64
_AT_A_TURN = 1_000
_FAILURES = (BackendError, PluginError, DecryptionFailed, msgspec.MsgspecError)

Pause = Callable[[], Awaitable[None]]


class Usage:
    """The counts of one tenure. ``gate`` returns a reason while data must not be read."""

    def __init__(
        self,
        sealed: SealedStore,
        mounts: MountView,
        settings: UsageSettings,
        *,
        cluster: str,
        now: Callable[[], float],
        gate: Callable[[], str | None],
        pause: Pause | None = None,
    ) -> None:
        self._sealed = sealed
        self._mounts = mounts
        self._settings = settings
        self._cluster = cluster
        self._now = now
        self._gate = gate
        self._pause = pause or _pause
        self._tokens: dict[str, TokenShape] = {}
        self._shapes: Counter[TokenShape] = Counter()
        self._minutes: dict[int, int] = {}
        self._next_minute = 0
        self._found: dict[str, Mapping[str, float]] = {}

    def gauges(self) -> dict[str, float]:
        """What the last passes have counted."""
        return {name: value for found in self._found.values() for name, value in found.items()}

    async def run(self) -> None:
        """Count once in each period, until cancelled; ends at once where the period is 0."""
        period_s = self._settings.period_s
        if not period_s:
            return
        await asyncio.sleep(min(FIRST_S, period_s))
        while True:
            await self.count()
            await asyncio.sleep(period_s)

    async def count(self) -> None:
        """One pass. What cannot be read now stays as it was counted last."""
        for kind, collect in (("token", self._of_tokens), ("kv", self._of_secrets), ("lease", self._of_leases)):
            if self._gate() is not None:
                return
            try:
                with METRICS.timer("metrics.collection", gauge=kind):
                    self._found[kind] = await collect()
            except _FAILURES as error:
                METRICS.increment("metrics.collection.error", gauge=kind)
                log.debug("usage of %s is not counted now: %s", kind, type(error).__name__)

    # -- tokens: what one is counted by never changes, so that each is read once

    async def _of_tokens(self) -> Mapping[str, float]:
        names = await self._list(TOKEN_IDS)
        if len(names) > TOKENS_MAX:
            self._tokens, self._shapes = {}, Counter()
            log.info("usage: there are %d tokens; only their number is told", len(names))
            return token_total(len(names), self._cluster)
        try:
            await self._read_new(await self._forget_gone(names))
        except BaseException:
            self._tokens, self._shapes = {}, Counter()  # half a pass is none: the next one begins anew
            raise
        shapes = dict(self._shapes)
        return await asyncio.to_thread(token_gauges, shapes, self._cluster, self._settings.label_values_max)

    async def _forget_gone(self, names: list[str]) -> list[str]:
        """Keep what is known of ``names`` and nothing else; returns those of which nothing is known."""
        before, kept, unknown = self._tokens, {}, []
        for number, name in enumerate(names):
            shape = before.pop(name, None)
            if shape is not None:
                kept[name] = shape
            else:
                unknown.append(name)
            if number % _AT_A_TURN == 0:
                await asyncio.sleep(0)
        self._tokens = kept
        for number, shape in enumerate(before.values()):
            self._shapes[shape] -= 1
            if not self._shapes[shape]:
                del self._shapes[shape]
            if number % _AT_A_TURN == 0:
                await asyncio.sleep(0)
        return unknown

    async def _read_new(self, names: list[str]) -> None:
        methods = self._methods()
        shared = {shape: shape for shape in self._shapes}
        for start in range(0, len(names), _READ_AT_ONCE):
            keys = [TOKEN_IDS + name for name in names[start : start + _READ_AT_ONCE]]
            for raw in await read_many(self._sealed, keys):
                entry = msgspec.msgpack.decode(raw, type=TokenEntry)
                shape = _shape(entry, methods)
                self._tokens[entry.id_hash] = shape = shared.setdefault(shape, shape)
                self._shapes[shape] += 1
            await self._pause()

    def _methods(self) -> list[tuple[str, str]]:
        """(path, type) of every auth method, the longest path first."""
        entries = self._mounts.table.entries(AUTH)
        return sorted(((entry.full_path, entry.type) for entry in entries), key=lambda item: -len(item[0]))

    # -- secrets, as the engine itself lists them

    async def _of_secrets(self) -> Mapping[str, float]:
        counts: dict[str, int] = {}
        for entry in list(self._mounts.table.entries(SECRETS)):
            if entry.type != "kv":
                continue
            try:
                counts[entry.path] = await self._secrets_of(entry)
            except _FAILURES as error:
                METRICS.increment("metrics.collection.error", gauge="kv")
                log.debug("usage of %s is not counted now: %s", entry.path, type(error).__name__)
        return kv_gauges(counts, self._cluster, self._settings.label_values_max)

    async def _secrets_of(self, mount: MountEntry) -> int:
        folders = ["metadata/" if (mount.options or {}).get("version") == "2" else ""]
        count = seen = 0
        while folders:
            engine = self._mounts.engine(mount.uuid)
            seen += 1
            if engine is None or seen > FOLDERS_MAX:
                raise PluginError("not counted: not loaded, or too many folders")
            folder = folders.pop()
            request = Request(Operation.LIST, folder, mount_point=mount.full_path)
            try:
                response = await engine.handle(request)
            except NotFound:
                response = None
            for name in ((response.data if response is not None else None) or {}).get("keys", ()):
                if name.endswith("/"):
                    folders.append(folder + name)
                else:
                    count += 1
            await self._pause()
        return count

    # -- leases, by the minute that they end in, in which they lie in the store

    async def _of_leases(self) -> Mapping[str, float]:
        settings, now_s = self._settings, self._now()
        if not settings.buckets:
            return {}
        first = int(now_s - settings.bucket_s / 2) // MINUTE_S
        last = int(now_s + settings.bucket_s * settings.buckets) // MINUTE_S
        due = sorted(int(name.rstrip("/")) for name in await self._list(LEASES_DUE))
        due = [minute for minute in due if first <= minute <= last]
        self._minutes = {minute: self._minutes[minute] for minute in due if minute in self._minutes}
        calls_left = max(1, int(settings.period_s / PAUSE_S / 2))
        for minute in self._from_where_it_stopped(due):
            if calls_left <= 0:
                self._next_minute = minute
                break
            folder = f"{LEASES_DUE}{minute:010d}/"
            seconds = await self._list(folder)
            names = [name for second in seconds for name in await self._list(folder + second)]
            self._minutes[minute] = sum(not name.startswith(f"{LOCKOUTS}-") for name in names)
            calls_left -= 1 + len(seconds)
        return await asyncio.to_thread(lease_gauges, dict(self._minutes), now_s, settings)

    def _from_where_it_stopped(self, due: list[int]) -> Iterator[int]:
        start, self._next_minute = self._next_minute, 0
        yield from (minute for minute in due if minute >= start)
        yield from (minute for minute in due if minute < start)

    async def _list(self, prefix: str) -> list[str]:
        names = await self._sealed.list(prefix)
        await self._pause()
        return names


async def _pause() -> None:
    await asyncio.sleep(PAUSE_S)


def _shape(entry: TokenEntry, methods: list[tuple[str, str]]) -> TokenShape:
    method = next((kind for path, kind in methods if entry.path.startswith(path)), "token")
    return TokenShape(entry.policies, method, ttl_label(entry.ttl_s))
