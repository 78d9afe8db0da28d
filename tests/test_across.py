"""Files fetched before they are opened, through a real mount of a real Blob service behind a proxy that counts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import mount_probe as on
from tests.mounting import Home, Probe, until
from tests.servers.azurite import Azurite
from tests.servers.faults import FaultProxy

pytestmark = [pytest.mark.fuse, pytest.mark.azurite]

FILES = {f"c{n // 20}/f{n:03d}.bin": random.Random(n).randbytes(20_000 + n) for n in range(80)}
NAMES = sorted(FILES)


class Frozen:
    """The files above as dataset `small`, and the proxy in front of them."""

    def __init__(self, home: Home, proxy: FaultProxy) -> None:
        self.home = home
        self.proxy = proxy

    def asked(self) -> Counter[str]:
        """Return how often each blob was asked for."""
        return Counter(
            "/".join(r.path.partition("?")[0].split("/")[-2:]) for r in self.proxy.requests(ranged=True)
        )


@pytest.fixture
def small(azurite: Azurite, tmp_path: Path) -> Iterator[Frozen]:
    container = "across-files"
    azurite.create_container(container)
    azurite.upload_many(container, FILES.items())
    home = Home(tmp_path / "home")
    with FaultProxy(azurite.url) as proxy:
        home.register("small", home.datastore("store", proxy.url, container))
        proxy.forget()
        yield Frozen(home, proxy)
    azurite.delete_container(container)


def test_files_read_in_order_are_fetched_before_they_are_opened(
    small: Frozen, probe: Probe, tmp_path: Path
) -> None:
    with small.home.mount("small", tmp_path / "mnt") as mount:
        for name in NAMES:
            assert probe.call(on.read, mount / name) == FILES[name]
        assert mount.count("prefetched") >= len(NAMES) - 4
        assert mount.count("prefetch_wasted") == 0
        for name in NAMES:  # again, from the page cache: nothing is fetched ahead of that
            assert probe.call(on.read, mount / name) == FILES[name]
        until(lambda: mount.count("in_flight") == 0)
    assert small.asked() == Counter(NAMES)


def test_fetching_stops_where_the_reader_stops(small: Frozen, probe: Probe, tmp_path: Path) -> None:
    with small.home.mount("small", tmp_path / "mnt") as mount:
        for name in NAMES[:5]:
            assert probe.call(on.read, mount / name) == FILES[name]
        until(lambda: mount.count("in_flight") == 0)
        asked = set(small.asked())
    assert asked >= set(NAMES[:6])
    assert asked <= set(NAMES[: 5 + 2 * 5])


def test_looking_at_names_fetches_nothing(small: Frozen, probe: Probe, tmp_path: Path) -> None:
    with small.home.mount("small", tmp_path / "mnt") as mount:
        assert len(probe.call(on.walk, mount.root, content=False)) == len(NAMES) + 4
    assert small.asked() == Counter()


def test_files_read_backwards_are_fetched_one_by_one(small: Frozen, probe: Probe, tmp_path: Path) -> None:
    with small.home.mount("small", tmp_path / "mnt") as mount:
        for name in reversed(NAMES):
            assert probe.call(on.read, mount / name) == FILES[name]
        assert mount.count("prefetched") == 0
    assert small.asked() == Counter(NAMES)
