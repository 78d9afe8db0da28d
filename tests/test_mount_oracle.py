"""A mount against its source, byte for byte: random trees with odd names and edge sizes, many readers at once."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests import mount_probe as on
from tests.mounting import Home, Mount, Probe, compare_trees, probes
from tests.servers.azurite import Azurite

pytestmark = pytest.mark.fuse

KIB, MIB = 1 << 10, 1 << 20

EDGES = [edge + by for edge in (256 * KIB, MIB, 4 * MIB, 8 * MIB) for by in (-1, 0, 1)]
SIZES = [0, 1, 2, 511, 512, 513, 4095, 4096, 4097, 65536, 131_072, 131_073]

ODD_NAMES = [
    "with space", " leading", "trailing ", "tab\tinside", "new\nline", "ünïcödé", "日本語", "🙂", "e\u0301", "\u00e9",
    "n" * 255, "é" * 127, ".hidden", "..double", "...", "-rf", "*", "a?b", "[x]", "{a,b}", "%41", "%2F", "a+b",
    "q=1&r#frag", "back\\slash", "'quote'", '"double"', "$HOME", "`cmd`", "semi;colon", "~", "CON", "a:b", "\x7f",
    "\u202eright to left", "\ufeffbom", "A", "a",
]  # fmt: skip


def grow(folder: Path, seed: int, names: list[str], sizes: list[int], files: int) -> None:
    """Fill a folder with a random tree."""
    chosen = random.Random(seed)
    folders = [folder]
    names = [*names]
    chosen.shuffle(names)
    for number in range(files):
        name = names[number] if number < len(names) else f"file-{number}"
        parent = chosen.choice(folders)
        if chosen.random() < 0.25:
            (parent / name).mkdir(parents=True)
            folders.append(parent / name)
            parent = parent / name
            name = "in"
        size = sizes[number % len(sizes)]
        (parent / name).parent.mkdir(parents=True, exist_ok=True)
        (parent / name).write_bytes(chosen.randbytes(size))
        os.utime(parent / name, ns=(0, chosen.randrange(10**18, 17 * 10**17)))
    for number in range(3):
        (chosen.choice(folders) / f"empty {number}" / "deeper").mkdir(parents=True)


def torture(mount: Mount, source: Path, *, readers: int, reads: int) -> None:
    """Have several processes read the largest files at random, all at once, and compare each read."""
    files = sorted((f for f in source.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)[-4:]
    with probes(readers, timeout_s=60) as pool:
        for file in files:
            inside = mount / str(file.relative_to(source))
            calls = [
                probe.begin(on.compare, inside, str(file), seed, reads) for seed, probe in enumerate(pool)
            ]
            assert [call.result() for call in calls] == [[]] * readers, file


@pytest.mark.parametrize("seed", range(6))
def test_local_tree(seed: int, home: Home, probe: Probe, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    grow(source, seed, ODD_NAMES, SIZES, 120)
    (source / os.fsdecode(b"not \xff utf-8 \xc3")).write_bytes(b"bytes")
    with home.mount(source, tmp_path / "mount point ü") as mount:
        compare_trees(probe, mount.root, str(source))


def test_local_reads(home: Home, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for size in EDGES[-4:]:
        (source / f"{size}.bin").write_bytes(random.Random(size).randbytes(size))
    with home.mount(source, tmp_path / "mnt") as mount:
        torture(mount, source, readers=4, reads=25)
        assert mount.count("read_errors") == 0


def test_deep_and_wide_tree(home: Home, probe: Probe, tmp_path: Path) -> None:
    source = tmp_path / "source"
    wide = source / "wide"
    wide.mkdir(parents=True)
    for number in range(3000):
        (wide / f"{number:05}").write_bytes(b"%d" % number)
    deep = source.joinpath(*(f"level-{number}" for number in range(60)))
    deep.mkdir(parents=True)
    (deep / "bottom").write_bytes(b"reached")
    with home.mount(source, tmp_path / "mnt") as mount:
        compare_trees(probe, mount.root, str(source))


def test_no_files_at_all(home: Home, probe: Probe, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with home.mount(tmp_path / "source", tmp_path / "mnt") as mount:
        assert probe.call(on.walk, mount.root) == {}


@pytest.mark.azurite
def test_blob_tree_and_reads(
    azurite: Azurite, container: str, home: Home, probe: Probe, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    # Names that Azurite itself would change or that its listing cannot carry stay out.
    names = [
        name
        for name in ODD_NAMES
        if name not in ("back\\slash", "...", "..double", "new\nline", "tab\tinside")
    ]
    names = [name for name in names if len(name) < 100 and "\x7f" not in name]
    grow(source, 7, names, [*EDGES, *SIZES], 64)
    azurite.upload_tree(container, source)
    ref = home.register("data", home.datastore("store", azurite.url, container))
    expected = {name: (seen[1], seen[3]) for name, seen in on.walk(str(source)).items() if seen[0] == "file"}
    for budget in ("auto", "16MiB"):  # the second time from the cache disk, and short of memory
        with home.mount(ref, tmp_path / "mnt", memory_budget=budget) as mount:
            torture(mount, source, readers=4, reads=12)
            tree = probe.call(on.walk, mount.root)
            found = {name: (seen[1], seen[3]) for name, seen in tree.items() if seen[0] == "file"}
            assert found == expected
            assert mount.count("read_errors") == 0
