"""Files per second that a shuffling DataLoader gets from an amlmount mount, with its order declared and without.

    amlmount mount weather:2 /data
    python examples/pytorch_order.py /data --workers 4 --batch 32 --epochs 2

Each round reads every file once, in a new order. What the kernel's page cache already holds says nothing about the
mount, so each round can be given a mount of its own: with `--ref REF` the script mounts and unmounts PATH by itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, RandomSampler

import amlmount


class Files(Dataset[int]):
    """Files by number. Real datasets decode what they read; here it is only counted."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> int:
        return len(Path(self.paths[index]).read_bytes())


def paths_below(folder: Path) -> list[str]:
    return sorted(os.path.join(top, name) for top, _, names in os.walk(folder) for name in names)


def epoch(dataset: Files, folder: Path, words: argparse.Namespace, *, declared: bool) -> str:
    """Read every file once and say how fast."""
    sampler: Any = RandomSampler(dataset)
    if declared:
        # These two lines are all there is to it.
        sampler = amlmount.ReadOrder(sampler, mount=folder, paths=dataset.paths)
    loader = DataLoader(dataset, sampler=sampler, batch_size=words.batch, num_workers=words.workers)
    began, size = time.monotonic(), 0
    for batch in loader:
        size += int(batch.sum())
    seconds = time.monotonic() - began
    return f"{len(dataset) / seconds:,.0f} samples/s, {size / seconds / 1e6:,.0f} MB/s"


@contextmanager
def mounted(ref: str | None, folder: Path) -> Iterator[None]:
    """Mount REF for one round, with nothing in any cache; or use what is there."""
    if ref is None:
        yield
        return
    command = [sys.executable, "-m", "amlmount"]
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [*command, "mount", ref, folder, "--cache-size", "0"], check=True, stdout=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        subprocess.run([*command, "umount", folder], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="where amlmount has mounted the data, or is to mount it")
    parser.add_argument("--ref", help="mount this dataset, URI or folder anew for each round")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2, help="rounds of each kind, in turn")
    words = parser.parse_args()
    folder = words.path.absolute()
    for number in range(1, words.epochs + 1):
        for declared in (False, True):
            with mounted(words.ref, folder):
                said = epoch(Files(paths_below(folder)), folder, words, declared=declared)
            print(f"epoch {number}, {'order declared' if declared else 'not declared  '}: {said}", flush=True)


if __name__ == "__main__":
    main()
