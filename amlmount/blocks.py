"""How a file is cut into byte ranges that are fetched and cached as one: names and arithmetic, no I/O.

A file of up to `WHOLE_FILE` bytes is one block: one request. A larger one is cut at fixed edges that start small, so
that the first bytes of a file cost one round trip and little more, and reach `BLOCK_SIZE`, where a request's fixed
cost no longer counts:

    [0, 256 KiB)  [256 KiB, 1 MiB)  [1 MiB, 4 MiB)  then every 4 MiB

The edges depend on nothing but the file's size. They are part of the cache's format (`cache.FORMAT`): other edges
would miss, never mislead, as the range is part of a block's key.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

WHOLE_FILE = 1 * MIB
"""Bytes up to which a file is one block. At 80 MB/s a connection 1 MiB takes 13 ms, less than its round trip."""

BLOCK_SIZE = 4 * MIB
"""Bytes of a full block. 4 MiB keep 90 % of a connection's rate at 20 ms to first byte with two in flight."""

_FIRST_EDGES = (0, 256 * KIB, 1 * MIB, BLOCK_SIZE)


class ByteRange(NamedTuple):
    """A half-open range of bytes, [start, stop)."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Bytes in the range."""
        return self.stop - self.start


class BlockKey(NamedTuple):
    """A byte range of one pinned object version; equal keys name equal bytes, on every machine."""

    object: bytes
    """The 32 bytes of `object_digest`."""
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Bytes in the block."""
        return self.stop - self.start

    def digest(self) -> bytes:
        """Return the 32 bytes under which the block is cached."""
        return hashlib.sha256(b"%b%d-%d" % (self.object, self.start, self.stop)).digest()


def object_digest(store: str, path: str, tag: str, version: str = "") -> bytes:
    """Return the identity of an object version: 32 bytes over its store, path, tag and version id."""
    fields = (store, path, tag, version)
    return hashlib.sha256(b"\0".join(field.encode("utf-8", "surrogateescape") for field in fields)).digest()


def block_at(offset: int, size: int) -> ByteRange:
    """Return the block that holds byte `offset` of a file of `size` bytes.

    Raises ValueError where the offset is outside the file.
    """
    if not 0 <= offset < size:
        raise ValueError(f"offset {offset} is outside a file of {size} bytes")
    if size <= WHOLE_FILE:
        return ByteRange(0, size)
    if offset >= BLOCK_SIZE:
        start = offset - offset % BLOCK_SIZE
        return ByteRange(start, min(start + BLOCK_SIZE, size))
    for start, stop in itertools.pairwise(_FIRST_EDGES):
        if offset < stop:
            return ByteRange(start, min(stop, size))
    raise AssertionError("unreachable: the edges cover [0, BLOCK_SIZE)")


def blocks_over(start: int, stop: int, size: int) -> Iterator[ByteRange]:
    """Yield, in order, the blocks that overlap [start, stop) of a file of `size` bytes."""
    stop = min(stop, size)
    while start < stop:
        block = block_at(start, size)
        yield block
        start = block.stop
