"""What a session says of itself, and what bounds the speed of its reads: decided from its counters; no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Literal

import msgspec

from amlmount.metrics import Spread

Bound = Literal["idle", "reader", "store", "budget", "cache disk", "fuse"]

WAITING = 0.25
"""Part of the time that a read must have been waiting for the reads to be bound by what they waited for."""

BUSY = 0.75
"""Part of the time that answering must have taken for it to be the bound: the rest goes to the threads beside it."""


OVER_S = 10.0
"""Seconds that a verdict looks at."""

REMEMBERED = 600
"""Snapshots that are kept, one a second: 1 MB."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds the reads: an answer to `why is my epoch slow`."""

    bound: Bound
    why: str
    """One sentence with the figures, and what to do."""
    over_s: float
    """Seconds that were looked at."""


class MountStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The form of `amlmount status --json`."""

    ref: str
    path: str
    digest: str
    mode: str
    state: str
    pid: int
    """The process that serves the reads."""
    started_ns: int
    files: int
    bytes: int
    statistics: dict[str, float] = {}
    histograms: dict[str, Spread] = {}
    verdict: Verdict | None = None


class History:
    """The counters of the last minutes: an epoch that has just ended is still to be explained."""

    def __init__(self) -> None:
        self._past: deque[tuple[float, Mapping[str, float]]] = deque(maxlen=REMEMBERED)

    def __repr__(self) -> str:
        return f"<History of {len(self._past)} snapshots>"

    def remember(self, at_s: float, figures: Mapping[str, float]) -> None:
        """Keep a snapshot, taken at a moment of a clock that only grows; to be called once a second."""
        self._past.append((at_s, figures))

    def verdict(self, at_s: float, figures: Mapping[str, float]) -> Verdict:
        """Judge the last `OVER_S` seconds, or, where nothing was read in them, those in which something last was."""
        past = list(self._past)
        if not past:
            return judge({}, figures, 1.0)
        while len(past) > 1 and _is_still(past[-1][1], figures):
            at_s, figures = past.pop()
        then_s, before = next((p for p in reversed(past) if p[0] <= at_s - OVER_S), past[0])
        return judge(before, figures, max(at_s - then_s, 0.001))


def _is_still(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    return before["reads"] == now["reads"] and before["waiting_s"] == now["waiting_s"]


def judge(before: Mapping[str, float], now: Mapping[str, float], over_s: float) -> Verdict:
    """Return what bounded the reads between two snapshots of the counters, `over_s` seconds apart."""

    def verdict(bound: Bound, why: str) -> Verdict:
        return Verdict(bound=bound, why=why, over_s=round(over_s, 1))

    gone = {name: now[name] - before.get(name, 0) for name in now}
    reads, waiting = gone["reads"], min(1.0, gone["waiting_s"] / over_s)
    if not reads and waiting < WAITING:
        return verdict("idle", "nothing was asked for")
    rate = f"{reads / over_s:,.0f} reads/s, {gone['bytes_asked'] / over_s / 1e6:,.0f} MB/s"
    busy = gone["busy_s"] / over_s
    if busy >= BUSY:
        return verdict(
            "fuse",
            f"{rate}; answering took {busy:.0%} of the time: larger reads, or a second mount for some of the readers",
        )
    if waiting < WAITING:
        return verdict(
            "reader",
            f"{rate}; a read was waiting {waiting:.0%} of the time: the program that reads does something else, or"
            " reads with too few workers",
        )
    store, disk, memory = gone["wait_store_s"], gone["wait_disk_s"], gone["wait_memory_s"]
    waited = f"{rate}; a read was waiting {waiting:.0%} of the time"
    if memory > max(store, disk):
        return verdict("budget", f"{waited}, most of it for room in memory: raise memory_budget")
    if disk > store:
        return verdict(
            "cache disk",
            f"{waited}, most of it for the cache disk: put cache_dir on a faster one, or declare the order",
        )
    return verdict("store", f"{waited}, most of it for the store: {_of_store(gone)}")


def _of_store(gone: Mapping[str, float]) -> str:
    if gone["throttled"]:
        return f"it throttled {gone['throttled']:,.0f} requests; lower connections"
    if gone["retries"] * 10 > gone["requests"]:
        return f"{gone['retries']:,.0f} of {gone['requests']:,.0f} requests had to be made again; see the log"
    if not gone["waited_store"]:
        return "it has not answered yet"
    if gone["prefetch_late"] * 2 > gone["waited_store"]:
        return "what was fetched ahead came too late; raise connections or memory_budget"
    each = gone["wait_store_s"] / gone["waited_store"]
    blocks = f"{gone['waited_store']:,.0f} blocks"
    return f"each of {blocks} took {each * 1e3:,.0f} ms; declare the order (amlmount prefetch)"
