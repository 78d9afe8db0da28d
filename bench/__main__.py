"""`python -m bench`: run the workloads in alternation and write tables and pictures. See README.md."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import formats, large_files, listing, pictures, report, small_files, trees
from bench.machine import machine, version_of
from bench.origin import OriginError, nginx_program
from bench.peers import rclone_program
from bench.rounds import Runner, say
from bench.workload import Sizes, Workload

RESULTS = Path(__file__).resolve().parent / "results"
ENTRIES, QUICK_ENTRIES = 100_000, 20_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 0 when nothing failed, 1 when a run did, 2 when the origin can't be had."""
    options = _parser().parse_args(arguments)
    if options.draw is not None:
        rows, about = report.load(options.draw)
        say(f"drawn: {', '.join(pictures.draw(rows, about, options.draw.parent, options.draw.stem))}")
        return 0
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    begun, load = time.monotonic(), os.getloadavg()[0]
    sizes = Sizes.quick() if options.quick else Sizes()
    try:
        chosen = _chosen(options)
        runner = Runner(sizes, options.disk, options.pairs, options.subjects, quick=options.quick)
        rows = runner.run(chosen)
        about = machine() | {
            "rclone": version_of([rclone_program() or "rclone", "version"]).removeprefix("rclone "),
            "origin": version_of([nginx_program(), "-v"]).removeprefix("nginx version: "),
            "load average before": f"{load:.1f}",
        }
    except OriginError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    name = "quick" if options.quick else "full"
    if parts := [*(options.only or ()), *(options.subjects or ())]:
        name = "-".join(["part", *parts])
    options.results.mkdir(parents=True, exist_ok=True)
    drawn = pictures.draw(rows, about, options.results, name)
    text, data = report.write(options.results, name, rows, about, runner.method(), drawn)
    print(text.read_text(encoding="utf-8"))
    say(f"written after {time.monotonic() - begun:.0f} s: {text} and {data}")
    return 1 if any(row.failures for row in rows) else 0


def workloads(entries: int) -> list[Workload]:
    """Every row, those of one container together."""
    return [
        *large_files.WORKLOADS,
        *small_files.WORKLOADS,
        *formats.WORKLOADS,
        *trees.WORKLOADS,
        listing.workload(entries),
    ]


def _chosen(options: argparse.Namespace) -> list[Workload]:
    """The rows named: by their name, or by its beginning where no row has that name."""
    found = workloads(options.entries or (QUICK_ENTRIES if options.quick else ENTRIES))
    if not options.only:
        return [workload for workload in found if workload.quick or not options.quick]
    names = {workload.name for workload in found}
    wanted = {
        name
        for word in options.only
        for name in names
        if name == word or (word not in names and name.startswith(word))
    }
    return [workload for workload in found if workload.name in wanted]


def _row_name(text: str) -> str:
    names = [workload.name for workload in workloads(ENTRIES)]
    if not any(name.startswith(text) for name in names):
        raise argparse.ArgumentTypeError(f"no row begins so; there are {', '.join(names)}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="amlmount next to its peers")
    parser.add_argument("--quick", action="store_true", help="fewer rows and peers, little data, one round")
    parser.add_argument(
        "--only",
        action="append",
        type=_row_name,
        metavar="NAME",
        help="a row, or the beginning of several rows' names; may be repeated: "
        + ", ".join(workload.name for workload in workloads(ENTRIES)),
    )
    parser.add_argument(
        "--pairs", type=int, help="rounds of A, B in alternation (each row's own number, 1 with --quick)"
    )
    parser.add_argument("--entries", type=int, help=f"blobs to list ({ENTRIES}; 1000000 for the long run)")
    parser.add_argument(
        "--subjects", nargs="+", metavar="NAME", help="run only these of each workload's subjects"
    )
    parser.add_argument(
        "--disk", type=Path, default=Path(tempfile.gettempdir()), help="where caches are kept"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where tables and pictures go")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw the pictures of these results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
