"""A scriptable HTTP proxy in front of a Blob endpoint, to give a test any storage fault it wants.

Duty: pass everything through unchanged, except for requests that a pushed rule matches; record every request.
It is plain HTTP/1.1 over sockets with the standard library alone, and a fault is made on the socket itself, so
that clients see what a broken network shows them and not what a polite server would.

Protocol facts: a Shared Key signature covers the method, the path, the query, the ``x-ms-*`` headers and some
standard ones (Range, If-Match, Content-Length, ...), but neither the host nor the port, so requests can be
forwarded as they are (learn.microsoft.com, "Authorize with Shared Key"). The one action that must alter a
request, `IgnoreRange`, signs it again. RST is what Linux sends on close() of a socket whose SO_LINGER is set to
zero seconds (socket(7)).

>>> with FaultProxy(azurite.url) as proxy:  # doctest: +SKIP
...     proxy.push(Respond(503, {"Retry-After": "1"}), ranged=True, times=2)
...     ...  # point the client at proxy.url
...     assert proxy.count(ranged=True) == 3
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import re
import socket
import socketserver
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Self

from .azurite import KEY

_PIECE = 256 * 1024
_TICK_S = 0.02


# Actions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pass:
    """Forward, after `delay_s` seconds."""

    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Respond:
    """Answer with this status, not asking the origin. `code` goes into x-ms-error-code and Azure's XML body."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    code: str = ""


@dataclass(frozen=True, slots=True)
class Stall:
    """Send `after` body bytes of the real answer (None: not even the headers), then nothing until released.

    `FaultProxy.release` lets the rest of the real answer through; `FaultProxy.close` drops the connection.
    """

    after: int | None = None


@dataclass(frozen=True, slots=True)
class Reset:
    """Send `after` body bytes of the real answer (None: not even the headers), then RST."""

    after: int | None = None


@dataclass(frozen=True, slots=True)
class Truncate:
    """Send the real headers with the full Content-Length and `after` body bytes, then close with a FIN."""

    after: int


@dataclass(frozen=True, slots=True)
class ShortBody:
    """A well-formed answer of only `length` bytes, whose Content-Range still claims the range asked for."""

    length: int


@dataclass(frozen=True, slots=True)
class IgnoreRange:
    """Answer a ranged request with 200 and the whole blob."""


@dataclass(frozen=True, slots=True)
class EditHeaders:
    """Change headers of the real answer; None removes one. See `wrong_etag` and `wrong_total`."""

    headers: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class WrongContentRange:
    """Edit the real Content-Range: another total, or a range shifted by some bytes. The body stays as it was."""

    total: int | None = None
    shift: int = 0


@dataclass(frozen=True, slots=True)
class FlipBit:
    """Change one bit of the body, at this byte, as a broken cache between client and origin might."""

    at: int = 0


@dataclass(frozen=True, slots=True)
class Drip:
    """Send the real body slowly: `bytes_per_s`, a few bytes ten times a second."""

    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Garbage:
    """Bytes that are not HTTP in place of an answer, then close."""

    data: bytes = b"\x16\x03\x01\x02\x00 this is not HTTP \r\n\r\n"


Action = (
    Pass | Respond | Stall | Reset | Truncate | ShortBody | IgnoreRange | EditHeaders | WrongContentRange
    | FlipBit | Drip | Garbage
)  # fmt: skip


def throttled(retry_after_s: int | None = None, status: int = 503) -> Respond:
    """Azure's ServerBusy (503), or TooManyRequests with status 429."""
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return Respond(status, headers, code="ServerBusy" if status == 503 else "TooManyRequests")


def denied() -> Respond:
    """Azure's 403 for a valid credential without the right to read."""
    return Respond(403, code="AuthorizationPermissionMismatch")


def redirect(location: str, status: int = 307) -> Respond:
    """A redirect to another URL."""
    return Respond(status, {"Location": location})


def wrong_etag(value: str = '"0xWRONG"') -> EditHeaders:
    """The real answer under another ETag, as a store would give that ignores If-Match."""
    return EditHeaders({"ETag": value})


# Records ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Request:
    """One request that reached the proxy, and what became of it. Header names are lower-case.

    `status`, `sent` and `finished` are set just before the bytes they are about leave, so whoever has seen an answer
    finds it recorded.
    """

    method: str
    path: str
    query: str
    headers: dict[str, str]
    started: float
    finished: float | None = None
    status: int | None = None
    length: int = 0
    sent: int = 0
    action: Action | None = None

    def finish(self) -> None:
        """Note the time of the end, once."""
        if self.finished is None:
            self.finished = time.monotonic()

    @property
    def range(self) -> str | None:
        """The range asked for, by either of the two headers that Azure takes."""
        return self.headers.get("x-ms-range") or self.headers.get("range")

    @property
    def if_match(self) -> str | None:
        """The ETag that the client insists on."""
        return self.headers.get("if-match")


@dataclass(slots=True, eq=False)
class Rule:
    """An action and the requests it is for. `left` counts down to 0; None means for ever."""

    action: Action
    method: str | None
    path: re.Pattern[str] | None
    header: Mapping[str, str]
    ranged: bool | None
    left: int | None
    skip: int
    hits: int = 0

    def matches(self, request: Request) -> bool:
        """Whether this rule is meant for the request, its count aside."""
        return _selects(request, self.method, self.path, self.ranged) and all(
            re.search(pattern, request.headers.get(name.lower(), "")) for name, pattern in self.header.items()
        )

    def take(self, request: Request) -> bool:
        """Whether the rule applies now; counts it if so."""
        if self.left == 0 or not self.matches(request):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.left is not None:
            self.left -= 1
        self.hits += 1
        return True


def _selects(request: Request, method: str | None, path: re.Pattern[str] | None, ranged: bool | None) -> bool:
    return (
        (method is None or request.method == method.upper())
        and (path is None or path.search(request.path) is not None)
        and (ranged is None or (request.range is not None) == ranged)
    )


def _compiled(path: str | None) -> re.Pattern[str] | None:
    return None if path is None else re.compile(path)


# The proxy --------------------------------------------------------------------------------------------------


class FaultProxy:
    """The proxy; listens as soon as it is made, until `close`. Safe to drive from any thread.

    `upstream` is an endpoint such as ``http://127.0.0.1:PORT/devstoreaccount1``; `url` is the same endpoint seen
    through the proxy. Rules are tried in the order they were pushed, and the first that applies acts.
    """

    def __init__(self, upstream: str, *, account_key: str = KEY, connect_timeout_s: float = 30.0) -> None:
        parts = urllib.parse.urlsplit(upstream)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"upstream must be an http:// URL, not {upstream!r}")
        self.upstream = (parts.hostname, parts.port or 80)
        self.account_key = account_key
        self.connect_timeout_s = connect_timeout_s
        self._changed = threading.Condition()
        self._requests: list[Request] = []
        self._rules: list[Rule] = []
        self._released = threading.Event()
        self._closed = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._server = _Server(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="fault-proxy", daemon=True
        )
        self._thread.start()
        self.origin = f"http://127.0.0.1:{self._server.server_address[1]}"
        """``http://127.0.0.1:PORT``, without the account."""
        self.url = self.origin + parts.path.rstrip("/")
        """The endpoint seen through the proxy."""

    def close(self) -> None:
        """Stop listening and drop every connection, stalled ones too, at once. May be called twice."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        with self._changed:
            open_sockets = list(self._sockets)
        for connection in open_sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Rules

    def push(
        self,
        action: Action,
        *,
        method: str | None = None,
        path: str | None = None,
        header: Mapping[str, str] | None = None,
        ranged: bool | None = None,
        times: int | None = None,
        skip: int = 0,
    ) -> Rule:
        """Add a rule: for requests of this method, in whose decoded path the regular expression `path` is found,
        whose headers match the regular expressions in `header`, and that ask for a range or not (`ranged`).

        It lets the first `skip` such requests by and then acts `times` times, or for ever.
        """
        rule = Rule(action, method, _compiled(path), dict(header or {}), ranged, times, skip)
        with self._changed:
            self._rules.append(rule)
        return rule

    def remove(self, rule: Rule) -> None:
        """Take one rule away; no complaint when it is gone already."""
        with self._changed, suppress(ValueError):
            self._rules.remove(rule)

    def clear(self) -> None:
        """Take every rule away. What is stalled stays so until `release`."""
        with self._changed:
            self._rules.clear()

    def release(self) -> None:
        """Let every request that is stalled now go on with the real answer. Later ones stall again."""
        with self._changed:
            self._released.set()
            self._released = threading.Event()

    # Records

    def requests(
        self, *, method: str | None = None, path: str | None = None, ranged: bool | None = None
    ) -> list[Request]:
        """What has arrived so far, in order of arrival, selected like a rule's requests."""
        with self._changed:
            return [
                request for request in self._requests if _selects(request, method, _compiled(path), ranged)
            ]

    def count(self, *, method: str | None = None, path: str | None = None, ranged: bool | None = None) -> int:
        """How many requests of that kind have arrived."""
        return len(self.requests(method=method, path=path, ranged=ranged))

    def peak(self, *, method: str | None = None, path: str | None = None, ranged: bool | None = None) -> int:
        """The largest number of requests of that kind that were being answered at one time."""
        edges: list[tuple[float, int]] = []
        for request in self.requests(method=method, path=path, ranged=ranged):
            edges.append((request.started, 1))
            if request.finished is not None:
                edges.append((request.finished, -1))
        level = highest = 0
        for _, step in sorted(edges):
            level += step
            highest = max(highest, level)
        return highest

    def forget(self) -> None:
        """Drop the records so far."""
        with self._changed:
            self._requests.clear()

    def wait_for(
        self,
        count: int,
        *,
        method: str | None = None,
        path: str | None = None,
        ranged: bool | None = None,
        timeout_s: float = 10.0,
    ) -> bool:
        """Wait until that many such requests have arrived (answered or not); False when the time is over."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self.count(method=method, path=path, ranged=ranged) >= count, timeout_s
            )

    # For the connection handlers

    def _begin(self, request: Request) -> tuple[Action, threading.Event]:
        with self._changed:
            self._requests.append(request)
            rule = next((rule for rule in self._rules if rule.take(request)), None)
            request.action = None if rule is None else rule.action
            self._changed.notify_all()
            return (Pass() if rule is None else rule.action), self._released

    def _hold(self, connection: socket.socket, until: Callable[[float], bool]) -> bool:
        """Wait until the event is set (True), or the client has gone or the proxy closes (False)."""
        while not until(_TICK_S):
            if self._closed.is_set() or _gone(connection):
                return False
        return True

    def _track(self, connection: socket.socket, *, present: bool) -> None:
        with self._changed:
            if present:
                self._sockets.add(connection)
            else:
                self._sockets.discard(connection)


def _gone(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Connection)

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet: a broken connection is what this server is for."""


class _Drop(Exception):
    """End the client's connection; `hard` means by RST."""

    def __init__(self, hard: bool = False) -> None:
        super().__init__(hard)
        self.hard = hard


class _Connection(socketserver.BaseRequestHandler):
    """One client connection: its requests in turn, over one connection of its own to the origin."""

    def setup(self) -> None:
        server = self.server
        assert isinstance(server, _Server)
        self.proxy = server.proxy
        self.client: socket.socket = self.request
        self.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader: IO[bytes] = self.client.makefile("rb")
        self.origin = http.client.HTTPConnection(*self.proxy.upstream, timeout=self.proxy.connect_timeout_s)
        self.proxy._track(self.client, present=True)

    def handle(self) -> None:
        hard = False
        try:
            while not self.proxy._closed.is_set() and self._one():
                pass
        except _Drop as drop:
            hard = drop.hard
        except (OSError, http.client.HTTPException):
            pass
        if hard:
            time.sleep(2 * _TICK_S)  # an RST makes the client's kernel drop what the client has not read yet
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def finish(self) -> None:
        self.proxy._track(self.client, present=False)
        self.origin.close()
        self.reader.close()
        self.client.close()  # before socketserver's own shutdown(), which would send a FIN first

    # One request

    def _one(self) -> bool:
        first = self.reader.readline(65537)
        if first in (b"", b"\r\n"):
            return False
        method, target, _ = first.decode("latin-1").split(" ", 2)
        raw: list[tuple[str, str]] = []
        while (line := self.reader.readline(65537)) not in (b"\r\n", b"\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            raw.append((name.strip(), value.strip()))
        headers = {name.lower(): value for name, value in raw}
        if "transfer-encoding" in headers:
            raise _Drop  # no Blob client sends a chunked request
        body = self.reader.read(int(headers.get("content-length", "0")))
        parts = urllib.parse.urlsplit(target)
        request = Request(method, urllib.parse.unquote(parts.path), parts.query, headers, time.monotonic())
        action, released = self.proxy._begin(request)
        try:
            self._act(action, released, request, target, raw, body)
        finally:
            request.finish()
        return headers.get("connection", "").lower() != "close"

    def _act(
        self,
        action: Action,
        released: threading.Event,
        request: Request,
        target: str,
        raw: list[tuple[str, str]],
        body: bytes,
    ) -> None:
        match action:
            case Garbage(data):
                self.client.sendall(data)
                raise _Drop
            case Respond():
                self._respond(action, request)
                return
            case Reset(None):
                raise _Drop(hard=True)
            case Stall(None):
                if not self.proxy._hold(self.client, released.wait):
                    raise _Drop
            case Pass(delay_s) if delay_s:
                self._pause(delay_s)
            case IgnoreRange():
                raw = _without_range(request, target, raw, self.proxy.account_key)
            case _:
                pass
        answer = self._ask(request.method, target, raw, body)
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
        length = _length(answer, request.method)
        self._relay(action, released, request, answer, headers, length)

    def _ask(
        self, method: str, target: str, raw: list[tuple[str, str]], body: bytes
    ) -> http.client.HTTPResponse:
        for attempt in (0, 1):
            try:
                self.origin.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
                for name, value in raw:
                    if name.lower() != "connection":
                        self.origin.putheader(name, value)
                self.origin.endheaders(body or None)
                return self.origin.getresponse()
            except (OSError, http.client.HTTPException):
                self.origin.close()  # an idle connection that the origin has closed: once more on a new one
                if attempt:
                    raise
        raise AssertionError("unreachable")

    def _respond(self, action: Respond, request: Request) -> None:
        headers = dict(action.headers)
        body = action.body
        if action.code:
            headers = {"x-ms-error-code": action.code, "Content-Type": "application/xml", **headers}
            body = (
                body
                or (
                    '<?xml version="1.0" encoding="utf-8"?>'
                    f"<Error><Code>{action.code}</Code><Message>injected</Message></Error>"
                ).encode()
            )
        headers.setdefault("Content-Length", str(len(body)))
        if request.method == "HEAD":
            body = b""
        self._head(request, action.status, list(headers.items()), len(body))
        self._send(request, body)

    def _relay(
        self,
        action: Action,
        released: threading.Event,
        request: Request,
        answer: http.client.HTTPResponse,
        headers: list[tuple[str, str]],
        length: int | None,
    ) -> None:
        pieces: Iterator[bytes] = iter(lambda: answer.read(_PIECE), b"")
        match action:
            case EditHeaders(changes):
                headers = _edited(headers, changes)
            case WrongContentRange(total, shift):
                moved = _moved(answer.getheader("Content-Range"), total, shift)
                headers = _edited(headers, {"Content-Range": moved})
            case ShortBody(short):
                body = answer.read()[:short]
                pieces, length = iter([body]), len(body)
                headers = _edited(headers, {"Content-Length": str(length)})
            case FlipBit(at):
                damaged = bytearray(answer.read())
                damaged[at] ^= 1
                pieces = iter([bytes(damaged)])
            case _:
                pass
        if length is None:  # the origin sent it in chunks
            body = b"".join(pieces)
            pieces, length = iter([body]), len(body)
            headers = _edited(headers, {"Content-Length": str(length)})
        self._head(request, answer.status, headers, length)
        if length == 0:
            answer.read()
        else:
            self._body(action, released, request, pieces)

    def _body(
        self, action: Action, released: threading.Event, request: Request, pieces: Iterator[bytes]
    ) -> None:
        match action:
            case Stall(int(after)):
                body = b"".join(pieces)
                self._send(request, body[:after])
                if not self.proxy._hold(self.client, released.wait):
                    raise _Drop
                self._send(request, body[after:])
            case Reset(int(after)) | Truncate(after):
                self._send(request, b"".join(pieces)[:after])
                raise _Drop(hard=isinstance(action, Reset))
            case Drip(bytes_per_s):
                self._drip(request, b"".join(pieces), bytes_per_s)
            case _:
                for piece in pieces:
                    self._send(request, piece)

    def _drip(self, request: Request, body: bytes, bytes_per_s: float) -> None:
        step = max(1, int(bytes_per_s / 10))
        for start in range(0, len(body), step):
            self._send(request, body[start : start + step])
            self._pause(step / bytes_per_s)

    def _pause(self, duration_s: float) -> None:
        over = time.monotonic() + duration_s
        if not self.proxy._hold(self.client, lambda tick_s: _slept(tick_s, over)):
            raise _Drop

    def _head(self, request: Request, status: int, headers: list[tuple[str, str]], length: int) -> None:
        request.status, request.length = status, length
        if length == 0:
            request.finish()
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, 'Unknown')}"]
        lines += [f"{name}: {value}" for name, value in headers]
        self.client.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))

    def _send(self, request: Request, data: bytes) -> None:
        request.sent += len(data)
        if request.sent >= request.length:
            request.finish()
        self.client.sendall(data)


_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding"})


def _slept(tick_s: float, over: float) -> bool:
    time.sleep(max(0.0, min(tick_s, over - time.monotonic())))
    return time.monotonic() >= over


def _length(answer: http.client.HTTPResponse, method: str) -> int | None:
    if method == "HEAD" or answer.status in (204, 304):
        return 0
    length = answer.getheader("Content-Length")
    return None if length is None else int(length)


def _edited(headers: list[tuple[str, str]], changes: Mapping[str, str | None]) -> list[tuple[str, str]]:
    changed = {name.lower() for name in changes}
    kept = [(name, value) for name, value in headers if name.lower() not in changed]
    return kept + [(name, value) for name, value in changes.items() if value is not None]


def _moved(content_range: str | None, total: int | None, shift: int) -> str | None:
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", content_range or "")
    if found is None:
        return content_range
    start, end, size = (int(part) for part in found.groups())
    return f"bytes {start + shift}-{end + shift}/{size if total is None else total}"


def _without_range(
    request: Request, target: str, raw: list[tuple[str, str]], account_key: str
) -> list[tuple[str, str]]:
    """The request's headers without its range, signed again if they were signed with the account key."""
    kept = [(name, value) for name, value in raw if name.lower() not in ("range", "x-ms-range")]
    scheme, _, rest = request.headers.get("authorization", "").partition(" ")
    if scheme != "SharedKey":
        return kept
    account = rest.partition(":")[0]
    values = {name.lower(): value for name, value in kept}
    own = "".join(f"{name}:{values[name]}\n" for name in sorted(values) if name.startswith("x-ms-"))
    parts = urllib.parse.urlsplit(target)
    resource = f"/{account}{parts.path}"
    query = urllib.parse.parse_qs(parts.query, keep_blank_values=True)
    for name in sorted(query):
        resource += f"\n{name.lower()}:{','.join(sorted(query[name]))}"
    length = values.get("content-length", "")
    standard = [values.get(name, "") for name in ("content-encoding", "content-language")]
    standard.append("" if length == "0" else length)
    standard += [
        values.get(name, "")
        for name in (
            "content-md5", "content-type", "",
            "if-modified-since", "if-match", "if-none-match", "if-unmodified-since",
        )
    ]  # fmt: skip
    if "x-ms-date" not in values:
        standard[5] = values.get("date", "")
    text = "\n".join([request.method, *standard, "", own + resource])
    digest = hmac.new(base64.b64decode(account_key), text.encode(), hashlib.sha256).digest()
    signature = f"SharedKey {account}:{base64.b64encode(digest).decode()}"
    return [(name, signature if name.lower() == "authorization" else value) for name, value in kept]
