"""What a workload is, and how one reading is measured.

A workload is a row of the table: a title, the container and origin it runs on, the subjects in comparison
(those named in `ours` are ours), the figures that are compared and the goals set for them. Figures have their
unit in their name; `*_mb_s` are 10^6 bytes a second, CPU is in seconds per GiB read or, where reads are
small, milliseconds a read or file.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.dataset import Dataset
from bench.mounting import Mount, Subject
from bench.origin import Origin, Served
from bench.processes import cpu_s, peak_rss, run, with_children
from bench.reader import Reading
from bench.report import Compared, Goal
from bench.sources import MIB

GIB = 1 << 30
READ_LIMIT_S = 300


@dataclass(frozen=True)
class Sizes:
    """How much data a run uses (bytes), how many files, and how many reads it makes."""

    large: int = 512 * MIB
    scattered: int = 1024 * MIB
    first: int = 256 * 1024
    first_count: int = 100
    block_reads: int = 32  # of each of 8 readers
    page_reads: int = 100  # of each of 16 readers
    random_limit_s: float = 10.0  # no new random read after so long
    eight: int = 128 * MIB  # of each of 8 files
    small: int = 100_000
    small_folders: int = 30  # of 100 files each
    small_limit_s: float = 3.0  # no new file after so long
    shard: int = 140_000_000
    shards: int = 8
    table: int = 64 * MIB
    tables: int = 5

    @classmethod
    def quick(cls) -> Sizes:
        """Small files, for a run of a minute or two."""
        return cls(
            large=128 * MIB, scattered=256 * MIB, first_count=40, block_reads=8, page_reads=40, eight=32 * MIB,
            small_folders=6, small_limit_s=1.5, shard=30_000_000, shards=4, table=16 * MIB, tables=2,
        )  # fmt: skip


@dataclass(frozen=True)
class Context:
    """What every workload is given. `seed` is the same for all subjects of one round."""

    origin: Origin
    container: str
    dataset: Dataset
    sizes: Sizes
    seed: int
    originals_at: Path | None = None

    @property
    def originals(self) -> Path:
        """The folder of the files that reads are compared with: the container's own, unless said otherwise."""
        return self.originals_at or self.dataset.root / self.container

    def names(self) -> list[str]:
        """The container's files, in the order of a manifest."""
        return sorted(blob.name for blob in self.dataset.blobs if blob.container == self.container)


Figures = dict[str, float]
Work = Callable[[Subject, Context, Path], Figures]
THROUGHPUT = (Compared("mb_s"),)


@dataclass(frozen=True)
class Workload:
    """One row. Goals and bounds are described in `report.Row`.

    `quick`: part of a quick run, with the subjects of `quick_subjects` where given. `contest`: after the first
    round, only the best of rclone's settings goes on. `rounds` is the most rounds made without --pairs.
    """

    name: str
    title: str
    origin: str
    container: str
    subjects: tuple[str, ...]
    work: Work
    compared: tuple[Compared, ...] = THROUGHPUT
    ours: tuple[str, ...] = ("amlmount",)
    goals: tuple[Goal, ...] = ()
    bounds: tuple[tuple[str, float, float], ...] = ()
    quick: bool = True
    quick_subjects: tuple[str, ...] | None = None
    contest: bool = False
    rounds: int = 3


def measure(mount: Mount, context: Context, arguments: list[str]) -> Figures:
    """Run a reader and put together what it, the mount and the origin spent."""
    origin = context.origin
    origin_pids = with_children(origin.pid)
    mount_pids = mount.pids()
    mount_before, origin_before = cpu_s(mount_pids), cpu_s(origin_pids)
    origin.reset()
    reading = read([*arguments, *mount.through])
    served = origin.served()
    mount_pids = mount.pids()
    figures = _figures(
        reading,
        served,
        mount_cpu_s=cpu_s(mount_pids) - mount_before,
        origin_cpu_s=cpu_s(origin_pids) - origin_before,
        rss=peak_rss(mount_pids),
    )
    if mount.mark:
        return figures
    return {key: value for key, value in figures.items() if not key.startswith("mount_")}


def _figures(
    reading: Reading, served: Served, *, mount_cpu_s: float, origin_cpu_s: float, rss: int
) -> Figures:
    figures = {
        "mb_s": reading.bytes / len(reading.seconds) / statistics.median(reading.seconds) / 1e6,
        "seconds": sum(reading.seconds),
        "reads": float(reading.reads),
        "fetched_per_asked": served.get_bytes / reading.bytes,
        "requests": float(served.requests),
        "requests_per_read": (served.get + served.head) / reading.reads,
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
    return figures | ({"declare_s": reading.declare_s} if reading.declare_s > 0 else {})


def read(arguments: list[str], limit_s: float = READ_LIMIT_S) -> Reading:
    """Run the reader; its answer is the last line it prints."""
    done = run([sys.executable, "-m", "bench.reader", *arguments], limit_s=limit_s)
    return Reading(**json.loads(done.stdout.rpartition("\n")[2]))


def wait_until_written(state: Path, size: int, limit_s: float = 30.0) -> bool:
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
        time.sleep(1.0)
    return False
