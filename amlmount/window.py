"""What to fetch ahead of the readers of one file: decided from the reads alone, O(1) each, no I/O.

The rule that bounds waste: a stream never has more bytes ahead of it than it has read (half as many while it is short),
so what is fetched stays under twice what is asked, give or take a block. A stream that began at the file's first byte
is most likely read to the end: it may be four times ahead of what it has read.

Several readers of one file, in whatever processes, are told apart by where they read: a read that begins where a
stream stands (give or take the jumps that kernel read-ahead makes) continues it, any other begins a new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from amlmount.blocks import KIB, MIB, ByteRange

STREAMS = 32
"""Readers of one file that are told apart; the one that read longest ago is forgotten first."""

JUMP = 1 * MIB
"""Bytes that a read may be ahead of or behind its stream: kernel read-ahead (1 MiB) sends requests out of order."""

SMALL_JUMP = 256 * KIB
"""The same for a stream that has not read much yet: two requests of the kernel's default read-ahead."""

SPLIT = 3
"""Requests that one random read of 1 MiB may become, where kernel read-ahead is raised: a read that is not aligned
with pages is cut at 1 MiB. Only more requests in a row mean that a reader goes on."""

EXACT_UNTIL = 2 * MIB
"""Bytes that a stream from the middle of a file must have read before whole blocks are fetched for it. A random read
of 1 MiB reaches the file system as 1 to 9 consecutive requests; it must not be taken for a sequential reader."""

MAX_WINDOW = 64 * MIB
"""Bytes ahead of one stream at the most: 800 MB/s need 16 MB under way at 20 ms, and four times that hides stalls."""


@dataclass(slots=True, eq=False)
class Stream:
    """One reader's progress through a file."""

    position: int
    """Where its next read is expected."""
    run: int
    """Bytes read in a row."""
    reads: int
    """Requests that made up the run."""
    ahead: int
    """End of what has been fetched ahead for it; set it back where less was possible."""
    from_start: bool


class Advice(NamedTuple):
    """How to serve a read and what to fetch after it."""

    exact: bool
    """Fetch just the bytes asked, not the blocks around them."""
    ahead: ByteRange | None
    """Bytes to fetch next; None for nothing."""
    stream: Stream


class ReadWindow:
    """The read streams of one file of `size` bytes."""

    def __init__(self, size: int, max_window: int = MAX_WINDOW) -> None:
        self._size = size
        self._max_window = max_window
        self._streams: list[Stream] = []  # the one that read last is last

    def __repr__(self) -> str:
        return f"<ReadWindow of {self._size} bytes, {len(self._streams)} streams>"

    def observe(self, offset: int, length: int, limit: int | None = None) -> Advice:
        """Take note of a read of [offset, offset + length), within the file, and return what to do.

        `limit` is the most that may be ahead of this stream now, in bytes: a share of the memory budget.
        """
        stop = offset + length
        stream = self._find(offset)
        if stream is None:
            if len(self._streams) >= STREAMS:
                self._streams.pop(0)
            stream = Stream(stop, length, 1, stop, offset == 0)
            self._streams.append(stream)
            return Advice(offset != 0, None, stream)
        self._streams.remove(stream)
        self._streams.append(stream)
        if stop <= stream.position:  # a request that was overtaken: no progress
            return Advice(self._exact(stream), None, stream)
        stream.run += min(length, stop - stream.position)
        stream.reads += 1
        stream.position = stop
        return Advice(self._exact(stream), self._extend(stream, limit), stream)

    def _find(self, offset: int) -> Stream | None:
        best: Stream | None = None
        for stream in self._streams:
            distance = offset - stream.position
            if distance == 0:
                return stream
            # Random reads of one file must not pass for each other's continuation: with 32 streams in 1 GB a reach
            # of 1 MiB would join 6 % of them by chance.
            reach = min(SMALL_JUMP if stream.run < EXACT_UNTIL else JUMP, 4 * stream.run)
            if -reach <= distance <= reach and (best is None or abs(distance) < abs(offset - best.position)):
                best = stream
        return best

    @staticmethod
    def _exact(stream: Stream) -> bool:
        return not stream.from_start and stream.run < EXACT_UNTIL

    def _extend(self, stream: Stream, limit: int | None) -> ByteRange | None:
        if stream.from_start:
            window = 4 * stream.run
        elif stream.run < EXACT_UNTIL:
            window = stream.run // 2 if stream.reads > SPLIT else 0
        else:
            window = stream.run
        window = min(window, self._max_window if limit is None else min(limit, self._max_window))
        start = max(stream.ahead, stream.position)
        stop = min(stream.position + window, self._size)
        if stop <= start:
            return None
        stream.ahead = stop
        return ByteRange(start, stop)
