"""What comes next, from the inodes that are opened."""

from __future__ import annotations

import random
from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from amlmount.order import DENSITY, JUMP, MAX_FILES, STARTS_AFTER, STREAMS, TOGETHER, FileOrder


def follow(order: FileOrder, inodes: list[int]) -> list[int]:
    """Open files in turn and fetch all that is wanted; return what was fetched."""
    fetched: list[int] = []
    for ino in inodes:
        stream = order.observe(ino)
        wanted = stream.wanted()
        fetched.extend(wanted)
        if wanted:
            stream.ahead = wanted.stop
    return fetched


def test_one_open_fetches_nothing() -> None:
    assert follow(FileOrder(), [100]) == []


def test_opens_in_order_are_followed_by_what_comes_next() -> None:
    fetched = follow(FileOrder(), [100, 101, 102, 103])
    assert fetched[:3] == [102, 103, 104]
    assert fetched == list(range(102, 103 + 2 * 4 + 1))  # twice as many as were opened


@given(st.integers(2, 10**9), st.integers(STARTS_AFTER, 3000))
def test_nothing_is_fetched_twice_or_left_out_on_a_straight_pass(first: int, count: int) -> None:
    fetched = follow(FileOrder(), list(range(first, first + count)))
    assert fetched == list(range(fetched[0], fetched[-1] + 1))
    assert fetched[0] == first + STARTS_AFTER
    window = min(2 * count, MAX_FILES)
    # Several are fetched together: the window is full but for fewer than that.
    assert window - min(TOGETHER, window // 4) < fetched[-1] - (first + count - 1) <= window


@given(st.lists(st.integers(2, 10**6), min_size=1, max_size=200))
def test_never_more_ahead_than_twice_what_was_opened(inodes: list[int]) -> None:
    order = FileOrder()
    for number, ino in enumerate(inodes, 1):
        stream = order.observe(ino)
        assert len(stream.wanted()) <= 2 * number
        assert all(wanted > stream.position for wanted in stream.wanted())


@given(st.integers(1, 8))
def test_workers_that_share_a_pass_are_one_stream(workers: int) -> None:
    """Each of a few workers opens every n-th batch of four; together they go through all files."""
    order = FileOrder()
    batches = [list(range(start, start + 4)) for start in range(10, 10 + 4 * 64, 4)]
    turns = [batches[k::workers] for k in range(workers)]
    opened = [ino for row in zip(*turns, strict=False) for step in zip(*row, strict=True) for ino in step]
    follow(order, opened)
    assert repr(order) == "<FileOrder 1 streams>"


def test_random_opens_near_each_other_fetch_nothing() -> None:
    opened = [1000, 1040, 1013, 1090, 1050, 1140, 1100, 1190, 1150, 1240]
    assert follow(FileOrder(), opened) == []


def test_opens_all_over_the_tree_fetch_nothing() -> None:
    far = [1000 * JUMP * k for k in range(1, 200)]
    assert follow(FileOrder(), far) == []


def test_two_passes_in_different_places_do_not_disturb_each_other() -> None:
    order = FileOrder()
    interleaved = [ino for k in range(50) for ino in (1000 + k, 900_000 + k)]
    fetched = follow(order, interleaved)
    assert {ino for ino in fetched if ino < 10_000} >= set(range(1002, 1050))
    assert {ino for ino in fetched if ino > 10_000} >= set(range(900_002, 900_050))


def test_where_memory_ended_is_where_fetching_goes_on() -> None:
    order = FileOrder()
    order.observe(10)
    stream = order.observe(11)
    stream.ahead = stream.wanted()[1]
    assert order.observe(12).wanted().start == 13


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
def test_32_readers_that_take_every_32nd_file_are_one_stream(chance: random.Random) -> None:
    """Whichever is quicker or slower by two of its files, the files come as one pass and are fetched ahead."""
    readers, files = 32, 2000
    order = FileOrder()
    left = [deque(range(10 + k, 10 + files, readers)) for k in range(readers)]
    fetched: set[int] = set()
    late = opened = 0
    while any(left):
        slowest = min(mine[0] for mine in left if mine)
        may = [mine for mine in left if mine and mine[0] < slowest + JUMP]
        ino = chance.choice(may).popleft()
        stream = order.observe(ino)
        opened = stream.opened
        late += ino not in fetched
        wanted = stream.wanted()
        assert not fetched & set(wanted)
        fetched |= set(wanted)
        if wanted:
            stream.ahead = wanted.stop
    assert repr(order) == "<FileOrder 1 streams>"
    assert opened == files
    assert late <= 2 * JUMP + STARTS_AFTER  # those that were passed before anything was fetched


def test_a_file_read_again_is_no_progress() -> None:
    order = FileOrder()
    follow(order, list(range(100, 140)))
    stream = order.observe(139)
    opened = stream.opened
    for ino in (139, 138, 139, 120):
        assert order.observe(ino) is stream
    assert stream.opened == opened == 40
    for _ in range(4):  # and going back far is no order at all
        order.observe(139 - JUMP // 2 - 1)
    assert stream.opened == opened // 16


def test_what_another_reader_was_a_little_behind_with_counts_once() -> None:
    order = FileOrder()
    streams = [order.observe(ino) for ino in (100, 102, 101, 101, 101)]
    assert (streams[-1].position, streams[-1].opened) == (102, 3)


@given(st.lists(st.integers(1, 3 * JUMP), min_size=1, max_size=200))
def test_a_stream_counts_each_inode_once(inodes: list[int]) -> None:
    """While nothing is far apart: a model with sets."""
    order = FileOrder()
    stream = order.observe(inodes[0])
    position, opened, seen = inodes[0], 1, {inodes[0]}
    for ino in inodes[1:]:
        if abs(ino - position) > JUMP:
            break
        assert order.observe(ino) is stream
        if ino not in seen:
            opened += 1
        elif position - ino > JUMP // 2:
            opened = max(1, opened // 2)
        seen.add(ino)
        position = max(position, ino)
        assert (stream.position, stream.opened) == (position, opened)


def test_the_place_left_longest_ago_is_forgotten_first() -> None:
    order = FileOrder()
    places = [1_000_000 * (k + 1) for k in range(STREAMS)]
    for place in places:
        follow(order, [place, place + 1])
    follow(order, [places[0] + 2, 999, places[1] + 2])  # one more place than there is room for
    assert repr(order) == f"<FileOrder {STREAMS} streams>"
    assert order.observe(places[0] + 3).opened == 4
    assert order.observe(places[1] + 3).opened == 2


def test_a_pass_that_leaves_out_many_files_is_not_followed() -> None:
    sparse, dense = FileOrder(), FileOrder()
    for k in range(60):
        wanted = sparse.observe(100 + k * (DENSITY + 2)).wanted()
        assert k < DENSITY or not wanted
        wanted = dense.observe(100 + k * (DENSITY - 2)).wanted()
        assert k < STARTS_AFTER or wanted


def test_a_wide_window_is_filled_several_files_at_a_time() -> None:
    order = FileOrder()
    follow(order, list(range(1000, 1100)))
    asked = []
    for ino in range(1100, 1200):
        stream = order.observe(ino)
        wanted = stream.wanted()
        if wanted:
            asked.append(len(wanted))
            stream.ahead = wanted.stop
    assert asked
    assert min(asked) >= TOGETHER
    assert len(asked) * (TOGETHER - 4) < 300
