"""The physical store in real Consul.

Two rules decide everything here. *A write is sent once*: what is known to have been refused has its own error, anything
else is OutcomeUnknown, and only the caller can resolve that. *Nothing is not nothing*: Consul answers a token without
rights with less, so absence is believed only when ``check-not-exists`` says it, which hidden keys refuse.

Values go by ``/v1/txn`` alone. ``/v1/kv`` cleans paths and redirects to another key; with names in our alphabet its
three read-only uses here (names below a prefix, waiting for one key, asking whether there are namespaces) are exact.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import TypeVar

import msgspec
import tenacity

from consul_backend.complaints import Complaint
from consul_backend.config import ConsulConfig
from consul_backend.errors import (
    BackendError,
    Conflict,
    OutcomeUnknown,
    PermissionDenied,
    SentinelMissing,
    TooLarge,
    Unavailable,
)
from consul_backend.limits import (
    Limits,
    require_body,
    require_key,
    require_prefix,
    require_shape,
)
from consul_backend.physical import SENTINEL_KEY, Item, Names, TxnResult, writes_sentinel
from consul_backend.probing import LimitsProbe
from consul_backend.sessions import Sessions
from consul_backend.transport import ANSWER_BYTES_MAX, Answer, AnswerTooBig, ConnectionLost, Transport
from consul_backend.txn import CheckNotExists, Get, Op
from consul_backend.wire import (
    Entry,
    clean,
    client_error,
    decode_entries,
    decode_names,
    decode_results,
    encode_txn,
    refusal,
)

log = logging.getLogger("core.consul")

WRITE_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 5.0
READ_DEADLINE_S = 15.0
READ_ANSWER_BYTES_MAX = 2 * 2**20
NAMES_ANSWER_BYTES_MAX = 2 * 2**20
"""Of one read of many keys: what is decoded at once must not hold up the event loop."""
ABSENCE_ROUNDS_MAX = 10
WATCH_MARGIN_S = 5.0

T = TypeVar("T")
Items = list[Item | None]


class NotOpen(Unavailable):
    """Called before ``open`` or after ``close``."""


class ConsulStore:
    """See ``physical.py`` for the rules. ``request_timeout_s`` bounds a single write."""

    def __init__(self, config: ConsulConfig, *, request_timeout_s: float = WRITE_TIMEOUT_S) -> None:
        self._config = config
        self._prefix = config.path
        self._timeout_s = request_timeout_s
        self._probe = LimitsProbe(config.path, ask=self._ask, ask_once=self._ask_once)
        self._query = f"dc={config.datacenter}" if config.datacenter else ""
        self._transport_now: Transport | None = None
        self._sessions_now: Sessions | None = None
        self._sentinel_seen = False

    @property
    def kind(self) -> str:
        return "consul"

    @property
    def limits(self) -> Limits:
        return self._probe.limits

    async def open(self) -> None:
        if self._transport_now is not None:
            return
        self._transport_now = Transport(self._config)
        self._sessions_now = Sessions(self._config, self._transport_now)
        try:
            if self._config.namespace:
                await self._check_namespace(self._transport_now)
            await self._probe.find()
            await self.get(SENTINEL_KEY)
        except BaseException:
            await self.close()
            raise

    async def _check_namespace(self, transport: Transport) -> None:
        """A Consul without namespaces refuses the header everywhere but at transactions, which would go to the default
        one unnoticed. Raises Unavailable."""
        answer = await transport.request("GET", f"/v1/kv/{self._prefix}{SENTINEL_KEY}", timeout_s=READ_TIMEOUT_S)
        if answer.status == HTTPStatus.BAD_REQUEST:
            why = clean(answer.body.decode("utf-8", "replace"))
            raise Unavailable(f'Consul has no namespace "{self._config.namespace}": {why}')

    async def close(self) -> None:
        """Idempotent."""
        transport, self._transport_now = self._transport_now, None
        sessions, self._sessions_now = self._sessions_now, None
        if sessions is not None:
            await sessions.close()
        if transport is not None:
            await transport.close()

    # -- reading

    async def get(self, key: str, *, consistent: bool = False) -> Item | None:
        return (await self._read_keys([require_key(key)], consistent))[0]

    async def get_many(self, keys: Sequence[str], *, consistent: bool = False) -> Items:
        for key in keys:
            require_key(key)
        items: Items = []
        step = self.limits.ops_max
        while len(items) < len(keys):
            chunk = keys[len(items) : len(items) + step]
            try:
                items.extend(await self._read_keys(chunk, consistent))
            except (AnswerTooBig, TooLarge):
                if len(chunk) == 1:
                    raise
                step = min(len(chunk) // 2, self.limits.ops_max)
        return items

    async def list(self, prefix: str, *, consistent: bool = False) -> list[str]:
        return sorted(name for name in await self._names(prefix, "keys&separator=/", consistent) if name)

    async def names_below(self, prefix: str, names_max: int, *, consistent: bool = False) -> Names | None:
        try:
            names = await self._names(prefix, "keys", consistent, NAMES_ANSWER_BYTES_MAX)
        except AnswerTooBig:
            return None
        return sorted(names) if len(names) <= names_max else None

    async def _names(self, prefix: str, what: str, consistent: bool, answer_bytes_max: int = ANSWER_BYTES_MAX) -> Names:
        if prefix and not prefix.endswith("/"):
            raise ValueError(f"a list prefix ends in a slash: {prefix!r}")
        full = self._prefix + require_prefix(prefix)
        query = self._with_query(what, consistent)

        async def read() -> Names:
            answer = await self._read("GET", f"/v1/kv/{full}", query, answer_bytes_max=answer_bytes_max)
            if answer.status == 404:
                return []
            return [name[len(full) :] for name in _decoded(decode_names, answer)]

        names = await _again(read)
        # After the scan: a token that lost its rights in between cannot show the sentinel either.
        if await self.get(SENTINEL_KEY, consistent=True) is None and self._sentinel_seen:
            raise SentinelMissing("the sentinel is gone: an empty or short list proves nothing")
        return names

    async def watch(self, key: str, index: int, wait_s: float) -> tuple[Item | None, int]:
        query = f"index={index}&wait={math.ceil(wait_s * 1000)}ms" if index > 0 else ""
        answer = await self._read(
            "GET",
            f"/v1/kv/{self._prefix}{require_key(key)}",
            self._with_query(query, consistent=False),
            timeout_s=wait_s * 17 / 16 + WATCH_MARGIN_S,  # Consul adds up to a sixteenth to the wait
        )
        entries: list[Entry] = [] if answer.status == 404 else _decoded(decode_entries, answer)
        item = entries[0].item(self._prefix) if entries else None
        return item, answer.index if answer.index >= index else 0

    async def _read_keys(self, keys: Sequence[str], consistent: bool) -> Items:
        query = self._with_query("", consistent)
        answer_bytes_max = READ_ANSWER_BYTES_MAX if len(keys) > 1 else ANSWER_BYTES_MAX
        absent: set[str] = set()
        for _ in range(ABSENCE_ROUNDS_MAX):
            ops = [CheckNotExists(key) if key in absent else Get(key) for key in keys]
            body = encode_txn(ops, self._prefix)
            read = partial(self._read, "PUT", "/v1/txn", query, body, answer_bytes_max=answer_bytes_max)
            try:
                answer = await _again(read)
            except TooLarge as error:
                self._probe.refused(len(ops), len(body), str(error))
                raise
            if answer.status == 200:
                return self._items(keys, absent, ops, answer)
            self._note_absence(keys, absent, answer)
        raise Unavailable("keys appear and vanish faster than they can be read")

    def _items(self, keys: Sequence[str], absent: set[str], ops: Sequence[Op], answer: Answer) -> Items:
        try:
            _, entries = decode_results(ops, answer.body)
        except msgspec.DecodeError as error:
            raise Unavailable(f"Consul's answer makes no sense: {error}") from None
        except PermissionDenied as refused:
            raise self._lacking(refused, "read") from None
        found = iter(entries)
        items = [None if key in absent else next(found).item(self._prefix) for key in keys]
        if any(item is not None and item.key != key for item, key in zip(items, keys, strict=True)):
            raise Unavailable("Consul answered with other keys than were asked for")
        self._sentinel_seen = self._sentinel_seen or (SENTINEL_KEY in keys and SENTINEL_KEY not in absent)
        return items

    def _note_absence(self, keys: Sequence[str], absent: set[str], answer: Answer) -> None:
        refused = _decoded(refusal, answer)
        if isinstance(refused, PermissionDenied):
            raise self._lacking(refused, "read")
        for failure in refused.failures:
            if not failure.what.endswith("exist") and not failure.what.endswith("exists"):
                raise Unavailable(f"Consul could not read a key: {failure.what}")
        # A get found nothing, or what was absent has appeared; a key that was asked for twice is refused twice.
        absent ^= {keys[failure.op_index] for failure in refused.failures}

    async def _read(
        self,
        method: str,
        path: str,
        query: str,
        body: bytes | None = None,
        *,
        timeout_s: float = READ_TIMEOUT_S,
        answer_bytes_max: int = ANSWER_BYTES_MAX,
    ) -> Answer:
        """One read: 200, 404 or 409. Raises Unavailable or PermissionDenied."""
        try:
            answer = await self._transport.request(
                method, path, query=query, body=body, timeout_s=timeout_s, answer_bytes_max=answer_bytes_max
            )
        except OutcomeUnknown as error:
            raise Unavailable(str(error)) from error
        if answer.status not in {200, 404, 409}:
            raise self._failure(answer)
        return answer

    # -- writing

    async def txn(self, ops: Sequence[Op]) -> TxnResult:
        require_shape(ops, self.limits)
        body = encode_txn(ops, self._prefix)
        require_body(len(body), self.limits)
        await self._probe.settle(len(body))
        try:
            answer = await self._transport.request(
                "PUT", "/v1/txn", query=self._query, body=body, timeout_s=self._timeout_s
            )
        except ConnectionLost:
            self._probe.unanswered(len(body))
            raise
        if answer.status != 200:
            failure = self._txn_failure(answer)
            if isinstance(failure, TooLarge):
                self._probe.refused(len(ops), len(body), _text(answer))  # whoever packs the next one asks `limits`
            raise failure
        try:
            index, entries = decode_results(ops, answer.body)
        except msgspec.DecodeError as error:
            raise OutcomeUnknown(f"Consul's answer to a transaction makes no sense: {error}") from None
        except PermissionDenied as refused:
            raise self._lacking(refused, "read") from None
        if not self._sentinel_seen and writes_sentinel(ops):
            self._sentinel_seen = True
        return TxnResult(index, tuple([entry.item(self._prefix) for entry in entries]))

    def _txn_failure(self, answer: Answer) -> BackendError:
        if answer.status == 409:
            try:
                refused = refusal(answer.body)
            except msgspec.DecodeError:
                return Conflict("Consul refused the transaction and does not say why")
            return self._lacking(refused, "write") if isinstance(refused, PermissionDenied) else refused
        if answer.status >= 500:
            # Also a lost leadership "while committing the log" comes as 500, and may have been committed.
            return OutcomeUnknown(f"Consul answered a transaction with {answer.status}: {_text(answer)}")
        return self._failure(answer)

    def _lacking(self, refused: PermissionDenied, right: str) -> PermissionDenied:
        """Names the rule that the token lacks."""
        return PermissionDenied(f'{refused} (needed: key_prefix "{self._prefix}" with policy "{right}")')

    def _failure(self, answer: Answer) -> BackendError:
        failure = client_error(answer.status, answer.body)
        if failure is None:
            failure = Unavailable(f"Consul answered {answer.status}: {_text(answer)}")
        if answer.status in {401, 403}:
            self._transport.token.suspect()
        return failure

    # -- sessions

    async def create_session(self, name: str, *, beat_ttl_s: float, lock_delay_s: float) -> str:
        return await self._sessions.create(name, beat_ttl_s=beat_ttl_s, lock_delay_s=lock_delay_s)

    async def beat(self) -> None:
        await self._sessions.beat()

    async def renew_session(self, session: str) -> bool:
        return await self._sessions.renew(session)

    async def destroy_session(self, session: str) -> None:
        await self._sessions.destroy(session)

    async def stop_beat(self) -> None:
        await self._sessions.stop()

    # -- inside

    async def _ask(self, body: bytes) -> None:
        complaint = Complaint()

        async def ask() -> None:
            try:
                await self._ask_readable(body)
            except Unavailable as error:
                if _worth_another_try(error) and complaint.due(error):
                    log.warning("%s; trying again for %.0f s at most", error, READ_DEADLINE_S)
                raise

        await _again(ask)

    async def _ask_once(self, body: bytes) -> None:
        try:
            await self._ask_readable(body)
        except Unavailable as error:
            if isinstance(error.__cause__, ConnectionLost):
                raise error.__cause__ from None
            raise

    async def _ask_readable(self, body: bytes) -> None:
        """A read-only transaction, for what the server says of its size. The token must be allowed to see our keys."""
        answer = await self._read("PUT", "/v1/txn", self._query, body)
        if answer.status == 409 and isinstance(refused := _decoded(refusal, answer), PermissionDenied):
            raise self._lacking(refused, "read")

    def _with_query(self, query: str, consistent: bool) -> str:
        parts = [query, self._query, "consistent" if consistent else ""]
        return "&".join([part for part in parts if part])

    @property
    def _transport(self) -> Transport:
        if self._transport_now is None:
            raise NotOpen("the Consul store is not open")
        return self._transport_now

    @property
    def _sessions(self) -> Sessions:
        if self._sessions_now is None:
            raise NotOpen("the Consul store is not open")
        return self._sessions_now


def _text(answer: Answer) -> str:
    return clean(answer.body[:1000].decode("utf-8", "replace"))


def _decoded(decode: Callable[[bytes], T], answer: Answer) -> T:
    try:
        return decode(answer.body)
    except msgspec.DecodeError as error:
        raise Unavailable(f"Consul's answer makes no sense: {error}") from None


def _worth_another_try(error: BaseException) -> bool:
    return isinstance(error, Unavailable) and not isinstance(error, AnswerTooBig | NotOpen)


async def _again(read: Callable[[], Awaitable[T]]) -> T:
    """A read, repeated with jitter while Consul is unavailable, READ_DEADLINE_S at most."""
    try:
        return await read()
    except Unavailable as error:
        if not _worth_another_try(error):
            raise
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(_worth_another_try),
        wait=tenacity.wait_random_exponential(multiplier=0.05, max=1.0),
        stop=tenacity.stop_after_delay(READ_DEADLINE_S),
        reraise=True,
    )
    return await retrying(read)
