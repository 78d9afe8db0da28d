"""Resident memory: under the budget and 200 MB, whoever reads however much at once."""

from __future__ import annotations

import hashlib
import random
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests import mount_probe as on
from tests.mounting import Home, Mount, Probe, probes
from tests.servers.azurite import Azurite

pytestmark = [pytest.mark.fuse, pytest.mark.azurite]

MIB = 1 << 20
BUDGET = 64 * MIB
ALLOWED = BUDGET + 200 * 1000 * 1000
FILES, SIZE, READERS = 8, 48 * MIB, 64
STEP = 512 * 1024


class Resident:
    """Looks at a session's memory all the while, and at what it counts as used."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.most = 0
        self.looks = 0

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            self.most = max(self.most, self._mount.resident())
            self.looks += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def digest_of(data: bytes) -> str:
    """Return what `mount_probe.sweep` returns for these bytes."""
    steps = (hashlib.sha256(data[start : start + STEP]).digest() for start in range(0, len(data), STEP))
    return hashlib.sha256(b"".join(steps)).hexdigest()


@pytest.mark.slow
def test_many_readers_of_files_far_larger_than_the_budget(
    azurite: Azurite, container: str, home: Home, tmp_path: Path
) -> None:
    digests = []
    for number in range(FILES):
        data = random.Random(number).randbytes(SIZE)
        azurite.upload(container, f"{number}.bin", data)
        digests.append(digest_of(data))
    ref = home.register("data", home.datastore("store", azurite.url, container))
    with (
        home.mount(ref, tmp_path / "mnt", memory_budget=BUDGET) as mount,
        Resident(mount) as resident,
        probes(READERS, timeout_s=100) as pool,
    ):
        before = mount.resident()
        calls = [
            # Readers of one file begin at eight different places in it.
            reader.begin(on.sweep, mount / f"{number % FILES}.bin", number // FILES * (SIZE // 8), STEP)
            for number, reader in enumerate(pool)
        ]
        for number, call in enumerate(calls):
            assert call.result() == (SIZE, digests[number % FILES]), number
        assert mount.count("read_errors") == 0
        assert mount.count("memory_bytes") <= mount.count("memory_budget_bytes") <= BUDGET
    assert resident.looks > 20
    assert before < resident.most < ALLOWED, f"{resident.most / 1e6:.0f} MB"


def test_many_open_files_cost_little(home: Home, probe: Probe, tmp_path: Path) -> None:
    """What a name or an open file costs, by the thousand."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3000):
        (source / f"{number}").write_bytes(b"x" * 100)
    with home.mount(source, tmp_path / "mnt", memory_budget="16MiB") as mount:
        before = mount.resident()
        fds = [probe.call(on.hold, mount / f"{number}") for number in range(900)]
        assert mount.count("reads") == 0  # nothing is fetched for an open file that nobody reads
        assert mount.count("prefetched") == 0
        for fd in fds:
            assert probe.call(on.read_held, fd, 0, 200) == b"x" * 100
        for fd in fds:
            probe.call(on.let_go, fd)
        for _ in range(2):
            assert len(probe.call(on.walk, mount.root)) == 3000
        assert mount.resident() - before < 30 * MIB
