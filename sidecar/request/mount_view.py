"""The live side of the mount tables: one engine object per mount, and the routing table made of them.

The tables say what should be mounted; :meth:`MountView.refresh` makes it so. An engine whose mount did not change keeps
its object, and so its caches and locks. A mount whose engine cannot be loaded answers with an error of its own and
hides nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Protocol

from plugin_api.description import PathDescription
from plugin_api.engine import Engine, EngineContext, MountInfo
from plugin_api.errors import PluginError, Unavailable
from plugin_api.request import Auth, Caller, Lease, Operation, Request, Response
from sidecar.core.keys import LOCAL_FOLDER, MAIN_FOLDER
from sidecar.core.leases import Granted
from sidecar.core.mounts import AUTH, SECRETS, MountEntry, MountTable
from sidecar.core.store_view import SealedStore, View
from sidecar.request.call import Answer, Backend, Call, matches_any
from sidecar.request.errors import UnknownMount
from sidecar.request.plugins import AUTH as AUTH_PLUGINS
from sidecar.request.plugins import SECRETS as SECRETS_PLUGINS
from sidecar.request.plugins import PluginNotFound, PluginRegistry
from sidecar.request.router import Router

log = logging.getLogger("core")

LogIn = Callable[[Call, MountInfo, Auth], Awaitable[Answer]]
"""Makes the token of a login that succeeded."""

KeepLease = Callable[[Call, MountInfo, Lease], Awaitable[Granted]]
"""Keeps the lease of an answer that has one, or has the secret taken back and raises."""

Guard = Callable[[MountEntry, str], AbstractAsyncContextManager[Callable[[], None]]]
"""Holds one login of an identity: refuses it, or counts how it ends; what it gives is called for a success."""


class RevokePrefix(Protocol):
    """Revokes every lease below a prefix; with ``force`` forgets what cannot be revoked."""

    async def __call__(self, prefix: str, *, force: bool) -> object: ...


DRAIN_S_MAX = 10.0
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


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the core does with answers of engines."""

    log_in: LogIn
    keep_lease: KeepLease
    guard: Guard


class EngineBackend:
    """One mounted engine as the pipeline sees it."""

    def __init__(self, entry: MountEntry, engine: Engine, hooks: Hooks) -> None:
        self.entry = entry
        self.engine = engine
        self.initialized = False
        self._hooks = hooks
        self._running = 0
        self._closed = False
        self._drained = asyncio.Event()

    @property
    def type_name(self) -> str:
        return self.entry.type

    @property
    def replicated(self) -> bool:
        return not self.entry.local

    def is_open(self, rest: str, operation: Operation) -> bool:
        return matches_any(self.engine.unauthenticated, rest)

    def needs_sudo(self, rest: str) -> bool:
        return matches_any(self.engine.sudo, rest)

    async def exists(self, call: Call, rest: str) -> bool | None:
        return await self.engine.exists(self._request(call, rest))

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Within the block no request reaches the engine: what it has issued can be revoked, and nothing comes after.
        Raises Unavailable where requests under way do not end in time."""
        if self._closed:
            raise Unavailable(f"the mount at {self.entry.full_path} is being changed already")
        self._closed = True
        try:
            await self._drain()
            yield
        finally:
            self._closed = False

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(DRAIN_S_MAX):
                while self._running:
                    self._drained.clear()
                    await self._drained.wait()
        except TimeoutError:
            raise Unavailable(f"requests to {self.entry.full_path} are still under way; try again") from None

    async def handle(self, call: Call, rest: str) -> Answer | None:
        if self._closed:
            raise UnknownMount(call.path)
        self._running += 1
        try:
            return await self._handle(call, self._request(call, rest))
        finally:
            self._running -= 1
            self._drained.set()

    async def login_role(self, call: Call, rest: str) -> str:
        """The role that a login is to; empty while the mount is closed, and for what is no login."""
        if self._closed or self.entry.table != AUTH or not self.is_open(rest, call.operation):
            return ""
        return await self.engine.login_role(self._request(call, rest))

    async def _handle(self, call: Call, request: Request) -> Answer | None:
        if call.identity is not None or self.entry.table != AUTH:
            return await self._finished(call, await self.engine.handle(request))
        identity = await self.engine.login_identity(request)
        if not identity:
            return await self._finished(call, await self.engine.handle(request))
        async with self._hooks.guard(self.entry, identity) as succeeded:
            response = await self.engine.handle(request)
            if response is not None and response.auth is not None:
                succeeded()
        return await self._finished(call, response)

    async def _finished(self, call: Call, response: Response | None) -> Answer | None:
        """The answer, with the token or the lease that goes with it."""
        if response is None:
            return None
        answer = self._answer(response)
        mount = self.engine.context.mount
        if response.auth is not None:
            if self.entry.table != AUTH or response.status >= 400 or response.lease is not None:
                raise PluginError("the engine answered with a login where none can be")
            response.auth.token_type = _token_type(self.entry.config.token_type, response.auth.token_type)
            issued = await self._hooks.log_in(call, mount, response.auth)
            answer.auth = issued.auth
            answer.warnings = [*response.warnings, *issued.warnings]
        elif response.lease is not None:
            granted = await self._hooks.keep_lease(call, mount, response.lease)
            answer.lease_id = granted.entry.id
            answer.lease_duration_s = granted.entry.ttl_s
            answer.renewable = granted.entry.renewable
            answer.warnings = [*response.warnings, *granted.warnings]
        return answer

    def help(self, rest: str) -> str:
        return self.engine.help(rest)

    def describe(self) -> Sequence[PathDescription]:
        engine = self.engine
        return [
            replace(
                one,
                # A parameter stands for some name; which one makes no difference to these patterns.
                open=matches_any(engine.unauthenticated, one.template),
                sudo=matches_any(engine.sudo, one.template),
            )
            for one in engine.describe()
        ]

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
            headers=_passed_headers(self.entry.config.passthrough_request_headers, call.headers),
        )

    def _answer(self, response: Response) -> Answer:
        return Answer(
            data=response.data,
            warnings=list(response.warnings),
            lease_duration_s=response.lease_duration_s,
            renewable=response.renewable,
            status=response.status,
            mount_type=self.entry.type,
            headers=self._allowed_headers(response),
        )

    def _allowed_headers(self, response: Response) -> dict[str, str]:
        if not response.headers:
            return {}
        allowed = {name.lower() for name in self.entry.config.allowed_response_headers}
        return {name: value for name, value in response.headers.items() if name.lower() in allowed}


def _token_type(of_mount: str, of_login: str) -> str:
    """What a login makes: the mount's ``service`` and ``batch`` decide, its defaults count where the login leaves it
    open."""
    if of_mount in ("service", "batch"):
        return of_mount
    return of_mount if of_mount and of_login in ("", "default") else of_login


_NEVER_PASSED = ("authorization", "cookie", "proxy-authorization")


def _passed_headers(wanted: Collection[str], headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a request that a mount may see. What proves who the caller is never reaches an engine."""
    if not wanted:
        return {}
    names = [name.lower() for name in wanted]
    passed = [name for name in names if name not in _NEVER_PASSED and not name.startswith("x-vault-")]
    return {name: headers[name] for name in passed if name in headers}


class BrokenMount:
    """Stands where an engine could not be loaded."""

    def __init__(self, entry: MountEntry, reason: str) -> None:
        self.entry = entry
        self._reason = reason

    @property
    def type_name(self) -> str:
        return self.entry.type

    @property
    def replicated(self) -> bool:
        return not self.entry.local

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

    def describe(self) -> Sequence[PathDescription]:
        return ()


class MountNotHeld(BrokenMount):
    """Stands where a mount's data is not on this cluster, so that nobody takes *not here* for *nothing there*."""

    def is_open(self, rest: str, operation: Operation) -> bool:
        return self.entry.table == AUTH  # who logs in is told the same

    async def handle(self, call: Call, rest: str) -> Answer | None:
        raise Unavailable(
            f"the data of the mount at {self.entry.full_path} is not held by this cluster: a paths filter has "
            "withheld it, or it is still on its way; sys/replication/performance/status says which"
        )


class MountView:
    """Owns the engines of a tenure. ``built_in`` are the backends at fixed paths, there whatever the tables say.
    ``not_held`` says of a replicated mount, by uuid, that its data is not here."""

    def __init__(
        self,
        table: MountTable,
        sealed: SealedStore,
        plugins: PluginRegistry,
        built_in: Mapping[str, Backend],
        *,
        hooks: Hooks,
        writable: Callable[[], bool],
        now: Callable[[], float],
        defaults: TtlDefaults,
        generate_password: Callable[[str], Awaitable[str]],
        not_held: Callable[[str], bool] = lambda mount_uuid: False,
    ) -> None:
        self._generate_password = generate_password
        self.table = table
        self._not_held = not_held
        self._sealed = sealed
        self._plugins = plugins
        self._built_in = dict(built_in)
        self._hooks = hooks
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
                backend: EngineBackend | BrokenMount
                if not entry.local and self._not_held(entry.uuid):
                    backend = MountNotHeld(entry, "its data is not held")
                elif old is not None and old.entry == entry and not isinstance(old, MountNotHeld):
                    backend = old
                else:
                    backend = self._make(entry)
                mounted[entry.uuid] = routes[entry.full_path] = backend
        self._mounted, self._by_path = mounted, by_path
        self._router = Router({**routes, **self._built_in})

    async def prepare_options(self, entry: MountEntry, options: Mapping[str, str]) -> list[str]:
        """Ask the engine of ``entry`` whether it can serve with ``options`` from now on; what it wants to tell.
        Raises InvalidRequest, and what the engine's storage raises."""
        backend = self._mounted.get(entry.uuid)
        return await backend.engine.retune(options) if isinstance(backend, EngineBackend) else []

    def check(self, entry: MountEntry) -> None:
        """Whether an engine would serve ``entry``. Raises PluginError with what the engine has against it."""
        with suppress(PluginNotFound):  # told apart where the type is looked up
            self._plugins.load(GROUPS[entry.table], entry.type)(self._context(entry))

    async def initialize(self) -> None:
        """Let engines that were made since do what they must in the background. Raises what their storage raises: to
        be repeated then."""
        for mount_uuid, backend in list(self._mounted.items()):
            if not isinstance(backend, EngineBackend) or backend.initialized:
                continue
            if not backend.entry.local and not self._writable():
                continue
            await backend.engine.initialize()
            if self._mounted.get(mount_uuid) is backend:
                backend.initialized = True

    def reload(self, type_name: str, paths: Collection[str]) -> None:
        """Make new engines for the mounts of ``type_name`` or at ``paths``: whatever they held in memory is gone."""
        for mount_uuid, backend in list(self._mounted.items()):
            if backend.type_name == type_name or backend.entry.full_path in paths:
                del self._mounted[mount_uuid]
        self.refresh()

    def engines(self) -> list[Engine]:
        """Those that are loaded now."""
        return [backend.engine for backend in self._mounted.values() if isinstance(backend, EngineBackend)]

    def has_login_roles(self, mount: str) -> bool:
        """Whether the mount at exactly ``mount`` is an auth method whose logins are to roles."""
        backend = self._router.get(mount)
        return isinstance(backend, EngineBackend) and backend.entry.table == AUTH and backend.engine.has_login_roles

    async def login_role(self, call: Call) -> str:
        """The role that ``call`` logs in to; empty where there is none. Raises what the engine and its storage
        raise."""
        match = self._router.match(call.path)
        if match is None or not isinstance(match.target, EngineBackend):
            return ""
        return await match.target.login_role(call, match.rest)

    def engine(self, mount_uuid: str) -> Engine | None:
        """The engine of a mount, None where none is mounted or it could not be loaded."""
        backend = self._mounted.get(mount_uuid)
        return backend.engine if isinstance(backend, EngineBackend) else None

    async def reselected(self, revoke_prefix: RevokePrefix) -> None:
        """Which mounts are hidden, or whose data is held, has changed. What a mount that is hidden has issued is
        revoked, while its engine still can; what cannot be is forgotten. Raises Unavailable: to be tried again."""
        shown = {entry.uuid for name in (SECRETS, AUTH) for entry in self.table.entries(name)}
        for entry in self.table.replicated():
            # A local mount in its place has leases of its own under the same path.
            if entry.uuid not in shown and self.table.find(entry.table, entry.path) is None:
                async with self.closed(entry):
                    await revoke_prefix(entry.full_path, force=True)
        self.refresh()

    @asynccontextmanager
    async def closed(self, entry: MountEntry) -> AsyncIterator[None]:
        """:meth:`EngineBackend.closed` of a mount, where it has an engine."""
        backend = self._mounted.get(entry.uuid)
        if not isinstance(backend, EngineBackend):
            yield
            return
        async with backend.closed():
            yield

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
        return EngineBackend(entry, engine, self._hooks)

    def _context(self, entry: MountEntry) -> EngineContext:
        if entry.local:
            main, local = (View(self._sealed, "l", entry.uuid, folder) for folder in (MAIN_FOLDER, LOCAL_FOLDER))
            return EngineContext(
                mount_info(entry, self.defaults), main, local, self._now, generate_password=self._generate_password
            )
        local = View(self._sealed, "l", entry.uuid)
        shared = View(self._sealed, "r", entry.uuid, writable=self._writable)
        return EngineContext(
            mount_info(entry, self.defaults), shared, local, self._now, self._writable, self._generate_password
        )
