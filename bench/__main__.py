"""`python -m bench`: run the workloads in alternation and write the tables. See README.md."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bench import listing, report
from bench.dataset import Dataset, temporary_dataset
from bench.origin import Origin, OriginError, nginx_program
from bench.peers import RCLONE_BEST, RCLONE_DEFAULT, Amlmount, LocalDisk, Subject, rclone_program
from bench.processes import CommandError
from bench.workloads import ALL, LARGE, Context, Sizes, Workload, make_dataset

DELAY_S = 0.020
RATE = 80_000_000  # bytes per second and connection
RESULTS = Path(__file__).resolve().parent / "results"
LISTING = "listing"
NAMES = (*(workload.name for workload in ALL), LISTING)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 0 when nothing failed, 1 when a run did, 2 when the origin can't be had."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    load = os.getloadavg()[0]
    sizes = Sizes.quick() if options.quick else Sizes()
    try:
        with temporary_dataset() as dataset, ExitStack() as stack:
            rows, method = _run_all(options, dataset, sizes, stack)
            about = report.machine() | {
                "rclone": report.version_of([rclone_program() or "rclone", "version"]).removeprefix(
                    "rclone "
                ),
                "origin": report.version_of([nginx_program(), "-v"]).removeprefix("nginx version: "),
                "load average before": f"{load:.1f}",
            }
    except OriginError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    name = "quick" if options.quick else "full"
    if options.only:
        name += "-" + "-".join(options.only)
    text, data = report.write(options.results, name, rows, about, method)
    print(text.read_text(encoding="utf-8"))
    _say(f"written: {text} and {data}")
    return 1 if any(row.failures for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="amlmount next to its peers")
    parser.add_argument("--quick", action="store_true", help="small files, one round")
    parser.add_argument(
        "--only",
        action="append",
        choices=NAMES,
        metavar="NAME",
        help=f"of {', '.join(NAMES)}; may be repeated",
    )
    parser.add_argument("--pairs", type=int, help="rounds of A, B in alternation (3; 1 with --quick)")
    parser.add_argument(
        "--entries", type=int, default=100_000, help="blobs to list (1000000 for the long run)"
    )
    parser.add_argument(
        "--subjects", nargs="+", metavar="NAME", help="run only these of each workload's subjects"
    )
    parser.add_argument(
        "--disk", type=Path, default=Path(tempfile.gettempdir()), help="where caches are kept"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables are written")
    return parser


def _run_all(
    options: argparse.Namespace, dataset: Dataset, sizes: Sizes, stack: ExitStack
) -> tuple[list[report.Row], list[str]]:
    """Every workload chosen, and the lines that say how it was done."""
    chosen = options.only or NAMES
    pairs = options.pairs or (1 if options.quick else 3)
    workloads = [workload for workload in ALL if workload.name in chosen]
    if workloads:
        _say(f"writing {(sizes.large + sizes.scattered) / 1e9:.1f} GB of data into memory")
        make_dataset(dataset, sizes)
    origins = {
        "near": stack.enter_context(Origin(dataset)),
        "delayed": stack.enter_context(Origin(dataset, delay_s=DELAY_S, rate=RATE)),
        "tls": stack.enter_context(Origin(dataset, tls=True)),
    }
    subjects = _subjects(dataset, options.subjects)
    rows = [_run(work, subjects, origins, dataset, sizes, pairs, options.disk) for work in workloads]
    if LISTING in chosen:
        rows.append(_listing(subjects, origins["near"], options.entries, pairs, options.disk))
    return rows, _method(pairs, sizes, subjects, origins)


def _subjects(dataset: Dataset, wanted: list[str] | None) -> dict[str, Subject]:
    """The subjects that can run here, by name."""
    zeros = Amlmount("amlmount-zeros", "AMLMOUNT_NULL_READS=1", {"AMLMOUNT_NULL_READS": "1"})
    local = LocalDisk(dataset, (LARGE,))
    candidates: tuple[Subject, ...] = (Amlmount(), zeros, RCLONE_BEST, RCLONE_DEFAULT, local)
    found: dict[str, Subject] = {}
    for subject in candidates:
        if wanted is None or subject.name in wanted:
            reason = subject.missing()
            if reason is None:
                found[subject.name] = subject
            else:
                _say(f"without {subject.name}: {reason}")
    return found


def _run(
    workload: Workload,
    subjects: dict[str, Subject],
    origins: dict[str, Origin],
    dataset: Dataset,
    sizes: Sizes,
    pairs: int,
    disk: Path,
) -> report.Row:
    origin = origins[workload.origin]
    row = report.Row(
        workload.name,
        workload.title,
        origin.description,
        workload.key,
        workload.higher_is_better,
        workload.subjects[0],
        workload.goals,
        workload.bounds,
    )
    for number in range(pairs):
        context = Context(origin, dataset, sizes, seed=number)
        for name in workload.subjects:
            if name in subjects:
                with _state(disk) as state:
                    _attempt(row, name, number, partial(workload.work, subjects[name], context, state))
    return row


def _listing(
    subjects: dict[str, Subject], origin: Origin, entries: int, pairs: int, disk: Path
) -> report.Row:
    row = report.Row(
        LISTING,
        f"{entries:,} blobs listed and frozen",
        origin.description,
        "entries_s",
        higher_is_better=True,
        ours="amlmount",
        goals={},
        bounds={"entries_s": (40_000, math.inf), "peak_rss_mb": (0, 300)},
    )
    amlmount = subjects.get("amlmount")
    for number in range(pairs):
        if isinstance(amlmount, Amlmount):
            with _state(disk) as state:
                _attempt(row, "amlmount", number, partial(listing.freeze, amlmount, origin, entries, state))
        _attempt(row, "azure-storage-blob", number, partial(listing.iterate_sdk, origin, entries))
    return row


def _attempt(row: report.Row, name: str, number: int, work: Callable[[], dict[str, float]]) -> None:
    try:
        figures = work()
    except (CommandError, OSError) as error:
        row.failures.append(f"{name}, round {number + 1}: {' '.join(str(error).split())}")
        row.add(name, None)
        _say(f"{row.name:16} {name:20} FAILED: {error}")
    else:
        row.add(name, figures)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if value)
        _say(f"{row.name:16} {name:20} {shown}")


@contextmanager
def _state(disk: Path) -> Iterator[Path]:
    """A folder for one run's caches; the mount in it is gone before it is removed."""
    with tempfile.TemporaryDirectory(prefix="amlmount-bench-", dir=disk, ignore_cleanup_errors=True) as name:
        yield Path(name)


def _method(pairs: int, sizes: Sizes, subjects: dict[str, Subject], origins: dict[str, Origin]) -> list[str]:
    lines = [
        f"{pairs} round(s) of all subjects in alternation; the median over the rounds, least and greatest in "
        "brackets.",
        "Origin, mount and reader share the machine. Every run is a new mount with an empty cache, and every "
        "read 1 MiB, unless its row says otherwise; a sample of each read is compared with the original.",
        f"Files: {sizes.large >> 20} MiB (sequential), {sizes.scattered >> 20} MiB (random), "
        f"{sizes.first_count} of {sizes.first >> 10} KiB (first byte): incompressible, in memory on the "
        "origin's side.",
        "Origins: " + "; ".join(f"{name}: {origin.description}" for name, origin in origins.items()) + ".",
    ]
    return lines + [f"{subject.name}: {subject.settings}." for subject in subjects.values()]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
