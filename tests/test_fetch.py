"""The single-flight block source: one request a block, demand first, memory under its budget, failures remembered."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import structlog
import trio

from amlmount import fetch
from amlmount.blocks import BlockKey, ByteRange
from amlmount.cache import FORMAT, PACKED_BELOW, BlockCache
from amlmount.errors import (
    AmlmountError,
    ObjectChanged,
    ObjectMissing,
    StoreError,
    StoreUnreachable,
    Throttled,
    TransientStoreError,
)
from amlmount.fetch import FAILED_FOR_S
from amlmount.metrics import Counters
from tests.fetch_rig import BLOCK, DATA, Rig, expected, rig
from tests.mounting import until


class Caches:
    """Caches on one folder, one after another."""

    def __init__(self, folder: Path, *, packed_below: int) -> None:
        self.folder = folder
        self.packed_below = packed_below
        self.made: list[BlockCache] = []

    def open(self) -> BlockCache:
        opened = BlockCache(
            self.folder,
            cache_size=1 << 26,
            min_free=0,
            queue_bytes=1 << 26,
            counters=Counters(),
            log=structlog.get_logger(),
            packed_below=self.packed_below,
        )
        self.made.append(opened)
        return opened

    def files(self) -> list[Path]:
        """Return the files that hold blocks."""
        return list((self.folder / FORMAT).glob("??/*"))


@pytest.fixture(params=[0, PACKED_BELOW], ids=["files", "packs"])
def caches(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Caches]:
    found = Caches(tmp_path / "cache", packed_below=request.param)
    yield found
    for opened in found.made:
        opened.close()


async def all_of(*calls: Callable[[], object]) -> list[object]:
    """Run async calls at once; return results or exceptions in order."""
    results: list[object] = [None] * len(calls)

    async def one(number: int, call: Callable[[], object]) -> None:
        try:
            results[number] = await call()  # type: ignore[misc]
        except AmlmountError as error:
            results[number] = error

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for number, call in enumerate(calls):
                nursery.start_soon(one, number, call)
    return results


# One request a block -------------------------------------------------------------------------------------------


async def test_readers_of_one_block_cause_one_request() -> None:
    async with rig() as r:
        with r.fake.held():
            async with trio.open_nursery() as nursery:
                results: list[bytes] = []

                async def one() -> None:
                    results.append(await r.get(3))

                for _ in range(20):
                    nursery.start_soon(one)
                await r.store_has(1)
                await trio.testing.wait_all_tasks_blocked()
                assert r.fetcher.in_flight() == 1
                r.fake._open.set()
        assert results == [expected(3)] * 20
        assert r.numbers() == [3]
        assert (r.counters.bytes_fetched, r.counters.requests) == (BLOCK, 1)


async def test_a_block_in_memory_is_asked_for_once() -> None:
    async with rig() as r:
        for _ in range(5):
            assert await r.get(7) == expected(7)
        assert r.numbers() == [7]
        assert r.counters.memory_hits == 4
        assert r.fetcher.known(r.file.key(r.block(7)))
        assert not r.fetcher.known(r.file.key(r.block(8)))


async def test_blocks_are_fetched_at_once_but_no_more_than_there_are_threads() -> None:
    async with rig(connections=1) as r:  # small blocks: four for each connection
        r.fake.delay_s = 0.005
        got = await all_of(*(lambda n=n: r.get(n) for n in range(20)))
        assert got == [expected(n) for n in range(20)]
        assert 2 <= r.fake.peak <= 4
        assert sorted(r.numbers()) == list(range(20))


async def test_every_waiter_hears_of_a_failure_and_each_gets_an_error_of_its_own() -> None:
    async with rig() as r:
        r.fake.fail(ObjectChanged("file was overwritten"))
        got = await all_of(*[lambda: r.get(0)] * 5)
        assert [type(e) for e in got] == [ObjectChanged] * 5
        assert [str(e) for e in got] == ["file was overwritten"] * 5
        assert len({id(e) for e in got}) == 5
        assert len(r.fake.reads) == 1
        assert r.memory.used == 0


async def test_a_reader_that_gives_up_takes_nothing_from_the_others() -> None:
    async with rig() as r:
        with r.fake.held():
            async with trio.open_nursery() as nursery:
                got: list[bytes] = []

                async def patient() -> None:
                    got.append(await r.get(0))

                nursery.start_soon(patient)
                await r.store_has(1)
                with trio.move_on_after(0) as scope:
                    await r.get(0)
                assert scope.cancelled_caught
                r.fake._open.set()
        assert got == [expected(0)]
        assert r.numbers() == [0]


# Demand before prefetch ----------------------------------------------------------------------------------------


async def test_a_block_fetched_ahead_is_there_when_it_is_read() -> None:
    async with rig() as r:
        assert r.ahead(5)
        assert r.ahead(5)  # it is on its way
        await r.landed()
        assert await r.get(5) == expected(5)
        assert r.ahead(5)  # it is there
        assert r.numbers() == [5]
        assert (r.counters.prefetched, r.counters.prefetch_used, r.counters.prefetch_late) == (1, 1, 0)


async def test_a_read_goes_before_what_is_fetched_ahead() -> None:
    async with rig(connections=1) as r:
        with r.fake.held():
            for number in range(6):
                assert r.ahead(number)
            await r.store_has(2)  # two of four threads may fetch ahead, the others wait for reads
            async with trio.open_nursery() as nursery:
                nursery.start_soon(r.get, 9)
                await r.store_has(3)
                assert set(r.numbers()[:2]) == {0, 1}
                assert r.numbers()[2:] == [9]
                r.fake._open.set()
        await r.landed()
        assert sorted(r.numbers()) == [0, 1, 2, 3, 4, 5, 9]


async def test_a_read_promotes_a_block_that_waits_its_turn() -> None:
    async with rig(connections=1) as r:
        with r.fake.held():
            for number in range(4):
                assert r.ahead(number)
            await r.store_has(2)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(r.get, 3)
                await r.store_has(3)
                assert r.numbers()[2:] == [3]
                r.fake._open.set()
        await r.landed()
        assert sorted(r.numbers()) == [0, 1, 2, 3]  # and it is not fetched a second time in its old place
        assert r.counters.prefetch_late == 1


async def test_prefetches_that_hang_leave_threads_for_reads() -> None:
    async with rig(connections=2) as r:
        with r.fake.held():
            for number in range(12):
                assert r.ahead(number)
            await r.store_has(6)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(r.get, 15)
                nursery.start_soon(r.get, 16)
                await r.store_has(8)
                assert set(r.numbers()[6:]) == {15, 16}
                r.fake._open.set()


async def test_nothing_is_fetched_ahead_while_the_store_is_throttling() -> None:
    async with rig() as r:
        r.fake.fail(Throttled("busy", hint="", retry_after_s=0.02))
        assert await r.get(0) == expected(0)
        r.retrying.throttled_until = time.monotonic() + 60
        assert not r.ahead(1)
        assert await r.get(2) == expected(2)  # a read is still served
        r.retrying.throttled_until = 0
        assert r.ahead(1)
        await r.landed()
        assert r.numbers() == [0, 0, 2, 1]


# Memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 3])
async def test_the_budget_is_never_exceeded(blocks: int) -> None:
    async with rig(budget=blocks * BLOCK) as r:
        r.fake.delay_s = 0.001
        order = random.Random(1).choices(range(20), k=60)
        got = await all_of(*(lambda n=n: r.get(n) for n in order))
        assert got == [expected(n) for n in order]
        assert r.memory.peak == blocks * BLOCK
        assert r.memory.used <= blocks * BLOCK


async def test_what_is_fetched_ahead_keeps_to_the_budget_too() -> None:
    async with rig(budget=3 * BLOCK) as r:
        assert [r.ahead(n) for n in range(5)] == [True, True, True, False, False]
        await r.landed()
        assert not r.ahead(3)  # unread blocks are not thrown out for another that nobody reads yet
        assert await r.get(9) == expected(9)  # but for a read
        assert r.counters.prefetch_wasted == 1
        assert r.memory.used <= 3 * BLOCK


async def test_blocks_read_to_their_end_make_room() -> None:
    async with rig(budget=2 * BLOCK) as r:
        await r.get(0)
        await r.get(1)
        r.fetcher.spent(r.key(1))
        await r.get(2)
        assert r.fetcher.known(r.file.key(r.block(0)))
        assert not r.fetcher.known(r.file.key(r.block(1)))


async def test_failures_give_their_memory_back() -> None:
    async with rig(budget=BLOCK) as r:
        others = [r.add(f"f{n}", DATA) for n in range(6)]
        for n in range(3):
            r.fake.fail(ObjectMissing("gone"), path=f"f{n}")
        got = await all_of(*(lambda f=f: r.get(0, f) for f in others))
        assert [type(g) for g in got[:3]] == [ObjectMissing] * 3
        assert got[3:] == [expected(0)] * 3
        # The last to land keeps its block, or gave back what it made another give up.
        assert r.memory.used == sum(BLOCK for f in others if r.fetcher.known(f.key(r.block(0))))


async def test_a_share_of_the_budget_for_each_reader() -> None:
    async with rig(budget=100 * BLOCK) as r:
        assert r.fetcher.window_limit(1) == r.fetcher.window_limit(0) == 50 * BLOCK
        assert r.fetcher.window_limit(10) == 5 * BLOCK


# Failures ------------------------------------------------------------------------------------------------------


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves this process's clock forward."""
    offset = 0.0
    real = time.monotonic

    def move(by_s: float) -> None:
        nonlocal offset
        offset += by_s

    monkeypatch.setattr(time, "monotonic", lambda: real() + offset)
    return move


async def test_a_failed_object_is_left_alone_for_a_while(later: Callable[[float], None]) -> None:
    async with rig() as r:
        r.fake.fail(ObjectMissing("gone"), path="file")
        other = r.add("other", DATA)
        for number in range(4):
            with pytest.raises(ObjectMissing, match="gone"):
                await r.get(number)
        assert len(r.fake.reads) == 1
        assert r.ahead(5)  # nothing more to do about it
        assert await r.get(0, other) == expected(0)
        later(FAILED_FOR_S + 0.1)
        assert await r.get(1) == expected(1)
        assert r.ahead(5)
        await r.landed()
        assert r.numbers() == [0, 0, 1, 5]


async def test_what_is_in_memory_is_served_though_the_object_failed() -> None:
    async with rig() as r:
        await r.get(0)
        r.fake.fail(ObjectChanged("overwritten"))
        with pytest.raises(ObjectChanged):
            await r.get(1)
        assert await r.get(0) == expected(0)


async def test_a_prefetch_that_fails_is_silent_and_a_read_tries_anew() -> None:
    async with rig(patience_s=0.001) as r:
        r.fake.fail(TransientStoreError("reset", hint=""))
        assert r.ahead(0)
        await r.landed()
        assert await r.get(0) == expected(0)
        assert r.numbers() == [0, 0]


async def test_a_prefetch_that_finds_the_object_changed_saves_the_read_the_question() -> None:
    async with rig() as r:
        r.fake.fail(ObjectChanged("overwritten"), times=None)
        assert r.ahead(0)
        await r.landed()
        with pytest.raises(ObjectChanged):
            await r.get(1)
        assert r.numbers() == [0]


async def test_transient_failures_are_retried_behind_the_read() -> None:
    async with rig() as r:
        r.fake.fail(TransientStoreError("reset", hint=""), times=2)
        assert await r.get(0) == expected(0)
        assert [read.attempt for read in r.fake.reads] == [0, 1, 2]
        assert r.counters.retries == 2


async def test_the_end_of_patience_is_an_error() -> None:
    async with rig(patience_s=0.3) as r:
        r.fake.fail(TransientStoreError("reset", hint=""), times=None)
        with pytest.raises(StoreUnreachable, match="reset"):
            await r.get(0)
        assert r.memory.used == 0


async def test_a_bug_in_a_store_costs_the_read_and_keeps_its_cause() -> None:
    async with rig() as r:
        r.fake.fail(ZeroDivisionError("a bug"))
        with pytest.raises(AmlmountError, match="a bug") as caught:
            await r.get(0)
        assert type(caught.value) is AmlmountError
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert caught.value.__cause__.__traceback__ is not None
        assert await r.get(0, r.add("other", DATA)) == expected(0)


async def test_a_read_has_a_deadline_whatever_the_store_does(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig(read_timeout_s=60) as r:
        with r.fake.held():
            begin = trio.current_time()
            with pytest.raises(StoreUnreachable, match="no answer within 65 s"):
                await r.get(0)
            assert trio.current_time() - begin == pytest.approx(65)
            with pytest.raises(StoreUnreachable):  # the kernel asks again: that takes no time
                await r.get(0)
            assert trio.current_time() - begin == pytest.approx(65)


async def test_a_read_that_finds_no_memory_has_the_deadline_too(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig(budget=BLOCK // 2) as r:
        with pytest.raises(StoreUnreachable):
            await r.get(0)
        assert r.fake.reads == []


# The disk ------------------------------------------------------------------------------------------------------


async def test_what_was_fetched_is_on_the_disk_for_the_next_mount(caches: Caches) -> None:
    first = caches.open()
    async with rig(cache=first) as r:
        obj = r.file
        assert await r.get(4) == expected(4)
        first.close()
    async with rig(cache=caches.open()) as r:
        assert r.file == obj
        assert await r.get(4) == expected(4)
        assert r.fake.reads == []
        assert (r.counters.bytes_from_disk, r.counters.bytes_fetched) == (BLOCK, 0)


async def test_a_piece_is_cut_from_a_block_on_the_disk(caches: Caches) -> None:
    first = caches.open()
    async with rig(cache=first) as r:
        await r.get(4)
        first.close()
    async with rig(cache=caches.open()) as r:
        piece = ByteRange(4 * BLOCK + 100, 4 * BLOCK + 150)
        data = await r.fetcher.get(r.file, piece, within=r.block(4))
        assert bytes(data) == DATA[piece.start : piece.stop]
        assert r.fake.reads == []
        # The whole block is in memory now, and counted as such.
        assert r.memory.used == BLOCK
        assert await r.get(4) == expected(4)
        assert r.counters.bytes_from_disk == BLOCK


async def test_a_piece_that_is_not_on_the_disk_is_fetched_alone(caches: Caches) -> None:
    async with rig(cache=caches.open()) as r:
        piece = ByteRange(4 * BLOCK + 100, 4 * BLOCK + 150)
        assert bytes(await r.fetcher.get(r.file, piece, within=r.block(4))) == DATA[piece.start : piece.stop]
        assert [(read.start, read.stop) for read in r.fake.reads] == [tuple(piece)]


async def test_a_damaged_block_on_the_disk_is_fetched_again(caches: Caches) -> None:
    first = caches.open()
    async with rig(cache=first) as r:
        await r.get(4)
        first.close()
    (path,) = caches.files()
    raw = bytearray(path.read_bytes())
    raw[500] ^= 1
    path.write_bytes(raw)
    second = caches.open()
    async with rig(cache=second) as r:
        assert await r.get(4) == expected(4)
        assert r.numbers() == [4]
    assert second._counters.cache_corrupt == 1


async def test_a_store_whose_blocks_are_not_worth_it_keeps_off_the_disk(caches: Caches) -> None:
    opened = caches.open()
    async with rig(cache=opened) as r:
        r.retrying.cacheable = False
        await r.get(0)
        opened.close()
    assert opened._counters.cache_misses == 0
    assert caches.files() == []


async def test_a_disk_that_does_not_come_back_is_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "DISK_PATIENCE_S", 0.05)
    opened = Caches(tmp_path / "cache", packed_below=0).open()
    stuck, raised = threading.Event(), threading.Event()
    real, calls = opened.read_all, list[str]()

    def read_all(keys: Sequence[BlockKey]) -> list[memoryview | None]:
        if not keys:
            return real(keys)
        calls.append(threading.current_thread().name)
        number = len(calls)
        if number <= 4:
            stuck.wait(20)
        if number == 1:
            raised.set()
            raise RuntimeError("what a disk says in the end")
        return real(keys)

    monkeypatch.setattr(opened, "read_all", read_all)
    async with rig(cache=opened, connections=1) as r:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetcher.watch)
            # All four threads are stuck on the disk; as many more take their places.
            got = await all_of(*(lambda n=n: r.get(n) for n in range(4)))
            assert got == [expected(n) for n in range(4)]
            assert len(set(calls)) == 4
            # Marked slow: the disk is left alone for a while.
            assert opened.read(r.key(0)) is None
            stuck.set()
            # What the four bring in the end, bytes and an error, is of no use to anybody any more.
            await trio.to_thread.run_sync(raised.wait, 10)
            assert await r.get(4) == expected(4)
            assert await r.get(5) == expected(5)
            nursery.cancel_scope.cancel()
        assert sorted(r.numbers()) == [0, 1, 2, 3, 4, 5]
        assert r.fetcher.in_flight() == 0
        assert r.memory.used == 6 * BLOCK
    assert r.threads() == []
    opened.close()


async def test_one_thread_that_hangs_is_replaced_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it had taken several blocks together."""
    monkeypatch.setattr(fetch, "DISK_PATIENCE_S", 0.05)
    opened = Caches(tmp_path / "cache", packed_below=PACKED_BELOW).open()
    stuck, groups = threading.Event(), list[int]()
    real = opened.read_all

    def read_all(keys: Sequence[BlockKey]) -> list[memoryview | None]:
        groups.append(len(keys))
        if len(keys) > 1:
            stuck.wait(20)
        return real(keys)

    monkeypatch.setattr(opened, "read_all", read_all)
    async with rig(cache=opened, connections=2) as r, trio.open_nursery() as nursery:
        await r.get(0)  # one thread
        with r.fetcher._crew._lock:
            for number in range(1, 7):
                assert r.ahead(number)
            started = r.fetcher._crew._started
        nursery.start_soon(r.fetcher.watch)
        await r.landed()
        assert max(groups) == 6
        assert r.fetcher._crew._started == started + 1
        stuck.set()
        nursery.cancel_scope.cancel()
    opened.close()


async def test_blocks_that_are_not_on_the_disk_wait_for_the_store_together(tmp_path: Path) -> None:
    """A thread takes several that may be there; none of those that are not waits for another's answer."""
    opened = Caches(tmp_path / "cache", packed_below=PACKED_BELOW).open()
    async with rig(cache=opened, connections=2) as r:
        with r.fake.held():
            with r.fetcher._crew._lock:  # so that one thread finds all of them in line
                for number in range(6):
                    assert r.ahead(number)
            await r.store_has(6)
            assert sorted(r.numbers()) == list(range(6))
        await r.landed()
    opened.close()


async def test_a_bug_in_a_store_costs_only_the_block_that_it_was_asked_for(tmp_path: Path) -> None:
    opened = Caches(tmp_path / "cache", packed_below=PACKED_BELOW).open()
    async with rig(cache=opened, connections=2) as r:
        files = [r.add(f"f{n}", DATA) for n in range(6)]
        r.fake.fail(ZeroDivisionError("a bug"), path="f0", times=None)
        with r.fetcher._crew._lock:
            for file in files:
                assert r.fetcher.ahead(file, file.key(r.block(0)))
        await r.landed()
        assert [r.fetcher.holds(file.key(r.block(0))) for file in files] == [False] + [True] * 5
    opened.close()


async def test_what_the_disk_cannot_have_is_not_looked_for(caches: Caches) -> None:
    first = caches.open()
    async with rig(cache=first) as r:
        await r.get(4)
        first.close()
    opened = caches.open()
    opened.look_around()
    async with rig(cache=opened) as r:
        assert await r.get(4) == expected(4)
        assert await r.get(5) == expected(5)
        assert r.numbers() == [5]
        # Only of what has a file of its own the disk has to be asked.
        assert opened._counters.cache_misses == (caches.packed_below == 0)


async def test_what_another_mount_wrote_is_found(caches: Caches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "DISK_PATIENCE_S", 0.05)
    monkeypatch.setattr(fetch, "LOOK_AROUND_S", 0.01)
    opened, other = caches.open(), caches.open()
    opened.look_around()
    async with rig(cache=other) as theirs:
        await theirs.get(4)
        other.close()
    async with rig(cache=opened) as r, trio.open_nursery() as nursery:
        nursery.start_soon(r.fetcher.watch)
        await trio.to_thread.run_sync(until, lambda: opened.maybe(r.key(4)))
        assert await r.get(4) == expected(4)
        assert r.numbers() == []
        nursery.cancel_scope.cancel()


# The end -------------------------------------------------------------------------------------------------------


async def test_threads_are_started_as_they_are_needed_and_end_when_it_is_closed() -> None:
    async with rig(connections=2) as r:
        assert r.threads() == []
        await r.get(0)
        assert len(r.threads()) == 1
        r.fake.delay_s = 0.005
        await all_of(*(lambda n=n: r.get(n) for n in range(20)))
        assert len(r.threads()) == 8
    assert r.threads() == []


def test_a_read_that_comes_back_after_the_loops_end_troubles_nobody() -> None:
    made: list[Rig] = []

    async def main() -> None:
        r = Rig(connections=1, budget=10 * BLOCK, patience_s=10, cache=None, read_timeout_s=60)
        made.append(r)
        r.fake._open.clear()
        assert r.ahead(0)
        await r.store_has(1)

    trio.run(main)
    (r,) = made
    (thread,) = r.threads()
    r.fake._open.set()
    r.fetcher.close()
    thread.join(5)
    assert not thread.is_alive()
    assert r.numbers() == [0]


async def test_failures_of_stores_are_only_store_errors() -> None:
    async with rig() as r:
        r.fake.fail(StoreError("archived", hint="bring it back"))
        with pytest.raises(StoreError) as caught:
            await r.get(0)
        assert caught.value.hint == "bring it back"
