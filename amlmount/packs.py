"""Small blocks, many to a file: where each lies, and reading several at once.

A file for each small block costs more than its bytes: making it takes 0.5 ms of processor time, and finding it again
two seeks. So small blocks are written together, as they come (a pack: records of header and data, one after the other,
the same as in a block's own file), and an index, a SQLite database beside them, says which pack holds which. Blocks
that were read after each other lie after each other.

The index is a hint and is shared by all processes: what it names is checked like any block; what it has lost is
fetched again. Where it is damaged it is begun anew; where somebody removed it, connections to what was there are given
up. Nothing here raises anything but OSError.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from amlmount.blockfile import record_bytes
from amlmount.blocks import BlockKey

_SCHEMA = """
CREATE TABLE IF NOT EXISTS pack (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS block (key BLOB PRIMARY KEY, pack INTEGER NOT NULL, start INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS block_pack ON block (pack);
"""
_KEY_BYTES = 16  # of a block's digest: no two of 10^12 blocks share them
_MMAP_BYTES = 64 << 20
_BUSY_MS = 1000
_PAGE = 4096
_LOG_PAGES = 64  # of the write-ahead log: from there on it is written into the database
_FEW_PAGES = 16  # that any change may touch
_FIRST_PAGES = 48  # of a new index, its log and what is shared with it


class Place(NamedTuple):
    """Where a block's record is."""

    pack: str
    """Name of the pack: 64 hexadecimal digits."""
    start: int


class Sieve:
    """What an index may hold, in 2 MiB of memory: `maybe` never says no to what was added.

    Asking the database for a block that is not there costs as much as fetching it from a near store. Of a million
    blocks, 1 in 80 that are not there pass.
    """

    def __init__(self) -> None:
        self._bits = bytearray(1 << 21)
        self._lock = threading.Lock()
        self.ready = False
        """Whether all was added that the index held when this began: before that, everything may be there."""

    def add(self, name: bytes) -> None:
        """Take in the beginning of a block's digest: at least 6 bytes."""
        first, second = int.from_bytes(name[:3], "little"), int.from_bytes(name[3:6], "little")
        with self._lock:  # or one thread's bit is lost to another's of the same byte
            self._bits[first >> 3] |= 1 << (first & 7)
            self._bits[second >> 3] |= 1 << (second & 7)

    def maybe(self, name: bytes) -> bool:
        """Whether a block of that digest may be in the index."""
        if not self.ready:
            return True
        first, second = int.from_bytes(name[:3], "little"), int.from_bytes(name[3:6], "little")
        return bool(self._bits[first >> 3] >> (first & 7) & self._bits[second >> 3] >> (second & 7) & 1)


File = tuple[int, int]
"""Device and inode of a database: another file may be at its path by now."""


class PackIndex:
    """Which pack holds which block. Thread-safe: each call takes a connection that nobody else has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: deque[tuple[File, sqlite3.Connection]] = deque()
        self._making = threading.Lock()
        self._made: File | None = None
        self._looked_at: File | None = None
        self._last_pack = 0
        self.sieve = Sieve()

    def __repr__(self) -> str:
        return f"<PackIndex {self._path}>"

    def find(self, keys: Sequence[BlockKey]) -> dict[BlockKey, Place]:
        """Return the places of those blocks that are in a pack."""
        if self._file() is None:
            return {}
        names = {key.digest()[:_KEY_BYTES]: key for key in keys}
        marks = ",".join("?" * len(names))
        with self._connection() as db:
            rows = db.execute(
                f"SELECT key, name, start FROM block JOIN pack ON id = pack WHERE key IN ({marks})",
                tuple(names),
            )
            return {names[key]: Place(name, start) for key, name, start in rows}

    def look_around(self) -> None:
        """Take into the sieve what other processes have added; the first time everything. Takes 1 s a million."""
        file = self._file()
        if file is not None:
            if file != self._looked_at:
                self._looked_at, self._last_pack = file, 0
            with self._connection() as db:
                (last,) = db.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()
                if last is not None and last > self._last_pack:
                    query = "SELECT key FROM block WHERE pack > ? AND pack <= ?"
                    for (name,) in db.execute(query, (self._last_pack, last)):
                        self.sieve.add(name)
                    self._last_pack = last
        self.sieve.ready = True

    def add(self, pack: str, keys: Iterable[tuple[BlockKey, int]]) -> None:
        """Note the blocks of a new pack, each with its record's start."""
        blocks = [(key.digest()[:_KEY_BYTES], start) for key, start in keys]
        for name, _ in blocks:
            self.sieve.add(name)
        with self._connection() as db:
            number = db.execute("INSERT INTO pack (name) VALUES (?)", (pack,)).lastrowid
            db.executemany(
                "INSERT OR REPLACE INTO block VALUES (?, ?, ?)",
                [(name, number, start) for name, start in blocks],
            )

    def forget_block(self, key: BlockKey) -> None:
        """Note that a block is not there any more; where that fails, the next who looks finds out."""
        with suppress(OSError), self._connection() as db:
            db.execute("DELETE FROM block WHERE key = ?", (key.digest()[:_KEY_BYTES],))

    def forget_packs(self, names: Iterable[str]) -> None:
        """Note the same of packs; names of what is no pack do no harm."""
        with suppress(OSError):
            if self._file() is not None:
                for name in names:  # one by one, so that the log stays small
                    with self._connection() as db:
                        db.execute(
                            "DELETE FROM block WHERE pack = (SELECT id FROM pack WHERE name = ?)", (name,)
                        )
                        db.execute("DELETE FROM pack WHERE name = ?", (name,))

    def bytes(self) -> int:
        """Return the bytes of disk that it takes now."""
        size = 0
        for path in self._paths():
            with suppress(OSError):
                size += os.stat(path).st_size
        return size

    def growth(self, blocks: int) -> int:
        """Return the bytes that it may take more once a pack of so many blocks is added."""
        pages = self.bytes() // _PAGE
        # A block changes the page it belongs to, first in the log.
        return (min(blocks, pages) + blocks // 10 + (_FEW_PAGES if pages else _FIRST_PAGES)) * _PAGE

    def close(self) -> None:
        """Close the connections."""
        with suppress(IndexError):
            while True:
                self._idle.pop()[1].close()

    def _paths(self) -> list[str]:
        return [f"{self._path}{suffix}" for suffix in ("", "-wal", "-shm")]

    def _file(self) -> File | None:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection for one transaction; OSError where the database fails."""
        try:
            file, db = self._take()
            try:
                with db:
                    yield db
            except BaseException:
                db.close()
                raise
            self._idle.append((file, db))
        except sqlite3.OperationalError as error:  # locked, full, read-only
            raise OSError(f"{self._path}: {error}") from error
        except sqlite3.DatabaseError as error:
            self._begin_anew()
            raise OSError(f"{self._path} was damaged and is begun anew: {error}") from error

    def _take(self) -> tuple[File, sqlite3.Connection]:
        file = self._file()
        if file is None or file != self._made:
            with self._making:
                file = self._make()
        with suppress(IndexError):
            while True:
                of, db = self._idle.pop()
                if of == file:
                    return file, db
                db.close()  # to what was there before
        return file, self._connect()

    def _make(self) -> File:
        """Make the database where there is none; return which file it is now."""
        # Of mode 0600 from the beginning: what SQLite makes beside it has the same mode.
        with suppress(FileExistsError):
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        file = self._file()
        if file is None:
            raise FileNotFoundError(f"{self._path} was removed")
        if file != self._made:
            if not self._is_read_only():
                with closing(self._connect()) as db:
                    db.execute("PRAGMA journal_mode = WAL")
                    db.executescript(_SCHEMA)
            self._made = file
        return file

    def _is_read_only(self) -> bool:
        return not os.access(self._path, os.W_OK)

    def _connect(self) -> sqlite3.Connection:
        # On a read-only disk the log cannot be made that a reader needs, nor can anything change.
        query = "?immutable=1" if self._is_read_only() else ""
        db = sqlite3.connect(
            self._path.absolute().as_uri() + query, uri=True, timeout=_BUSY_MS / 1000, check_same_thread=False
        )
        try:
            # Losing the last changes in a crash costs a few blocks; waiting for the disk costs time with each pack.
            db.execute("PRAGMA synchronous = OFF")
            db.execute(f"PRAGMA mmap_size = {_MMAP_BYTES}")
            db.execute("PRAGMA cache_size = -512")
            db.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
            db.execute(f"PRAGMA journal_size_limit = {_LOG_PAGES * _PAGE}")
        except BaseException:
            db.close()
            raise
        return db

    def _begin_anew(self) -> None:
        self.close()
        for path in self._paths():
            with suppress(OSError):
                os.unlink(path)


class Read(NamedTuple):
    """One record to be read from a pack."""

    key: BlockKey
    start: int
    length: int


def starts(blocks: Iterable[tuple[BlockKey, memoryview]]) -> Iterator[tuple[BlockKey, int]]:
    """Yield the blocks of a pack, each with its record's start."""
    at = 0
    for key, _ in blocks:
        yield key, at
        at += record_bytes(key)


def read_records(fd: int, wanted: Sequence[Read]) -> Iterator[tuple[BlockKey, bytearray]]:
    """Read records from an open pack, those that touch with one call each run; short ones come back short.

    Each gets memory of its own, so that one block kept does not keep its neighbours. Raises OSError.
    """
    run: list[Read] = []
    for record in sorted(wanted, key=lambda r: r.start):
        if run and run[-1].start + run[-1].length != record.start:
            yield from _read_run(fd, run)
            run = []
        run.append(record)
    if run:
        yield from _read_run(fd, run)


def _read_run(fd: int, run: Sequence[Read]) -> Iterator[tuple[BlockKey, bytearray]]:
    buffers = [bytearray(record.length) for record in run]
    left = os.preadv(fd, buffers, run[0].start)
    for record, buffer in zip(run, buffers, strict=True):
        if left < len(buffer):
            del buffer[max(0, left) :]
        left -= record.length
        yield record.key, buffer
