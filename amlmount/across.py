"""Fetches files before they are read: what an order expects, through their readers, as far as memory goes.

Three orders, asked in this turn: one that somebody declared, one that was learned from an earlier pass (if asked for),
and that of the tree. Small files are fetched whole; of a larger one its first block, from where its own window goes on.
No tasks: the work is done in the call that notes a file, a few files at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from amlmount.declared import DeclaredOrder
from amlmount.epoch import Epoch
from amlmount.learned import LearnedOrder
from amlmount.manifest import Node
from amlmount.order import FileOrder
from amlmount.reader import FileReader
from amlmount.tree import Tree

AT_ONCE = 16
"""Files asked for in one call at the most: about 1 ms of the event loop."""

EVERY = 4
"""Files begun between two looks at a declared order: a look has a fixed cost, and several files go together."""

LEARNED = "learned"
"""The reader whose declared order is the one learned."""


class AcrossFiles:
    """Read-ahead from file to file, for one mount."""

    def __init__(self, tree: Tree, reader: Callable[[int, Node], FileReader]) -> None:
        self._tree = tree
        self._reader = reader
        self._order = FileOrder()
        self._declared = DeclaredOrder()
        self._learned: LearnedOrder | None = None
        self._since = 0
        self._tree_ahead = 0

    @property
    def window_files(self) -> int:
        """Files fetched ahead of the readers of declared orders, else of the last reader in the tree's order."""
        return self._declared.ahead or self._tree_ahead

    def learn(self) -> int:
        """Record the order of the reads from now on, and use it for the next pass; return the files recorded."""
        if self._learned is None:
            self._learned = LearnedOrder(self._tree.inodes)
        return self._learned.files

    def declare(self, epoch: Epoch, *, reader: str = "", keep: int | None = None) -> int:
        """Take in the order of a reader's next epoch; return how many of its epochs wait to be read.

        Raises UsageError where there is no room for it.
        """
        queued = self._declared.declare(epoch, reader=reader, keep=keep)
        self._follow_declared()
        return queued

    def reached(self, ino: int) -> None:
        """Take note that a file is read now and fetch what comes next."""
        if self._learned is not None:
            self._learn(self._learned, ino)
        if self._declared.reached(ino):
            self._since += 1
            if self._since >= EVERY:
                self._follow_declared()
            return
        self._give_up()
        stream = self._order.observe(ino)
        wanted = stream.wanted()[:AT_ONCE]
        wanted = range(wanted.start, min(wanted.stop, self._tree.level_end(stream.position)))
        if wanted:
            fetched = self._fetch(self._tree.run(wanted.start, len(wanted)))
            stream.ahead = wanted.start + fetched
        self._tree_ahead = max(0, stream.ahead - stream.position - 1)

    def _learn(self, learned: LearnedOrder, ino: int) -> None:
        passed = learned.observe(ino)
        if passed is not None:
            epoch, begun = passed
            self._declared.declare(epoch, reader=LEARNED, keep=0)
            for earlier in begun:
                self._declared.reached(earlier)

    def _give_up(self) -> None:
        for ino in self._declared.given_up():
            node = self._tree.get(ino)
            if node is not None and not node.is_dir:
                self._reader(ino, node).give_up()

    def _follow_declared(self) -> None:
        self._since = 0
        self._give_up()
        wanted = self._declared.wanted(AT_ONCE)
        if wanted:
            found = self._tree.nodes(wanted)
            self._declared.fetched(self._fetch(found[ino] for ino in wanted))

    def _fetch(self, nodes: Iterable[Node]) -> int:
        """Fetch the beginnings of files ahead of need; return how many, which is fewer where memory is short."""
        done = 0
        for node in nodes:
            if not node.is_dir and not self._reader(node.ino, node).ahead():
                break
            done += 1
        return done
