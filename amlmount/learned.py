"""The order of one pass over the files, recorded as it is read, for the next pass. No I/O.

A pass ends where files are read again: `AGAIN` in a row that were read in it already. What repeats now and then, as a
file of labels does, does not end one. Files that the kernel's page cache holds are not seen, so a recorded pass may
have gaps; whoever follows it must tolerate that.
"""

from __future__ import annotations

from array import array

from amlmount.epoch import Epoch

AGAIN = 8
"""Reads in a row of files that this pass has had: a new pass has begun."""

MAX_FILES = 16_000_000
"""Files of a pass that are recorded: 128 MB with their index. What comes after is left out."""


class LearnedOrder:
    """The pass that is being read, and whether one like it comes next."""

    def __init__(self, highest_inode: int) -> None:
        self._highest = highest_inode
        self._again: list[int] = []
        self._begin()

    def _begin(self) -> None:
        self._order = array("I")
        self._first = array("i", [-1]) * (self._highest + 1)  # by inode: its position

    def __repr__(self) -> str:
        return f"<LearnedOrder of {len(self._order)} files>"

    @property
    def files(self) -> int:
        """Files recorded in this pass."""
        return len(self._order)

    def observe(self, ino: int) -> tuple[Epoch, list[int]] | None:
        """Take note that a file is begun; at the start of a new pass, return the last one, and the new one so far."""
        if self._has_seen(ino):
            if not self._again or self._again[-1] != ino:
                self._again.append(ino)
            if len(self._again) < AGAIN:
                return None
            finished, begun, self._again = Epoch.recorded(self._order, self._first), self._again, []
            self._begin()
            for again in begun:
                self._take(again)
            return finished, begun
        self._again.clear()
        self._take(ino)
        return None

    def _has_seen(self, ino: int) -> bool:
        return self._first[ino] >= 0

    def _take(self, ino: int) -> None:
        if len(self._order) < MAX_FILES and not self._has_seen(ino):
            self._first[ino] = len(self._order)
            self._order.append(ino)
