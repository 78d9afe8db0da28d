"""Which files come next, where somebody has said so: declared orders against the files that are begun. No I/O.

A reader (a sampler, a command) declares epochs, one after the other: their positions count on from epoch to epoch, so
that fetching goes over the end of one into the next. What the session sees is not what is read, though: a file that the
kernel's page cache holds is read without a request, workers are at several places at once, and an order may be wrong.

Where readers are. A read close to the front moves it. One elsewhere is believed when others follow it there: a stray
read, or another job's, must not end what was declared. The slowest reader is as far behind as lately a read was.

How much is fetched ahead. The window counts files fetched and not read yet. It grows by `GROWTH` with each one used,
and shrinks by one with each given up: it settles where a third of what is fetched is used, half the page cache costs
nothing, and all that is ever fetched for nothing is twice what was of use and `START` files. (Halving would have one
run of cached files, or one worker that died, undo the evidence of an epoch.)
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from heapq import heappop, heappush

from amlmount.errors import UsageError

START = 64
"""Files fetched ahead on somebody's word alone: one batch, before anything was seen to be read."""

MAX_FILES = 4096
"""Files ahead at the most; memory ends it earlier for all but the smallest files."""

FLOOR = 4
"""Files fetched ahead of an order that has been of no use: what tells when it is again."""

GROWTH = 2

REACH = 256
"""Positions ahead of the front that one read may be. Reads of another job in a million files land there once in 4,000,
and each moves the front 128 too far on average: it must come to far less than a position a read."""

NEARBY, CONFIRMED, PLACES = 64, 4, 8
"""Reads elsewhere that are believed: so many within so few positions; and places that are watched for it."""

START_SPREAD = 1024
"""Positions that the slowest reader may be behind before any was seen: 8 workers with 2 batches of 64 each."""

MAX_SPREAD = 32_768
"""The same at the most: 64 workers with 2 batches of 256."""

MIN_LAG = 128
"""Positions behind the slowest reader after which a file is given up."""

GENERATION = 512
"""Reads after which a reader that was further behind begins to be forgotten."""

IDLE = 4096
"""Reads, none of them of this order, after which its files leave the memory to others."""

MAX_QUEUED = 8
"""Epochs of one reader that can wait."""

LINES = 32
"""Readers: the ranks of one machine, twice over."""

MAX_BYTES = 256 << 20
"""Memory of all declared orders. An epoch of a million files takes 8 MB, 12 MB where files repeat."""

_SCAN = 1024  # positions looked at in one call: 0.2 ms
_ABSENT, _NONE_LEFT = -1, -2


def pack(inodes: array[int]) -> bytes:
    """Return inodes as they go to a session: 32 bits each, little-endian."""
    if sys.byteorder == "big":
        inodes = array("I", inodes)
        inodes.byteswap()
    return inodes.tobytes()


def unpack(body: bytes) -> array[int]:
    """Return the inodes in what a session was sent; raise UsageError where it holds no whole number of them."""
    if len(body) % 4:
        raise UsageError(f"an order of {len(body)} bytes: it is 4 bytes a file")
    inodes = array("I", body)
    if sys.byteorder == "big":
        inodes.byteswap()
    return inodes


class Epoch:
    """One declared order. Made in 0.2 s for a million files: in a thread, not on the event loop."""

    __slots__ = ("_chain", "_first", "begin", "inodes", "left")

    def __init__(self, inodes: array[int], highest_inode: int) -> None:
        """Index an order of inodes, which may repeat; raise UsageError where it is too long or none of this mount."""
        if 4 * (2 * len(inodes) + highest_inode) > MAX_BYTES:
            raise UsageError(f"an order of {len(inodes):,} files is too long", hint="declare it in parts")
        if inodes and not 1 <= min(inodes) <= max(inodes) <= highest_inode:
            raise UsageError("the order is of another dataset: it holds inodes that are not there")
        self.inodes = inodes
        self.begin = 0
        """Where it begins among its reader's positions."""
        self.left = len(inodes)
        """Positions not read."""
        self._first = first = array("i", [_ABSENT]) * (highest_inode + 1)  # by inode: where it comes unread first
        self._chain = array("i")  # by position: where its inode comes next; empty where none repeats
        for at in range(len(inodes) - 1, -1, -1):
            ino = inodes[at]
            if first[ino] != _ABSENT:
                if not self._chain:
                    self._chain = array("i", [_NONE_LEFT]) * len(inodes)
                self._chain[at] = first[ino]
            first[ino] = at

    def __repr__(self) -> str:
        return f"<Epoch of {len(self.inodes)} files, {self.left} unread>"

    @property
    def end(self) -> int:
        """One past its last position."""
        return self.begin + len(self.inodes)

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return 4 * (len(self.inodes) + len(self._first) + len(self._chain))

    def unread(self, ino: int, since: int) -> int | None:
        """Return the first position from `since` on where an inode comes and is unread, or None."""
        at = self._first[ino] if ino < len(self._first) else _ABSENT
        if at < 0:
            return None
        while at < since - self.begin:
            at = self._first[ino] = self._chain[at] if self._chain else _NONE_LEFT
            if at < 0:
                return None
        return self.begin + at

    def mark(self, ino: int) -> None:
        """Take note that an inode was read where it comes unread first."""
        at = self._first[ino]
        self._first[ino] = self._chain[at] if self._chain else _NONE_LEFT
        self.left -= 1


class _Line:
    """The epochs that one reader declared, and how far they are read. Positions count on from epoch to epoch."""

    def __init__(self, given_up: list[int]) -> None:
        self.epochs: list[Epoch] = []
        self.moved = 0
        """When a read moved it, counted in reads of the mount."""
        self._given_up = given_up
        self._window = START
        self._end = 0  # one past the last position
        self._front = -1  # the highest position read
        self._cursor = 0  # the next position to fetch
        self._ahead: dict[int, int] = {}  # fetched and not read: position to inode
        self._oldest: list[int] = []  # a heap of those positions, and of some that were read
        self._offered: list[tuple[int, int]] = []
        self._looked_at = 0  # where the last offer ended
        self._spreads = [START_SPREAD, 0]  # the furthest behind a read was: in the last generation, and in this
        self._reads = 0
        self._places: list[tuple[int, int]] = []  # reads elsewhere: the last position, and how many were near it

    def queued(self) -> int:
        """Return the number of epochs not read to their end."""
        return sum(epoch.end - 1 > self._front for epoch in self.epochs)

    def declare(self, epoch: Epoch, keep: int | None) -> None:
        if keep is not None and len(self.epochs) > keep:
            del self.epochs[: len(self.epochs) - keep]
            begin = self.epochs[0].begin if self.epochs else self._end
            self._front = max(self._front, begin - 1)
            self._cursor = max(self._cursor, begin)
            self._places.clear()
            self._give_up(begin)
        if epoch.inodes:
            epoch.begin = self._end
            self.epochs.append(epoch)
            self._end = epoch.end

    def reached(self, ino: int) -> bool:
        """Take note that a file is begun; return whether that follows this line."""
        since = self._since()
        found: list[tuple[Epoch, int]] = []
        for epoch in self.epochs:
            position = epoch.unread(ino, since)
            if position is None:
                continue
            if position <= self._front + REACH:
                self._read(epoch, ino, position)
                return True
            found.append((epoch, position))
        for epoch, position in found:
            if self._believed(position):
                self._front = position
                self._cursor = position + 1
                self._read(epoch, ino, position)
                return True
        return False
