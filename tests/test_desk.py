"""What is answered to names and reads: at once or by waiting, and which errno and log line each failure becomes."""

from __future__ import annotations

import errno
import random
import stat
import time

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from amlmount import desk as desk_module
from amlmount import errors
from amlmount.blocks import KIB, MIB
from amlmount.desk import ACTIVE_S, Owner, Waiting
from amlmount.errors import (
    AccessDenied,
    AmlmountError,
    NoSuchInode,
    ObjectChanged,
    ObjectMissing,
    StoreUnreachable,
)
from amlmount.manifest import ROOT
from tests.desk_rig import DeskRig, desk_rig

SMALL = {f"many/f{n:03d}": random.Random(n).randbytes(1000 + n) for n in range(200)}
LARGE = random.Random(1).randbytes(9 * MIB + 17)
FILES = {"a.txt": b"hello", "empty": b"", "large": LARGE, "d/e/z": b"x" * 513, "d/x\ny": b"1", **SMALL}
FEW = {"a.txt": b"hello", "d/e/z": b"x" * 513}

# Names ---------------------------------------------------------------------------------------------------------


async def test_a_name_is_looked_up() -> None:
    async with desk_rig(FEW) as r:
        found = r.desk.lookup(ROOT, b"a.txt")
        assert found is not None
        assert found.ino == r.ino("a.txt")
        assert (found.mode, found.nlink) == (stat.S_IFREG | 0o444, 1)
        assert (found.uid, found.gid, found.size, found.mtime_ns) == (7, 8, 5, 10**9)
        d = r.ino("d")
        for name, parent in ((b".", d), (b"..", r.ino("d/e")), (b"d", ROOT)):
            same = r.desk.lookup(parent, name)
            assert same is not None
            assert (same.ino, same.mode, same.nlink) == (d, stat.S_IFDIR | 0o555, 3)


async def test_a_name_that_is_not_there_is_no_error() -> None:
    async with desk_rig(FEW) as r:
        for parent in (ROOT, r.ino("a.txt"), 99_999):
            assert r.desk.lookup(parent, b"nope") is None
        assert r.counters.read_errors == 0


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o777])
async def test_owner_and_umask(umask: int) -> None:
    async with desk_rig(FEW, owner=Owner(1000, 100, umask)) as r:
        for name, mode in ((b"a.txt", 0o444), (b"d", 0o555)):
            found = r.desk.lookup(ROOT, name)
            assert found is not None
            assert (found.uid, found.gid) == (1000, 100)
            assert stat.S_IMODE(found.mode) == mode & ~umask


@pytest.mark.parametrize(("size", "blocks"), [(0, 0), (1, 1), (512, 1), (513, 2)])
async def test_blocks_are_sizes_in_512_bytes_rounded_up(size: int, blocks: int) -> None:
    async with desk_rig({"f": bytes(size)}) as r:
        found = r.desk.lookup(ROOT, b"f")
        assert found is not None
        assert (found.size, found.blocks) == (size, blocks)


async def test_an_inode_that_is_not_there_is_an_error() -> None:
    async with desk_rig(FEW) as r:
        with pytest.raises(NoSuchInode, match="99999"):
            r.desk.node(99_999)
        with pytest.raises(NoSuchInode):
            r.desk.read(99_999, 0, 10)
        r.desk.go_on()
        assert await r.read("a.txt") == b"hello"


# Reads ---------------------------------------------------------------------------------------------------------


async def test_a_read_waits_the_first_time_and_not_the_second() -> None:
    async with desk_rig(FEW) as r:
        ino = r.ino("a.txt")
        first = r.desk.read(ino, 0, 100)
        assert isinstance(first, Waiting)
        assert b"".join(await r.desk.wait(first)) == b"hello"
        second = r.desk.read(ino, 1, 3)
        assert isinstance(second, tuple)
        assert b"".join(second) == b"ell"
        assert r.paths_read() == ["a.txt"]
        assert (r.counters.reads, r.counters.bytes_asked) == (2, 8)


async def test_reads_are_exact_and_counted() -> None:
    async with desk_rig(FILES) as r:
        assert len(await r.read("large", 0, 100)) == 100
        assert len(await r.read("large", len(LARGE) - 10, 100)) == 10
        assert await r.read("large", len(LARGE), 100) == b""
        assert await r.read("large", len(LARGE) + 5000, 100) == b""
        assert await r.read("empty", 0, 100) == b""
        assert (r.counters.reads, r.counters.bytes_asked) == (5, 110)


wanted = st.tuples(st.sampled_from(sorted(FILES)), st.integers(0, 10 * MIB), st.integers(0, 2 * MIB))


@settings(max_examples=25, deadline=None)
@given(st.lists(wanted, min_size=1, max_size=20), st.sampled_from([16 * MIB, 100 * MIB]), st.integers(1, 300))
async def test_any_reads_in_any_order_give_the_files_bytes(
    reads: list[tuple[str, int, int]], budget: int, readers: int
) -> None:
    async with desk_rig(FILES, budget=budget) as r:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(desk_module, "READERS", readers)

            async def one(path: str, offset: int, size: int) -> None:
                offset %= len(FILES[path]) + 3
                assert await r.read(path, offset, size) == FILES[path][offset : offset + size]

            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for read in reads:
                        nursery.start_soon(one, *read)
                for read in reads:
                    await one(*read)
        assert r.counters.reads == 2 * len(reads)
        assert len(r.desk._readers) <= readers


async def test_reads_that_measure_the_ceiling_are_zeros() -> None:
    async with desk_rig(FILES, null_reads=True) as r:
        assert await r.read("a.txt") == bytes(5)
        assert await r.read("large", len(LARGE) - 1, 10) == bytes(1)
        assert await r.read("large", len(LARGE) + 5, 10) == b""
        assert r.fake.reads == []
        with pytest.raises(NoSuchInode):
            r.desk.read(99_999, 0, 10)


# Readers -------------------------------------------------------------------------------------------------------


async def test_everybody_who_reads_a_file_shares_its_reader() -> None:
    async with desk_rig(FILES) as r:
        ino = r.ino("large")
        reader = r.desk.reader(ino)
        await r.read("large", 0, 10)
        assert r.desk.reader(ino) is reader
        assert r.desk.reader(r.ino("a.txt")) is not reader


async def test_readers_are_kept_up_to_a_number_and_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "READERS", 10)
    async with desk_rig(FILES) as r:
        for path, data in SMALL.items():
            assert await r.read(path) == data
        assert len(r.desk._readers) == 10
        first = next(iter(SMALL))
        assert await r.read(first, 500, 10) == SMALL[first][500:510]


async def test_the_reader_of_a_large_file_in_use_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows where the file is read; another would take that for a random read."""
    monkeypatch.setattr(desk_module, "READERS", 100)
    async with desk_rig(FILES) as r:
        reader = r.desk.reader(r.ino("large"))
        paths = list(SMALL)
        for number, offset in enumerate(range(0, MIB, 64 * KIB)):
            await r.read("large", offset, 64 * KIB)
            for path in paths[12 * number : 12 * number + 12]:
                await r.read(path)
        assert r.desk.reader(r.ino("large")) is reader


async def test_large_files_share_the_memory_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    files = {f"f{n}": LARGE for n in range(4)} | {"small": b"x"}
    async with desk_rig(files) as r:
        assert r.desk.active_files() == 0
        await r.read("small")
        assert r.desk.active_files() == 0
        for number in range(4):
            await r.read(f"f{number}", 0, 10)
            assert r.desk.active_files() == r.desk.active == number + 1
            now += ACTIVE_S / 8
        await r.read("f0", 10, 10)
        now += ACTIVE_S * 6 / 8
        assert r.desk.active_files() == 3  # not f1
        now += ACTIVE_S
        assert r.desk.active == 3  # as of the last read
        assert r.desk.active_files() == 0


# What comes next -----------------------------------------------------------------------------------------------


async def test_files_read_in_order_are_fetched_before_they_are_begun() -> None:
    async with desk_rig(FILES) as r:
        for path, data in SMALL.items():
            assert await r.read(path) == data
            await r.rig.landed()
        assert sorted(r.paths_read()) == sorted(SMALL)  # each once
        assert r.counters.prefetch_used == len(SMALL) - 2
        assert r.counters.prefetch_wasted == 0


async def test_nothing_is_fetched_ahead_before_the_read_is_on_its_way() -> None:
    async with desk_rig(FILES) as r:
        await r.read("many/f000")
        before = r.counters.prefetched
        found = r.desk.read(r.ino("many/f001"), 0, 100)
        assert r.counters.prefetched == before
        r.desk.go_on()
        after = r.counters.prefetched
        assert after > before
        r.desk.go_on()  # nothing new to say
        assert r.counters.prefetched == after
        assert isinstance(found, Waiting)
        await r.desk.wait(found)


async def test_the_rest_of_a_file_is_no_new_file() -> None:
    async with desk_rig(FILES) as r:
        await r.read("many/f000", 0, 100)
        for offset in range(100, 1000, 100):
            await r.read("many/f000", offset, 100)
        await r.rig.landed()
        assert r.paths_read() == ["many/f000"]


async def test_a_large_file_is_fetched_ahead_of_its_reader() -> None:
    async with desk_rig(FILES) as r:
        got = b""
        while len(got) < len(LARGE):
            got += await r.read("large", len(got), 128 * KIB)
        assert got == LARGE
        await r.rig.landed()
        assert r.counters.bytes_fetched == len(LARGE)
        assert r.counters.prefetched > 0


# Waiting -------------------------------------------------------------------------------------------------------


def waits(r: DeskRig) -> bool:
    return r.desk.waits_since is not None


async def test_time_in_which_reads_wait_is_counted_once() -> None:
    async with desk_rig(FILES) as r:
        assert not waits(r)
        with r.fake.held():
            async with trio.open_nursery() as nursery:
                began = time.monotonic()
                for path in list(SMALL)[:10]:
                    nursery.start_soon(r.read, path)
                await r.rig.store_has(8)
                assert waits(r)
                assert began <= (r.desk.waits_since or 0) <= time.monotonic()
                r.fake._open.set()
        assert not waits(r)
        assert 0 < r.counters.waiting_s <= time.monotonic() - began
        assert r.counters.read_wait.spread().count == 10
        assert r.counters.wait_store_s >= r.counters.waiting_s


async def test_a_read_that_fails_does_not_wait_for_ever() -> None:
    async with desk_rig(FEW) as r:
        r.fake.fail(ObjectMissing("gone"))
        with pytest.raises(ObjectMissing):
            await r.read("a.txt")
        assert r.desk.waits_since is None
        assert r.counters.bytes_asked == 0


# Failures ------------------------------------------------------------------------------------------------------

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AmlmountError)]


async def refused(r: DeskRig, path: str) -> str:
    """Return the name of the errno that a read gets."""
    try:
        await r.read(path)
    except AmlmountError as error:
        return errno.errorcode[r.desk.refuse(error, r.ino(path))]
    raise AssertionError("it was read")


@pytest.mark.parametrize("kind", ALL)
async def test_every_error_becomes_its_own_errno(kind: type[AmlmountError]) -> None:
    async with desk_rig(FEW) as r:
        with capture_logs() as lines:
            assert r.desk.refuse(kind("a.txt: it failed"), 2) == kind.errno
        assert len(lines) == 1
        assert r.counters.read_errors == 1


@pytest.mark.parametrize(
    ("failure", "name"),
    [
        (ObjectChanged("a.txt was overwritten"), "ESTALE"),
        (ObjectMissing("a.txt: no such blob"), "EIO"),
        (AccessDenied("a.txt: access denied"), "EACCES"),
        (StoreUnreachable("a.txt: gave up"), "EIO"),
    ],
)
async def test_what_a_reader_gets_and_the_log_says(failure: AmlmountError, name: str) -> None:
    async with desk_rig(FEW) as r:
        r.fake.fail(failure, times=None)
        with capture_logs() as lines:
            for _ in range(5):
                assert await refused(r, "a.txt") == name
        (line,) = lines
        assert line["log_level"] == "error"
        assert "a.txt" in line["event"]
        assert (line["errno"], line["do"]) == (name, failure.hint)
        assert failure.hint
        assert r.counters.read_errors == 5
        assert r.counters.stale_reads == 5 * isinstance(failure, ObjectChanged)


async def test_a_failure_that_goes_on_is_said_again_with_how_often_it_was_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    async with desk_rig(FEW) as r:
        with capture_logs() as lines:
            for _ in range(3):
                r.desk.refuse(ObjectMissing("gone"), 2)
            now += 3600
            r.desk.refuse(ObjectMissing("gone"), 2)
        assert [line.get("since_last_line") for line in lines] == [None, 2]


async def test_each_file_and_each_kind_of_failure_has_a_line() -> None:
    async with desk_rig(FEW) as r:
        with capture_logs() as lines:
            for ino in (2, 3):
                for failure in (ObjectMissing("gone"), AccessDenied("denied")):
                    r.desk.refuse(failure, ino)
        assert len(lines) == 4


async def test_a_secret_in_an_error_stays_out_of_the_log() -> None:
    async with desk_rig(FEW) as r:
        with capture_logs() as lines:
            r.desk.refuse(StoreUnreachable("https://h/c?sv=1&sig=CANARY"), 2)
        assert lines
        assert "CANARY" not in str(lines)


@pytest.mark.parametrize("bug", [ValueError("a bug"), AssertionError(), KeyError(5), OSError(28, "no space")])
async def test_the_unexpected_is_eio_with_a_traceback(bug: Exception) -> None:
    async with desk_rig(FEW) as r:
        with capture_logs() as lines:
            assert r.desk.refuse(bug, 2) == errno.EIO
        (line,) = lines
        assert (line["log_level"], line["exc_info"]) == ("error", bug)


async def test_a_bug_in_a_store_costs_one_file_and_shows_its_traceback() -> None:
    async with desk_rig(FEW) as r:
        r.fake.fail(ZeroDivisionError("a bug"))
        with capture_logs() as lines:
            assert await refused(r, "a.txt") == "EIO"
        (line,) = lines
        assert isinstance(line["exc_info"], ZeroDivisionError)
        assert await r.read("d/e/z") == FEW["d/e/z"]
