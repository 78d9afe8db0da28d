"""Blocks on their way, and the threads that fly them: long-lived, fed by two lines, demand before prefetch.

Only a queue of the standard library's in C and one lock that is never waited with: a condition variable, or a thread
hop for each request, costs more than the request. Threads are started as they are needed.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple

import trio

from amlmount.blocks import MIB, BlockKey, ByteRange
from amlmount.dataset import ObjectId
from amlmount.errors import AmlmountError

LARGE = 1 * MIB
"""Bytes from which a block's transfer, not its round trip, is what takes time."""

SMALL_AT_ONCE = 4
"""Small requests for each large one that may be under way: they wait for the store's answer, not for its bytes."""

FROM_DISK = 8
"""Blocks that one thread takes together where they are expected on the cache disk: one wake-up, one look for all."""

_FAR = 1e300  # not infinity: that means "not taken"


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


class Ask(NamedTuple):
    """A read request that a block on its way will answer: whoever brings the bytes sends them."""

    unique: int
    """The request's number."""
    ino: int
    start: int
    stop: int
    """Bytes of the block, half-open."""


class Flight:
    """A block on its way."""

    __slots__ = (
        "_done",
        "ahead",
        "asks",
        "born",
        "data",
        "error",
        "file",
        "from_disk",
        "key",
        "leased",
        "phase_since",
        "skip_disk",
        "thread",
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
        self.asks: list[Ask] = []
        """Taken one by one with `pop`, by the thread that has the bytes or by the event loop: each is answered once."""
        self.born = time.monotonic()
        self.leased = 0
        self._done: trio.Event | None = None
        self.data: memoryview | None = None
        self.error: AmlmountError | None = None
        self.from_disk = False
        self.skip_disk = False
        """The cache disk has not got it, or does not answer."""
        self.thread = 0
        """Which thread took it."""
        self.try_no = 0
        self.phase_since = math.inf

    def expect(self) -> trio.Event:
        """Return what is set when it has landed."""
        if self._done is None:
            self._done = trio.Event()
        return self._done

    @property
    def is_awaited(self) -> bool:
        """Whether a task waits for it."""
        return self._done is not None

    def land(self) -> None:
        """Wake who waits."""
        if self._done is not None:
            self._done.set()

    @property
    def weight(self) -> int:
        """What it counts for among the prefetches under way."""
        return SMALL_AT_ONCE if self.key.length >= LARGE else 1

    def past_disk(self) -> None:
        """Note that only the store is asked from now on, which keeps its own time."""
        self.phase_since = _FAR


class Try(NamedTuple):
    """A flight, and which of its tries this is: one that hangs is given to another thread."""

    flight: Flight
    number: int

    @property
    def is_void(self) -> bool:
        """Whether another thread has it."""
        return self.flight.try_no != self.number


class Crew:
    """The threads of one mount. `fly` is called in them, with one flight or with several that the disk may have."""

    def __init__(self, fly: Callable[[Sequence[Try]], None], *, connections: int) -> None:
        self._fly = fly
        self._most = connections * SMALL_AT_ONCE
        self._started = 0
        self._tokens: SimpleQueue[bool] = SimpleQueue()  # one for each entry in the lines; False: end
        self._demand: deque[Try] = deque()
        self._prefetch: deque[Try] = deque()
        self._lock = threading.Lock()
        self._weight = 0
        self._parked = 0
        # Prefetches that hang in retries must not hold every thread when a read comes.
        self._limit = self._most - max(2, self._most // 8)

    def __repr__(self) -> str:
        return f"<Crew of {self._started}, {len(self._demand)} and {len(self._prefetch)} waiting>"

    def queue(self, flight: Flight, wanted: int) -> None:
        """Give a flight to the threads, of which there should be `wanted`."""
        if self._started < wanted and self._started < self._most:
            self.add()
        (self._prefetch if flight.ahead else self._demand).append(Try(flight, flight.try_no))
        self._tokens.put(True)

    def add(self) -> None:
        """Start one more thread."""
        self._started += 1
        threading.Thread(target=self._work, name=f"fetch-{self._started}", daemon=True).start()

    def replace(self) -> None:
        """Start a thread for one that is stuck."""
        self._most += 1
        self.add()

    def close(self) -> None:
        """Have the threads end as they become free; one that waits for a store is left behind."""
        self._tokens.put(False)

    def _work(self) -> None:
        while True:
            if not self._tokens.get():
                self._tokens.put(False)
                return
            with self._lock:
                taken, weight = self._take()
            if taken:
                self._fly(taken)
            if weight:
                with self._lock:
                    self._weight -= weight
                    parked, self._parked = self._parked, 0
                for _ in range(parked):
                    self._tokens.put(True)
            if any(entry.is_void for entry in taken):
                return  # it hung, and was replaced
            del taken  # a thread that waits holds no block

    def _take(self) -> tuple[list[Try], int]:
        """Take what is next, and the weight of it where it is a prefetch."""
        while self._demand:
            entry = self._demand.popleft()
            if self._is_free(entry):
                return [entry], 0
        taken: list[Try] = []
        weight = 0
        while self._prefetch and len(taken) < FROM_DISK:
            entry = self._prefetch[0]
            flight = entry.flight
            if self._is_free(entry):
                if taken and (flight.skip_disk or flight.weight > 1):
                    flight.phase_since = math.inf
                    break
                if self._weight + flight.weight > self._limit:
                    flight.phase_since = math.inf
                    self._parked += not taken
                    break
                self._weight += flight.weight
                weight += flight.weight
                taken.append(entry)
            self._prefetch.popleft()
            if taken and (flight.skip_disk or flight.weight > 1):
                break
        return taken, weight

    @staticmethod
    def _is_free(entry: Try) -> bool:
        if entry.is_void or entry.flight.phase_since != math.inf:
            return False
        entry.flight.thread = threading.get_ident()
        entry.flight.phase_since = time.monotonic()
        return True
