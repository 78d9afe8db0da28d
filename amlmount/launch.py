"""Start a session behind a mount point and leave it running; and end one.

The session is this same program in a process of its own session (setsid), given its spec on standard input. It answers
with one JSON line on standard output, ready or failed, and closes it. Its log is a file in the log folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import psutil

from amlmount import channel, kernel
from amlmount.config import Places, private_folder
from amlmount.dataset import MountSpec, utf8
from amlmount.errors import MountBusy, MountFailed, NotMounted, ReportedError

_TERMINATE_S = 10.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A session's one line to whoever started it."""

    pid: int
    error: str = ""
    hint: str = ""
    exit_code: int = 0


def log_file(where: Places, path: str) -> Path:
    """Return the log file of the session at a mount point."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path).strip("-")[-80:]
    return where.logs / f"{name}-{sha256(utf8(path)).hexdigest()[:8]}.log"


def start(spec: MountSpec, where: Places, environ: Mapping[str, str], *, timeout_s: float) -> Report:
    """Start a detached session; return when its tree answers.

    Raises ReportedError with the session's own error, MountFailed where it stays silent; then nothing is left behind.
    """
    private_folder(where.logs)
    log_path = log_file(where, spec.path)
    deadline = time.monotonic() + timeout_s
    with log_path.open("ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "amlmount", "session"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=dict(environ),
            cwd="/",
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(spec))
        process.stdin.close()
        line = _first_line(process, deadline)
        report = msgspec.json.decode(line, type=Report)
        if not report.error:
            _wait_for_answer(spec.path, deadline)
    except (OSError, msgspec.MsgspecError, subprocess.TimeoutExpired) as error:
        _end(process, spec.path)
        said = log_path.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
        why = said[-1] if said else type(error).__name__
        raise MountFailed(
            f"{spec.path}: the session did not become ready: {why}", hint=f"see {log_path}"
        ) from None
    except BaseException:
        _end(process, spec.path)
        raise
    finally:
        process.stdout.close()
    if report.error:
        process.wait()
        # What libfuse itself has to say of a mount that failed is in the log.
        hint = f"see {log_path}" if report.exit_code == MountFailed.exit_code else report.hint
        raise ReportedError(report.error, hint=hint, exit_code=report.exit_code)
    # The session outlives this process, which is nobody's business to wait for.
    process.returncode = 0
    return report


def _first_line(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    import selectors

    assert process.stdout is not None
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise subprocess.TimeoutExpired("session", 0)
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                raise OSError("it ended")
            line += chunk
    return line


def _wait_for_answer(path: str, deadline: float) -> None:
    """Have the root answer a stat, asked by a process that can be left behind."""
    subprocess.run(
        ["stat", "--", path], check=False, capture_output=True, timeout=max(0.1, deadline - time.monotonic())
    )


def _end(process: subprocess.Popen[bytes], path: str) -> None:
    process.terminate()
    try:
        process.wait(_TERMINATE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        mounted = kernel.mounted_at(path)
        if mounted is not None and mounted.fstype == kernel.FSTYPE:
            kernel.unmount(path, lazy=True)


def stop(where: Places, path: str, *, lazy: bool, force: bool) -> dict[str, Any]:
    """Unmount what amlmount mounted at `path` and wait for its session to end.

    Raises NotMounted, MountBusy while files are open there (unless `lazy`), MountPointError.
    """
    mounted = kernel.mounted_at(path)
    record = channel.read_record(where.run, path)
    if mounted is None or mounted.fstype != kernel.FSTYPE:
        channel.remove_dead_record(where.run, path)
        other = "" if mounted is None else f" ({mounted.fstype} is)"
        raise NotMounted(f"amlmount has nothing mounted at {path}{other}")
    if force:
        kernel.abort(mounted.device)
        if record is not None and channel.is_alive(record):
            # Reads that still wait for the store hold the session up: nobody wants their answers any more.
            psutil.Process(record.pid).terminate()
    kernel.unmount(path, lazy=lazy or force)
    if record is not None and not lazy and not _has_ended(record, _TERMINATE_S):
        if not force:
            raise MountBusy(f"{path} is unmounted, but its session {record.pid} goes on", hint="--force")
        with suppress(psutil.NoSuchProcess):
            psutil.Process(record.pid).kill()
    channel.remove_dead_record(where.run, path)
    return {"path": path, "ref": record.ref if record else mounted.source}


def _has_ended(record: channel.SessionRecord, timeout_s: float) -> bool:
    """Wait for a session's process to end.

    Not by `psutil.Process.wait`: a process 1 that reaps slowly, as in many containers, would hold it up.
    """
    deadline = time.monotonic() + timeout_s
    while channel.is_alive(record):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
