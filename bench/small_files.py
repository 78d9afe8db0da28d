"""Thousands of small files, as an epoch of training reads them.

Duty: the rows `small-*`. Files of 100 KB in folders of 100 are read whole by processes that start together, in
the manifest's order or shuffled (the same shuffle for all subjects of a round). The mount is walked before
the clock starts, by a process of its own. A subject that declares its order runs its command when all readers
stand at the start; the clock starts when the command has ended.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench.dataset import Dataset
from bench.mounting import Mount, Subject
from bench.processes import drop_page_cache, marked
from bench.report import Compared, Goal
from bench.workload import Context, Figures, Sizes, Workload, measure, read, wait_until_written

CONTAINER = "small"
PER_FOLDER = 100
CACHED_PART = 0.999  # of the files' bytes, on disk: then the cache counts as filled
FILL_TRIES = 3
MANIFEST, SHUFFLED = "manifest", "shuffled"


def make_data(dataset: Dataset, sizes: Sizes) -> None:
    """Write the files."""
    for number in range(sizes.small_folders * PER_FOLDER):
        dataset.add(CONTAINER, f"class-{number // PER_FOLDER:03d}/sample-{number:06d}.bin", sizes.small)


def first_epoch(order: str, readers: int, subject: Subject, context: Context, state: Path) -> Figures:
    """A new mount with an empty cache."""
    with subject.mounted(context.origin, CONTAINER, state) as mount:
        return _epoch(mount, context, state, order, readers, context.sizes.small_limit_s)


def second_epoch(order: str, readers: int, subject: Subject, context: Context, state: Path) -> Figures:
    """A new mount on the cache that a first epoch filled, the page cache dropped in between."""
    size = context.sizes.small_folders * PER_FOLDER * context.sizes.small
    for _ in range(FILL_TRIES):
        with subject.mounted(context.origin, CONTAINER, state) as mount:
            if not mount.mark:  # plain files: there is no cache to fill
                break
            _epoch(mount, context, state, MANIFEST, 8, 60.0)
            filled = wait_until_written(state, round(size * CACHED_PART))
            time.sleep(mount.settle_s)
            if filled:
                break
    drop_page_cache(state)
    with subject.mounted(context.origin, CONTAINER, state) as mount:
        return _epoch(mount, context, state, order, readers, 60.0)


def ceiling(readers: int, subject: Subject, context: Context, state: Path) -> Figures:
    """Reads answered with zeros: what FUSE and the program that answers allow for files of this size."""
    zeros = state / "zeros"
    for name in context.names():
        (zeros / name).parent.mkdir(parents=True, exist_ok=True)
        with (zeros / name).open("wb") as file:
            file.truncate(context.sizes.small)
    with subject.mounted(context.origin, CONTAINER, state) as mount:
        return _epoch(mount, replace(context, originals_at=zeros), state, MANIFEST, readers, 60.0)


@dataclass(frozen=True)
class Both(Mount):
    """Two mounts, below one folder."""

    marks: tuple[str, ...] = ()

    def pids(self) -> list[int]:
        """The processes of both."""
        return [pid for mark in self.marks for pid in marked(mark)]


def two_mounts(readers: int, subject: Subject, context: Context, state: Path) -> Figures:
    """Two mounts, each with a process and a cache of its own, and half of the readers and of the files."""
    originals = state / "original"
    for side in "ab":
        (originals / side).mkdir(parents=True)
        (originals / side / "mnt").symlink_to(context.originals)
        (state / side).mkdir()
    with (
        subject.mounted(context.origin, CONTAINER, state / "a") as one,
        subject.mounted(context.origin, CONTAINER, state / "b") as other,
    ):
        for mount in (one, other):
            read(["walk", str(mount.path)])
        names = context.names()
        halves = iter(names[: len(names) // 2]), iter(names[len(names) // 2 :])
        sides = (at % readers * 2 // readers for at in range(len(names)))  # of the reader whose turn it is
        names = [f"{'ab'[side]}/mnt/{next(halves[side])}" for side in sides]
        both = Both(state, one.mark, marks=(one.mark, other.mark))
        return _read(both, replace(context, originals_at=originals), state, names, readers, 60.0)


def _epoch(mount: Mount, context: Context, state: Path, order: str, readers: int, limit_s: float) -> Figures:
    names = context.names()
    if order == SHUFFLED:
        random.Random(context.seed).shuffle(names)
    if not mount.through:
        read(["walk", str(mount.path)])
    return _read(mount, context, state, names, readers, limit_s)


def _read(
    mount: Mount, context: Context, state: Path, names: list[str], readers: int, limit_s: float
) -> Figures:
    listed = state / "order.txt"
    listed.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    arguments = [
        "files", str(mount.path), "--list", str(listed), "--original", str(context.originals),
        "--readers", str(readers), "--limit-s", str(limit_s),
    ]  # fmt: skip
    if mount.declare:
        arguments += ["--declare", json.dumps(mount.declare)]
    figures = measure(mount, context, arguments)
    renamed = {key.replace("_per_read", "_per_file"): value for key, value in figures.items()}
    return {"files_s": figures["reads"] / figures["seconds"]} | renamed


_BY = (Compared("files_s"),)
_RCLONES = ("rclone-default", "rclone-streams", "rclone-cached")
_ADLFS = ("adlfs", "adlfs-fuse")
_DECLARED = "amlmount-declared"
_QUICK = ("amlmount", _DECLARED, "rclone-default", "obstore", "local-disk")


def _files(readers: int) -> str:
    return f"small files, {readers} reader{'s' if readers > 1 else ''}"


def _manifest(readers: int, floor: float | None, aim: float | None = None) -> Workload:
    ceilings = ("obstore", "obstore-128") if readers == 32 else ("obstore",)
    return Workload(
        f"small-manifest-{readers}",
        f"{_files(readers)}, in manifest order, first epoch",
        "delayed",
        CONTAINER,
        ("amlmount", *_RCLONES, *_ADLFS, *ceilings),
        partial(first_epoch, MANIFEST, readers),
        _BY,
        goals=(Goal("rclone", floor, aim=aim),) if floor else (),
        quick=readers == 8,
        quick_subjects=_QUICK,
        contest=True,
    )


def _shuffled(readers: int, floor: float | None, aim: float | None = None) -> Workload:
    goals = (Goal("rclone", 1.0),)
    return Workload(
        f"small-shuffled-{readers}",
        f"{_files(readers)}, shuffled, first epoch",
        "delayed",
        CONTAINER,
        ("amlmount", _DECLARED, *_RCLONES, "adlfs", "obstore"),
        partial(first_epoch, SHUFFLED, readers),
        _BY,
        ours=("amlmount", _DECLARED),
        goals=(*goals, Goal("rclone", floor, _DECLARED, aim)) if floor else goals,
        quick=readers == 8,
        quick_subjects=_QUICK,
        contest=True,
    )


def _near(readers: int) -> Workload:
    return Workload(
        f"small-near-{readers}",
        f"{_files(readers)}, in manifest order, first epoch",
        "near",
        CONTAINER,
        ("amlmount", *_RCLONES, "obstore"),
        partial(first_epoch, MANIFEST, readers),
        _BY,
        quick=False,
        contest=True,
    )


def _second(readers: int, order: str, floor: float | None) -> Workload:
    words = "in manifest order" if order == MANIFEST else "shuffled"
    return Workload(
        f"small-second-{order}-{readers}",
        f"{_files(readers)}, {words}, second epoch, page cache dropped",
        "delayed",
        CONTAINER,
        ("amlmount", "local-disk", "rclone-cached")
        if (readers, order) == (8, MANIFEST)
        else ("amlmount", "local-disk"),
        partial(second_epoch, order, readers),
        _BY,
        goals=(Goal("local-disk", floor),) if floor else (),
        bounds=(("requests", 0, 0),),
        quick=readers == 8 and order == MANIFEST,
        quick_subjects=_QUICK,
    )


def _limits() -> tuple[Workload, ...]:
    return tuple(
        Workload(
            f"small-{name}-8",
            f"{_files(8)}, in manifest order: {title}",
            "near",
            CONTAINER,
            (subject,),
            partial(work, 8),
            _BY,
            ours=(subject,),
            quick=False,
        )
        for name, title, subject, work in (
            ("ceiling", "reads answered with zeros", "amlmount-zeros", ceiling),
            ("two-mounts", "two mounts, four readers each", "amlmount", two_mounts),
        )
    )


WORKLOADS = (
    _manifest(1, 25.0),
    _manifest(8, None),
    _manifest(32, 2.0, 4.0),
    _shuffled(1, 25.0),
    _shuffled(8, None),
    _shuffled(32, 2.0, 4.0),
    _near(1),
    _near(8),
    *_limits(),
    _second(1, MANIFEST, 0.8),
    _second(8, MANIFEST, 0.8),
    _second(32, MANIFEST, None),
    _second(1, SHUFFLED, 0.8),
    _second(8, SHUFFLED, 0.8),
    _second(32, SHUFFLED, None),
)
