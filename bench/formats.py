"""The rows `records` and `columns`: TFRecord shards read by four workers, and columns of Parquet tables.

Duty: name the files, mount, run the reader's mode. How they are made and read is in records.py.
"""

from __future__ import annotations

from pathlib import Path

from bench.dataset import Dataset
from bench.mounting import Subject
from bench.records import add_shard, add_table, has_parquet
from bench.workload import Context, Figures, Sizes, Workload, measure

SHARDS = "shards"
TABLES = "tables"
WORKERS = 4


def make_shards(dataset: Dataset, sizes: Sizes) -> None:
    """Write the TFRecord shards."""
    for number in range(sizes.shards):
        add_shard(dataset, SHARDS, f"train-{number:05d}-of-{sizes.shards:05d}.tfrecord", sizes.shard)


def make_tables(dataset: Dataset, sizes: Sizes) -> None:
    """Write the Parquet files, where pyarrow is there to do it."""
    for number in range(sizes.tables if has_parquet() else 0):
        add_table(dataset, TABLES, f"part-{number:05d}.parquet", sizes.table)


def records(subject: Subject, context: Context, state: Path) -> Figures:
    """Every shard once, by four processes."""
    with subject.mounted(context.origin, SHARDS, state) as mount:
        return measure(
            mount, context, ["records", str(mount.path), *context.names(), "--readers", str(WORKERS)]
        )


def columns(subject: Subject, context: Context, state: Path) -> Figures:
    """3 of 16 columns of every table, by one process."""
    with subject.mounted(context.origin, TABLES, state) as mount:
        arguments = ["columns", str(mount.path), *context.names(), "--original", str(context.originals)]
        return measure(mount, context, arguments)


_SUBJECTS = ("amlmount", "rclone-default", "rclone-streams", "rclone-cached", "adlfs")

WORKLOADS = (
    Workload(
        "records",
        "TFRecord shards, four workers",
        "delayed",
        SHARDS,
        _SUBJECTS,
        records,
        contest=True,
        quick_subjects=("amlmount", "rclone-streams"),
    ),
    Workload(
        "columns",
        "3 of 16 columns of Parquet files, one reader",
        "delayed",
        TABLES,
        _SUBJECTS,
        columns,
        contest=True,
        quick_subjects=("amlmount", "rclone-default"),
    ),
)
