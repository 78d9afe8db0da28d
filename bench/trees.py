"""Trees: how soon a mount is ready, and what `find`, `ls -lR` and `du` take on trees of many files.

Duty: the rows `ready` and `tree-*`. The containers are the origin's made-up ones; the version is registered
before, its registration is the row `listing`. Each command runs after the kernel's caches were dropped, so that
it asks the mount. Durations in seconds.
"""

from __future__ import annotations

from pathlib import Path

from bench.mounting import Subject
from bench.processes import CommandError, cpu_s, drop_page_cache, peak_rss, run
from bench.report import Compared
from bench.workload import Context, Figures, Workload

COMMANDS = {"find": ("find",), "ls": ("ls", "-lR"), "du": ("du", "-a")}
COMMAND_LIMIT_S = 240
PER_FOLDER = 1000  # files in each folder, as origin.lua makes them up


def ready(subject: Subject, context: Context, state: Path) -> Figures:
    """From the mount command's start until the root is listed, and nothing more."""
    with subject.mounted(context.origin, context.container, state) as mount:
        return {"ready_s": mount.ready_s, "mount_peak_rss_mb": peak_rss(mount.pids()) / 1e6}


def walked(subject: Subject, context: Context, state: Path) -> Figures:
    """The three commands, one after the other."""
    entries = int(context.container.removeprefix("listing-"))
    figures: Figures = {}
    with subject.mounted(context.origin, context.container, state) as mount:
        before = cpu_s(mount.pids())
        for name, command in COMMANDS.items():
            drop_page_cache()
            done = run(["sh", "-c", '"$@" | wc -l', "sh", *command, str(mount.path)], limit_s=COMMAND_LIMIT_S)
            if int(done.stdout) < entries:
                raise CommandError(f"{name} printed {done.stdout.strip()} lines for {entries} files")
            figures[f"{name}_s"] = done.seconds
        pids = mount.pids()
        figures["entries_s"] = entries / figures["find_s"]
        if not pids:
            return figures
        figures |= {
            "mount_cpu_ms_per_file": (cpu_s(pids) - before) * 1e3 / len(COMMANDS) / entries,
            "mount_peak_rss_mb": peak_rss(pids) / 1e6,
            "ready_s": mount.ready_s,
        }
    return figures


_READY = Compared("ready_s", higher_is_better=False)
_BY = tuple(Compared(f"{name}_s", higher_is_better=False) for name in COMMANDS)


def _tree(entries: int, words: str, subjects: tuple[str, ...], rounds: int) -> Workload:
    return Workload(
        f"tree-{words}",
        f"find, ls -lR, du on {entries:,} files",
        "delayed",
        f"listing-{entries}",
        subjects,
        walked,
        _BY,
        rounds=rounds,
        quick=rounds > 1,
        quick_subjects=("amlmount", "rclone-default"),
    )


WORKLOADS = (
    Workload(
        "ready",
        "mount command until the tree of 10,000 files answers",
        "delayed",
        "listing-10000",
        ("amlmount", "rclone-default", "adlfs-fuse"),
        ready,
        (_READY,),
        rounds=5,
    ),
    _tree(10_000, "10k", ("amlmount", "rclone-default", "local-disk"), 3),
    _tree(1_000_000, "1m", ("amlmount",), 1),
)
