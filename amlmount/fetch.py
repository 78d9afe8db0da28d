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

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress

import trio

from amlmount.blocks import BlockKey, ByteRange
from amlmount.cache import BlockCache
from amlmount.crew import Ask, Crew, Flight, PinnedFile
from amlmount.dataset import printable
from amlmount.errors import AmlmountError, StoreUnreachable, unexpected
from amlmount.memory import BlockMemory
from amlmount.metrics import Counters
from amlmount.pilot import Answering, Landing, Pilot
from amlmount.stores import Retrying

DISK_PATIENCE_S = 1.0
"""Seconds that a read of the cache disk may take; a healthy disk needs milliseconds for 4 MiB."""

LOOK_AROUND_S = 1.0
"""Seconds between two looks at what other processes have put on the cache disk."""

FAILED_FOR_S = 5.0
"""Seconds for which a failed object is not asked for again: a training loop must not hammer a dead blob."""


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
        self._waiting_for_room = 0
        self._asks = 0
        self._asks_since = 0.0
        self._look_next = 0.0
        self._looking = False
        self._failed: OrderedDict[bytes, tuple[float, AmlmountError]] = OrderedDict()
        self._room = trio.Event()
        self._pilot = Pilot(stores, cache, arrived=self._arrived, again=self._queue)
        self._crew = Crew(self._pilot.fly, connections=connections)

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

    @property
    def answers(self) -> Answering | None:
        """Where answers go, if threads give them: to a relay, which calls `take_in` with each request.

        The event loop is then woken only for what a task waits for.
        """
        return self._pilot.answers

    @answers.setter
    def answers(self, answers: Answering) -> None:
        self._pilot.answers = answers

    def take_in(self) -> None:
        """Take in what the threads have brought."""
        if self._landed:
            self._drain()

    def join(self, flight: Flight, ask: Ask) -> None:
        """Have a flight answer a request as soon as its bytes are there."""
        if self._asks == 0:
            self._asks_since = time.monotonic()
        self._asks += 1
        flight.asks.append(ask)
        self.take_in()  # it may have landed while we looked; then nobody else would see the request

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
                        self._waiting_for_room += 1
                        try:
                            await room.wait()
                        finally:
                            self._waiting_for_room -= 1
                        self._counters.wait_memory_s += time.monotonic() - since
                    continue
                since = time.monotonic()
                waiting = flight.expect()
                self.take_in()  # what landed before a thread could see that somebody waits
                await waiting.wait()
                if flight.from_disk:
                    self._counters.waited_disk += 1
                    self._counters.wait_disk_s += time.monotonic() - since
                else:
                    self._counters.waited_store += 1
                    self._counters.wait_store_s += time.monotonic() - since
                if flight.error is not None:
                    raise flight.error.fresh()
                assert flight.data is not None
                return flight.data
        raise self._late(file)

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
        return failed[1].fresh()

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
            (flight, try_no), data, key, from_disk, error, answered, at_s = self._landed.popleft()
            if answered:
                self._count(flight, answered, from_disk, at_s)
            if self._flights.get(flight.key) is not flight or flight.try_no != try_no:
                continue
            del self._flights[flight.key]
            if data is None:
                self._memory.release(flight.leased)
                flight.error = error if isinstance(error, AmlmountError) else unexpected(error)
                if not flight.ahead or not isinstance(flight.error, StoreUnreachable):
                    self._failed[flight.file.digest] = (time.monotonic() + FAILED_FOR_S, flight.error)
                    if len(self._failed) > 4096:
                        self._failed.popitem(last=False)
            else:
                self._land(flight, key, data, from_disk)
                if answered:
                    self._memory.spent(key)
            flight.land()
            if flight.asks:
                self._answer_rest(flight)
        if self._waiting_for_room:
            room, self._room = self._room, trio.Event()
            room.set()

    def _answer_rest(self, flight: Flight) -> None:
        if flight.data is not None:
            answered = self._pilot.answer(flight, flight.data)
            self._count(flight, answered, flight.from_disk, time.monotonic())
        self._refuse_all(flight, flight.error or unexpected(None))

    def _refuse_all(self, flight: Flight, error: AmlmountError) -> None:
        while flight.asks and self.answers is not None:
            ask = flight.asks.pop()
            self.answers.refuse(ask.unique, error.fresh(), ask.ino)
            self._has_answered(1, time.monotonic())

    def _has_answered(self, asks: int, at_s: float) -> None:
        self._asks -= asks
        if self._asks == 0:
            self._counters.waiting_s += max(0.0, at_s - self._asks_since)

    def _count(self, flight: Flight, answered: Sequence[Ask], from_disk: bool, at_s: float) -> None:
        counters = self._counters
        self._has_answered(len(answered), at_s)
        waited_s = at_s - flight.born
        for ask in answered:
            counters.bytes_asked += ask.stop - ask.start
            counters.read_wait.observe(waited_s)
            if from_disk:
                counters.waited_disk += 1
                counters.wait_disk_s += waited_s
            else:
                counters.waited_store += 1
                counters.wait_store_s += waited_s

    @property
    def waits_since(self) -> float | None:
        """Moment since which at least one request has been waiting for a thread's answer, or None. Thread-safe."""
        return self._asks_since if self._asks else None

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
            self.take_in()
            self._end_late_reads()
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

    def _end_late_reads(self) -> None:
        now = time.monotonic()
        for flight in [f for f in self._flights.values() if f.asks and now - f.born > self._deadline_s]:
            self._refuse_all(flight, self._late(flight.file))

    def _late(self, file: PinnedFile) -> StoreUnreachable:
        late = StoreUnreachable(f"{printable(file.object.path)}: no answer within {self._deadline_s:.0f} s")
        # The kernel asks a second time for what it read ahead; that must not take as long again.
        self._failed[file.digest] = (time.monotonic() + FAILED_FOR_S, late)
        return late

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

    def _arrived(self, landings: Sequence[Landing]) -> None:
        self._landed.extend(landings)
        if self._drain_due:
            return
        if (
            self.answers is None
            or self._waiting_for_room
            or any(it.error or it.entry.flight.is_awaited or it.entry.flight.asks for it in landings)
        ):
            self._drain_due = True
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._drain)
