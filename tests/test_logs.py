"""Log lines: one line an event, without a secret in it, and not too many."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from amlmount import logs
from amlmount.credentials import Access
from amlmount.errors import StoreError

CANARY = "CaNaRy8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsu=="

SECRETS = [
    f"https://a.blob.core.windows.net/c/b?sv=2023-11-03&sr=c&sig={CANARY}",
    f"https://a.blob.core.windows.net/c/b?sig={CANARY}&sv=2023",
    f"sv=2023-11-03&se=2030&sp=rl&sig={CANARY}",
    f"the SAS is sig={CANARY}",
    f"the SAS is 'sig={CANARY}'",
    f"url(sig={CANARY})",
    f"SIG={CANARY}",
    f"?a=1&amp;sig={CANARY}",
    f"sig%3D{CANARY}",
    f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={CANARY};EndpointSuffix=core.windows.net",
    f"SharedAccessSignature={CANARY}",
    f"account_key = {CANARY}",
    f'{{"account_key": "{CANARY}"}}',
    f"AZURE_STORAGE_KEY={CANARY}",
    f"Authorization: Bearer {CANARY}",
    f"authorization: SharedKey account:{CANARY}",
    f"{{'Authorization': 'Bearer {CANARY}'}}",
    f"client_secret={CANARY}",
    f"password: {CANARY}",
    f"access_token={CANARY}",
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_taken_out(text: str) -> None:
    shown = logs.redact(text)
    assert "***" in shown
    assert CANARY[:12] not in shown


@pytest.mark.parametrize(
    "text",
    [
        "a/b/signal=3.csv: no such blob in https://a.blob.core.windows.net/c (404 BlobNotFound)",
        "2026-01-01 [info] mounted path=/mnt/design=4",
        "the keys of the dictionary: a, b",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert logs.redact(text) == text


@given(st.text(max_size=40))
def test_redaction_is_idempotent(text: str) -> None:
    once = logs.redact(f"?sig={text}&x=1")
    assert logs.redact(once) == once


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """A stream that all of this process's logs go to, for one test."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers[:] = []
    out = io.StringIO()
    yield out
    root.handlers[:] = before
    root.setLevel(level)
    structlog.reset_defaults()


def test_every_way_into_the_log_is_redacted(stream: io.StringIO) -> None:
    logs.configure("debug", stream)
    log = logs.get()
    log.info(
        SECRETS[0], url=SECRETS[1], error=StoreError(SECRETS[2]), more={"sas": SECRETS[0]}, also=[SECRETS[4]]
    )
    try:
        raise StoreError(f"cannot open {SECRETS[0]}")
    except StoreError:
        log.exception("it broke")
    logging.getLogger("urllib3").warning("retrying %s", SECRETS[0])
    try:
        raise ValueError(SECRETS[0])
    except ValueError:
        logging.getLogger("azure").exception("failed")
    shown = stream.getvalue()
    assert "Traceback" in shown
    assert shown.count("***") >= 8
    assert CANARY[:12] not in shown


def test_an_access_does_not_show_its_secret() -> None:
    assert CANARY not in repr(Access("blob", "https://h/c", "a", "key", CANARY, "variable X"))


def test_one_line_an_event_without_colours(stream: io.StringIO) -> None:
    logs.configure("info", stream)
    logs.get().info("mounted", path="/a b\n\x1b[31mx", ref="w:1")
    logs.get().debug("not this one")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert "mounted" in lines[0]
    assert "ref=w:1" in lines[0]
    assert "\x1b" not in lines[0]


def test_levels(stream: io.StringIO) -> None:
    logs.configure("error", stream)
    logs.get().warning("quiet")
    logs.get().error("loud")
    assert "quiet" not in stream.getvalue()
    assert "loud" in stream.getvalue()


def test_thinned_events(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    thinned = logs.Thinned(interval_s=60, keys=3)
    assert thinned.due("a") == 0
    assert [thinned.due("a") for _ in range(5)] == [None] * 5
    assert thinned.due("b") == 0
    now += 61
    assert thinned.due("a") == 5
    assert thinned.due("a") is None
    for key in "cde":  # its memory is bounded
        assert thinned.due(key) == 0
    assert len(thinned._seen) <= 3
