"""Files that training formats are made of: shards of records (TFRecord), and tables in columns (Parquet).

Duty: make them, the same on every machine, and read them as their own readers do. A TFRecord is its length (8
bytes, little-endian), that length's masked CRC-32C (4), the data, and its CRC (4); a reader knows where the
next one begins only once it has read this one's length. A Parquet reader takes the footer, then the chunks of
the columns wanted, row group by row group. Sizes in bytes.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crc32c

from bench.dataset import Dataset
from bench.forked import Part, Race, cpu_now_s, race
from bench.sources import BUFFERED, MIB, Source

if TYPE_CHECKING:
    from bench.reader import Reading

HEADER = struct.Struct("<QI")
CRC = struct.Struct("<I")
CHECKED = 16  # one record in so many has the CRC of its data checked
COLUMNS = 16
WANTED = ("c02", "c07", "c11")
ROWS = 32_768  # of a row group: a chunk of 256 KiB of each column


class BrokenRecordError(RuntimeError):
    """A record's CRC or a table's values are not the original's."""


def masked(data: bytes) -> int:
    """CRC-32C as TFRecord stores it."""
    value = crc32c.crc32c(data)
    return (((value >> 15) | (value << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def add_shard(dataset: Dataset, container: str, name: str, size: int) -> None:
    """A shard of about `size` bytes, of records of 20 to 180 KB."""
    generator = random.Random(f"{container}/{name}")

    def pieces() -> Iterator[bytes]:
        written = 0
        while written < size:
            data = generator.randbytes(generator.randint(20_000, 180_000))
            length = struct.pack("<Q", len(data))
            yield b"".join((length, CRC.pack(masked(length)), data, CRC.pack(masked(data))))
            written += HEADER.size + len(data) + CRC.size

    dataset.add_pieces(container, name, pieces())


def read_shards(open_at: Callable[[int], Source], names: Sequence[str], workers: int) -> Race:
    """Every shard once, each by one of the workers; reads are records."""

    def work(number: int, go: Callable[[], None]) -> Part:
        source, part = open_at(MIB), Part()
        go()
        for name in names[number::workers]:
            with source.open(name, BUFFERED) as file:
                while head := file.read(HEADER.size):
                    length, crc = HEADER.unpack(head)
                    body = file.read(length + CRC.size)
                    if crc != masked(head[:8]) or len(body) != length + CRC.size:
                        raise BrokenRecordError(
                            f"{name}: broken length in record {part.reads} of this reader"
                        )
                    if part.reads % CHECKED == 0 and CRC.unpack(body[length:])[0] != masked(body[:length]):
                        raise BrokenRecordError(f"{name}: wrong bytes in record {part.reads} of this reader")
                    part.reads += 1
                    part.bytes += HEADER.size + len(body)
        return part

    return race(workers, work)


def has_parquet() -> bool:
    """Whether pyarrow is installed: only the bench extra does that."""
    return importlib.util.find_spec("pyarrow") is not None


def add_table(dataset: Dataset, container: str, name: str, size: int) -> None:
    """A table of about `size` bytes: 16 columns of random doubles, neither compressed nor encoded."""
    arrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    generator = random.Random(f"{container}/{name}")
    columns = [f"c{number:02d}" for number in range(COLUMNS)]
    schema = arrow.schema([(column, arrow.float64()) for column in columns])
    sink = arrow.BufferOutputStream()
    with parquet.ParquetWriter(sink, schema, compression="none", use_dictionary=False) as writer:
        for _ in range(max(1, size // (ROWS * 8 * COLUMNS))):
            buffers = (arrow.py_buffer(generator.randbytes(ROWS * 8)) for _ in columns)
            arrays = [arrow.Array.from_buffers(arrow.float64(), ROWS, [None, buffer]) for buffer in buffers]
            writer.write_table(arrow.Table.from_arrays(arrays, schema=schema), row_group_size=ROWS)
    dataset.add_pieces(container, name, [sink.getvalue().to_pybytes()])


def read_columns(source: Source, names: Sequence[str], original: Path) -> Reading:
    """3 of the 16 columns of every row group of every file, by pyarrow; reads are column chunks."""
    from bench.reader import Reading

    parquet: Any = importlib.import_module("pyarrow.parquet")
    start, before = time.perf_counter(), cpu_now_s()
    chunks, last = 0, None
    for name in names:
        with source.open(name, 0) as file, parquet.ParquetFile(file, pre_buffer=True) as table:
            for group in range(table.num_row_groups):
                last = table.read_row_group(group, columns=list(WANTED))
                chunks += len(WANTED)
    seconds, spent = time.perf_counter() - start, cpu_now_s() - before
    with parquet.ParquetFile(original / names[-1]) as table:
        truth = table.read_row_group(table.num_row_groups - 1, columns=list(WANTED))
    # As bytes: random doubles hold NaNs, which equal nothing.
    if last is None or _bytes_of(last) != _bytes_of(truth):
        raise BrokenRecordError(f"{names[-1]}: wrong values in the last row group")
    return Reading(chunks * ROWS * 8, chunks, [seconds], spent)


def _bytes_of(table: Any) -> list[bytes]:
    return [
        chunk.buffers()[1].to_pybytes() for column in table.itercolumns() for chunk in column.iterchunks()
    ]
