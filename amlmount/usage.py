"""The shared count of the bytes on the cache disk: right whatever processes do at once, and after a kill.

Three numbers in the file `usage`, changed under a lock on it: the bytes of all blocks, those on their way included; the
bytes of those on their way; and, only growing, the bytes of damaged blocks removed. They are never too small. What a
killed process had set aside is taken back by the next sweep that finds nobody writing.

A sweep looks at every block while others write. `Sweep` is what makes its sum right: what was on its way when it began
is not among what it found, and what was removed meanwhile by others may not be either.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

_NUMBERS = struct.Struct("<QQQ")


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of processes that are gone; a file's name begins with its writer's number."""
    for entry in os.scandir(folder):
        pid = entry.name.partition("-")[0]
        if not pid.isdigit() or not os.path.exists(f"/proc/{pid}"):
            with suppress(OSError):
                os.unlink(entry.path)


class Count:
    """The numbers, while their lock is held."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        raw = os.pread(fd, _NUMBERS.size, 0)
        self.known = len(raw) == _NUMBERS.size
        """False for a new file, or one that was lost: only a sweep can say what there is."""
        numbers: tuple[int, int, int] = _NUMBERS.unpack(raw.ljust(_NUMBERS.size, b"\0"))
        self.used, self.on_way, self.dropped = numbers

    def add(self, used: int = 0, on_way: int = 0, dropped: int = 0) -> None:
        """Change the numbers where they are known."""
        if self.known:
            self._write(self.used + used, self.on_way + on_way, self.dropped + dropped)

    def _write(self, *numbers: int) -> None:
        self.used, self.on_way, self.dropped = (max(0, number) for number in numbers)
        os.pwrite(self._fd, _NUMBERS.pack(self.used, self.on_way, self.dropped), 0)

    def begin(self, *, nobody_writes: bool) -> Sweep | None:
        """Begin to count anew; None where that cannot be done now."""
        if nobody_writes:
            self.add(on_way=-self.on_way)
        elif not self.known:
            return None
        return Sweep(self.known, self.used, self.on_way, self.dropped)

    def end(self, sweep: Sweep, found: int, gone: int) -> None:
        """Take in what a sweep found, `gone` bytes of which it removed.

        A block that was written meanwhile may count twice now. The next sweep sets that right.
        """
        if self.known != sweep.known:
            return  # the file was lost meanwhile
        if not self.known:
            self.known = True
            self._write(found - gone, 0, 0)
            return
        # `gone` was taken off as it went.
        self.add(used=found - sweep.used + sweep.on_way + self.dropped - sweep.dropped)


class Sweep(NamedTuple):
    """The numbers at the beginning of a sweep."""

    known: bool
    used: int
    on_way: int
    dropped: int


class Usage:
    """The count in one folder. Each call opens its files anew: the folder may be removed and made again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def _locked_file(self, name: str, how: int) -> Iterator[int]:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._folder / name, flags, 0o600)
        try:
            fcntl.flock(fd, how)
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def locked(self) -> Iterator[Count]:
        """Hold the lock on the numbers."""
        with self._locked_file("usage", fcntl.LOCK_EX) as fd:
            yield Count(fd)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let a sweep know, for as long as a block is set aside but not published."""
        with self._locked_file("writing.lock", fcntl.LOCK_SH):
            yield

    @contextmanager
    def sweeping(self) -> Iterator[Sweep | None]:
        """Be the one process that sweeps; None where another does, or where the count cannot be made anew now."""
        try:
            with self._locked_file("sweep.lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
                with self.locked() as count:
                    try:
                        with self._locked_file("writing.lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
                            begun = count.begin(nobody_writes=True)
                    except BlockingIOError:
                        begun = count.begin(nobody_writes=False)
                yield begun
        except BlockingIOError:
            yield None

    def used(self) -> int:
        """Return the bytes of all blocks; waits for no lock, and is 0 where there is none to read."""
        try:
            fd = os.open(self._folder / "usage", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return 0
        try:
            return Count(fd).used
        except OSError:
            return 0
        finally:
            os.close(fd)
