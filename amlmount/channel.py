"""The small local socket of one mount session: one question a connection, one answer.

A question is a line of JSON; where it says `"bytes": N`, so many bytes of any kind follow it. The answer is JSON.

It lies beside the session's record in the user's run folder (mode 0700), so only that user and root reach it. A record
is removed by its session; one whose process is gone is removed by whoever finds it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil

from amlmount.dataset import utf8
from amlmount.errors import UsageError
from amlmount.status import MountStatus

if TYPE_CHECKING:
    import trio  # only a session serves: whoever asks need not import it

MAX_QUESTION = 1 << 20
MAX_BODY = 256 << 20
"""Bytes that may follow a question: an order of 64 million files."""

_PIECE = 1 << 20
_PIECE_TIMEOUT_S = 10  # for each piece that is received or sent: large ones may take longer
_ANSWER_TIMEOUT_S = 60


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the run folder says of one session."""

    ref: str
    path: str
    digest: str
    pid: int
    started_at: float
    """The process's start time, in seconds since 1970, so that a reused process number is noticed."""
    manifest: str = ""
    """Absolute path of the manifest file: whoever has names to ask about resolves them there."""


def _stem(path: str) -> str:
    return sha256(utf8(path)).hexdigest()[:16]


def write_record(run: Path, record: SessionRecord) -> None:
    """Publish a session's record."""
    target = run / f"{_stem(record.path)}.json"
    temporary = target.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(msgspec.json.encode(record))
    temporary.rename(target)


def remove_record(run: Path, path: str) -> None:
    """Remove a session's record and socket, if they are this process's."""
    record = read_record(run, path)
    if record is None or record.pid == os.getpid():
        _remove(run, path)


def remove_dead_record(run: Path, path: str) -> None:
    """Remove the record and socket that a session left which did not end by itself."""
    record = read_record(run, path)
    if record is not None and not is_alive(record):
        _remove(run, path)


def _remove(run: Path, path: str) -> None:
    for suffix in (".json", ".sock"):
        with suppress(FileNotFoundError):
            (run / f"{_stem(path)}{suffix}").unlink()


def read_record(run: Path, path: str) -> SessionRecord | None:
    """Return the record of the session at a mount point, alive or not."""
    try:
        return msgspec.json.decode((run / f"{_stem(path)}.json").read_bytes(), type=SessionRecord)
    except (OSError, msgspec.MsgspecError):
        return None


def records(run: Path) -> list[SessionRecord]:
    """Return all records, by mount point."""
    found = []
    for file in run.glob("*.json"):
        with suppress(OSError, msgspec.MsgspecError):
            found.append(msgspec.json.decode(file.read_bytes(), type=SessionRecord))
    return sorted(found, key=lambda record: record.path)


def is_alive(record: SessionRecord) -> bool:
    """Whether the record's process still runs; one that ended and waits for its parent to notice does not."""
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.started_at) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextmanager
def only_one(run: Path, path: str) -> Iterator[None]:
    """Hold a lock while something is done to a mount point, against other processes of the same user."""
    with (run / f"{_stem(path)}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _address(run: Path, path: str) -> Iterator[str]:
    # A socket's address holds 107 bytes; a path through a descriptor is short wherever the folder is.
    fd = os.open(run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{_stem(path)}.sock"
    finally:
        os.close(fd)


def ask(
    run: Path, path: str, question: dict[str, Any], body: bytes = b"", timeout_s: float = 3.0
) -> dict[str, Any] | None:
    """Ask the session at a mount point; None where it does not answer, or not within `timeout_s` of the last byte.

    Raises UsageError where the body is too long for any session.
    """
    if len(body) > MAX_BODY:
        raise UsageError(f"{len(body):,} bytes are too many for one question", hint="ask in parts")
    if body:
        question = {**question, "bytes": len(body)}
    try:
        with socket.socket(socket.AF_UNIX) as client, _address(run, path) as address:
            client.settimeout(timeout_s)
            client.connect(address)
            with suppress(BrokenPipeError, ConnectionResetError):  # it may refuse before it has read all
                client.sendall(json.dumps(question).encode() + b"\n")
                for start in range(0, len(body), _PIECE):
                    client.sendall(memoryview(body)[start : start + _PIECE])
            answer = bytearray()
            while chunk := client.recv(65536):
                answer += chunk
            decoded = json.loads(answer)
            return decoded if isinstance(decoded, dict) else None
    except (OSError, ValueError):
        return None


async def serve(
    run: Path,
    path: str,
    answer: Callable[[dict[str, Any], bytes], dict[str, Any]],
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """Answer questions until cancelled. Each is answered in a thread: `answer(question, body)` may take its time."""
    import trio

    listener = trio.socket.socket(trio.socket.AF_UNIX)
    with _address(run, path) as address:
        with suppress(FileNotFoundError):
            (run / f"{_stem(path)}.sock").unlink()
        await listener.bind(address)
        (run / f"{_stem(path)}.sock").chmod(0o600)
    listener.listen(16)

    async def one(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.TooSlowError, ValueError):
            question, body = await _question(stream)
            with trio.fail_after(_ANSWER_TIMEOUT_S):
                # Not on the event loop: an answer may look at the cache disk; one that hangs must not stop the mount.
                try:
                    said = await trio.to_thread.run_sync(answer, question, body, abandon_on_cancel=True)
                except Exception as error:  # noqa: BLE001  # a bug must cost one answer, not the mount
                    said = {"error": f"unexpected {type(error).__name__}: {error}"}
            with trio.fail_after(_PIECE_TIMEOUT_S):
                await stream.send_all(json.dumps(said).encode())
        await trio.aclose_forcefully(stream)

    task_status.started()
    await trio.serve_listeners(one, [trio.SocketListener(listener)])


async def _question(stream: trio.SocketStream) -> tuple[dict[str, Any], bytes]:
    """Read a question and its body; raise ValueError for what is none, TooSlowError where it stops coming."""
    import trio

    async def piece(limit: int) -> bytes:
        with trio.fail_after(_PIECE_TIMEOUT_S):
            received = await stream.receive_some(min(limit, _PIECE))
        if not received:
            raise ValueError("it ended early")
        return received

    received = b""
    while b"\n" not in received:
        received += await piece(MAX_QUESTION - len(received))
        if len(received) == MAX_QUESTION and b"\n" not in received:
            raise ValueError("the question is too long")
    line, _, start = received.partition(b"\n")
    question = json.loads(line)
    size = question.get("bytes", 0) if isinstance(question, dict) else None
    if not isinstance(size, int) or not len(start) <= size <= MAX_BODY:
        raise ValueError("it has no question's form")
    body = bytearray(start)
    while len(body) < size:
        body += await piece(size - len(body))
    return question, bytes(body)


def status_of(run: Path, record: SessionRecord) -> MountStatus:
    """Return a session's status; its state is `dead` or `not answering` where it cannot say so itself."""
    alive = is_alive(record)
    said = ask(run, record.path, {"ask": "status"}) if alive else None
    if said is not None:
        with suppress(msgspec.ValidationError):
            return msgspec.convert(said, MountStatus)
    state = "not answering" if alive else "dead"
    return MountStatus(
        ref=record.ref, path=record.path, digest=record.digest, mode="mount", state=state, pid=record.pid,
        started_ns=int(record.started_at * 1e9), files=0, bytes=0,
    )  # fmt: skip
