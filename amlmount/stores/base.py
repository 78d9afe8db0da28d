"""What every kind of storage offers: pages of a listing, and exact byte ranges of pinned object versions.

A store is synchronous and thread-safe: it is called from a pool of threads and holds no lock while it waits. It makes
one attempt a call; `retry` makes the others. It raises nothing but `errors.StoreError` and its subclasses.

A new kind is one module beside this one, one row in `stores.KINDS`, one fixture in tests/test_stores.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from amlmount.dataset import ListedObject, ObjectId


class Page(Protocol):
    """One page of a listing; parsed when asked for, so that the next page can be on its way."""

    @property
    def next_marker(self) -> str:
        """Where the next page begins; empty at the end."""

    def objects(self) -> Sequence[ListedObject]:
        """Return the page's objects and kept directories."""

    def unlisted(self) -> Sequence[tuple[str, str]]:
        """Return names that cannot be read as files, each with the reason."""


class ListedPage(NamedTuple):
    """A page that is in memory already."""

    listed: Sequence[ListedObject]
    next_marker: str = ""
    refused: Sequence[tuple[str, str]] = ()

    def objects(self) -> Sequence[ListedObject]:
        """Return the page's objects."""
        return self.listed

    def unlisted(self) -> Sequence[tuple[str, str]]:
        """Return the refused names."""
        return self.refused


class ObjectStore(Protocol):
    """One container, share or file system."""

    @property
    def identity(self) -> str:
        """The store's name in block keys: the same on every machine and for every credential; no secret in it."""

    @property
    def cacheable(self) -> bool:
        """Whether blocks are worth a place on the cache disk."""

    def list_page(self, prefix: str, marker: str) -> Page:
        """Return the page of objects whose names begin with `prefix` that starts at `marker` ("": the first)."""

    def head(self, path: str) -> ListedObject | None:
        """Return what the store says of one object, or None where there is none."""

    def read(self, obj: ObjectId, start: int, stop: int, attempt: int = 0) -> memoryview:
        """Return exactly the bytes [start, stop) of the pinned version, `stop` at most its size.

        `attempt` counts from 0: a store may go another way at a second attempt. Raises ObjectChanged, ObjectMissing,
        AccessDenied; TransientStoreError where another attempt may help.
        """

    def close(self) -> None:
        """Release connections."""


def list_all(store: ObjectStore, prefix: str) -> Iterator[Page]:
    """Yield the pages of a listing one after the other."""
    marker = ""
    while True:
        page = store.list_page(prefix, marker)
        yield page
        marker = page.next_marker
        if not marker:
            return
