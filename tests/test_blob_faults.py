"""Blob storage that misbehaves: which error each fault becomes, and that no wrong byte is taken for a right one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlmount.credentials import Access
from amlmount.dataset import ManifestEntry, ObjectId, Source
from amlmount.errors import (
    AccessDenied,
    FreezeError,
    ObjectChanged,
    ObjectMissing,
    StoreError,
    StoreUnreachable,
    Throttled,
    TransientStoreError,
)
from amlmount.freeze import Drift, compare, freeze, freeze_again
from amlmount.manifest import Manifest
from amlmount.metrics import Counters
from amlmount.stores import ObjectStore, Retrying, blob_rest, list_all, open_store
from amlmount.stores.blob_rest import ListPage, http_time_ns
from amlmount.uri import parse
from tests.servers.azurite import Azurite
from tests.servers.faults import (
    Action,
    EditHeaders,
    FaultProxy,
    Garbage,
    IgnoreRange,
    Reset,
    Respond,
    ShortBody,
    Stall,
    Truncate,
    WrongContentRange,
    denied,
    redirect,
    throttled,
    wrong_etag,
)

pytestmark = pytest.mark.azurite

DATA = bytes(i * 7 % 251 for i in range(100_000))
NAME = "dir/data.bin"
STALL_S = 0.25


class Blob:
    """One blob behind the proxy, and a store that reads it with a short-lived patience."""

    def __init__(self, azurite: Azurite, faults: FaultProxy, container: str) -> None:
        self.azurite = azurite
        self.faults = faults
        self.container = container
        self.sas = azurite.container_sas(container)
        self.url = f"{faults.url}/{container}"
        self.pinned = ObjectId(NAME, azurite.upload(container, NAME, DATA), len(DATA))
        self.store = self.open(Access("blob", self.url, azurite.account, "sas", self.sas))

    def open(self, access: Access) -> ObjectStore:
        return open_store(access, stall_timeout_s=STALL_S)

    def read(self, start: int = 1000, stop: int = 51_000, attempt: int = 0) -> bytes:
        return bytes(self.store.read(self.pinned, start, stop, attempt))

    def read_again(self, patience_s: float = 20) -> tuple[bytes, Counters]:
        counters = Counters()
        store = Retrying(self.store, patience_s=patience_s, counters=counters)
        return bytes(store.read(self.pinned, 1000, 51_000)), counters


@pytest.fixture(scope="module")
def proxy(azurite: Azurite) -> Iterator[FaultProxy]:
    with FaultProxy(azurite.url) as made:
        yield made


@pytest.fixture
def blob(azurite: Azurite, proxy: FaultProxy, container: str) -> Iterator[Blob]:
    proxy.forget()
    made = Blob(azurite, proxy, container)
    yield made
    made.store.close()
    proxy.clear()
    proxy.release()


# One fault, one error ------------------------------------------------------------------------------------------

TRANSIENT: dict[str, Action] = {
    "truncated body": Truncate(1000),
    "truncated to nothing": Truncate(0),
    "short body, lying Content-Range": ShortBody(1000),
    "another total": WrongContentRange(total=99),
    "another range": WrongContentRange(shift=1),
    "no Content-Range": EditHeaders({"Content-Range": None}),
    "the whole blob with 200": IgnoreRange(),
    "reset before the answer": Reset(),
    "reset in the body": Reset(1000),
    "stall before the answer": Stall(),
    "stall in the body": Stall(1000),
    "no HTTP": Garbage(),
    "500": Respond(500, code="InternalError"),
    "502": Respond(502),
    "503": throttled(),
    "504": Respond(504),
    "408": Respond(408),
    "429": throttled(status=429),
}


@pytest.mark.parametrize("attempt", [0, 1])
@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_another_attempt_may_mend(blob: Blob, fault: str, attempt: int) -> None:
    blob.faults.push(TRANSIENT[fault], ranged=True)
    begin = time.monotonic()
    with pytest.raises(TransientStoreError) as caught:
        blob.read(attempt=attempt)
    assert time.monotonic() - begin < STALL_S + 5
    assert "sig=" not in str(caught.value)
    assert blob.sas not in repr(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", TRANSIENT)
def test_retries_mend_it_and_give_the_right_bytes(blob: Blob, fault: str) -> None:
    blob.faults.push(TRANSIENT[fault], ranged=True, times=1)
    data, counters = blob.read_again()
    assert data == DATA[1000:51_000]
    assert (counters.requests, counters.retries) == (2, 1)
    # Whatever way it went, it insisted on the pinned version.
    ranged = blob.faults.requests(ranged=True)
    assert [r.if_match for r in ranged] == [f'"{blob.pinned.tag}"'] * 2
    assert [r.range for r in ranged] == ["bytes=1000-50999"] * 2


@pytest.mark.parametrize(
    ("status", "retry_after_s"), [(429, 7), (503, 7), (503, None), (429, 0), (503, 100_000)]
)
def test_throttling_is_told_apart_and_its_time_is_kept(
    blob: Blob, status: int, retry_after_s: int | None
) -> None:
    blob.faults.push(throttled(retry_after_s, status), ranged=True)
    with pytest.raises(Throttled) as caught:
        blob.read(attempt=1)
    assert caught.value.retry_after_s == (None if retry_after_s is None else min(retry_after_s, 300))


def test_a_retry_after_that_is_no_number_is_none(blob: Blob) -> None:
    blob.faults.push(Respond(503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), ranged=True)
    with pytest.raises(Throttled) as caught:
        blob.read(attempt=1)
    assert caught.value.retry_after_s is None


def test_retry_after_is_honoured_end_to_end(blob: Blob) -> None:
    blob.faults.push(throttled(1), ranged=True, times=2)
    begin = time.monotonic()
    data, counters = blob.read_again()
    assert data == DATA[1000:51_000]
    assert time.monotonic() - begin >= 1
    assert counters.throttled == 1  # the first attempt cannot tell


FINAL: list[tuple[str, Action, type[StoreError]]] = [
    ("401", Respond(401, code="InvalidAuthenticationInfo"), AccessDenied),
    ("403", denied(), AccessDenied),
    ("404", Respond(404, code="BlobNotFound"), ObjectMissing),
    ("404 of the container", Respond(404, code="ContainerNotFound"), ObjectMissing),
    ("409 of an archived blob", Respond(409, code="BlobArchived"), StoreError),
    ("400", Respond(400, code="InvalidHeaderValue"), StoreError),
]


@pytest.mark.parametrize(("action", "kind"), [f[1:] for f in FINAL], ids=[f[0] for f in FINAL])
def test_what_another_attempt_cannot_mend(blob: Blob, action: Action, kind: type[StoreError]) -> None:
    blob.faults.push(action, ranged=True)
    with pytest.raises(kind) as caught:
        blob.read_again()
    assert type(caught.value) is kind
    assert NAME in str(caught.value)
    assert "sig=" not in str(caught.value)
    assert blob.faults.count(ranged=True) <= 2


def test_an_archived_blob_says_what_to_do(blob: Blob) -> None:
    blob.faults.push(Respond(409, code="BlobArchived"), ranged=True)
    with pytest.raises(StoreError) as caught:
        blob.read_again()
    assert "archive" in caught.value.hint


@pytest.mark.parametrize("attempt", [0, 1])
def test_another_etag_is_a_changed_object(blob: Blob, attempt: int) -> None:
    blob.faults.push(wrong_etag())  # as of a store that does not know If-Match, for HEAD too
    with pytest.raises(ObjectChanged):
        blob.read(attempt=attempt)


@pytest.mark.parametrize("attempt", [0, 1])
@pytest.mark.parametrize("status", [412, 416])
def test_a_failed_if_match_is_looked_into(blob: Blob, status: int, attempt: int) -> None:
    rule = blob.faults.push(Respond(status, code="ConditionNotMet"), ranged=True)
    with pytest.raises(TransientStoreError):  # the blob has the very tag that was asked for
        blob.read(attempt=attempt)
    blob.azurite.upload(blob.container, NAME, DATA)
    with pytest.raises((ObjectChanged, TransientStoreError)) as caught:
        blob.read(attempt=attempt)
    assert type(caught.value) is ObjectChanged or (status, attempt) == (416, 0)
    blob.azurite.delete(blob.container, NAME)
    with pytest.raises((ObjectMissing, TransientStoreError)) as gone:
        blob.read(attempt=attempt)
    assert type(gone.value) is ObjectMissing or (status, attempt) == (416, 0)
    assert rule.hits == 3


@pytest.mark.parametrize("attempt", [0, 1])
@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 10 << 30])
def test_a_manifest_that_lies_about_the_size_gives_no_bytes(blob: Blob, size: int, attempt: int) -> None:
    with pytest.raises(StoreError):
        blob.store.read(blob.pinned._replace(size=size), 0, 1000, attempt)
    if size > len(DATA):
        with pytest.raises(StoreError):
            blob.store.read(blob.pinned._replace(size=size), len(DATA) - 5, len(DATA) + 1, attempt)


@pytest.mark.parametrize("attempt", [0, 1])
def test_a_compressed_blob_is_read_as_it_is_stored(blob: Blob, attempt: int) -> None:
    tag = blob.azurite.upload(blob.container, "z", b"\x1f\x8b not really gzip", content_encoding="gzip")
    data = blob.store.read(ObjectId("z", tag, 18), 0, 18, attempt)
    assert bytes(data) == b"\x1f\x8b not really gzip"
    assert {r.headers.get("accept-encoding", "identity") for r in blob.faults.requests(path="z")} == {
        "identity"
    }


def test_a_redirect_takes_no_secret_and_no_bytes_elsewhere(blob: Blob, public_container: str) -> None:
    blob.azurite.upload(public_container, NAME, DATA[::-1])
    with FaultProxy(blob.azurite.url) as elsewhere:
        blob.faults.push(redirect(f"{elsewhere.url}/{public_container}/{NAME}"))
        for credential in ("sas", "key"):
            secret = blob.sas if credential == "sas" else blob.azurite.key
            access = Access("blob", blob.url, blob.azurite.account, credential, secret)
            store = Retrying(blob.open(access), patience_s=5)
            with pytest.raises(StoreError) as caught:
                store.read(blob.pinned, 0, 1000)
            assert not isinstance(caught.value, StoreUnreachable)
            with pytest.raises(StoreError, match="elsewhere"):
                store.list_page("", "")
            with pytest.raises(StoreError, match="elsewhere"):
                store.head(NAME)
        for request in elsewhere.requests():
            assert "authorization" not in request.headers
            assert "sig=" not in request.query


def test_nobody_there(blob: Blob) -> None:
    with FaultProxy(blob.azurite.url) as gone:
        store = blob.open(Access("blob", f"{gone.url}/{blob.container}", "acc", "sas", blob.sas))
    for attempt in (0, 1):
        with pytest.raises(TransientStoreError):
            store.read(blob.pinned, 0, 10, attempt)
    for call in (lambda: store.head(NAME), lambda: store.list_page("", "")):
        with pytest.raises(TransientStoreError, match="refused"):
            call()


def test_patience_with_a_store_that_hangs_has_an_end(blob: Blob) -> None:
    blob.faults.push(Stall())
    begin = time.monotonic()
    with pytest.raises(StoreUnreachable) as caught:
        blob.read_again(patience_s=1)
    assert time.monotonic() - begin < 1 + 2 * STALL_S + 2
    assert NAME in str(caught.value)


def test_a_stall_holds_up_nobody_else(blob: Blob) -> None:
    blob.faults.push(Stall(), ranged=True, times=8)
    results: list[BaseException | bytes] = []

    def one() -> None:
        try:
            results.append(blob.read())
        except TransientStoreError as error:
            results.append(error)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert blob.faults.wait_for(8, ranged=True)
    assert blob.read() == DATA[1000:51_000]
    for thread in threads:
        thread.join()
    assert [type(r) for r in results] == [TransientStoreError] * 8


# Credentials ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["wrong key", "expired SAS", "SAS of another container", "none at all"])
def test_a_credential_that_does_not_open(blob: Blob, public_container: str, what: str) -> None:
    azurite = blob.azurite
    access = {
        "wrong key": Access("blob", blob.url, azurite.account, "key", azurite.wrong_key(), "variable X"),
        "expired SAS": Access(
            "blob", blob.url, azurite.account, "sas", azurite.container_sas(blob.container, valid_s=-60)
        ),
        "SAS of another container": Access(
            "blob", blob.url, azurite.account, "sas", azurite.container_sas(public_container)
        ),
        "none at all": Access("blob", blob.url, azurite.account, "anonymous"),
    }[what]
    store = Retrying(blob.open(access), patience_s=10)
    # Azure does not tell a stranger what is private: Azurite says 404 for a container without public access.
    refused = (AccessDenied, ObjectMissing) if what == "none at all" else AccessDenied
    with pytest.raises(refused) as caught:
        store.read(blob.pinned, 0, 10)
    if what == "wrong key":
        assert "variable X" in str(caught.value)
    with pytest.raises(refused) as listing:
        store.list_page("", "")
    for error in (caught.value, listing.value):
        assert "sig=" not in str(error)
        assert azurite.wrong_key() not in str(error)
        assert error.hint


def test_a_sas_that_may_read_but_not_list(blob: Blob) -> None:
    sas = blob.azurite.container_sas(blob.container, permission="r")
    store = blob.open(Access("blob", blob.url, blob.azurite.account, "sas", sas))
    assert bytes(store.read(blob.pinned, 0, 10)) == DATA[:10]
    with pytest.raises(AccessDenied) as caught:
        store.list_page("", "")
    assert "list" in caught.value.hint


def test_the_account_key_itself_is_never_sent(blob: Blob) -> None:
    access = Access("blob", blob.url, blob.azurite.account, "key", blob.azurite.key)
    store = blob.open(access)
    store.read(blob.pinned, 0, 10, 0)
    store.read(blob.pinned, 0, 10, 1)
    store.head(NAME)
    store.list_page("", "")
    for request in blob.faults.requests():
        assert blob.azurite.key not in request.query + repr(request.headers)
        assert blob.azurite.key.rstrip("=") not in request.query


def test_a_container_that_is_not_there(blob: Blob) -> None:
    url = f"{blob.faults.url}/nowhere"
    store = blob.open(Access("blob", url, blob.azurite.account, "key", blob.azurite.key))
    with pytest.raises(ObjectMissing, match="no such container"):
        store.list_page("", "")


def test_settings_that_cannot_work_are_a_store_error() -> None:
    store = open_store(Access("blob", "http://127.0.0.1:1/acc/box", "acc", "key", "not base64!"))
    with pytest.raises(StoreError):
        store.read(ObjectId("a", "t", 1), 0, 1)


# Listings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (Respond(500), TransientStoreError),
        (throttled(3), Throttled),
        (denied(), AccessDenied),
        (Truncate(200), TransientStoreError),
        (Reset(200), TransientStoreError),
        (Stall(200), TransientStoreError),
        (Stall(), TransientStoreError),
        (Garbage(), TransientStoreError),
        (Respond(200, body=b"<html>a captive portal</html"), StoreError),
        (Respond(200, body=b""), StoreError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_listings_fail_loudly(blob: Blob, action: Action, kind: type[StoreError]) -> None:
    blob.faults.push(action)
    with pytest.raises(kind):
        blob.store.list_page("", "").objects()


def test_pages_add_up(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob_rest, "PAGE_ENTRIES", 7)
    names = [f"p/{n:02}&<{n}>" for n in range(30)]
    blob.azurite.upload_many(blob.container, [(name, b"x") for name in names])
    pages = [page.objects() for page in list_all(blob.store, "p/")]
    assert [len(page) for page in pages] == [7, 7, 7, 7, 2]
    assert [o.path for page in pages for o in page] == names


def test_more_blobs_than_a_page_of_the_service_holds(blob: Blob, tmp_path: Path) -> None:
    # Azurite takes 2 ms to write each; so the proxy says what it would.
    names = [f"n/{number:05}" for number in range(5050)]
    blobs = [blob_of(f"<Name>{name}</Name>") for name in names]
    pages = [page_body(blobs[:5000], "2!92!next&amp;page"), page_body(blobs[5000:], "")]
    for _ in range(2):
        for body in pages:
            blob.faults.push(Respond(200, body=body), times=1)
    listed = [page.objects() for page in list_all(blob.store, "n/")]
    assert [len(page) for page in listed] == [5000, 50]
    assert [o.path for page in listed for o in page] == names
    assert "marker=2%2192%21next%26page" in blob.faults.requests()[-1].query
    frozen = freeze([parse(f"{blob.url}/n/", cwd="/")], lambda source: blob.store, tmp_path)
    assert (frozen.info.files, frozen.info.bytes, frozen.info.rejected) == (5050, 5 * 5050, 0)


def frozen_names(blob: Blob, folder: Path, path: str = "") -> tuple[dict[str, bool], dict[str, str]]:
    """Freeze what is below a path; return the names in the tree (and whether a folder), and those left out."""
    location = parse(f"{blob.url}/{path}", cwd="/")
    frozen = freeze([location], lambda source: blob.store, folder)
    with Manifest(frozen.path) as manifest:
        manifest.check()
        kept = {entry.path.decode(): entry.is_dir for entry in manifest.entries()}
        return kept, {path.decode(): reason for path, reason in manifest.rejected()}


def test_marks_of_folders_and_names_that_are_two_things(blob: Blob, tmp_path: Path) -> None:
    azurite, box = blob.azurite, blob.container
    azurite.mark_directory(box, "x/kept")  # hdi_isfolder
    azurite.upload(box, "x/slash/", b"")  # a zero-byte blob with a slash
    azurite.mark_directory(box, "x/full")
    azurite.upload(box, "x/full/f", b"1")
    azurite.upload(box, "x/a", b"a file")
    azurite.upload(box, "x/a/b", b"1")
    azurite.upload(box, "x/a-", b"1")
    kept, left_out = frozen_names(blob, tmp_path, "x/")
    assert kept == {"kept": True, "slash": True, "full/f": False, "a/b": False, "a-": False}
    assert left_out == {"a": "is also a folder"}


def test_names_that_a_file_system_cannot_hold_are_left_out_with_the_reason(
    blob: Blob, tmp_path: Path
) -> None:
    azurite, box = blob.azurite, blob.container
    good = [
        "good",
        "nl\nx",
        "%41",
        "dot.",
        "d./x",
        " lead",
        "tab\tx",
        "what?",
        "#",
        "ü",
        "a\u0301",
        "emoji😀",
    ]
    bad = ["/lead", "a//b", "two//", "full/", "l" * 256, "/"]
    for name in [*good, *bad]:
        azurite.upload(box, f"n/{name}", b"" if name in ("two//", "/") else b"x")
    kept, left_out = frozen_names(blob, tmp_path, "n/")
    assert set(kept) == set(good)
    assert (
        left_out["two/"]
        == left_out["/lead"]
        == left_out["a//b"]
        == left_out["full/"]
        == "has an empty segment"
    )
    assert "255" in left_out["l" * 256]
    assert left_out[""] == "has an empty segment"  # of "n//"
    assert len(left_out) == len(bad)


def test_odd_names_are_read_as_they_are(blob: Blob) -> None:
    names = [
        "nl\nx",
        "a%0Ab",
        "cr\rx",
        "dot.",
        "d./x",
        " lead",
        "trail ",
        "q?x",
        "h#x",
        "a&b<c>",
        "a%2Fb",
        "😀",
    ]
    for name in names:
        blob.azurite.upload(blob.container, f"o/{name}", name.encode())
    listed = {o.path: o for page in list_all(blob.store, "o/") for o in page.objects()}
    assert set(listed) == {f"o/{name}" for name in names}
    for name in names:
        found, raw = listed[f"o/{name}"], name.encode()
        for attempt in (0, 1):
            data = blob.store.read(ObjectId(found.path, found.tag, found.size), 0, len(raw), attempt)
            assert bytes(data) == raw
        assert blob.store.head(found.path) == found


def page_body(blobs: Sequence[str], marker: str) -> bytes:
    """Return a page as the service would send it: Azurite refuses some names that Azure does not."""
    return (
        '\ufeff<?xml version="1.0" encoding="utf-8"?><EnumerationResults ContainerName="c"><Blobs>'
        + "".join(blobs)
        + f"</Blobs><NextMarker>{marker}</NextMarker></EnumerationResults>"
    ).encode()


def page_of(*blobs: str, marker: str = "") -> ListPage:
    return ListPage(page_body(blobs, marker))


def blob_of(name: str, size: int = 5, more: str = "", after: str = "") -> str:
    return (
        f"<Blob>{name}<Properties><Creation-Time>Mon, 01 Jan 2024 00:00:00 GMT</Creation-Time>"
        f"<Last-Modified>Tue, 02 Jan 2024 03:04:05 GMT</Last-Modified><Etag>0x8DC</Etag>"
        f"<Content-Length>{size}</Content-Length><Content-Type>text/plain</Content-Type>{more}</Properties>{after}</Blob>"
    )


def test_a_page_is_parsed() -> None:
    page = page_of(
        blob_of("<Name>a/b&amp;c</Name>", more="<Content-MD5>XUFAKrxLKna5cZ2REBfFkg==</Content-MD5>"),
        blob_of('<Name Encoded="true">d%EF%BF%BEe%25</Name>'),
        blob_of("<Name>plain%41</Name>", more="<Content-MD5 />"),
        blob_of("<Name>hns</Name>", 0, more="<ResourceType>directory</ResourceType>"),
        blob_of("<Name>mark</Name>", 0, after="<Metadata><hdi_isfolder>true</hdi_isfolder></Metadata>"),
        blob_of("<Name>not</Name>", 0, after="<Metadata><hdi_isfolder>false</hdi_isfolder></Metadata>"),
        blob_of("<Name>slash/</Name>", 0),
        marker="2!92!MDAw&amp;x",
    )
    at = 1704164645 * 10**9
    assert page.next_marker == "2!92!MDAw&x"
    assert page.objects() == [
        ("a/b&c", 5, at, "0x8DC", "5d41402abc4b2a76b9719d911017c592", False),
        ("d\ufffee%", 5, at, "0x8DC", "", False),
        ("plain%41", 5, at, "0x8DC", "", False),
        ("hns", 0, at, "", "", True),
        ("mark", 0, at, "", "", True),
        ("not", 0, at, "0x8DC", "", False),
        ("slash", 0, at, "", "", True),
    ]
    assert page.unlisted() == []


@pytest.mark.parametrize("control", ["\x01", "&#x1;", "&#1;", "\x0b"])
def test_a_control_character_costs_its_own_blob_only(control: str) -> None:
    page = page_of(
        blob_of("<Name>good</Name>"), blob_of(f"<Name>b{control}d</Name>"), blob_of("<Name>\ufffd</Name>")
    )
    assert "good" in {o.path for o in page.objects()}
    assert [name for name, _ in page.unlisted() if name.startswith("b")] == ["b\ufffdd"]


def test_the_last_page_has_no_marker() -> None:
    assert page_of().next_marker == ""
    assert page_of(blob_of("<Name>&lt;NextMarker&gt;x</Name>")).next_marker == ""


@given(st.datetimes().filter(lambda t: t.year >= 1970))
def test_http_times(moment: object) -> None:
    import datetime

    assert isinstance(moment, datetime.datetime)
    moment = moment.replace(microsecond=0, tzinfo=datetime.UTC)
    written = moment.strftime("%a, %d %b %Y %H:%M:%S GMT").replace(f" {moment.year} ", f" {moment.year:04} ")
    assert http_time_ns(written) == int(moment.timestamp()) * 10**9


# Freezing ------------------------------------------------------------------------------------------------------


def names_at(blob: Blob, folder: Path, uri_path: str) -> list[str]:
    return sorted(frozen_names(blob, folder, uri_path)[0])


def test_what_a_uri_takes_from_a_container(blob: Blob, tmp_path: Path) -> None:
    azurite, box = blob.azurite, blob.container
    for name in ("t/a.csv", "t/b.txt", "t/u/c.csv", "t/u/v/d.csv", "tx/e.csv"):
        azurite.upload(box, name, name.encode())
    assert names_at(blob, tmp_path, "t") == ["a.csv", "b.txt", "u/c.csv", "u/v/d.csv"]
    assert names_at(blob, tmp_path, "t/") == ["a.csv", "b.txt", "u/c.csv", "u/v/d.csv"]
    assert names_at(blob, tmp_path, "t/a.csv") == ["a.csv"]
    assert names_at(blob, tmp_path, "t/*.csv") == ["a.csv"]
    assert names_at(blob, tmp_path, "t/**/*.csv") == ["a.csv", "u/c.csv", "u/v/d.csv"]
    assert names_at(blob, tmp_path, "t*/*.csv") == ["t/a.csv", "tx/e.csv"]
    assert names_at(blob, tmp_path, "t/u/[cd].csv") == ["c.csv"]
    assert len(names_at(blob, tmp_path, "")) == 6
    for nothing in ("nowhere", "nowhere/", "t/*.parquet", "t/a.csv/"):
        with pytest.raises(FreezeError, match="nothing there"):
            names_at(blob, tmp_path, nothing)
    assert not [p for p in tmp_path.iterdir() if "staging" in p.name]


def test_md5_is_recorded_where_the_store_lists_it(blob: Blob, tmp_path: Path) -> None:
    blob.azurite.upload(blob.container, "m/x", b"hello")
    frozen = freeze([parse(f"{blob.url}/m/", cwd="/")], lambda source: blob.store, tmp_path)
    with Manifest(frozen.path) as manifest:
        (entry,) = manifest.entries()
    assert isinstance(entry, ManifestEntry)
    assert entry.md5 == "5d41402abc4b2a76b9719d911017c592"
    assert entry.tag == blob.azurite.etag(blob.container, "m/x")


def test_a_listing_that_breaks_off_freezes_nothing(
    blob: Blob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_rest, "PAGE_ENTRIES", 2)
    for number in range(7):
        blob.azurite.upload(blob.container, f"b/{number}", b"x")
    blob.faults.push(Respond(403), path=f"{blob.container}$", skip=2)
    with pytest.raises(AccessDenied):
        freeze([parse(f"{blob.url}/b/", cwd="/")], lambda source: blob.store, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_drift_names_what_changed(blob: Blob, tmp_path: Path) -> None:
    for name in ("same", "changed", "gone"):
        blob.azurite.upload(blob.container, f"d/{name}", b"x")

    def open_it(source: Source) -> ObjectStore:
        return blob.store

    frozen = freeze([parse(f"{blob.url}/d/", cwd="/")], open_it, tmp_path)
    blob.azurite.upload(blob.container, "d/changed", b"y")
    blob.azurite.delete(blob.container, "d/gone")
    blob.azurite.upload(blob.container, "d/new\nname", b"x")
    with Manifest(frozen.path) as old:
        again = freeze_again(old, lambda s: parse(s.uri, cwd="/"), open_it, tmp_path, lambda _: None)
        with Manifest(again.path) as new:
            assert compare(old, new) == Drift(["changed"], ["gone"], ["new\\nname"])
            assert not compare(new, new)
        blob.azurite.delete(blob.container, "d/same")
        blob.azurite.delete(blob.container, "d/changed")
        blob.azurite.delete(blob.container, "d/new\nname")
        again = freeze_again(old, lambda s: parse(s.uri, cwd="/"), open_it, tmp_path, lambda _: None)
        with Manifest(again.path) as new:
            assert compare(old, new) == Drift([], ["changed", "gone", "same"], [])
