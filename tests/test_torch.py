"""A real data loader with four workers, over a real mount, with its order declared: right bytes, and in time."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounting import Home, Mount

TOP = Path(__file__).resolve().parent.parent
FILES = 800

pytestmark = [pytest.mark.fuse, pytest.mark.slow]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small files in a few classes, as data for training is."""
    folder = tmp_path_factory.mktemp("source")
    rng = random.Random(1)
    for number in range(FILES):
        path = folder / f"class{number % 7}" / f"{number:05}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rng.randbytes(rng.choice([1, 5_000, 60_000])))
    return folder


@pytest.fixture
def mount(home: Home, source: Path, tmp_path: Path) -> Iterator[Mount]:
    with home.mount(source, tmp_path / "mnt") as mount:
        yield mount


def epochs(mount: Mount, count: int, mode: str) -> list[list[tuple[int, str]]]:
    """Run the program over a mount; return number and digest of each sample, for each epoch."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.torch_epochs", mount.root, str(count), mode],
        capture_output=True, text=True, cwd=TOP, timeout=120,
        env={**mount.home.environ, "PYTHONWARNINGS": "ignore:This DataLoader will create"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [[(number, digest) for number, digest in json.loads(line)] for line in done.stdout.splitlines()]


def expected(source: Path) -> dict[int, str]:
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    return {number: hashlib.sha256(path.read_bytes()).hexdigest() for number, path in enumerate(paths)}


@pytest.mark.parametrize("mode", ["declared", "batches", "ahead"])
def test_two_epochs_have_every_byte_and_most_of_it_in_time(mount: Mount, source: Path, mode: str) -> None:
    first, second = epochs(mount, 2, mode)
    assert dict(first) == dict(second) == expected(source)
    assert len(first) == len(second) == FILES
    assert [number for number, _ in first] != [number for number, _ in second]
    # The second epoch is the page cache's.
    statistics = mount.status()["statistics"]
    assert statistics["prefetch_used"] + statistics["prefetch_late"] > 0.8 * FILES
    assert statistics["prefetch_used"] > 0.6 * FILES
    assert statistics["prefetched"] < 1.2 * FILES


def test_samples_come_in_the_same_order_with_it_and_without(mount: Mount) -> None:
    with_it, without = (epochs(mount, 3, mode) for mode in ("declared", "plain"))
    assert with_it == without


def test_a_wrong_order_gives_the_right_bytes(mount: Mount, source: Path) -> None:
    wrong = "\n".join(map(str, random.Random(2).choices(range(FILES), k=2 * FILES)))
    said = mount.home.run("prefetch", mount.path, "--order", "-", stdin=wrong).out
    assert f"{2 * FILES:,} files declared" in said
    [samples] = epochs(mount, 1, "plain")
    assert dict(samples) == expected(source)


def test_the_example_runs(mount: Mount) -> None:
    done = subprocess.run(
        [sys.executable, TOP / "examples" / "pytorch_order.py", mount.root, "--epochs", "1", "--batch", "16"],
        capture_output=True, text=True, cwd="/", timeout=120, env={**mount.home.environ, "PYTHONPATH": str(TOP)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "samples/s" in done.stdout
