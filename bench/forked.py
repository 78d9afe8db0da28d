"""Reader processes that start together: forked, held at a barrier, timed from its fall to the last one's end.

Duty: fork, start, collect. Children are processes, as a DataLoader's workers are, so no lock of ours stands
between them. Times are CLOCK_MONOTONIC, which all processes share; CPU is each child's own, from the barrier
to its end. Durations in seconds.
"""

from __future__ import annotations

import json
import os
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import BinaryIO


@dataclass
class Part:
    """What one reader did."""

    bytes: int = 0
    reads: int = 0
    cpu_s: float = 0.0
    end_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Race:
    """What they did together; `before_s` is how long the command before the start took."""

    seconds: float
    parts: list[Part]
    before_s: float


Worker = Callable[[int, Callable[[], None]], Part]
"""Prepares with its number, calls the second argument (which returns at the start), works."""


class ReaderError(RuntimeError):
    """A reader process failed; its traceback is in the error output."""


def cpu_now_s() -> float:
    """CPU of this process until now, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def race(readers: int, work: Worker, before: Callable[[], None] | None = None) -> Race:
    """Run `readers` workers; once all stand at the barrier run `before`, then let them go."""
    ready, ready_end = os.pipe()
    hold, go = os.pipe()
    answers: list[BinaryIO] = []
    for number in range(readers):
        answer, answer_end = os.pipe()
        if os.fork() == 0:
            os.close(go)
            _child(number, work, ready_end, hold, answer_end)
        os.close(answer_end)
        answers.append(os.fdopen(answer, "rb"))
    os.close(ready_end)
    for _ in range(readers):
        if not os.read(ready, 1):
            raise ReaderError("a reader ended before the start")
    start = begun = time.monotonic()
    if before is not None:
        before()
        start = time.monotonic()
    os.close(go)
    parts = [Part(**json.loads(text)) if (text := answer.read()) else None for answer in answers]
    for _ in range(readers):
        os.wait()
    for file in answers:
        file.close()
    for descriptor in (ready, hold):
        os.close(descriptor)
    done = [part for part in parts if part is not None]
    if len(done) < readers:
        raise ReaderError("a reader failed")
    return Race(max(part.end_s for part in done) - start, done, start - begun)


def _child(number: int, work: Worker, ready: int, hold: int, answer: int) -> None:
    """Work and never return."""
    code, before_s = 1, 0.0

    def go() -> None:
        nonlocal before_s
        os.write(ready, b".")
        os.read(hold, 1)  # at its end once the parent has closed the other side
        before_s = cpu_now_s()

    try:
        part = work(number, go)
        part.end_s = time.monotonic()
        part.cpu_s = cpu_now_s() - before_s
        with os.fdopen(answer, "wb") as file:
            file.write(json.dumps(asdict(part)).encode())
        code = 0
    except BaseException:  # noqa: BLE001  # the process must end here, not in the parent's code
        traceback.print_exc()
    finally:
        os._exit(code)
