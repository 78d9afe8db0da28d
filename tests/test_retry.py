"""Another attempt where one may help: how often, how long between, when to stop. No real time passes here."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlmount.dataset import ObjectId
from amlmount.errors import (
    AccessDenied,
    ObjectChanged,
    ObjectMissing,
    StoreError,
    StoreUnreachable,
    Throttled,
    TransientStoreError,
)
from amlmount.metrics import Counters
from amlmount.stores import Retrying
from amlmount.stores.retry import FIRST_DELAY_S, MAX_DELAY_S, delay_s
from tests.fake_store import FakeStore, Fault

DATA = bytes(range(200))


class Clock(threading.Event):
    """A clock that moves on when somebody waits for this event, instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        self.now += timeout
        return self.is_set()


class Setup:
    """A fake store behind retries, with a clock of its own."""

    def __init__(self, patience_s: float = 60) -> None:
        self.fake = FakeStore()
        self.obj = self.fake.put("dir/a", DATA)
        self.clock = Clock()
        self.counters = Counters()
        self.store = Retrying(
            self.fake,
            patience_s=patience_s,
            counters=self.counters,
            stop=self.clock,
            clock=lambda: self.clock.now,
        )

    def read(self, obj: ObjectId | None = None) -> bytes:
        return bytes(self.store.read(obj or self.obj, 10, 20))


def transient(**more: float) -> TransientStoreError:
    return TransientStoreError("a reset", hint="", **more)


def test_what_works_is_asked_once() -> None:
    setup = Setup()
    assert setup.read() == DATA[10:20]
    assert setup.clock.waits == []
    assert (setup.counters.requests, setup.counters.retries, setup.counters.throttled) == (1, 0, 0)


def test_it_passes_for_the_store_it_wraps() -> None:
    setup = Setup()
    assert (setup.store.identity, setup.store.cacheable) == (setup.fake.identity, setup.fake.cacheable)
    assert [o.path for o in setup.store.list_page("dir/", "").objects()] == ["dir/a"]
    assert setup.store.head("dir/a") is not None
    setup.store.close()
    assert setup.fake.closed


def test_a_transient_failure_is_tried_again_until_it_works() -> None:
    setup = Setup()
    setup.fake.fail(transient(), times=4)
    assert setup.read() == DATA[10:20]
    # A store may go another way at a second attempt: it is told which one this is.
    assert [read.attempt for read in setup.fake.reads] == [0, 1, 2, 3, 4]
    assert len(setup.clock.waits) == 4
    assert (setup.counters.requests, setup.counters.retries) == (5, 4)


def test_waits_grow_and_are_bounded() -> None:
    setup = Setup(patience_s=300)
    setup.fake.fail(transient(), times=None)
    with pytest.raises(StoreUnreachable):
        setup.read()
    for number, wait in enumerate(setup.clock.waits):
        base = min(MAX_DELAY_S, FIRST_DELAY_S * 2**number)
        assert base * 0.5 <= wait <= base * 1.5
    assert len(setup.clock.waits) > 10


@given(st.integers(0, 10_000), st.one_of(st.none(), st.floats(0, 300)), st.floats(0, 0.999))
def test_a_delay_is_never_less_than_what_the_store_said(
    attempt: int, retry_after_s: float | None, jitter: float
) -> None:
    wait = delay_s(attempt, retry_after_s, jitter)
    assert 0 < wait <= (retry_after_s or 0) + 1.5 * MAX_DELAY_S
    assert retry_after_s is None or wait >= retry_after_s


def test_jitter_spreads_clients() -> None:
    waits = []
    for _ in range(20):
        setup = Setup()
        setup.fake.fail(Throttled("busy", hint="", retry_after_s=7))
        setup.read()
        waits += setup.clock.waits
    assert all(7 < wait <= 8 for wait in waits)
    assert len(set(waits)) == 20


def test_retry_after_is_honoured_and_others_hear_of_it() -> None:
    setup = Setup()
    setup.fake.fail(Throttled("busy", hint="", retry_after_s=12))
    begin = setup.clock.now
    assert setup.read() == DATA[10:20]
    assert setup.clock.waits[0] >= 12
    # Nothing is fetched ahead of need before this moment.
    assert setup.store.throttled_until == begin + setup.clock.waits[0]
    assert setup.counters.throttled == 1


def test_a_failure_that_is_no_throttling_holds_nobody_else_up() -> None:
    setup = Setup()
    setup.fake.fail(transient(retry_after_s=5))
    setup.read()
    assert setup.clock.waits[0] >= 5
    assert setup.store.throttled_until == 0
    assert setup.counters.throttled == 0


def test_a_shorter_word_does_not_shorten_a_longer_one() -> None:
    setup = Setup()
    setup.fake.fail(Throttled("busy", hint="", retry_after_s=30))
    setup.read()
    until = setup.store.throttled_until
    setup.clock.now -= 20
    setup.fake.fail(Throttled("busy", hint="", retry_after_s=1))
    setup.read()
    assert setup.store.throttled_until == until


@pytest.mark.parametrize("patience_s", [0.01, 1, 10, 60])
def test_patience_ends_on_time_and_says_why(patience_s: float) -> None:
    setup = Setup(patience_s)
    begin = setup.clock.now
    setup.fake.fail(transient(), times=None)
    with pytest.raises(StoreUnreachable) as caught:
        setup.read()
    assert setup.clock.now - begin <= patience_s
    tries = len(setup.fake.reads)
    assert f"{tries} tr" in str(caught.value)
    assert "dir/a" in str(caught.value)
    assert "a reset" in str(caught.value)
    assert "READ_TIMEOUT" in caught.value.hint
    assert isinstance(caught.value.__cause__, TransientStoreError)
    # It does not end early either: the next wait would have gone past the end.
    assert setup.clock.now - begin + 1.5 * MAX_DELAY_S >= patience_s


def test_a_store_that_wants_more_time_than_there_is_is_given_up_at_once() -> None:
    setup = Setup(patience_s=10)
    setup.fake.fail(Throttled("busy", hint="", retry_after_s=11), times=None)
    with pytest.raises(StoreUnreachable):
        setup.read()
    assert len(setup.fake.reads) == 1
    assert setup.clock.waits == []


@pytest.mark.parametrize(
    "error",
    [ObjectChanged("x"), ObjectMissing("x"), AccessDenied("x"), StoreError("x"), ValueError("x")],
    ids=lambda error: type(error).__name__,
)
def test_what_another_attempt_cannot_mend_is_told_at_once(error: Exception) -> None:
    setup = Setup()
    setup.fake.fail(error)
    with pytest.raises(type(error)):
        setup.read()
    assert len(setup.fake.reads) == 1
    assert setup.clock.waits == []


def test_a_session_that_ends_waits_for_nothing() -> None:
    setup = Setup()
    setup.fake.fail(setup.clock.set)  # the end comes while a read is under way
    setup.fake.faults.append(Fault(transient(), None, None))
    assert setup.read() == DATA[10:20]
    with pytest.raises(StoreUnreachable):
        setup.read()
    assert setup.clock.waits == []


def test_the_end_of_a_session_wakes_who_waits() -> None:
    fake = FakeStore()
    obj = fake.put("a", DATA)
    fake.fail(transient(), times=None)
    stop = threading.Event()
    store = Retrying(fake, patience_s=3600, stop=stop)
    failed = threading.Event()

    def read() -> None:
        with pytest.raises(StoreUnreachable):
            store.read(obj, 0, 1)
        failed.set()

    thread = threading.Thread(target=read)
    thread.start()
    fake.wait_for(4)
    stop.set()
    assert failed.wait(5)
    thread.join()


def test_listings_and_heads_are_tried_again_too() -> None:
    setup = Setup()
    calls: list[str] = []

    def list_page(prefix: str, marker: str) -> object:
        calls.append(prefix)
        if len(calls) < 3:
            raise transient()
        return FakeStore.list_page(setup.fake, prefix, marker)

    setup.fake.list_page = list_page  # type: ignore[method-assign, assignment]
    assert [o.path for o in setup.store.list_page("dir/", "").objects()] == ["dir/a"]
    assert calls == ["dir/"] * 3

    def head(path: str) -> None:
        calls.append(path)
        if len(calls) < 6:
            raise transient()

    setup.fake.head = head  # type: ignore[method-assign]
    assert setup.store.head("x") is None
    assert calls[3:] == ["x"] * 3
