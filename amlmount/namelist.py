"""The files of a manifest by what people call them: their paths, or their numbers in the list of files.

A path is relative to the mount point, or absolute below it. A number counts the files from 0, in the order of
`amlmount show REF --files`. Pure but for SQLite page reads. A million paths take 2 s (5 s in 100,000
folders), a million numbers 0.3 s.
"""

from __future__ import annotations

import posixpath
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from amlmount.dataset import printable, utf8
from amlmount.errors import ManifestError, UsageError
from amlmount.manifest import ROOT, Manifest, Node

UNKNOWN = 0
"""In place of an inode: there is none of that number."""

CHEAPER = 8
"""Names read with their whole folder in the time that one is looked up by itself (5 us)."""

MAX_NAMES = 2_000_000
"""Names of folders read as a whole that are kept: 300 MB at the most, until the list is done."""


class Named(NamedTuple):
    """What a list of names stands for."""

    inodes: array[int]
    """One for each name, `UNKNOWN` for a name of no file."""
    unknown: int
    """How many of those there are."""
    first_unknown: str
    """The first of them, as a person may see it."""

    def known(self, where: str, *, skip_unknown: bool) -> array[int]:
        """Return the inodes without the unknown; raise UsageError where there are any, unless they may be skipped."""
        if not self.unknown:
            return self.inodes
        if not skip_unknown:
            more = f", nor are {self.unknown - 1:,} more" if self.unknown > 1 else ""
            raise UsageError(
                f"{self.first_unknown!r} is no file in {where}{more}",
                hint="paths are relative to the mount point; --skip-unknown leaves such lines out",
            )
        return array("I", [ino for ino in self.inodes if ino != UNKNOWN])


def split(text: bytes, *, null: bool) -> list[bytes]:
    """Return the names in a text: one a line, or each ended by a NUL; empty ones are left out."""
    return [name for name in text.split(b"\0" if null else b"\n") if name]


def resolve(names: Sequence[bytes], manifest: Manifest, mount_points: Iterable[str]) -> Named:
    """Return the files that names stand for: numbers where every one is digits alone, else paths.

    `mount_points` are the ways to write where the manifest is mounted.
    """
    if all(map(bytes.isdigit, names)):
        numbers = [int(name) if len(name) < 12 else -1 for name in names]
        inodes = by_number(numbers, files(manifest))
    else:
        inodes = by_path(names, manifest, mount_points)
    unknown = inodes.count(UNKNOWN)
    return Named(inodes, unknown, printable(names[inodes.index(UNKNOWN)]) if unknown else "")


def files(manifest: Manifest) -> array[int]:
    """Return the inodes of all files in the order of their paths' bytes."""
    found = array("I")
    stack = [_root(manifest)]
    while stack:
        node = stack.pop()
        if not node.is_dir:
            found.append(node.ino)
        elif node.subdirs:
            stack += reversed(manifest.in_path_order(node))
        else:  # nothing but files, and those are numbered in the order of their names
            found.extend(range(node.first, node.first + node.children))
    return found


def by_number(numbers: Iterable[int], listed: Sequence[int]) -> array[int]:
    """Return the inodes at these places of a list, `UNKNOWN` for places that it has not."""
    size = len(listed)
    return array("I", [listed[n] if 0 <= n < size else UNKNOWN for n in numbers])


def by_path(paths: Iterable[bytes], manifest: Manifest, mount_points: Iterable[str]) -> array[int]:
    """Return the inodes of the files at these paths, `UNKNOWN` where there is none."""
    folders = _Folders(manifest, [utf8(point).rstrip(b"/") for point in mount_points])
    inodes = array("I")
    for path in paths:
        slash = path.rfind(b"/") + 1
        inodes.append(folders.written(path[:slash]).file(path[slash:]))
    return inodes


def _root(manifest: Manifest) -> Node:
    root = manifest.get(ROOT)
    if root is None:
        raise ManifestError(f"{manifest.path} is damaged: it has no root")
    return root


class _Folder:
    """The files of one folder, or of one that is not there."""

    def __init__(self, manifest: Manifest, node: Node | None, room: list[int]) -> None:
        self.node = node
        self._manifest = manifest
        self._room = room
        self._asked = 0
        self._names: dict[bytes, int] | None = None

    def file(self, name: bytes) -> int:
        if self._names is not None:
            return self._names.get(name, UNKNOWN)
        if self.node is None:
            return UNKNOWN
        self._asked += 1
        if self._asked * CHEAPER >= self.node.children and self._room[0] >= self.node.children:
            self._room[0] -= self.node.children
            self._names = dict(self._manifest.files_in(self.node))
        found = self._manifest.lookup(self.node.ino, name)
        return UNKNOWN if found is None or found.is_dir else found.ino


class _Folders:
    """The folders that paths lead through, each looked up once for each way to write it."""

    def __init__(self, manifest: Manifest, mount_points: Sequence[bytes]) -> None:
        self._manifest = manifest
        self._mount_points = mount_points
        self._room = [MAX_NAMES]
        self._nowhere = _Folder(manifest, None, self._room)
        self._tidy = {b"": _Folder(manifest, _root(manifest), self._room)}
        self._written: dict[bytes, _Folder] = {}

    def written(self, path: bytes) -> _Folder:
        """Return the folder at a path as somebody wrote it: empty, or with a slash at its end."""
        folder = self._written.get(path)
        if folder is None:
            inner = self._below_the_mount_point(path)
            folder = self._written[path] = self._nowhere if inner is None else self._at(inner)
        return folder

    def _below_the_mount_point(self, path: bytes) -> bytes | None:
        if not path.startswith(b"/"):
            inner = posixpath.normpath(path) if path else b""
        else:
            whole = b"/" + posixpath.normpath(path).lstrip(b"/") + b"/"
            point = next((point for point in self._mount_points if whole.startswith(point + b"/")), None)
            if point is None:
                return None
            inner = whole[len(point) :].strip(b"/")
        return b"" if inner == b"." else inner

    def _at(self, path: bytes) -> _Folder:
        folder = self._tidy.get(path)
        if folder is not None:
            return folder
        folder, done = self._tidy[b""], b""
        for name in path.split(b"/"):
            done = done + b"/" + name if done else name
            if done not in self._tidy:
                node = None if folder.node is None else self._manifest.lookup(folder.node.ino, name)
                is_there = node is not None and node.is_dir
                self._tidy[done] = _Folder(self._manifest, node, self._room) if is_there else self._nowhere
            folder = self._tidy[done]
        return folder
