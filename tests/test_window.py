"""The read windows: waste is bounded whatever the reads are, and sequential readers are found among others."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlmount.blocks import KIB, MIB
from amlmount.window import EXACT_UNTIL, JUMP, MAX_WINDOW, STREAMS, Advice, ReadWindow

BIG = 1 << 40
GIB = 1 << 30
OVER = 4
"""Times its own progress that a stream from a file's start may be ahead: the rule in the module's docstring."""


def sequential(window: ReadWindow, start: int, stop: int, step: int) -> list[Advice]:
    return [window.observe(at, min(step, stop - at)) for at in range(start, stop, step)]


reads = st.lists(
    st.tuples(
        st.one_of(st.integers(0, GIB), st.integers(0, 256).map(lambda n: n * 128 * KIB)),
        st.sampled_from([1, 4 * KIB, 128 * KIB, MIB]),
    ),
    max_size=60,
)


@given(reads, st.one_of(st.none(), st.integers(0, 64 * MIB)))
def test_whatever_is_read_the_advice_keeps_to_its_bounds(
    asked: list[tuple[int, int]], limit: int | None
) -> None:
    size = GIB + MIB
    window = ReadWindow(size)
    for offset, length in asked:
        advice = window.observe(offset, length, limit)
        stream = advice.stream
        if advice.ahead is not None:
            assert stream.position <= advice.ahead.start < advice.ahead.stop <= size
            ahead = advice.ahead.stop - stream.position
            assert ahead <= min(OVER * stream.run, MAX_WINDOW if limit is None else limit)
            assert stream.from_start or ahead <= stream.run
            assert advice.ahead.start >= offset
        assert 0 <= stream.position <= size
        # The start of a file is fetched in whole blocks; from its middle exactly, until a stream is long enough.
        assert advice.exact == (not stream.from_start and stream.run < EXACT_UNTIL)
    assert len(window._streams) <= STREAMS


@given(
    st.integers(1, BIG // 2),
    st.lists(st.sampled_from([4 * KIB, 64 * KIB, 128 * KIB, MIB]), min_size=1, max_size=80),
)
def test_a_stream_never_asks_twice_for_the_same_bytes(start: int, lengths: list[int]) -> None:
    window = ReadWindow(BIG)
    at, ahead = start, list[tuple[int, int]]()
    for length in lengths:
        advice = window.observe(at, length)
        at += length
        if advice.ahead is not None:
            ahead.append((advice.ahead.start, advice.ahead.stop))
            # At most as many bytes again as were read: fetched stays under twice what is asked.
            assert advice.ahead.stop - at <= at - start
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ahead))


def test_a_reader_from_the_start_grows_its_window_to_the_full() -> None:
    window = ReadWindow(BIG)
    advices = sequential(window, 0, 128 * MIB, 128 * KIB)
    assert advices[0].ahead is None  # one read says nothing yet
    assert advices[1].ahead is not None
    assert not any(advice.exact for advice in advices)
    last = [advice.ahead for advice in advices if advice.ahead is not None][-1]
    assert last.stop - 128 * MIB == MAX_WINDOW
    assert len(window._streams) == 1


def test_a_reader_from_the_middle_earns_whole_blocks() -> None:
    window = ReadWindow(BIG)
    advices = sequential(window, GIB, GIB + 2 * EXACT_UNTIL, 128 * KIB)
    exact = [advice.exact for advice in advices]
    assert exact == sorted(exact, reverse=True)
    assert exact.count(True) == EXACT_UNTIL // (128 * KIB) - 1
    assert advices[0].ahead is None


def test_the_end_of_the_file_ends_the_window() -> None:
    size = 3 * MIB + 17
    window = ReadWindow(size)
    advices = sequential(window, 0, size, 256 * KIB)
    ends = [advice.ahead.stop for advice in advices if advice.ahead is not None]
    assert max(ends) == size
    assert advices[-1].ahead is None


def test_scattered_reads_fetch_nothing_ahead() -> None:
    window = ReadWindow(BIG)
    for number in range(100):
        advice = window.observe(GIB + number * 7 * MIB, 4 * KIB)
        assert advice.exact
        assert advice.ahead is None


def test_a_random_read_of_1_mib_in_pieces_is_not_taken_for_a_sequential_reader() -> None:
    window = ReadWindow(BIG)
    asked = ahead = 0
    for number in range(1, 50):
        for piece in range(8):
            advice = window.observe(number * GIB + piece * 128 * KIB, 128 * KIB)
            assert advice.exact
            asked += 128 * KIB
            ahead += 0 if advice.ahead is None else advice.ahead.length
    assert asked + ahead <= 2 * asked


def test_interleaved_readers_are_told_apart() -> None:
    window = ReadWindow(BIG)
    starts = [number * GIB for number in range(STREAMS)]
    streams: dict[int, set[int]] = {start: set() for start in starts}
    for step in range(64):
        for start in starts:
            streams[start].add(id(window.observe(start + step * 128 * KIB, 128 * KIB).stream))
    assert all(len(seen) == 1 for seen in streams.values())
    assert len(window._streams) == STREAMS


def test_the_reader_that_paused_longest_is_forgotten_first() -> None:
    window = ReadWindow(BIG)
    first = window.observe(GIB, MIB).stream
    others = [window.observe((2 + n) * GIB, MIB).stream for n in range(STREAMS - 1)]
    assert window.observe(GIB + MIB, MIB).stream is first  # it reads again, so another is oldest now
    window.observe(1000 * GIB, MIB)
    assert first in window._streams
    assert others[0] not in window._streams


@pytest.mark.parametrize("by", [-JUMP, -128 * KIB, 128 * KIB, JUMP])
def test_the_jumps_of_kernel_read_ahead_continue_a_stream(by: int) -> None:
    window = ReadWindow(BIG)
    stream = sequential(window, GIB, GIB + 8 * MIB, 128 * KIB)[-1].stream
    assert window.observe(GIB + 8 * MIB + by, 128 * KIB).stream is stream


@pytest.mark.parametrize("by", [-2 * JUMP, 2 * JUMP, GIB])
def test_a_seek_begins_another_stream(by: int) -> None:
    window = ReadWindow(BIG)
    stream = sequential(window, GIB, GIB + 8 * MIB, 128 * KIB)[-1].stream
    assert window.observe(GIB + 8 * MIB + by, 128 * KIB).stream is not stream


def test_reads_out_of_order_count_their_bytes_once() -> None:
    window = ReadWindow(BIG)
    window.observe(0, 128 * KIB)
    window.observe(256 * KIB, 128 * KIB)
    advice = window.observe(128 * KIB, 128 * KIB)  # the one that was overtaken
    assert advice.ahead is None
    assert advice.stream.position == 384 * KIB
    assert advice.stream.run <= 384 * KIB


def test_a_share_of_memory_limits_the_window() -> None:
    window = ReadWindow(BIG)
    for at in range(0, 64 * MIB, MIB):
        advice = window.observe(at, MIB, limit=3 * MIB)
        assert advice.ahead is None or advice.ahead.stop - (at + MIB) <= 3 * MIB


def test_bytes_that_could_not_be_fetched_ahead_are_advised_again() -> None:
    window = ReadWindow(BIG)
    window.observe(0, MIB)
    advice = window.observe(MIB, MIB)
    assert advice.ahead is not None
    advice.stream.ahead = advice.ahead.start  # the reader found no memory for it
    again = window.observe(2 * MIB, MIB)
    assert again.ahead is not None
    assert again.ahead.start == max(advice.ahead.start, 3 * MIB)
