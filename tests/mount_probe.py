"""What touches a mount for the tests, in a process of its own: calls by name, in pickles, over standard input.

Run as a script by `tests.mounting.Probe`, with the standard library alone. The functions are plain: the tests call
them directly on a source directory, and through a `Probe` on a mount.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import pickle
import random
import stat
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

_held: dict[int, mmap.mmap] = {}


Seen = tuple[str, int, int, str]
"""What a walk finds at one name: "file" or "dir", size, modification time in ns, SHA-256."""


def walk(root: str, *, content: bool = True) -> dict[bytes, Seen]:
    """Return every file and directory below `root`, by relative path; a directory has no size of interest."""
    found: dict[bytes, Seen] = {}
    top = os.fsencode(root)
    folders = [top]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                status = entry.stat()
                name = os.path.relpath(entry.path, top)
                if stat.S_ISDIR(status.st_mode):
                    folders.append(entry.path)
                    found[name] = ("dir", 0, status.st_mtime_ns, "")
                else:
                    digest = sha256(os.fsdecode(entry.path)) if content else ""
                    found[name] = ("file", status.st_size, status.st_mtime_ns, digest)
    return found


def status(path: str) -> dict[str, int]:
    """Return stat(2) of a path."""
    found = os.stat(path)
    return {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}


def names(path: str) -> list[str]:
    """Return the names in a directory."""
    return sorted(os.listdir(path))


def file_system(path: str) -> dict[str, int]:
    """Return statvfs(3) of a path."""
    found = os.statvfs(path)
    return {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}


def attributes(path: str) -> dict[str, str]:
    """Return the extended attributes of a path."""
    return {name: os.getxattr(path, name).decode() for name in os.listxattr(path)}


def sha256(path: str) -> str:
    """Return the digest of a file read from end to end, 1 MiB a call."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read(path: str, offset: int = 0, length: int = -1) -> bytes:
    """Return the bytes of one pread(2); of the whole file where no length is given."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if length >= 0:
            return os.pread(fd, length, offset)
        pieces = []
        while piece := os.pread(fd, 1 << 20, offset):
            pieces.append(piece)
            offset += len(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)


def outcome(path: str, offset: int = 0, length: int = 4096) -> str:
    """Return "read" for a read that succeeds, else the name of its errno; the page cache is passed by."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(fd, length, offset)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    else:
        return "read"
    finally:
        with suppress(OSError):  # where the mount has ended
            os.close(fd)


def timed_outcome(path: str) -> tuple[str, float]:
    """Return `outcome` and the seconds that it took."""
    began = time.monotonic()
    found = outcome(path)
    return found, time.monotonic() - began


def forget_pages(path: str) -> None:
    """Have the kernel drop the pages it keeps of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def random_reads(path: str, offsets: Sequence[int], length: int) -> list[str]:
    """Read `length` bytes at each offset, with read-ahead off; return the digests."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return [hashlib.sha256(os.pread(fd, length, offset)).hexdigest() for offset in offsets]
    finally:
        os.close(fd)


def compare(ours: str, theirs: str, seed: int, count: int) -> list[str]:
    """Read two copies of a file at random places in random ways; return what differed."""
    chosen = random.Random(seed)
    size = os.stat(theirs).st_size
    edges = [edge for edge in (0, 1 << 18, 1 << 20, 1 << 22, 1 << 23, size) if edge <= size]
    wrong = []
    a, b = os.open(ours, os.O_RDONLY), os.open(theirs, os.O_RDONLY)
    try:
        for _ in range(count):
            if chosen.random() < 0.5:
                offset = max(0, chosen.choice(edges) + chosen.randint(-5000, 5000))
            else:
                offset = chosen.randint(0, size + 10)
            length = chosen.choice((1, 511, 4096, 4097, 65536, 300_000, 1 << 20, 3 << 20))
            if chosen.random() < 0.1:
                os.posix_fadvise(a, 0, 0, os.POSIX_FADV_DONTNEED)
            if os.pread(a, length, offset) != os.pread(b, length, offset):
                wrong.append(f"pread({length}, {offset})")
            start = offset - offset % mmap.ALLOCATIONGRANULARITY
            if chosen.random() < 0.3 and start < size:
                length = min(length, size - start)
                with (
                    mmap.mmap(a, length, prot=mmap.PROT_READ, offset=start) as x,
                    mmap.mmap(b, length, prot=mmap.PROT_READ, offset=start) as y,
                ):
                    if x[:] != y[:]:
                        wrong.append(f"mmap({length}, {start})")
    finally:
        os.close(a)
        os.close(b)
    return wrong


def sweep(path: str, start: int, step: int) -> tuple[int, str]:
    """Read a file to its end from `start`, then from 0 to `start`; return the bytes read and the file's digest."""
    pieces: dict[int, bytes] = {}
    total = 0
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        for offset in [*range(start, size, step), *range(0, start, step)]:
            stop = min(offset + step, size if offset >= start else start)
            data = os.pread(fd, stop - offset, offset)
            total += len(data)
            pieces[offset] = hashlib.sha256(data).digest()
    finally:
        os.close(fd)
    return total, hashlib.sha256(b"".join(pieces[offset] for offset in sorted(pieces))).hexdigest()


def mapped(path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return byte ranges of a file as seen through mmap(2)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
            return [memory[start:stop] for start, stop in ranges]
    finally:
        os.close(fd)


def hold(path: str) -> int:
    """Open a file and keep it open; return its descriptor."""
    return os.open(path, os.O_RDONLY)


def read_held(fd: int, offset: int, length: int) -> bytes:
    """Read from a file that `hold` opened."""
    return os.pread(fd, length, offset)


def held_outcome(fd: int, offset: int, length: int) -> str:
    """Read from a file that `hold` opened; return the one byte that the data repeats, or the name of the errno."""
    try:
        data = os.pread(fd, length, offset)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return bytes(set(data)).decode()


def let_go(fd: int) -> None:
    """Close what `hold` opened."""
    os.close(fd)


def change(root: str, file: str, folder: str) -> dict[str, str]:
    """Try everything that would change a tree; return the name of the errno of each."""
    some = f"{root}/{file}"
    attempts: dict[str, Callable[[], Any]] = {
        "create": lambda: os.open(f"{root}/new", os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644),
        "open to write": lambda: os.open(some, os.O_WRONLY),
        "open to read and write": lambda: os.open(some, os.O_RDWR),
        "open to append": lambda: os.open(some, os.O_WRONLY | os.O_APPEND),
        "open to truncate": lambda: os.open(some, os.O_RDONLY | os.O_TRUNC),
        "truncate": lambda: os.truncate(some, 0),
        "unlink": lambda: os.unlink(some),
        "rename": lambda: os.rename(some, f"{root}/other"),
        "link": lambda: os.link(some, f"{root}/link"),
        "symlink": lambda: os.symlink("there", f"{root}/symlink"),
        "mkdir": lambda: os.mkdir(f"{root}/made"),
        "rmdir": lambda: os.rmdir(f"{root}/{folder}"),
        "mknod": lambda: os.mknod(f"{root}/node", stat.S_IFREG | 0o644),
        "chmod": lambda: os.chmod(some, 0o777),
        "chown": lambda: os.chown(some, 12345, 12345),
        "utime": lambda: os.utime(some, (1, 1)),
        "setxattr": lambda: os.setxattr(some, "user.new", b"value"),
        "removexattr": lambda: os.removexattr(some, "user.amlmount.etag"),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "allowed"
        except OSError as error:
            found[name] = errno.errorcode[error.errno or 0]
    return found


def overwrite(path: str, data: bytes) -> None:
    """Write into a file, and wait until that has reached it."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def main() -> None:
    """Answer calls until standard input ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(8)) == 8:
        name, args, options = pickle.loads(source.read(struct.unpack("<Q", head)[0]))
        answer: tuple[bool, Any]
        try:
            answer = True, globals()[name](*args, **options)
        except Exception as error:  # noqa: BLE001  # the test gets it, whatever it is
            answer = False, error
        data = pickle.dumps(answer)
        with suppress(BrokenPipeError):
            sink.write(struct.pack("<Q", len(data)) + data)
            sink.flush()


if __name__ == "__main__":
    main()
