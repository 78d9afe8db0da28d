"""What a session counts: every figure is in the README, histograms add up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlmount.metrics import BOUNDS_S, GAUGES, Counters, Histogram

README = Path(__file__).resolve().parent.parent / "README.md"


def test_every_figure_is_in_the_readme_and_no_other() -> None:
    section = README.read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    counted = set(Counters().snapshot())
    assert documented == counted | GAUGES
    gauges = {name for row in rows if "gauge" in row[2] for name in re.findall(r"`(\w+)`", row[1])}
    assert gauges == GAUGES
    for name in Counters().spreads():
        assert f"`{name}`" in section


def test_a_snapshot_is_what_was_counted() -> None:
    counters = Counters()
    assert set(counters.snapshot().values()) == {0}
    counters.bytes_fetched, counters.bytes_asked, counters.busy_s = 3000, 2000, 0.5
    taken = counters.snapshot()
    assert (taken["fetched_per_asked"], taken["busy_s"]) == (1.5, 0.5)
    counters.bytes_asked += 1
    assert taken["bytes_asked"] == 2000


times = st.lists(st.floats(0, 200, allow_nan=False), max_size=200)


@given(times)
def test_a_histogram_counts_each_time_in_its_bucket(seconds: list[float]) -> None:
    histogram = Histogram()
    for each in seconds:
        histogram.observe(each)
    spread = histogram.spread()
    assert len(spread.counts) == len(spread.upper_s) + 1
    assert spread.count == sum(spread.counts) == len(seconds)
    assert spread.sum_s == pytest.approx(sum(seconds), abs=1e-5)
    edges = [-1.0, *BOUNDS_S, float("inf")]
    for number, count in enumerate(spread.counts):
        assert count == sum(edges[number] < each <= edges[number + 1] for each in seconds)


@given(times.filter(bool), st.floats(0.01, 1))
def test_a_quantile_is_the_bound_that_so_many_lie_under(seconds: list[float], part: float) -> None:
    histogram = Histogram()
    for each in seconds:
        histogram.observe(each)
    bound = histogram.spread().quantile_s(part)
    assert bound in BOUNDS_S
    if bound < BOUNDS_S[-1]:
        assert sum(each <= bound for each in seconds) >= part * len(seconds) - 1e-9
    lower = [b for b in BOUNDS_S if b < bound]
    if lower:
        assert sum(each <= lower[-1] for each in seconds) < part * len(seconds) + 1e-9


def test_nothing_was_counted() -> None:
    assert Histogram().spread().quantile_s(0.5) == BOUNDS_S[0]
