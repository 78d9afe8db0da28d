"""What the kernel asks of a real mount, and how often: opens, lists and names are its own affair once it has them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from amlmount.relay import BACKGROUND
from tests import mount_probe as on
from tests.mounting import Home, Mount, Probe, compare_trees, mounted, probes, until
from tests.servers.azurite import Azurite
from tests.servers.faults import FaultProxy, Stall

pytestmark = pytest.mark.fuse

KIB, MIB = 1 << 10, 1 << 20
FILES = {f"d{n % 7}/{n:03d}.bin": random.Random(n).randbytes(3000 + n) for n in range(210)}
LARGE = random.Random(1).randbytes(24 * MIB)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "large.bin").write_bytes(LARGE)
    return folder


@pytest.fixture
def mount(home: Home, source: Path, tmp_path: Path) -> Iterator[Mount]:
    with home.mount(source, tmp_path / "mnt") as mount:
        yield mount


def test_opening_and_closing_costs_no_request(mount: Mount, probe: Probe) -> None:
    for name, data in FILES.items():
        assert probe.call(on.read, mount / name) == data
    asked = mount.count("asked")
    for name in FILES:
        fd = probe.call(on.hold, mount / name)
        probe.call(on.let_go, fd)
    assert mount.count("asked") == asked  # the names are known, too
    for name, data in FILES.items():
        assert probe.call(on.read, mount / name) == data
    assert mount.count("asked") == asked


def test_a_file_read_for_the_first_time_costs_two_requests(mount: Mount, probe: Probe) -> None:
    probe.call(on.names, mount.root)
    probe.call(on.status, mount / "d0/000.bin")  # the kernel's first questions: OPEN, OPENDIR, ACCESS, ...
    probe.call(on.read, mount / "d0/000.bin")
    probe.call(on.status, mount / "d1")
    names = [name for name in FILES if name.startswith("d1/")]
    asked = mount.count("asked")
    for name in names:
        assert probe.call(on.read, mount / name) == FILES[name]
    assert mount.count("asked") - asked <= 2 * len(names)  # LOOKUP and READ


def test_a_directory_listed_twice_is_asked_for_once(mount: Mount, probe: Probe) -> None:
    first = probe.call(on.names, mount / "d3")
    assert first == sorted(name[3:] for name in FILES if name.startswith("d3/"))
    asked = mount.count("asked")
    for _ in range(5):
        assert probe.call(on.names, mount / "d3") == first
    # Names that a listing brought are known, and those that are not there as well, once they were asked for.
    for name in first:
        assert probe.call(on.status, mount / f"d3/{name}")["st_size"] == len(FILES[f"d3/{name}"])
    assert mount.count("asked") == asked
    for _ in range(5):
        with pytest.raises(FileNotFoundError):
            probe.call(on.status, mount / "d3/none")
    assert mount.count("asked") <= asked + 1


def test_two_processes_walk_and_compare_at_once(mount: Mount, source: Path) -> None:
    with probes(2) as (one, two):
        walks = [each.begin(on.walk, mount.root) for each in (one, two)]
        assert walks[0].result() == walks[1].result()
        compare_trees(one, mount.root, str(source))


def test_read_ahead_stays_as_it_was_set(as_root: None, mount: Mount) -> None:
    """The answer to the kernel's first message sets it as well: that must come before."""
    [line] = mounted(mount.path)
    assert mount.lines("kernel read-ahead raised")
    assert Path(f"/sys/class/bdi/{line.device}/read_ahead_kb").read_text().strip() == "1024"


def test_a_random_read_of_1_mib_is_one_request(mount: Mount, probe: Probe) -> None:
    probe.call(on.random_reads, mount / "large.bin", [0], 4096)
    reads = mount.count("reads")
    probe.call(on.random_reads, mount / "large.bin", [n * 2 * MIB for n in range(1, 11)], MIB)
    assert mount.count("reads") - reads == 10


@pytest.fixture
def connections(as_root: None, tmp_path: Path) -> Iterator[Path]:
    """What the kernel shows of each FUSE connection; containers have that not mounted."""
    folder = tmp_path / "connections"
    folder.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "amlmount-test", folder], check=True, timeout=10)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True, timeout=10)


def test_the_kernel_may_have_more_requests_under_way_than_its_default(
    mount: Mount, connections: Path
) -> None:
    [line] = mounted(mount.path)
    connection = connections / line.device.partition(":")[2]
    assert (connection / "max_background").read_text().strip() == str(BACKGROUND)
    assert (connection / "congestion_threshold").read_text().strip() == str(BACKGROUND * 3 // 4)


def test_attributes_that_are_not_ours(mount: Mount, probe: Probe) -> None:
    listed = subprocess.run(
        ["ls", "-l", f"{mount.path}/d0"], capture_output=True, text=True, timeout=20, check=False
    )
    assert listed.returncode == 0
    assert len(listed.stdout.splitlines()) == 31
    assert "user.amlmount.etag" in probe.call(on.attributes, mount / "d0/000.bin")
    assert mount.count("read_errors") == 0
    assert mount.lines("[error") == []


def test_a_mount_made_writable_by_root_takes_no_change(
    as_root: None, mount: Mount, probe: Probe, source: Path
) -> None:
    subprocess.run(["mount", "-i", "-o", "remount,rw", mount.root], check=True, timeout=10)
    outcomes = probe.call(on.change, mount.root, "d0/000.bin", "d1")
    # The kernel opens files by itself: what is refused is to write into them.
    opens = {name for name in outcomes if name.startswith("open to") and name != "open to truncate"}
    assert {outcomes[name] for name in set(outcomes) - opens} == {"EROFS"}, outcomes
    with pytest.raises(OSError, match="Read-only file system"):
        probe.call(on.overwrite, mount / "d0/000.bin", b"other")
    probe.call(on.forget_pages, mount / "d0/000.bin")
    assert probe.call(on.read, mount / "d0/000.bin") == FILES["d0/000.bin"]


@pytest.mark.azurite
def test_a_reader_killed_while_it_waits_harms_nobody(
    azurite: Azurite, container: str, faults: FaultProxy, home: Home, probe: Probe, tmp_path: Path
) -> None:
    azurite.upload_many(container, [("stalled.bin", LARGE[:MIB]), ("fine.bin", LARGE[:MIB])])
    ref = home.register("data", home.datastore("store", faults.url, container))
    stall = faults.push(Stall(None), path="stalled.bin", ranged=True)
    with home.mount(ref, tmp_path / "mnt") as mount:
        with probes(4) as pool:
            for reader in pool:
                reader.begin(on.read, mount / "stalled.bin")
            assert faults.wait_for(1, ranged=True)
            mount.counted("reads", 1)
            for reader in pool:
                os.kill(reader.pid, signal.SIGKILL)
            assert probe.call(on.read, mount / "fine.bin") == LARGE[:MIB]
            faults.remove(stall)
            faults.release()
        assert probe.call(on.read, mount / "stalled.bin") == LARGE[:MIB]
        until(lambda: mount.count("in_flight") == 0)
        assert mount.count("read_errors") == 0
        assert mount.lines("[error") == []
