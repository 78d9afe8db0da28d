"""One module for each kind of storage, a base that says what a kind must offer, and retry as a wrapper."""

from __future__ import annotations

from collections.abc import Callable

from amlmount.credentials import Access
from amlmount.stores.base import ListedPage, ObjectStore, Page, list_all
from amlmount.stores.retry import Retrying

__all__ = ["KINDS", "ListedPage", "ObjectStore", "Page", "Retrying", "list_all", "open_store"]


def _local(access: Access, stall_timeout_s: float) -> ObjectStore:
    from amlmount.stores.local import LocalStore

    del access, stall_timeout_s
    return LocalStore()


def _blob(access: Access, stall_timeout_s: float) -> ObjectStore:
    from amlmount.stores.blob import BlobStore

    return BlobStore(access, stall_timeout_s=stall_timeout_s)


KINDS: dict[str, Callable[[Access, float], ObjectStore]] = {"local": _local, "blob": _blob}
"""Kind of storage to its opener; each imports its libraries only when it is used."""


def open_store(access: Access, *, stall_timeout_s: float = 10.0) -> ObjectStore:
    """Open the store that `access` leads to; no request is made. Raises StoreError for settings that cannot work."""
    return KINDS[access.kind](access, stall_timeout_s)
