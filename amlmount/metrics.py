"""Counters of one mount session: plain numbers, added to on the hot path, read as one snapshot.

One source for `amlmount status`, the log line at unmount, and tests. Names carry their unit; all only grow, save those
named in `GAUGES`. Every counter is written from one thread or under the GIL by a single `+=`; a lost update would cost
a count, never a read.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

import msgspec

GAUGES = frozenset(
    {
        "memory_bytes",
        "memory_budget_bytes",
        "cache_bytes",
        "cache_limit_bytes",
        "active_files",
        "in_flight",
        "window_files",
        "fetched_per_asked",
    }
)

BOUNDS_S = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Upper bounds of a histogram's buckets, in seconds; the last bucket has none."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A histogram as it is shown: how many took up to each bound, the last without one; and all together."""

    upper_s: tuple[float, ...]
    counts: tuple[int, ...]
    """By bucket, one more than there are bounds; not cumulative."""
    count: int
    sum_s: float

    def quantile_s(self, part: float) -> float:
        """Return the bound under which `part` of the times lie; the last bound where they lie over it."""
        left = part * self.count
        for upper, count in zip(self.upper_s, self.counts, strict=False):
            left -= count
            if left <= 0:
                return upper
        return self.upper_s[-1]


class Histogram:
    """Times, counted by how long they were."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0

    def __repr__(self) -> str:
        return f"<Histogram of {sum(self._counts)}>"

    def observe(self, seconds: float) -> None:
        """Count a time."""
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self._sum_s += seconds

    def spread(self) -> Spread:
        """Return what was counted."""
        counts = tuple(self._counts)
        return Spread(upper_s=BOUNDS_S, counts=counts, count=sum(counts), sum_s=round(self._sum_s, 6))


@dataclass(slots=True)
class Counters:
    """What one session has done."""

    asked: int = 0
    """Requests of any kind that the kernel made."""
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
    waited_store: int = 0
    """Blocks that a read waited for while the store was asked."""
    waited_disk: int = 0
    """Blocks that a read waited for while the cache disk was asked."""
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

    read_wait: Histogram = field(default_factory=Histogram)
    """How long reads waited that did not find their bytes in memory."""
    request: Histogram = field(default_factory=Histogram)
    """How long each attempt at a ranged read took, to its last byte."""

    def spreads(self) -> dict[str, Spread]:
        """Return the histograms by name, with their unit."""
        return {"read_wait_seconds": self.read_wait.spread(), "request_seconds": self.request.spread()}

    def snapshot(self) -> dict[str, float]:
        """Return all counters by name, and `fetched_per_asked`: bytes fetched per byte asked."""
        values: dict[str, float] = {
            name: getattr(self, name) for name in self.__slots__ if name not in ("read_wait", "request")
        }
        values["fetched_per_asked"] = (
            round(self.bytes_fetched / self.bytes_asked, 3) if self.bytes_asked else 0.0
        )
        return values
