"""linux/fuse.h, written down a second time, in another way: an oracle for `wire`, and how tests speak FUSE."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_uint16, c_uint32, c_uint64
from typing import ClassVar, TypeVar

T = TypeVar("T", bound=ctypes.Structure)

OPCODES = {
    "LOOKUP": 1, "FORGET": 2, "GETATTR": 3, "SETATTR": 4, "READLINK": 5, "SYMLINK": 6, "MKNOD": 8, "MKDIR": 9,
    "UNLINK": 10, "RMDIR": 11, "RENAME": 12, "LINK": 13, "OPEN": 14, "READ": 15, "WRITE": 16, "STATFS": 17,
    "RELEASE": 18, "FSYNC": 20, "SETXATTR": 21, "GETXATTR": 22, "LISTXATTR": 23, "REMOVEXATTR": 24, "FLUSH": 25,
    "INIT": 26, "OPENDIR": 27, "READDIR": 28, "RELEASEDIR": 29, "FSYNCDIR": 30, "GETLK": 31, "SETLK": 32,
    "SETLKW": 33, "ACCESS": 34, "CREATE": 35, "INTERRUPT": 36, "BMAP": 37, "DESTROY": 38, "IOCTL": 39, "POLL": 40,
    "NOTIFY_REPLY": 41, "BATCH_FORGET": 42, "FALLOCATE": 43, "READDIRPLUS": 44, "RENAME2": 45, "LSEEK": 46,
    "COPY_FILE_RANGE": 47, "SETUPMAPPING": 48, "REMOVEMAPPING": 49, "SYNCFS": 50, "TMPFILE": 51, "STATX": 52,
}  # fmt: skip
"""enum fuse_opcode."""

NO_OPEN_SUPPORT, NO_OPENDIR_SUPPORT = 1 << 17, 1 << 24
MIN_READ_BUFFER = 8192


class InHeader(ctypes.Structure):
    """struct fuse_in_header."""

    _fields_: ClassVar = [
        ("len", c_uint32),
        ("opcode", c_uint32),
        ("unique", c_uint64),
        ("nodeid", c_uint64),
        ("uid", c_uint32),
        ("gid", c_uint32),
        ("pid", c_uint32),
        ("total_extlen", c_uint16),
        ("padding", c_uint16),
    ]


class OutHeader(ctypes.Structure):
    """struct fuse_out_header."""

    _fields_: ClassVar = [("len", c_uint32), ("error", c_int32), ("unique", c_uint64)]


class Attr(ctypes.Structure):
    """struct fuse_attr."""

    _fields_: ClassVar = [
        ("ino", c_uint64),
        ("size", c_uint64),
        ("blocks", c_uint64),
        ("atime", c_uint64),
        ("mtime", c_uint64),
        ("ctime", c_uint64),
        ("atimensec", c_uint32),
        ("mtimensec", c_uint32),
        ("ctimensec", c_uint32),
        ("mode", c_uint32),
        ("nlink", c_uint32),
        ("uid", c_uint32),
        ("gid", c_uint32),
        ("rdev", c_uint32),
        ("blksize", c_uint32),
        ("flags", c_uint32),
    ]


class EntryOut(ctypes.Structure):
    """struct fuse_entry_out."""

    _fields_: ClassVar = [
        ("nodeid", c_uint64),
        ("generation", c_uint64),
        ("entry_valid", c_uint64),
        ("attr_valid", c_uint64),
        ("entry_valid_nsec", c_uint32),
        ("attr_valid_nsec", c_uint32),
        ("attr", Attr),
    ]


class ReadIn(ctypes.Structure):
    """struct fuse_read_in."""

    _fields_: ClassVar = [
        ("fh", c_uint64),
        ("offset", c_uint64),
        ("size", c_uint32),
        ("read_flags", c_uint32),
        ("lock_owner", c_uint64),
        ("flags", c_uint32),
        ("padding", c_uint32),
    ]


class GetXattrIn(ctypes.Structure):
    """struct fuse_getxattr_in."""

    _fields_: ClassVar = [("size", c_uint32), ("padding", c_uint32)]


class InitIn(ctypes.Structure):
    """struct fuse_init_in."""

    _fields_: ClassVar = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("max_readahead", c_uint32),
        ("flags", c_uint32),
        ("flags2", c_uint32),
        ("unused", c_uint32 * 11),
    ]


class InitOut(ctypes.Structure):
    """struct fuse_init_out."""

    _fields_: ClassVar = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("max_readahead", c_uint32),
        ("flags", c_uint32),
        ("max_background", c_uint16),
        ("congestion_threshold", c_uint16),
        ("max_write", c_uint32),
        ("time_gran", c_uint32),
        ("max_pages", c_uint16),
        ("map_alignment", c_uint16),
        ("flags2", c_uint32),
        ("max_stack_depth", c_uint32),
        ("request_timeout", c_uint16),
        ("unused", c_uint16 * 11),
    ]


def request(opcode: str, nodeid: int, body: bytes = b"", *, unique: int = 2) -> bytes:
    """Return a request as the kernel sends it."""
    header = InHeader(
        len=ctypes.sizeof(InHeader) + len(body), opcode=OPCODES[opcode], unique=unique, nodeid=nodeid
    )
    return bytes(header) + body


def read_in(offset: int, size: int, *, fh: int = 0) -> bytes:
    """Return the body of READ, READDIR and READDIRPLUS."""
    return bytes(ReadIn(fh=fh, offset=offset, size=size, flags=0o100000))


def init_in(flags: int = NO_OPEN_SUPPORT | NO_OPENDIR_SUPPORT) -> bytes:
    """Return the body of INIT."""
    return bytes(InitIn(major=7, minor=44, max_readahead=131072, flags=flags, flags2=3))


def parsed(kind: type[T], data: bytes, at: int = 0) -> T:
    """Return the structure at a place in a message."""
    assert len(data) >= at + ctypes.sizeof(kind)
    return kind.from_buffer_copy(data, at)


def answer(data: bytes) -> tuple[int, int, bytes]:
    """Return unique, errno and body of an answer; fail where its length is not what it says."""
    header = parsed(OutHeader, data)
    assert header.len == len(data)
    return header.unique, -header.error, data[ctypes.sizeof(OutHeader) :]
