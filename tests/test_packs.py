"""Small blocks in packs: the index that finds them, and what happens when it, or a pack, is damaged, lost or held."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from amlmount import behind
from amlmount.blockfile import HEADER_BYTES, record_bytes, space_of
from amlmount.blocks import MIB, BlockKey
from amlmount.cache import PACKED_BELOW, BlockCache
from amlmount.packs import PackIndex, Place, Read, Sieve, read_records
from tests.test_cache import Disk, Writers, block, counted, held_usage, put, settle, there, tmpfs, until

__all__ = ["tmpfs"]  # a fixture

INDEX = "packs.sqlite"


class Packs(Disk):
    """A folder for caches that write small blocks in packs."""

    def open(self, cache_size: int | None = 64 * MIB, **more: Any) -> BlockCache:
        return super().open(cache_size, **{"packed_below": PACKED_BELOW, **more})

    @property
    def index(self) -> Path:
        return self.top / INDEX

    def rows(self, query: str) -> list[Any]:
        with closing(sqlite3.connect(self.index)) as db:
            return db.execute(query).fetchall()

    def index_bytes(self) -> int:
        return sum(p.stat().st_size for p in self.top.glob(f"{INDEX}*"))


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Packs]:
    monkeypatch.setattr(behind, "LINGER_S", 0.01)
    found = Packs(tmp_path / "cache")
    yield found
    for opened in found.caches:
        opened.close(flush_s=5)


def together(opened: BlockCache, *numbers: int, size: int = 10_000) -> None:
    """Write blocks as one pack."""
    with opened._queue._wake:
        for number in numbers:
            assert opened.offer(*block(number, size))
    settle(opened)


# The sieve -----------------------------------------------------------------------------------------------------

names = st.binary(min_size=32, max_size=32)


@settings(deadline=None)
@given(st.lists(names, max_size=200), st.lists(names, max_size=20))
def test_the_sieve_never_denies_what_it_was_given(added: list[bytes], others: list[bytes]) -> None:
    sieve = Sieve()
    sieve.ready = True
    for name in added:
        sieve.add(name[:16])  # the index keeps so much of it
    assert all(sieve.maybe(name) for name in added)
    assert all(sieve.maybe(name) == sieve.maybe(name[:16]) for name in others)


def test_the_sieve_keeps_out_most_of_what_it_was_not_given() -> None:
    sieve, chance = Sieve(), random.Random(1)
    sieve.ready = True
    for _ in range(200_000):
        sieve.add(chance.randbytes(16))
    passed = sum(sieve.maybe(chance.randbytes(32)) for _ in range(20_000))
    assert 0 < passed / 20_000 < 0.002


def test_the_sieve_lets_everything_pass_until_it_has_seen_all() -> None:
    sieve = Sieve()
    assert sieve.maybe(b"x" * 32)
    sieve.ready = True
    assert not sieve.maybe(b"x" * 32)


# The index -----------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path) -> Iterator[PackIndex]:
    opened = PackIndex(tmp_path / INDEX)
    yield opened
    opened.close()


def keys(*numbers: int) -> list[BlockKey]:
    return [block(n, 10)[0] for n in numbers]


def test_what_was_added_is_found_and_nothing_else(index: PackIndex) -> None:
    assert index.find(keys(1, 2)) == {}
    index.add("p1", zip(keys(1, 2, 3), (0, 100, 200), strict=True))
    index.add("p2", zip(keys(4), (0,), strict=True))
    one, two, four, five = keys(1, 2, 4, 5)
    assert index.find([one, two, four, five]) == {
        one: Place("p1", 0), two: Place("p1", 100), four: Place("p2", 0),
    }  # fmt: skip
    assert index.find([]) == {}
    assert index.find([one, one]) == {one: Place("p1", 0)}


def test_the_last_place_of_a_block_counts(index: PackIndex) -> None:
    (key,) = keys(1)
    index.add("p1", [(key, 5)])
    index.add("p2", [(key, 7)])
    assert index.find([key]) == {key: Place("p2", 7)}
    index.forget_packs(["p1"])
    assert index.find([key]) == {key: Place("p2", 7)}
    index.forget_packs(["p2"])
    assert index.find([key]) == {}


def test_what_is_forgotten_is_not_found(index: PackIndex) -> None:
    one, two, three = keys(1, 2, 3)
    index.add("p1", [(one, 0), (two, 100)])
    index.add("p2", [(three, 0)])
    index.forget_block(one)
    assert set(index.find([one, two, three])) == {two, three}
    index.forget_packs(["no pack", "p1"])
    assert set(index.find([one, two, three])) == {three}


def test_as_many_blocks_as_a_pack_holds(index: PackIndex) -> None:
    many = keys(*range(behind.PACK_BLOCKS))
    index.add("p", [(key, 10 * n) for n, key in enumerate(many)])
    found = index.find(many)
    assert found == {key: Place("p", 10 * n) for n, key in enumerate(many)}


def test_an_index_is_no_larger_than_its_blocks_need(index: PackIndex, tmp_path: Path) -> None:
    for pack in range(100):
        index.add(f"{pack:064x}", [(key, n) for n, key in enumerate(keys(*range(40 * pack, 40 * pack + 40)))])
    size = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert size < 4000 * 100 + MIB


def test_looking_around_takes_in_what_others_added(tmp_path: Path) -> None:
    mine, theirs = PackIndex(tmp_path / INDEX), PackIndex(tmp_path / INDEX)
    one, two, three = keys(1, 2, 3)
    mine.look_around()  # there is no index yet
    assert mine.sieve.ready
    assert not mine.sieve.maybe(one.digest())
    theirs.add("p1", [(one, 0)])
    assert not mine.sieve.maybe(one.digest())
    mine.look_around()
    assert mine.sieve.maybe(one.digest())
    # A pack that takes the place of another is another pack.
    theirs.forget_packs(["p1"])
    theirs.add("p2", [(two, 0)])
    mine.look_around()
    assert mine.sieve.maybe(two.digest())
    # And so are those of an index that was begun anew.
    theirs._begin_anew()
    theirs.add("p3", [(three, 0)])
    mine.look_around()
    assert mine.sieve.maybe(three.digest())
    for each in (mine, theirs):
        each.close()


def test_an_index_that_others_removed_is_not_used_any_more(tmp_path: Path) -> None:
    mine, theirs = PackIndex(tmp_path / INDEX), PackIndex(tmp_path / INDEX)
    one, two, three = keys(1, 2, 3)
    mine.add("p1", [(one, 0)])
    for path in tmp_path.iterdir():
        path.unlink()
    assert mine.find([one]) == {}
    theirs.add("p2", [(two, 0)])
    mine.add("p3", [(three, 0)])
    assert set(mine.find([one, two, three])) == set(theirs.find([one, two, three])) == {two, three}
    for each in (mine, theirs):
        each.close()


def test_threads_share_an_index(index: PackIndex) -> None:
    wrong: list[object] = []

    def work(first: int) -> None:
        try:
            for pack in range(first, first + 20):
                mine = keys(*range(10 * pack, 10 * pack + 10))
                index.add(f"p{pack}", [(key, n) for n, key in enumerate(mine)])
                if index.find(mine) != {key: Place(f"p{pack}", n) for n, key in enumerate(mine)}:
                    wrong.append(pack)
        except Exception as error:  # noqa: BLE001  # the test is to see it
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(20 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert len(index.find(keys(*range(1600)))) == 1600


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no database": lambda path: path.write_bytes(b"not a database" * 1000),
    "its header": lambda path: overwrite(path, 0, bytes(100)),
    "its pages": lambda path: overwrite(path, 100, b"\xff" * (path.stat().st_size - 100)),
    "its end": lambda path: os.truncate(path, 5000),
    "empty": lambda path: os.truncate(path, 0),
}


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_index_is_begun_anew(tmp_path: Path, how: str) -> None:
    path = tmp_path / INDEX
    first = PackIndex(path)
    first.add("p1", [(key, n) for n, key in enumerate(keys(*range(300)))])
    first.close()
    DAMAGE[how](path)
    again = PackIndex(path)
    for name in ("p2", "p3"):  # either may be who finds the damage
        with suppress(OSError):
            found = again.find(keys(*range(300)))
            assert set(found.values()) <= {Place("p1", n) for n in range(300)}
        with suppress(OSError):
            again.add(name, [(key, n) for n, key in enumerate(keys(*range(500, 800)))])
    assert len(again.find(keys(*range(500, 800)))) == 300
    again.close()


def test_an_index_in_whose_place_is_a_folder_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / INDEX).mkdir()
    index = PackIndex(tmp_path / INDEX)
    with pytest.raises(OSError, match=INDEX):
        index.find(keys(1))
    with pytest.raises(OSError, match=INDEX):
        index.add("p", [(keys(1)[0], 0)])
    index.forget_block(keys(1)[0])  # there is nothing to forget
    index.forget_packs(["p"])


# Reading records -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=30),
    st.integers(0, 60),
    st.randoms(use_true_random=False),
)
def test_records_are_read_whole_or_as_far_as_the_file_goes(
    records: list[tuple[int, bool]], lost: int, chance: random.Random
) -> None:
    """Records side by side or with others between them, asked for in any order; the file's end may be lost."""
    data, wanted = bytearray(), []
    for number, (length, asked) in enumerate(records):
        if asked:
            wanted.append(Read(BlockKey(b"k" * 32, number, number + 1), len(data), length))
        data += chance.randbytes(length)
    del data[len(data) - min(lost, len(data)) :]
    chance.shuffle(wanted)
    fd = os.memfd_create("pack")
    try:
        os.write(fd, data)
        found = dict(read_records(fd, wanted))
    finally:
        os.close(fd)
    assert {key: bytes(raw) for key, raw in found.items()} == {
        read.key: bytes(data[read.start : read.start + read.length]) for read in wanted
    }


def test_records_that_touch_are_read_with_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = os.preadv

    def preadv(fd: int, buffers: list[bytearray], at: int) -> int:
        calls.append(at)
        return real(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", preadv)
    fd = os.memfd_create("pack")
    os.write(fd, bytes(1000))
    wanted = [
        Read(BlockKey(b"k" * 32, n, n + 1), at, 100) for n, at in enumerate((0, 100, 200, 400, 500, 900))
    ]
    buffers = [raw for _, raw in read_records(fd, wanted)]
    os.close(fd)
    assert calls == [0, 400, 900]
    assert len({id(raw) for raw in buffers}) == 6  # one block kept does not keep its neighbours


# Kept, shared, private -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4096 - 64, 4096, 100_000, PACKED_BELOW - 1])
def test_small_blocks_are_kept_across_restarts(disk: Packs, size: int) -> None:
    first = disk.open()
    together(first, 1, 2, 3, size=size)
    first.close()
    (pack,) = disk.files()
    assert pack.stat().st_size == 3 * (HEADER_BYTES + size)
    second = disk.open()
    found = second.read_all([block(n, size)[0] for n in (3, 9, 1, 2)])
    assert [None if data is None else bytes(data) for data in found] == [
        bytes(block(3, size)[1]), None, bytes(block(1, size)[1]), bytes(block(2, size)[1]),
    ]  # fmt: skip
    assert (second._counters.cache_hits, second._counters.cache_misses) == (3, 1)
    assert second.used() == disk.real() == space_of(3 * (HEADER_BYTES + size) - HEADER_BYTES)


def test_a_large_block_has_a_file_of_its_own(disk: Packs) -> None:
    opened = disk.open()
    put(opened, 1, size=PACKED_BELOW)
    put(opened, 2, size=PACKED_BELOW - 1)
    assert disk.path(block(1, PACKED_BELOW)[0]).exists()
    assert len(disk.files()) == 2
    keys = [block(2, PACKED_BELOW - 1)[0], block(1, PACKED_BELOW)[0]]
    assert all(data is not None for data in opened.read_all(keys))


def test_two_caches_on_one_folder_share(disk: Packs) -> None:
    one, other = disk.open(), disk.open()
    one.look_around()
    other.look_around()
    put(one, 1)
    other.look_around()
    assert other.maybe(block(1)[0])
    assert not other.maybe(block(2)[0])
    assert there(other, 1, 2) == [1]
    put(other, 1)  # it is there already
    assert len(disk.files()) == 1
    assert one.used() == other.used() == disk.real() == space_of(10_000)
    assert other._counters.cache_dropped == 0


def test_what_is_offered_twice_is_written_once(disk: Packs) -> None:
    opened = disk.open()
    together(opened, 1, 2, 1, 1, 3)
    (pack,) = disk.files()
    assert pack.stat().st_size == 3 * (HEADER_BYTES + 10_000)
    together(opened, 2, 4)
    assert sorted(p.stat().st_size for p in disk.files()) == [10_064, 3 * 10_064]
    assert there(opened, 1, 2, 3, 4) == [1, 2, 3, 4]
    assert opened._counters.cache_writes == 7  # taken care of


def test_files_are_private_those_of_the_index_too(disk: Packs) -> None:
    mask = os.umask(0)
    try:
        put(disk.open(), 1)
        paths = list(disk.folder.rglob("*"))
    finally:
        os.umask(mask)
    assert {INDEX, f"{INDEX}-wal"} <= {path.name for path in paths}
    for path in paths:
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path


def test_a_cache_that_was_only_looked_at_has_no_index(disk: Packs) -> None:
    opened = disk.open()
    opened.look_around()
    assert opened.read(block(1)[0]) is None
    put(opened, 1, size=MIB)
    assert not disk.index.exists()


# Waiting for company -------------------------------------------------------------------------------------------


def test_small_blocks_wait_for_company_and_not_longer(disk: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "LINGER_S", 0.2)
    opened = disk.open()
    began = time.monotonic()
    opened.offer(*block(1))
    opened.offer(*block(2))
    settle(opened)
    assert time.monotonic() - began >= 0.2
    assert len(disk.files()) == 1
    assert there(opened, 1, 2) == [1, 2]


def test_a_full_pack_waits_for_nothing(disk: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "LINGER_S", 3600)
    opened = disk.open()
    numbers = range(behind.PACK_BYTES // 400_000 + 1)
    for number in numbers:
        assert opened.offer(*block(number, 400_000))
    until(lambda: len(disk.files()) == 1)
    opened.close(flush_s=5)  # the rest does not wait, either
    assert len(disk.files()) == 2
    again = disk.open()
    assert there(again, *numbers, size=400_000) == [*numbers]


def test_many_tiny_blocks_make_a_full_pack_too(disk: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "LINGER_S", 3600)
    opened = disk.open()
    for number in range(behind.PACK_BLOCKS):
        assert opened.offer(*block(number, 10))
    settle(opened)
    assert len(disk.files()) == 1
    assert len(there(opened, *range(behind.PACK_BLOCKS), size=10)) == behind.PACK_BLOCKS


def test_closing_writes_what_waits(disk: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "LINGER_S", 3600)
    first = disk.open()
    for number in range(5):
        assert first.offer(*block(number))
    assert disk.files() == []
    first.close(flush_s=10)
    assert there(disk.open(), *range(6)) == [0, 1, 2, 3, 4]
    assert not first.offer(*block(9))


# Damage --------------------------------------------------------------------------------------------------------


def damage(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)


@pytest.mark.parametrize("at", [0, 8, 16, 20, 60, 64, 5000, 10_063])
def test_a_damaged_record_costs_one_block_of_its_pack(disk: Packs, at: int) -> None:
    opened = disk.open()
    together(opened, 1, 2, 3)
    (pack,) = disk.files()
    damage(pack, record_bytes(block(1)[0]) + at)
    with capture_logs() as lines:
        assert there(opened, 1, 2, 3) == [1, 3]
    assert opened._counters.cache_corrupt == 1
    assert [line["log_level"] for line in lines] == ["warning"]
    assert there(opened, 2) == []
    assert opened._counters.cache_corrupt == 1  # it is forgotten
    put(opened, 2)  # and can be written again
    assert there(opened, 1, 2, 3) == [1, 2, 3]
    assert opened.used() == disk.real()


def test_of_a_pack_cut_short_the_beginning_is_served(disk: Packs) -> None:
    opened = disk.open()
    together(opened, 1, 2, 3)
    (pack,) = disk.files()
    os.truncate(pack, 2 * (HEADER_BYTES + 10_000) - 1)
    assert opened.read_all([block(n)[0] for n in (1, 2, 3)])[1:] == [None, None]
    assert there(opened, 1, 2, 3) == [1]
    assert opened._counters.cache_corrupt == 2


def test_records_that_changed_places_are_dropped(disk: Packs) -> None:
    opened = disk.open()
    together(opened, 1, 2, 3)
    (pack,) = disk.files()
    raw, size = pack.read_bytes(), HEADER_BYTES + 10_000
    pack.write_bytes(raw[size : 2 * size] + raw[:size] + raw[2 * size :])
    assert there(opened, 1, 2, 3) == [3]


def test_a_pack_that_was_removed_is_forgotten(disk: Packs) -> None:
    opened = disk.open()
    together(opened, 1, 2)
    together(opened, 3, 4)
    for pack in disk.files():
        if b"".join(bytes(block(n)[1]) for n in (1,)) in pack.read_bytes():
            pack.unlink()
    assert [data is not None for data in opened.read_all([block(n)[0] for n in (1, 3, 2, 4)])] == [
        False, True, False, True,
    ]  # fmt: skip
    assert len(disk.rows("SELECT * FROM pack")) == 1
    assert len(disk.rows("SELECT * FROM block")) == 2
    assert opened.enabled
    put(opened, 1, 2)
    assert there(opened, 1, 2, 3, 4) == [1, 2, 3, 4]


def test_a_link_in_a_packs_place_is_never_followed(disk: Packs, tmp_path: Path) -> None:
    opened = disk.open()
    put(opened, 1)
    (pack,) = disk.files()
    pack.rename(tmp_path / "elsewhere")
    pack.symlink_to(tmp_path / "elsewhere")
    assert there(opened, 1) == []
    assert (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_index_costs_its_blocks_and_is_begun_anew(disk: Packs, how: str) -> None:
    first = disk.open()
    together(first, *range(50))
    first.close()
    DAMAGE[how](disk.index)
    with capture_logs() as lines:
        opened = disk.open()
        opened.look_around()
        for number in range(50):
            data = opened.read(block(number)[0])
            assert data is None or data == block(number)[1]
        for number in (100, 101, 102):
            opened.offer(*block(number))
            settle(opened)
        assert there(opened, 101, 102) == [101, 102]
    assert {line["log_level"] for line in lines} <= {"warning"}
    assert (
        opened.used() == disk.real()
    )  # what no index names any more is still counted, and evicted in its turn


@pytest.mark.parametrize("when", ["between two mounts", "under a mount"])
def test_a_lost_index_costs_its_blocks(disk: Packs, when: str) -> None:
    opened = disk.open()
    together(opened, 1, 2)
    if when == "between two mounts":
        opened.close()
    for path in disk.top.glob(f"{INDEX}*"):
        path.unlink()
    if when == "between two mounts":
        opened = disk.open()
    assert there(opened, 1, 2) == []
    put(opened, 1, 3)
    assert there(opened, 1, 2, 3) == [1, 3]
    opened.close()
    assert there(disk.open(), 1, 2, 3) == [1, 3]
    assert opened.used() == disk.real()


def test_a_locked_index_costs_what_would_be_written(disk: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amlmount.packs._BUSY_MS", 20)
    opened = disk.open()
    put(opened, 1)
    opened.close()
    opened = disk.open()
    with closing(sqlite3.connect(disk.index, isolation_level=None)) as db, capture_logs() as lines:
        db.execute("BEGIN IMMEDIATE")
        opened.offer(*block(2))
        settle(opened)
        assert there(opened, 1, 2) == [1]
        assert opened._counters.cache_dropped == 1
        db.execute("ROLLBACK")
        assert [line["log_level"] for line in lines] == ["warning"]
        put(opened, 3)
    assert there(opened, 1, 2, 3) == [1, 3]
    assert opened.used() == disk.real()


def test_killed_between_a_pack_and_its_note_in_the_index(disk: Packs) -> None:
    """The pack is there and counted; nobody finds it, and it goes in its turn."""
    pid = os.fork()
    if pid == 0:  # only what cannot fail the test in two processes
        PackIndex.add = lambda self, pack, keys: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        opened = disk.open()
        opened.offer(*block(1))
        time.sleep(20)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(disk.files()) == 1
    opened = disk.open(cache_size=MIB)
    assert there(opened, 1) == []
    assert opened.used() >= disk.real() == space_of(10_000)
    put(opened, 1)
    assert there(opened, 1) == [1]
    (orphan, *_) = sorted(disk.files(), key=lambda p: p.stat().st_mtime_ns)
    put(opened, *range(10, 60), size=30_000)
    assert not orphan.exists()
    assert opened.used() == disk.real() <= MIB


# Quota and floor -----------------------------------------------------------------------------------------------


def test_the_least_recently_used_packs_go_first(disk: Packs) -> None:
    opened = disk.open(cache_size=5 * MIB // 2)
    for first in range(0, 50, 5):
        together(opened, *range(first, first + 5), size=25_000)
    now = time.time_ns()
    rows = dict(disk.rows("SELECT id, name FROM pack"))
    for number in range(10):
        age = (20 - number) * 3600 * 10**9
        name = rows[number + 1]
        os.utime(disk.top / name[:2] / name[2:], ns=(now - age, now - age))
    assert there(opened, 3, size=25_000) == [3]  # which is used now: the first pack stays
    for first in range(50, 100, 5):
        together(opened, *range(first, first + 5), size=25_000)
    left = there(opened, *range(100), size=25_000)
    assert set(range(5)) <= set(left)
    gone = set(range(100)) - set(left)
    assert gone
    assert gone <= set(range(5, 50))
    assert gone == set(range(5, 5 + len(gone)))  # whole packs, oldest first
    assert len(disk.rows("SELECT * FROM pack")) == len(disk.files())
    assert len(disk.rows("SELECT * FROM block")) == len(left)
    assert disk.real() == opened.used() <= 5 * MIB // 2
    assert opened._counters.cache_evicted == len(gone) // 5


def test_a_pack_larger_than_the_quota_is_not_kept(disk: Packs) -> None:
    opened = disk.open(cache_size=400_000)
    together(opened, *range(8), size=100_000)
    assert disk.real() == opened.used() <= 400_000
    put(opened, 20)
    assert there(opened, 20) == [20]


def test_blocks_and_index_together_keep_the_quota_for_all_processes(disk: Packs) -> None:
    limit = 3 * MIB
    looks = most = 0
    with Writers(disk.folder, 3, size=limit, packed_below=PACKED_BELOW) as writers:
        writers.go()
        while writers.running():
            fd = held_usage(disk)
            used, real, index = counted(fd), disk.real(), disk.index_bytes()
            os.close(fd)
            assert real <= used, f"look {looks}"
            assert real + index <= limit, f"look {looks}: {real} and {index}"
            most = max(most, real + index)
            looks += 1
            time.sleep(0.002)
        assert [process.wait() for process in writers.processes] == [0, 0, 0]
    assert looks > 20
    assert most > limit // 2
    assert list((disk.top / "tmp").iterdir()) == []


def test_the_floor_holds_with_packs_and_their_index(tmpfs: Callable[[str], Path]) -> None:
    folder = tmpfs("size=10m")
    floor = 5 * MIB
    lowest = 10 * MIB
    with Writers(folder, 3, size=1 << 30, min_free=floor, packed_below=PACKED_BELOW) as writers:
        writers.go()
        while writers.running():
            now = os.statvfs(folder)
            lowest = min(lowest, now.f_bavail * now.f_frsize)
            assert lowest >= floor
        assert [process.wait() for process in writers.processes] == [0, 0, 0]
    assert lowest < floor + 3 * MIB  # the disk was used


def test_killed_writers_leave_no_wrong_block_and_no_lost_count(disk: Packs) -> None:
    limit = 3 * MIB
    with Writers(disk.folder, 3, size=limit, blocks=100_000, packed_below=PACKED_BELOW) as writers:
        writers.go()
        until(lambda: len(disk.files()) > 8)  # somewhere in the middle: any moment will do
        for process in writers.processes:
            process.kill()
    opened = disk.open(cache_size=limit)
    for number in range(300):
        key, data = block(number, 1000 * (1 + number % 100))
        found = opened.read(key)
        assert found is None or found == data
    assert opened._counters.cache_corrupt == 0
    assert opened._counters.cache_hits > 10
    assert disk.real() <= opened.used() <= limit
    assert list((disk.top / "tmp").iterdir()) == []
    for number in range(300, 400):
        opened.offer(*block(number, 50_000))
        settle(opened)
    assert limit // 3 < disk.real() <= opened.used() <= limit


# Disks that fail -----------------------------------------------------------------------------------------------


def test_a_full_disk_fails_nothing(tmpfs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "LINGER_S", 0.005)
    disk = Packs(tmpfs("size=2m"))
    (disk.folder / "others").write_bytes(bytes(MIB // 2))
    opened = disk.open(cache_size=1 << 30)
    for number in range(30):
        opened.offer(*block(number, 100_000))
        settle(opened)
    assert there(opened, 29, size=100_000) == [29]
    assert opened._counters.cache_evicted > 0
    (disk.folder / "more").write_bytes(bytes(os.statvfs(disk.folder).f_bavail * 4096))
    for number in range(30, 60):  # no room but that of its own blocks
        opened.offer(*block(number, 100_000))
        settle(opened)
        data = opened.read(block(number, 100_000)[0])
        assert data is None or data == block(number, 100_000)[1]
    assert opened.used() == disk.real()
    assert list((disk.top / "tmp").iterdir()) == []
    opened.close()


def test_a_disk_turned_read_only_is_still_read(
    tmpfs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behind, "LINGER_S", 0.005)
    disk = Packs(tmpfs("size=8m"))
    opened = disk.open()
    put(opened, 1, 2, 3)
    opened.close()
    (first, *_) = disk.files()
    damage(first, 100)
    subprocess.run(["mount", "-o", "remount,ro", disk.folder], check=True)
    with capture_logs() as lines:
        again = disk.open()
        again.look_around()
        assert len(there(again, 1, 2, 3, 4)) == 2
        for number in range(5, 15):
            again.offer(*block(number))
            settle(again)
        for _ in range(
            5
        ):  # a damaged record, that cannot be forgotten here, does not make the disk a failing one
            assert len(there(again, 1, 2, 3)) == 2
    assert sorted(line["event"].partition(";")[0] for line in lines) == [
        "a damaged block in the cache was dropped and is fetched again", "the cache disk fails",
    ]  # fmt: skip
    again.close()


def test_a_cache_that_vanishes_is_made_again(disk: Packs) -> None:
    opened = disk.open()
    put(opened, 1)
    disk.top.rename(disk.folder / "gone")
    assert there(opened, 1) == []
    put(opened, 2, 3)
    assert there(opened, 2, 3) == [2, 3]
    opened.close()
    assert opened.used() == disk.real() == 2 * space_of(10_000)
    assert there(disk.open(), 1, 2, 3) == [2, 3]


def test_a_cache_that_cannot_be_made_again_fails_nothing(disk: Packs) -> None:
    opened = disk.open()
    put(opened, 1)
    disk.folder.rename(disk.folder.with_name("gone"))
    disk.folder.write_bytes(b"a file now")
    for number in range(6):
        assert opened.read(block(number)[0]) is None
        opened.offer(*block(number))
        settle(opened)
        opened.look_around()
    assert opened.used() == 0
