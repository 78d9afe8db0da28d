"""A desk over a real manifest and the fake store, for tests of what a mount answers without a kernel."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from amlmount.cache import BlockCache
from amlmount.desk import Desk, Owner, Waiting
from amlmount.manifest import ROOT, Manifest
from amlmount.metrics import Counters
from amlmount.tree import Tree
from tests.fake_store import FakeStore
from tests.fetch_rig import Rig, rig
from tests.manifests import build, file

OWNER = Owner(7, 8, 0o022)


class DeskRig:
    """A desk, and what is behind it."""

    def __init__(self, r: Rig, tree: Tree, *, owner: Owner, null_reads: bool) -> None:
        self.rig = r
        self.tree = tree
        self.desk = Desk(
            tree, [r.retrying], r.fetcher, r.counters, structlog.get_logger(), owner=owner, null_reads=null_reads
        )  # fmt: skip

    @property
    def fake(self) -> FakeStore:
        return self.rig.fake

    @property
    def counters(self) -> Counters:
        return self.rig.counters

    def ino(self, path: str) -> int:
        ino = ROOT
        for name in path.encode().split(b"/"):
            node = self.tree.lookup(ino, name)
            assert node is not None
            ino = node.ino
        return ino

    async def read(self, path: str, offset: int = 0, size: int = 1 << 20) -> bytes:
        """Read as the relay does."""
        found = self.desk.read(self.ino(path), offset, size)
        self.desk.go_on()
        assert found is not None
        return b"".join(await self.desk.wait(found) if isinstance(found, Waiting) else found)

    def paths_read(self) -> list[str]:
        """Return what was asked of the store, in order."""
        return [read.path for read in self.fake.reads]


@asynccontextmanager
async def desk_rig(
    files: Mapping[str, bytes],
    *,
    owner: Owner = OWNER,
    null_reads: bool = False,
    connections: int = 2,
    budget: int = 100 << 20,
    patience_s: float = 10,
    cache: BlockCache | None = None,
) -> AsyncIterator[DeskRig]:
    with tempfile.TemporaryDirectory() as top:
        async with rig(connections=connections, budget=budget, patience_s=patience_s, cache=cache) as r:
            pinned = {path: r.fake.put(path, data) for path, data in files.items()}
            build(
                Path(top) / "m",
                [file(p, obj.size, 10**9 + n, obj.tag) for n, (p, obj) in enumerate(pinned.items())],
            )
            with Manifest(Path(top) / "m") as manifest:
                yield DeskRig(r, Tree(manifest), owner=owner, null_reads=null_reads)
