"""Builder, manifest and digest: against a model made of plain dictionaries, golden bytes, and damage."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amlmount import manifest as manifest_module
from amlmount.builder import NAME_MAX, ManifestBuilder, reject_reason
from amlmount.dataset import ManifestEntry, Source
from amlmount.errors import FreezeError, ManifestError
from amlmount.manifest import ROOT, Manifest, Node, digest_of, set_name
from tests.manifests import HERE, build, file, folder

OTHER = Source(kind="local", url="file:///", base="/data/", uri="/data")


def documented_digest(entries: Iterable[ManifestEntry]) -> str:
    """Compute the digest from the words of the manifest module's docstring, sharing no code with it."""
    text = b"amlmount-manifest-1\n"
    for entry in sorted(entries, key=lambda e: e.path):
        fields = [
            entry.path,
            b"d" if entry.is_dir else b"f",
            str(entry.size).encode(),
            str(entry.mtime_ns).encode(),
            entry.tag.encode(),
            entry.md5.encode(),
        ]
        text += b"".join(field + b"\0" for field in fields)
    return hashlib.sha256(text).hexdigest()


# The digest ----------------------------------------------------------------------------------------------------

GOLDEN = [
    file("b.txt", 5, 1_700_000_000_123_456_789, "0x8DC", md5="5d41402abc4b2a76b9719d911017c592"),
    file("a/x.bin", 1 << 33, 0, "1700000000000000000-5"),
    folder("a/empty", 7),
    file("ü", 0, -1, ""),
]


def test_the_digest_is_the_documented_one(tmp_path: Path) -> None:
    info = build(tmp_path / "m", GOLDEN)
    assert info.digest == documented_digest(GOLDEN)
    assert info.digest == "827e4a7c54738483e8498133c72e86df5a3cdbd5f5df774291fb8b0ec9dc30f4", (
        "the digest of the same content changed: every registered dataset would get another identity."
        " Bump manifest.FORMAT (and the digest's first line) if that is meant"
    )
    assert manifest_module.FORMAT == 1


@pytest.mark.parametrize(
    "changed",
    [
        file("c.txt", 5, 9, "t"),
        file("b.txt", 6, 9, "t"),
        file("b.txt", 5, 8, "t"),
        file("b.txt", 5, 9, "u"),
        file("b.txt", 5, 9, "t", md5="00" * 16),
        file("b.txt", 5, 9, "t", is_dir=True),
    ],
)
def test_the_digest_changes_with_each_field(tmp_path: Path, changed: ManifestEntry) -> None:
    before = build(tmp_path / "1", [file("b.txt", 5, 9, "t")])
    assert build(tmp_path / "2", [changed]).digest != before.digest


def test_where_the_files_come_from_is_not_in_the_digest(tmp_path: Path) -> None:
    one = build(tmp_path / "1", GOLDEN)
    other = build(tmp_path / "2", [e._replace(source=1) for e in GOLDEN], [HERE, OTHER])
    assert one.digest == other.digest


# The model -----------------------------------------------------------------------------------------------------

segments = st.one_of(
    st.sampled_from(["a", "b", "a-b", "a.b", "A", "é", "日", "a b", "-", "+", "\n", ".a", "..."]),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=4),
).filter(lambda s: s not in (".", ".."))
paths = st.lists(segments, min_size=1, max_size=4).map("/".join)
sizes = st.one_of(st.integers(0, 10), st.integers(0, 1 << 50))
times = st.one_of(st.integers(0, 3), st.integers(0, 1 << 62))
entries = st.one_of(
    st.builds(file, paths, sizes, times, st.sampled_from(["t", "0x8DC", ""])),
    st.builds(folder, paths, times),
)
distinct = st.lists(entries, unique_by=lambda e: e.path, max_size=30)


def _folders(path: bytes) -> list[bytes]:
    parts = path.split(b"/")
    return [b"/".join(parts[:n]) for n in range(len(parts))]


class Model:
    """What the manifest of these entries must say, made the slow and obvious way."""

    def __init__(self, given_entries: Iterable[ManifestEntry]) -> None:
        listed = list(given_entries)
        implied = {f for e in listed for f in _folders(e.path)}
        self.shadowed = sorted(e.path for e in listed if not e.is_dir and e.path in implied)
        self.entries = {e.path: e for e in listed if e.path not in implied}
        self.folders = implied | {b""} | {p for p, e in self.entries.items() if e.is_dir}
        self.files = {p: e for p, e in self.entries.items() if not e.is_dir}

    def children(self, path: bytes) -> list[bytes]:
        lead = path + b"/" if path else b""
        below = {p[len(lead) :] for p in self.folders | set(self.files) if p.startswith(lead) and p != path}
        return sorted({p.partition(b"/")[0] for p in below})

    def newest(self, path: bytes) -> int:
        """Return the newest time below a folder: of files and empty folders, or its own where it is empty."""
        lead = path + b"/" if path else b""
        below = (e.mtime_ns for p, e in self.entries.items() if p.startswith(lead) or p == path)
        return max(below, default=0)


def _check_node(manifest: Manifest, model: Model, node: Node, path: bytes) -> None:
    assert manifest.path_of(node) == path
    assert manifest.get(node.ino) == node
    if not node.is_dir:
        entry = model.files[path]
        assert (node.size, node.mtime_ns, node.tag, node.md5) == entry[1:5]
        assert (node.children, node.subdirs) == (0, 0)
        return
    assert path in model.folders
    assert node.mtime_ns == model.newest(path)
    children = manifest.children(node)
    assert [c.name for c in children] == model.children(path)
    assert [c.ino for c in children] == list(range(node.first, node.first + node.children))
    assert node.subdirs == sum(c.is_dir for c in children)
    for child in children:
        assert child.parent == node.ino < child.ino
        assert manifest.lookup(node.ino, child.name) == child
        _check_node(manifest, model, child, path + b"/" + child.name if path else child.name)


@settings(max_examples=100, deadline=None)
@given(distinct, st.integers(1, 7), st.randoms())
def test_a_manifest_says_what_its_entries_say(
    listed: list[ManifestEntry], batch: int, shuffled: object
) -> None:
    model = Model(listed)
    with tempfile.TemporaryDirectory() as top:
        path = Path(top) / "m"
        info = build(path, listed, batch=batch)
        shuffled.shuffle(listed)  # type: ignore[attr-defined]
        assert build(Path(top) / "again", listed).digest == info.digest
        assert sorted(p.name for p in Path(top).iterdir()) == ["again", "m"]
        with Manifest(path) as manifest:
            manifest.check()
            assert manifest.info == info
            assert (info.files, info.directories) == (len(model.files), len(model.folders))
            assert info.bytes == sum(e.size for e in model.files.values())
            assert list(manifest.entries()) == [model.entries[p] for p in sorted(model.entries)]
            assert info.digest == documented_digest(model.entries.values())
            assert [p for p, _ in manifest.rejected()] == model.shadowed
            assert info.rejected == len(model.shadowed)
            root = manifest.get(ROOT)
            assert root is not None
            assert (root.is_dir, root.name, root.parent) == (True, b"", ROOT)
            _check_node(manifest, model, root, b"")
            assert manifest.get(0) is None
            assert manifest.get(info.files + info.directories + 1) is None


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40), st.booleans())
def test_no_name_breaks_the_tree(raw: bytes, is_dir: bool) -> None:
    entry = ManifestEntry(raw, 1 - is_dir, 5, "t" * (not is_dir), "", 0, is_dir)
    reason = reject_reason(raw)
    with tempfile.TemporaryDirectory() as top:
        info = build(Path(top) / "m", [entry, file("ok/file", 3)])
        with Manifest(Path(top) / "m") as manifest:
            manifest.check()
            rejected = dict(manifest.rejected())
            left = {e.path for e in manifest.entries()}
    assert b"ok/file" in left
    assert (raw in rejected) == (reason is not None) or raw == b"ok"
    assert info.rejected == len(rejected)
    for path in left:
        for name in path.split(b"/"):
            assert name not in (b"", b".", b"..")
            assert b"\0" not in name
            assert len(name) <= NAME_MAX


# Names that a tree cannot hold ---------------------------------------------------------------------------------

HOSTILE = {
    b"": "empty segment",
    b"/": "empty segment",
    b"/a": "empty segment",
    b"a/": "empty segment",
    b"a//b": "empty segment",
    b".": "'.' or '..'",
    b"a/./b": "'.' or '..'",
    b"..": "'.' or '..'",
    b"../../etc/passwd": "'.' or '..'",
    b"a/..": "'.' or '..'",
    b"a\0b": "NUL",
    b"a/" + b"x" * 256: "over 255 bytes",
    ("é" * 128).encode(): "over 255 bytes",
}


@pytest.mark.parametrize("path", sorted(HOSTILE))
def test_a_name_that_cannot_be_is_reported_with_the_reason(path: bytes) -> None:
    assert HOSTILE[path] in (reject_reason(path) or "")


@pytest.mark.parametrize(
    "path", [b"x" * 255, b"...", b"a/..b", b".a", b"\n", b"\xff", b"a\\b", b"a b./c", b"%2e%2e"]
)
def test_an_odd_name_that_can_be_is_kept(path: bytes) -> None:
    assert reject_reason(path) is None


def test_hostile_names_leave_every_other_file_alone(tmp_path: Path) -> None:
    good = [file(f"d{n}/f{n}", n, n, str(n)) for n in range(50)]
    info = build(tmp_path / "m", [*(file(p, 1) for p in HOSTILE), *good])
    assert info.digest == documented_digest(good)
    assert (info.files, info.rejected) == (50, len(HOSTILE))
    with Manifest(tmp_path / "m") as manifest:
        assert {p for p, _ in manifest.rejected()} == set(HOSTILE)
        assert manifest.rejected(3) == manifest.rejected()[:3]


def test_254_levels(tmp_path: Path) -> None:
    deep = "/".join(["d"] * 254)
    info = build(tmp_path / "m", [file(deep + "/f", 1)])
    assert (info.files, info.directories) == (1, 255)
    with Manifest(tmp_path / "m") as manifest:
        assert [e.path for e in manifest.entries()] == [(deep + "/f").encode()]
        manifest.check()


# A name that is two things -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_file_that_is_also_a_folder_is_reported_and_the_folder_stays(
    tmp_path: Path, order: list[int], batch: int
) -> None:
    listed = [file("a", 5, 1, "t", md5="00" * 16), folder("a", 2), file("b", 1, 3, "u")]
    info = build(tmp_path / "m", [listed[n] for n in order], batch=batch)
    # The same content has the same digest in whatever order a store lists it.
    assert info.digest == documented_digest([folder("a", 2), file("b", 1, 3, "u")])
    with Manifest(tmp_path / "m") as manifest:
        assert manifest.rejected() == [(b"a", "is also a folder")]
        node = manifest.lookup(ROOT, b"a")
        assert node is not None
        assert (node.is_dir, node.size, node.mtime_ns, node.tag, node.md5) == (True, 0, 2, "", "")


def test_a_file_that_other_paths_go_through_is_reported(tmp_path: Path) -> None:
    info = build(tmp_path / "m", [file("a", 5), file("a/b", 1), file("a-b", 1)])
    assert (info.files, info.directories, info.rejected) == (2, 2, 1)
    with Manifest(tmp_path / "m") as manifest:
        assert manifest.rejected() == [(b"a", "is also a folder")]


@pytest.mark.parametrize("batch", [1, 5000])
def test_two_objects_at_one_path_are_an_error_that_names_both(tmp_path: Path, batch: int) -> None:
    with pytest.raises(FreezeError) as caught:
        build(tmp_path / "m", [file("a/b", 5), file("x", 1), file("a/b", 5, source=1)], [HERE, OTHER], batch)
    assert "https://account.blob.core.windows.net/data/a/b" in str(caught.value)
    assert "file:///data/a/b" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_one_object_reached_twice_is_one_file(tmp_path: Path) -> None:
    again = Source(kind="blob", url=HERE.url, base="", uri="another way there")
    info = build(tmp_path / "m", [file("a", 5), file("a", 5, source=1)], [HERE, again], batch=1)
    assert (info.files, info.bytes, info.rejected) == (1, 5, 0)


def test_a_folder_that_two_sources_keep_is_one(tmp_path: Path) -> None:
    info = build(tmp_path / "m", [folder("a", 5), folder("a", 5, source=1)], [HERE, OTHER])
    assert (info.directories, info.rejected) == (2, 0)


def test_a_folders_time_comes_from_what_is_in_the_digest(tmp_path: Path) -> None:
    # A local store lists folders with times of their own, and the file "g" is left out: neither may show.
    listed = [folder("a", 900), file("a/f", 1, 10), folder("e", 20), file("g", 1, 800), file("g/h", 1, 30)]
    build(tmp_path / "m", listed)
    with Manifest(tmp_path / "m") as manifest:
        nodes = {manifest.path_of(n): n.mtime_ns for n in (manifest.get(i) for i in range(1, 8)) if n}
    assert nodes == {b"": 30, b"a": 10, b"a/f": 10, b"e": 20, b"g": 30, b"g/h": 30}


# Unfinished, damaged, hostile ----------------------------------------------------------------------------------


def test_nothing_is_left_of_an_unfinished_manifest(tmp_path: Path) -> None:
    with ManifestBuilder(tmp_path / "m", [HERE]) as builder:
        builder.add([file("a")])
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


def test_an_empty_dataset_is_a_root(tmp_path: Path) -> None:
    info = build(tmp_path / "m", [])
    assert (info.files, info.directories, info.bytes) == (0, 1, 0)
    assert info.digest == hashlib.sha256(b"amlmount-manifest-1\n").hexdigest() == digest_of([])[0]
    with Manifest(tmp_path / "m") as manifest:
        manifest.check()
        assert list(manifest.entries()) == []


def test_a_name_can_be_written_into_a_copy(tmp_path: Path) -> None:
    build(tmp_path / "m", GOLDEN)
    with Manifest(tmp_path / "m") as manifest:
        assert manifest.name == ""
    shutil.copy(tmp_path / "m", tmp_path / "copy")
    set_name(tmp_path / "copy", "weather")
    with Manifest(tmp_path / "copy") as manifest:
        manifest.check()
        assert manifest.name == "weather"


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\0" + b"\0" * 4096])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ManifestError):
        Manifest(tmp_path / "m")
    with pytest.raises(ManifestError):
        Manifest(tmp_path / "missing")
    with pytest.raises(ManifestError):
        Manifest(tmp_path)


def test_another_database_and_another_format_are_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other")) as db, db:
        db.execute("CREATE TABLE node (x)")
    with pytest.raises(ManifestError, match="no amlmount manifest"):
        Manifest(tmp_path / "other")
    build(tmp_path / "m", GOLDEN)
    alter(tmp_path / "m", "UPDATE meta SET value = 99 WHERE key = 'format'")
    with pytest.raises(ManifestError, match="format 99"):
        Manifest(tmp_path / "m")


def alter(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        for statement in statements:
            db.execute(statement)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE node SET size = size + 1 WHERE name = x'78'",
        "UPDATE node SET tag = 'other' WHERE name = x'78'",
        "UPDATE node SET name = x'79' WHERE name = x'78'",
        "DELETE FROM node WHERE name = x'78'",
        "UPDATE node SET source = 7 WHERE name = x'78'",
        "UPDATE node SET first = first + 1 WHERE ino = 1",
        "UPDATE node SET count = count - 1 WHERE ino = 1",
        "UPDATE meta SET value = value || '0' WHERE key = 'digest'",
        "UPDATE meta SET value = value + 1 WHERE key = 'files'",
        "UPDATE meta SET value = value + 1 WHERE key = 'bytes'",
        "UPDATE meta SET value = value + 1 WHERE key = 'directories'",
    ],
)
def test_check_finds_what_was_altered(tmp_path: Path, damage: str) -> None:
    build(tmp_path / "m", [file("d/x", 5, 6), file("e", 1), file("f", 1)])
    alter(tmp_path / "m", damage)
    with Manifest(tmp_path / "m") as manifest, pytest.raises(ManifestError, match="damaged"):
        manifest.check()


def forge(path: Path, *statements: str) -> None:
    """Alter a manifest and give it the digest of what it holds now, as whoever means harm would."""
    alter(path, *statements)
    with Manifest(path) as manifest:
        digest, files, size = digest_of(manifest.entries())
    with closing(sqlite3.connect(path)) as db, db:
        for key, value in (("digest", digest), ("files", files), ("bytes", size)):
            db.execute("UPDATE meta SET value = ? WHERE key = ?", (value, key))


@pytest.mark.parametrize("name", [b"..", b".", b"", b"../../etc", b"a/b", b"a\0b", b"x" * 256])
def test_check_refuses_a_forged_manifest_whose_names_leave_the_tree(tmp_path: Path, name: bytes) -> None:
    build(tmp_path / "m", [file("d/x", 5, 6), file("e", 1)])
    forge(tmp_path / "m", f"UPDATE node SET name = x'{name.hex()}' WHERE name = x'78'")
    with Manifest(tmp_path / "m") as manifest, pytest.raises(ManifestError, match="damaged"):
        manifest.check()


@pytest.mark.parametrize("size", [-1, "'big'", "NULL"])
def test_check_refuses_a_forged_manifest_whose_sizes_are_none(tmp_path: Path, size: int | str) -> None:
    build(tmp_path / "m", [file("d/x", 5, 6), file("e", 1)])
    if size == -1:
        forge(tmp_path / "m", "UPDATE node SET size = -1 WHERE name = x'78'")
    elif size == "NULL":
        with pytest.raises(sqlite3.IntegrityError):
            alter(tmp_path / "m", "UPDATE node SET size = NULL")
        return
    else:
        alter(tmp_path / "m", f"UPDATE node SET size = {size} WHERE name = x'78'")
    with Manifest(tmp_path / "m") as manifest, pytest.raises(ManifestError, match="damaged"):
        manifest.check()


def test_check_refuses_a_manifest_that_goes_in_circles(tmp_path: Path) -> None:
    build(tmp_path / "m", [file("d/x", 5, 6)])
    # The directory becomes its own child: walking it would never end.
    alter(
        tmp_path / "m",
        "UPDATE node SET parent = 2 WHERE ino = 2",
        "UPDATE node SET first = 2, count = 1, subdirs = 1 WHERE ino = 2",
        "DELETE FROM node WHERE ino = 3",
    )
    with Manifest(tmp_path / "m") as manifest, pytest.raises(ManifestError, match="damaged"):
        manifest.check()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_bit_flipped_anywhere_is_found_or_harmless(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as top:
        path = Path(top) / "m"
        listed = [file(f"d{n % 3}/f{n}", n, n, f"tag{n}") for n in range(30)]
        build(path, listed)
        raw = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(raw)
        try:
            with Manifest(path) as manifest:
                manifest.check()
                assert list(manifest.entries()) == sorted(listed, key=lambda e: e.path)
        except ManifestError:
            return


def test_a_truncated_file_is_found(tmp_path: Path) -> None:
    build(tmp_path / "m", [file(f"f{n}", n) for n in range(2000)])
    raw = (tmp_path / "m").read_bytes()
    for part in (1, 2, 3):
        (tmp_path / "m").write_bytes(raw[: len(raw) * part // 4])
        with pytest.raises(ManifestError), Manifest(tmp_path / "m") as manifest:
            manifest.check()


def test_paths_with_odd_characters_open(tmp_path: Path) -> None:
    odd = tmp_path / "a?b#c%41 d"
    odd.mkdir()
    build(odd / "m?x", [file("a", 1)])
    with Manifest(odd / "m?x") as manifest:
        assert manifest.info.files == 1
