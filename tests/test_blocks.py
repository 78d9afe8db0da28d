"""The cut of files into blocks: every byte is in exactly one, and their names are content identities."""

from __future__ import annotations

import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlmount.blocks import (
    BLOCK_SIZE,
    KIB,
    MIB,
    WHOLE_FILE,
    BlockKey,
    ByteRange,
    block_at,
    blocks_over,
    object_digest,
)

EDGES = [0, 1, 256 * KIB, MIB, 4 * MIB, 8 * MIB, 12 * MIB, 1 << 40]
sizes = st.one_of(
    st.integers(1, 1 << 44),
    st.builds(lambda edge, by: max(1, edge + by), st.sampled_from(EDGES), st.integers(-2, 2)),
)


@given(sizes, st.data())
def test_the_block_of_an_offset_holds_it(size: int, data: st.DataObject) -> None:
    offset = data.draw(st.one_of(st.integers(0, size - 1), st.sampled_from([0, size - 1])))
    block = block_at(offset, size)
    assert 0 <= block.start <= offset < block.stop <= size
    assert block.length == block.stop - block.start <= BLOCK_SIZE
    assert block_at(block.start, size) == block_at(block.stop - 1, size) == block


@given(st.integers(1, 40 * MIB))
def test_the_blocks_of_a_file_cover_it_without_gap_or_overlap(size: int) -> None:
    blocks = list(blocks_over(0, size, size))
    assert blocks[0].start == 0
    assert blocks[-1].stop == size
    assert all(a.stop == b.start for a, b in itertools.pairwise(blocks))
    assert all(block.length == BLOCK_SIZE for block in blocks[3:-1])
    assert (len(blocks) == 1) == (size <= WHOLE_FILE)


@given(st.integers(1, 40 * MIB), st.integers(0, 41 * MIB), st.integers(0, 41 * MIB))
def test_the_blocks_over_a_range_are_those_that_touch_it(size: int, start: int, stop: int) -> None:
    wanted = [b for b in blocks_over(0, size, size) if b.start < min(stop, size) and b.stop > start]
    assert list(blocks_over(start, stop, size)) == (wanted if start < stop else [])


@pytest.mark.parametrize(
    ("size", "cuts"),
    [
        (1, [0, 1]),
        (MIB, [0, MIB]),
        (MIB + 1, [0, 256 * KIB, MIB, MIB + 1]),
        (4 * MIB, [0, 256 * KIB, MIB, 4 * MIB]),
        (9 * MIB, [0, 256 * KIB, MIB, 4 * MIB, 8 * MIB, 9 * MIB]),
    ],
)
def test_the_edges_are_the_documented_ones(size: int, cuts: list[int]) -> None:
    # Other edges would make every block on every cache disk a miss: raise cache.FORMAT with them.
    assert list(blocks_over(0, size, size)) == [ByteRange(a, b) for a, b in itertools.pairwise(cuts)]


@given(st.integers(0, 100), st.one_of(st.integers(-100, -1), st.integers(0, 100)))
def test_an_offset_outside_the_file_is_refused(size: int, by: int) -> None:
    with pytest.raises(ValueError, match="outside a file"):
        block_at(by if by < 0 else size + by, size)


names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
identities = st.tuples(names, names, names, names)


@given(identities, identities)
def test_object_digests_differ_when_anything_differs(
    one: tuple[str, str, str, str], other: tuple[str, str, str, str]
) -> None:
    assert (object_digest(*one) == object_digest(*other)) == (one == other)


@given(st.text("ab/", max_size=6), st.integers(0, 6), st.integers(0, 6))
def test_object_digests_know_where_a_field_ends(text: str, one: int, other: int) -> None:
    digests = {
        object_digest("s", text[:at], text[at:]) for at in (min(one, len(text)), min(other, len(text)))
    }
    assert len(digests) == len({min(one, len(text)), min(other, len(text))})


def test_an_object_digest_takes_names_that_are_not_utf8() -> None:
    assert len(object_digest("file:///", "/a\udcff", "1-2")) == 32


@given(st.binary(min_size=32, max_size=32), st.integers(0, 1 << 40), st.integers(1, BLOCK_SIZE))
def test_a_block_key_is_named_by_object_and_range(owner: bytes, start: int, length: int) -> None:
    key = BlockKey(owner, start, start + length)
    assert key.length == length
    assert key.digest() == hashlib.sha256(owner + f"{start}-{start + length}".encode()).digest()
