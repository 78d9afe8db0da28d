"""The memory tier: blocks under one byte budget, and the leases of those on their way.

`used` counts every block held and every lease given; it never goes over the budget. Owned by the session's event loop:
no call waits, so each is atomic there. Blocks that have been read to their end are dropped first: the kernel's page
cache has those bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import psutil

from amlmount.blocks import GIB, MIB, BlockKey
from amlmount.metrics import Counters

SPENT_BYTES = 32 * MIB
"""Bytes of blocks kept though they were read to their end: for requests that arrive out of order. The kernel has them
too, and the memory of a dropped block is the cheapest for the next one: it is mapped, and warm."""

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8  # mallopt(3)

_CGROUP_FILES = ("memory.max", "memory.limit_in_bytes")


def memory_limit() -> int:
    """Return the bytes of memory this process may use: the machine's, or its cgroup's where that is less."""
    limit = int(psutil.virtual_memory().total)
    for folder in _cgroup_folders():
        for name in _CGROUP_FILES:
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                limit = min(limit, int(text))
    return limit


def _cgroup_folders() -> list[Path]:
    top = Path("/sys/fs/cgroup")
    folders = [top, top / "memory"]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            below = (top / "memory" if controllers else top) / path.lstrip("/")
            folders.extend(p for p in (below, *below.parents) if p.is_relative_to(top))
    return folders


def default_budget(limit: int) -> int:
    """Return the budget for a machine or cgroup of `limit` bytes: a quarter, between 128 MiB and 1 GiB."""
    return max(min(limit // 4, GIB), min(128 * MIB, limit // 2))


def tune_malloc() -> None:
    """Have glibc use the memory of a dropped block for the next one.

    Left alone it maps every block anew, and the kernel clears a thousand pages for each (12 % of the throughput from
    a near store); or keeps what is freed in one arena a thread, where resident memory drifts far over the budget.
    """
    import ctypes

    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * MIB)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * MIB)
        libc.mallopt(_M_ARENA_MAX, 2)
    except (OSError, AttributeError):  # no glibc: nothing to tune
        return


@dataclass(slots=True)
class Block:
    """A byte range of a file in memory."""

    data: memoryview
    ahead: bool
    """Fetched ahead of need, and not read yet."""


class BlockMemory:
    """Blocks by key, least recently used first, under a budget in bytes."""

    def __init__(self, budget: int, counters: Counters) -> None:
        self.budget = budget
        self.used = 0
        self._counters = counters
        self._live: OrderedDict[BlockKey, Block] = OrderedDict()
        self._spent: OrderedDict[BlockKey, Block] = OrderedDict()
        self._spent_bytes = 0

    def __repr__(self) -> str:
        held = len(self._live) + len(self._spent)
        return f"<BlockMemory {self.used} of {self.budget} bytes, {held} blocks>"

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._live or key in self._spent

    def get(self, key: BlockKey) -> Block | None:
        """Return a block, which counts as a use of it."""
        block = self._live.get(key)
        if block is not None:
            self._live.move_to_end(key)
            return block
        block = self._spent.pop(key, None)
        if block is not None:
            self._spent_bytes -= len(block.data)
            self._live[key] = block
        return block

    def lease(self, size: int, *, may_evict_unread: bool) -> bool:
        """Set `size` bytes aside; False where that would break the budget.

        For a read that waits, blocks not yet read may go too; for one ahead of need they may not, or two streams that
        read ahead would throw out each other's blocks.
        """
        while self.used + size > self.budget:
            if not self._evict(may_evict_unread):
                return False
        self.used += size
        return True

    def release(self, size: int) -> None:
        """Give a lease back."""
        self.used -= size

    def put(self, key: BlockKey, data: memoryview, *, ahead: bool) -> None:
        """Keep a block whose bytes are leased."""
        if key in self:
            self.release(len(data))
            return
        self._live[key] = Block(data, ahead)

    def spent(self, key: BlockKey) -> None:
        """Note that a block was read to its end."""
        block = self._live.pop(key, None)
        if block is not None:
            self._spent[key] = block
            self._spent_bytes += len(block.data)
            while self._spent_bytes > SPENT_BYTES:
                self._evict(False)

    def give_up(self, key: BlockKey) -> None:
        """Note that a block fetched ahead is not expected to be read: it goes before all others."""
        block = self._live.get(key)
        if block is not None and block.ahead:
            del self._live[key]
            self._spent[key] = block
            self._spent.move_to_end(key, last=False)
            self._spent_bytes += len(block.data)
            while self._spent_bytes > SPENT_BYTES:
                self._evict(False)

    def _evict(self, may_evict_unread: bool) -> bool:
        if self._spent:
            _, block = self._spent.popitem(last=False)
            self._spent_bytes -= len(block.data)
        else:
            key = next((k for k, b in self._live.items() if may_evict_unread or not b.ahead), None)
            if key is None:
                return False
            block = self._live.pop(key)
        if block.ahead:
            self._counters.prefetch_wasted += 1
        self.used -= len(block.data)
        return True
