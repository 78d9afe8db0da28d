"""What readers ask most, names and bytes: answered at once where memory has it, by waiting where it has not.

The relay calls `lookup` and `read` for each request; both are O(1) and hold no await, so that what is in memory costs
no task. No FUSE here: nodes and buffers come back. Owned by the session's event loop.
"""

from __future__ import annotations

import errno
import stat
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import structlog

from amlmount.across import AcrossFiles
from amlmount.blocks import object_digest
from amlmount.crew import PinnedFile
from amlmount.errors import AmlmountError, NoSuchInode, ObjectChanged
from amlmount.fetch import Fetcher
from amlmount.logs import Thinned, redact
from amlmount.manifest import Node
from amlmount.metrics import Counters
from amlmount.reader import Buffer, FileReader, Part
from amlmount.stores import Retrying
from amlmount.tree import Tree
from amlmount.wire import Attributes

FOR_EVER_S = 10 * 365 * 86400
"""A frozen tree never changes: the kernel may keep names and attributes as long as it likes."""

READERS = 8192
"""Files whose reader is kept: those being read and those fetched ahead; about 1 KB each."""

ACTIVE_S = 2.0
"""Seconds after its last read that a large file counts among those that share the memory budget."""


class Owner(NamedTuple):
    """Whose files they are."""

    uid: int
    gid: int
    umask: int


class Waiting(NamedTuple):
    """A read whose bytes are on their way."""

    ino: int
    reader: FileReader
    parts: Sequence[Part]


class Desk:
    """The names and bytes of one mount."""

    def __init__(
        self,
        tree: Tree,
        stores: Sequence[Retrying],
        fetcher: Fetcher,
        counters: Counters,
        log: structlog.typing.FilteringBoundLogger,
        *,
        owner: Owner,
        null_reads: bool = False,
    ) -> None:
        self.tree = tree
        self.log = log
        self.across = AcrossFiles(tree, self.reader)
        self._stores = stores
        self._fetcher = fetcher
        self._counters = counters
        self._owner = owner
        self._zeros = memoryview(bytes(1 << 20)) if null_reads else None
        self._thinned = Thinned()
        self._readers: OrderedDict[int, FileReader] = OrderedDict()
        self._active: OrderedDict[int, float] = OrderedDict()
        self._waiting = 0
        self._waiting_since = 0.0
        self._reached = 0
        self._going_on: FileReader | None = None

    def __repr__(self) -> str:
        return f"<Desk {len(self._readers)} readers, {self._waiting} reads waiting>"

    # Names

    def node(self, ino: int) -> Node:
        """Return an inode; raise NoSuchInode where the manifest has none of that number."""
        node = self.tree.get(ino)
        if node is None:
            raise NoSuchInode(f"there is no inode {ino}")
        return node

    def attributes(self, node: Node) -> Attributes:
        """Return what `stat` shows."""
        uid, gid, umask = self._owner
        if node.is_dir:
            mode, links = stat.S_IFDIR | (0o555 & ~umask), 2 + node.subdirs
        else:
            mode, links = stat.S_IFREG | (0o444 & ~umask), 1
        return Attributes(node.ino, mode, links, uid, gid, node.size, node.mtime_ns)

    def lookup(self, parent: int, name: bytes) -> Attributes | None:
        """Return the attributes of the child of that name, or None."""
        node = self.tree.lookup(parent, name)
        return None if node is None else self.attributes(node)

    # Bytes

    def reader(self, ino: int, node: Node | None = None) -> FileReader:
        """Return the reader that everybody who reads this file shares."""
        reader = self._readers.get(ino)
        if reader is not None:
            self._readers.move_to_end(ino)
            return reader
        node = node or self.node(ino)
        source, pinned = self.tree.object(node)
        digest = object_digest(self._stores[source].identity, pinned.path, pinned.tag, pinned.version)
        reader = FileReader(PinnedFile(source, pinned, digest), self._fetcher, self.active_files)
        self._readers[ino] = reader
        if len(self._readers) > READERS:
            self._readers.popitem(last=False)
        return reader

    def active_files(self) -> int:
        """Return the number of large files that are being read: they share what memory has for reading ahead."""
        late = time.monotonic() - ACTIVE_S
        while self._active and next(iter(self._active.values())) < late:
            self._active.popitem(last=False)
        return len(self._active)

    @property
    def waits_since(self) -> float | None:
        """Moment since which at least one read has been waiting, or None. Thread-safe."""
        return self._waiting_since if self._waiting else None

    @property
    def active(self) -> int:
        """Large files being read, as of the last read. Thread-safe."""
        return len(self._active)

    def read(self, ino: int, offset: int, size: int, unique: int = 0) -> Sequence[Buffer] | Waiting | None:
        """Return the bytes [offset, offset + size) of a file, fewer only at its end, or what they wait for.

        None is for a request, number `unique`, that is answered as soon as the bytes are there.

        Follow it with `go_on`, once the answer is on its way.
        """
        counters = self._counters
        counters.reads += 1
        if self._zeros is not None:
            return (self._zeros[: max(0, min(size, self.node(ino).size - offset))],)
        reader = self._readers.get(ino)
        if reader is None or offset == 0:
            reader = reader or self.reader(ino)
            self._reached = ino
        if reader.is_large:
            self._readers.move_to_end(ino)  # it knows how the file is read
            self._active[ino] = time.monotonic()
            self._active.move_to_end(ino)
            self._going_on = reader
        self._fetcher.take_in()
        found = reader.begin(offset, size, (unique, ino) if unique and self._fetcher.answers else None)
        if found is None:
            return None
        if isinstance(found, list):
            return Waiting(ino, reader, found)
        counters.bytes_asked += sum(map(len, found))
        return found

    def go_on(self) -> None:
        """Fetch ahead what the last `read` gives reason to; it never delays the read itself."""
        reader, self._going_on = self._going_on, None
        ino, self._reached = self._reached, 0
        try:
            if reader is not None:
                reader.go_on()
            if ino:
                self.across.reached(ino)
        except Exception as error:  # the read has its answer, or will have it
            if self._thinned.due("go on") is not None:
                self.log.error("unexpected error; not fetched ahead", exc_info=error)

    async def wait(self, waiting: Waiting) -> Sequence[Buffer]:
        """Return the bytes that a read waits for; raise what `Fetcher.get` raises."""
        began = time.monotonic()
        if self._waiting == 0:
            self._waiting_since = began
        self._waiting += 1
        try:
            found = await waiting.reader.complete(waiting.parts)
        finally:
            now = time.monotonic()
            self._counters.read_wait.observe(now - began)
            self._waiting -= 1
            if self._waiting == 0:
                self._counters.waiting_s += now - self._waiting_since
        self._counters.bytes_asked += sum(map(len, found))
        return found

    def refuse(self, error: Exception, ino: int) -> int:
        """Count and log an error that a reader gets; return its errno."""
        if not isinstance(error, AmlmountError):  # a bug must cost one request, not the mount
            self.log.error("unexpected error; the request failed with EIO", exc_info=error)
            return errno.EIO
        self._counters.read_errors += 1
        self._counters.stale_reads += isinstance(error, ObjectChanged)
        passed_over = self._thinned.due((ino, type(error)))
        if passed_over is not None:
            name = errno.errorcode.get(error.errno, str(error.errno))
            more: dict[str, Any] = {"since_last_line": passed_over} if passed_over else {}
            if type(error) is AmlmountError:  # not one that anybody foresaw
                more["exc_info"] = error.__cause__ or error
            self.log.error(redact(str(error)), errno=name, do=error.hint, **more)
        return error.errno
