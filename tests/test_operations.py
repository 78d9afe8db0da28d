"""The handlers that are left to the library, called without a mount: what each answers, and its errnos.

Names and reads do not come here: see test_desk and test_relay.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, cast

import pyfuse3
import pytest
import structlog
from structlog.testing import capture_logs

from amlmount.dataset import Source
from amlmount.desk import FOR_EVER_S, Desk, Owner
from amlmount.errors import ManifestError
from amlmount.fetch import Fetcher
from amlmount.manifest import ROOT, Manifest
from amlmount.metrics import Counters
from amlmount.operations import Operations
from amlmount.stores import Retrying
from amlmount.tree import Tree
from amlmount.wire import Handleless
from tests.fake_store import FakeStore
from tests.manifests import build, file, folder

SOURCES = (
    Source(kind="blob", url="https://acc.blob.core.windows.net/box", base="pre/"),
    Source(kind="local", url="file:///", base="/data/"),
)
ENTRIES = [
    file("a.txt", 5, 1_000_000_001, "0x1", md5="5d41402abc4b2a76b9719d911017c592"),
    file("b.bin", 3_000_000, 2_000_000_002, "0x2"),
    folder("empty", 3),
    file("d/x\ny", 1, 4, "0x4"),
    file("d/e/z", 513, 5, "0x5"),
    file("local", 7, 6, "6-7", source=1),
    *(file(f"many/f{n:04}", n, n, f"t{n}") for n in range(1000)),
]
CTX = cast("pyfuse3.RequestContext", None)


OWNER = Owner(7, 8, 0o022)
OLD = Handleless(files=False, folders=False)
NEW = Handleless(files=True, folders=True)


class Mounted:
    """Operations over a real manifest, and the answers in a form that is easy to compare."""

    def __init__(self, tree: Tree, *, owner: Owner = OWNER) -> None:
        self.tree = tree
        self.counters = Counters()
        self.handleless = OLD
        stores = [Retrying(FakeStore(identity=f"fake:{n}"), patience_s=1) for n in range(2)]
        desk = Desk(
            tree, stores, cast("Fetcher", None), self.counters, structlog.get_logger(), owner=owner
        )  # nothing is read here
        self.ops = Operations(desk, stores, handleless=lambda: self.handleless)

    def ino(self, path: str) -> pyfuse3.InodeT:
        ino = ROOT
        for name in path.encode().split(b"/"):
            node = self.tree.lookup(ino, name)
            assert node is not None
            ino = node.ino
        return pyfuse3.InodeT(ino)

    async def attributes(self, path: str) -> pyfuse3.EntryAttributes:
        return await self.ops.getattr(self.ino(path), CTX)

    async def open(self, path: str, flags: int = os.O_RDONLY) -> pyfuse3.FileInfo:
        return await self.ops.open(self.ino(path), pyfuse3.FlagT(flags), CTX)


async def refused(call: Awaitable[object]) -> str:
    """Return the name of the errno that a handler answers with."""
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await call
    return errno.errorcode[caught.value.errno]


@pytest.fixture
def tree() -> Iterator[Tree]:
    with tempfile.TemporaryDirectory() as top:
        build(Path(top) / "m", ENTRIES, SOURCES)
        with Manifest(Path(top) / "m") as manifest:
            yield Tree(manifest)


@pytest.fixture
def mounted(tree: Tree) -> Mounted:
    return Mounted(tree)


# Names and attributes ------------------------------------------------------------------------------------------


async def test_attributes_of_a_file(mounted: Mounted) -> None:
    found = await mounted.attributes("d/e/z")
    assert found.st_mode == stat.S_IFREG | 0o444
    assert (found.st_uid, found.st_gid, found.st_nlink, found.st_rdev) == (7, 8, 1, 0)
    assert (found.st_size, found.st_blocks, found.st_blksize) == (513, 2, 4096)
    assert found.st_mtime_ns == found.st_atime_ns == found.st_ctime_ns == 5
    assert (found.attr_timeout, found.entry_timeout) == (FOR_EVER_S, FOR_EVER_S)


async def test_attributes_of_directories(mounted: Mounted) -> None:
    root = await mounted.ops.getattr(pyfuse3.InodeT(ROOT), CTX)
    assert root.st_mode == stat.S_IFDIR | 0o555
    assert root.st_nlink == 2 + 3
    assert root.st_mtime_ns == 2_000_000_002
    assert (await mounted.attributes("empty")).st_nlink == 2
    assert (await mounted.attributes("d")).st_nlink == 3


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o777])
async def test_owner_and_umask(tree: Tree, umask: int) -> None:
    mounted = Mounted(tree, owner=Owner(1000, 100, umask))
    found = await mounted.attributes("a.txt")
    assert (found.st_uid, found.st_gid) == (1000, 100)
    assert stat.S_IMODE(found.st_mode) == 0o444 & ~umask
    assert stat.S_IMODE((await mounted.attributes("d")).st_mode) == 0o555 & ~umask


async def test_an_inode_that_never_was_is_stale(mounted: Mounted) -> None:
    nowhere = pyfuse3.InodeT(99_999)
    ops = mounted.ops
    with capture_logs() as lines:
        assert await refused(ops.getattr(nowhere, CTX)) == "ESTALE"
        handle = pyfuse3.FileHandleT(nowhere)
        assert await refused(ops.readdir(handle, 0, cast("pyfuse3.ReaddirToken", None))) == "ESTALE"
        assert await refused(ops.listxattr(nowhere, CTX)) == "ESTALE"
        name = pyfuse3.XAttrNameT(b"user.amlmount.etag")
        assert await refused(ops.getxattr(nowhere, name, CTX)) == "ESTALE"
    assert len(lines) == 1  # for the inode, not for each question
    assert "99999" in lines[0]["event"]


# Directories ---------------------------------------------------------------------------------------------------


async def listing(
    mounted: Mounted, path: str, monkeypatch: pytest.MonkeyPatch, reply_entries: int, start: int = 0
) -> list[tuple[bytes, int, int]]:
    """List a directory as the kernel does, a reply of so many entries at a time."""
    out: list[tuple[bytes, int, int]] = []
    room = 0

    def reply(token: object, name: bytes, attributes: pyfuse3.EntryAttributes, next_id: int) -> bool:
        nonlocal room
        if room == 0:
            return False
        room -= 1
        out.append((name, attributes.st_ino, next_id))
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    fh = await mounted.ops.opendir(mounted.ino(path) if path else pyfuse3.InodeT(ROOT), CTX)
    at = start
    while True:
        before, room = len(out), reply_entries
        await mounted.ops.readdir(fh, at, cast("pyfuse3.ReaddirToken", None))
        if len(out) == before:
            await mounted.ops.releasedir(fh)
            return out
        at = out[-1][2]


@pytest.mark.parametrize("reply_entries", [1, 7, 127, 128, 129, 1000, 2000])
async def test_directories_are_listed_in_pages(
    mounted: Mounted, monkeypatch: pytest.MonkeyPatch, reply_entries: int
) -> None:
    found = await listing(mounted, "many", monkeypatch, reply_entries)
    assert [name for name, _, _ in found] == [b"f%04d" % n for n in range(1000)]
    assert [ino for _, ino, _ in found] == [mounted.ino(f"many/f{n:04}") for n in range(1000)]
    assert [number for _, _, number in found] == list(range(1, 1001))


async def test_a_listing_goes_on_where_it_stood(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    # telldir and seekdir: the number is all there is.
    assert (await listing(mounted, "many", monkeypatch, 10, start=995))[0][0] == b"f0995"
    assert await listing(mounted, "many", monkeypatch, 10, start=1000) == []
    assert await listing(mounted, "many", monkeypatch, 10, start=5000) == []


async def test_other_directories(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await listing(mounted, "empty", monkeypatch, 10) == []
    assert [n for n, _, _ in await listing(mounted, "d", monkeypatch, 10)] == [b"e", b"x\ny"]
    names = [n for n, _, _ in await listing(mounted, "", monkeypatch, 100)]
    assert names == [b"a.txt", b"b.bin", b"d", b"empty", b"local", b"many"]


# Opening -------------------------------------------------------------------------------------------------------

WRITING = (os.O_WRONLY, os.O_RDWR, os.O_TRUNC, os.O_APPEND | os.O_WRONLY, os.O_CREAT | os.O_RDWR)
READING = (os.O_RDONLY, os.O_NONBLOCK, os.O_CLOEXEC, os.O_NOFOLLOW, os.O_DIRECT)


@pytest.mark.parametrize("handleless", [OLD, NEW])
async def test_opening_for_writing_is_refused(mounted: Mounted, handleless: Handleless) -> None:
    mounted.handleless = handleless
    for flags in WRITING:
        assert await refused(mounted.open("a.txt", flags)) == "EROFS"


async def test_a_kernel_that_can_do_without_opens_is_told_so(mounted: Mounted) -> None:
    """It takes ENOSYS as: open by yourself, from now on. It is not a failure, and no line in the log."""
    mounted.handleless = NEW
    with capture_logs() as lines:
        for flags in READING:
            assert await refused(mounted.open("a.txt", flags)) == "ENOSYS"
        assert await refused(mounted.ops.opendir(pyfuse3.InodeT(ROOT), CTX)) == "ENOSYS"
    assert lines == []
    assert mounted.counters.read_errors == 0


@pytest.mark.parametrize(("files", "folders"), [(True, False), (False, True)])
async def test_files_and_folders_are_told_apart(mounted: Mounted, files: bool, folders: bool) -> None:
    mounted.handleless = Handleless(files, folders)
    if files:
        assert await refused(mounted.open("a.txt")) == "ENOSYS"
        assert await mounted.ops.opendir(mounted.ino("d"), CTX) == mounted.ino("d")
    else:
        assert (await mounted.open("a.txt")).fh == mounted.ino("a.txt")
        assert await refused(mounted.ops.opendir(mounted.ino("d"), CTX)) == "ENOSYS"


async def test_an_older_kernel_keeps_pages_between_opens(mounted: Mounted) -> None:
    for flags in READING:
        info = await mounted.open("a.txt", flags)
        assert info.fh == mounted.ino("a.txt")  # a handle needs no state: any session can serve it
        assert info.keep_cache
        assert not info.direct_io
        await mounted.ops.release(info.fh)
    await mounted.ops.release(pyfuse3.FileHandleT(99_999))  # of a session that died


CHANGES: dict[str, Any] = {
    "mkdir": lambda ops, f: ops.mkdir(ROOT, b"n", 0o755, CTX),
    "mknod": lambda ops, f: ops.mknod(ROOT, b"n", stat.S_IFREG | 0o644, 0, CTX),
    "create": lambda ops, f: ops.create(ROOT, b"n", 0o644, os.O_WRONLY, CTX),
    "unlink": lambda ops, f: ops.unlink(ROOT, b"a.txt", CTX),
    "rmdir": lambda ops, f: ops.rmdir(ROOT, b"empty", CTX),
    "symlink": lambda ops, f: ops.symlink(ROOT, b"n", b"a.txt", CTX),
    "link": lambda ops, f: ops.link(f, ROOT, b"n", CTX),
    "rename": lambda ops, f: ops.rename(ROOT, b"a.txt", ROOT, b"n", 0, CTX),
    "setattr": lambda ops, f: ops.setattr(f, pyfuse3.EntryAttributes(), None, None, CTX),
    "write": lambda ops, f: ops.write(f, 0, b"x"),
    "setxattr": lambda ops, f: ops.setxattr(f, b"user.x", b"y", CTX),
    "removexattr": lambda ops, f: ops.removexattr(f, b"user.amlmount.etag", CTX),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_every_change_is_refused_even_on_a_mount_made_writable(mounted: Mounted, change: str) -> None:
    # The kernel refuses them on a mount with "ro"; root can take that option away.
    assert await refused(CHANGES[change](mounted.ops, mounted.ino("a.txt"))) == "EROFS"


# Errors --------------------------------------------------------------------------------------------------------

HANDLERS: dict[str, Any] = {
    "getattr": lambda ops: ops.getattr(ROOT, CTX),
    "opendir": lambda ops: ops.opendir(ROOT, CTX),
    "readdir": lambda ops: ops.readdir(ROOT, 0, None),
    "open": lambda ops: ops.open(2, 0, CTX),
    "getxattr": lambda ops: ops.getxattr(2, b"user.amlmount.etag", CTX),
    "listxattr": lambda ops: ops.listxattr(2, CTX),
    "statfs": lambda ops: ops.statfs(CTX),
}


def break_all(mounted: Mounted, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(*args: object) -> Any:
        raise error

    for method in ("get", "children"):
        monkeypatch.setattr(Tree, method, broken)
    monkeypatch.setattr(Tree, "info", property(broken))
    monkeypatch.setattr(mounted.ops, "_handleless", broken)


@pytest.mark.parametrize("handler", HANDLERS)
async def test_no_handler_lets_anything_but_an_errno_out(
    mounted: Mounted, handler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug = RuntimeError("the manifest's disk is gone")
    break_all(mounted, monkeypatch, bug)
    with capture_logs() as lines:
        for _ in range(2):
            assert await refused(HANDLERS[handler](mounted.ops)) == "EIO"
    assert [(line["log_level"], line["exc_info"]) for line in lines] == [("error", bug)] * 2


@pytest.mark.parametrize("handler", HANDLERS)
async def test_every_handler_says_what_failed_once(
    mounted: Mounted, handler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_all(mounted, monkeypatch, ManifestError("the manifest is damaged", hint="import it again"))
    with capture_logs() as lines:
        for _ in range(2):
            assert await refused(HANDLERS[handler](mounted.ops)) == "EIO"
    (line,) = lines
    assert (line["event"], line["do"]) == ("the manifest is damaged", "import it again")


# What else a file system says ----------------------------------------------------------------------------------


async def test_statfs(mounted: Mounted) -> None:
    found = await mounted.ops.statfs(CTX)
    total = sum(e.size for e in ENTRIES)
    assert found.f_blocks * found.f_frsize >= total > (found.f_blocks - 1) * found.f_frsize
    assert (found.f_bfree, found.f_bavail, found.f_ffree, found.f_favail) == (0, 0, 0, 0)
    assert found.f_files == len(ENTRIES) + 4  # the root, d, d/e, many; "empty" is an entry itself
    assert (found.f_bsize, found.f_namemax) == (4096, 255)


async def test_extended_attributes(mounted: Mounted) -> None:
    async def values(ino: pyfuse3.InodeT) -> dict[str, str]:
        names = await mounted.ops.listxattr(ino, CTX)
        return {n.decode(): (await mounted.ops.getxattr(ino, n, CTX)).decode() for n in names}

    assert await values(mounted.ino("a.txt")) == {
        "user.amlmount.etag": "0x1",
        "user.amlmount.url": "https://acc.blob.core.windows.net/box/pre/a.txt",
        "user.amlmount.md5": "5d41402abc4b2a76b9719d911017c592",
    }
    assert await values(mounted.ino("local")) == {
        "user.amlmount.etag": "6-7",
        "user.amlmount.url": "file:///data/local",
    }
    odd = await values(mounted.ino("d/x\ny"))
    assert odd["user.amlmount.url"] == "https://acc.blob.core.windows.net/box/pre/d/x\\ny"
    assert await values(mounted.ino("d")) == {}
    root = await values(pyfuse3.InodeT(ROOT))
    assert root == {
        "user.amlmount.digest": mounted.tree.info.digest,
        "user.amlmount.files": str(mounted.tree.info.files),
    }


@pytest.mark.parametrize("name", [b"user.amlmount.nope", b"user.other", b"security.capability", b""])
async def test_other_extended_attributes_are_none(mounted: Mounted, name: bytes) -> None:
    call = mounted.ops.getxattr(mounted.ino("a.txt"), pyfuse3.XAttrNameT(name), CTX)
    assert await refused(call) == errno.errorcode[pyfuse3.ENOATTR]
