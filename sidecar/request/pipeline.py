"""The one way every request takes: token, existence check, policies, routing, backend.

A use of a counted token is committed before the policies are looked at, so that probing costs uses too. Nothing here
writes replicated storage; a backend that does so on a performance secondary raises ReadOnlyStorage, which passes
through to the caller together with the identity that the call carries by then.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from plugin_api.errors import NotFound, PermissionDenied, PluginError, ReadOnlyStorage
from plugin_api.request import Caller, Operation
from sidecar.core.metrics import METRICS
from sidecar.core.policies import PolicyStore
from sidecar.core.token_entry import TokenEntry
from sidecar.core.tokens import TokenStore
from sidecar.request import openapi
from sidecar.request.call import Answer, Backend, Call, Identity
from sidecar.request.errors import LoginNeedsPrimary, StateMissing, TokenRefused, UnknownMount
from sidecar.request.help_text import help_text
from sidecar.request.router import Match, Router
from sidecar.request.types import ForwardedAuth
from sidecar.version import API_VERSION

Routes = Callable[[], Router[Backend]]

_WRITES = frozenset({Operation.CREATE, Operation.UPDATE})


class Audit(Protocol):
    """Who must know of a request before it is carried out."""

    @property
    def enabled(self) -> bool:
        """Whether anybody must."""

    async def request(self, call: Call) -> None:
        """Returns once it is known. Raises PluginError: the request must not be carried out."""


class Pipeline:
    """Runs calls on the active node. ``routes`` gives the routing table of the moment. A *stale* call is not run here:
    ReadOnlyStorage says that the primary can, StateMissing that nobody can."""

    def __init__(self, routes: Routes, tokens: TokenStore, policies: PolicyStore, audit: Audit) -> None:
        self._routes = routes
        self._tokens = tokens
        self._policies = policies
        self._audit = audit

    async def run(self, call: Call) -> Answer:
        """Answer ``call``. Raises PluginError; ReadOnlyStorage only for a call with an identity."""
        match = self._routes().match(call.path)
        if match is not None and not call.wants_help and match.target.is_open(match.rest, call.operation):
            return await self._open(call, match)
        spent = await self._introduce(call)
        try:
            return await self._known(call, match)
        finally:
            if spent is not None:
                await self._tokens.finish(spent)

    async def _known(self, call: Call, match: Match[Backend] | None) -> Answer:
        if match is not None and call.operation in _WRITES:
            call.operation = await _write_operation(call, match)
        call.allowed = False
        self.authorize(call, sudo=match is not None and match.target.needs_sudo(match.rest))
        call.allowed = True
        if match is None:
            raise UnknownMount(call.path)
        if self._audit.enabled:
            await self._audit.request(call)
        if call.stale:
            raise ReadOnlyStorage if match.target.replicated else StateMissing
        if call.wants_help:
            return _help(match)
        return _or_missing(call, await _routed(call, match))

    async def _open(self, call: Call, match: Match[Backend]) -> Answer:
        if self._audit.enabled:
            await self._audit.request(call)
        if call.stale:
            raise StateMissing
        try:
            return _or_missing(call, await _routed(call, match))
        except ReadOnlyStorage:
            if call.identity is not None:
                raise
            raise LoginNeedsPrimary from None

    @asynccontextmanager
    async def identified(self, call: Call) -> AsyncIterator[Identity]:
        """Check the caller's token, consuming one use, and set ``call.identity``; a token in its last use is removed
        when the block ends. Raises TokenRefused. A call that has its identity already keeps it."""
        spent = await self._introduce(call)
        try:
            yield call.known
        finally:
            if spent is not None:
                await self._tokens.finish(spent)

    async def _introduce(self, call: Call) -> TokenEntry | None:
        """Set the identity of a call that has none; returns the token's entry if this is its last use."""
        if call.identity is not None:
            return None
        with METRICS.timer("core.check_token"):
            call.identity = await self._identify(call)
        entry = call.identity.entry
        return entry if entry is not None and entry.spent else None

    def authorize(self, call: Call, *, sudo: bool = False) -> None:
        """Raise PermissionDenied unless the caller's policies allow the call."""
        decision = call.known.acl.check(call.path, call.operation, call.data, wrap_ttl_s=call.wrap_ttl_s)
        if not decision.allowed or (sudo and not decision.sudo):
            raise PermissionDenied

    async def _identify(self, call: Call) -> Identity:
        if call.forwarded_auth is not None:
            return await self._vouched_for(call.forwarded_auth, call.remote_address)
        if not call.token:
            raise TokenRefused
        with METRICS.timer("core.fetch_acl_and_token"):
            entry = await self._tokens.use(call.token)
            acl = await self._policies.acl(entry.policies) if entry is not None else None
        if entry is None or acl is None:
            raise TokenRefused
        if not address_allowed(entry.bound_cidrs, call.remote_address):
            if entry.spent:
                await self._tokens.finish(entry)
            raise TokenRefused
        return Identity(
            policies=entry.policies,
            acl=acl,
            caller=Caller(
                display_name=entry.display_name,
                accessor=entry.accessor,
                policies=entry.policies,
                entity_id=entry.entity_id,
                metadata=dict(entry.meta or {}),
                remote_address=call.remote_address,
            ),
            entry=entry,
            token=call.token,
        )

    async def _vouched_for(self, auth: ForwardedAuth, remote_address: str) -> Identity:
        policies = tuple(auth.policies)
        return Identity(
            policies=policies,
            acl=await self._policies.acl(policies),
            caller=Caller(
                display_name=auth.display_name,
                accessor=auth.accessor,
                policies=policies,
                entity_id=auth.entity_id,
                metadata=dict(auth.metadata),
                remote_address=remote_address,
            ),
        )


async def _routed(call: Call, match: Match[Backend]) -> Answer | None:
    with METRICS.timer(_routed_as(call.operation, match.mount)):
        return await match.target.handle(call, match.rest)


@functools.lru_cache(maxsize=4096)
def _routed_as(operation: Operation, mount: str) -> str:
    """By the mount's name, which an operator chose: there are as many series as mounts."""
    return f"route.{operation.value}.{mount.replace('/', '-')}"


def _help(match: Match[Backend]) -> Answer:
    backend = match.target
    mount = openapi.MountDescription(match.mount, backend.type_name, tuple(backend.describe()))
    document = openapi.document([openapi.matching(mount, match.rest)], API_VERSION)
    text = help_text(mount, match.rest, backend.help(match.rest))
    return Answer(raw={"help": text, "see_also": None, "openapi": document})


async def _write_operation(call: Call, match: Match[Backend]) -> Operation:
    """Create or update: asked before the policies, which tell them apart. What is wrong with the request is said by
    the backend's handler, to callers who may know."""
    try:
        exists = await match.target.exists(call, match.rest)
    except PluginError:
        return Operation.UPDATE
    return Operation.CREATE if exists is False else Operation.UPDATE


def _or_missing(call: Call, answer: Answer | None) -> Answer:
    """Nothing is 204 for a write, and 404 for a read or a list."""
    if answer is not None:
        return answer
    if call.operation in (Operation.READ, Operation.LIST):
        raise NotFound
    return Answer()


def address_allowed(cidrs: tuple[str, ...], address: str) -> bool:
    """Whether ``address`` is within one of ``cidrs``; no blocks bind nothing, and an unreadable address is within
    none."""
    if not cidrs:
        return True
    try:
        client = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(client, "ipv4_mapped", None)
    return any((mapped or client) in ipaddress.ip_network(block, strict=False) for block in cidrs)
