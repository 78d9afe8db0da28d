"""Another attempt where one may help: backoff with jitter, Retry-After, and an end to patience.

Source of the rules: Azure Storage answers 429, 500 and 503 when it wants fewer or later requests, with Retry-After in
seconds where it knows better (learn.microsoft.com, "Blob service error codes" and "Performance checklist").
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from amlmount.dataset import ListedObject, ObjectId, printable
from amlmount.errors import StoreUnreachable, Throttled, TransientStoreError
from amlmount.metrics import Counters
from amlmount.stores.base import ObjectStore, Page

T = TypeVar("T")

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 10.0


def delay_s(attempt: int, retry_after_s: float | None, jitter: float) -> float:
    """Return how long to wait after attempt number `attempt` (from 0); `jitter` in [0, 1) spreads clients apart.

    What the store says is a minimum; jitter comes on top, so that a thousand nodes do not come back at once.
    """
    backoff = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempt, 16)) * (0.5 + jitter)
    return backoff if retry_after_s is None else retry_after_s + min(1.0, backoff)


class Retrying:
    """A store whose every call is tried until it succeeds, cannot, or `patience_s` seconds are over."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        patience_s: float,
        counters: Counters | None = None,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.identity = store.identity
        self.cacheable = store.cacheable
        self._patience_s = patience_s
        self._counters = counters or Counters()
        self._stop = stop or threading.Event()
        self._clock = clock
        self._random = random.Random()
        self.throttled_until = 0.0
        """Moment, of `clock`, before which nothing should be fetched ahead of need."""

    def _call(self, what: str, attempt_once: Callable[[int], T]) -> T:
        deadline = self._clock() + self._patience_s
        attempt = 0
        while True:
            self._counters.requests += 1
            began = self._clock()
            try:
                answer = attempt_once(attempt)
                self._counters.request.observe(self._clock() - began)
                return answer
            except TransientStoreError as error:
                wait_s = delay_s(attempt, error.retry_after_s, self._random.random())
                now = self._clock()
                if isinstance(error, Throttled):
                    self._counters.throttled += 1
                    self.throttled_until = max(self.throttled_until, now + wait_s)
                if now + wait_s >= deadline or self._stop.is_set():
                    tries = "1 try" if attempt == 0 else f"{attempt + 1} tries"
                    raise StoreUnreachable(f"{what}: gave up after {tries}: {error}") from error
            attempt += 1
            self._counters.retries += 1
            self._stop.wait(wait_s)

    def list_page(self, prefix: str, marker: str) -> Page:
        """As the store's."""
        return self._call(f"listing {printable(prefix)!r}", lambda _: self.store.list_page(prefix, marker))

    def head(self, path: str) -> ListedObject | None:
        """As the store's."""
        return self._call(printable(path), lambda _: self.store.head(path))

    def read(self, obj: ObjectId, start: int, stop: int, attempt: int = 0) -> memoryview:
        """As the store's."""
        del attempt
        return self._call(printable(obj.path), lambda attempt: self.store.read(obj, start, stop, attempt))

    def close(self) -> None:
        """Close the store."""
        self.store.close()
