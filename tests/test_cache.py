"""The disk tier: blocks that check themselves, rules that hold at every moment, and disks that fail.

Here every block has a file of its own (`packed_below=0`); small blocks in packs are in test_packs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from amlmount.blockfile import HEADER_BYTES, BlockFileWriter, decode, encode_header, space_of
from amlmount.blocks import KIB, MIB, BlockKey
from amlmount.cache import FORMAT, BlockCache
from amlmount.metrics import Counters
from tests.servers.fixtures import unavailable

TOP = Path(__file__).resolve().parent.parent


class Disk:
    """A folder for caches, and the caches opened on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.caches: list[BlockCache] = []

    @property
    def top(self) -> Path:
        return self.folder / FORMAT

    def open(self, cache_size: int | None = 64 * MIB, **more: Any) -> BlockCache:
        values: dict[str, Any] = {
            "min_free": 0,
            "queue_bytes": 64 * MIB,
            "counters": Counters(),
            "packed_below": 0,
            **more,
        }
        opened = BlockCache(self.folder, cache_size=cache_size, log=structlog.get_logger(), **values)
        self.caches.append(opened)
        return opened

    def files(self) -> list[Path]:
        """Return the published blocks."""
        return [p for shard in self.top.glob("??") for p in shard.iterdir()]

    def real(self) -> int:
        """Return the bytes that blocks and unfinished files are counted for."""
        # Published ones first: one that is renamed meanwhile must not be counted twice.
        found = [*self.files(), *(self.top / "tmp").iterdir()]
        total = 0
        for path in found:
            try:
                total += space_of(max(0, path.stat().st_size - HEADER_BYTES))
            except FileNotFoundError:
                continue
        return total

    def path(self, key: BlockKey) -> Path:
        name = key.digest().hex()
        return self.top / name[:2] / name[2:]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    found = Disk(tmp_path / "cache")
    yield found
    for opened in found.caches:
        opened.close(flush_s=5)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts small file systems in memory; returns where."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"tmpfs{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"{options},mode=0700", "tmpfs", folder], capture_output=True
        )
        if done.returncode != 0:
            unavailable("this user may not mount a tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def block(number: int, size: int = 10_000) -> tuple[BlockKey, memoryview]:
    data = random.Random(number).randbytes(size)
    return BlockKey(hashlib.sha256(b"%d" % number).digest(), 0, size), memoryview(data)


def settle(opened: BlockCache) -> None:
    """Wait until all that was offered is written or dropped."""
    queue = opened._queue
    with queue._wake:
        assert queue._wake.wait_for(lambda: queue._held == 0, 20)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def put(opened: BlockCache, *numbers: int, size: int = 10_000) -> None:
    for number in numbers:
        assert opened.offer(*block(number, size))
        settle(opened)


def there(opened: BlockCache, *numbers: int, size: int = 10_000) -> list[int]:
    return [n for n in numbers if opened.read(block(n, size)[0]) is not None]


# The format ----------------------------------------------------------------------------------------------------

GOLDEN = (
    "414d4c420001"  # magic
    "0000"
    "0500000000000000"  # length
    "4cbb719a"
    "7b9d4d34437ee7079c4d6c9a6345618c9d506745494eb52eda1e1c959fcbe526"
    "0000000000000000"
    "023da6b8"
)


def test_the_header_is_the_one_of_this_format() -> None:
    key = BlockKey(bytes(range(32)), 256 * KIB, 256 * KIB + 5)
    assert encode_header(key, memoryview(b"hello")).hex() == GOLDEN, (
        "the bytes in front of cached blocks changed: bump the version (cache.FORMAT), or a mount of this version"
        " and one of the last would throw out each other's blocks"
    )
    assert (FORMAT, HEADER_BYTES) == ("v2", 64)
    name = "7b9d4d34437ee7079c4d6c9a6345618c9d506745494eb52eda1e1c959fcbe526"
    assert key.digest().hex() == name, "blocks have other names: bump the version (cache.FORMAT)"


@given(st.binary(min_size=1, max_size=200), st.integers(0, 1 << 40))
def test_what_was_encoded_decodes(data: bytes, start: int) -> None:
    key = BlockKey(b"k" * 32, start, start + len(data))
    raw = encode_header(key, memoryview(data)) + data
    decoded = decode(key, raw)
    assert decoded is not None
    assert bytes(decoded) == data
    assert decode(key._replace(start=start + 1, stop=key.stop + 1), raw) is None
    assert decode(key._replace(object=b"o" * 32), raw) is None


@settings(max_examples=30)
@given(st.binary(min_size=1, max_size=60), st.data())
def test_any_flipped_bit_or_lost_byte_is_seen(data: bytes, draw: st.DataObject) -> None:
    key = BlockKey(b"k" * 32, 0, len(data))
    raw = encode_header(key, memoryview(data)) + data
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << draw.draw(st.integers(0, 7))
        assert decode(key, bytes(damaged)) is None
        assert decode(key, raw[:at]) is None
    assert decode(key, raw + b"\0") is None


@given(st.integers(0, 1 << 30))
def test_space_is_whole_pages(length: int) -> None:
    assert space_of(length) % 4096 == 0
    assert 0 <= space_of(length) - length - HEADER_BYTES < 4096


# Kept, shared, private -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4096 - 64, 4096, 256 * KIB, MIB, 4 * MIB])
def test_a_block_is_kept_across_restarts(disk: Disk, size: int) -> None:
    first = disk.open()
    put(first, 1, size=size)
    first.close()
    assert disk.path(block(1, size)[0]).stat().st_size == HEADER_BYTES + size
    second = disk.open()
    data = second.read(block(1, size)[0])
    assert data is not None
    assert bytes(data) == bytes(block(1, size)[1])
    assert second._counters.cache_hits == 1
    assert second.used() == disk.real() == space_of(size)


def test_two_caches_on_one_folder_share(disk: Disk) -> None:
    one, other = disk.open(), disk.open()
    put(one, 1)
    assert there(other, 1, 2) == [1]
    assert other._counters.cache_misses == 1
    put(other, 1)  # it is there already
    assert one.used() == other.used() == disk.real() == space_of(10_000)


def test_files_and_folders_are_private_and_named_by_hash(disk: Disk) -> None:
    put(disk.open(), 1)
    for path in disk.folder.rglob("*"):
        status = path.lstat()
        assert stat.S_IMODE(status.st_mode) & 0o077 == 0, path
    (only,) = disk.files()
    assert only.parent.name + only.name == block(1)[0].digest().hex()
    assert list((disk.top / "tmp").iterdir()) == []


def test_a_cache_of_size_zero_is_none(disk: Disk) -> None:
    opened = disk.open(cache_size=0)
    assert not opened.enabled
    assert not opened.offer(*block(1))
    assert opened.read(block(1)[0]) is None
    assert not disk.folder.exists()


def test_the_queue_is_bounded_and_offers_never_wait(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    real_rename = os.rename

    def rename(source: str, target: str) -> None:
        held.wait(20)
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    opened = disk.open(queue_bytes=50_000)
    taken = [opened.offer(*block(n)) for n in range(10)]
    assert taken == [True] * 5 + [False] * 5
    assert opened._counters.cache_dropped == 5
    held.set()
    settle(opened)
    assert there(opened, *range(10)) == [0, 1, 2, 3, 4]


# Damage --------------------------------------------------------------------------------------------------------

REGIONS = {
    "magic": 0,
    "reserved": 6,
    "length": 8,
    "data's checksum": 16,
    "digest": 20,
    "padding": 52,
    "header's checksum": 60,
    "first byte": 64,
    "middle": 5000,
    "last byte": 10_063,
}


def damage(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)


@pytest.mark.parametrize("region", REGIONS)
def test_a_flipped_bit_is_dropped_counted_and_written_again(disk: Disk, region: str) -> None:
    opened = disk.open()
    put(opened, 1, 2)
    damage(disk.path(block(1)[0]), REGIONS[region])
    with capture_logs() as lines:
        assert opened.read(block(1)[0]) is None
    assert opened._counters.cache_corrupt == 1
    assert [line["log_level"] for line in lines] == ["warning"]
    assert not disk.path(block(1)[0]).exists()
    assert opened.used() == disk.real() == space_of(10_000)
    put(opened, 1)
    assert there(opened, 1, 2) == [1, 2]


@pytest.mark.parametrize("length", [0, 10, 63, 64, 10_063, 10_065, 20_000])
def test_a_file_of_another_length_is_dropped(disk: Disk, length: int) -> None:
    opened = disk.open()
    put(opened, 1, 2)
    path = disk.path(block(1)[0])
    os.truncate(path, length)
    assert opened.read(block(1)[0]) is None
    assert opened._counters.cache_corrupt == 1
    assert not path.exists()
    assert opened.used() >= disk.real() == space_of(10_000)


def test_a_block_under_another_blocks_name_is_dropped(disk: Disk) -> None:
    opened = disk.open()
    put(opened, 1, 2)
    os.replace(disk.path(block(2)[0]), disk.path(block(1)[0]))
    assert there(opened, 1, 2) == []
    assert opened._counters.cache_corrupt == 1


def test_a_link_is_never_followed(disk: Disk, tmp_path: Path) -> None:
    opened = disk.open()
    put(opened, 1)
    path = disk.path(block(1)[0])
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert opened.read(block(1)[0]) is None
    assert (tmp_path / "elsewhere").exists()


def test_a_folder_in_a_blocks_place_costs_that_block(disk: Disk) -> None:
    opened = disk.open()
    disk.path(block(1)[0]).mkdir(parents=True)
    put(opened, 1, 2)
    assert there(opened, 1, 2) == [2]


# Quota and floor -----------------------------------------------------------------------------------------------


def test_the_least_recently_used_go_first(disk: Disk) -> None:
    space = space_of(10_000)
    opened = disk.open(cache_size=10 * space)
    put(opened, *range(10))
    now = time.time_ns()
    for number in range(10):
        age = (20 - number) * 3600 * 10**9
        os.utime(disk.path(block(number)[0]), ns=(now - age, now - age))
    assert there(opened, 0, 1) == [0, 1]  # used just now, so 2 is the oldest
    put(opened, 10, 11)
    assert there(opened, *range(12)) == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11]
    assert opened._counters.cache_evicted == 2
    assert opened.used() == disk.real() == 10 * space


def test_a_limit_lowered_since_the_last_mount_holds_at_once(disk: Disk) -> None:
    space = space_of(10_000)
    first = disk.open(cache_size=20 * space)
    put(first, *range(20))
    first.close()
    second = disk.open(cache_size=5 * space)
    second.close(flush_s=10)
    until(lambda: disk.real() == second.used() <= 5 * space)


def test_a_block_larger_than_the_quota_is_not_kept(disk: Disk) -> None:
    opened = disk.open(cache_size=8192)
    put(opened, 1, size=100_000)
    put(opened, 2, size=4000)
    assert disk.real() <= 8192
    assert there(opened, 2, size=4000) == [2]


def test_the_rest_of_the_disk_as_a_limit(disk: Disk) -> None:
    opened = disk.open(cache_size=-1 * MIB)
    free = os.statvfs(disk.folder)
    assert abs(opened.limit - (free.f_bavail * free.f_frsize - MIB)) < 256 * MIB
    assert disk.open(cache_size=None).limit == free.f_blocks * free.f_frsize // 2


WRITER = """
import random, sys
from pathlib import Path
import structlog
from amlmount import behind
from amlmount.cache import BlockCache
from amlmount.metrics import Counters
from tests.test_cache import block, settle
behind.LINGER_S = 0.002
folder, seed, size, min_free, count, packed_below = Path(sys.argv[1]), *map(int, sys.argv[2:7])
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
cache = BlockCache(folder, cache_size=size, min_free=min_free, queue_bytes=4 << 20, counters=Counters(),
                   log=structlog.get_logger(), packed_below=packed_below)
print("ready", flush=True)
sys.stdin.readline()
rng = random.Random(seed)
for _ in range(count):
    number = rng.randrange(300)
    key, data = block(number, 1000 * (1 + number % 100))
    found = cache.read(key)
    if found is None:
        cache.offer(key, data)
        if rng.random() < 0.3:
            settle(cache)
    else:
        assert found == data
settle(cache)
print("done", flush=True)
"""


class Writers:
    """Processes that write blocks to one folder."""

    def __init__(
        self,
        folder: Path,
        count: int,
        *,
        size: int,
        min_free: int = 0,
        blocks: int = 400,
        packed_below: int = 0,
    ) -> None:
        numbers = (size, min_free, blocks, packed_below)
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, folder, str(seed), *map(str, numbers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=TOP,
                text=True,
            )
            for seed in range(count)
        ]
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"

    def go(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def held_usage(disk: Disk) -> int:
    """Open the shared count with its lock held, so that nobody begins to write meanwhile."""
    fd = os.open(disk.top / "usage", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def counted(fd: int) -> int:
    return int(struct.unpack("<Q", os.pread(fd, 8, 0).ljust(8, b"\0"))[0])


def test_the_quota_holds_at_every_moment_for_all_processes_together(disk: Disk) -> None:
    limit = 3 * MIB
    looks = 0
    with Writers(disk.folder, 3, size=limit) as writers:
        writers.go()
        while writers.running():
            fd = held_usage(disk)
            used, real = counted(fd), disk.real()
            os.close(fd)
            assert real <= used, f"look {looks}"
            assert real <= limit, f"look {looks}"
            looks += 1
            time.sleep(0.002)
        assert [process.wait() for process in writers.processes] == [0, 0, 0]
    assert looks > 20
    assert disk.real() > limit // 2
    assert list((disk.top / "tmp").iterdir()) == []


def test_the_floor_holds_at_every_moment_for_all_processes_together(tmpfs: Callable[[str], Path]) -> None:
    folder = tmpfs("size=8m")
    floor = 4 * MIB
    lowest = 8 * MIB
    with Writers(folder, 3, size=1 << 30, min_free=floor) as writers:
        writers.go()
        while writers.running():
            now = os.statvfs(folder)
            lowest = min(lowest, now.f_bavail * now.f_frsize)
            assert lowest >= floor
        assert [process.wait() for process in writers.processes] == [0, 0, 0]
    assert lowest < floor + 2 * MIB  # the disk was used


def test_killed_writers_leave_no_wrong_block_and_no_lost_count(disk: Disk) -> None:
    limit = 3 * MIB
    with Writers(disk.folder, 3, size=limit, blocks=100_000) as writers:
        writers.go()
        time.sleep(0.3)  # somewhere in the middle: any moment will do
        for process in writers.processes:
            process.kill()
    opened = disk.open(cache_size=limit)
    numbers = range(300)
    for number in numbers:
        key, data = block(number, 1000 * (1 + number % 100))
        found = opened.read(key)
        assert found is None or found == data
    assert opened._counters.cache_corrupt == 0
    assert opened._counters.cache_hits > 10
    assert disk.real() <= opened.used() <= limit
    assert list((disk.top / "tmp").iterdir()) == []
    # What the dead had set aside is given back by the time it is needed.
    for number in range(300, 400):
        opened.offer(*block(number, 50_000))
        settle(opened)
    assert limit // 2 < disk.real() <= opened.used() <= limit
    assert opened.used() - disk.real() <= 200_000


def test_a_count_made_anew_does_not_lose_a_block_on_its_way(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, other = disk.open(), disk.open()
    put(opened, *range(5))
    arrived, go = threading.Event(), threading.Event()
    real_rename = os.rename

    def rename(source: str, target: str) -> None:
        arrived.set()
        go.wait(20)
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    assert opened.offer(*block(9))
    assert arrived.wait(20)
    sweep = threading.Thread(target=other._evict, args=(0,))
    sweep.start()
    sweep.join(0.3)  # it may finish now, or wait for the block
    go.set()
    sweep.join(20)
    settle(opened)
    assert len(disk.files()) == 6
    assert opened.used() == disk.real()


def test_space_set_aside_but_not_written_yet_is_not_free(
    tmpfs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmpfs("size=4m"))
    floor = 3 * MIB
    one, other = disk.open(min_free=floor), disk.open(min_free=floor)
    arrived, go = threading.Event(), threading.Event()
    write = BlockFileWriter.write

    def late(self: BlockFileWriter, *args: Any) -> None:
        arrived.set()
        go.wait(20)
        write(self, *args)

    monkeypatch.setattr(BlockFileWriter, "write", late)
    assert one.offer(*block(1, 600_000))
    assert arrived.wait(20)
    assert other.offer(*block(2, 600_000))
    with other._queue._wake:  # it is refused at once, or waits at the same place
        other._queue._wake.wait_for(lambda: other._queue._held == 0, 0.3)
    go.set()
    settle(one)
    settle(other)
    free = os.statvfs(disk.folder)
    assert free.f_bavail * free.f_frsize >= floor
    assert there(one, 1, 2, size=600_000) == [1]
    for each in (one, other):
        each.close()


@pytest.mark.parametrize("lost", [b"", b"\0" * 3, None])
def test_a_lost_count_is_made_anew(disk: Disk, lost: bytes | None) -> None:
    space = space_of(10_000)
    first = disk.open(cache_size=10 * space)
    put(first, *range(9))
    first.close()
    if lost is None:
        (disk.top / "usage").unlink()
    else:
        (disk.top / "usage").write_bytes(lost)
    second = disk.open(cache_size=10 * space)
    until(lambda: second.used() > 0)  # by a thread that runs beside
    put(second, *range(20, 24))
    assert disk.real() == second.used() <= 10 * space


def test_a_count_lost_under_way_is_made_anew(disk: Disk) -> None:
    space = space_of(10_000)
    opened = disk.open(cache_size=10 * space)
    put(opened, *range(10))
    (disk.top / "usage").unlink()
    put(opened, *range(20, 24))
    assert disk.real() == opened.used() <= 10 * space


# Disks that fail -----------------------------------------------------------------------------------------------


def test_a_full_disk_fails_nothing(tmpfs: Callable[[str], Path]) -> None:
    disk = Disk(tmpfs("size=2m"))
    (disk.folder / "others").write_bytes(bytes(MIB))
    opened = disk.open(cache_size=1 << 30)
    for number in range(30):
        assert opened.offer(*block(number, 100_000))
        settle(opened)
    assert there(opened, 29, size=100_000) == [29]
    assert opened._counters.cache_evicted > 0
    (disk.folder / "more").write_bytes(bytes(os.statvfs(disk.folder).f_bavail * 4096))
    for number in range(30, 60):  # no room but that of its own blocks
        opened.offer(*block(number, 100_000))
        settle(opened)
    assert opened.used() == disk.real()
    assert list((disk.top / "tmp").iterdir()) == []
    opened.close()


def test_a_disk_without_inodes_fails_nothing(tmpfs: Callable[[str], Path]) -> None:
    disk = Disk(tmpfs("size=8m,nr_inodes=16"))
    opened = disk.open()
    with capture_logs() as lines:
        for number in range(40):
            opened.offer(*block(number))
            settle(opened)
    assert opened.enabled
    assert opened._counters.cache_dropped > 0
    assert [line["log_level"] for line in lines] == ["warning"]
    kept = there(opened, *range(40))
    assert 0 < len(kept) == len(disk.files())
    assert opened.used() == disk.real()
    assert list((disk.top / "tmp").iterdir()) == []
    opened.close()


def test_a_disk_turned_read_only_is_still_read(tmpfs: Callable[[str], Path]) -> None:
    disk = Disk(tmpfs("size=8m"))
    opened = disk.open()
    put(opened, 1, 2)
    subprocess.run(["mount", "-o", "remount,ro", disk.folder], check=True)
    with capture_logs() as lines:
        for number in range(3, 6):
            opened.offer(*block(number))
            settle(opened)
    assert [line["log_level"] for line in lines] == ["warning"]
    again = disk.open()
    assert there(again, 1, 2, 3) == [1, 2]
    damage_is_no_error = disk.path(block(1)[0])
    assert damage_is_no_error.exists()
    for each in (opened, again):
        each.close()


def test_a_read_only_disk_without_a_cache_is_none(tmpfs: Callable[[str], Path]) -> None:
    folder = tmpfs("size=1m,ro")
    with capture_logs() as lines:
        opened = Disk(folder).open()
    assert not opened.enabled
    assert opened.read(block(1)[0]) is None
    assert not opened.offer(*block(1))
    assert [line["event"] for line in lines] == ["no disk cache"]


def test_a_cache_that_vanishes_is_made_again(disk: Disk) -> None:
    opened = disk.open()
    put(opened, 1)
    disk.top.rename(disk.folder / "gone")
    assert there(opened, 1) == []
    put(opened, 2, 3)
    assert there(opened, 2, 3) == [2, 3]
    assert opened.used() == disk.real() == 2 * space_of(10_000)


def test_a_cache_that_cannot_be_made_again_fails_nothing(disk: Disk) -> None:
    opened = disk.open()
    put(opened, 1)
    disk.folder.rename(disk.folder.with_name("gone"))
    disk.folder.write_bytes(b"a file now")
    for number in range(6):
        assert opened.read(block(number)[0]) is None
        opened.offer(*block(number))
        settle(opened)
    assert opened.used() == 0


def test_errors_in_a_row_leave_the_disk_alone_for_a_while(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = disk.open()
    put(opened, 1)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    calls = 0
    real_open = os.open

    def failing(path: Any, *args: Any, **more: Any) -> int:
        nonlocal calls
        if str(path) == str(disk.path(block(1)[0])):
            calls += 1
            raise OSError(5, "Input/output error")
        return real_open(path, *args, **more)

    monkeypatch.setattr(os, "open", failing)
    with capture_logs() as lines:
        assert [opened.read(block(1)[0]) for _ in range(10)] == [None] * 10
    assert calls == 3
    assert len(lines) == 1
    assert not opened.offer(*block(2))
    monkeypatch.setattr(os, "open", real_open)
    assert there(opened, 1) == []
    now += 31
    assert there(opened, 1) == [1]


def test_a_slow_disk_is_left_alone_for_a_while(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = disk.open()
    put(opened, 1)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with capture_logs() as lines:
        opened.mark_slow()
        opened.mark_slow()
    assert len(lines) == 1
    assert there(opened, 1) == []
    now += 31
    assert there(opened, 1) == [1]


# Who may use it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", ["writable by all", "writable by the group", "a link", "a file", "another user's"]
)
def test_an_insecure_folder_is_refused(disk: Disk, tmp_path: Path, how: str) -> None:
    put(disk.open(), 1)
    if how == "writable by all":
        disk.top.chmod(0o707)
    elif how == "writable by the group":
        disk.top.chmod(0o720)
    elif how == "a link":
        disk.top.rename(tmp_path / "target")
        disk.top.symlink_to(tmp_path / "target")
    elif how == "a file":
        disk.top.rename(tmp_path / "target")
        disk.top.write_bytes(b"")
    elif os.geteuid() == 0:
        os.chown(disk.top, 65534, 65534)
    else:
        disk.folder = Path("/")  # another user's, where this one may make nothing
    with capture_logs() as lines:
        opened = disk.open()
    assert not opened.enabled
    assert opened.limit == 0
    assert opened.read(block(1)[0]) is None
    assert not opened.offer(*block(2))
    assert [line["log_level"] for line in lines] == ["warning"]
    assert lines[0]["do"]


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(disk: Disk) -> None:
    put(disk.open(), 1)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f"{dead.pid}-1-1", "odd", f"{os.getpid()}-1-1"):
        (disk.top / "tmp" / name).write_bytes(b"x")
    disk.open()
    assert [p.name for p in (disk.top / "tmp").iterdir()] == [f"{os.getpid()}-1-1"]
