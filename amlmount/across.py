"""Fetches files before they are read: what an order expects, through the fetcher, as far as memory goes.

Small files are fetched whole; of a larger one its first block, from where its own window goes on. No tasks: the work is
done in the call that notes a file, a few files at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from amlmount.manifest import Node
from amlmount.order import FileOrder
from amlmount.reader import FileReader
from amlmount.tree import Tree

AT_ONCE = 16
"""Files asked for in one call at the most: about 1 ms of the event loop."""


class AcrossFiles:
    """Read-ahead from file to file, for one mount."""

    def __init__(self, tree: Tree, reader: Callable[[int, Node], FileReader]) -> None:
        self._tree = tree
        self._reader = reader
        self._order = FileOrder()

    def reached(self, ino: int) -> None:
        """Take note that a file is read now and fetch what comes next."""
        stream = self._order.observe(ino)
        wanted = stream.wanted()[:AT_ONCE]
        wanted = range(wanted.start, min(wanted.stop, self._tree.level_end(stream.position)))
        if wanted:
            fetched = self._fetch(self._tree.run(wanted.start, len(wanted)))
            stream.ahead = wanted.start + fetched

    def _fetch(self, nodes: Iterable[Node]) -> int:
        """Fetch the beginnings of files ahead of need; return how many, which is fewer where memory is short."""
        done = 0
        for node in nodes:
            if not node.is_dir and not self._reader(node.ino, node).ahead():
                break
            done += 1
        return done
