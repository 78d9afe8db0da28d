"""Running workloads: their data, their origins, and rounds of all subjects in alternation.

Duty: for each container make its data, run the origins that its rows need, and give every subject its turn in
every round with a new state folder; a failure is noted and the rest goes on. Only one container's data is in
memory at a time.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path

from bench import formats, large_files, small_files
from bench.dataset import Dataset, temporary_dataset
from bench.listing import Sdk
from bench.mounting import Subject
from bench.origin import Origin
from bench.ours import Amlmount
from bench.peers import (
    ADLFS,
    LEFT_OUT,
    OBSTORE,
    OBSTORE_128,
    RCLONE_CACHED,
    RCLONE_DEFAULT,
    RCLONE_STREAMS,
    AdlfsFuse,
    LocalDisk,
)
from bench.processes import CommandError
from bench.report import RCLONE, Row
from bench.workload import Context, Figures, Sizes, Workload

DELAY_S = 0.020
RATE = 80_000_000  # bytes per second and connection

MAKE: dict[str, Callable[[Dataset, Sizes], None]] = {
    large_files.CONTAINER: large_files.make_data,
    large_files.EIGHT: large_files.make_eight,
    small_files.CONTAINER: small_files.make_data,
    formats.SHARDS: formats.make_shards,
    formats.TABLES: formats.make_tables,
}


class Runner:
    """One run of the bench. `pairs` and `wanted` (subjects' names) are the user's choice, None where there is none."""

    def __init__(
        self, sizes: Sizes, disk: Path, pairs: int | None, wanted: Sequence[str] | None, *, quick: bool
    ) -> None:
        self._sizes = sizes
        self._disk = disk
        self._pairs = pairs
        self._wanted = wanted
        self._quick = quick
        self._absent: dict[str, str | None] = {}
        self._used: dict[str, str] = {}
        self._rounds: set[int] = set()

    def run(self, workloads: Sequence[Workload]) -> list[Row]:
        """Every row, in the order given; rows of one container stand together."""
        rows = []
        for container, group in groupby(workloads, key=lambda workload: workload.container):
            together = list(group)
            with temporary_dataset() as dataset, ExitStack() as stack:
                if make := MAKE.get(container):
                    make(dataset, self._sizes)
                    total = sum(blob.size for blob in dataset.blobs)
                    say(f"{container}: {len(dataset.blobs):,} files of {total / 1e9:.2f} GB in memory")
                origins = {
                    name: stack.enter_context(_origin(name, dataset))
                    for name in dict.fromkeys(workload.origin for workload in together)
                }
                rows += [self._row(workload, origins[workload.origin], dataset) for workload in together]
        return rows

    def method(self) -> list[str]:
        """The lines that say how it was done."""
        sizes, rounds = self._sizes, sorted(self._rounds)
        small = f"{sizes.small_folders * small_files.PER_FOLDER:,} of {sizes.small / 1e3:.0f} KB"
        lines = [
            f"{' to '.join(str(number) for number in {rounds[0], rounds[-1]})} round(s) of all subjects in "
            "alternation; the median over the rounds, least and greatest in brackets. Of rclone's settings only "
            "the best in a row's first round goes on to the next (but for `sequential*`); `rclone` is, in each "
            "round, the best of its settings.",
            "Origin, mount and reader share the machine. Every run is a new mount with an empty cache, and every "
            "read 1 MiB, unless its row says otherwise; a sample of each read is compared with the original.",
            f"Files: {sizes.large >> 20} MiB (sequential), 8 of {sizes.eight >> 20} MiB (eight-files), "
            f"{sizes.scattered >> 20} MiB (random), {sizes.first_count} of {sizes.first >> 10} KiB (first byte), "
            f"{small} (small), {sizes.shards} of {sizes.shard / 1e6:.0f} MB (records), {sizes.tables} of "
            f"{sizes.table >> 20} MiB (columns): incompressible, in memory on the origin's side.",
            f"Small files: reader processes start together; none begins a file later than {sizes.small_limit_s:g} s "
            "after the start in a first epoch, so that slow subjects read only the order's beginning.",
            f"Origins: near: no added delay; delayed: {DELAY_S * 1e3:.0f} ms to first byte and {RATE / 1e6:.0f} MB/s "
            "for each connection; tls: no added delay, over TLS.",
        ]
        lines += [f"{name}: {settings}." for name, settings in self._used.items()]
        absent = {name: reason for name, reason in self._absent.items() if reason} | LEFT_OUT
        return lines + [f"Left out: {name}: {reason}." for name, reason in absent.items()]

    def _row(self, workload: Workload, origin: Origin, dataset: Dataset) -> Row:
        row = Row(
            workload.name,
            workload.title,
            origin.description,
            workload.compared,
            workload.ours,
            workload.goals,
            workload.bounds,
        )
        subjects = self._subjects(workload, dataset)
        rounds = self._pairs or (1 if self._quick else workload.rounds)
        self._rounds.add(rounds)
        for number in range(rounds):
            context = Context(origin, workload.container, dataset, self._sizes, seed=number)
            best = row.best_of_rclone(0) if workload.contest and number else None
            for name, subject in subjects.items():
                if best is None or name == best or not name.startswith(f"{RCLONE}-"):
                    with _state(self._disk) as state:
                        _attempt(row, name, number, partial(workload.work, subject, context, state))
        return row

    def _subjects(self, workload: Workload, dataset: Dataset) -> dict[str, Subject]:
        """Those of the row's subjects that were asked for and can run here, by name."""
        names = workload.subjects
        if self._quick and workload.quick_subjects is not None:
            names = tuple(name for name in names if name in workload.quick_subjects)
        known = {subject.name: subject for subject in _all_subjects(dataset)}
        found = {}
        for name in names:
            if self._wanted is None or name in self._wanted:
                if name not in self._absent:
                    self._absent[name] = known[name].missing()
                    if reason := self._absent[name]:
                        say(f"without {name}: {reason}")
                if self._absent[name] is None:
                    found[name] = known[name]
                    self._used[name] = known[name].settings
        return found


def _all_subjects(dataset: Dataset) -> tuple[Subject, ...]:
    return (
        Amlmount(),
        Amlmount("amlmount-declared", "its order announced with `amlmount prefetch --order`", declares=True),
        Amlmount("amlmount-zeros", "AMLMOUNT_NULL_READS=1", {"AMLMOUNT_NULL_READS": "1"}),
        RCLONE_DEFAULT,
        RCLONE_STREAMS,
        RCLONE_CACHED,
        ADLFS,
        AdlfsFuse(),
        OBSTORE,
        OBSTORE_128,
        LocalDisk(dataset, {large_files.CONTAINER: (large_files.LARGE,)}),
        Sdk(),
    )


def _origin(name: str, dataset: Dataset) -> Origin:
    if name == "delayed":
        return Origin(dataset, delay_s=DELAY_S, rate=RATE)
    return Origin(dataset, tls=name == "tls")


def _attempt(row: Row, name: str, number: int, work: Callable[[], Figures]) -> None:
    try:
        figures = work()
    except (CommandError, OSError) as error:
        row.failures.append(f"{name}, round {number + 1}: {' '.join(str(error).split())}")
        row.add(name, number, None)
        say(f"{row.name:26} {name:18} FAILED: {error}")
    else:
        row.add(name, number, figures)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if value)
        say(f"{row.name:26} {name:18} {shown}")


@contextmanager
def _state(disk: Path) -> Iterator[Path]:
    """A folder for one run's caches; the mount in it is gone before it is removed."""
    with tempfile.TemporaryDirectory(prefix="amlmount-bench-", dir=disk, ignore_cleanup_errors=True) as name:
        yield Path(name)


def say(text: str) -> None:
    """One line about how it goes."""
    print(text, file=sys.stderr, flush=True)
