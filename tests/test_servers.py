"""The test servers themselves: Azurite serves what was uploaded, each fault of the proxy is what it says."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import obstore
import pytest
import urllib3
from azure.core.exceptions import ResourceNotFoundError
from azure.storage.blob import BlobClient
from obstore.exceptions import PermissionDeniedError
from obstore.store import AzureStore
from urllib3.exceptions import HTTPError, IncompleteRead, ProtocolError, ReadTimeoutError

from tests.servers.azurite import Azurite
from tests.servers.faults import (
    Drip,
    EditHeaders,
    FaultProxy,
    FlipBit,
    Garbage,
    IgnoreRange,
    Pass,
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

if TYPE_CHECKING:
    from obstore.store import AzureConfig, RetryConfig

pytestmark = pytest.mark.azurite

DATA = bytes(i * 7 % 251 for i in range(100_000))
RANGE = {"Range": "bytes=1000-50999"}
PART = DATA[1000:51000]


class Client:
    """urllib3 without retries, on one public blob seen through the proxy."""

    def __init__(self, proxy: FaultProxy, container: str) -> None:
        self.pool = urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(connect=2, read=5), maxsize=32)
        self.url = f"{proxy.url}/{container}/dir/data.bin"

    def get(self, headers: dict[str, str] | None = None, **options: object) -> urllib3.BaseHTTPResponse:
        return self.pool.request("GET", self.url, headers=RANGE if headers is None else headers, **options)  # type: ignore[arg-type]


@pytest.fixture
def client(azurite: Azurite, faults: FaultProxy, public_container: str) -> Iterator[Client]:
    azurite.upload(public_container, "dir/data.bin", DATA)
    client = Client(faults, public_container)
    yield client
    client.pool.clear()


def store(url: str, container: str, **credential: Unpack[AzureConfig]) -> AzureStore:
    config: AzureConfig = {"endpoint": url, "account_name": Azurite.account, **credential}
    retry: RetryConfig = {"max_retries": 0}
    return AzureStore(container, config=config, client_options={"allow_http": True}, retry_config=retry)


# Azurite ----------------------------------------------------------------------------------------------------


def test_upload_overwrite_delete(azurite: Azurite, container: str) -> None:
    first = azurite.upload(container, "a b/ü%41.bin", b"one")
    second = azurite.upload(container, "a b/ü%41.bin", b"two")
    assert first != second == azurite.etag(container, "a b/ü%41.bin")
    assert azurite.container(container).download_blob("a b/ü%41.bin").readall() == b"two"
    azurite.delete(container, "a b/ü%41.bin")
    with pytest.raises(ResourceNotFoundError):
        azurite.etag(container, "a b/ü%41.bin")


def test_upload_tree(azurite: Azurite, container: str, tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "deep.txt").write_bytes(b"deep")
    (tmp_path / "top.txt").write_bytes(b"top")
    (tmp_path / "link").symlink_to("top.txt")
    assert azurite.upload_tree(container, tmp_path, "/prefix/") == 2
    azurite.mark_directory(container, "prefix/empty")
    names = [blob.name for blob in azurite.container(container).list_blobs()]
    assert names == ["prefix/empty", "prefix/top.txt", "prefix/x/y/deep.txt"]


def test_obstore_with_each_credential(azurite: Azurite, container: str, public_container: str) -> None:
    for name in (container, public_container):
        azurite.upload(name, "data.bin", DATA)
    good = [
        store(azurite.url, container, account_key=azurite.key),
        store(azurite.url, container, sas_key=azurite.container_sas(container)),
        store(azurite.url, container, sas_key=azurite.account_sas()),
        store(azurite.url, public_container, skip_signature=True),
    ]
    bad = [
        store(azurite.url, container, account_key=azurite.wrong_key()),
        store(azurite.url, container, sas_key=azurite.container_sas(container, valid_s=-60)),
        store(azurite.url, container, sas_key=azurite.container_sas(public_container)),
        store(azurite.url, container, skip_signature=True),
    ]
    for one in good:
        assert bytes(obstore.get(one, "data.bin", options={"range": (5, 500)}).bytes()) == DATA[5:500]
    for one in bad:
        with pytest.raises(PermissionDeniedError):
            obstore.get(one, "data.bin", options={"range": (5, 500)})


def test_two_at_once_and_stop_twice() -> None:
    with Azurite() as one, Azurite() as two:
        assert one.origin != two.origin
        one.create_container("only-here")
        assert not two.container("only-here").exists()
        two.stop()
        assert one.container("only-here").exists()


# The proxy, transparent -------------------------------------------------------------------------------------


def test_passes_through_and_records(client: Client, faults: FaultProxy) -> None:
    etag = client.get().headers["ETag"]
    answer = client.get({**RANGE, "If-Match": etag})
    assert (answer.status, answer.data) == (206, PART)
    assert client.get({}).data == DATA
    assert client.pool.request("HEAD", client.url).headers["Content-Length"] == str(len(DATA))
    second = faults.requests(ranged=True)[1]
    assert (second.method, second.range, second.if_match, second.status) == (
        "GET",
        "bytes=1000-50999",
        etag,
        206,
    )
    assert second.sent == len(PART)
    assert second.path.endswith("/dir/data.bin")
    assert faults.count() == 4
    assert faults.count(method="head") == 1
    assert faults.count(path=r"other\.bin$") == 0
    faults.forget()
    assert faults.count() == 0


def test_signatures_stay_valid(azurite: Azurite, faults: FaultProxy, container: str) -> None:
    azurite.upload(container, "dir/a b.bin", DATA)
    for through in (
        store(faults.url, container, account_key=azurite.key),
        store(faults.url, container, sas_key=azurite.container_sas(container)),
    ):
        assert bytes(obstore.get(through, "dir/a b.bin", options={"range": (9, 99)}).bytes()) == DATA[9:99]
        assert [entry["path"] for entry in obstore.list(through).collect()] == ["dir/a b.bin"]


def test_uploads_pass(azurite: Azurite, faults: FaultProxy, container: str) -> None:
    with BlobClient(faults.url, container, "up.bin", credential=azurite.key) as blob:
        blob.upload_blob(DATA)
        assert blob.download_blob().readall() == DATA


# The proxy, rules -------------------------------------------------------------------------------------------


def test_rules_match_and_count(client: Client, faults: FaultProxy) -> None:
    rule = faults.push(throttled(7), ranged=True, times=2, skip=1)
    assert client.get({}).status == 200
    assert [client.get().status for _ in range(4)] == [206, 503, 503, 206]
    assert rule.hits == 2
    other = faults.push(denied(), path=r"/dir/", header={"If-Match": "0xBAD"})
    assert client.get().status == 206
    assert client.get({**RANGE, "If-Match": '"0xBAD"'}).status == 403
    faults.remove(other)
    assert client.get({**RANGE, "If-Match": '"0xBAD"'}).status == 412
    faults.push(Respond(500), method="HEAD")
    assert client.get().status == 206
    assert client.pool.request("HEAD", client.url).status == 500
    faults.clear()
    assert client.pool.request("HEAD", client.url).status == 200


def test_peak_and_wait_for(client: Client, faults: FaultProxy) -> None:
    faults.push(Stall())
    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(client.get) for _ in range(5)]
        assert faults.wait_for(5)
        assert not faults.wait_for(6, timeout_s=0.05)
        faults.clear()
        faults.release()
        assert [answer.result().data for answer in answers] == [PART] * 5
    client.get()
    assert faults.peak() == faults.peak(ranged=True) == 5
    assert faults.peak(ranged=False) == 0


# The proxy, each fault --------------------------------------------------------------------------------------


def test_respond(client: Client, faults: FaultProxy) -> None:
    faults.push(throttled(7), times=1)
    busy = client.get()
    assert (busy.status, busy.headers["Retry-After"], busy.headers["x-ms-error-code"]) == (
        503,
        "7",
        "ServerBusy",
    )
    assert b"<Code>ServerBusy</Code>" in busy.data
    faults.push(throttled(status=429), times=1)
    assert client.get().headers["x-ms-error-code"] == "TooManyRequests"
    faults.push(redirect("http://127.0.0.1:1/elsewhere"), times=1)
    assert client.get(redirect=False).headers["Location"] == "http://127.0.0.1:1/elsewhere"
    faults.push(Respond(200, {"X-Any": "thing"}, b"body"), times=1)
    made = client.get()
    assert (made.headers["X-Any"], made.data) == ("thing", b"body")


def test_delay(client: Client, faults: FaultProxy) -> None:
    faults.push(Pass(delay_s=0.2))
    began = time.monotonic()
    assert client.get().data == PART
    assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("after", [None, 0, 1000])
def test_stall(client: Client, faults: FaultProxy, after: int | None) -> None:
    faults.push(Stall(after))
    if after is None:
        with pytest.raises(ReadTimeoutError):
            client.get(timeout=0.2)
    else:
        answer = client.get(timeout=0.2, preload_content=False)
        assert answer.read(after) == PART[:after]
        with pytest.raises(ReadTimeoutError):
            answer.read(1)
        answer.close()


def test_stall_then_release(client: Client, faults: FaultProxy) -> None:
    faults.push(Stall(1000))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.get)
        assert faults.wait_for(1)
        while not answer.done():  # the request may arrive a moment before it stalls
            faults.release()
            time.sleep(0.01)
        assert answer.result().data == PART


@pytest.mark.parametrize("after", [None, 0, 1000])
def test_reset(client: Client, faults: FaultProxy, after: int | None) -> None:
    faults.push(Reset(after))
    with pytest.raises(ProtocolError, match=r"[Rr]eset by peer"):
        client.get()
    assert faults.requests()[0].sent == (after or 0)


def test_truncate(client: Client, faults: FaultProxy) -> None:
    faults.push(Truncate(1000))
    answer = client.get(preload_content=False)
    assert answer.headers["Content-Length"] == str(len(PART))
    with pytest.raises(ProtocolError) as caught:
        answer.read()
    assert isinstance(caught.value, IncompleteRead) or "1000 bytes read" in str(caught.value)


def test_short_body(client: Client, faults: FaultProxy) -> None:
    faults.push(ShortBody(1000))
    answer = client.get()
    assert (answer.status, answer.data) == (206, PART[:1000])
    assert answer.headers["Content-Length"] == "1000"
    assert answer.headers["Content-Range"] == f"bytes 1000-50999/{len(DATA)}"


def test_ignore_range(azurite: Azurite, client: Client, faults: FaultProxy, public_container: str) -> None:
    faults.push(IgnoreRange())
    answer = client.get()
    assert (answer.status, answer.data) == (200, DATA)
    with BlobClient(faults.url, public_container, "dir/data.bin", credential=azurite.key) as signed:
        azurite.container(public_container).set_container_access_policy(signed_identifiers={})  # private now
        with pytest.raises(ValueError, match="Content-Range"):  # the SDK cannot make sense of 200 without it
            signed.download_blob(offset=1000, length=50).readall()
    last = faults.requests(path="dir/data.bin")[-1]
    assert (last.headers["x-ms-range"], last.status, last.length) == ("bytes=1000-1049", 200, len(DATA))


def test_edited_headers(client: Client, faults: FaultProxy) -> None:
    faults.push(wrong_etag('"0xOTHER"'), times=1)
    answer = client.get()
    assert (answer.headers["ETag"], answer.data) == ('"0xOTHER"', PART)
    faults.push(EditHeaders({"etag": None, "X-More": "1"}), times=1)
    answer = client.get()
    assert "ETag" not in answer.headers
    assert answer.headers["X-More"] == "1"
    faults.push(WrongContentRange(total=5), times=1)
    assert client.get().headers["Content-Range"] == "bytes 1000-50999/5"
    faults.push(WrongContentRange(shift=1), times=1)
    answer = client.get()
    assert (answer.headers["Content-Range"], answer.data) == (f"bytes 1001-51000/{len(DATA)}", PART)


def test_flipped_bit(client: Client, faults: FaultProxy) -> None:
    faults.push(FlipBit(3))
    answer = client.get()
    assert answer.data[3] == PART[3] ^ 1
    assert (answer.data[:3], answer.data[4:]) == (PART[:3], PART[4:])


def test_drip(client: Client, faults: FaultProxy) -> None:
    faults.push(Drip(100_000))
    began = time.monotonic()
    assert client.get().data == PART
    assert 0.4 <= time.monotonic() - began < 3


def test_garbage(client: Client, faults: FaultProxy) -> None:
    faults.push(Garbage())
    with pytest.raises(ProtocolError):
        client.get()
    faults.clear()
    faults.push(Garbage(b""))
    with pytest.raises(ProtocolError, match="without response"):
        client.get()


def test_close_frees_stalled_connections_at_once(azurite: Azurite, public_container: str) -> None:
    azurite.upload(public_container, "dir/data.bin", DATA)
    before = set(threading.enumerate())
    proxy = FaultProxy(azurite.url)
    proxy.push(Stall(), times=2)
    proxy.push(Stall(1000), times=2)
    client = Client(proxy, public_container)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(client.get) for _ in range(4)]
        assert proxy.wait_for(4)
        began = time.monotonic()
        proxy.close()
        assert [type(answer.exception(5)) for answer in answers] != []
        assert all(isinstance(answer.exception(), HTTPError) for answer in answers)
        assert time.monotonic() - began < 1
    proxy.close()
    client.pool.clear()
    deadline = time.monotonic() + 2
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


def test_a_client_that_left_is_noticed(client: Client, faults: FaultProxy) -> None:
    faults.push(Stall())
    with pytest.raises(ReadTimeoutError):
        client.get(timeout=0.1)
    client.pool.clear()
    deadline = time.monotonic() + 2
    while faults.requests()[0].finished is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert faults.requests()[0].finished is not None
