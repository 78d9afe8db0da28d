"""What waits to be written: bounded, small blocks in company, large ones alone, nothing for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlmount import behind
from amlmount.behind import PACK_BLOCKS, PACK_BYTES, Waiting, WriteQueue
from amlmount.blockfile import record_bytes
from amlmount.blocks import BlockKey

BELOW = 100_000


def block(number: int, size: int) -> Waiting:
    return BlockKey(number.to_bytes(32, "little"), 0, size), memoryview(bytes(size))


def numbers(taken: Sequence[Waiting] | None) -> list[int]:
    assert taken is not None
    return [int.from_bytes(key.object, "little") for key, _ in taken]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "LINGER_S", 3600)


sizes = st.one_of(st.integers(1, 3000), st.integers(1, BELOW - 1), st.integers(BELOW, 300_000))


@given(st.lists(sizes, max_size=120))
def test_every_block_is_taken_once_small_ones_in_packs(blocks: list[int]) -> None:
    queue = WriteQueue(1 << 30, BELOW)
    for number, size in enumerate(blocks):
        assert queue.put(*block(number, size))
    queue.close(0)
    seen: list[int] = []
    while (taken := queue.take()) is not None:
        large = [key for key, _ in taken if key.length >= BELOW]
        assert not large or len(taken) == 1
        assert len(taken) <= PACK_BLOCKS
        assert len(taken) == 1 or sum(record_bytes(key) for key, _ in taken) <= PACK_BYTES
        seen += numbers(taken)
        queue.written(sum(len(data) for _, data in taken))
    small = [number for number in seen if blocks[number] < BELOW]
    assert sorted(seen) == list(range(len(blocks)))
    assert small == sorted(small)  # those read after each other lie after each other
    assert repr(queue) == f"<WriteQueue 0 of {1 << 30} bytes>"


def test_what_does_not_fit_is_refused_until_something_is_written() -> None:
    queue = WriteQueue(250_000, BELOW)
    assert queue.put(*block(0, 120_000))
    assert queue.put(*block(1, 130_000))
    assert not queue.put(*block(2, 1))
    assert numbers(queue.take()) == [0]
    assert not queue.put(*block(2, 1))  # its memory is still in use
    queue.written(120_000)
    assert queue.put(*block(2, 1))


def test_a_large_block_does_not_wait_behind_small_ones() -> None:
    queue = WriteQueue(1 << 30, BELOW)
    queue.put(*block(0, 10))
    queue.put(*block(1, BELOW))
    assert numbers(queue.take()) == [1]


def test_small_blocks_wait_for_company_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "LINGER_S", 0.1)
    queue = WriteQueue(1 << 30, BELOW)
    began = time.monotonic()
    queue.put(*block(0, 10))
    queue.put(*block(1, 10))
    assert numbers(queue.take()) == [0, 1]
    assert time.monotonic() - began >= 0.1


@pytest.mark.parametrize(("size", "count"), [(50_000, PACK_BYTES // 50_064), (10, PACK_BLOCKS)])
def test_a_full_pack_does_not_wait(size: int, count: int) -> None:
    queue = WriteQueue(1 << 30, BELOW)
    for number in range(count + 1):
        queue.put(*block(number, size))
    assert numbers(queue.take()) == list(range(count))


def test_who_waits_is_woken_by_a_block_and_by_the_end() -> None:
    queue = WriteQueue(1 << 30, BELOW)
    taken: list[Sequence[Waiting] | None] = []

    def work() -> None:
        while True:
            blocks = queue.take()
            taken.append(blocks)
            if blocks is None:
                return
            queue.written(sum(len(data) for _, data in blocks))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    queue.put(*block(0, BELOW))
    queue.put(*block(1, 10))
    queue.close(10)  # waits until both are written
    assert repr(queue) == f"<WriteQueue 0 of {1 << 30} bytes>"
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert sorted(n for blocks in taken if blocks is not None for n in numbers(blocks)) == [0, 1]
    assert not queue.put(*block(2, 10))


def test_the_end_does_not_wait_longer_than_it_may() -> None:
    queue = WriteQueue(1 << 30, BELOW)
    queue.put(*block(0, 10))
    began = time.monotonic()
    queue.close(0.05)
    assert 0.05 <= time.monotonic() - began < 5
    assert numbers(queue.take()) == [0]
    assert queue.take() is None
