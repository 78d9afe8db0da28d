"""The messages, held against the layouts of linux/fuse.h."""

from __future__ import annotations

import ctypes
import errno
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlmount import wire
from amlmount.wire import Attributes
from tests import fuse_abi as abi

u16, u32, u64 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
names = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (abi.InHeader, 40),
        (abi.OutHeader, 16),
        (abi.Attr, 88),
        (abi.EntryOut, 128),
        (abi.ReadIn, 40),
        (abi.GetXattrIn, 8),
        (abi.InitIn, 64),
        (abi.InitOut, 64),
    ],
)
def test_the_structures_here_have_the_sizes_that_a_compiler_says(
    kind: type[ctypes.Structure], size: int
) -> None:
    assert ctypes.sizeof(kind) == size


def test_sizes_and_numbers() -> None:
    assert wire.HEADER.size == ctypes.sizeof(abi.InHeader)
    assert ctypes.sizeof(abi.OutHeader) == wire.OUT_HEADER_BYTES
    assert wire._ENTRY.size == ctypes.sizeof(abi.EntryOut)
    named = {name: value for name, value in vars(wire).items() if name in abi.OPCODES}
    assert named == {name: abi.OPCODES[name] for name in named}
    assert {"LOOKUP", "FORGET", "READ", "INIT", "READDIRPLUS", "BATCH_FORGET", "INTERRUPT"} <= set(named)


def test_the_buffer_takes_the_largest_request_that_the_kernel_may_send() -> None:
    # It wants room for a WRITE of max_write bytes, which the library sets to 1 MiB: fuse_in_header, fuse_write_in (40).
    assert max(ctypes.sizeof(abi.InHeader) + 40 + (1 << 20), abi.MIN_READ_BUFFER) <= wire.READ_BUFFER


@given(u32, u64, u64)
def test_headers_of_requests(opcode: int, unique: int, nodeid: int) -> None:
    raw = bytes(abi.InHeader(len=40, opcode=opcode, unique=unique, nodeid=nodeid, uid=1, gid=2, pid=3))
    assert wire.HEADER.unpack(raw) == (40, opcode, unique, nodeid, 1, 2, 3, 0, 0)


@given(u64, u32, u64)
def test_reads_are_taken_apart(offset: int, size: int, fh: int) -> None:
    message = memoryview(abi.request("READ", 5, abi.read_in(offset, size, fh=fh)))
    assert wire.read_in(message) == (offset, size)


@given(names)
def test_names_are_taken_out_as_they_are(name: bytes) -> None:
    assert wire.lookup_name(memoryview(abi.request("LOOKUP", 1, name + b"\0"))) == name
    body = bytes(abi.GetXattrIn(size=99)) + name + b"\0"
    assert wire.xattr_name(memoryview(abi.request("GETXATTR", 1, body))) == name


@given(u64, u32, u64, u32)
def test_a_listing_gets_a_handle_and_no_more_than_there_is_room_for(
    offset: int, size: int, handle: int, most: int
) -> None:
    message = abi.request("READDIRPLUS", 5, abi.read_in(offset, size, fh=77), unique=9)
    changed = wire.with_handle(memoryview(message), handle, most)
    assert changed == abi.request("READDIRPLUS", 5, abi.read_in(offset, min(size, most), fh=handle), unique=9)


@given(u64, st.integers(0, 1 << 20))
def test_headers_of_answers(unique: int, length: int) -> None:
    header = abi.parsed(abi.OutHeader, wire.reply(unique, length))
    assert (header.len, header.error, header.unique) == (16 + length, 0, unique)


@given(u64, st.sampled_from(sorted(errno.errorcode)))
def test_refusals(unique: int, number: int) -> None:
    assert abi.answer(wire.refusal(unique, number)) == (unique, number, b"")
    assert wire.answered(wire.refusal(unique, number)) == unique


attributes = st.builds(
    Attributes, ino=u64, mode=u32, nlink=u32, uid=u32, gid=u32,
    size=st.integers(0, 2**63 - 512), mtime_ns=st.integers(-(2**62), 2**62),
)  # fmt: skip


@given(u64, attributes, st.integers(0, 2**40))
def test_entries(unique: int, said: Attributes, valid_s: int) -> None:
    number, error, body = abi.answer(wire.entry(unique, said, valid_s))
    assert (number, error, len(body)) == (unique, 0, 128)
    found = abi.parsed(abi.EntryOut, body)
    attr = found.attr
    assert (found.nodeid, found.generation) == (said.ino, 0)
    assert (found.entry_valid, found.entry_valid_nsec) == (valid_s, 0)
    assert (found.attr_valid, found.attr_valid_nsec) == (valid_s, 0)
    assert (attr.ino, attr.mode, attr.nlink, attr.uid, attr.gid) == (
        said.ino, said.mode, said.nlink, said.uid, said.gid,
    )  # fmt: skip
    assert (attr.size, attr.blocks) == (said.size, said.blocks) == (said.size, -(-said.size // 512))
    for seconds, ns in (
        (attr.atime, attr.atimensec), (attr.mtime, attr.mtimensec), (attr.ctime, attr.ctimensec),
    ):  # fmt: skip
        signed = ctypes.c_int64(seconds).value  # as the kernel takes it
        assert signed * 10**9 + ns == said.mtime_ns
        assert 0 <= ns < 10**9
    assert (attr.rdev, attr.blksize, attr.flags) == (0, 4096, 0)


@given(u64, st.integers(0, 2**40))
def test_that_a_name_is_not_there_is_an_entry_of_node_0(unique: int, valid_s: int) -> None:
    number, error, body = abi.answer(wire.no_entry(unique, valid_s))
    assert (number, error, len(body)) == (unique, 0, 128)
    assert body == bytes(abi.EntryOut(nodeid=0, entry_valid=valid_s))


GOLDEN = (
    "90000000" "00000000" "0700000000000000"  # len 144, no error, unique 7
    "0200000000000000" "0000000000000000"  # node 2, generation 0
    "0a00000000000000" "0a00000000000000" "00000000" "00000000"  # names and attributes are valid for 10 s
    "0200000000000000" "0102000000000000" "0200000000000000"  # ino 2, 513 bytes, 2 blocks
    "0100000000000000" "0100000000000000" "0100000000000000" "05000000" "05000000" "05000000"  # 1 s 5 ns
    "24810000" "01000000" "07000000" "08000000" "00000000" "00100000" "00000000"  # -r--r--r--, 1 link, owner 7:8
)  # fmt: skip


def test_golden_bytes_of_an_entry() -> None:
    said = Attributes(2, stat.S_IFREG | 0o444, 1, 7, 8, 513, 1_000_000_005)
    assert wire.entry(7, said, 10).hex() == GOLDEN


@pytest.mark.parametrize(("flags", "files", "folders"), [
    (0, False, False), (1 << 17, True, False), (1 << 24, False, True), (0xFFFFFFFF, True, True),
    (0xFFFFFFFF ^ (1 << 17 | 1 << 24), False, False),
])  # fmt: skip
def test_what_a_kernel_can_do_without(flags: int, files: bool, folders: bool) -> None:
    assert wire.handleless(memoryview(abi.request("INIT", 0, abi.init_in(flags)))) == (files, folders)


@given(st.binary(min_size=64, max_size=64), u64, st.integers(4, 2**16 - 1), st.sampled_from([24, 64]))
def test_only_two_fields_of_the_answer_to_init_are_changed(
    body: bytes, unique: int, background: int, length: int
) -> None:
    theirs = wire.reply(unique, length) + body[:length]
    ours = wire.amended_init(memoryview(theirs), background)
    assert abi.answer(ours)[:2] == (unique, 0)
    found = abi.parsed(abi.InitOut, ours[16:].ljust(64, b"\0"))
    assert found.max_background == background
    assert found.congestion_threshold == background * 3 // 4
    before = abi.parsed(abi.InitOut, theirs[16:].ljust(64, b"\0"))
    for field in ("max_background", "congestion_threshold"):
        setattr(found, field, getattr(before, field))
    assert bytes(found)[:length] == body[:length]
