"""The FUSE messages that are most of the traffic, as bytes: taking requests apart, putting replies together. No I/O.

Source of every layout and number: include/uapi/linux/fuse.h (protocol 7.x, little or big endian as the machine's).
Only what `relay` answers by itself is here; the library knows the rest.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

HEADER = struct.Struct("=IIQQIIIHH")
"""fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding."""

LOOKUP, FORGET, READ, GETXATTR, INIT, READDIR, INTERRUPT, BATCH_FORGET, READDIRPLUS = (
    1,
    2,
    15,
    22,
    26,
    28,
    36,
    42,
    44,
)

_OUT = struct.Struct("=IiQ")  # fuse_out_header: len, error, unique
_READ_IN = struct.Struct("=QQI")  # fuse_read_in: fh, offset, size; more follows
_FH = struct.Struct("=Q")
_READ_SIZE = struct.Struct("=I")
# fuse_entry_out with its fuse_attr: nodeid, generation, entry_valid, attr_valid (s), their ns; then ino, size, blocks,
# atime, mtime, ctime (s), their ns, mode, nlink, uid, gid, rdev, blksize, flags
_ENTRY = struct.Struct("=QQQQII" + "QQQQQQIIIIIIIIII")
_INIT_IN_FLAGS = struct.Struct("=IIII")  # fuse_init_in: major, minor, max_readahead, flags
_INIT_OUT = struct.Struct("=HH")  # of fuse_init_out: max_background, congestion_threshold ...
_INIT_OUT_AT = 16  # ... behind major, minor, max_readahead, flags

OUT_HEADER_BYTES = _OUT.size
READ_BUFFER = (1 << 20) + 8192
"""Bytes that the kernel wants a buffer for requests to have: the library's max_write and a header.

With a smaller max_write the kernel cuts random reads to 128 KiB, whatever the read-ahead (seen on Linux 6.18).
"""
_NO_OPEN_SUPPORT, _NO_OPENDIR_SUPPORT = 1 << 17, 1 << 24


class Attributes(NamedTuple):
    """What `stat` shows of an inode."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    mtime_ns: int

    @property
    def blocks(self) -> int:
        """The size in units of 512 bytes, rounded up."""
        return (self.size + 511) // 512


class Handleless(NamedTuple):
    """Which opens the kernel can do without: answered ENOSYS once, it never asks again, nor tells of the close."""

    files: bool
    folders: bool


def read_in(message: memoryview) -> tuple[int, int]:
    """Return offset and size of a READ."""
    _, offset, size = _READ_IN.unpack_from(message, HEADER.size)
    return offset, size


def with_handle(message: memoryview, handle: int, most: int) -> bytes:
    """Return a READDIR or READDIRPLUS with another handle, and asking for `most` bytes at the most."""
    changed = bytearray(message)
    _FH.pack_into(changed, HEADER.size, handle)
    at = HEADER.size + 16
    (size,) = _READ_SIZE.unpack_from(changed, at)
    _READ_SIZE.pack_into(changed, at, min(size, most))
    return bytes(changed)


def lookup_name(message: memoryview) -> bytes:
    """Return the name that a LOOKUP asks for."""
    return bytes(message[HEADER.size : -1])


def xattr_name(message: memoryview) -> bytes:
    """Return the name that a GETXATTR asks for (after fuse_getxattr_in: size, padding)."""
    return bytes(message[HEADER.size + 8 : -1])


def reply(unique: int, length: int) -> bytes:
    """Return the header of an answer of `length` bytes."""
    return _OUT.pack(OUT_HEADER_BYTES + length, 0, unique)


def refusal(unique: int, errno: int) -> bytes:
    """Return an answer that is an error."""
    return _OUT.pack(OUT_HEADER_BYTES, -errno, unique)


def answered(answer: bytes | memoryview) -> int:
    """Return the number of the request that a message answers."""
    _, _, unique = _OUT.unpack_from(answer)
    return int(unique)


def entry(unique: int, attributes: Attributes, valid_s: int) -> bytes:
    """Return the answer to a LOOKUP that found something; the kernel may remember it for `valid_s` seconds."""
    ino, mode, nlink, uid, gid, size, mtime_ns = attributes
    seconds, ns = divmod(mtime_ns, 1_000_000_000)
    seconds &= 0xFFFFFFFFFFFFFFFF  # signed to stat, unsigned on the wire
    return reply(unique, _ENTRY.size) + _ENTRY.pack(
        ino, 0, valid_s, valid_s, 0, 0,
        ino, size, (size + 511) // 512, seconds, seconds, seconds, ns, ns, ns, mode, nlink, uid, gid, 0, 4096, 0,
    )  # fmt: skip


def no_entry(unique: int, valid_s: int) -> bytes:
    """Return the answer to a LOOKUP that found nothing, which may be remembered, too (node 0)."""
    return reply(unique, _ENTRY.size) + _ENTRY.pack(0, 0, valid_s, *([0] * 19))


def handleless(init: memoryview) -> Handleless:
    """Return what the kernel's INIT says of opens."""
    flags = _INIT_IN_FLAGS.unpack_from(init, HEADER.size)[3]
    return Handleless(bool(flags & _NO_OPEN_SUPPORT), bool(flags & _NO_OPENDIR_SUPPORT))


def amended_init(answer: memoryview, background: int) -> bytes:
    """Return the library's answer to INIT with what it has no knob for.

    `background` is the number of requests that the kernel may have under way for read-ahead (its default is 12, and
    one reader of a large file fills that); the kernel slows down at three quarters of it.
    """
    changed = bytearray(answer)
    _INIT_OUT.pack_into(changed, OUT_HEADER_BYTES + _INIT_OUT_AT, background, background * 3 // 4)
    return bytes(changed)
