"""Small manifests for tests, made with the real builder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amlmount.builder import ManifestBuilder
from amlmount.dataset import ManifestEntry, ManifestInfo, Source

HERE = Source(kind="blob", url="https://account.blob.core.windows.net/data", base="", uri="here")


def file(
    path: str | bytes, size: int = 0, mtime_ns: int = 0, tag: str = "t", **more: object
) -> ManifestEntry:
    """Return the entry of a file."""
    fields: dict[str, object] = {"md5": "", "source": 0, **more}
    raw = path if isinstance(path, bytes) else path.encode("utf-8", "surrogateescape")
    return ManifestEntry(raw, size, mtime_ns, tag, **fields)  # type: ignore[arg-type]  # fields of several types, by name


def folder(path: str | bytes, mtime_ns: int = 0, source: int = 0) -> ManifestEntry:
    """Return the entry of a kept directory."""
    return file(path, 0, mtime_ns, "", source=source, is_dir=True)


def build(
    path: Path, entries: Sequence[ManifestEntry], sources: Sequence[Source] = (HERE,), batch: int = 5000
) -> ManifestInfo:
    """Write a manifest of these entries at `path`, taken in `batch` at a time."""
    with ManifestBuilder(path, sources) as builder:
        for start in range(0, len(entries), batch):
            builder.add(entries[start : start + batch])
        return builder.finish()
