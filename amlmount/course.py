"""One reader's course through the epochs that it declared: how far it is, and what to fetch ahead of it. No I/O.

Positions count on from each epoch to the next, so that fetching goes over the end of one into the beginning of the
other. What is seen of the reads is less than what is read: a file that the kernel's page cache holds is read without a
request, workers are at several places at once, and an order may be wrong.

Where the reader is. A read close to the front moves it. One elsewhere is believed when others follow it there: a stray
read, or another job's, must not end what was declared. The slowest worker is as far behind as lately a read was.

How much is fetched ahead. The window is the number of files that are fetched and not read yet. It grows by `GROWTH`
with each of them that is read, and shrinks by one with each that is given up. So it settles where a third of what is
fetched is read (half of it in the page cache costs nothing), and what is fetched for nothing is at the most about
`START` files and twice what was of use. Halving it would have one run of cached files undo the evidence of an epoch.
"""

from __future__ import annotations

from heapq import heappop, heappush

from amlmount.epoch import Epoch

START = 64
"""Files fetched ahead on somebody's word alone: a batch or two, before any is read."""

MAX_FILES = 4096
"""Files ahead of one reader at the most; memory ends it earlier for all but the smallest files."""

GROWTH = 2

FLOOR = 4
"""Files fetched ahead of an order that has been of no use: they tell when it is again."""

REACH = 128
"""Positions ahead of the front where one read is believed. Another job's reads of 100,000 files land there once in 800
times and move the front 64 too far: that must come to far less than the one position a read that is right."""

NEARBY, BELIEVED, PLACES = 64, 4, 8
"""Further away, so many reads within so few positions are; and so many places are watched for that."""

START_SPREAD = 256
"""Positions that the slowest worker is taken to be behind before any was seen: 4 workers, 2 batches of 32 each."""

MAX_SPREAD = 32_768
"""The most that it can be behind: 64 workers, 2 batches of 256 each."""

GENERATION = 512
"""Reads after which it begins to be forgotten that one was further behind."""

MIN_LAG = 128
"""Positions behind the slowest worker where a file is given up: as much again as it is behind, and this."""

_LOOK = 1024
"""Positions looked at in one call at the most: 0.2 ms of the event loop."""


class Course:
    """The epochs that one reader declared, and how far they are read."""

    def __init__(self, given_up: list[int]) -> None:
        self.moved = 0
        """When a read moved it, counted in reads of the mount."""
        self._given_up = given_up
        self._epochs: list[Epoch] = []
        self._end = 0  # one past the last position
        self._front = -1  # the highest position read
        self._cursor = 0  # the next position to fetch
        self._window = START
        self._ahead: dict[int, int] = {}  # fetched and not read: position to inode
        self._oldest: list[int] = []  # a heap of those positions, and of some that were read
        self._offered: list[tuple[int, int]] = []  # what `wanted` returned: position and inode
        self._looked_to = 0  # where it stopped
        self._reads = 0
        self._spread = START_SPREAD  # the furthest behind that a read was, in this generation and the last
        self._spread_now = 0  # in this one
        self._places: list[tuple[int, int]] = []  # reads elsewhere: the last position, and how many near it

    def __repr__(self) -> str:
        return f"<Course at {self._front} of {self._end}, {len(self._ahead)} of {self._window} files ahead>"

    @property
    def bytes(self) -> int:
        """Memory that its epochs take."""
        return sum(epoch.bytes for epoch in self._epochs)

    @property
    def ahead(self) -> int:
        """Files fetched and not read yet."""
        return len(self._ahead)

    @property
    def queued(self) -> int:
        """Epochs not read to their end."""
        return sum(epoch.end - 1 > self._front for epoch in self._epochs)

    def keep(self, epochs: int) -> None:
        """Drop all but the last few epochs; reading goes on in those."""
        if len(self._epochs) <= epochs:
            return
        del self._epochs[: len(self._epochs) - epochs]
        begin = self._epochs[0].begin if self._epochs else self._end
        self._front = max(self._front, begin - 1)
        self._cursor = max(self._cursor, begin)
        self._places.clear()
        self._give_up(begin)

    def append(self, epoch: Epoch) -> None:
        """Put an epoch after those there."""
        if epoch.inodes:
            epoch.begin = self._end
            self._end = epoch.end
            self._epochs.append(epoch)

    # Where readers are

    def reached(self, ino: int) -> bool:
        """Take note that a file is begun; return whether that follows what was declared."""
        near: list[tuple[int, int, Epoch]] = []
        elsewhere: list[tuple[int, Epoch]] = []
        passed = self._passed()
        for epoch in self._epochs:
            position = epoch.first(ino)
            if position is not None and position < passed:
                elsewhere.append((position, epoch))
                position = epoch.first_from(ino, passed)
            if position is None:
                continue
            if position <= self._front + REACH:
                near.append((abs(position - self._front), position, epoch))
            else:
                elsewhere.append((position, epoch))
        if near:
            _, position, epoch = min(near)
            self._read(epoch, ino, position)
            return True
        for position, epoch in elsewhere:
            if self._is_believed(position):
                self._go_to(position)
                if epoch.first(ino) == position:
                    self._read(epoch, ino, position)
                return True
        return False

    def _passed(self) -> int:
        """Return the position before which no file is waited for any more."""
        return self._front - 2 * self._spread - MIN_LAG

    def _read(self, epoch: Epoch, ino: int, position: int) -> None:
        epoch.drop(ino)
        if self._ahead.pop(position, None) is not None:
            self._window = min(MAX_FILES, self._window + GROWTH)
        behind = self._front - position
        if behind <= max(self._spread, START_SPREAD):  # further behind, one read is no evidence
            self._spread_now = max(self._spread_now, behind)
            self._spread = max(self._spread, behind)
        self._reads += 1
        if self._reads % GENERATION == 0:
            self._spread, self._spread_now = self._spread_now, 0
        self._front = max(self._front, position)
        # What is behind the front and not read is in the page cache, or about to be read by a slow worker.
        self._cursor = max(self._cursor, self._front + 1)
        passed = self._passed()
        self._give_up(passed)
        while self._epochs and (not self._epochs[0].left or self._epochs[0].end <= passed):
            del self._epochs[0]

    def _is_believed(self, position: int) -> bool:
        """Take note of a read elsewhere; return whether there were several there."""
        for number, (last, reads) in enumerate(self._places):
            if 0 < abs(position - last) <= NEARBY:
                del self._places[number]
                if reads + 1 == BELIEVED:
                    self._places.clear()
                    return True
                self._places.append((position, reads + 1))
                return False
        self._places.append((position, 1))
        del self._places[:-PLACES]
        return False

    def _go_to(self, position: int) -> None:
        behind = self._front - position
        if 0 < behind <= MAX_SPREAD:  # a slow worker
            self._spread = self._spread_now = max(behind, self._spread)
        else:
            self._front = position
            self._cursor = position + 1

    def _give_up(self, before: int) -> None:
        while self._oldest and self._oldest[0] < before:
            ino = self._ahead.pop(heappop(self._oldest), None)
            if ino is not None:
                self._given_up.append(ino)
                self._window = max(FLOOR, self._window - 1)

    def rest(self) -> None:
        """Give up what is ahead, without blame; a read that moves the line has it fetched again."""
        if self._ahead:
            self._cursor = min(self._ahead)
            self._given_up.extend(self._ahead.values())
            self._ahead.clear()
            self._oldest.clear()

    # What comes next

    def wanted(self, limit: int) -> list[int]:
        """Return up to `limit` inodes to fetch."""
        self._offered = []
        room = min(limit, self._window - len(self._ahead))
        at, stop, passed = self._cursor, min(self._cursor + _LOOK, self._end), self._passed()
        for epoch in self._epochs:
            while epoch.begin <= at < min(epoch.end, stop) and len(self._offered) < room:
                ino = epoch.inodes[at - epoch.begin]
                if (
                    at not in self._ahead
                    and epoch.first_from(ino, passed) == at
                    and not self._is_due(ino, epoch)
                ):
                    self._offered.append((at, ino))
                at += 1
        if not self._offered:
            self._cursor = at
        self._looked_to = at
        return [ino for _, ino in self._offered]

    def _is_due(self, ino: int, before: Epoch) -> bool:
        """Whether a file is to be read in an earlier epoch yet: then the page cache will have it."""
        slowest = self._front - self._spread
        for epoch in self._epochs:
            if epoch is before:
                return False
            position = epoch.first(ino)
            if position is not None and position >= slowest:
                return True
        return False

    def fetched(self, count: int) -> None:
        """Take note that the first `count` of those are fetched or on their way."""
        for position, ino in self._offered[:count]:
            self._ahead[position] = ino
            heappush(self._oldest, position)
        if self._offered:
            self._cursor = self._offered[count][0] if count < len(self._offered) else self._looked_to
        self._offered = []
