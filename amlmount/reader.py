"""One open file: serve a read, then start what its window wants.

A `FileReader` belongs to an inode, not to a handle: every reader of a file shares it, and it can be made again at any
moment from the manifest alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from amlmount.blocks import BLOCK_SIZE, KIB, ByteRange, block_at, blocks_over
from amlmount.fetch import Fetcher, PinnedFile
from amlmount.window import ReadWindow

WHOLE = 256 * KIB
"""Bytes up to which a file is fetched whole whatever part of it is read: a quarter of a round trip at 80 MB/s."""

PIECES = 32
"""Ranges fetched by themselves, not as blocks, that are remembered for a file."""


class Part(NamedTuple):
    """A part of a read, and the block or piece that holds it."""

    part: ByteRange
    held_in: ByteRange
    within: ByteRange | None
    """The block around a piece, where it is within one."""


class FileReader:
    """The reads of one file."""

    def __init__(self, file: PinnedFile, fetcher: Fetcher, readers: Callable[[], int]) -> None:
        self.file = file
        self._size = file.object.size
        self._fetcher = fetcher
        self._readers = readers
        self._window = ReadWindow(self._size) if self._size > WHOLE else None
        self._pieces: deque[ByteRange] = deque(maxlen=PIECES)

    @property
    def is_large(self) -> bool:
        """Whether the file is read in several blocks."""
        return self._window is not None

    def __repr__(self) -> str:
        return f"<FileReader {self.file.object.path!r} {self._window!r}>"

    async def read(self, offset: int, length: int) -> memoryview | bytes:
        """Return the file's bytes [offset, offset + length), fewer only at its end.

        Raises what `Fetcher.get` raises.
        """
        stop = min(offset + length, self._size)
        if offset >= stop:
            return b""
        if self._window is None:
            data = await self._fetcher.get(self.file, ByteRange(0, self._size))
            if stop == self._size:
                self._fetcher.spent(self.file, ByteRange(0, self._size))
            return data[offset:stop]
        limit = self._fetcher.window_limit(self._readers())
        advice = self._window.observe(offset, stop - offset, limit)
        # Where a reader's share of memory is no block, a block would be gone before its next read, and come again.
        exact = advice.exact or limit < BLOCK_SIZE
        parts = self._split(ByteRange(offset, stop), exact=exact)
        for part in parts:
            self._fetcher.start(self.file, part.held_in, part.within)
        if advice.ahead is not None:
            advice.stream.ahead = self._fetch_ahead(advice.ahead, exact=exact)
        if len(parts) == 1:
            return await self._take(parts[0])
        return b"".join([await self._take(part) for part in parts])

    async def _take(self, part: Part) -> memoryview:
        data = await self._fetcher.get(self.file, part.held_in, part.within)
        start = part.held_in.start
        if part.part.stop == part.held_in.stop:
            self._fetcher.spent(self.file, part.held_in)
        return data[part.part.start - start : part.part.stop - start]

    def _split(self, wanted: ByteRange, *, exact: bool) -> list[Part]:
        """Cut a read into parts, each held by a block or piece that is there, on its way, or to be fetched."""
        parts: list[Part] = []
        at = wanted.start
        while at < wanted.stop:
            block = block_at(at, self._size)
            held = block
            within = None
            if not self._fetcher.known(self.file.key(block)):
                piece = self._piece_at(at)
                if piece is not None:
                    held = piece
                elif exact:
                    # Up to the block's end, so that a piece lies within one block and can be cut from it on the disk.
                    held = ByteRange(at, min(wanted.stop, block.stop))
                    within = block
                    if held != block:
                        self._pieces.append(held)
            stop = min(wanted.stop, held.stop)
            parts.append(Part(ByteRange(at, stop), held, within))
            at = stop
        return parts

    def _piece_at(self, offset: int) -> ByteRange | None:
        for piece in self._pieces:
            if piece.start <= offset < piece.stop and self._fetcher.known(self.file.key(piece)):
                return piece
        return None

    def _fetch_ahead(self, wanted: ByteRange, *, exact: bool) -> int:
        """Fetch a range ahead of need; return where it ends, which is earlier where memory is short."""
        for block in blocks_over(wanted.start, wanted.stop, self._size):
            held = block
            if exact:
                held = ByteRange(max(block.start, wanted.start), min(block.stop, wanted.stop))
                if self._fetcher.known(self.file.key(block)) or self._piece_at(held.start) is not None:
                    continue
            if not self._fetcher.ahead(self.file, held):
                return max(block.start, wanted.start)
            if held != block:
                self._pieces.append(held)
        return wanted.stop
