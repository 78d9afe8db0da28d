"""A program that trains, as far as reading goes: a real DataLoader with workers and a shuffling sampler.

    torch_epochs.py FOLDER EPOCHS plain|declared|batches|ahead

Prints one JSON line an epoch: for each sample, in the order they arrive, its number and the digest of its bytes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

import amlmount

WORKERS = 4
BATCH = 8


class Files(Dataset[tuple[int, str]]):
    """The files of a folder, by number; their paths are known, as they are to most datasets."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, str]:
        return index, hashlib.sha256(self.paths[index].read_bytes()).hexdigest()


def loader(folder: Path, mode: str) -> tuple[DataLoader[Any], Any]:
    dataset = Files(sorted(path for path in folder.rglob("*") if path.is_file()))
    sampler: Any = RandomSampler(dataset)
    options: dict[str, Any] = {"num_workers": WORKERS, "collate_fn": list}
    if mode == "batches":
        sampler = amlmount.ReadOrder(
            BatchSampler(sampler, BATCH, drop_last=False), mount=folder, paths=dataset.paths
        )
        return DataLoader(dataset, batch_sampler=sampler, **options), sampler
    if mode != "plain":
        sampler = amlmount.ReadOrder(sampler, mount=folder, paths=dataset.paths)
    return DataLoader(dataset, sampler=sampler, batch_size=BATCH, **options), sampler


def samples(batches: DataLoader[Any], begun: Any) -> Iterator[tuple[int, str]]:
    for number, batch in enumerate(batches):
        if number == 1:
            begun()
        yield from batch


def main() -> None:
    folder, epochs, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.manual_seed(7)
    batches, sampler = loader(folder, mode)
    for _ in range(epochs):
        begun = sampler.declare_next if mode == "ahead" else lambda: None
        print(json.dumps(list(samples(batches, begun))), flush=True)


if __name__ == "__main__":
    main()
