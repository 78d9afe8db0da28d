"""The order of a pass, learned as it is read: where one ends and the next begins, whatever is read twice."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlmount import learned as learned_module
from amlmount.epoch import Epoch
from amlmount.learned import AGAIN, LearnedOrder

HIGHEST = 500
FILES = list(range(10, 410))

seeds = st.integers(0, 2**32 - 1).map(random.Random)


def shuffled(chance: random.Random) -> list[int]:
    order = FILES[:]
    chance.shuffle(order)
    return order


def passes(order: LearnedOrder, inodes: list[int]) -> list[tuple[Epoch, list[int], int]]:
    """Read files in turn; return what ended, how the next began, and at which read that was seen."""
    found = []
    for number, ino in enumerate(inodes):
        ended = order.observe(ino)
        if ended is not None:
            found.append((*ended, number))
    return found


@given(seeds, st.integers(2, 4))
def test_a_pass_ends_where_the_next_is_begun(chance: random.Random, count: int) -> None:
    orders = [shuffled(chance) for _ in range(count)]
    found = passes(LearnedOrder(HIGHEST), [ino for order in orders for ino in order])
    assert len(found) == count - 1
    for number, (epoch, begun, seen) in enumerate(found):
        assert list(epoch.inodes) == orders[number]
        assert begun == orders[number + 1][:AGAIN]
        assert seen == len(FILES) * (number + 1) + AGAIN - 1


@given(seeds)
def test_what_was_learned_can_be_looked_up(chance: random.Random) -> None:
    order = shuffled(chance)
    ((epoch, _, _),) = passes(LearnedOrder(HIGHEST), order + order[:AGAIN])
    assert epoch.left == len(order)
    for position, ino in enumerate(order):
        assert epoch.first(ino) == position
    assert all(epoch.first(ino) is None for ino in range(HIGHEST + 1) if ino not in order)


def test_a_pass_is_not_over_because_of_what_repeats_now_and_then() -> None:
    """A file of labels, read before each batch, or a file read in several pieces from its beginning."""
    order = LearnedOrder(HIGHEST)
    inodes = [ino for n, ino in enumerate(FILES) for ino in ([5, ino, ino] if n % 4 == 0 else [ino])]
    assert passes(order, inodes) == []
    assert order.files == len(FILES) + 1
    # Nor because of one file, however often it is read.
    assert passes(order, [7, *[FILES[3]] * 100, 8]) == []


@pytest.mark.parametrize("reads", [AGAIN - 1, AGAIN])
def test_how_many_must_be_read_again(reads: int) -> None:
    order = LearnedOrder(HIGHEST)
    found = passes(order, FILES + FILES[:reads] + [HIGHEST])
    assert len(found) == (reads == AGAIN)
    # Then they belong to the new pass, else to the old.
    assert order.files == (AGAIN + 1 if found else len(FILES) + 1)


def test_two_files_in_turn_are_a_pass_of_two() -> None:
    """As soon as reads are only of files that were read; a dataset so small needs no read-ahead, but no harm comes."""
    order = LearnedOrder(HIGHEST)
    found = passes(order, [10, 11] * 20)
    assert [list(epoch.inodes) for epoch, _, _ in found][:2] == [[10, 11], [10, 11]]


@given(st.lists(st.integers(1, 30), max_size=300))
def test_whatever_is_read_each_pass_holds_a_file_once(inodes: list[int]) -> None:
    order = LearnedOrder(30)
    for epoch, begun, _ in passes(order, inodes):
        assert len(set(epoch.inodes)) == len(epoch.inodes) > 0
        assert len(begun) == AGAIN
        assert set(epoch.inodes) <= set(inodes)
    assert order.files <= 30


def test_what_comes_after_the_most_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_module, "MAX_FILES", 100)
    order = LearnedOrder(HIGHEST)
    ((epoch, _, _),) = passes(order, FILES + FILES[:AGAIN])
    assert list(epoch.inodes) == FILES[:100]
    assert repr(order) == f"<LearnedOrder of {AGAIN} files>"


def test_nothing_is_there_before_anything_is_read() -> None:
    assert LearnedOrder(HIGHEST).files == 0
