"""Stands between the kernel and pyfuse3: answers names and reads itself, passes everything else on.

pyfuse3 is given one end of a socket in place of /dev/fuse, and reads and writes messages there as it would on the
device. What a training job sends most, LOOKUP and READ, never gets there: here each is one read(2), one answer out of
memory and one writev(2), with no task, no lock and no wait between them (a third of the processor time that the
library's loop takes). Reads that have to wait become tasks.

Passing on also gives what the library has no knob for: opens and closes that cost no message (its `read` is told a
handle, never the inode), the kernel's own cache of directories, and more requests under way for read-ahead.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress

import trio

from amlmount import wire
from amlmount.desk import FOR_EVER_S, Desk, Waiting
from amlmount.metrics import Counters
from amlmount.reader import Buffer

DEVICE = "/dev/fuse"

BACKGROUND = 64
"""Read-ahead requests that the kernel may have under way."""

_AT_ONCE = 8  # requests between two turns of the event loop: 0.3 ms
_LISTING = 128 << 10  # bytes of one answer to READDIRPLUS: what fits a socket's buffer by default
_GONE = (errno.ENODEV, errno.ECONNABORTED, errno.EBADF)  # unmounted, aborted


def device_fds() -> set[int]:
    """Return this process's descriptors of /dev/fuse."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == DEVICE:
                found.add(int(name))
    return found


class Relay:
    """The traffic of one mount. Made after the mount, before the library's loop begins."""

    def __init__(self, library_fd: int, desk: Desk, counters: Counters) -> None:
        """Take over the descriptor that the library has of the device, and give it a socket instead."""
        self._device = os.dup(library_fd)
        os.set_blocking(self._device, False)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _LISTING)
            os.dup2(theirs.fileno(), library_fd, inheritable=False)
        self._library = trio.socket.from_stdlib_socket(ours)
        self._desk = desk
        self._counters = counters
        self._buffer = bytearray(wire.READ_BUFFER)
        self._init = 0
        self.handleless = wire.Handleless(files=False, folders=False)
        self.begun = trio.Event()
        """Set when the kernel has the answer to its first message, which sets its read-ahead, too."""
        self._passing: list[bytes] = []

    def __repr__(self) -> str:
        return f"<Relay of descriptor {self._device}>"

    async def run(self) -> None:
        """Serve until the mount is gone."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._answers)
            await self._requests(nursery)
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Let go of the device."""
        self._library.close()
        # Its number stays taken: a thread that comes late must not write into another file.
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, self._device, inheritable=False)
        os.close(nowhere)

    async def _requests(self, nursery: trio.Nursery) -> None:
        buffers = [self._buffer]
        view = memoryview(self._buffer)
        counters = self._counters
        while True:
            began = time.perf_counter()
            idle = False
            for _ in range(_AT_ONCE):
                try:
                    length = os.readv(self._device, buffers)
                except BlockingIOError:
                    idle = True
                    break
                except OSError as error:
                    if error.errno in _GONE:
                        return
                    if error.errno not in (errno.ENOENT, errno.EINTR):  # a request that was taken back
                        raise
                    continue
                counters.asked += 1
                self._serve(view[:length], nursery)
            while self._passing:
                await self._library.send(self._passing.pop(0))
            counters.busy_s += time.perf_counter() - began
            if idle:
                await trio.lowlevel.wait_readable(self._device)
            else:
                await trio.lowlevel.checkpoint()

    def _serve(self, message: memoryview, nursery: trio.Nursery) -> None:
        _, opcode, unique, ino, _, _, _, _, _ = wire.HEADER.unpack_from(message)
        if opcode in (wire.READ, wire.LOOKUP):
            try:
                if opcode == wire.READ:
                    self._read(unique, ino, message, nursery)
                else:
                    self._lookup(unique, ino, message)
            except Exception as error:  # noqa: BLE001  # whatever it is, one request fails and the mount lives on
                self.refuse(unique, error, ino)
        elif opcode == wire.GETXATTR and not wire.xattr_name(message).startswith(b"user."):
            # `ls -l` asks for security and access lists of each file, unless it hears that there is no such thing.
            self._write([wire.refusal(unique, errno.EOPNOTSUPP)])
        elif opcode in (wire.FORGET, wire.BATCH_FORGET, wire.INTERRUPT):
            return  # inodes are rows of the manifest; and who interrupts a read has its answer soon enough
        elif opcode in (wire.READDIR, wire.READDIRPLUS):
            self._passing.append(wire.with_handle(message, ino, _LISTING))
        else:
            if opcode == wire.INIT:
                self._init = unique
                self.handleless = wire.handleless(message)
            self._passing.append(bytes(message))

    def _read(self, unique: int, ino: int, message: memoryview, nursery: trio.Nursery) -> None:
        found = self._desk.read(ino, *wire.read_in(message), unique)
        if isinstance(found, Waiting):
            nursery.start_soon(self._read_later, unique, found)
        elif found is not None:
            self._reply(unique, found)
        self._desk.go_on()

    def _lookup(self, unique: int, ino: int, message: memoryview) -> None:
        found = self._desk.lookup(ino, wire.lookup_name(message))
        answer = wire.no_entry(unique, FOR_EVER_S) if found is None else wire.entry(unique, found, FOR_EVER_S)
        self._write([answer])

    async def _read_later(self, unique: int, waiting: Waiting) -> None:
        try:
            found = await self._desk.wait(waiting)
        except Exception as error:  # noqa: BLE001  # as above
            self.refuse(unique, error, waiting.ino)
        else:
            self._reply(unique, found)

    def _reply(self, unique: int, found: Sequence[Buffer]) -> None:
        self._write([wire.reply(unique, sum(map(len, found))), *found])

    def answer(self, unique: int, data: memoryview) -> None:
        """Answer a READ; thread-safe: the kernel takes each message whole."""
        self._write([wire.reply(unique, len(data)), data])

    def refuse(self, unique: int, error: Exception, ino: int) -> None:
        """Answer a request with the errno of what went wrong."""
        self._write([wire.refusal(unique, self._desk.refuse(error, ino))])

    def _write(self, answer: Sequence[Buffer]) -> None:
        try:
            os.writev(self._device, answer)
        except OSError as error:
            if error.errno in (errno.ENOENT, *_GONE):  # nobody waits for it any more
                return
            self._desk.log.error("the kernel refuses an answer; the request failed with EIO", exc_info=error)
            with suppress(OSError):
                os.write(self._device, wire.refusal(wire.answered(answer[0]), errno.EIO))

    async def _answers(self) -> None:
        """Carry the library's answers to the kernel."""
        while True:
            answer = await self._library.recv(2 * _LISTING)
            if not answer:
                return
            if self._init and wire.answered(answer) == self._init:
                self._init = 0
                self._write([wire.amended_init(memoryview(answer), BACKGROUND)])
                self.begun.set()
            else:
                self._write([answer])
