"""One open file: the right bytes whatever is read in whatever order, and no more requests than it takes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from amlmount.blocks import BLOCK_SIZE, KIB, MIB, block_at, blocks_over
from amlmount.errors import ObjectChanged, StoreUnreachable
from amlmount.memory import SPENT_BYTES
from amlmount.reader import WHOLE, FileReader
from tests.fetch_rig import Rig, rig

CONTENT = random.Random(3).randbytes(9 * MIB + 17)
ZEROS = bytes(256 * MIB)  # pages that are never touched cost nothing

SIZES = [1, 4096, WHOLE, WHOLE + 1, MIB, MIB + 1, 4 * MIB, len(CONTENT)]


def open_file(r: Rig, data: bytes, *, readers: int = 1, name: str = "data") -> FileReader:
    r.fake.reads.clear()
    return FileReader(r.add(name, data), r.fetcher, lambda: readers)


async def read(reader: FileReader, offset: int, length: int) -> bytes:
    """Read as the session does."""
    found = reader.begin(offset, length)
    reader.go_on()
    assert found is not None
    return b"".join(await reader.complete(found) if isinstance(found, list) else found)


async def at_once(*calls: Callable[[], object]) -> None:
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(call)  # type: ignore[arg-type]


reads = st.lists(
    st.tuples(
        st.one_of(
            st.integers(0, len(CONTENT) + 10),
            st.sampled_from([0, 256 * KIB, MIB, 4 * MIB, 8 * MIB, len(CONTENT)]).flatmap(
                lambda edge: st.integers(-3, 3).map(lambda by: max(0, edge + by))
            ),
        ),
        st.sampled_from([0, 1, 100, 4096, 128 * KIB, MIB, 5 * MIB]),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SIZES), reads, st.sampled_from([16 * MIB, 100 * MIB]), st.integers(1, 40), st.booleans()
)
async def test_any_reads_give_the_files_bytes(
    size: int, wanted: list[tuple[int, int]], budget: int, readers: int, together: bool
) -> None:
    data = CONTENT[:size]
    async with rig(budget=budget) as r:
        reader = open_file(r, data, readers=readers)

        async def one(offset: int, length: int) -> None:
            assert await read(reader, offset, length) == data[offset : offset + length]

        if together:
            await at_once(*(lambda o=o, n=n: one(o, n) for o, n in wanted))
        else:
            for offset, length in wanted:
                await one(offset, length)
        assert r.memory.used <= budget
        # Nothing outside the file is ever asked of the store.
        assert all(0 <= read.start < read.stop <= size for read in r.fake.reads)


@pytest.mark.parametrize("size", [1, 100_000, WHOLE])
async def test_a_small_file_is_one_request_whatever_is_read(size: int) -> None:
    async with rig(budget=16 * MIB) as r:
        reader = open_file(r, CONTENT[:size])
        assert not reader.is_large
        for offset in (size // 2, 0, size - 1):
            assert await read(reader, offset, 10) == CONTENT[:size][offset : offset + 10]
        assert [(read.start, read.stop) for read in r.fake.reads] == [(0, size)]


async def test_reads_at_and_past_the_end() -> None:
    async with rig(budget=16 * MIB) as r:
        for size in (0, 10, 2 * MIB):
            reader = open_file(r, CONTENT[:size], name=f"f{size}")
            assert await read(reader, size, 100) == b""
            assert await read(reader, size + 100, 100) == b""
            assert r.fake.reads == []
            assert await read(reader, max(0, size - 5), 100) == CONTENT[:size][-5:]


@pytest.mark.parametrize("step", [16 * KIB, 128 * KIB, MIB])
async def test_a_sequential_reader_finds_the_file_ahead_of_it_and_fetches_no_byte_twice(step: int) -> None:
    async with rig(connections=8, budget=200 * MIB) as r:
        reader = open_file(r, CONTENT)
        for number, offset in enumerate(range(0, len(CONTENT), step)):
            assert await read(reader, offset, step) == CONTENT[offset : offset + step]
            if number == 3:
                # It is taken for a reader of the whole file by now.
                assert r.counters.prefetched > 0
        await r.landed()
        assert sorted((x.start, x.stop) for x in r.fake.reads) == list(
            map(tuple, blocks_over(0, len(CONTENT), len(CONTENT)))
        )
        assert r.counters.bytes_fetched == len(CONTENT)
        assert r.counters.prefetch_wasted == 0


async def test_several_sequential_readers_share_what_is_fetched() -> None:
    async with rig(connections=8, budget=200 * MIB) as r:
        reader = open_file(r, CONTENT, readers=3)

        async def one() -> None:
            for offset in range(0, len(CONTENT), 128 * KIB):
                assert await read(reader, offset, 128 * KIB) == CONTENT[offset : offset + 128 * KIB]

        await at_once(one, one, one)
        await r.landed()
        assert r.counters.bytes_fetched == len(CONTENT)


async def test_a_sequential_reader_with_little_memory_fetches_no_byte_twice() -> None:
    async with rig(budget=4 * BLOCK_SIZE) as r:
        data = ZEROS[: 40 * MIB]
        reader = open_file(r, data)
        for offset in range(0, len(data), 128 * KIB):
            assert len(await read(reader, offset, 128 * KIB)) == 128 * KIB
        await r.landed()
        assert r.counters.bytes_fetched == len(data)
        assert r.memory.peak <= 4 * BLOCK_SIZE


async def test_a_reader_from_the_middle_wastes_little_and_earns_whole_blocks() -> None:
    async with rig(connections=8, budget=200 * MIB) as r:
        reader = open_file(r, ZEROS)
        start, stop = 100 * MIB + 4096, 130 * MIB
        for offset in range(start, stop, 128 * KIB):
            await read(reader, offset, min(128 * KIB, stop - offset))
        await r.landed()
        assert r.counters.bytes_fetched <= 2 * (stop - start) + BLOCK_SIZE  # whole blocks
        assert max(read.length for read in r.fake.reads) == BLOCK_SIZE
        assert len(r.fake.reads) < (stop - start) // (128 * KIB)


@pytest.mark.parametrize("readers", [1, 16])
async def test_random_reads_of_4_kib_are_one_exact_range_each(readers: int) -> None:
    async with rig(connections=8, budget=100 * MIB) as r:
        reader = open_file(r, ZEROS, readers=readers)
        offsets = random.Random(4).sample(range(1, len(ZEROS) // 4096), 400)

        async def some(mine: list[int]) -> None:
            for page in mine:
                assert len(await read(reader, page * 4096, 4096)) == 4096

        await at_once(*(lambda n=n: some(offsets[n::readers]) for n in range(readers)))
        await r.landed()
        wanted = sorted((page * 4096, page * 4096 + 4096) for page in offsets)
        assert sorted((read.start, read.stop) for read in r.fake.reads) == wanted


@pytest.mark.parametrize("pieces", [1, 2, 8, 9])
@pytest.mark.parametrize("aligned", [True, False])
async def test_random_reads_of_1_mib_fetch_at_most_twice_what_is_asked(pieces: int, aligned: bool) -> None:
    # Kernel read-ahead cuts a read of 1 MiB into up to 9 requests in a row.
    readers, rng = 8, random.Random(5)
    async with rig(connections=8, budget=200 * MIB) as r:
        reader = open_file(r, ZEROS, readers=readers)

        async def some(offsets: list[int]) -> None:
            for offset in offsets:
                edges = [offset + MIB * n // pieces for n in range(pieces + 1)]
                for start, stop in itertools.pairwise(edges):
                    assert len(await read(reader, start, stop - start)) == stop - start

        def place() -> int:
            return (
                rng.randrange(1, len(ZEROS) // MIB - 1) * MIB if aligned else rng.randrange(len(ZEROS) - MIB)
            )

        asked = [[place() for _ in range(6)] for _ in range(readers)]
        await at_once(*(lambda o=o: some(o) for o in asked))
        await r.landed()
        assert r.counters.bytes_fetched <= 2 * MIB * 6 * readers


async def test_an_error_reaches_the_read_and_the_file_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amlmount.fetch.FAILED_FOR_S", -1)
    async with rig(budget=16 * MIB) as r:
        reader = open_file(r, CONTENT)
        r.fake.fail(ObjectChanged("overwritten"))
        with pytest.raises(ObjectChanged):
            await read(reader, 0, 100)
        assert await read(reader, 0, 100) == CONTENT[:100]
        r.fake.delete("data")
        r.fake.fail(StoreUnreachable("gone"), times=None)
        assert await read(reader, 50, 100) == CONTENT[50:150]  # in memory
        with pytest.raises(StoreUnreachable):
            await read(reader, 8 * MIB, 100)


async def test_a_read_over_several_blocks_has_them_under_way_together() -> None:
    async with rig(connections=8, budget=100 * MIB) as r:
        reader = open_file(r, CONTENT)
        with r.fake.held():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, reader, 0, len(CONTENT))
                await r.store_has(5)
                r.fake._open.set()
        assert r.fake.peak == 5


# What is in memory ---------------------------------------------------------------------------------------------


async def test_what_is_in_memory_is_answered_without_a_wait_or_a_copy() -> None:
    async with rig(connections=8, budget=100 * MIB) as r:
        reader = open_file(r, CONTENT)
        assert isinstance(reader.begin(0, len(CONTENT)), list)
        await r.landed()
        found = reader.begin(MIB - 10, 4 * MIB)
        assert isinstance(found, tuple)
        assert [len(piece) for piece in found] == [10, 3 * MIB, MIB - 10]
        assert b"".join(found) == CONTENT[MIB - 10 : 5 * MIB - 10]
        held = r.fetcher.take(reader.file.key(block_at(2 * MIB, len(CONTENT))))
        assert isinstance(found[1], memoryview)
        assert found[1].obj is held.obj


async def test_a_read_that_finds_one_block_in_memory_and_one_not_waits_for_that() -> None:
    async with rig(connections=8, budget=100 * MIB) as r:
        reader = open_file(r, CONTENT)
        await read(reader, 4 * MIB, 10)
        r.fake.reads.clear()
        parts = reader.begin(4 * MIB - 5, 10)
        assert isinstance(parts, list)
        assert [tuple(part.part) for part in parts] == [(4 * MIB - 5, 4 * MIB), (4 * MIB, 4 * MIB + 5)]
        assert b"".join(await reader.complete(parts)) == CONTENT[4 * MIB - 5 : 4 * MIB + 5]
        assert [(x.start, x.stop) for x in r.fake.reads] == [(4 * MIB - 5, 4 * MIB)]


async def test_a_block_that_makes_room_is_not_the_next_one_of_the_same_read() -> None:
    """One reader has gone ahead; another re-reads the block that the first one's progress pushed out last."""
    async with rig(connections=8, budget=200 * MIB) as r:
        reader = open_file(r, ZEROS[: 64 * MIB])
        full = SPENT_BYTES // BLOCK_SIZE
        for number in range(1, full + 2):
            await read(reader, number * BLOCK_SIZE, BLOCK_SIZE)
        await r.landed()
        first, second = (reader.file.key(block_at(n * BLOCK_SIZE, 64 * MIB)) for n in (1, 2))
        assert not r.fetcher.holds(first)
        assert next(iter(r.memory._spent)) == second
        await r.fetcher.get(reader.file, block_at(BLOCK_SIZE, 64 * MIB))
        assert len(await read(reader, 2 * BLOCK_SIZE - 50, 100)) == 100


@pytest.mark.parametrize("size", [1, WHOLE, WHOLE + 1, len(CONTENT)])
async def test_a_file_fetched_ahead_is_there_when_it_is_begun(size: int) -> None:
    async with rig(budget=16 * MIB) as r:
        reader = open_file(r, CONTENT[:size])
        assert reader.ahead()
        await r.landed()
        assert [(x.start, x.stop) for x in r.fake.reads] == [tuple(block_at(0, size))]
        found = reader.begin(0, min(size, 256 * KIB))
        assert isinstance(found, tuple)
        assert b"".join(found) == CONTENT[: min(size, 256 * KIB)]
        assert (r.counters.prefetched, r.counters.prefetch_used) == (1, 1)


async def test_of_an_empty_file_nothing_is_fetched_ahead() -> None:
    async with rig(budget=16 * MIB) as r:
        reader = open_file(r, b"")
        assert reader.ahead()
        reader.give_up()
        assert reader.begin(0, 10) == (b"",)
        assert r.fake.reads == []


async def test_where_memory_ends_a_file_is_not_fetched_ahead() -> None:
    async with rig(budget=1000) as r:
        reader = open_file(r, CONTENT[:1001])
        assert not reader.ahead()
        assert r.fake.reads == []


async def test_a_file_given_up_leaves_the_memory_to_others() -> None:
    async with rig(budget=300) as r:
        readers = [open_file(r, CONTENT[:100], name=f"f{n}") for n in range(4)]
        assert [reader.ahead() for reader in readers[:3]] == [True] * 3
        await r.landed()
        assert not readers[3].ahead()
        readers[1].give_up()
        assert readers[3].ahead()
        await r.landed()
        assert [r.fetcher.holds(reader.file.key(block_at(0, 100))) for reader in readers] == [
            True, False, True, True,
        ]  # fmt: skip
        assert r.counters.prefetch_wasted == 1


async def test_ahead_of_a_large_file_nothing_is_fetched_until_the_read_is_answered() -> None:
    async with rig(connections=8, budget=200 * MIB) as r:
        reader = open_file(r, CONTENT)
        for offset in (0, 128 * KIB):
            await r.fetcher.get(reader.file, block_at(offset, len(CONTENT)))
            assert isinstance(reader.begin(offset, 128 * KIB), tuple)
            assert r.counters.prefetched == 0
        reader.go_on()
        assert r.counters.prefetched > 0
        prefetched = r.counters.prefetched
        reader.go_on()  # it was said already
        assert r.counters.prefetched == prefetched
