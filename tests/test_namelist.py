"""Names of files: by path, however it is written, and by number, against the manifest's own list."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amlmount import namelist
from amlmount.dataset import ManifestEntry
from amlmount.errors import UsageError
from amlmount.manifest import Manifest
from amlmount.namelist import UNKNOWN, resolve, split
from tests.manifests import build, file, folder


@contextmanager
def manifest_of(*entries: ManifestEntry) -> Iterator[Manifest]:
    with tempfile.TemporaryDirectory() as top:
        build(Path(top) / "m", entries)
        with Manifest(Path(top) / "m") as manifest:
            yield manifest


def paths_of(manifest: Manifest) -> list[bytes]:
    return [entry.path for entry in manifest.entries() if not entry.is_dir]


def back(manifest: Manifest, inodes: list[int]) -> list[bytes]:
    nodes = map(manifest.get, inodes)
    return [manifest.path_of(node) for node in nodes if node is not None]


segments = st.sampled_from([b"a", b"b", b"a-", b"x.y", b"7", b"\xff", b"\xe6\x97\xa5", b"new\nline"])
trees = st.sets(st.lists(segments, min_size=1, max_size=4).map(b"/".join), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(trees, st.sets(st.lists(segments, min_size=1, max_size=3).map(b"/".join), max_size=3))
def test_files_are_listed_in_the_order_of_their_paths(listed: set[bytes], empty: set[bytes]) -> None:
    with manifest_of(*map(file, listed), *map(folder, empty - listed)) as manifest:
        assert back(manifest, namelist.files(manifest).tolist()) == paths_of(manifest)


@settings(max_examples=100, deadline=None)
@given(trees, st.lists(st.integers(0, 1 << 30), min_size=1, max_size=60), st.data())
def test_every_way_to_write_a_path_leads_to_its_file(
    listed: set[bytes], picks: list[int], data: st.DataObject
) -> None:
    with manifest_of(*map(file, listed)) as manifest:
        there = paths_of(manifest)
        asked = [there[pick % len(there)] for pick in picks]
        ways = [b"%b", b"./%b", b"././%b", b"x/../%b", b"/mnt/data/%b", b"/mnt//data/./%b", b"/link/%b"]
        written = [data.draw(st.sampled_from(ways)) % path for path in asked]
        found = resolve([*written, b"./nowhere"], manifest, ["/mnt/data", "/link/"])
        assert back(manifest, found.inodes.tolist()) == asked
        assert found.inodes[-1] == UNKNOWN
        assert (found.unknown, found.first_unknown) == (1, "./nowhere")


def test_a_folder_that_many_names_lead_to_is_read_whole_with_the_same_result() -> None:
    names = [b"d/%03d" % number for number in range(300)]
    with manifest_of(*map(file, names), file("d/sub/x")) as manifest:
        one_by_one = [resolve([name], manifest, []).inodes[0] for name in [*names, b"d/sub", b"d/nope"]]
        assert resolve([*names, b"d/sub", b"d/nope"], manifest, []).inodes.tolist() == one_by_one
        assert one_by_one[-2:] == [UNKNOWN, UNKNOWN]
        assert UNKNOWN not in one_by_one[:-2]


@pytest.mark.parametrize(
    "name",
    [
        "", "/", ".", "..", "d", "d/", "./d", "d/a/", "d/a/b", "D/a", "../d/a", "d/../../d/a", "/d/a", "/mnt/dat/d/a",
        "/mnt/database/d/a", "//mnt/dat/d/a", "/mnt/data", "a" * 300, "a/" * 3000, "e", "e/a",
    ],
)  # fmt: skip
def test_what_is_no_file(name: str) -> None:
    with manifest_of(file("d/a"), folder("e")) as manifest:
        found = resolve([b"d/a", name.encode()], manifest, ["/mnt/data"])
        assert (found.inodes[0] != UNKNOWN, found.inodes[1], found.unknown) == (True, UNKNOWN, 1)


def test_numbers_count_the_files_in_the_order_they_are_shown() -> None:
    with manifest_of(file("b"), file("a/x"), file("a-"), file("7"), folder("e")) as manifest:
        assert paths_of(manifest) == [b"7", b"a-", b"a/x", b"b"]
        found = resolve([b"3", b"0", b"02", b"3"], manifest, [])
        assert back(manifest, found.inodes.tolist()) == [b"b", b"7", b"a/x", b"b"]
        outside = resolve([b"0", b"4", b"9" * 5000], manifest, [])
        assert outside.inodes.tolist()[1:] == [UNKNOWN, UNKNOWN]
        # One name that is no number makes all of them paths.
        assert back(manifest, resolve([b"7", b"./b"], manifest, []).inodes.tolist()) == [b"7", b"b"]
        assert back(manifest, resolve([b"./7"], manifest, []).inodes.tolist()) == [b"7"]


def test_names_of_no_file_are_an_error_that_names_the_first_or_are_left_out() -> None:
    with manifest_of(file("a"), file("b")) as manifest:
        found = resolve([b"b", b"x\x1by", b"a", b"z"], manifest, [])
        with pytest.raises(UsageError, match=r"'x\\\\x1by' is no file in /data, nor are 1 more"):
            found.known("/data", skip_unknown=False)
        assert back(manifest, found.known("/data", skip_unknown=True).tolist()) == [b"b", b"a"]
        one = resolve([b"b", b"x"], manifest, [])
        with pytest.raises(UsageError, match=r"'x' is no file in /data$"):
            one.known("/data", skip_unknown=False)
        every = resolve([b"b"], manifest, [])
        assert every.known("/data", skip_unknown=False) is every.inodes


def test_no_names_are_no_files() -> None:
    with manifest_of(file("a")) as manifest:
        assert resolve([], manifest, ["/"]).inodes.tolist() == []


def test_names_are_split_at_lines_or_at_nuls() -> None:
    assert split(b"a b\n\n./c\r\nd", null=False) == [b"a b", b"./c\r", b"d"]
    assert split(b"a\nb\0c\0", null=True) == [b"a\nb", b"c"]
    assert split(b"", null=False) == []
