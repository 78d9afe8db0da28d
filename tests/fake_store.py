"""A store in memory that does what a test tells it to: the same rules as a real one (tests/test_stores.py), and faults,
delays and gates on demand; it remembers every call.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from amlmount.dataset import ListedObject, ObjectId
from amlmount.errors import ObjectChanged, ObjectMissing, StoreError, TransientStoreError
from amlmount.stores import ListedPage

Failure = StoreError | Exception | Callable[[], None]


class Read(NamedTuple):
    """One call of `read`."""

    path: str
    start: int
    stop: int
    attempt: int

    @property
    def length(self) -> int:
        """Bytes asked for."""
        return self.stop - self.start


@dataclass
class Stored:
    """One object."""

    data: bytes
    tag: str
    mtime_ns: int


@dataclass
class Fault:
    """What goes wrong, and how often still."""

    failure: Failure
    path: str | None
    left: int | None


@dataclass
class FakeStore:
    """A store of objects in memory. Thread-safe."""

    identity: str = "fake:///box"
    cacheable: bool = True
    page_entries: int = 3
    delay_s: float = 0.0
    objects: dict[str, Stored] = field(default_factory=dict)
    folders: dict[str, int] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self._lock = threading.Condition()
        self._tags = 0
        self._open = threading.Event()
        self._open.set()
        self._busy = 0
        self.peak = 0
        """The largest number of reads under way at one time."""

    # What a test says

    def put(self, path: str, data: bytes, mtime_ns: int = 1_700_000_000_000_000_000) -> ObjectId:
        """Write an object, or overwrite one."""
        with self._lock:
            self._tags += 1
            self.objects[path] = Stored(data, f"tag{self._tags}", mtime_ns)
            return ObjectId(path, f"tag{self._tags}", len(data))

    def delete(self, path: str) -> None:
        """Remove an object."""
        with self._lock:
            del self.objects[path]

    def fail(self, failure: Failure, *, path: str | None = None, times: int | None = 1) -> None:
        """Have the next reads (of `path`) raise an error, or call a function first; `times` None is for ever."""
        with self._lock:
            self.faults.append(Fault(failure, path, times))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold every read that begins in this block until its end."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def wait_for(self, count: int, timeout_s: float = 10.0) -> None:
        """Wait until so many reads have begun."""
        with self._lock:
            assert self._lock.wait_for(lambda: len(self.reads) >= count, timeout_s), f"only {len(self.reads)}"

    def bytes_read(self) -> int:
        """Return the sum of what was asked for."""
        with self._lock:
            return sum(read.length for read in self.reads)

    # What a store offers

    def list_page(self, prefix: str, marker: str) -> ListedPage:
        """Return one page."""
        with self._lock:
            listed = [self._listed(path) for path in sorted(self.objects) if path.startswith(prefix)]
            listed += [
                ListedObject(path, 0, mtime_ns, "", "", True)
                for path, mtime_ns in sorted(self.folders.items())
                if path.startswith(prefix)
            ]
        start = int(marker or 0)
        stop = start + self.page_entries
        return ListedPage(listed[start:stop], str(stop) if stop < len(listed) else "")

    def _listed(self, path: str) -> ListedObject:
        found = self.objects[path]
        md5 = hashlib.md5(found.data).hexdigest()
        return ListedObject(path, len(found.data), found.mtime_ns, found.tag, md5)

    def head(self, path: str) -> ListedObject | None:
        """Return what is known of one object."""
        with self._lock:
            if path in self.folders:
                return ListedObject(path, 0, self.folders[path], "", "", True)
            return self._listed(path) if path in self.objects else None

    def read(self, obj: ObjectId, start: int, stop: int, attempt: int = 0) -> memoryview:
        """Return a range, or do what the script says."""
        with self._lock:
            self.reads.append(Read(obj.path, start, stop, attempt))
            self._busy += 1
            self.peak = max(self.peak, self._busy)
            self._lock.notify_all()
        try:
            if not self._open.wait(30):
                raise AssertionError("held for ever")
            if self.delay_s:
                time.sleep(self.delay_s)
            self._stumble(obj.path)
            return self._range(obj, start, stop)
        finally:
            with self._lock:
                self._busy -= 1

    def _stumble(self, path: str) -> None:
        with self._lock:
            fault = next((f for f in self.faults if f.left != 0 and f.path in (None, path)), None)
            if fault is None:
                return
            if fault.left is not None:
                fault.left -= 1
        if isinstance(fault.failure, Exception):
            raise fault.failure
        fault.failure()

    def _range(self, obj: ObjectId, start: int, stop: int) -> memoryview:
        with self._lock:
            found = self.objects.get(obj.path)
        if found is None:
            raise ObjectMissing(f"{obj.path}: no such object")
        if found.tag != obj.tag:
            raise ObjectChanged(f"{obj.path} was overwritten since it was frozen")
        data = found.data[start:stop]
        if len(data) != stop - start or len(found.data) != obj.size:
            raise TransientStoreError(f"{obj.path}: {len(data)} bytes of {stop - start}")
        return memoryview(data)

    def close(self) -> None:
        """Take note of it."""
        self.closed = True
