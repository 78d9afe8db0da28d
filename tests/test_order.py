"""What comes next, from the inodes that are opened."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from amlmount.order import JUMP, MAX_FILES, STARTS_AFTER, FileOrder


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
    assert fetched == list(range(102, 103 + 2 * 4 + 1))


@given(st.integers(2, 10**9), st.integers(STARTS_AFTER, 3000))
def test_nothing_is_fetched_twice_or_left_out_on_a_straight_pass(first: int, count: int) -> None:
    fetched = follow(FileOrder(), list(range(first, first + count)))
    assert fetched == list(range(fetched[0], fetched[-1] + 1))
    assert fetched[0] == first + STARTS_AFTER
    assert fetched[-1] - (first + count - 1) == min(2 * count, MAX_FILES)


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
