"""The single-flight block source: memory, what is on its way, the cache disk, then the store.

One event loop owns a `Fetcher` and all its state; between two awaits everything here is atomic, and the methods that
change state (`start`, `ahead`, `_drain`) hold no await. A small pool of long-lived threads does the blocking part:
each takes a flight, looks on the cache disk, then asks the store. A thread hop by `trio.to_thread` for each request
would cost more than the request (3,300 against 11,000 ranges a second).

Demand goes before prefetch: a flight that a read waits for is taken first, and gets memory even if unread blocks must
go for it. A flight nobody waits for is given up silently when it fails.

A disk that does not come back from a read holds one thread: after `DISK_PATIENCE_S` the flight is given to another
thread, past the disk, and a new thread takes the stuck one's place.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

import trio

from amlmount.blocks import BlockKey, ByteRange
from amlmount.cache import BlockCache
from amlmount.dataset import ObjectId, printable
from amlmount.errors import AmlmountError, StoreUnreachable
from amlmount.memory import BlockMemory
from amlmount.metrics import Counters
from amlmount.stores import Retrying

DISK_PATIENCE_S = 1.0
"""Seconds that a read of the cache disk may take; a healthy disk needs milliseconds for 4 MiB."""

FAILED_FOR_S = 5.0
"""Seconds for which a failed object is not asked for again: a training loop must not hammer a dead blob."""


class PinnedFile(NamedTuple):
    """A file as the fetcher needs it."""

    store: int
    """Index of its store."""
    object: ObjectId
    digest: bytes
    """`blocks.object_digest` of it."""

    def key(self, wanted: ByteRange) -> BlockKey:
        """Return the key of a range of it."""
        return BlockKey(self.digest, wanted.start, wanted.stop)


class Flight:
    """A block on its way."""

    __slots__ = (
        "ahead",
        "data",
        "done",
        "error",
        "file",
        "from_disk",
        "key",
        "leased",
        "phase_since",
        "skip_disk",
        "try_no",
        "within",
    )

    def __init__(self, file: PinnedFile, key: BlockKey, within: BlockKey | None, *, ahead: bool) -> None:
        self.file = file
        self.key = key
        self.within = within
        """A larger block that holds this range and may be on the cache disk."""
        self.ahead = ahead
        """Nobody has asked for it yet."""
        self.leased = 0
        self.done = trio.Event()
        self.data: memoryview | None = None
        self.error: AmlmountError | None = None
        self.from_disk = False
        self.skip_disk = False
        self.try_no = 0
        self.phase_since = math.inf


class Fetcher:
    """Blocks of the files of one mount."""

    def __init__(
        self,
        stores: Sequence[Retrying],
        memory: BlockMemory,
        cache: BlockCache | None,
        counters: Counters,
        *,
        threads: int,
        read_timeout_s: float,
    ) -> None:
        self._stores = stores
        self._memory = memory
        self._cache = cache
        self._counters = counters
        self._threads = threads
        # The store's own patience ends first and says more; this is the hard limit of a read.
        self._deadline_s = read_timeout_s + 5.0
        self._token = trio.lowlevel.current_trio_token()
        self._flights: dict[BlockKey, Flight] = {}
        self._landed: deque[tuple[Flight, int, memoryview | None, BlockKey, bool, Exception | None]] = deque()
        self._failed: OrderedDict[bytes, tuple[float, AmlmountError]] = OrderedDict()
        self._room = trio.Event()
        self._demand: deque[tuple[Flight, int]] = deque()
        self._prefetch: deque[tuple[Flight, int]] = deque()
        self._work = threading.Condition()
        self._closing = False
        # Prefetches that hang in retries must not hold every thread when a read comes.
        self._prefetch_threads = max(1, threads - max(2, threads // 8))
        self._prefetching = 0
        for number in range(threads):
            self._start_thread(number)

    def __repr__(self) -> str:
        return f"<Fetcher {len(self._flights)} in flight, {self._memory!r}>"

    def _start_thread(self, number: int) -> None:
        threading.Thread(target=self._fly, name=f"fetch-{number}", daemon=True).start()

    # Called on the event loop

    def window_limit(self, readers: int) -> int:
        """Return the bytes that one of `readers` streams may have ahead of it: its share of half the budget."""
        return self._memory.budget // (2 * max(1, readers))

    def known(self, key: BlockKey) -> bool:
        """Whether a block is in memory or on its way."""
        return key in self._memory or key in self._flights

    def holds(self, key: BlockKey) -> bool:
        """Whether a block is in memory."""
        return key in self._memory

    def now(self, key: BlockKey) -> memoryview | None:
        """Return a block's bytes where memory holds them."""
        block = self._memory.get(key)
        if block is None:
            return None
        if block.ahead:
            block.ahead = False
            self._counters.prefetch_used += 1
        self._counters.memory_hits += 1
        return block.data

    def take(self, key: BlockKey) -> memoryview:
        """Return the bytes of a block that memory `holds`."""
        data = self.now(key)
        assert data is not None
        return data

    def ahead(self, file: PinnedFile, wanted: ByteRange) -> bool:
        """Fetch a block that nobody waits for; False where memory or the store's mood do not allow it now."""
        key = file.key(wanted)
        if self.known(key) or file.digest in self._failed:
            return True
        if self._stores[file.store].throttled_until > time.monotonic():
            return False
        if not self._memory.lease(wanted.length, may_evict_unread=False):
            return False
        self._counters.prefetched += 1
        self._take_off(Flight(file, key, None, ahead=True), wanted.length)
        return True

    def start(self, file: PinnedFile, wanted: ByteRange, within: ByteRange | None = None) -> Flight | None:
        """Fetch a block that a read waits for; None where it is in memory, or where memory has no room yet.

        `get` completes what this begins; calling it for all blocks of a read first has them under way together.
        """
        key = file.key(wanted)
        flight = self._flights.get(key)
        if flight is not None:
            if flight.ahead:
                flight.ahead = False
                self._counters.prefetch_late += 1
                self._queue(self._demand, flight)  # whoever takes it first flies it; the other entry is void
            return flight
        if key in self._memory or self._recent_failure(file) is not None:
            return None
        if not self._memory.lease(wanted.length, may_evict_unread=True):
            return None
        flight = Flight(
            file, key, None if within is None or within == wanted else file.key(within), ahead=False
        )
        self._take_off(flight, wanted.length)
        return flight

    async def get(self, file: PinnedFile, wanted: ByteRange, within: ByteRange | None = None) -> memoryview:
        """Return the bytes of a block.

        Raises what the store raises, and StoreUnreachable where the deadline of a read passes first.
        """
        key = file.key(wanted)
        with trio.move_on_after(self._deadline_s):
            while True:
                data = self.now(key)
                if data is not None:
                    return data
                if (error := self._recent_failure(file)) is not None:
                    raise error
                flight = self.start(file, wanted, within)
                if flight is None:
                    if key not in self._memory:
                        since = time.monotonic()
                        room = self._room  # replaced at every release, so it is looked up anew each time
                        await room.wait()
                        self._counters.wait_memory_s += time.monotonic() - since
                    continue
                since = time.monotonic()
                await flight.done.wait()
                if flight.from_disk:
                    self._counters.wait_disk_s += time.monotonic() - since
                else:
                    self._counters.wait_store_s += time.monotonic() - since
                if flight.error is not None:
                    raise _fresh(flight.error)
                assert flight.data is not None
                return flight.data
        late = StoreUnreachable(f"{printable(file.object.path)}: no answer within {self._deadline_s:.0f} s")
        # The kernel asks a second time for what it read ahead; that must not take as long again.
        self._failed[file.digest] = (time.monotonic() + FAILED_FOR_S, late)
        raise late

    def spent(self, key: BlockKey) -> None:
        """Note that a block was read to its end."""
        self._memory.spent(key)

    def _recent_failure(self, file: PinnedFile) -> AmlmountError | None:
        failed = self._failed.get(file.digest)
        if failed is None:
            return None
        if failed[0] < time.monotonic():
            del self._failed[file.digest]
            return None
        return _fresh(failed[1])

    def _take_off(self, flight: Flight, leased: int) -> None:
        flight.leased = leased
        self._flights[flight.key] = flight
        self._queue(self._prefetch if flight.ahead else self._demand, flight)

    def _queue(self, line: deque[tuple[Flight, int]], flight: Flight) -> None:
        with self._work:
            line.append((flight, flight.try_no))
            self._work.notify()

    def _drain(self) -> None:
        """Take in what the threads finished; runs on the event loop."""
        while self._landed:
            flight, try_no, data, key, from_disk, error = self._landed.popleft()
            if self._flights.get(flight.key) is not flight or flight.try_no != try_no:
                continue
            del self._flights[flight.key]
            if data is None:
                self._memory.release(flight.leased)
                flight.error = error if isinstance(error, AmlmountError) else _unexpected(error)
                if not flight.ahead or not isinstance(flight.error, StoreUnreachable):
                    self._failed[flight.file.digest] = (time.monotonic() + FAILED_FOR_S, flight.error)
                    if len(self._failed) > 4096:
                        self._failed.popitem(last=False)
            else:
                self._land(flight, key, data, from_disk)
            flight.done.set()
        room, self._room = self._room, trio.Event()
        room.set()

    def _land(self, flight: Flight, key: BlockKey, data: memoryview, from_disk: bool) -> None:
        flight.from_disk = from_disk
        if from_disk:
            self._counters.bytes_from_disk += len(data)
        else:
            self._counters.bytes_fetched += len(data)
            if self._cache is not None and self._stores[flight.file.store].cacheable:
                self._cache.offer(key, data)
        if key != flight.key:  # the larger block was on the disk
            offset = flight.key.start - key.start
            flight.data = data[offset : offset + flight.key.length]
            self._memory.release(flight.leased)
            if not self._memory.lease(len(data), may_evict_unread=False):
                return
        else:
            flight.data = data
        self._memory.put(key, data, ahead=flight.ahead)

    async def watch(self) -> None:
        """Look after flights that the cache disk holds up, for ever; a task of the session's."""
        while True:
            await trio.sleep(DISK_PATIENCE_S / 4)
            late = time.monotonic() - DISK_PATIENCE_S
            for flight in [f for f in self._flights.values() if f.phase_since < late]:
                if self._cache is not None:
                    self._cache.mark_slow()
                flight.try_no += 1
                flight.skip_disk = True
                flight.phase_since = math.inf
                self._queue(self._demand, flight)
                self._start_thread(self._threads)
                self._threads += 1

    def in_flight(self) -> int:
        """Return the number of blocks on their way."""
        return len(self._flights)

    def close(self) -> None:
        """Have the threads end as they become free; one that waits for a store is left behind."""
        with self._work:
            self._closing = True
            self._work.notify_all()

    # Called in the threads

    def _next(self) -> tuple[Flight, int, bool] | None:
        """Wait for a flight and take it; None at the end. Also says whether it was taken as a prefetch."""
        with self._work:
            while True:
                if self._closing:
                    return None
                as_prefetch = not self._demand
                if as_prefetch and (not self._prefetch or self._prefetching >= self._prefetch_threads):
                    self._work.wait()
                    continue
                flight, try_no = (self._prefetch if as_prefetch else self._demand).popleft()
                if flight.try_no != try_no or flight.phase_since != math.inf:
                    continue  # another thread has it
                flight.phase_since = time.monotonic()
                self._prefetching += as_prefetch
                return flight, try_no, as_prefetch

    def _fly(self) -> None:
        while (taken := self._next()) is not None:
            flight, try_no, as_prefetch = taken
            try:
                landed = self._load(flight, try_no)
            except Exception as error:  # noqa: BLE001  # whatever it is, the read that waits must hear of it
                landed = (flight, try_no, None, flight.key, False, error)
            if as_prefetch:
                with self._work:
                    self._prefetching -= 1
            if landed is None:
                return  # given to another thread meanwhile, and this one replaced
            self._landed.append(landed)
            del landed, flight, taken  # a thread that waits holds no block
            try:
                self._token.run_sync_soon(self._drain, idempotent=True)
            except trio.RunFinishedError:
                return

    def _load(
        self, flight: Flight, try_no: int
    ) -> tuple[Flight, int, memoryview | None, BlockKey, bool, Exception | None] | None:
        store = self._stores[flight.file.store]
        if self._cache is not None and store.cacheable and not flight.skip_disk:
            for key in (flight.key, flight.within):
                data = None if key is None else self._cache.read(key)
                if flight.try_no != try_no:
                    return None
                if data is not None and key is not None:
                    return flight, try_no, data, key, True, None
        with self._work:
            if flight.try_no != try_no:
                return None
            # Not infinity: that means "not taken". The store keeps its own time.
            flight.phase_since = _FAR
        data = store.read(flight.file.object, flight.key.start, flight.key.stop)
        return flight, try_no, data, flight.key, False, None


_FAR = 1e300


def _fresh(error: AmlmountError) -> AmlmountError:
    """Return a copy of an error for one more reader: a traceback belongs to one task."""
    fresh = copy.copy(error).with_traceback(None)
    fresh.__cause__ = error.__cause__
    return fresh


def _unexpected(error: Exception | None) -> AmlmountError:
    failure = AmlmountError(f"unexpected: {error!r}")
    failure.__cause__ = error
    return failure
