"""`amlmount prefetch`, as scripts see it, against a session that listens; see test_torch for a mount that follows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from amlmount import channel
from tests.manifests import file, folder
from tests.stand_in import StandIn

PATHS = ["a.csv", "b/7", "b/c/d", "z"]


@pytest.fixture
def session(tmp_path: Path) -> StandIn:
    (tmp_path / "data").mkdir()
    return StandIn(tmp_path, str(tmp_path / "data"), [*map(file, PATHS), file(b"b/\xff\n"), folder("e")])


@pytest.fixture
def listening(session: StandIn) -> Iterator[StandIn]:
    with session.listening():
        yield session


def prefetch(
    session: StandIn, *args: str, stdin: bytes = b"", code: int = 0, path: str = "", cwd: Path | None = None
) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "amlmount", "prefetch", path or session.path, *args],
        input=stdin,
        capture_output=True,
        env={**os.environ, "AMLMOUNT_HOME": str(session.run.parent)},
        cwd=cwd or session.run,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, out + err
    assert "Traceback" not in err
    return out if code == 0 else err


def test_paths_in_a_file_are_declared_in_their_order(listening: StandIn, tmp_path: Path) -> None:
    (tmp_path / "order").write_text(f"z\n./b/7\n\n{listening.path}/a.csv\nz\n")
    said = prefetch(listening, "--order", str(tmp_path / "order"))
    assert said == f"data:1 on {listening.path}: 4 files declared; 1 order to be read\n"
    assert listening.paths() == ["z", "b/7", "a.csv", "z"]
    assert listening.questions == [{"ask": "prefetch", "reader": "", "bytes": 16}]


def test_names_from_standard_input_end_with_a_nul_where_asked(listening: StandIn) -> None:
    prefetch(listening, "--order", "-", "-0", stdin=b"b/\xff\n\0a.csv\0")
    assert listening.paths() == ["b/\udcff\n", "a.csv"]


def test_numbers_are_those_of_the_list_of_files(listening: StandIn) -> None:
    prefetch(listening, "--order", "-", stdin=b"4\n0\n1\n")
    assert listening.paths() == ["z", "a.csv", "b/7"]


def test_without_an_order_it_is_the_list_of_files(listening: StandIn) -> None:
    listening.answer = {"queued": 3}
    assert "5 files declared; 3 orders" in prefetch(listening)
    assert listening.paths() == ["a.csv", "b/7", "b/c/d", "b/\udcff\n", "z"]


def test_replace_starts_anew(listening: StandIn) -> None:
    prefetch(listening, "--replace")
    assert listening.questions[0]["keep"] == 0


def test_a_mount_point_may_be_written_in_other_ways(listening: StandIn, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    through = str(tmp_path / "link" / "data")
    prefetch(listening, "--order", "-", path=through, stdin=f"{through}/z\n{listening.path}/a.csv\n".encode())
    assert listening.paths() == ["z", "a.csv"]
    prefetch(listening, "--order", "-", path="data", cwd=tmp_path, stdin=b"z")
    assert listening.paths() == ["z"]


def test_learned_is_the_sessions_affair_and_a_file_of_that_name_is_not(
    listening: StandIn, tmp_path: Path
) -> None:
    listening.answer = {"queued": 0, "files": 12345}
    assert "recorded" in prefetch(listening, "--order", "learned", cwd=tmp_path)
    assert listening.questions == [{"ask": "prefetch", "order": "learned"}]
    (tmp_path / "learned").write_text("z")
    prefetch(listening, "--order", "./learned", cwd=tmp_path)
    assert listening.paths() == ["z"]


def test_unknown_names_are_an_error_or_left_out(listening: StandIn) -> None:
    names = b"z\nnope\nb\ne\n"
    said = prefetch(listening, "--order", "-", stdin=names, code=2)
    assert "'nope' is no file" in said
    assert "2 more" in said
    assert "--skip-unknown" in said
    assert listening.orders == []
    prefetch(listening, "--order", "-", "--skip-unknown", stdin=names)
    assert listening.paths() == ["z"]
    assert "is no file" in prefetch(listening, "--order", "-", stdin=b"5\n", code=2)


def test_no_order_at_all(listening: StandIn, tmp_path: Path) -> None:
    assert "no files" in prefetch(listening, "--order", "-", code=2)
    assert "no files" in prefetch(listening, "--order", "-", "--skip-unknown", stdin=b"nope", code=2)
    assert "cannot read" in prefetch(listening, "--order", str(tmp_path / "nowhere"), code=2)
    assert listening.orders == []


def test_what_the_session_refuses_keeps_its_exit_code(listening: StandIn) -> None:
    listening.answer = {"error": "too many orders", "hint": "--replace", "exit_code": 2}
    assert prefetch(listening, code=2) == "amlmount: too many orders (--replace)\n"


def test_not_mounted(session: StandIn, tmp_path: Path) -> None:
    assert "nothing mounted" in prefetch(session, code=33)
    session.publish()
    assert "does not answer" in prefetch(session, code=36)
    channel.remove_record(session.run, session.path)


def test_a_list_of_files_that_is_no_longer_what_is_mounted(listening: StandIn) -> None:
    other = StandIn(listening.run.parent, listening.path, [file("other")])
    other.manifest.rename(listening.manifest)
    assert "no longer" in prefetch(listening, code=15)
