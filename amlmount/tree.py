"""Numbered inodes over a manifest: what a file system asks, answered from the frozen list.

Pure but for SQLite page reads. Not safe for several threads; the session's one event loop uses it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cachetools import LRUCache

from amlmount.dataset import ManifestInfo, ObjectId, text
from amlmount.manifest import ROOT, Manifest, Node

# A cached node is about 400 bytes: 16,384 of them are 6 MB, and the lookups of one directory's files go to few folders.
_NODES = 16_384
_FOLDERS = 1_024


class FileObject(NamedTuple):
    """The pinned object behind a file."""

    source: int
    object: ObjectId


class Tree:
    """The names of one mounted dataset."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._nodes: LRUCache[int, Node] = LRUCache(_NODES)
        self._folders: LRUCache[int, str] = LRUCache(_FOLDERS)
        self._levels = manifest.levels()

    @property
    def info(self) -> ManifestInfo:
        """What the manifest says of itself."""
        return self._manifest.info

    @property
    def inodes(self) -> int:
        """Number of files and directories."""
        return self.info.files + self.info.directories

    def get(self, ino: int) -> Node | None:
        """Return an inode, or None."""
        node = self._nodes.get(ino)
        if node is None:
            node = self._manifest.get(ino)
            if node is not None:
                self._nodes[ino] = node
        return node

    def lookup(self, parent: int, name: bytes) -> Node | None:
        """Return the child of that name, or None."""
        if name == b".":
            return self.get(parent)
        if name == b"..":
            node = self.get(parent)
            return None if node is None else self.get(node.parent)
        node = self._manifest.lookup(parent, name)
        if node is not None:
            self._nodes[node.ino] = node
        return node

    def children(self, directory: Node, start: int, limit: int) -> Sequence[Node]:
        """Return up to `limit` children from child number `start` on."""
        return self._manifest.children(directory, start, limit)

    def path(self, node: Node) -> str:
        """Return a node's path in the tree."""
        return self._folder(node.parent) + text(node.name) if node.ino != ROOT else ""

    def _folder(self, ino: int) -> str:
        """Return a directory's path and the slash behind it; empty for the root."""
        path = self._folders.get(ino)
        if path is None:
            node = self.get(ino)
            assert node is not None, "every inode but the root has a parent: Manifest.check"
            path = f"{self.path(node)}/" if ino != ROOT else ""
            self._folders[ino] = path
        return path

    def level_end(self, ino: int) -> int:
        """Return the inode after the last one as deep in the tree as `ino`.

        Up to there numbers follow a walk of the tree; what comes after lies deeper, and a walk has been there.
        """
        return self._levels[bisect_right(self._levels, ino)]

    def run(self, ino: int, limit: int) -> Sequence[Node]:
        """Return up to `limit` inodes from number `ino` on, in order."""
        return self._manifest.run(ino, limit)

    def nodes(self, inodes: Sequence[int]) -> Mapping[int, Node]:
        """Return these inodes by number."""
        return {node.ino: node for node in self._manifest.nodes(inodes)}

    def any_object(self, source: int) -> FileObject | None:
        """Return the object of one file of a source, or None where it has none."""
        node = self._manifest.any_file(source)
        return None if node is None else self.object(node)

    def object(self, node: Node) -> FileObject:
        """Return the pinned object behind a file's inode."""
        base = self.info.sources[node.source].base
        return FileObject(node.source, ObjectId(base + self.path(node), node.tag, node.size))
