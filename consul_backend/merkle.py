"""The merkle index: a digest of every entry, summed up per bucket, page, partition and class. Pure.

Geometry, the same in every cluster and independent of how the index is stored: a (class, partition) has 256 pages of
256 subpages, 65,536 *buckets* together; an entry's bucket is the first two bytes of BLAKE2b-20 of its path.

Digests are BLAKE2b-20, each level with its own ``person`` so that no level's input passes for another's:

* entry: 4-byte length of the key's UTF-8, key, value;
* subpage: its packed entries, sorted by path: per entry 2-byte path length, path, entry digest;
* page: (subpage number, subpage digest) of its non-empty subpages, in order;
* partition: (page number, page digest) of its non-empty pages, in order;
* set of partitions: (2-byte name length, name, partition digest), in order. An empty set has a root too.

A subpage *is* its packed bytes: no Python object exists per key, which keeps a million keys below 150 bytes each.
Digests of subpages, pages and partitions are computed when asked for and kept until something below them changes.

A page may be *cold*: its digest is known (or not even that), its entries are in the store only. Whatever needs them
raises NotLoaded; :mod:`consul_backend.lazy_index` loads pages before anybody asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any, NoReturn

from consul_backend.errors import Corrupt, NotLoaded

DIGEST_BYTES = 20
PAGES = 256
SUBPAGES = 256
BUCKETS = PAGES * SUBPAGES
PATH_BYTES_MAX = 0xFFFF

_COPY_BYTES_MAX = 2048
_FRAME_BYTES = 2 + DIGEST_BYTES
_ENTRY = blake2b(digest_size=DIGEST_BYTES, person=b"entry")  # a copy costs less than a new one


def entry_digest(key: str, value: bytes) -> bytes:
    """What the index keeps of one entry: covers the whole logical key and the whole stored value."""
    name = key.encode()
    framed = len(name).to_bytes(4, "big") + name
    digest = _ENTRY.copy()
    if len(value) < _COPY_BYTES_MAX:
        digest.update(framed + value)
    else:
        digest.update(framed)
        digest.update(value)
    return digest.digest()


def bucket_of(path: str) -> int:
    """The bucket of a path: page number times 256 plus subpage number."""
    head = blake2b(path.encode(), digest_size=DIGEST_BYTES).digest()
    return head[0] << 8 | head[1]


def pack_entries(entries: Iterable[tuple[str, bytes]]) -> bytes:
    """The bytes of a subpage that holds ``entries`` (path, digest), in any order."""
    ordered = sorted((path.encode(), digest) for path, digest in entries)
    return b"".join([len(path).to_bytes(2, "big") + path + digest for path, digest in ordered])


def unpack_entries(blob: bytes) -> Iterator[tuple[str, bytes]]:
    """The (path, digest) pairs of a subpage. Raises Corrupt when the bytes are no subpage."""
    position, end, before = 0, len(blob), b""
    while position < end:
        cut = position + 2 + int.from_bytes(blob[position : position + 2], "big")
        path = blob[position + 2 : cut]
        position = cut + DIGEST_BYTES
        if position > end or path <= before:
            raise Corrupt("a subpage of the merkle index is malformed")
        before = path
        try:
            name = path.decode()
        except UnicodeDecodeError:
            raise Corrupt("a subpage of the merkle index is malformed") from None
        yield name, blob[cut:position]


class _Cold(dict[int, bytes]):
    """Stands for the subpages of a cold page: any look at them is refused. Costs loaded pages nothing."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise NotLoaded("a page of the merkle index is not in memory yet; try again")

    get = pop = items = __getitem__ = __setitem__ = __iter__ = __len__ = _refuse


_COLD = _Cold()


class _Page:
    """Subpages by number, and the digests that are known."""

    __slots__ = ("blobs", "count", "digest", "digests")

    def __init__(self) -> None:
        self.blobs: dict[int, bytes] = {}
        self.count = 0
        self.digests: dict[int, bytes] = {}
        self.digest: bytes | None = None

    def subpage_digests(self) -> dict[int, bytes]:
        digests = self.digests
        if len(digests) != len(self.blobs):
            for number, blob in self.blobs.items():
                if number not in digests:
                    digests[number] = blake2b(blob, digest_size=DIGEST_BYTES, person=b"subpage").digest()
        return digests

    def root(self) -> bytes:
        if self.digest is None:
            self.digest = _hash_numbered(self.subpage_digests(), b"page")
        return self.digest


class _Partition:
    """Pages by number, how many entries they hold, and the root if known."""

    __slots__ = ("count", "digest", "pages")

    def __init__(self) -> None:
        self.pages: dict[int, _Page] = {}
        self.count = 0
        self.digest: bytes | None = None

    def page_digests(self) -> dict[int, bytes]:
        return {number: page.root() for number, page in self.pages.items()}

    def root(self) -> bytes:
        if self.digest is None:
            self.digest = _hash_numbered(self.page_digests(), b"partition")
        return self.digest

    def set_blob(self, bucket: int, blob: bytes, grown: int) -> None:
        number, subpage = bucket >> 8, bucket & 0xFF
        page = self.pages.get(number)
        if page is None:
            if not blob:
                return
            page = self.pages[number] = _Page()
        page.digests.pop(subpage, None)
        page.digest = self.digest = None
        page.count += grown
        self.count += grown
        if blob:
            page.blobs[subpage] = blob
            return
        page.blobs.pop(subpage, None)
        if not page.blobs:
            del self.pages[number]


class Forest:
    """The index of one store. Classes are ``r``, ``l`` and ``c``; the caller leaves ``c`` out of public roots."""

    def __init__(self) -> None:
        self._partitions: dict[str, dict[str, _Partition]] = {}

    def apply(self, changes: Iterable[tuple[str, bytes | None]]) -> None:
        """Set the digest of each key, or remove the key where the digest is None. Keys must be well-formed."""
        for key, digest in changes:
            cls, partition, path = key.split("/", 2)
            self.change(cls, partition, path, digest)

    def change(self, cls: str, partition: str, path: str, digest: bytes | None) -> int:
        """Set or remove (None) one entry; returns its bucket. Raises ValueError for a path over 65,535 bytes."""
        name = path.encode()
        if len(name) > PATH_BYTES_MAX:
            raise ValueError(f"a path of {len(name)} bytes, the index takes {PATH_BYTES_MAX}")
        head = blake2b(name, digest_size=DIGEST_BYTES).digest()
        bucket = head[0] << 8 | head[1]
        tree = self._partitions.setdefault(cls, {}).get(partition)
        if tree is None:
            if digest is None:
                return bucket
            tree = self._partitions[cls][partition] = _Partition()
        page = tree.pages.get(head[0])
        blob = page.blobs.get(head[1], b"") if page is not None else b""
        start, stop = _locate(blob, name)
        entry = b"" if digest is None else len(name).to_bytes(2, "big") + name + digest
        if start == stop and digest is None:
            return bucket
        grown = (digest is not None) - (start != stop)
        tree.set_blob(bucket, blob[:start] + entry + blob[stop:], grown)
        if not tree.pages:
            del self._partitions[cls][partition]
        return bucket

    def digest_of(self, key: str) -> bytes | None:
        """The entry digest of a key, or None: the key does not exist."""
        cls, partition, path = key.split("/", 2)
        tree = self._find(cls, partition)
        if tree is None:
            return None
        name = path.encode()
        head = blake2b(name, digest_size=DIGEST_BYTES).digest()
        page = tree.pages.get(head[0])
        blob = page.blobs.get(head[1]) if page is not None else None
        if blob is None:
            return None
        start, stop = _locate(blob, name)
        return blob[stop - DIGEST_BYTES : stop] if stop > start else None

    def root(self, cls: str) -> bytes:
        """The root over every partition of a class."""
        return self.root_of((cls, partition) for partition in self._partitions.get(cls, ()))

    def root_of(self, pairs: Iterable[tuple[str, str]]) -> bytes:
        """The root over the given (class, partition) pairs; those that hold nothing do not count."""
        total = blake2b(digest_size=DIGEST_BYTES, person=b"set")
        for cls, partition in sorted(set(pairs)):
            tree = self._find(cls, partition)
            if tree is not None:
                name = f"{cls}/{partition}".encode()
                total.update(len(name).to_bytes(2, "big") + name + tree.root())
        return total.digest()

    def partitions(self, cls: str) -> dict[str, bytes]:
        """The roots of the class's partitions that hold anything."""
        return {partition: tree.root() for partition, tree in self._partitions.get(cls, {}).items()}

    def page_digests(self, cls: str, partition: str) -> dict[int, bytes]:
        """The digests of a partition's non-empty pages."""
        tree = self._find(cls, partition)
        return tree.page_digests() if tree is not None else {}

    def subpage_digests(self, cls: str, partition: str, page: int) -> dict[int, bytes]:
        """The digests of a page's non-empty subpages."""
        tree = self._find(cls, partition)
        found = tree.pages.get(page) if tree is not None else None
        return dict(found.subpage_digests()) if found is not None else {}

    def entries(self, cls: str, partition: str, page: int, subpage: int) -> list[tuple[str, bytes]]:
        """The (path, entry digest) pairs of a subpage, sorted by the path's UTF-8."""
        tree = self._find(cls, partition)
        found = tree.pages.get(page) if tree is not None else None
        return list(unpack_entries(found.blobs.get(subpage, b""))) if found is not None else []

    def count(self, cls: str, partition: str) -> int:
        """How many entries a partition holds."""
        tree = self._find(cls, partition)
        return tree.count if tree is not None else 0

    def keys(self, cls: str, partition: str) -> Iterator[tuple[str, bytes]]:
        """Every (path, entry digest) of a partition, by bucket. Do not change the partition meanwhile."""
        for _, blob in self.blobs(cls, partition, 0, BUCKETS):
            yield from unpack_entries(blob)

    def names(self, cls: str) -> list[str]:
        """The partitions of a class that hold anything, without computing a digest."""
        return list(self._partitions.get(cls, ()))

    def blobs(self, cls: str, partition: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """The non-empty subpages of the buckets ``start`` to ``stop`` (exclusive), in order: (bucket, packed bytes)."""
        tree = self._find(cls, partition)
        if tree is None:
            return
        wanted = range(start >> 8, (stop + 0xFF) >> 8)
        few = len(tree.pages) < len(wanted)
        for number in sorted([page for page in tree.pages if page in wanted]) if few else wanted:
            page = tree.pages.get(number)
            if page is None:
                continue
            base = number << 8
            for subpage in sorted(page.blobs):
                if start <= base + subpage < stop:
                    yield base + subpage, page.blobs[subpage]

    def load_blob(self, cls: str, partition: str, bucket: int, blob: bytes) -> None:
        """Put a stored subpage in place of what the bucket holds. Raises Corrupt for malformed bytes."""
        trees = self._partitions.setdefault(cls, {})
        tree = trees.get(partition)
        if tree is None:
            tree = trees[partition] = _Partition()
        page = tree.pages.get(bucket >> 8)
        old = page.blobs.get(bucket & 0xFF, b"") if page is not None else b""
        tree.set_blob(bucket, blob, count_entries(blob) - count_entries(old))
        if not tree.pages:
            del trees[partition]

    def add_cold(self, cls: str, partition: str, page: int, digest: bytes | None, count: int) -> None:
        """Note that a page's entries are in the store only; ``digest`` None: even its digest must be computed."""
        tree = self._partitions.setdefault(cls, {}).setdefault(partition, _Partition())
        before = tree.pages.get(page)
        cold = tree.pages[page] = _Page()
        cold.blobs, cold.digest, cold.count = _COLD, digest, count
        tree.count += count - (before.count if before is not None else 0)
        tree.digest = None

    def is_cold(self, cls: str, partition: str, page: int) -> bool:
        """Whether a page's entries are in the store only."""
        tree = self._find(cls, partition)
        found = tree.pages.get(page) if tree is not None else None
        return found is not None and found.blobs is _COLD

    def cold_between(self, cls: str, partition: str, start: int, stop: int) -> bool:
        """Whether any page of the buckets ``start`` to ``stop`` (exclusive) is cold."""
        tree = self._find(cls, partition)
        if tree is None:
            return False
        pages = range(start >> 8, (stop + 0xFF) >> 8)
        return any(page in tree.pages and tree.pages[page].blobs is _COLD for page in pages)

    def copy_page(self, source: Forest, cls: str, partition: str, page: int) -> None:
        """Take a copy of ``source``'s page, which is in memory; this forest has no such page yet."""
        theirs = source._find(cls, partition)
        found = theirs.pages.get(page) if theirs is not None else None
        if found is None:
            return
        tree = self._partitions.setdefault(cls, {}).setdefault(partition, _Partition())
        copy = tree.pages[page] = _Page()
        copy.blobs, copy.digests = dict(found.blobs.items()), dict(found.digests)
        copy.count, copy.digest = found.count, found.digest
        tree.count += found.count
        tree.digest = None

    def adopt(self, cls: str, partition: str, page: int, source: Forest) -> None:
        """Put ``source``'s page, perhaps an empty one, in place of this one's. It is no copy."""
        theirs = source._find(cls, partition)
        loaded = theirs.pages.get(page) if theirs is not None else None
        trees = self._partitions.setdefault(cls, {})
        tree = trees.setdefault(partition, _Partition())
        before = tree.pages.pop(page, None) or _Page()
        if loaded is not None:
            tree.pages[page] = loaded
        if loaded is None or loaded.digest is None or before.digest != loaded.digest:
            tree.digest = None
        tree.count += (loaded.count if loaded is not None else 0) - before.count
        if not tree.pages:
            del trees[partition]

    def page_digest(self, cls: str, partition: str, page: int) -> bytes | None:
        """The digest of one page, None when it is empty."""
        tree = self._find(cls, partition)
        found = tree.pages.get(page) if tree is not None else None
        return found.root() if found is not None else None

    def undigested(self) -> list[tuple[str, str]]:
        """The partitions (class, partition) whose roots are not computed."""
        return [
            (cls, partition)
            for cls, trees in self._partitions.items()
            for partition, tree in trees.items()
            if tree.digest is None
        ]

    def undigested_pages(self, cls: str, partition: str) -> list[int]:
        """The pages in memory whose digests are not computed: what the partition's root would cost."""
        tree = self._find(cls, partition)
        pages = tree.pages.items() if tree is not None else ()
        return [number for number, page in pages if page.digest is None and page.blobs is not _COLD]

    def page_heads(self, cls: str, partition: str) -> dict[int, tuple[bytes, int]]:
        """Digest and number of entries of a partition's non-empty pages."""
        tree = self._find(cls, partition)
        if tree is None:
            return {}
        return {number: (page.root(), page.count) for number, page in tree.pages.items()}

    def _find(self, cls: str, partition: str) -> _Partition | None:
        trees = self._partitions.get(cls)
        return trees.get(partition) if trees is not None else None


def count_entries(blob: bytes) -> int:
    """How many entries a subpage's bytes hold. Raises Corrupt for malformed bytes."""
    position, end, count = 0, len(blob), 0
    while position + 1 < end:
        position += _FRAME_BYTES + (blob[position] << 8 | blob[position + 1])
        count += 1
    if position != end:
        raise Corrupt("a subpage of the merkle index is malformed")
    return count


def _locate(blob: bytes, name: bytes) -> tuple[int, int]:
    """Where the entry of ``name`` starts and stops in a subpage; equal numbers are the place where it would go."""
    position, end = 0, len(blob)
    while position < end:
        cut = position + 2 + (blob[position] << 8 | blob[position + 1])
        path = blob[position + 2 : cut]
        if path >= name:
            return (position, cut + DIGEST_BYTES) if path == name else (position, position)
        position = cut + DIGEST_BYTES
    return end, end


def _hash_numbered(digests: dict[int, bytes], person: bytes) -> bytes:
    parts = [bytes((number,)) + digests[number] for number in sorted(digests)]
    return blake2b(b"".join(parts), digest_size=DIGEST_BYTES, person=person).digest()
