"""Where the reader's bytes come from: files of a mount, or a library that asks the origin itself.

Duty: one way to read a whole small file and one to read a large file in order, for each. Names are relative
to the container. A source belongs to one process: it is opened after the fork. Sizes in bytes.
"""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol, cast

from bench.origin import ACCOUNT, KEY

MIB = 1 << 20
RANGE = 8 * MIB
RANGES_AT_ONCE = 32  # as many as amlmount's own connections
BUFFERED = 256 * 1024  # TensorFlow's default for a file of records


class Source(Protocol):
    """One container, readable."""

    def whole(self, name: str, size: int) -> memoryview:
        """A small file's bytes, valid until the next call."""

    def stream(self, name: str, size: int) -> Iterator[memoryview]:
        """A large file's bytes in order, each piece valid until the next."""

    def open(self, name: str, buffering: int) -> IO[bytes]:
        """A file to read and seek in."""


class MountSource:
    """Files below a folder: open, read to the end, close."""

    def __init__(self, root: Path, largest: int = MIB) -> None:
        self._root = root
        self._buffer = memoryview(bytearray(max(MIB, largest + 1)))

    def whole(self, name: str, size: int) -> memoryview:
        """Read until there is no more, whatever the size."""
        del size
        buffer, filled = self._buffer, 0
        descriptor = os.open(self._root / name, os.O_RDONLY)
        try:
            while count := os.readv(descriptor, [buffer[filled:]]):
                filled += count
        finally:
            os.close(descriptor)
        return buffer[:filled]

    def stream(self, name: str, size: int) -> Iterator[memoryview]:
        """In reads of 1 MiB."""
        del size
        buffer = self._buffer[:MIB]
        with open(self._root / name, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]

    def open(self, name: str, buffering: int) -> IO[bytes]:
        """A file of the mount; `buffering` 0 for none."""
        return open(self._root / name, "rb", buffering=buffering)


class ObstoreSource:
    """obstore's own calls. Thread-safe."""

    def __init__(self, url: str, container: str) -> None:
        import obstore
        from obstore.store import AzureStore

        self._get = obstore.get
        self._store = AzureStore(
            container,
            config={
                "account_name": ACCOUNT,
                "endpoint": url,
                "use_emulator": False,
                "skip_signature": True,
            },
            client_options={"allow_http": True},
        )

    def whole(self, name: str, size: int) -> memoryview:
        """One request."""
        return self._range(name, 0, size)

    def stream(self, name: str, size: int) -> Iterator[memoryview]:
        """In ranges of 8 MiB, 32 under way at once."""
        starts = iter(range(0, size, RANGE))
        with ThreadPoolExecutor(RANGES_AT_ONCE) as pool:
            waiting: deque[Future[memoryview]] = deque()
            while True:
                for start in starts:
                    waiting.append(pool.submit(self._range, name, start, min(start + RANGE, size)))
                    if len(waiting) == RANGES_AT_ONCE:
                        break
                if not waiting:
                    return
                yield waiting.popleft().result()

    def open(self, name: str, buffering: int) -> IO[bytes]:
        """Not measured."""
        raise NotImplementedError(f"{name}: obstore is not read as a file here ({buffering})")

    def _range(self, name: str, start: int, end: int) -> memoryview:
        return memoryview(self._get(self._store, name, options={"range": (start, end)}).bytes())


class AdlfsSource:
    """adlfs's own calls."""

    def __init__(self, url: str, container: str) -> None:
        account = f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={url};"
        # Not imported by name: only the bench extra installs it, and it has no types.
        self._files: Any = importlib.import_module("adlfs").AzureBlobFileSystem(connection_string=account)
        self._container = container

    def whole(self, name: str, size: int) -> memoryview:
        """cat_file, which asks for the size first."""
        del size
        return memoryview(self._files.cat_file(f"{self._container}/{name}"))

    def stream(self, name: str, size: int) -> Iterator[memoryview]:
        """An open file, in reads of 1 MiB."""
        del size
        with self.open(name, 0) as file:
            while piece := file.read(MIB):
                yield memoryview(piece)

    def open(self, name: str, buffering: int) -> IO[bytes]:
        """An open file with adlfs's own read-ahead."""
        del buffering
        return cast(IO[bytes], self._files.open(f"{self._container}/{name}", "rb"))


def open_source(through: str, root: Path, url: str, largest: int = MIB) -> Source:
    """The source named: `mount` (the folder `root`), or a library (the container `root` at the origin)."""
    if through == "mount":
        return MountSource(root, largest)
    if through == "adlfs":
        return AdlfsSource(url, str(root))
    return ObstoreSource(url, str(root))
