"""Counters of one mount session: plain integers, added to on the hot path, read as one snapshot.

One source for `amlmount status`, the log line at unmount, and tests. Names carry their unit; all only grow, save those
named in `GAUGES`. Every counter is written from one thread or under the GIL by a single `+=`; a lost update would cost
a count, never a read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

GAUGES = frozenset(
    {"memory_bytes", "memory_budget_bytes", "cache_bytes", "cache_limit_bytes", "open_files", "in_flight"}
)


@dataclass(slots=True)
class Counters:
    """What one session has done."""

    reads: int = 0
    """FUSE read requests."""
    bytes_asked: int = 0
    """Bytes that readers got."""
    read_errors: int = 0
    memory_hits: int = 0
    """Blocks that were in memory when a read asked for them."""
    bytes_from_disk: int = 0
    """Bytes of blocks read from the cache disk."""
    bytes_fetched: int = 0
    """Bytes of blocks that came from the store."""
    requests: int = 0
    """Ranged reads asked of the store, retries included."""
    retries: int = 0
    throttled: int = 0
    prefetched: int = 0
    """Blocks asked for ahead of a read."""
    prefetch_used: int = 0
    """Blocks fetched ahead that a read then took."""
    prefetch_late: int = 0
    """Blocks that a read had to wait for though they were fetched ahead."""
    prefetch_wasted: int = 0
    """Blocks fetched ahead and dropped unread."""
    cache_hits: int = 0
    cache_misses: int = 0
    cache_writes: int = 0
    cache_dropped: int = 0
    """Blocks not written to the cache disk: it was full, failing or behind."""
    cache_corrupt: int = 0
    """Blocks on the cache disk that failed their checksum and were fetched again."""
    cache_evicted: int = 0
    waiting_s: float = 0.0
    """Seconds in which at least one read was waiting for its bytes."""
    busy_s: float = 0.0
    """Seconds that the event loop spent on answering requests."""
    wait_store_s: float = 0.0
    """Seconds that reads waited for the store, summed over the reads."""
    wait_disk_s: float = 0.0
    """The same for the cache disk."""
    wait_memory_s: float = 0.0
    """The same for room in the memory budget."""
    stale_reads: int = 0
    """Reads refused with ESTALE."""

    def snapshot(self) -> dict[str, float]:
        """Return all counters by name, and `fetched_per_asked`: bytes fetched per byte asked."""
        values: dict[str, float] = asdict(self)
        values["fetched_per_asked"] = (
            round(self.bytes_fetched / self.bytes_asked, 3) if self.bytes_asked else 0.0
        )
        return values
