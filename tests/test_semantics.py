"""One test, at least, for each numbered sentence of the README's Semantics section: test_sNN_ is about sentence NN."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import pytest

from tests import mount_probe as on
from tests.block_records import records
from tests.mounting import (
    FSTYPE,
    Home,
    Mount,
    Probe,
    compare_trees,
    mounted,
    probes,
    tmpfs,
    until,
)
from tests.servers.azurite import Azurite
from tests.servers.faults import FaultProxy, Respond, Stall, denied, throttled

pytestmark = pytest.mark.fuse

KIB, MIB = 1 << 10, 1 << 20
README = Path(__file__).resolve().parent.parent / "README.md"


def noise(size: int, seed: int = 0) -> bytes:
    """Return bytes that differ everywhere."""
    return random.Random(seed).randbytes(size)


def test_every_sentence_has_a_test() -> None:
    section = README.read_text().split("\n## Semantics\n")[1].split("\n## ")[0]
    sentences = [int(number) for number in re.findall(r"^(\d+)\. ", section, re.MULTILINE)]
    tested = {int(found[1]) for name in globals() if (found := re.match(r"test_s(\d\d)_", name))}
    assert sentences == list(range(1, len(sentences) + 1))
    assert tested == set(sentences)


# A mount that many tests look at ----------------------------------------------------------------------------


class Shared(NamedTuple):
    """A dataset in Azurite that stays as it is, mounted."""

    azurite: Azurite
    container: str
    mount: Mount
    probe: Probe
    files: dict[str, bytes]


@pytest.fixture(scope="module")
def shared(azurite: Azurite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("shared")
    container = "semantics"
    azurite.create_container(container)
    files = {
        "top.bin": noise(3 * MIB + 17, 1),
        "empty": b"",
        "deep/one/two/three.txt": b"three",
        "deep/other.txt": b"x" * 513,
        "deep/one/late.txt": b"late",
    }
    late = files.pop("deep/one/late.txt")
    azurite.upload_many(container, files.items())
    azurite.mark_directory(container, "kept/empty")
    azurite.upload(container, "slash/", b"")
    time.sleep(
        1.0 - time.time() % 1.0
    )  # the store's times are whole seconds: this one is newer than the rest
    azurite.upload(container, "deep/one/late.txt", late)
    files["deep/one/late.txt"] = late
    home = Home(folder / "home")
    ref = home.register("shared", home.datastore("store", azurite.url, container))
    with home.mount(ref, folder / "mnt") as mount, Probe() as probe:
        yield Shared(azurite, container, mount, probe, files)
    azurite.delete_container(container)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory of files, to be a dataset."""
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"content of a")
    (folder / "b.bin").write_bytes(noise(300_000))
    (folder / "sub" / "c.txt").write_bytes(b"content of c")
    return folder


# The tree ---------------------------------------------------------------------------------------------------


def test_s01_tree_is_what_was_registered(home: Home, probe: Probe, source: Path, tmp_path: Path) -> None:
    ref = home.register("data", source)
    before = on.walk(str(source), content=False)
    (source / "new.txt").write_bytes(b"new")  # after the freeze, before the mount
    with home.mount(ref, tmp_path / "mnt") as mount:
        assert sorted(probe.call(on.walk, mount.root, content=False)) == sorted(before)
        (source / "a.txt").write_bytes(b"another content")
        (source / "sub" / "c.txt").unlink()
        (source / "newer.txt").write_bytes(b"newer")
        seen = probe.call(on.walk, mount.root, content=False)
        assert sorted(seen) == sorted(before)
        assert all(seen[name] == entry for name, entry in before.items() if entry[0] == "file")
        with pytest.raises(FileNotFoundError):
            probe.call(on.status, mount / "new.txt")


def test_s02_whatever_would_change_the_tree_is_refused(shared: Shared) -> None:
    outcomes = shared.probe.call(on.change, shared.mount.root, "top.bin", "kept/empty")
    assert set(outcomes.values()) == {"EROFS"}, outcomes


def test_s03_modes_and_owner(shared: Shared, home: Home, source: Path, tmp_path: Path) -> None:
    file = shared.probe.call(on.status, shared.mount / "top.bin")
    folder = shared.probe.call(on.status, shared.mount / "deep")
    assert (file["st_mode"], folder["st_mode"]) == (0o100444, 0o040555)
    for status in (file, folder):
        assert (status["st_uid"], status["st_gid"]) == (os.getuid(), os.getgid())
    flags = ["--uid", "1234", "--gid", "4321", "--umask", "026"]
    with home.mount(source, tmp_path / "mnt", *flags) as mount:
        for path, mode in ((mount / "a.txt", 0o100440), (mount / "sub", 0o040551), (mount.root, 0o040551)):
            status = shared.probe.call(on.status, path)
            assert (status["st_mode"], status["st_uid"], status["st_gid"]) == (mode, 1234, 4321)


def test_s04_directories_are_implied_or_kept(shared: Shared) -> None:
    tree = shared.probe.call(on.walk, shared.mount.root)
    folders = {name.decode() for name, seen in tree.items() if seen[0] == "dir"}
    assert folders == {"deep", "deep/one", "deep/one/two", "kept", "kept/empty", "slash"}
    assert {name.decode() for name, seen in tree.items() if seen[0] == "file"} == set(shared.files)


def test_s04_empty_local_directories_are_kept(home: Home, probe: Probe, tmp_path: Path) -> None:
    (tmp_path / "source" / "empty" / "emptier").mkdir(parents=True)
    with home.mount(tmp_path / "source", tmp_path / "mnt") as mount:
        assert probe.call(on.names, mount / "empty") == ["emptier"]
        assert probe.call(on.names, mount / "empty/emptier") == []


def test_s05_sizes_and_times(shared: Shared) -> None:
    container = shared.azurite.container(shared.container)
    stored = {blob.name: blob for blob in container.list_blobs()}
    tree = shared.probe.call(on.walk, shared.mount.root)
    times = {}
    for name in shared.files:
        times[name] = int(stored[name].last_modified.timestamp()) * 1_000_000_000
        kind, size, mtime_ns, digest = tree[name.encode()]
        assert (kind, size, mtime_ns) == ("file", stored[name].size, times[name])
        assert digest == hashlib.sha256(shared.files[name]).hexdigest()
    newest = times["deep/one/late.txt"]
    assert newest > times["deep/one/two/three.txt"]
    assert tree[b"deep/one/two"][2] == times["deep/one/two/three.txt"]
    assert tree[b"deep/one"][2] == tree[b"deep"][2] == newest
    assert shared.probe.call(on.status, shared.mount.root)["st_mtime_ns"] == newest


def test_s05_a_directory_has_the_time_of_its_newest_file(
    home: Home, probe: Probe, source: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(("a.txt", "sub/c.txt", "b.bin")):
        os.utime(source / name, ns=(0, 10**18 + number))
    with home.mount(source, tmp_path / "mnt") as mount:  # the folders themselves are of today
        assert probe.call(on.status, mount.root)["st_mtime_ns"] == 10**18 + 2
        assert probe.call(on.status, mount / "sub")["st_mtime_ns"] == 10**18 + 1


def test_s06_links_and_blocks(shared: Shared) -> None:
    links = {"": 5, "deep": 3, "deep/one": 3, "deep/one/two": 2, "kept": 3, "kept/empty": 2}
    for name, expected in links.items():
        assert shared.probe.call(on.status, shared.mount / name)["st_nlink"] == expected, name
    for name, data in shared.files.items():
        status = shared.probe.call(on.status, shared.mount / name)
        assert (status["st_nlink"], status["st_blocks"]) == (1, -(-len(data) // 512)), name


def test_s07_statfs(shared: Shared) -> None:
    found = shared.probe.call(on.file_system, shared.mount.root)
    total = sum(map(len, shared.files.values()))
    assert found["f_blocks"] == -(-total // found["f_frsize"])
    assert found["f_files"] == len(shared.files) + 7  # with the root
    assert (found["f_bfree"], found["f_bavail"], found["f_ffree"], found["f_favail"]) == (0, 0, 0, 0)


def test_s08_extended_attributes(shared: Shared) -> None:
    found = shared.probe.call(on.attributes, shared.mount / "top.bin")
    assert found == {
        "user.amlmount.etag": shared.azurite.etag(shared.container, "top.bin"),
        "user.amlmount.url": f"{shared.azurite.container_url(shared.container)}/top.bin",
        "user.amlmount.md5": hashlib.md5(shared.files["top.bin"]).hexdigest(),
    }
    root = shared.probe.call(on.attributes, shared.mount.root)
    assert root == {
        "user.amlmount.digest": shared.mount.status()["digest"],
        "user.amlmount.files": str(len(shared.files)),
    }
    assert shared.probe.call(on.attributes, shared.mount / "deep") == {}


def test_s08_urls_hold_no_secret(
    azurite: Azurite, container: str, home: Home, probe: Probe, tmp_path: Path
) -> None:
    azurite.upload(container, "a b/ü.txt", b"data")
    sas = azurite.container_sas(container)
    uri = home.datastore("store", azurite.url, container, credential="sas", secret=sas)
    with home.mount(uri, tmp_path / "mnt") as mount:
        found = probe.call(on.attributes, mount / "a b/ü.txt")
        assert found["user.amlmount.url"] == f"{azurite.container_url(container)}/a b/ü.txt"
        signature = re.search(r"sig=([^&]+)", sas)
        assert signature is not None
        said = json.dumps([*found.values(), mount.status(), mount.log()])
        assert signature[1] not in said


def test_s08_local_urls(home: Home, probe: Probe, source: Path, tmp_path: Path) -> None:
    with home.mount(source, tmp_path / "mnt") as mount:
        status = os.stat(source / "a.txt")
        assert probe.call(on.attributes, mount / "a.txt") == {
            "user.amlmount.etag": f"{status.st_mtime_ns}-{status.st_size}",
            "user.amlmount.url": f"file://{source}/a.txt",
        }


def test_s09_file_system_type(shared: Shared) -> None:
    [line] = mounted(shared.mount.path)
    assert (line.fstype, line.source) == ("fuse.amlmount", "shared:1")
    assert {"ro", "nosuid", "nodev"} <= set(line.options.split(","))


def test_s10_mmap_and_the_page_cache(shared: Shared) -> None:
    data = shared.files["top.bin"]
    path = shared.mount / "top.bin"
    ranges = [(0, 10), (256 * KIB - 5, 256 * KIB + 5), (MIB - 1, 2 * MIB + 1), (len(data) - 3, len(data))]
    assert shared.probe.call(on.mapped, path, ranges) == [data[start:stop] for start, stop in ranges]
    assert shared.probe.call(on.read, path) == data
    reads = shared.mount.count("reads")
    assert shared.probe.call(on.read, path) == data
    assert shared.probe.call(on.mapped, path, [(0, len(data))]) == [data]
    assert shared.mount.count("reads") == reads


# Bytes ------------------------------------------------------------------------------------------------------


def test_s11_exactly_the_bytes_asked_for(shared: Shared) -> None:
    data = shared.files["top.bin"]
    size = len(data)
    for start, length in (
        (0, 1), (0, size), (0, size + 1), (1, 2 * MIB), (256 * KIB - 1, 2), (MIB - 1, MIB + 2),
        (size - 1, 1), (size - 1, 2), (size, 1), (size + 5000, 1), (4095, 4098), (7, 0),
    ):  # fmt: skip
        found = shared.probe.call(on.read, shared.mount / "top.bin", start, length)
        assert found == data[start : start + length], (start, length)
    assert shared.probe.call(on.read, shared.mount / "empty", 0, 10) == b""


def test_s11_never_the_bytes_of_another_version(
    azurite: Azurite, container: str, home: Home, probe: Probe, tmp_path: Path
) -> None:
    azurite.upload(container, "data.bin", b"a" * 12 * MIB)
    ref = home.register("data", home.datastore("store", azurite.url, container))
    with home.mount(ref, tmp_path / "mnt", cache_size=0) as mount:
        fd = probe.call(on.hold, mount / "data.bin")
        assert probe.call(on.read_held, fd, 0, 4096) == b"a" * 4096
        azurite.upload(container, "data.bin", b"b" * 12 * MIB)
        answers = {probe.call(on.held_outcome, fd, offset, 4096) for offset in range(0, 12 * MIB, 256 * KIB)}
        assert "ESTALE" in answers
        assert answers <= {"a", "ESTALE"}
        probe.call(on.let_go, fd)


def test_s12_overwritten_is_estale_gone_is_eio_denied_is_eacces(
    azurite: Azurite, container: str, faults: FaultProxy, home: Home, probe: Probe, tmp_path: Path
) -> None:
    names = ("overwritten.bin", "gone.bin", "denied.bin", "fine.bin")
    azurite.upload_many(container, [(name, noise(3 * MIB)) for name in names])
    ref = home.register("data", home.datastore("store", faults.url, container))
    azurite.upload(container, "overwritten.bin", noise(3 * MIB, 2))
    azurite.delete(container, "gone.bin")
    with home.mount(ref, tmp_path / "mnt") as mount:
        faults.push(denied(), path="denied.bin")
        expected = {"overwritten.bin": "ESTALE", "gone.bin": "EIO", "denied.bin": "EACCES"}
        remedies = {
            "overwritten.bin": "register a new version",
            "gone.bin": "restore it",
            "denied.bin": "credential",
        }
        for name, outcome in expected.items():
            for _ in range(3):
                assert probe.call(on.outcome, mount / name) == outcome
            [line] = mount.lines(name)
            assert f"errno={outcome}" in line
            assert remedies[name] in line
        assert probe.call(on.read, mount / "fine.bin") == noise(3 * MIB)
        assert mount.count("read_errors") >= 9  # the kernel may ask twice
        assert mount.count("stale_reads") >= 3


def test_s13_cached_bytes_are_served_though_the_object_changed(
    azurite: Azurite, container: str, home: Home, probe: Probe, tmp_path: Path
) -> None:
    data = noise(6 * MIB)
    azurite.upload(container, "data.bin", data)
    ref = home.register("data", home.datastore("store", azurite.url, container))
    with home.mount(ref, tmp_path / "mnt") as mount:
        assert probe.call(on.read, mount / "data.bin") == data
    azurite.upload(container, "data.bin", noise(6 * MIB, 2))
    with home.mount(ref, tmp_path / "mnt") as mount:
        assert probe.call(on.read, mount / "data.bin") == data
        assert mount.count("requests") == 0


def test_s14_throttling_is_retried_no_earlier_than_asked(
    azurite: Azurite, container: str, faults: FaultProxy, home: Home, probe: Probe, tmp_path: Path
) -> None:
    azurite.upload(container, "data.bin", b"data")
    ref = home.register("data", home.datastore("store", faults.url, container))
    faults.push(throttled(1), ranged=True, times=2)
    with home.mount(ref, tmp_path / "mnt") as mount:
        assert probe.call(on.read, mount / "data.bin") == b"data"
        retries = faults.requests(ranged=True)
        # Only the second attempt sees the header: the first client does not show it.
        assert retries[-1].started - retries[-2].started >= 1.0
        assert mount.count("throttled") >= 1


def test_s14_no_answer_within_read_timeout_is_eio(
    azurite: Azurite, container: str, faults: FaultProxy, home: Home, probe: Probe, tmp_path: Path
) -> None:
    azurite.upload(container, "data.bin", b"data")
    ref = home.register("data", home.datastore("store", faults.url, container))
    faults.push(Respond(500, code="InternalError"), ranged=True)
    with home.mount(ref, tmp_path / "mnt", read_timeout=1.5) as mount:
        began = time.monotonic()
        assert probe.call(on.outcome, mount / "data.bin") == "EIO"
        # A wait that would end after `read_timeout` is not begun, so it can be over earlier.
        assert 0.3 < time.monotonic() - began < 4
        assert faults.count(ranged=True) >= 3
        [line] = mount.lines("data.bin")
        assert "AMLMOUNT_READ_TIMEOUT" in line


def test_s15_a_failed_object_is_left_alone_for_5_seconds(
    azurite: Azurite, container: str, faults: FaultProxy, home: Home, probe: Probe, tmp_path: Path
) -> None:
    azurite.upload(container, "data.bin", b"data")
    ref = home.register("data", home.datastore("store", faults.url, container))
    faults.push(Respond(404, code="BlobNotFound"), path="data.bin", ranged=True, times=1)
    with home.mount(ref, tmp_path / "mnt") as mount:
        assert probe.call(on.outcome, mount / "data.bin") == "EIO"
        failed = time.monotonic()
        asked = faults.count(path="data.bin")
        while probe.call(on.outcome, mount / "data.bin") == "EIO":
            assert faults.count(path="data.bin") == asked
            assert time.monotonic() - failed < 8
            time.sleep(0.05)
        assert time.monotonic() - failed > 4.5
        assert probe.call(on.read, mount / "data.bin") == b"data"


# Names ------------------------------------------------------------------------------------------------------


def test_s16_paths_join_at_the_root(
    azurite: Azurite, container: str, home: Home, probe: Probe, tmp_path: Path, source: Path
) -> None:
    names = (
        "folder/x/1.txt", "folder/2.txt", "single/file.bin", "pattern/a/1.csv", "pattern/b/2.csv",
        "pattern/b/c/3.csv", "pattern/a/1.json", "deep/p/q/r.log", "deep/s.log", "elsewhere.txt",
    )  # fmt: skip
    azurite.upload_many(container, [(name, name.encode()) for name in names])
    root = home.datastore("store", azurite.url, container)
    ref = home.register(
        "joined", f"{root}/folder/", f"{root}/single/file.bin", f"{root}/pattern/*/*.csv",
        f"{root}/deep/**/*.log", source, source / "sub" / "c.txt",
    )  # fmt: skip
    expected = {
        "x/1.txt": b"folder/x/1.txt", "2.txt": b"folder/2.txt", "file.bin": b"single/file.bin",
        "a/1.csv": b"pattern/a/1.csv", "b/2.csv": b"pattern/b/2.csv", "p/q/r.log": b"deep/p/q/r.log",
        "s.log": b"deep/s.log", "a.txt": b"content of a", "b.bin": (source / "b.bin").read_bytes(),
        "sub/c.txt": b"content of c", "c.txt": b"content of c",
    }  # fmt: skip
    with home.mount(ref, tmp_path / "mnt") as mount:
        tree = probe.call(on.walk, mount.root)
    found = {name.decode(): seen[3] for name, seen in tree.items() if seen[0] == "file"}
    assert found == {name: hashlib.sha256(data).hexdigest() for name, data in expected.items()}


def test_s17_two_objects_of_one_name(home: Home, source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_bytes(b"another a")
    done = home.run("register", "both", "--path", source, "--path", other, code=14)
    assert len(done.err.splitlines()) == 1
    assert f"{source}/a.txt" in done.err
    assert f"{other}/a.txt" in done.err
    assert home.run("list").out == ""
    ref = home.register("twice", source, source / "a.txt", f"{source}/*.txt")
    shown = home.run("show", ref, "--files").out.splitlines()
    assert sorted(line.split("\t")[-1] for line in shown) == ["a.txt", "b.bin", "sub/c.txt"]


BAD_NAMES = {
    "a//b.txt": "empty segment",
    "/lead.txt": "empty segment",
    "up/../b.txt": "'..'",
    "../../etc/passwd": "'..'",
    "./b.txt": "'.'",
    "dot/./b.txt": "'.'",
    "..": "'..'",
    "nul\0name": "NUL",
    "long/" + "n" * 256: "255",
    "long/" + "é" * 128: "255",
}


def listing(names: list[str]) -> bytes:
    """Return a page of List Blobs with names that Azurite would not take."""
    blobs = "".join(
        f"<Blob><Name Encoded='true'>{name.encode().hex('%', 1).join(('%', ''))}</Name><Properties>"
        "<Last-Modified>Mon, 01 Jan 2024 00:00:00 GMT</Last-Modified><Etag>0x1</Etag>"
        "<Content-Length>4</Content-Length></Properties></Blob>"
        for name in names
    )
    return f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker /></EnumerationResults>".encode()


def test_s18_names_that_no_file_can_have(
    azurite: Azurite, container: str, faults: FaultProxy, home: Home, probe: Probe, tmp_path: Path
) -> None:
    good = ["good.txt", "long/" + "n" * 255, "..data", "a/...", "new\nline", "back\\slash", " "]
    faults.push(Respond(200, body=listing([*good, *BAD_NAMES])), method="GET", ranged=False)
    root = home.datastore("store", faults.url, container)
    done = home.run("register", "odd", "--path", root)
    reported = done.err.splitlines()
    for name, reason in BAD_NAMES.items():
        printable = name.replace("\0", "\\x00")
        assert any(repr(printable)[1:-1] in line and reason in line for line in reported), (name, reported)
    with home.mount("odd", tmp_path / "mnt") as mount:
        tree = probe.call(on.walk, mount.root, content=False)
    assert sorted(name.decode() for name, seen in tree.items() if seen[0] == "file") == sorted(good)
    assert not home.run("register", "strict", "--path", root, "--strict", code=14).out
    assert "strict" not in home.run("list").out


def test_s19_a_blob_that_is_also_a_folder(
    azurite: Azurite, container: str, home: Home, probe: Probe, tmp_path: Path
) -> None:
    azurite.upload_many(container, [("both", b"blob"), ("both/inside.txt", b"inside"), ("other", b"other")])
    root = home.datastore("store", azurite.url, container)
    done = home.run("register", "data", "--path", root)
    [line] = [line for line in done.err.splitlines() if "left out" in line]
    assert "'both' is also a folder" in line
    with home.mount("data", tmp_path / "mnt") as mount:
        tree = probe.call(on.walk, mount.root, content=False)
    kinds = {name.decode(): seen[0] for name, seen in tree.items()}
    assert kinds == {"both": "dir", "both/inside.txt": "file", "other": "file"}


def test_s20_marks_of_folders(shared: Shared) -> None:
    names = {blob.name for blob in shared.azurite.container(shared.container).list_blobs()}
    assert {"kept/empty", "slash/"} <= names
    for name in ("kept/empty", "slash"):
        assert shared.probe.call(on.names, shared.mount / name) == []
        assert shared.probe.call(on.status, shared.mount / name)["st_mode"] == 0o040555


# The cache --------------------------------------------------------------------------------------------------


def test_s21_blocks_are_kept_and_shared(
    azurite: Azurite, container: str, faults: FaultProxy, home: Home, probe: Probe, tmp_path: Path
) -> None:
    data = {f"{number}.bin": noise(2 * MIB, number) for number in range(3)}
    azurite.upload_many(container, data.items())
    ref = home.register("data", home.datastore("store", faults.url, container))
    other = home.register("other", "azureml://datastores/store/paths/*.bin")
    with home.mount(ref, tmp_path / "one") as one:
        for name, content in data.items():
            assert probe.call(on.read, one / name) == content
        asked = faults.count(ranged=True)
        assert asked > 0
        until(lambda: one.count("cache_writes") == asked, what="all blocks written")
        with home.mount(other, tmp_path / "two") as two:  # of the same objects, at the same time
            for name, content in data.items():
                assert probe.call(on.read, two / name) == content
    with home.mount(ref, tmp_path / "one") as one:
        for name, content in data.items():
            assert probe.call(on.read, one / name) == content  # a restart
        assert one.count("bytes_from_disk") >= 6 * MIB
    assert faults.count(ranged=True) == asked


def test_s22_damaged_blocks_are_dropped(
    azurite: Azurite, container: str, home: Home, probe: Probe, tmp_path: Path
) -> None:
    # Small blocks lie in packs, and blocks of 1 MiB in files of their own.
    data = {f"{number}.bin": noise(MIB if number < 4 else 40_000, number) for number in range(8)}
    azurite.upload_many(container, data.items())
    ref = home.register("data", home.datastore("store", azurite.url, container))
    with home.mount(ref, tmp_path / "mnt") as mount:
        for name, content in data.items():
            assert probe.call(on.read, mount / name) == content
        mount.counted("cache_writes", 8)
    found = list(records(home.cache))
    large = [record for record in found if record.length == MIB]
    small = [record for record in found if record.length == 40_000]
    assert (len(found), len(large), len(small)) == (8, 4, 4)
    for record, at in zip(small + large[:2], (1, 10, 70, -1, 20, -1), strict=True):
        record.flip(at)
    os.truncate(large[2].path, large[2].stop - 1)
    os.truncate(large[3].path, large[3].stop + 1)
    with home.mount(ref, tmp_path / "mnt") as mount:
        for name, content in data.items():
            assert probe.call(on.read, mount / name) == content
        assert mount.count("cache_corrupt") == 8
        mount.counted("cache_writes", 8)
        assert len(mount.lines("was dropped")) == 1
    with home.mount(ref, tmp_path / "mnt") as mount:
        for name, content in data.items():
            assert probe.call(on.read, mount / name) == content
        assert (mount.count("cache_corrupt"), mount.count("requests")) == (0, 0)


class Watch:
    """Looks at a disk all the while: the most bytes that were in use, the fewest that were free."""

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        self._stop = threading.Event()
        self.most = 0
        self.least_free = 1 << 62
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(0.001):
            disk = os.statvfs(self._disk)
            self.least_free = min(self.least_free, disk.f_bavail * disk.f_frsize)
            self.most = max(self.most, (disk.f_blocks - disk.f_bfree) * disk.f_frsize)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def test_s23_the_cache_keeps_its_limits(
    as_root: None, azurite: Azurite, container: str, home: Home, probe: Probe, tmp_path: Path
) -> None:
    data = {f"{number}.bin": noise(2 * MIB, number) for number in range(12)}
    azurite.upload_many(container, data.items())
    ref = home.register("data", home.datastore("store", azurite.url, container))
    for limit, min_free in ((7 * MIB, 0), (64 * MIB, 9 * MIB)):
        with (
            tmpfs(tmp_path / "disk", 16 * MIB) as disk,
            Watch(disk) as watch,
            home.mount(
                ref, tmp_path / "mnt", cache_dir=disk, cache_size=limit, cache_min_free=min_free
            ) as mount,
        ):
            for name, content in data.items():
                assert probe.call(on.read, mount / name) == content
            mount.counted("cache_evicted", 1)
            assert mount.count("cache_writes") > 3
        assert 2 * MIB < watch.most <= limit + 16 * KIB  # the cache's own count takes a few pages, too
        assert watch.least_free >= min_free


def test_s24_a_cache_that_fails_costs_no_read(
    as_root: None, azurite: Azurite, container: str, home: Home, probe: Probe, tmp_path: Path
) -> None:
    data = {f"{number}.bin": noise(MIB, number) for number in range(4)}
    azurite.upload_many(container, data.items())
    ref = home.register("data", home.datastore("store", azurite.url, container))
    with tmpfs(tmp_path / "disk", 2 * MIB) as disk:
        (disk / "filler").write_bytes(bytes(2 * MIB - 64 * KIB))
        with home.mount(ref, tmp_path / "mnt", cache_dir=disk, cache_min_free=0) as mount:  # full
            assert probe.call(on.read, mount / "0.bin") == data["0.bin"]
            mount.counted("cache_dropped", 1)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with home.mount(ref, tmp_path / "mnt", cache_dir=disk, cache_min_free=0) as mount:  # read-only
            assert probe.call(on.read, mount / "1.bin") == data["1.bin"]
    with home.mount(ref, tmp_path / "mnt") as mount:
        assert probe.call(on.read, mount / "2.bin") == data["2.bin"]
        mount.counted("cache_writes", 1)
        shutil.rmtree(home.cache)  # vanished
        probe.call(on.forget_pages, mount / "2.bin")
        assert probe.call(on.read, mount / "2.bin") == data["2.bin"]
        assert probe.call(on.read, mount / "3.bin") == data["3.bin"]
        assert mount.count("read_errors") == 0


def test_s25_one_request_for_many_readers(
    azurite: Azurite, container: str, faults: FaultProxy, home: Home, tmp_path: Path
) -> None:
    data = noise(200_000)
    azurite.upload(container, "data.bin", data)
    ref = home.register("data", home.datastore("store", faults.url, container))
    faults.push(Stall(None), ranged=True)
    with home.mount(ref, tmp_path / "mnt") as mount, probes(8) as readers:
        offsets = [number * 24_000 // 4096 * 4096 for number in range(8)]
        calls = [
            reader.begin(on.random_reads, mount / "data.bin", [offset], 4096)
            for reader, offset in zip(readers, offsets, strict=True)
        ]
        mount.counted("reads", 8)
        faults.clear()
        faults.release()
        for call, offset in zip(calls, offsets, strict=True):
            assert call.result() == [hashlib.sha256(data[offset : offset + 4096]).hexdigest()]
        assert faults.count(ranged=True) == 1


# Life -------------------------------------------------------------------------------------------------------


def test_s26_mount_returns_when_the_tree_answers(
    home: Home, probe: Probe, source: Path, tmp_path: Path
) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with home.mount(source, tmp_path / "mnt", detach=True) as mount:
            compare_trees(probe, mount.root, str(source))
            assert mount.status()["pid"] == mount.pid
            mount.signal(number)  # checks the time


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_s26_signals_end_a_session_whose_store_hangs(
    number: signal.Signals, azurite: Azurite, container: str, faults: FaultProxy, home: Home, tmp_path: Path
) -> None:
    azurite.upload(container, "data.bin", noise(3 * MIB))
    ref = home.register("data", home.datastore("store", faults.url, container))
    with home.mount(ref, tmp_path / "mnt") as mount, Probe() as reader:
        faults.push(Stall(None))
        call = reader.begin(on.outcome, mount / "data.bin")
        assert faults.wait_for(1, ranged=True)
        assert mount.signal(number) == 0
        assert not mounted(mount.path)
        assert call.result(5) != "read"


def test_s27_a_dead_mount_is_replaced_and_any_other_is_not(
    home: Home, probe: Probe, source: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mnt"
    with home.mount(source, path, detach=True) as dead:
        os.kill(dead.pid, signal.SIGKILL)
        dead.wait(5)
        [line] = mounted(path)
        assert line.fstype == FSTYPE
        with pytest.raises(OSError, match="not connected"):
            probe.call(on.names, str(path))
        with home.mount(source, path, detach=True) as mount:
            assert len(mounted(path)) == 1
            compare_trees(probe, mount.root, str(source))
            done = home.run("mount", source, path, code=32)
            assert "fuse.amlmount is mounted there" in done.err
            assert probe.call(on.names, str(path)) == ["a.txt", "b.bin", "sub"]
        dead.over = True


def test_s28_the_digest_is_the_same_on_every_machine(home: Home, tmp_path: Path) -> None:
    one = tmp_path / "here"
    (one / "sub" / "empty").mkdir(parents=True)
    for number, name in enumerate(("b.txt", "a", "ä.txt", "sub/x", "sub.txt", "Z")):
        (one / name).write_bytes(b"x" * number)
        os.utime(one / name, ns=(0, 1_700_000_000_123_456_789 + number))
    os.utime(one / "sub" / "empty", ns=(0, 1_600_000_000_000_000_000))
    other = tmp_path / "somewhere" / "else"
    shutil.copytree(one, other)
    elsewhere = Home(
        tmp_path / "other home",
        environ={"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "1", "PYTHONUTF8": "0"},
    )
    digests = {
        at.run("register", name, "--path", folder).out.split()[1]
        for at, name, folder in ((home, "data", one), (elsewhere, "other", other))
    }
    assert digests == {GOLDEN}


GOLDEN = "a537f0423c3c0c34ef91d173ef9597d0b1ca1304915a60711b176d23da81fd1a"
"""Computed once: it must never change but with the manifest's format."""


# Order ------------------------------------------------------------------------------------------------------

FEW_FILES = 240


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small files."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(FEW_FILES):
        path = folder / f"class{number // 80}" / f"{number:03}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(noise(100_000, number))
    return folder


def shuffled(folder: Path, seed: int) -> list[str]:
    """Return the names of a folder's files, out of order."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.bin"))
    random.Random(seed).shuffle(names)
    return names


def read_all(probe: Probe, mount: Mount, names: list[str], source: Path) -> None:
    """Read files in this order, past the page cache, and compare every byte."""
    for name in names:
        probe.call(on.forget_pages, mount / name)
        assert probe.call(on.read, mount / name) == (source / name).read_bytes()


def declare(mount: Mount, names: list[str], file: Path, *flags: str, code: int = 0) -> str:
    """Declare an order by the command."""
    file.write_text("".join(f"{name}\n" for name in names))
    done = mount.home.run("prefetch", mount.path, "--order", file, *flags, code=code)
    return done.out + done.err


def test_s29_a_wrong_order_costs_no_wrong_byte(many: Path, home: Home, probe: Probe, tmp_path: Path) -> None:
    order = shuffled(many, 1)
    with home.mount(many, tmp_path / "mnt") as mount:
        declare(mount, order[: FEW_FILES // 2], tmp_path / "order")
        read_all(probe, mount, [*order[::3], *shuffled(many, 2), *order[:5], *order[:5]], many)
        assert mount.count("read_errors") == 0


@pytest.mark.parametrize("workers", [1, 4])
def test_s30_a_declared_order_is_fetched_ahead(many: Path, home: Home, tmp_path: Path, workers: int) -> None:
    order = shuffled(many, 3)
    with home.mount(many, tmp_path / "mnt") as mount, probes(workers) as readers:
        declare(mount, order, tmp_path / "order")
        for number, name in enumerate(order):
            assert readers[number % workers].call(on.read, mount / name) == (many / name).read_bytes()
        assert mount.count("prefetch_used") + mount.count("prefetch_late") >= FEW_FILES * 0.9
        assert mount.count("prefetched") <= FEW_FILES


def test_s31_the_trees_order_is_fetched_ahead_and_no_order_is_not(
    many: Path, home: Home, probe: Probe, tmp_path: Path
) -> None:
    with home.mount(many, tmp_path / "mnt") as mount:
        read_all(probe, mount, sorted(shuffled(many, 4)), many)
        assert mount.count("prefetch_used") + mount.count("prefetch_late") >= FEW_FILES * 0.9
    with home.mount(many, tmp_path / "mnt") as mount:
        # Far from each other: of 80 names in a folder, every 20th, and another folder each time.
        apart = [sorted(shuffled(many, 4))[number * 83 % FEW_FILES] for number in range(20)]
        read_all(probe, mount, apart, many)
        assert mount.count("prefetched") == 0


def test_s32_unknown_names_in_an_order(many: Path, home: Home, tmp_path: Path) -> None:
    names = [*shuffled(many, 5)[:3], "class0/none.bin", "nowhere/1.bin"]
    with home.mount(many, tmp_path / "mnt") as mount:
        assert "class0/none.bin" in declare(mount, names, tmp_path / "order", code=2)
        assert mount.count("prefetched") == 0
        assert "3 files declared" in declare(mount, names, tmp_path / "order", "--skip-unknown")
        mount.counted("prefetched", 3)


def test_s33_a_pass_that_repeats_the_last_is_fetched_ahead(
    many: Path, home: Home, probe: Probe, tmp_path: Path
) -> None:
    order = shuffled(many, 6)
    with home.mount(many, tmp_path / "mnt", order="learned", memory_budget="16MiB", cache_size=0) as mount:
        read_all(probe, mount, order, many)
        before = mount.count("prefetched")
        read_all(probe, mount, order, many)
        assert mount.count("prefetched") - before >= FEW_FILES * 0.8
        assert mount.count("read_errors") == 0


def test_s34_opening_and_listing_again_ask_nothing(
    many: Path, home: Home, probe: Probe, tmp_path: Path
) -> None:
    with home.mount(many, tmp_path / "mnt") as mount:
        first = probe.call(on.names, mount / "class0")
        assert probe.call(on.names, mount / "class0") == first
        read_all(probe, mount, [f"class0/{name}" for name in first], many)
        asked = mount.count("asked")
        for name in first:
            assert probe.call(on.read, mount / f"class0/{name}") == (many / "class0" / name).read_bytes()
        assert probe.call(on.names, mount / "class0") == first
        assert mount.count("asked") == asked
