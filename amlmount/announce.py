"""Tells the session at a mount point which files are read next, in what order: names in, inodes over its socket.

Used by the command and by Python programs. Nothing here touches the mount itself.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

from amlmount import channel
from amlmount.channel import SessionRecord
from amlmount.epoch import pack
from amlmount.errors import ManifestError, MountFailed, NotMounted, ReportedError
from amlmount.manifest import Manifest

_TIMEOUT_S = 20.0
"""Seconds for a session to take an order in; one of a million files takes it 0.3 s."""


def session_at(run: Path, path: str) -> SessionRecord:
    """Return the record of the session that serves a mount point; raise NotMounted where none does."""
    record = channel.read_record(run, path)
    if record is None or not channel.is_alive(record):
        raise NotMounted(f"amlmount has nothing mounted at {path}")
    return record


def open_manifest(record: SessionRecord) -> Manifest:
    """Open the list of files that a session serves; raise ManifestError where it is no longer there."""
    manifest = Manifest(Path(record.manifest))
    if manifest.info.digest != record.digest:
        manifest.close()
        raise ManifestError(f"{record.manifest} is no longer what is mounted at {record.path}")
    return manifest


def declare(
    run: Path, record: SessionRecord, inodes: array[int], *, reader: str = "", keep: int | None = None
) -> int:
    """Declare the order of a reader's next epoch; return how many of its epochs are not read to their end.

    With `keep`, all but the last so many that it declared before are dropped first. Raises NotMounted, MountFailed
    where the session does not answer, and what it answers.
    """
    question: dict[str, Any] = {"ask": "prefetch", "reader": reader}
    if keep is not None:
        question["keep"] = keep
    return int(_tell(run, record, question, pack(inodes))["queued"])


def learn(run: Path, record: SessionRecord) -> None:
    """Have the session record the order of the reads, and go by it in the next pass."""
    _tell(run, record, {"ask": "prefetch", "order": "learned"}, b"")


def _tell(run: Path, record: SessionRecord, question: dict[str, Any], body: bytes) -> dict[str, Any]:
    answer = channel.ask(run, record.path, question, body, timeout_s=_TIMEOUT_S)
    if answer is None:
        session_at(run, record.path)
        raise MountFailed(
            f"the session at {record.path}, process {record.pid}, does not answer", hint="amlmount status"
        )
    if "error" in answer:
        raise ReportedError(
            str(answer["error"]), hint=str(answer.get("hint", "")), exit_code=int(answer.get("exit_code", 1))
        )
    return answer
