"""A sampler of a data loader that tells the mount what it draws, before it is read.

It stands around any sampler (PyTorch's, or whatever gives indices) and gives the same indices in the same order. It
draws them when the loader begins an epoch, in the process that has the loader, and declares them to the session at the
mount point. Nothing of that is ever in the way of training: what goes wrong is one warning in the log `amlmount`.
"""

from __future__ import annotations

import logging
import operator
import os
import secrets
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, Generic, TypeVar, cast

from amlmount import announce, kernel, namelist
from amlmount.channel import SessionRecord
from amlmount.config import places

AT_ONCE = 1 << 20
"""Indices drawn and declared together. An epoch that is longer, or has no end, is declared in parts of this size, each
while the one before it is read."""

_LOG = logging.getLogger("amlmount")

T = TypeVar("T")
Name = str | bytes | os.PathLike[str]
Names = Name | Sequence[Name]


class ReadOrder(Generic[T]):
    """A sampler, or a batch sampler, whose order is declared to a mount; else it behaves as the one it is given.

        sampler = amlmount.ReadOrder(RandomSampler(dataset), mount="/data", paths=[p for p, _ in dataset.samples])
        loader = DataLoader(dataset, sampler=sampler, num_workers=4)

    `paths` are the files of each sample: one path, or several; absolute, or relative to the mount point. Without them
    an index is a file's number in the list that `amlmount show REF --files` prints.
    """

    def __init__(
        self, sampler: Iterable[T], *, mount: str | os.PathLike[str], paths: Iterable[Names] | None = None
    ) -> None:
        self._sampler = sampler
        self._mount = os.fspath(mount)
        self._paths = None if paths is None else list(paths)
        self._reader = secrets.token_hex(8)
        self._table: _Table | None = None
        self._next: tuple[list[T], Iterator[T]] | None = None
        self._epoch: object = None
        self._warned = False

    def __repr__(self) -> str:
        return f"ReadOrder({self._sampler!r}, mount={self._mount!r})"

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]  # whether it has a length is the sampler's affair

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_sampler" not in self.__dict__:  # while it is copied or unpickled
            raise AttributeError(name)
        value = getattr(self._sampler, name)
        return self._set_epoch if name == "set_epoch" else value

    def _set_epoch(self, epoch: Any) -> None:
        if epoch != self._epoch:
            self._next = None  # it was drawn for another
        self._epoch = epoch
        cast(Any, self._sampler).set_epoch(epoch)

    def __iter__(self) -> Iterator[T]:
        # Nothing is drawn before the loader asks: random numbers are drawn in the order that they always were.
        drawn, rest = self._next or self._draw(keep=0)
        self._next = None
        while drawn:
            following = _take(rest)
            if following:
                self._declare(following, keep=2)
            yield from drawn
            drawn = following

    def declare_next(self) -> None:
        """Draw and declare the next epoch while this one is read, so that there is no pause between them.

        A sampler with `set_epoch` has to be given the next epoch before. One that draws from a generator of random
        numbers that others use does so now, rather than when the next epoch begins.
        """
        if self._next is None:
            self._next = self._draw(keep=1)

    def _draw(self, keep: int) -> tuple[list[T], Iterator[T]]:
        rest = iter(self._sampler)
        drawn = _take(rest)
        self._declare(drawn, keep)
        return drawn, rest

    def _declare(self, drawn: Sequence[T], keep: int) -> None:
        try:
            run, path = places(os.environ).run, kernel.absolute(self._mount)
            record = announce.session_at(run, path)
            if self._table is None or self._table.digest != record.digest:
                self._table = _Table(record, self._mount, self._paths)
            inodes, unknown = self._table.inodes(_indices(drawn))
            # Ranks that are copies of one process read side by side, each its own part.
            announce.declare(run, record, inodes, reader=f"{self._reader}.{os.getpid()}", keep=keep)
        except Exception as error:  # noqa: BLE001  # whatever it is, no training shall fail for it
            self._warn(f"the order of reads was not declared: {error}")
        else:
            if unknown:
                self._warn(f"{unknown:,} of {len(drawn):,} samples are no files in {path}")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            _LOG.warning("%s; training goes on, files are fetched when they are read", what)


class _Table:
    """The inodes of each sample, for one manifest."""

    def __init__(self, record: SessionRecord, mount: str, paths: Sequence[Names] | None) -> None:
        self.digest = record.digest
        self._starts: array[int] | None = None  # by sample: where its files begin, where one has several
        with announce.open_manifest(record) as manifest:
            if paths is None:
                self._files = namelist.files(manifest)
                return
            several = [[path] if isinstance(path, str | bytes | os.PathLike) else path for path in paths]
            if any(len(each) != 1 for each in several):
                self._starts = array("I", accumulate(map(len, several), initial=0))
            names: Iterable[bytes] = map(os.fsencode, chain.from_iterable(several))
            if not os.path.isabs(
                mount
            ):  # what begins with it is written from where the program stands, as it is
                prefix, here = os.fsencode(mount.rstrip("/") + "/"), os.fsencode(os.path.abspath(mount) + "/")
                names = (here + n.removeprefix(prefix) if n.startswith(prefix) else n for n in names)
            self._files = namelist.by_path(names, manifest, [record.path, os.path.abspath(mount)])

    def inodes(self, indices: Sequence[int]) -> tuple[array[int], int]:
        """Return the files of samples, in their order, and how many there are not."""
        starts = self._starts
        if starts is None:
            found = namelist.by_number(indices, self._files)
        else:
            wanted = (i for index in indices for i in range(*starts[index : index + 2]))
            found = array("I", [self._files[i] for i in wanted])
        unknown = found.count(namelist.UNKNOWN)
        return array("I", [ino for ino in found if ino != namelist.UNKNOWN]) if unknown else found, unknown


def _take(elements: Iterator[T]) -> list[T]:
    taken, count = [], 0
    for element in elements:
        taken.append(element)
        count += len(element) if isinstance(element, list | tuple) else 1
        if count >= AT_ONCE:
            break
    return taken


def _indices(drawn: Iterable[Any]) -> list[int]:
    """Return the indices that a sampler or a batch sampler drew."""
    indices: list[int] = []
    for element in drawn:
        if type(element) is int:
            indices.append(element)
        elif hasattr(element, "__index__") and not getattr(element, "ndim", 0):
            indices.append(operator.index(element))
        elif isinstance(element, Sequence) or hasattr(
            element, "ndim"
        ):  # not an iterator: it could be read but once
            indices.extend(map(operator.index, element))
        else:
            raise TypeError(f"{type(element).__name__} is no index")
    return indices
