"""The reader: a process of its own, so that its CPU can be told from the mount's.

`python -m bench.reader MODE ROOT [NAME...] [options]` reads files below ROOT and prints one JSON object. Modes:

- `walk`: the names below ROOT, as a training script finds them; how many there are;
- `sequential`: one file from start to end, `--repeat` times;
- `many`: `--readers` processes, each with every N-th of the files, from start to end;
- `random`: `--readers` threads, each with its own descriptor, `--size` bytes at random multiples of 4 KiB; no new
  read after `--limit-s`;
- `first`: open, read 4 KiB, close, for each file in turn, in a shuffled order;
- `files`: `--readers` processes (threads through obstore), each with every N-th of the names in the file
  `--list`: open, read to the end, close; no new file after `--limit-s`;
- `records`, `columns`: TFRecord shards and Parquet files, see records.py.

With `--original` (a folder) a sample of every read is compared with the same place of the original: a fast
wrong byte is not a result. `--through` reads with a library instead of a mount; ROOT is then the container at
`--url`. Durations in seconds, sizes in bytes.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.forked import Part, Race, ReaderError, cpu_now_s, race
from bench.sources import MIB, Source, open_source

PAGE = 4096
SAMPLE = 256
DECLARE_LIMIT_S = 60

Check = Callable[[int, memoryview], None]
Open = Callable[[int], Source]


class WrongBytesError(RuntimeError):
    """The mount answered with other bytes than the file's."""


@dataclass(frozen=True)
class Reading:
    """What a reader did: `seconds` has one entry a repetition, `latencies_s` one a read or file."""

    bytes: int
    reads: int
    seconds: list[float]
    cpu_s: float
    latencies_s: list[float] = field(default_factory=list)
    declare_s: float = 0.0


@dataclass(frozen=True)
class Known:
    """What is known of a small file before the clock starts."""

    name: str
    size: int
    head: bytes
    tail: bytes

    def check(self, data: memoryview) -> None:
        """Compare the length, the first and the last bytes."""
        if len(data) != self.size or data[:SAMPLE] != self.head or data[-SAMPLE:] != self.tail:
            raise WrongBytesError(f"{self.name}: wrong bytes, {len(data)} of them instead of {self.size}")


def _unchecked(_offset: int, _data: memoryview) -> None:
    """Accept any bytes."""


def checker(original: Path | None) -> Check:
    """A comparison of the first and last bytes of a read with the original's; nothing without an original."""
    if original is None:
        return _unchecked
    with original.open("rb") as file:
        truth = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def check(offset: int, data: memoryview) -> None:
        end = offset + len(data)
        head, tail = min(SAMPLE, len(data)), max(0, len(data) - SAMPLE)
        if data[:head] != truth[offset : offset + head] or data[tail:] != truth[offset + tail : end]:
            raise WrongBytesError(f"{original.name}: wrong bytes in [{offset}, {end})")

    return check


def known(original: Path, name: str) -> Known:
    """Look at an original."""
    with (original / name).open("rb") as file:
        head, size = file.read(SAMPLE), os.fstat(file.fileno()).st_size
        file.seek(max(0, size - SAMPLE))
        return Known(name, size, head, file.read(SAMPLE))


def walk(root: Path) -> Reading:
    """Find every file, as a training script does before it starts."""
    start, before = time.perf_counter(), cpu_now_s()
    count = sum(len(names) for _, _, names in os.walk(root))
    return Reading(0, count, [time.perf_counter() - start], cpu_now_s() - before)


def whole_file(source: Source, name: str, original: Path | None, size: int) -> tuple[int, int]:
    """Read one file from start to end; how many bytes and reads that was."""
    check, offset, reads = checker(original), 0, 0
    for piece in source.stream(name, size):
        check(offset, piece)
        offset += len(piece)
        reads += 1
    if offset != size:
        raise WrongBytesError(f"{name}: {offset} bytes read of {size}")
    return offset, reads


def sequential(source: Source, name: str, repeat: int, original: Path | None, size: int) -> Reading:
    """Read a file from start to end, `repeat` times."""
    seconds: list[float] = []
    total = reads = 0
    before = cpu_now_s()
    for _ in range(repeat):
        start = time.perf_counter()
        count, pieces = whole_file(source, name, original, size)
        seconds.append(time.perf_counter() - start)
        total, reads = total + count, reads + pieces
    return Reading(total, reads, seconds, cpu_now_s() - before)


def many(open_at: Open, names: Sequence[str], readers: int, original: Path) -> Reading:
    """Read large files at once, each in one of the processes."""

    def work(number: int, go: Callable[[], None]) -> Part:
        source, part = open_at(MIB), Part()
        sizes = {name: (original / name).stat().st_size for name in names[number::readers]}
        go()
        for name, size in sizes.items():
            count, reads = whole_file(source, name, original / name, size)
            part.bytes, part.reads = part.bytes + count, part.reads + reads
        return part

    return summed(race(readers, work))


def scattered(
    path: Path, readers: int, reads: int, size: int, seed: int, limit_s: float, check: Check
) -> Reading:
    """Random reads by `readers` threads, `reads` each, none begun after the time is over."""
    places = (path.stat().st_size - size) // PAGE

    def one_reader(number: int) -> list[float]:
        generator = random.Random(f"{seed}/{number}")
        buffer = memoryview(bytearray(size))
        latencies = []
        descriptor = os.open(path, os.O_RDONLY)
        try:
            for _ in range(reads):
                offset = generator.randint(0, places) * PAGE
                start = time.perf_counter()
                if start > deadline:
                    break
                count = os.preadv(descriptor, [buffer], offset)
                latencies.append(time.perf_counter() - start)
                if count != size:
                    raise WrongBytesError(f"{path.name}: {count} bytes at {offset} instead of {size}")
                check(offset, buffer)
        finally:
            os.close(descriptor)
        return latencies

    start, before = time.perf_counter(), cpu_now_s()
    deadline = start + limit_s
    with ThreadPoolExecutor(readers) as pool:
        latencies = [value for values in pool.map(one_reader, range(readers)) for value in values]
    count = len(latencies)
    return Reading(count * size, count, [time.perf_counter() - start], cpu_now_s() - before, latencies)


def first_bytes(root: Path, names: Sequence[str], seed: int, original: Path | None) -> Reading:
    """The time from open to the first 4 KiB, of each file, in a shuffled order."""
    order = list(names)
    random.Random(seed).shuffle(order)
    buffer = memoryview(bytearray(PAGE))
    checks = [checker(original / name if original is not None else None) for name in order]
    latencies = []
    begin, before = time.perf_counter(), cpu_now_s()
    for name, check in zip(order, checks, strict=True):
        start = time.perf_counter()
        descriptor = os.open(root / name, os.O_RDONLY)
        count = os.preadv(descriptor, [buffer], 0)
        latencies.append(time.perf_counter() - start)
        os.close(descriptor)
        check(0, buffer[:count])
    spent = cpu_now_s() - before
    return Reading(len(order) * PAGE, len(order), [time.perf_counter() - begin], spent, latencies)


def files(
    open_at: Open,
    order: Sequence[Known],
    readers: int,
    limit_s: float,
    declare: Callable[[], None] | None,
) -> Reading:
    """Small files by processes that start together; the command that declares the order runs just before."""
    largest = max(file.size for file in order)

    def work(number: int, go: Callable[[], None]) -> Part:
        source = open_at(largest)
        mine = order[number::readers]
        go()
        return read_files(source, mine, limit_s)

    return summed(race(readers, work, declare))


def files_in_threads(source: Source, order: Sequence[Known], threads: int, limit_s: float) -> Reading:
    """The same by threads of this process, for a library that needs no more."""
    start, before = time.perf_counter(), cpu_now_s()
    with ThreadPoolExecutor(threads) as pool:
        parts = list(
            pool.map(lambda number: read_files(source, order[number::threads], limit_s), range(threads))
        )
    spent = Part(cpu_s=cpu_now_s() - before)
    return summed(Race(time.perf_counter() - start, [*parts, spent], 0.0))


def read_files(source: Source, mine: Sequence[Known], limit_s: float) -> Part:
    """Read these files whole, one after the other, until there are none or the time is over."""
    part, clock = Part(), time.perf_counter
    deadline = clock() + limit_s
    for file in mine:
        start = clock()
        if start > deadline:
            break
        data = source.whole(file.name, file.size)
        part.latencies_s.append(clock() - start)
        file.check(data)
        part.bytes += len(data)
        part.reads += 1
    return part


def summed(done: Race) -> Reading:
    """What the processes did, as one reading."""
    return Reading(
        sum(part.bytes for part in done.parts),
        sum(part.reads for part in done.parts),
        [done.seconds],
        sum(part.cpu_s for part in done.parts),
        [value for part in done.parts for value in part.latencies_s],
        done.before_s,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read as told, print what it took."""
    parser = argparse.ArgumentParser(description="the bench's reader")
    parser.add_argument("mode", choices=tuple(_MODES))
    parser.add_argument("root", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--original", type=Path, help="folder of the original files")
    parser.add_argument("--list", type=Path, help="file of names, one a line")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--reads", type=int, default=1, help="of each reader")
    parser.add_argument("--size", type=int, default=MIB, help="bytes of one random read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--limit-s", type=float, default=3600.0, help="no new file or random read after so many seconds"
    )
    parser.add_argument("--declare", default="", help="JSON list: the command that announces --list")
    parser.add_argument("--through", default="mount", choices=("mount", "adlfs", "obstore", "obstore-128"))
    parser.add_argument("--url", default="", help="the origin, for a library")
    given = parser.parse_args(arguments)
    json.dump(asdict(_MODES[given.mode](given)), sys.stdout)
    return 0


def _original(given: argparse.Namespace, name: str) -> Path | None:
    return given.original / name if given.original is not None else None


def _opener(given: argparse.Namespace) -> Open:
    return lambda largest: open_source(given.through, given.root, given.url, largest)


def _sequential(given: argparse.Namespace) -> Reading:
    name = given.names[0]
    original = _original(given, name)
    size = (original or given.root / name).stat().st_size
    return sequential(_opener(given)(MIB), name, given.repeat, original, size)


def _scattered(given: argparse.Namespace) -> Reading:
    check = checker(_original(given, given.names[0]))
    path = given.root / given.names[0]
    return scattered(path, given.readers, given.reads, given.size, given.seed, given.limit_s, check)


def _files(given: argparse.Namespace) -> Reading:
    order = [known(given.original, name) for name in given.list.read_text(encoding="utf-8").splitlines()]
    opener = _opener(given)
    if given.through.startswith("obstore"):
        threads = 128 if given.through == "obstore-128" else given.readers
        return files_in_threads(opener(MIB), order, threads, given.limit_s)

    def declare() -> None:
        command = ["timeout", str(DECLARE_LIMIT_S), *json.loads(given.declare), str(given.list)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ReaderError(f"the order was not declared: {(done.stderr or done.stdout)[-400:]}")

    return files(opener, order, given.readers, given.limit_s, declare if given.declare else None)


def _records(given: argparse.Namespace) -> Reading:
    from bench import records

    return summed(records.read_shards(_opener(given), given.names, given.readers))


def _columns(given: argparse.Namespace) -> Reading:
    from bench import records

    return records.read_columns(_opener(given)(MIB), given.names, given.original)


_MODES: dict[str, Callable[[argparse.Namespace], Reading]] = {
    "walk": lambda given: walk(given.root),
    "sequential": _sequential,
    "many": lambda given: many(_opener(given), given.names, given.readers, given.original),
    "random": _scattered,
    "first": lambda given: first_bytes(given.root, given.names, given.seed, given.original),
    "files": _files,
    "records": _records,
    "columns": _columns,
}


if __name__ == "__main__":
    sys.exit(main())
