"""Large files: one, eight at once, at random places, again, and the first byte of many.

Duty: the rows `sequential*`, `eight-files`, `random-*`, `first-byte`, `warm`, `from-disk`, `fuse-ceiling`.
Every reading is cold and is compared with the original.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bench.dataset import Dataset
from bench.mounting import Mount, Subject
from bench.processes import drop_page_cache
from bench.report import Compared, Goal
from bench.sources import MIB
from bench.workload import Context, Figures, Sizes, Workload, measure, read, wait_until_written

CONTAINER = "bench"
EIGHT = "eight"
CACHED_PART = 0.98  # of a file, on disk: then the cache counts as filled
WARM_REPEATS = 5
LARGE = "large/large.bin"
SCATTERED = "random/random.bin"


def make_data(dataset: Dataset, sizes: Sizes) -> None:
    """Write the large file, the one for random reads, and those whose first bytes are read."""
    dataset.add(CONTAINER, LARGE, sizes.large)
    dataset.add(CONTAINER, SCATTERED, sizes.scattered)
    for number in range(sizes.first_count):
        dataset.add(CONTAINER, f"first/file-{number:04d}.bin", sizes.first)


def make_eight(dataset: Dataset, sizes: Sizes) -> None:
    """Write eight large files."""
    for number in range(8):
        dataset.add(EIGHT, f"large-{number}.bin", sizes.eight)


def sequential(subject: Subject, context: Context, state: Path) -> Figures:
    """One reader, one large file, from start to end."""
    with subject.mounted(context.origin, CONTAINER, state) as mount:
        return measure(mount, context, _sequential(mount, context))


def sequential_unchecked(subject: Subject, context: Context, state: Path) -> Figures:
    """The same with answers made of zeros: what FUSE and the adapter alone can do."""
    with subject.mounted(context.origin, CONTAINER, state) as mount:
        return measure(mount, context, ["sequential", str(mount.path), LARGE])


def eight_files(subject: Subject, context: Context, state: Path) -> Figures:
    """Eight readers, each with a large file of its own."""
    with subject.mounted(context.origin, EIGHT, state) as mount:
        arguments = ["many", str(mount.path), *context.names(), "--original", str(context.originals)]
        return measure(mount, context, [*arguments, "--readers", "8"])


def random_blocks(subject: Subject, context: Context, state: Path) -> Figures:
    """8 readers, 1 MiB each time, at random places of one file."""
    return _random(subject, context, state, readers=8, reads=context.sizes.block_reads, size=MIB)


def random_pages(subject: Subject, context: Context, state: Path) -> Figures:
    """16 readers, 4 KiB each time."""
    figures = _random(subject, context, state, readers=16, reads=context.sizes.page_reads, size=4096)
    return {"reads_s": figures["mb_s"] * 1e6 / 4096} | figures


def first_byte(subject: Subject, context: Context, state: Path) -> Figures:
    """From open to the first 4 KiB of a cold file, names already known; many files, in random order."""
    names = [name for name in context.names() if name.startswith("first/")]
    round_trip_s = context.origin.round_trip_s(CONTAINER, names[0])
    with subject.mounted(context.origin, CONTAINER, state) as mount:
        read(["walk", str(mount.path)])
        seed = str(context.seed)
        arguments = ["first", str(mount.path), *names, "--original", str(context.originals), "--seed", seed]
        figures = measure(mount, context, arguments)
    return figures | {"round_trips": figures["median_ms"] / round_trip_s / 1e3}


def warm(subject: Subject, context: Context, state: Path) -> Figures:
    """Reading a file again, from the kernel's page cache: the median of several further readings."""
    with subject.mounted(context.origin, CONTAINER, state) as mount:
        arguments = _sequential(mount, context)
        read(arguments)
        return measure(mount, context, [*arguments, "--repeat", str(WARM_REPEATS)])


def from_disk(subject: Subject, context: Context, state: Path) -> Figures:
    """Reading a file again after the mount and the page cache are gone: from the cache on disk."""
    for _ in range(3):
        with subject.mounted(context.origin, CONTAINER, state) as mount:
            if not mount.mark:  # plain files: there is no cache to fill
                break
            read(_sequential(mount, context))
            if wait_until_written(state, round(context.sizes.large * CACHED_PART)):
                break
    drop_page_cache(state)
    with subject.mounted(context.origin, CONTAINER, state) as mount:
        return measure(mount, context, _sequential(mount, context))


def _sequential(mount: Mount, context: Context) -> list[str]:
    return ["sequential", str(mount.path), LARGE, "--original", str(context.originals)]


def _random(
    subject: Subject, context: Context, state: Path, *, readers: int, reads: int, size: int
) -> Figures:
    with subject.mounted(context.origin, CONTAINER, state) as mount:
        arguments = [
            "random", str(mount.path), SCATTERED, "--original", str(context.originals), "--seed", str(context.seed),
            "--readers", str(readers), "--reads", str(reads), "--size", str(size),
            "--limit-s", str(context.sizes.random_limit_s),
        ]  # fmt: skip
        return measure(mount, context, arguments)


_RCLONES = ("rclone-default", "rclone-streams")
_MOUNTS = ("amlmount", *_RCLONES)
_QUICK = ("amlmount", "rclone-streams", "obstore")
_SEQUENTIAL = Workload(
    "sequential",
    "one large file, one sequential reader",
    "delayed",
    CONTAINER,
    (*_MOUNTS, "rclone-cached", "adlfs", "adlfs-fuse", "obstore"),
    sequential,
    goals=(Goal("rclone-streams", 2.0), Goal("rclone-default", 8.0)),
    quick_subjects=_QUICK,
)

WORKLOADS = (
    _SEQUENTIAL,
    replace(
        _SEQUENTIAL,
        name="sequential-near",
        origin="near",
        subjects=(*_MOUNTS, "obstore"),
        goals=(Goal("rclone-streams", 1.5),),
    ),
    replace(
        _SEQUENTIAL, name="sequential-tls", origin="tls", subjects=_MOUNTS, goals=(), quick=False, rounds=2
    ),
    Workload(
        "random-1m",
        "random 1 MiB reads, 8 readers",
        "delayed",
        CONTAINER,
        _MOUNTS,
        random_blocks,
        goals=(Goal("rclone", 1.0),),
        bounds=(("fetched_per_asked", 0, 2),),
        contest=True,
        quick_subjects=("amlmount", "rclone-default"),
    ),
    Workload(
        "random-4k",
        "random 4 KiB reads, 16 readers",
        "delayed",
        CONTAINER,
        _MOUNTS,
        random_pages,
        compared=(Compared("reads_s"),),
        bounds=(("requests_per_read", 0, 1.05), ("bytes_per_read", 0, 4096 * 1.05)),
        contest=True,
        quick_subjects=("amlmount", "rclone-default"),
    ),
    Workload(
        "first-byte",
        "time to first byte of a cold file",
        "delayed",
        CONTAINER,
        _MOUNTS,
        first_byte,
        compared=(Compared("median_ms", higher_is_better=False),),
        bounds=(("round_trips", 0, 1.5),),
        contest=True,
        quick_subjects=("amlmount", "rclone-default"),
    ),
    Workload(
        "warm",
        "second read, from the page cache",
        "near",
        CONTAINER,
        ("amlmount", "local-disk"),
        warm,
        goals=(Goal("local-disk", 0.9),),
    ),
    Workload(
        "from-disk",
        "second read, page cache dropped",
        "near",
        CONTAINER,
        ("amlmount", "local-disk"),
        from_disk,
        goals=(Goal("local-disk", 0.8),),
    ),
    Workload(
        "fuse-ceiling",
        "reads answered with zeros",
        "near",
        CONTAINER,
        ("amlmount-zeros",),
        sequential_unchecked,
        ours=("amlmount-zeros",),
    ),
    Workload(
        "eight-files",
        "eight large files at once, a reader each",
        "delayed",
        EIGHT,
        (*_MOUNTS, "rclone-cached", "obstore"),
        eight_files,
        contest=True,
        quick_subjects=_QUICK,
    ),
)
