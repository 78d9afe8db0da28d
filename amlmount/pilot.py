"""What a fetch thread does with its flights: the cache disk, then the store; the reads that wait are answered here.

A thread that has the bytes answers a waiting read itself, and the event loop hears of it when it next looks: a file
that is read without warning costs one wake-up, not three.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from amlmount.blocks import BlockKey
from amlmount.cache import BlockCache
from amlmount.crew import Ask, Flight, Try
from amlmount.errors import StoreError
from amlmount.stores import Retrying


class Landing(NamedTuple):
    """What came of a try."""

    entry: Try
    data: memoryview | None
    key: BlockKey
    """Of the data: the flight's, or that of the larger block around it."""
    from_disk: bool
    error: Exception | None
    answered: Sequence[Ask] = ()
    at_s: float = 0.0
    """When those were answered."""


class Answering(Protocol):
    """Where the answers to read requests go: the relay."""

    def answer(self, unique: int, data: memoryview) -> None:
        """Answer a request; thread-safe."""

    def refuse(self, unique: int, error: Exception, ino: int) -> None:
        """Refuse a request; on the event loop."""


class Pilot:
    """Flies for one mount. Its methods run in the crew's threads, several at a time."""

    def __init__(
        self,
        stores: Sequence[Retrying],
        cache: BlockCache | None,
        *,
        arrived: Callable[[Sequence[Landing]], None],
        again: Callable[[Flight], None],
    ) -> None:
        """Tell `arrived` of what was brought; give to `again` what another thread should fly."""
        self._stores = stores
        self._cache = cache
        self._arrived = arrived
        self._again = again
        self.answers: Answering | None = None

    def __repr__(self) -> str:
        return f"<Pilot of {len(self._stores)} stores, {self._cache!r}>"

    def fly(self, tries: Sequence[Try]) -> None:
        """Bring one flight from the disk or the store, or several from the disk."""
        try:
            alone = len(tries) == 1
            tries = [entry for entry in self._from_disk(tries) if not entry.is_void]
            while tries:
                flight = tries[0].flight
                flight.skip_disk = True
                if alone:
                    self._from_store(tries[0])
                else:  # each waits for the store by itself
                    flight.phase_since = math.inf
                    self._again(flight)
                tries = tries[1:]
        except Exception as error:  # noqa: BLE001  # whatever it is, the reads that wait must hear of it
            self._arrived(
                [Landing(entry, None, entry.flight.key, from_disk=False, error=error) for entry in tries]
            )

    def _from_store(self, entry: Try) -> None:
        flight = entry.flight
        flight.past_disk()
        store = self._stores[flight.file.store]
        try:
            data = store.read(flight.file.object, flight.key.start, flight.key.stop)
        except StoreError as error:
            self._arrived([Landing(entry, None, flight.key, from_disk=False, error=error)])
        else:
            answered = self.answer(flight, data)
            self._arrived(
                [
                    Landing(
                        entry,
                        data,
                        flight.key,
                        from_disk=False,
                        error=None,
                        answered=answered,
                        at_s=time.monotonic(),
                    )
                ]
            )

    def _from_disk(self, tries: Sequence[Try]) -> Sequence[Try]:
        """Bring what the cache disk has; return the others."""
        cache = self._cache
        if cache is None:
            return tries
        left = [entry for entry in tries if entry.flight.skip_disk]
        asked = [entry for entry in tries if not entry.flight.skip_disk]
        found: list[Landing] = []
        for entry, held in zip(asked, cache.read_all([e.flight.key for e in asked]), strict=True):
            key, within, data = entry.flight.key, entry.flight.within, held
            if data is None and within is not None:
                key, data = within, cache.read(within)
            if data is None:
                left.append(entry)
            else:
                answered = self.answer(entry.flight, data) if key == entry.flight.key else ()
                found.append(
                    Landing(
                        entry, data, key, from_disk=True, error=None, answered=answered, at_s=time.monotonic()
                    )
                )
        if found:
            self._arrived(found)
        return left

    def answer(self, flight: Flight, data: memoryview) -> Sequence[Ask]:
        """Answer the requests that wait for a block; return them, to be counted on the event loop."""
        answered: list[Ask] = []
        with suppress(IndexError):
            while flight.asks and self.answers is not None:
                ask = flight.asks.pop()
                self.answers.answer(ask.unique, data[ask.start : ask.stop])
                answered.append(ask)
        return answered
