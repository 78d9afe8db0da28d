"""Resolve URIs to a frozen file list: list, match, strip, collect; and compare a frozen list with what is there now.

How several paths join into one tree: a folder gives its content, relative to the folder; a single file gives itself,
under its base name; a pattern gives the files that match, relative to the folder before its first wildcard. The tree is
the union. Two different objects at one path are an error; the same object reached twice is one file.

Synchronous: called from a command's main thread, or from a thread of its own.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from amlmount.builder import ManifestBuilder
from amlmount.dataset import ListedObject, ManifestEntry, ManifestInfo, Source, printable, utf8
from amlmount.errors import FreezeError, ObjectMissing
from amlmount.manifest import Manifest
from amlmount.stores import ObjectStore, Page
from amlmount.uri import Location, compile_pattern, literal_prefix, pattern_base

OpenStore = Callable[[Source], ObjectStore]
Progress = Callable[[int], None]


class NothingThere(FreezeError):
    """A path leads to no object."""


class Plan(NamedTuple):
    """What to list for one location, and which of it to take."""

    source: Source
    prefix: str
    """Names to list begin so."""
    match: re.Pattern[str] | None
    only: ListedObject | None = None
    """The one file that the location names."""


class Frozen(NamedTuple):
    """A finished manifest file and what it says of itself."""

    path: Path
    info: ManifestInfo
    rejected: Sequence[tuple[bytes, str]]
    """The first few names that are not in the tree, each with the reason."""


def plan(location: Location, store: ObjectStore) -> Plan:
    """Decide what a location is (file, folder or pattern); raise NothingThere where a local path leads nowhere."""
    source = Source(
        kind=location.kind, url=location.url, base="", uri=location.uri, datastore=location.datastore
    )
    local = location.kind == "local"
    literal = local and store.head(location.path) is not None
    if location.is_pattern and not literal:
        prefix = pattern_base(location.path) if local else literal_prefix(location.path)
        match = compile_pattern(location.path)
        return Plan(msgspec.structs.replace(source, base=pattern_base(location.path)), prefix, match)
    path = location.path
    if local:
        found = store.head(path)
        if found is None:
            raise NothingThere(f"{location.uri}: no such file or folder")
        if found.is_dir:
            base = path.rstrip("/") + "/"
            return Plan(msgspec.structs.replace(source, base=base), base, None)
        return Plan(msgspec.structs.replace(source, base=path[: path.rfind("/") + 1]), "", None, found)
    folder = path.rstrip("/") + "/" if path else ""
    if path and not path.endswith("/") and not _holds_anything(store, folder):
        found = store.head(path)
        if found is not None and not found.is_dir:
            return Plan(msgspec.structs.replace(source, base=path[: path.rfind("/") + 1]), "", None, found)
    return Plan(msgspec.structs.replace(source, base=folder), folder, None)


def _holds_anything(store: ObjectStore, prefix: str) -> bool:
    page = store.list_page(prefix, "")
    return bool(page.objects()) or bool(page.next_marker)


def _pages(store: ObjectStore, prefix: str) -> Iterator[Page]:
    """Yield a listing's pages, the next one on its way while the caller works on this one."""
    pool = ThreadPoolExecutor(1, "listing")
    try:
        coming = pool.submit(store.list_page, prefix, "")
        while True:
            page = coming.result()
            marker = page.next_marker
            if marker:
                coming = pool.submit(store.list_page, prefix, marker)
            yield page
            if not marker:
                return
    finally:
        # Whoever gives up on a store that hangs does not wait for it.
        pool.shutdown(wait=False, cancel_futures=True)


def freeze(
    locations: Sequence[Location],
    open_store: OpenStore,
    folder: Path,
    progress: Progress = lambda _: None,
    *,
    may_be_empty: bool = False,
) -> Frozen:
    """List everything and write the manifest as a new file in `folder`, named for nothing yet.

    Raises FreezeError, ObjectMissing for a container that is not there, and what the stores raise. With `may_be_empty`
    a location that leads nowhere holds nothing. `progress` gets the number of objects seen so far, once a page.
    """
    plans: list[tuple[Plan, ObjectStore]] = []
    for location in locations:
        store = open_store(
            Source(kind=location.kind, url=location.url, base="", datastore=location.datastore)
        )
        try:
            plans.append((plan(location, store), store))
        except (NothingThere, ObjectMissing):
            if not may_be_empty:
                raise
    _remove_unfinished(folder)
    fd, name = tempfile.mkstemp(prefix=f".freezing-{os.getpid()}-", suffix=".sqlite", dir=folder)
    os.close(fd)
    path = Path(name)
    seen = 0
    with ManifestBuilder(path, [p.source for p, _ in plans]) as builder:
        for index, (what, store) in enumerate(plans):
            found = False
            for entries, count in _entries(what, store, index, builder):
                builder.add(entries)
                found = found or bool(entries)
                seen += count
                progress(seen)
            empty_folder = what.source.kind == "local" and what.match is None
            if not found and not may_be_empty and not empty_folder:
                raise NothingThere(
                    f"{what.source.uri}: nothing there", hint="check the path; names are case-sensitive"
                )
        info = builder.finish()
    with Manifest(path) as manifest:
        rejected = manifest.rejected(20)
    return Frozen(path, info, rejected)


def _remove_unfinished(folder: Path) -> None:
    """Remove what a freeze left that was killed."""
    for left in folder.glob(".freezing-*"):
        pid = left.name.split("-")[1]
        if not os.path.exists(f"/proc/{pid}"):
            left.unlink(missing_ok=True)


def _entries(
    what: Plan, store: ObjectStore, index: int, builder: ManifestBuilder
) -> Iterator[tuple[list[ManifestEntry], int]]:
    base = what.source.base
    if what.only is not None:
        yield [_entry(what.only, base, index)], 1
        return
    for page in _pages(store, what.prefix):
        listed = page.objects()
        match = what.match
        if match is not None:
            # A pattern names files; the folders that hold them are implied.
            listed = [o for o in listed if not o.is_dir and match.fullmatch(o.path)]
        for name, reason in page.unlisted():
            if match is None or match.fullmatch(name):
                builder.reject(utf8(name[len(base) :]), reason)
        # The mark of the folder itself has no name in the tree.
        itself = base[:-1] if base else None
        yield [_entry(o, base, index) for o in listed if o.path != itself or not o.is_dir], len(listed)


def _entry(found: ListedObject, base: str, index: int) -> ManifestEntry:
    path = utf8(found.path[len(base) :])
    return ManifestEntry(path, found.size, found.mtime_ns, found.tag, found.md5, index, found.is_dir)


class Drift(NamedTuple):
    """The difference between a frozen list and a newer one: paths in order."""

    changed: list[str]
    missing: list[str]
    new: list[str]

    def __bool__(self) -> bool:
        return bool(self.changed or self.missing or self.new)


def compare(old: Manifest, new: Manifest) -> Drift:
    """Compare two manifests entry by entry: by kind, size and tag for files, by presence for folders."""
    drift = Drift([], [], [])
    before, after = old.entries(), new.entries()
    a, b = next(before, None), next(after, None)
    while a is not None or b is not None:
        if b is None or (a is not None and a.path < b.path):
            assert a is not None
            drift.missing.append(printable(a.path))
            a = next(before, None)
        elif a is None or b.path < a.path:
            drift.new.append(printable(b.path))
            b = next(after, None)
        else:
            if (a.is_dir, a.size, a.tag) != (b.is_dir, b.size, b.tag):
                drift.changed.append(printable(a.path))
            a, b = next(before, None), next(after, None)
    return drift


def freeze_again(
    old: Manifest,
    locate: Callable[[Source], Location],
    open_store: OpenStore,
    folder: Path,
    progress: Progress,
) -> Frozen:
    """Freeze what a manifest's sources hold now, be it nothing."""
    return freeze(
        [locate(source) for source in old.info.sources], open_store, folder, progress, may_be_empty=True
    )
