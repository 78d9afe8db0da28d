"""One suite that every kind of store passes, the tests' own fake included: a listing, exact ranges, pinned versions.

A new kind of storage adds a class to `Place` here, and a name to `KINDS`.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from amlmount.credentials import Access
from amlmount.dataset import ListedObject, ObjectId
from amlmount.errors import AccessDenied, ObjectChanged, ObjectMissing, StoreError, TransientStoreError
from amlmount.stores import KINDS as STORE_KINDS
from amlmount.stores import ObjectStore, Retrying, list_all, open_store
from tests.fake_store import FakeStore
from tests.servers.azurite import Azurite
from tests.servers.faults import FaultProxy

DATA = random.Random(1).randbytes(300_000)
ODD = [
    "a b.txt",
    "ünï/日本.bin",
    "100%.csv",
    "%41",
    "a%2Fb",
    "a+b&c=d",
    "what?.txt",
    "hash#tag",
    "semi;colon",
    "...",
    "..a",
    "a'b\"c",
    "~tilde",
    "[x]*",
    "a:b",
]


class Place:
    """A store and the way to write to it behind its back. Names are relative to `prefix`."""

    store: ObjectStore
    prefix = ""

    def put(self, name: str, data: bytes) -> None:
        raise NotImplementedError

    def delete(self, name: str) -> None:
        raise NotImplementedError

    def listed(self, below: str = "") -> dict[str, ListedObject]:
        """Return the files below a folder by name."""
        pages = list_all(self.store, self.prefix + below)
        return {o.path.removeprefix(self.prefix): o for page in pages for o in page.objects() if not o.is_dir}

    def pin(self, name: str) -> ObjectId:
        """Return the object as a listing pins it."""
        found = self.listed()[name]
        return ObjectId(found.path, found.tag, found.size)


class LocalPlace(Place):
    def __init__(self, folder: Path) -> None:
        self.store = open_store(Access("local", "file:///"))
        self.prefix = f"{folder}/"
        self._folder = folder
        self._moment = 1_700_000_000_000_000_000

    def put(self, name: str, data: bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self._moment += 1_000_000_000  # the clock of a file system is coarse
        os.utime(path, ns=(self._moment, self._moment))

    def delete(self, name: str) -> None:
        (self._folder / name).unlink()


class BlobPlace(Place):
    def __init__(self, azurite: Azurite, container: str, access: Access) -> None:
        self.store = open_store(access)
        self._azurite = azurite
        self._container = container

    def put(self, name: str, data: bytes) -> None:
        self._azurite.upload(self._container, name, data)

    def delete(self, name: str) -> None:
        self._azurite.delete(self._container, name)


class FakePlace(Place):
    def __init__(self, fake: FakeStore, *, retrying: bool) -> None:
        self.store = Retrying(fake, patience_s=5) if retrying else fake
        self._fake = fake

    def put(self, name: str, data: bytes) -> None:
        self._fake.put(name, data)

    def delete(self, name: str) -> None:
        self._fake.delete(name)


KINDS = ["local", "fake", "fake-retrying"]
BLOB = ["blob-key", "blob-sas", "blob-account-sas", "blob-anonymous", "blob-proxied"]


def _blob_access(kind: str, azurite: Azurite, url: str, container: str) -> Access:
    if kind == "blob-anonymous":
        return Access("blob", url, azurite.account, "anonymous")
    if kind == "blob-sas":
        return Access("blob", url, azurite.account, "sas", azurite.container_sas(container))
    if kind == "blob-account-sas":
        return Access("blob", url, azurite.account, "sas", azurite.account_sas())
    return Access("blob", url, azurite.account, "key", azurite.key)


@pytest.fixture(params=[*KINDS, *(pytest.param(kind, marks=pytest.mark.azurite) for kind in BLOB)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    kind = request.param
    found: Place
    if kind == "local":
        found = LocalPlace(tmp_path)
    elif kind.startswith("fake"):
        found = FakePlace(FakeStore(), retrying=kind == "fake-retrying")
    else:
        azurite: Azurite = request.getfixturevalue("azurite")
        fixture = "public_container" if kind == "blob-anonymous" else "container"
        container: str = request.getfixturevalue(fixture)
        url = azurite.container_url(container)
        if kind == "blob-proxied":
            proxy: FaultProxy = request.getfixturevalue("faults")
            url = f"{proxy.url}/{container}"
        found = BlobPlace(azurite, container, _blob_access(kind, azurite, url, container))
    yield found
    found.store.close()


def test_every_kind_of_store_is_in_the_suite() -> None:
    tested = {name.partition("-")[0] for name in [*KINDS, *BLOB]}
    assert set(STORE_KINDS) | {"fake"} == tested


def test_a_listing_has_every_object_with_its_facts(place: Place) -> None:
    begin = time.time_ns()
    wanted = {f"d{n % 3}/f{n}.bin": DATA[: n * 1000] for n in range(8)}
    for name, data in wanted.items():
        place.put(name, data)
    listed = place.listed()
    assert {name: found.size for name, found in listed.items()} == {n: len(d) for n, d in wanted.items()}
    assert len({found.tag for found in listed.values()}) == 8
    for name, found in listed.items():
        assert found.tag
        assert '"' not in found.tag
        assert "\0" not in found.tag
        assert 1_600_000_000 * 10**9 < found.mtime_ns < begin + 3600 * 10**9
        assert found.md5 in ("", hashlib.md5(wanted[name]).hexdigest())


def test_a_listing_below_a_prefix(place: Place) -> None:
    for name in ("a/x", "a/b/y", "ab/z", "c"):
        place.put(name, b"1")
    assert set(place.listed("a/")) == {"a/x", "a/b/y"}
    assert set(place.listed("a/b/")) == {"a/b/y"}


def test_head_says_what_the_listing_says(place: Place) -> None:
    place.put("a/x", b"12345")
    listed = place.listed()["a/x"]
    found = place.store.head(place.prefix + "a/x")
    assert found is not None
    assert found[:4] == listed[:4]
    assert not found.is_dir
    assert place.store.head(place.prefix + "a/nope") is None
    assert place.store.head(place.prefix + "a/x/y") is None


def test_ranges_are_exact(place: Place) -> None:
    place.put("data", DATA)
    pinned = place.pin("data")
    size = len(DATA)
    rng = random.Random(2)
    ranges = [(0, 1), (0, size), (size - 1, size), (1, size), (0, size - 1)]
    ranges += [tuple(sorted(rng.sample(range(size + 1), 2))) for _ in range(20)]  # type: ignore[misc]
    for start, stop in ranges:
        for attempt in (0, 1):
            data = place.store.read(pinned, start, stop, attempt)
            assert isinstance(data, memoryview)
            assert data == DATA[start:stop]


def test_reads_from_many_threads_at_once(place: Place) -> None:
    for number in range(4):
        place.put(f"f{number}", DATA[number:])
    pinned = [place.pin(f"f{number}") for number in range(4)]

    def one(number: int) -> bool:
        which, start = number % 4, number * 1000
        return (
            place.store.read(pinned[which], start, start + 5000) == DATA[which + start : which + start + 5000]
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(100)))


@pytest.mark.parametrize("attempt", [0, 1])
def test_an_overwritten_object_is_changed(place: Place, attempt: int) -> None:
    place.put("a", DATA)
    pinned = place.pin("a")
    place.put("a", DATA[::-1])
    with pytest.raises(ObjectChanged) as caught:
        place.store.read(pinned, 0, 100, attempt)
    assert "a" in str(caught.value)
    assert caught.value.hint
    assert place.store.read(place.pin("a"), 0, 100) == DATA[::-1][:100]


@pytest.mark.parametrize("attempt", [0, 1])
def test_a_deleted_object_is_missing(place: Place, attempt: int) -> None:
    place.put("a", DATA)
    place.put("b", DATA)
    pinned = place.pin("a")
    place.delete("a")
    with pytest.raises(ObjectMissing):
        place.store.read(pinned, 0, 100, attempt)
    assert set(place.listed()) == {"b"}


def test_odd_names_are_listed_and_read(place: Place) -> None:
    for name in ODD:
        place.put(name, name.encode())
    listed = place.listed()
    assert set(listed) == set(ODD)
    for name in ODD:
        raw = name.encode()
        assert place.store.read(place.pin(name), 0, len(raw)) == raw
        found = place.store.head(place.prefix + name)
        assert found is not None
        assert found.tag == listed[name].tag


def test_an_identity_is_stable_and_holds_no_secret(place: Place, azurite: Azurite) -> None:
    identity = place.store.identity
    assert identity == place.store.identity != ""
    assert azurite.key not in identity
    assert "sig=" not in identity


def test_an_empty_place_lists_nothing(place: Place) -> None:
    assert place.listed() == {}


def test_many_pages(place: Place) -> None:
    # More than one page of each kind is in test_blob_faults (5,000 a page) and below; here pages must add up.
    for number in range(11):
        place.put(f"n{number:02}", b"x" * number)
    assert sorted(place.listed()) == [f"n{number:02}" for number in range(11)]


# Local files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def local() -> ObjectStore:
    return open_store(Access("local", "file:///"))


def everything(store: ObjectStore, folder: Path) -> tuple[dict[str, ListedObject], dict[str, str]]:
    found: dict[str, ListedObject] = {}
    refused: dict[str, str] = {}
    for page in list_all(store, f"{folder}/"):
        found |= {o.path.removeprefix(f"{folder}/"): o for o in page.objects()}
        refused |= {path.removeprefix(f"{folder}/"): reason for path, reason in page.unlisted()}
    return found, refused


def test_local_links_folders_and_special_files(local: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "d/e").mkdir(parents=True)
    (tmp_path / "d/f").write_bytes(b"12")
    (tmp_path / "link").symlink_to("d/f")
    (tmp_path / "to_folder").symlink_to("d")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    found, refused = everything(local, tmp_path)
    assert set(found) == {"d", "d/e", "d/f", "link"}
    assert {name for name, o in found.items() if o.is_dir} == {"d", "d/e"}
    assert bytes(local.read(ObjectId(found["link"].path, found["link"].tag, 2), 0, 2)) == b"12"
    assert {name: reason.split()[1] for name, reason in refused.items()} == {
        "to_folder": "a",
        "loop": "a",
        "broken": "a",
        "pipe": "a",
    }
    assert "special" in refused["pipe"]
    assert "broken" in refused["broken"]


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\nb", b"a\\b", b"x" * 255])
def test_local_names_that_no_blob_has(local: ObjectStore, tmp_path: Path, name: bytes) -> None:
    with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
        file.write(b"odd")
    found, _ = everything(local, tmp_path)
    (only,) = found.values()
    assert os.fsencode(only.path).endswith(b"/" + name)
    assert bytes(local.read(ObjectId(only.path, only.tag, 3), 0, 3)) == b"odd"


def test_local_listings_come_in_pages(local: ObjectStore, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        for inner in range(2500):
            (tmp_path / str(number) / str(inner)).touch()
    pages = [len(page.objects()) for page in list_all(local, f"{tmp_path}/")]
    assert len(pages) > 1
    assert sum(pages) == 7503


@pytest.mark.parametrize("what", ["folder", "pipe", "longer", "shorter", "same size"])
def test_a_local_file_replaced_by_something_else_has_changed(
    local: ObjectStore, tmp_path: Path, what: str
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"12345")
    found = local.head(str(path))
    assert found is not None
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes({"longer": b"123456", "shorter": b"1", "same size": b"54321"}[what])
        os.utime(path, ns=(1, found.mtime_ns + (what == "same size")))
    with pytest.raises(ObjectChanged):
        local.read(ObjectId(str(path), found.tag, 5), 0, 5)


def test_a_local_file_cut_off_while_it_is_read_gives_no_short_read(
    local: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"12345")
    found = local.head(str(path))
    assert found is not None
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        path.write_bytes(b"1")
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(StoreError):
        local.read(ObjectId(str(path), found.tag, 5), 0, 5)


def test_a_local_file_that_may_not_be_read_is_denied(local: ObjectStore, tmp_path: Path) -> None:
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "f").write_bytes(b"12345")
    found = local.head(str(folder / "f"))
    assert found is not None
    (folder / "f").chmod(0)
    folder.chmod(0o711 if os.geteuid() == 0 else 0o311)
    for parent in tmp_path.parents[:-2]:
        if os.geteuid() == 0 and parent.stat().st_uid == 0 and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o011)
    tmp_path.chmod(0o711)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(AccessDenied) as caught:
            local.read(ObjectId(str(folder / "f"), found.tag, 5), 0, 5)
        with pytest.raises(AccessDenied):
            list(list_all(local, f"{folder}/"))
    finally:
        os.seteuid(me)
        folder.chmod(0o700)
    assert str(folder / "f") in str(caught.value)
    assert caught.value.hint


def test_a_local_folder_that_is_not_there(local: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(ObjectMissing):
        list(list_all(local, f"{tmp_path}/nowhere/"))


def test_other_local_failures_are_worth_another_attempt(
    local: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    found = local.head(str(tmp_path / "f"))
    assert found is not None

    def pread(fd: int, length: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(TransientStoreError, match="Input/output error"):
        local.read(ObjectId(found.path, found.tag, 5), 0, 5)
