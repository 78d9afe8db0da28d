"""The reader: a process of its own, so that its CPU can be told from the mount's.

`python -m bench.reader MODE PATH... [options]` reads and prints one JSON object. Modes: `sequential` (one
file from start to end in 1 MiB reads, `--repeat` times), `random` (`--readers` threads, each with its own
descriptor, reading `--size` bytes at random multiples of 4 KiB), `first` (open, read 4 KiB, close, for each
file in turn). With `--original` a sample of every read is compared with the same place of that file (a
directory for `first`): a fast wrong byte is not a result. Durations in seconds, sizes in bytes.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 1 << 20
PAGE = 4096
SAMPLE = 256

Check = Callable[[int, memoryview], None]


class WrongBytesError(RuntimeError):
    """The mount answered with other bytes than the file's."""


@dataclass(frozen=True)
class Reading:
    """What a reader did: `seconds` has one entry a repetition, `latencies_s` one a read or file."""

    bytes: int
    reads: int
    seconds: list[float]
    cpu_s: float
    latencies_s: list[float]


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


def sequential(path: Path, repeat: int, check: Check) -> tuple[int, int, list[float], list[float]]:
    """Read a file from start to end, `repeat` times."""
    buffer = memoryview(bytearray(MIB))
    seconds: list[float] = []
    total = reads = 0
    for _ in range(repeat):
        start = time.perf_counter()
        offset = 0
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                check(offset, buffer[:count])
                offset += count
                reads += 1
            size = os.fstat(file.fileno()).st_size
        if offset != size:
            raise WrongBytesError(f"{path.name}: {offset} bytes read of {size}")
        seconds.append(time.perf_counter() - start)
        total += offset
    return total, reads, seconds, []


def scattered(
    path: Path, readers: int, reads: int, size: int, seed: int, check: Check
) -> tuple[int, int, list[float], list[float]]:
    """Random reads by `readers` threads, `reads` each."""
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
                count = os.preadv(descriptor, [buffer], offset)
                latencies.append(time.perf_counter() - start)
                if count != size:
                    raise WrongBytesError(f"{path.name}: {count} bytes at {offset} instead of {size}")
                check(offset, buffer)
        finally:
            os.close(descriptor)
        return latencies

    start = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        latencies = [value for values in pool.map(one_reader, range(readers)) for value in values]
    return readers * reads * size, readers * reads, [time.perf_counter() - start], latencies


def first_bytes(
    paths: Sequence[Path], seed: int, originals: Path | None
) -> tuple[int, int, list[float], list[float]]:
    """The time from open to the first 4 KiB, of each file, in a shuffled order."""
    order = list(paths)
    random.Random(seed).shuffle(order)
    buffer = memoryview(bytearray(PAGE))
    checks = [checker(originals / path.name if originals is not None else None) for path in order]
    latencies = []
    begin = time.perf_counter()
    for path, check in zip(order, checks, strict=True):
        start = time.perf_counter()
        descriptor = os.open(path, os.O_RDONLY)
        count = os.preadv(descriptor, [buffer], 0)
        latencies.append(time.perf_counter() - start)
        os.close(descriptor)
        check(0, buffer[:count])
    return len(order) * PAGE, len(order), [time.perf_counter() - begin], latencies


def main(arguments: Sequence[str] | None = None) -> int:
    """Read as told, print what it took."""
    parser = argparse.ArgumentParser(description="the bench's reader")
    parser.add_argument("mode", choices=("sequential", "random", "first"))
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--original", type=Path)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--reads", type=int, default=1, help="of each reader")
    parser.add_argument("--size", type=int, default=MIB, help="bytes of one random read")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    before = resource.getrusage(resource.RUSAGE_SELF)
    if given.mode == "sequential":
        done = sequential(given.paths[0], given.repeat, checker(given.original))
    elif given.mode == "random":
        done = scattered(
            given.paths[0], given.readers, given.reads, given.size, given.seed, checker(given.original)
        )
    else:
        done = first_bytes(given.paths, given.seed, given.original)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    total, reads, seconds, latencies = done
    json.dump(asdict(Reading(total, reads, seconds, cpu, latencies)), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
