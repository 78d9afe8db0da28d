"""The bench's data: incompressible bytes that are the same on every machine, in memory-backed files.

Duty: write the files, know each one's size, MD5 and ETag. The ETag is derived from the MD5, so a file of the
same name and content has the same identity in every run. Sizes in bytes.
"""

from __future__ import annotations

import base64
import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
MODIFIED_S = 1_700_000_000  # every file's modification time, Unix seconds


@dataclass(frozen=True)
class Blob:
    """One file as the origin shows it."""

    container: str
    name: str
    size: int
    md5: bytes

    @property
    def etag(self) -> str:
        """The identity without its quotes, shaped like the service's own (0x8D and 13 hexadecimal digits)."""
        return "0x8D" + self.md5.hex()[:13].upper()

    def index_line(self) -> str:
        """The line origin.lua reads."""
        md5 = base64.b64encode(self.md5).decode()
        return f"{self.container}\t{self.name}\t{self.size}\t{MODIFIED_S}\t{self.etag}\t{md5}\n"


class Dataset:
    """A data directory: one folder for each container, the blobs' files below it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs: list[Blob] = []

    def add(self, container: str, name: str, size: int) -> Blob:
        """Write one file of `size` pseudo-random bytes, seeded by its name."""
        generator = random.Random(f"{container}/{name}")
        pieces = (generator.randbytes(min(MIB, size - start)) for start in range(0, size, MIB))
        return self.add_pieces(container, name, pieces)

    def add_pieces(self, container: str, name: str, pieces: Iterable[bytes]) -> Blob:
        """Write one file of these pieces."""
        path = self.path(container, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.md5(usedforsecurity=False), 0
        with path.open("wb") as file:
            for piece in pieces:
                digest.update(piece)
                size += file.write(piece)
        os.utime(path, (MODIFIED_S, MODIFIED_S))
        blob = Blob(container, name, size, digest.digest())
        self.blobs.append(blob)
        return blob

    def path(self, container: str, name: str) -> Path:
        """Where a blob's bytes are."""
        return self.root / container / name

    def write_index(self, path: Path) -> None:
        """Write the sorted index the origin serves lists, ETags and MD5s from."""
        ordered = sorted(self.blobs, key=lambda blob: (blob.container, blob.name.encode()))
        path.write_text("".join(blob.index_line() for blob in ordered), encoding="utf-8")


def listing_name(number: int) -> str:
    """The name origin.lua gives to a blob of a made-up container; the first is number 0."""
    return f"part-{number // 1000:05d}/sample-{number:08d}.bin"


@contextmanager
def temporary_dataset(parent: Path = Path("/dev/shm")) -> Iterator[Dataset]:
    """An empty dataset in memory, removed at the end."""
    base = parent if os.access(parent, os.W_OK) else Path(tempfile.gettempdir())
    root = Path(tempfile.mkdtemp(prefix="amlmount-bench-", dir=base))
    try:
        yield Dataset(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
