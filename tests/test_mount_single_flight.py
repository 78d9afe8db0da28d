"""How often storage is asked: once for each block, whoever reads it; counted by the proxy in front of Azurite."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import mount_probe as on
from tests.mounting import Home, Probe, probes, until
from tests.servers.azurite import Azurite
from tests.servers.faults import FaultProxy, Pass

pytestmark = [pytest.mark.fuse, pytest.mark.azurite]

KIB, MIB = 1 << 10, 1 << 20
SMALL = random.Random(1).randbytes(200_000)
LARGE = random.Random(2).randbytes(40 * MIB + 123)


class Origin:
    """A frozen dataset behind a proxy that counts."""

    def __init__(self, home: Home, faults: FaultProxy) -> None:
        self.home = home
        self.faults = faults

    def ranges(self, name: str) -> list[tuple[int, int]]:
        """Return the byte ranges that were asked of a blob, half-open, in order of their beginnings."""
        found = []
        for request in self.faults.requests(path=f"/{re.escape(name)}$", ranged=True):
            matched = re.fullmatch(r"bytes=(\d+)-(\d+)", request.range or "")
            assert matched is not None, request.range
            found.append((int(matched[1]), int(matched[2]) + 1))
        return sorted(found)


@pytest.fixture(scope="module")
def frozen(azurite: Azurite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    container = "single-flight"
    azurite.create_container(container)
    azurite.upload_many(container, [("large.bin", LARGE), *((f"{n}.bin", SMALL) for n in range(20))])
    home = Home(tmp_path_factory.mktemp("origin") / "home")
    with FaultProxy(azurite.url) as proxy:
        home.register("data", home.datastore("store", proxy.url, container))
        yield Origin(home, proxy)
    azurite.delete_container(container)


@pytest.fixture
def origin(frozen: Origin, tmp_path: Path) -> Iterator[Origin]:
    """The dataset, with no cache and no count yet."""
    shutil.copytree(frozen.home.folder, tmp_path / "home")
    frozen.faults.forget()
    yield Origin(Home(tmp_path / "home"), frozen.faults)
    frozen.faults.clear()


def covers_once(ranges: list[tuple[int, int]], size: int) -> bool:
    """Whether ranges lie side by side from 0 to `size`, each byte in one of them."""
    ends = [0, *(stop for _, stop in ranges)]
    return [start for start, _ in ranges] == ends[:-1] and ends[-1] == size


def test_many_readers_of_one_block(origin: Origin, tmp_path: Path) -> None:
    origin.faults.push(Pass(0.3), ranged=True)  # so that all of them come while it is under way
    with origin.home.mount("data", tmp_path / "mnt") as mount, probes(12) as pool:
        calls = [reader.begin(on.read, mount / "0.bin") for reader in pool]
        assert all(call.result() == SMALL for call in calls)
    assert origin.ranges("0.bin") == [(0, len(SMALL))]


def test_many_readers_of_a_large_file(origin: Origin, tmp_path: Path) -> None:
    origin.faults.push(Pass(0.02), ranged=True)
    digest = hashlib.sha256(LARGE).hexdigest()
    with origin.home.mount("data", tmp_path / "mnt") as mount, probes(6) as pool:
        calls = [reader.begin(on.sha256, mount / "large.bin") for reader in pool]
        assert [call.result() for call in calls] == [digest] * len(pool)
        assert mount.count("fetched_per_asked") <= 1.0
    assert covers_once(origin.ranges("large.bin"), len(LARGE))


def test_sequential_reading_asks_for_each_byte_once(origin: Origin, probe: Probe, tmp_path: Path) -> None:
    with origin.home.mount("data", tmp_path / "mnt") as mount:
        assert probe.call(on.sha256, mount / "large.bin") == hashlib.sha256(LARGE).hexdigest()
        assert mount.count("bytes_fetched") == len(LARGE)
        assert mount.count("prefetched") > 0
        assert origin.faults.peak(ranged=True) > 1  # the pipe is kept full
    ranges = origin.ranges("large.bin")
    assert covers_once(ranges, len(LARGE))
    assert len(ranges) < 20


def test_the_first_bytes_of_a_file_cost_one_small_request(
    origin: Origin, probe: Probe, tmp_path: Path
) -> None:
    with origin.home.mount("data", tmp_path / "mnt") as mount:
        assert probe.call(on.random_reads, mount / "large.bin", [0], 4096) == [
            hashlib.sha256(LARGE[:4096]).hexdigest()
        ]
        until(lambda: mount.count("in_flight") == 0)
    asked = sum(stop - start for start, stop in origin.ranges("large.bin"))
    assert origin.ranges("large.bin")[0][0] == 0
    assert asked <= 4 * MIB


def test_a_second_read_comes_from_the_page_cache(origin: Origin, tmp_path: Path) -> None:
    with origin.home.mount("data", tmp_path / "mnt") as mount, probes(2) as (one, two):
        assert one.call(on.read, mount / "large.bin") == LARGE
        asked, reads = origin.faults.count(ranged=True), mount.count("reads")
        assert two.call(on.read, mount / "large.bin") == LARGE  # another open, another process
        assert (origin.faults.count(ranged=True), mount.count("reads")) == (asked, reads)


def test_a_second_mount_comes_from_the_cache_disk(origin: Origin, probe: Probe, tmp_path: Path) -> None:
    names = [f"{number}.bin" for number in range(20)]
    with origin.home.mount("data", tmp_path / "mnt") as mount:
        assert all(probe.call(on.read, mount / name) == SMALL for name in names)
        assert probe.call(on.read, mount / "large.bin") == LARGE
        until(
            lambda: mount.count("cache_writes") + mount.count("cache_dropped") >= mount.count("cache_misses")
        )
        assert mount.count("cache_dropped") == 0
    origin.faults.forget()
    with origin.home.mount("data", tmp_path / "mnt") as mount:
        assert all(probe.call(on.read, mount / name) == SMALL for name in names)
        assert probe.call(on.read, mount / "large.bin") == LARGE
        assert mount.count("bytes_from_disk") == len(LARGE) + 20 * len(SMALL)
        assert mount.count("cache_corrupt") == 0
    assert origin.faults.count(ranged=True) == 0


def test_small_random_reads_ask_for_exactly_their_bytes(origin: Origin, tmp_path: Path) -> None:
    chosen = random.Random(9)
    pages = chosen.sample(range(256, len(LARGE) // 4096 - 1, 7), 80)
    shares = [[4096 * page for page in pages[reader::8]] for reader in range(8)]
    with origin.home.mount("data", tmp_path / "mnt") as mount, probes(8) as pool:
        calls = [
            reader.begin(on.random_reads, mount / "large.bin", share, 4096)
            for reader, share in zip(pool, shares, strict=True)
        ]
        for call, share in zip(calls, shares, strict=True):
            assert call.result() == [hashlib.sha256(LARGE[at : at + 4096]).hexdigest() for at in share]
        assert mount.count("fetched_per_asked") == 1.0
    assert origin.ranges("large.bin") == sorted((4096 * page, 4096 * page + 4096) for page in pages)


def test_medium_random_reads_waste_little(origin: Origin, tmp_path: Path) -> None:
    chosen = random.Random(4)
    offsets = [chosen.randrange(1, len(LARGE) - MIB) // 4096 * 4096 for _ in range(12)]
    with origin.home.mount("data", tmp_path / "mnt") as mount, probes(4) as pool:
        calls = [
            reader.begin(on.random_reads, mount / "large.bin", offsets[n::4], MIB)
            for n, reader in enumerate(pool)
        ]
        for number, call in enumerate(calls):
            expected = [hashlib.sha256(LARGE[at : at + MIB]).hexdigest() for at in offsets[number::4]]
            assert call.result() == expected
        until(lambda: mount.count("in_flight") == 0)
        assert mount.count("fetched_per_asked") <= 2.0


def test_a_walk_asks_for_nothing(origin: Origin, probe: Probe, tmp_path: Path) -> None:
    with origin.home.mount("data", tmp_path / "mnt") as mount:
        assert len(probe.call(on.walk, mount.root, content=False)) == 21
        assert probe.call(on.attributes, mount / "0.bin")["user.amlmount.etag"]
    assert origin.faults.count(ranged=True) == 0
