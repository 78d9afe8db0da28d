"""The session's socket: questions with and without a body, and clients that do not keep to the form."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from amlmount import channel
from amlmount.errors import UsageError

MOUNT = "/somewhere"


def echo(question: dict[str, Any], body: bytes) -> dict[str, Any]:
    if question.get("ask") == "trouble":
        raise KeyError("a bug")
    return {"question": question, "length": len(body), "sum": sum(body)}


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Path]:
    """The run folder of a session that says what it was asked."""
    async with trio.open_nursery() as nursery:
        await nursery.start(channel.serve, tmp_path, MOUNT, echo)
        yield tmp_path
        nursery.cancel_scope.cancel()


async def ask(run: Path, question: dict[str, Any], body: bytes = b"") -> dict[str, Any] | None:
    return await trio.to_thread.run_sync(channel.ask, run, MOUNT, question, body)


def raw(run: Path, *pieces: bytes) -> bytes:
    """Send bytes, one piece at a time, and return the answer; empty where there is none."""
    with socket.socket(socket.AF_UNIX) as client, channel._address(run, MOUNT) as address:
        client.settimeout(5)
        client.connect(address)
        for piece in pieces:
            client.sendall(piece)
        client.shutdown(socket.SHUT_WR)
        return client.recv(1 << 20)


async def test_a_question_without_a_body(run: Path) -> None:
    assert await ask(run, {"ask": "status"}) == {"question": {"ask": "status"}, "length": 0, "sum": 0}


@pytest.mark.parametrize("size", [1, 4096, 5_000_000])
async def test_a_question_with_a_body(run: Path, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"\n" * (size % 256)
    said = await ask(run, {"ask": "prefetch"}, body)
    assert said == {"question": {"ask": "prefetch", "bytes": size}, "length": size, "sum": sum(body)}


async def test_line_and_body_may_come_in_any_pieces(run: Path) -> None:
    whole = b'{"bytes": 6}\nab\ncd\n'
    for cut in range(len(whole)):
        said = await trio.to_thread.run_sync(raw, run, whole[:cut], whole[cut:])
        assert b'"length": 6' in said


@pytest.mark.parametrize(
    "wrong",
    [
        b"", b"{}", b"[1]\n", b"nonsense\n", b'{"bytes": 3}\nab', b'{"bytes": 3}\nabcd', b'{"bytes": -1}\n',
        b'{"bytes": "3"}\nabc', b'{"bytes": 1e9}\n', b'{"bytes": %d}\n' % (channel.MAX_BODY + 1),
        b" " * (channel.MAX_QUESTION + 1),
    ],
)  # fmt: skip
async def test_what_is_no_question_gets_no_answer_and_ends_nothing(run: Path, wrong: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel, "_PIECE_TIMEOUT_S", 1)
        with suppress(OSError):  # it may be refused before all is sent
            assert await trio.to_thread.run_sync(raw, run, wrong) == b""
    assert await ask(run, {"ask": "again"}) is not None


async def test_an_answer_that_fails_says_so_and_ends_nothing(run: Path) -> None:
    assert await ask(run, {"ask": "trouble"}) == {"error": "unexpected KeyError: 'a bug'"}
    assert await ask(run, {"ask": "again"}) is not None


async def test_a_client_that_stops_sending_does_not_hold_up_others(run: Path) -> None:
    async with trio.open_nursery() as nursery:
        silent = trio.socket.socket(trio.socket.AF_UNIX)
        with channel._address(run, MOUNT) as address:
            await silent.connect(address)
        await silent.send(b'{"bytes": 1000}\nabc')
        assert await ask(run, {"ask": "status"}) is not None
        silent.close()
        nursery.cancel_scope.cancel()


async def test_a_body_that_no_session_takes_is_not_sent(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_BODY", 1000)
    with pytest.raises(UsageError, match="1,001"):
        channel.ask(run, MOUNT, {}, bytes(1001))


def test_nobody_answers_where_nobody_is(tmp_path: Path) -> None:
    assert channel.ask(tmp_path, MOUNT, {"ask": "status"}, b"123") is None
