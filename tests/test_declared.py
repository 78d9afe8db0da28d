"""What is fetched ahead of a declared order, for readers of all kinds: in turn, in workers, skipping, or not at all."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from amlmount.course import FLOOR, GROWTH, MAX_FILES, MIN_LAG, START
from amlmount.declared import IDLE, MAX_QUEUED, READERS, DeclaredOrder
from amlmount.epoch import MAX_BYTES, Epoch, pack, unpack
from amlmount.errors import UsageError

seeds = st.integers(0, 2**32 - 1).map(random.Random)

FIRST = 7
"""The first file's inode: folders come before it."""


def epoch(inodes: Iterable[int], highest: int = 100_000) -> Epoch:
    return Epoch(array("I", inodes), highest)


def shuffled(count: int, seed: int = 0) -> list[int]:
    inodes = list(range(FIRST, FIRST + count))
    random.Random(seed).shuffle(inodes)
    return inodes


class Rig:
    """A mount without bytes: what is fetched ahead is in memory at once, until it is read or given up."""

    def __init__(self, *epochs: Sequence[int], room: int = 1 << 30, keeps: int = 0) -> None:
        self.order = DeclaredOrder()
        self.page_cache: set[int] = set()
        self.recent: deque[int] = deque()
        self.keeps = keeps
        """Files read last that the page cache keeps."""
        self.room = room
        self.memory: dict[int, None] = {}
        self.fetched: list[int] = []
        self.begun = 0
        """Files that programs began to read, by whatever way."""
        self.reads = 0
        """Those that were a request."""
        self.in_time = 0
        self.wasted = 0
        for inodes in epochs:
            self.declare(inodes)

    def declare(self, inodes: Sequence[int], reader: str = "", keep: int | None = None) -> int:
        queued = self.order.declare(epoch(inodes), reader=reader, keep=keep)
        self.fetch()
        return queued

    def read(self, ino: int) -> bool:
        """Read a file as a program does: what the page cache holds is no request."""
        self.begun += 1
        if ino in self.page_cache:
            return True
        self.reads += 1
        if ino in self.memory:
            del self.memory[ino]
            self.in_time += 1
        followed = self.order.reached(ino)
        self.fetch()
        if self.keeps:
            self.page_cache.add(ino)
            self.recent.append(ino)
            if len(self.recent) > self.keeps:
                self.page_cache.discard(self.recent.popleft())
        return followed

    def read_all(self, inodes: Iterable[int]) -> None:
        for ino in inodes:
            self.read(ino)

    def fetch(self, at_once: int = 16) -> None:
        for ino in self.order.given_up():
            if self.memory.pop(ino, ino) is None:
                self.wasted += 1
        while wanted := self.order.wanted(at_once):
            assert len(wanted) <= at_once
            room = max(0, self.room - len(self.memory))
            self.order.fetched(min(room, len(wanted)))
            self.fetched += wanted[:room]
            self.memory.update(dict.fromkeys(wanted[:room]))
            if room < len(wanted):
                break

    @property
    def share(self) -> float:
        """The part of the reads that found their file fetched."""
        return self.in_time / self.reads


def workers(order: Sequence[int], count: int, batch: int, rng: random.Random) -> Iterator[int]:
    """Yield the files as the workers of a data loader begin them: each has two batches, and takes its time."""
    batches = [order[at : at + batch] for at in range(0, len(order), batch)]
    hands: list[list[int]] = [[] for _ in range(count)]
    given = 0
    done = [0] * len(batches)
    first = 0  # batches are handed out in turn, while no more than two a worker are under way
    while first < len(batches):
        while given < len(batches) and given < first + 2 * count:
            hands[given % count] += [given] * len(batches[given])
            given += 1
        hand = rng.choice([hand for hand in hands if hand])
        number = hand.pop(0)
        yield batches[number][done[number]]
        done[number] += 1
        while first < len(batches) and done[first] == len(batches[first]):
            first += 1


# One order, read as declared ---------------------------------------------------------------------------------


def test_the_first_files_are_fetched_on_declaration() -> None:
    rig = Rig(shuffled(1000))
    assert rig.fetched == shuffled(1000)[:START]


@pytest.mark.parametrize("count", [1, START, 5000])
def test_one_reader_finds_every_file_fetched_and_none_is_fetched_twice(count: int) -> None:
    inodes = shuffled(count)
    rig = Rig(inodes)
    rig.read_all(inodes)
    assert rig.share == 1
    assert rig.fetched == inodes
    assert not rig.order.reached(inodes[0])  # it is over


def test_the_window_grows_with_use_to_its_limit() -> None:
    inodes = shuffled(20_000)
    rig = Rig(inodes)
    for number, ino in enumerate(inodes[:4000], 1):
        rig.read(ino)
        assert len(rig.memory) == min(START + GROWTH * number, MAX_FILES)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 64), seeds)
def test_workers_with_batches_find_their_files_fetched(count: int, batch: int, rng: random.Random) -> None:
    inodes = shuffled(4000)
    rig = Rig(inodes)
    rig.read_all(workers(inodes, count, batch, rng))
    assert rig.reads == 4000
    assert rig.wasted < 40  # where one worker is far slower than any was before
    assert len(rig.fetched) == len(set(rig.fetched))
    # At the start each worker is at another place, and the window is a batch or two.
    assert rig.reads - rig.in_time <= 2 * count * batch


def test_many_workers_with_large_batches() -> None:
    inodes = shuffled(60_000)
    rig = Rig(inodes)
    rig.read_all(workers(inodes, 16, 256, random.Random(1)))
    assert rig.share > 0.8
    assert rig.wasted < 3000


def test_where_memory_ends_fetching_goes_on_when_there_is_room() -> None:
    inodes = shuffled(3000)
    rig = Rig(inodes, room=10)
    rig.read_all(inodes)
    assert rig.share == 1
    assert rig.fetched == inodes


# Skips and repeats -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
# Once, what was fetched lay behind all readers, and stayed there.
@example(0.5625, 4, random.Random(11397))
@given(st.floats(0, 0.6), st.integers(1, 6), seeds)
def test_files_in_the_page_cache_are_like_skips(held: float, count: int, rng: random.Random) -> None:
    inodes = shuffled(8000)
    rig = Rig(inodes)
    rig.page_cache = {ino for ino in inodes if rng.random() < held}
    rig.read_all(workers(inodes, count, 32, rng))
    assert rig.share > 0.9
    bounds(rig)


def bounds(rig: Rig) -> None:
    """Check what is promised of waste; at the floor, a few files are tried for each lag of the front."""
    assert len(rig.fetched) == len(set(rig.fetched)) == rig.in_time + rig.wasted + len(rig.memory)
    assert rig.wasted + len(rig.memory) <= START + GROWTH * rig.in_time + FLOOR * (1 + rig.begun // MIN_LAG)


def test_all_in_the_page_cache_costs_what_was_fetched_before_anybody_read() -> None:
    inodes = shuffled(5000)
    rig = Rig(inodes)
    rig.page_cache = set(inodes)
    rig.read_all(inodes)
    assert len(rig.fetched) == START


def test_little_is_fetched_where_the_page_cache_has_nine_in_ten() -> None:
    inodes = shuffled(50_000)
    rig = Rig(inodes)
    rig.page_cache = {ino for number, ino in enumerate(inodes) if number % 10}
    rig.read_all(inodes)
    assert len(rig.fetched) < 50_000 / 10


def test_what_was_of_no_use_is_tried_again_and_found_of_use() -> None:
    """The page cache has the first half; a window that fell to its floor grows again."""
    inodes = shuffled(20_000)
    rig = Rig(inodes)
    rig.page_cache = {ino for number, ino in enumerate(inodes) if number < 10_000 and number % 10}
    rig.read_all(inodes[:10_000])
    assert len(rig.memory) <= 2 * FLOOR
    bounds(rig)
    rig.in_time = rig.reads = 0
    rig.read_all(inodes[10_000:])
    assert rig.share > 0.99


def test_a_long_run_in_the_page_cache_is_jumped_over() -> None:
    inodes = shuffled(50_000)
    rig = Rig(inodes)
    rig.page_cache = set(inodes[1000:40_000])
    rig.read_all(inodes)
    assert rig.share > 0.99
    bounds(rig)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.sampled_from([2000, 20_000]), seeds)
def test_files_that_repeat(hands: int, count: int, rng: random.Random) -> None:
    """Draws with replacement; the page cache keeps what was read last."""
    inodes = rng.choices(shuffled(count), k=10_000)
    rig = Rig(inodes, keeps=5000)
    rig.read_all(workers(inodes, hands, 16, rng))
    assert rig.share > 0.95
    assert rig.wasted < GROWTH * rig.in_time


def test_a_repeat_is_fetched_again_once_the_first_was_read() -> None:
    inodes = [*range(10, 90), 10, *range(90, 99)]
    rig = Rig(inodes)
    assert rig.fetched.count(10) == 1
    rig.read_all(inodes)
    assert rig.fetched == inodes


# Wrong orders ------------------------------------------------------------------------------------------------


def test_reads_of_other_files_fetch_nothing_more() -> None:
    rig = Rig(shuffled(1000))
    rig.read_all(range(5000, 20_000))
    assert len(rig.fetched) == START
    assert not rig.memory  # it went to those that read


@pytest.mark.parametrize("count", [20_000, 90_000])
def test_reads_in_another_order_fetch_little(count: int) -> None:
    rig = Rig(shuffled(count, 1))
    rig.read_all(shuffled(count, 2))
    assert len(rig.fetched) < count / 20
    followed = sum(map(rig.read, shuffled(count, 3)))
    assert followed < count / 8


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 40), seeds)
def test_whatever_is_read_waste_is_bounded(count: int, run: int, rng: random.Random) -> None:
    """Runs of the order from anywhere, in any order."""
    inodes = shuffled(count)
    rig = Rig(inodes)
    for _ in range(100):
        at = rng.randrange(count)
        rig.read_all(inodes[at : at + run])
        assert len(rig.memory) <= START + GROWTH * rig.in_time + FLOOR
    assert len(rig.fetched) <= START + (1 + GROWTH) * rig.in_time + 2 * FLOOR * rig.reads


def test_a_stray_read_changes_nothing() -> None:
    inodes = shuffled(50_000)
    rig = Rig(inodes)
    rng = random.Random(5)
    for ino in inodes[:30_000]:
        rig.read(ino)
        if rng.random() < 0.01:
            rig.read(rng.choice(inodes))
    assert rig.share > 0.98


def test_what_was_given_up_is_told_once() -> None:
    inodes = shuffled(30_000)
    rig = Rig(inodes)
    told: list[int] = []
    for ino in inodes[::3]:
        rig.order.reached(ino)
        told += rig.order.given_up()
        rig.order.wanted(16)
        rig.order.fetched(16)
    assert told
    assert len(told) == len(set(told))
    assert not set(told) & set(inodes[::3])


# Several epochs ----------------------------------------------------------------------------------------------


def test_fetching_goes_on_into_an_epoch_declared_early() -> None:
    first, second = shuffled(20_000, 1), shuffled(20_000, 2)
    rig = Rig(first, keeps=5000)
    rig.read_all(first[:19_000])
    assert rig.declare(second) == 2
    rig.read_all(first[19_000:])
    assert len(rig.memory) == MAX_FILES
    rig.read_all(second)
    assert rig.share == 1
    assert rig.wasted < 0.25 * 20_000  # what the page cache had of them


def test_without_one_it_ends_and_begins_again_when_it_is_declared() -> None:
    first, second = shuffled(3000, 1), shuffled(3000, 2)
    rig = Rig(first)
    rig.read_all(first)
    assert len(rig.fetched) == 3000
    assert rig.declare(second) == 1
    assert rig.fetched[3000:] == second  # the window is what the first epoch made it
    rig.read_all(second)
    assert rig.share == 1


@pytest.mark.parametrize("left", [5, 500, 5000, 19_990])
def test_an_epoch_that_is_left_early_is_followed_by_the_next(left: int) -> None:
    first, second, third = (shuffled(20_000, number) for number in range(3))
    rig = Rig(first, second, keeps=5000)
    rig.read_all(first[: 20_000 - left])
    rig.in_time = rig.reads = 0
    rig.read_all(second[:10_000])
    assert rig.share > 0.95
    assert rig.declare(third, keep=0) == 1
    rig.in_time = rig.reads = 0
    rig.read_all(third)
    assert rig.share > 0.99


def test_starting_anew_drops_what_was_declared() -> None:
    rig = Rig(shuffled(3000, 1), shuffled(3000, 2))
    last = list(range(20_000, 21_000))
    assert rig.declare(last, keep=0) == 1
    assert rig.wasted == START
    assert rig.fetched[START : START + FLOOR] == last[:FLOOR]
    rig.read_all(last)
    assert rig.share == 1


def test_keeping_one_is_to_declare_the_next_while_this_one_runs() -> None:
    rig = Rig()
    for number in range(3 * MAX_QUEUED):  # none of them is ever seen to be read: the page cache has it all
        assert rig.declare(shuffled(100, number), keep=1) == min(2, number + 1)


def test_too_many_epochs_and_too_long_ones() -> None:
    rig = Rig(*[shuffled(10)] * MAX_QUEUED)
    with pytest.raises(UsageError, match="8 declared"):
        rig.declare([FIRST])
    assert rig.declare([FIRST], reader="another") == 1
    with pytest.raises(UsageError, match="too long"):
        epoch([1], MAX_BYTES)
    for wrong in ([0], [11], [5, 2**32 - 1]):
        with pytest.raises(UsageError, match="has not"):
            epoch(wrong, 10)


def test_an_empty_epoch_is_none() -> None:
    rig = Rig()
    assert rig.declare([]) == 0
    assert rig.order.wanted(10) == []
    assert not rig.read(5)


# Several readers ---------------------------------------------------------------------------------------------


def test_ranks_each_follow_their_own_order() -> None:
    inodes = shuffled(16_000)
    ranks = [inodes[rank::8] for rank in range(8)]
    rig = Rig()
    for rank, part in enumerate(ranks):
        rig.declare(part, f"rank {rank}")
    rng = random.Random(3)
    places = [workers(part, 2, 16, rng) for part in ranks]
    for _ in range(2000):
        for place in places:
            rig.read(next(place))
    assert rig.share > 0.95
    assert rig.wasted == 0


def test_two_jobs_read_the_same_files_in_their_own_orders() -> None:
    one, other = shuffled(80_000, 1), shuffled(80_000, 2)
    rig = Rig(keeps=20_000)
    rig.declare(one, "one")
    rig.declare(other, "other")
    for pair in zip(one[:30_000], other[:30_000], strict=True):
        rig.read_all(pair)
    assert rig.share > 0.98


def test_who_does_not_read_leaves_the_memory_to_others() -> None:
    inodes = shuffled(20_000)
    rig = Rig(inodes)
    rig.read_all(inodes[:2000])
    ahead = len(rig.memory)
    assert ahead == START + GROWTH * 2000
    rig.read_all(range(50_000, 50_000 + IDLE + 1))
    assert not rig.memory
    # One read wakes it.
    rig.read(inodes[2000])
    assert len(rig.memory) == ahead
    rig.in_time = rig.reads = 0
    rig.read_all(inodes[2001:])
    assert rig.share == 1


def test_readers_that_were_idle_longest_are_forgotten() -> None:
    rig = Rig()
    for number in range(READERS + 1):
        rig.declare([1000 + number], f"reader {number}")
    assert not rig.read(1000)
    assert rig.read(1001)


def test_orders_that_take_too_much_memory_push_out_the_oldest() -> None:
    order = DeclaredOrder()
    highest = MAX_BYTES // 4 // 3
    for reader in "abcd":
        order.declare(Epoch(array("I", [ord(reader)]), highest), reader=reader)
    assert [order.reached(ord(reader)) for reader in "abcd"] == [False, False, True, True]
    for _ in range(2):
        order.declare(Epoch(array("I", [5]), highest), reader="d")
    with pytest.raises(UsageError, match="no room"):
        order.declare(Epoch(array("I", [5]), highest), reader="d")


# Whatever happens --------------------------------------------------------------------------------------------

actions = st.one_of(
    st.tuples(st.just("read"), st.integers(1, 60)),
    st.tuples(st.just("follow"), st.integers(0, 5)),
    st.tuples(st.just("declare"), st.lists(st.integers(1, 50), max_size=80), st.sampled_from(["", "x"])),
    st.tuples(st.just("fetch"), st.integers(0, 9), st.integers(0, 9)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(actions, max_size=60), st.sampled_from([None, 0, 1]))
def test_any_calls_in_any_order(calls: list[tuple[object, ...]], keep: int | None) -> None:
    order = DeclaredOrder()
    declared: set[int] = set()
    wanted: list[int] = []
    for call in calls:
        match call:
            case ("read", int(ino)):
                assert order.reached(ino) <= (ino in declared)
            case ("follow", int(number)):
                if number < len(wanted):
                    order.reached(wanted[number])
            case ("declare", list(inodes), str(reader)):
                try:
                    order.declare(Epoch(array("I", inodes), 60), reader=reader, keep=keep)
                except UsageError:
                    assert keep is None
                declared |= set(inodes)
            case ("fetch", int(limit), int(count)):
                wanted = list(order.wanted(limit))
                assert len(wanted) <= limit
                assert set(wanted) <= declared
                order.fetched(count)
                assert set(order.given_up()) <= declared


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_the_wire_form_is_little_endian(inodes: list[int]) -> None:
    body = pack(array("I", inodes))
    assert body == b"".join(ino.to_bytes(4, "little") for ino in inodes)
    assert unpack(body).tolist() == inodes


def test_half_an_inode_is_refused() -> None:
    with pytest.raises(UsageError):
        unpack(b"12345")
