"""Fetches files before they are opened: what `order` expects, through the fetcher, as far as memory goes.

Small files are fetched whole; of a larger one its first block, from where its own window goes on. No tasks: the work is
done in the call that notes a file, a few files at a time.
"""

from __future__ import annotations

from collections.abc import Callable

from amlmount.blocks import block_at
from amlmount.fetch import Fetcher, PinnedFile
from amlmount.manifest import Node
from amlmount.order import FileOrder
from amlmount.tree import Tree

AT_ONCE = 16
"""Files asked for in one call at the most: about 1 ms of the event loop."""


class AcrossFiles:
    """Read-ahead from file to file, for one mount."""

    def __init__(self, tree: Tree, fetcher: Fetcher, pinned: Callable[[Node], PinnedFile]) -> None:
        self._tree = tree
        self._fetcher = fetcher
        self._pinned = pinned
        self._order = FileOrder()

    def reached(self, ino: int) -> None:
        """Take note that a file is read now and fetch what comes next."""
        stream = self._order.observe(ino)
        wanted = stream.wanted()[:AT_ONCE]
        wanted = range(wanted.start, min(wanted.stop, self._tree.level_end(stream.position)))
        if not wanted:
            return
        for node in self._tree.run(wanted.start, len(wanted)):
            if not node.is_dir and node.size:
                file = self._pinned(node)
                if not self._fetcher.ahead(file, block_at(0, node.size)):
                    stream.ahead = node.ino
                    return
        stream.ahead = wanted.stop
