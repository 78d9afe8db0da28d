"""The threads: demand before prefetch, weights, several at once where the disk may have them, and none lost."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import trio

from amlmount.blocks import MIB, ByteRange
from amlmount.crew import FROM_DISK, LARGE, SMALL_AT_ONCE, Crew, Flight, PinnedFile, Try
from amlmount.dataset import ObjectId
from tests.mounting import until

FILE = PinnedFile(0, ObjectId("f", "t", 1 << 40), b"d" * 32)


def flight(number: int, *, ahead: bool, size: int = 1000, skip_disk: bool = True) -> Flight:
    made = Flight(FILE, FILE.key(ByteRange(number * size, (number + 1) * size)), None, ahead=ahead)
    made.skip_disk = skip_disk
    return made


class Field:
    """A crew whose flights wait for the test, and a note of each group that took off."""

    def __init__(self, connections: int) -> None:
        self.crew = Crew(self._fly, connections=connections)
        self.groups: list[list[Flight]] = []
        self.lock = threading.Condition()
        self.open = threading.Event()
        self.open.set()
        self.landed: list[Flight] = []
        self.busy = 0
        self.peak = 0

    def _fly(self, tries: Sequence[Try]) -> None:
        with self.lock:
            self.groups.append([entry.flight for entry in tries])
            self.busy += 1
            self.peak = max(self.peak, self.busy)
            self.lock.notify_all()
        self.open.wait(20)
        with self.lock:
            self.busy -= 1
            self.landed += [entry.flight for entry in tries if not entry.is_void]
            self.lock.notify_all()

    def queue(self, *flights: Flight, wanted: int = 100) -> None:
        for each in flights:
            self.crew.queue(each, wanted)

    def together(self, *flights: Flight, wanted: int = 100) -> None:
        """Queue flights before any thread looks."""
        with self.crew._lock:
            self.queue(*flights, wanted=wanted)

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.lock:
            assert self.lock.wait_for(condition, 20), self.groups

    def flown(self) -> list[Flight]:
        return [each for group in self.groups for each in group]

    def threads(self) -> list[threading.Thread]:
        return [t for t in threading.enumerate() if getattr(t, "_target", None) == self.crew._work]


@pytest.fixture
def fields() -> Iterator[Callable[[int], Field]]:
    made: list[Field] = []

    def make(connections: int) -> Field:
        field = Field(connections)
        made.append(field)
        return field

    yield make
    for field in made:
        field.open.set()
        field.crew.close()
        for thread in field.threads():
            thread.join(10)
            assert not thread.is_alive()


def test_a_flight_is_flown_once(fields: Callable[[int], Field]) -> None:
    field = fields(2)
    flights = [flight(n, ahead=bool(n % 2)) for n in range(200)]
    field.queue(*flights)
    field.wait(lambda: len(field.landed) == 200)
    assert sorted(map(id, field.flown())) == sorted(map(id, flights))
    assert repr(field.crew).endswith("0 and 0 waiting>")


def test_threads_are_started_as_they_are_wanted_and_no_more_than_there_may_be(
    fields: Callable[[int], Field],
) -> None:
    field = fields(2)
    field.open.clear()
    for number in range(3):
        field.queue(flight(number, ahead=False), wanted=1)
    assert len(field.threads()) == 1
    for number in range(3, 6):
        field.queue(flight(number, ahead=False), wanted=number)
    assert len(field.threads()) == 4
    for number in range(6, 30):
        field.queue(flight(number, ahead=False), wanted=number)
    assert len(field.threads()) == 2 * SMALL_AT_ONCE
    field.wait(lambda: field.busy == 2 * SMALL_AT_ONCE)


def test_demand_goes_first(fields: Callable[[int], Field]) -> None:
    field = fields(1)
    ahead = [flight(n, ahead=True) for n in range(3)]
    demand = [flight(n, ahead=False) for n in range(10, 13)]
    field.together(*ahead, *demand, wanted=1)
    field.wait(lambda: len(field.landed) == 6)
    assert field.flown() == demand + ahead


def test_a_prefetch_that_a_read_wants_is_flown_once_and_at_once(fields: Callable[[int], Field]) -> None:
    field = fields(1)
    ahead = [flight(n, ahead=True) for n in range(4)]
    with field.crew._lock:
        field.queue(*ahead, wanted=1)
        ahead[2].ahead = False
        field.queue(ahead[2], wanted=1)
    field.wait(lambda: len(field.landed) == 4)
    assert field.flown() == [ahead[2], ahead[0], ahead[1], ahead[3]]


@pytest.mark.parametrize("connections", [1, 2, 8, 32])
def test_prefetches_leave_threads_for_reads(fields: Callable[[int], Field], connections: int) -> None:
    field = fields(connections)
    most = connections * SMALL_AT_ONCE
    spare = max(2, most // 8)
    field.open.clear()
    field.queue(*(flight(n, ahead=True) for n in range(2 * most)), wanted=most)
    field.wait(lambda: field.busy == most - spare)
    reads = [flight(n, ahead=False) for n in range(1000, 1000 + spare)]
    field.queue(*reads, wanted=most)
    field.wait(lambda: field.busy == most)
    assert set(field.flown()[-spare:]) == set(reads)
    field.open.set()
    field.wait(lambda: len(field.landed) == 2 * most + spare)  # those that had to wait, too
    assert field.peak == most


def test_a_large_prefetch_counts_for_several_small_ones(fields: Callable[[int], Field]) -> None:
    field = fields(4)  # a weight of 14 in all
    assert (flight(0, ahead=True, size=LARGE).weight, flight(0, ahead=True, size=LARGE - 1).weight) == (4, 1)
    field.open.clear()
    large = [flight(n, ahead=True, size=4 * MIB) for n in range(5)]
    small = [flight(n, ahead=True) for n in range(5)]
    field.queue(*large[:3], *small)
    field.wait(lambda: len(field.groups) == 5)  # three of 4 and two of 1
    assert field.crew._weight == 14
    field.queue(*large[3:])
    field.open.set()
    field.wait(lambda: len(field.landed) == 10)
    field.wait(lambda: field.crew._weight == 0)


def test_a_large_read_counts_for_nothing(fields: Callable[[int], Field]) -> None:
    field = fields(1)
    field.open.clear()
    field.queue(*(flight(n, ahead=False, size=4 * MIB) for n in range(4)))
    field.wait(lambda: field.busy == 4)
    assert field.crew._weight == 0


def test_what_the_disk_may_have_is_taken_together(fields: Callable[[int], Field]) -> None:
    field = fields(8)
    disk = [flight(n, ahead=True, skip_disk=False) for n in range(FROM_DISK + 3)]
    store = [flight(n, ahead=True) for n in range(100, 102)]
    large = [flight(n, ahead=True, size=MIB, skip_disk=False) for n in range(2)]
    field.together(*disk, store[0], large[0], store[1], large[1], wanted=1)
    field.wait(lambda: len(field.landed) == len(disk) + 4)
    assert field.groups == [
        disk[:FROM_DISK],
        disk[FROM_DISK:],
        [store[0]],
        [large[0]],
        [store[1]],
        [large[1]],
    ]


def test_a_read_is_never_taken_together_with_others(fields: Callable[[int], Field]) -> None:
    field = fields(8)
    reads = [flight(n, ahead=False, skip_disk=False) for n in range(3)]
    field.together(*reads, wanted=1)
    field.wait(lambda: len(field.landed) == 3)
    assert field.groups == [[each] for each in reads]


def test_a_group_is_no_larger_than_there_is_room_for(fields: Callable[[int], Field]) -> None:
    field = fields(1)  # a weight of 2
    disk = [flight(n, ahead=True, skip_disk=False) for n in range(5)]
    field.together(*disk, wanted=1)
    field.wait(lambda: len(field.landed) == 5)
    assert [len(group) for group in field.groups] == [2, 2, 1]


def test_one_that_was_left_for_want_of_room_is_free_for_a_read(fields: Callable[[int], Field]) -> None:
    field = fields(1)
    field.open.clear()
    ahead = [flight(n, ahead=True) for n in range(3)]
    field.queue(*ahead)
    field.wait(lambda: field.busy == 2)
    until(lambda: field.crew._parked == 1)
    assert ahead[2].phase_since == math.inf
    ahead[2].ahead = False
    field.queue(ahead[2])
    field.wait(lambda: field.busy == 3)
    assert field.flown()[2] is ahead[2]


def test_a_flight_given_to_another_thread_is_no_longer_this_ones(fields: Callable[[int], Field]) -> None:
    field = fields(1)
    field.open.clear()
    stuck, other = flight(0, ahead=True), flight(1, ahead=False)
    field.queue(stuck, wanted=1)
    field.wait(lambda: field.busy == 1)
    # As `Fetcher.watch` does:
    stuck.try_no += 1
    stuck.phase_since = math.inf
    stuck.ahead = False
    field.queue(stuck, wanted=1)
    field.crew.replace()
    field.wait(lambda: field.busy == 2)
    field.open.set()
    field.wait(lambda: field.landed == [stuck])  # once
    until(lambda: len(field.threads()) == 1)  # the one that was replaced has ended
    field.queue(other, wanted=1)
    field.wait(lambda: field.landed == [stuck, other])
    assert field.crew._weight == 0


def test_a_flight_waits_in_line_until_it_is_taken() -> None:
    one = flight(0, ahead=True)
    assert one.phase_since == math.inf
    assert Crew._is_free(Try(one, 0))
    assert one.phase_since <= time.monotonic()
    assert not Crew._is_free(Try(one, 0))
    one.past_disk()
    assert math.inf > one.phase_since > time.monotonic() + 1e9
    assert not Crew._is_free(Try(one, 0))
    one.phase_since = math.inf
    assert not Crew._is_free(Try(one, 1))
    assert Try(one, 1).is_void


async def test_who_waits_for_a_flight_wakes_when_it_lands() -> None:
    one = flight(0, ahead=False)
    one.land()  # nobody waits
    two = flight(1, ahead=False)
    assert not one.is_awaited
    woken = 0

    async def wait() -> None:
        nonlocal woken
        await two.expect().wait()
        woken += 1

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert woken == 0
        assert two.is_awaited
        two.land()
    assert woken == 3


def test_keys_are_ranges_of_the_object() -> None:
    key = FILE.key(ByteRange(5, 9))
    assert (key.object, key.start, key.stop, key.length) == (FILE.digest, 5, 9, 4)


def test_queueing_from_many_threads_loses_nothing(fields: Callable[[int], Field]) -> None:
    field = fields(8)
    flights = [
        [flight(1000 * k + n, ahead=bool(n % 3), skip_disk=bool(n % 2)) for n in range(300)] for k in range(4)
    ]
    senders = [threading.Thread(target=field.queue, args=mine) for mine in flights]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(20)
    field.wait(lambda: len(field.landed) == 1200)
    assert len({id(each) for each in field.landed}) == 1200
    assert field.crew._weight == 0 or until(lambda: field.crew._weight == 0)
