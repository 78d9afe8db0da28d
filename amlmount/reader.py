"""One open file: serve a read, then start what its window wants.

A `FileReader` belongs to an inode, not to a handle: every reader of a file shares it, and it can be made again at any
moment from the manifest alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from amlmount.blocks import BLOCK_SIZE, KIB, ByteRange, block_at, blocks_over
from amlmount.crew import Ask, PinnedFile
from amlmount.fetch import Fetcher
from amlmount.window import ReadWindow, Stream

WHOLE = 256 * KIB
"""Bytes up to which a file is fetched whole whatever part of it is read: a quarter of a round trip at 80 MB/s."""

PIECES = 32
"""Ranges fetched by themselves, not as blocks, that are remembered for a file."""


Buffer = bytes | memoryview


class Part(NamedTuple):
    """A part of a read, and the block or piece that holds it."""

    part: ByteRange
    held_in: ByteRange
    within: ByteRange | None
    """The block around a piece, where it is within one."""


Begun = tuple[Buffer, ...] | list[Part] | None


class FileReader:
    """The reads of one file. Follow each `begin` with `go_on`, once the read is answered or under way."""

    __slots__ = ("_advice", "_fetcher", "_pieces", "_readers", "_size", "_whole", "_window", "file")

    def __init__(self, file: PinnedFile, fetcher: Fetcher, readers: Callable[[], int]) -> None:
        self.file = file
        self._size = file.object.size
        self._fetcher = fetcher
        self._readers = readers
        self._window = ReadWindow(self._size) if self._size > WHOLE else None
        self._whole = file.key(ByteRange(0, self._size))
        self._pieces: deque[ByteRange] = deque(maxlen=PIECES)
        self._advice: tuple[Stream, ByteRange, bool] | None = None

    @property
    def is_large(self) -> bool:
        """Whether the file is read in several blocks."""
        return self._window is not None

    @property
    def size(self) -> int:
        """The file's bytes."""
        return self._size

    def __repr__(self) -> str:
        return f"<FileReader {self.file.object.path!r} {self._window!r}>"

    def begin(self, offset: int, length: int, ask: tuple[int, int] | None = None) -> Begun:
        """Return the file's bytes [offset, offset + length), fewer only at its end, as one or more buffers.

        What is not in memory is set under way; then a list of the read's parts comes back, for `complete`. With `ask`,
        the request's number and inode, None may come back: whoever brings the bytes of a small file answers it.
        """
        stop = min(offset + length, self._size)
        if offset >= stop:
            return (b"",)
        fetcher = self._fetcher
        if self._window is None:
            data = fetcher.now(self._whole)
            if data is None:
                whole = ByteRange(0, self._size)
                flight = fetcher.start(self.file, whole)
                if flight is not None and ask is not None:
                    fetcher.join(flight, Ask(*ask, offset, stop))
                    return None
                return [Part(ByteRange(offset, stop), whole, None)]
            if stop == self._size:
                fetcher.spent(self._whole)
            return (data[offset:stop],)
        limit = fetcher.window_limit(self._readers())
        advice = self._window.observe(offset, stop - offset, limit)
        # Where a reader's share of memory is no block, a block would be gone before its next read, and come again.
        exact = advice.exact or limit < BLOCK_SIZE
        parts = self._split(ByteRange(offset, stop), exact=exact)
        if advice.ahead is not None:
            self._advice = advice.stream, advice.ahead, exact
        keys = [self.file.key(part.held_in) for part in parts]
        if not all(map(fetcher.holds, keys)):
            for part in parts:
                fetcher.start(self.file, part.held_in, part.within)
            return parts
        blocks = [
            fetcher.take(key) for key in keys
        ]  # all first: a block read to its end may push out another
        return tuple(map(self._cut, parts, blocks))

    def ahead(self) -> bool:
        """Fetch the file's first block ahead of need; False where `Fetcher.ahead` would not."""
        if self._size == 0:
            return True
        if self._window is None:
            return self._fetcher.ahead(self.file, self._whole)
        return self._fetcher.ahead(self.file, self.file.key(block_at(0, self._size)))

    def give_up(self) -> None:
        """Let the first block go first, if it was fetched ahead and not read."""
        if self._size:
            self._fetcher.give_up(self.file.key(block_at(0, self._size)))

    def go_on(self) -> None:
        """Fetch what the last read's window wants."""
        if self._advice is not None:
            (stream, ahead, exact), self._advice = self._advice, None
            stream.ahead = self._fetch_ahead(ahead, exact=exact)

    async def complete(self, parts: Sequence[Part]) -> tuple[Buffer, ...]:
        """Wait for the parts of a read, and return its bytes; raise what `Fetcher.get` raises."""
        return tuple(
            [self._cut(part, await self._fetcher.get(self.file, part.held_in, part.within)) for part in parts]
        )

    def _cut(self, part: Part, data: memoryview) -> memoryview:
        start = part.held_in.start
        if part.part.stop == part.held_in.stop:
            self._fetcher.spent(self.file.key(part.held_in))
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
            if not self._fetcher.ahead(self.file, self.file.key(held)):
                return max(block.start, wanted.start)
            if held != block:
                self._pieces.append(held)
        return wanted.stop
