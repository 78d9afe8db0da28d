"""From what a user wrote to a manifest: names looked up, URIs frozen on the spot, stores opened with their credentials.

Shared by all commands; it prints, to standard error, what a person waits for (progress) and must know (names left out).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import click

from amlmount.catalog import Catalog
from amlmount.config import load
from amlmount.dataset import DatasetRef, Source, printable
from amlmount.errors import FreezeError
from amlmount.freeze import Frozen, freeze
from amlmount.manifest import Manifest
from amlmount.stores import ObjectStore, Retrying, open_store
from amlmount.uri import Location, looks_like_uri, parse

NAMES_SHOWN = 1000
"""Names left out of a tree that are told one by one; the manifest holds them all."""


def human_bytes(count: float) -> str:
    """Return a number of bytes for people: 512 B, 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


class Resolved(NamedTuple):
    """A manifest to mount."""

    ref: str
    manifest: Path
    digest: str
    files: int
    bytes: int


class Resolver:
    """Turns what a user wrote into manifests and stores."""

    def __init__(self, catalog: Catalog, environ: Mapping[str, str] = os.environ) -> None:
        self.catalog = catalog
        self._environ = environ
        self._settings = load(environ).settings
        self.open_store = lru_cache(maxsize=None)(self._open_store)

    def _open_store(self, source: Source) -> ObjectStore:
        access = self.catalog.access(source, self._environ)
        store = open_store(access, stall_timeout_s=self._settings.stall_timeout)
        return Retrying(store, patience_s=self._settings.read_timeout)

    def locate(self, uri: str) -> Location:
        """Parse a URI against the working directory and the known datastores."""
        datastores = self.catalog.datastores() if "://" in uri else ()
        return parse(uri, cwd=os.getcwd(), datastores=datastores)

    def locate_source(self, source: Source) -> Location:
        """Parse a frozen source's URI anew; local paths were made absolute when they were frozen."""
        return self.locate(source.uri)

    def freeze(self, uris: Sequence[str], *, strict: bool) -> Frozen:
        """Freeze URIs and report the names that were left out."""
        locations = [self.locate(uri) for uri in uris]
        locations = [loc._replace(uri=loc.path) if loc.kind == "local" else loc for loc in locations]
        frozen = freeze(locations, self.open_store, self.catalog.manifests, progress())
        report_rejected(frozen, strict=strict)
        return frozen

    def resolve(self, ref: str, *, strict: bool = False) -> Resolved:
        """Return the manifest of a REF; a URI is frozen on the spot."""
        if looks_like_uri(ref):
            frozen = self.freeze([ref], strict=strict)
            digest, name = self.catalog.keep_manifest(frozen.path)
            return Resolved(ref, self.catalog.manifests / name, digest, frozen.info.files, frozen.info.bytes)
        record = self.catalog.find(DatasetRef.parse(ref))
        path = self.catalog.manifests / record.manifest
        with Manifest(path):
            return Resolved(record.ref(), path, record.digest, record.files, record.bytes)


def progress() -> Callable[[int], None]:
    """Return a callback that keeps one line of a terminal up to date, and does nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda _: None
    begin = time.monotonic()

    def show(seen: int) -> None:
        rate = seen / max(1e-3, time.monotonic() - begin)
        click.echo(f"\r\x1b[Klisted {seen:,} ({rate:,.0f}/s)", nl=False, err=True)

    return show


def report_rejected(frozen: Frozen, *, strict: bool) -> None:
    """Name each path that is not in the tree, on standard error; raise FreezeError where `strict`."""
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)
    count = frozen.info.rejected
    if not count:
        return
    with Manifest(frozen.path) as manifest:
        for path, reason in manifest.rejected(NAMES_SHOWN):
            click.echo(f"amlmount: left out: {printable(path)!r} {reason}", err=True)
    if count > NAMES_SHOWN:
        click.echo(f"amlmount: and {count - NAMES_SHOWN:,} more", err=True)
    if strict:
        frozen.path.unlink()
        raise FreezeError(
            f"{count:,} names cannot be in a file tree", hint="without --strict they are left out"
        )
