"""The handlers, called without a mount: what each answers, and which errno each failure becomes."""

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

from amlmount import errors
from amlmount.blocks import ByteRange
from amlmount.dataset import Source
from amlmount.errors import AccessDenied, AmlmountError, ObjectChanged, ObjectMissing, StoreUnreachable
from amlmount.fetch import Fetcher, PinnedFile
from amlmount.manifest import ROOT, Manifest
from amlmount.metrics import Counters
from amlmount.operations import FOR_EVER_S, Operations, Owner
from amlmount.stores import Retrying
from amlmount.tree import Tree
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


class FakeFetcher:
    """Serves zeros, or raises what it is told to."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.asked: list[ByteRange] = []

    def window_limit(self, readers: int) -> int:
        return 1 << 26

    def known(self, key: object) -> bool:
        return False

    def start(self, pinned: PinnedFile, wanted: ByteRange, within: ByteRange | None = None) -> None:
        return None

    def ahead(self, pinned: PinnedFile, wanted: ByteRange) -> bool:
        return True

    def spent(self, pinned: PinnedFile, wanted: ByteRange) -> None:
        return None

    async def get(self, pinned: PinnedFile, wanted: ByteRange, within: ByteRange | None = None) -> memoryview:
        self.asked.append(wanted)
        if self.failure is not None:
            raise self.failure
        return memoryview(bytes(wanted.length))


class Mounted:
    """Operations over a real manifest, and the answers in a form that is easy to compare."""

    def __init__(self, tree: Tree, **more: Any) -> None:
        self.tree = tree
        self.fetcher = FakeFetcher()
        self.counters = Counters()
        self.inits = 0
        stores = [Retrying(FakeStore(identity=f"fake:{n}"), patience_s=1) for n in range(2)]
        self.ops = Operations(
            tree,
            stores,
            cast("Fetcher", self.fetcher),
            self.counters,
            structlog.get_logger(),
            owner=more.pop("owner", Owner(7, 8, 0o022)),
            on_init=self._count,
            **more,
        )

    def _count(self) -> None:
        self.inits += 1

    def ino(self, path: str) -> pyfuse3.InodeT:
        ino = ROOT
        for name in path.encode().split(b"/"):
            node = self.tree.lookup(ino, name)
            assert node is not None
            ino = node.ino
        return pyfuse3.InodeT(ino)

    async def attributes(self, path: str) -> pyfuse3.EntryAttributes:
        return await self.ops.getattr(self.ino(path), CTX)

    async def open(self, path: str, flags: int = os.O_RDONLY) -> pyfuse3.FileHandleT:
        return (await self.ops.open(self.ino(path), pyfuse3.FlagT(flags), CTX)).fh

    async def read(self, path: str, offset: int = 0, size: int = 100) -> bytes:
        return bytes(await self.ops.read(pyfuse3.FileHandleT(self.ino(path)), offset, size))


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


async def test_lookup(mounted: Mounted) -> None:
    ops, root = mounted.ops, pyfuse3.InodeT(ROOT)
    found = await ops.lookup(root, pyfuse3.FileNameT(b"a.txt"), CTX)
    assert (found.st_ino, found.st_size) == (mounted.ino("a.txt"), 5)
    same = await ops.lookup(mounted.ino("d"), pyfuse3.FileNameT(b"."), CTX)
    assert same.st_ino == mounted.ino("d")
    up = await ops.lookup(mounted.ino("d/e"), pyfuse3.FileNameT(b".."), CTX)
    assert up.st_ino == mounted.ino("d")


async def test_that_a_name_is_not_there_is_an_answer_to_remember(mounted: Mounted) -> None:
    for parent in (pyfuse3.InodeT(ROOT), mounted.ino("a.txt"), mounted.ino("empty"), pyfuse3.InodeT(99_999)):
        absent = await mounted.ops.lookup(parent, pyfuse3.FileNameT(b"nope"), CTX)
        assert absent.st_ino == 0
        assert absent.entry_timeout == FOR_EVER_S


async def test_an_inode_that_never_was_is_stale(mounted: Mounted) -> None:
    nowhere = 99_999
    ops = mounted.ops
    assert await refused(ops.getattr(pyfuse3.InodeT(nowhere), CTX)) == "ESTALE"
    assert await refused(ops.opendir(pyfuse3.InodeT(nowhere), CTX)) == "ESTALE"
    assert await refused(ops.open(pyfuse3.InodeT(nowhere), pyfuse3.FlagT(0), CTX)) == "ESTALE"
    assert await refused(ops.read(pyfuse3.FileHandleT(nowhere), 0, 1)) == "ESTALE"
    assert await refused(ops.listxattr(pyfuse3.InodeT(nowhere), CTX)) == "ESTALE"
    assert mounted.ops.open_files == 0


async def test_forget_does_nothing(mounted: Mounted) -> None:
    await mounted.ops.forget([(mounted.ino("a.txt"), 3)])
    assert (await mounted.attributes("a.txt")).st_size == 5


async def test_the_kernels_first_word_is_passed_on(mounted: Mounted) -> None:
    mounted.ops.init()
    assert mounted.inits == 1


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


# Reading -------------------------------------------------------------------------------------------------------


async def test_reads_are_exact_and_counted(mounted: Mounted) -> None:
    fh = await mounted.open("b.bin")
    assert len(await mounted.ops.read(fh, 0, 100)) == 100
    assert len(await mounted.ops.read(fh, 2_999_990, 100)) == 10
    assert len(await mounted.ops.read(fh, 3_000_000, 100)) == 0
    assert (mounted.counters.reads, mounted.counters.bytes_asked) == (3, 110)


async def test_opening_for_writing_is_refused(mounted: Mounted) -> None:
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_TRUNC, os.O_APPEND | os.O_WRONLY, os.O_CREAT | os.O_RDWR):
        assert await refused(mounted.open("a.txt", flags)) == "EROFS"
    assert mounted.ops.open_files == 0
    for flags in (os.O_RDONLY, os.O_NONBLOCK, os.O_CLOEXEC, os.O_NOFOLLOW, os.O_DIRECT):
        await mounted.ops.release(await mounted.open("a.txt", flags))


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


async def test_a_file_keeps_its_reader_until_its_last_handle_is_closed(mounted: Mounted) -> None:
    first, second = await mounted.open("a.txt"), await mounted.open("a.txt")
    other = await mounted.open("b.bin")
    assert first == second
    assert mounted.ops.open_files == 2
    await mounted.ops.release(first)
    assert mounted.ops.open_files == 2
    await mounted.ops.release(second)
    await mounted.ops.release(other)
    assert mounted.ops.open_files == 0
    await mounted.ops.release(other)  # of a session that died


async def test_a_handle_of_a_session_that_died_still_reads(mounted: Mounted) -> None:
    assert len(await mounted.read("a.txt")) == 5


async def test_the_kernel_keeps_pages_between_opens(mounted: Mounted) -> None:
    info = await mounted.ops.open(mounted.ino("a.txt"), pyfuse3.FlagT(0), CTX)
    assert info.keep_cache
    assert not info.direct_io


async def test_reads_that_measure_the_ceiling_are_zeros(tree: Tree) -> None:
    mounted = Mounted(tree, null_reads=True)
    assert await mounted.read("a.txt") == bytes(5)
    assert await mounted.read("b.bin", 2_999_999, 10) == bytes(1)
    assert await mounted.read("b.bin", 4_000_000, 10) == b""
    assert mounted.fetcher.asked == []


# Errors --------------------------------------------------------------------------------------------------------

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AmlmountError)]


@pytest.mark.parametrize("kind", ALL)
async def test_every_error_becomes_its_own_errno(mounted: Mounted, kind: type[AmlmountError]) -> None:
    mounted.fetcher.failure = kind("pre/a.txt: it failed")
    with capture_logs() as lines:
        assert await refused(mounted.read("a.txt")) == errno.errorcode[kind.errno]
    assert len(lines) == 1
    assert mounted.counters.read_errors == 1


@pytest.mark.parametrize(
    ("failure", "name"),
    [
        (ObjectChanged("pre/a.txt was overwritten"), "ESTALE"),
        (ObjectMissing("pre/a.txt: no such blob"), "EIO"),
        (AccessDenied("pre/a.txt: access denied"), "EACCES"),
        (StoreUnreachable("pre/a.txt: gave up"), "EIO"),
    ],
)
async def test_what_a_reader_gets_and_the_log_says(
    mounted: Mounted, failure: AmlmountError, name: str
) -> None:
    mounted.fetcher.failure = failure
    with capture_logs() as lines:
        for _ in range(5):
            assert await refused(mounted.read("a.txt")) == name
    (line,) = lines
    assert line["log_level"] == "error"
    assert "pre/a.txt" in line["event"]
    assert (line["errno"], line["do"]) == (name, failure.hint)
    assert failure.hint
    assert mounted.counters.read_errors == 5
    assert mounted.counters.stale_reads == 5 * isinstance(failure, ObjectChanged)


async def test_each_file_and_each_kind_of_failure_has_a_line(mounted: Mounted) -> None:
    with capture_logs() as lines:
        for path in ("a.txt", "d/e/z"):
            for failure in (ObjectMissing("gone"), AccessDenied("denied")):
                mounted.fetcher.failure = failure
                await refused(mounted.read(path))
    assert len(lines) == 4


async def test_a_secret_in_an_error_stays_out_of_the_log(mounted: Mounted) -> None:
    mounted.fetcher.failure = StoreUnreachable("https://h/c?sv=1&sig=CANARY")
    with capture_logs() as lines:
        await refused(mounted.read("a.txt"))
    assert "CANARY" not in str(lines)


@pytest.mark.parametrize("bug", [ValueError("a bug"), AssertionError(), KeyError(5), OSError(28, "no space")])
async def test_the_unexpected_costs_one_request(mounted: Mounted, bug: Exception) -> None:
    mounted.fetcher.failure = bug
    with capture_logs() as lines:
        assert await refused(mounted.read("a.txt")) == "EIO"
    (line,) = lines
    assert line["log_level"] == "error"
    assert line["exc_info"]
    assert line["handler"] == "read"
    mounted.fetcher.failure = None
    assert len(await mounted.read("a.txt")) == 5


async def test_a_bug_behind_the_fetcher_shows_its_traceback(mounted: Mounted) -> None:
    try:
        raise ZeroDivisionError
    except ZeroDivisionError as bug:
        failure = AmlmountError("unexpected")
        failure.__cause__ = bug
    mounted.fetcher.failure = failure
    with capture_logs() as lines:
        assert await refused(mounted.read("a.txt")) == "EIO"
    assert lines[0]["exc_info"] is failure.__cause__


HANDLERS: dict[str, Any] = {
    "lookup": lambda ops: ops.lookup(ROOT, b"a.txt", CTX),
    "getattr": lambda ops: ops.getattr(ROOT, CTX),
    "opendir": lambda ops: ops.opendir(ROOT, CTX),
    "readdir": lambda ops: ops.readdir(ROOT, 0, None),
    "open": lambda ops: ops.open(2, 0, CTX),
    "read": lambda ops: ops.read(2, 0, 10),
    "getxattr": lambda ops: ops.getxattr(2, b"user.amlmount.etag", CTX),
    "listxattr": lambda ops: ops.listxattr(2, CTX),
}


@pytest.mark.parametrize("handler", HANDLERS)
async def test_no_handler_lets_anything_but_an_errno_out(
    mounted: Mounted, handler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Tree, *args: object) -> None:
        raise RuntimeError("the manifest's disk is gone")

    for method in ("get", "lookup", "children"):
        monkeypatch.setattr(Tree, method, broken)
    with capture_logs() as lines:
        assert await refused(HANDLERS[handler](mounted.ops)) == "EIO"
    assert [line["handler"] for line in lines] == [handler]


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
