"""The live side of the mount tables: one engine object per mount, and the routing table made of them.

The tables say what should be mounted; :meth:`MountView.refresh` makes it so. An engine whose mount did not change keeps
its object, and so its caches and locks. A mount whose engine cannot be loaded answers with an error of its own and
hides nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from plugin_api.engine import Engine, EngineContext, MountInfo
from plugin_api.errors import PluginError
from plugin_api.request import Auth, Caller, Operation, Request, Response
from sidecar.core.mounts import AUTH, SECRETS, MountEntry, MountTable
from sidecar.core.store_view import SealedStore, View
from sidecar.request.call import Answer, Backend, Call, matches_any
from sidecar.request.plugins import AUTH as AUTH_PLUGINS
from sidecar.request.plugins import SECRETS as SECRETS_PLUGINS
from sidecar.request.plugins import PluginNotFound, PluginRegistry
from sidecar.request.router import Router

log = logging.getLogger("core")

LogIn = Callable[[Call, MountInfo, Auth], Awaitable[Answer]]
GROUPS = {SECRETS: SECRETS_PLUGINS, AUTH: AUTH_PLUGINS}
BUILT_IN = frozenset({"system", "cubbyhole", "token"})


@dataclass(frozen=True, slots=True)
class TtlDefaults:
    """The system's lease TTLs, for mounts that do not set their own."""

    default_s: int
    max_s: int


def mount_info(entry: MountEntry, defaults: TtlDefaults) -> MountInfo:
    """What an engine is told about its mount."""
    max_s = entry.config.max_lease_ttl_s or defaults.max_s
    return MountInfo(
        path=entry.full_path,
        type=entry.type,
        uuid=entry.uuid,
        accessor=entry.accessor,
        local=entry.local,
        options=dict(entry.options or {}),
        default_lease_ttl_s=min(entry.config.default_lease_ttl_s or defaults.default_s, max_s),
        max_lease_ttl_s=max_s,
    )


class EngineBackend:
    """One mounted engine as the pipeline sees it."""

    def __init__(self, entry: MountEntry, engine: Engine, log_in: LogIn) -> None:
        self.entry = entry
        self.engine = engine
        self._log_in = log_in

    @property
    def type_name(self) -> str:
        return self.entry.type

    def is_open(self, rest: str, operation: Operation) -> bool:
        return matches_any(self.engine.unauthenticated, rest)

    def needs_sudo(self, rest: str) -> bool:
        return matches_any(self.engine.sudo, rest)

    async def exists(self, call: Call, rest: str) -> bool | None:
        return await self.engine.exists(self._request(call, rest))

    async def handle(self, call: Call, rest: str) -> Answer | None:
        response = await self.engine.handle(self._request(call, rest))
        if response is None:
            return None
        answer = self._answer(response)
        if response.auth is None:
            return answer
        if self.entry.table != AUTH or response.status >= 400:
            raise PluginError("the engine answered with a login where none can be")
        issued = await self._log_in(call, self.engine.context.mount, response.auth)
        answer.auth = issued.auth
        answer.warnings = [*response.warnings, *issued.warnings]
        return answer

    def help(self, rest: str) -> str:
        return self.engine.help(rest)

    def _request(self, call: Call, rest: str) -> Request:
        # A call without an identity is a login, of which no more is known than where it came from.
        known = call.identity
        return Request(
            operation=call.operation,
            path=rest,
            data=call.data,
            mount_point=self.entry.full_path,
            caller=known.caller if known is not None else Caller(remote_address=call.remote_address),
            id=call.id,
        )

    def _answer(self, response: Response) -> Answer:
        return Answer(
            data=response.data,
            warnings=list(response.warnings),
            lease_duration_s=response.lease_duration_s,
            renewable=response.renewable,
            status=response.status,
            mount_type=self.entry.type,
        )


class BrokenMount:
    """Stands where an engine could not be loaded."""

    def __init__(self, entry: MountEntry, reason: str) -> None:
        self.entry = entry
        self._reason = reason

    @property
    def type_name(self) -> str:
        return self.entry.type

    def is_open(self, rest: str, operation: Operation) -> bool:
        return False

    def needs_sudo(self, rest: str) -> bool:
        return False

    async def exists(self, call: Call, rest: str) -> bool | None:
        return None

    async def handle(self, call: Call, rest: str) -> Answer | None:
        raise PluginError(f"the mount at {self.entry.full_path} is not available: {self._reason}")

    def help(self, rest: str) -> str:
        return ""


class MountView:
    """Owns the engines of a tenure. ``built_in`` are the backends at fixed paths, there whatever the tables say."""

    def __init__(
        self,
        table: MountTable,
        sealed: SealedStore,
        plugins: PluginRegistry,
        built_in: Mapping[str, Backend],
        *,
        log_in: LogIn,
        writable: Callable[[], bool],
        now: Callable[[], float],
        defaults: TtlDefaults,
    ) -> None:
        self.table = table
        self._sealed = sealed
        self._plugins = plugins
        self._built_in = dict(built_in)
        self._log_in = log_in
        self._writable = writable
        self._now = now
        self.defaults = defaults
        self._mounted: dict[str, EngineBackend | BrokenMount] = {}
        self._by_path: dict[str, MountEntry] = {}
        self._router: Router[Backend] = Router(self._built_in)

    def install(self, path: str, backend: Backend) -> None:
        """Add a backend at a fixed path: one that itself needs this view."""
        self._built_in[path] = backend
        self.refresh()

    @property
    def router(self) -> Router[Backend]:
        """The routing table of the moment."""
        return self._router

    def serving(self, path: str) -> tuple[str, MountEntry | None]:
        """The mount that serves ``path`` (``""`` for none) and its entry, if it has one."""
        match = self._router.match(path)
        return ("", None) if match is None else (match.mount, self._by_path.get(match.mount))

    def plugin_types(self) -> dict[str, list[str]]:
        """Types that can be mounted, for the plugin catalog."""
        return {"auth": self._plugins.types(AUTH_PLUGINS), "secret": self._plugins.types(SECRETS_PLUGINS)}

    def refresh(self) -> None:
        """Bring engines and routes in line with the tables. Makes no store access, so it cannot fail half-way."""
        mounted: dict[str, EngineBackend | BrokenMount] = {}
        routes: dict[str, Backend] = {}
        by_path: dict[str, MountEntry] = {}
        for name in (SECRETS, AUTH):
            for entry in self.table.entries(name):
                by_path[entry.full_path] = entry
                if entry.type in BUILT_IN:
                    continue
                old = self._mounted.get(entry.uuid)
                backend = old if old is not None and old.entry == entry else self._make(entry)
                mounted[entry.uuid] = routes[entry.full_path] = backend
        self._mounted, self._by_path = mounted, by_path
        self._router = Router({**routes, **self._built_in})

    async def invalidate(self, keys: Iterable[str]) -> None:
        """Tell engines which paths of their storage replication changed."""
        for key in keys:
            _, partition, path = key.split("/", 2)
            backend = self._mounted.get(partition)
            if isinstance(backend, EngineBackend):
                await backend.engine.invalidate(path)

    def _make(self, entry: MountEntry) -> EngineBackend | BrokenMount:
        try:
            engine_class = self._plugins.load(GROUPS[entry.table], entry.type)
            engine = engine_class(self._context(entry))
        except (PluginNotFound, PluginError) as error:
            log.error("mount not available: path=%s type=%s error=%s", entry.full_path, entry.type, error)
            return BrokenMount(entry, str(error))
        return EngineBackend(entry, engine, self._log_in)

    def _context(self, entry: MountEntry) -> EngineContext:
        if entry.local:
            # Both storages of a local mount are of one class: folders keep them apart.
            main, local = (View(self._sealed, "l", entry.uuid, folder) for folder in ("main/", "local/"))
            return EngineContext(mount_info(entry, self.defaults), main, local, self._now)
        local = View(self._sealed, "l", entry.uuid)
        shared = View(self._sealed, "r", entry.uuid, writable=self._writable)
        return EngineContext(mount_info(entry, self.defaults), shared, local, self._now, self._writable)
