"""What is said to bound the reads, from figures made up for each case."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlmount.metrics import Counters
from amlmount.status import BUSY, OVER_S, REMEMBERED, WAITING, History, Verdict, judge

NOTHING = Counters().snapshot()


def figures(**changed: float) -> dict[str, float]:
    assert set(changed) <= set(NOTHING)
    return {**NOTHING, **changed}


def verdict(over_s: float = 10.0, **changed: float) -> Verdict:
    return judge(NOTHING, figures(**changed), over_s)


BOUND = [
    ("idle", {}, "nothing"),
    ("idle", {"waiting_s": 1.0}, "nothing"),
    ("fuse", {"reads": 9, "busy_s": 8.0, "waiting_s": 9.0, "wait_store_s": 9.0}, "80%"),
    ("reader", {"reads": 100, "busy_s": 1.0, "waiting_s": 1.0}, "10%"),
    ("budget", {"reads": 100, "waiting_s": 9, "wait_memory_s": 5, "wait_store_s": 4}, "memory_budget"),
    ("cache disk", {"reads": 100, "waiting_s": 9, "wait_disk_s": 5, "wait_store_s": 4}, "cache_dir"),
    ("store", {"reads": 0, "waiting_s": 10, "wait_store_s": 10}, "not answered yet"),
    ("store", {"reads": 9, "waiting_s": 9, "wait_store_s": 9, "throttled": 3, "retries": 3}, "throttled 3"),
    ("store", {"reads": 9, "waiting_s": 9, "wait_store_s": 9, "retries": 2, "requests": 9}, "2 of 9"),
    (
        "store",
        {"reads": 9, "waiting_s": 9, "wait_store_s": 9, "waited_store": 9, "prefetch_late": 5, "requests": 9},
        "too late",
    ),
    ("store", {"reads": 9, "waiting_s": 9, "wait_store_s": 9, "waited_store": 90, "requests": 90}, "100 ms"),
]


@pytest.mark.parametrize(("bound", "changed", "says"), BOUND)
def test_what_bounds_the_reads(bound: str, changed: dict[str, float], says: str) -> None:
    found = verdict(**changed)
    assert found.bound == bound
    assert says in found.why
    assert found.over_s == 10.0


def test_rates_are_of_the_time_that_was_looked_at() -> None:
    before = figures(reads=1000, bytes_asked=10**9, busy_s=100.0)
    now = figures(reads=1500, bytes_asked=10**9 + 5 * 10**7, busy_s=101.0)
    found = judge(before, now, 5.0)
    assert found.bound == "reader"
    assert found.why.startswith("100 reads/s, 10 MB/s;")


@given(
    st.dictionaries(st.sampled_from(sorted(NOTHING)), st.floats(0, 1e12), max_size=len(NOTHING)),
    st.floats(0.001, 1000),
)
def test_whatever_was_counted_there_is_a_verdict(changed: dict[str, float], over_s: float) -> None:
    found = verdict(over_s, **changed)
    assert found.why
    assert (found.bound == "idle") == (
        not changed.get("reads") and changed.get("waiting_s", 0) / over_s < WAITING
    )
    assert found.bound != "fuse" or changed["busy_s"] / over_s >= BUSY


# Which seconds are looked at -----------------------------------------------------------------------------------


def test_the_last_seconds_are_looked_at() -> None:
    history = History()
    for second in range(100):
        history.remember(second, figures(reads=10 * second, waiting_s=second if second > 80 else 0.0))
    found = history.verdict(100, figures(reads=1000, waiting_s=100))
    assert (found.bound, found.over_s) == ("store", OVER_S)
    assert found.why.startswith("10 reads/s")


def test_a_young_mount_is_judged_by_what_there_is() -> None:
    history = History()
    assert history.verdict(5, NOTHING).bound == "idle"
    history.remember(5, NOTHING)
    found = history.verdict(8, figures(reads=30))
    assert (found.bound, found.over_s) == ("reader", 3.0)


def test_an_epoch_that_has_ended_is_still_explained() -> None:
    history = History()
    for second in range(60):
        history.remember(second, figures(reads=10 * second, waiting_s=second, wait_store_s=second))
    last = figures(reads=590, waiting_s=59, wait_store_s=59)
    for second in range(60, 300):
        history.remember(second, last)
    found = history.verdict(300, last)
    assert (found.bound, found.over_s) == ("store", OVER_S)
    assert found.why.startswith("10 reads/s")


def test_what_was_long_ago_is_forgotten() -> None:
    history = History()
    history.remember(0, NOTHING)
    last = figures(reads=590)
    for second in range(1, 2 * REMEMBERED):
        history.remember(second, last)
    assert history.verdict(2 * REMEMBERED, last).bound == "idle"
    assert repr(history) == f"<History of {REMEMBERED} snapshots>"
