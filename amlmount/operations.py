"""pyfuse3's handlers: take the request apart, ask the tree or a reader, put the answer together. No logic.

One guard wraps every handler: it holds the only way from an error to an errno, logs what a person should know (thinned:
one line a minute for each file and kind of error), and turns the unexpected into EIO. Any exception but FUSEError that
left a handler would end the mount.

Handles are inode numbers: a handle needs no state that the manifest does not give.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import pyfuse3
import structlog

from amlmount.across import AcrossFiles
from amlmount.blocks import object_digest
from amlmount.dataset import printable
from amlmount.errors import AmlmountError, ObjectChanged
from amlmount.fetch import Fetcher, PinnedFile
from amlmount.logs import Thinned, redact
from amlmount.manifest import ROOT, Node
from amlmount.metrics import Counters
from amlmount.reader import FileReader
from amlmount.stores import Retrying
from amlmount.tree import Tree

FOR_EVER_S = 10 * 365 * 86400
"""A frozen tree never changes: the kernel may keep names and attributes as long as it likes."""

_LISTED_AT_ONCE = 128
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND | os.O_CREAT
_XATTR = b"user.amlmount."

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])


class Owner(NamedTuple):
    """Whose files they are."""

    uid: int
    gid: int
    umask: int


def guarded(handler: F) -> F:
    """Turn whatever a handler raises into an errno, and log it."""

    @functools.wraps(handler)
    async def guard(self: Operations, *args: Any) -> Any:
        try:
            return await handler(self, *args)
        except pyfuse3.FUSEError:
            raise
        except AmlmountError as error:
            self.note(error, args[0])
            raise pyfuse3.FUSEError(error.errno) from None
        except Exception:  # a bug must cost one request, not the mount
            self.log.exception("unexpected error; the request failed with EIO", handler=handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return guard  # type: ignore[return-value]  # the wrapper has the handler's signature


class Operations(pyfuse3.Operations):
    """The handlers of one mount."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        tree: Tree,
        stores: Sequence[Retrying],
        fetcher: Fetcher | None,
        counters: Counters,
        log: structlog.typing.FilteringBoundLogger,
        *,
        owner: Owner,
        on_init: Callable[[], None],
        null_reads: bool = False,
    ) -> None:
        super().__init__()
        self.tree = tree
        self._stores = stores
        self._fetcher = fetcher
        self._counters = counters
        self.log = log
        self._owner = owner
        self._on_init = on_init
        self._zeros = memoryview(bytes(1 << 20)) if null_reads else None
        self._thinned = Thinned()
        self._across = None if fetcher is None else AcrossFiles(tree, fetcher, self._pinned)
        self._open: dict[int, list[Any]] = {}  # inode: [reader, times opened, whether it was read]
        self._large = 0  # open files that are read in blocks

    def init(self) -> None:
        """Take note that the kernel has answered: what comes next are requests."""
        self._on_init()

    @property
    def open_files(self) -> int:
        """Number of files that are open."""
        return len(self._open)

    def note(self, error: AmlmountError, ino: int) -> None:
        """Count and log an error that a reader gets."""
        self._counters.read_errors += 1
        self._counters.stale_reads += isinstance(error, ObjectChanged)
        passed_over = self._thinned.due((ino, type(error)))
        if passed_over is not None:
            name = errno.errorcode.get(error.errno, str(error.errno))
            more: dict[str, Any] = {"since_last_line": passed_over} if passed_over else {}
            if type(error) is AmlmountError:  # not one that anybody foresaw
                more["exc_info"] = error.__cause__ or error
            self.log.error(redact(str(error)), errno=name, do=error.hint, **more)

    def _node(self, ino: int) -> Node:
        node = self.tree.get(ino)
        if node is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return node

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = pyfuse3.InodeT(node.ino)
        attributes.generation = 0
        attributes.entry_timeout = FOR_EVER_S
        attributes.attr_timeout = FOR_EVER_S
        owner = self._owner
        if node.is_dir:
            attributes.st_mode = pyfuse3.ModeT(stat.S_IFDIR | (0o555 & ~owner.umask))
            attributes.st_nlink = 2 + node.subdirs
        else:
            attributes.st_mode = pyfuse3.ModeT(stat.S_IFREG | (0o444 & ~owner.umask))
            attributes.st_nlink = 1
        attributes.st_uid = owner.uid
        attributes.st_gid = owner.gid
        attributes.st_rdev = 0
        attributes.st_size = node.size
        attributes.st_blksize = 4096
        attributes.st_blocks = (node.size + 511) // 512
        attributes.st_atime_ns = attributes.st_ctime_ns = attributes.st_mtime_ns = node.mtime_ns
        return attributes

    @guarded
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Answer for a name; that there is none may be remembered, too (inode 0)."""
        node = self.tree.lookup(parent_inode, name)
        if node is not None:
            return self._attributes(node)
        absent = pyfuse3.EntryAttributes()
        absent.st_ino = pyfuse3.InodeT(0)
        absent.entry_timeout = FOR_EVER_S
        return absent

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """Do nothing: inodes are rows of the manifest."""

    @guarded
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return an inode's attributes."""
        return self._attributes(self._node(inode))

    @guarded
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        """Return the inode: a directory's handle."""
        self._node(inode)
        return pyfuse3.FileHandleT(inode)

    @guarded
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List children from number `start_id` on, until the reply is full."""
        directory = self._node(fh)
        while start_id < directory.children:
            for node in self.tree.children(directory, start_id, _LISTED_AT_ONCE):
                start_id += 1
                if not pyfuse3.readdir_reply(
                    token, pyfuse3.FileNameT(node.name), self._attributes(node), start_id
                ):
                    return

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """Do nothing: the handle holds nothing."""

    @guarded
    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        """Open a file for reading; the kernel keeps its pages from one open to the next."""
        if flags & _WRITING:
            raise pyfuse3.FUSEError(errno.EROFS)
        opened = self._open.get(inode)
        if opened is None:
            reader = self._reader(inode)
            self._open[inode] = opened = [reader, 0, False]
            self._large += reader is not None and reader.is_large
        opened[1] += 1
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    def _reader(self, ino: int) -> FileReader | None:
        node = self._node(ino)
        if self._fetcher is None:
            return None
        return FileReader(self._pinned(node), self._fetcher, lambda: self._large)

    def _pinned(self, node: Node) -> PinnedFile:
        source, pinned = self.tree.object(node)
        digest = object_digest(self._stores[source].identity, pinned.path, pinned.tag, pinned.version)
        return PinnedFile(source, pinned, digest)

    @guarded
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Return exactly the bytes asked for, fewer only at the end of the file."""
        counters = self._counters
        counters.reads += 1
        if self._zeros is not None:
            length = max(0, min(size, self._node(fh).size - off))
            return self._zeros[:length]  # type: ignore[return-value]  # a buffer, as below
        opened = self._open.get(fh)
        reader: FileReader | None = self._reader(fh) if opened is None else opened[0]
        assert reader is not None, "only a session that answers with zeros has none"
        if self._across is not None and opened is not None and not opened[2]:
            # Not at the open: what the page cache holds is opened and not read, and the next files may be there too.
            opened[2] = True
            self._across.reached(fh)
        data = await reader.read(off, size)
        counters.bytes_asked += len(data)
        return data  # type: ignore[return-value]  # any contiguous buffer will do, without a copy

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """Forget the reader with its last handle."""
        opened = self._open.get(fh)
        if opened is not None:
            opened[1] -= 1
            if opened[1] <= 0:
                del self._open[fh]
                self._large -= opened[0] is not None and opened[0].is_large

    async def _refuse(self, *_: Any) -> NoReturn:
        """Refuse a change. The kernel does that by itself, unless root mounts it anew without "ro"."""
        raise pyfuse3.FUSEError(errno.EROFS)

    mkdir = mknod = create = unlink = rmdir = symlink = link = rename = _refuse  # type: ignore[assignment]
    setattr = write = setxattr = removexattr = _refuse  # type: ignore[assignment]

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return the size of the dataset; nothing is free, as nothing can be written."""
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_blocks = (self.tree.info.bytes + 4095) // 4096
        answer.f_bfree = answer.f_bavail = 0
        answer.f_files = self.tree.inodes
        answer.f_ffree = answer.f_favail = 0
        answer.f_namemax = 255
        return answer

    @guarded
    async def getxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> bytes:
        """Return what the manifest knows of an inode."""
        if name.startswith(_XATTR):
            value = self._attributes_of(self._node(inode)).get(name)
            if value is not None:
                return value
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)

    @guarded
    async def listxattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> Sequence[pyfuse3.XAttrNameT]:
        """Return the names that `getxattr` knows for an inode."""
        return [pyfuse3.XAttrNameT(name) for name in self._attributes_of(self._node(inode))]

    def _attributes_of(self, node: Node) -> dict[bytes, bytes]:
        if node.ino == ROOT:
            info = self.tree.info
            return {_XATTR + b"digest": info.digest.encode(), _XATTR + b"files": b"%d" % info.files}
        if node.is_dir:
            return {}
        source, pinned = self.tree.object(node)
        url = printable(f"{self.tree.info.sources[source].url.removesuffix('/')}/{pinned.path.lstrip('/')}")
        values = {_XATTR + b"etag": node.tag.encode(), _XATTR + b"url": url.encode()}
        if node.md5:
            values[_XATTR + b"md5"] = node.md5.encode()
        return values
