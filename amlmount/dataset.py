"""The records that everything else speaks in: references, datastores, sources, entries; no I/O.

Records that are stored or sent (`Datastore`, `Source`, `DatasetVersion`, `MountSpec`) are msgspec structs: their
JSON is their wire form. None of them ever holds a secret.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import msgspec

from amlmount.errors import UsageError

CredentialKind = Literal["key", "sas", "anonymous", "default"]
StoreKind = Literal["local", "blob"]

LATEST = "latest"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}\Z")


def check_name(name: str, what: str) -> str:
    """Return `name` if it can name a dataset or a datastore, else raise UsageError; `what` says which."""
    if not _NAME.match(name):
        raise UsageError(
            f"{name!r} is no {what} name",
            hint="letters, digits, '_', '-' and '.', beginning with a letter or digit",
        )
    return name


class DatasetRef(NamedTuple):
    """A dataset by name: one version, or the newest where `version` is None."""

    name: str
    version: int | None

    def __str__(self) -> str:
        return f"{self.name}@{LATEST}" if self.version is None else f"{self.name}:{self.version}"

    @classmethod
    def parse(cls, text: str) -> DatasetRef:
        """Parse `weather`, `weather:2`, `weather@latest`, each also behind `azureml:`; raise UsageError."""
        body = text.removeprefix("azureml:")
        name, at, label = body.partition("@")
        if at:
            if label != LATEST:
                raise UsageError(
                    f"unknown label {label!r} in {text!r}", hint=f"the label there is: @{LATEST}"
                )
            return cls(check_name(name, "dataset"), None)
        name, colon, version = body.partition(":")
        check_name(name, "dataset")
        if not colon:
            return cls(name, None)
        if not version.isascii() or not version.isdigit() or int(version) < 1:
            raise UsageError(f"{version!r} is no version in {text!r}", hint="versions are 1, 2, 3, ...")
        return cls(name, int(version))


class Datastore(msgspec.Struct, frozen=True, kw_only=True):
    """A named place in storage, and how to be let in there (the secret itself is kept apart)."""

    name: str
    kind: StoreKind = "blob"
    account: str
    container: str
    endpoint: str = ""
    """Base URL of the account's blob service, where it is not https://ACCOUNT.blob.core.windows.net."""
    credential: CredentialKind = "default"

    def url(self) -> str:
        """Return the URL of the container."""
        endpoint = self.endpoint.rstrip("/") or f"https://{self.account}.blob.core.windows.net"
        return f"{endpoint}/{self.container}"


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where a part of a tree comes from: a store, and the name prefix that paths in the tree are relative to."""

    kind: StoreKind
    url: str
    """The store: `file:///`, or a container's URL without query and trailing slash."""
    base: str
    """An object's name is `base` + its path in the tree; ends in '/' where not empty."""
    uri: str = ""
    """What the user wrote."""
    datastore: str = ""
    """The datastore whose credential opens it; empty for the environment's."""


class ObjectId(NamedTuple):
    """One pinned version of an object in a store."""

    path: str
    """The object's name in its store (for a local file its absolute path)."""
    tag: str
    """ETag without quotes; for a local file `mtime_ns-size`."""
    size: int
    """Bytes."""
    version: str = ""


class ListedObject(NamedTuple):
    """What a store's listing says of one object or directory."""

    path: str
    """The object's name in its store; str with surrogate escapes where a local name is not UTF-8."""
    size: int
    mtime_ns: int
    tag: str
    md5: str = ""
    """Lower-case hexadecimal, or empty where the store lists none."""
    is_dir: bool = False


class ManifestEntry(NamedTuple):
    """One file or kept directory of a frozen dataset."""

    path: bytes
    """Path in the tree, UTF-8 (a local name that is not UTF-8: its bytes), no leading slash."""
    size: int
    mtime_ns: int
    tag: str
    md5: str
    source: int
    """Index into the manifest's sources."""
    is_dir: bool = False


class ManifestInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a manifest says of itself."""

    digest: str
    """64 hexadecimal digits over the sorted entries; see `manifest`."""
    files: int
    directories: int
    bytes: int
    rejected: int
    """Names that the store holds and a file system cannot, or that a directory shadows."""
    sources: tuple[Source, ...]
    created_ns: int


class DatasetVersion(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the registry: a name and number for a manifest."""

    name: str
    version: int
    digest: str
    manifest: str
    """File name of the manifest in the registry's manifest folder."""
    created_ns: int
    files: int
    bytes: int
    description: str = ""
    tags: dict[str, str] = {}
    paths: tuple[str, ...] = ()

    def ref(self) -> str:
        """Return NAME:VERSION."""
        return f"{self.name}:{self.version}"


class MountSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one mount session needs to start, as one JSON document."""

    ref: str
    """What was asked for, resolved: NAME:VERSION, or the URI."""
    path: str
    """Absolute path of the mount point."""
    manifest: str
    """Absolute path of the manifest file."""
    digest: str
    uid: int
    gid: int
    umask: int = 0o022
    allow_other: bool = False
    nonempty: bool = False


def utf8(name: str) -> bytes:
    """Return a name's bytes, as a file system wants them."""
    return name.encode("utf-8", "surrogateescape")


def text(name: bytes) -> str:
    """Return a name's text; the inverse of `utf8`."""
    return name.decode("utf-8", "surrogateescape")


def printable(name: str | bytes) -> str:
    """Return a name fit for one line of a log or terminal: control and undecodable bytes are escaped."""
    if isinstance(name, bytes):
        name = text(name)
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)
