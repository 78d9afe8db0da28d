"""The sampler that declares what it draws: the same indices as without it, and never in the way."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import amlmount
from amlmount import readorder
from amlmount.readorder import ReadOrder
from tests.manifests import file
from tests.stand_in import StandIn

NAMES = [f"{letter}/{number}" for letter in "abc" for number in range(4)]


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setenv("AMLMOUNT_HOME", str(tmp_path))
    return StandIn(tmp_path, str(tmp_path / "data"), [*map(file, NAMES)])


@pytest.fixture
def listening(session: StandIn) -> Iterator[StandIn]:
    with session.listening():
        yield session


class Shuffling:
    """A sampler as there are many: an order of its own for each epoch."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count = count
        self.epoch = seed

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from random.Random(self.epoch).sample(range(self.count), self.count)


def paths(listening: StandIn) -> list[str]:
    return [f"{listening.path}/{name}" for name in NAMES]


def named(indices: list[int]) -> list[str]:
    return [NAMES[index] for index in indices]


def test_what_is_drawn_is_declared_and_given(listening: StandIn) -> None:
    order = ReadOrder(Shuffling(12), mount=listening.path, paths=paths(listening))
    expected = list(Shuffling(12))
    assert (len(order), list(order)) == (12, expected)
    assert listening.paths() == named(expected)
    [question] = listening.questions
    assert question["keep"] == 0
    list(order)
    assert listening.questions[1] == question  # the same reader starts anew


def test_it_is_declared_when_the_first_is_asked_for(listening: StandIn) -> None:
    iterator = iter(ReadOrder(Shuffling(12), mount=listening.path))
    assert listening.orders == []
    first = next(iterator)
    assert listening.paths() == named(list(Shuffling(12)))
    assert named([first]) == listening.paths()[:1]


def test_batches(listening: StandIn) -> None:
    batches: list[Any] = [[3, 1], (4,), [1, 5]]
    assert list(ReadOrder(batches, mount=listening.path)) == batches
    assert listening.paths() == named([3, 1, 4, 1, 5])


class Number:
    def __index__(self) -> int:
        return 7


def test_indices_of_other_types(listening: StandIn) -> None:
    drawn: list[Any] = [Number(), [Number(), True], range(2, 4)]
    assert list(ReadOrder(drawn, mount=listening.path)) == drawn
    assert listening.paths() == named([7, 7, 1, 2, 3])


def test_samples_of_several_files(listening: StandIn) -> None:
    several: list[Any] = [["a/0", Path("b/0")], [], f"{listening.path}/c/1", b"c/2", ("a/3", "nope", b"b/3")]
    order = ReadOrder([4, 0, 1, 2, 3], mount=listening.path, paths=several)
    assert list(order) == [4, 0, 1, 2, 3]
    assert listening.paths() == ["a/3", "b/3", "a/0", "b/0", "c/1", "c/2"]


def test_paths_written_from_where_the_program_stands(
    listening: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(listening.path).parent)
    list(ReadOrder([1, 0, 2], mount="data", paths=["data/a/0", "data/b/1", "c/2"]))
    assert listening.paths() == ["b/1", "a/0", "c/2"]


def test_all_else_is_the_samplers_own() -> None:
    inner = Shuffling(5)
    order = ReadOrder(inner, mount="/nowhere")
    assert order.count == 5
    order.set_epoch(3)
    assert inner.epoch == 3
    assert not hasattr(ReadOrder([1], mount="/nowhere"), "set_epoch")
    assert repr(inner) in repr(order)
    with pytest.raises(TypeError):
        len(ReadOrder(iter([1]), mount="/nowhere"))


def test_a_copy_works_too(listening: StandIn) -> None:
    order = pickle.loads(pickle.dumps(ReadOrder([1, 2], mount=listening.path)))
    assert list(order) == [1, 2]
    assert listening.paths() == named([1, 2])


# The next epoch ----------------------------------------------------------------------------------------------


def test_the_next_epoch_can_be_declared_while_one_is_read(listening: StandIn) -> None:
    order = ReadOrder(Shuffling(12), mount=listening.path)
    order.set_epoch(1)
    iterator = iter(order)
    seen = [next(iterator) for _ in range(6)]
    order.set_epoch(2)
    order.declare_next()
    order.declare_next()
    assert [question["keep"] for question in listening.questions] == [0, 1]
    assert [*seen, *iterator] == list(Shuffling(12, 1))
    order.set_epoch(2)
    assert list(order) == list(Shuffling(12, 2))
    assert len(listening.orders) == 2
    assert listening.paths() == named(list(Shuffling(12, 2)))


def test_what_was_drawn_for_another_epoch_is_drawn_again(listening: StandIn) -> None:
    order = ReadOrder(Shuffling(12), mount=listening.path)
    order.set_epoch(2)
    order.declare_next()
    order.set_epoch(3)
    assert list(order) == list(Shuffling(12, 3))
    assert listening.questions[-1]["keep"] == 0


def test_an_endless_sampler_is_declared_in_parts(listening: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readorder, "AT_ONCE", 8)
    iterator = iter(ReadOrder(itertools.cycle(range(12)), mount=listening.path))
    assert list(itertools.islice(iterator, 100)) == [number % 12 for number in range(100)]
    assert all(len(order) == 8 for order in listening.orders)
    assert 100 <= 8 * len(listening.orders) <= 116
    assert [question["keep"] for question in listening.questions][:3] == [0, 2, 2]


def test_a_long_epoch_of_batches_is_declared_in_parts(
    listening: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readorder, "AT_ONCE", 5)
    batches = [[0, 1, 2], [3, 4, 5], [6, 7], [8]]
    assert list(ReadOrder(batches, mount=listening.path)) == batches
    assert [len(order) for order in listening.orders] == [6, 3]


# Never in the way --------------------------------------------------------------------------------------------


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "amlmount"]


def test_without_a_session_it_warns_once_and_goes_on(
    session: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    order = ReadOrder(Shuffling(12), mount=session.path)
    assert list(order) == list(order) == list(Shuffling(12))
    [message] = warned(caplog)
    assert "nothing mounted" in message
    with session.listening():  # and once there is one, it is used
        list(order)
    assert len(session.orders) == 1
    assert len(warned(caplog)) == 1


@pytest.mark.parametrize(
    "answer", [{"error": "full", "hint": "", "exit_code": 2}, {}, {"queued": None}, {"error": 5}]
)
def test_a_session_that_refuses(
    listening: StandIn, caplog: pytest.LogCaptureFixture, answer: dict[str, Any]
) -> None:
    listening.answer = answer
    assert list(ReadOrder([1, 2], mount=listening.path)) == [1, 2]
    assert len(warned(caplog)) == 1


def test_samples_that_are_not_in_the_mount(listening: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    order = ReadOrder([0, 1, 2, 2, 5], mount=listening.path, paths=["a/1", "/elsewhere/x", "a/2"])
    assert list(order) == [0, 1, 2, 2, 5]
    assert listening.paths() == ["a/1", "a/2", "a/2"]
    assert "2 of 5 samples" in warned(caplog)[0]


@pytest.mark.parametrize("paths", [["a/0", 7], [[["a/0"]]], [None, None]])
def test_what_are_no_paths(listening: StandIn, caplog: pytest.LogCaptureFixture, paths: Any) -> None:
    assert list(ReadOrder([0, 1], mount=listening.path, paths=paths)) == [0, 1]
    assert len(warned(caplog)) == 1


@pytest.mark.parametrize("drawn", [["key", "other"], [None], [1, 2.5], [iter([1])]])
def test_what_are_no_indices(listening: StandIn, caplog: pytest.LogCaptureFixture, drawn: list[Any]) -> None:
    assert list(ReadOrder(drawn, mount=listening.path)) == drawn
    assert len(warned(caplog)) == 1


def test_what_can_be_read_but_once_is_left_to_the_loader(listening: StandIn) -> None:
    assert [list(batch) for batch in ReadOrder([iter([1, 2])], mount=listening.path)] == [[1, 2]]


def test_a_mount_of_other_files_is_looked_up_anew(listening: StandIn) -> None:
    order = ReadOrder([1], mount=listening.path, paths=["a/0", "b/1"])
    list(order)
    other = StandIn(listening.run.parent, listening.path, [file("b/0"), file("b/1"), file("c")])
    other.publish()
    list(order)
    listening.manifest = other.manifest
    assert listening.paths() == ["b/1"]


def test_the_samplers_own_errors_are_its_own() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise RuntimeError("of the sampler")

    with pytest.raises(RuntimeError, match="of the sampler"):
        list(ReadOrder(failing(), mount="/nowhere"))


def test_a_warning_is_seen_where_nobody_set_up_logging(session: StandIn) -> None:
    program = "import amlmount; print(list(amlmount.ReadOrder([1, 2], mount='/nowhere')))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert (done.returncode, done.stdout) == (0, "[1, 2]\n")
    assert "nothing mounted at /nowhere" in done.stderr


# The package -------------------------------------------------------------------------------------------------


def test_importing_the_package_costs_next_to_nothing() -> None:
    program = (
        "import sys; import amlmount; print(sorted(m for m in sys.modules if m.startswith('amlmount.')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert amlmount.ReadOrder is ReadOrder
    assert "ReadOrder" in amlmount.__all__
    with pytest.raises(AttributeError, match="Nothing"):
        _ = amlmount.Nothing


def test_declaring_takes_no_event_loop() -> None:
    program = (
        "import sys, amlmount.readorder; print({'trio', 'torch', 'obstore', 'structlog'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_copies_of_a_process_are_readers_of_their_own(
    listening: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = ReadOrder([1, 2], mount=listening.path)
    list(order)
    monkeypatch.setattr(os, "getpid", lambda: 12345)
    list(order)
    assert len({question["reader"] for question in listening.questions}) == 2
