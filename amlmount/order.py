"""Which files come next: decided from the inodes that are read, O(1) each, no I/O.

Inodes are numbered so that the files of a directory, and of the next directory beside it, follow each other in the
order of their names (`manifest`). Reading a dataset in its listing's order is therefore counting. Several processes
that share the work open files a little out of order: an open within `JUMP` of where a stream stands continues it.

As in `window`, a stream never has more ahead of it than it has opened, so that what is fetched for nothing stays below
what was asked for; when the opens stop or go elsewhere, so does fetching.
"""

from __future__ import annotations

from dataclasses import dataclass

STREAMS = 32
"""Places in the tree where files are read in order at the same time: one a worker, where batches are long."""

JUMP = 64
"""Inodes that an open may be ahead of or behind its stream: eight workers with batches of eight files."""

_SEEN = (1 << JUMP + 1) - 1

STARTS_AFTER = 2
"""Opens in a row before files are fetched ahead: one may be chance."""

DENSITY = 4
"""A stream must have opened one in so many of the inodes that it passed: random opens near each other have not."""

YOUNG, YOUNG_DENSITY = 16, 2
"""The same for a stream of fewer opens: in a shuffled pass over 3,000 files, many are near one of the last 32."""

TOGETHER = 16
"""Files fetched at once when the window is wide: one query, and threads that read several from the disk together."""

MAX_FILES = 1024
"""Files ahead of one stream at the most; memory ends it earlier for all but the smallest files."""


@dataclass(slots=True, eq=False)
class Stream:
    """One pass over consecutive inodes."""

    begin: int
    """The lowest inode opened."""
    position: int
    """The highest inode opened."""
    opened: int
    """Files opened in a row."""
    ahead: int
    """The next inode to fetch; set back where less was possible."""
    seen: int = 1
    """A bit for each of the last `JUMP` inodes up to `position` that was read, the lowest for `position` itself."""

    def wanted(self) -> range:
        """Return the inodes to fetch now, those fetched already left out."""
        passed = self.position - self.begin
        if self.opened <= STARTS_AFTER and passed != 1:
            return range(0)  # two files in a row begin a pass; two near each other may be chance
        if self.opened * (YOUNG_DENSITY if self.opened < YOUNG else DENSITY) <= passed:
            return range(0)
        start = max(self.ahead, self.position + 1)
        window = min(2 * self.opened, MAX_FILES)
        found = range(start, self.position + 1 + window)
        return found if len(found) >= min(TOGETHER, window // 4) else range(0)


class FileOrder:
    """The streams of one mount."""

    def __init__(self) -> None:
        self._streams: list[Stream] = []  # the one that moved last is last

    def __repr__(self) -> str:
        return f"<FileOrder {len(self._streams)} streams>"

    def observe(self, ino: int) -> Stream:
        """Take note that a file was opened; return the stream that it continues or begins."""
        best: Stream | None = None
        for stream in self._streams:
            distance = abs(ino - stream.position)
            if distance <= JUMP and (best is None or distance < abs(ino - best.position)):
                best = stream
        if best is None:
            if len(self._streams) >= STREAMS:
                self._streams.pop(0)
            best = Stream(ino, ino, 1, ino + 1)
        else:
            self._streams.remove(best)
            step = ino - best.position
            if step > 0:
                best.position = ino
                best.seen = (best.seen << step | 1) & _SEEN
                best.opened += 1
            elif not best.seen >> -step & 1:  # another worker's, a little behind
                best.seen |= 1 << -step
                best.opened += 1
                best.begin = min(best.begin, ino)
            elif -step > JUMP // 2:
                best.opened = max(1, best.opened // 2)  # read again: no order to follow
        self._streams.append(best)
        return best
