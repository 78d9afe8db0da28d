"""Numbered inodes: what a file system asks, against the entries that went in."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from amlmount.dataset import ManifestEntry, Source
from amlmount.manifest import ROOT, Manifest, Node
from amlmount.tree import Tree
from tests.manifests import HERE, build, file, folder

SOURCES = (
    Source(kind="blob", url="https://a.blob.core.windows.net/c", base="pre/fix/"),
    Source(kind="local", url="file:///", base="/data/"),
)


@contextmanager
def tree_of(*entries: ManifestEntry, sources: tuple[Source, ...] = (HERE,)) -> Iterator[Tree]:
    with tempfile.TemporaryDirectory() as top:
        build(Path(top) / "m", entries, sources)
        with Manifest(Path(top) / "m") as manifest:
            yield Tree(manifest)


def walk(tree: Tree, path: bytes) -> Node | None:
    node = tree.get(ROOT)
    for name in path.split(b"/"):
        assert node is not None
        node = tree.lookup(node.ino, name)
    return node


names = st.sampled_from(["a", "b", "c-", "日", "x.y"])
paths = st.lists(names, min_size=1, max_size=5).map("/".join)


@settings(max_examples=80, deadline=None)
@given(st.sets(paths, min_size=1, max_size=30), st.integers(1, 6))
def test_every_file_is_found_by_its_names_and_by_paging(listed: set[str], page: int) -> None:
    with tree_of(*(file(p, len(p), 1, "t-" + p) for p in listed)) as tree:
        shadowed = {p for p in listed if any(q.startswith(p + "/") for q in listed)}
        for path in listed - shadowed:
            node = walk(tree, path.encode())
            assert node is not None
            assert (node.is_dir, node.size, tree.path(node)) == (False, len(path), path)
            assert tree.object(node).object[:3] == (path, "t-" + path, len(path))
        assert tree.inodes == tree.info.files + tree.info.directories
        seen = 0
        for ino in range(1, tree.inodes + 1):
            node = tree.get(ino)
            assert node is not None
            seen += 1
            children: list[Node] = []
            while len(children) < node.children:
                children += tree.children(node, len(children), page)
            assert [c.name for c in children] == sorted(c.name for c in children)
            assert all(tree.lookup(ino, c.name) == c for c in children)
        assert seen == tree.inodes
        assert tree.get(tree.inodes + 1) is None


def test_dots() -> None:
    with tree_of(file("a/b/c", 1)) as tree:
        a, b = walk(tree, b"a"), walk(tree, b"a/b")
        assert a is not None
        assert b is not None
        assert tree.lookup(b.ino, b".") == b
        assert tree.lookup(b.ino, b"..") == a
        assert tree.lookup(ROOT, b"..") == tree.get(ROOT)
        assert tree.lookup(99, b"..") is None
        assert tree.lookup(99, b".") is None


def test_names_that_are_not_there() -> None:
    with tree_of(file("a/b", 1), folder("e")) as tree:
        for parent in range(9):
            assert tree.lookup(parent, b"nope") is None
        leaf = walk(tree, b"a/b")
        assert leaf is not None
        assert tree.lookup(leaf.ino, b"b") is None
        assert tree.children(leaf, 0, 10) == []
        empty = walk(tree, b"e")
        assert empty is not None
        assert (empty.is_dir, tree.children(empty, 0, 10)) == (True, [])


def test_the_object_behind_a_file_is_in_its_own_source() -> None:
    with tree_of(file("x/y", 3, 0, "e1"), file("x/z", 4, 0, "e2", source=1), sources=SOURCES) as tree:
        y, z = walk(tree, b"x/y"), walk(tree, b"x/z")
        assert y is not None
        assert z is not None
        assert tree.object(y) == (0, ("pre/fix/x/y", "e1", 3, ""))
        assert tree.object(z) == (1, ("/data/x/z", "e2", 4, ""))


def test_a_name_that_is_not_utf8_leads_back_to_its_bytes() -> None:
    with tree_of(file(b"d/\xff\xfe", 1)) as tree:
        node = walk(tree, b"d/\xff\xfe")
        assert node is not None
        assert tree.path(node).encode("utf-8", "surrogateescape") == b"d/\xff\xfe"


def test_nodes_that_are_remembered_are_the_manifests() -> None:
    with tree_of(*(file(f"f{n:05}", n) for n in range(200))) as tree:
        first = [tree.get(ino) for ino in range(1, 202)]
        assert [tree.get(ino) for ino in range(1, 202)] == first
        assert [n.size for n in first[1:] if n is not None] == list(range(200))


def test_levels_end_where_the_next_depth_begins() -> None:
    paths = ["a/b/c/x", "a/b/y", "a/z", "d/b/q", "e", "f/g"]
    with tree_of(*map(file, paths), folder("h")) as tree:
        depths: dict[int, int] = {}
        for ino in range(2, tree.inodes + 1):
            node = tree.get(ino)
            assert node is not None
            depths[ino] = tree.path(node).count("/")
        for ino, depth in depths.items():
            same = [other for other, its in depths.items() if its == depth]
            assert tree.level_end(ino) == max(same) + 1
