"""The blocks that a cache folder holds, found by their headers alone: to damage them in tests of whole mounts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HEADER = 64
MAGIC = b"AMLB\x00\x01"


class Record(NamedTuple):
    """One block, in a file of its own or in a pack."""

    path: Path
    start: int
    """Of its header."""
    length: int
    """Of its data."""

    @property
    def stop(self) -> int:
        return self.start + HEADER + self.length

    def read(self) -> bytes:
        """Return header and data."""
        return self.path.read_bytes()[self.start : self.stop]

    def write(self, raw: bytes) -> None:
        """Put other bytes in its place."""
        with self.path.open("r+b") as file:
            file.seek(self.start)
            file.write(raw)

    def flip(self, at: int, bit: int = 4) -> None:
        """Change one bit; `at` counts from the header's first byte."""
        raw = bytearray(self.read())
        raw[at] ^= 1 << bit
        self.write(bytes(raw))


def block_files(cache: Path) -> list[Path]:
    """Return the files that hold blocks."""
    return sorted(path for path in cache.rglob("*") if len(path.name) == 62)


def records(cache: Path) -> Iterator[Record]:
    """Yield every block below a cache folder."""
    for path in block_files(cache):
        raw = path.read_bytes()
        at = 0
        while at < len(raw):
            assert raw[at : at + len(MAGIC)] == MAGIC
            found = Record(path, at, int.from_bytes(raw[at + 8 : at + 16], "little"))
            yield found
            at = found.stop
