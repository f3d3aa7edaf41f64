"""The token store: every token of this cluster, in local storage, writable whatever role the cluster has.

One token is up to five entries (token, accessor, place below its parent, expiry, a mark while it is being revoked);
each change of a token is one commit of all of them. Entries are cached parsed. The cache is exact because this object
is the only writer of these keys while its node leads; replication tells it of others by :meth:`TokenStore.invalidate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager

import msgspec

from consul_backend.errors import BackendError
from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, PermissionDenied
from sidecar.core.batch_tokens import KEY_LABEL, BatchTokens
from sidecar.core.keys import LEASES_BY_TOKEN, TOKEN_ACCESSORS, TOKEN_IDS, TOKEN_PARENTS, TOKEN_REVOKING, TOKEN_SALT
from sidecar.core.locks import KeyedLocks
from sidecar.core.metrics import METRICS
from sidecar.core.on_demand import OnDemand
from sidecar.core.policies import normalize_policies
from sidecar.core.schedule import Due, Schedule
from sidecar.core.store_view import SealedStore, View, read_many, walk
from sidecar.core.token_entry import (
    BATCH,
    ROOT_POLICY,
    CreateToken,
    IssuedToken,
    Renewed,
    TokenEntry,
    check_spec,
    first_ttl,
    new_entry,
    renewed_expiry,
)
from sidecar.core.token_expiry import AbandonedTokens
from sidecar.core.token_ids import (
    BATCH_PREFIX,
    RANDOM_LENGTH,
    SALT_BYTES,
    SERVICE_PREFIX,
    AccessorEntry,
    base62,
    creation,
    cubbyhole_folder,
    expiry,
    keyed_hash,
    parent_key,
    removal,
    store,
)
from sidecar.core.token_tidy import logged_tidy
from sidecar.core.token_trees import Release, descendants, nothing_leased, side_by_side
from sidecar.core.usage import creation_labels

log = logging.getLogger("token")

__all__ = ["CreateToken", "IssuedToken", "Renewed", "TokenEntry", "TokenStore", "cubbyhole"]

# A transaction has room for 61 operations; what a revocation deletes beyond this goes in further commits.
WRITES_MAX = 48
_TOKEN_BYTES_MAX = 8192


class TokenStore:
    """Create, look up, use, renew and revoke tokens. ``now`` returns unix seconds.

    Methods that take a token answer None (or do nothing) for one that is unknown, expired, spent or revoked, all alike.
    """

    def __init__(
        self,
        sealed: SealedStore,
        now: Callable[[], float],
        *,
        schedule: Schedule | None = None,
        release: Release = nothing_leased,
        random_bytes: Callable[[int], bytes] = os.urandom,
        cache_max: int = 50_000,
    ) -> None:
        self.schedule = schedule or Schedule(sealed, now)
        self._release = release
        self._sealed = sealed
        self._now = now
        self._random_bytes = random_bytes
        self._cache_max = cache_max
        self._salt = b""
        self._cache: OrderedDict[str, TokenEntry] = OrderedDict()
        self._loading: dict[str, object] = {}
        self._locks = KeyedLocks()
        self._batch = BatchTokens(sealed.barrier.derived_key(KEY_LABEL))
        self._abandoned = AbandonedTokens(sealed, now, self.revoke_hash)
        self._tidying = OnDemand(self._tidy)

    async def load(self) -> None:
        """Read the salt and what an earlier tenure left unfinished. Once, before anything else."""
        salt = await self._sealed.get(TOKEN_SALT)
        if salt is None:
            salt = self._random_bytes(SALT_BYTES)
            await self._sealed.put(TOKEN_SALT, salt)
        self._salt = salt
        await self._abandoned.load()

    async def run(self) -> None:
        """Finish interrupted revocations, tidy when asked; until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._abandoned.run(), name="unfinished token revocations")
            tasks.create_task(self._tidying.run(), name="token tidy")

    def ask_for_tidy(self) -> bool:
        """Have :meth:`run` tidy up soon. False where it is asked to already."""
        return self._tidying.ask()

    async def tidied(self) -> None:
        """Return once no tidy is asked for or under way."""
        await self._tidying.done()

    async def _tidy(self) -> None:
        try:
            await self._abandoned.sweep()
            await logged_tidy(self._sealed)
        except BackendError as error:
            log.error("tidy gave up: %s", type(error).__name__)

    async def sweep(self) -> None:
        """One pass over revocations that were cut short; :meth:`run` repeats it."""
        await self._abandoned.sweep()

    # -- creation

    async def create(self, spec: CreateToken) -> IssuedToken:
        """Make a token in one commit. Raises InvalidRequest, and PermissionDenied where the parent has gone."""
        with METRICS.timer("token.create"):
            issued = await self.create_with(spec, lambda entry: ())
        METRICS.increment("token.creation", **creation_labels(spec, issued.entry.ttl_s))
        return issued

    async def create_with(self, spec: CreateToken, also: Callable[[TokenEntry], Sequence[Write]]) -> IssuedToken:
        """:meth:`create`, with further writes in the same commit."""
        check_spec(spec)
        if spec.type == BATCH:
            return self._create_batch(spec)
        issued = self.prepare(spec)
        writes = [*creation(issued.entry, self._salt), *also(issued.entry)]
        parent = issued.entry.parent
        async with self._guarded(issued.entry, custom_id=spec.id is not None):
            if parent and await self._live(parent) is None:
                raise PermissionDenied("parent token lookup failed")
            if spec.id is not None and await self._load(issued.entry.id_hash) is not None:
                raise InvalidRequest("cannot create a token with a duplicate ID")
            await self._sealed.commit(writes)
            self.adopt(issued.entry)
        return issued

    def _guarded(self, entry: TokenEntry, *, custom_id: bool) -> AbstractAsyncContextManager[None]:
        """Of two with one chosen id only the first is made; and a revocation of the parent either sees this child, or
        is seen here. Siblings do not wait for each other."""
        if custom_id:
            return self._locks.hold_all({entry.id_hash, entry.parent} - {""})
        return self._locks.share(entry.parent) if entry.parent else contextlib.nullcontext()

    def prepare(self, spec: CreateToken) -> IssuedToken:
        """A service token that does not exist yet: :meth:`creation` has its writes, :meth:`adopt` follows their
        commit."""
        token = spec.id or SERVICE_PREFIX + base62(RANDOM_LENGTH, self._random_bytes)
        accessor = base62(RANDOM_LENGTH, self._random_bytes)
        ttl_s, warnings = first_ttl(spec)
        entry = self._entry(spec, self._hash(token), accessor, ttl_s)
        return IssuedToken(token, entry, warnings)

    def creation(self, entry: TokenEntry) -> list[Write]:
        """The writes that make ``entry`` exist."""
        return creation(entry, self._salt)

    def adopt(self, entry: TokenEntry) -> None:
        """``entry`` has been committed: cache it and watch its expiry."""
        self._remember(entry)
        if entry.expires_s:
            self.schedule.add(entry.expires_s)

    async def create_root(self, token: str | None = None) -> IssuedToken:
        """A root token that never expires; ``token`` is a custom id (as for a development server)."""
        METRICS.increment("token.create_root")
        path = "auth/token/root"
        return await self.create(
            CreateToken(policies=(ROOT_POLICY,), path=path, display_name="root", renewable=False, id=token),
        )

    def _entry(self, spec: CreateToken, id_hash: str, accessor: str, ttl_s: int) -> TokenEntry:
        policies = tuple(normalize_policies(spec.policies, default=False))
        return new_entry(spec, policies, id_hash, accessor, ttl_s, int(self._now()))

    def _create_batch(self, spec: CreateToken) -> IssuedToken:
        """A batch token is its own storage."""
        ttl_s, warnings = first_ttl(spec)
        entry = self._entry(spec, "", "", ttl_s)
        token = self._batch.make(entry, self._random_bytes)
        return IssuedToken(token, msgspec.structs.replace(entry, id_hash=self._hash(token)), warnings)

    # -- looking up and using

    async def lookup(self, token: str) -> TokenEntry | None:
        """The entry of a token that may be used now. Consumes nothing."""
        if not token or len(token) > _TOKEN_BYTES_MAX:
            return None
        with METRICS.timer("token.lookup"):
            if token.startswith(BATCH_PREFIX):
                return await self._lookup_batch(token)
            return await self._live(self._hash(token))

    async def use(self, token: str) -> TokenEntry | None:
        """:meth:`lookup`, and consume one of its uses if they are counted. The consumption is committed when this
        returns. After the last use the entry is ``spent``: call :meth:`finish` when the request is done."""
        entry = await self.lookup(token)
        if entry is None or entry.num_uses == 0:
            return entry
        async with self._locks.hold(entry.id_hash):
            entry = await self._live(entry.id_hash)
            if entry is None:
                return None
            used = msgspec.structs.replace(entry, num_uses=entry.num_uses - 1, spent=entry.num_uses == 1)
            writes = [store(used)]
            if used.spent:
                writes.append(Write(TOKEN_REVOKING + used.id_hash, str(int(self._now())).encode()))
            await self._change(used, writes)
            return used

    async def finish(self, entry: TokenEntry) -> None:
        """Remove a spent token, with its children and cubbyhole."""
        await self.revoke_hash(entry.id_hash)

    async def lookup_accessor(self, accessor: str) -> TokenEntry | None:
        """The entry that ``accessor`` stands for."""
        raw = await self._sealed.get(TOKEN_ACCESSORS + self._hash(accessor)) if accessor else None
        if raw is None:
            return None
        return await self._live(msgspec.msgpack.decode(raw, type=AccessorEntry).id_hash)

    async def list_accessors(self) -> list[str]:
        """Sorted accessors of all service tokens; a token that expired within the last minutes may be among them."""
        names = await self._sealed.list(TOKEN_ACCESSORS)
        raws = await read_many(self._sealed, [TOKEN_ACCESSORS + name for name in names])
        return sorted(msgspec.msgpack.decode(raw, type=AccessorEntry).accessor for raw in raws)

    async def _lookup_batch(self, token: str) -> TokenEntry | None:
        """A child counts only where its parent lives: names of tokens are another cluster's own."""
        entry = self._batch.read(token)
        if entry is None or not entry.alive(self._now()):
            return None
        if entry.parent and await self._live(entry.parent) is None:
            return None
        return msgspec.structs.replace(entry, id_hash=self._hash(token))

    # -- renewal

    async def renew(self, token: str, increment_s: int = 0) -> Renewed:
        """Let the token live longer, within its maxima. Raises InvalidRequest ``lease is not renewable``, and
        ``token not found`` for an unknown one."""
        entry = await self.lookup(token)
        if entry is None:
            raise InvalidRequest("token not found")
        return await self._renew(entry, increment_s)

    async def renew_accessor(self, accessor: str, increment_s: int = 0) -> Renewed:
        """:meth:`renew` by accessor. Raises InvalidRequest ``invalid accessor`` for an unknown one."""
        return await self._renew(await self._by_accessor(accessor), increment_s)

    async def _renew(self, entry: TokenEntry, increment_s: int) -> Renewed:
        if entry.type == BATCH:
            raise InvalidRequest("batch tokens cannot be renewed")
        async with self._locks.hold(entry.id_hash):
            current = await self._live(entry.id_hash)
            if current is None:
                raise InvalidRequest("token not found")
            if not current.renewable or not current.expires_s:
                raise InvalidRequest("lease is not renewable")
            now_s = int(self._now())
            expires_s, warnings = renewed_expiry(current, increment_s, now_s)
            renewed = msgspec.structs.replace(current, expires_s=expires_s, last_renewal_s=now_s)
            writes = [store(renewed)]
            if expires_s != current.expires_s:
                writes += [Write(expiry(current).key, None), expiry(renewed)]
            await self._change(renewed, writes)
            self.schedule.add(expires_s)
            return Renewed(renewed, warnings)

    # -- revocation

    async def revoke(self, token: str) -> None:
        """Revoke a token and everything below it. Raises InvalidRequest for a batch token."""
        entry = await self.lookup(token)
        if entry is not None:
            await self.revoke_entry(entry)

    async def revoke_entry(self, entry: TokenEntry) -> None:
        """:meth:`revoke` of the token that ``entry`` describes."""
        if entry.type == BATCH:
            raise InvalidRequest("batch tokens cannot be revoked")
        with METRICS.timer("token.revoke"):
            await self.revoke_hash(entry.id_hash)

    async def revoke_accessor(self, accessor: str) -> None:
        """:meth:`revoke` by accessor. Raises InvalidRequest ``invalid accessor`` for an unknown one."""
        await self.revoke_entry(await self._by_accessor(accessor))

    async def revoke_orphan(self, token: str) -> None:
        """Revoke a token but not its children, which become orphans. Raises InvalidRequest for a batch token."""
        entry = await self.lookup(token)
        if entry is None:
            return
        if entry.type == BATCH:
            raise InvalidRequest("batch tokens cannot be revoked")
        # No child can be added while the lock is held. A crash half way leaves a valid token with fewer children.
        async with self._locks.hold(entry.id_hash):
            for name in await self._sealed.list(f"{TOKEN_PARENTS}{entry.id_hash}/"):
                await self._orphan(name)
        await self.revoke_hash(entry.id_hash)

    async def take(
        self,
        token: str,
        paths: Sequence[str],
        also: Callable[[list[bytes | None]], Sequence[Write]],
    ) -> list[bytes | None] | None:
        """Read ``paths`` of the token's cubbyhole and revoke the token, in one commit with the writes ``also`` gives.
        Of any number of callers exactly one gets the values; the others get None. The token must have no children."""
        entry = await self.lookup(token)
        if entry is None or entry.type == BATCH:
            return None
        async with self._locks.hold(entry.id_hash):
            entry = await self._live(entry.id_hash)
            if entry is None:
                return None
            folder = cubbyhole_folder(entry.id_hash)
            values = [await self._sealed.get(folder + path) for path in paths]
            deletes = [Write(folder + path, None) for path in paths]
            await self._drop(entry, [*deletes, *also(values)])
            return values

    async def revoke_hash(self, id_hash: str) -> None:
        """:meth:`revoke` by hash, also of a token that cannot be used any more: it is unusable from the start, then all
        below it, many in a commit; the mark that each gets lets a restart finish the work. Then they go."""
        if (children := await self._revoke_one(id_hash)) is None:
            return
        tree = await descendants(self._sealed, children)
        await side_by_side(self._revoke_one, tree)
        marked = frozenset(tree)
        left = await side_by_side(lambda name: self._revoke_one(name, marked), [*tree, id_hash])
        pending = [name for name, below in zip([*tree, id_hash], left, strict=True) if below is not None]
        while pending:
            children = await self._revoke_one(pending[-1])
            if children is None:
                pending.pop()
            else:
                pending.extend(children)

    async def _revoke_one(self, id_hash: str, marked: Collection[str] = ()) -> list[str] | None:
        """Remove one token (None), or make it unusable and return the children that have to go before the next try:
        none of ``marked``, which go by themselves."""
        folder = f"{TOKEN_PARENTS}{id_hash}/"
        async with self._locks.hold(id_hash):
            entry = await self._load(id_hash)
            if entry is None:
                return None
            children = [name for name in await self._sealed.list(folder) if name not in marked]
            kept = await walk(self._sealed, cubbyhole_folder(id_hash), WRITES_MAX + 1)
            leased = bool(await self._sealed.list(f"{LEASES_BY_TOKEN}{id_hash}/"))
            if not children and not leased and len(kept) <= WRITES_MAX:
                await self._drop(entry, [Write(key, None) for key in kept])
                return None
            if not entry.spent:
                mark = Write(TOKEN_REVOKING + id_hash, str(int(self._now())).encode())
                spent = msgspec.structs.replace(entry, spent=True)
                await self._change(spent, [store(spent), mark])
            if leased:
                await self._release(id_hash)
            while len(kept) > WRITES_MAX:
                await self._sealed.commit([Write(key, None) for key in kept[:WRITES_MAX]])
                kept = await walk(self._sealed, cubbyhole_folder(id_hash), WRITES_MAX + 1)
            gone = [child for child in children if await self._load(child) is None]
            for start in range(0, len(gone), WRITES_MAX):
                await self._sealed.commit([Write(folder + child, None) for child in gone[start : start + WRITES_MAX]])
            return [child for child in children if child not in gone]

    async def _orphan(self, id_hash: str) -> None:
        async with self._locks.hold(id_hash):
            child = await self._load(id_hash)
            if child is not None:
                orphan = msgspec.structs.replace(child, parent="")
                await self._change(orphan, [store(orphan), Write(parent_key(child), None)])

    async def _by_accessor(self, accessor: str) -> TokenEntry:
        entry = await self.lookup_accessor(accessor)
        if entry is None:
            raise InvalidRequest("invalid accessor")
        return entry

    async def expire(self, due: Due) -> None:
        """What is due for a token: remove it with everything that ends with it."""
        entry = await self._load(due.subject)
        if entry is None or entry.expires_s != due.at_s:
            await self._sealed.delete(due.key)
        elif self._now() >= entry.expires_s:
            METRICS.increment("expire.lease_expiration")
            await self.revoke_hash(due.subject)

    # -- what ends with a token

    async def attach(self, entry: TokenEntry, writes: Sequence[Write]) -> bool:
        """Commit writes that end with the token of ``entry``, as leases do. False, and nothing was written, where it
        cannot be used any more."""
        guard = entry.parent if entry.type == BATCH else entry.id_hash
        if not guard:
            alive = entry.alive(self._now())
            if alive:
                await self._sealed.commit(writes)
            return alive
        # A revocation either sees what is attached, or is seen here.
        async with self._locks.share(guard):
            if not entry.alive(self._now()) or await self._live(guard) is None:
                return False
            await self._sealed.commit(writes)
            return True

    async def by_hash(self, id_hash: str) -> TokenEntry | None:
        """The entry that a lease id names, if the token may be used now."""
        return await self._live(id_hash)

    # -- the cache

    def invalidate(self, keys: Iterable[str]) -> None:
        """Replication changed these logical keys."""
        for key in keys:
            if key.startswith(TOKEN_IDS):
                self._forget(key.removeprefix(TOKEN_IDS))

    async def _live(self, id_hash: str) -> TokenEntry | None:
        entry = await self._load(id_hash)
        return entry if entry is not None and entry.alive(self._now()) else None

    async def _load(self, id_hash: str) -> TokenEntry | None:
        cached = self._cache.get(id_hash)
        if cached is not None:
            self._cache.move_to_end(id_hash)
            return cached
        # A change during the read takes the mark away, so that what was read before it never enters the cache.
        mark = object()
        self._loading[id_hash] = mark
        try:
            raw = await self._sealed.get(TOKEN_IDS + id_hash)
            entry = None if raw is None else msgspec.msgpack.decode(raw, type=TokenEntry)
            if entry is not None and self._loading.get(id_hash) is mark:
                self._remember(entry)
            return entry
        finally:
            if self._loading.get(id_hash) is mark:
                del self._loading[id_hash]

    async def _change(self, entry: TokenEntry, writes: Sequence[Write]) -> None:
        """Commit a change of an existing token; whatever happens, the cache holds no older entry afterwards."""
        self._forget(entry.id_hash)
        await self._sealed.commit(writes)
        self._remember(entry)

    async def _drop(self, entry: TokenEntry, also: Sequence[Write]) -> None:
        self._forget(entry.id_hash)
        await self._sealed.commit([*removal(entry, self._salt), *also])
        self._forget(entry.id_hash)

    def _remember(self, entry: TokenEntry) -> None:
        self._loading.pop(entry.id_hash, None)
        self._cache[entry.id_hash] = entry
        self._cache.move_to_end(entry.id_hash)
        if len(self._cache) > self._cache_max:
            self._cache.popitem(last=False)

    def _forget(self, id_hash: str) -> None:
        self._loading.pop(id_hash, None)
        self._cache.pop(id_hash, None)

    def _hash(self, text: str) -> str:
        if not self._salt:
            raise RuntimeError("the token store is used before load()")
        return keyed_hash(self._salt, text)


def cubbyhole(sealed: SealedStore, entry: TokenEntry) -> View:
    """What the token of ``entry`` keeps for itself; it goes when the token goes."""
    return View(sealed, "l", "cubbyhole", f"{entry.id_hash}/")
