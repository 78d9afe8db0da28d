"""Blocks that wait to be written behind the reads: large ones one by one, small ones until they fill a pack.

Bounded in bytes; what does not fit is refused, and then not written. Thread-safe.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

from amlmount.blockfile import record_bytes
from amlmount.blocks import BLOCK_SIZE, BlockKey

PACK_BYTES = BLOCK_SIZE
"""Bytes of a full pack: 40 files of 100 KB, one direct write."""

PACK_BLOCKS = 500
"""Blocks of a pack at the most: one call writes no more than 1,024 pieces (IOV_MAX)."""

LINGER_S = 0.25
"""Seconds that a small block waits for company."""

Waiting = tuple[BlockKey, memoryview]


class WriteQueue:
    """What the writers of one cache have before them."""

    def __init__(self, limit: int, packed_below: int) -> None:
        self._limit = limit
        self._packed_below = packed_below
        self._large: deque[Waiting] = deque()
        self._small: list[Waiting] = []
        self._small_bytes = 0
        self._small_since = 0.0
        self._held = 0
        self._wake = threading.Condition()
        self._closing = False

    def __repr__(self) -> str:
        return f"<WriteQueue {self._held} of {self._limit} bytes>"

    def put(self, key: BlockKey, data: memoryview) -> bool:
        """Take a block; False where it does not fit any more."""
        with self._wake:
            if self._closing or self._held + len(data) > self._limit:
                return False
            self._held += len(data)
            if len(data) >= self._packed_below:
                self._large.append((key, data))
                self._wake.notify()
                return True
            self._small.append((key, data))
            self._small_bytes += record_bytes(key)
            if len(self._small) == 1:
                self._small_since = time.monotonic()
            if len(self._small) == 1 or self._is_full():
                self._wake.notify()
        return True

    def take(self) -> Sequence[Waiting] | None:
        """Wait for a large block, or for enough small ones; None at the end. Follow it with `written`."""
        with self._wake:
            while True:
                if self._large:
                    return [self._large.popleft()]
                wait_s = None
                if self._small:
                    wait_s = self._small_since + LINGER_S - time.monotonic()
                    if self._is_full() or wait_s <= 0 or self._closing:
                        return self._take_small()
                elif self._closing:
                    return None
                self._wake.wait(wait_s)

    def _is_full(self) -> bool:
        return self._small_bytes >= PACK_BYTES or len(self._small) >= PACK_BLOCKS

    def _take_small(self) -> Sequence[Waiting]:
        size = count = 0
        for key, _ in self._small[:PACK_BLOCKS]:
            if count and size + record_bytes(key) > PACK_BYTES:
                break
            size += record_bytes(key)
            count += 1
        taken, self._small = self._small[:count], self._small[count:]
        self._small_bytes -= size
        self._small_since = time.monotonic()
        return taken

    def written(self, size: int) -> None:
        """Note that `size` bytes of blocks are dealt with."""
        with self._wake:
            self._held -= size
            self._wake.notify_all()

    def close(self, flush_s: float) -> None:
        """Take no more; wait up to `flush_s` seconds for the writers to be through."""
        deadline = time.monotonic() + flush_s
        with self._wake:
            self._closing = True
            self._wake.notify_all()
            while self._held and (left := deadline - time.monotonic()) > 0:
                self._wake.wait(left)
