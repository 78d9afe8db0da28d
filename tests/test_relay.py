"""The relay between a kernel and a library that a test plays: who answers what, and what is passed on how."""

from __future__ import annotations

import errno
import os
import random
import select
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
from structlog.testing import capture_logs

from amlmount import fetch
from amlmount import relay as relay_module
from amlmount.across import AcrossFiles
from amlmount.blocks import KIB, MIB, BlockKey
from amlmount.cache import BlockCache
from amlmount.desk import FOR_EVER_S, Desk
from amlmount.errors import ObjectChanged
from amlmount.manifest import ROOT
from amlmount.metrics import Counters
from amlmount.reader import FileReader
from amlmount.relay import BACKGROUND, Relay, device_fds
from tests import fuse_abi as abi
from tests.desk_rig import DeskRig, desk_rig

LARGE = random.Random(1).randbytes(9 * MIB + 17)
FILES = {
    "a.txt": b"hello",
    "large": LARGE,
    "d/e/z": b"x" * 513,
    **{f"many/f{n:02d}": random.Random(n).randbytes(1000 + n) for n in range(50)},
}
OURS = {"LOOKUP", "READ", "GETXATTR", "FORGET", "BATCH_FORGET", "INTERRUPT", "READDIR", "READDIRPLUS", "INIT"}


def packet_pair() -> tuple[socket.socket, socket.socket]:
    """Return two ends where a message is written and read whole, as on the device."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Kernel:
    """The kernel's side of the device."""

    def __init__(self, end: socket.socket) -> None:
        self._end = trio.socket.from_stdlib_socket(end)
        self._unique = 0
        self._answers: dict[int, tuple[int, bytes]] = {}
        self._came = trio.Event()

    async def send(self, opcode: str, ino: int, body: bytes = b"") -> int:
        self._unique += 2
        await self._end.send(abi.request(opcode, ino, body, unique=self._unique))
        return self._unique

    async def listen(self) -> None:
        while data := await self._end.recv(1 << 20):
            unique, error, body = abi.answer(data)
            assert unique not in self._answers, "answered twice"
            self._answers[unique] = error, body
            came, self._came = self._came, trio.Event()
            came.set()

    async def answer(self, unique: int) -> tuple[int, bytes]:
        with trio.fail_after(10):
            while unique not in self._answers:
                await self._came.wait()
        return self._answers[unique]

    async def ask(self, opcode: str, ino: int, body: bytes = b"") -> tuple[int, bytes]:
        """Return errno and body of the answer."""
        return await self.answer(await self.send(opcode, ino, body))

    async def read(self, ino: int, offset: int, size: int) -> bytes:
        error, body = await self.ask("READ", ino, abi.read_in(offset, size))
        assert error == 0, errno.errorcode[error]
        return body

    async def refused(self, opcode: str, ino: int, body: bytes = b"") -> str:
        """Return the name of the errno."""
        error, _ = await self.ask(opcode, ino, body)
        return errno.errorcode[error]

    def unmount(self) -> None:
        self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._end.close()

    def unanswered(self) -> int:
        return self._unique // 2 - len(self._answers)


class Relayed:
    """A relay at work."""

    def __init__(self, r: DeskRig, kernel: Kernel, relay: Relay, library_fd: int) -> None:
        self.r = r
        self.kernel = kernel
        self.relay = relay
        self.library = trio.socket.from_stdlib_socket(socket.socket(fileno=os.dup(library_fd)))
        self.ended = trio.Event()

    async def run(self) -> None:
        await self.relay.run()
        self.ended.set()

    async def passed(self) -> bytes:
        """Return the next message that the library gets."""
        with trio.fail_after(10):
            return await self.library.recv(1 << 20)

    def nothing_passed(self) -> bool:
        try:
            return not os.read(self.library.fileno(), 1 << 20)
        except BlockingIOError:
            return True


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket whose other end is closed gives nothing; the device says ENODEV."""
    real = os.readv

    def readv(fd: int, buffers: Sequence[Any]) -> int:
        length = real(fd, buffers)
        if length == 0:
            raise OSError(errno.ENODEV, "unmounted")
        return length

    monkeypatch.setattr(os, "readv", readv)


@asynccontextmanager
async def relayed(**more: Any) -> AsyncIterator[Relayed]:
    ours, device = packet_pair()
    async with desk_rig(FILES, **more) as r:
        with device:
            relay = Relay(device.fileno(), r.desk, r.counters)
            r.rig.fetcher.answers = relay
            kernel = Kernel(ours)
            found = Relayed(r, kernel, relay, device.fileno())
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(kernel.listen)
                    nursery.start_soon(found.run)
                    yield found
                    nursery.cancel_scope.cancel()
            finally:
                kernel.close()
                relay.close()
                found.library.close()


# Names ---------------------------------------------------------------------------------------------------------


async def test_a_name_is_answered() -> None:
    async with relayed() as m:
        ino = m.r.ino("a.txt")
        error, body = await m.kernel.ask("LOOKUP", ROOT, b"a.txt\0")
        found = abi.parsed(abi.EntryOut, body)
        assert (error, len(body)) == (0, 128)
        assert (found.nodeid, found.attr.ino, found.attr.size) == (ino, ino, 5)
        assert (found.entry_valid, found.attr_valid) == (FOR_EVER_S, FOR_EVER_S)
        assert m.nothing_passed()


async def test_that_a_name_is_not_there_is_an_answer_to_remember() -> None:
    async with relayed() as m:
        for parent in (ROOT, m.r.ino("a.txt"), 99_999):
            error, body = await m.kernel.ask("LOOKUP", parent, b"nope\0")
            found = abi.parsed(abi.EntryOut, body)
            assert (error, found.nodeid, found.entry_valid) == (0, 0, FOR_EVER_S)


@pytest.mark.parametrize("name", [b"security.capability", b"system.posix_acl_access", b"trusted.x", b""])
async def test_other_peoples_attributes_are_not_supported(name: bytes) -> None:
    async with relayed() as m:
        body = bytes(abi.GetXattrIn(size=100)) + name + b"\0"
        assert await m.kernel.refused("GETXATTR", ROOT, body) == "ENOTSUP"  # as EOPNOTSUPP
        assert m.nothing_passed()


# Reads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads_answer", [True, False])
async def test_reads_are_answered_in_full(threads_answer: bool) -> None:
    async with relayed() as m:
        if not threads_answer:
            m.r.rig.fetcher._pilot.answers = None
        for path, data in FILES.items():
            ino = m.r.ino(path)
            for offset, size in ((0, 4096), (3, 100), (len(data) - 2, 100), (len(data), 100), (0, 4096)):
                assert await m.kernel.read(ino, offset, size) == data[offset : offset + size]
        got = b""
        while len(got) < len(LARGE):
            got += await m.kernel.read(m.r.ino("large"), len(got), 128 * KIB)
        assert got == LARGE
        assert m.kernel.unanswered() == 0
        assert m.nothing_passed()
        assert m.r.counters.reads == 5 * len(FILES) + -(-len(LARGE) // (128 * KIB))
        asked = sum(min(4096, len(d)) * 2 + len(d[3:103]) + 2 for d in FILES.values()) + len(LARGE)
        assert m.r.counters.bytes_asked == asked
        assert m.r.counters.busy_s > 0


@pytest.mark.parametrize("threads_answer", [True, False])
async def test_a_read_that_waits_holds_up_no_other(threads_answer: bool) -> None:
    async with relayed() as m:
        if not threads_answer:
            m.r.rig.fetcher._pilot.answers = None
        await m.kernel.read(m.r.ino("d/e/z"), 0, 10)
        with m.r.fake.held():
            waiting = await m.kernel.send("READ", m.r.ino("a.txt"), abi.read_in(0, 100))
            also = await m.kernel.send("READ", m.r.ino("a.txt"), abi.read_in(1, 3))
            await m.r.rig.store_has(2)
            assert await m.kernel.read(m.r.ino("d/e/z"), 0, 1000) == FILES["d/e/z"]
            assert (await m.kernel.ask("LOOKUP", ROOT, b"a.txt\0"))[0] == 0
            assert m.kernel.unanswered() == 2
        assert await m.kernel.answer(waiting) == (0, b"hello")
        assert await m.kernel.answer(also) == (0, b"ell")
        assert m.r.paths_read().count("a.txt") == 1


async def test_a_read_is_answered_though_its_bytes_came_while_it_was_asked() -> None:
    """Between a thread's look at who waits and its word that the bytes are there; no other request comes."""
    async with relayed() as m:
        fetcher = m.r.rig.fetcher
        arrived = fetcher._pilot._arrived
        joined = False

        def late(landings: Any) -> None:
            nonlocal joined
            if not joined:
                joined = True
                trio.from_thread.run_sync(join, trio_token=token)
            arrived(landings)

        def join() -> None:
            assert m.r.desk.read(m.r.ino("a.txt"), 1, 3, 9999) is None

        token = trio.lowlevel.current_trio_token()
        fetcher._pilot._arrived = late
        assert await m.kernel.read(m.r.ino("a.txt"), 0, 100) == b"hello"
        assert await m.kernel.answer(9999) == (0, b"ell")


async def test_files_read_in_order_are_fetched_ahead() -> None:
    async with relayed() as m:
        for path, data in FILES.items():
            if path.startswith("many/"):
                assert await m.kernel.read(m.r.ino(path), 0, 4096) == data
        assert m.r.counters.prefetched >= 45


@pytest.mark.parametrize("threads_answer", [True, False])
async def test_a_read_that_fails_is_refused(threads_answer: bool) -> None:
    async with relayed() as m:
        if not threads_answer:
            m.r.rig.fetcher._pilot.answers = None
        m.r.fake.fail(ObjectChanged("a.txt was overwritten"), path="a.txt", times=None)
        with capture_logs() as lines:
            for _ in range(2):
                assert await m.kernel.refused("READ", m.r.ino("a.txt"), abi.read_in(0, 10)) == "ESTALE"
        assert len(lines) == 1
        assert (m.r.counters.read_errors, m.r.counters.stale_reads) == (2, 2)
        assert await m.kernel.refused("READ", 99_999, abi.read_in(0, 10)) == "ESTALE"
        assert await m.kernel.read(m.r.ino("d/e/z"), 0, 4) == b"xxxx"


async def test_a_read_of_a_store_that_hangs_ends_at_its_deadline() -> None:
    async with relayed() as m:
        m.r.rig.fetcher._deadline_s = 0.05
        with m.r.fake.held():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(m.r.rig.fetcher.watch)
                assert await m.kernel.refused("READ", m.r.ino("a.txt"), abi.read_in(0, 10)) == "EIO"
                assert await m.kernel.refused("READ", m.r.ino("large"), abi.read_in(0, 10)) == "EIO"
                assert m.r.rig.fetcher.waits_since is None
                nursery.cancel_scope.cancel()
        assert m.kernel.unanswered() == 0


async def test_a_read_that_the_cache_disk_holds_up_is_answered_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "DISK_PATIENCE_S", 0.05)
    cache = BlockCache(
        tmp_path / "cache", cache_size=MIB, min_free=0, queue_bytes=MIB, counters=Counters(), log=structlog.get_logger()
    )  # fmt: skip
    stuck, back = threading.Event(), threading.Event()
    real = cache.read_all

    def read_all(keys: Sequence[BlockKey]) -> list[memoryview | None]:
        if keys and not stuck.is_set():
            stuck.wait(20)
            back.set()
            return [memoryview(b"hello") for _ in keys]  # it was there, after all
        return real(keys)

    monkeypatch.setattr(cache, "read_all", read_all)
    async with relayed(cache=cache) as m, trio.open_nursery() as nursery:
        nursery.start_soon(m.r.rig.fetcher.watch)
        ino = m.r.ino("a.txt")
        with m.r.fake.held():
            first = await m.kernel.send("READ", ino, abi.read_in(0, 100))
            await m.r.rig.store_has(1)  # the disk was given up
            second = await m.kernel.send("READ", ino, abi.read_in(1, 3))
            with trio.fail_after(10):
                while m.r.counters.reads < 2:
                    await trio.lowlevel.checkpoint()
            stuck.set()
            await trio.to_thread.run_sync(back.wait, 10)
            assert await m.kernel.answer(first) == (0, b"hello")  # who has the bytes answers
            assert await m.kernel.answer(second) == (0, b"ell")
        await m.r.rig.landed()
        assert await m.kernel.read(ino, 0, 10) == b"hello"
        assert m.r.counters.bytes_asked == 5 + 3 + 5
        nursery.cancel_scope.cancel()
    cache.close()


# What goes wrong -----------------------------------------------------------------------------------------------


@contextmanager
def broken(method: str, kind: type = Desk) -> Iterator[None]:
    def bug(*args: object) -> None:
        raise RuntimeError("a bug")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, method, bug)
        yield


async def test_a_bug_behind_a_lookup_costs_one_request() -> None:
    async with relayed() as m:
        with broken("lookup"), capture_logs() as lines:
            assert await m.kernel.refused("LOOKUP", ROOT, b"a.txt\0") == "EIO"
        assert [(line["log_level"], str(line["exc_info"])) for line in lines] == [("error", "a bug")]
        assert (await m.kernel.ask("LOOKUP", ROOT, b"a.txt\0"))[0] == 0


@pytest.mark.parametrize("method", ["read", "wait"])
async def test_a_bug_behind_a_read_costs_one_request(method: str) -> None:
    async with relayed() as m:
        m.r.rig.fetcher._pilot.answers = None  # so that there is a wait
        ino = m.r.ino("a.txt")
        with broken(method), capture_logs() as lines:
            assert await m.kernel.refused("READ", ino, abi.read_in(0, 10)) == "EIO"
        assert [(line["log_level"], str(line["exc_info"])) for line in lines] == [("error", "a bug")]
        assert await m.kernel.read(ino, 0, 10) == b"hello"


@pytest.mark.parametrize("kind", [AcrossFiles, FileReader])
async def test_a_bug_in_what_comes_after_a_read_costs_a_line_in_the_log(kind: type) -> None:
    async with relayed() as m:
        with broken("reached" if kind is AcrossFiles else "go_on", kind), capture_logs() as lines:
            for path in ("a.txt", "large", "d/e/z", "large"):
                assert await m.kernel.read(m.r.ino(path), 0, 10) == FILES[path][:10]
        assert [str(line["exc_info"]) for line in lines] == ["a bug"]


async def test_requests_that_were_taken_back_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relayed() as m:
        failures = [errno.ENOENT, errno.EINTR, errno.ENOENT]
        real = os.readv

        def readv(fd: int, buffers: Sequence[Any]) -> int:
            if failures:
                raise OSError(failures.pop(), "taken back")
            return real(fd, buffers)

        monkeypatch.setattr(os, "readv", readv)
        assert await m.kernel.read(m.r.ino("a.txt"), 0, 10) == b"hello"
        assert failures == []


@pytest.mark.parametrize("gone", [errno.ENODEV, errno.ECONNABORTED])
async def test_an_unmount_ends_it(gone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with relayed() as m:
        real = os.readv

        def readv(fd: int, buffers: Sequence[Any]) -> int:
            try:
                return real(fd, buffers)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    error.errno = gone
                raise

        monkeypatch.setattr(os, "readv", readv)
        with m.r.fake.held():
            await m.kernel.send("READ", m.r.ino("large"), abi.read_in(0, 10))  # nobody waits for it any more
            await m.r.rig.store_has(1)
            m.kernel.unmount()
            with trio.fail_after(10):
                await m.ended.wait()


async def test_another_error_of_the_device_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def readv(fd: int, buffers: Sequence[Any]) -> int:
        raise OSError(errno.EPERM, "no")

    ours, device = packet_pair()
    async with desk_rig(FILES) as r:
        with ours, device:
            relay = Relay(device.fileno(), r.desk, r.counters)
            monkeypatch.setattr(os, "readv", readv)
            with pytest.RaisesGroup(PermissionError):
                await relay.run()
            relay.close()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV])
async def test_an_answer_that_nobody_waits_for_any_more_is_no_failure(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with relayed() as m:
        real, refused = os.writev, 0

        def writev(fd: int, parts: Sequence[Any]) -> int:
            nonlocal refused
            if refused < 3:
                refused += 1
                raise OSError(number, "interrupted")
            return real(fd, parts)

        monkeypatch.setattr(os, "writev", writev)
        await m.kernel.send("LOOKUP", ROOT, b"a.txt\0")
        await m.kernel.send("READ", m.r.ino("a.txt"), abi.read_in(0, 10))
        await m.kernel.send("GETATTR", ROOT)
        await m.library.send(abi.request("GETATTR", ROOT)[:16])  # an answer of the library's
        await trio.to_thread.run_sync(lambda: None)
        assert await m.passed()
        with trio.fail_after(10):
            while refused < 3:
                await trio.lowlevel.checkpoint()
        assert await m.kernel.read(m.r.ino("d/e/z"), 0, 4) == b"xxxx"


@pytest.mark.parametrize(
    "kind", ["a name", "no name", "in memory", "from a thread", "from a task", "passed on"]
)
async def test_an_answer_that_the_kernel_refuses_costs_one_request(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with relayed() as m:
        ino = m.r.ino("a.txt")
        if kind == "in memory":
            await m.kernel.read(ino, 0, 10)
        if kind == "from a task":
            m.r.rig.fetcher._pilot.answers = None

        def writev(fd: int, parts: Sequence[Any]) -> int:
            raise OSError(errno.EINVAL, "no such answer")

        with monkeypatch.context() as patch, capture_logs() as lines:
            patch.setattr(os, "writev", writev)
            if kind == "passed on":
                unique = await m.kernel.send("STATFS", ROOT)
                await m.passed()
                await m.library.send(bytes(abi.OutHeader(len=16, unique=unique)))
                error, _ = await m.kernel.answer(unique)
                assert errno.errorcode[error] == "EIO"
            elif kind.endswith("name"):
                name = b"a.txt\0" if kind == "a name" else b"none\0"
                assert await m.kernel.refused("LOOKUP", ROOT, name) == "EIO"
            else:
                assert await m.kernel.refused("READ", ino, abi.read_in(0, 10)) == "EIO"
        assert len(lines) == 1
        assert await m.kernel.read(ino, 0, 10) == b"hello"


# What is passed on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", sorted(set(abi.OPCODES) - OURS))
async def test_all_else_goes_to_the_library_and_its_answer_comes_back(opcode: str) -> None:
    async with relayed() as m:
        body = random.Random(opcode).randbytes(48)
        unique = await m.kernel.send(opcode, 7, body)
        assert await m.passed() == abi.request(opcode, 7, body, unique=unique)
        answer = bytes(abi.OutHeader(len=16 + 5, error=0, unique=unique)) + b"fives"
        await m.library.send(answer)
        assert await m.kernel.answer(unique) == (0, b"fives")


async def test_our_own_attributes_are_the_librarys() -> None:
    async with relayed() as m:
        body = bytes(abi.GetXattrIn(size=100)) + b"user.amlmount.etag\0"
        unique = await m.kernel.send("GETXATTR", 7, body)
        assert await m.passed() == abi.request("GETXATTR", 7, body, unique=unique)


@pytest.mark.parametrize("opcode", ["FORGET", "BATCH_FORGET", "INTERRUPT"])
async def test_what_wants_no_answer_gets_none(opcode: str) -> None:
    async with relayed() as m:
        await m.kernel.send(opcode, m.r.ino("a.txt"), bytes(16))
        await m.kernel.read(m.r.ino("a.txt"), 0, 10)
        assert m.kernel.unanswered() == 1
        assert m.nothing_passed()


@pytest.mark.parametrize("opcode", ["READDIR", "READDIRPLUS"])
@pytest.mark.parametrize("size", [4096, 1 << 20])
async def test_a_listing_is_passed_with_the_inode_as_its_handle_and_no_larger_than_a_message(
    opcode: str, size: int
) -> None:
    async with relayed() as m:
        unique = await m.kernel.send(opcode, 77, abi.read_in(5, size, fh=0))
        capped = min(size, 128 * KIB)
        assert await m.passed() == abi.request(opcode, 77, abi.read_in(5, capped, fh=77), unique=unique)
        listing = os.urandom(capped)
        await m.library.send(bytes(abi.OutHeader(len=16 + capped, unique=unique)) + listing)
        assert await m.kernel.answer(unique) == (0, listing)


def begun(m: Relayed) -> bool:
    return m.relay.begun.is_set()


@pytest.mark.parametrize("flags", [0, abi.NO_OPEN_SUPPORT, abi.NO_OPENDIR_SUPPORT, 0xFFFFFFFF])
async def test_the_answer_to_init_is_amended_once(flags: int) -> None:
    async with relayed() as m:
        assert m.relay.handleless == (False, False)
        unique = await m.kernel.send("INIT", 0, abi.init_in(flags))
        assert await m.passed() == abi.request("INIT", 0, abi.init_in(flags), unique=unique)
        files, folders = bool(flags & abi.NO_OPEN_SUPPORT), bool(flags & abi.NO_OPENDIR_SUPPORT)
        assert m.relay.handleless == (files, folders)
        assert not begun(m)
        theirs = abi.InitOut(
            major=7, minor=38, max_readahead=1 << 17, flags=5, max_write=1 << 20, max_pages=256
        )
        await m.library.send(bytes(abi.OutHeader(len=80, unique=unique)) + bytes(theirs))
        error, body = await m.kernel.answer(unique)
        assert error == 0
        theirs.max_background, theirs.congestion_threshold = BACKGROUND, BACKGROUND * 3 // 4
        assert body == bytes(theirs)
        assert begun(m)
        # What comes after is none of its business, though it should look the same.
        later = await m.kernel.send("STATFS", ROOT)
        answer = bytes(abi.OutHeader(len=80, unique=later)) + bytes(64)
        await m.passed()
        await m.library.send(answer)
        assert await m.kernel.answer(later) == (0, bytes(64))


async def test_the_library_is_heard_though_requests_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "_AT_ONCE", 2)
    async with relayed() as m:
        unique = await m.kernel.send("GETATTR", ROOT)
        answered = False

        async def answer() -> None:
            nonlocal answered
            await m.passed()
            await m.library.send(bytes(abi.OutHeader(len=16, unique=unique)))
            assert await m.kernel.answer(unique) == (0, b"")
            answered = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            with trio.fail_after(10):
                while not answered:
                    for _ in range(10):
                        await m.kernel.send("LOOKUP", ROOT, b"a.txt\0")


# The end -------------------------------------------------------------------------------------------------------


async def test_what_a_thread_brings_after_the_end_goes_nowhere() -> None:
    """Least of all into a file that has the device's number by then."""
    ours, device = packet_pair()
    async with desk_rig(FILES) as r:
        with ours, device:
            relay = Relay(device.fileno(), r.desk, r.counters)
            library = os.dup(device.fileno())
            number = relay._device
            relay.close()
            relay.close()
            assert os.read(library, 10) == b""  # the library hears of it
            os.close(library)
            others = [os.memfd_create("another file") for _ in range(20)]
            relay._device = number  # as a thread saw it that was about to write
            relay.answer(2, memoryview(b"late"))
            relay.refuse(4, ObjectChanged("late"), 2)
            assert [os.fstat(other).st_size for other in others] == [0] * 20
            for other in others:
                os.close(other)
            assert select.select([ours], [], [], 0)[0]
            assert ours.recv(100) == b""  # nor to the kernel


def test_descriptors_of_the_device_are_found() -> None:
    before = device_fds()
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        assert device_fds() == before | {fd}
    finally:
        os.close(fd)
    assert device_fds() == before
