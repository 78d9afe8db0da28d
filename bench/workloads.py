"""The workloads: each runs once for one subject, cold, and says what it took.

A workload is a row of the table: a title, the origin it runs on, the subjects in comparison (the first one is
ours), the figure that is compared and the goals set for it. Figures have their unit in their name; `*_mb_s`
are 10^6 bytes a second, CPU is in seconds per GiB asked or, where reads are small, milliseconds a read.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.dataset import Dataset
from bench.origin import Origin, Served
from bench.peers import Mount, Subject
from bench.processes import cpu_s, drop_page_cache, peak_rss, run, with_children
from bench.reader import MIB, Reading

CONTAINER = "bench"
GIB = 1 << 30
READ_LIMIT_S = 600
CACHED_PART = 0.98  # of a file, on disk: then the cache counts as filled
WARM_REPEATS = 5


@dataclass(frozen=True)
class Sizes:
    """How much data a run uses (bytes) and how many reads it makes."""

    large: int = 512 * MIB
    scattered: int = 1024 * MIB
    first: int = 256 * 1024
    first_count: int = 100
    block_reads: int = 32  # of each of 8 readers
    page_reads: int = 100  # of each of 16 readers

    @classmethod
    def quick(cls) -> Sizes:
        """A run of about a minute."""
        return cls(large=128 * MIB, scattered=256 * MIB, first_count=40, block_reads=8, page_reads=40)


@dataclass(frozen=True)
class Context:
    """What every workload is given. `seed` is the same for all subjects of one round."""

    origin: Origin
    dataset: Dataset
    sizes: Sizes
    seed: int


Figures = dict[str, float]
Work = Callable[[Subject, Context, Path], Figures]

LARGE = "large/large.bin"
SCATTERED = "random/random.bin"


def first_name(number: int) -> str:
    """The name of one of the many small files."""
    return f"first/file-{number:04d}.bin"


def make_dataset(dataset: Dataset, sizes: Sizes) -> None:
    """Write every file the workloads read."""
    dataset.add(CONTAINER, LARGE, sizes.large)
    dataset.add(CONTAINER, SCATTERED, sizes.scattered)
    for number in range(sizes.first_count):
        dataset.add(CONTAINER, first_name(number), sizes.first)


def sequential(subject: Subject, context: Context, state: Path) -> Figures:
    """One reader, one large file, from start to end."""
    with subject.mounted(context.origin, CONTAINER, state) as mount:
        return _measure(mount, context, ["sequential", _at(mount, LARGE), *_original(context, LARGE)])


def sequential_unchecked(subject: Subject, context: Context, state: Path) -> Figures:
    """The same with answers made of zeros: what FUSE and the adapter alone can do."""
    with subject.mounted(context.origin, CONTAINER, state) as mount:
        return _measure(mount, context, ["sequential", _at(mount, LARGE)])


def random_blocks(subject: Subject, context: Context, state: Path) -> Figures:
    """8 readers, 1 MiB each time, at random places of one file."""
    return _random(subject, context, state, readers=8, reads=context.sizes.block_reads, size=MIB)


def random_pages(subject: Subject, context: Context, state: Path) -> Figures:
    """16 readers, 4 KiB each time."""
    figures = _random(subject, context, state, readers=16, reads=context.sizes.page_reads, size=4096)
    return {"reads_s": figures["mb_s"] * 1e6 / 4096} | figures


def first_byte(subject: Subject, context: Context, state: Path) -> Figures:
    """From open to the first 4 KiB of a cold file, names already known; many files, in random order."""
    names = [first_name(number) for number in range(context.sizes.first_count)]
    round_trip_s = context.origin.round_trip_s(CONTAINER, names[0])
    with subject.mounted(context.origin, CONTAINER, state) as mount:
        run(["ls", "-l", _at(mount, "first")], limit_s=60)
        paths = [_at(mount, name) for name in names]
        originals = str(context.dataset.path(CONTAINER, "first"))
        figures = _measure(
            mount, context, ["first", *paths, "--original", originals, "--seed", str(context.seed)]
        )
    return {"ms": figures["median_ms"], "round_trips": figures["median_ms"] / round_trip_s / 1e3} | figures


def warm(subject: Subject, context: Context, state: Path) -> Figures:
    """Reading a file again, from the kernel's page cache: the median of several further readings."""
    with subject.mounted(context.origin, CONTAINER, state) as mount:
        arguments = ["sequential", _at(mount, LARGE), *_original(context, LARGE)]
        _read(arguments)
        return _measure(mount, context, [*arguments, "--repeat", str(WARM_REPEATS)])


def from_disk(subject: Subject, context: Context, state: Path) -> Figures:
    """Reading a file again after the mount and the page cache are gone: from the cache on disk."""
    for _ in range(3):
        with subject.mounted(context.origin, CONTAINER, state) as mount:
            _read(["sequential", _at(mount, LARGE), *_original(context, LARGE)])
            if _wait_until_written(state, round(context.sizes.large * CACHED_PART)):
                break
    drop_page_cache(state)
    with subject.mounted(context.origin, CONTAINER, state) as mount:
        return _measure(mount, context, ["sequential", _at(mount, LARGE), *_original(context, LARGE)])


@dataclass(frozen=True)
class Workload:
    """One row. `key` is the figure compared; goals and bounds are described in `report.Row`."""

    name: str
    title: str
    origin: str
    subjects: tuple[str, ...]
    work: Work
    key: str = "mb_s"
    higher_is_better: bool = True
    goals: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)


_RCLONE = ("amlmount", "rclone-best", "rclone-default")

ALL = (
    Workload(
        "sequential",
        "one large file, one sequential reader",
        "delayed",
        _RCLONE,
        sequential,
        goals={"rclone-best": 2.0, "rclone-default": 8.0},
    ),
    Workload(
        "sequential-near",
        "one large file, one sequential reader",
        "near",
        _RCLONE,
        sequential,
        goals={"rclone-best": 1.5},
    ),
    Workload("sequential-tls", "one large file, one sequential reader", "tls", _RCLONE, sequential),
    Workload(
        "random-1m",
        "random 1 MiB reads, 8 readers",
        "delayed",
        _RCLONE,
        random_blocks,
        goals={"rclone-best": 1.0, "rclone-default": 1.0},
        bounds={"fetched_per_asked": (0, 2)},
    ),
    Workload(
        "random-4k",
        "random 4 KiB reads, 16 readers",
        "delayed",
        _RCLONE,
        random_pages,
        key="reads_s",
        bounds={"requests_per_read": (0, 1.05), "bytes_per_read": (0, 4096 * 1.05)},
    ),
    Workload(
        "first-byte",
        "time to first byte of a cold file",
        "delayed",
        _RCLONE,
        first_byte,
        key="ms",
        higher_is_better=False,
        bounds={"round_trips": (0, 1.5)},
    ),
    Workload(
        "warm",
        "second read, from the page cache",
        "near",
        ("amlmount", "local-disk"),
        warm,
        goals={"local-disk": 0.9},
    ),
    Workload(
        "from-disk",
        "second read, page cache dropped",
        "near",
        ("amlmount", "local-disk"),
        from_disk,
        goals={"local-disk": 0.8},
    ),
    Workload("fuse-ceiling", "reads answered with zeros", "near", ("amlmount-zeros",), sequential_unchecked),
)


def _random(
    subject: Subject, context: Context, state: Path, *, readers: int, reads: int, size: int
) -> Figures:
    with subject.mounted(context.origin, CONTAINER, state) as mount:
        arguments = [
            "random", _at(mount, SCATTERED), *_original(context, SCATTERED), "--seed", str(context.seed),
            "--readers", str(readers), "--reads", str(reads), "--size", str(size),
        ]  # fmt: skip
        return _measure(mount, context, arguments)


def _measure(mount: Mount, context: Context, arguments: list[str]) -> Figures:
    """Run a reader and put together what it, the mount and the origin spent."""
    origin = context.origin
    origin_pids = with_children(origin.pid)
    mount_pids = mount.pids()
    mount_before, origin_before = cpu_s(mount_pids), cpu_s(origin_pids)
    origin.reset()
    reading = _read(arguments)
    served = origin.served()
    mount_pids = mount.pids()
    return _figures(
        reading,
        served,
        mount_cpu_s=cpu_s(mount_pids) - mount_before,
        origin_cpu_s=cpu_s(origin_pids) - origin_before,
        rss=peak_rss(mount_pids),
    )


def _figures(
    reading: Reading, served: Served, *, mount_cpu_s: float, origin_cpu_s: float, rss: int
) -> Figures:
    figures = {
        "mb_s": reading.bytes / len(reading.seconds) / statistics.median(reading.seconds) / 1e6,
        "fetched_per_asked": served.get_bytes / reading.bytes,
        "requests": float(served.requests),
        "requests_per_read": served.get / reading.reads,
        "bytes_per_read": served.get_bytes / reading.reads,
        "mount_peak_rss_mb": rss / 1e6,
        "unquoted_if_match": float(served.unquoted_if_match),
        "origin_errors": float(served.errors),
    }
    spent = {"mount": mount_cpu_s, "reader": reading.cpu_s, "origin": origin_cpu_s}
    if reading.bytes / reading.reads >= MIB // 2:
        gib = reading.bytes / GIB
        figures |= {f"{who}_cpu_s_per_gib": seconds / gib for who, seconds in spent.items()}
    else:
        figures |= {f"{who}_cpu_ms_per_read": seconds * 1e3 / reading.reads for who, seconds in spent.items()}
    if len(reading.latencies_s) >= 2:
        ordered = statistics.quantiles(reading.latencies_s, n=100, method="inclusive")
        figures |= {"median_ms": ordered[49] * 1e3, "p99_ms": ordered[98] * 1e3}
    return figures


def _read(arguments: list[str]) -> Reading:
    done = run([sys.executable, "-m", "bench.reader", *arguments], limit_s=READ_LIMIT_S)
    return Reading(**json.loads(done.stdout))


def _at(mount: Mount, name: str) -> str:
    return str(mount.path / name)


def _original(context: Context, name: str) -> tuple[str, str]:
    return "--original", str(context.dataset.path(CONTAINER, name))


def _wait_until_written(state: Path, size: int, limit_s: float = 30.0) -> bool:
    """Wait until files below the state folder (not its mount) hold that many bytes, or stop growing."""
    deadline, held = time.monotonic() + limit_s, -1
    while time.monotonic() < deadline:
        now = sum(
            path.stat().st_size
            for folder in state.iterdir()
            if folder.name != "mnt" and folder.is_dir()
            for path in folder.rglob("*")
            if path.is_file()
        )
        if now >= size:
            return True
        if now == held:
            return False
        held = now
        time.sleep(2.0)
    return False
