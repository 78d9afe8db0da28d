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
from contextlib import suppress
from typing import NamedTuple

import trio

from amlmount.blocks import BlockKey, ByteRange
from amlmount.cache import BlockCache
from amlmount.crew import Crew, Flight, PinnedFile, Try
from amlmount.dataset import printable
from amlmount.errors import AmlmountError, StoreError, StoreUnreachable
from amlmount.memory import BlockMemory
from amlmount.metrics import Counters
from amlmount.stores import Retrying

DISK_PATIENCE_S = 1.0
"""Seconds that a read of the cache disk may take; a healthy disk needs milliseconds for 4 MiB."""

LOOK_AROUND_S = 1.0
"""Seconds between two looks at what other processes have put on the cache disk."""

FAILED_FOR_S = 5.0
"""Seconds for which a failed object is not asked for again: a training loop must not hammer a dead blob."""


class Landing(NamedTuple):
    """What came of a try."""

    entry: Try
    data: memoryview | None
    key: BlockKey
    """Of the data: the flight's, or that of the larger block around it."""
    from_disk: bool
    error: Exception | None


class Fetcher:
    """Blocks of the files of one mount."""

    def __init__(
        self,
        stores: Sequence[Retrying],
        memory: BlockMemory,
        cache: BlockCache | None,
        counters: Counters,
        *,
        connections: int,
        read_timeout_s: float,
    ) -> None:
        self._stores = stores
        self._memory = memory
        self._cache = cache
        self._counters = counters
        # The store's own patience ends first and says more; this is the hard limit of a read.
        self._deadline_s = read_timeout_s + 5.0
        self._token = trio.lowlevel.current_trio_token()
        self._flights: dict[BlockKey, Flight] = {}
        self._landed: deque[Landing] = deque()
        self._drain_due = False
        self._look_next = 0.0
        self._looking = False
        self._failed: OrderedDict[bytes, tuple[float, AmlmountError]] = OrderedDict()
        self._room = trio.Event()
        self._crew = Crew(self._fly, connections=connections)

    def __repr__(self) -> str:
        return f"<Fetcher {len(self._flights)} in flight, {self._memory!r}>"

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

    def ahead(self, file: PinnedFile, key: BlockKey) -> bool:
        """Fetch a block that nobody waits for; False where memory or the store's mood do not allow it now."""
        if self.known(key) or file.digest in self._failed:
            return True
        throttled_until = self._stores[file.store].throttled_until
        if throttled_until and throttled_until > time.monotonic():
            return False
        if not self._memory.lease(key.stop - key.start, may_evict_unread=False):
            return False
        self._counters.prefetched += 1
        self._take_off(Flight(file, key, None, ahead=True), key.stop - key.start)
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
                self._queue(flight)  # whoever takes it first flies it; the other entry is void
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
                await flight.wait()
                if flight.from_disk:
                    self._counters.waited_disk += 1
                    self._counters.wait_disk_s += time.monotonic() - since
                else:
                    self._counters.waited_store += 1
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

    def give_up(self, key: BlockKey) -> None:
        """Note that a block fetched ahead is not expected to be read any more."""
        self._memory.give_up(key)

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
        cacheable = self._cache is not None and self._stores[flight.file.store].cacheable
        flight.skip_disk = not (cacheable and self._may_be_on_disk(flight))
        self._flights[flight.key] = flight
        self._queue(flight)

    def _may_be_on_disk(self, flight: Flight) -> bool:
        assert self._cache is not None
        return self._cache.maybe(flight.key) or (
            flight.within is not None and self._cache.maybe(flight.within)
        )

    def _queue(self, flight: Flight) -> None:
        self._crew.queue(flight, len(self._flights))

    def _drain(self) -> None:
        """Take in what the threads finished; runs on the event loop."""
        self._drain_due = False  # before the first look: what lands later calls again
        while self._landed:
            (flight, try_no), data, key, from_disk, error = self._landed.popleft()
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
            flight.land()
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
            self._look_around()
            late = time.monotonic() - DISK_PATIENCE_S
            stuck = set()
            for flight in [f for f in self._flights.values() if f.phase_since < late]:
                if self._cache is not None:
                    self._cache.mark_slow()
                stuck.add(flight.thread)
                flight.try_no += 1
                flight.skip_disk = True
                flight.phase_since = math.inf
                flight.ahead = False  # whatever it was: soon
                self._queue(flight)
            for _ in stuck:
                self._crew.replace()

    def _look_around(self) -> None:
        now = time.monotonic()
        if self._cache is not None and now >= self._look_next and not self._looking:
            self._looking = True
            self._look_next = now + LOOK_AROUND_S

            def look(cache: BlockCache) -> None:
                cache.look_around()
                self._looking = False

            threading.Thread(target=look, args=(self._cache,), name="look-around", daemon=True).start()

    def in_flight(self) -> int:
        """Return the number of blocks on their way."""
        return len(self._flights)

    def close(self) -> None:
        """Have the threads end as they become free; one that waits for a store is left behind."""
        self._crew.close()

    # Called in the threads

    def _fly(self, tries: Sequence[Try]) -> None:
        try:
            alone = len(tries) == 1
            tries = [entry for entry in self._from_disk(tries) if not entry.is_void]
            while tries:
                flight = tries[0].flight
                flight.skip_disk = True
                if alone:
                    self._from_store(tries[0])
                else:  # each waits for the store by itself
                    flight.phase_since = math.inf
                    self._queue(flight)
                tries = tries[1:]
        except Exception as error:  # noqa: BLE001  # whatever it is, the reads that wait must hear of it
            self._arrived(
                [Landing(entry, None, entry.flight.key, from_disk=False, error=error) for entry in tries]
            )

    def _from_store(self, entry: Try) -> None:
        flight = entry.flight
        flight.past_disk()
        store = self._stores[flight.file.store]
        try:
            data = store.read(flight.file.object, flight.key.start, flight.key.stop)
        except StoreError as error:
            self._arrived([Landing(entry, None, flight.key, from_disk=False, error=error)])
        else:
            self._arrived([Landing(entry, data, flight.key, from_disk=False, error=None)])

    def _from_disk(self, tries: Sequence[Try]) -> Sequence[Try]:
        """Bring what the cache disk has; return the others."""
        cache = self._cache
        if cache is None:
            return tries
        left = [entry for entry in tries if entry.flight.skip_disk]
        asked = [entry for entry in tries if not entry.flight.skip_disk]
        found: list[Landing] = []
        for entry, held in zip(asked, cache.read_all([e.flight.key for e in asked]), strict=True):
            key, within, data = entry.flight.key, entry.flight.within, held
            if data is None and within is not None:
                key, data = within, cache.read(within)
            if data is None:
                left.append(entry)
            else:
                found.append(Landing(entry, data, key, from_disk=True, error=None))
        if found:
            self._arrived(found)
        return left

    def _arrived(self, landings: Sequence[Landing]) -> None:
        self._landed.extend(landings)
        if not self._drain_due:
            self._drain_due = True
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._drain)


def _fresh(error: AmlmountError) -> AmlmountError:
    """Return a copy of an error for one more reader: a traceback belongs to one task."""
    fresh = copy.copy(error).with_traceback(None)
    fresh.__cause__ = error.__cause__
    return fresh


def _unexpected(error: Exception | None) -> AmlmountError:
    failure = AmlmountError(f"unexpected: {error!r}")
    failure.__cause__ = error
    return failure
