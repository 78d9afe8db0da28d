"""The orders that readers of a mount declared, and which of their files to fetch next. No I/O.

A reader is a sampler, or a command: whoever declares epochs that are read one after another. Several read side by side,
the ranks of a training for instance; `course` follows each of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from amlmount.course import Course
from amlmount.epoch import MAX_BYTES, Epoch
from amlmount.errors import UsageError

MAX_QUEUED = 8
"""Epochs of one reader that can wait."""

READERS = 32
"""Readers that are known: the ranks on one machine, twice over."""

IDLE = 4096
"""Reads of other files after which the files ahead of a reader leave the memory to those."""


class DeclaredOrder:
    """The declared orders of one mount. Owned by the session's event loop; no call takes longer with more files."""

    def __init__(self) -> None:
        self._courses: OrderedDict[str, Course] = OrderedDict()  # the one that moved last is last
        self._reads = 0
        self._turn: Course | None = None  # the one to fetch for
        self._given_up: list[int] = []

    def __repr__(self) -> str:
        return f"<DeclaredOrder {[*self._courses.values()]}>"

    def declare(self, epoch: Epoch, *, reader: str = "", keep: int | None = None) -> int:
        """Put an epoch after those that its reader declared before; return how many of them are not read to their end.

        With `keep`, all but the last so many of those before are dropped: 0 starts anew. Raises UsageError where too
        many wait. Readers that were idle longest are forgotten where memory is short.
        """
        course = self._courses.get(reader) or Course(self._given_up)
        if keep is not None:
            course.keep(keep)
        if course.queued >= MAX_QUEUED or course.bytes + epoch.bytes > MAX_BYTES:
            raise UsageError(
                f"{course.queued} declared orders wait to be read, and there is no room for another",
                hint="read them first, or --replace them with this one",
            )
        course.append(epoch)
        self._courses[reader] = course
        self._has_moved(reader)
        while (
            len(self._courses) > READERS or sum(course.bytes for course in self._courses.values()) > MAX_BYTES
        ):
            self._courses.popitem(last=False)[1].rest()
        return course.queued

    def reached(self, ino: int) -> bool:
        """Take note that a file is begun; return whether that follows a declared order.

        To be called once each time that a file is read from its beginning. False is for a file that is in no declared
        order, and for one that its order has elsewhere: whoever knows another order may look there.
        """
        self._reads += 1
        moved = [reader for reader, course in self._courses.items() if course.reached(ino)]
        for reader in moved:
            self._has_moved(reader)
        for course in self._courses.values():  # those idle longest come first
            if self._reads - course.moved <= IDLE:
                break
            course.rest()
            if course is self._turn:
                self._turn = None
        return bool(moved)

    def _has_moved(self, reader: str) -> None:
        self._turn = self._courses[reader]
        self._turn.moved = self._reads
        self._courses.move_to_end(reader)

    def wanted(self, limit: int) -> Sequence[int]:
        """Return up to `limit` inodes to fetch now, for the reader that moved last; follow it with `fetched`."""
        return [] if self._turn is None else self._turn.wanted(limit)

    def fetched(self, count: int) -> None:
        """Take note that the first `count` of the files last returned are fetched or on their way, and the rest not."""
        if self._turn is not None:
            self._turn.fetched(count)

    @property
    def ahead(self) -> int:
        """Files fetched ahead and not read yet."""
        return sum(course.ahead for course in list(self._courses.values()))  # asked from another thread, too

    def given_up(self) -> list[int]:
        """Return the files fetched ahead that nobody is expected to read any more, each once: their memory is free."""
        given_up, self._given_up[:] = self._given_up[:], []
        return given_up
