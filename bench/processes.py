"""Running and accounting for processes on Linux, without a library.

Duty: run a command to its end and know what it cost; find the processes of one mount by a mark in their
environment (a mount may detach, so being a child says nothing); sum CPU and memory. CPU in seconds, sizes in
bytes. Source of the formats: proc(5), getrusage(2).
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "BENCH_MOUNT_MARK"
END_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM")  # util-linux; then exec, so the process id is the same
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class CommandError(RuntimeError):
    """A command failed or did not end in time; the message holds the end of what it said."""


@dataclass(frozen=True)
class Finished:
    """A command that ended well."""

    stdout: str
    seconds: float
    cpu_s: float
    peak_rss: int


def run(command: Sequence[str], *, env: Mapping[str, str] | None = None, limit_s: float = 60.0) -> Finished:
    """Run a command to its end, under timeout(1) lest a dead mount hold us; CommandError unless it exits 0.

    CPU and the resident peak are those of the process and of every descendant it waited for.
    """
    # A child begins with its parent's peak of resident memory (exec keeps it): set ours back to what we hold now.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    process = subprocess.Popen(
        [*END_WITH_PARENT, "timeout", "-k", "5", f"{limit_s:.0f}", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(env) if env is not None else None,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    with process.stdout as stream:
        stdout = stream.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        what = "did not end in time" if process.returncode == 124 else f"exit code {process.returncode}"
        raise CommandError(f"{' '.join(command[:6])}: {what}: {stdout.strip()[-600:]}")
    return Finished(
        stdout, time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    )


def marked(mark: str) -> list[int]:
    """The processes whose environment carries this mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def with_children(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        try:
            found.extend(
                int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            )
        except OSError:
            continue
    return found


def cpu_s(pids: Iterable[int]) -> float:
    """CPU spent by these processes until now, user and system, all threads."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_S


def peak_rss(pids: Iterable[int]) -> int:
    """The sum of these processes' resident peaks (an upper bound of the peak of their sum)."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return total


def drop_page_cache(*roots: Path) -> None:
    """Write all out and forget it: the files below `roots` always, the whole machine's where we may."""
    os.sync()
    for root in roots:
        for path in [root] if root.is_file() else root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)
    if os.access(_DROP_CACHES, os.W_OK):
        _DROP_CACHES.write_text("3\n")
