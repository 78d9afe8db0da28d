"""The disk tier: blocks as immutable files named by content identity, shared by every mount of a user.

Layout, below `cache_dir/v2` (mode 0700): `ab/cdef...`, a file a block, named by `BlockKey.digest()`, or a pack of small
blocks (see `packs`), named at random; `packs.sqlite`, their index; `tmp/`, files being written; `usage` and two locks
beside it, the shared count of bytes (see that module).

A block's record checks itself (see `blockfile`); what fails is dropped, counted, and fetched again. So nothing is ever
synced: a torn file after a crash is a missed block. Files appear by rename.

Nothing here raises into a read. A disk that fails, is full, read-only or gone costs speed: blocks are not written, and
after three errors in a row the cache is left alone for a while. Writes happen behind the read, in two threads, from a
queue bounded in bytes; what does not fit the queue is not written.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from amlmount.behind import Waiting, WriteQueue
from amlmount.blockfile import HEADER_BYTES, BlockFileWriter, decode, encode_header, record_bytes, space_of
from amlmount.blocks import BLOCK_SIZE, KIB, MIB, BlockKey
from amlmount.logs import Thinned
from amlmount.metrics import Counters
from amlmount.packs import PackIndex, Read, read_records, starts
from amlmount.quota import Quota, Victim, limit_of, victims
from amlmount.usage import Usage, remove_leftovers

FORMAT = "v2"
PACKED_BELOW = 512 * KIB
"""Bytes of a block from which it has a file of its own."""

_GROUP = 50_000  # blocks looked at together when evicting: 10 MB of memory
_TOUCH_NS = 600 * 1_000_000_000  # a hit is noted on disk when the last note is older than this
_ERRORS = 3
_WRITERS = 2  # one waits for the disk while the other copies
_DOWN_S = 30.0
_FULL_S = 5.0


class BlockCache:
    """The blocks of one user on one disk. Thread-safe; `read` may block on the disk, `offer` never does."""

    def __init__(
        self,
        folder: Path,
        *,
        cache_size: int | None,
        min_free: int,
        queue_bytes: int,
        counters: Counters,
        log: structlog.typing.FilteringBoundLogger,
        packed_below: int = PACKED_BELOW,
    ) -> None:
        self._packed_below = packed_below
        self._top = folder / FORMAT
        self._cache_size = cache_size
        self._min_free = min_free
        self._counters = counters
        self._log = log
        self._thinned = Thinned()
        self._errors = 0
        self._down_until = 0.0
        self._no_write_until = 0.0
        self._queue = WriteQueue(queue_bytes, packed_below)
        self._names = 0
        self._usage = Usage(self._top)
        self._index = PackIndex(self._top / "packs.sqlite")
        self._quota = Quota(0, min_free)
        self.enabled = cache_size != 0 and self._prepare()
        if self.enabled:
            for number in range(_WRITERS):
                threading.Thread(
                    target=self._write_behind, args=(number == 0,), name=f"cache-writer-{number}", daemon=True
                ).start()

    def __repr__(self) -> str:
        return f"<BlockCache {self._top}, {self.used()} of {self._quota.limit} bytes>"

    @property
    def limit(self) -> int:
        """Bytes of blocks that the disk may hold."""
        return self._quota.limit if self.enabled else 0

    def _prepare(self) -> bool:
        try:
            self._make_folders()
            status = os.lstat(self._top)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                self._log.warning(
                    "no disk cache: others could write to it", folder=str(self._top), do="chmod 700 it"
                )
                return False
            disk = os.statvfs(self._top)
            total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
            self._quota = Quota(limit_of(self._cache_size, total, free, self.used()), self._min_free)
            remove_leftovers(self._top / "tmp")
            if not self.used() and not any(len(name) == 2 for name in os.listdir(self._top)):
                with suppress(OSError):  # a read-only disk can still be read
                    self._evict(0)  # nothing to look at: the count begins here
        except OSError as error:
            self._log.warning(
                "no disk cache",
                folder=str(self._top),
                error=str(error),
                do="set cache_dir to a disk that works",
            )
            return False
        return True

    def _make_folders(self) -> None:
        self._top.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self._top / "tmp").mkdir(mode=0o700, exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._top}/{name[:2]}/{name[2:]}"

    # Reading

    def read(self, key: BlockKey) -> memoryview | None:
        """Return a block's bytes, or None where it is not there, damaged, or the disk fails."""
        return self.read_all([key])[0]

    def maybe(self, key: BlockKey) -> bool:
        """Whether it makes sense to `read` a block; may be wrong for what others wrote in the last second."""
        return self.enabled and (key.length >= self._packed_below or self._index.sieve.maybe(key.digest()))

    def look_around(self) -> None:
        """Take note of what others have written; to be called about once a second, not on the event loop."""
        if self.enabled:
            try:
                self._index.look_around()
            except OSError as error:
                self._failed("read", error)

    def read_all(self, keys: Sequence[BlockKey]) -> list[memoryview | None]:
        """Return what `read` would of each: those that lie together on the disk are read together."""
        if not self.enabled or time.monotonic() < self._down_until:
            return [None] * len(keys)
        found: dict[BlockKey, memoryview | None] = {}
        packed = [key for key in keys if key.length < self._packed_below]
        try:
            if packed:
                found = self._read_packed(packed)
            for key in keys:
                if key.length >= self._packed_below:
                    with suppress(FileNotFoundError):
                        path = self._path(key.digest().hex())
                        found |= self._read_file(path, [Read(key, 0, record_bytes(key))])
            self._errors = 0
        except OSError as error:
            self._failed("read", error)
        self._counters.cache_misses += len(keys) - len(found)
        return [found.get(key) for key in keys]

    def _read_packed(self, keys: Sequence[BlockKey]) -> dict[BlockKey, memoryview | None]:
        packs: dict[str, list[Read]] = {}
        for key, place in self._index.find(keys).items():
            packs.setdefault(place.pack, []).append(Read(key, place.start, record_bytes(key)))
        found: dict[BlockKey, memoryview | None] = {}
        for name, records in packs.items():
            try:
                found |= self._read_file(self._path(name), records)
            except FileNotFoundError:
                self._index.forget_packs([name])
        return found

    def _read_file(self, path: str, records: Sequence[Read]) -> dict[BlockKey, memoryview]:
        """Return the undamaged of these records of a file; raise FileNotFoundError where there is no such file."""
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        found = {}
        try:
            status = os.fstat(fd)
            if time.time_ns() - status.st_mtime_ns > _TOUCH_NS:
                with suppress(OSError):  # a read-only disk can still be read
                    os.utime(fd)
            for key, raw in read_records(fd, records):
                data = decode(key, raw)
                if data is None or (key.length >= self._packed_below and status.st_size != len(raw)):
                    self._damaged(path, key)
                else:
                    self._counters.cache_hits += 1
                    found[key] = data
            if sum(record.length for record in records) >= MIB:
                # The kernel keeps these bytes for the mount already: once is enough.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        return found

    def _damaged(self, path: str, key: BlockKey) -> None:
        self._counters.cache_corrupt += 1
        if self._thinned.due("corrupt") is not None:
            self._log.warning("a damaged block in the cache was dropped and is fetched again", file=path)
        if key.length < self._packed_below:
            self._index.forget_block(key)
        else:
            self._remove(path, space_of(key.length), damaged=True)

    def _remove(self, path: str, space: int, *, damaged: bool = False) -> bool:
        try:
            with self._usage.locked() as count:
                os.unlink(path)
                count.add(used=-space, dropped=space if damaged else 0)
        except OSError:
            return False
        return True

    def mark_slow(self) -> None:
        """Leave the disk alone for a while: a read on it does not come back."""
        self._down_until = time.monotonic() + _DOWN_S
        if self._thinned.due("slow") is not None:
            self._log.warning(
                "the cache disk does not answer; reading past it", folder=str(self._top), for_s=_DOWN_S
            )

    def _failed(self, what: str, error: OSError) -> None:
        self._errors += 1
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            self._no_write_until = time.monotonic() + _FULL_S
        elif self._errors >= _ERRORS:
            self._errors = 0
            self._down_until = time.monotonic() + _DOWN_S
        if self._thinned.due((what, error.errno)) is not None:
            self._log.warning(
                "the cache disk fails; reads go on without it", on=what, error=error.strerror or str(error)
            )

    # Writing

    def offer(self, key: BlockKey, data: memoryview) -> bool:
        """Take a block to be written behind the read; False where it will not be."""
        now = time.monotonic()
        refused = not self.enabled or now < self._down_until or now < self._no_write_until
        if refused or not self._queue.put(key, data):
            self._counters.cache_dropped += self.enabled
            return False
        return True

    def _tidy(self) -> None:
        try:
            # A limit lowered since the last mount holds from now on; a count that was lost is made anew.
            with self._usage.locked() as count:
                excess = self._quota.to_evict(count.used + self._index.bytes(), self._free(), 0)
                known = count.known
            if excess or not known:
                self._evict(excess)
        except OSError as error:
            self._failed("write", error)

    def _write_behind(self, first: bool) -> None:
        if first:
            self._tidy()
        files = BlockFileWriter(HEADER_BYTES + BLOCK_SIZE)
        while (blocks := self._queue.take()) is not None:
            try:
                written = self._write(files, blocks)
            except OSError as error:
                self._failed("write", error)
                written = False
            if written:
                self._counters.cache_writes += len(blocks)
            else:
                self._counters.cache_dropped += len(blocks)
            size = sum(len(data) for _, data in blocks)
            del blocks
            self._queue.written(size)

    def _write(self, files: BlockFileWriter, blocks: Sequence[Waiting]) -> bool:
        packed = blocks[0][0].length < self._packed_below
        if packed:
            there = self._index.find([key for key, _ in blocks])
            blocks = [(key, data) for key, data in dict(blocks).items() if key not in there]
            if not blocks:
                return True
            name = os.urandom(32).hex()
        else:
            name = blocks[0][0].digest().hex()
            if os.path.lexists(self._path(name)):
                return True
        space = space_of(sum(record_bytes(key) for key, _ in blocks) - HEADER_BYTES)
        growth = self._index.growth(len(blocks)) if packed else 0
        for evicted in (False, True):
            with self._writing():
                short = self._reserve(space + growth)
                if short is None:
                    try:
                        self._publish(files, blocks, name, space)
                        if packed:
                            self._index.add(name, starts(blocks))
                    finally:  # what the index has grown is seen from now on
                        self._give_back(growth)
                    return True
            if not evicted:
                self._evict(short)
        return False

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if not self._top.is_dir():
            self._make_folders()  # somebody removed the cache under us
        with self._usage.writing():
            yield

    def _publish(self, files: BlockFileWriter, blocks: Sequence[Waiting], name: str, space: int) -> None:
        """Write a block or a pack whose space is set aside; where that fails, give it back."""
        path = self._path(name)
        self._names += 1
        temporary = str(self._top / "tmp" / f"{os.getpid()}-{threading.get_native_id()}-{self._names}")
        try:
            files.write(
                temporary, [part for key, data in blocks for part in (encode_header(key, data), data)]
            )
            with suppress(FileExistsError):
                os.mkdir(os.path.dirname(path), 0o700)
            with self._usage.locked() as count:
                if os.path.lexists(path):  # another process was quicker
                    os.unlink(temporary)
                    count.add(used=-space, on_way=-space)
                else:
                    os.rename(temporary, path)
                    count.add(on_way=-space)
        except OSError:
            self._give_back(space)
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self._errors = 0

    def _give_back(self, space: int) -> None:
        if space:
            with suppress(OSError), self._usage.locked() as count:
                count.add(used=-space, on_way=-space)

    def _free(self) -> int:
        disk = os.statvfs(self._top)
        return disk.f_bavail * disk.f_frsize

    def _reserve(self, space: int) -> int | None:
        """Count `space` bytes as used and return None if the quota allows, else the bytes to evict first."""
        with self._usage.locked() as count:
            free = self._free() - count.on_way  # what others have set aside is not on the disk yet
            used = count.used + self._index.bytes()
            if count.known and self._quota.fits(used, free, space):
                count.add(used=space, on_way=space)
                return None
            return self._quota.to_evict(used, free, space) if count.known else 0

    def _evict(self, need: int) -> None:
        """Remove the least recently used blocks, `need` bytes of them, and count anew what is there."""
        with self._usage.sweeping() as sweep:
            if sweep is None:
                return
            found = gone = 0
            group: list[Victim] = []
            shards = sorted(e.path for e in os.scandir(self._top) if len(e.name) == 2)
            for index, shard in enumerate(shards):
                with suppress(FileNotFoundError), os.scandir(shard) as entries:
                    for entry in entries:
                        with suppress(FileNotFoundError):  # somebody removed it: the others still count
                            status = entry.stat(follow_symlinks=False)
                            space = space_of(max(0, status.st_size - HEADER_BYTES))
                            group.append(Victim(status.st_mtime_ns, space, entry.path))
                if len(group) >= _GROUP or index == len(shards) - 1:
                    size = sum(v.size for v in group)
                    found += size
                    # This group's part of what has to go: names are hashes, so a group is a fair sample of all ages.
                    last = index == len(shards) - 1
                    part = need - gone if last else need * size // max(sweep.used, size)
                    went = [v for v in victims(group, part) if self._remove(v.name, v.size)]
                    gone += sum(victim.size for victim in went)
                    self._counters.cache_evicted += len(went)
                    if went:
                        self._index.forget_packs(
                            v.name[len(str(self._top)) + 1 :].replace("/", "") for v in went
                        )
                    group = []
            with self._usage.locked() as count:
                count.end(sweep, found, gone)

    def used(self) -> int:
        """Return the bytes of all blocks as counted; 0 where that cannot be read."""
        return self._usage.used()

    def close(self, flush_s: float = 2.0) -> None:
        """Stop writing; blocks still queued are written for up to `flush_s` seconds."""
        self._queue.close(flush_s)
        self._index.close()
