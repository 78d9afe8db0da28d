"""What a user writes for a place in storage, parsed: URIs and glob patterns; no I/O.

Forms: a local path or `file://`; `https://ACCOUNT.blob.SUFFIX/CONTAINER/PATH`; `wasb[s]://CONTAINER@HOST/PATH`;
`azureml://datastores/NAME/paths/PATH`; `http[s]://ADDRESS:PORT/ACCOUNT/CONTAINER/PATH` for an emulator or any endpoint
that a datastore names. A path may hold a pattern: `*` and `?` stay within a segment, `[a-z]` is one character of a set
(`[!a-z]` one outside it), and a segment `**` is any number of folders, none included. A literal `*` is `[*]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote

from amlmount.dataset import Datastore, StoreKind, printable
from amlmount.errors import DatastoreNotFound, UriError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
_MAGIC = re.compile(r"[*?\[]")
_IP_OR_LOCAL = re.compile(r"(localhost|\d{1,3}(\.\d{1,3}){3}|\[[0-9A-Fa-f:.]+\])(:\d+)?\Z")
_SECRET = re.compile(r"[?&](sig|sv|se|skoid)=", re.IGNORECASE)

FORMS = "a local path, file://, https://ACCOUNT.blob..., wasbs://, azureml://datastores/NAME/paths/..."


class Location(NamedTuple):
    """A parsed URI: a store, a path or pattern in it, and the datastore whose credential opens it."""

    kind: StoreKind
    url: str
    """As `dataset.Source.url`."""
    path: str
    """Path within the store, without a leading slash for blobs, absolute for local files; may be a pattern."""
    uri: str
    datastore: str = ""

    @property
    def is_pattern(self) -> bool:
        """Whether the path holds a glob character."""
        return bool(_MAGIC.search(self.path))


def looks_like_uri(text: str) -> bool:
    """Whether a REF is a place in storage, rather than a dataset's name."""
    if text.startswith("azureml:") and not text.startswith("azureml://"):
        return False
    return "://" in text or "/" in text or text in (".", "..")


def parse(uri: str, *, cwd: str, datastores: Sequence[Datastore] = ()) -> Location:
    """Parse a URI; a relative local path is taken from `cwd`.

    Raises UriError for a scheme or form not understood and for a URI that carries a secret, DatastoreNotFound for an
    unknown `azureml://datastores/NAME`.
    """
    if not uri or "\0" in uri:
        raise UriError(f"{uri!r} is not a path", hint=FORMS)
    if _SECRET.search(uri):
        raise UriError(
            f"the URI carries a SAS: {uri.partition('?')[0]}?...",
            hint="arguments are visible to all users; amlmount datastore add NAME --credential sas reads it from stdin",
        )
    match = _SCHEME.match(uri)
    if match is None or (not match[2] and "/" in uri.partition(":")[0]):
        return _local(uri, uri, cwd)
    scheme = match[1].lower()
    rest = uri[match.end() :]
    if scheme == "file":
        return _local(uri, unquote(rest if match[2] else uri[5:]), cwd)
    if scheme in ("http", "https"):
        return _http(uri, scheme, rest, datastores)
    if scheme in ("wasb", "wasbs"):
        return _wasb(uri, scheme, rest, datastores)
    if scheme == "azureml" and match[2]:
        return _azureml(uri, rest, datastores)
    raise UriError(f"unknown scheme {scheme!r} in {uri!r}", hint=f"known forms: {FORMS}")


def _local(uri: str, path: str, cwd: str) -> Location:
    if not path.startswith("/"):
        path = f"{cwd.rstrip('/')}/{path}"
    if any("\ud800" <= char <= "\udfff" for char in path):
        raise UriError(f"{printable(path)} is not UTF-8", hint="bind-mount it, or name a folder above it")
    folder = path.endswith(("/", "/."))
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if parts:
                parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return Location("local", "file:///", "/" + "/".join(parts) + ("/" if folder and parts else ""), uri)


def _covering(url: str, path: str, datastores: Sequence[Datastore]) -> str:
    """Return the name of the first datastore of the same container, if there is one."""
    del path
    return next((d.name for d in datastores if d.url().lower() == url.lower()), "")


def _http(uri: str, scheme: str, rest: str, datastores: Sequence[Datastore]) -> Location:
    bare = f"{scheme}://{rest}"
    for store in datastores:
        if bare == store.url() or bare.startswith(store.url() + "/"):
            return Location("blob", store.url(), unquote(bare[len(store.url()) + 1 :]), uri, store.name)
    host, _, path = rest.partition("/")
    if not host or "@" in host:
        raise UriError(
            f"no host in {uri!r}" if not host else f"{uri!r} names a user", hint=f"known forms: {FORMS}"
        )
    account = ""
    if _IP_OR_LOCAL.match(host):
        account, _, path = path.partition("/")
    elif ".blob." not in host.lower():
        raise UriError(
            f"{host} is no Blob endpoint that amlmount knows",
            hint="amlmount datastore add NAME --endpoint URL makes any endpoint known",
        )
    container, _, path = path.partition("/")
    if not container or (not account and _IP_OR_LOCAL.match(host)):
        raise UriError(
            f"no container in {uri!r}", hint="https://ACCOUNT.blob.core.windows.net/CONTAINER/PREFIX"
        )
    url = f"{scheme}://{host}/{account}/{container}" if account else f"{scheme}://{host.lower()}/{container}"
    return Location("blob", url, unquote(path), uri, _covering(url, path, datastores))


def _wasb(uri: str, scheme: str, rest: str, datastores: Sequence[Datastore]) -> Location:
    authority, _, path = rest.partition("/")
    container, at, host = authority.partition("@")
    if not at or not container or not host:
        raise UriError(
            f"no CONTAINER@ACCOUNT in {uri!r}", hint="wasbs://CONTAINER@ACCOUNT.blob.core.windows.net/PREFIX"
        )
    if "." not in host:
        host += ".blob.core.windows.net"
    url = f"{'https' if scheme == 'wasbs' else 'http'}://{host.lower()}/{container}"
    return Location("blob", url, path, uri, _covering(url, path, datastores))


def _azureml(uri: str, rest: str, datastores: Sequence[Datastore]) -> Location:
    match = re.match(r"datastores/([^/]+)(?:/paths(?:/(.*))?)?\Z", rest, re.DOTALL)
    if match is None:
        raise UriError(
            f"{uri!r} is no form that amlmount knows", hint="azureml://datastores/NAME/paths/PREFIX"
        )
    for store in datastores:
        if store.name == match[1]:
            return Location("blob", store.url(), match[2] or "", uri, store.name)
    raise DatastoreNotFound(f"no datastore {match[1]!r}")


def pattern_base(pattern: str) -> str:
    """Return the part of a pattern up to and with the last '/' before its first glob character."""
    match = _MAGIC.search(pattern)
    head = pattern if match is None else pattern[: match.start()]
    return head[: head.rfind("/") + 1]


def literal_prefix(pattern: str) -> str:
    """Return the part of a pattern before its first glob character: what a listing can be narrowed to."""
    match = _MAGIC.search(pattern)
    return pattern if match is None else pattern[: match.start()]


def _set(body: str) -> str:
    """Return the characters and ranges between the brackets of a set as a regular expression wants them."""
    out: list[str] = []
    i = 0
    while i < len(body):
        is_range = body[i + 1 : i + 2] == "-" and i + 2 < len(body)
        out.append(f"{re.escape(body[i])}-{re.escape(body[i + 2])}" if is_range else re.escape(body[i]))
        i += 3 if is_range else 1
    return "".join(out)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a glob pattern to a regular expression for `fullmatch` on whole paths.

    Raises UriError for a set that is never closed.
    """
    out: list[str] = []
    i, n = 0, len(pattern)
    while i < n:
        at_segment = i == 0 or pattern[i - 1] == "/"
        char = pattern[i]
        if char == "*" and at_segment and pattern.startswith("**", i) and pattern[i + 2 : i + 3] in ("", "/"):
            if i + 2 == n:
                out.append(".*")
                i += 2
            else:
                out.append("(?:[^/]*/)*")
                i += 3
        elif char == "*":
            while i < n and pattern[i] == "*":
                i += 1
            out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
            i += 1
        elif char == "[":
            end = pattern.find("]", i + 2 + pattern.startswith("[!", i))
            if end < 0:
                raise UriError(f"'[' is never closed in {pattern!r}", hint="a literal '[' is '[[]'")
            body = pattern[i + 1 : end]
            negate = body.startswith("!")
            out.append(f"(?!/)[{'^' if negate else ''}{_set(body.removeprefix('!'))}]")
            i = end + 1
        else:
            out.append(re.escape(char))
            i += 1
    try:
        return re.compile("".join(out), re.DOTALL)
    except re.error as error:
        raise UriError(f"{pattern!r} is no pattern: {error}") from error
