"""Values that fit no transaction, in pieces of their own. They are private to each cluster: log, index and stream know
the whole value only.

Such a value is written as ``g/<generation>/b/<name>/<number>`` (its chunks) and ``.../meta`` (whose value it is), and
its data key gets a *manifest* that names them. A name is used once, so a late duplicate of a deletion does no harm. A
reader takes what a manifest leads to only if it has the digest that the index has: nothing here needs to be believed.

Chunks whose manifest was replaced are garbage. The tenure that replaces it knows; what a crash leaves is found by the
sweep of the next one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import NoReturn

import msgspec

from consul_backend.batching import MANIFEST_MAGIC
from consul_backend.complaints import Complaint
from consul_backend.errors import Corrupt, OutcomeUnknown, PermissionDenied, Unavailable
from consul_backend.failpoint import failpoint
from consul_backend.fenced import Newest, fenced_idempotent
from consul_backend.keys import own_folders
from consul_backend.lazy_index import LazyIndex
from consul_backend.limits import Limits
from consul_backend.physical import PhysicalStore
from consul_backend.tenure import Tenure
from consul_backend.txn import DeleteTree, Set

log = logging.getLogger("core.chunks")

CHUNK_BYTES_MAX = 192 * 1024
CHUNKS_MAX = 16_384
"""Of one value: 64 MiB in the smallest pieces are less. A foreign manifest must not make anybody count further."""

_READ_AT_ONCE = 8
_FRAME_BYTES = 4096  # guards, names and JSON around one chunk
_RETRY_PAUSE_S = 0.5


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    """Where a value is: ``count`` chunks under ``name``, ``size_bytes`` together."""

    name: str
    count: int
    size_bytes: int


class Meta(msgspec.Struct, frozen=True, array_like=True):
    """Whose chunks these are: the physical data key, and the logical key with the value's digest."""

    where: str
    key: str
    digest: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode_manifest = msgspec.msgpack.Decoder(Manifest).decode
_decode_meta = msgspec.msgpack.Decoder(Meta).decode


def chunk_prefix(generation: str, name: str = "") -> str:
    """What the chunks of one value, or of all, begin with."""
    return f"g/{generation}/b/{name}/" if name else f"g/{generation}/b/"


def _chunk_key(generation: str, name: str, number: int) -> str:
    return f"{chunk_prefix(generation, name)}{number:06d}"


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of the data key."""
    return MANIFEST_MAGIC + _encode(manifest)


def decode_manifest(stored: bytes) -> Manifest | None:
    """The manifest in a data key, or None when it holds a value itself."""
    if not stored.startswith(MANIFEST_MAGIC):
        return None
    try:
        manifest = _decode_manifest(stored[len(MANIFEST_MAGIC) :])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return manifest if 0 <= manifest.count <= CHUNKS_MAX else None


async def read_value(physical: PhysicalStore, generation: str, stored: bytes, *, consistent: bool) -> bytes | None:
    """The value that a data key stands for; None when it is a manifest whose chunks are not all there."""
    manifest = decode_manifest(stored)
    if manifest is None:
        return stored
    keys = [_chunk_key(generation, manifest.name, number) for number in range(manifest.count)]
    pieces: list[bytes] = []
    for start in range(0, len(keys), _READ_AT_ONCE):
        items = await physical.get_many(keys[start : start + _READ_AT_ONCE], consistent=consistent)
        pieces += [item.value for item in items if item is not None]
    value = b"".join(pieces)
    return value if len(pieces) == manifest.count and len(value) == manifest.size_bytes else None


def split(value: bytes, limits: Limits) -> list[bytes]:
    """A value in pieces that each fit a transaction of their own; none for an empty one."""
    size = min(CHUNK_BYTES_MAX, limits.value_bytes_max, (limits.body_bytes_max - _FRAME_BYTES) // 4 * 3)
    return [value[start : start + size] for start in range(0, len(value), size)]


class Chunks:
    """One tenure's. ``digest_of`` asks the index, whose pages ``lazy`` loads."""

    def __init__(
        self,
        physical: PhysicalStore,
        generation: str,
        tenure: Tenure,
        lazy: LazyIndex,
        digest_of: Callable[[str], bytes | None],
        newest: Newest,
    ) -> None:
        self._physical = physical
        self._generation = generation
        self._tenure = tenure
        self._lazy = lazy
        self._digest_of = digest_of
        self._newest = newest
        self.live: dict[str, str] = {}
        """Names of chunks by logical key, as far as known."""
        self._writing: set[str] = set()
        self._doomed: deque[str] = deque()
        self.swept = False

    async def write(self, name: str, key: str, where: str, value: bytes, digest: bytes, limits: Limits) -> bytes:
        """Store a value's chunks under a fresh name; returns the manifest. Raises FenceLost, TooLarge; goes on through
        what passes."""
        pieces = split(value, limits)
        self._writing.add(name)
        meta = _encode(Meta(where, key, digest))
        await self._put(chunk_prefix(self._generation, name) + "meta", meta)
        for number, piece in enumerate(pieces):
            await self._put(_chunk_key(self._generation, name, number), piece)
            failpoint("large:after-chunk")
        return encode_manifest(Manifest(name, len(pieces), len(value)))

    async def _put(self, key: str, value: bytes) -> None:
        while True:
            try:
                await fenced_idempotent(self._physical, self._tenure, [Set(key, value)])
            except (Unavailable, OutcomeUnknown, PermissionDenied):
                await asyncio.sleep(_RETRY_PAUSE_S)
            else:
                return

    def adopted(self, key: str, name: str) -> None:
        """The data key of ``key`` now holds the manifest that names these chunks."""
        self._writing.discard(name)
        self.replaced(key)
        self.live[key] = name

    def given_up(self, name: str) -> None:
        """No manifest will name these chunks."""
        self._writing.discard(name)
        self._doomed.append(name)

    def replaced(self, key: str) -> None:
        """The data key of ``key`` has another value now, or none."""
        name = self.live.pop(key, None)
        if name is not None:
            self._doomed.append(name)

    def replaced_all(self, keys: Iterable[str]) -> None:
        """The same for the keys of an ordinary commit."""
        for key in self.live.keys() & keys:
            self.replaced(key)

    def statistics(self) -> dict[str, int]:
        """Counters and gauges, by the names of their metrics."""
        return {"chunked_values": len(self.live)}

    async def run(self, interval_s: float) -> NoReturn:
        """Collect until cancelled. Raises FenceLost, Corrupt; what passes is tried again."""
        complaint = Complaint()
        while True:
            try:
                await self.collect()
                complaint.over()
            except (Unavailable, PermissionDenied, OutcomeUnknown) as error:
                if complaint.due(error):
                    log.warning("chunks of old values could not be deleted, trying again later: %s", error)
            await asyncio.sleep(interval_s)

    async def collect(self) -> None:
        """Delete what is garbage, and once find what earlier tenures left. Raises FenceLost, Unavailable,
        PermissionDenied, OutcomeUnknown."""
        if not self.swept:
            await self._sweep()
            self.swept = True
        while self._doomed:
            doomed = DeleteTree(chunk_prefix(self._generation, self._doomed[0]))
            await fenced_idempotent(self._physical, self._tenure, [doomed], self._newest)
            self._doomed.popleft()

    async def _sweep(self) -> None:
        # What cannot be ours is left alone: a request for such a name cannot even be made.
        for folder in own_folders(await self._physical.list(chunk_prefix(self._generation), consistent=True)):
            name = folder.removesuffix("/")
            if name in self._writing or name in self._doomed or name in self.live.values():
                continue
            item = await self._physical.get(chunk_prefix(self._generation, name) + "meta", consistent=True)
            if item is None:  # the first thing written: this name never got further, or is half deleted
                self._doomed.append(name)
                continue
            try:
                meta = _decode_meta(item.value)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                raise Corrupt(f"{item.key} is malformed") from None
            await self._judge(name, meta)

    async def _judge(self, name: str, meta: Meta) -> None:
        item = await self._physical.get(meta.where, consistent=True)
        manifest = decode_manifest(item.value) if item is not None else None
        await self._lazy.need((meta.key,))
        # The index is asked last, with no await after it: what replaces the value from now on says so itself.
        if manifest is not None and manifest.name == name and self._digest_of(meta.key) == meta.digest:
            self.live.setdefault(meta.key, name)
        elif name not in self._writing and self.live.get(meta.key) != name:
            self._doomed.append(name)
