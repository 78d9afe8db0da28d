"""References, names and records."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlmount.dataset import DatasetRef, Datastore, MountSpec, Source, check_name, printable, text, utf8
from amlmount.errors import UsageError


@pytest.mark.parametrize(
    ("written", "name", "version"),
    [
        ("weather", "weather", None),
        ("weather@latest", "weather", None),
        ("weather:2", "weather", 2),
        ("azureml:weather:2", "weather", 2),
        ("azureml:weather@latest", "weather", None),
        ("azureml:weather", "weather", None),
        ("a.b_c-d:10", "a.b_c-d", 10),
    ],
)
def test_refs(written: str, name: str, version: int | None) -> None:
    assert DatasetRef.parse(written) == DatasetRef(name, version)


@pytest.mark.parametrize(
    "written",
    [
        "",
        ":2",
        "a:",
        "a:0",
        "a:-1",
        "a:x",
        "a:1.5",
        "a:٣",
        "a@newest",
        "a@",
        "a:1:2",
        "a b",
        "../a",
        ".a",
        "a\n",
        "é",
    ],
)
def test_refs_that_are_none(written: str) -> None:
    with pytest.raises(UsageError):
        DatasetRef.parse(written)


names = st.builds("{}{}".format, st.sampled_from("aZ0"), st.text("abcXYZ019_.-", max_size=30))


@given(names, st.one_of(st.none(), st.integers(1, 1 << 60)))
def test_a_ref_is_what_it_prints(name: str, version: int | None) -> None:
    ref = DatasetRef(name, version)
    assert DatasetRef.parse(str(ref)) == ref
    assert DatasetRef.parse(f"azureml:{ref}") == ref


@given(st.text(max_size=300))
def test_a_name_that_passes_is_safe_as_a_file_name(name: str) -> None:
    try:
        check_name(name, "dataset")
    except UsageError:
        assert "/" in name or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) or len(name) > 255
        return
    assert 0 < len(name) <= 255
    assert name.isascii()
    assert not set(name) & set("/\0 \n\\:@")
    assert name[0] != "."


@given(st.binary(max_size=50))
def test_bytes_of_names_survive_the_way_through_text(raw: bytes) -> None:
    assert utf8(text(raw)) == raw


@given(st.one_of(st.text(max_size=50), st.binary(max_size=50)))
def test_printable_names_are_one_harmless_line(name: str | bytes) -> None:
    shown = printable(name)
    assert shown.isprintable()
    shown.encode("utf-8")


def test_printable_leaves_what_is_printable() -> None:
    assert printable("año/日本 x") == "año/日本 x"
    assert printable("a\nb\x1b[31m") == "a\\nb\\x1b[31m"
    assert printable(b"\xff") == "\\udcff"


def test_the_url_of_a_datastore() -> None:
    assert Datastore(name="d", account="a", container="c").url() == "https://a.blob.core.windows.net/c"
    emulated = Datastore(name="d", account="a", container="c", endpoint="http://127.0.0.1:1/a/")
    assert emulated.url() == "http://127.0.0.1:1/a/c"


def test_records_are_their_json() -> None:
    spec = MountSpec(ref="a:1", path="/m", manifest="/x", digest="0", uid=1, gid=2)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=MountSpec) == spec
    source = Source(kind="blob", url="https://h/c", base="b/", uri="u", datastore="d")
    assert msgspec.json.decode(msgspec.json.encode(source), type=Source) == source
