"""What the bench mounts, and how a mount is waited for and taken away.

Duty: the words `Mount` and `Subject`, and the few commands that touch a mount point, none of them without
timeout(1). A subject keeps everything it writes below the state folder it is given: a fresh folder is a cold
cache, the same folder again is a warm one. Durations in seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.origin import Origin
from bench.processes import MARK, CommandError, marked, run

READY_LIMIT_S = 30.0
STOP_LIMIT_S = 10.0


@dataclass(frozen=True)
class Mount:
    """A container that can be read. `mark` finds the processes that serve it; it is empty when there are none.

    `ready_s` is the time from the start of the mount command until the tree answered. `through` are the
    reader's arguments where it reads past the file system, `declare` the command that announces an order of
    reading (the file of names follows); both are empty otherwise. `settle_s`: so long after the last read the
    mount may still write down what it has cached.
    """

    path: Path
    mark: str = ""
    ready_s: float = 0.0
    through: tuple[str, ...] = ()
    declare: tuple[str, ...] = ()
    settle_s: float = 0.0

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


def mount_point(state: Path) -> Path:
    """The folder to mount on, made."""
    path = state / "mnt"
    path.mkdir(parents=True, exist_ok=True)
    return path


def environment(origin: Origin, mark: str) -> dict[str, str]:
    """Ours, with the mark, and with trust in the origin's certificate."""
    env = dict(os.environ) | {MARK: mark}
    if origin.ca_file is not None:
        env["SSL_CERT_FILE"] = str(origin.ca_file)
    return env


def wait_ready(path: Path, process: subprocess.Popen[bytes] | None) -> None:
    """Wait until something is mounted there and lists its root."""
    deadline = time.monotonic() + READY_LIMIT_S
    while not is_mounted(path):
        if process is not None and process.poll() is not None:
            raise CommandError(f"the mount ended with exit code {process.returncode}")
        if time.monotonic() > deadline:
            raise CommandError(f"nothing was mounted after {READY_LIMIT_S:.0f} s")
        time.sleep(0.01)
    run(["ls", str(path)], limit_s=READY_LIMIT_S)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a mount that runs in the foreground."""
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_marked(mark: str) -> None:
    """Wait for what a detached mount left running, then end it: it carries our mark, so it is ours."""
    start = time.monotonic()
    while pids := marked(mark):
        waited = time.monotonic() - start
        if waited > STOP_LIMIT_S:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM if waited < 2 * STOP_LIMIT_S else signal.SIGKILL)
        time.sleep(0.05)
