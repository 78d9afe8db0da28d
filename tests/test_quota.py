"""The two rules of the cache disk, and what goes first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlmount.blocks import GIB, MIB
from amlmount.quota import Quota, Victim, limit_of, victims

amounts = st.integers(0, 1 << 44)
quotas = st.builds(Quota, amounts, amounts)


@given(quotas, amounts, amounts, amounts)
def test_what_fits_breaks_neither_rule(quota: Quota, used: int, free: int, need: int) -> None:
    fits = quota.fits(used, free, need)
    assert fits == (used + need <= quota.limit and free - need >= quota.min_free)
    # Both rules can only be broken by what is evicted being zero.
    assert fits == (quota.to_evict(used, free, need) == 0) or used == 0


@given(quotas, amounts, amounts, amounts)
def test_evicting_what_is_asked_makes_room_or_empties_the_cache(
    quota: Quota, used: int, free: int, need: int
) -> None:
    evicted = quota.to_evict(used, free, need)
    assert 0 <= evicted <= used
    assert evicted == used or quota.fits(used - evicted, free + evicted, need)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=50), st.integers(-5, 300))
def test_victims_are_the_oldest_and_no_more_than_needed(blocks: list[tuple[int, int]], need: int) -> None:
    known = [Victim(used_ns, size, f"b{number}") for number, (used_ns, size) in enumerate(blocks)]
    chosen = victims(known, need)
    assert len(set(chosen)) == len(chosen)
    kept = set(known) - set(chosen)
    if chosen:
        assert max(chosen).last_used_ns <= min((v.last_used_ns for v in kept), default=1 << 60)
        assert sum(v.size for v in chosen[:-1]) < need
    assert sum(v.size for v in chosen) >= need or not kept


@pytest.mark.parametrize(
    ("cache_size", "expected"),
    [(None, 50 * GIB), (0, 0), (7 * MIB, 7 * MIB), (-10 * GIB, 13 * GIB), (-40 * GIB, 0)],
)
def test_what_the_setting_means(cache_size: int | None, expected: int) -> None:
    assert limit_of(cache_size, disk_total=100 * GIB, disk_free=20 * GIB, used=3 * GIB) == expected
