"""How much the cache disk may hold, and what goes first: arithmetic on numbers that `cache` measures; no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

K = TypeVar("K")

SLACK = 0.05
"""Part of the limit that one eviction frees beyond what is needed, so that the next block does not cause another."""


@dataclass(frozen=True, slots=True)
class Quota:
    """Two rules that hold together: at most `limit` bytes of blocks, and at least `min_free` bytes of disk left."""

    limit: int
    min_free: int

    def fits(self, used: int, free: int, need: int) -> bool:
        """Whether `need` more bytes break neither rule; `used` bytes of blocks are there, `free` bytes of disk left."""
        return used + need <= self.limit and free - need >= self.min_free

    def to_evict(self, used: int, free: int, need: int) -> int:
        """Return the bytes to free before `need` more fit: 0 where they do, else with some slack."""
        short = max(used + need - self.limit, need + self.min_free - free, 0)
        if short == 0:
            return 0
        return min(used, short + int(self.limit * SLACK))


def limit_of(cache_size: int | None, disk_total: int, disk_free: int, used: int) -> int:
    """Return the limit in bytes that a `cache_size` setting means on a disk.

    None is half of the disk; negative is all but so many bytes of what is free now or used by the cache itself.
    """
    if cache_size is None:
        return disk_total // 2
    if cache_size < 0:
        return max(0, disk_free + used + cache_size)
    return cache_size


class Victim(NamedTuple):
    """A block that may go."""

    last_used_ns: int
    size: int
    name: str


def victims(blocks: Iterable[Victim], need: int) -> list[Victim]:
    """Return the least recently used blocks whose sizes add up to `need` bytes or more, as far as there are any."""
    out: list[Victim] = []
    for block in sorted(blocks):
        if need <= 0:
            break
        out.append(block)
        need -= block.size
    return out
