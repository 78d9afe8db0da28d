"""Which order is followed from file to file: a declared one, one that was learned, or the tree's; and how far."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable

import pytest
from structlog.testing import capture_logs

from amlmount import across
from amlmount.across import AT_ONCE, EVERY
from amlmount.course import START
from amlmount.epoch import Epoch
from amlmount.errors import UsageError
from amlmount.learned import AGAIN
from tests.desk_rig import DeskRig, desk_rig

FILES = {f"c{n // 50}/f{n:03d}": random.Random(n).randbytes(1000) for n in range(300)}
NAMES = sorted(FILES)


def shuffled(seed: int) -> list[str]:
    names = NAMES[:]
    random.Random(seed).shuffle(names)
    return names


def declare(r: DeskRig, names: Iterable[str], *, reader: str = "") -> int:
    inodes = array("I", [r.ino(name) for name in names])
    return r.desk.across.declare(Epoch(inodes, r.tree.inodes), reader=reader)


async def read_all(r: DeskRig, names: Iterable[str]) -> list[str]:
    """Read files in turn; return those that had not been fetched ahead."""
    late = []
    for name in names:
        before = r.counters.requests - r.counters.prefetched
        assert await r.read(name) == FILES[name]
        await r.rig.landed()
        late += [name] * (r.counters.requests - r.counters.prefetched - before)
    return late


async def test_a_declared_order_is_begun_before_anything_is_read() -> None:
    async with desk_rig(FILES) as r:
        order = shuffled(1)
        assert declare(r, order) == 1
        await r.rig.landed()
        assert sorted(r.paths_read()) == sorted(order[:AT_ONCE])
        assert r.desk.across.window_files == AT_ONCE
        for name in order[:8]:
            await r.read(name)
        await r.rig.landed()
        assert set(r.paths_read()) == set(order[: len(r.fake.reads)])
        assert len(r.fake.reads) <= START + 2 * 8


async def test_what_was_declared_is_fetched_ahead_each_file_once() -> None:
    async with desk_rig(FILES) as r:
        order = shuffled(2)
        declare(r, order)
        await r.rig.landed()
        assert await read_all(r, order) == []
        assert sorted(r.paths_read()) == NAMES
        assert (r.counters.prefetch_used, r.counters.prefetch_wasted) == (len(NAMES), 0)


async def test_one_order_goes_over_into_the_next() -> None:
    async with desk_rig(FILES, budget=100_000) as r:
        first, second = shuffled(3), shuffled(4)
        assert declare(r, first) == 1
        assert declare(r, second) == 2
        await r.rig.landed()
        await read_all(r, first)
        late = await read_all(r, second)
        assert second[0] not in late
        # What was read last is still in memory when it is its turn to be fetched, and may go before it is read again.
        assert len(late) < len(second) // 10


async def test_a_read_outside_what_was_declared_follows_the_tree() -> None:
    async with desk_rig(FILES) as r:
        declare(r, [name for name in shuffled(5) if name.startswith("c5/")])
        await r.rig.landed()
        late = await read_all(r, [name for name in NAMES if name.startswith("c1/")])
        assert len(late) <= 3


async def test_without_memory_less_is_fetched_ahead_and_every_byte_is_right() -> None:
    async with desk_rig(FILES, budget=5_000) as r:
        order = shuffled(6)
        declare(r, order)
        await r.rig.landed()
        assert len(r.fake.reads) == 5
        await read_all(r, order)
        assert r.counters.prefetch_used > len(NAMES) // 2


async def test_files_that_nobody_came_for_leave_the_memory_to_others() -> None:
    async with desk_rig(FILES, budget=40_000) as r:
        order = shuffled(7)
        declare(r, order)
        await r.rig.landed()
        used = r.counters.prefetch_used
        # Another job reads everything in the tree's order, though memory is full of what was declared.
        for _ in range(20):
            for name in NAMES:
                assert await r.read(name) == FILES[name]
        await r.rig.landed()
        assert r.counters.prefetch_used > used + len(NAMES)


async def test_an_order_that_is_too_long_is_refused_and_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("amlmount.declared.MAX_BYTES", 100)
    async with desk_rig(FILES) as r:
        with pytest.raises(UsageError):
            declare(r, NAMES)
        assert r.fake.reads == []
        assert await read_all(r, NAMES[:20]) == NAMES[:2]


async def test_a_pass_is_learned_and_the_next_fetched_ahead() -> None:
    async with desk_rig(FILES, budget=100_000) as r:
        order = shuffled(8)
        assert r.desk.across.learn() == 0
        await read_all(r, order)
        assert r.desk.across.learn() == len(order)  # asked for again: it goes on
        for _ in range(3):
            late = await read_all(r, order)
            assert len(late) <= AGAIN + EVERY  # until it is seen that the pass has begun
            assert set(late) <= set(order[: 2 * AGAIN])


async def test_what_is_not_asked_for_is_not_learned() -> None:
    async with desk_rig(FILES, budget=20_000) as r:
        order = shuffled(9)
        await read_all(r, order)
        before = r.counters.prefetched
        await read_all(r, order)
        assert r.counters.prefetched - before < len(order) // 2  # those that come after each other by chance


async def test_a_pass_that_finds_no_room_costs_no_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amlmount.declared.MAX_BYTES", 100)
    async with desk_rig(FILES, budget=20_000) as r:
        r.desk.across.learn()
        order = shuffled(10)
        with capture_logs() as lines:
            await read_all(r, order)
            await read_all(r, order)
        assert [line["log_level"] for line in lines] in ([], ["error"])
        assert r.counters.read_errors == 0


async def test_a_look_is_taken_every_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    real = across.AcrossFiles._follow_declared

    def follow(self: across.AcrossFiles) -> None:
        nonlocal looks
        looks += 1
        real(self)

    monkeypatch.setattr(across.AcrossFiles, "_follow_declared", follow)
    async with desk_rig(FILES) as r:
        order = shuffled(11)
        declare(r, order)
        for name in order:
            await r.read(name)
        assert looks <= 1 + len(order) // EVERY
