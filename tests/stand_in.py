"""A session without a mount: its record and its socket, a manifest, and an ear for what is declared to it."""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import trio

from amlmount import channel
from amlmount.dataset import ManifestEntry
from amlmount.epoch import unpack
from amlmount.manifest import Manifest
from tests.manifests import build


class StandIn:
    """What was asked of it, in order, and what it says."""

    def __init__(self, home: Path, path: str, entries: Sequence[ManifestEntry]) -> None:
        self.run = home / "run"
        self.run.mkdir(parents=True, mode=0o700, exist_ok=True)
        self.path = path
        self.manifest = home / f"manifest-{os.urandom(4).hex()}"
        self.digest = build(self.manifest, entries).digest
        self.questions: list[dict[str, Any]] = []
        self.orders: list[array[int]] = []
        self.answer: dict[str, Any] = {"queued": 1}

    def hear(self, question: dict[str, Any], body: bytes) -> dict[str, Any]:
        self.questions.append(question)
        self.orders.append(unpack(body))
        return self.answer

    def paths(self, number: int = -1) -> list[str]:
        """Return the files of one declared order."""
        with Manifest(self.manifest) as manifest:
            nodes = [manifest.get(ino) for ino in self.orders[number]]
            return [os.fsdecode(manifest.path_of(node)) for node in nodes if node is not None]

    def publish(self) -> None:
        """Write its record, as of this process."""
        started_at = psutil.Process().create_time()
        record = channel.SessionRecord(
            ref="data:1", path=self.path, digest=self.digest, pid=os.getpid(), started_at=started_at,
            manifest=str(self.manifest),
        )  # fmt: skip
        channel.write_record(self.run, record)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Answer until the end of the block."""
        ready = threading.Event()
        scope = trio.CancelScope()
        token: list[trio.lowlevel.TrioToken] = []

        async def main() -> None:
            token.append(trio.lowlevel.current_trio_token())
            with scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(channel.serve, self.run, self.path, self.hear)
                    self.publish()
                    ready.set()

        thread = threading.Thread(target=trio.run, args=(main,))
        thread.start()
        try:
            assert ready.wait(10)
            yield
        finally:
            token[0].run_sync_soon(scope.cancel)
            thread.join()
            channel.remove_record(self.run, self.path)
