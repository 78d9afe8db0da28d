"""What a user writes for a place in storage: every documented form, every refusal, and the glob patterns."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amlmount.dataset import Datastore
from amlmount.errors import DatastoreNotFound, UriError
from amlmount.uri import compile_pattern, literal_prefix, looks_like_uri, parse, pattern_base

EMULATED = Datastore(name="emu", account="acc", container="box", endpoint="http://127.0.0.1:10000/acc")
NAMED = Datastore(name="corp", account="acc", container="box", endpoint="https://blob.corp.example/acc")
CLOUD = Datastore(name="cloud", account="weather", container="data")
STORES = (EMULATED, NAMED, CLOUD)
AZURE = "https://weather.blob.core.windows.net/data"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("/a/b", "/a/b"),
        ("/a/b/", "/a/b/"),
        ("/", "/"),
        ("rel", "/home/u/rel"),
        ("./rel/", "/home/u/rel/"),
        ("../x", "/home/x"),
        ("..", "/home"),
        (".", "/home/u/"),
        ("/a//b/./c/../d", "/a/b/d"),
        ("/../../a", "/a"),
        ("file:///a/b%20c", "/a/b c"),
        ("file:/a", "/a"),
        ("FILE:///a", "/a"),
        ("/a%20b", "/a%20b"),
        ("/a?b#c", "/a?b#c"),
        ("dir/a:b", "/home/u/dir/a:b"),
        ("/data/*.csv", "/data/*.csv"),
    ],
)
def test_local_paths(uri: str, path: str) -> None:
    location = parse(uri, cwd="/home/u")
    assert location[:3] == ("local", "file:///", path)
    assert location.uri == uri


@pytest.mark.parametrize(
    ("uri", "url", "path", "datastore"),
    [
        (f"{AZURE}/a/b.csv", AZURE, "a/b.csv", "cloud"),
        (f"{AZURE}/", AZURE, "", "cloud"),
        (AZURE, AZURE, "", "cloud"),
        ("https://other.blob.core.windows.net/data/a", "https://other.blob.core.windows.net/data", "a", ""),
        ("https://Weather.Blob.core.windows.net/data/A", AZURE, "A", "cloud"),
        ("https://x.blob.core.chinacloudapi.cn/c/p", "https://x.blob.core.chinacloudapi.cn/c", "p", ""),
        (f"{AZURE}/a%20b/%C3%BC", AZURE, "a b/ü", "cloud"),
        (f"{AZURE}/100%25.csv", AZURE, "100%.csv", "cloud"),
        ("wasbs://data@weather.blob.core.windows.net/a/b", AZURE, "a/b", "cloud"),
        ("wasbs://data@weather/a/b", AZURE, "a/b", "cloud"),
        ("wasbs://data@weather", AZURE, "", "cloud"),
        ("wasb://c@h.blob.core.windows.net/p", "http://h.blob.core.windows.net/c", "p", ""),
        ("http://127.0.0.1:10000/acc/box/a/b", "http://127.0.0.1:10000/acc/box", "a/b", "emu"),
        ("http://localhost:1/acc/box", "http://localhost:1/acc/box", "", ""),
        ("http://[::1]:1/acc/box/x", "http://[::1]:1/acc/box", "x", ""),
        ("https://blob.corp.example/acc/box/a", "https://blob.corp.example/acc/box", "a", "corp"),
        ("azureml://datastores/emu/paths/a/b", "http://127.0.0.1:10000/acc/box", "a/b", "emu"),
        ("azureml://datastores/emu/paths/", "http://127.0.0.1:10000/acc/box", "", "emu"),
        ("azureml://datastores/emu", "http://127.0.0.1:10000/acc/box", "", "emu"),
        ("azureml://datastores/cloud/paths/x/**/*.csv", AZURE, "x/**/*.csv", "cloud"),
    ],
)
def test_blob_uris(uri: str, url: str, path: str, datastore: str) -> None:
    location = parse(uri, cwd="/", datastores=STORES)
    assert location == ("blob", url, path, uri, datastore)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "a\0b",
        "s3://bucket/key",
        "gs://bucket/key",
        "ftp://host/x",
        "azureml:weather:1",
        "azureml://jobs/1",
        "azureml://datastores/",
        "azureml://datastores/emu/files/x",
        "https://",
        "https:///container/x",
        "https://example.com/container/x",
        "https://weather.blob.core.windows.net",
        "https://weather.blob.core.windows.net/",
        "https://user:pass@weather.blob.core.windows.net/c/x",
        "http://127.0.0.1:10000/acc",
        "http://127.0.0.1:10000/acc/",
        "wasbs://weather.blob.core.windows.net/x",
        "wasbs://data@/x",
        "wasbs://@host/x",
    ],
)
def test_what_is_refused_says_what_would_do(uri: str) -> None:
    with pytest.raises(UriError) as caught:
        parse(uri, cwd="/", datastores=STORES)
    assert caught.value.hint
    assert "\n" not in caught.value.line()


def test_an_unknown_datastore() -> None:
    with pytest.raises(DatastoreNotFound, match="nowhere"):
        parse("azureml://datastores/nowhere/paths/x", cwd="/", datastores=STORES)


@pytest.mark.parametrize(
    "query",
    [
        "sv=2023&sig=CANARYCANARY",
        "sig=CANARYCANARY",
        "x=1&SIG=CANARYCANARY",
        "se=CANARYCANARY",
        "skoid=CANARYCANARY",
    ],
)
@pytest.mark.parametrize("base", [AZURE + "/a.csv", "wasbs://data@weather/x", "/local/path", "odd://x"])
def test_a_secret_is_refused_and_not_repeated(base: str, query: str) -> None:
    with pytest.raises(UriError) as caught:
        parse(f"{base}?{query}", cwd="/")
    assert "CANARY" not in caught.value.line()
    assert "stdin" in caught.value.hint


@settings(max_examples=300)
@given(
    st.text(max_size=30) | st.text("ab:/@.?%*[]~", max_size=30),
    st.sampled_from(["", "https://", "azureml://", "wasbs://", "file://"]),
)
def test_parse_never_fails_in_another_way(uri: str, scheme: str) -> None:
    try:
        location = parse(scheme + uri, cwd="/w", datastores=STORES)
    except (UriError, DatastoreNotFound):
        return
    assert location.kind in ("local", "blob")
    assert not location.url.endswith("/") or location.url == "file:///"
    if location.kind == "local":
        assert location.path.startswith("/")
        assert not {"..", "."} & set(location.path.split("/"))


@pytest.mark.parametrize(
    ("text", "is_uri"),
    [
        ("weather", False),
        ("weather:2", False),
        ("weather@latest", False),
        ("azureml:weather:2", False),
        ("azureml://datastores/d/paths/x", True),
        ("./weather", True),
        ("weather/", True),
        (".", True),
        ("..", True),
        ("/data", True),
        ("https://a.blob.core.windows.net/c", True),
    ],
)
def test_a_ref_is_a_name_or_a_place(text: str, is_uri: bool) -> None:
    assert looks_like_uri(text) is is_uri


# Patterns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "matches", "differs"),
    [
        ("*.csv", ["a.csv", ".csv", "é.csv"], ["a.csv2", "d/a.csv", "acsv"]),
        ("d/*", ["d/a", "d/", "d/.a"], ["d/a/b", "d"]),
        ("a?c", ["abc", "a\nc", "a日c"], ["ac", "a/c", "abbc"]),
        ("**/x", ["x", "a/x", "a/b/x"], ["ax", "a/bx", "x/"]),
        ("a/**/x", ["a/x", "a/b/x", "a/b/c/x"], ["ax", "a/bx", "x"]),
        ("a/**", ["a/", "a/b", "a/b/c"], ["a", "ab"]),
        ("**", ["", "a", "a/b"], []),
        ("a**b", ["ab", "axxb"], ["a/b"]),
        ("**a", ["a", "ba"], ["x/a"]),
        ("[ab]x", ["ax", "bx"], ["cx", "x", "abx"]),
        ("[a-c]", ["a", "b", "c"], ["d", "-", "A"]),
        ("[!a-c]", ["d", "-"], ["a", "/", ""]),
        ("[]]", ["]"], ["["]),
        ("[!]]", ["a"], ["]"]),
        ("[[]", ["["], ["]"]),
        ("[*]?", ["*x"], ["xx", "*"]),
        ("[a-]", ["a", "-"], ["b"]),
        ("[^a]", ["^", "a"], ["b"]),
        ("a.b+(c)", ["a.b+(c)"], ["axb+(c)", "a.bb(c)"]),
        ("[a/]b", ["ab"], ["/b"]),
        ("[a--]", [], ["a"]),
        ("[+--]", ["+", ",", "-"], ["."]),
        ("[&&]", ["&"], ["a"]),
        ("[\\d]", ["\\", "d"], ["1"]),
    ],
)
def test_patterns(pattern: str, matches: list[str], differs: list[str]) -> None:
    try:
        compiled = compile_pattern(pattern)
    except UriError:
        assert not matches
        return
    assert [m for m in matches if not compiled.fullmatch(m)] == []
    assert [d for d in differs if compiled.fullmatch(d)] == []


@pytest.mark.parametrize("pattern", ["[", "a[b", "[]", "[!]", "x[!", "[z-a]"])
def test_a_set_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(UriError, match=r"pattern|closed"):
        compile_pattern(pattern)


def _segment_matches(pattern: str, text: str) -> bool:
    """Match one segment the slow and obvious way: a set, a '?', a '*' or a character at a time."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(_segment_matches(pattern[1:], text[n:]) for n in range(len(text) + 1))
    if not text:
        return False
    if pattern[0] == "?":
        return _segment_matches(pattern[1:], text[1:])
    if pattern[0] == "[":
        negated = pattern[1] == "!"
        end = pattern.index("]", 2 + negated)
        members = pattern[1 + negated : end]
        return (text[0] in members) != negated and _segment_matches(pattern[end + 1 :], text[1:])
    return text[0] == pattern[0] and _segment_matches(pattern[1:], text[1:])


def _matches(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        if len(pattern) == 1:
            return bool(path)
        return any(_matches(pattern[1:], path[n:]) for n in range(len(path) + 1))
    return bool(path) and _segment_matches(pattern[0], path[0]) and _matches(pattern[1:], path[1:])


pieces = st.sampled_from(["a", "b", ".", "*", "?", "[ab]", "[!a]", "[b.+]"])
segment_patterns = st.lists(pieces, min_size=1, max_size=4).map("".join).filter(lambda s: "**" not in s)
glob_patterns = st.lists(st.just("**") | segment_patterns, min_size=1, max_size=4).filter(
    lambda parts: not any(a == b == "**" for a, b in itertools.pairwise(parts))
)
some_paths = st.lists(st.text("ab.+", min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=500)
@given(glob_patterns, some_paths)
def test_a_pattern_matches_what_its_segments_match(parts: list[str], path: list[str]) -> None:
    found = compile_pattern("/".join(parts)).fullmatch("/".join(path)) is not None
    assert found == _matches(parts, path)


@given(st.text(max_size=20))
def test_any_text_is_a_pattern_or_refused(pattern: str) -> None:
    try:
        compiled = compile_pattern(pattern)
    except UriError:
        assert "[" in pattern
        return
    if not set(pattern) & set("*?["):
        assert compiled.fullmatch(pattern)
        assert literal_prefix(pattern) == pattern


@given(st.text("ab/*?[]!-\\&~|^.", max_size=12))
def test_sets_of_odd_characters_raise_nothing_else(body: str) -> None:
    try:
        compile_pattern(f"[{body}]")
    except UriError:
        return
    # A set never matches a slash: `[!a]` stays within a segment as `?` does.
    first = re.match(r"\[!?\]?[^\]]*\]\Z", f"[{body}]")
    if first is not None:
        assert not compile_pattern(f"[{body}]").fullmatch("/")


@pytest.mark.parametrize(
    ("pattern", "base", "prefix"),
    [
        ("a/b/*.csv", "a/b/", "a/b/"),
        ("a/b*/c", "a/", "a/b"),
        ("*.csv", "", ""),
        ("a/b", "a/", "a/b"),
        ("a/**", "a/", "a/"),
        ("x[1]/y", "", "x"),
        ("/data/?", "/data/", "/data/"),
    ],
)
def test_where_a_pattern_begins(pattern: str, base: str, prefix: str) -> None:
    assert pattern_base(pattern) == base
    assert literal_prefix(pattern) == prefix
    assert prefix.startswith(base)
