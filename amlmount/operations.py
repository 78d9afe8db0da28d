"""pyfuse3's handlers: take the request apart, ask the desk, put the answer together. No logic.

One guard wraps every handler: any exception but FUSEError that left one would end the mount. Names and reads do not
come here: `relay` answers them. Handles are inode numbers: a handle needs no state that the manifest does not give.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, TypeVar

import pyfuse3

from amlmount.dataset import printable
from amlmount.desk import FOR_EVER_S, Desk
from amlmount.manifest import ROOT, Node
from amlmount.stores import Retrying
from amlmount.wire import Handleless

_LISTED_AT_ONCE = 128
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND | os.O_CREAT
_XATTR = b"user.amlmount."

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])


def guarded(handler: F) -> F:
    """Turn whatever a handler raises into an errno, and log it."""

    @functools.wraps(handler)
    async def guard(self: Operations, *args: Any) -> Any:
        try:
            return await handler(self, *args)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:  # noqa: BLE001  # a bug must cost one request, not the mount
            raise pyfuse3.FUSEError(self.desk.refuse(error, args[0])) from None

    return guard  # type: ignore[return-value]  # the wrapper has the handler's signature


class Operations(pyfuse3.Operations):
    """The handlers of one mount."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        desk: Desk,
        stores: Sequence[Retrying],
        *,
        handleless: Callable[[], Handleless],
    ) -> None:
        super().__init__()
        self.desk = desk
        self._tree = desk.tree
        self._stores = stores
        self._handleless = handleless

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        said = self.desk.attributes(node)
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = pyfuse3.InodeT(said.ino)
        attributes.generation = 0
        attributes.entry_timeout = FOR_EVER_S
        attributes.attr_timeout = FOR_EVER_S
        attributes.st_mode = pyfuse3.ModeT(said.mode)
        attributes.st_nlink = said.nlink
        attributes.st_uid = said.uid
        attributes.st_gid = said.gid
        attributes.st_rdev = 0
        attributes.st_size = said.size
        attributes.st_blksize = 4096
        attributes.st_blocks = said.blocks
        attributes.st_atime_ns = attributes.st_ctime_ns = attributes.st_mtime_ns = said.mtime_ns
        return attributes

    @guarded
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return an inode's attributes."""
        return self._attributes(self.desk.node(inode))

    @guarded
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        """Have the kernel open directories by itself and keep their lists; an old one is answered each time."""
        if self._handleless().folders:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        return pyfuse3.FileHandleT(inode)

    @guarded
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List children from number `start_id` on, until the reply is full."""
        directory = self.desk.node(fh)
        while start_id < directory.children:
            for node in self._tree.children(directory, start_id, _LISTED_AT_ONCE):
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
        """Have the kernel open files by itself and keep their pages; an old one is answered each time."""
        if flags & _WRITING:
            raise pyfuse3.FUSEError(errno.EROFS)
        if self._handleless().files:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """Do nothing: the handle holds nothing."""

    async def _refuse(self, *_: Any) -> NoReturn:
        """Refuse a change. The kernel does that by itself, unless root mounts it anew without "ro"."""
        raise pyfuse3.FUSEError(errno.EROFS)

    mkdir = mknod = create = unlink = rmdir = symlink = link = rename = _refuse  # type: ignore[assignment]
    setattr = write = setxattr = removexattr = _refuse  # type: ignore[assignment]

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return the size of the dataset; nothing is free, as nothing can be written."""
        tree = self._tree
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_blocks = (tree.info.bytes + 4095) // 4096
        answer.f_bfree = answer.f_bavail = 0
        answer.f_files = tree.inodes
        answer.f_ffree = answer.f_favail = 0
        answer.f_namemax = 255
        return answer

    @guarded
    async def getxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> bytes:
        """Return what the manifest knows of an inode."""
        if name.startswith(_XATTR):
            value = self._attributes_of(self.desk.node(inode)).get(name)
            if value is not None:
                return value
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)

    @guarded
    async def listxattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> Sequence[pyfuse3.XAttrNameT]:
        """Return the names that `getxattr` knows for an inode."""
        return [pyfuse3.XAttrNameT(name) for name in self._attributes_of(self.desk.node(inode))]

    def _attributes_of(self, node: Node) -> dict[bytes, bytes]:
        if node.ino == ROOT:
            info = self._tree.info
            return {_XATTR + b"digest": info.digest.encode(), _XATTR + b"files": b"%d" % info.files}
        if node.is_dir:
            return {}
        source, pinned = self._tree.object(node)
        url = printable(f"{self._tree.info.sources[source].url.removesuffix('/')}/{pinned.path.lstrip('/')}")
        values = {_XATTR + b"etag": node.tag.encode(), _XATTR + b"url": url.encode()}
        if node.md5:
            values[_XATTR + b"md5"] = node.md5.encode()
        return values
