"""A fetcher over the fake store, for tests of what is fetched when."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from amlmount.blocks import BlockKey, ByteRange, object_digest
from amlmount.cache import BlockCache
from amlmount.crew import PinnedFile
from amlmount.dataset import ObjectId
from amlmount.fetch import Fetcher
from amlmount.memory import BlockMemory
from amlmount.metrics import Counters
from amlmount.stores import Retrying
from tests.fake_store import FakeStore

BLOCK = 1000
DATA = random.Random(5).randbytes(20 * BLOCK)


class WatchedMemory(BlockMemory):
    """Fails the test at the moment when the budget is exceeded, or a count goes wrong."""

    peak = 0

    def lease(self, size: int, *, may_evict_unread: bool) -> bool:
        given = super().lease(size, may_evict_unread=may_evict_unread)
        assert 0 <= self.used <= self.budget
        self.peak = max(self.peak, self.used)
        return given

    def release(self, size: int) -> None:
        super().release(size)
        assert self.used >= 0


class WatchedFetcher(Fetcher):
    """Says when it has taken in what landed."""

    taken_in: trio.Event | None = None

    def _drain(self) -> None:
        super()._drain()
        if self.taken_in is not None:
            self.taken_in.set()


class Rig:
    """A fetcher over a fake store."""

    def __init__(
        self,
        *,
        connections: int,
        budget: int,
        patience_s: float,
        cache: BlockCache | None,
        read_timeout_s: float,
    ) -> None:
        self.fake = FakeStore()
        self.counters = Counters()
        self.memory = WatchedMemory(budget, self.counters)
        self.cache = cache
        self.retrying = Retrying(self.fake, patience_s=patience_s, counters=self.counters)
        self._before = set(threading.enumerate())
        self.fetcher = WatchedFetcher(
            [self.retrying],
            self.memory,
            cache,
            self.counters,
            connections=connections,
            read_timeout_s=read_timeout_s,
        )
        self.file = self.add("file", DATA)

    def add(self, name: str, data: bytes) -> PinnedFile:
        return pin(self.fake.put(name, data))

    def block(self, number: int) -> ByteRange:
        return ByteRange(number * BLOCK, (number + 1) * BLOCK)

    async def get(self, number: int, file: PinnedFile | None = None) -> bytes:
        return bytes(await self.fetcher.get(file or self.file, self.block(number)))

    def ahead(self, number: int) -> bool:
        return self.fetcher.ahead(self.file, self.key(number))

    def key(self, number: int) -> BlockKey:
        return self.file.key(self.block(number))

    def threads(self) -> list[threading.Thread]:
        """Return the fetcher's threads."""
        return [t for t in threading.enumerate() if t not in self._before and t.name.startswith("fetch-")]

    def numbers(self) -> list[int]:
        """Return the blocks read from the store, in order."""
        return [read.start // BLOCK for read in self.fake.reads]

    async def store_has(self, count: int) -> None:
        """Wait until so many reads have reached the store."""
        await trio.to_thread.run_sync(self.fake.wait_for, count)

    async def landed(self) -> None:
        """Wait until nothing is on its way."""
        with trio.fail_after(10):
            while self.fetcher.in_flight():
                self.fetcher.taken_in = trio.Event()
                self.fetcher.take_in()
                if self.fetcher.in_flight():
                    await self.fetcher.taken_in.wait()


def pin(obj: ObjectId) -> PinnedFile:
    return PinnedFile(0, obj, object_digest("fake:///box", obj.path, obj.tag))


def expected(number: int) -> bytes:
    return DATA[number * BLOCK : (number + 1) * BLOCK]


@asynccontextmanager
async def rig(
    *,
    connections: int = 1,
    budget: int = 100 * BLOCK,
    patience_s: float = 10,
    cache: BlockCache | None = None,
    read_timeout_s: float = 60,
) -> AsyncIterator[Rig]:
    made = Rig(
        connections=connections,
        budget=budget,
        patience_s=patience_s,
        cache=cache,
        read_timeout_s=read_timeout_s,
    )
    try:
        yield made
    finally:
        made.fake._open.set()
        made.fetcher.close()
        for thread in made.threads():
            await trio.to_thread.run_sync(thread.join, 5)
            assert not thread.is_alive()
