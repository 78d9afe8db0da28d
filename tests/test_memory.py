"""The memory tier: the budget holds after every step, and what goes first is what is needed least."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from amlmount import memory as memory_module
from amlmount.blocks import GIB, MIB, BlockKey
from amlmount.memory import BlockMemory, default_budget, memory_limit, tune_malloc
from amlmount.metrics import Counters

BUDGET = 100


def key(number: int, size: int = 10) -> BlockKey:
    return BlockKey(bytes([number]) * 32, 0, size)


def fill(memory: BlockMemory, number: int, size: int = 10, *, ahead: bool = False) -> None:
    assert memory.lease(size, may_evict_unread=True)
    memory.put(key(number, size), memoryview(bytes(size)), ahead=ahead)


class Model(RuleBasedStateMachine):
    """Any order of leases, blocks and reads; a lease is given back or becomes a block."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = BlockMemory(BUDGET, Counters())
        self.leases: list[int] = []

    @rule(size=st.integers(1, BUDGET + 5), may=st.booleans())
    def lease(self, size: int, may: bool) -> None:
        given = self.memory.lease(size, may_evict_unread=may)
        if given:
            self.leases.append(size)
        elif may:  # it gave up everything it had, and the leases alone are too much
            assert not self.memory._live
            assert not self.memory._spent
            assert sum(self.leases) + size > BUDGET

    @precondition(lambda self: self.leases)
    @rule(number=st.integers(0, 5), ahead=st.booleans())
    def put(self, number: int, ahead: bool) -> None:
        size = self.leases.pop()
        wanted = key(number, size)
        self.memory.put(wanted, memoryview(bytes(size)), ahead=ahead)
        assert wanted in self.memory

    @precondition(lambda self: self.leases)
    @rule()
    def release(self) -> None:
        self.memory.release(self.leases.pop())

    @rule(number=st.integers(0, 5), size=st.integers(1, 20))
    def get(self, number: int, size: int) -> None:
        wanted = key(number, size)
        there = wanted in self.memory
        block = self.memory.get(wanted)
        assert (block is not None) == there
        assert block is None or len(block.data) == size

    @rule(number=st.integers(0, 5), size=st.integers(1, 20))
    def spent(self, number: int, size: int) -> None:
        there = key(number, size) in self.memory
        self.memory.spent(key(number, size))
        assert (key(number, size) in self.memory) == there

    @rule(number=st.integers(0, 5), size=st.integers(1, 20))
    def give_up(self, number: int, size: int) -> None:
        wanted = key(number, size)
        block = self.memory._live.get(wanted)
        unread = block is not None and block.ahead
        there = wanted in self.memory
        self.memory.give_up(wanted)
        assert (wanted in self.memory) == there
        if unread:
            assert next(iter(self.memory._spent)) == wanted

    @invariant()
    def what_is_used_is_what_is_there(self) -> None:
        blocks = [*self.memory._live.values(), *self.memory._spent.values()]
        assert not set(self.memory._live) & set(self.memory._spent)
        assert self.memory._spent_bytes == sum(len(b.data) for b in self.memory._spent.values())
        assert self.memory.used == sum(len(b.data) for b in blocks) + sum(self.leases)
        assert self.memory.used <= BUDGET


TestModel = Model.TestCase


def test_blocks_that_were_read_to_their_end_go_first() -> None:
    memory = BlockMemory(30, Counters())
    for number in range(3):
        fill(memory, number)
    memory.spent(key(1))
    fill(memory, 9)
    assert [n for n in range(3) if key(n) in memory] == [0, 2]


def test_then_the_least_recently_used() -> None:
    memory = BlockMemory(30, Counters())
    for number in range(3):
        fill(memory, number)
    memory.get(key(0))
    fill(memory, 9)
    assert [n for n in range(3) if key(n) in memory] == [0, 2]


def test_a_spent_block_that_is_read_again_is_live() -> None:
    memory = BlockMemory(30, Counters())
    for number in range(3):
        fill(memory, number)
        memory.spent(key(number))
    assert memory.get(key(0)) is not None
    fill(memory, 9)
    assert [n for n in range(3) if key(n) in memory] == [0, 2]


def test_a_prefetch_does_not_throw_out_another_that_is_unread() -> None:
    counters = Counters()
    memory = BlockMemory(20, counters)
    fill(memory, 0, ahead=True)
    fill(memory, 1, ahead=True)
    assert not memory.lease(10, may_evict_unread=False)
    assert memory.lease(10, may_evict_unread=True)
    assert key(0) not in memory
    assert counters.prefetch_wasted == 1


def test_what_is_given_up_goes_before_all_others() -> None:
    counters = Counters()
    memory = BlockMemory(40, counters)
    for number in range(4):
        fill(memory, number, ahead=number >= 2)
    memory.spent(key(0))
    memory.give_up(key(2))
    assert memory.lease(10, may_evict_unread=False)
    assert [n for n in range(4) if key(n) in memory] == [0, 1, 3]
    assert counters.prefetch_wasted == 1
    memory.give_up(key(1))  # it was asked for: whoever did may go on
    memory.give_up(key(9))  # it is not there
    assert memory.lease(10, may_evict_unread=False)
    assert [n for n in range(4) if key(n) in memory] == [1, 3]


def test_what_was_given_up_and_is_read_after_all_stays() -> None:
    memory = BlockMemory(20, Counters())
    fill(memory, 0, ahead=True)
    fill(memory, 1)
    memory.give_up(key(0))
    block = memory.get(key(0))
    assert block is not None
    assert block.ahead  # the fetcher counts it as used
    assert memory.lease(10, may_evict_unread=True)
    assert [n for n in range(2) if key(n) in memory] == [0]


def test_spent_blocks_are_kept_up_to_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "SPENT_BYTES", 25)
    memory = BlockMemory(1000, Counters())
    for number in range(5):
        fill(memory, number, ahead=number == 4)
    for number in range(3):
        memory.spent(key(number))
    assert [n for n in range(5) if key(n) in memory] == [1, 2, 3, 4]
    memory.give_up(key(4))  # the first to go is itself
    assert [n for n in range(5) if key(n) in memory] == [1, 2, 3]
    assert memory.used == 30


def test_a_lease_over_the_whole_budget_is_refused() -> None:
    memory = BlockMemory(20, Counters())
    fill(memory, 0)
    assert not memory.lease(21, may_evict_unread=True)
    assert memory.used <= 20


@pytest.mark.parametrize(
    ("limit", "budget"),
    [
        (64 * GIB, GIB),
        (4 * GIB, GIB),
        (2 * GIB, 512 * MIB),
        (512 * MIB, 128 * MIB),
        (256 * MIB, 128 * MIB),
        (100 * MIB, 50 * MIB),
    ],
)
def test_the_default_budget(limit: int, budget: int) -> None:
    assert default_budget(limit) == budget


def test_the_smallest_limit_on_the_way_up_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.setattr(
        memory_module, "_cgroup_folders", lambda: [inner, inner.parent, tmp_path, tmp_path / "no"]
    )
    machine = memory_limit()
    (inner / "memory.max").write_text("max\n")
    assert memory_limit() == machine
    (tmp_path / "memory.max").write_text(f"{96 * MIB}\n")
    (inner.parent / "memory.limit_in_bytes").write_text(f"{64 * MIB}\n")
    assert memory_limit() == 64 * MIB


def test_cgroups_of_both_versions_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "12:cpu,cpuacct:/ignored\n9:memory:/docker/abc\n0::/user.slice/x.scope\n"
    monkeypatch.setattr(Path, "read_text", lambda self: lines)
    folders = memory_module._cgroup_folders()
    top = Path("/sys/fs/cgroup")
    for wanted in (top / "memory/docker/abc", top / "user.slice/x.scope", top / "user.slice", top):
        assert wanted in folders
    assert not [f for f in folders if "ignored" in f.parts or not f.is_relative_to(top)]


def test_no_cgroup_at_all_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", gone)
    assert memory_limit() > 0


def test_malloc_can_be_told() -> None:
    tune_malloc()
    tune_malloc()
    assert len(bytes(64 * MIB)) == 64 * MIB
