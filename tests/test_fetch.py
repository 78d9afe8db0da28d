"""The single-flight block source: one request a block, demand first, memory under its budget, failures remembered."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
import trio

from amlmount import fetch
from amlmount.blocks import ByteRange
from amlmount.cache import BlockCache
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


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Callable[[], BlockCache]]:
    made: list[BlockCache] = []

    def make() -> BlockCache:
        opened = BlockCache(
            tmp_path / "cache",
            cache_size=1 << 26,
            min_free=0,
            queue_bytes=1 << 26,
            counters=Counters(),
            log=structlog.get_logger(),
        )
        made.append(opened)
        return opened

    yield make
    for opened in made:
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
    async with rig(threads=4) as r:
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
    async with rig(threads=2) as r:
        with r.fake.held():
            for number in range(4):
                assert r.ahead(number)
            await r.store_has(1)  # one of two threads may fetch ahead, the other waits for a read
            async with trio.open_nursery() as nursery:
                nursery.start_soon(r.get, 9)
                await r.store_has(2)
                assert r.numbers() == [0, 9]
                r.fake._open.set()
        await r.landed()
        assert sorted(r.numbers()) == [0, 1, 2, 3, 9]


async def test_a_read_promotes_a_block_that_waits_its_turn() -> None:
    async with rig(threads=2) as r:
        with r.fake.held():
            for number in range(4):
                assert r.ahead(number)
            await r.store_has(1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(r.get, 3)
                await r.store_has(2)
                assert r.numbers() == [0, 3]
                r.fake._open.set()
        await r.landed()
        assert sorted(r.numbers()) == [0, 1, 2, 3]  # and it is not fetched a second time in its old place
        assert r.counters.prefetch_late == 1


async def test_prefetches_that_hang_leave_threads_for_reads() -> None:
    async with rig(threads=8) as r:
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
        r.fetcher.spent(r.file, r.block(1))
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


async def test_what_was_fetched_is_on_the_disk_for_the_next_mount(cache: Callable[[], BlockCache]) -> None:
    first = cache()
    async with rig(cache=first) as r:
        obj = r.file
        assert await r.get(4) == expected(4)
        first.close()
    async with rig(cache=cache()) as r:
        assert r.file == obj
        assert await r.get(4) == expected(4)
        assert r.fake.reads == []
        assert (r.counters.bytes_from_disk, r.counters.bytes_fetched) == (BLOCK, 0)


async def test_a_piece_is_cut_from_a_block_on_the_disk(cache: Callable[[], BlockCache]) -> None:
    first = cache()
    async with rig(cache=first) as r:
        await r.get(4)
        first.close()
    async with rig(cache=cache()) as r:
        piece = ByteRange(4 * BLOCK + 100, 4 * BLOCK + 150)
        data = await r.fetcher.get(r.file, piece, within=r.block(4))
        assert bytes(data) == DATA[piece.start : piece.stop]
        assert r.fake.reads == []
        # The whole block is in memory now, and counted as such.
        assert r.memory.used == BLOCK
        assert await r.get(4) == expected(4)
        assert r.counters.bytes_from_disk == BLOCK


async def test_a_piece_that_is_not_on_the_disk_is_fetched_alone(cache: Callable[[], BlockCache]) -> None:
    async with rig(cache=cache()) as r:
        piece = ByteRange(4 * BLOCK + 100, 4 * BLOCK + 150)
        assert bytes(await r.fetcher.get(r.file, piece, within=r.block(4))) == DATA[piece.start : piece.stop]
        assert [(read.start, read.stop) for read in r.fake.reads] == [tuple(piece)]


async def test_a_damaged_block_on_the_disk_is_fetched_again(
    cache: Callable[[], BlockCache], tmp_path: Path
) -> None:
    first = cache()
    async with rig(cache=first) as r:
        await r.get(4)
        first.close()
    (path,) = (tmp_path / "cache" / "v1").glob("??/*")
    raw = bytearray(path.read_bytes())
    raw[500] ^= 1
    path.write_bytes(raw)
    second = cache()
    async with rig(cache=second) as r:
        assert await r.get(4) == expected(4)
        assert r.numbers() == [4]
    assert second._counters.cache_corrupt == 1


async def test_a_store_whose_blocks_are_not_worth_it_keeps_off_the_disk(
    cache: Callable[[], BlockCache], tmp_path: Path
) -> None:
    opened = cache()
    async with rig(cache=opened) as r:
        r.retrying.cacheable = False
        await r.get(0)
        opened.close()
    assert opened._counters.cache_misses == 0
    assert list((tmp_path / "cache" / "v1").glob("??/*")) == []


async def test_a_disk_that_does_not_come_back_is_passed_by(
    cache: Callable[[], BlockCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "DISK_PATIENCE_S", 0.05)
    opened = cache()
    stuck, raised = threading.Event(), threading.Event()
    real, calls = opened.read, list[str]()

    def read(key: object) -> memoryview | None:
        calls.append(threading.current_thread().name)
        number = len(calls)
        if number <= 2:
            stuck.wait(20)
        if number == 1:
            raised.set()
            raise RuntimeError("what a disk says in the end")
        return real(key)  # type: ignore[arg-type]

    monkeypatch.setattr(opened, "read", read)
    async with rig(cache=opened, threads=2) as r:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.fetcher.watch)
            # Both threads are stuck on the disk; two more take their places.
            got = await all_of(lambda: r.get(0), lambda: r.get(1), lambda: r.get(2))
            assert got == [expected(0), expected(1), expected(2)]
            assert len(set(calls)) >= 2
            # Marked slow: the disk is left alone for a while.
            assert opened.read(r.file.key(r.block(0))) is None
            stuck.set()
            # What the two bring in the end, bytes and an error, is of no use to anybody any more.
            await trio.to_thread.run_sync(raised.wait, 10)
            assert await r.get(3) == expected(3)
            assert await r.get(4) == expected(4)
            nursery.cancel_scope.cancel()
        assert sorted(r.numbers()) == [0, 1, 2, 3, 4]
        assert r.fetcher.in_flight() == 0
        assert r.memory.used == 5 * BLOCK
    for thread in threading.enumerate():
        if thread.name.startswith("fetch-"):
            await trio.to_thread.run_sync(thread.join, 5)
            assert not thread.is_alive()


# The end -------------------------------------------------------------------------------------------------------


async def test_threads_end_when_it_is_closed() -> None:
    async with rig(threads=6) as r:
        assert len(r.threads) == 6
        await all_of(*(lambda n=n: r.get(n) for n in range(10)))
    assert not [t for t in r.threads if t.is_alive()]


def test_a_read_that_comes_back_after_the_loops_end_troubles_nobody() -> None:
    made: list[Rig] = []

    async def main() -> None:
        r = Rig(threads=2, budget=10 * BLOCK, patience_s=10, cache=None, read_timeout_s=60)
        made.append(r)
        r.fake._open.clear()
        assert r.ahead(0)
        await r.store_has(1)

    trio.run(main)
    (r,) = made
    r.fake._open.set()
    for thread in r.threads:
        if r.numbers() == [0]:
            r.fetcher.close()
        thread.join(5)
        assert not thread.is_alive()


async def test_failures_of_stores_are_only_store_errors() -> None:
    async with rig() as r:
        r.fake.fail(StoreError("archived", hint="bring it back"))
        with pytest.raises(StoreError) as caught:
            await r.get(0)
        assert caught.value.hint == "bring it back"
